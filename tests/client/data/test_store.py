"""The prepared data folder: what is refused, and that it appears whole or not at all."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.data.store import (
    Pair,
    Split,
    bucket,
    format_pair,
    parse_pair,
    read_card,
    read_checksums,
    read_pairs,
    split_of,
    write_dataset,
)
from common.errors import (
    DatasetExists,
    DatasetInvalid,
    ImageMissing,
    ImagePathEscapes,
    PairInvalid,
    SplitLeaks,
    StudyDuplicated,
)

KEY = bytes(range(32))


def png(shade: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, *, patient: str | None = None, split: Split = "train") -> Pair:
    return Pair(
        patient=patient or f"p{number}",
        study=f"s{number}",
        images=(f"images/s{number}-0.png",),
        view="frontal",
        indication="cough",
        findings="Clear lungs.",
        impression="Normal.",
        split=split,
    )


def write(directory: Path, pairs: list[Pair]) -> None:
    write_dataset(directory, [(p, [png()]) for p in pairs], card={"source": "test"})


def edit_line(directory: Path, **changes: object) -> None:
    file = directory / "pairs.jsonl"
    lines = file.read_bytes().splitlines()
    record = json.loads(lines[1])
    for name, value in changes.items():
        if value is None:
            record.pop(name)
        else:
            record[name] = value
    lines[1] = json.dumps(record).encode()
    file.write_bytes(b"\n".join(lines) + b"\n")


def test_written_pairs_are_read_back_in_order(tmp_path: Path) -> None:
    pairs = [pair(n) for n in (3, 1, 2)]
    write(tmp_path / "site", pairs)
    assert read_pairs(tmp_path / "site") == tuple(pairs)


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [pair(1), pair(2, split="test")])
    assert read_checksums(tmp_path / "a") == read_checksums(tmp_path / "b")
    assert (tmp_path / "a/checksums.json").read_bytes() == (tmp_path / "b/checksums.json").read_bytes()


def test_card_holds_bucketed_counts_only(tmp_path: Path) -> None:
    write(tmp_path / "site", [pair(n) for n in range(7)] + [pair(9, split="test")])
    card = read_card(tmp_path / "site")
    assert card["counts"]["studies"] == {"train": "1-9", "validation": "0", "test": "1-9"}
    assert card["source"] == "test"


@given(
    st.builds(
        Pair,
        patient=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        study=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        images=st.lists(
            st.from_regex(r"images/[a-z0-9]{1,8}\.png", fullmatch=True), min_size=1, max_size=3, unique=True
        ).map(tuple),
        view=st.text(max_size=10),
        indication=st.text(max_size=40),
        findings=st.text(max_size=40),
        impression=st.text(max_size=40),
        split=st.sampled_from(["train", "validation", "test"]),
    )
)
def test_parse_inverts_format(value: Pair) -> None:
    assert parse_pair(format_pair(value)) == value


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"age": 63}, PairInvalid),
        ({"findings": None}, PairInvalid),
        ({"findings": 3}, PairInvalid),
        ({"findings": "x" * 40_000}, PairInvalid),
        ({"split": "dev"}, PairInvalid),
        ({"patient": "../p"}, PairInvalid),
        ({"images": []}, PairInvalid),
        ({"images": "images/s1-0.png"}, PairInvalid),
        ({"images": ["images/s0-0.png"]}, PairInvalid),
        ({"study": "s0"}, StudyDuplicated),
        ({"patient": "p0", "split": "test"}, SplitLeaks),
        ({"images": ["images/gone.png"]}, ImageMissing),
        ({"images": ["../s1-0.png"]}, ImagePathEscapes),
        ({"images": ["images/../s1-0.png"]}, ImagePathEscapes),
        ({"images": ["/etc/x.png"]}, ImagePathEscapes),
        ({"images": ["images//s1-0.png"]}, ImagePathEscapes),
    ],
)
def test_bad_line_is_refused_with_file_and_line_number(
    tmp_path: Path, changes: dict[str, object], error: type[Exception]
) -> None:
    write(tmp_path / "site", [pair(0), pair(1)])
    edit_line(tmp_path / "site", **changes)
    with pytest.raises(error, match=r"pairs\.jsonl:2: "):
        read_pairs(tmp_path / "site")


@pytest.mark.parametrize("line", [b"[]\n", b"{\n", b"\xff\n", b'{"study":"a","study":"b"}\n', b"[" * 100_000])
def test_line_that_is_no_single_object_is_refused(line: bytes) -> None:
    with pytest.raises(PairInvalid):
        parse_pair(line)


def test_error_message_holds_no_report_text(tmp_path: Path) -> None:
    write(tmp_path / "site", [pair(0), pair(1)])
    edit_line(tmp_path / "site", findings=["Mrs Secretname has pneumonia"])
    with pytest.raises(PairInvalid) as caught:
        read_pairs(tmp_path / "site")
    assert "Secretname" not in str(caught.value)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_symbolic_link_to_an_image_is_refused(tmp_path: Path, where: str) -> None:
    write(tmp_path / "site", [pair(0)])
    target = tmp_path / "site/images"
    if where == "file":
        target = target / "s0-0.png"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImagePathEscapes):
        read_pairs(tmp_path / "site")


def test_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"no file .*pairs\.jsonl"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(DatasetInvalid, match="at least one pair"):
        read_pairs(tmp_path)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def records() -> Iterator[tuple[Pair, list[bytes]]]:
        yield pair(0), [png()]
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_dataset(tmp_path / "site", records(), card={})
    assert list(tmp_path.iterdir()) == []


def test_invalid_records_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(StudyDuplicated):
        write(tmp_path / "site", [pair(0), pair(0)])
    with pytest.raises(SplitLeaks):
        write(tmp_path / "site", [pair(0, patient="p"), pair(1, patient="p", split="test")])
    with pytest.raises(PairInvalid):
        write_dataset(tmp_path / "site", [(pair(0), [b"GIF89a"])], card={})
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    write(tmp_path / "site", [pair(0)])
    with pytest.raises(DatasetExists):
        write(tmp_path / "site", [pair(1)])
    write_dataset(tmp_path / "site", [(pair(1), [png()])], card={}, replace=True)
    assert [p.study for p in read_pairs(tmp_path / "site")] == ["s1"]
    assert os.listdir(tmp_path) == ["site"]


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/thesis.doc").touch()
    with pytest.raises(DatasetExists, match="holds no prepared data"):
        write_dataset(tmp_path / "site", [(pair(1), [png()])], card={}, replace=True)


def test_split_depends_on_patient_and_key_and_keeps_fractions() -> None:
    splits = [split_of(f"p{n}", key=KEY) for n in range(4000)]
    assert splits == [split_of(f"p{n}", key=KEY) for n in range(4000)]
    assert splits != [split_of(f"p{n}", key=bytes(32)) for n in range(4000)]
    assert 0.78 < splits.count("train") / 4000 < 0.82
    assert 0.08 < splits.count("test") / 4000 < 0.12
    assert {
        split_of(f"p{n}", key=KEY, fractions={"train": 0, "validation": 0, "test": 1}) for n in range(9)
    } == {"test"}


def test_weak_split_key_and_wrong_fractions_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        split_of("p", key=b"short")
    with pytest.raises(ValueError, match="sum to 1"):
        split_of("p", key=KEY, fractions={"train": 0.5, "validation": 0.1, "test": 0.1})


@given(st.integers(0, 10**9))
def test_bucket_contains_its_count(count: int) -> None:
    low, _, high = bucket(count).partition("-")
    assert int(low) <= count <= int(high or low)
