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
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import warmup
from .aoti import varying
from .artefacts import MISSING, Cache, RegionArtefacts
from .guards import without_bookkeeping
from .interrupt import interruptible
from .optional import OPTIONAL_BACKENDS, compile_optional
from .options import CompileOptions
from .regions import Region, find_regions
from .report import NOT_KEPT, CompileReport, Counters, first_lines, on_compile, remedy
from .settings import compile_settings, recompile_limit

logger = logging.getLogger(__name__)

Tell = Callable[[CompileReport, str, tuple[int, int] | None], None]

_VARYING = {dims: set(varying(dims)) for dims in range(16)}


def _entry(name: str) -> types.FunctionType:
    """A function with a code object of its own. Dynamo keeps what it compiled on the code object: so one region never uses up
    the recompile limit of another, and all of it is freed with the region."""
    def call(module, *args, **kwargs):
        return module._call_impl(*args, **kwargs)
    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)


def _strided(value: Tensor) -> bool:
    """Whether value, which is not contiguous, has a layout that only some of the blocks get: not one of the formats that a model
    keeps on purpose. An expanded tensor stays: to write it out would cost its memory."""
    return (0 not in value.stride()
            and not (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
            and not (value.dim() == 5 and value.is_contiguous(memory_format=torch.channels_last_3d)))


def _mark(value):
    """What torch._dynamo.maybe_mark_dynamic sets, at a tenth of its cost."""
    if isinstance(value, Tensor):
        value._dynamo_weak_dynamic_indices = _VARYING[value.dim()]
    elif isinstance(value, (tuple, list)):
        for item in value:
            _mark(item)


class _Block:
    """The call of one block, in its ``_compiled_call_impl``."""

    __slots__ = ("artefacts", "compiled", "first", "mark", "module")

    def __init__(self, module: torch.nn.Module, compiled: Callable[[], Callable], artefacts: RegionArtefacts | None, mark: bool,
                 first: bool):
        self.module = module
        self.compiled = compiled  # gives the compiled function: nothing of the compiler is needed where an artefact fits
        self.artefacts = artefacts
        self.mark = mark
        self.first = first  # of its class

    def __call__(self, *args, **kwargs):
        if self.artefacts is not None:
            result = self.artefacts.run(self.module, args, kwargs)
            if result is not MISSING:
                return result
            if self.artefacts.instead:
                return self.module._call_impl(*args, **kwargs)
        compiled = self.compiled()
        copies = {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not value.is_contiguous() and _strided(value):
                copies[id(value)] = value, value.contiguous()
        if self.mark:
            _mark((*args, *kwargs.values(), *copies.values()))
        if not copies:
            return compiled(self.module, *args, **kwargs)
        # The first block often gets a transposed tensor, the others dense ones: that would be a graph more.
        args = [copies[id(v)][1] if id(v) in copies else v for v in args]
        kwargs = {k: copies[id(v)][1] if id(v) in copies else v for k, v in kwargs.items()}
        result = compiled(self.module, *args, **kwargs)
        originals = {}
        for value, copy in copies.values():
            value.copy_(copy)  # a block may have written into its input, or return it
            originals[id(copy)] = value
        return tree_map_only(Tensor, lambda t: originals.get(id(t), t), result)


class CompiledModule:
    """The compiled regions of one module on one device. Thread-safe; built at the first call.

    While ``run`` is under way the blocks' ``_compiled_call_impl`` (the slot of nn.Module.compile) is set; names, parameters and
    the modules themselves stay as they are, and everything is put back afterwards.
    """

    def __init__(self, options: CompileOptions, device: torch.device | None = None, cache: Cache | None = None):
        self.report = CompileReport(title=options.title)
        self._device = device or torch.device("cpu")
        self.options, refusal = options.on_device(self._device)
        if refusal:
            self._fall_back(refusal)
        self._cuda_graphs = self.options.cuda_graphs
        self._cache = cache
        if self.options.artefact_refusal:
            self._cache = None
            if options.background:
                self._fall_back(f"{self.options.artefact_refusal}: compiling when it first samples, not in the background.")
        self._root: weakref.ref | None = None
        self._regions: list[Region] = []
        # (class, region's index, guards filtered) -> the entry function and the compiled one. Kept when an object patch changes the
        # blocks: the same branch may be back at the next prompt.
        self._compiled: dict[tuple[str, int, bool], tuple[types.FunctionType, Callable]] = {}
        self._artefacts: dict[int, RegionArtefacts] = {}
        self._blocks: dict[tuple[bool, bool], list[_Block]] = {}
        self._settled = False  # nothing was compiled in the last call: a new size or batch is met by the first block of a class
        self._lock = threading.RLock()
        # Of the call under way: torch's compiler is set up once a block needs it.
        self._scope = contextlib.ExitStack()
        self._counters: Counters | None = None
        self._compiling: tuple[str, int, bool] = "", 0, False  # the key in _compiled of the block that is called
        self._tell: Tell | None = None  # of the last call
        self._told = False  # nothing has happened that it does not know of
        self._interrupted: Callable[[], bool] = bool  # of the call under way
        self._running = False

    def run(self, root: torch.nn.Module, call: Callable, *, filter_guards: bool, passthrough: Callable[[Exception], bool],
            around_block: Callable | None = None, tell: Tell | None = None,
            interrupted: Callable[[], bool] = bool):
        """call() with root's regions compiled.

        filter_guards: no patch is active that may read the bookkeeping in transformer_options (see guards.py). passthrough: whether an
        exception is never a failure of compile (out of memory, interrupt). On any other exception of a compiled call the same call is
        made once more eager: if that fails too, its error is the model's own; if not, compile is off from then on. around_block: wraps
        the call of each block, as around_block(call) -> call. tell: called with the report when something has happened, what is under
        way ("" at its end) and how much of it is done (None: nobody knows); from the builder's thread too. May raise only what
        passthrough passes on. interrupted: asked while something is compiled, from another
        thread; once it is true the compile ends with Interrupted, and what is called next compiles again.
        """
        with self._lock:
            if tell is not self._tell:
                self._tell, self._told = tell, False
            self._interrupted = interrupted
            if self.report.failure:
                self._say()
                return call()
            try:
                result = self._run_compiled(root, call, filter_guards, around_block)
                self._say()
                # The memory of a CUDA graph's outputs is written again at the next step.
                return tree_map_only(Tensor, torch.clone, result) if self._cuda_graphs else result
            except Exception as error:
                if passthrough(error):
                    self._say()
                    raise
                cause = f"{type(error).__name__}: {error}"
            # Out of the except block: its traceback would keep the failed call's tensors alive.
            result = call()
            self.report.failure = cause
            self._told = False
            self._say()
            logger.warning("%s: compile failed; running uncompiled. %s%s", self.options.title, remedy(cause), first_lines(cause))
            return result

    def _run_compiled(self, root, call, filter_guards, around_block):
        if self._root is None or self._root() is not root or not all(region.is_current() for region in self._regions):
            self._root = weakref.ref(root)
            self._regions = find_regions(root, self.options.blocks_only)
            self._blocks.clear()
            self._artefacts.clear()
            self.report.regions = [(region.name, len(region.modules)) for region in self._regions]
        artefacts = filter_guards and self._artefacts_allowed()
        if self._cache and self.options.background and not artefacts:
            self.report.steps += 1
            return call()  # a compile in this process is what was not asked for
        blocks = self._attachable(filter_guards and self.options.guard_filter, artefacts)
        self.report.steps += 1
        before = [block.module.__dict__.get("_compiled_call_impl") for block in blocks]
        start = time.perf_counter()
        self._running = True
        try:
            for artefacts in self._artefacts.values():
                artefacts.begin()
            for block in blocks:
                block.module.__dict__["_compiled_call_impl"] = around_block(block) if around_block else block
            with self._cache.builder.sampling() if self._cache else contextlib.nullcontext():
                result = call()
        finally:
            for block, previous in zip(blocks, before):
                if previous is None:
                    block.module.__dict__.pop("_compiled_call_impl", None)
                else:
                    block.module.__dict__["_compiled_call_impl"] = previous
            counters, self._counters = self._counters, None
            self._scope.close()
            settled = counters is None or not counters.new_frames()
            if settled != self._settled:
                self._settled = settled
                for block in blocks:
                    block.mark = self.options.mark_sizes and (block.first or not settled)
            if not settled:
                self._record(counters, time.perf_counter() - start)
            self._running = False
        if self.report.seconds:  # not after an interrupt, which leaves some of it uncompiled
            self.report.compiled_from_step = self.report.compiled_from_step or self.report.steps
        return result

    def _say(self, doing: str = "", progress: tuple[int, int] | None = None):
        if self._tell is not None and (doing or not self._told):
            self._told = not doing
            self._tell(self.report, doing, progress)

    def _begins_compile(self, *_):
        name, index, _ = self._compiling
        self._say(f"compiling {name} {index + 1}/{len(self._regions)}", (index, len(self._regions)))

    def _artefacts_allowed(self) -> bool:
        """An artefact was made for inference, as it is without autocast."""
        return self._cache is not None and not torch.is_grad_enabled() and not torch.is_autocast_enabled(self._device.type)

    def _attachable(self, filter_guards: bool, artefacts: bool) -> list[_Block]:
        if (filter_guards, artefacts) not in self._blocks:
            blocks = self._blocks[filter_guards, artefacts] = []
            for index, region in enumerate(self._regions):
                compiled = functools.partial(self._compile, (region.name, index, filter_guards))
                blocks += [_Block(module, compiled, self._region_artefacts(index) if artefacts else None, self.options.mark_sizes,
                                  module is region.modules[0]) for module in region.modules]
        return self._blocks[filter_guards, artefacts]

    def _region_artefacts(self, index: int) -> RegionArtefacts:
        if index not in self._artefacts:
            options = self.options
            self._artefacts[index] = RegionArtefacts(
                self._cache, self._regions[index].name, self._device, options.mark_sizes or options.dynamic is not False,
                options.torch_options(), options.background, self._note)
        return self._artefacts[index]

    def _compile(self, key: tuple[str, int, bool]) -> Callable:
        self._compiling = key
        if self._counters is None:
            if not self._compiled:
                self._say("loading the compiler")
            warmup.start(self._device.type)
            warmup.wait(self._interrupted)
            if self._cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            self._counters = Counters()
            self._scope.enter_context(on_compile(self._begins_compile))
            self._scope.enter_context(interruptible(self._interrupted))
            self._scope.enter_context(compile_settings(self.options.cache_size_limit))
        if key not in self._compiled:
            entry = _entry(f"{key[0]}_{key[1]}")
            self._compiled[key] = entry, _torch_compile(entry, self.options, key[2])
        return self._compiled[key][1]

    def _note(self, event: str, name: str, detail: str):
        """Of a region's artefacts; from the builder's thread too. name: the region's."""
        report = self.report
        text = f"{name} {detail}" if event in ("loaded", "building", "built") else f"{name}: {detail}"
        if event in ("built", "refused"):
            report.building = [building for building in report.building if building.partition(" ")[0] != name]
        if event == "loaded":
            report.artefacts.append(text)
            report.compiled_from_step = report.compiled_from_step or report.steps
            logger.info("%s: step %d on runs %s from the compile cache", self.options.title, report.steps, text)
        elif event == "refused" and self.options.background:
            self._fall_back(f"{text}: running uncompiled. Set background to false to compile it in this process.")
        elif event == "refused":
            report.fallbacks.append(f"{NOT_KEPT}: {text}")
            logger.info("%s: not kept in the compile cache: %s", self.options.title, text)
        else:
            if event == "building":
                report.building.append(text)
            logger.info("%s: %s: %s", self.options.title, event, text)
        self._told = False
        if not self._running:
            self._say()

    def _record(self, counters: Counters, seconds: float):
        first = not self.report.graphs
        counters.add_to(self.report)
        self.report.seconds += seconds
        if first or self.options.log:
            logger.info("%s: %s", self.options.title, self.report.summary())
        with compile_settings(self.options.cache_size_limit):
            limit = recompile_limit()
        for (name, _, _), (entry, _) in self._compiled.items():
            if len(torch._dynamo.eval_frame._debug_get_cache_entry_list(entry.__code__)) >= limit:
                self._fall_back(f"{name} was compiled {limit} times, which is the limit (dynamo_cache_size_limit): "
                                "it runs uncompiled wherever it would need another compile.")

    def _fall_back(self, message: str):
        if message not in self.report.fallbacks:
            self.report.fallbacks.append(message)
            self._told = False
            logger.warning("%s: %s", self.options.title, message)


def _torch_compile(fn: Callable, options: CompileOptions, filter_guards: bool) -> Callable:
    torch_options = options.torch_options()
    # With its sizes marked, what else varies is torch's to find out.
    arguments = dict(backend=options.backend, fullgraph=options.fullgraph, dynamic=None if options.mark_sizes else options.dynamic)
    if options.backend in OPTIONAL_BACKENDS:
        return compile_optional(fn, mode=options.mode, options=torch_options, **arguments)
    if options.backend == "inductor":
        from ..int8.graph_pass import MergeQuantizations  # inductor: at the first compile, not at import
        torch_options.setdefault("post_grad_custom_pre_pass", MergeQuantizations())
    if filter_guards:
        torch_options["guard_filter_fn"] = without_bookkeeping
    return torch.compile(fn, **arguments, options=torch_options or None)
