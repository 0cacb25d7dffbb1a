"""The guard: a hostile server (with the operator's key) and a hostile relay against the site agent.

One honest study is recorded per mode; each test takes the agent as it was before a request and sends
something else. Every refusal is named, and after it the honest request still works where it should.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent import SiteAgent
from client.home import create_home, open_home, refuse_study
from client.models import ModelPool
from common.canonical import canonical_json
from common.config import format_study
from common.deflate import deflate, inflate
from common.errors import (
    BodyTooLarge,
    EnvelopeMalformed,
    FedRadError,
    SignatureInvalid,
    StudyNotApproved,
    StudyUnknown,
    UnknownSender,
    WrongRecipient,
    WrongStage,
)
from common.identity import Purpose, SigningKey, load_key
from common.ledger.note import format_lines, parse_lines
from common.ledger.statements import commit, parse_participation
from common.model.lora import vector_sha256, vector_to_bytes
from common.protocol import Envelope, Kind, Stage, pack_body, unpack_body
from common.records import sign_record, signed_from_json, signed_to_json
from common.secagg.context import context_digest, keys_message, receipt_message, setup_digest
from common.secagg.messages import (
    AdvertisedKeys,
    KeySet,
    SurvivorSet,
    format_key_set,
    format_opening,
    format_survivor_set,
    parse_key_set,
    parse_opening,
    parse_survivor_set,
)
from common.secagg.study_terms import round_terms
from tests.simulator import (
    POOL,
    START_UNIX_S,
    Clock,
    NodeDown,
    Tape,
    build,
    data_folder,
    record,
    refusal_of,
    split_message,
)

SITE = "alpha"
META = {"adapter_sha256": str, "cohort": list, "deadline_unix_s": float}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tape:
    directory = tmp_path_factory.mktemp("plain")
    return record(build(directory, mode="plain", rounds=3), SITE, directory / "tape")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Tape:
    """Mode consortium with secure aggregation and random draws, as in earnest."""
    directory = tmp_path_factory.mktemp("masked")
    world = build(directory, mode="consortium", rounds=2, spare_rounds=0, seed=None)
    return record(world, SITE, directory / "tape")


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Callable[..., SiteAgent]]:
    """Make agents as they were before a recorded request, and close them in the end."""
    agents = []

    def make(tape: Tape, stage: Stage, round: int, **settings: Any) -> SiteAgent:
        agents.append(tape.agent_before(stage, round, tmp_path / f"agent-{len(agents)}", **settings))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()


Before = Callable[..., SiteAgent]


def contribute(
    tape: Tape, round: int, *, opening: bytes = b"", shown: bytes = b"", blob: bytes = b"", **meta: Any
) -> bytes:
    """The recorded contribute request with other parts or fields in its body, signed by the operator."""
    fields, *parts = parts_of(tape, round)
    if "records" in meta:
        _, *ledger = shown_of(tape, round)
        shown = deflate(pack_body({"records": meta.pop("records")}, *ledger))
    changed = [new or old for new, old in zip((opening, shown, blob), parts, strict=True)]
    body = pack_body({**fields, **meta}, *changed)
    return tape.forge(Stage.CONTRIBUTE, round, body=body)


def parts_of(tape: Tape, round: int) -> tuple[dict[str, Any], bytes, bytes, bytes]:
    """Fields, opening, what is shown of the ledger, and adapter of a recorded contribute request."""
    body = split_message(tape.requests[(Stage.CONTRIBUTE, round)])[2]
    fields, (opening, shown, blob) = unpack_body(body, fields=META, parts=3)
    return fields, bytes(opening), bytes(shown), bytes(blob)


def shown_of(tape: Tape, round: int) -> list[Any]:
    """Records (as JSON) and parts of the ledger that a recorded contribute request shows."""
    body = inflate(parts_of(tape, round)[2], max_bytes=1 << 20)
    count = 3 if tape.world.study.masked else 1
    meta, ledger = unpack_body(body, fields={"records": list}, parts=count)
    return [meta["records"], *(bytes(part) for part in ledger)]


def body_of(reply: bytes | Envelope) -> bytes:
    assert not refusal_of(reply), unpack_body(split_message(reply)[2], fields={"error": str, "message": str})
    return split_message(reply)[2]


def vector_of(reply: bytes | Envelope) -> bytes:
    """The vector of a contribution; statement and commitment rest on a seed of the agent's own."""
    *_, vector = unpack_body(body_of(reply), fields={"adapter_sha256": str, "form": str}, parts=6)[1]
    return bytes(vector)


def charges(agent: SiteAgent) -> int:
    return agent.home.budget_path.read_text().count('"kind":"charge"')


# --- who may speak at all -----------------------------------------------------------------------------------


def test_an_unknown_study_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.HELLO, 0)
    with pytest.raises(StudyUnknown):
        agent.handle(Stage.HELLO, plain.forge(Stage.HELLO, 0, study="ab" * 32))


def test_a_study_that_this_site_has_not_approved_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.HELLO, 0)
    (agent.home.study_directory(plain.world.study.sha256) / "approval.sig").unlink()
    with pytest.raises(StudyNotApproved):
        agent.handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])


def test_an_approval_withdrawn_between_rounds_stops_the_study(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 1)
    refuse_study(agent.home, plain.world.study.sha256, "changed our mind")
    with pytest.raises(StudyNotApproved):
        agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 1)])


def test_an_approval_of_another_site_does_not_count(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.HELLO, 0)
    other = load_key(plain.world.out / "sites" / "beta" / "keys" / "message.key")
    forged = other.sign(Purpose.APPROVAL, format_study(plain.world.study)).hex()
    (agent.home.study_directory(plain.world.study.sha256) / "approval.sig").write_text(forged)
    with pytest.raises(StudyNotApproved):
        agent.handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])


def test_a_manifest_swapped_between_rounds_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 1)
    swapped = replace(plain.world.study, training=replace(plain.world.study.training, sampling_rate=1.0))
    directory = agent.home.study_directory(plain.world.study.sha256)
    manifest = format_study(swapped)
    (directory / "study.json").write_bytes(manifest)
    (directory / "operator.sig").write_text(plain.world.operator.sign(Purpose.STUDY, manifest).hex())
    with pytest.raises(StudyUnknown):
        agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 1)])


def test_a_message_of_somebody_else_than_the_operator_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(SignatureInvalid):
        agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, key=SigningKey.generate()))


def test_a_message_in_the_name_of_a_site_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(UnknownSender):
        agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, sender="beta"))


def test_a_message_for_another_site_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(WrongRecipient):
        agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, recipient="beta"))


def test_a_message_relayed_to_another_stage_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(WrongStage):
        agent.handle(Stage.WITNESS, plain.requests[(Stage.CONTRIBUTE, 0)])


def test_a_reply_is_no_request(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(WrongStage):
        agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, kind=Kind.REPLY))


def test_a_header_that_claims_two_gigabytes_is_refused_before_anything_else(
    plain: Tape, before: Before
) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    header, _, _ = split_message(plain.requests[(Stage.CONTRIBUTE, 0)])
    encoded = canonical_json(
        {**vars(header), "stage": "contribute", "kind": "request", "body_bytes": 1 << 31}
    )
    signature = plain.world.operator.sign(Purpose.ENVELOPE, encoded)
    with pytest.raises(BodyTooLarge):
        agent.handle(Stage.CONTRIBUTE, b"FRM1" + len(encoded).to_bytes(4, "big") + encoded + signature)


def test_a_body_over_the_studys_cap_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(BodyTooLarge):
        agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, body=bytes(12 << 20)))


@pytest.mark.parametrize("cut", [0, 3, 8, 100, 400])
def test_a_truncated_message_is_refused(plain: Tape, before: Before, cut: int) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    with pytest.raises(EnvelopeMalformed):
        agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 0)][:cut])


def test_another_sites_key_in_the_manifest_stops_the_study(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.HELLO, 0)
    other = open_home(plain.world.out / "sites" / "beta")
    shutil.copy(other.key_path, agent.home.key_path)
    with pytest.raises(StudyNotApproved):
        SiteAgent(agent.home, models=POOL).handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])


# --- base, data and adapter ---------------------------------------------------------------------------------


def test_an_altered_base_is_refused_by_name(plain: Tape, before: Before, tmp_path: Path) -> None:
    agent = before(plain, Stage.HELLO, 0)
    base = tmp_path / "altered-base"
    shutil.copytree(agent.home.base_directory("tiny"), base)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    home = create_home(
        agent.home.directory, site=SITE, operator_key=agent.home.operator_key, data=agent.home.data,
        bases={"tiny": base},
    )  # fmt: skip
    reply = SiteAgent(home, models=ModelPool()).handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])
    assert refusal_of(reply) == "BaseHashMismatch"


def test_a_base_that_the_site_does_not_hold_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.HELLO, 0)
    home = replace(agent.home, bases={})
    reply = SiteAgent(home, models=POOL).handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])
    assert refusal_of(reply) == "BaseInvalid"


def test_missing_data_is_refused_without_a_traceback(plain: Tape, before: Before, tmp_path: Path) -> None:
    agent = before(plain, Stage.HELLO, 0)
    home = replace(agent.home, data=tmp_path / "nowhere")
    reply = SiteAgent(home, models=POOL).handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])
    assert refusal_of(reply) == "DataInsufficient"


def test_adapter_bytes_that_are_not_the_named_ones_are_refused(plain: Tape, before: Before) -> None:
    *_, blob = parts_of(plain, 0)
    other = np.frombuffer(blob, "<f4") + np.float32(1)
    request = contribute(plain, 0, blob=vector_to_bytes(other))
    assert (
        refusal_of(before(plain, Stage.CONTRIBUTE, 0).handle(Stage.CONTRIBUTE, request)) == "AdapterInvalid"
    )


@pytest.mark.parametrize("round", [0, 1])
def test_an_adapter_that_the_history_does_not_lead_to_is_refused(
    plain: Tape, before: Before, round: int
) -> None:
    *_, blob = parts_of(plain, round)
    other = np.frombuffer(blob, "<f4") + np.float32(1)
    request = contribute(plain, round, blob=vector_to_bytes(other), adapter_sha256=vector_sha256(other))
    reply = before(plain, Stage.CONTRIBUTE, round).handle(Stage.CONTRIBUTE, request)
    assert refusal_of(reply) == "AdapterInvalid"


@pytest.mark.parametrize("extra", [-4, 4, 400])
def test_an_adapter_of_another_length_is_refused(plain: Tape, before: Before, extra: int) -> None:
    *_, blob = parts_of(plain, 0)
    other = blob[:extra] if extra < 0 else blob + bytes(extra)
    request = contribute(plain, 0, blob=other, adapter_sha256=hashlib.sha256(other).hexdigest())
    assert (
        refusal_of(before(plain, Stage.CONTRIBUTE, 0).handle(Stage.CONTRIBUTE, request)) == "AdapterInvalid"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_a_value_that_is_no_number_is_refused(
    plain: Tape, before: Before, value: float
) -> None:
    *_, blob = parts_of(plain, 0)
    other = np.frombuffer(blob, "<f4").copy()
    other[7] = value
    request = contribute(plain, 0, blob=vector_to_bytes(other), adapter_sha256=vector_sha256(other))
    assert (
        refusal_of(before(plain, Stage.CONTRIBUTE, 0).handle(Stage.CONTRIBUTE, request)) == "AdapterInvalid"
    )


# --- cohort, turn and history -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "cohort"),
    [
        ("CohortTooSmall", ["alpha", "beta"]),
        ("CohortRepeatsSite", ["alpha", "beta", "beta"]),
        ("SiteNotInStudy", ["alpha", "beta", "mallory"]),
        ("CohortTooSmall", ["beta", "delta", "gamma"]),
        ("CohortTooSmall", []),
        ("SiteNotInStudy", [1, 2, 3]),
        ("SiteNotInStudy", ["alpha", ["beta"], {}]),
    ],
)
def test_a_cohort_that_the_manifest_does_not_allow_is_refused(
    plain: Tape, before: Before, error: str, cohort: list[Any]
) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    reply = agent.handle(Stage.CONTRIBUTE, contribute(plain, 0, cohort=cohort))
    assert refusal_of(reply) == error


def test_the_same_request_twice_gives_the_same_bytes(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    request = plain.requests[(Stage.CONTRIBUTE, 0)]
    first = agent.handle(Stage.CONTRIBUTE, request)
    assert vector_of(first) == vector_of(plain.replies[(Stage.CONTRIBUTE, 0)])
    assert agent.handle(Stage.CONTRIBUTE, request) == first
    again = SiteAgent(agent.home, models=POOL, clock=Clock())
    assert again.handle(Stage.CONTRIBUTE, request) == first


def test_another_request_for_a_round_already_served_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    body_of(agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 0)]))
    other = plain.forge(Stage.CONTRIBUTE, 0, nonce="ab" * 16)
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, other)) == "RoundAlreadyServed"


def test_a_round_behind_the_verified_history_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.WITNESS, 3)
    other = plain.forge(Stage.CONTRIBUTE, 0, nonce="ab" * 16)
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, other)) == "RoundAlreadyServed"


def test_an_attempt_below_the_last_one_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    body_of(agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, attempt=2)))
    reply = agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 0)])
    assert refusal_of(reply) == "RoundAlreadyServed"


@pytest.mark.parametrize("attempt", [0, 4, 10_000])
def test_an_attempt_outside_the_manifest_is_refused(plain: Tape, before: Before, attempt: int) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    reply = agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, attempt=attempt))
    assert refusal_of(reply) == "RoundLimitReached"


def test_a_round_after_the_studys_last_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.WITNESS, 3)
    reply = agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 2, round=3))
    assert refusal_of(reply) == "RoundLimitReached"


def test_a_round_out_of_order_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    reply = agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 0, round=1))
    assert refusal_of(reply) == "WrongRound"


def test_a_round_whose_history_skips_a_record_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    reply = agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 2)])
    assert refusal_of(reply) in ("WrongRound", "PreviousStateMismatch")
    assert agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 0)])


def test_a_round_that_builds_on_another_record_than_the_last_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 1)
    reply = agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 1, previous="cd" * 32))
    assert refusal_of(reply) == "PreviousStateMismatch"


def first_record(tape: Tape) -> Any:
    return signed_from_json(shown_of(tape, 1)[0][0])


def test_a_forged_record_is_refused(plain: Tape, before: Before) -> None:
    forged = sign_record(SigningKey.generate(), first_record(plain).record)
    request = contribute(plain, 1, records=[signed_to_json(forged)])
    reply = before(plain, Stage.WITNESS, 1).handle(Stage.CONTRIBUTE, request)
    assert refusal_of(reply) == "SignatureInvalid"


def test_a_forked_history_is_refused_although_the_operator_signed_it(plain: Tape, before: Before) -> None:
    """The site has verified round 0; the server now shows a round 1 that builds on another round 0."""
    agent = before(plain, Stage.WITNESS, 2)
    other = replace(first_record(plain).record, adapter_out="ef" * 32)
    second = signed_from_json(shown_of(plain, 2)[0][0]).record
    fork = sign_record(plain.world.operator, replace(second, previous=other.sha256))
    request = contribute(plain, 2, records=[signed_to_json(fork)])
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, request)) == "PreviousStateMismatch"


def test_a_record_of_another_study_is_refused(plain: Tape, before: Before) -> None:
    other = sign_record(plain.world.operator, replace(first_record(plain).record, study="12" * 32))
    request = contribute(plain, 1, records=[signed_to_json(other)])
    reply = before(plain, Stage.WITNESS, 1).handle(Stage.CONTRIBUTE, request)
    assert refusal_of(reply) == "WrongStudy"


@pytest.mark.parametrize("records", [[1], [{}], [{"record": {}, "signature": "00" * 64}], ["x" * 128]])
def test_records_that_are_none_are_refused(plain: Tape, before: Before, records: list[Any]) -> None:
    reply = before(plain, Stage.CONTRIBUTE, 1).handle(Stage.CONTRIBUTE, contribute(plain, 1, records=records))
    assert refusal_of(reply) == "EnvelopeMalformed"


def test_a_record_whose_signature_is_not_hex_is_refused_by_name(plain: Tape, before: Before) -> None:
    record = signed_to_json(first_record(plain)) | {"signature": "z" * 128}
    reply = before(plain, Stage.CONTRIBUTE, 1).handle(
        Stage.CONTRIBUTE, contribute(plain, 1, records=[record])
    )
    assert refusal_of(reply) == "EnvelopeMalformed"


def test_a_request_after_its_deadline_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    reply = agent.handle(Stage.CONTRIBUTE, contribute(plain, 0, deadline_unix_s=START_UNIX_S - 1))
    assert refusal_of(reply) == "DeadlinePassed"


@pytest.mark.parametrize("stage", [Stage.KEYS, Stage.SHARES, Stage.UNMASK])
def test_a_stage_of_another_mode_is_refused(plain: Tape, before: Before, stage: Stage) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    request = plain.forge(Stage.CONTRIBUTE, 0, body=pack_body({}), stage=stage)
    assert refusal_of(agent.handle(stage, request)) == "WrongStage"


@pytest.mark.parametrize("field", ["adapter_sha256", "cohort", "deadline_unix_s"])
def test_a_body_without_a_field_or_with_one_too_many_is_refused(
    plain: Tape, before: Before, field: str
) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    meta, *parts = parts_of(plain, 0)
    for wrong in ({k: v for k, v in meta.items() if k != field}, meta | {field: True}, meta | {"x": 1}):
        request = plain.forge(Stage.CONTRIBUTE, 0, body=pack_body(wrong, *parts))
        assert refusal_of(agent.handle(Stage.CONTRIBUTE, request)) == "EnvelopeMalformed"


# --- the ledger ---------------------------------------------------------------------------------------------


def showing(tape: Tape, round: int, *ledger: bytes) -> bytes:
    """What a recorded contribute request shows, with other parts of the ledger."""
    return deflate(pack_body({"records": shown_of(tape, round)[0]}, *ledger))


def test_a_round_without_a_checkpoint_is_refused_before_a_charge(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    _, _, entry, proof = shown_of(masked, 0)
    reply = agent.handle(Stage.CONTRIBUTE, contribute(masked, 0, shown=showing(masked, 0, b"", entry, proof)))
    assert refusal_of(reply) == "NoteInvalid"
    assert charges(agent) == 0


def test_a_record_that_is_not_in_the_witnessed_log_is_refused(masked: Tape, before: Before) -> None:
    """The operator shows this site the log as it was before the round that the adapter comes from."""
    agent = before(masked, Stage.CONTRIBUTE, 1)
    _, request, _, _ = shown_of(masked, 1)
    *_, opening, proof = shown_of(masked, 0)
    shown = showing(masked, 1, request, opening, proof)
    reply = agent.handle(Stage.CONTRIBUTE, contribute(masked, 1, shown=shown))
    assert refusal_of(reply) in ("InclusionInvalid", "LedgerInvalid")
    assert charges(agent) == 1


def test_a_shrunk_log_is_refused_and_named(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.WITNESS, 2)
    request = masked.forge(Stage.WITNESS, 2, body=pack_body({}, parts_of(masked, 0)[2]))
    assert refusal_of(agent.handle(Stage.WITNESS, request)) == "LogShrunk"
    assert list((agent.home.directory / "witness").glob("*.shrunk"))


def test_nothing_is_revealed_without_the_quorum(masked: Tape, before: Before) -> None:
    survivors, key_set, witnessed = unmask_parts(masked)
    bare = format_lines(parse_lines(inflate(witnessed, max_bytes=1 << 20))[:1])  # one witness
    request = masked.forge(Stage.UNMASK, 0, body=pack_body({}, survivors, key_set, deflate(bare)))
    reply = before(masked, Stage.UNMASK, 0).handle(Stage.UNMASK, request)
    assert refusal_of(reply) == "QuorumNotReached"


def test_an_unmasked_round_without_the_quorum_is_refused(plain: Tape, before: Before) -> None:
    shown = showing(plain, 0, format_lines(parse_lines(shown_of(plain, 0)[1])[:1]))
    reply = before(plain, Stage.CONTRIBUTE, 0).handle(Stage.CONTRIBUTE, contribute(plain, 0, shown=shown))
    assert refusal_of(reply) == "QuorumNotReached"


def test_an_unmasked_round_on_a_record_that_was_never_witnessed_is_refused(
    plain: Tape, before: Before
) -> None:
    """The quorum's lines are of the head before; the record of round 0 is in no log this site has seen."""
    agent = before(plain, Stage.WITNESS, 1)
    shown = deflate(pack_body({"records": shown_of(plain, 1)[0]}, shown_of(plain, 0)[1]))
    reply = agent.handle(Stage.CONTRIBUTE, contribute(plain, 1, shown=shown))
    assert refusal_of(reply) == "LedgerInvalid"


def test_what_a_site_states_of_itself_is_made_once(plain: Tape, before: Before, tmp_path: Path) -> None:
    agent = before(plain, Stage.WITNESS, 1)
    request = plain.forge(Stage.HELLO, 0, nonce="cd" * 16)
    fields = {"speaks": dict, "seen_round": int, "seen_record": str, "seen_size": int}
    first = unpack_body(body_of(agent.handle(Stage.HELLO, request)), fields=fields, parts=2)[1][1]
    data = tmp_path / "fewer"
    shutil.copytree(agent.home.data, data)
    lines = (data / "pairs.jsonl").read_text().splitlines(keepends=True)
    (data / "pairs.jsonl").write_text("".join(lines[:-2]))
    changed = SiteAgent(replace(agent.home, data=data), models=POOL, clock=Clock())
    again = unpack_body(body_of(changed.handle(Stage.HELLO, request)), fields=fields, parts=2)[1][1]
    changed.close()
    assert bytes(first) == bytes(again)


def test_a_site_states_what_it_sent_and_spent_under_its_own_key(masked: Tape) -> None:
    body = body_of(masked.replies[(Stage.CONTRIBUTE, 1)])
    _, parts = unpack_body(body, fields={"adapter_sha256": str, "form": str}, parts=6)
    statement = parse_participation(bytes(parts[3]))
    assert commit(bytes(parts[4]), parts[5]) == statement.commitment
    assert statement.epsilon > 0 and statement.sigma_units > 0 and not statement.summed


def test_a_step_longer_than_the_manifest_allows_is_refused(plain: Tape, before: Before) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 1)
    path = next((agent.home.directory / "state").rglob("adapter.f32"))
    kept = path.read_bytes()
    path.write_bytes(kept[:8] + vector_to_bytes(np.frombuffer(kept[8:], "<f4") + np.float32(1)))
    reply = agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 1)])
    assert refusal_of(reply) == "StepTooLarge"


# --- budget -------------------------------------------------------------------------------------------------


def test_a_contribution_is_charged_once_however_often_it_is_asked(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    request = masked.requests[(Stage.CONTRIBUTE, 0)]
    first = agent.handle(Stage.CONTRIBUTE, request)
    assert not refusal_of(first) and charges(agent) == 1
    assert agent.handle(Stage.CONTRIBUTE, request) == first
    assert charges(agent) == 1


def test_an_attempt_beyond_the_spare_rounds_is_refused(tmp_path: Path, before: Before) -> None:
    world = build(tmp_path, mode="consortium", masking=False, rounds=1, spare_rounds=0)
    tape = record(world, SITE, tmp_path / "tape")
    agent = before(tape, Stage.CONTRIBUTE, 0)
    body_of(agent.handle(Stage.CONTRIBUTE, tape.requests[(Stage.CONTRIBUTE, 0)]))
    second = tape.forge(Stage.CONTRIBUTE, 0, attempt=2)
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, second)) == "BudgetExceeded"
    assert charges(agent) == 1


def test_a_study_over_the_sites_own_limit_is_refused_at_hello(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.HELLO, 0)
    home = replace(agent.home, epsilon=0.1)
    small = SiteAgent(home, models=POOL, clock=Clock())
    assert refusal_of(small.handle(Stage.HELLO, masked.requests[(Stage.HELLO, 0)])) == "BudgetExceeded"
    small.close()


def test_a_contribution_without_a_committed_plan_is_refused(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    agent.home.budget_path.unlink()
    reply = agent.handle(Stage.CONTRIBUTE, masked.requests[(Stage.CONTRIBUTE, 0)])
    assert refusal_of(reply) == "BudgetMismatch"


# --- secure aggregation -------------------------------------------------------------------------------------


def key_set_of(tape: Tape) -> KeySet:
    _, (blob,) = unpack_body(split_message(tape.requests[(Stage.SHARES, 0)])[2], fields={}, parts=1)
    return parse_key_set(bytes(blob))


def shares_for(tape: Tape, altered: Callable[[AdvertisedKeys], AdvertisedKeys], *sites: str) -> bytes:
    """A shares request whose key set has other keys for `sites`."""
    keys = tuple(altered(k) if k.site in sites else k for k in key_set_of(tape).keys)
    return tape.forge(Stage.SHARES, 0, body=pack_body({}, format_key_set(KeySet(keys))))


def resigned(tape: Tape, keys: AdvertisedKeys, **fields: bytes) -> AdvertisedKeys:
    """Keys with other fields, signed by their own site: a peer that works with the server."""
    unsigned = replace(keys, **fields)
    own = load_key(tape.world.out / "sites" / keys.site / "keys" / "message.key")
    return replace(unsigned, signature=own.private.sign(keys_message(unsigned)))


def test_a_key_substituted_for_a_peer_is_refused(masked: Tape, before: Before) -> None:
    request = shares_for(masked, lambda keys: replace(keys, mask_public=bytes([9]) + bytes(31)), "beta")
    assert refusal_of(before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)) == "KeysForged"


def test_equal_keys_are_refused(masked: Tape, before: Before) -> None:
    request = shares_for(masked, lambda k: resigned(masked, k, mask_public=k.share_public), "beta")
    assert refusal_of(before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)) == "KeysRepeated"


def test_two_peers_with_one_key_are_refused(masked: Tape, before: Before) -> None:
    copied = next(k for k in key_set_of(masked).keys if k.site == "gamma").mask_public
    request = shares_for(masked, lambda k: resigned(masked, k, mask_public=copied), "beta")
    assert refusal_of(before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)) == "KeysRepeated"


def test_the_all_zero_point_is_refused(masked: Tape, before: Before) -> None:
    request = shares_for(masked, lambda k: resigned(masked, k, share_public=bytes(32)), "beta")
    assert refusal_of(before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)) == "PublicKeyInvalid"


def test_this_sites_own_keys_altered_are_refused(masked: Tape, before: Before) -> None:
    request = shares_for(masked, lambda k: resigned(masked, k, mask_public=bytes([9]) + bytes(31)), SITE)
    assert refusal_of(before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)) == "OwnKeysAltered"


def test_a_key_set_below_the_floor_is_refused(masked: Tape, before: Before) -> None:
    keys = tuple(k for k in key_set_of(masked).keys if k.site in (SITE, "beta"))
    request = masked.forge(Stage.SHARES, 0, body=pack_body({}, format_key_set(KeySet(keys))))
    reply = before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)
    assert refusal_of(reply) == "CohortTooSmall"


def test_a_key_set_without_this_site_is_refused(masked: Tape, before: Before) -> None:
    keys = tuple(k for k in key_set_of(masked).keys if k.site != SITE)
    request = masked.forge(Stage.SHARES, 0, body=pack_body({}, format_key_set(KeySet(keys))))
    assert refusal_of(before(masked, Stage.SHARES, 0).handle(Stage.SHARES, request)) == "SiteMissing"


def test_a_contribution_before_keys_is_refused(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.KEYS, 0)
    reply = agent.handle(Stage.CONTRIBUTE, masked.requests[(Stage.CONTRIBUTE, 0)])
    assert refusal_of(reply) == "StageOutOfOrder"
    assert charges(agent) == 0


def test_a_reveal_before_an_upload_is_refused(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    assert refusal_of(agent.handle(Stage.UNMASK, masked.requests[(Stage.UNMASK, 0)])) == "WitnessBehind"


def test_masks_for_another_adapter_are_refused_before_a_charge(masked: Tape, before: Before) -> None:
    """The opening's context is made for an adapter that this site was not given."""
    agent = before(masked, Stage.CONTRIBUTE, 0)
    _, opening, *_ = parts_of(masked, 0)
    parsed = parse_opening(opening)
    setup = setup_digest(round_terms(masked.world.study, round=0, attempt=1), key_set_of(masked))
    context = context_digest(setup, adapter="ab" * 32, roster=parsed.roster)
    other = format_opening(replace(parsed, context=context))
    reply = agent.handle(Stage.CONTRIBUTE, contribute(masked, 0, opening=other))
    assert refusal_of(reply) == "ContextDiffers"
    assert charges(agent) == 0


def test_masks_for_another_cohort_are_refused(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    reply = agent.handle(Stage.CONTRIBUTE, contribute(masked, 0, cohort=["alpha", "beta", "gamma"]))
    assert refusal_of(reply) == "CohortTooSmall"


def test_a_round_replayed_with_another_adapter_is_refused(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.UNMASK, 0)
    *_, blob = parts_of(masked, 0)
    other = np.frombuffer(blob, "<f4") + np.float32(1)
    request = contribute(masked, 0, blob=vector_to_bytes(other), adapter_sha256=vector_sha256(other))
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, request)) == "RoundAlreadyServed"


def unmask_parts(tape: Tape) -> tuple[bytes, bytes, bytes]:
    body = split_message(tape.requests[(Stage.UNMASK, 0)])[2]
    survivors, key_set, witnessed = unpack_body(body, fields={}, parts=3)[1]
    return bytes(survivors), bytes(key_set), bytes(witnessed)


def unmask_with(tape: Tape, change: Callable[[SurvivorSet], SurvivorSet]) -> bytes:
    survivors, key_set, witnessed = unmask_parts(tape)
    other = change(parse_survivor_set(survivors))
    return tape.forge(Stage.UNMASK, 0, body=pack_body({}, format_survivor_set(other), key_set, witnessed))


def dropped(survivors: SurvivorSet, site: str) -> SurvivorSet:
    kept = tuple(r for r in survivors.survivors if r.site != site)
    return SurvivorSet(survivors.context, kept, tuple(sorted((*survivors.dropped, site))))


def test_a_second_survivor_set_is_refused(masked: Tape, before: Before) -> None:
    """The server shows one set, then calls a survivor dropped: that would reveal both of its secrets."""
    agent = before(masked, Stage.UNMASK, 0)
    body_of(agent.handle(Stage.UNMASK, masked.requests[(Stage.UNMASK, 0)]))
    second = unmask_with(masked, lambda s: dropped(s, "beta"))
    assert refusal_of(agent.handle(Stage.UNMASK, second)) == "RoundAlreadyServed"
    agent.close()
    reborn = SiteAgent(agent.home, models=POOL, clock=Clock())
    assert refusal_of(reborn.handle(Stage.UNMASK, second)) == "RoundAlreadyServed"


@pytest.mark.parametrize(("round", "attempt"), [(0, 0), (0, 1 << 40), (2, 1), (1 << 50, 1)])
def test_a_reveal_outside_the_study_is_refused(
    masked: Tape, before: Before, round: int, attempt: int
) -> None:
    agent = before(masked, Stage.UNMASK, 0)
    request = masked.forge(Stage.UNMASK, 0, round=round, attempt=attempt)
    assert refusal_of(agent.handle(Stage.UNMASK, request)) == "RoundLimitReached"


def test_a_second_survivor_set_in_another_attempts_name_is_refused(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.UNMASK, 0)
    body_of(agent.handle(Stage.UNMASK, masked.requests[(Stage.UNMASK, 0)]))
    survivors, key_set, witnessed = unmask_parts(masked)
    other = format_survivor_set(dropped(parse_survivor_set(survivors), "beta"))
    request = masked.forge(Stage.UNMASK, 0, attempt=2, body=pack_body({}, other, key_set, witnessed))
    assert refusal_of(agent.handle(Stage.UNMASK, request)) == "StageOutOfOrder"


def test_both_secrets_of_one_peer_are_refused(masked: Tape, before: Before) -> None:
    request = unmask_with(masked, lambda s: SurvivorSet(s.context, s.survivors, ("beta",)))
    reply = before(masked, Stage.UNMASK, 0).handle(Stage.UNMASK, request)
    assert refusal_of(reply) == "BothSecretsAsked"


def test_too_few_survivors_are_refused(masked: Tape, before: Before) -> None:
    request = unmask_with(masked, lambda s: dropped(dropped(s, "beta"), "gamma"))
    reply = before(masked, Stage.UNMASK, 0).handle(Stage.UNMASK, request)
    assert refusal_of(reply) == "CohortTooSmall"


def test_a_survivor_set_without_this_site_is_refused(masked: Tape, before: Before) -> None:
    request = unmask_with(masked, lambda s: dropped(s, SITE))
    assert refusal_of(before(masked, Stage.UNMASK, 0).handle(Stage.UNMASK, request)) == "SiteMissing"


def test_a_forged_receipt_in_the_survivor_set_is_refused(masked: Tape, before: Before) -> None:
    def forged(survivors: SurvivorSet) -> SurvivorSet:
        receipts = tuple(
            replace(r, signature=masked.world.operator.private.sign(
                receipt_message(survivors.context, site=r.site, upload=r.upload)
            )) if r.site == "beta" else r
            for r in survivors.survivors
        )  # fmt: skip
        return SurvivorSet(survivors.context, receipts, survivors.dropped)

    reply = before(masked, Stage.UNMASK, 0).handle(Stage.UNMASK, unmask_with(masked, forged))
    assert refusal_of(reply) == "UploadForged"


# --- what a refusal leaves behind ---------------------------------------------------------------------------


def test_refusals_are_logged_without_data(
    masked: Tape, before: Before, caplog: pytest.LogCaptureFixture
) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    caplog.set_level(logging.DEBUG)
    agent.handle(Stage.CONTRIBUTE, contribute(masked, 0, cohort=["alpha"]))
    agent.handle(Stage.CONTRIBUTE, contribute(masked, 0, deadline_unix_s=1.0))
    with pytest.raises(FedRadError):
        agent.handle(Stage.HELLO, b"junk")
    body_of(agent.handle(Stage.CONTRIBUTE, masked.requests[(Stage.CONTRIBUTE, 0)]))
    agent.handle(Stage.CONTRIBUTE, masked.forge(Stage.CONTRIBUTE, 0, nonce="ab" * 16))
    logged = caplog.text
    for name in ("CohortTooSmall", "DeadlinePassed", "EnvelopeMalformed", "RoundAlreadyServed"):
        assert name in logged
    pairs = [json.loads(line) for line in (data_folder() / SITE / "pairs.jsonl").read_text().splitlines()]
    secrets = [p["patient"] for p in pairs] + [p["findings"] for p in pairs]
    secrets += [path.read_text() for path in agent.home.directory.rglob("*.key")]
    for path in (agent.home.directory / "state").rglob("begun/*.json"):
        secrets.append(json.loads(path.read_text())["seed"])
    for path in (agent.home.directory / "state").rglob("masking/*.json"):
        secrets.append(json.loads(path.read_text())["seed"])
    assert len(secrets) > 15
    for secret in secrets:
        assert secret not in logged


def test_a_refusal_leaves_the_honest_request_served(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.CONTRIBUTE, 0)
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, contribute(masked, 0, cohort=["alpha"])))
    assert not refusal_of(agent.handle(Stage.CONTRIBUTE, masked.requests[(Stage.CONTRIBUTE, 0)]))
    assert charges(agent) == 1


# --- crashes ------------------------------------------------------------------------------------------------


def counted(start: int) -> Callable[[int], bytes]:
    """Randomness that tells one process from the next."""
    count = iter(range(start, 1 << 30))
    return lambda size: hashlib.sha256(str(next(count)).encode()).digest()[:size]


CRASHES = {
    "begin": "client.state.SiteState.begin",
    "charge": "client.budget.Budget.charge",
    "mask": "client.masking.MaskedRounds.mask",
    "spool": "client.state.SiteState.spool",
}


@pytest.mark.parametrize("step", sorted(CRASHES))
def test_an_agent_killed_after_a_step_goes_on_to_the_same_bytes(
    masked: Tape, before: Before, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    request = masked.requests[(Stage.CONTRIBUTE, 0)]
    undisturbed = before(masked, Stage.CONTRIBUTE, 0, random_bytes=counted(0))
    wanted = body_of(undisturbed.handle(Stage.CONTRIBUTE, request))

    agent = before(masked, Stage.CONTRIBUTE, 0, random_bytes=counted(0))
    with monkeypatch.context() as patch:
        module, cls, name = CRASHES[step].rsplit(".", 2)
        owner = getattr(__import__(module, fromlist=[cls]), cls)
        real = getattr(owner, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            real(*args, **kwargs)
            raise NodeDown(step)

        patch.setattr(owner, name, dying)
        with pytest.raises(NodeDown):
            agent.handle(Stage.CONTRIBUTE, request)
    agent.close()

    reborn = SiteAgent(agent.home, models=POOL, clock=Clock(), random_bytes=counted(1000))
    got = body_of(reborn.handle(Stage.CONTRIBUTE, request))
    fields = {"adapter_sha256": str, "form": str}
    _, (upload, *_, vector) = unpack_body(got, fields=fields, parts=6)
    _, (upload_wanted, *_, vector_wanted) = unpack_body(wanted, fields=fields, parts=6)
    assert bytes(upload) == bytes(upload_wanted)
    assert bytes(vector) == bytes(vector_wanted)
    assert charges(reborn) == 1
    reborn.close()


def test_an_agent_killed_while_revealing_reveals_the_same(
    masked: Tape, before: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = masked.requests[(Stage.UNMASK, 0)]
    wanted = body_of(masked.replies[(Stage.UNMASK, 0)])
    agent = before(masked, Stage.UNMASK, 0)
    with monkeypatch.context() as patch:
        patch.setattr("client.state.SiteState.begin", _raise)
        with pytest.raises(NodeDown):
            agent.handle(Stage.UNMASK, request)
    agent.close()
    reborn = SiteAgent(agent.home, models=POOL, clock=Clock())
    assert body_of(reborn.handle(Stage.UNMASK, request)) == wanted


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise NodeDown("killed")


def test_data_changed_after_a_charge_stops_the_repeat(
    masked: Tape, before: Before, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same noise on other data would show their difference."""
    request = masked.requests[(Stage.CONTRIBUTE, 0)]
    agent = before(masked, Stage.CONTRIBUTE, 0)
    with monkeypatch.context() as patch:
        patch.setattr("client.masking.MaskedRounds.mask", _raise)
        with pytest.raises(NodeDown):
            agent.handle(Stage.CONTRIBUTE, request)
    agent.close()
    data = tmp_path / "changed"
    shutil.copytree(agent.home.data, data)
    lines = (data / "pairs.jsonl").read_text().splitlines(keepends=True)
    (data / "pairs.jsonl").write_text("".join(lines[:-1]))
    changed = SiteAgent(replace(agent.home, data=data), models=POOL, clock=Clock())
    assert refusal_of(changed.handle(Stage.CONTRIBUTE, request)) == "RoundAlreadyServed"
    changed.close()


def test_finishing_gives_back_the_rest_of_the_budget(masked: Tape, before: Before) -> None:
    agent = before(masked, Stage.WITNESS, 2)
    body_of(agent.handle(Stage.WITNESS, masked.requests[(Stage.WITNESS, 2)]))
    assert agent.home.budget_path.read_text().count('"kind":"end"') == 1
    assert not list((agent.home.directory / "state").rglob("masking/*.json"))


# --- what the site's own data may say -----------------------------------------------------------------------


def test_a_refusal_about_the_sites_data_says_nothing_of_it(
    plain: Tape, before: Before, tmp_path: Path
) -> None:
    agent = before(plain, Stage.HELLO, 0)
    data = tmp_path / "data"
    shutil.copytree(agent.home.data, data)
    image = sorted(data.rglob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:60])
    own = tmp_path / "own"
    shutil.copytree(agent.home.directory, own)
    shutil.rmtree(own / "cache", ignore_errors=True)
    broken = SiteAgent(replace(agent.home, directory=own, data=data), models=POOL, clock=Clock())
    reply = broken.handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])
    broken.close()
    body, _ = unpack_body(split_message(reply)[2], fields={"error": str, "message": str})
    assert body["error"] == "DataInsufficient"
    assert image.name not in body["message"] and not any(c.isdigit() for c in body["message"])


def test_whoever_watches_progress_cannot_count_patients(plain: Tape, before: Before) -> None:
    events: list[tuple[str, int]] = []
    agent = before(
        plain, Stage.CONTRIBUTE, 0, report=lambda progress: events.append((progress.stage, progress.percent))
    )
    assert not refusal_of(agent.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 0)]))
    assert events == [("contribute", 0), ("contribute", 100)]


def test_data_that_changed_is_read_again(plain: Tape, before: Before, tmp_path: Path) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 0)
    data = tmp_path / "data"
    shutil.copytree(agent.home.data, data)
    changing = SiteAgent(replace(agent.home, data=data), models=POOL, clock=Clock())
    changing.handle(Stage.HELLO, plain.requests[(Stage.HELLO, 0)])
    running = changing._running[plain.world.study.sha256]
    assert running.data is not None
    patients = running.data.patients
    lines = (data / "pairs.jsonl").read_text().splitlines(keepends=True)
    withdrawn = next(p for p in patients)
    (data / "pairs.jsonl").write_text("".join(line for line in lines if f'"{withdrawn}"' not in line))
    assert not refusal_of(changing.handle(Stage.CONTRIBUTE, plain.requests[(Stage.CONTRIBUTE, 0)]))
    changing.close()
    assert running.data is not None and withdrawn not in running.data.patients
