"""The artifacts of a region's blocks: found on disk, run where they fit, asked of the builder where there is none."""
from __future__ import annotations

import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..torch_internals.block_tree import attributes_of_tensors
from . import key as cache_key
from .artifact import Artifact
from .attention_override import OVERRIDE
from .block import structure_of
from .block_guards import BlockGuards, BlockInfo, ClassGuards, Weights, WeightSpecs, module_classes
from .builder import Builder, BuildRequest
from .call import Call, flatten, numbers_in, with_numbers, without_numbers
from .describe import Names
from .entry import Damaged
from .job import dynamic_dims_of_rank, job_of
from .loaded import Loaded, Verifier
from .option_reads import transformer_options_match
from .records import classes_in
from .source_guards import CodeFingerprint
from .store import CacheStore
from .values import CallAgain, Unsupported

logger = logging.getLogger(__name__)

MISSING = object()
MAX_SIGNATURES = 8  # kinds of calls of a block class that artifacts are built for


@dataclass(frozen=True)
class Cache:
    """Where artifacts are and who builds them. host: see cache_key.group."""

    store: CacheStore
    builder: Builder
    host: Callable[[], dict] = dict


class RegionArtifacts:
    """For blocks that are made of the same on one device. Thread-safe by the lock of the CompiledModule that it belongs to.

    background: an artifact is built as soon as a call needs one, and MISSING means to run eager. note: told of what happened, for the
    report. numbers: names of the blocks' attributes that are numbers and differ from block to block.
    """

    def __init__(self, cache: Cache, name: str, device: torch.device, dynamic: bool, config: dict, background: bool,
                 note: Callable[[str, str, str], None], numbers: tuple[str, ...] = ()):
        self._cache = cache
        self._name = name
        self._device = device
        self._dynamic = dynamic
        self._config = config
        self._background = background
        self._note = note
        self._numbers: tuple[str, ...] = ()  # of these, what the code is known to read
        self._may_be_numbers = numbers if dynamic else ()
        self._place = ""
        self._settings: dict = {}  # torch's, that the place is for
        self._differs = False  # they are others in this step
        self._weights = WeightSpecs([], [])
        self._kinds: list[type] = []  # classes of the blocks' modules
        self._loaded: dict[tuple, list[Loaded]] = {}
        self._seen: set[str] = set()
        self._stale: dict[str, list] = {}  # entries made of other code, by their sources
        self._unloaded: dict[str, str] = {}  # entries that failed to load -> how
        self._requested: dict[str, bool] = {}  # entry -> whether it is being built
        self._asked: set[tuple] = set()  # calls that no artifact fits until the builder has finished something
        self._shapes: dict[tuple, tuple] = {}  # of calls that were asked for: without its numbers -> its structure
        self._running: Loaded | None = None  # whose artifact run() called last, if it did
        self._refusal = ""
        self._said: set[str] = set()
        self._changed = threading.Event()  # set by the builder
        self._changed.set()

    @property
    def eager_fallback(self) -> bool:
        """Whether what no artifact fits is to run eager, not to be compiled in this process."""
        return self._background

    def begin(self) -> None:
        """At the start of a step: what the builder has finished since is loaded; code that was patched since is not used."""
        for group in self._loaded.values():
            for loaded in group:
                loaded.young -= loaded.young > 0
        if self._changed.is_set() and self._place:
            self._changed.clear()
            self._asked.clear()
            self._load()
        differs = bool(self._place) and cache_key.settings() != self._settings
        if differs and not self._differs:
            self._note("not used", self._name, "torch's settings (default dtype, precision, threads, ...) are not those of its artifact")
        self._differs = differs
        for group in self._loaded.values():
            for loaded in group:
                changed = loaded.change()
                if loaded.usable == bool(changed):
                    loaded.usable = not changed
                    if changed:
                        self._note("not used", self._name, f"{changed} is not the code that its artifact was made of")

    def run(self, block: torch.nn.Module, info: BlockInfo, args: tuple, kwargs: dict, attributes: frozenset[str],
            verification: Verifier | None = None, distrust: Callable[[str], None] = logger.error, comfyuis: bool = False):
        """The block's result by an artifact; MISSING where none fits this call. attributes: names of what Python code has put on
        weights. verification: looks at the call, and tells distrust. comfyuis: by one that calls no other code."""
        self._running = None
        if self._differs or (self._refusal and not self._loaded):
            return MISSING
        try:
            call = self._flatten(block, args, kwargs)
            if call is None:
                return MISSING
            if len(set(map(id, call.leaves))) < len(call.leaves):
                return MISSING  # the block may ask whether two of its arguments are one
            if info.weights is None:
                self._learn(block, info)
            attributes |= attributes_of_tensors(call.leaves)
            other_batch, numbers = True, self._numbers
            for loaded in self._loaded.get(call.structure, ()):
                if attributes and (read := next((name for name in sorted(attributes) if name in loaded.artifact.names), "")):
                    raise Unsupported(f"it reads the attribute {read} of a tensor")
                if not loaded.artifact.accepts(call.leaves):
                    continue
                other_batch = False
                if loaded.may_serve(comfyuis) and self._fits(block, info, loaded, call):
                    if changed := loaded.change_on_the_way():
                        loaded.usable = False
                        loaded.young = math.inf  # the next step's first block may find all as it was
                        raise Unsupported(f"{changed} changes from block to block")
                    tensors = info.weights.get()
                    if tensors is None or loaded.artifact.writes_into(tensors, call.leaves):
                        return MISSING  # a LoRA that is added on the way, or weights elsewhere: another time
                    self._running = loaded
                    if verification is None or not verification.is_due(loaded):
                        return loaded.artifact(tensors, call.leaves, call.options)
                    run = functools.partial(loaded.artifact, tensors, call.leaves, call.options)
                    return verification.call(loaded, "artifact", self._name, block, args, kwargs, run, distrust)
            if self._numbers != numbers:
                call = self._flatten(block, args, kwargs) or call
            self._request(block, call, other_batch)
        except Unsupported as error:
            self._refuse(str(error))
        return MISSING

    def give_up(self, error: Exception) -> bool:
        """After an error of run(): whether an artifact raised it, which is then used no more, in no process. Raises CallAgain where
        it may have written into its inputs before."""
        failed = self._running
        reason = f"its artifact does not run ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        if failed is None or not self.distrust(reason):
            return False
        self._refuse(reason)
        if failed.artifact.written:
            raise CallAgain from error
        return True

    def distrust(self, reason: str) -> bool:
        """The artifact that run() called last, if it did, is used no more, in no process."""
        failed, self._running = self._running, None
        if failed is None:
            return False
        for group in self._loaded.values():
            group[:] = [loaded for loaded in group if loaded is not failed]
        self._cache.store.set_aside(failed.artifact.folder, reason)
        return True

    def _flatten(self, block: torch.nn.Module, args: tuple, kwargs: dict) -> Call | None:
        """None for a call that cannot be described, which says nothing of others: some blocks are called in two ways."""
        try:
            if self._numbers:
                kwargs = with_numbers(block, self._numbers, kwargs)
            return flatten(args, kwargs, block, self._device if self._dynamic else None)
        except Unsupported as error:
            if not self._refusal and str(error) not in self._said:
                self._said.add(str(error))
                self._note("refused", self._name, str(error))
        return None

    def _learn(self, block: torch.nn.Module, info: BlockInfo) -> None:
        if not self._place:
            structure = structure_of(block)
            self._kinds = module_classes(block)
            self._weights = WeightSpecs.of(block)
            self._settings = cache_key.settings()
            group = cache_key.group(self._name, self._dynamic, "aoti", structure, self._config, self._device, self._cache.host())
            self._place = f"{group}/{cache_key.distribution() or 'single'}/forward"
            self._load()
        info.weights = Weights(block, self._weights, self._device)

    def _fits(self, block: torch.nn.Module, info: BlockInfo, loaded: Loaded, call: Call) -> bool:
        artifact = loaded.artifact
        if not all(map(transformer_options_match, call.options, artifact.options)):
            return False
        guards = info.guards.get(id(loaded))
        if guards is None:
            guards = info.guards[id(loaded)] = BlockGuards(block, artifact.attributes, artifact.names,
                                                              numbers_in(artifact.structure))
        difference = guards.difference if not guards.is_unchanged() else "" if artifact.has_layout(call.leaves) else (
            "the layout of its inputs, which it reads,")
        if difference in self._may_be_numbers:
            self._numbers = tuple(dict.fromkeys((*self._numbers, difference)))
        elif difference and difference not in self._said:
            self._said.add(difference)
            self._note("not used", self._name, f"{difference} is not as in the blocks that its artifact was made of")
        return not difference

    def _load(self):
        store = self._cache.store
        for entry in store.entries(self._place):
            if entry.folder.name in self._seen:
                continue
            self._seen.add(entry.folder.name)
            sources = CodeFingerprint(entry.body["sources"], Names(entry.body["names"]))
            if changed := sources.mismatch():
                if self._requested.get(entry.folder.name):  # another is being built in its place
                    self._seen.discard(entry.folder.name)
                    continue
                self._note("not used", self._name, f"{changed} is not the code that its artifact was made of")
                self._stale[entry.folder.name] = entry.body["sources"]
                continue
            try:
                artifact = Artifact(entry, self._device)
            except Damaged as error:
                store.set_aside(entry.folder, str(error))
                self._seen.discard(entry.folder.name)  # a call asks for another
                continue
            except (RuntimeError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # of this process or this machine now
                self._unloaded[entry.folder.name] = reason = f"its artifact cannot be loaded: {str(error).partition(chr(10))[0]}"
                self._note("not used", self._name, reason)
                continue
            store.touch(entry)
            classes = ClassGuards([*self._kinds, *classes_in(artifact.structure)], artifact.classes, artifact.names)
            self._numbers = tuple(dict.fromkeys((*self._numbers, *numbers_in(artifact.structure)))) if self._may_be_numbers else ()
            self._loaded.setdefault(artifact.structure, []).append(Loaded(artifact, sources, classes, not classes.difference()))
            self._note("loaded", self._name, entry.folder.name)

    def _request(self, block, call: Call, other_batch: bool):
        if self._refusal or any(not loaded.usable for loaded in self._loaded.get(call.structure, ())):
            return  # code that was patched while this process ran may be put back
        patched = any("forward" in vars(module) for module in block.modules())
        asked = call.structure, patched, *[(leaf.dtype, leaf.shape) for leaf in call.leaves], *map(frozenset, call.options)
        if asked in self._asked:
            return
        self._asked.add(asked)
        others = any(loaded.artifact.is_for_other_numbers(call) for loaded in self._loaded.get(call.structure, ()))
        if others and self._numbers:
            self._numbers = self._may_be_numbers = ()  # each is another program
            return
        if others or self._shapes.setdefault(without_numbers(call.structure), call.structure) != call.structure:
            self._refuse("a number among its arguments differs from call to call")
            return
        if len(self._requested) >= MAX_SIGNATURES:
            self._refuse(f"it is called in more than {MAX_SIGNATURES} ways")
            return
        try:
            job = job_of(self._name, block, call, self._device, lambda leaf: dynamic_dims_of_rank(leaf.dim()) if self._dynamic else (),
                         self._config)
        except Unsupported as error:
            if not patched:
                raise
            self._note("not used", self._name, f"{error}, on account of a method that was put on one of its layers (a bypass LoRA?)")
            return
        entry = cache_key.entry_name(job)
        if other_batch and job.any_batch and entry in self._seen and entry not in self._stale and entry not in self._unloaded:
            entry = cache_key.entry_name(job, "one" if job.batch == 1 else "many")
        if entry in self._requested:
            if entry in self._seen:
                self._refuse("what was built for it does not fit: other code runs here than in a new process (another pack's patch?), "
                             "or its attributes change")
            return
        if entry in self._seen and entry not in self._stale:
            if entry in self._unloaded:
                self._refuse(self._unloaded[entry])
            else:
                self._refuse("its artifact is for blocks that were not patched, or with other attributes")
            return
        self._seen.discard(entry)
        self._requested[entry] = True
        self._note("building", self._name, entry)
        region = weakref.ref(self)
        overridden = any(OVERRIDE in options for options in job.options)
        self._cache.builder.submit(BuildRequest(job, self._place, entry, functools.partial(_done, region, entry, overridden),
                                                self._background, self._stale.pop(entry, None)))

    def _refuse(self, reason: str):
        """Nothing more is built; what is there goes on."""
        if self._refusal:
            return
        self._refusal = reason
        self._note("refused", self._name, reason)


def _done(region: weakref.ref, entry: str, overridden: bool, reason: str):
    """In the builder's thread. overridden: another pack's attention was in it, without which it may be kept."""
    owner = region()
    if owner is None:
        return
    owner._requested[entry] = False
    owner._note("ended", owner._name, entry)
    if reason and overridden:
        owner._note("refused", owner._name, reason)
    elif reason:
        owner._refuse(reason)
    else:
        owner._note("built", owner._name, entry)
        owner._changed.set()
