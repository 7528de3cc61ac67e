"""Attention as one operation: what compiled code calls at run time, instead of tracing how it is computed.

Functions that look at the free memory, split their work by it or call a library's kernels break graphs, or make them good for one size.
Each that is added here becomes ``int8_compile::attention`` wherever this pack traces; what other compilers trace is left as it is.
"""
from __future__ import annotations

import contextlib
import math
import threading
import types
from collections.abc import Callable, Iterator

import torch

NAMESPACE = "int8_compile"
# Keywords that the operation has a place for; a call with others is traced as it is.
_KEYWORDS = frozenset({"heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape", "scale", "enable_gqa",
                       "low_precision_attention"})

# What an override gets besides.
_OVERRIDES = frozenset({"transformer_options", "_inside_attn_wrapper"})

_functions: dict[str, Callable] = {}
_traced_as: dict[str, Callable] = {}  # during export
# Of each wrapper: the cell that holds its function, that function, and what it is in traces.
_cells: list[tuple[types.CellType, Callable, Callable]] = []
_known_to_dynamo = 0  # of _cells
_tracing = threading.local()


def add(name: str, wrapper: Callable, unread: frozenset[str] = frozenset(), traced: bool = False) -> None:
    """wrapper: calls its __wrapped__(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
    **kwargs), which it closes over, for attention. q, k, v: [batch, tokens, heads * dim], with skip_reshape [batch, heads, tokens, dim];
    the result likewise, by skip_output_reshape. name: the same in every process, without spaces. unread: keywords that it gets and does
    not read. traced: it is traced as it is, but where an override gets it. Other functions are left as they are."""
    function = getattr(wrapper, "__wrapped__", None)
    if hasattr(function, "__wrapped__"):
        return  # it is wrapped once more
    cell = next((cell for cell in getattr(wrapper, "__closure__", None) or () if _content(cell) is function), None)
    if name in _functions or not isinstance(function, types.FunctionType) or cell is None:
        return
    _define()
    _functions[name] = function
    if traced:
        return
    inlined = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    inlined.__kwdefaults__ = function.__kwdefaults__
    taken = _KEYWORDS | unread

    def attention(*args, **kwargs):
        # The operation has no gradient.
        if is_tracing() and _fits(taken, *args, **kwargs):
            return call_operation(name, *args, **{key: value for key, value in kwargs.items() if key not in unread})
        return inlined(*args, **kwargs)
    _traced_as[name] = attention
    _cells.append((cell, function, attention))


def _fits(taken: frozenset[str], q=None, k=None, v=None, heads=None, mask=None, *others, scale=None, **kwargs) -> bool:
    """Whether the operation can be called so: it has no gradient."""
    return (not torch.is_grad_enabled() and not others and kwargs.keys() <= taken and q is not None and k is not None and v is not None
            and q.dtype == k.dtype == v.dtype and (scale is None or isinstance(scale, (int, float))))


def name_of(function: Callable) -> str:
    """Empty for a function that was not added."""
    for name, known in (*_functions.items(), *_traced_as.items()):  # no lookup: dynamo cannot hash what it substitutes
        if known is function:
            return name
    return ""


def function(name: str) -> Callable:
    return _functions[name]


def takes(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the operation can call an override with these, and the function of that name."""
    return bool(name) and "transformer_options" in kwargs and _fits(_KEYWORDS | _OVERRIDES, *args, **kwargs)


def _content(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def is_tracing() -> bool:
    """A constant of what is traced."""
    return getattr(_tracing, "on", False)


@contextlib.contextmanager
def traced_as_operation() -> Iterator[None]:
    """In this thread, by torch.compile."""
    global _known_to_dynamo
    _define()
    torch.compiler.assume_constant_result(is_tracing)  # not before: imports dynamo
    for _, function, attention in _cells[_known_to_dynamo:]:
        with contextlib.suppress(ValueError):  # a sibling copy of this pack has done so
            torch.compiler.substitute_in_graph(function, skip_signature_check=True)(attention)
    _known_to_dynamo = len(_cells)
    with _operation_traced():
        yield


def is_exporting() -> bool:
    return getattr(_tracing, "exporting", False)


@contextlib.contextmanager
def _operation_traced(exporting: bool = False) -> Iterator[None]:
    before = is_tracing(), is_exporting()
    _tracing.on, _tracing.exporting = True, exporting
    try:
        yield
    finally:
        _tracing.on, _tracing.exporting = before


@contextlib.contextmanager
def called_as_operation() -> Iterator[None]:
    """In this thread, by Python: for torch.export. Other threads compute meanwhile what they always do."""
    with _operation_traced(exporting=True):
        for cell, _, attention in _cells:
            cell.cell_contents = attention
        try:
            yield
        finally:
            for cell, function, _ in _cells:
                cell.cell_contents = function


def call_operation(name, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, scale=None,
                   enable_gqa=None, low_precision_attention=None, transformer_options=None, _inside_attn_wrapper=None, numbers=()):
    """In a trace. name: of a function, or what call_override is told, with numbers."""
    return getattr(torch.ops, NAMESPACE).attention(q, k, v, heads, mask, name, name_of_precision(attn_precision), skip_reshape,
                                                   skip_output_reshape, scale, enable_gqa, low_precision_attention, numbers)


def name_of_precision(precision: torch.dtype | None) -> str:
    """For an operation: a ScalarType that AOTInductor hands to a Python op is another one there (torch 2.11)."""
    return "" if precision is None else str(precision).removeprefix("torch.")


def precision_named(name: str) -> torch.dtype | None:
    """The inverse."""
    return getattr(torch, name) if name else None


def _attention(q, k, v, heads, mask, function, attn_precision, skip_reshape, skip_output_reshape, scale, enable_gqa,
               low_precision_attention, numbers=()):
    given = {"scale": scale, "enable_gqa": enable_gqa, "low_precision_attention": low_precision_attention}
    precision = precision_named(attn_precision)
    try:
        if " " in function:
            from .attention_override import call_override
            from .replaced_attention import OPERATION, call_replaced
            given |= {"heads": heads, "mask": mask if mask is None else mask.clone(), "attn_precision": precision,
                      "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            call = call_replaced if function.startswith(OPERATION) else call_override
            return copy(call(function, (copy(q), copy(k), copy(v)), given, numbers))
        result = _functions[function](q, k, v, heads, mask=mask, attn_precision=precision, skip_reshape=skip_reshape,
                                      skip_output_reshape=skip_output_reshape,
                                      **{key: value for key, value in given.items() if value is not None})
    except Exception as error:
        keep_failure(error)
        raise
    return result.contiguous()


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """Of what another pack gets, or gives, and may keep: compiled code writes other things into that memory, once it has used it."""
    return tensor.clone(memory_format=torch.contiguous_format)


def keep_failure(error: Exception) -> None:
    """For take_failure()."""
    _tracing.failure = error


def has_failed() -> bool:
    """Whether take_failure() has one to give."""
    return getattr(_tracing, "failure", None) is not None


def take_failure() -> Exception | None:
    """What the operation has raised in this thread since the last time: the error of which AOTInductor makes another one."""
    failure = getattr(_tracing, "failure", None)
    _tracing.failure = None
    return failure


def _fake_attention(q, k, v, heads, mask, function, attn_precision, skip_reshape, skip_output_reshape, *_):
    return q.new_empty(shape_of(q, k, v, heads, skip_reshape, skip_output_reshape))


def is_as_expected(result, q, k, v, heads, *_, skip_reshape=False, skip_output_reshape=False, **others) -> bool:
    """Whether result is of the kind that the operation gives."""
    return (type(result) is torch.Tensor and result.dtype is q.dtype and result.device == q.device
            and result.shape == shape_of(q, k, v, heads, skip_reshape, skip_output_reshape))


def shape_of(q, k, v, heads, skip_reshape=False, skip_output_reshape=False) -> tuple:
    """Of the operation's result."""
    if skip_reshape:
        batch, _, tokens, _ = q.shape
        dim = v.shape[-1]
    else:
        batch, tokens = q.shape[:2]
        # Heads and dim may be two dimensions; k and v may have fewer heads.
        q_width, k_width, v_width = (math.prod(t.shape[2:]) for t in (q, k, v))
        dim = v_width // (k_width // (q_width // heads))
    return (batch, heads, tokens, dim) if skip_output_reshape else (batch, tokens, heads * dim)


def _define() -> None:
    global _library
    if _library is None and not hasattr(getattr(torch.ops, NAMESPACE), "attention"):  # else a sibling copy of this pack has
        _library = torch.library.Library(NAMESPACE, "FRAGMENT")
        _library.define("attention(Tensor q, Tensor k, Tensor v, SymInt heads, Tensor? mask, str function, str attn_precision, "
                        "bool skip_reshape, bool skip_output_reshape, float? scale, bool? enable_gqa, bool? low_precision_attention, "
                        "SymInt[] numbers=[]) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl("attention", _attention, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::attention", _fake_attention, lib=_library)


_library: torch.library.Library | None = None
