"""Runs a call with its regions compiled: by an artifact of the compile cache where one fits, else by torch.compile. Plain torch.

What compiled code depends on is looked at (once a process, entry, step or call) or refused: the table is in ARCHITECTURE.md.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..int8.global_hooks import has_global_hooks
from .arguments import call_compiled, kind_of_call
from .artifacts import attention
from .artifacts.closures import closed_over
from .artifacts.key import is_inference
from .artifacts.runtime import MISSING, Cache
from .artifacts.stand_ins import StandIns
from .artifacts.values import CallAgain
from .block_calls import Slots
from .errors import is_models_own
from .events import Events, OnProgress
from .options import CompileOptions
from .regions import RegionSet
from .report import Changes, first_lines, remedy
from .step import Block, RegionState, Step, describe
from .torch_compiler import CompileScope, own_methods
from .torch_internals.guard_filter import has_patches, options_of
from .verification.verifier import Verification, VerificationOptions

logger = logging.getLogger(__name__)
# Kinds of calls that could not be compiled, of a model that runs compiled; then compile is off for it.
MOST_FAILURES = 8

class CompiledModule:
    """The compiled regions of one module on one device. Thread-safe; built at the first call.

    While ``run`` is under way the blocks' ``_compiled_call_impl`` (the slot of nn.Module.compile) is set; names, parameters and
    the modules themselves stay as they are, and everything is put back afterwards. Branches of a model (INT8 and float, two methods) may
    take turns: what was compiled belongs to what the blocks are made of.
    """

    def __init__(self, options: CompileOptions, device: torch.device | None = None, cache: Cache | None = None,
                 verification: VerificationOptions | None = None):
        self._events = Events(options.title, options.background)
        self.report = self._events.report
        self._changes = Changes()
        self._device = device or torch.device("cpu")
        self.options, refusal = options.on_device(self._device)
        if refusal:
            self._events.fall_back(refusal)
        self._cuda_graphs = self.options.cuda_graphs
        self._verification = None if verification is None else Verification(self._device, verification, self._events, options)
        refusal = self.options.artifact_refusal or ("" if cache else "the compile cache is off, or cannot be used (the console says why)")
        self._cache = None if refusal else cache
        if refusal and options.background:
            self._events.fall_back(f"{refusal}: compiling when it first samples, not in the background.")
        self._root: weakref.ref | None = None
        self._regions: RegionSet | None = None
        self._blocks: dict[int, Block] = {}  # by id of the module, of the regions
        self._states: dict[tuple, RegionState] = {}  # by what blocks are made of
        self._failed_kinds = 0  # of calls, while others ran compiled
        self._failures: dict[tuple, str] = {}  # why compile is off, by what all the regions are made of
        self._steady_state = False  # nothing was compiled in the last call: a new size or batch is met by the first block of a class
        self._lock = threading.RLock()
        self._step: Step | None = None

    def run(self, root: torch.nn.Module, call: Callable, *, filter_guards: bool, passthrough: Callable[[Exception], bool],
            around_block: Callable | None = None, on_progress: OnProgress | None = None,
            interrupted: Callable[[], bool] = bool, situation: Mapping[str, Hashable] | None = None, elsewhere: bool = False):
        """call() with root's regions compiled.

        filter_guards: no patch is active that may read the bookkeeping in transformer_options (see GuardFilter). passthrough: whether an
        exception is never a failure of compile (out of memory, interrupt). An error that the model's own code raises is raised. On any
        other of a compiled call the same call is made once more eager: if that fails too, its error is the model's own; if not, compile is
        off from then on for what the blocks are made of now. around_block: wraps the call of each block, as around_block(call) -> call.
        on_progress: called with the report when something has happened, what is under way ("" at its end) and how much of it is done (None:
        nobody knows); from the builder's thread too. May raise only what passthrough passes on. interrupted: asked while something is
        compiled, from another thread; once it is true the compile ends with Interrupted, and what is called next compiles again.
        situation: what users change from image to image (batch -> 2); the report says what was compiled for it. elsewhere: not here.
        """
        if not self._lock.acquire(blocking=False):
            # In another thread's run, which may be waiting for this one: the blocks run eager.
            return call()
        try:
            self._events.listen(on_progress)
            self._refresh(root)
            if self.report.failure or elsewhere:
                self.report.steps += 1
                self._events.uncompiled_step(elsewhere, len(self._regions.blocks))
                return call()
            self._changes.begin(situation or {}, self.report)
            try:
                result = self._run_compiled(call, filter_guards, around_block, interrupted, passthrough)
                self._changes.end(self.report)
                self._events.notify()
                # The memory of a CUDA graph's outputs is written again at the next step.
                return tree_map_only(Tensor, torch.clone, result) if self._cuda_graphs else result
            except Exception as error:
                if passthrough(error) or is_models_own(error):
                    self._events.notify()
                    raise
                cause = "" if isinstance(error, CallAgain) else f"{type(error).__name__}: {error}"
            # Out of the except block: its traceback would keep the failed call's tensors alive.
            result = call()
            if cause:
                self._fail(cause)
            return result
        finally:
            self._lock.release()

    def _fail(self, cause: str) -> None:
        """From now on what these blocks are made of runs uncompiled."""
        if any(state.code.refusal() for state in self._states.values()):
            return  # the next step says so
        self._failures[self._regions.key] = cause
        self._events.failed(cause)
        self._events.notify()
        logger.warning("%s: compile failed; running uncompiled. %s%s", self.options.title, remedy(cause), first_lines(cause))

    def blocks(self, root: torch.nn.Module) -> list[torch.nn.Module]:
        """Those of root's regions; none while another thread's run is under way, which may be waiting for this one."""
        if not self._lock.acquire(blocking=False):
            return []
        try:
            self._refresh(root)
            return self._regions.blocks
        finally:
            self._lock.release()

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
        self._events.failed(self._failures.get(self._regions.key, ""))

    def _describe_blocks(self) -> dict[int, Block]:
        return describe(self._regions, self._states, self.options, self._root(), self._steady_state)

    def _run_compiled(self, call, filter_guards, around_block, interrupted, passthrough):
        use_artifacts = filter_guards and self._cache is not None and is_inference(self._device.type)
        self.report.steps += 1
        if self._cache and self.options.background and not use_artifacts:
            self._events.count({"artifact": 0, "graph": 0, "eager": len(self._regions.blocks)})
            return call()  # a compile in this process is what was not asked for
        outer = self._step
        scope = CompileScope(self.options, self._device.type, interrupted, self._begins_compile)
        step = self._step = Step(threading.get_ident(), filter_guards and self.options.guard_filter, use_artifacts, scope,
                                  passthrough=passthrough)
        slots, self._events.in_step = Slots(), True
        try:
            if foreign := slots.fill(self._regions.blocks, self.call_block, around_block):
                step.calls["eager"] += foreign
                self._events.fall_back("some blocks are compiled by another pack, or by nn.Module.compile: as that compiled them.", True)
            with self._cache.builder.sampling(self._device) if self._cache else contextlib.nullcontext():
                result = call()
        finally:
            slots.put_back()
            compiled = scope.close()
            self._step, self._events.in_step = outer, outer is not None
            self._after_step(step, compiled)
        if step.failure:
            self._fail(step.failure)
        elif self.report.graphs:  # not after an interrupt, which leaves some of it uncompiled
            self.report.compiled_from_step = self.report.compiled_from_step or self.report.steps
        return result

    def _after_step(self, step: Step, compiled: bool) -> None:
        if compiled == self._steady_state:
            self._steady_state = not compiled
            for block in self._blocks.values():
                block.mark = self.options.mark_sizes and (block.is_first or compiled)
        if compiled:
            codes = [(region.name, self._states[region.key].code) for region in self._regions]
            self._events.compiled(step.scope, codes, self.options.log)
        attention.take_failure()  # one that was caught holds tensors
        self._events.count(step.calls)

    def call_block(self, module: torch.nn.Module, args: tuple, kwargs: dict):
        """The call of a block during a run."""
        step = self._step
        if step is None or step.thread != threading.get_ident():
            return module._call_impl(*args, **kwargs)
        if step.blocks is None:
            self._begin(step, args, kwargs)
        block = step.blocks.get(id(module))
        if block is None or block.region.wrong or self._regions.has_hooks(module):
            if block is not None and not block.region.wrong:
                self._events.fall_back("some blocks have forward hooks: they run uncompiled while these are there.", True)
            step.calls["eager"] += 1
            return module._call_impl(*args, **kwargs)
        options = options_of(args, kwargs)
        try:
            with step.stand_ins(block, module, options) or contextlib.nullcontext() as standing:
                result = self._compiled_result(step, block, module, args, kwargs, options, standing)
        except Exception as error:
            failure = attention.take_failure()
            if failure is None or failure is error:
                raise
            raise failure from None
        if result is MISSING:
            step.calls["eager"] += 1
            return module._call_impl(*args, **kwargs)
        return result

    def _compiled_result(self, step: Step, block: Block, module: torch.nn.Module, args: tuple, kwargs: dict, options: dict,
                         standing: StandIns | None):
        """MISSING where the block is to run eager."""
        patched = standing is None and has_patches(options)
        if step.use_artifacts:
            artifacts, result = block.region.artifacts, MISSING
            if not patched and (standing is None or not standing.replaces):
                try:
                    result = artifacts.run(module, block.info, args, kwargs, step.tensor_attributes, self._verifier(standing),
                                           block.region.distrust, comfyuis=standing is not None)
                except Exception as error:
                    if step.passthrough(error) or is_models_own(error) or attention.has_failed() or not artifacts.give_up(error):
                        raise
            if result is not MISSING:
                step.calls["artifact"] += 1
            if result is not MISSING or artifacts.eager_fallback:
                return result
        return self._by_graph(step, block, module, args, kwargs, options, patched, standing)

    def _verifier(self, standing: StandIns | None) -> Verification | None:
        return None if standing is not None and standing.calls_operations else self._verification  # another pack's code may keep a state

    def _by_graph(self, step: Step, block: Block, module: torch.nn.Module, args: tuple, kwargs: dict, options: dict, patched: bool,
                  standing: StandIns | None):
        """The block's result by what torch compiled; MISSING where it is to run eager: now, or, since it cannot be compiled, from now on.
        What the model has done before this block is not done again then. standing: the first time the block runs eager."""
        compiled = None
        try:
            compiled = step.compiled_for(block, step.filter_guards and not patched, own_methods(module), options, self._events)
            if compiled is None or (compiled.failed and kind_of_call(args, kwargs) in compiled.failed):
                return MISSING
            inside = closed_over((*args, *kwargs.values()))
            if difference := step.beyond_guards(block, compiled, args, kwargs, inside):
                self._events.fall_back(difference, True)
                return MISSING
            if standing is not None:
                standing.known = compiled.stand_ins
                if standing.kinds not in standing.known:
                    step.probes(block)
                    return standing.probe(lambda: module._call_impl(*args, **kwargs))
            if standing is None or (compiled.is_comfyuis and standing.known[standing.kinds]):
                before = dict(options) if standing else {}
                run = functools.partial(call_compiled, compiled, module, args, kwargs, inside, step.marks(block), block.region.numbers)
                verification = None if patched else self._verifier(standing)
                result = run() if verification is None or not verification.is_due(compiled) else verification.call(
                    compiled, "graph", block.region.name, module, args, kwargs, run, block.region.distrust)
                if standing is not None and not standing.is_unchanged(before):
                    standing.distrust()  # in another branch than it was probed in
                step.calls["graph"] += 1
                return result
        except Exception as error:
            if step.passthrough(error) or is_models_own(error) or attention.has_failed() or (compiled and compiled.may_have_run(error)):
                raise  # the model is called again, see run()
            cause = f"{type(error).__name__}: {error}"
        else:  # the patches are traced with it
            standing.withdraw()
            return self._by_graph(step, block, module, args, kwargs, options, True, None)
        if compiled is None or not self._has_worked(block):
            step.failure, step.blocks, step.use_artifacts = cause, {}, False
            return MISSING
        step.calls["eager"] += 1
        result = module._call_impl(*args, **kwargs)  # raises what is the model's own
        self._failed_kinds += 1
        compiled.failed.add(kind_of_call(args, kwargs))
        self._events.fall_back(f"{block.region.name} cannot be compiled as it is called now: it runs uncompiled where it is called so. "
                               f"{remedy(cause)}{first_lines(cause)}")
        return result

    def _has_worked(self, block: Block) -> bool:
        """Whether a failure to compile says nothing of the model: other calls run compiled, or do not want gradients."""
        others = self.report.compiled_from_step or torch.is_grad_enabled()
        return bool(others) and self._failed_kinds < MOST_FAILURES and not block.region.code.refusal()

    def _begin(self, step: Step, args: tuple, kwargs: dict) -> None:
        """At the first block of a step, when every wrapper around the model has done what it does. args, kwargs: of that block."""
        if not self._regions.is_current():
            self._find_regions()
        if not self._blocks:  # forgotten
            self._blocks = self._describe_blocks()
        step.blocks = self._blocks
        if self._verification is not None:
            self._verification.begin(self.report.steps, len(self._blocks), step.passthrough, args, kwargs, self._changes.weights)
        foreign, step.tensor_attributes = self._regions.look_inside()
        if foreign:
            step.blocks = {key: block for key, block in self._blocks.items() if key not in foreign}
            self._events.fall_back("in some blocks another pack has compiled a module or bypasses a layer: they run uncompiled.", True)
        if has_global_hooks():
            step.blocks = {}
            self._events.fall_back("there are forward hooks on all modules of the process: running uncompiled while they are there.", True)
        if step.use_artifacts:
            for region in self._regions:
                self._states[region.key].begin(self._cache, self._device, self.options, self._events)

    def _begins_compile(self):
        names = [self._states[region.key].code.name for region in self._regions]
        if self._step is not None and self._step.compiling in names:
            index = names.index(self._step.compiling)
            self._events.notify(f"compiling {self._regions[index].name} {index + 1}/{len(names)}", (index, len(names)))
