"""Flower's SuperNode, started by module so that it runs under the very Python of FedRad."""

from __future__ import annotations

import sys


def main() -> None:
    """Become `flower-supernode` with the same arguments."""
    from flwr.supernode.cli import flower_supernode

    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
