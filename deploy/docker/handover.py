"""Between a site's two users in two containers: what the relay needs, handed over, and followed.

    give    the site's user, in the relay's group: node key and gateway authority into the relay's folder
    watch   the relay's user: runs a command, and starts it again when one of the two files has changed

Nobody is root and no capability is needed: the site's user is a member of the relay's group and may give it
its own files (mode 0640, in a folder of mode 2770). It is what `fedrad-site up --relay-user` does as root.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from common.files import write_atomic

NAMES = ("node.key", "gateway-ca.pem")
_TICK_S = 1.0
_END_S = 20.0


def give(sources: dict[str, Path], relay: Path, *, group: int) -> bool:
    """Write what has changed into the relay's folder, readable by its group; tell whether anything had."""
    changed = False
    for name in NAMES:
        if not sources[name].is_file():
            continue
        data, target = sources[name].read_bytes(), relay / name
        if not target.is_file() or target.read_bytes() != data:
            write_atomic(target, data, mode=0o640)
            os.chown(target, -1, group)
            target.chmod(0o640)
            changed = True
    return changed


def state_of(relay: Path) -> str:
    """Name the two files' content, empty while one is missing."""
    digest = hashlib.sha256()
    for name in NAMES:
        try:
            digest.update(hashlib.sha256((relay / name).read_bytes()).digest())
        except OSError:
            return ""
    return digest.hexdigest()


def watch(relay: Path, command: Sequence[str], *, stop: threading.Event) -> int:
    """Run a command once the files are there, again whenever they change; return its exit code."""
    while not stop.is_set():
        before = state_of(relay)
        if not before:
            stop.wait(_TICK_S)
            continue
        process = subprocess.Popen(command)
        while process.poll() is None and not stop.wait(_TICK_S) and state_of(relay) in (before, ""):
            pass
        if process.poll() is not None:
            return process.returncode
        _end(process)
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _sources(home: Path) -> dict[str, Path]:
    from client.enrolment import node_key_path
    from client.home import open_home

    opened = open_home(home)
    return {"node.key": node_key_path(opened), "gateway-ca.pem": home / "run" / "gateway" / "ca.crt"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--relay-dir", type=Path, required=True, help="the relay's folder")
    parser.add_argument("--home", type=Path, help="give: the site's directory")
    parser.add_argument("--group", type=int, help="give: the number of the relay's group")
    parser.add_argument("command", nargs="*", help="watch: what to run, after --")
    given = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if given.command:
        return watch(given.relay_dir, given.command, stop=stop)
    if given.home is None or given.group is None:
        parser.error("expected --home and --group, or a command after --")
    sources: dict[str, Path] | None = None
    while not stop.is_set():
        if sources is None and (given.home / "enrolment.json").is_file():
            sources = _sources(given.home)
        if sources is not None and give(sources, given.relay_dir, group=given.group):
            print("handed over", file=sys.stderr, flush=True)
        stop.wait(_TICK_S)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
