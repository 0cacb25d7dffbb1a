"""What may stand in the ledger: one frozen dataclass per kind of entry, canonical JSON, signatures.

An entry is `{"body", "kind", "signatures", "study", "time_s", "v"}`; docs/protocol/ledger.md describes
each field. Guarantees: `parse_entry(format_entry(e)) == e` and no other byte sequence parses; a signature
binds kind, study and body. Bodies hold hashes, keyed commitments, public parameters and buckets, never an
identifier of a patient, free text or an exact small count. What a signer was allowed to say is the audit's
business (`audit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeAlias

from common.canonical import canonical_json, parse_canonical
from common.config import Study, format_study, parse_study
from common.errors import EntryInvalid, FedRadError
from common.ledger.fields import SITE_PATTERN, build, hex64, plain, ranged, site_id, text

VERSION = 1
MAX_ENTRY_BYTES = 5 << 20
OPERATOR = "operator"
NO_STUDY = "0" * 64
SOFTWARE_CHANGED = "software-changed"  # an incident: the server was upgraded between two rounds
BUCKETS = (
    "<10", "10-19", "20-49", "50-99", "100-199", "200-499", "500-999", "1000-1999", "2000-4999",
    "5000-9999", "10000-19999", "20000-49999", "50000-99999", "100000+",
)  # fmt: skip
_BUCKET_PATTERN = "|".join(bucket.replace("+", r"\+") for bucket in BUCKETS)
_SIGNER_PATTERN = SITE_PATTERN
_SOFTWARE_PATTERN = r"[a-z][a-z0-9-]{0,39} [0-9][0-9A-Za-z.+-]{0,39}"
_CODE_PATTERN = r"[a-z][a-z0-9-]{0,63}"
_MAX_TIME_S = 1 << 40


class KeyUse(StrEnum):
    """What a key is used for; one key, one use."""

    MESSAGE = "message"
    WITNESS = "witness"
    TLS = "tls"
    NODE = "node"
    RELEASE = "release"


class Decision(StrEnum):
    APPROVE = "approve"
    WITHDRAW = "withdraw"


class RevocationReason(StrEnum):
    LEFT = "left"
    SUPERSEDED = "superseded"
    COMPROMISED = "compromised"
    EXPIRED = "expired"


class Outcome(StrEnum):
    """What became of a round's attempt; `released` means that the noised sum was seen by the server."""

    RELEASED = "released"
    FAILED = "failed"


class Acceptance(StrEnum):
    ACCEPT = "accept"
    ROLLBACK = "rollback"


class EndReason(StrEnum):
    COMPLETED = "completed"
    STOPPED = "stopped"
    BUDGET_SPENT = "budget-spent"


@dataclass(frozen=True, kw_only=True)
class StudyOpened:
    """The manifest in full, and the code that will run it. Its SHA-256 is the entry's `study`."""

    manifest: Study
    code: str = hex64()
    lockfile: str = hex64()
    software: str = text(_SOFTWARE_PATTERN)


@dataclass(frozen=True, kw_only=True)
class Approval:
    """A site's decision on the study, signed by the site.

    `signature` is the site's signature of the manifest (Purpose.APPROVAL); empty on withdrawal, which is
    signed as an entry instead.
    """

    site: str = site_id()
    decision: Decision
    policy: str = hex64(optional=True)
    signature: str = text(r"(?:[0-9a-f]{128})?")


@dataclass(frozen=True, kw_only=True)
class DataUse:
    """What a site brought, in buckets; `commitment` is keyed. Signed by the site."""

    site: str = site_id()
    commitment: str = hex64()
    patients: str = text(_BUCKET_PATTERN)
    studies: str = text(_BUCKET_PATTERN)
    dropped: dict[str, str] = text(_BUCKET_PATTERN)  # noqa: RUF009
    tools: dict[str, str] = text(r"[0-9A-Za-z.+-]{1,40}")  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """A site's keys, after the operator compared the fingerprint out of band. Signed by both."""

    site: str = site_id()
    message_key: str = hex64()
    witness_key: str = hex64()
    tls_fingerprint: str = hex64(optional=True)
    node_fingerprint: str = hex64(optional=True)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A new key for an old; signed with the old one by its holder."""

    holder: str = site_id()
    use: KeyUse
    old: str = hex64()
    new: str = hex64()


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """A key that counts no more from this entry on; signed by the operator or the holder."""

    holder: str = site_id()
    use: KeyUse
    key: str = hex64()
    reason: RevocationReason


@dataclass(frozen=True, kw_only=True)
class KeyCompromise:
    """A key that may have been in foreign hands since `since_s`: nothing it signed after that counts."""

    holder: str = site_id()
    use: KeyUse
    key: str = hex64()
    since_s: int = ranged(0, _MAX_TIME_S)


@dataclass(frozen=True, kw_only=True)
class Participation:
    """One site's contribution as the site itself signed it; see `statements.py`.

    `sigma_units` is the width of its noise share in integer units, `epsilon` the site's own spending with
    this round charged, `summed` whether the contribution is part of the aggregate.
    """

    site: str = site_id()
    commitment: str = hex64()
    sigma_units: float = ranged(0, 1e12)
    epsilon: float = ranged(0, 1e9)
    summed: bool
    signature: str = text(r"[0-9a-f]{128}")


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One attempt at one round: what went in, who took part, how it was protected, what came out.

    `server_sigma_units` is the width of the server's top-up in integer units, `release_epsilon` what the
    released sums of the study cost so far, `record` the hash of the signed record that sites chain
    (common/records.py), `aggregate` a keyed commitment to the sum of what came, masked where it was. Without
    privacy (mode plain) widths and epsilons are 0 and claim nothing.
    """

    number: int = ranged(0, 1_000_000)
    attempt: int = ranged(0, 1000)
    outcome: Outcome
    adapter_in: str = hex64()
    adapter_out: str = hex64(optional=True)
    state_out: str = hex64(optional=True)
    cohort: tuple[str, ...] = text(SITE_PATTERN)
    participations: tuple[Participation, ...]
    dropouts: tuple[str, ...] = text(SITE_PATTERN)
    clip_norm: float = ranged(0, 1e9)
    sampling_rate: float = ranged(0, 1)
    patients: int = ranged(0, 10_000_000)
    server_sigma_units: float = ranged(0, 1e12)
    delta: float = ranged(0, 1)
    release_epsilon: float = ranged(0, 1e9)
    aggregate: str = hex64(optional=True)
    record: str = hex64(optional=True)
    code: str = hex64()
    lockfile: str = hex64()


@dataclass(frozen=True, kw_only=True)
class EvaluationSum:
    """Where the figures of an evaluation across sites come from: what each site signed, the server's noise.

    The statements are those of the round after the last (number = the manifest's rounds).
    """

    attempt: int = ranged(1, 1000)
    participations: tuple[Participation, ...]
    server_sigma_units: float = ranged(0, 1e12)


@dataclass(frozen=True, kw_only=True)
class _Figures:
    number: int = ranged(0, 1_000_000)
    adapter: str = hex64()
    site: str = site_id()
    subgroup: str = text(_CODE_PATTERN)
    studies: str = text(_BUCKET_PATTERN)
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Figures):
    """Metrics of an adapter at a site (`site` = "all": pooled). A site's own is signed by the site.

    `sum` is there for figures from a noised sum over sites; without it the field is left out of the JSON.
    """

    sum: EvaluationSum | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterDecision:
    """The acceptance test of a round's adapter; on rollback `adapter` is the one gone back to."""

    number: int = ranged(0, 1_000_000)
    decision: Acceptance
    adapter: str = hex64()
    rejected: str = hex64(optional=True)


@dataclass(frozen=True, kw_only=True)
class ReleasedFile:
    path: str = text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
    bytes: int = ranged(0, 1 << 40)
    sha256: str = hex64()


@dataclass(frozen=True, kw_only=True)
class Release:
    """A published adapter version; signed by the operator (release key) and by approving sites."""

    version: int = ranged(1, 1_000_000)
    adapter: str = hex64()
    number: int = ranged(0, 1_000_000)
    base: str = text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
    site_epsilon: float = ranged(0, 1e9)
    release_epsilon: float = ranged(0, 1e9)
    delta: float = ranged(0, 1)
    files: tuple[ReleasedFile, ...]


@dataclass(frozen=True, kw_only=True)
class ReleaseRollback:
    """A signed permission for sites to run version `to` instead of `frm`; signed by the operator."""

    frm: int = ranged(1, 1_000_000)
    to: int = ranged(1, 1_000_000)
    code: str = text(_CODE_PATTERN)


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something an auditor will ask about, by code; the story is kept aside, its commitment here."""

    code: str = text(_CODE_PATTERN)
    site: str = text(rf"(?:{SITE_PATTERN})?")
    number: int = ranged(0, 1_000_000)
    detail: str = hex64(optional=True)


@dataclass(frozen=True, kw_only=True)
class StudyEnd:
    reason: EndReason
    number: int = ranged(0, 1_000_000)
    adapter: str = hex64()
    release_epsilon: float = ranged(0, 1e9)


Body: TypeAlias = (
    StudyOpened | Approval | DataUse | Enrolment | Rotation | Revocation | KeyCompromise | RoundRecord
    | Evaluation | AdapterDecision | Release | ReleaseRollback | Incident | StudyEnd
)  # fmt: skip

KINDS: Mapping[str, type[Body]] = {
    "study": StudyOpened,
    "approval": Approval,
    "data": DataUse,
    "enrolment": Enrolment,
    "rotation": Rotation,
    "revocation": Revocation,
    "compromise": KeyCompromise,
    "round": RoundRecord,
    "evaluation": Evaluation,
    "decision": AdapterDecision,
    "release": Release,
    "rollback": ReleaseRollback,
    "incident": Incident,
    "end": StudyEnd,
}
_KIND_OF = {body: kind for kind, body in KINDS.items()}


@dataclass(frozen=True)
class EntrySignature:
    """Who signed (`operator` or a site id), with which public key, and the signature in hex."""

    signer: str = text(_SIGNER_PATTERN)
    key: str = hex64()
    value: str = text(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class Entry:
    """One ledger entry; `time_s` is POSIX seconds UTC and never runs backwards along the log."""

    time_s: int
    study: str
    body: Body
    signatures: tuple[EntrySignature, ...] = ()

    @property
    def kind(self) -> str:
        return _KIND_OF[type(self.body)]


def format_entry(entry: Entry) -> bytes:
    """Encode an entry as one line of canonical JSON; raises EntryInvalid for a value that would not parse."""
    data = canonical_json(
        {
            "body": _plain_body(entry.body),
            "kind": entry.kind,
            "signatures": [plain(signature) for signature in entry.signatures],
            "study": entry.study,
            "time_s": entry.time_s,
            "v": VERSION,
        }
    )
    if parse_entry(data) != entry:
        raise EntryInvalid(f"{entry.kind}: a field does not survive encoding")
    return data


def parse_entry(data: bytes) -> Entry:
    """Parse one entry; raises EntryInvalid, NotCanonical or BodyTooLarge. No signature is verified."""
    value = parse_canonical(data, max_bytes=MAX_ENTRY_BYTES)
    if not isinstance(value, dict) or value.keys() != {"body", "kind", "signatures", "study", "time_s", "v"}:
        raise EntryInvalid("entry: expected body, kind, signatures, study, time_s and v")
    if value["v"] != VERSION:
        raise EntryInvalid(f"entry: expected version {VERSION}, got {value['v']!r}")
    if not isinstance(value["kind"], str) or value["kind"] not in KINDS:
        raise EntryInvalid(f"entry: expected a kind of {', '.join(KINDS)}")
    kind, body = value["kind"], value["body"]
    if kind == "study":
        parsed: Body = _study_body(body)
    elif kind == "evaluation":
        parsed = _evaluation_body(body)
    else:
        parsed = build(KINDS[kind], body, kind)
    head = build(_Head, {"study": value["study"], "time_s": value["time_s"]}, "entry")
    signatures = build(tuple[EntrySignature, ...], value["signatures"], "signatures")
    _check_sense(parsed, head.study)
    return Entry(head.time_s, head.study, parsed, signatures)


@dataclass(frozen=True)
class _Head:
    study: str = hex64()
    time_s: int = ranged(0, _MAX_TIME_S)


def signed_bytes(entry: Entry) -> bytes:
    """Return what a signature on an entry covers: kind, study and body."""
    return canonical_json({"body": _plain_body(entry.body), "kind": entry.kind, "study": entry.study})


# --- inside -----------------------------------------------------------------------------------------------


def _plain_body(body: Body) -> Any:
    if isinstance(body, StudyOpened):
        manifest = parse_canonical(format_study(body.manifest), max_bytes=MAX_ENTRY_BYTES)
        rest = {f.name: getattr(body, f.name) for f in fields(body) if f.name != "manifest"}
        return {"manifest": manifest, **rest}
    if isinstance(body, Evaluation) and body.sum is None:
        return {f.name: plain(getattr(body, f.name)) for f in fields(body) if f.name != "sum"}
    return plain(body)


def _study_body(body: Any) -> StudyOpened:
    if not isinstance(body, dict) or "manifest" not in body:
        raise EntryInvalid("study: expected a manifest")
    try:
        manifest = parse_study(canonical_json(body["manifest"]))
    except FedRadError as error:
        raise EntryInvalid(f"study.manifest: {error}") from error
    rest = build(_StudyRest, {k: v for k, v in body.items() if k != "manifest"}, "study")
    return StudyOpened(manifest=manifest, code=rest.code, lockfile=rest.lockfile, software=rest.software)


def _evaluation_body(body: Any) -> Evaluation:
    summed = None
    if isinstance(body, dict) and "sum" in body:
        summed = build(EvaluationSum, body["sum"], "evaluation.sum")
        body = {name: value for name, value in body.items() if name != "sum"}
    figures = build(_Figures, body, "evaluation")
    return Evaluation(sum=summed, **vars(figures))


@dataclass(frozen=True)
class _StudyRest:
    code: str = hex64()
    lockfile: str = hex64()
    software: str = text(_SOFTWARE_PATTERN)


def _check_sense(body: Body, study: str) -> None:
    if isinstance(body, StudyOpened):
        if body.manifest.sha256 != study:
            raise EntryInvalid("study: expected the manifest's own hash as the entry's study")
    elif isinstance(body, RoundRecord):
        taking = [p.site for p in body.participations]
        known = set(body.cohort)
        if len(known) != len(body.cohort) or len(set(taking)) != len(taking):
            raise EntryInvalid("round: expected each site at most once")
        if not set(taking) <= known or set(body.dropouts) != known - {p.site for p in body.participations}:
            raise EntryInvalid("round: expected every site of the cohort as participant or dropout")
        if (body.outcome is Outcome.RELEASED) != bool(body.adapter_out):
            raise EntryInvalid("round: expected an adapter_out exactly when released")
    elif isinstance(body, Evaluation) and body.sum is not None:
        stated = [part.site for part in body.sum.participations]
        if not stated or len(set(stated)) != len(stated) or body.site != "all":
            raise EntryInvalid("evaluation: expected a sum over all, each site at most once")
    elif isinstance(body, Rotation) and body.old == body.new:
        raise EntryInvalid("rotation: expected a new key, got the old one")
