"""A release: one adapter version with its study, its privacy and a signature, as a directory of plain files.

    adapter_model.safetensors  adapter_config.json    what peft loads
    study.json                                        the signed manifest's canonical JSON
    release.json  release.sig                         hashes, ε, marks; signed by the operator
    README.md                                         the model card

Guarantees: `open_release` returns only what the operator's key signed, byte for byte, and refuses a release
without privacy (mode plain, or seeded draws) unless told otherwise. Ledger proofs and TUF come on top.
"""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.config import Mode, Study, format_study, parse_study
from common.errors import FedRadError, ReleaseInvalid
from common.files import write_atomic
from common.identity import Purpose, SigningKey, verify_signature
from common.model.lora import Vector, read_adapter, vector_sha256, write_adapter

_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "study.json")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ReleaseNote:
    """What the operator signs: `files` maps every file to its SHA-256; ε is 0 where none is claimed."""

    schema: int
    study: str
    round: int
    mode: str
    seeded: bool
    adapter_sha256: str
    release_epsilon: float
    delta: float
    files: dict[str, str]


@dataclass(frozen=True)
class Release:
    """A verified release in memory."""

    directory: Path
    note: ReleaseNote
    study: Study
    adapter: Vector


def write_release(
    directory: Path,
    study: Study,
    vector: Vector,
    key: SigningKey,
    *,
    round: int,
    release_epsilon: float,
    card: str,
) -> None:
    """Write and sign a release directory; `card` is the model card's text."""
    write_adapter(directory, vector, study.adapter.tensors, study.adapter)
    write_atomic(directory / "study.json", format_study(study))
    write_atomic(directory / "README.md", card.encode())
    note = ReleaseNote(
        schema=1,
        study=study.sha256,
        round=round,
        mode=study.privacy.mode.value,
        seeded=study.testing is not None,
        adapter_sha256=vector_sha256(vector),
        release_epsilon=release_epsilon,
        delta=study.privacy.delta,
        files={name: sha256_hex((directory / name).read_bytes()) for name in _FILES},
    )
    encoded = canonical_json(asdict(note))
    write_atomic(directory / "release.json", encoded)
    write_atomic(directory / "release.sig", key.sign(Purpose.RELEASE, encoded).hex().encode())


def open_release(
    directory: Path, *, operator_key: str | None = None, allow_unprotected: bool = False
) -> Release:
    """Verify a release and read its adapter; raises ReleaseInvalid, SignatureInvalid, AdapterInvalid.

    Without `operator_key` the signature is checked against the key that the release's own study names.
    """
    note, encoded = _read_note(directory)
    for name, expected in sorted(note.files.items()):
        try:
            got = sha256_hex((directory / name).read_bytes())
        except OSError as error:
            raise ReleaseInvalid(
                f"{directory / name}: expected this file of the release, got none"
            ) from error
        if got != expected:
            raise ReleaseInvalid(f"{directory / name}: expected SHA-256 {expected[:16]}…, got {got[:16]}…")
    study = parse_study((directory / "study.json").read_bytes())
    signed_by = operator_key or study.cohort.operator_key
    try:
        signature = bytes.fromhex((directory / "release.sig").read_text().strip())
    except (OSError, ValueError) as error:
        raise ReleaseInvalid(f"{directory / 'release.sig'}: expected a signature, got none") from error
    verify_signature(signed_by, Purpose.RELEASE, encoded, signature)
    if study.sha256 != note.study:
        raise ReleaseInvalid(f"{directory}: expected study {note.study[:16]}…, got {study.sha256[:16]}…")
    if (note.mode, note.seeded) != (study.privacy.mode.value, study.testing is not None):
        raise ReleaseInvalid(f"{directory}: expected mode and seeding as in its study, got others")
    unprotected = note.mode == Mode.PLAIN.value or note.seeded
    if unprotected and not allow_unprotected:
        why = "its draws were seeded for a test" if note.seeded else "it was trained in mode plain"
        raise ReleaseInvalid(
            f"{directory}: expected a release with differential privacy, got one without ({why}); "
            "--allow-unprotected runs it where no patient's data went in"
        )
    adapter = read_adapter(directory, study.adapter.tensors)
    if vector_sha256(adapter) != note.adapter_sha256:
        raise ReleaseInvalid(f"{directory}: expected adapter {note.adapter_sha256[:16]}…, got another")
    return Release(directory, note, study, adapter)


def _read_note(directory: Path) -> tuple[ReleaseNote, bytes]:
    path = directory / "release.json"
    try:
        encoded = path.read_bytes()
        value: Any = parse_canonical(encoded, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise ReleaseInvalid(f"{path}: expected a release, got none") from error
    except FedRadError as error:
        raise ReleaseInvalid(f"{path}: {error}") from error
    names = set(ReleaseNote.__dataclass_fields__)
    if not isinstance(value, dict) or set(value) != names:
        raise ReleaseInvalid(f"{path}: expected the fields {', '.join(sorted(names))}")
    for name, kind in typing.get_type_hints(ReleaseNote).items():
        if kind is float and type(value[name]) is int:
            value[name] = float(value[name])
        if type(value[name]) is not (typing.get_origin(kind) or kind):
            raise ReleaseInvalid(f"{path}: {name}: expected {kind}, got {type(value[name]).__name__}")
    if set(value["files"]) != set(_FILES):
        raise ReleaseInvalid(f"{path}: files: expected {', '.join(_FILES)}")
    return ReleaseNote(**value), encoded


def summary(note: ReleaseNote) -> str:
    """Say in one line what a release is and what it guarantees."""
    privacy = (
        "no differential privacy"
        if note.mode == Mode.PLAIN.value
        else f"(ε, δ) = ({note.release_epsilon:.2f}, {note.delta:.1e}) for one patient at one site"
    )
    return f"round {note.round}, adapter {note.adapter_sha256[:12]}, {privacy}"
