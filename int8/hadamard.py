"""Regular Hadamard matrices, the rotation of ConvRot (arXiv 2512.03673).

The regular matrix has equal row sums, so a constant offset of a token does not pile up in one channel as it does
with Sylvester's. Same matrix as comfy_kitchen's int8_tensorwise layout: H is symmetric and orthonormal.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .echo import echo

GROUP_SIZES = (256, 64, 16)
# A file may ask for any group; a matrix of 65536 would have 32 GiB.
MAX_GROUP = 1024
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def group_size(in_features: int) -> int:
    """The largest rotation group that divides in_features, 0 where none does."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), 0)


def made_apart(make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """make(), a CPU tensor, on device, for a cache that outlives the call. A thread of its own has neither the inference mode of this one
    nor the memory pool of a CUDA graph that is warmed up here, which takes whatever stays for a leak (torch._inductor.cudagraph_trees)."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: make().to(device)).result()  # from pageable memory: there when it returns


def check_group(size) -> None:
    """Raises ValueError unless there is a matrix of that size."""
    if type(size) is not int or not 4 <= size <= MAX_GROUP or size & (size - 1) or size.bit_length() % 2 == 0:
        raise ValueError(f"A Hadamard group must be a power of 4, not {echo(size)}; the largest is {MAX_GROUP}")


def _matrix(size: int) -> torch.Tensor:
    check_group(size)
    h = h4 = torch.tensor(_H4, dtype=torch.float64) / 2
    while h.shape[0] < size:
        h = torch.kron(h, h4)
    return h


@functools.cache
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return made_apart(lambda: _matrix(size).to(dtype), device)


def hadamard(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The orthonormal regular Hadamard matrix [size, size], size a power of 4."""
    if torch.compiler.is_compiling():  # a trace makes it of its own operations: what it would cache is a fake tensor
        return _matrix(size).to(device=device, dtype=dtype)
    return _hadamard(size, torch.device(device), dtype)


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [..., K] with every run of ``group`` channels multiplied by H; its own inverse. K % group must be 0."""
    if not group:
        return x
    h = hadamard(group, x.device, x.dtype)
    return (x.reshape(-1, group) @ h).reshape(x.shape)
