"""What another process needs to build an artifact."""
from __future__ import annotations

import dataclasses

import torch

from .block import Spec


@dataclasses.dataclass
class Job:
    """What another process needs to build the artifact of a call; pickled by this pack for itself.

    skeleton: of dump_skeleton, or of copy_skeleton to build in this process. attributes: of the block. tensors: of the block, in
    order: name, dtype, shape, layout. structure, leaves, options: of the call (see cache_call), a leaf as (dtype, shape, layout).
    batched: leaves whose first size is the batch. dims: of each leaf, those compiled for any size. device: of everything. threads: of
    the CPU. config: inductor's options. method: of the block, called as block.method(*args).
    """

    name: str
    skeleton: bytes | torch.nn.Module
    attributes: list[list]
    tensors: list[tuple[str, str, tuple[int, ...], str]]
    structure: tuple
    leaves: list[Spec]
    options: list[dict]
    batched: list[int]
    dims: list[tuple[int, ...]]
    device: str
    threads: int
    config: dict
    method: str = "forward"

    @property
    def any_batch(self) -> bool:
        return any(0 in self.dims[index] for index in self.batched)


def varying(dims: int) -> range:
    """Which dims of a block's input may vary between calls: not the channels of [batch, channels] and [batch, tokens, channels], nor the
    rotation matrices of position embeddings [..., D/2, 2, 2]."""
    return range(dims - 1 if dims in (2, 3) else dims - 3 if dims > 5 else dims)
