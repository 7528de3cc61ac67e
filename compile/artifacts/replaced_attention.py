"""What a pack puts in the place of a UNet block's attention (transformer_options["patches_replace"]: IPAdapter, PAG, SAG) as an operation
of compiled code: it is called at run time, with the tensors and the options that eager gives it. See stand_ins.

Source: BasicTransformerBlock.forward in comfy/ldm/modules/attention.py (0.33), which hands on the options that it gets, without the patches
and with what it adds of its own.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from . import attention, current_block
from .values import CallAgain

KINDS = "attn1", "attn2"
INDEX, SHAPE = "block_index", "activations_shape"  # what a SpatialTransformer writes into its transformer_options
ADDED = "n_heads", "dim_head", "attn_precision"  # what the block adds to those that a replacement gets
OPERATION = "replaced "


def replaced_attn1(q, k, v, extra_options):
    return _replaced(KINDS[0], q, k, v, extra_options)


def replaced_attn2(q, k, v, extra_options):
    return _replaced(KINDS[1], q, k, v, extra_options)


STAND_INS = dict(zip(KINDS, (replaced_attn1, replaced_attn2)))


def _replaced(kind: str, q, k, v, extra_options):
    """In the place of a replacement of one kind."""
    if attention.is_tracing() and torch.compiler.is_dynamo_compiling():
        return attention.call_operation(f"{OPERATION}{kind} {extra_options[INDEX]}", q, k, v, extra_options["n_heads"],
                                        attn_precision=extra_options["attn_precision"],
                                        numbers=(extra_options["dim_head"], *extra_options[SHAPE]))
    written = {name: extra_options[name] for name in (INDEX, SHAPE, *ADDED)}
    return current_block.call_now("call_replacement", kind, (q, k, v), written)


def call_replaced(function: str, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], given: dict, numbers: list[int]) -> torch.Tensor:
    """What the operation does."""
    kind, index = function.removeprefix(OPERATION).split(" ")
    dim_head, *shape = numbers
    written = {INDEX: int(index), SHAPE: shape, "n_heads": given["heads"], "dim_head": dim_head, "attn_precision": given["attn_precision"]}
    block = current_block.current()
    result = as_expected(block.call_replacement(kind, tensors, written), *tensors, given["heads"])
    if result is None:
        block.distrust()
        raise CallAgain
    return result


def as_expected(result, q, k, v, heads: int) -> torch.Tensor | None:
    """A replacement's result in the shape that the operation gives: what it gave for all rows or tokens as one for each of them, of which
    the block computes the same. None for one of another kind."""
    shape = attention.shape_of(q, k, v, heads)
    with contextlib.suppress(AttributeError, TypeError, RuntimeError):
        result = result.expand(shape)
    return result if attention.is_as_expected(result, q, k, v, heads) else None


def finds(replacements: dict, block: tuple, index: int) -> Callable | None:
    """As BasicTransformerBlock looks for its own."""
    return replacements.get((block[0], block[1], index), replacements.get(block))
