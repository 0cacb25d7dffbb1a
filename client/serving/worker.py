"""`python -m client.serving.worker FD`: one engine in a process of its own, spoken to over a socket.

The front sends `load` once, then `submit`, `vector`, `attention`, `cancel`; the worker answers `ready`, then
`tokens`, `result`, `array` or `error`. It ends when the socket does, so no worker outlives its front. A
question's words are in no message of its own but the answer, and on no log.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from client.serving.engine import Ask, Options, Result, Token
from client.serving.frames import Message, format_frame, read_frame
from common.errors import FedRadError

if TYPE_CHECKING:
    from client.serving.decoding import BatchDecoder


def main() -> int:
    """Serve one front over the inherited socket until it closes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        first = read_frame(connection)
        if first is None:
            return 0
        try:
            engine, ready = _load(first[0])
        except FedRadError as error:
            connection.sendall(format_frame({"op": "failed", "code": error.code, "message": str(error)}))
            return 1
        connection.sendall(format_frame({"op": "ready"} | ready))
        inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
        return _serve(engine, connection, inbox)


def _listen(connection: socket.socket, inbox: queue.SimpleQueue[Message | None]) -> None:
    try:
        while (message := read_frame(connection)) is not None:
            inbox.put(message)
    finally:
        inbox.put(None)


def _load(settings: dict[str, Any]) -> tuple[BatchDecoder, dict[str, Any]]:
    import torch

    from client.serving.plan import EnginePlan
    from client.serving.source import open_decoder, parse_source

    torch.set_num_threads(settings["threads"])
    source, plan = parse_source(settings["source"]), EnginePlan(**settings["plan"])
    started = time.monotonic()
    engine = open_decoder(source, plan, threads=settings["threads"])
    return engine, {"model": asdict(engine.version), "load_s": round(time.monotonic() - started, 3)}


def _serve(engine: BatchDecoder, connection: socket.socket, inbox: queue.SimpleQueue[Message | None]) -> int:
    """Take what came, step, send; block only when there is nothing to write."""
    while True:
        try:
            while True:
                message = inbox.get(block=engine.idle)
                if message is None:
                    return 0
                reply = _take(engine, *message)
                if reply is not None:
                    connection.sendall(reply)
        except queue.Empty:
            pass
        try:
            connection.sendall(_events(engine))
        except OSError:
            return 0


def _take(engine: BatchDecoder, head: dict[str, Any], body: bytes) -> bytes | None:
    number = head["id"]
    if head["op"] == "cancel":
        engine.cancel(number)
        return None
    try:
        question = parse_ask(head, body)
        if head["op"] == "submit":
            engine.submit(number, question)
            return None
        if head["op"] == "vector":
            array = engine.image_vector(question)
        else:
            array = engine.attention(question, tuple(head["tokens"]))
    except FedRadError as error:
        return format_frame({"op": "error", "id": number, "code": error.code, "message": str(error)})
    return format_frame({"op": "array", "id": number, "shape": list(array.shape)}, array.tobytes())


def _events(engine: BatchDecoder) -> bytes:
    tokens, rest = [], b""
    for number, event in engine.step():
        if isinstance(event, Token):
            tokens.append([number, event.text, event.token_id, event.logprob])
        elif isinstance(event, Result):
            rest += format_frame({"op": "result", "id": number, "result": format_result(event)})
        else:
            rest += format_frame({"op": "error", "id": number, "code": event.code, "message": str(event)})
    return (format_frame({"op": "tokens", "items": tokens}) if tokens else b"") + rest


def format_ask(op: str, number: int, ask: Ask, **more: Any) -> bytes:
    """Encode a question for the worker."""
    head = {
        "op": op,
        "id": number,
        "picture": ask.picture_key,
        "shape": list(ask.pixels.shape),
        "indication": ask.indication,
        "options": asdict(ask.options),
        "written": list(ask.written),
    }
    return format_frame(head | more, ask.pixels.tobytes())


def parse_ask(head: dict[str, Any], body: bytes) -> Ask:
    """Decode a question."""
    import numpy as np

    pixels = np.frombuffer(body, np.float32).reshape(head["shape"]).copy()
    options = Options(**head["options"])
    return Ask(head["picture"], pixels, head["indication"], options, tuple(head["written"]))


def format_result(result: Result) -> dict[str, Any]:
    """Encode a result without the model's version, which the front knows."""
    value = asdict(result)
    del value["model"]
    return value


if __name__ == "__main__":
    raise SystemExit(main())
