"""Put a serving process together: release, engine, guard, HTTP, gRPC; run until told to stop.

Guarantees: it listens beyond loopback only when told so, with TLS and users; it serves only a release whose
signature, and in a model store whose ledger proof, was verified; it runs without a guard only when told so.
A release switched with `fedrad-site model use` is taken up while running, after the canary.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.access import AccessLog
from client.data.framing import Framing, site_framing
from client.serving.engine import Ask
from client.serving.guard import CalibratedGuard, calibrate_guard, guard_path, pick_pictures, read_guard
from client.serving.guard_image import format_guard
from client.serving.http import HttpSettings, create_app
from client.serving.merging import merge_bytes
from client.serving.picture import Picture, prepared
from client.serving.plan import EnginePlan, find_device, plan_engine
from client.serving.retention import DAY_S, keep_purging
from client.serving.service import Active, DraftingService
from client.serving.source import ReleaseSource
from client.serving.switching import ReleaseSwitch
from client.serving.users import TokenFile
from client.serving.workers import WorkerEngine
from client.serving.worklist import Worklist
from common.canonical import sha256_hex
from common.errors import GuardNotCalibrated, ServingRefused
from common.files import write_atomic
from common.model.images import read_processor

if TYPE_CHECKING:
    from client.releases import ModelStore

_LOG = logging.getLogger("fedrad.serving")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tls:
    """Certificate and key of this server; `client_ca` asks every client for a certificate of that CA."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Launch:
    """All that `fedrad-site serve` was told. `folder` is the site's directory for tokens, guard and logs.

    `keep_cases_days` is how long the worklist keeps what was decided, 0 for ever.
    """

    folder: Path
    source: ReleaseSource
    host: str = "127.0.0.1"
    port: int = 8787
    beyond_loopback: bool = False
    tls: Tls | None = None
    hosts: tuple[str, ...] = ()
    open_to: str = ""
    guarded: bool = True
    guard_images: tuple[Path, ...] = ()
    socket: Path | None = None
    threads: int = 1
    max_batch: int = 8
    per_minute: float = 120.0
    burst: int = 30
    keep_drafts: bool = True
    keep_cases_days: int = 30
    use_card: bool = True
    page: bool = True
    pacs: Path | None = None
    data: Path | None = None

    @property
    def framing(self) -> Framing:
        """How this site's images were stored; raises DatasetInvalid."""
        return site_framing(self.data, *self.guard_images[:1])


def verify_listening(launch: Launch, *, has_tokens: bool) -> None:
    """Raise ServingRefused for an address, or an openness, that was not asked for in full."""
    loopback = is_loopback(launch.host)
    certified = launch.tls is not None and launch.tls.client_ca is not None
    if not loopback:
        if not launch.beyond_loopback:
            raise ServingRefused(f"expected a loopback address, got {launch.host}; --listen asks for others")
        if launch.tls is None:
            raise ServingRefused(f"expected TLS (--tls-cert, --tls-key) to listen on {launch.host}, got none")
        if launch.open_to:
            raise ServingRefused(f"expected users to listen on {launch.host}, got --open")
        if not has_tokens and not certified:
            raise ServingRefused(
                "expected users (fedrad-site token add, or --client-ca) to listen beyond loopback, got none"
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def engine_plan(source: ReleaseSource, *, max_batch: int, use_card: bool = True) -> EnginePlan:
    """Plan the engine for this machine's device and the base's size; raises ServingRefused."""
    import json
    import math

    from common.model.manifest import tensor_shapes

    weights = sum(math.prod(shape) for shape in tensor_shapes(source.base).values())
    config = json.loads((source.base / "config.json").read_text()).get("text_config", {})
    hidden, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    many = config.get("num_key_value_heads", heads)
    per_token = 2 * 2 * config.get("num_hidden_layers", 32) * many * (hidden // heads)
    device = find_device(use_card=use_card)
    return plan_engine(device, weights=weights, kv_bytes_per_token=per_token, max_batch=max_batch)


async def open_service(
    launch: Launch, *, progress: Progress, plan: EnginePlan | None = None
) -> DraftingService:
    """Start engine and guard and return the service; the caller closes it."""
    if launch.source.merged is not None:
        needed = merge_bytes(launch.source.base) / 1e9
        _LOG.info("merged copies in %s: %.1f GB each, two are kept", launch.source.merged, needed)
    plan = plan or engine_plan(launch.source, max_batch=launch.max_batch, use_card=launch.use_card)
    engine = WorkerEngine(launch.source, plan, threads=launch.threads)
    await engine.start()
    try:
        guard = await site_guard(launch, engine, progress=progress) if launch.guarded else None
        access = AccessLog(launch.folder / "access")
        active = Active(engine, guard, read_processor(launch.source.base))
        service = DraftingService(
            active, access=access, framing=launch.framing, keep_drafts=launch.keep_drafts
        )
        service.metrics.serving(engine.model)
        return service
    except BaseException:
        await engine.stop()
        raise


async def site_guard(launch: Launch, engine: WorkerEngine, *, progress: Progress) -> CalibratedGuard:
    """Read the guard's calibration for this base, or make it from the site's own images."""
    path = guard_path(launch.folder / "serving", base_files=base_name(launch.source))
    with contextlib.suppress(GuardNotCalibrated):
        return read_guard(path)
    processor = read_processor(launch.source.base)

    async def features(picture: Picture) -> Any:
        return await engine.image_vector(Ask(picture.sha256, prepared(picture, processor)))

    made = await calibrate_guard(
        pick_pictures(launch.guard_images), features, progress=progress, framing=launch.framing
    )
    write_atomic(path, format_guard(made), mode=0o600)
    return CalibratedGuard(made)


def base_name(source: ReleaseSource) -> str:
    """Name a base by its pinned files."""
    return sha256_hex(repr(source.opened().study.base.files).encode())


async def serve(
    launch: Launch, *, store: ModelStore | None, progress: Progress, started: Callable[[str, str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `started` gets the address and, the first time, a token."""
    tokens = None if launch.open_to else TokenFile(launch.folder / "serving" / "tokens.json")
    verify_listening(launch, has_tokens=tokens is not None and bool(tokens.names()))
    service = await open_service(launch, progress=progress)
    socket_server, pacs = None, None
    watches: list[asyncio.Task[None]] = []
    try:
        switch = None
        if store is not None:
            switch = ReleaseSwitch(service, store, launch.source)
            watches.append(asyncio.create_task(switch.follow()))
        if launch.keep_cases_days and (launch.page or launch.pacs or _worklist(launch).is_dir()):
            keep_s = launch.keep_cases_days * DAY_S
            watches.append(asyncio.create_task(keep_purging(Worklist(_worklist(launch)), keep_s=keep_s)))
        app = create_app(
            service,
            settings=HttpSettings(
                tokens=tokens,
                hosts=_hosts(launch),
                open_to=launch.open_to,
                certificate_users=launch.tls is not None and launch.tls.client_ca is not None,
                per_minute=launch.per_minute,
                burst=launch.burst,
            ),
            routers=_routers(service, launch),
            switch=switch.use if switch else None,
        )
        if launch.socket is not None:
            from client.serving.grpc_service import start_grpc

            socket_server = await start_grpc(service, launch.socket, user="local:grpc")
        if launch.pacs is not None:
            from client.pacs.serve import start_pacs

            pacs = start_pacs(service, launch.pacs, worklist=Worklist(_worklist(launch)))
        token = ""
        if tokens is not None and not tokens.names():
            token = tokens.create("first", admin=True)
        server = _quiet_server(uvicorn_config(app, launch))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
        running = asyncio.create_task(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.02)
        if server.started:
            started(_address(launch, server), token)
        await running
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        if pacs is not None:
            await asyncio.to_thread(pacs.stop)
        if socket_server is not None:
            await socket_server.stop(5.0)
        await service.close()


def uvicorn_config(app: Any, launch: Launch) -> Any:
    """Configure uvicorn: TLS as told, names from client certificates, no access log of its own."""
    import uvicorn

    from client.serving.certificate_user import CertificateProtocol

    tls: dict[str, Any] = {}
    if launch.tls is not None:
        tls = {"ssl_certfile": str(launch.tls.certificate), "ssl_keyfile": str(launch.tls.key)}
        if launch.tls.client_ca is not None:
            tls |= {"ssl_ca_certs": str(launch.tls.client_ca), "ssl_cert_reqs": int(ssl.CERT_REQUIRED)}
    return uvicorn.Config(
        app,
        host=launch.host,
        port=launch.port,
        http=CertificateProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=512,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        **tls,
    )


def _quiet_server(config: Any) -> Any:
    """Make a server that leaves signals to its caller: uvicorn raises them again before our clean-up."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)


def _routers(service: DraftingService, launch: Launch) -> list[Any]:
    if not launch.page:
        return []
    from client.serving.page import page_router

    folder = launch.folder / "serving" / "page"
    return [page_router(service, folder=folder, data=launch.data, worklist_folder=_worklist(launch))]


def _worklist(launch: Launch) -> Path:
    return launch.folder / "serving" / "page" / "worklist"


def _hosts(launch: Launch) -> tuple[str, ...]:
    own = HttpSettings(None).hosts if is_loopback(launch.host) else (launch.host.lower(),)
    return tuple(dict.fromkeys((*own, *(host.lower() for host in launch.hosts))))


def _address(launch: Launch, server: Any) -> str:
    port = launch.port
    for one in server.servers:
        for listening in one.sockets:
            port = listening.getsockname()[1]
    return f"{'https' if launch.tls else 'http'}://{launch.host}:{port}/"
