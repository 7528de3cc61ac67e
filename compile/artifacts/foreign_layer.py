"""A layer of another pack (a GGUF Linear) as an operation of compiled code: it is called at run time, as eager calls it.

Its weight is a tensor of a class of its own, with the LoRA as an attribute: traced, each LoRA and each strength would be another graph, and
nothing could be kept. Which layer is meant the operation is told by a tensor that the layer owns, its tag: compiled code hands tensors on.
"""
from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...int8.artifact_layer import FOREIGN
from .attention import NAMESPACE, is_tracing, keep_failure

_LAYERS: weakref.WeakValueDictionary[int, ForeignLayer] = weakref.WeakValueDictionary()  # address of the tag -> layer
_calls = threading.local()
# What a call of a layer runs: another pack may put its own in their place.
_MODULE = torch.nn.Module
_CALL = _MODULE.__call__, _MODULE._call_impl


class ForeignLayer(torch.nn.Module):
    """What stands before the class of the other pack's layer, see beside(). It takes x [..., in_features] and gives [..., out_features] of
    the same dtype: what does not is an error at run time."""

    in_features: int
    out_features: int

    def forward(self, input, *args, **kwargs):
        # The operation has no gradient, and other compilers than this pack's trace the layer as they find it.
        if args or kwargs or not torch.compiler.is_compiling() or not is_tracing() or torch.is_grad_enabled():
            if getattr(_calls, "unwatched", False):
                with _disable_current_modes():
                    return super().forward(input, *args, **kwargs)
            return super().forward(input, *args, **kwargs)
        return call_operation(input, vars(self)[FOREIGN]["tag"], self.out_features)

    def __setstate__(self, state):
        """Of a copy: it has a tag of its own."""
        super().__setstate__(state)
        _add(self, vars(self)[FOREIGN]["tag"].clone())

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def is_on(self, device: torch.device) -> bool:
        """Whether its tag is."""
        return vars(self)[FOREIGN]["tag"].device == device

    def artifact_tensors(self) -> dict[str, torch.Tensor]:
        """None while something stands between a call of the layer and its class's forward."""
        if ("forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks or type(self).forward is not ForeignLayer.forward
                or (_MODULE.__call__, _MODULE._call_impl) != _CALL):
            return {}
        return vars(self)[FOREIGN]

    def artifact_constants(self) -> tuple:
        return self.in_features, self.out_features

    def artifact_replacement(self) -> tuple:
        return ForeignArtifactLayer, (self.in_features, self.out_features)


class ForeignArtifactLayer(torch.nn.Module):
    """The layer in a process that has neither the weights nor the other pack. Buffer: tag."""

    # What ComfyUI asks of a Linear before it multiplies past forward: it then does not.
    weight = None
    weight_function = bias_function = ()
    _full_precision_mm = True
    comfy_cast_weights = comfy_force_cast_weights = False

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        _define()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("tag", torch.empty(0))  # the real one comes with each call

    def artifact_tensors(self) -> dict[str, torch.Tensor]:
        return {"tag": self.tag}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return call_operation(input, self.tag, self.out_features)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """In this thread, a mode that sees each operation does not see those inside such layers: GGUF's tensors fail under one, and compiled
    code calls the layers as eager does."""
    before, _calls.unwatched = getattr(_calls, "unwatched", False), True
    try:
        yield
    finally:
        _calls.unwatched = before


def beside(layer: torch.nn.Module, kind: type[ForeignLayer], device: torch.device) -> ForeignLayer:
    """A layer of kind, a subclass of (ForeignLayer, type(layer)), of the same state as layer, whoever of the two it is set on: what a host
    notes on a layer that it loads stays true whichever is in its place. device: on which its tag lies."""
    _define()
    result: ForeignLayer = object.__new__(kind)
    object.__setattr__(result, "__dict__", layer.__dict__)
    _add(result, torch.zeros(1, dtype=torch.uint8, device=device))
    return result


def _add(layer: ForeignLayer, tag: torch.Tensor) -> None:
    layer.__dict__[FOREIGN] = {"tag": tag}
    _LAYERS[tag.data_ptr()] = layer


def call_operation(x: torch.Tensor, tag: torch.Tensor, out_features: int) -> torch.Tensor:
    return getattr(torch.ops, NAMESPACE).foreign_layer(x, tag, out_features)


def _foreign_layer(x: torch.Tensor, tag: torch.Tensor, out_features: int) -> torch.Tensor:
    layer = _LAYERS.get(tag.data_ptr())
    if layer is None:
        raise RuntimeError("a layer of another pack is not there any more")
    try:
        result = layer.run(x)
    except Exception as error:
        keep_failure(error)
        raise
    if type(result) is not torch.Tensor or result.dtype is not x.dtype or result.shape != (*x.shape[:-1], out_features):
        raise RuntimeError(f"{type(layer).__name__}, another pack's layer, gave another kind of result than a Linear's")
    return result.contiguous()


def _fake_foreign_layer(x: torch.Tensor, tag: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _define() -> None:
    global _library
    if _library is None and not hasattr(getattr(torch.ops, NAMESPACE), "foreign_layer"):  # else a sibling copy of this pack has
        _library = torch.library.Library(NAMESPACE, "FRAGMENT")
        _library.define("foreign_layer(Tensor x, Tensor tag, SymInt out_features) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl("foreign_layer", _foreign_layer, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::foreign_layer", _fake_foreign_layer, lib=_library)


_library: torch.library.Library | None = None
