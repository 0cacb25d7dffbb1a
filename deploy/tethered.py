"""Start a program that ends with its parent: `python -I -S tethered.py PARENT_PID PROGRAM ARGUMENTS…`.

For programs that wipe their environment, such as nginx, so that `deploy.local.guardian` cannot find them. The
kernel sends SIGTERM when the parent dies, whatever it dies of (Linux: prctl PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent and become the program."""
    parent = int(sys.argv[1])
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        sys.exit("expected the kernel to tie this process to its parent, got an error")
    if os.getppid() != parent:
        sys.exit("the parent has ended already")
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606


if __name__ == "__main__":
    main()
