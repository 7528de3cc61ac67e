"""A call of the model that is under way, and what is known of its blocks."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .artifacts.runtime import BlockInfo, RegionArtifacts
from .torch_compiler import Compiled, CompileScope, RegionCode


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


@dataclass
class Step:
    """A call of the model that is under way. calls: of blocks, by what ran them."""

    thread: int
    filter_guards: bool
    use_artifacts: bool
    scope: CompileScope
    blocks: dict[int, Block] | None = None  # by id of the module, from the first call of a block on
    compiled: dict[tuple, Compiled | None] = field(default_factory=dict)  # by what RegionCode.find is asked
    takes_overrides: dict[int, bool] = field(default_factory=dict)  # by id of the region
    tensor_attributes: frozenset[str] = frozenset()  # names of what Python code has put on the blocks' weights
    compiling: str = ""  # the region that is called
    passthrough: Callable[[Exception], bool] = bool  # whether an error is no failure of compiling, see CompiledModule.run
    failure: str = ""  # of compiling a block; that block, and all after it, then ran eager
    calls: dict[str, int] = field(default_factory=lambda: {"artifact": 0, "graph": 0, "eager": 0})
