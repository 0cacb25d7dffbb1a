"""`python -m tests.client.serving.soak`: many requests from several clients in a row, all of them checked.

Every answer must be the one that the same release gives to the same picture alone, in another process; the
front and its worker may not grow. `--kill N` kills the worker N times on the way. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PICTURES, TOKENS = 64, 8


@dataclass
class Tally:
    """What the clients saw."""

    requests: int = 0
    answered: int = 0
    wrong: int = 0
    failed: dict[str, int] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kill", type=int, default=0)
    told = parser.parse_args(arguments)
    figures = soak(requests=told.requests, clients=told.clients, kills=told.kill)
    print(json.dumps(figures, indent=2))
    return 0 if not figures["wrong"] and not figures["failed"] else 1


def soak(*, requests: int, clients: int, kills: int = 0) -> dict[str, Any]:
    """Ask `requests` times; memory in MB after a tenth of the requests and at the end."""
    from tests.client.serving.hosting import hosted, png

    pictures = [png(seed) for seed in range(PICTURES)]
    expected = _alone(pictures)
    tally, lock = Tally(requests=requests), threading.Lock()
    memory: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, hosted(Path(folder)) as host:
        host.service._keep_drafts = False
        numbers = iter(range(requests))
        every = max(1, requests // 10)
        killing = {requests * (turn + 1) // (kills + 1) for turn in range(kills)}

        def client() -> None:
            import httpx

            with httpx.Client(base_url=host.url, headers=host.headers, timeout=600) as session:
                while True:
                    with lock:
                        number = next(numbers, None)
                        if number is None:
                            return
                        if number % every == 0:
                            memory.append(_memory(host.service.engine.pid) | {"after": number})
                            print(f"{number}/{requests}", file=sys.stderr, flush=True)
                        if number in killing and host.service.engine.pid:
                            os.kill(host.service.engine.pid, signal.SIGKILL)
                    chosen = (number * 7 + number // PICTURES) % PICTURES
                    answer = session.post(
                        f"/v1/report?indication=Cough.&max_new_tokens={TOKENS}", content=pictures[chosen]
                    )
                    with lock:
                        _count(tally, answer, expected[chosen])

        started, cpu = time.monotonic(), time.process_time()
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        memory.append(_memory(host.service.engine.pid) | {"after": requests})
        records = sum(1 for _ in host.service._access.records())
        restarts = host.service.engine.restarts
    settled = [one for one in memory if one["after"] >= requests // 5] or memory
    return asdict(tally) | {
        "clients": clients,
        "logged": records,
        "restarts": restarts,
        "distinct_answers": len(set(expected)),
        "seconds": round(time.monotonic() - started, 1),
        "front_and_clients_cpu_s": round(time.process_time() - cpu, 1),
        "front_mb_settled": settled[0]["front"],
        "front_mb_end": memory[-1]["front"],
        "worker_mb_settled": settled[0]["worker"],
        "worker_mb_end": memory[-1]["worker"],
    }


def _alone(pictures: list[bytes]) -> list[tuple[int, ...]]:
    """The release's answers, one at a time, without a server."""
    from client.serving.engine import Ask
    from client.serving.picture import prepared, read_picture
    from client.serving.source import load_source
    from common.model.images import read_processor
    from tests.client.serving.models import PLAN, decoder, talkative_base, talkative_source
    from tests.client.serving.test_decoding import drain

    model, words, _ = load_source(talkative_source(), PLAN)
    engine = decoder(model, words, max_batch=1, prefix_bytes=0, default_tokens=TOKENS)
    processor = read_processor(talkative_base())
    for number, data in enumerate(pictures):
        engine.submit(number, Ask(str(number), prepared(read_picture(data), processor), "Cough."))
    results = drain(engine)
    return [results[number].token_ids for number in range(len(pictures))]


def _count(tally: Tally, answer: Any, expected: tuple[int, ...]) -> None:
    if answer.status_code != 200:
        code = str(answer.json()["error"]["code"])
        tally.failed[code] = tally.failed.get(code, 0) + 1
        return
    tally.answered += 1
    tally.wrong += tuple(answer.json()["token_ids"]) != expected


def _memory(worker: int | None) -> dict[str, float]:
    return {"front": _resident(os.getpid()), "worker": _resident(worker) if worker else 0.0}


def _resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    raise SystemExit(main())
