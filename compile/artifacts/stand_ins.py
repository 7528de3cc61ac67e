"""What a compiled block gets in its transformer_options in the place of other packs' patches, while it is called:

- attention that a pack puts in the place of ComfyUI's, and what it puts before and behind a UNet's, is an operation (attention_override,
  replaced_attention, attention_patches), called at run time as eager calls it. So it may depend on the step and the block and keep a state;
- patches that ComfyUI calls around its blocks (FreeU, SLG, a control of double blocks) are not there: blocks do not read them.

It is right for blocks of ComfyUI's own code that hand on the transformer_options that they get: ``probe`` looks at what one does.
"""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ...pack import PACKAGE
from ..torch_internals.guard_filter import INNER_PATCHES
from ..torch_internals.settings import unknown_sizes
from . import attention, attention_patches, current_block
from .attention_override import OVERRIDE, overridden
from .origins import is_comfyuis
from .replaced_attention import ADDED, INDEX, KINDS, SHAPE, STAND_INS, as_expected, finds
from .traced_calls import not_recorded, recording
from .watched_patches import Watched

# What ComfyUI's models call before, between and after their blocks (comfy/ldm, 0.3.64 to 0.33).
OUTSIDE = {"patches": frozenset({"input_block_patch", "input_block_patch_after_skip", "middle_block_after_patch", "output_block_patch",
                                 "emb_patch", "double_block", "single_block", "post_input", "noise_refiner"}),
           "patches_replace": frozenset({"dit"})}
_ABSENT = object()
_BLOCK = ("block", 0)  # for all: which one it is nothing but a replacement reads
_UNWRITTEN = {SHAPE: (), INDEX: -1}  # there at the first block as at others, in the order in which they are written


def reach_blocks(options: dict) -> bool:
    """Whether there are patches for which nothing can stand."""
    return any(name not in OUTSIDE[key] and (key, name) not in _REPLACED for key in INNER_PATCHES for name in options.get(key) or ())


_REPLACED = {*(("patches_replace", kind) for kind in KINDS), *(("patches", kind) for kind in attention_patches.KINDS)}


def takes_stand_ins(block: torch.nn.Module) -> bool:
    """Whether it is ComfyUI's, and runs its own code: what a pack's block does with patches is not known."""
    return all(_is_known(type(module), module.__dict__.get("forward", type(module).forward)) for module in block.modules())


def _is_known(kind: type, forward: Callable) -> bool:
    return all(is_comfyuis(name) or f"{name}.".startswith(("torch.", f"{PACKAGE}."))
               for name in (kind.__module__, getattr(forward, "__module__", None) or ""))


def stand_ins(module: torch.nn.Module, options: dict, operations: bool = True) -> StandIns | None:
    """For a block that takes them. operations: compiled code may call another pack's. None where something is there for which nothing can
    stand."""
    if reach_blocks(options) or (OVERRIDE in options and not (operations and _may_be_operation(options[OVERRIDE]))):
        return None
    replaced, patched = _replacements(module, options), attention_patches.KINDS & (options.get("patches") or {}).keys()
    if replaced is None or ((replaced or patched) and not operations):
        return None
    if patched and not (_tells_its_blocks(module, options) and attention_patches.define()):
        return None
    return StandIns(options, replaced, [kind for kind in attention_patches.KINDS if kind in patched])


def _may_be_operation(override) -> bool:
    """Whether it is called in one way only. What ComfyUI's own do with a container is to free its memory sooner."""
    if override is None or not hasattr(override, "container_function"):
        return override is not None
    return is_comfyuis(getattr(override, "__module__", None) or "")


def _replacements(module: torch.nn.Module, options: dict) -> dict[str, dict[int, Callable]] | None:
    """{kind: {index of a block in module: function}}. None where module is none that tells its blocks their index."""
    given = {kind: found for kind in KINDS if (found := (options.get("patches_replace") or {}).get(kind))}
    if not given:
        return {}
    if not _tells_its_blocks(module, options):
        return None
    indices, block = range(len(module.transformer_blocks)), options["block"]
    found = {kind: {index: function for index in indices if (function := finds(functions, block, index)) is not None}
             for kind, functions in given.items()}
    return {kind: functions for kind, functions in found.items() if functions}


def _tells_its_blocks(module: torch.nn.Module, options: dict) -> bool:
    """Whether it is a UNet's transformer, by what it has and what the UNet tells it."""
    block = options.get("block")
    return bool(len(getattr(module, "transformer_blocks", ()))) and type(block) is tuple and len(block) == 2


class StandIns:
    """While it is entered, in this thread: a block with these transformer_options is called by what was compiled. kinds: of what stands.
    known: whether they may, by kinds; missing: nobody has looked. calls_operations: something of another pack is called by what is
    compiled; replaces: that is no override."""

    def __init__(self, options: dict, replaced: dict[str, dict[int, Callable]], patched: Sequence[str] = ()):
        self.options = options
        self.known: dict[frozenset, bool] = {}
        self._given = dict(options)
        self._replaced = replaced
        self._patched = {kind: options["patches"][kind] for kind in patched}
        self.replaces = bool(replaced or patched)
        self.calls_operations = self.replaces or OVERRIDE in options
        self._stood: dict = {key: _ABSENT for key in INNER_PATCHES if key in options}
        if self.replaces:
            self._stood |= {"block": _BLOCK, **_UNWRITTEN}
        if replaced:
            self._stood["patches_replace"] = {
                kind: {(*_BLOCK, index): STAND_INS[kind] for index in functions} for kind, functions in replaced.items()}
        if patched:
            self._stood["patches"] = {kind: [attention_patches.stand_in(kind, self._patched)] for kind in patched}
        if OVERRIDE in options or patched:  # attention of as many tokens as a patch gives is an operation, too
            self._stood[OVERRIDE] = overridden
        # By whose they are: how one behaves says nothing of another.
        self.kinds = frozenset((*(key for key in self._stood if key in INNER_PATCHES), *(
            (kind, _code(function)) for kind, functions in (
                (OVERRIDE, (options.get(OVERRIDE),)), *((kind, functions.values()) for kind, functions in replaced.items()),
                *self._patched.items())
            for function in functions if function is not None)))
        self._extra: dict = {}  # what the last replacement or patch got
        self._served = -1, -1  # its block's index, and its place among those of that
        self._inputs: dict[tuple, torch.Tensor] = {}  # by where and how they lie
        _put(options, self._stood)

    def __enter__(self) -> StandIns:
        current_block.enter(self)
        return self

    def __exit__(self, *_):
        current_block.leave()
        self.withdraw()

    def settings(self, tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager:
        """While what was compiled is called with these tensors, and may be compiled."""
        if not (self._patched and self._stood):
            return contextlib.nullcontext()
        self._inputs = {_place_of(tensor): tensor for tensor in tensors if type(tensor) is torch.Tensor and tensor.numel()}
        return unknown_sizes()

    def given(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The block's own input that tensor is: a patch may write into it, and what comes after reads that."""
        return self._inputs.get(_place_of(tensor))

    def _show(self, options: dict) -> dict:
        """Puts what was given where something stands; what that was."""
        shown = {key: value for key, value in self._stood.items() if options.get(key, _ABSENT) is value}
        _put(options, {key: self._given.get(key, _ABSENT) for key in shown})
        return shown

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """While other code than the block's runs."""
        shown = self._show(self.options)
        try:
            yield
        finally:  # what it has taken away, or put another in its place, stays so
            _put(self.options, {key: value for key, value in shown.items()
                                if self.options.get(key, _ABSENT) is self._given.get(key, _ABSENT)})

    def withdraw(self) -> None:
        """The options are as they were given, but for what was written since. In their order: who goes through them sees it."""
        self._show(self.options)
        now = dict(self.options)
        self.options.clear()
        self.options.update({key: now[key] for key in (*self._given, *now) if key in now})
        self._stood = {}

    def distrust(self) -> None:
        """What stood was not right."""
        self.known[self.kinds] = False

    def _told(self) -> tuple[str, ...]:
        """The keys of what a block may write into its options: an operation is told what."""
        return (INDEX, SHAPE) if self.replaces else ()

    def is_unchanged(self, before: dict) -> bool:
        """Whether the block has written nothing else into its options, which were as before."""
        return not self.calls_operations or _is_same(self.options, before, but=(OVERRIDE, *self._told()))

    def call(self, function: Callable, args: tuple, kwargs: dict):
        """The override's result. It finds itself, and other patches, where they were put."""
        given = kwargs.get("transformer_options")
        if isinstance(given, dict) and given is not self.options:
            self._show(given)  # a copy
        with self._shown():
            return self._given[OVERRIDE](function, *args, **kwargs) if OVERRIDE in self._given else function(*args, **kwargs)

    def call_successor(self, call: Callable, args: tuple, kwargs: dict):
        """The result of what the override has left in its place."""
        with self._shown():
            return call(*args, **kwargs)

    def call_replacement(self, kind: str, tensors: tuple, written: dict):
        """Its result. written: what the block adds to the options that it hands on."""
        extra = self._extra_options(kind, written)
        return self._replaced[kind][written[INDEX]](*tensors, extra)

    def call_patches(self, kind: str, tensors: tuple, written: dict):
        """The result of those of that kind, one after the other."""
        return attention_patches.call_all(self._patched[kind], tensors, self._extra_options(kind, written))

    def _extra_options(self, kind: str, written: dict) -> dict:
        """One for all of a block."""
        place, (index, last) = attention_patches.ORDER.index(kind), self._served
        if place <= last or index != written[INDEX]:  # another block's
            self._extra = {key: value for key, value in self._given.items() if key not in INNER_PATCHES} | written
        self._served = written[INDEX], place
        return self._extra

    def probe(self, call: Callable):
        """call(): a block is called as it is, and what it reads and hands on is looked at, for known. Nothing stands any more then."""
        told = (*self._told(), *ADDED)
        options, fits = self.options, True
        self.withdraw()
        before = dict(options)

        def doubt(is_right: bool) -> None:
            nonlocal fits
            fits = fits and is_right

        def overriding(function, *args, **kwargs):
            doubt(kwargs.get("transformer_options") is options and _is_same(options, before, but=(*put,)))
            with not_recorded():
                result = self.call(function, args, kwargs)
            doubt(attention.is_as_expected(result, *args, **kwargs))
            return result

        left: tuple = None, {}  # a block's options, and what the last of its patches has left in them

        def handing_on(call, extra, *given):
            nonlocal left
            doubt(extra.keys() >= {*self._told(), *ADDED} and _is_same(
                extra, left[1] if left[0] is extra else before, but=(*told, *INNER_PATCHES)))
            with not_recorded():
                result = call(*given, extra)
            left = extra, dict(extra)
            return result

        def replacing(function, index, q, k, v, extra):
            self._show(extra)
            found = dict(extra)
            doubt(found.get(INDEX) == index and type(found.get(SHAPE)) is list)
            result = handing_on(function, extra, q, k, v)
            doubt(as_expected(result, q, k, v, found.get("n_heads", 1)) is not None)
            return result
        shapes: dict = {}

        def patching(kind, *arguments):
            *given, extra = arguments
            result = handing_on(functools.partial(attention_patches.call_all, self._patched[kind], given), extra)
            doubt(attention_patches.fits(kind, result, given, shapes, self._patched))
            return result
        put: dict = {key: Watched(before[key], OUTSIDE[key], doubt) for key in INNER_PATCHES if isinstance(before.get(key), dict)}
        for kind in self._patched:
            put["patches"][kind] = [functools.partial(patching, kind)]
        if OVERRIDE in before:
            put[OVERRIDE] = overriding
        for kind, functions in self._replaced.items():
            put["patches_replace"].update({kind: {**before["patches_replace"][kind], **{
                (*before["block"], index): functools.partial(replacing, function, index) for index, function in functions.items()}}})
        self._stood = put
        _put(options, put)
        try:
            with recording() as found:
                result = call()
            doubt(found.is_comfyuis())  # other code may ask for what is not there
            if self.calls_operations:
                doubt(_is_same(options, before, but=(*told, *put)))
            self.known[self.kinds] = fits
            return result
        finally:
            self.withdraw()


def _place_of(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _code(function):
    return getattr(function, "__code__", type(function))


def _put(options: dict, values: dict) -> None:
    for key, value in values.items():
        if value is _ABSENT:
            options.pop(key, None)
        else:
            options[key] = value


def _is_same(one: dict, other: dict, but: Iterable = ()) -> bool:
    keys = one.keys() - but
    return keys == other.keys() - but and all(one[key] is other[key] for key in keys)
