"""`fedrad-site data import --format table`: every row is kept or has its reason, nothing is half-written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from client.data.cli import app
from client.data.store import read_card, read_pairs
from common.errors import DatasetExists, DatasetInvalid, FedRadError, SourceInvalid
from tests.client.data.site_folder import make_site, rows, site_key, write_table


def run_import(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run the command in this process with the fixed key and return its JSON document."""
    key = site_key(source.parent / "test.key")
    arguments = [
        "import",
        str(source),
        "--out",
        str(out),
        "--key",
        str(key),
        "--workers",
        "1",
        "--json",
        *options,
    ]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_become_pairs_under_pseudonyms(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(5))
    document = run_import(source, tmp_path / "out")
    pairs = read_pairs(tmp_path / "out")
    assert document["read"] == document["kept"] == len(pairs) == 5
    assert (
        pairs[1].findings == "There is a small left pleural effusion with adjacent atelectasis. Marker 1 mm."
    )
    assert pairs[0].view == "frontal"
    with Image.open(tmp_path / "out" / pairs[0].images[0]) as image:
        assert image.size == (128, 128)
        assert image.info == {}
    everything = b"".join([*tree(tmp_path / "out").values(), *map(str.encode, tree(tmp_path / "out"))])
    assert b"MRN1" not in everything
    assert b"ACC" not in everything


def test_every_bad_row_has_one_reason_and_counts_add_up(tmp_path: Path) -> None:
    table = rows(16)
    source = make_site(tmp_path / "hospital", table)
    (source / table[1]["image"]).write_bytes((source / table[1]["image"]).read_bytes()[:900])
    table[2]["findings"] = ""
    table[3] = dict(table[0])
    table[4]["view"] = "Lateral"
    table[5]["image"] = "images/gone.jpg"
    table[6]["image"] = "../hospital/images/6.jpg"
    table[7]["patient"] = ""
    table[8]["findings"] = table[8]["impression"] = table[8]["indication"] = ""
    Image.new("L", (128, 128), 90).save(source / table[9]["image"])
    Image.new("L", (20, 20), 90).save(source / table[10]["image"])
    (source / table[11]["image"]).write_text("<html>404</html>")
    table[12]["image"] = ""
    table[13]["accession"] = table[0]["accession"]
    (source / "images/link.jpg").symlink_to("/etc/passwd")
    table[14]["image"] = "images/link.jpg"
    write_table(source / "reports.csv", table)
    document = run_import(source, tmp_path / "out")
    drops = [json.loads(line) for line in (tmp_path / "out/drops.jsonl").read_text().splitlines()]
    assert {drop["where"]: drop["reason"] for drop in drops} == {
        "reports.csv:3": "image-unreadable",
        "reports.csv:4": "report-without-findings",
        "reports.csv:5": "duplicate-study",
        "reports.csv:6": "lateral-view",
        "reports.csv:7": "image-missing",
        "reports.csv:8": "image-outside-folder",
        "reports.csv:9": "no-patient-or-study-identifier",
        "reports.csv:10": "no-report",
        "reports.csv:11": "image-blank",
        "reports.csv:12": "image-too-small",
        "reports.csv:13": "image-unreadable",
        "reports.csv:14": "no-image",
        "reports.csv:15": "study-of-two-patients",
        "reports.csv:16": "image-outside-folder",
    }
    assert document["read"] == 16 == document["kept"] + sum(document["dropped"].values())
    assert read_card(tmp_path / "out")["dropped"]["image-unreadable"] == "1-9"


def test_dry_run_previews_ten_pairs_and_writes_nothing(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(12))
    before = sorted(os.listdir(tmp_path))
    arguments = [
        "import",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--json",
        "--dry-run",
    ]
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert document["kept"] == 12
    assert [pair["where"] for pair in document["preview"]] == [f"reports.csv:{n}" for n in range(2, 12)]
    assert sorted(os.listdir(tmp_path)) == before


def test_preview_is_readable_without_json(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(3))
    out = str(tmp_path / "out")
    shown = (
        CliRunner().invoke(app, ["import", str(source), "--out", out, "--workers", "1", "--dry-run"]).stdout
    )
    assert "findings: Heart size is normal." in shown
    assert "dry run: nothing was written" in shown


def test_second_import_does_nothing(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(4))
    first = run_import(source, tmp_path / "out")
    before = tree(tmp_path / "out")
    second = run_import(source, tmp_path / "out")
    assert (first["done_before"], second["done_before"]) == (False, True)
    assert {**first, "done_before": True} == second
    assert tree(tmp_path / "out") == before


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(12))
    run_import(source, tmp_path / "one")
    run_import(source, tmp_path / "two", "--workers", "2")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_changed_source_is_not_mixed_into_finished_data(tmp_path: Path) -> None:
    table = rows(4)
    source = make_site(tmp_path / "hospital", table)
    run_import(source, tmp_path / "out")
    write_table(source / "reports.csv", table[:3])
    with pytest.raises(DatasetExists):
        run_import(source, tmp_path / "out")


def test_changed_settings_are_another_import(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(3))
    run_import(source, tmp_path / "out")
    for options in (["--keep-priors"], ["--size", "100"], ["--no-check-writing"], ["--bits", "16"]):
        with pytest.raises(DatasetExists):
            run_import(source, tmp_path / "out", *options)


def test_source_without_one_usable_study_is_an_error_and_leaves_no_folder(tmp_path: Path) -> None:
    table = rows(2)
    for row in table:
        row["findings"] = ""
    source = make_site(tmp_path / "hospital", table)
    with pytest.raises(DatasetInvalid, match="report-without-findings 2"):
        run_import(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_inside_the_source_is_refused(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(1))
    with pytest.raises(SourceInvalid, match="apart from"):
        run_import(source, source / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a column patient"),
        ("patient,accession,findings\n", "expected a column image"),
        ("patient,accession,image,findings\nP,A,x.jpg\n", "reports.csv:2: expected 4 values, got 3"),
        ("patient,accession,image\nP,A,x.jpg\n", "column findings or report"),
        ("patient,accession,image,findings\n", "at least one study"),
    ],
)
def test_unusable_table_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    source = make_site(tmp_path / "hospital", rows(1))
    (source / "reports.csv").write_text(content)
    with pytest.raises(FedRadError, match=message):
        run_import(source, tmp_path / "out")


def test_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(1))
    (source / "reports.csv").write_bytes(
        "patient,accession,image,findings\nP,A,x.jpg,Müller\n".encode("latin-1")
    )
    with pytest.raises(SourceInvalid, match="UTF-8"):
        run_import(source, tmp_path / "out")


def test_mapping_file_names_the_columns(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(1))
    row = rows(1)[0]
    write_table(
        source / "reports.csv",
        [{"Fall": row["patient"], "Nr": row["accession"], "Bild": row["image"], "Befund": row["findings"]}],
    )
    mapping = tmp_path / "mapping.toml"
    mapping.write_text('[columns]\npatient = "Fall"\nstudy = "Nr"\nimage = "Bild"\nfindings = "Befund"\n')
    assert run_import(source, tmp_path / "out", "--mapping", str(mapping))["kept"] == 1
    mapping.write_text('[columns]\npatiant = "Fall"\n')
    with pytest.raises(SourceInvalid, match="unknown column 'patiant'"):
        run_import(source, tmp_path / "out2", "--mapping", str(mapping))


def test_pa_image_comes_before_ap_and_several_images_are_kept(tmp_path: Path) -> None:
    table = rows(2)
    source = make_site(tmp_path / "hospital", table)
    table[0]["image"] = "images/0.jpg;images/1.jpg"
    write_table(source / "reports.csv", table[:1])
    run_import(source, tmp_path / "out")
    assert len(read_pairs(tmp_path / "out")[0].images) == 2


REAL = Path(__file__).resolve().parents[4] / "shared/data/iu-xray"


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/iu-xray")
def test_real_hospital_folder_is_imported(tmp_path: Path) -> None:
    key = site_key(tmp_path / "test.key")
    arguments = [
        "import",
        str(REAL / "west"),
        "--format",
        "table",
        "--out",
        str(tmp_path / "west"),
        "--key",
        str(key),
    ]
    result = CliRunner().invoke(app, [*arguments, "--workers", "1", "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["read"] == 150 == document["kept"] + sum(document["dropped"].values())
    assert document["kept"] >= 147
    assert len(read_pairs(tmp_path / "west")) == document["kept"]
