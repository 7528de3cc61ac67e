"""torch.compile for the regions of one model: a compiled function for each, set up once a block needs it."""
from __future__ import annotations

import contextlib
import functools
import os
import time
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import warmup
from .guards import GuardFilter
from .interrupt import interruptible
from .optional import OPTIONAL_BACKENDS, compile_optional
from .options import CompileOptions
from .report import CompileReport, Counters, on_compile
from .settings import compile_settings, recompile_limit

# States of their classes' methods that a region is compiled for. A pack that patches a class anew each time would compile each time.
MAX_METHOD_STATES = 8


def _entry(name: str) -> types.FunctionType:
    """A function with a code object of its own. Dynamo keeps what it compiled on the code object: so one region never uses up
    the recompile limit of another, and all of it is freed with the region."""
    def call(module, *args, **kwargs):
        return module._call_impl(*args, **kwargs)
    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)


@dataclass
class _Compiled:
    """environment: of the process when it was compiled, where it depends on that."""

    entry: types.FunctionType
    call: Callable
    guards: GuardFilter
    environment: dict | None = None


class RegionCode:
    """The compiled functions of a region: for each state of what dynamo does not guard, one. name: the region's."""

    def __init__(self, name: str, options: CompileOptions):
        self.name = name
        self._options = options
        self._compiled: dict[tuple, _Compiled] = {}

    def find(self, filter_guards: bool, methods: tuple) -> _Compiled | None:
        """methods: what the classes of the blocks answer with. None: there have been too many states."""
        key = filter_guards, methods
        found = self._compiled.get(key)
        if found is not None and found.environment is not None and found.environment != dict(os.environ):
            found = None
        if found is None:
            if key not in self._compiled and len(self._compiled) >= 2 * MAX_METHOD_STATES:
                return None
            entry, guards = _entry(self.name), GuardFilter(filter_guards)
            found = self._compiled[key] = _Compiled(entry, _torch_compile(entry, self._options, guards), guards)
        return found

    def after_compile(self) -> None:
        for compiled in self._compiled.values():
            if compiled.guards.reads_environment and compiled.environment is None:
                compiled.environment = dict(os.environ)

    def is_at_limit(self, limit: int) -> bool:
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
        return any(len(entries(compiled.entry.__code__)) >= limit for compiled in self._compiled.values())


class CompileScope:
    """torch's compiler during one call of a model: set up by the first block that needs it, put back by close()."""

    def __init__(self, options: CompileOptions, device_type: str, interrupted: Callable[[], bool], on_start: Callable[[], None]):
        self._options = options
        self._device_type = device_type
        self._interrupted = interrupted
        self._on_start = on_start
        self._stack = contextlib.ExitStack()
        self._counters: Counters | None = None
        self._start = time.perf_counter()

    @property
    def is_open(self) -> bool:
        return self._counters is not None

    def open(self) -> None:
        """Raises Interrupted."""
        warmup.start(self._device_type)
        warmup.wait(self._interrupted)
        if self._options.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self._counters = Counters()
        self._stack.enter_context(on_compile(lambda *_: self._on_start()))
        self._stack.enter_context(interruptible(self._interrupted))
        self._stack.enter_context(compile_settings(self._options.cache_size_limit))

    def close(self) -> bool:
        """Whether anything was compiled."""
        self._stack.close()
        return self._counters is not None and self._counters.new_frames()

    def record(self, report: CompileReport) -> None:
        """What was compiled, after close()."""
        self._counters.add_to(report)
        report.seconds += time.perf_counter() - self._start

    def limit(self) -> int:
        """Of compiles of a block class."""
        with compile_settings(self._options.cache_size_limit):
            return recompile_limit()


def _torch_compile(fn: Callable, options: CompileOptions, guards: GuardFilter) -> Callable:
    torch_options = options.torch_options()
    # With its sizes marked, what else varies is torch's to find out.
    arguments = dict(backend=options.backend, fullgraph=options.fullgraph, dynamic=None if options.mark_sizes else options.dynamic)
    if options.backend in OPTIONAL_BACKENDS:
        return compile_optional(fn, mode=options.mode, options=torch_options, **arguments)
    if options.backend == "inductor":
        from ..int8.graph_pass import MergeQuantizations  # inductor: at the first compile, not at import
        torch_options.setdefault("post_grad_custom_pre_pass", MergeQuantizations())
    else:
        # Unequal backends: dynamo shares frames that it compiled for equal ones (below a graph break), whatever was patched between.
        arguments["backend"] = functools.partial(torch._dynamo.lookup_backend(options.backend))
    torch_options["guard_filter_fn"] = guards
    return torch.compile(fn, **arguments, options=torch_options)
