"""Reports and the command line: every claim links to its record, nothing is loaded, exit codes tell."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.canonical import sha256_hex
from common.ledger.audit import verify_bundle, verify_file
from common.ledger.bundle import Bundle, pack, write_bundle
from common.ledger.cli import app
from common.ledger.document import (
    Block,
    Chart,
    Heading,
    Link,
    Mark,
    Record,
    Table,
    Text,
    chart_ticks,
    place_labels,
    render_html,
)
from common.ledger.export import export_bundle
from common.ledger.findings import Status
from common.ledger.note import format_verifier_key
from common.ledger.pdf import render_pdf
from common.ledger.report import TITLE, report_blocks, report_json
from common.ledger.sbom import code_sha256, dependencies_sha256, make_sbom
from tests.common.ledger.consortium import finished_bundle

REGIMES = {"hipaa", "gdpr", "eu-ai-act", "fda-pccp", "nist-800-226"}
runner = CliRunner()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return finished_bundle(3)


@pytest.fixture
def path(bundle: Bundle, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle.zip", bundle)
    return tmp_path / "bundle.zip"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if "href" in values:
            self.links.append(str(values["href"]))


def test_the_html_report_links_every_claim_and_loads_nothing(bundle: Bundle) -> None:
    report = verify_bundle(bundle)
    text = render_html(TITLE, report_blocks(report))
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert "http" not in text and "url(" not in text
    for index in range(len(bundle.leaves)):
        assert f"entry-{index}" in page.ids
    for finding in report.findings:
        assert finding.detail[1:60].replace("'", "&#x27;") in text


def test_a_report_of_a_damaged_bundle_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 not a bundle")
    report = verify_file(tmp_path / "bad.zip")
    assert not report.passed and report.case is None
    text = render_html(TITLE, report_blocks(report))
    assert "FAIL" in text and "damaged" in text
    assert render_pdf(TITLE, report_blocks(report)).startswith(b"%PDF-1.4")


def test_text_from_a_bundle_is_escaped_everywhere() -> None:
    evil = "<script>alert(1)</script>&\"'"
    blocks: list[Block] = [
        Heading(evil, 2, "a"), Text((evil, Link(evil, "a"), Mark(evil, "bad"))), Record("b", evil, evil),
        Table((evil,), (1.0,), ((evil,),), ("c",)),
        Chart(evil, evil, evil, ((evil, ((0.0, 0.0), (1.0, 2.0))),)),
    ]  # fmt: skip
    assert "<script>" not in render_html(evil, blocks)
    assert b"alert(1)" not in render_pdf(evil, blocks).split(b"stream")[0]


def test_a_link_to_nowhere_is_not_made() -> None:
    assert "<a " not in render_html("t", [Text((Link("nowhere", "missing"),))])


def test_the_pdf_is_well_formed_with_inner_links(bundle: Bundle) -> None:
    blocks = report_blocks(verify_bundle(bundle))
    data = render_pdf(TITLE, blocks)
    assert data == render_pdf(TITLE, blocks)
    start = int(re.findall(rb"startxref\n(\d+)\n%%EOF\n$", data)[0])
    offsets = re.findall(rb"(\d{10}) 00000 n \n", data[start:])
    for number, offset in enumerate(offsets, start=1):
        assert data[int(offset) :].startswith(b"%d 0 obj\n" % number)
    pages = int(re.findall(rb"/Count (\d+)", data)[0])
    assert data.count(b"/Type /Page ") == pages > 2
    assert data.count(b"/Subtype /Link") > 20
    streams = [zlib.decompress(s) for s in re.findall(rb"stream\n(.*?)\nendstream", data, re.S)]
    assert len(streams) == pages
    words = b" ".join(re.findall(rb"\(((?:[^()\\]|\\.)*)\) Tj", b"\n".join(streams)))
    for word in (b"PASS", b"164.312\\(b\\)", b"amber", b"opened"):
        assert word in words


def test_the_json_report_maps_every_regime_line(bundle: Bundle) -> None:
    value = report_json(verify_bundle(bundle))
    assert value["result"] == "pass"
    assert {regime["id"] for regime in value["regimes"]} == {
        "hipaa",
        "gdpr",
        "eu-ai-act",
        "fda-pccp",
        "nist-800-226",
    }
    known = {status.value for status in Status} | {"outside"}
    assert all(line["status"] in known for regime in value["regimes"] for line in regime["lines"])
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize("top", [1e-9, 0.17, 1.0, 7.3, 16.0, 99.0, 12345.0])
def test_chart_ticks_are_few_round_and_cover_the_top(top: float) -> None:
    ticks = chart_ticks(top)
    assert ticks[0] == 0 and ticks[-1] >= top * (1 - 1e-9) and 2 <= len(ticks) <= 7


def test_chart_labels_do_not_overlap() -> None:
    placed = place_labels([50.0, 50.0, 51.0, 99.0], apart=10, lowest=0, highest=100)
    assert all(b - a >= 10 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert max(placed) <= 100


# --- command line -----------------------------------------------------------------------------------------


def test_verify_prints_each_control_and_exits_0(path: Path, bundle: Bundle) -> None:
    result = runner.invoke(app, ["verify", str(path), "--log-key", format_verifier_key(bundle.log)])
    assert result.exit_code == 0, result.output
    assert "PASS: 19 passed, 0 failed, 3 not checkable" in result.output


def test_verify_json_is_one_document_on_stdout(path: Path) -> None:
    result = runner.invoke(app, ["verify", str(path), "--json"])
    assert json.loads(result.stdout)["result"] == "pass"


def test_a_failing_bundle_exits_1_and_wrong_usage_2(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    result = runner.invoke(app, ["verify", str(path)])
    assert result.exit_code == 1 and "damaged" in result.output
    assert runner.invoke(app, ["verify"]).exit_code == 2
    assert runner.invoke(app, ["verify", str(path), "--unknown"]).exit_code == 2
    missing = runner.invoke(app, ["verify", str(path.with_name("none.zip")), "--json"])
    assert missing.exit_code == 1 and json.loads(missing.stdout)["result"] == "fail"


@pytest.mark.parametrize("format", ["html", "pdf", "json"])
def test_reports_are_written_where_asked(format: str, path: Path, tmp_path: Path) -> None:
    out = tmp_path / f"report.{format}"
    result = runner.invoke(app, ["report", str(path), "--format", format, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"report": str(out), "bytes": out.stat().st_size, "result": "pass"}


def test_show_prints_an_entry_and_refuses_one_that_is_not_there(path: Path) -> None:
    assert json.loads(runner.invoke(app, ["show", str(path), "4", "--json"]).stdout)["kind"] == "round"
    assert runner.invoke(app, ["show", str(path), "99"]).exit_code == 1


def test_help_answers_quickly_and_without_heavy_imports() -> None:
    code = (
        "import sys, common.ledger.cli as c; from typer.main import get_command; get_command(c.app);"
        "print([m for m in ('numpy','dp_accounting','torch','tuf') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"


def test_the_audit_imports_only_common_and_cryptography() -> None:
    """The modules that `verify` loads, beyond Python's own: those of the base installation."""
    code = (
        "import sys; before = set(sys.modules);"
        "import common.ledger.audit, common.ledger.report, common.ledger.pdf;"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names;"
        "print(sorted(n for n in names if not n.startswith('_')))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(output.stdout) == ["common", "cryptography", "rfc8785"]  # noqa: S307


# --- export and SBOM --------------------------------------------------------------------------------------


def test_a_bundle_exported_from_files_is_the_one_made_in_memory(bundle: Bundle, tmp_path: Path) -> None:
    log, release = tmp_path / "log", tmp_path / "release"
    for name, data in bundle.members.items():
        if name == "entries.jsonl":
            data += b'{"not yet": "in a checkpoint"}\n'
        target = release / name.rpartition("/")[2] if name.startswith("releases/") else log / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    exported = export_bundle(
        log,
        log=bundle.log,
        exported_s=bundle.exported_s,
        software=bundle.software,
        releases={1: release},
        with_sbom=False,
    )
    assert pack(exported) == pack(bundle)


def test_the_sbom_lists_the_running_code() -> None:
    value = json.loads(make_sbom())
    names = {component["name"] for component in value["components"]}
    assert value["bomFormat"] == "CycloneDX" and {"cryptography", "rfc8785", "typer"} <= names
    assert make_sbom() == make_sbom()
    assert dependencies_sha256() == sha256_hex(make_sbom())


def test_the_code_hash_covers_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_up_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = code_sha256(("made_up_package",))
    (package / "module.py").write_text("x = 1\n")
    code_sha256.cache_clear()  # a running process has one code
    assert code_sha256(("made_up_package",)) != before
    assert code_sha256() != code_sha256(("common",))
