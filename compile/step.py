"""A call of the model that is under way, and what is known of its blocks."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .artifacts.closures import kept_object
from .artifacts.runtime import MISSING, BlockInfo, Cache, RegionArtifacts
from .artifacts.stand_ins import StandIns, stand_ins, takes_stand_ins
from .events import Events
from .options import CompileOptions
from .regions import RegionSet
from .torch_compiler import MAX_STATES, Compiled, CompileScope, OwnMethods, RegionCode
from .torch_internals.block_tree import attributes_of_tensors
from .torch_internals.guard_filter import has_patches


@dataclass
class Block:
    """What is known of one block while the regions are what they are."""

    region: RegionState
    info: BlockInfo
    is_first: bool  # of its region
    mark: bool


@dataclass
class RegionState:
    """What was compiled of the blocks that are made of the same. Kept when an object patch changes the blocks: the same branch may be back
    at the next prompt."""

    name: str
    code: RegionCode
    numbers: tuple[str, ...] = ()  # attributes of the blocks, integers that differ from one to another
    artifacts: RegionArtifacts | None = None
    wrong: str = ""  # how what was compiled was seen to be wrong: the blocks run eager

    def begin(self, cache: Cache, device: torch.device, options: CompileOptions, events: Events) -> None:
        """At the start of a step that uses artifacts."""
        if self.artifacts is None:
            self.artifacts = RegionArtifacts(cache, self.name, device, options.mark_sizes or options.dynamic is not False,
                                             options.torch_options(), options.background, events.on_artifact, self.numbers)
        self.artifacts.begin()

    def distrust(self, reason: str) -> None:
        self.wrong = reason
        if self.artifacts is not None:
            self.artifacts.distrust(reason)


def describe(regions: RegionSet, states: dict[tuple, RegionState], options: CompileOptions, root: torch.nn.Module,
             is_steady: bool) -> dict[int, Block]:
    """By id of the module, of the regions of root. states: by what blocks are made of; gets those of new ones."""
    blocks = {}
    for region in regions:
        state = states.get(region.key)
        if state is None:
            state = states[region.key] = RegionState(region.name, RegionCode(region.name, options, root in region.modules),
                                                     region.numbers())
        for index, module in enumerate(region.modules):
            blocks[id(module)] = Block(state, BlockInfo(module), index == 0, options.mark_sizes and (index == 0 or not is_steady))
    return blocks


@dataclass
class Step:
    """A call of the model that is under way. calls: of blocks, by what ran them."""

    thread: int
    filter_guards: bool
    use_artifacts: bool
    scope: CompileScope
    blocks: dict[int, Block] | None = None  # by id of the module, from the first call of a block on
    compiled: dict[tuple, Compiled | None] = field(default_factory=dict)  # by what RegionCode.find is asked
    takes_stand_ins: dict[int, bool] = field(default_factory=dict)  # by id of the region
    probed: set[int] = field(default_factory=set)  # ids of regions: the first block, with its sizes marked, was not compiled
    tensor_attributes: frozenset[str] = frozenset()  # names of what Python code has put on the blocks' weights
    compiling: str = ""  # the region that is called
    passthrough: Callable[[Exception], bool] = bool  # whether an error is no failure of compiling, see CompiledModule.run
    failure: str = ""  # of compiling a block; that block, and all after it, then ran eager
    calls: dict[str, int] = field(default_factory=lambda: {"artifact": 0, "graph": 0, "eager": 0})

    def stand_ins(self, block: Block, module: torch.nn.Module, options: dict) -> StandIns | None:
        """What stands for the patches in options while what was compiled of the block is called; None where nothing can, or is to."""
        if not self.filter_guards or not has_patches(options):
            return None
        if id(block.region) not in self.takes_stand_ins:
            self.takes_stand_ins[id(block.region)] = not block.region.code.whole_model and takes_stand_ins(module)
        # A CUDA graph would do again what another pack's code did while it was recorded, without calling it.
        operations = not block.region.code.options.cuda_graphs
        return stand_ins(module, options, operations) if self.takes_stand_ins[id(block.region)] else None

    def probes(self, block: Block) -> None:
        """A block runs eager to be looked at."""
        self.calls["eager"] += 1
        if block.mark:
            self.probed.add(id(block.region))

    def marks(self, block: Block) -> bool:
        """Whether its sizes are to be marked as varying, see arguments."""
        return block.mark or id(block.region) in self.probed

    def beyond_guards(self, block: Block, compiled: Compiled, args: tuple, kwargs: dict, inside: list) -> str:
        """In what this call differs from what was compiled that dynamo's guards do not see, empty where it does not."""
        name, unguarded = block.region.name, compiled.guards.unguarded
        if unguarded and (what := unguarded.disagreement(block.info.block(), args, kwargs)):
            return (f"{name} reads something ({what}) that was another when it was compiled, in a way that torch does not "
                    "look at (the sign of a zero, an order, a default): it runs uncompiled where that is so.")
        if inside and (kept := kept_object(inside)):
            return (f"{name} gets a function that keeps a {kept}, for which it would be compiled again and again: it runs "
                    "uncompiled where it does.")
        present = self.tensor_attributes | attributes_of_tensors([*args, *kwargs.values(), *inside])
        read = next((item for item in sorted(present) if compiled.names is not None and item in compiled.names), "")
        if read:
            return (f"{name} reads the attribute {read} of a tensor, which torch takes for a constant: it runs uncompiled "
                    "while a tensor has one.")
        return ""

    def compiled_for(self, block: Block, filter_guards: bool, methods: OwnMethods, options: dict, events: Events) -> Compiled | None:
        """What torch compiled for the block's region as its classes, its own methods and the keys of its options are now; None where it is
        not compiled."""
        code = block.region.code
        self.compiling = code.name
        if not self.scope.is_open:
            if not events.report.graphs:
                events.notify("loading the compiler")
            self.scope.open()
        keys = code.option_keys(filter_guards, options)
        key = id(code), filter_guards, methods, keys
        known = self.compiled.get(key, MISSING)
        if known is MISSING or (known is not None and not known.still_fits()):
            self.compiled[key] = found = code.find(filter_guards, methods, keys)
            if found is None and (reason := code.refusal()):
                events.fall_back(reason)
            elif found is None:
                events.fall_back(f"what {block.region.name} computes with was changed more than {MAX_STATES} times (by another "
                                 "pack): it runs uncompiled with new code or values.")
        return self.compiled[key]
