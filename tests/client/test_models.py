"""Base models: read only, before they are loaded and while they are used."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from client.models import verify_unwritable
from common.errors import BaseWritable
from common.model.loading import AdaptedModel
from common.protocol import Stage
from tests.simulator import POOL, build, record, refusal_of, split_message


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True, mode=0o755)
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "sub" / "config.json").write_text("{}")
    for path in base.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return base


def test_a_base_that_only_its_owner_can_write_passes(base: Path) -> None:
    verify_unwritable([base])
    (base / "model.safetensors").chmod(0o664)  # a group of the user's own, as umask 002 makes it
    verify_unwritable([base])


def test_a_base_that_is_not_there_is_somebody_elses_question(tmp_path: Path) -> None:
    verify_unwritable([tmp_path / "none"])


@pytest.mark.parametrize("name", [".", "sub", "model.safetensors", "sub/config.json"])
def test_a_base_that_all_can_write_is_refused(base: Path, name: str) -> None:
    (base / name).chmod(0o777)
    with pytest.raises(BaseWritable, match="chmod go-w"):
        verify_unwritable([base])


def test_a_directory_above_that_all_can_write_is_refused_unless_sticky(base: Path) -> None:
    base.parent.chmod(0o777)
    with pytest.raises(BaseWritable):
        verify_unwritable([base])
    base.parent.chmod(0o1777)
    verify_unwritable([base])
    base.parent.chmod(0o700)


def test_a_base_that_the_relays_group_can_write_is_refused(base: Path) -> None:
    (base / "model.safetensors").chmod(0o664)
    with pytest.raises(BaseWritable):
        verify_unwritable([base], relay_group=os.getegid())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_base_of_another_user_or_group_is_refused(base: Path) -> None:
    os.chown(base / "model.safetensors", 65534, -1)
    with pytest.raises(BaseWritable, match="user 65534"):
        verify_unwritable([base])
    os.chown(base / "model.safetensors", 0, 65534)
    verify_unwritable([base])
    (base / "model.safetensors").chmod(0o664)
    with pytest.raises(BaseWritable, match="group 65534"):
        verify_unwritable([base])


def fingerprint(adapted: AdaptedModel) -> str:
    """A hash of every parameter and buffer that the adapter does not own."""
    own = {id(parameter) for _, parameter in adapted.parameters}
    running = hashlib.sha256()
    values = [*adapted.model.named_parameters(), *adapted.model.named_buffers()]
    for name, value in sorted(values, key=lambda item: item[0]):
        if id(value) not in own:
            running.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return running.hexdigest()


def test_rounds_honest_and_hostile_leave_the_base_as_it_was(tmp_path: Path) -> None:
    world = build(tmp_path, mode="plain", rounds=2)
    base = world.agent("alpha").home.base_directory("tiny")
    hashes = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.rglob("*") if path.is_file()
    }
    with POOL.use(world.study, base) as adapted:
        before = fingerprint(adapted)
        frozen = [p for _, p in adapted.model.named_parameters() if not p.requires_grad]
    tape = record(world, "alpha", tmp_path / "tape")
    agent = tape.agent_before(Stage.CONTRIBUTE, 1, tmp_path / "victim")
    body = bytearray(split_message(tape.requests[(Stage.CONTRIBUTE, 1)])[2])
    body[-8:] = b"\x00\x00\xc0\x7f" * 2  # NaN at the end of the adapter
    assert refusal_of(agent.handle(Stage.CONTRIBUTE, tape.forge(Stage.CONTRIBUTE, 1, body=bytes(body))))
    agent.close()
    with POOL.use(world.study, base) as adapted:
        assert fingerprint(adapted) == before
        assert frozen and not any(parameter.grad is not None for parameter in frozen)
    assert hashes == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in hashes}
