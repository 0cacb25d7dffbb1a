"""Which versions of FedRad can work together: the rule, as pure functions, and its named refusal.

A program speaks the protocol versions `oldest` to `newest`; a release speaks its own version and the one
before, so that server and sites can be upgraded one at a time, between rounds. At each hello both sides say
what they speak, and until the next hello the server's messages to that site are in the newest version that
both know; an answer is in the version of its request. Where there is none, the refusal names the side to
upgrade. The release's number (`software`) is shown to people and decides nothing.

Guarantees: `agree` is symmetric, so both sides come to the same version or the same refusal by themselves.
A hello itself has the same form in every release (`protocol.HELLO_VERSION`), so that any two can read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from common.errors import EnvelopeMalformed, VersionsTooFarApart
from common.protocol import OLDEST, VERSION

_SOFTWARE = re.compile(r"[A-Za-z0-9.+-]{1,64}")


@dataclass(frozen=True)
class Speaks:
    """The protocol versions that a program speaks, and the release's number for people."""

    oldest: int
    newest: int
    software: str

    @property
    def versions(self) -> range:
        return range(self.oldest, self.newest + 1)


def this_release(software: str) -> Speaks:
    """What this release speaks."""
    return Speaks(OLDEST, VERSION, software)


def running_release() -> Speaks:
    """What the installed distribution speaks."""
    try:
        return this_release(version("fedrad"))
    except PackageNotFoundError:
        return this_release("0-source")


def agree(server: Speaks, site: Speaks) -> int:
    """Return the newest protocol version that both speak; raises VersionsTooFarApart."""
    newest = min(server.newest, site.newest)
    if newest < max(server.oldest, site.oldest):
        behind, who = (site, "the site") if site.newest < server.oldest else (server, "the server")
        ahead = server if behind is site else site
        raise VersionsTooFarApart(
            f"expected a protocol version that both sides speak, got {_span(server)} of the server "
            f"(release {server.software}) and {_span(site)} of the site (release {site.software}); upgrade "
            f"{who} to a release that speaks version {ahead.oldest} or later"
        )
    return newest


def format_speaks(speaks: Speaks) -> dict[str, Any]:
    """The fields of a hello; `parse_speaks(format_speaks(s)) == s`."""
    return {"oldest": speaks.oldest, "newest": speaks.newest, "software": speaks.software}


def parse_speaks(value: Any) -> Speaks:
    """Parse what a peer says it speaks; raises EnvelopeMalformed."""
    if not isinstance(value, dict) or set(value) != {"oldest", "newest", "software"}:
        raise EnvelopeMalformed("hello: expected oldest, newest and software")
    oldest, newest, software = value["oldest"], value["newest"], value["software"]
    if type(oldest) is not int or type(newest) is not int or not 1 <= oldest <= newest <= 1 << 20:
        raise EnvelopeMalformed("hello: expected oldest and newest protocol version, in order")
    if not isinstance(software, str) or not _SOFTWARE.fullmatch(software):
        raise EnvelopeMalformed("hello software: expected a release's number")
    return Speaks(oldest, newest, software)


def _span(speaks: Speaks) -> str:
    return str(speaks.newest) if speaks.oldest == speaks.newest else f"{speaks.oldest} to {speaks.newest}"
