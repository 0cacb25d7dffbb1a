"""`fedrad-site data instruct` and `convert`: instruction samples from reports and between file formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from client.data.console import Json, progress_bars


def instruct(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data folder.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    format_: Annotated[str, typer.Option("--format", help="llava, llava-rad, vqa-rad or pefomed.")] = "llava",
    endpoint: Annotated[str, typer.Option("--endpoint", help="OpenAI-compatible URL on this machine.")] = "",
    model: Annotated[str, typer.Option("--model", help="Model name at the endpoint.")] = "",
    json_: Json = False,
) -> None:
    """Make questions and answers from the reports, by rules or with a local model."""
    from client.data.converters import FORMATTERS
    from client.data.instructions import instructions, local_endpoint, model_instruction
    from client.data.store import read_pairs
    from common.errors import InstructionRefused
    from common.files import write_atomic

    if format_ not in FORMATTERS:
        raise typer.BadParameter(f"expected one of {', '.join(FORMATTERS)}", param_hint="--format")
    if bool(endpoint) != bool(model):
        raise typer.BadParameter("expected --endpoint and --model together")
    pairs = read_pairs(directory)
    samples, refused = list(instructions(pairs)), 0
    if endpoint:
        ask = local_endpoint(endpoint, model)
        with progress_bars() as progress:
            for number, pair in enumerate(pairs, start=1):
                try:
                    samples.append(model_instruction(pair, ask, model=model))
                except InstructionRefused:
                    refused += 1
                progress("ask", number, len(pairs))
    write_atomic(out, FORMATTERS[format_](samples).encode("utf-8"), mode=0o600)
    counts = {"samples": len(samples), "refused": refused, "file": str(out)}
    print(json.dumps(counts) if json_ else ", ".join(f"{name} {value}" for name, value in counts.items()))


def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="File of instruction samples.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    from_: Annotated[str, typer.Option("--from", help="llava, llava-rad, vqa-rad or pefomed.")],
    to: Annotated[str, typer.Option("--to", help="llava, llava-rad, vqa-rad or pefomed.")],
    clean: Annotated[
        bool, typer.Option("--clean/--no-clean", help="Remove identifiers; leave out what names a report.")
    ] = True,
    json_: Json = False,
) -> None:
    """Convert instruction samples between file formats; images are named, not copied."""
    from dataclasses import replace

    from client.data.converters import FORMATTERS, PARSERS
    from client.data.instructions import clean_turn
    from common.errors import InstructionRefused
    from common.files import write_atomic

    for name, option in ((from_, "--from"), (to, "--to")):
        if name not in PARSERS:
            raise typer.BadParameter(f"expected one of {', '.join(PARSERS)}", param_hint=option)
    try:
        samples = PARSERS[from_](source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InstructionRefused(f"cannot read {source}: {type(error).__name__}") from error
    kept = []
    for sample in samples:
        try:
            turns = tuple(clean_turn(turn) for turn in sample.turns) if clean else sample.turns
        except InstructionRefused:
            continue
        kept.append(replace(sample, turns=turns))
    write_atomic(out, FORMATTERS[to](kept).encode("utf-8"), mode=0o600)
    counts = {"samples": len(kept), "refused": len(samples) - len(kept), "file": str(out)}
    print(json.dumps(counts) if json_ else ", ".join(f"{name} {value}" for name, value in counts.items()))
