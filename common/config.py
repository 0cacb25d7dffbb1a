"""The study manifest: everything that one federated training run is allowed to do.

`study.toml` (for people) → frozen dataclasses → canonical JSON → SHA-256, the study's name everywhere.
Guarantees: unknown or missing keys, wrong types, values outside their range and impossible combinations
are refused with the line, the key, what was expected and what was got. A *resolved* study also pins the
base model's files, the adapter's tensors and every site's public key; only a resolved study is signed.
It does not check that the base exists or that the keys belong to whom they name.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.errors import ManifestInvalid

MAX_MANIFEST_BYTES = 4 << 20
SCHEMA = 1
_ID = r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?"
_HEX64 = r"[0-9a-f]{64}"


class StageName(StrEnum):
    """What a stage trains: `align` the projector, `tune` projector and LoRA."""

    ALIGN = "align"
    TUNE = "tune"


class Schedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Strategy(StrEnum):
    """How LoRA's two factors are trained: RoLoRA alternation, FFA (A frozen) or both at once."""

    ALTERNATING = "alternating"
    FROZEN_A = "frozen-a"
    JOINT = "joint"


class OptimizerName(StrEnum):
    ADAM = "adam"
    SGD = "sgd"


class Mode(StrEnum):
    CONSORTIUM = "consortium"
    LOCAL = "local"
    PLAIN = "plain"


class OnFailedRound(StrEnum):
    REPEAT = "repeat"
    END = "end"


class TensorGroup(StrEnum):
    PROJECTOR = "projector"
    LORA_A = "lora_a"
    LORA_B = "lora_b"


def _number(low: float, high: float, *, default: Any = dataclasses.MISSING, open_low: bool = False) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "open_low": open_low})


def _text(pattern: str, meaning: str, *, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"pattern": pattern, "meaning": meaning})


@dataclass(frozen=True)
class StudySection:
    id: str = _text(_ID, "lower-case letters, digits and hyphens, at most 64")
    purpose: str = _text(r"[^\x00-\x1f]{1,500}", "one line of at most 500 characters")


@dataclass(frozen=True)
class FileHash:
    path: str = _text(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", "a relative path")
    bytes: int = _number(0, 1 << 50)
    sha256: str = _text(_HEX64, "64 hex digits")


@dataclass(frozen=True)
class BaseSection:
    """The frozen base model: a Llava checkpoint directory whose every file is pinned once resolved."""

    name: str = _text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "a name of at most 100 characters")
    files: tuple[FileHash, ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor: its name in the adapter file, shape and group; always float32."""

    name: str = _text(r"[A-Za-z0-9_.]{1,250}", "a tensor name")
    shape: tuple[int, ...] = ()
    group: TensorGroup = TensorGroup.PROJECTOR

    @property
    def size(self) -> int:
        size = 1
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True)
class AdapterSection:
    rank: int = _number(1, 512)
    alpha: float = _number(0, 4096, open_low=True)
    targets: str = _text(r"[^\x00-\x1f]{1,300}", "a regular expression")
    strategy: Strategy = Strategy.ALTERNATING
    init_seed: int = _number(0, 2**31 - 1, default=0)
    initial_sha256: str = _text(r"(?:[0-9a-f]{64})?", "64 hex digits", default="")
    tensors: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class StageSection:
    name: StageName
    rounds: int = _number(1, 100_000)
    learning_rate: float = _number(0, 10, open_low=True)
    schedule: Schedule = Schedule.COSINE
    warmup_rounds: int = _number(0, 100_000, default=0)


@dataclass(frozen=True)
class TrainingSection:
    """How a site turns its pairs into one gradient sum.

    `patients` is a public, nominal number of training patients of the whole cohort (no site's true count);
    `sampling_rate` is the probability with which each patient is drawn in a round. Their product is the
    denominator of every gradient sum.
    """

    sampling_rate: float = _number(0, 1, open_low=True)
    patients: int = _number(1, 10_000_000)
    studies_per_patient: int = _number(1, 64, default=2)
    max_tokens: int = _number(8, 8192, default=128)
    max_new_tokens: int = _number(1, 4096, default=64)
    microbatch_patients: int = _number(1, 4096, default=32)
    local_steps: int = _number(1, 1000, default=1)

    @property
    def denominator(self) -> float:
        return self.sampling_rate * self.patients


@dataclass(frozen=True)
class OptimizerSection:
    name: OptimizerName = OptimizerName.ADAM
    beta1: float = _number(0, 0.9999, default=0.9)
    beta2: float = _number(0, 0.99999, default=0.99)
    epsilon: float = _number(0, 1, default=1e-8, open_low=True)
    momentum: float = _number(0, 0.9999, default=0.0)
    max_step_norm: float = _number(0, 1e9, default=1e6, open_low=True)


@dataclass(frozen=True)
class PrivacySection:
    """Differential privacy of the study; in mode `plain` nothing is protected and nothing is released.

    `site_epsilon` and `release_epsilon` are what the study may cost one patient at one site, over all rounds,
    against the server and against anyone with the released model. The noise multipliers that meet them are
    filled in when the study is signed.
    """

    mode: Mode = Mode.PLAIN
    clip_norm: float = _number(0, 1e6, default=1.0, open_low=True)
    site_epsilon: float = _number(0, 1000, default=16.0, open_low=True)
    release_epsilon: float = _number(0, 1000, default=8.0, open_low=True)
    delta: float = _number(0, 0.01, default=0.0)
    colluders: int = _number(0, 64, default=0)
    dropouts: int = _number(0, 64, default=0)
    spare_rounds: int = _number(0, 100_000, default=0)
    units_per_clip: int = _number(1 << 10, 1 << 24, default=1 << 20)
    masking: bool = True
    site_noise: float = _number(0, 1e6, default=0.0)
    release_noise: float = _number(0, 1e6, default=0.0)


@dataclass(frozen=True)
class SiteSection:
    id: str = _text(_ID, "lower-case letters, digits and hyphens, at most 64")
    message_key: str = _text(r"(?:[0-9a-f]{64})?", "64 hex digits (Ed25519 public key)", default="")
    witness_key: str = _text(r"(?:[0-9a-f]{64})?", "64 hex digits (Ed25519 public key)", default="")


@dataclass(frozen=True)
class CohortSection:
    min_sites: int = _number(1, 64)
    deadline_s: float = _number(1, 7 * 86400, default=600.0)
    grace_s: float | None = _number(0, 7 * 86400, default=None)
    max_attempts: int = _number(1, 100, default=3)
    on_failed_round: OnFailedRound = OnFailedRound.REPEAT
    witness_quorum: int = _number(0, 64, default=0)
    operator_key: str = _text(r"(?:[0-9a-f]{64})?", "64 hex digits (Ed25519 public key)", default="")
    site: tuple[SiteSection, ...] = ()

    @property
    def grace(self) -> float:
        """Seconds past the deadline for sites still at work then: as long again where none is given."""
        return self.deadline_s if self.grace_s is None else self.grace_s


@dataclass(frozen=True)
class EvaluationSection:
    every_rounds: int = _number(0, 100_000, default=0)
    max_studies: int = _number(1, 1_000_000, default=400)
    resamples: int = _number(0, 100_000, default=1000)


@dataclass(frozen=True)
class FederatedEvaluationSection:
    """One evaluation of the final adapter on every site's held-out studies; only noised counts leave.

    The two ε are the evaluation's own, at the study's δ, on top of training's.
    """

    site_epsilon: float = _number(0, 1000, open_low=True)
    release_epsilon: float = _number(0, 1000, open_low=True)
    split: str = _text(r"validation|test", "validation or test", default="test")


@dataclass(frozen=True)
class AcceptanceSection:
    """The operator's test of a new adapter on a public set, every so many rounds.

    Where the mean loss per report token on the public set rises by more than `max_increase` nats over that of
    the last accepted adapter, or is not finite, the study goes back to that adapter.
    """

    every_rounds: int = _number(1, 100_000)
    max_increase: float = _number(0, 100, default=0.1)
    public_sha256: str = _text(r"(?:[0-9a-f]{64})?", "64 hex digits", default="")


@dataclass(frozen=True)
class AuditSection:
    """What the operator keeps for auditors: the masked contributions of every so many rounds."""

    retain_every_rounds: int = _number(1, 100_000)


@dataclass(frozen=True)
class TestingSection:
    """Seeded draws and noise for tests and comparisons; the result of such a study is never released."""

    __test__ = False
    seed: int = _number(0, 2**31 - 1)


@dataclass(frozen=True)
class Study:
    """A parsed study manifest; see the module docstring for draft and resolved."""

    schema: int
    study: StudySection
    base: BaseSection
    adapter: AdapterSection
    stage: tuple[StageSection, ...]
    training: TrainingSection
    cohort: CohortSection
    optimizer: OptimizerSection = OptimizerSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    acceptance: AcceptanceSection | None = None
    audit: AuditSection | None = None
    federated_evaluation: FederatedEvaluationSection | None = None
    testing: TestingSection | None = None

    @property
    def masked(self) -> bool:
        """Whether contributions are masked by secure aggregation."""
        return self.privacy.mode is Mode.CONSORTIUM and self.privacy.masking

    @property
    def rounds(self) -> int:
        return sum(stage.rounds for stage in self.stage)

    @property
    def sums(self) -> int:
        """Rounds of training and, where there is one, the federated evaluation after them."""
        return self.rounds + (self.federated_evaluation is not None)

    @property
    def site_ids(self) -> tuple[str, ...]:
        return tuple(site.id for site in self.cohort.site)

    @property
    def sha256(self) -> str:
        return sha256_hex(format_study(self))

    def site(self, site_id: str) -> SiteSection:
        for site in self.cohort.site:
            if site.id == site_id:
                return site
        raise ManifestInvalid(f"cohort.site: expected one of {', '.join(self.site_ids)}, got {site_id!r}")


# --- parse and format -------------------------------------------------------------------------------------


def parse_study_toml(text: str, *, source: str = "study.toml") -> Study:
    """Parse a study manifest written by people; raises ManifestInvalid naming line and key."""
    if len(text.encode()) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"{source}: expected at most {MAX_MANIFEST_BYTES} bytes, got more")
    try:
        mapping = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestInvalid(f"{source}: not TOML: {error}") from error
    try:
        return study_from_mapping(mapping)
    except _At as problem:
        line = _line_of(text, problem.path)
        where = f"{source} line {line}" if line else source
        raise ManifestInvalid(f"{where}: {_dotted(problem.path)}: {problem}") from None


def parse_study(data: bytes) -> Study:
    """Parse the canonical JSON of a study; raises ManifestInvalid, NotCanonical or BodyTooLarge."""
    mapping = parse_canonical(data, max_bytes=MAX_MANIFEST_BYTES)
    try:
        study = study_from_mapping(mapping)
    except _At as problem:
        raise ManifestInvalid(f"study manifest: {_dotted(problem.path)}: {problem}") from None
    if format_study(study) != data:
        raise ManifestInvalid("study manifest: expected every key written out, got one left out")
    return study


def format_study(study: Study) -> bytes:
    """Encode a study as canonical JSON; `parse_study(format_study(s)) == s`."""
    return canonical_json(_plain(study))


def study_from_mapping(mapping: Any) -> Study:
    study: Study = _build(Study, mapping, ())
    _check_combinations(study)
    return study


def verify_resolved(study: Study) -> None:
    """Raise ManifestInvalid unless base files, adapter tensors and all public keys are pinned."""
    if not study.base.files:
        raise ManifestInvalid("base.files: expected the pinned files of the base, got none; run `study sign`")
    if not study.adapter.tensors:
        raise ManifestInvalid("adapter.tensors: expected the adapter's tensors, got none; run `study sign`")
    if not study.adapter.initial_sha256:
        raise ManifestInvalid("adapter.initial_sha256: expected the hash of the first adapter, got none")
    if not study.cohort.operator_key:
        raise ManifestInvalid("cohort.operator_key: expected the operator's public key, got none")
    if study.privacy.mode is not Mode.PLAIN and not (study.privacy.site_noise and study.privacy.delta):
        raise ManifestInvalid("privacy.site_noise: expected the calibrated noise multipliers, got none")
    if study.acceptance is not None and not study.acceptance.public_sha256:
        raise ManifestInvalid("acceptance.public_sha256: expected the hash of the public set, got none")
    for site in study.cohort.site:
        if not site.message_key:
            raise ManifestInvalid(f"cohort.site {site.id}: expected a message_key, got none")
    witnesses = sum(bool(site.witness_key) for site in study.cohort.site)
    if witnesses < study.cohort.witness_quorum:
        raise ManifestInvalid(
            f"cohort.witness_quorum: expected at most the number of sites with a witness_key ({witnesses}), "
            f"got {study.cohort.witness_quorum}"
        )


class _At(Exception):
    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


def _dotted(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the whole file"


def _line_of(text: str, path: tuple[str | int, ...]) -> int:
    """The 1-based line of a key in TOML text, 0 where it cannot be told (a missing key: its table)."""
    names = [part for part in path if isinstance(part, str)]
    wanted_index = next((part for part in path if isinstance(part, int)), 0)
    if not names:
        return 0
    table: list[str] = []
    seen = -1
    fallback = 0
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        header = re.fullmatch(r"(\[\[?)\s*([A-Za-z0-9_.\s-]+?)\s*\]\]?\s*(#.*)?", stripped)
        if header:
            previous, table = table, [part.strip() for part in header.group(2).split(".")]
            repeated = header.group(1) == "[["
            seen = (seen + 1 if table == previous else 0) if repeated else wanted_index
            if table in (names, names[:-1]) and seen == wanted_index:
                fallback = number
                if table == names:
                    return number
            continue
        key = re.match(r'["\']?([A-Za-z0-9_-]+)["\']?\s*=', stripped)
        if key and [*table, key.group(1)] == names and (seen in (wanted_index, -1)):
            return number
    return fallback


def _build(annotation: Any, value: Any, path: tuple[str | int, ...]) -> Any:
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(typing.cast(type, annotation), value, path)
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in typing.get_args(annotation) if a is not type(None))
        return None if value is None else _build(inner, value, path)
    if origin is tuple:
        inner = typing.get_args(annotation)[0]
        if not isinstance(value, list):
            raise _At(path, f"expected a list, got {_named(value)}")
        return tuple(_build(inner, item, (*path, index)) for index, item in enumerate(value))
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        choices = [member.value for member in annotation]
        if not isinstance(value, str) or value not in choices:
            raise _At(path, f"expected one of {', '.join(choices)}, got {value!r}")
        return annotation(value)
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _At(path, f"expected a number, got {_named(value)}")
        return float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        names = {int: "an integer", str: "text", bool: "true or false"}
        raise _At(path, f"expected {names.get(annotation, annotation.__name__)}, got {_named(value)}")
    return value


def _build_dataclass(cls: type, value: Any, path: tuple[str | int, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise _At(path, f"expected a table, got {_named(value)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            close = _closest(str(key), list(fields))
            hint = f"; did you mean {close!r}?" if close else f"; known keys: {', '.join(fields)}"
            raise _At((*path, str(key)), f"unknown key{hint}")
    arguments = {}
    for name, spec in fields.items():
        if name not in value:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise _At((*path, name), f"expected this key in {_dotted(path)}, got nothing")
            continue
        built = _build(hints[name], value[name], (*path, name))
        _check_range(spec, built, (*path, name))
        arguments[name] = built
    return cls(**arguments)


def _check_range(spec: dataclasses.Field[Any], value: Any, path: tuple[str | int, ...]) -> None:
    meta = spec.metadata
    if value is None:
        return
    if "low" in meta:
        low, high = meta["low"], meta["high"]
        too_low = value <= low if meta["open_low"] else value < low
        if too_low or value > high or value != value:
            bracket = "(" if meta["open_low"] else "["
            raise _At(path, f"expected a value in {bracket}{low:g}, {high:g}], got {value!r}")
    elif "pattern" in meta and not re.fullmatch(meta["pattern"], value):
        raise _At(path, f"expected {meta['meaning']}, got {value[:80]!r}")


def _check_combinations(study: Study) -> None:
    if study.schema != SCHEMA:
        raise _At(("schema",), f"expected {SCHEMA}, got {study.schema}")
    if not study.stage:
        raise _At(("stage",), "expected at least one [[stage]], got none")
    order = [stage.name for stage in study.stage]
    if StageName.TUNE in order and StageName.ALIGN in order[order.index(StageName.TUNE) :]:
        raise _At(("stage",), "expected every align stage before the first tune stage, got one after it")
    for index, stage in enumerate(study.stage):
        if stage.warmup_rounds > stage.rounds:
            raise _At(
                ("stage", index, "warmup_rounds"),
                f"expected at most the stage's rounds ({stage.rounds}), got {stage.warmup_rounds}",
            )
    try:
        re.compile(study.adapter.targets)
    except re.error as error:
        raise _At(("adapter", "targets"), f"expected a regular expression, got an error: {error}") from error
    ids = study.site_ids
    if not ids:
        raise _At(("cohort", "site"), "expected at least one [[cohort.site]], got none")
    for index, site_id in enumerate(ids):
        if site_id in ids[:index]:
            raise _At(("cohort", "site", index, "id"), f"expected each site once, got {site_id!r} twice")
    keys = [key for site in study.cohort.site for key in (site.message_key, site.witness_key) if key]
    if len(set(keys)) != len(keys):
        raise _At(("cohort", "site"), "expected a different key for each site and use, got one key twice")
    if study.cohort.min_sites > len(ids):
        raise _At(
            ("cohort", "min_sites"),
            f"expected at most the number of sites ({len(ids)}), got {study.cohort.min_sites}",
        )
    if study.cohort.witness_quorum > len(ids):
        raise _At(
            ("cohort", "witness_quorum"),
            f"expected at most the number of sites ({len(ids)}), got {study.cohort.witness_quorum}",
        )
    if study.federated_evaluation is not None and not study.masked:
        raise _At(
            ("federated_evaluation",),
            "expected it with mode consortium and masks only (one site's counts need the others' noise), got "
            f"mode {study.privacy.mode.value}",
        )
    _check_privacy(study, len(ids))


def _check_privacy(study: Study, sites: int) -> None:
    optimizer, privacy = study.optimizer, study.privacy
    if optimizer.name is OptimizerName.ADAM and optimizer.momentum != 0.0:
        raise _At(("optimizer", "momentum"), f"expected no momentum with adam, got {optimizer.momentum}")
    if study.training.local_steps > 1 and privacy.mode is not Mode.LOCAL:
        raise _At(
            ("training", "local_steps"),
            f"expected 1 in mode {privacy.mode.value} (one gradient sum per round), "
            f"got {study.training.local_steps}; only mode local takes several steps",
        )
    if privacy.mode is Mode.PLAIN:
        return
    if privacy.colluders + privacy.dropouts >= sites:
        raise _At(
            ("privacy", "dropouts"),
            f"expected colluders + dropouts below the number of sites ({sites}), "
            f"got {privacy.colluders} + {privacy.dropouts}",
        )
    if privacy.mode is Mode.CONSORTIUM and sites - study.cohort.min_sites > privacy.dropouts:
        raise _At(
            ("cohort", "min_sites"),
            f"expected at least {sites - privacy.dropouts} (sites less the tolerated dropouts, whose noise "
            f"the others carry), got {study.cohort.min_sites}",
        )
    if privacy.mode is Mode.CONSORTIUM and not privacy.masking and study.testing is None:
        raise _At(
            ("privacy", "masking"),
            "expected true (without masks the server sees each site's single noise share, and the site ε "
            "does not hold), got false; only a [testing] study may compare without masks",
        )
    tolerated = (max(2, study.cohort.min_sites) + 1) // 3
    if study.masked and privacy.colluders > tolerated:
        raise _At(
            ("privacy", "colluders"),
            f"expected at most {tolerated} with this floor of survivors (docs/protocol/secagg.md), "
            f"got {privacy.colluders}",
        )
    if privacy.release_epsilon > privacy.site_epsilon and privacy.mode is Mode.CONSORTIUM:
        raise _At(
            ("privacy", "release_epsilon"),
            f"expected at most site_epsilon ({privacy.site_epsilon:g}), got {privacy.release_epsilon:g}",
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in items.items() if item is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    return value


def _named(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list"}
    kind = names.get(type(value), "a table" if isinstance(value, Mapping) else type(value).__name__)
    return f"{kind} ({value!r})" if isinstance(value, bool | int | float | str) else kind


def _closest(word: str, words: list[str]) -> str | None:
    import difflib

    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _evaluation_words(study: Study) -> str:
    evaluation = study.federated_evaluation
    if evaluation is None:
        return "none across sites"
    return (
        f"the final model, on each site's {evaluation.split} split; noised counts only, ε ≤ "
        f"{evaluation.site_epsilon:g} against the server and ≤ {evaluation.release_epsilon:g} for the figures"
    )


def describe(study: Study) -> dict[str, str]:
    """Say in words what a study may do, for those who approve it; a draft's words say what is not set yet."""
    stages = ", then ".join(f"{s.name.value} for {s.rounds} rounds" for s in study.stage)
    trained = sum(spec.size for spec in study.adapter.tensors)
    privacy, training, cohort = study.privacy, study.training, study.cohort
    delta = f"δ {privacy.delta:.1e}" if privacy.delta else "δ is set when it is submitted"
    pinned = f"{len(study.base.files)} pinned files" if study.base.files else "pinned when it is submitted"
    values = f", {trained:,} values" if trained else ""
    if privacy.mode is Mode.PLAIN:
        protection = "NONE: the server sees un-noised sums and the release is not private"
    elif privacy.mode is Mode.LOCAL:
        protection = f"each site noises its own updates; ε ≤ {privacy.site_epsilon:g}, {delta}"
    else:
        protection = (
            f"one patient at one site: ε ≤ {privacy.site_epsilon:g} against the server, "
            f"ε ≤ {privacy.release_epsilon:g} for the released model, {delta}; "
            f"{'sums are masked' if privacy.masking else 'NOT MASKED: a comparison for tests'}"
        )
    words = {
        "purpose": study.study.purpose,
        "base": f"{study.base.name}, frozen, {pinned}",
        "training": f"{stages}; projector and LoRA rank {study.adapter.rank}{values}",
        "data": (
            f"each patient is drawn with probability {training.sampling_rate:g} a round, at most "
            f"{training.studies_per_patient} studies each"
        ),
        "privacy": protection,
        "evaluation": _evaluation_words(study),
        "cohort": f"at least {cohort.min_sites} of {', '.join(study.site_ids)}",
        "attempts": (
            f"at most {cohort.max_attempts} per round, {cohort.deadline_s:g} s each, and up to "
            f"{cohort.grace:g} s more for sites still at work"
        ),
    }
    if study.testing is not None:
        words["testing"] = "draws are seeded: nothing of this study is protected or released"
    return words
