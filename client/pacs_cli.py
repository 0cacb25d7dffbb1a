"""`fedrad-site pacs …`: the PACS loop's configuration and its queue; `serve --pacs` runs the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from common.terminal import answer

pacs_app = typer.Typer(
    help="Images in by C-STORE, preliminary reports out as DICOM SR and FHIR.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="pacs.toml")]


@pacs_app.callback()
def pacs() -> None:
    """Images in by C-STORE, preliminary reports out as DICOM SR and FHIR; `serve --pacs` runs it."""


@pacs_app.command()
def example(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; an existing one is kept.")],
    as_json: Json = False,
) -> None:
    """Write a complete, commented configuration."""
    from client.pacs.config import EXAMPLE
    from common.errors import PacsConfigInvalid
    from common.files import write_atomic

    if out.exists():
        raise PacsConfigInvalid(f"{out}: expected no file there, got one; choose another name")
    write_atomic(out, EXAMPLE.encode(), mode=0o600)
    answer(
        {"config": str(out)}, as_json=as_json, text=lambda: f"{out}: edit it, then `fedrad-site pacs check`"
    )


@pacs_app.command()
def check(config: Config, as_json: Json = False) -> None:
    """Check a configuration and ask its destination whether it is there (C-ECHO)."""
    from client.pacs.config import read_pacs_config
    from client.pacs.sending import echo

    settings = read_pacs_config(config)
    if settings.destination is not None:
        echo(settings.destination, calling=settings.listen.ae_title)
    listen = settings.listen
    value = {
        "listen": f"{listen.ae_title} on {listen.address}:{listen.port}",
        "tls": listen.certificate is not None,
        "senders": list(listen.senders),
        "destination": settings.destination.ae_title if settings.destination else None,
        "fhir": str(settings.fhir.directory or settings.fhir.url) if settings.fhir else None,
    }

    def text() -> str:
        there = f"; {value['destination']} answers" if value["destination"] else ""
        return f"{value['listen']}, {'TLS' if value['tls'] else 'plain on loopback'}{there}"

    answer(value, as_json=as_json, text=text)


@pacs_app.command("list")
def list_jobs(config: Config, as_json: Json = False) -> None:
    """List the queue: jobs by stage, and why what is waiting or dead is so; nothing about patients."""
    values = [_value(job) for job in _queue(config).listing()]

    def text() -> str:
        lines = [f"{v['id'][:12]}  {v['stage']:<9} {v['reason']}".rstrip() for v in values]
        return "\n".join([*lines, f"{len(values)} jobs"])

    answer({"jobs": values}, as_json=as_json, text=text)


@pacs_app.command()
def retry(
    config: Config,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id, or the start of it, of a dead job.")],
    as_json: Json = False,
) -> None:
    """Open a dead job again; the running loop takes it up within seconds."""
    from client.pacs.jobs import Stage
    from common.errors import JobUnknown

    queue = _queue(config)
    found = [one.id for one in queue.listing() if one.stage is Stage.DEAD and one.id.startswith(job)]
    if len(found) != 1:
        raise JobUnknown(f"expected the id of one dead job, got {len(found)} that begin so")
    value = _value(queue.revive(found[0]))
    answer(value, as_json=as_json, text=lambda: f"{found[0][:12]}: open again")


def _queue(config: Path) -> Any:
    from client.pacs.config import read_pacs_config
    from client.pacs.jobs import JobQueue

    return JobQueue(read_pacs_config(config).directory)


def _value(job: Any) -> dict[str, Any]:
    waiting = [f"{n}: {d.reason}" for n, d in sorted(job.deliveries.items()) if d.sent_s is None and d.reason]
    return {
        "id": job.id,
        "stage": job.stage.value,
        "received_s": job.received_s,
        "reason": job.reason or "; ".join(waiting),
        "sent": sorted(name for name, one in job.deliveries.items() if one.sent_s is not None),
    }
