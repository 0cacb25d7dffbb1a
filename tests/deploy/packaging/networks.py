"""Network namespaces of this machine, joined by pairs of virtual cables, for tests that run as root.

A namespace lives as long as the process that holds it; its cables go with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

TOOLS = all(map(shutil.which, ("ip", "nsenter", "setpriv", "unshare")))
_ATTEMPT = """
import errno, socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as end:
        print(end.recv(100).decode())
except OSError as error:
    print(errno.errorcode.get(error.errno or 0, type(error).__name__))
"""


def may_make_networks() -> bool:
    """Whether this process may make a network namespace and cables, and has the tools."""
    return (
        TOOLS and os.geteuid() == 0 and _works("ip link set lo up; ip link add fr0 type veth peer name fr1")
    )


def may_filter() -> bool:
    """Whether this kernel's packet filter may be set in such a namespace, and knows users."""
    rules = "add table inet t; add chain inet t c { type filter hook output priority 0; }; "
    rules += "add rule inet t c meta skuid 1 reject"
    return may_make_networks() and shutil.which("nft") is not None and _works(f"nft '{rules}'")


def _works(script: str) -> bool:
    done = subprocess.run(["unshare", "--net", "sh", "-c", script], check=False, capture_output=True)
    return done.returncode == 0


@contextlib.contextmanager
def network() -> Iterator[int]:
    """Hold a network namespace with a loopback of its own; yields the process that holds it."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        end = time.monotonic() + 20
        while _namespace(holder.pid) == _namespace(os.getpid()):
            if time.monotonic() > end:
                raise TimeoutError("expected a network namespace, got none")
            time.sleep(0.01)
        call(inside(holder.pid, "ip", "link", "set", "lo", "up"))
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def join(one: int | None, other: int, *, addresses: tuple[str, str]) -> None:
    """Lay a cable between two namespaces, None for this machine's own, with an IPv4 address at each end."""
    ends = (f"fr{other}a", f"fr{other}b")
    call(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", str(other)])
    if one is not None:
        call(["ip", "link", "set", ends[0], "netns", str(one)])
    for pid, end, address in ((one, ends[0], addresses[0]), (other, ends[1], addresses[1])):
        call(inside(pid, "ip", "address", "add", f"{address}/30", "dev", end))
        call(inside(pid, "ip", "link", "set", end, "up"))


def inside(pid: int | None, *command: str, user: int | None = None) -> list[str]:
    """Return the command to run in a namespace, as a user without rights where one is given."""
    who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"] if user else []
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net"] if pid is not None else []
    return [*enter, *who, *command]


def attempt(pid: int | None, host: str, port: int, *, user: int | None = None) -> str:
    """Connect and return what was heard, or the error's name."""
    command = inside(pid, "/usr/bin/python3", "-I", "-c", _ATTEMPT, host, str(port), user=user)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@contextlib.contextmanager
def greeter(pid: int | None, host: str) -> Iterator[int]:
    """Listen at an address in a namespace and say `hello` to whoever connects; yields the port."""
    program = (
        "import socket, sys\n"
        "with socket.create_server((sys.argv[1], 0)) as server:\n"
        "    print(server.getsockname()[1], flush=True)\n"
        "    while True:\n"
        "        end, _ = server.accept()\n"
        "        end.sendall(b'hello')\n"
        "        end.close()\n"
    )
    with subprocess.Popen(
        inside(pid, sys.executable, "-c", program, host), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def call(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""
