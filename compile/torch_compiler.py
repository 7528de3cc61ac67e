"""torch.compile for the regions of one model: a compiled function for each, set up once a block needs it."""
from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .any_batch import NotRun
from .artifacts import current_block, linear
from .artifacts.attention import traced_as_operation
from .artifacts.block_guards import ClassGuards, classes_of, module_classes
from .artifacts.describe import Names
from .artifacts.origins import is_pristine_package
from .artifacts.source_guards import CodeFingerprint, sources_of
from .artifacts.traced_calls import Recording
from .backend import _Backend
from .options import CompileOptions
from .report import CompileReport, Counters, on_compile
from .third_party_backends import OPTIONAL_BACKENDS, compile_optional
from .torch_internals import warmup
from .torch_internals.guard_filter import GuardFilter
from .torch_internals.interrupt import interruptible
from .torch_internals.settings import compile_settings, recompile_limit

# States of the code and values that a region is compiled for. A pack that patches anew each time would compile each time.
MAX_STATES = 8
# Torch remembers by a code's name and line which numbers have varied (torch._dynamo.pgo), and guards those where it would not otherwise: of
# another model (SD1.5's block numbers), they cost a graph for each block.
_NUMBERS = itertools.count()
OwnMethods = tuple[tuple[str, Callable], ...]


def _entry(name: str) -> types.FunctionType:
    """A function with a code object and globals of its own. Dynamo keeps what it compiled on the code object, and puts it into the globals:
    so one region never uses up the recompile limit of another, and all of it is freed with the region."""
    def call(module, *args, **kwargs):
        list(kwargs.keys())  # dynamo then guards their order, which it loses on the way through nn.Module (2.14: not for a tuple)
        return module._call_impl(*args, **kwargs)
    own = {key: call.__globals__[key] for key in ("__builtins__", "__name__", "__file__")}
    return types.FunctionType(call.__code__.replace(co_name=name), own, name)


def _forget(code: types.CodeType, backend: _Backend | None) -> None:
    """What was compiled of code goes with its model: the code holds it, and is held by it where the garbage collector does not see it.
    Torch keeps every backend that was ever used, the guards on every class and the last sizes that were reasoned about."""
    from torch._dynamo import eval_frame
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    guards = [getattr(entry, "guard_manager", None) for entry in eval_frame._debug_get_cache_entry_list(code)]
    eval_frame.reset_code(code)
    for finalizer, info in getattr(weakref.finalize, "_registry", {}).copy().items():
        manager = getattr(getattr(info.func, "func", None), "__self__", None)  # calls its invalidate() when a class is freed
        if any(guard is not None and getattr(manager, "guard_manager", None) is guard for guard in guards):
            finalizer.detach()
    for cache in vars(ShapeEnv).values():
        getattr(cache, "cache_clear", bool)()
    if backend is None:
        return
    backend.traced.clear()
    for environment in backend.sizes:
        environment.tracked_fakes = None  # their sizes hold it, in C++
    backend.sizes.clear()
    known = eval_frame.cached_backends if hasattr(eval_frame, "cached_backends") else {}
    for key, value in known.copy().items():
        if getattr(value, "compiler_fn", value) is backend:
            known.pop(key, None)


def own_methods(block: torch.nn.Module) -> OwnMethods:
    """(name, function) of the bound methods that were put on the block itself, block.forward = types.MethodType(function, block); the
    method where it is bound to another object. Torch 2.11 guards neither which they are nor that there are none."""
    values = vars(block)
    if types.MethodType not in map(type, values.values()):
        return ()
    return tuple((name, value.__func__ if value.__self__ is block else value) for name, value in values.items()
                 if type(value) is types.MethodType)


@dataclass
class Compiled:
    """call: what torch compiled of entry. guards, code, classes: what it depends on that dynamo does not look at; known from the first
    compile on."""

    entry: types.FunctionType
    call: Callable
    backend: _Backend | None
    guards: GuardFilter
    described: tuple[int, int] = (0, 0)  # how many functions and classes, when code and classes were
    code: CodeFingerprint | None = None
    classes: ClassGuards | None = None
    names: Names | None = None  # of attributes that it can read
    own_methods: OwnMethods = ()  # of the blocks that it is for
    stand_ins: dict[frozenset, bool] = field(default_factory=dict)  # whether they may, see StandIns.known
    is_comfyuis: bool = True  # all that was traced, installed libraries aside
    failed: set = field(default_factory=set)  # kinds of calls that could not be compiled, see kind_of_call
    seen_right: set = field(default_factory=set)  # see Verification

    def still_fits(self) -> bool:
        """fits(), which was true before, asked before each block: only values may have changed since."""
        return ((self.guards.environment is None and (self.code is None or self.code.values_unchanged())
                 and (self.classes is None or self.classes.values_unchanged())) or self.fits())

    def fits(self) -> bool:
        """Whether it is right for the code and values of now."""
        if self.backend is not None and self.backend.refused is not None:
            return self.backend.refused.holds()
        return (self.guards.environment in (None, os.environ) and (self.code is None or not self.code.mismatch())
                and (self.classes is None or not self.classes.difference()))

    def may_have_run(self, error: Exception) -> bool:
        """Whether a call that ended in error may have computed something: it was not ended by the compiler, or that had a graph before."""
        from torch._dynamo.exc import TorchDynamoException

        return self.backend is None or self.backend.may_have_run or not isinstance(error, TorchDynamoException)

    @property
    def one_apart(self) -> bool:
        """Whether a size that is 1 is compiled for by itself, as with another package's backend, whose graphs nobody sees."""
        return self.backend is None or self.backend.one_apart

    @property
    def can_compile_for_more(self) -> bool:
        """Whether torch can, and would trace: what it leaves alone (under a mode of another's) would run."""
        return (_breaks_as_errors() is not None and not torch._C._len_torch_dispatch_stack()
                and not getattr(torch._dynamo.config, "disable", False))

    def compile_for_more(self, shared: set[int], *args, **kwargs) -> None:
        """Compiles for a call with these, without running anything of the model; nothing where that would take more than one graph or
        the graph would not do for a batch of 1, too. shared: ids of tensors among them that stand for some that share memory."""
        from torch._dynamo.exc import TorchDynamoException

        if not self.can_compile_for_more or (whole := _breaks_as_errors()) is None:
            return
        self.backend.compiles_for_more, self.backend.shared, drawn = True, shared, random.getstate()
        try:
            with whole(True), linear.kept_whole():
                self.call(*args, **kwargs)
        except (NotRun, TorchDynamoException):
            if self.backend.refused is not None or self.backend.one_apart:
                raise
        finally:
            self.backend.compiles_for_more, self.backend.shared = False, set()
            random.setstate(drawn)  # what torch compiled draws before it is run

    @property
    def takes_copies(self) -> bool:
        """Whether dense copies of its inputs do."""
        return self.backend is None or not self.backend.by_layout

    @contextlib.contextmanager
    def given_copies(self):
        if self.backend is not None:
            self.backend.gets_copies = True
        try:
            yield
        finally:
            if self.backend is not None:
                self.backend.gets_copies = False

    def look(self, block: torch.nn.Module) -> None:
        """After a call: describes what was traced in it, as it is now."""
        if self.backend is not None and self.backend.traced and self.described != (
                counts := (len(self.backend.traced), len(self.guards.classes))):
            self.described = counts
            self.seen_right.clear()  # there is another graph
            found = Recording.of(self.backend.traced)
            self.is_comfyuis = found.is_comfyuis()
            self.names = names = found.names()
            self.code = CodeFingerprint(sources_of(found, names, lenient=True), names, lenient=True)
            kinds = module_classes(block)
            kinds += [kind for kind in self.guards.classes.difference(kinds) if not is_pristine_package(kind.__module__)]
            self.classes = ClassGuards(kinds, classes_of(kinds, names, lenient=True), names, lenient=True)
            self.fits()  # looks


def _breaks_as_errors() -> Callable | None:
    """torch's context in which a graph break is an error, from torch 2.9 on."""
    return getattr(torch._dynamo, "error_on_graph_break", None)


class RegionCode:
    """The compiled functions of a region: for each state of what dynamo does not guard, one. name: the region's, with a number.
    whole_model: see GuardFilter."""

    def __init__(self, name: str, options: CompileOptions, whole_model: bool = False):
        self.name = f"{name}_{next(_NUMBERS)}"
        self.options = options
        self.whole_model = whole_model
        self._compiled: dict[bool, list[Compiled]] = {False: [], True: []}  # by whether guards on bookkeeping are left out

    def option_keys(self, filter_guards: bool, options: dict) -> frozenset | None:
        """What of the keys of options is to be told to find."""
        guards = next((compiled.guards for compiled in self._compiled[filter_guards] if compiled.guards.option_keys is not None), None)
        return None if guards is None else guards.keys(options)

    def find(self, filter_guards: bool, methods: OwnMethods = (), keys: frozenset | None = None) -> Compiled | None:
        """What was, or will be, compiled for the code and values of now. Asked once a step. methods: own_methods of the block. keys:
        option_keys of its call. None where it must not be compiled."""
        known = self._compiled[filter_guards]
        # One that has failed may know nothing of its state: last.
        found = next((compiled for compiled in sorted(known, key=lambda compiled: bool(compiled.failed)) if compiled.own_methods == methods
                      and compiled.guards.option_keys in (None, keys) and compiled.fits()), None)
        if found is not None:
            known.sort(key=lambda compiled: compiled is not found)  # first
        else:
            known[:] = [compiled for compiled in known if compiled.guards.environment in (None, os.environ)]
            if len(known) >= MAX_STATES and known[-1].guards.option_keys is not None:
                known.pop()  # for keys that were there once: of a node that is gone
            if len(known) >= MAX_STATES:
                return None
            entry = _entry(self.name)
            guards = GuardFilter(filter_guards, self.whole_model, entry.__code__)
            guards.option_keys = keys  # before its first compile another block's call may come
            found = Compiled(entry, *_torch_compile(entry, self.options, guards), guards, own_methods=methods)
            guards.traced = found.backend.traced if found.backend is not None else ()
            weakref.finalize(entry, _forget, entry.__code__, found.backend).atexit = False
            known.insert(0, found)
        return found if found.backend is None or found.backend.refused is None else None

    def refusal(self) -> str:
        """Why it is not compiled for the code and values of now, empty where it is."""
        for compiled in (*self._compiled[False], *self._compiled[True]):
            if compiled.backend is not None and compiled.backend.refused is not None and compiled.fits():
                return str(compiled.backend.refused)
        return ""

    def is_at_limit(self, limit: int) -> bool:
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
        return any(len(entries(compiled.entry.__code__)) >= limit for compiled in (*self._compiled[False], *self._compiled[True]))


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
        """Raises Interrupted; CacheError where others can write what torch would load."""
        warmup.start(self._device_type)
        warmup.wait(self._interrupted)
        warmup.require_own_cache()
        if self._options.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self._counters = Counters()
        self._stack.enter_context(on_compile(lambda *_: self._on_start()))
        self._stack.enter_context(interruptible(self._interrupted))
        self._stack.enter_context(compile_settings(self._options.cache_size_limit))
        current_block.prepare()
        self._stack.enter_context(traced_as_operation())

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


def _torch_compile(fn: Callable, options: CompileOptions, guards: GuardFilter) -> tuple[Callable, _Backend | None]:
    torch_options = options.torch_options()
    # With its sizes marked, what else varies is torch's to find out.
    arguments = dict(fullgraph=options.fullgraph, dynamic=None if options.mark_sizes else options.dynamic)
    if options.backend in OPTIONAL_BACKENDS:
        return compile_optional(fn, backend=options.backend, mode=options.mode, options=torch_options, **arguments), None
    if options.backend == "inductor":
        from ..int8.graph_pass import Int8GraphPass  # inductor: at the first compile, not at import
        torch_options.setdefault("post_grad_custom_pre_pass", Int8GraphPass())
        torch_options.setdefault("fallback_random", True)  # inductor's own generator draws other numbers than eager's
        # What torch.compile makes of the name.
        inner = torch._TorchCompileInductorWrapper(None, torch_options, arguments["dynamic"])
    else:
        inner = torch._dynamo.lookup_backend(options.backend)
        if torch_options:
            inner = functools.partial(inner, options=torch_options)
    backend = _Backend(inner, options.backend if isinstance(options.backend, str) else getattr(options.backend, "__name__", "backend"))
    return torch.compile(fn, backend=backend, options={"guard_filter_fn": guards}, **arguments), backend
