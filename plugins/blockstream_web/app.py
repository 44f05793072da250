"""The routes of the page. No answer has a path of this machine; names are looked up, never joined."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from blockstream.errors import BlockstreamError, ConfigError
from blockstream.report.page import report_html
from blockstream.report.record import read_run
from blockstream.system import regular

from .body import received
from .hub import Hub
from .maker import Maker
from .outlook_words import public
from .presets import Preset
from .process import COMMAND, PATIENCE_S, ask
from .scrub import Scrub
from .shelf import SHOWN, Shelf

log = logging.getLogger(__name__)

#: The files of the page, by name.
PAGE = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "form.js": "text/javascript",
    "draw.js": "text/javascript",
}
#: Seconds that a plan and a comparison may take, and how many may wait for one to end.
PLAN_S, COMPARE_S, MOST_ASKING = 900.0, 1800.0, 4
#: A report brings its own policy, which lets its own script run and nothing else; this keeps out the rest.
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: 'self'; "
    "media-src data: 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Site:
    """The page of one folder of runs. `app` serves it; its queue works while the app's lifespan lasts."""

    def __init__(
        self,
        presets: Mapping[str, Preset],
        folder: Path,
        command: Sequence[str] = COMMAND,
        patience_s: Sequence[float] = PATIENCE_S,
    ) -> None:
        self.presets = presets
        self.shelf, self.hub, self.scrub = Shelf(folder), Hub(), Scrub(folder)
        self.maker = Maker(self.shelf, self.hub, self.scrub, command, patience_s)
        self._command = command
        self._one_at_a_time, self._asking = asyncio.Lock(), 0
        self.app = Starlette(
            routes=self._routes(), lifespan=self._working, exception_handlers=self._handlers()
        )

    def _routes(self) -> list[Route]:
        return [
            Route("/", self.index),
            Route("/page/{name}", self.page_file),
            Route("/api/presets", self.list_presets),
            Route("/api/events", self.events),
            Route("/api/plan", self.plan, methods=["POST"]),
            Route("/api/runs", self.add, methods=["POST"]),
            Route("/api/runs/{id}/stop", self.stop, methods=["POST"]),
            Route("/api/runs/{id}/resume", self.resume, methods=["POST"]),
            Route("/api/runs/{id}", self.remove, methods=["DELETE"]),
            Route("/runs/{id}/report.html", self.report),
            Route("/runs/{id}/{path:path}", self.result),
            Route("/compare/{a}/{b}", self.compare),
        ]

    @asynccontextmanager
    async def _working(self, app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self.maker.work())
        try:
            yield
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work

    # -- errors

    def _handlers(self) -> dict[Any, Any]:
        return {
            HTTPException: self._refused,
            BlockstreamError: self._impossible,
            Exception: self._failed,
        }

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    async def _impossible(self, request: Request, error: Exception) -> Response:
        return JSONResponse({"error": self.scrub.text(str(error))}, 422)

    async def _failed(self, request: Request, error: Exception) -> Response:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return JSONResponse({"error": "the server failed; its terminal says at what"}, 500)

    # -- the page

    async def index(self, request: Request) -> Response:
        """Return the page."""
        return HTMLResponse(_text("index.html"))

    async def page_file(self, request: Request) -> Response:
        """Return a file of the page."""
        name = request.path_params["name"]
        if name not in PAGE:
            raise HTTPException(404)
        return Response(_text(name), media_type=PAGE[name])

    async def list_presets(self, request: Request) -> Response:
        """Return the presets, in order."""
        return JSONResponse([preset.public() for preset in self.presets.values()])

    async def events(self, request: Request) -> Response:
        """Return the stream of what happens."""
        return StreamingResponse(self.hub.listen(self.maker.greeting), media_type="text/event-stream")

    # -- runs

    async def add(self, request: Request) -> Response:
        """Queue a run."""
        async with received(request, self.shelf.folder) as (asked, upload):
            record = self.maker.add(self._preset(asked), _kept(asked), upload)
        return JSONResponse({"id": record.id}, 201)

    async def stop(self, request: Request) -> Response:
        """Stop a run."""
        return JSONResponse({"state": self.maker.stop(self._named(request)).state})

    async def resume(self, request: Request) -> Response:
        """Let a run go on."""
        return JSONResponse({"state": self.maker.resume(self._named(request)).state})

    async def remove(self, request: Request) -> Response:
        """Remove a run."""
        self.maker.remove(self._named(request))
        return Response(status_code=204)

    async def result(self, request: Request) -> Response:
        """Return a video or picture of a run, or the part of it that is asked for."""
        name = self._named(request)
        found = self.shelf.result(name, request.path_params["path"])
        if found is None:
            raise HTTPException(404)
        return FileResponse(found, media_type=SHOWN[found.suffix])

    async def report(self, request: Request) -> Response:
        """Return the report of a run as far as it has come."""
        name = self._named(request)
        text = await asyncio.to_thread(self._report_of, name)
        return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY})

    def _report_of(self, name: str) -> str:
        record = read_run(self.shelf.run_folder(name))
        clean = self.scrub
        return report_html(
            replace(
                record,
                config=clean.text(record.config),
                report=clean.all(record.report),
                remarks=[clean.text(remark) for remark in record.remarks],
            )
        )

    # -- questions that a process of its own answers

    async def plan(self, request: Request) -> Response:
        """Return what a run would take."""
        with tempfile.TemporaryDirectory(prefix="blockstream-web-") as scratch:
            async with received(request, Path(scratch)) as (asked, upload):
                config = Path(scratch) / "config.yaml"
                config.write_text(self._preset(asked).config(_kept(asked), upload).dump(), encoding="utf-8")
                printed = await self._ask("plan", str(config), "--json", wait_s=PLAN_S)
        return JSONResponse(self.scrub.all(public(json.loads(printed))))

    async def compare(self, request: Request) -> Response:
        """Return a page that measures two runs and shows them side by side."""
        folders = [str(self.shelf.run_folder(self._named(request, key))) for key in "ab"]
        with tempfile.TemporaryDirectory(prefix="blockstream-web-") as scratch:
            page = Path(scratch) / "pairs.html"
            await self._ask("compare", *folders, "--out", str(page), "--json", wait_s=COMPARE_S)
            text = regular.read_text(page)
        return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY})

    async def _ask(self, *args: str, wait_s: float) -> str:
        """Return what a command prints; they are made one at a time. Raises ConfigError with what it says."""
        if self._asking >= MOST_ASKING:
            raise ConfigError("several plans and comparisons are being made; ask again in a moment")
        self._asking += 1
        try:
            async with self._one_at_a_time:
                code, printed, error = await ask(*args, command=self._command, wait_s=wait_s)
        finally:
            self._asking -= 1
        if code:
            raise ConfigError(error)
        return printed

    def _named(self, request: Request, key: str = "id") -> str:
        """Return the run that an address names. Raises HTTPException where there is none."""
        name: str = request.path_params[key]
        if name not in self.shelf.records:
            raise HTTPException(404)
        return name

    def _preset(self, asked: Mapping[str, Any]) -> Preset:
        name = asked.get("preset")
        if not isinstance(name, str) or name not in self.presets:
            raise ConfigError(f"no preset {name!r:.80} (presets: {', '.join(self.presets)})")
        return self.presets[name]


def _kept(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a request: what a page fills its form with again."""
    return {"settings": asked.get("settings", {}), "prompts": asked.get("prompts", [])}


def _text(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")
