"""`fedrad-site serve`, `bench`, `token …` and `guard …`: a release at work in this hospital."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.serving.plan import GgufType
from common.terminal import answer, bars

if TYPE_CHECKING:
    from client.releases import ModelStore
    from client.serving.source import ReleaseSource
    from client.serving.users import TokenFile

token_app = typer.Typer(help="Who may ask this site's drafting server.", no_args_is_help=True)
guard_app = typer.Typer(help="What this site's chest radiographs look like.", no_args_is_help=True)

_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
ReleaseFolder = Annotated[
    Path | None, typer.Option("--release", help="A release folder; default: the version in use.")
]
Base = Annotated[
    Path | None, typer.Option("--base", help="Base model directory, if not this site's or tiny.")
]
Unprotected = Annotated[bool, typer.Option(help="Allow a release without differential privacy.")]
Merge = Annotated[
    bool,
    typer.Option(
        "--merge",
        help="Run base and adapter merged, from a fresh copy in the cache: 4 bytes of disk per weight, and "
        "as much memory while it is made.",
    ),
]
LlamaCpp = Annotated[
    GgufType | None,
    typer.Option("--llama-cpp", help="Run the language model in llama.cpp, its weights stored so (merged)."),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave the graphics card alone.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="CPU threads of the engine.")]


def serve(
    home: Home = _DEFAULT_HOME,
    release: ReleaseFolder = None,
    base: Base = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8787,
    listen: Annotated[
        str | None, typer.Option("--listen", help="Address beyond loopback; needs TLS and users.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Server certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key (PEM).")] = None,
    client_ca: Annotated[
        Path | None, typer.Option("--client-ca", help="Ask clients for a certificate of this CA.")
    ] = None,
    host_name: Annotated[
        list[str] | None, typer.Option("--host-name", help="A name this server answers to.")
    ] = None,
    open_loopback: Annotated[bool, typer.Option("--open", help="No tokens; on loopback only.")] = False,
    no_guard: Annotated[bool, typer.Option("--no-guard", help="Answer whatever comes.")] = False,
    guard_images: Annotated[
        Path | None, typer.Option("--guard-images", help="Own frontal images, if not the site's data.")
    ] = None,
    grpc_socket: Annotated[
        Path | None, typer.Option("--grpc-socket", help="Unix socket; default HOME/run/drafting.sock.")
    ] = None,
    pacs: Annotated[Path | None, typer.Option("--pacs", help="Settings of the PACS loop.")] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Without the radiologist's page.")] = False,
    no_keep: Annotated[
        bool, typer.Option("--no-keep-drafts", help="Log that drafts were made, not what they said.")
    ] = False,
    keep_cases: Annotated[
        int,
        typer.Option("--keep-cases", min=0, help="Days a decided case stays on the worklist; 0: for ever."),
    ] = 30,
    merge: Merge = False,
    llama_cpp: LlamaCpp = None,
    threads: Threads = 1,
    cpu: Cpu = False,
    max_batch: Annotated[int, typer.Option(min=1, max=64, help="Answers written at once.")] = 8,
    per_minute: Annotated[float, typer.Option(min=1, help="Requests of one user a minute.")] = 120.0,
    allow_unprotected: Unprotected = False,
) -> None:
    """Draft reports for this hospital until told to stop (Ctrl-C or SIGTERM)."""
    import asyncio
    import logging
    import sys

    from client.serving.launch import Launch, Tls
    from client.serving.launch import serve as run
    from common.errors import ServingRefused

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if (tls_cert is None) != (tls_key is None) or (client_ca is not None and tls_cert is None):
        raise ServingRefused("expected --tls-cert and --tls-key together, and both with --client-ca")
    source, store = _source(
        home, release, base, merge=merge, gguf=llama_cpp, allow_unprotected=allow_unprotected
    )
    launch = Launch(
        folder=home,
        source=source,
        host=listen or "127.0.0.1",
        port=port,
        beyond_loopback=listen is not None,
        tls=Tls(tls_cert, tls_key, client_ca) if tls_cert and tls_key else None,
        hosts=tuple(host_name or ()),
        open_to="local:anyone" if open_loopback else "",
        guarded=not no_guard,
        guard_images=_own_images(home, guard_images) if not no_guard else (),
        socket=grpc_socket or home / "run" / "drafting.sock",
        threads=threads,
        max_batch=max_batch,
        per_minute=per_minute,
        keep_drafts=not no_keep,
        keep_cases_days=keep_cases,
        use_card=not cpu,
        page=not no_page,
        pacs=pacs,
        data=_own_data(home),
    )

    def started(address: str, token: str) -> None:
        print(f"drafting on {address}{'#token=' + token if token else ''}", file=sys.stderr, flush=True)

    with bars() as shown:
        asyncio.run(run(launch, store=store, progress=shown.step, started=started))


def bench(
    home: Home = _DEFAULT_HOME,
    release: ReleaseFolder = None,
    base: Base = None,
    reports: Annotated[int, typer.Option(min=1, max=1000, help="Made-up studies to write.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens of each report, at most.")] = 64,
    merge: Merge = False,
    llama_cpp: LlamaCpp = None,
    threads: Threads = 1,
    cpu: Cpu = False,
    allow_unprotected: Unprotected = False,
    as_json: Json = False,
) -> None:
    """Measure tokens per second, seconds per report and memory here, beside the limit of the memory bus."""
    from client.serving.bench import bench_text, measure

    source, _ = _source(home, release, base, merge=merge, gguf=llama_cpp, allow_unprotected=allow_unprotected)
    with bars() as shown:
        value = measure(
            source, reports=reports, tokens=tokens, threads=threads, use_card=not cpu, progress=shown.step
        )
    answer(value, as_json=as_json, text=lambda: bench_text(value))


@token_app.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Who will use it; the access log names them.")],
    admin: Annotated[bool, typer.Option("--admin", help="May switch releases.")] = False,
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Make a token, in place of the name's former one; it is shown once."""
    from client.home import SiteHomeInvalid

    if not home.is_dir():
        raise SiteHomeInvalid(f"{home}: expected a site's directory, got none; is --home right?")
    token = _tokens(home).create(name, admin=admin)
    answer({"name": name, "admin": admin, "token": token}, as_json=as_json, text=lambda: token)


@token_app.command("list")
def token_list(home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """List who has a token."""
    from client.home import verify_site_folder

    verify_site_folder(home, part="serving")
    names = _tokens(home).names()
    answer(
        names,
        as_json=as_json,
        text=lambda: "\n".join(f"{n}{'  (admin)' if a else ''}" for n, a in names.items()) or "no tokens",
    )


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Whose token ends.")],
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """End a token; a running server refuses it from the next request on."""
    _tokens(home).revoke(name)
    answer({"revoked": name}, as_json=as_json, text=lambda: f"revoked {name}")


@guard_app.command("calibrate")
def guard_calibrate(
    home: Home = _DEFAULT_HOME,
    release: ReleaseFolder = None,
    base: Base = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Own frontal images, if not the site's data.")
    ] = None,
    allow_unprotected: Unprotected = False,
    as_json: Json = False,
) -> None:
    """Learn what this site's frontal chest radiographs look like; it stays here."""
    import asyncio

    from client.serving.guard import guard_path
    from client.serving.launch import Launch, base_name, engine_plan, site_guard
    from client.serving.workers import WorkerEngine

    source, _ = _source(home, release, base, merge=False, allow_unprotected=allow_unprotected)
    launch = Launch(folder=home, source=source, guard_images=_own_images(home, images), data=_own_data(home))
    path = guard_path(home / "serving", base_files=base_name(source))
    path.unlink(missing_ok=True)

    async def calibrated(progress: object) -> int:
        engine = WorkerEngine(source, engine_plan(source, max_batch=1))
        await engine.start()
        try:
            made = await site_guard(launch, engine, progress=progress)  # type: ignore[arg-type]
            return made.image.pictures
        finally:
            await engine.stop()

    with bars() as shown:
        pictures = asyncio.run(calibrated(shown.step))
    value = {"pictures": pictures, "path": str(path)}
    answer(value, as_json=as_json, text=lambda: f"calibrated on {pictures} own images: {path}")


def mount(app: typer.Typer) -> None:
    """Add these commands to `fedrad-site`."""
    app.command("serve")(serve)
    app.command("bench")(bench)
    app.add_typer(token_app, name="token")
    app.add_typer(guard_app, name="guard")


def _source(
    home: Path,
    release: Path | None,
    base: Path | None,
    *,
    merge: bool,
    allow_unprotected: bool,
    gguf: GgufType | None = None,
) -> tuple[ReleaseSource, ModelStore | None]:
    """Find the release to run: a folder as given, else the version in use, verified against the ledger."""
    from client.serving.source import ReleaseSource
    from common.errors import BaseInvalid, VersionUnknown
    from common.model.release import open_release
    from common.model.tiny import known_base

    operator_key, bases = None, {}
    if (home / "site.json").is_file():
        from client.home import open_home

        opened = open_home(home)
        operator_key, bases = opened.operator_key, opened.bases
    store, version, folder = None, 0, release
    if folder is None:
        from client.releases import ModelStore

        store = ModelStore(home / "models")
        current = store.current()
        if current is None:
            raise VersionUnknown("expected a release in use, got none; `fedrad-site model use`, or --release")
        version = current.version
        store.verify(version, allow_unprotected=allow_unprotected)
        folder = store.folder(version)
    name = open_release(
        folder, operator_key=operator_key, allow_unprotected=allow_unprotected
    ).study.base.name
    directory = known_base(name, base or bases.get(name))
    if directory is None:
        raise BaseInvalid(f"--base: expected the directory of base {name!r}, got none")
    merged = home / "cache" / "merged" if merge or gguf else None
    stored = gguf.value if gguf else ""
    return ReleaseSource(folder, directory, version, operator_key, allow_unprotected, merged, stored), store


def _own_images(home: Path, given: Path | None) -> tuple[Path, ...]:
    """List the site's own frontal images: of a folder, or of its prepared data."""
    if given is not None:
        kinds = {".png", ".jpg", ".jpeg", ".dcm"}
        return tuple(sorted(path for path in given.rglob("*") if path.suffix.lower() in kinds))
    data = _own_data(home)
    if data is None:
        return ()
    from client.data.store import iter_pairs

    frontal = (pair for pair in iter_pairs(data) if pair.view.lower() != "lateral")
    return tuple(data / image for pair in frontal for image in pair.images)


def _own_data(home: Path) -> Path | None:
    if not (home / "site.json").is_file():
        return None
    from client.home import open_home

    data = open_home(home).data
    return data if (data / "pairs.jsonl").is_file() else None


def _tokens(home: Path) -> TokenFile:
    from client.serving.users import TokenFile

    return TokenFile(home / "serving" / "tokens.json")
