"""The server itself as `fedrad-server up` last wrote it down (`status.json`): sites, connections, warnings.

Read while `up` may be running; nothing is locked or changed. Whether a site is connected is known only while
`up` runs, which its lock tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.status import is_held, read_json

STATUS_NAME = "status.json"
LOCK_NAME = "state/supervisor.lock"


@dataclass(frozen=True)
class SiteConnection:
    """One enrolled site; `online` is None where nobody can tell, `certificate_until_s` 0 without one."""

    site: str
    state: str
    online: bool | None
    certificate_until_s: int


@dataclass(frozen=True)
class ServerView:
    """What `up` says: `running` is None where the system does not tell whether its lock is held."""

    consortium: str
    address: str
    running: bool | None
    sites: tuple[SiteConnection, ...]
    warnings: dict[str, str]


def read_server(directory: Path) -> ServerView | None:
    """Read a server's directory; None where `up` never ran in it, or its file is of another form."""
    try:
        return server_view(read_json(directory / STATUS_NAME), running=is_held(directory / LOCK_NAME))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def server_view(value: Any, *, running: bool | None) -> ServerView:
    """Make the view of what `up` wrote; pure."""
    sites = tuple(
        SiteConnection(
            str(name),
            str(site["state"]),
            bool(site["online"]) if running and site["state"] == "approved" else None,
            int(site["certificate_until_s"]),
        )
        for name, site in sorted(value["sites"].items())
    )
    warnings = {str(name): str(text) for name, text in sorted(value["warnings"].items())}
    return ServerView(str(value["consortium"]), str(value["address"]), running, sites, warnings)
