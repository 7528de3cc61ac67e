"""Runs a call with its regions compiled: by an artefact of the compile cache where one fits, else by torch.compile in this process. Plain
torch: works on any nn.Module.

What compiled code depends on is looked at (once a process, entry, step or call) or refused: the table is in ARCHITECTURE.md.
"""
from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .artifacts.closures import closed_over, kept_object
from .artifacts.job import varying
from .artifacts.runtime import MISSING, BlockInfo, Cache, RegionArtefacts
from .options import CompileOptions
from .regions import Region, RegionSet
from .report import NOT_KEPT, CompileReport, first_lines, remedy
from .torch_compiler import MAX_STATES, Compiled, CompileScope, RegionCode
from .torch_internals.block_tree import attributes_of_tensors, has_global_hooks

logger = logging.getLogger(__name__)

Tell = Callable[[CompileReport, str, tuple[int, int] | None], None]

_VARYING = {dims: frozenset(varying(dims)) for dims in range(16)}
_NOT_THE_MODELS = "<", str(Path(torch.__file__).parent), str(Path(__file__).parent)
_LAYERS = str(Path(__file__).parent / "comfyui")  # INT8 layers are parts of the model


def _strided(value: Tensor) -> bool:
    """Whether value, which is not contiguous, has a layout that only some of the blocks get: not one of the formats that a model
    keeps on purpose. An expanded tensor stays: to write it out would cost its memory."""
    return (0 not in value.stride()
            and not (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
            and not (value.dim() == 5 and value.is_contiguous(memory_format=torch.channels_last_3d)))


def _mark(value):
    """What torch._dynamo.maybe_mark_dynamic sets, at a tenth of its cost."""
    if isinstance(value, Tensor):
        value._dynamo_weak_dynamic_indices = set(_VARYING[value.dim()])  # its own: torch adds to it
    elif isinstance(value, (tuple, list)):
        for item in value:
            _mark(item)


def _storages(value) -> list[int]:
    if isinstance(value, Tensor):
        return [value.untyped_storage().data_ptr()]
    return [found for item in value for found in _storages(item)] if isinstance(value, (tuple, list)) else []


def _dense_copies(values: tuple, inside: list) -> dict[int, tuple[Tensor, Tensor]]:
    """{id: (tensor, dense copy)} of those that only some blocks get in another layout. None while gradients are wanted, which the way back
    into the original would break; none where memory is shared, or the original may not be written. inside: what functions among values
    close over."""
    loose = [v for v in values if isinstance(v, Tensor) and not v.is_contiguous() and _strided(v)]
    if not loose or torch.is_grad_enabled():
        return {}
    if not torch.is_inference_mode_enabled() and any(value.is_inference() for value in loose):
        return {}
    storages = _storages((*values, *inside))
    if len(set(storages)) < len(storages):
        return {}
    return {id(value): (value, value.contiguous()) for value in loose}


def _is_models_own(error: Exception) -> bool:
    """Whether it came up in the model's code, or another pack's: neither in torch nor in what it compiled."""
    if type(error).__module__.partition(".")[0] in ("torch", "triton"):
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    if code.co_filename.startswith(_LAYERS):
        return True
    return not code.co_filename.startswith(_NOT_THE_MODELS) and "torchinductor" not in code.co_filename


@dataclass
class _Block:
    """What is known of one block while the regions are what they are."""

    region: _RegionState
    info: BlockInfo
    is_first: bool  # of its region
    mark: bool


@dataclass
class _RegionState:
    """What was compiled of the blocks that are made of the same. Kept when an object patch changes the blocks: the same branch may be back
    at the next prompt."""

    name: str
    code: RegionCode
    artefacts: RegionArtefacts | None = None


@dataclass
class _Step:
    """A call of the model that is under way. calls: of blocks, by what ran them."""

    thread: int
    filter_guards: bool
    use_artefacts: bool
    scope: CompileScope
    blocks: dict[int, _Block] | None = None  # by id of the module, from the first call of a block on
    compiled: dict[int, Compiled | None] = field(default_factory=dict)  # by id of the region's state
    tensor_attributes: frozenset[str] = frozenset()  # names of what Python code has put on the blocks' weights
    compiling: str = ""  # the region that is called
    passthrough: Callable[[Exception], bool] = bool  # whether an error is no failure of compiling, see CompiledModule.run
    is_over: bool = False
    failure: str = ""  # of compiling a block; that block, and all after it, then ran eager
    calls: dict[str, int] = field(default_factory=lambda: {"artefact": 0, "graph": 0, "eager": 0})


_MODULE = torch.nn.Module
_MODULE_CALL = _MODULE._wrapped_call_impl.__code__


_SLOTS = threading.Lock()  # of models that share blocks


class OwnCall:
    """What this pack puts into ``_compiled_call_impl``, the slot of nn.Module.compile. Anything else there is another pack's."""

    __slots__ = ()
    step: _Step | None = None  # the only one that it is there for


class _BlockCall(OwnCall):
    """The call of one block."""

    __slots__ = ("module", "owner", "step")

    def __init__(self, owner: CompiledModule, module: torch.nn.Module, step: _Step):
        self.owner = owner
        self.module = module
        self.step = step

    def __call__(self, *args, **kwargs):
        caller = sys._getframe(1)
        if caller.f_code is _MODULE_CALL and (called := caller.f_locals["self"]) is not self.module:
            return called._call_impl(*args, **kwargs)  # a copy of the block by its __dict__, as torch's replicas are
        return self.owner.call_block(self.module, args, kwargs)


class _WrappedCall(OwnCall):
    """The same with something around it, see CompiledModule.run."""

    __slots__ = ("_call", "step")

    def __init__(self, call: Callable, step: _Step):
        self._call = call
        self.step = step

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)


def _put_back(step: _Step, before: list[tuple[torch.nn.Module, OwnCall, OwnCall | None]]) -> None:
    """At the end of step, what was in the slots of its blocks before. Another thread's step, of a model that shares blocks, may have begun
    since, and stays; or may have ended, and is not put back."""
    with _SLOTS:
        step.is_over = True
        for module, own, previous in before:
            if module.__dict__.get("_compiled_call_impl") is not own:
                continue
            if previous is None or (previous.step is not None and previous.step.is_over):
                module.__dict__.pop("_compiled_call_impl", None)
            else:
                module.__dict__["_compiled_call_impl"] = previous


class CompiledModule:
    """The compiled regions of one module on one device. Thread-safe; built at the first call.

    While ``run`` is under way the blocks' ``_compiled_call_impl`` (the slot of nn.Module.compile) is set; names, parameters and
    the modules themselves stay as they are, and everything is put back afterwards. Branches of a model (INT8 and float, two methods) may
    take turns: what was compiled belongs to what the blocks are made of.
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
        self._regions: RegionSet | None = None
        self._blocks: dict[int, _Block] = {}  # by id of the module, of the regions
        self._states: dict[tuple, _RegionState] = {}  # by what blocks are made of
        self._failures: dict[tuple, str] = {}  # why compile is off, by what all the regions are made of
        self._unused: dict[str, list[str]] = {}  # why artefacts are not used, by region; until one of it is loaded
        self._settled = False  # nothing was compiled in the last call: a new size or batch is met by the first block of a class
        self._lock = threading.RLock()
        self._step: _Step | None = None
        self._tell: Tell | None = None  # of the last call
        self._told = False  # nothing has happened that it does not know of

    def run(self, root: torch.nn.Module, call: Callable, *, filter_guards: bool, passthrough: Callable[[Exception], bool],
            around_block: Callable | None = None, tell: Tell | None = None,
            interrupted: Callable[[], bool] = bool):
        """call() with root's regions compiled.

        filter_guards: no patch is active that may read the bookkeeping in transformer_options (see guards.py). passthrough: whether an
        exception is never a failure of compile (out of memory, interrupt). An error that the model's own code raises is raised. On any
        other of a compiled call the same call is made once more eager: if that fails too, its error is the model's own; if not, compile is
        off from then on for what the blocks are made of now. around_block: wraps the call of each block, as around_block(call) -> call.
        tell: called with the report when something has happened, what is under way ("" at its end) and how much of it is done (None:
        nobody knows); from the builder's thread too. May raise only what passthrough passes on. interrupted: asked while something is
        compiled, from another thread; once it is true the compile ends with Interrupted, and what is called next compiles again.
        """
        if not self._lock.acquire(blocking=False):
            # In another thread's run, which may be waiting for this one: the blocks run eager.
            return call()
        try:
            if tell is not self._tell:
                self._tell, self._told = tell, False
            self._refresh(root)
            if self.report.failure:
                self.report.steps += 1
                self._say()
                return call()
            try:
                result = self._run_compiled(call, filter_guards, around_block, interrupted, passthrough)
                self._say()
                # The memory of a CUDA graph's outputs is written again at the next step.
                return tree_map_only(Tensor, torch.clone, result) if self._cuda_graphs else result
            except Exception as error:
                if passthrough(error) or _is_models_own(error):
                    self._say()
                    raise
                cause = f"{type(error).__name__}: {error}"
            # Out of the except block: its traceback would keep the failed call's tensors alive.
            result = call()
            self._fail(cause)
            return result
        finally:
            self._lock.release()

    def _fail(self, cause: str) -> None:
        """From now on what these blocks are made of runs uncompiled."""
        if any(state.code.refusal() for state in self._states.values()):
            return  # the next step says so
        self._failures[self._regions.key] = self.report.failure = cause
        self._told = False
        self._say()
        logger.warning("%s: compile failed; running uncompiled. %s%s", self.options.title, remedy(cause), first_lines(cause))

    def _refresh(self, root: torch.nn.Module) -> None:
        if self._root is None or self._root() is not root or self._regions is None or not self._regions.is_current():
            self._root = weakref.ref(root)
            self._find_regions()

    def _find_regions(self) -> None:
        owner = weakref.ref(self)

        def forget():
            # A layer was freed: nothing here may keep its weights.
            if (compiled := owner()) is not None:
                compiled._blocks = {}
        self._regions = RegionSet(self._root(), self.options.blocks_only, forget)
        self._blocks = self._describe_blocks()
        self.report.regions = [(region.name, len(region.modules)) for region in self._regions]
        failure = self._failures.get(self._regions.key, "")
        if failure != self.report.failure:
            self.report.failure, self._told = failure, False

    def _describe_blocks(self) -> dict[int, _Block]:
        blocks = {}
        for region in self._regions:
            state = self._states.get(region.key)
            if state is None:
                state = self._states[region.key] = _RegionState(
                    region.name, RegionCode(f"{region.name}_{len(self._states)}", self.options))
            for index, module in enumerate(region.modules):
                first = index == 0
                blocks[id(module)] = _Block(state, BlockInfo(module), first, self.options.mark_sizes and (first or not self._settled))
        return blocks

    def _run_compiled(self, call, filter_guards, around_block, interrupted, passthrough):
        use_artefacts = filter_guards and self._artefacts_allowed()
        self.report.steps += 1
        if self._cache and self.options.background and not use_artefacts:
            self._count({"artefact": 0, "graph": 0, "eager": len(self._regions.blocks)})
            return call()  # a compile in this process is what was not asked for
        outer = self._step
        scope = CompileScope(self.options, self._device.type, interrupted, self._begins_compile)
        step = self._step = _Step(threading.get_ident(), filter_guards and self.options.guard_filter, use_artefacts, scope,
                                  passthrough=passthrough)
        before = []
        try:
            with _SLOTS:
                for module in self._regions.blocks:
                    previous = module.__dict__.get("_compiled_call_impl")
                    if previous is not None and not isinstance(previous, OwnCall):
                        self._fall_back("some blocks are compiled by another pack, or by nn.Module.compile: they run as that compiled "
                                        "them.")
                        step.calls["eager"] += 1
                        continue
                    own = block = _BlockCall(self, module, step)
                    if around_block:
                        own = _WrappedCall(around_block(block), step)
                    before.append((module, own, previous))
                    module.__dict__["_compiled_call_impl"] = own
            with self._cache.builder.sampling() if self._cache else contextlib.nullcontext():
                result = call()
        finally:
            _put_back(step, before)
            compiled = scope.close()
            self._step = outer
            self._after_step(step, compiled)
        if step.failure:
            self._fail(step.failure)
        elif self.report.graphs:  # not after an interrupt, which leaves some of it uncompiled
            self.report.compiled_from_step = self.report.compiled_from_step or self.report.steps
        return result

    def _after_step(self, step: _Step, compiled: bool) -> None:
        if compiled == self._settled:
            self._settled = not compiled
            for block in self._blocks.values():
                block.mark = self.options.mark_sizes and (block.is_first or compiled)
        if compiled:
            self._record(step.scope)
        self._count(step.calls)

    def _count(self, calls: dict[str, int]) -> None:
        if calls != self.report.last_calls:
            self.report.last_calls, self._told = dict(calls), False
        for kind, count in calls.items():
            self.report.calls[kind] = self.report.calls.get(kind, 0) + count

    def call_block(self, module: torch.nn.Module, args: tuple, kwargs: dict):
        """The call of a block during a run."""
        step = self._step
        if step is None or step.thread != threading.get_ident():
            return module._call_impl(*args, **kwargs)
        if step.blocks is None:
            self._begin(step)
        block = step.blocks.get(id(module))
        if block is None or self._regions.has_hooks(module):
            if block is not None:
                self._fall_back("some blocks have forward hooks: they run uncompiled while these are there.")
            step.calls["eager"] += 1
            return module._call_impl(*args, **kwargs)
        if step.use_artefacts:
            artefacts = block.region.artefacts
            result = artefacts.run(module, block.info, args, kwargs, step.tensor_attributes)
            if result is not MISSING:
                step.calls["artefact"] += 1
                return result
            if artefacts.instead:
                step.calls["eager"] += 1
                return module._call_impl(*args, **kwargs)
        result = self._by_graph(step, block, module, args, kwargs)
        if result is MISSING:
            step.calls["eager"] += 1
            return module._call_impl(*args, **kwargs)
        step.calls["graph"] += 1
        return result

    def _by_graph(self, step: _Step, block: _Block, module: torch.nn.Module, args: tuple, kwargs: dict):
        """The block's result by what torch compiled; MISSING where it is to run eager: now, or, since it cannot be compiled, from now on.
        What the model has done before this block is not done again then."""
        try:
            compiled = self._compiled(step, block)
            if compiled is None or self._is_beyond_guards(step, block, compiled, args, kwargs):
                return MISSING
            result = _call_compiled(compiled, module, args, kwargs, block.mark)
            compiled.look(module)
            return result
        except Exception as error:
            if step.passthrough(error) or _is_models_own(error):
                raise
            step.failure = f"{type(error).__name__}: {error}"
            step.blocks, step.use_artefacts = {}, False
        return MISSING

    def _begin(self, step: _Step) -> None:
        """At the first block of a step, when every wrapper around the model has done what it does."""
        if not self._regions.is_current():
            self._find_regions()
        if not self._blocks:  # forgotten
            self._blocks = self._describe_blocks()
        step.blocks = self._blocks
        foreign, step.tensor_attributes = self._regions.look_inside()
        if foreign:
            step.blocks = {key: block for key, block in self._blocks.items() if key not in foreign}
            self._fall_back("in some blocks another pack has compiled a module: they run uncompiled while it is.")
        if has_global_hooks():
            step.blocks = {}
            self._fall_back("there are forward hooks on all modules of the process: running uncompiled while they are there.")
        if step.use_artefacts:
            for region in self._regions:
                state = self._states[region.key]
                if state.artefacts is None:
                    state.artefacts = self._region_artefacts(region)
                state.artefacts.begin()

    def _is_beyond_guards(self, step: _Step, block: _Block, compiled: Compiled, args: tuple, kwargs: dict) -> bool:
        """Whether this call differs from what was compiled in something that dynamo's guards do not see."""
        name, unguarded = block.region.name, compiled.guards.unguarded
        if unguarded and (what := unguarded.disagreement(block.info.block(), args, kwargs)):
            self._fall_back(f"{name} reads something ({what}) that was another when it was compiled, in a way that torch does not look at "
                            "(the sign of a zero, an order, a default): it runs uncompiled where that is so.")
            return True
        inside = closed_over((*args, *kwargs.values()))
        if inside and (kept := kept_object(inside)):
            self._fall_back(f"{name} gets a function that keeps a {kept}, for which it would be compiled again and again: it runs "
                            "uncompiled where it does.")
            return True
        present = step.tensor_attributes | attributes_of_tensors([*args, *kwargs.values(), *inside])
        read = next((item for item in sorted(present) if compiled.names is not None and item in compiled.names), "")
        if read:
            self._fall_back(f"{name} reads the attribute {read} of a tensor, which torch takes for a constant: it runs uncompiled while a "
                            "tensor has one.")
        return bool(read)

    def _compiled(self, step: _Step, block: _Block) -> Compiled | None:
        """What torch compiled for the block's region as its classes are now; None where it is not compiled."""
        code = block.region.code
        step.compiling = code.name
        if not step.scope.is_open:
            if not self.report.graphs:
                self._say("loading the compiler")
            step.scope.open()
        known = step.compiled.get(id(code), MISSING)
        if known is MISSING or (known is not None and not known.still_fits()):
            step.compiled[id(code)] = found = code.find(step.filter_guards)
            if found is None and (reason := code.refusal()):
                self._fall_back(reason)
            elif found is None:
                self._fall_back(f"what {block.region.name} computes with was changed more than {MAX_STATES} times (by another pack): it "
                                "runs uncompiled with new code or values.")
        return step.compiled[id(code)]

    def _region_artefacts(self, region: Region) -> RegionArtefacts:
        options = self.options
        return RegionArtefacts(self._cache, region.name, self._device, options.mark_sizes or options.dynamic is not False,
                               options.torch_options(), options.background, self._note)

    def _artefacts_allowed(self) -> bool:
        """An artefact was made for inference, as it is without autocast."""
        return (self._cache is not None and not torch.is_grad_enabled() and not torch.is_autocast_enabled(self._device.type)
                and not torch._C._len_torch_function_stack())

    def _say(self, doing: str = "", progress: tuple[int, int] | None = None):
        if self._tell is not None and (doing or not self._told):
            self._told = not doing
            self._tell(self.report, doing, progress)

    def _begins_compile(self):
        names = [self._states[region.key].code.name for region in self._regions]
        if self._step is not None and self._step.compiling in names:
            index = names.index(self._step.compiling)
            self._say(f"compiling {self._regions[index].name} {index + 1}/{len(names)}", (index, len(names)))

    def _note(self, event: str, name: str, detail: str):
        """Of a region's artefacts; from the builder's thread too. name: the region's."""
        report = self.report
        text = f"{name} {detail}" if event in ("loaded", "building", "built") else f"{name}: {detail}"
        if event in ("built", "refused"):
            report.building = [building for building in report.building if building.partition(" ")[0] != name]
        if event == "loaded":
            report.fallbacks = [fallback for fallback in report.fallbacks if fallback not in self._unused.pop(name, ())]
            report.artefacts.append(text)
            report.compiled_from_step = report.compiled_from_step or report.steps
            logger.info("%s: step %d on runs %s from the compile cache", self.options.title, report.steps, text)
        elif event == "refused" and self.options.background:
            self._fall_back(f"{text}: running uncompiled. Set background to false to compile it in this process.")
        elif event == "not used":
            if self.options.background:
                reason = f"{text}: running uncompiled while it is so."
                self._fall_back(reason)
            else:
                reason = f"{NOT_KEPT}: {text}"
                report.fallbacks += [] if reason in report.fallbacks else [reason]
                logger.info("%s: not used: %s", self.options.title, text)
            self._unused.setdefault(name, []).append(reason)
        elif event == "refused":
            report.fallbacks.append(f"{NOT_KEPT}: {text}")
            logger.info("%s: not kept in the compile cache: %s", self.options.title, text)
        else:
            if event == "building":
                report.building.append(text)
            logger.info("%s: %s: %s", self.options.title, event, text)
        self._told = False
        if self._step is None:
            self._say()

    def _record(self, scope: CompileScope):
        first = not self.report.graphs
        scope.record(self.report)
        if first or self.options.log:
            logger.info("%s: %s", self.options.title, self.report.summary())
        limit = scope.limit()
        for region in self._regions:
            code = self._states[region.key].code
            if code.is_at_limit(limit):
                self._fall_back(f"{region.name} was compiled {limit} times, which is the limit (dynamo_cache_size_limit): "
                                "it runs uncompiled wherever it would need another compile.")

    def _fall_back(self, message: str):
        if message not in self.report.fallbacks:
            self.report.fallbacks.append(message)
            self._told = False
            logger.warning("%s: %s", self.options.title, message)


def _call_compiled(compiled: Compiled, module: torch.nn.Module, args: tuple, kwargs: dict, mark: bool):
    inside = closed_over((*args, *kwargs.values()))
    copies = _dense_copies((*args, *kwargs.values()), inside) if compiled.takes_copies else {}
    if mark:
        _mark((*args, *kwargs.values(), *inside, *copies.values()))
    if not copies:
        return compiled.call(module, *args, **kwargs)
    # The first block often gets a transposed tensor, the others dense ones: that would be a graph more.
    dense = [copies[id(v)][1] if id(v) in copies else v for v in args]
    dense_kwargs = {k: copies[id(v)][1] if id(v) in copies else v for k, v in kwargs.items()}
    try:
        with compiled.given_copies():
            result = compiled.call(module, *dense, **dense_kwargs)
    except Exception:
        if compiled.takes_copies:
            raise
        return compiled.call(module, *args, **kwargs)  # found out while it compiled
    originals = {}
    for value, copy in copies.values():
        value.copy_(copy)  # a block may have written into its input, or return it
        originals[id(copy)] = value
    return tree_map_only(Tensor, lambda t: originals.get(id(t), t), result)
