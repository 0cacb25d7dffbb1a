"""`data check`, `data show` and `data drop` on prepared data."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from client.data.cli import app
from client.data.index import read_index
from client.data.store import Pair, read_checksums, read_pairs, write_dataset
from common.errors import DatasetInvalid, PatientUnknown
from tests.client.data.site_folder import jpeg, make_site, rows
from tests.client.data.test_duplicates import LONG
from tests.client.data.test_import_table import run_import, tree


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a data command with --json and return its document."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def prepared(folder: Path, count: int = 6) -> Path:
    """Import a small site."""
    source = make_site(folder / "hospital", rows(count))
    run_import(source, folder / "out", "--no-check-writing")
    return folder / "out"


def kinds(folder: Path) -> list[str]:
    return [problem["kind"] for problem in run("check", str(folder), code=1)["problems"]]


def test_fresh_import_passes_check(tmp_path: Path) -> None:
    assert run("check", str(prepared(tmp_path))) == {"ok": True, "problems": []}


def test_check_names_what_was_changed(tmp_path: Path) -> None:
    out = prepared(tmp_path)
    pairs = read_pairs(out)
    image = out / pairs[0].images[0]
    image.write_bytes(image.read_bytes()[:-40])
    assert kinds(out) == ["checksum-differs", "image-unreadable"]
    os.unlink(out / "drops.jsonl")
    (out / "notes.txt").write_text("to do")
    (out / "images/aa").mkdir(exist_ok=True)
    Image.new("L", (80, 80)).save(out / "images/aa/orphan.png")
    assert {"file-missing", "file-without-checksum", "orphan-image"} <= set(kinds(out))


def test_check_finds_metadata_in_an_image(tmp_path: Path) -> None:
    out = prepared(tmp_path)
    path = out / read_pairs(out)[0].images[0]
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "Jane Doe")
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=info)
    assert "image-unreadable" in kinds(out)


def png(seed: int) -> bytes:
    import io

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(jpeg(seed))) as image:
        image.convert("L").save(buffer, "PNG")
    return buffer.getvalue()


def test_check_finds_leakage_across_splits_and_identifiers(tmp_path: Path) -> None:
    def pair(number: int, findings: str, split: Any) -> Pair:
        return Pair(f"p{number}", f"s{number}", (f"images/{number}.png",), "pa", "", findings, "", split)

    records = [
        (pair(1, "Heart normal.", "train"), [png(1)]),
        (pair(2, "Lungs clear.", "test"), [png(1)]),
        (pair(3, LONG, "train"), [png(3)]),
        (pair(4, LONG, "validation"), [png(4)]),
        (pair(5, "Discussed with Dr. Jane Doe.", "train"), [png(5)]),
    ]
    write_dataset(tmp_path / "out", records, card={})
    problems = run("check", str(tmp_path / "out"), code=1)["problems"]
    assert problems == [
        {"kind": "identifier-like-text", "where": "pairs.jsonl:5"},
        {"kind": "near-duplicate-across-splits", "where": "pairs.jsonl:1 and 2"},
        {"kind": "near-duplicate-across-splits", "where": "pairs.jsonl:3 and 4"},
    ]


def test_import_puts_near_duplicates_into_one_split(tmp_path: Path) -> None:
    table = rows(30)
    for row in table:
        row["findings"] = LONG + f" {row['accession']}"
    for number in (0, 7, 14, 21):
        table[number]["findings"] = LONG
    source = make_site(tmp_path / "hospital", table)
    run_import(source, tmp_path / "out", "--no-check-writing")
    assert run("check", str(tmp_path / "out"))["ok"]


def test_show_counts_and_writes_a_private_contact_sheet(tmp_path: Path) -> None:
    out = prepared(tmp_path)
    shown = run("show", str(out), "--html", str(tmp_path / "sheet.html"), "--count", "3")
    assert (shown["studies"], shown["patients"], shown["images"]) == (6, 6, 6)
    assert sum(shown["findings_words"].values()) == 6
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<article>") == 3
    assert (tmp_path / "sheet.html").stat().st_mode & 0o077 == 0


def test_index_holds_the_pairs_in_order(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = prepared(tmp_path)
    index = read_index(out, columns=["study", "split", "flags"])
    assert index["study"] == [pair.study for pair in read_pairs(out)]
    with pytest.raises(DatasetInvalid, match="expected columns"):
        read_index(out, columns=["name"])


def test_withdrawn_patient_goes_and_stays_away(tmp_path: Path) -> None:
    out = prepared(tmp_path)
    key = str(tmp_path / "test.key")
    before = read_pairs(out)
    done = run("drop", str(out), "--patient", "MRN1002", "--key", key)
    assert (done["studies"], done["images"]) == (1, 1)
    assert "no budget is given back" in done["consequence"]
    after = read_pairs(out)
    assert set(before) - set(after) == {before[2]}
    assert run("check", str(out))["ok"]
    assert before[2].study.encode() not in b"".join(tree(out).values())
    again = run_import(tmp_path / "hospital", tmp_path / "second", "--no-check-writing")
    assert again["dropped"] == {"consent-withdrawn": 1}
    assert run_import(tmp_path / "hospital", out, "--no-check-writing")["done_before"]


def test_unknown_or_only_patient_cannot_be_withdrawn(tmp_path: Path) -> None:
    out = prepared(tmp_path, 1)
    key = str(tmp_path / "test.key")
    with pytest.raises(PatientUnknown):
        run("drop", str(out), "--patient", "MRN9", "--key", key)
    with pytest.raises(DatasetInvalid, match="only patient"):
        run("drop", str(out), "--patient", "MRN1000", "--key", key)
    assert len(read_checksums(out)) >= 4
