"""The study manifest: what is accepted, and each refusal with its line and key."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.canonical import canonical_json, parse_canonical
from common.config import (
    FileHash,
    Mode,
    Schedule,
    StageName,
    StageSection,
    Strategy,
    Study,
    TensorGroup,
    TensorSpec,
    TestingSection,
    describe,
    format_study,
    parse_study,
    parse_study_toml,
    verify_resolved,
)
from common.errors import BodyTooLarge, FedRadError, ManifestInvalid, NotCanonical
from server.studies import study_template
from tests.simulator import study_text

PLAIN = study_text(mode="plain")
CONSORTIUM = study_text(mode="consortium")


def refused(text: str) -> str:
    with pytest.raises(ManifestInvalid) as caught:
        parse_study_toml(text)
    return str(caught.value)


def changed(old: str, new: str, text: str = PLAIN) -> str:
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the manifest"
    return text.replace(old, new)


def line_of(text: str, start: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(start))


@pytest.mark.parametrize("text", [PLAIN, CONSORTIUM, study_text(mode="local", local_steps=3)])
def test_a_study_parses_to_what_was_formatted(text: str) -> None:
    study = parse_study_toml(text)
    assert parse_study(format_study(study)) == study


@pytest.mark.parametrize("mode", ["plain", "consortium", "local"])
def test_the_template_is_a_valid_manifest(mode: str) -> None:
    text = study_template(id="demo", base="tiny", sites=("a", "b", "c", "d"), mode=mode)
    study = parse_study_toml(text)
    assert study.privacy.mode is Mode(mode) and study.site_ids == ("a", "b", "c", "d")


def test_a_grace_left_out_is_as_long_as_the_deadline_and_leaves_the_hash_as_it_was() -> None:
    study = parse_study_toml(PLAIN)
    assert study.cohort.grace == study.cohort.deadline_s and b"grace" not in format_study(study)
    none = parse_study_toml(changed("deadline_s = 600", "deadline_s = 600\ngrace_s = 0"))
    assert none.cohort.grace == 0.0 and parse_study(format_study(none)) == none
    assert "cohort.grace_s: expected a value in [0, 604800]" in refused(
        changed("deadline_s = 600", "deadline_s = 600\ngrace_s = -1")
    )


def test_an_unknown_key_is_refused_with_line_and_suggestion() -> None:
    text = changed("rank = 2", "rnak = 2")
    message = refused(text)
    assert f"line {line_of(text, 'rnak')}: adapter.rnak" in message
    assert "did you mean 'rank'" in message


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    assert "known keys: id, purpose" in refused(changed('id = "small"', 'id = "small"\nzzz = 1'))


def test_an_unknown_table_is_refused_with_its_line() -> None:
    text = PLAIN + "[networking]\nport = 1\n"
    assert f"line {line_of(text, '[networking]')}: networking: unknown key" in refused(text)


def test_an_unknown_key_in_the_second_site_is_refused_with_its_line() -> None:
    text = changed('id = "beta"', 'id = "beta"\nurl = "x"')
    assert f"line {line_of(text, 'url')}: cohort.site[1].url" in refused(text)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('id = "small"', "study.id"), ("rank = 2", "adapter.rank"),
        ("sampling_rate = 0.5", "training.sampling_rate"),
        ("min_sites = 3", "cohort.min_sites"), ("rounds = 3", "stage[0].rounds"),
    ],
)  # fmt: skip
def test_a_missing_key_is_refused_by_name(line: str, key: str) -> None:
    message = refused(changed(line + "\n", ""))
    assert f"{key}: expected this key" in message and "line" in message


def test_a_missing_table_is_refused_by_name() -> None:
    assert "base: expected this key" in refused(changed('[base]\nname = "tiny"\n', ""))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("rank = 2", 'rank = "2"', "adapter.rank: expected an integer, got text"),
        ("rank = 2", "rank = 2.0", "adapter.rank: expected an integer, got a number"),
        ("rank = 2", "rank = true", "adapter.rank: expected an integer, got true or false"),
        ("alpha = 4", 'alpha = "four"', "adapter.alpha: expected a number, got text"),
        ("alpha = 4", "alpha = true", "adapter.alpha: expected a number, got true or false"),
        ('purpose = "Test of the protocol"', "purpose = 3", "study.purpose: expected text, got an integer"),
        ('[base]\nname = "tiny"', 'base = "tiny"', "base: expected a table, got text"),
        ('name = "adam"', 'name = "sgdd"', "optimizer.name: expected one of adam, sgd, got 'sgdd'"),
        ('name = "tune"', "name = 7", "stage[0].name: expected one of align, tune, got 7"),
    ],
)
def test_a_value_of_another_type_is_refused(old: str, new: str, expected: str) -> None:
    text = new + "\n" + changed(old, "") if old.startswith("[base]") else changed(old, new)
    assert expected in refused(text)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("rank = 2", "rank = 0", "adapter.rank"),
        ("rank = 2", "rank = 513", "adapter.rank"),
        ("alpha = 4", "alpha = 0", "adapter.alpha"),
        ("alpha = 4", "alpha = nan", "adapter.alpha"),
        ("alpha = 4", "alpha = inf", "adapter.alpha"),
        ("sampling_rate = 0.5", "sampling_rate = 0.0", "training.sampling_rate"),
        ("sampling_rate = 0.5", "sampling_rate = 1.01", "training.sampling_rate"),
        ("patients = 40", "patients = 0", "training.patients"),
        ("rounds = 3", "rounds = 0", "stage[0].rounds"),
        ("learning_rate = 0.002", "learning_rate = -1", "stage[0].learning_rate"),
        ("deadline_s = 600", "deadline_s = 0.5", "cohort.deadline_s"),
        ("max_attempts = 3", "max_attempts = 0", "cohort.max_attempts"),
        ("seed = 5", "seed = -1", "testing.seed"),
        ('id = "small"', 'id = "Small Study"', "study.id"),
        ('id = "beta"', 'id = "-beta"', "cohort.site[1].id"),
        ('purpose = "Test of the protocol"', 'purpose = "two\\nlines"', "study.purpose"),
        ('name = "tiny"', 'name = "../etc"', "base.name"),
    ],
)
def test_a_value_out_of_range_is_refused(old: str, new: str, key: str) -> None:
    text = PLAIN.replace("init_seed = 7\n", "") if "seed" in old else PLAIN
    message = refused(changed(old, new, text))
    assert f"{key}: expected" in message and "line" in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("schema = 1", "schema = 2", "schema: expected 1, got 2"),
        ('id = "beta"', 'id = "alpha"', "expected each site once, got 'alpha' twice"),
        ("min_sites = 3", "min_sites = 5", "cohort.min_sites: expected at most the number of sites (4)"),
        ("witness_quorum = 3", "witness_quorum = 5", "cohort.witness_quorum: expected at most"),
        ("rounds = 3", "rounds = 3\nwarmup_rounds = 4", "warmup_rounds: expected at most the stage's rounds"),
        ("targets = '.*", "targets = '*", "adapter.targets: expected a regular expression"),
        (
            'name = "adam"',
            'name = "adam"\nmomentum = 0.9',
            "optimizer.momentum: expected no momentum with adam",
        ),
        ("local_steps = 1", "local_steps = 2", "training.local_steps: expected 1 in mode plain"),
        (
            "[training]",
            '[[stage]]\nname = "align"\nrounds = 1\nlearning_rate = 0.1\n[training]',
            "align stage",
        ),
    ],
)
def test_an_impossible_combination_is_refused(old: str, new: str, expected: str) -> None:
    assert expected in refused(changed(old, new))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("dropouts = 1", "dropouts = 4", "colluders + dropouts below the number of sites"),
        ("dropouts = 1", "dropouts = 2\ncolluders = 2", "colluders + dropouts below the number of sites"),
        ("min_sites = 3", "min_sites = 2", "cohort.min_sites: expected at least 3"),
        ("release_epsilon = 900", "release_epsilon = 901", "privacy.release_epsilon: expected at most"),
        ("masking = true", "masking = 1", "privacy.masking: expected true or false, got an integer"),
    ],
)
def test_an_impossible_privacy_is_refused(old: str, new: str, expected: str) -> None:
    assert expected in refused(changed(old, new, CONSORTIUM))


def test_no_site_and_no_stage_are_refused() -> None:
    sites = PLAIN.index("[[cohort.site]]")
    assert "at least one [[cohort.site]]" in refused(PLAIN[:sites] + "[testing]\nseed = 5\n")
    stage = PLAIN[PLAIN.index("[[stage]]") : PLAIN.index("[training]")]
    assert "at least one [[stage]]" in refused("stage = []\n" + PLAIN.replace(stage, ""))


def test_one_key_for_two_sites_is_refused() -> None:
    key = "ab" * 32
    text = changed('id = "beta"', f'id = "beta"\nmessage_key = "{key}"')
    text = changed('id = "gamma"', f'id = "gamma"\nwitness_key = "{key}"', text)
    assert "one key twice" in refused(text)


def test_text_that_is_no_toml_is_refused_with_its_source() -> None:
    with pytest.raises(ManifestInvalid, match=r"my\.toml: not TOML"):
        parse_study_toml("rank == 2", source="my.toml")


def test_a_manifest_over_its_size_cap_is_refused() -> None:
    assert "at most" in refused("#" * (5 << 20))
    with pytest.raises(BodyTooLarge):
        parse_study(b"[" + b" " * (5 << 20))


def test_json_that_is_not_canonical_is_refused() -> None:
    with pytest.raises(NotCanonical):
        parse_study(format_study(parse_study_toml(PLAIN)) + b"\n")


def test_an_unknown_key_in_canonical_json_is_refused() -> None:
    value = parse_canonical(format_study(parse_study_toml(PLAIN)), max_bytes=1 << 20)
    with pytest.raises(ManifestInvalid, match="unknown key"):
        parse_study(canonical_json(value | {"extra": 1}))


def test_the_hash_names_every_value() -> None:
    study = parse_study_toml(PLAIN)
    hashes = {
        study.sha256,
        replace(study, training=replace(study.training, sampling_rate=0.25)).sha256,
        replace(study, testing=None).sha256,
        replace(study, cohort=replace(study.cohort, min_sites=2)).sha256,
    }
    assert len(hashes) == 4


def test_a_draft_is_not_resolved_and_each_missing_pin_is_named() -> None:
    study = parse_study_toml(CONSORTIUM)
    files = (FileHash("config.json", 2, "ab" * 32),)
    tensors = (TensorSpec("x.weight", (2, 2), TensorGroup.PROJECTOR),)
    steps: list[tuple[str, Study]] = [("base.files", study)]
    study = replace(study, base=replace(study.base, files=files))
    steps.append(("adapter.tensors", study))
    study = replace(study, adapter=replace(study.adapter, tensors=tensors))
    steps.append(("adapter.initial_sha256", study))
    study = replace(study, adapter=replace(study.adapter, initial_sha256="ab" * 32))
    steps.append(("cohort.operator_key", study))
    study = replace(study, cohort=replace(study.cohort, operator_key="cd" * 32))
    steps.append(("privacy.site_noise", replace(study, privacy=replace(study.privacy, site_noise=0.0))))
    steps.append(("cohort.site alpha", study))
    for name, incomplete in steps:
        with pytest.raises(ManifestInvalid, match=name):
            verify_resolved(incomplete)
    sites = tuple(replace(s, message_key=f"{n:064x}") for n, s in enumerate(study.cohort.site))
    unwitnessed = replace(study, cohort=replace(study.cohort, site=sites))
    with pytest.raises(ManifestInvalid, match="witness_quorum"):
        verify_resolved(unwitnessed)
    sites = tuple(replace(s, witness_key=f"{n + 9:064x}") for n, s in enumerate(sites))
    verify_resolved(replace(study, cohort=replace(study.cohort, site=sites)))


def test_a_description_says_loudly_when_there_is_no_privacy() -> None:
    words = describe(parse_study_toml(PLAIN))
    assert "NONE" in words["privacy"] and "seeded" in words["testing"]
    assert "ε ≤ 900" in describe(parse_study_toml(CONSORTIUM))["privacy"]


def test_a_drafts_description_claims_no_delta_and_no_pins() -> None:
    draft = parse_study_toml(CONSORTIUM)
    draft = replace(draft, privacy=replace(draft.privacy, delta=0.0), base=replace(draft.base, files={}))
    words = describe(draft)
    assert "δ is set when it is submitted" in words["privacy"] and "pinned when" in words["base"]
    assert "0.0e" not in words["privacy"] and " 0 " not in words["base"]


@settings(max_examples=60)
@given(
    rank=st.integers(1, 512),
    rate=st.floats(1e-6, 1.0),
    rounds=st.lists(st.tuples(st.integers(1, 50), st.floats(1e-9, 10.0)), min_size=1, max_size=4),
    schedule=st.sampled_from(Schedule),
    strategy=st.sampled_from(Strategy),
    seed=st.none() | st.integers(0, 2**31 - 1),
    purpose=st.text(st.characters(min_codepoint=32, codec="utf-8"), min_size=1, max_size=50),
)
def test_any_valid_study_survives_the_round_trip(
    rank: int,
    rate: float,
    rounds: list[Any],
    schedule: Schedule,
    strategy: Strategy,
    seed: int | None,
    purpose: str,
) -> None:
    study = parse_study_toml(PLAIN)
    varied = replace(
        study,
        study=replace(study.study, purpose=purpose),
        adapter=replace(study.adapter, rank=rank, strategy=strategy),
        training=replace(study.training, sampling_rate=rate),
        stage=tuple(StageSection(StageName.TUNE, count, lr, schedule) for count, lr in rounds),
        testing=None if seed is None else TestingSection(seed),
    )
    assert parse_study(format_study(varied)) == varied


@settings(max_examples=150)
@given(st.text(max_size=120))
def test_arbitrary_text_ends_in_a_named_error(text: str) -> None:
    with pytest.raises(FedRadError):
        parse_study_toml(text)


@settings(max_examples=150)
@given(st.integers(0, len(PLAIN) - 1), st.integers(1, 40), st.text(max_size=8))
def test_a_damaged_manifest_parses_or_ends_in_a_named_error(start: int, length: int, junk: str) -> None:
    with contextlib.suppress(FedRadError):
        parse_study_toml(PLAIN[:start] + junk + PLAIN[start + length :])
