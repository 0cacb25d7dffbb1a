"""What an enrolled site may ask the server besides Flower: renewal, its studies, to take an approval.

One HTTP call on loopback, `POST /fedrad/v1/site`, behind the consortium's proxy. Guarantees: a request counts
only with the signature of the site's registered message key and a time within an hour of the server's; a
revoked site is refused; an answer says the server's time, so that a site can tell how far its clock is off,
and with each study whether the site's approval is held, so that a site can send what was lost. A replayed
request gives its replayer nothing: a certificate without its key, a public manifest, or a decision that the
site's own, later one overrules (server/submission.py). A site asks no oftener than its own rate, which counts
once its signature has; an address, as the door names it, no oftener than a far higher one, since behind a
load balancer all sites may be one address.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from common.certificates import Authority
from common.enrolment import (
    MAX_REQUEST_BYTES,
    Ask,
    SiteRequest,
    format_bundle,
    parse_site_request,
    verify_site_request,
)
from common.errors import ClockSkewed, EnrolmentInvalid, FedRadError, ListenAddressInvalid, TooFrequent
from common.pace import Pace
from deploy.proxy.render import (
    ADDRESS_BURST,
    ADDRESS_PER_MINUTE,
    API_BURST,
    API_PER_MINUTE,
    CLIENT_HEADER,
)
from server.consortium import ServerHome
from server.enrolment import approved_site, renew
from server.submission import offered_studies, record_approval, withdraw_approval

log = logging.getLogger("fedrad.up")

PATH = "/fedrad/v1/site"
MAX_SKEW_S = 3600.0
_TIMEOUT_S = 20.0

Answer = dict[str, Any]


def answer_request(
    home: ServerHome,
    authority: Authority,
    data: bytes,
    *,
    now: datetime,
    admit: Callable[[str], None] = lambda site: None,
) -> Answer:
    """Check one signed request and answer it; raises the named refusal.

    `admit` is called with the site's name once its signature has counted, and may refuse.
    """
    signed = parse_site_request(data)
    asked = signed.request
    site = approved_site(home, asked.site)
    verify_site_request(signed, message_key=site.message_key)
    admit(asked.site)
    skew_s = asked.time_s - now.timestamp()
    if abs(skew_s) > MAX_SKEW_S:
        raise ClockSkewed(
            f"site {asked.site}: expected a clock within {MAX_SKEW_S:g} s of the server's, got one that is "
            f"{abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
        )
    log.info(
        "%s asks: %s", asked.site, asked.ask.value, extra={"site": asked.site, "reason": asked.ask.value}
    )
    if asked.ask is Ask.RENEW:
        bundle = renew(home, authority, asked.site, asked.argument, now=now)
        return {"bundle": format_bundle(bundle).decode()}
    if asked.ask is Ask.STUDIES:
        return {
            "studies": [
                {
                    "manifest": one.manifest.decode(),
                    "signature": one.signature.hex(),
                    "approved": one.approved,
                }
                for one in offered_studies(home, asked.site)
            ]
        }
    return _take_approval(home, asked)


def _take_approval(home: ServerHome, asked: SiteRequest) -> Answer:
    """Take in a decision; a site of an earlier release does not say when: that counts as of its request."""
    form = re.fullmatch(r"([0-9a-f]{64}) (-|[0-9a-f]{128})(?: ([0-9]{1,12}))?", asked.argument)
    if form is None:
        raise EnrolmentInvalid(
            "approval: expected a study's hash, a signature or a hyphen to withdraw, and when it was decided"
        )
    study, signature, time_s = form.groups()
    decided_s = min(int(time_s or asked.time_s), asked.time_s + int(MAX_SKEW_S))
    if signature == "-":
        withdraw_approval(home, study, asked.site, decided_s=decided_s)
        return {"approved": False}
    submitted = record_approval(home, study, asked.site, bytes.fromhex(signature), decided_s=decided_s)
    return {"approved": True, "missing": submitted.missing}


class SiteEndpoint:
    """The endpoint, serving in threads from `start` to `stop`."""

    def __init__(
        self,
        home: ServerHome,
        authority: Authority,
        *,
        port: int,
        clock: Callable[[], datetime],
        pace_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        handler = _handler(
            home,
            authority,
            clock,
            addresses=Pace(burst=ADDRESS_BURST, per_minute=ADDRESS_PER_MINUTE, clock=pace_clock),
            sites=Pace(burst=API_BURST, per_minute=API_PER_MINUTE, clock=pace_clock),
        )
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise ListenAddressInvalid(
                f"127.0.0.1:{port}: expected a free port for the sites' endpoint (--api-port), got "
                f"{error.strerror or error}"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(
    home: ServerHome,
    authority: Authority,
    clock: Callable[[], datetime],
    *,
    addresses: Pace,
    sites: Pace,
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S
        server_version = "fedrad"
        sys_version = ""

        def do_POST(self) -> None:
            status, value = 200, {}
            try:
                size = int(self.headers.get("Content-Length", ""))
            except ValueError:
                size = -1
            if self.path != PATH or not 0 < size <= MAX_REQUEST_BYTES:
                status, value = 404 if self.path != PATH else 413, {"error": "EnrolmentInvalid"}
                self.close_connection = True
            else:
                data = self.rfile.read(size)
                try:
                    if CLIENT_HEADER in self.headers:  # else nobody came through a door
                        addresses.take(self.headers[CLIENT_HEADER])
                    value = answer_request(home, authority, data, now=clock(), admit=sites.take)
                except TooFrequent:
                    status, value = 429, {"error": "TooFrequent"}
                except FedRadError as error:
                    log.warning("a site's request was refused: %s", error)
                    status, value = 403, {"error": error.code, "message": str(error)}
            body = json.dumps({**value, "time_s": clock().timestamp()}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are logged by what they ask, not by line."""

    return Handler
