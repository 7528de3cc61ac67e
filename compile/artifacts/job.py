"""What another process needs to build an artifact."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .block import TensorSpec, dump_skeleton, tensor_spec, tensors_of
from .block_guards import attributes_of
from .call import Call, numbers_in
from .describe import Names
from .option_reads import transformer_options_for_trace
from .values import Unsupported


@dataclasses.dataclass
class BuildSpec:
    """What another process needs to build the artifact of a call; pickled by this pack for itself.

    skeleton: of dump_skeleton, or of copy_skeleton to build in this process. attributes: of the block. tensors: of the block, in
    order: name, dtype, shape, layout. structure, leaves, options: of the call (see call.flatten), a leaf as (dtype, shape, layout).
    batch_leaves: leaves whose first size is the batch. dynamic_dims: of each leaf, those compiled for any size. device: of everything.
    threads: of the CPU. config: inductor's options. method: of the block, called as block.method(*args). sizes: leaves that stand for
    integers, see call.Call.
    """

    name: str
    skeleton: bytes | torch.nn.Module
    attributes: list[list]
    tensors: list[tuple[str, str, tuple[int, ...], str]]
    structure: tuple
    leaves: list[TensorSpec]
    options: list[dict]
    batch_leaves: list[int]
    dynamic_dims: list[tuple[int, ...]]
    device: str
    threads: int
    config: dict
    method: str = "forward"
    sizes: list[int] = dataclasses.field(default_factory=list)

    def with_fixed_sizes(self) -> BuildSpec:
        """The same for integers of just these values."""
        dims = [() if index in self.sizes else dims for index, dims in enumerate(self.dynamic_dims)]
        return dataclasses.replace(self, dynamic_dims=dims, sizes=[])

    def with_fixed_batch(self) -> BuildSpec:
        dims = [tuple(dim for dim in dims if dim or index not in self.batch_leaves) for index, dims in enumerate(self.dynamic_dims)]
        return dataclasses.replace(self, dynamic_dims=dims)

    @property
    def any_batch(self) -> bool:
        return any(0 in self.dynamic_dims[index] for index in self.batch_leaves)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the leaves."""
        return [shape for _, shape, _ in self.leaves]

    @property
    def batch(self) -> int:
        """0 where there is none."""
        return self.leaves[self.batch_leaves[0]][1][0] if self.batch_leaves else 0


def dynamic_dims_of_rank(rank: int) -> range:
    """Which dims of a block's input may vary between calls: not the channels of [batch, channels] and [batch, tokens, channels], nor the
    rotation matrices of position embeddings [..., D/2, 2, 2]."""
    return range(rank - 1 if rank in (2, 3) else rank - 3 if rank > 5 else rank)


def is_table_of_positions(shape: Sequence[int]) -> bool:
    """Whether it is one [1, tokens, 1, D/2, 2, 2] for all batches, as Wan and Z-Image have it; Flux has [batch, 1, tokens, D/2, 2, 2]."""
    return len(shape) > 5 and shape[0] == 1 and shape[1] > 1


def job_of(name: str, block: torch.nn.Module, call: Call, device: torch.device, dynamic_dims: Callable[[Tensor], Sequence[int]],
           config: dict, method: str = "forward", skeleton: Callable = dump_skeleton) -> BuildSpec:
    """dynamic_dims: of an input, those compiled for any size. Raises Unsupported for a block that cannot be described."""
    # A call makes dense copies of what has another layout.
    leaves = [(dtype, shape, kind or "c") for dtype, shape, kind in map(tensor_spec, call.leaves)]
    batch = next((shape[0] for index, (_, shape, _) in enumerate(leaves) if len(shape) > 1 and index not in call.sizes), 0)
    batch_leaves = [index for index, (_, shape, _) in enumerate(leaves) if shape and shape[0] == batch and index not in call.sizes
                    and not is_table_of_positions(shape)] if batch else []
    tensors = [(path, *tensor_spec(tensor)) for path, tensor in tensors_of(block)]
    if not all(kind for *_, kind in tensors):
        raise Unsupported("one of its weights is not contiguous")
    attributes = attributes_of(block, Names(None), lenient=True, without=numbers_in(call.structure))
    return BuildSpec(name, skeleton(block), attributes, tensors, call.structure, leaves,
                     list(map(transformer_options_for_trace, call.options)), batch_leaves,
                     [tuple(dynamic_dims(leaf)) for leaf in call.leaves], device.type, torch.get_num_threads(), config, method,
                     call.sizes)
