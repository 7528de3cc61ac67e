"""Runs a call with its regions compiled. Plain torch: works on any nn.Module."""
from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import types
import weakref
from collections.abc import Callable

import torch

from .guards import without_bookkeeping
from .optional import OPTIONAL_BACKENDS, compile_optional
from .options import CompileOptions
from .regions import Region, find_regions
from .report import CompileReport, remedy

logger = logging.getLogger(__name__)


def _entry(name: str) -> Callable:
    """A function with a code object of its own. Dynamo keeps what it compiled on the code object: so one region never uses up
    the recompile limit of another, and all of it is freed with the region."""
    def call(module, *args, **kwargs):
        return module._call_impl(*args, **kwargs)
    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)


@contextlib.contextmanager
def _compile_settings(limit: int):
    """torch's settings for one call, put back afterwards: limit recompiles of a block class (0: torch's own limit), and sizes that
    happen to be equal (256 tokens, hidden size 256) are not taken for the same size, which would compile again at the next one."""
    import torch._dynamo  # compile machinery: at the first compile, not at import
    import torch.fx.experimental._config as shape_config

    config = torch._dynamo.config
    # torch before 2.6 calls them cache_size_limit.
    name, total = (n if hasattr(config, n) else n.replace("recompile", "cache_size")
                   for n in ("recompile_limit", "accumulated_recompile_limit"))
    values = {name: limit, total: max(limit, getattr(config, total))} if limit else {}
    with config.patch(**values), shape_config.patch(use_duck_shape=False):
        yield


def _graphs() -> int:
    from torch._dynamo.utils import counters
    return counters["stats"]["unique_graphs"]


class CompiledModule:
    """The compiled regions of one module on one device. Thread-safe; built at the first call.

    While ``run`` is under way the blocks' ``_compiled_call_impl`` (the slot of nn.Module.compile) is set; names, parameters and
    the modules themselves stay as they are, and everything is put back afterwards.
    """

    def __init__(self, options: CompileOptions):
        self.options = options
        self.report = CompileReport(title=options.title)
        self._root: weakref.ref | None = None
        self._regions: list[Region] = []
        self._compiled: dict[tuple[str, int, bool], Callable] = {}
        self._lock = threading.RLock()

    def run(self, root: torch.nn.Module, call: Callable, *, filter_guards: bool, passthrough: Callable[[Exception], bool]):
        """call() with root's regions compiled.

        filter_guards: no patch is active that may read the bookkeeping in transformer_options (see guards.py). passthrough: whether an
        exception is never a failure of compile (out of memory, interrupt). On any other exception of a compiled call the same call is
        made once more eager: if that fails too, its error is the model's own; if not, compile is off from then on.
        """
        with self._lock:
            if self.report.failure:
                return call()
            try:
                return self._run_compiled(root, call, filter_guards)
            except Exception as error:
                if passthrough(error):
                    raise
                cause = f"{type(error).__name__}: {error}"
            # Out of the except block: its traceback would keep the failed call's tensors alive.
            result = call()
            self.report.failure = cause
            logger.warning("%s: compile failed; running uncompiled. %s%s", self.options.title, remedy(cause), _first_lines(cause))
            return result

    def _run_compiled(self, root, call, filter_guards):
        if self._root is None or self._root() is not root or not all(region.is_current() for region in self._regions):
            self._root = weakref.ref(root)
            self._regions = find_regions(root, self.options.blocks_only)
            self.report.regions = [(region.name, len(region.modules)) for region in self._regions]
        graphs, start = _graphs(), time.perf_counter()
        attached = []
        try:
            for index, region in enumerate(self._regions):
                compiled = self._callable(region, index, filter_guards and self.options.guard_filter)
                for module in region.modules:
                    attached.append((module, module.__dict__.get("_compiled_call_impl")))
                    module.__dict__["_compiled_call_impl"] = functools.partial(compiled, module)
            with _compile_settings(self.options.cache_size_limit):
                return call()
        finally:
            for module, previous in attached:
                if previous is None:
                    del module.__dict__["_compiled_call_impl"]
                else:
                    module.__dict__["_compiled_call_impl"] = previous
            self._record(_graphs() - graphs, time.perf_counter() - start)

    def _callable(self, region: Region, index: int, filter_guards: bool) -> Callable:
        key = (region.name, index, filter_guards)
        if key not in self._compiled:
            self._compiled[key] = _torch_compile(_entry(f"{region.name}_{index}"), self.options, filter_guards)
        return self._compiled[key]

    def _record(self, graphs: int, seconds: float):
        if not graphs:
            return
        first = not self.report.graphs
        self.report.graphs += graphs
        self.report.seconds += seconds
        if first or self.options.log:
            logger.info("%s: %s", self.options.title, self.report.summary())


def _torch_compile(fn: Callable, options: CompileOptions, filter_guards: bool) -> Callable:
    torch_options = options.torch_options()
    arguments = dict(backend=options.backend, fullgraph=options.fullgraph, dynamic=options.dynamic)
    if options.backend in OPTIONAL_BACKENDS:
        return compile_optional(fn, mode=options.mode, options=torch_options, **arguments)
    if filter_guards:
        torch_options["guard_filter_fn"] = without_bookkeeping
    return torch.compile(fn, **arguments, options=torch_options or None)


def _first_lines(text: str, lines: int = 4) -> str:
    return " | ".join(line.strip() for line in text.splitlines() if line.strip()).strip()[:200 * lines]
