"""`fedrad-site base …`: bring a published model in as a base, check it, and list what this site has."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from common.terminal import answer, bars

base_app = typer.Typer(help="Base models of this site: import, verify, list.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()


class SourceKind(StrEnum):
    """What a source is; `auto` tells it by its files."""

    AUTO = "auto"
    LLAVA_RAD = "llava-rad"
    LLAVA_MED = "llava-med"
    LLAVA_HF = "llava-hf"
    SMOLLM_DINO = "smollm-dino"


class Precision(StrEnum):
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@base_app.command("import")
def import_command(
    out: Annotated[Path, typer.Option("--out", help="New directory for the base.")],
    source: Annotated[
        Path | None, typer.Argument(metavar="SRC", help="Folder with the published files (not smollm-dino).")
    ] = None,
    kind: Annotated[SourceKind, typer.Option("--kind", help="What SRC is.")] = SourceKind.AUTO,
    language: Annotated[
        Path | None, typer.Option("--language", help="Vicuna's folder; default SRC/vicuna-7b-v1.5.")
    ] = None,
    vision: Annotated[
        Path | None, typer.Option("--vision", help="The tower's file or folder, where SRC lacks it.")
    ] = None,
    dtype: Annotated[Precision, typer.Option("--dtype", help="Of the weights on disk.")] = Precision.FLOAT16,
    name: Annotated[
        str | None, typer.Option("--name", help="Also enter it in this site's settings under this name.")
    ] = None,
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Convert a published model to a hash-pinned Llava directory; nothing is fetched, no code is run."""
    from common.errors import ConversionRefused
    from common.model.convert.importing import base_sha256, import_base
    from common.model.convert.kinds import Kind
    from common.model.manifest import hash_base

    _quiet()
    with bars() as display:
        if kind is SourceKind.SMOLLM_DINO:
            from common.model.smollm import convert_smollm

            convert_smollm(out, progress=display.step)
            what, sha256 = kind.value, base_sha256(hash_base(out))
        elif source is None:
            raise ConversionRefused("SRC: expected the folder with the published files, got none")
        else:
            made = import_base(
                source,
                out,
                kind=None if kind is SourceKind.AUTO else Kind(kind.value),
                language=language,
                vision=vision,
                dtype=dtype.value,
                progress=display.step,
            )
            what, sha256 = made.kind, made.sha256
    if name:
        _enter(home, name, out)
    value = {"base": str(out), "kind": what, "sha256": sha256, "name": name}
    answer(
        value,
        as_json=as_json,
        text=lambda: f"{what}: {out}\nbase {sha256}\nits licences: {out / 'README.md'}",
    )


@base_app.command("verify")
def verify_command(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A base's directory, or its name at this site.")
    ],
    study: Annotated[
        str | None, typer.Option("--study", help="Also check that it is the base of this received study.")
    ] = None,
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Hash every file again, against the record of its import and a study's manifest."""
    from common.model.convert.importing import ORIGIN, base_sha256, verify_import
    from common.model.manifest import hash_base, verify_base

    directory = Path(base)
    if not directory.is_dir():
        from client.home import open_home

        directory = open_home(home).base_directory(base)
    imported = _kind(directory / ORIGIN) is not None
    with bars() as display:
        if imported:
            sha256 = verify_import(directory, progress=display.step).sha256
        else:
            sha256 = base_sha256(hash_base(directory, progress=lambda what: display.step(what, 0, 1)))
    if study:
        from client.home import find_study, open_home, read_study

        opened = open_home(home)
        verify_base(directory, read_study(opened, find_study(opened, study)).base.files)
    value = {"base": str(directory), "sha256": sha256, "import_verified": imported, "study": study}
    answer(value, as_json=as_json, text=lambda: f"{directory}\nbase {sha256}")


@base_app.command("list")
def list_command(home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """List this site's bases by name; nothing is hashed (`base verify` does)."""
    from client.home import open_home
    from common.model.convert.importing import ORIGIN

    values = [
        {
            "name": name,
            "directory": str(path),
            "present": (path / "config.json").is_file(),
            "kind": _kind(path / ORIGIN),
        }
        for name, path in sorted(open_home(home).bases.items())
    ]

    def text() -> str:
        lines = [
            f"{v['name']:<20} {v['kind'] or '-':<12} {v['directory'] if v['present'] else 'MISSING'}"
            for v in values
        ]
        return "\n".join(lines) or "no base yet; `fedrad-site base import`"

    answer(values, as_json=as_json, text=text)


def _kind(origin: Path) -> str | None:
    try:
        value: Any = json.loads(origin.read_text())
        return str(value["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _enter(home: Path, name: str, directory: Path) -> None:
    from client.home import create_home, open_home

    opened = open_home(home)
    create_home(
        home,
        site=opened.site,
        operator_key=opened.operator_key,
        data=opened.data,
        bases=opened.bases | {name: directory},
        epsilon=opened.epsilon,
        delta=opened.delta,
    )


def _quiet() -> None:
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
