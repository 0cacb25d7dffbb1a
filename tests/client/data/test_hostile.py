"""Hostile input to the import: bombs, traversal, links, injection; no socket; kill -9 at any moment."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from client.data.cli import app
from client.data.prepare import Recipe, prepare_study
from client.data.sitekey import SiteKey
from client.data.sources.table import read_table
from client.data.store import read_pairs
from client.data.study import Dropped, Prepared, Reason, SourceStudy
from client.data.workers import prepared
from tests.client.data.site_folder import make_site, rows, site_key, write_table
from tests.client.data.test_import_table import run_import, tree


def png_bomb(side: int) -> bytes:
    """Encode a black PNG of side² pixels in a few kilobytes per thousand rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    compressor = zlib.compressobj(9)
    row = bytes(1 + side)
    body = b"".join(compressor.compress(row) for _ in range(64)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """Encode a small PNG whose compressed text chunk inflates to 100 MB."""
    blob = zlib.compress(bytes(100_000_000), 9)
    data = b"k\x00\x00" + blob
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return png_bomb(128)[:33] + chunk + png_bomb(128)[33:]


def test_bombs_traversal_and_links_each_cost_one_study(tmp_path: Path) -> None:
    table = rows(7)
    source = make_site(tmp_path / "hospital", table)
    (source / table[1]["image"]).write_bytes(png_bomb(60_000))
    (source / table[2]["image"]).write_bytes(text_bomb())
    table[3]["image"] = "/etc/passwd"
    table[4]["image"] = "images/../../hospital/images/4.jpg"
    (tmp_path / "outside").mkdir()
    shutil.copy(source / "images/5.jpg", tmp_path / "outside/5.jpg")
    (source / "linked").symlink_to(tmp_path / "outside")
    table[5]["image"] = "linked/5.jpg"
    table[6]["image"] = "images\\..\\..\\outside\\5.jpg"
    write_table(source / "reports.csv", table)
    document = run_import(source, tmp_path / "out")
    assert document["kept"] == 1
    assert document["dropped"] == {"image-outside-folder": 4, "image-too-large": 1, "image-unreadable": 1}


def test_report_cannot_act_in_the_contact_sheet(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    table = rows(2)
    table[0]["findings"] = (
        '=HYPERLINK("x") <script>alert(1)</script> <img src=x onerror=alert(2)> heart normal.'
    )
    source = make_site(tmp_path / "hospital", table)
    run_import(source, tmp_path / "out")
    result = CliRunner().invoke(
        app, ["show", str(tmp_path / "out"), "--html", str(tmp_path / "s.html"), "--json"]
    )
    assert result.exit_code == 0
    page = (tmp_path / "s.html").read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page


def test_overlong_report_is_dropped(tmp_path: Path) -> None:
    table = rows(2)
    table[0]["findings"] = "The heart is normal. " * 3000
    source = make_site(tmp_path / "hospital", table)
    assert run_import(source, tmp_path / "out")["dropped"] == {"report-too-long": 1}


def prepare_or_crash(source: SourceStudy, recipe: Recipe) -> Prepared | Dropped:
    """Prepare a study, but end the process on one of them as a decoder with a bug would."""
    if source.study == "ACC3":
        os.kill(os.getpid(), signal.SIGSEGV)
    return prepare_study(source, recipe)


def test_decoder_that_crashes_costs_one_study(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(8))
    recipe = Recipe(source, None, SiteKey(bytes(32)), check_writing=False)
    studies = enumerate(read_table(source))
    outcomes = list(prepared(studies, recipe, workers=2, prepare=prepare_or_crash))
    assert [position for position, _ in outcomes] == list(range(8))
    reasons = [outcome.reason if isinstance(outcome, Dropped) else "" for _, outcome in outcomes]
    assert reasons == ["", "", "", Reason.IMAGE_CRASHED, "", "", "", ""]


def command(source: Path, out: Path, *options: str) -> list[str]:
    key = site_key(source.parent / "test.key")
    start = [
        sys.executable,
        "-m",
        "client.data.cli",
        "import",
        str(source),
        "--out",
        str(out),
        "--key",
        str(key),
    ]
    return [*start, "--no-check-writing", "--workers", "1", "--json", *options]


def test_no_socket_is_opened_during_import(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(4))
    watch = (
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event.startswith('socket.'):\n"
        "        sys.stderr.write(f'SOCKET {event}\\n'); sys.stderr.flush()\n"
        "        import os; os._exit(99)\n"
        "sys.addaudithook(hook)\n"
        "from client.data.cli import main\n"
        "sys.argv = sys.argv[1:]\n"
        "main()\n"
    )
    arguments = command(source, tmp_path / "out")[3:]
    done = subprocess.run([sys.executable, "-c", watch, "data", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["kept"] == 4


def has_namespaces() -> bool:
    program = shutil.which("unshare")
    return (
        program is not None
        and subprocess.run([program, "-rn", "true"], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not has_namespaces(), reason="needs network namespaces")
def test_import_works_in_a_network_namespace_without_interfaces(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(4))
    alone = ["unshare", "-rn", *command(source, tmp_path / "out", "--workers", "2")]
    done = subprocess.run(alone, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_pairs(tmp_path / "out")) == 4


def children_of(pid: int) -> list[int]:
    return [int(line) for line in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_die_with_a_killed_import(tmp_path: Path) -> None:
    source = make_site(tmp_path / "hospital", rows(60))
    process = subprocess.Popen(
        command(source, tmp_path / "out", "--workers", "2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / ".out.importing/journal.sqlite"
    limit = time.monotonic() + 120
    while not (journal.exists() and len(children_of(process.pid)) >= 2) and time.monotonic() < limit:
        time.sleep(0.05)
    workers = children_of(process.pid) if process.poll() is None else []
    assert workers
    process.kill()
    process.wait()
    limit = time.monotonic() + 120
    while any(map(is_alive, workers)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert [pid for pid in workers if is_alive(pid)] == []


def killed_and_repeated(tmp_path: Path, kills: int, *, studies: int, seed: int) -> None:
    """Import undisturbed, then with kill -9 at random moments; both folders must have the same bytes."""
    source = make_site(tmp_path / "hospital", rows(studies))
    start = time.monotonic()
    subprocess.run(command(source, tmp_path / "calm"), check=True, capture_output=True)
    whole_s = time.monotonic() - start
    chooser = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(
            command(source, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chooser.uniform(0.3, 1.0) * whole_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (
            not (tmp_path / "killed/pairs.jsonl").exists() or len(read_pairs(tmp_path / "killed")) == studies
        )
        if (tmp_path / "killed").exists() and chooser.random() < 0.5:
            shutil.rmtree(tmp_path / "killed")
    subprocess.run(command(source, tmp_path / "killed"), check=True, capture_output=True)
    assert tree(tmp_path / "calm") == tree(tmp_path / "killed")
    assert not (tmp_path / ".killed.importing").exists()


def test_killed_import_continues_to_the_same_bytes(tmp_path: Path) -> None:
    killed_and_repeated(tmp_path, 2, studies=20, seed=os.getpid())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_import_killed_twenty_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed_and_repeated(tmp_path, 20, studies=300, seed=20)


def test_dicom_bombs_each_cost_one_study(tmp_path: Path) -> None:
    """Declare huge dimensions, lie about lengths, nest without end, inflate without end: one pair is left."""
    import numpy as np
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    from tests.client.data.synthetic_dicom import base_image, dataset_for, make_export
    from tests.client.data.test_dicom import nested

    export = tmp_path / "export"
    studies = make_export(export, 5, seed=21, side=128)
    files = [export / f"dicom/000/{number:06d}.dcm" for number in range(5)]
    for path in export.rglob("*-lat.dcm"):
        path.unlink()
    image = base_image(np.random.default_rng(1), side=128)
    huge = dataset_for(studies[1], image, view="PA", number=1, inverted=False)
    huge.Rows = huge.Columns = 60_000
    huge.save_as(files[1], enforce_file_format=True)
    for path, attack in (
        (files[2], b"\x08\x00\x49\x00OB\x00\x00\xf0\xff\xff\xff"),
        (files[3], nested(5000)),
    ):
        content = path.read_bytes()
        at = content.index(b"\x08\x00\x50\x00SH")
        path.write_bytes(content[:at] + attack + content[at:])
    bomb = dataset_for(studies[4], image, view="PA", number=4, inverted=False)
    bomb.Rows = bomb.Columns = 12_000
    bomb.PixelData = bytes(288_000_000)
    bomb.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    bomb.save_as(files[4], enforce_file_format=True)
    assert files[4].stat().st_size < 1_000_000
    document = run_import(export, tmp_path / "out", "--format", "dicom+table", "--no-check-writing")
    assert document["kept"] == 1
    assert document["dropped"]["image-too-large"] >= 1
    assert document["read"] == document["kept"] + sum(document["dropped"].values())


def test_links_in_place_of_table_dicom_and_output_are_refused(tmp_path: Path) -> None:
    from common.errors import FedRadError
    from tests.client.data.synthetic_dicom import make_export

    outside = tmp_path / "outside"
    source = make_site(tmp_path / "hospital", rows(2))
    outside.mkdir()
    (source / "reports.csv").rename(outside / "reports.csv")
    (source / "reports.csv").symlink_to(outside / "reports.csv")
    with pytest.raises(FedRadError, match="plain file"):
        run_import(source, tmp_path / "out", "--format", "table")
    make_export(tmp_path / "elsewhere", 2, seed=3, side=128)
    export = tmp_path / "export"
    (export / "dicom").mkdir(parents=True)
    (export / "reports.csv").write_bytes((tmp_path / "elsewhere/reports.csv").read_bytes())
    (export / "dicom/000").symlink_to(tmp_path / "elsewhere/dicom/000")
    (export / "dicom/one.dcm").symlink_to(tmp_path / "elsewhere/dicom/000/000000.dcm")
    with pytest.raises(FedRadError, match="expected DICOM files"):
        run_import(export, tmp_path / "out", "--format", "dicom+table")
    (outside / "target").mkdir()
    (tmp_path / "linked-out").symlink_to(outside / "target")
    with pytest.raises(FedRadError):
        run_import(make_site(tmp_path / "second", rows(2)), tmp_path / "linked-out")
    assert list((outside / "target").iterdir()) == []


def test_zip_archives_are_not_opened(tmp_path: Path) -> None:
    import zipfile

    from common.errors import FedRadError

    source = make_site(tmp_path / "hospital", rows(2))
    with zipfile.ZipFile(source / "more.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped.dcm", bytes(1000))
        archive.writestr("bomb.dcm", bytes(50_000_000))
    assert run_import(source, tmp_path / "out")["kept"] == 2
    assert not list(tmp_path.rglob("escaped.dcm"))
    table = rows(1)
    table[0]["image"] = "more.zip"
    write_table(source / "reports.csv", table)
    with pytest.raises(FedRadError, match="image-unreadable 1"):
        run_import(source, tmp_path / "other")


def test_names_and_formulas_of_a_hostile_table_stay_text(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    table = rows(3)
    attacks = (
        '"><svg onload=alert(1)>',
        "=cmd|' /C calc'!A0",
        "@SUM(1+1)*<iframe src=//evil>",
        "{{7*7}}${7*7}",
    )
    table[0]["patient"], table[1]["accession"] = attacks[0], attacks[1]
    table[2]["findings"] = f"Heart size is normal. {attacks[2]} {attacks[3]}"
    table[2]["impression"] = "</p></article><style>*{display:none}</style>"
    source = make_site(tmp_path / "hospital", table)
    assert run_import(source, tmp_path / "out")["kept"] == 3
    sheet = tmp_path / "s.html"
    assert CliRunner().invoke(app, ["show", str(tmp_path / "out"), "--html", str(sheet)]).exit_code == 0
    page = sheet.read_text()
    for raw in ("<svg", "<iframe", "cmd|", "</article><style>", "onload=alert(1)>"):
        assert raw not in page
    assert "{{7*7}}" in page and page.count("<style>") == 1
    for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines():
        assert set(json.loads(line)["patient"]) <= set("p0123456789abcdef")
