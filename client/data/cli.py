"""`fedrad-site data`: import, check, show, drop, receive, instruct and convert.

Every command prints one JSON document on stdout with `--json`, progress on stderr, and ends with 0 (done),
1 (refused, one line) or 2 (usage). Nothing here decides anything about data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.data.console import Json, progress_bars
from client.data.instruct_cli import convert, instruct
from common.terminal import run_program

if TYPE_CHECKING:
    from client.data.importing import Reader
    from client.data.summary import ImportSummary

app = typer.Typer(
    help="Turn a hospital's images and reports into clean, de-identified pairs.", no_args_is_help=True
)


@app.callback()
def data() -> None:
    """Turn a hospital's images and reports into clean, de-identified pairs; nothing leaves this machine."""


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder to import.")],
    out: Annotated[Path, typer.Option("--out", help="Prepared data folder to make.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, table, dicom+table, dicomdir, mimic-cxr-jpg, padchest, openi-xml or fhir-ndjson.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write; show ten pairs.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Site key file; default site.key beside OUT, made on first use."),
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option("--mapping", help="TOML with [columns]: our name = theirs.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Report table; default the one in SRC.")
    ] = None,
    keep_priors: Annotated[
        bool, typer.Option("--keep-priors", help="Keep references to earlier studies.")
    ] = False,
    writing: Annotated[
        bool,
        typer.Option("--check-writing/--no-check-writing", help="Quarantine images with writing on them."),
    ] = True,
    with_dicom: Annotated[
        bool, typer.Option("--with-dicom", help="Keep de-identified DICOM files too.")
    ] = False,
    chest: Annotated[
        bool,
        typer.Option("--check-chest/--no-check-chest", help="Quarantine images unlike an upright chest."),
    ] = True,
    ner: Annotated[
        str, typer.Option("--ner", help="Local recogniser of names: module:function or a model folder.")
    ] = "",
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Table of labels to compare with the texts.")
    ] = None,
    size: Annotated[
        int, typer.Option("--size", min=64, max=4096, help="Longest image side in pixels.")
    ] = 512,
    bits: Annotated[int, typer.Option("--bits", help="8 or 16 bits per pixel.")] = 8,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes; 0 for one per core.")] = 0,
    json_: Json = False,
) -> None:
    """Import studies into a prepared data folder, with a reason for every dropped one."""
    import os
    import secrets

    from client.data.importing import ImportPlan, import_studies, preview_import
    from client.data.sitekey import SiteKey, load_key, load_or_create_key
    from client.data.sources.table import read_mapping

    if bits not in (8, 16):
        raise typer.BadParameter("expected 8 or 16", param_hint="--bits")
    path = key or out.absolute().parent / "site.key"
    if dry_run:
        site_key = load_key(path) if path.exists() else SiteKey(secrets.token_bytes(32))
    else:
        site_key = load_or_create_key(path, fresh=secrets.token_bytes(32))
    chosen, read_source = _reader(format_, source)
    from client.data.withdrawal import withdrawn

    plan = ImportPlan(
        source=source,
        format=chosen,
        directory=out.absolute(),
        key=site_key,
        mapping=read_mapping(mapping),
        max_side=size,
        bits=bits,
        table=table,
        withdrawn=withdrawn(withdrawn_list(path)),
        keep_priors=keep_priors,
        check_writing=writing,
        with_dicom=with_dicom,
        check_chest=chest,
        recogniser=ner,
        labels=labels,
        workers=workers or os.cpu_count() or 1,
    )
    with progress_bars() as progress:
        run = preview_import if dry_run else import_studies
        summary = run(plan, read_source, progress=progress)
    _print_summary(summary, dry_run=dry_run, as_json=json_)


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data folder.")],
    writing: Annotated[bool, typer.Option("--writing", help="Look for writing in the images again.")] = False,
    json_: Json = False,
) -> None:
    """Verify schema, checksums, orphans, leakage across splits and left-over identifiers."""
    from dataclasses import asdict

    from client.data.check import check_dataset

    with progress_bars() as progress:
        problems = check_dataset(directory, writing=writing, progress=progress)
    if json_:
        print(json.dumps({"ok": not problems, "problems": [asdict(problem) for problem in problems]}))
    else:
        for problem in problems:
            print(f"{problem.kind}  {problem.where}")
        print("no problem found" if not problems else f"{len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data folder.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a contact sheet to this file.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=500, help="Studies on the sheet.")] = 30,
    flag: Annotated[str, typer.Option("--flag", help="Only studies with this flag.")] = "",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which random sample.")] = 1,
    json_: Json = False,
) -> None:
    """Show counts and histograms; with --html a contact sheet of images and reports."""
    from client.data.show import contact_sheet, describe
    from common.files import write_atomic

    described = describe(directory)
    if html is not None:
        page = contact_sheet(directory, count=count, seed=seed, flag=flag)
        write_atomic(html, page.encode("utf-8"), mode=0o600)
        described["html"] = str(html)
    if json_:
        print(json.dumps(described, ensure_ascii=False))
        return
    for name, value in described.items():
        if name == "card":
            continue
        if isinstance(value, dict):
            print(name.replace("_", " "))
            for key, number in value.items():
                print(f"    {number:6d}  {key}")
        else:
            print(f"{name}: {value}")


@app.command()
def drop(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data folder.")],
    patient: Annotated[str, typer.Option("--patient", help="Hospital identifier or pseudonym.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="Site key file; default site.key beside DIR.")
    ] = None,
    json_: Json = False,
) -> None:
    """Remove a patient who withdrew consent, now and from every later import."""
    from dataclasses import asdict

    from client.data.sitekey import load_key
    from client.data.withdrawal import CONSEQUENCE, withdraw

    path = key or directory.absolute().parent / "site.key"
    done = withdraw(directory.absolute(), patient, key=load_key(path), withdrawn_list=withdrawn_list(path))
    if json_:
        print(json.dumps({**asdict(done), "consequence": CONSEQUENCE}))
    else:
        print(f"removed {done.studies} studies with {done.images} images of {done.patient}")
        print(CONSEQUENCE)


@app.command()
def receive(
    inbox: Annotated[Path, typer.Option("--out", help="Inbox folder; holds identified images.")],
    senders: Annotated[list[str], typer.Option("--allow", help="AE title that may send; repeat for more.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 11112,
    address: Annotated[str, typer.Option("--address", help="Address to listen on.")] = "127.0.0.1",
    ae_title: Annotated[str, typer.Option("--ae-title", help="Our AE title.")] = "FEDRAD",
    certificate: Annotated[Path | None, typer.Option("--tls-cert", help="Our certificate (PEM).")] = None,
    private_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key (PEM).")] = None,
    authority: Annotated[
        Path | None, typer.Option("--tls-ca", help="Authority of the senders (PEM).")
    ] = None,
    json_: Json = False,
) -> None:
    """Receive DICOM images from a PACS until interrupted; import the inbox afterwards."""
    import signal
    import threading

    from client.data.receive import ReceiverPlan, start_receiver

    plan = ReceiverPlan(
        inbox=inbox,
        address=address,
        port=port,
        ae_title=ae_title,
        senders=tuple(senders),
        certificate=certificate,
        private_key=private_key,
        authority=authority,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    receiver = start_receiver(plan)
    print(f"listening on {address}:{receiver.port} as {ae_title}; Ctrl-C ends", file=sys.stderr, flush=True)
    ended.wait()
    receiver.close()
    counts = {"stored": receiver.stored, "repeated": receiver.repeated, "refused": receiver.refused}
    print(json.dumps(counts) if json_ else ", ".join(f"{name} {count}" for name, count in counts.items()))


app.command()(instruct)
app.command()(convert)


def withdrawn_list(key: Path) -> Path:
    """Return the path of the private list of withdrawn patients beside a key file."""
    return key.with_name(f"{key.stem}.withdrawn")


def main() -> None:
    """Run the commands on their own."""
    run_program(app)


def _reader(name: str, source: Path) -> tuple[str, Reader]:
    from client.data.sources import FORMATS, guess_format, reader_of

    if name == "auto":
        name = guess_format(source)
    if name not in FORMATS:
        raise typer.BadParameter(f"expected auto or one of {', '.join(FORMATS)}", param_hint="--format")
    return name, reader_of(name)


def _print_summary(summary: ImportSummary, *, dry_run: bool, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print(json.dumps({**asdict(summary), "dry_run": dry_run}, ensure_ascii=False))
        return
    for pair in summary.preview:
        print(f"{pair['where']}  {pair['view']}  {pair['split']}  images {len(pair['images'])}")
        for name in ("indication", "findings", "impression"):
            if pair[name]:
                print(f"    {name}: {pair[name]}")
    dropped = summary.read - summary.kept
    print(f"read {summary.read}, kept {summary.kept} of {summary.patients} patients, dropped {dropped}")
    for reason, count in summary.dropped.items():
        print(f"    {count:6d}  {reason}")
    print("splits " + ", ".join(f"{split} {count}" for split, count in summary.splits.items()))
    if dry_run:
        print("dry run: nothing was written")
    elif summary.done_before:
        print(f"{summary.directory} was complete already; nothing was done")
    else:
        print(f"wrote {summary.directory}")


if __name__ == "__main__":
    main()
