"""What packs put before and behind a UNet block's attention (transformer_options["patches"]: HyperTile, ToMe, ControlNet-LLLite) as
operations of compiled code: called at run time, with the tensors and the options that eager gives them. What comes before attention may
give another batch or other tokens at each call, so compiled code does not know how many there are. See stand_ins.

Source: BasicTransformerBlock.forward in comfy/ldm/modules/attention.py (0.33), which gives all of them one dict of options.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from . import attention, current_block
from .replaced_attention import ADDED, INDEX, SHAPE
from .values import CallAgain

BEFORE = {"attn1_patch": "attn1_output_patch", "attn2_patch": "attn2_output_patch"}  # and what is behind that attention
BEHIND = "attn1_output_patch", "middle_patch", "attn2_output_patch"
# Those that a block calls, with what replaces its attention, in its order.
ORDER = "attn1_patch", "attn1", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2", "attn2_output_patch"
KINDS = *BEFORE, *BEHIND
_WRITTEN = SHAPE, INDEX, *ADDED  # in the order of eager


def _before(kind: str, keeps: bool) -> Callable:
    """In the place of the patches of a kind before attention. keeps: they give as many tokens as they get."""
    def stand_in(n, context, value, extra_options):
        extra_options[BEFORE[kind]] = n.shape  # what is behind gives it again
        if attention.is_tracing() and torch.compiler.is_dynamo_compiling():
            return getattr(torch.ops, attention.NAMESPACE).patch_attention_inputs(n, context, value, keeps, *_told(kind, extra_options))
        return current_block.call_now("call_patches", kind, (n, context, value), _written(extra_options))
    return stand_in


def _behind(kind: str) -> Callable:
    """In the place of the patches of a kind behind attention."""
    def stand_in(n, extra_options):
        shape = extra_options.get(kind, n.shape)
        if attention.is_tracing() and torch.compiler.is_dynamo_compiling():
            return getattr(torch.ops, attention.NAMESPACE).patch_attention_output(n, shape, *_told(kind, extra_options))
        return current_block.call_now("call_patches", kind, (n,), _written(extra_options))
    return stand_in


_STAND_INS = {**{(kind, keeps): _before(kind, keeps) for kind in BEFORE for keeps in (False, True)},
              **{(kind, True): _behind(kind) for kind in BEHIND}}


def stand_in(kind: str, kinds: dict) -> Callable:
    """For the patches of a kind. kinds: of all that there are."""
    return _STAND_INS[kind, BEFORE.get(kind) not in kinds]


def _written(extra_options: dict) -> dict:
    """What the block has added to the options that it got."""
    return {name: extra_options[name] for name in _WRITTEN}


def _told(kind: str, extra_options: dict) -> tuple[str, list]:
    """The same for an operation: see _read."""
    shape, index, heads, dim_head, precision = (extra_options[name] for name in _WRITTEN)
    return f"{kind} {attention.name_of_precision(precision)}", [index, heads, dim_head, *shape]


def _read(told: str, numbers: list[int]) -> tuple[str, dict]:
    kind, precision = told.split(" ")
    return kind, dict(zip(_WRITTEN, (numbers[3:], *numbers[:3], attention.precision_named(precision))))


def call_all(patches: Iterable[Callable], tensors: Sequence[torch.Tensor], extra_options: dict):
    """As BasicTransformerBlock calls those of a kind: before attention with three tensors, behind it with one."""
    for patch in patches:
        if len(tensors) == 1:
            tensors = (patch(*tensors, extra_options),)
        else:
            n, context, value = patch(*tensors, extra_options)
            tensors = n, context, value
    return tensors if len(tensors) > 1 else tensors[0]


def fits(kind: str, result, given: Sequence, shapes: dict, kinds: dict) -> bool:
    """Whether patches gave what their operation gives. shapes: what was given before attention, for the kind behind it; written by this.
    kinds: of all that there are."""
    if kind not in BEFORE:
        return len(given) == 1 and _as_expected_behind(kind, result, given[0], shapes.pop(kind, given[0].shape)) is not None
    shapes[BEFORE[kind]] = given[0].shape
    return _fits_before(result, given, BEFORE[kind] not in kinds)


def _fits_before(results, given: Sequence, keeps: bool) -> bool:
    return len(results) == len(given) and all(map(_is_like, results, given)) and not (keeps and results[0].shape != given[0].shape)


def _as_expected_behind(kind: str, result, given: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """A result in the shape that the operation gives: what is added to all rows or tokens may be one for them. None for one of another
    kind."""
    shape = torch.Size(shape)
    if not _is_of_kind(result, given) or result.dim() > len(shape) or (result.shape != shape and kind == "middle_patch"):
        return None
    fits = all(size in (1, whole) for size, whole in zip(reversed(result.shape), reversed(shape)))
    return result.expand(shape) if fits else None


def _is_of_kind(result, given) -> bool:
    return (type(result) is torch.Tensor and type(given) is torch.Tensor and result.dtype is given.dtype
            and result.device == given.device)


def _is_like(result, given) -> bool:
    return _is_of_kind(result, given) and result.dim() == given.dim() == 3 and result.shape[2] == given.shape[2]


def _patch_inputs(n, context, value, keeps, told, numbers):
    tensors = n, context, value
    results = _call(told, numbers, tensors, lambda _, results: results if _fits_before(results, tensors, keeps) else None)
    return tuple(map(attention.copy, results))


def _patch_output(n, shape, told, numbers):
    return attention.copy(_call(told, numbers, (n,), lambda kind, result: _as_expected_behind(kind, result, n, shape)))


def _call(told: str, numbers: list[int], tensors: tuple, as_expected: Callable):
    kind, written = _read(told, numbers)
    block = current_block.current()
    own: dict[int, torch.Tensor] = {}  # one of what is one, and what was given to the block itself
    for tensor in tensors:
        own[id(tensor)] = attention.copy(tensor) if (given := block.given(tensor)) is None else given
    try:
        result = as_expected(kind, block.call_patches(kind, tuple(own[id(tensor)] for tensor in tensors), written))
        if result is None:
            block.distrust()
            raise CallAgain
    except Exception as error:
        attention.keep_failure(error)
        raise
    return result


def _fake_inputs(n, context, value, keeps, told, numbers):
    context_of_sizes = torch.library.get_ctx()

    def any_tokens(tensor):
        return tensor.new_empty(context_of_sizes.new_dynamic_size(), context_of_sizes.new_dynamic_size(), tensor.shape[2])
    return n.new_empty(n.shape) if keeps else any_tokens(n), any_tokens(context), any_tokens(value)


def define() -> bool:
    """Before they are traced. False where a sibling copy of this pack has: its operations know nothing of our blocks."""
    global _library
    if _library is None and not hasattr(getattr(torch.ops, attention.NAMESPACE), "patch_attention_inputs"):
        _library = torch.library.Library(attention.NAMESPACE, "FRAGMENT")
        tags = (torch.Tag.pt2_compliant_tag,)
        _library.define("patch_attention_inputs(Tensor n, Tensor context, Tensor value, bool keeps, str told, SymInt[] numbers) "
                        "-> (Tensor, Tensor, Tensor)", tags=tags)
        _library.define("patch_attention_output(Tensor n, SymInt[] shape, str told, SymInt[] numbers) -> Tensor", tags=tags)
        _library.impl("patch_attention_inputs", _patch_inputs, "CompositeExplicitAutograd")
        _library.impl("patch_attention_output", _patch_output, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{attention.NAMESPACE}::patch_attention_inputs", _fake_inputs, lib=_library)
        torch.library.register_fake(f"{attention.NAMESPACE}::patch_attention_output", lambda n, shape, *_: n.new_empty(shape), lib=_library)
    return _library is not None


_library: torch.library.Library | None = None
