"""Flower's SuperLink with one setting that it has no option for: how far a site's clock may be ahead.

Flower takes a node's signed timestamp when it is at most 300 s old, but only 5 s ahead of the server. Here it
may be ahead by the consortium's tolerance: `python -m deploy.server.superlink SECONDS ARGUMENTS…`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Set the tolerance and become `flower-superlink`."""
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.routers.fleet import node_auth

    tolerance_s = float(sys.argv[1])
    node_auth.SYSTEM_TIME_TOLERANCE = tolerance_s
    sys.argv = ["flower-superlink", *sys.argv[2:]]
    flower_superlink()


if __name__ == "__main__":
    main()
