"""`fedrad-audit`: verify a bundle, report on it, show one of its entries. Offline, read-only.

Exit codes: 0 every control passed or was not checkable, 1 a control failed or the command was refused,
2 wrong usage. With --json, one JSON document on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from common.terminal import answer, run_program

app = typer.Typer(
    name="fedrad-audit",
    help="Verify what a FedRad consortium did, offline, from one audit bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Bundle = Annotated[
    Path, typer.Argument(help="The audit bundle, a file made by `fedrad-server audit export`.")
]
LogKey = Annotated[
    str, typer.Option("--log-key", help="The log's verifier key (name+id+base64), from a hospital you trust.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


class Format(StrEnum):
    HTML = "html"
    JSON = "json"
    PDF = "pdf"


@app.command()
def verify(bundle: Bundle, log_key: LogKey = "", as_json: AsJson = False) -> None:
    """Check every control: pass, fail or not checkable."""
    from common.ledger.findings import Status, catalogue

    report = _verified(bundle, log_key)
    titles = {control["id"]: control["title"] for control in catalogue()["controls"]}

    def text() -> str:
        lines = []
        for finding in report.findings:
            lines.append(f"{finding.status.value:>13}  {titles[finding.control]}: {finding.detail}")
            if finding.status is Status.FAIL and finding.evidence:
                lines.append(f"{'':>13}  see {', '.join(finding.evidence)}")
        verdict = "PASS" if report.passed else "FAIL"
        counts = f"{report.count(Status.PASS)} passed, {report.count(Status.FAIL)} failed"
        return "\n".join(
            [*lines, "", f"{verdict}: {counts}, {report.count(Status.NOT_CHECKABLE)} not checkable"]
        )

    answer(report.to_json(), as_json=as_json, text=text)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def report(
    bundle: Bundle,
    format: Annotated[Format, typer.Option("--format", help="html, json or pdf.")] = Format.HTML,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; default: next to the bundle.")
    ] = None,
    log_key: LogKey = "",
    as_json: AsJson = False,
) -> None:
    """Write a report for people: timeline, privacy ledger, participants, incidents, regulations."""
    from common.canonical import canonical_json
    from common.files import write_atomic
    from common.ledger.document import render_html
    from common.ledger.pdf import render_pdf
    from common.ledger.report import TITLE, report_blocks, report_json

    verified = _verified(bundle, log_key)
    if format is Format.JSON:
        data = canonical_json(report_json(verified)) + b"\n"
    elif format is Format.HTML:
        data = render_html(TITLE, report_blocks(verified)).encode()
    else:
        data = render_pdf(TITLE, report_blocks(verified))
    path = out or bundle.with_suffix(f".{format.value}")
    write_atomic(path, data)
    value = {"report": str(path), "bytes": len(data), "result": verified.to_json()["result"]}
    answer(value, as_json=as_json, text=lambda: f"{path} ({len(data)} bytes), {value['result']}")
    if not verified.passed:
        raise typer.Exit(1)


@app.command()
def show(
    bundle: Bundle,
    entry: Annotated[int, typer.Argument(help="Index of the entry in the log.")],
    as_json: AsJson = False,
) -> None:
    """Print one ledger entry in full; nothing is verified."""
    from common.errors import BundleInvalid
    from common.ledger.bundle import read_bundle

    leaves = read_bundle(bundle).leaves
    if not 0 <= entry < len(leaves):
        raise BundleInvalid(f"expected an entry from 0 to {len(leaves) - 1}, got {entry}")
    value = json.loads(leaves[entry])
    answer(value, as_json=as_json, text=lambda: json.dumps(value, indent=2, ensure_ascii=False))


def _verified(path: Path, log_key: str) -> Any:
    from common.ledger.audit import verify_file
    from common.ledger.note import parse_verifier_key

    trusted = parse_verifier_key(log_key) if log_key else None
    return verify_file(
        path, trusted=trusted, progress=lambda what: print(f"checking {what}", file=sys.stderr)
    )


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
