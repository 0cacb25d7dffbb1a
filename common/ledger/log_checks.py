"""The audit of the log itself: history, witnesses, time, signatures and keys."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping

from common.errors import FedRadError, InclusionInvalid
from common.identity import Purpose, verify_signature
from common.ledger.case import Case, StudyCase
from common.ledger.checkpoint import cosigned_at, open_checkpoint, verify_cosignature, witness_key
from common.ledger.entries import (
    OPERATOR,
    Approval,
    DataUse,
    Decision,
    Enrolment,
    Entry,
    Evaluation,
    KeyCompromise,
    KeyUse,
    Outcome,
    Release,
    ReleaseRollback,
    Revocation,
    Rotation,
    RoundRecord,
    StudyEnd,
    StudyOpened,
)
from common.ledger.findings import Finding, Problem, Problems, Status, conclude
from common.ledger.note import VerifierKey, find_signature, format_verifier_key
from common.ledger.statements import verify_entry_signature

CLOCK_SKEW_S = 600


def check_trust(case: Case, trusted: VerifierKey | None) -> Finding:
    """Compare the bundle's log key with the one that the auditor holds from elsewhere."""
    stated = format_verifier_key(case.bundle.log)
    if trusted is None:
        return Finding(
            "trust-anchor",
            Status.NOT_CHECKABLE,
            f"no log key was given to compare with; the bundle states {stated}. "
            "Ask a hospital for the key it enrolled with and pass it with --log-key",
            ("bundle.json",),
        )
    problems = Problems()
    if trusted != case.bundle.log:
        problems.add(f"expected log key {format_verifier_key(trusted)}, got {stated}", "bundle.json")
    return conclude("trust-anchor", problems, passed=f"the log key is {stated}", evidence=("bundle.json",))


def check_history(case: Case) -> Finding:
    """Every checkpoint is the operator's and a prefix of the one log; the last covers every entry."""
    problems = Problems()
    for head in case.heads:
        try:
            open_checkpoint(head.note, case.bundle.log)
            if case.tree.root(head.checkpoint.size) != head.checkpoint.root:
                problems.add(
                    f"checkpoint {head.checkpoint.size}: another root than the entries'", head.member
                )
        except InclusionInvalid:
            problems.add(
                f"checkpoint {head.checkpoint.size}: the log holds only {case.tree.size} entries", head.member
            )
        except FedRadError as error:
            problems.add(f"checkpoint {head.checkpoint.size}: {error}", head.member)
    if not case.heads:
        problems.add("no checkpoint in the bundle")
    elif case.heads[-1].checkpoint.size < case.tree.size:
        problems.add(f"entries {case.heads[-1].checkpoint.size} to {case.tree.size - 1} are in no checkpoint")
    return conclude(
        "log-history",
        problems,
        passed=f"{case.tree.size} entries, {len(case.heads)} signed checkpoints, one history",
        evidence=tuple(h.member for h in case.heads[-1:]),
    )


def check_time(case: Case, cosignatures: Cosignatures) -> Finding:
    """Entries never run backwards and fit between the witnesses' times before and after them."""
    problems = Problems()
    last = 0
    for index, entry in enumerate(case.entries):
        if entry.time_s < last:
            problems.add(f"entry {index} is dated before the one ahead of it", f"entry {index}")
        last = max(last, entry.time_s)
    start, earliest, witnessed = 0, 0, 0
    for head in case.heads:
        times = cosignatures[head.member].values()
        for index in range(start, min(head.checkpoint.size, len(case.entries))):
            time_s, where = case.entries[index].time_s, f"entry {index}"
            if earliest and time_s < earliest - CLOCK_SKEW_S:
                problems.add(f"{where} is back-dated: witnesses saw the log without it later", where)
            if times and time_s > max(times) + CLOCK_SKEW_S:
                problems.add(f"{where} is dated after the witnesses saw it", where)
        start = max(start, head.checkpoint.size)
        if times:
            earliest, witnessed = min(times), witnessed + 1
    unchecked = "" if witnessed else "no witness cosigned: the times rest on the operator's clock alone"
    return conclude(
        "entry-times",
        problems,
        passed=f"in order, within {CLOCK_SKEW_S} s of {witnessed} witnessed checkpoints",
        unchecked=unchecked,
    )


def check_witnesses(case: Case, study: StudyCase, cosignatures: Cosignatures, forged: Problems) -> Finding:
    """Opening, rounds, releases and end came under a quorum, each before the next round was released."""
    quorum, sites = study.manifest.cohort.witness_quorum, set(study.manifest.site_ids)
    if quorum == 0:
        return Finding(
            "witness-quorum", Status.NOT_CHECKABLE, "the manifest asks for no witnesses", study=study.sha256
        )
    problems = Problems(forged)
    witnessed = [h for h in case.heads if len(cosignatures[h.member].keys() & sites) >= quorum]
    sizes = [head.checkpoint.size for head in witnessed]
    released = [i for i, record in study.rounds if record.outcome is Outcome.RELEASED]
    kinds = StudyOpened | RoundRecord | Release | StudyEnd
    for index, entry in study.entries:
        if not isinstance(entry.body, kinds):
            continue
        where, at, following = f"entry {index}", bisect_right(sizes, index), bisect_right(released, index)
        if at == len(sizes):
            problems.add(f"{where}: no checkpoint over it has {quorum} witnesses", where)
        elif following < len(released) and sizes[at] > released[following]:
            problems.add(f"{where}: expected {quorum} witnesses before the next round", where)
    return conclude(
        "witness-quorum",
        problems,
        passed=f"{len(witnessed)} checkpoints carry at least {quorum} of {len(sites)} sites' cosignatures",
        evidence=tuple(head.member for head in witnessed[-1:]),
        study=study.sha256,
    )


def check_signatures(case: Case) -> Finding:
    """Every entry carries the signatures its kind asks for, by keys that counted at the time."""
    problems = Problems()
    count = 0
    for index, entry in enumerate(case.entries):
        signers = set()
        for signature in entry.signatures:
            valid = case.keys.valid(signature.signer, KeyUse.MESSAGE, index=index, time_s=entry.time_s)
            if signature.key not in valid:
                problems.add(
                    f"entry {index}: {_unknown_key(case, signature.signer, signature.key)}", f"entry {index}"
                )
                continue
            try:
                verify_entry_signature(entry, signature)
                signers.add((signature.signer, signature.key))
                count += 1
            except FedRadError as error:
                problems.add(f"entry {index}: {error}", f"entry {index}")
        problems += [
            Problem(f"entry {index}: {text}", f"entry {index}") for text in _unsigned(entry, signers)
        ]
    return conclude(
        "entry-signatures", problems, passed=f"{count} signatures verified on {len(case.entries)} entries"
    )


def check_enrolment(case: Case) -> Finding:
    """Every study pins exactly the keys that its sites enrolled."""
    problems, missing, pinned = Problems(), set(), 0
    enrolled: dict[tuple[str, KeyUse], str] = {}
    for index, entry in enumerate(case.entries):
        body = entry.body
        if isinstance(body, Enrolment):
            enrolled[body.site, KeyUse.MESSAGE] = body.message_key
            enrolled[body.site, KeyUse.WITNESS] = body.witness_key
        elif isinstance(body, Rotation) and enrolled.get((body.holder, body.use)) == body.old:
            enrolled[body.holder, body.use] = body.new
        elif (
            isinstance(body, Revocation | KeyCompromise) and enrolled.get((body.holder, body.use)) == body.key
        ):
            del enrolled[body.holder, body.use]
        elif isinstance(body, StudyOpened):
            for site in body.manifest.cohort.site:
                for use, key in ((KeyUse.MESSAGE, site.message_key), (KeyUse.WITNESS, site.witness_key)):
                    if not key:
                        continue
                    expected = enrolled.get((site.id, use))
                    pinned += 1
                    if expected is None:
                        missing.add(site.id)
                    elif expected != key:
                        problems.add(
                            f"entry {index}: {site.id}'s {use.value} key is not the enrolled one",
                            f"entry {index}",
                        )
    unchecked = f"no enrolment of {', '.join(sorted(missing))} in the log" if missing else ""
    return conclude(
        "enrolment", problems, passed=f"{pinned} pinned keys are the enrolled ones", unchecked=unchecked
    )


def check_studies_are_open(case: Case) -> Finding:
    """Every entry of a study stands after the study's opening, which stands once, and before its end."""
    problems = Problems()
    opened: set[str] = set()
    ended: set[str] = set()
    for index, entry in enumerate(case.entries):
        body = entry.body
        where = f"entry {index}"
        if isinstance(body, StudyOpened):
            if entry.study in opened:
                problems.add(f"{where}: the study was opened before", where)
            opened.add(entry.study)
        elif not isinstance(body, Enrolment | Rotation | Revocation | KeyCompromise):
            if entry.study not in opened:
                problems.add(f"{where}: {entry.kind} of a study that the log does not hold", where)
            if entry.study in ended and isinstance(body, RoundRecord | StudyEnd):
                problems.add(f"{where}: {entry.kind} after the study's end", where)
        if isinstance(body, StudyEnd):
            ended.add(entry.study)
    return conclude("study-order", problems, passed=f"{len(opened)} studies, {len(ended)} of them ended")


def check_approvals(case: Case, study: StudyCase) -> Finding:
    """Every site had approved exactly this manifest before it took part, and had not withdrawn."""
    problems = Problems()
    approved: dict[str, int] = {}
    for index, entry in study.entries:
        body = entry.body
        if isinstance(body, Approval):
            if body.site not in study.manifest.site_ids:
                problems.add(
                    f"entry {index}: approval of {body.site}, not a site of the study", f"entry {index}"
                )
            if body.decision is Decision.WITHDRAW:
                approved.pop(body.site, None)
                continue
            try:
                _verify_approval(case, study, index, entry, body)
                approved[body.site] = index
            except FedRadError as error:
                problems.add(f"entry {index}: approval of {body.site}: {error}", f"entry {index}")
        elif isinstance(body, RoundRecord):
            for part in body.participations:
                if part.site not in approved:
                    problems.add(
                        f"round {body.number}: {part.site} took part without its approval", f"entry {index}"
                    )
    return conclude(
        "approvals",
        problems,
        passed=f"{len(approved)} of {len(study.manifest.site_ids)} sites approved this manifest",
        evidence=[f"entry {i}" for i in approved.values()],
        study=study.sha256,
    )


def _verify_approval(case: Case, study: StudyCase, index: int, entry: Entry, body: Approval) -> None:
    from common.config import format_study
    from common.errors import SignatureInvalid

    keys = case.keys.valid(body.site, KeyUse.MESSAGE, index=index, time_s=entry.time_s)
    if body.signature:
        for key in keys:
            try:
                verify_signature(
                    key, Purpose.APPROVAL, format_study(study.manifest), bytes.fromhex(body.signature)
                )
                return
            except SignatureInvalid:
                continue
    elif any(s.signer == body.site and s.key in keys for s in entry.signatures):
        return  # the signature itself is checked with every entry's
    raise SignatureInvalid(f"expected a signature of {body.site} by a key that counts, got none")


def _unsigned(entry: Entry, signers: set[tuple[str, str]]) -> Iterator[str]:
    """Say which signatures an entry lacks; `signers` are those that verified."""
    names = {name for name, _ in signers}
    body = entry.body
    wanted: tuple[set[str], ...] = ()
    if isinstance(body, StudyOpened | Release | ReleaseRollback | StudyEnd):
        wanted = ({OPERATOR},)
    elif isinstance(body, Enrolment):
        wanted = ({OPERATOR}, {body.site})
    elif (
        isinstance(body, DataUse)
        or (isinstance(body, Evaluation) and body.site != "all")
        or (isinstance(body, Approval) and body.decision is Decision.WITHDRAW)
    ):
        wanted = ({body.site},)
    elif isinstance(body, Revocation | KeyCompromise):
        wanted = ({OPERATOR, body.holder},)
    elif isinstance(body, Rotation):
        if body.holder == OPERATOR:
            yield "the operator's key is the log's and cannot be rotated: start a new log"
        elif body.use is KeyUse.MESSAGE and (body.holder, body.old) not in signers:
            yield f"rotation: expected a signature of {body.holder} with the old key"
        wanted = ({body.holder},)
    for any_of in wanted:
        if not any_of & names:
            yield f"{entry.kind}: expected a signature of {' or '.join(sorted(any_of))}, got none that counts"


def _unknown_key(case: Case, signer: str, key: str) -> str:
    if key in case.keys.known(signer, KeyUse.MESSAGE):
        return (
            f"signed by {signer} with a key that did not count at the time (revoked, replaced or compromised)"
        )
    return f"signed for {signer} with a key that is not in the log"


Cosignatures = Mapping[str, Mapping[str, int]]


def read_cosignatures(case: Case) -> tuple[Cosignatures, Problems]:
    """The times at which sites cosigned, by checkpoint member and site, and the lines that do not verify.

    Only lines of witness keys that counted for the checkpoint's last entry are read.
    """
    sites = sorted({site for study in case.studies.values() for site in study.manifest.site_ids})
    found: dict[str, dict[str, int]] = {}
    problems = Problems()
    for head in case.heads:
        times = found.setdefault(head.member, {})
        index = min(head.checkpoint.size, len(case.entries)) - 1
        lines = {(s.name, s.key_id) for s in head.note.signatures}
        for site in sites if index >= 0 else ():
            for public in case.keys.valid(
                site, KeyUse.WITNESS, index=index, time_s=case.entries[index].time_s
            ):
                key = witness_key(site, bytes.fromhex(public))
                if (key.name, key.key_id) not in lines:
                    continue
                try:
                    verify_cosignature(head.note, key)
                    times[site] = cosigned_at(find_signature(head.note, key))
                except FedRadError as error:
                    problems.add(f"checkpoint {head.checkpoint.size}: {error}", head.member)
    return found, problems
