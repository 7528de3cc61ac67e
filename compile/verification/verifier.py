"""Whether what was compiled gives on this machine what eager gives: seen at its first run, at every new size, and now and then.

Before the compiled call the block is called eager with copies of its arguments, see second_run. Beyond what rounding explains (see
difference) the block's region runs eager from then on, and eager's result is the one that is used.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...int8.artifact_layer import has_artifact_tensors
from ..arguments import tensors_in
from ..artifacts import key as cache_key
from ..artifacts.loaded import Seen
from ..errors import is_out_of_memory
from ..events import Events
from ..options import CompileOptions
from .difference import Difference, coarsest, is_right, own_rounding
from .quantization import QuantizationError, quantization_error
from .second_run import CallCopy, Unverifiable, is_same, weights_in
from .state import nothing_left

logger = logging.getLogger(__name__)

AGAIN = 1000  # steps of a model, after which a block of each region is looked at again
_LATER = 20  # steps without a look after one for which there was no memory
_EXACTLY = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class VerificationOptions:
    """always: looks at every call of every block. record: keeps a failure for whoever hunts it; what it returns says where, empty where it
    does not."""

    always: bool = False
    record: Callable[[Failure], str] = lambda failure: ""


@dataclass
class Failure:
    """What was compiled was wrong. difference: of its result, relative; in_roundings: in roundings of dtype. inputs: dtypes and sizes.
    machine: versions and hardware."""

    region: str
    kind: str
    dtype: str
    difference: float
    worst_row: float
    in_roundings: float
    quantized: bool
    inputs: list[str]
    machine: dict


class Verification:
    """Of the regions of one model on one device. events: where what is seen is said."""

    def __init__(self, device: torch.device, options: VerificationOptions, events: Events, compile_options: CompileOptions):
        self._each_size = compile_options.compiles_each_size
        self._device = device
        self._options = options
        self._events = events
        self._passthrough: Callable[[Exception], bool] = bool
        self._situation: tuple = ()
        self._turn = 0
        self._weights: object = None
        self._has_int8 = False
        self._costs: dict[object, dict[str, QuantizationError]] = {}  # by weights and region
        self._measured: set[tuple] = set()  # (turn, region) that were compared with float
        self._skip = 0  # so many calls that are due are not looked at
        self._not_before = 0
        self._step = 0

    def begin(self, step: int, blocks: int, passthrough: Callable[[Exception], bool], args: tuple, kwargs: dict,
              weights: object = None) -> None:
        """At the first block of a step, which is called with args and kwargs. passthrough: see CompiledModule.run. weights: which they
        are (an identity; equal while they are the same)."""
        self._step, self._passthrough = step, passthrough
        if weights != self._weights:  # INT8 costs others something else
            self._weights = weights
            self._measured.clear()
            if len(self._costs) > 100:
                self._costs.clear()
            self._events.quantization(self._costs.get(weights, {}))
        turn = step // AGAIN
        if turn != self._turn:
            self._turn, self._skip = turn, 7 * turn % blocks  # another block than the first
        sizes = [tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        sizes = sizes if self._each_size else [tuple(map(int.bit_length, shape)) for shape in sizes]
        self._situation = turn, weights if self._has_int8 else None, *sizes

    def is_due(self, compiled: Seen) -> bool:
        """Whether this call of it is to be looked at."""
        if self._situation in compiled.seen_right and not self._options.always:
            return False
        if self._step < self._not_before:
            return False
        if self._options.always or self._situation[1:] not in compiled.seen_right:
            return True
        self._skip -= 1
        return self._skip < 0

    def call(self, compiled: Seen, kind: str, region: str, module: torch.nn.Module, args: tuple, kwargs: dict, run: Callable,
             distrust: Callable[[str], Any]):
        """run()'s result, that of the block's call by what was compiled; eager's where that is wrong, of which distrust is told."""
        self._events.report.checks += 1
        try:
            look = _Look(module, args, kwargs, self._device, any(map(has_artifact_tensors, module.modules())))
        except Exception as error:  # run() raises what is the model's own
            if self._passthrough(error) and not is_out_of_memory(error):
                raise
            self._could_not(compiled, region, error)
            return run()
        done = not look.quantized or self._compare_with_float(region, look)
        result = run()
        try:
            right, apart = look.compare(result)
        except Exception as error:
            if self._passthrough(error) and not is_out_of_memory(error):
                raise
            self._could_not(compiled, region, error)
            return result
        in_roundings = apart.total / own_rounding(look.dtype)
        name = str(look.dtype).removeprefix("torch.")
        if right:
            if len(compiled.seen_right) > 1000:
                compiled.seen_right.clear()
            if done:
                compiled.seen_right.update((self._situation, self._situation[1:]))
            self._events.checked(region, name, in_roundings)
            return result
        machine = cache_key.machine_without_paths(self._device)
        card = machine.get("gpu") or machine["processor"]
        inputs = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors_in((args, kwargs))]
        failure = Failure(region, kind, name, apart.total, apart.worst, in_roundings, look.quantized, inputs[:64], machine)
        reason = (f"{region}: what was compiled computes something else than the model (difference {apart.total:.1e}, {in_roundings:.0f} "
                  f"times {name}'s own rounding; torch {torch.__version__}, {card}). The model's own result was used, and it "
                  'runs uncompiled from now on. The option {"emulate_precision_casts": true} or another backend may help.')
        distrust(reason)
        self._events.fall_back(reason)
        if where := self._options.record(failure):
            logger.warning("Versions, sizes and figures of it, and nothing of your prompt, are in %s: please add that to a report.", where)
        return look.as_eager()

    def _compare_with_float(self, region: str, look: _Look) -> bool:
        """Once for the same weights in a turn: what INT8 costs the block, said in the report. False: there was no memory for it."""
        if not self._has_int8:
            self._has_int8 = True
            self._situation = self._situation[0], self._weights, *self._situation[2:]
        if (self._turn, region) in self._measured:
            return True
        try:
            found = look.quantization_error()
        except Exception as error:
            if is_out_of_memory(error):
                self._not_before = self._step + _LATER
                return False
            if self._passthrough(error):
                raise
            logger.info("INT8 is not compared with float in %s: %s", region, error)
        else:
            if found is not None:
                costs = self._costs.setdefault(self._weights, {})
                costs[region] = found
                self._events.quantization(costs)
        self._measured.add((self._turn, region))
        return True

    def _could_not(self, compiled: Seen, region: str, error: Exception) -> None:
        if is_out_of_memory(error):
            self._not_before = self._step + _LATER
            self._events.fall_back(f"There was no memory to check {region} against eager: tried again later.")
            return
        compiled.seen_right.update((self._situation, self._situation[1:]))  # not to ask again
        logger.info("%s is not checked against eager: %s", region, error)


class _Look:
    """One block's call, computed eager without a trace."""

    def __init__(self, module: torch.nn.Module, args: tuple, kwargs: dict, device: torch.device, quantized: bool):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            raise Unverifiable("gradients are wanted")
        self.quantized = quantized
        self._module, self._device = module, device
        self._given = args, kwargs
        self._copy = CallCopy(args, kwargs)
        with nothing_left(module, device) as trace:
            self.expected = module._call_impl(*self._copy.args, **self._copy.kwargs)
        self._outputs = list(tensors_in(self.expected))
        dtype = coarsest({*trace.dtypes, *(tensor.dtype for tensor in self._outputs)})
        if dtype is None:
            raise Unverifiable("its result is not floating-point")
        self._decides = trace.decides
        self.dtype = dtype
        self._may_be_repeated = not trace.is_left and is_same(self._given, (self._copy.args, self._copy.kwargs))

    def quantization_error(self) -> QuantizationError | None:
        """Of the block's INT8 layers, before the call itself has written into its arguments; None where there are no float weights."""
        return quantization_error(self._module, *self._given, self._outputs, self._device)

    def as_eager(self):
        """Eager's result, after what it has written into the arguments."""
        return self._copy.write_back(self.expected)

    def compare(self, result) -> tuple[bool, Difference]:
        """Of the compiled call's result, and of what it has written into its arguments."""
        written, expected = list(tensors_in(self._given)), list(tensors_in((self._copy.args, self._copy.kwargs)))
        return is_right([*tensors_in(result), *written], [*self._outputs, *expected], self.dtype, self.quantized, self._computed_exactly,
                        self._decides)

    def _computed_exactly(self) -> list[torch.Tensor] | None:
        dtype = _EXACTLY.get(self.dtype)
        if not self._may_be_repeated or dtype is None or (dtype is torch.float64 and self._device.type == "mps"):
            return None
        try:
            exact = CallCopy(*self._given, dtype=dtype)
            with nothing_left(self._module, self._device), weights_in(self._module, dtype):
                result = self._module._call_impl(*exact.args, **exact.kwargs)
        except Exception as error:
            if not isinstance(error, (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)):
                raise
            return None  # no memory for it, or an attention or a layer that takes no such dtype
        return [*tensors_in(result), *tensors_in((exact.args, exact.kwargs))]
