"""A release: only what the operator signed, byte for byte, and nothing unprotected by accident."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.canonical import canonical_json
from common.config import Mode, Study, parse_study_toml
from common.errors import AdapterInvalid, ReleaseInvalid, SignatureInvalid
from common.identity import Purpose, SigningKey
from common.model.lora import Vector, adapter_tensors, vector_size
from common.model.release import open_release, summary, write_release
from common.model.tiny import tiny_base_directory
from tests.simulator import study_text

KEY = SigningKey.from_seed(b"o" * 32)
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "study.json"]


def study(*, mode: str = "consortium", seeded: bool = False) -> Study:
    parsed = parse_study_toml(study_text(mode=mode, seed=5 if seeded else None))
    tensors = adapter_tensors(tiny_base_directory(), parsed.adapter)
    return replace(
        parsed,
        adapter=replace(parsed.adapter, tensors=tensors),
        cohort=replace(parsed.cohort, operator_key=KEY.public),
    )


def vector() -> Vector:
    size = vector_size(study().adapter.tensors)
    return np.random.default_rng(1).standard_normal(size).astype(np.float32)


def write(directory: Path, of: Study) -> None:
    write_release(directory, of, vector(), KEY, round=2, release_epsilon=7.5, card="# A model\n")


@functools.cache
def _private() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fedrad-test-release-"))
    write(folder, study())
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    shutil.copytree(_private(), tmp_path / "release")
    return tmp_path / "release"


def test_a_release_opens_to_what_was_signed(release: Path) -> None:
    opened = open_release(release, operator_key=KEY.public)
    assert np.array_equal(opened.adapter, vector())
    assert opened.study == study()
    assert (opened.note.round, opened.note.release_epsilon, opened.note.mode) == (2, 7.5, "consortium")
    assert "(ε, δ) = (7.50," in summary(opened.note)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_refused_by_name(release: Path, name: str) -> None:
    data = bytearray((release / name).read_bytes())
    data[-2] ^= 1
    (release / name).write_bytes(data)
    with pytest.raises(ReleaseInvalid, match=name):
        open_release(release)


@pytest.mark.parametrize("name", [*FILES, "release.json", "release.sig"])
def test_a_missing_file_is_refused_by_name(release: Path, name: str) -> None:
    (release / name).unlink()
    with pytest.raises(ReleaseInvalid, match=name):
        open_release(release)


def test_another_operators_key_is_refused(release: Path) -> None:
    with pytest.raises(SignatureInvalid):
        open_release(release, operator_key=SigningKey.generate().public)


def test_a_release_signed_by_somebody_else_is_refused(release: Path) -> None:
    forged = SigningKey.generate().sign(Purpose.RELEASE, (release / "release.json").read_bytes())
    (release / "release.sig").write_text(forged.hex())
    with pytest.raises(SignatureInvalid):
        open_release(release)


def test_a_release_that_claims_another_epsilon_is_refused(release: Path) -> None:
    note = json.loads((release / "release.json").read_text()) | {"release_epsilon": 0.1}
    (release / "release.json").write_bytes(canonical_json(note))
    with pytest.raises(SignatureInvalid):
        open_release(release)


def test_a_note_of_another_study_is_refused_although_it_is_signed(release: Path) -> None:
    note = json.loads((release / "release.json").read_text()) | {"study": "ab" * 32}
    encoded = canonical_json(note)
    (release / "release.json").write_bytes(encoded)
    (release / "release.sig").write_text(KEY.sign(Purpose.RELEASE, encoded).hex())
    with pytest.raises(ReleaseInvalid, match="study"):
        open_release(release)


@pytest.mark.parametrize("change", [{"extra": 1}, {"files": {}}])
def test_a_note_with_other_fields_is_refused(release: Path, change: dict[str, object]) -> None:
    note = json.loads((release / "release.json").read_text()) | change
    (release / "release.json").write_bytes(canonical_json(note))
    with pytest.raises(ReleaseInvalid):
        open_release(release)


@pytest.mark.parametrize(
    "change",
    [{"files": None}, {"mode": 7}, {"round": "2"}, {"seeded": 0}, {"mode": "local"}, {"seeded": True}],
)
def test_a_mistyped_note_is_refused_by_name(release: Path, change: dict[str, object]) -> None:
    note = json.loads((release / "release.json").read_text()) | change
    encoded = canonical_json(note)
    (release / "release.json").write_bytes(encoded)
    (release / "release.sig").write_text(KEY.sign(Purpose.RELEASE, encoded).hex())
    with pytest.raises(ReleaseInvalid):
        open_release(release)


@pytest.mark.parametrize(("mode", "seeded"), [("plain", False), ("consortium", True)])
def test_a_release_without_privacy_is_refused_unless_asked_for(
    tmp_path: Path, mode: str, seeded: bool
) -> None:
    write(tmp_path, study(mode=mode, seeded=seeded))
    with pytest.raises(ReleaseInvalid, match="without"):
        open_release(tmp_path)
    opened = open_release(tmp_path, allow_unprotected=True)
    assert np.array_equal(opened.adapter, vector())
    if Mode(mode) is Mode.PLAIN:
        assert "no differential privacy" in summary(opened.note)


def test_an_adapter_whose_manifest_lists_other_tensors_is_refused(tmp_path: Path) -> None:
    of = study()
    fewer = replace(of, adapter=replace(of.adapter, tensors=of.adapter.tensors[:-1]))
    write(tmp_path / "whole", of)
    write_release(
        tmp_path / "fewer", fewer, vector()[: vector_size(fewer.adapter.tensors)], KEY, round=2,
        release_epsilon=7.5, card="",
    )  # fmt: skip
    for name in ("adapter_model.safetensors",):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "fewer" / name)
    note = json.loads((tmp_path / "fewer" / "release.json").read_text())
    whole = json.loads((tmp_path / "whole" / "release.json").read_text())
    note["files"]["adapter_model.safetensors"] = whole["files"]["adapter_model.safetensors"]
    encoded = canonical_json(note)
    (tmp_path / "fewer" / "release.json").write_bytes(encoded)
    (tmp_path / "fewer" / "release.sig").write_text(KEY.sign(Purpose.RELEASE, encoded).hex())
    with pytest.raises(AdapterInvalid):
        open_release(tmp_path / "fewer")
