"""The operator's read-only web page: studies, sites, rounds, ε, who is missing and why.

HTML and SVG made on the server from `server/status.py`; no script, nothing from elsewhere, nothing that
changes anything. Guarantees: GET and HEAD only; a Content-Security-Policy that allows this page's own
stylesheet alone; only the Host names it was told are answered (DNS rebinding); errors show names, not paths.
It has no login: it listens on loopback, and whoever reaches it may read it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointInvalid, FedRadError
from common.protocol import Stage
from server.connections import ServerView, read_server
from server.operator_page import charts
from server.status import StudyView, find_studies, read_view

if TYPE_CHECKING:
    from fastapi import FastAPI

FOLDER = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_page(
    directory: Path, *, hosts: tuple[str, ...], clock: Callable[[], float] = time.time, refresh_s: int = 15
) -> FastAPI:
    """Make the web application for the study or studies in a directory; `hosts` are the names answered."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(title="FedRad", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    style = (FOLDER / "style.css").read_bytes()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return HTMLResponse(render("problem.html.j2", text=str(error.detail)), error.status_code)

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    def index() -> Response:
        views, problems = _views(directory)
        server, now_s = read_server(directory), clock()
        if len(views) == 1 and not problems:
            return HTMLResponse(study_page(views[0], now_s=now_s, refresh_s=refresh_s, server=server))
        return HTMLResponse(index_page(views, problems, now_s=now_s, refresh_s=refresh_s, server=server))

    @app.api_route("/study/{sha256}", methods=["GET", "HEAD"], response_class=HTMLResponse)
    def study(sha256: str) -> Response:
        return HTMLResponse(study_page(_find(directory, sha256), now_s=clock(), refresh_s=refresh_s))

    @app.api_route("/status.json", methods=["GET", "HEAD"])
    def status() -> Response:
        views, problems = _views(directory)
        server = read_server(directory)
        value = {"studies": [asdict(view) for view in views], "problems": problems}
        return JSONResponse(value | {"server": asdict(server) if server else None})

    @app.api_route("/style.css", methods=["GET", "HEAD"])
    def stylesheet() -> Response:
        return Response(style, media_type="text/css; charset=utf-8")

    @app.api_route("/icon.svg", methods=["GET", "HEAD"])
    def icon() -> Response:
        return Response((FOLDER / "icon.svg").read_bytes(), media_type="image/svg+xml")

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    def health() -> Response:
        return Response("ok\n", media_type="text/plain; charset=utf-8")

    return app


def study_page(view: StudyView, *, now_s: float, refresh_s: int, server: ServerView | None = None) -> str:
    """Write the page of one study, with the server's sites where they are known."""
    epsilon = ""
    if view.release_epsilon_limit is not None:
        epsilon = charts.epsilon_chart(
            view.curve, limit=view.release_epsilon_limit, rounds_planned=view.rounds_planned
        )
    timed = [one.seconds for one in view.rounds if one.seconds is not None]
    return render(
        "study.html.j2",
        view=view,
        server=server,
        now_s=now_s,
        refresh_s=refresh_s,
        epsilon_chart=epsilon,
        seconds_chart=charts.seconds_chart(view.rounds, view.failed),
        presence=charts.presence_grid([site.site for site in view.sites], view.rounds),
        reasons=charts.by_reason([site.absences for site in view.sites]),
        meter=charts.meter,
        stages=_stages(view),
        usual_s=statistics.median(timed) if timed else None,
        slowest_s=max(timed, default=0.0),
        newest_s=view.rounds[-1].time_unix_s if view.rounds else None,
        serving=sum(site.serves for site in view.sites) if view.rounds or view.failed else None,
    )


def index_page(
    views: list[StudyView],
    problems: list[str],
    *,
    now_s: float,
    refresh_s: int,
    server: ServerView | None = None,
) -> str:
    """Write the list of studies, with the server's sites where they are known."""
    return render("index.html.j2", views=views, problems=problems, now_s=now_s, refresh_s=refresh_s,
                  server=server, meter=charts.meter)  # fmt: skip


def render(name: str, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped but the charts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "ago": ago, "bytes": in_bytes, "seconds": in_seconds, "svg": Markup, "time_left": time_left,
        "until": until,
    }  # fmt: skip
    return environment.get_template(name).render(**values)


def ago(then_s: float, now_s: float) -> str:
    """Say how long ago something was, in words."""
    passed = int(now_s - then_s)
    if passed < 0:
        return "in the future: compare clocks"
    for size, word in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= size:
            count = passed // size
            return f"{count} {word}{'s' if count > 1 else ''} ago"
    return "just now"


def until(end_s: float, now_s: float) -> str:
    """Say how long something holds, in words."""
    left = end_s - now_s
    if left <= 0:
        return "ended" if end_s else "none"
    return f"ends in {left / 86400:.1f} days" if left >= 86400 else f"ends in {left / 3600:.0f} h"


def in_bytes(count: float) -> str:
    """Write bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def in_seconds(value: float) -> str:
    """Write seconds as people say them."""
    if value < 90:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def time_left(deadline_unix_s: float, *, grace_s: float, now_s: float) -> str:
    """Say how long an attempt waits on: to its deadline, then for sites that are still at work."""
    left_s = deadline_unix_s - now_s
    if left_s >= 0:
        return f"{in_seconds(left_s)} to the deadline"
    if left_s + grace_s > 0:
        return f"past the deadline; up to {in_seconds(left_s + grace_s)} more for sites still at work"
    return "deadline passed"


def _views(directory: Path) -> tuple[list[StudyView], list[str]]:
    views: list[StudyView] = []
    problems: list[str] = []
    try:
        directories = find_studies(directory)
    except CheckpointInvalid:
        directories = []
    if not directories:
        return [], ["There is no study in this directory yet."]
    for path in directories:
        try:
            views.append(read_view(path))
        except FedRadError as error:
            problems.append(f"{path.name} cannot be read: {error.code}")
    return views, problems


def _find(directory: Path, sha256: str) -> StudyView:
    from starlette.exceptions import HTTPException

    found = [view for view in _views(directory)[0] if len(sha256) >= 12 and view.sha256.startswith(sha256)]
    if len(found) != 1:
        raise HTTPException(404, "There is no study of this name here.")
    return found[0]


def _stages(view: StudyView) -> list[str]:
    """The stages that anything was sent in, in the protocol's order."""
    named = {name.rpartition("-")[0] for name in view.bytes_by_stage}
    known = [stage.value for stage in Stage if stage.value in named]
    return [*known, *sorted(named - set(known))]
