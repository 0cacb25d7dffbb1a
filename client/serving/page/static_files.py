"""The page's own files, read once, served by name with an ETag; no other file can be asked for."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from common.canonical import sha256_hex

FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def static_router() -> APIRouter:
    """Serve every file of the static folder below /page/; /page/ itself is index.html, and / leads there."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in _TYPES}
    tags = {name: f'"{sha256_hex(content)[:32]}"' for name, content in files.items()}
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/page")
    def page() -> RedirectResponse:
        return RedirectResponse("/page/", status_code=307)

    @router.get("/page/")
    def index(request: Request) -> Response:
        return serve("index.html", request)

    @router.get("/page/{name}")
    def file(name: str, request: Request) -> Response:
        return serve(name, request)

    def serve(name: str, request: Request) -> Response:
        if name not in files:
            return Response("no such file", status_code=404, media_type="text/plain")
        headers = {"ETag": tags[name], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=_TYPES[Path(name).suffix])

    return router
