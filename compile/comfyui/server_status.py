"""What the pack is doing on this server, for whoever looks after many: GET /int8_compile/status. No prompt and no path is in it."""
from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any

import comfy.model_management
from aiohttp import web

from ...int8.echo import OF_A_PROMPT
from ...int8.kernels import seen_right
from ...pack import PACKAGE, version
from ..artifacts import key as cache_key
from ..artifacts.store import CacheError
from ..report import CompileReport
from . import artifact_cache
from .compile_model import all_reports
from .node_status import for_client

ROUTE = "/int8_compile/status"
MOST_WARNINGS = 20
CACHE_SECONDS = 10.0  # that the cache's size is not looked up again: it walks through a folder


class _LastWarnings(logging.Handler):
    """The pack's last warnings and errors, with their times, without those that say what stands in a prompt."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.kept: deque[dict] = deque(maxlen=MOST_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, OF_A_PROMPT, False):
            return
        try:
            self.kept.append({"time": int(record.created), "level": record.levelname.lower(), "text": record.getMessage()})
        except Exception:  # as every handler: a message that cannot be put together stops nobody
            self.handleError(record)


_warnings = _LastWarnings()
_cache: tuple[float, dict] = -CACHE_SECONDS, {}


def add_route(server) -> None:
    """server: ComfyUI's PromptServer. Warnings are kept from now on."""
    logger = logging.getLogger(PACKAGE)
    if _warnings not in logger.handlers:
        logger.addHandler(_warnings)
    if any(getattr(route, "path", "") == ROUTE for route in server.routes):
        return  # a sibling copy of the pack has it: aiohttp takes no second one

    @server.routes.get(ROUTE)
    async def get_status(request):
        return web.json_response(await asyncio.to_thread(status))


def status() -> dict[str, Any]:
    device = comfy.model_management.get_torch_device()
    checks, wrong = seen_right.looked_at()
    return for_client({
        "version": version(), "machine": cache_key.machine_without_paths(device), "models": [_model(*found) for found in all_reports()],
        "kernels": {"checked": checks, "wrong": wrong}, "cache": _cache_facts(), "warnings": list(_warnings.kept)})


def _model(kind: str, report: CompileReport) -> dict:
    return {"model": kind, "node": report.title, "state": report.status(), "steps": report.steps,
            "compiled_from_step": report.compiled_from_step, "graphs": report.graphs, "compile_seconds": round(report.seconds, 1),
            "from_cache": len(report.artifacts), "building": len(report.building), "checks": report.checks,
            "gain": report.gain and report.gain.to_dict(), "warnings": report.warnings()}


def _cache_facts() -> dict:
    """bytes and limit: of all that is compiled and all bundles."""
    global _cache
    now = time.monotonic()
    if now - _cache[0] >= CACHE_SECONDS:
        _cache = now, _look_at_cache()
    return _cache[1]


def _look_at_cache() -> dict:
    cache = artifact_cache.get_cache()
    if cache is None:
        return {"enabled": False}
    try:
        return {"enabled": True, "entries": len(cache.store.all()), "limit": artifact_cache.size_limit(),
                "bytes": cache.store.size() + sum(artifact_cache.bundle_sizes().values())}
    except (CacheError, OSError) as error:
        return {"enabled": True, "error": str(error)}
