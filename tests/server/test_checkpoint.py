"""The server's durable state: kills between its steps, torn lines, other studies, locks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import format_study
from common.errors import CheckpointInvalid, FedRadError, RunDirectoryBusy, SignatureInvalid
from common.identity import Purpose
from common.model.lora import Vector, read_adapter, vector_sha256
from common.records import SignedRecord, sign_record
from server.checkpoint import (
    Pending,
    StudyDirectory,
    StudyState,
    read_signed_study,
    write_signed_study,
)
from server.optimizer import initial_state
from server.round import make_record, plan_attempt
from tests.simulator import Consortium, build


@pytest.fixture
def world(tmp_path: Path) -> Consortium:
    return build(tmp_path, mode="plain", rounds=9)


def initial(world: Consortium) -> Vector:
    return read_adapter(world.server / "initial", world.study.adapter.tensors)


def advance(world: Consortium, state: StudyState) -> tuple[StudyState, SignedRecord]:
    """The state and record after one more round, with made-up values."""
    study, round = world.study, state.round + 1
    adapter = state.adapter + np.float32(1)
    pending = plan_attempt(
        study, round=round, attempt=1, cohort=("alpha",), histories={}, sizes={}, versions={}, now_unix_s=1.0
    )
    record = make_record(
        study, state, pending, adapter_out=vector_sha256(adapter), contributions={"alpha": "ab" * 32},
        missing={"beta": "refused: because of x"}, site_share_sigma_units=0.0, server_sigma_units=0.0,
        rolled_back_to="",
        now_unix_s=1.0,
    )  # fmt: skip
    assert record.missing == {"beta": "refused"}
    optimizer = replace(initial_state(study), first=np.full_like(adapter, round))
    return StudyState(round, adapter, optimizer, record.sha256), sign_record(world.operator, record)


def saved(world: Consortium, rounds: int) -> StudyState:
    opened = StudyDirectory(world.server)
    state = opened.load_state(initial(world))
    for _ in range(rounds):
        state, signed = advance(world, state)
        opened.save_round(state, signed)
    opened.close()
    return state


def loaded(world: Consortium) -> StudyState:
    opened = StudyDirectory(world.server)
    try:
        return opened.load_state(initial(world))
    finally:
        opened.close()


def test_a_fresh_directory_starts_before_the_first_round(world: Consortium) -> None:
    state = loaded(world)
    assert (state.round, state.record_sha256) == (-1, world.study.sha256)


def test_a_saved_state_loads_whole(world: Consortium) -> None:
    state, got = saved(world, 3), loaded(world)
    assert (got.round, got.record_sha256) == (2, state.record_sha256)
    assert np.array_equal(got.adapter, state.adapter)
    assert np.array_equal(got.optimizer.first, state.optimizer.first)
    assert got.optimizer.steps == state.optimizer.steps


def test_only_the_newest_rounds_are_kept(world: Consortium) -> None:
    saved(world, 5)
    assert sorted(p.name for p in (world.server / "rounds").iterdir()) == ["000003", "000004"]


def test_a_kill_between_state_and_record_is_mended(world: Consortium) -> None:
    state = saved(world, 2)
    path = world.server / "records.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert loaded(world).record_sha256 == state.record_sha256
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("torn", [1, 50, 400])
def test_a_torn_last_line_is_cut_off_and_written_again(world: Consortium, torn: int) -> None:
    state = saved(world, 2)
    path = world.server / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn])
    assert loaded(world).record_sha256 == state.record_sha256
    assert path.read_bytes() == whole


def test_a_half_written_round_is_no_round(world: Consortium) -> None:
    saved(world, 1)
    partial = world.server / "rounds" / ".000001.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{")
    assert loaded(world).round == 0


def test_an_adapter_that_is_not_the_recorded_one_is_refused(world: Consortium) -> None:
    saved(world, 1)
    path = world.server / "rounds" / "000000" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid):
        loaded(world)


def test_a_record_that_is_not_the_states_is_refused(world: Consortium) -> None:
    saved(world, 1)
    path = world.server / "rounds" / "000000" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"record_sha256": "ab" * 32}))
    with pytest.raises(CheckpointInvalid):
        loaded(world)


@pytest.mark.parametrize("name", ["state.json", "optimizer.npz"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80junk"])
def test_a_damaged_round_is_refused_by_name(world: Consortium, name: str, content: bytes | None) -> None:
    saved(world, 1)
    path = world.server / "rounds" / "000000" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointInvalid):
        loaded(world)


def test_records_ahead_of_the_newest_round_are_refused(world: Consortium) -> None:
    """Going back behind what sites have verified would fork the history."""
    saved(world, 2)
    shutil.rmtree(world.server / "rounds" / "000001")
    with pytest.raises(CheckpointInvalid, match="records"):
        loaded(world)


def test_a_damaged_record_line_is_refused_by_name(world: Consortium) -> None:
    saved(world, 1)
    path = world.server / "records.jsonl"
    path.write_bytes(b"{junk\n" + path.read_bytes())
    with pytest.raises(FedRadError):
        loaded(world)


def test_a_second_server_is_refused_until_the_first_is_gone(world: Consortium) -> None:
    first = StudyDirectory(world.server)
    with pytest.raises(RunDirectoryBusy):
        StudyDirectory(world.server)
    first.close()
    StudyDirectory(world.server).close()


def test_another_study_in_the_directory_is_refused(world: Consortium) -> None:
    other = format_study(replace(world.study, cohort=replace(world.study.cohort, deadline_s=7.0)))
    with pytest.raises(RunDirectoryBusy, match="--out"):
        write_signed_study(world.server, other, world.operator.sign(Purpose.STUDY, other))
    same = format_study(world.study)
    write_signed_study(world.server, same, world.operator.sign(Purpose.STUDY, same))


def test_a_study_that_the_operator_did_not_sign_is_refused(world: Consortium) -> None:
    (world.server / "operator.sig").write_text("00" * 64)
    with pytest.raises(SignatureInvalid):
        read_signed_study(world.server)


@pytest.mark.parametrize("name", ["study.json", "operator.sig"])
def test_a_directory_without_a_signed_study_is_refused(world: Consortium, name: str) -> None:
    (world.server / name).unlink()
    with pytest.raises(CheckpointInvalid):
        read_signed_study(world.server)


def test_a_directory_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid):
        StudyDirectory(tmp_path / "nowhere")


def test_a_pending_attempt_survives_a_restart(world: Consortium) -> None:
    pending = Pending(3, 2, ("alpha", "beta"), 5.0, "ab" * 16, {"alpha": 2, "beta": -1})
    opened = StudyDirectory(world.server)
    assert opened.pending() is None
    opened.save_pending(pending)
    opened.close()
    again = StudyDirectory(world.server)
    assert again.pending() == pending
    again.clear_pending()
    assert again.pending() is None
    again.close()
