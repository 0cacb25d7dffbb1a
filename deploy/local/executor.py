"""A SuperExec for ClientApp tasks that forks instead of starting a new Python for every message.

Flower's `flower-superexec` starts `flwr-clientapp` anew per message, about two CPU-seconds of imports. Here a
nursery process does the imports once and forks; the child runs Flower's own `run_clientapp` for one message
and ends, so a message still has a process of its own.

With `--app client.app:app` that app serves every message, whatever bundle the server names: no code that the
server sent is unpacked or run.

Guarantees: the nursery and its children never hold the SuperExec secret, which is read after the nursery
has been forked off; a child gets the token of its one task. It serves no other kind of task.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


def main() -> None:
    """Serve ClientApp tasks of one SuperNode until killed."""
    parser = argparse.ArgumentParser(description="Serve the ClientApp tasks of one SuperNode by forking.")
    parser.add_argument("--runtime-api-address", required=True, metavar="HOST:PORT")
    parser.add_argument("--root-certificates", required=True, type=Path, metavar="PEM")
    parser.add_argument("--superexec-auth-secret-file", required=True, type=Path, metavar="FILE")
    parser.add_argument(
        "--poll-s", required=True, type=float, help="seconds between two questions for a task"
    )
    parser.add_argument(
        "--preload", action="append", default=[], metavar="MODULE", help="import before forking"
    )
    parser.add_argument("--app", metavar="MODULE:NAME", help="the only ClientApp that may run")
    arguments = parser.parse_args()
    for module in arguments.preload:
        importlib.import_module(module)
    if arguments.app:
        _pin_app(arguments.app)
    authority = arguments.root_certificates.read_bytes()
    nursery, tokens = _start_nursery(arguments.runtime_api_address, authority)
    _serve(
        arguments.runtime_api_address,
        authority,
        secret=arguments.superexec_auth_secret_file.read_bytes(),
        poll_s=arguments.poll_s,
        nursery=nursery,
        tokens=tokens,
    )


def _serve(
    address: str, authority: bytes, *, secret: bytes, poll_s: float, nursery: int, tokens: int
) -> NoReturn:
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=authority,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE})),
        ],
    )
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    while os.waitpid(nursery, os.WNOHANG) == (0, 0):
        try:
            response = client.AcquireTask(request)
        except httpx.TransportError:
            pass  # the SuperNode is not there yet, or not any more
        except httpx.HTTPStatusError as refusal:
            if not refusal.response.is_server_error:
                raise
        else:
            if response.HasField("task") and response.token:
                os.write(tokens, response.token.encode("ascii") + b"\n")
        time.sleep(poll_s)
    sys.exit("the process that forks ClientApps has ended")


def _pin_app(reference: str) -> None:
    """Make Flower load the installed app for every bundle, and unpack none."""
    from flwr.supernode.runtime import run_clientapp as runner

    module, _, name = reference.partition(":")
    app = getattr(importlib.import_module(module), name)
    runner.install_from_fab = lambda *_, **__: None
    runner.get_load_client_app_fn = lambda *_, **__: lambda *_: app


def _start_nursery(address: str, authority: bytes) -> tuple[int, int]:
    """Fork the nursery; return its pid and the file descriptor that takes one token per line."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid:
        os.close(receiving)
        return pid, sending
    os.close(sending)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with os.fdopen(receiving, encoding="ascii") as lines:
        for line in lines:
            if os.fork() == 0:
                _run_task(address, line.strip(), authority)
    os._exit(0)


def _run_task(address: str, token: str, authority: bytes) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run_clientapp(
            runtime_api_address=address,
            token=token,
            insecure=False,
            certificates=authority,
            parent_pid=os.getppid(),
        )
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
