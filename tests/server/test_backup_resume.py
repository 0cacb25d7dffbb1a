"""A server restored on another machine goes on; the sites decide whether its state is new enough."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import FedRadError
from common.model.lora import vector_sha256
from common.protocol import Header, Stage
from server.backup import restore_backup, write_backup
from tests.simulator import Consortium, build

PASSPHRASE = b"correct horse battery staple"


class PowerCut(Exception):
    """The machine of the server is gone."""


def undisturbed(directory: Path, mode: str) -> str:
    world = build(directory / "undisturbed", mode=mode)
    state = world.run()
    world.close()
    return vector_sha256(state.adapter)


def cut_at(stage: Stage, round: int) -> Any:
    def before(site: str, header: Header, request: bytes) -> bytes:
        if (header.stage, header.round) == (stage, round):
            raise PowerCut
        return request

    return before


def run_until_cut(world: Consortium, stage: Stage, round: int) -> None:
    world.before = cut_at(stage, round)
    with pytest.raises(PowerCut):
        world.run()
    world.before = lambda site, header, request: request


def move(world: Consortium, tmp_path: Path) -> None:
    """Back the server up, lose its machine, restore it."""
    file = tmp_path / "server.fedrad"
    write_backup(world.server, file, passphrase=PASSPHRASE, now_unix_s=0, pause=lambda: None)
    shutil.rmtree(world.server)
    restore_backup(file, world.server, passphrase=PASSPHRASE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "consortium"])
@pytest.mark.parametrize("stage", [Stage.CONTRIBUTE, Stage.UNMASK])
def test_a_server_that_died_and_moved_ends_with_the_same_adapter(
    tmp_path: Path, mode: str, stage: Stage
) -> None:
    if mode == "plain" and stage is Stage.UNMASK:
        pytest.skip("mode plain has no unmasking")
    world = build(tmp_path, mode=mode)
    run_until_cut(world, stage, 1)
    move(world, tmp_path)
    state = world.run()
    world.close()
    assert vector_sha256(state.adapter) == undisturbed(tmp_path, mode)


@pytest.mark.slow
def test_a_copy_taken_while_a_round_ran_is_gone_on_from(tmp_path: Path) -> None:
    world = build(tmp_path, mode="consortium")
    file = tmp_path / "hot.fedrad"

    def before(site: str, header: Header, request: bytes) -> bytes:
        if header.stage is Stage.UNMASK and header.round == 1:
            if not file.exists():
                write_backup(world.server, file, passphrase=PASSPHRASE, now_unix_s=0, pause=lambda: None)
            raise PowerCut
        return request

    world.before = before
    with pytest.raises(PowerCut):
        world.run()
    world.before = lambda site, header, request: request
    shutil.rmtree(world.server)
    restore_backup(file, world.server, passphrase=PASSPHRASE)
    state = world.run()
    world.close()
    assert vector_sha256(state.adapter) == undisturbed(tmp_path, "consortium")


@pytest.mark.slow
def test_a_copy_older_than_what_the_sites_have_seen_is_refused_by_them(tmp_path: Path) -> None:
    world = build(tmp_path, mode="consortium", rounds=4)
    run_until_cut(world, Stage.CONTRIBUTE, 1)
    old = tmp_path / "old.fedrad"
    write_backup(world.server, old, passphrase=PASSPHRASE, now_unix_s=0, pause=lambda: None)
    run_until_cut(world, Stage.CONTRIBUTE, 3)
    charged = {
        path: path.read_bytes() for path in (world.out / "sites").rglob("budget.jsonl") if path.is_file()
    }
    shutil.rmtree(world.server)
    restore_backup(old, world.server, passphrase=PASSPHRASE)
    with pytest.raises(FedRadError):
        world.run()
    world.close()
    assert charged == {path: path.read_bytes() for path in charged}  # nothing was charged for it
