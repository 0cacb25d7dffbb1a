"""A site's connection to its server, kept up: the gateway, renewal, studies in and approvals out.

It holds the TLS key and the message key, so it runs as the site's user. Guarantees: a certificate is renewed
from two thirds of its life on, until it works, and at once where it is not for the key that is here; none is
asked for that could not be installed, and one that was not installed is tried again, not asked for again; a
fault in one step (new keys, renewal, studies) holds up no other; a study from the server is only received
(approving it is the site's own act); what this site has decided about a study is compared with what the
server holds of it at every exchange and sent where they differ, also to a server that lost it or refused it
for a moment; a clock that is off is named. What it knows is in `run/link.json`, for `fedrad-site status`.

A decision goes with the time at which it was made here, not sent: a site restored from a copy of before its
withdrawal sends an old approval, which the server refuses (server/submission.py says which decision counts).
A server of an earlier release does not say what it holds and takes no time: it gets each decision until it
has taken it once (`decision.sent`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from client.enrolment import (
    authority_path,
    certificate_fits_key,
    certificate_path,
    finish_rotation,
    install_bundle,
    read_enrolled,
    renewal_request,
    reserve_room,
    rotation_answer_request,
    site_request,
    tls_key_path,
    utc_now,
)
from client.heartbeat import LINK_NAME, whoami
from client.home import Decision, SiteHome, list_studies, read_decision, receive_study
from common.canonical import sha256_hex
from common.ec_keys import key_sha256, load_csr
from common.enrolment import Ask, SignedSiteRequest, format_site_request, parse_bundle
from common.errors import FedRadError, ServerUnreachable, SiteRevoked
from common.files import write_atomic
from deploy.local.certificates import LoopbackTls, write_loopback_tls
from deploy.site.gateway import DoorClosed, Gateway, Route, ServerRefused, ask_server
from deploy.supervision import Bearing

log = logging.getLogger("fedrad.link")

SKEW_WARNING_S = 60.0
_ASK_EVERY_S = 30.0
_FIRST_PAUSE_S = 2.0
_LAST_PAUSE_S = 60.0
_STATUS_EVERY_S = 2.0
_EVER_NEW = ("gateway_last_s", "last_contact_s", "bytes_up", "bytes_down")
_GATEWAY_LIFETIME = timedelta(days=3650)  # this machine's loopback only; its authority's key is never written
_GATEWAY_SPARE = timedelta(days=365)
_UNDECIDED = Decision("", 0)
_NOT_ANSWERED = ("EnrolmentInvalid", "SignatureInvalid")  # the server knows the old TLS or message key still
_KEPT = timedelta(days=1)  # as long as a bundle is tried: of a week's certificates seven count at once


@dataclass(frozen=True)
class _Fetched:
    """The server's answer to a request for a certificate: for which key it was asked, and when."""

    key_sha256: str
    asked: datetime
    bundle: bytes

    def serves(self, key_sha256: str, now: datetime) -> bool:
        return key_sha256 == self.key_sha256 and abs(now - self.asked) < _KEPT


def gateway_tls(directory: Path, *, now: datetime) -> LoopbackTls:
    """Return the gateway's loopback certificate; the one of before where it lasts, as the relay knows it."""
    known = LoopbackTls(directory / "ca.crt", directory / "server.pem", directory / "server.key")
    if all(path.is_file() for path in (known.authority, known.certificate, known.key)):
        certificate = x509.load_pem_x509_certificate(known.certificate.read_bytes())
        if certificate.not_valid_before_utc < now < certificate.not_valid_after_utc - _GATEWAY_SPARE:
            return known
    return write_loopback_tls(directory, now=now, lifetime=_GATEWAY_LIFETIME)


class SiteLink:
    """One site's link; `run` until stopped."""

    def __init__(
        self,
        home: SiteHome,
        *,
        port: int,
        proxy: Callable[[str], str],
        clock: Callable[[], datetime] = utc_now,
        host: str = "127.0.0.1",
    ) -> None:
        self._home, self._proxy, self._clock = home, proxy, clock
        tls = gateway_tls(home.directory / "run" / "gateway", now=clock())
        self.authority = tls.authority
        self.gateway = Gateway(self.route, tls=tls, port=port, host=host)
        self._status: dict[str, Any] = {"connected": False, "error": "", "clock_ahead_s": None}
        self._written: dict[str, Any] = {}
        self._told: dict[str, Decision] = {}
        self._refused: dict[str, str] = {}
        self._fetched: _Fetched | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._due = 0.0

    def route(self) -> Route:
        """Return the way to the server as it is enrolled now."""
        enrolled = read_enrolled(self._home)
        return Route(
            enrolled.host,
            enrolled.port,
            authority_path(self._home),
            certificate_path(self._home),
            tls_key_path(self._home),
            self._proxy(enrolled.host),
        )

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        bearing = Bearing()
        self.gateway.start()
        try:
            while not stop.wait(0.5):
                with bearing.bear():
                    if time.monotonic() >= self._due or self._changed():
                        self._ask()
                    self._write_status()
        finally:
            self.gateway.stop()

    def _ask(self) -> None:
        """Take up new keys, renew, exchange studies and approvals; what fails is tried again.

        A step that fails keeps none from its turn, but where the server is away or has revoked the site.
        """
        failures: list[str] = []
        for step in (
            self._note_decisions,
            self._take_up_rotation,
            self._keep_certificate,
            self._exchange_studies,
        ):
            failure: FedRadError | OSError | None = None
            try:
                step()
            except (FedRadError, OSError) as error:  # an OSError: nothing can be written, a full disk mostly
                failure = error
                code = error.code if isinstance(error, FedRadError) else "this machine"
                failures.append(f"{code}: {error}")
                if failures[-1] not in self._status["error"]:
                    log.warning("the server does not serve this site: %s", error)
                away = isinstance(error, ServerUnreachable) and not isinstance(error, ServerRefused)
                if away or isinstance(error, SiteRevoked):
                    break
        reached = failure is None or isinstance(failure, ServerRefused | SiteRevoked)
        self._status.update(connected=reached, error="; ".join(dict.fromkeys(failures)))
        if failure is None:
            self._status["last_contact_s"] = int(time.time())
        if failures:
            wait_s = self._pause_s
            self._pause_s = min(_LAST_PAUSE_S, 2 * self._pause_s)
        else:
            self._pause_s, wait_s = _FIRST_PAUSE_S, _ASK_EVERY_S
        self._due = time.monotonic() + wait_s

    def _note_decisions(self) -> None:
        self._told = self._decisions()

    def _take_up_rotation(self) -> None:
        """Fetch the operator's answer to a rotation and take up the new keys; until then nothing changes."""
        finish_rotation(self._home)
        nonce = secrets.token_hex(16)
        request = rotation_answer_request(self._home, now=self._clock(), nonce=nonce)
        if request is None:
            return
        try:
            self._take_bundle(request, with_certificate=False)
        except ServerRefused as error:
            if str(error).partition(":")[0] not in _NOT_ANSWERED:
                raise
            return
        log.info("the new keys are taken up")

    def _keep_certificate(self) -> None:
        """Renew where it is time, and at once, without the certificate, where it is not for the key here."""
        enrolled, fits = read_enrolled(self._home), certificate_fits_key(self._home)
        self._status["certificate_until"] = enrolled.not_after.isoformat()
        now = self._clock()
        if fits and now < enrolled.renew_after:
            return
        request = renewal_request(self._home, now=now, nonce=secrets.token_hex(16))
        self._take_bundle(request, with_certificate=fits and now < enrolled.not_after)
        log.info("the certificate was renewed")

    def _take_bundle(self, request: SignedSiteRequest, *, with_certificate: bool) -> None:
        """Fetch a bundle and install it; the one that could not be installed before is tried again first."""
        key = key_sha256(load_csr(request.request.argument, site=self._home.site))
        if self._fetched is None or not self._fetched.serves(key, self._clock()):
            reserve_room(self._home)
            value = self._send(request, with_certificate=with_certificate)
            self._fetched = _Fetched(key, self._clock(), str(value.get("bundle", "")).encode())
        installed = install_bundle(self._home, parse_bundle(self._fetched.bundle))
        self._fetched = None
        self._status["certificate_until"] = installed.not_after.isoformat()

    def _exchange_studies(self) -> None:
        """Take in what is offered, and send the decisions that the server does not hold as they are here.

        A decision that is refused does not keep the next one from being sent; the last refusal is raised.
        """
        value = self._send(self._request(Ask.STUDIES))
        known = set(list_studies(self._home))
        held: dict[str, object] = {}
        for offered in value.get("studies", []):
            with contextlib.suppress(FedRadError, ValueError, KeyError, TypeError, AttributeError):
                manifest = offered["manifest"].encode()
                sha256 = sha256_hex(manifest)
                if sha256 not in known:
                    study = receive_study(self._home, manifest, bytes.fromhex(offered["signature"]))
                    log.info("study %s was received", study.study.id, extra={"study": study.sha256})
                held[sha256] = offered.get("approved")
        refusal: ServerRefused | None = None
        for sha256, holds in held.items():
            try:
                self._tell(sha256, holds)
                self._refused.pop(sha256, None)
            except ServerRefused as error:
                if str(error) != self._refused.get(sha256):
                    log.warning("a decision was refused: %s", error, extra={"study": sha256})
                self._refused[sha256] = str(error)
                refusal = error
        if refusal is not None:
            raise refusal

    def _tell(self, sha256: str, holds: object) -> None:
        """Send this site's decision on a study unless the server holds the same; `holds` is what it says."""
        decision = read_decision(self._home, sha256)
        words, path = decision.approval or "-", self._home.study_directory(sha256) / "decision.sent"
        if isinstance(holds, bool):
            if holds == bool(decision.approval):
                return
            withdrawn_s = 0 if decision.approval else int(self._clock().timestamp())
            argument = f"{sha256} {words} {decision.decided_s or withdrawn_s}"
        else:
            if words == (path.read_text() if path.is_file() else "-"):
                return
            argument = f"{sha256} {words}"
        self._send(self._request(Ask.APPROVAL, argument))
        write_atomic(path, words.encode())

    def _decisions(self) -> dict[str, Decision]:
        """Read what this site has decided, by study."""
        read = {sha256: read_decision(self._home, sha256) for sha256 in list_studies(self._home)}
        return {sha256: decision for sha256, decision in read.items() if decision != _UNDECIDED}

    def _changed(self) -> bool:
        """Tell whether a decision was made since the server was asked last."""
        return self._decisions() != self._told

    def _request(self, ask: Ask, argument: str = "") -> SignedSiteRequest:
        nonce = secrets.token_hex(16)
        return site_request(self._home, ask, argument=argument, now=self._clock(), nonce=nonce)

    def _send(self, request: SignedSiteRequest, *, with_certificate: bool = True) -> dict[str, Any]:
        before = self._clock().timestamp()
        data = format_site_request(request)
        try:
            value = ask_server(self.route(), data, with_certificate=with_certificate)
        except DoorClosed:  # without the certificate the server says why, or renews it
            value = ask_server(self.route(), data, with_certificate=False)
        ahead_s = (before + self._clock().timestamp()) / 2 - float(value["time_s"])
        if abs(ahead_s) > SKEW_WARNING_S and self._status["clock_ahead_s"] is None:
            log.warning("ClockSkewed: this clock is %s s ahead of the server's", round(ahead_s))
        self._status["clock_ahead_s"] = round(ahead_s, 1)
        return value

    def _write_status(self) -> None:
        certificate = self._status.get("certificate_until")
        if certificate is None:
            with contextlib.suppress(FedRadError, OSError):
                self._status["certificate_until"] = read_enrolled(self._home).not_after.isoformat()
        value = {
            **self._status,
            **whoami(),
            "gateway_port": self.gateway.port,
            "connections": self.gateway.open,
            "gateway_error": self.gateway.last_error,
            "gateway_last_s": int(self.gateway.last_connected_s),
            "bytes_up": self.gateway.bytes_up,
            "bytes_down": self.gateway.bytes_down,
        }
        stable = {name: v for name, v in value.items() if name not in _EVER_NEW}
        last = self._written.get("at", 0.0)
        if stable == self._written.get("value") and time.monotonic() - last < 15 * _STATUS_EVERY_S:
            return
        write_atomic(self._home.directory / "run" / LINK_NAME, json.dumps(value, indent=1).encode())
        self._written = {"value": stable, "at": time.monotonic()}
