"""What a site's agent has served in one study: durable, so that a crash neither repeats nor forgets a round.

    seen.json                              the last round record this site verified
    begun/000012-1-contribute.json         request hash and round seed, written before data is touched
    spool/000012-1-contribute.reply        the reply, written before it is sent
    adapter.f32                            the global adapter of the last round served

Guarantees: for one (round, attempt, stage) only one request is ever served; the same request again gives the
same bytes, from the spool or recomputed from the stored seed; another request is refused. The directory is
as secret as the data: seeds determine the noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import RoundAlreadyServed
from common.files import write_atomic
from common.protocol import Envelope, Header, cut_envelope

_KEEP_ROUNDS = 2


@dataclass(frozen=True)
class Seen:
    """The newest verified record: its round (-1 before the first), hash, and the adapter it leads to."""

    round: int
    record_sha256: str
    adapter_sha256: str


class SiteState:
    """The durable state of one study at one site; `directory` is made with mode 0700."""

    def __init__(self, directory: Path, *, study: str) -> None:
        self._directory = directory
        self._study = study
        for part in ("begun", "spool"):
            (directory / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)

    def seen(self) -> Seen:
        path = self._directory / "seen.json"
        if not path.is_file():
            return Seen(-1, self._study, "")
        value = json.loads(path.read_text())
        return Seen(value["round"], value["record_sha256"], value["adapter_sha256"])

    def see(self, seen: Seen) -> None:
        """Move the verified history forward; replies of rounds it supersedes are deleted."""
        write_atomic(self._directory / "seen.json", json.dumps(vars(seen)).encode(), mode=0o600)
        for part in ("begun", "spool"):
            for path in (self._directory / part).iterdir():
                if path.name[:6].isdigit() and int(path.name[:6]) <= seen.round - _KEEP_ROUNDS:
                    path.unlink()

    def spooled(self, header: Header, request_sha256: str) -> Envelope | None:
        """Return the stored reply to exactly this request, None when it was not finished.

        Raises RoundAlreadyServed when another request was begun for the same round, attempt and stage.
        """
        begun = self._begun_path(header)
        if not begun.is_file():
            return None
        stored = json.loads(begun.read_text())
        if stored["request_sha256"] != request_sha256:
            raise RoundAlreadyServed(
                f"round {header.round} attempt {header.attempt} stage {header.stage.value}: expected the "
                f"request served before ({stored['request_sha256'][:16]}…), got another one"
            )
        path = self._spool_path(header)
        return cut_envelope(path.read_bytes()) if path.is_file() else None

    def begin(self, header: Header, request_sha256: str, seed: bytes) -> bytes:
        """Durably begin to serve a request and return its 32-byte seed: the stored one after a crash.

        Raises RoundAlreadyServed as `spooled` does.
        """
        self.spooled(header, request_sha256)
        path = self._begun_path(header)
        if path.is_file():
            return bytes.fromhex(json.loads(path.read_text())["seed"])
        value = {"request_sha256": request_sha256, "seed": seed.hex()}
        write_atomic(path, json.dumps(value).encode(), mode=0o600)
        return seed

    def spool(self, header: Header, reply: Envelope) -> None:
        """Durably store a reply before it is sent."""
        write_atomic(self._spool_path(header), reply.frame, reply.body, mode=0o600)

    def stated_once(self, make: Callable[[], list[bytes]]) -> list[bytes]:
        """Return what this site states of itself in the study: made at the first call, the same ever after.

        Made afresh, a count at the edge of its bucket would show single patients come and go.
        """
        path = self._directory / "statements.jsonl"
        if not path.is_file():
            write_atomic(path, b"\n".join(make()), mode=0o600)
        return path.read_bytes().split(b"\n")

    def keep_adapter(self, round: int, adapter: bytes) -> None:
        """Durably keep the adapter that a round starts from, to measure the next step by."""
        write_atomic(self._directory / "adapter.f32", round.to_bytes(8, "little") + adapter, mode=0o600)

    def kept_adapter(self) -> tuple[int, bytes] | None:
        """Return the round whose adapter was kept last, and its bytes; None where none was."""
        path = self._directory / "adapter.f32"
        if not path.is_file():
            return None
        data = path.read_bytes()
        return int.from_bytes(data[:8], "little"), data[8:]

    def last_attempt(self, round: int) -> int:
        """Return the highest attempt of a round that was begun, 0 when none was."""
        attempts = [int(p.name.split("-")[1]) for p in (self._directory / "begun").glob(f"{round:06d}-*")]
        return max(attempts, default=0)

    def _begun_path(self, header: Header) -> Path:
        return self._directory / "begun" / f"{header.round:06d}-{header.attempt}-{header.stage.value}.json"

    def _spool_path(self, header: Header) -> Path:
        return self._directory / "spool" / f"{header.round:06d}-{header.attempt}-{header.stage.value}.reply"
