"""Launches of Triton kernels without what Triton finds out anew at each of them: types and alignments of the operands, constants, options.

The caller has one Bound for each of what Triton compiles apart. Whatever a Bound is not sure of, Triton launches itself.
"""
from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable

import torch
import triton

logger = logging.getLogger(__name__)

# Bytes that an address is a multiple of, or Triton compiles another kernel.
POINTER_ALIGNMENT = 16
# TMA descriptors that are kept of a kernel: weights of one shape, and where the allocator has put q.
MAX_DESCRIPTORS = 1024
# What a launcher that Triton 3.6 generates takes before the kernel's own arguments.
ARGUMENTS = "iiiKKppOOOOOO"


class Address(int):
    """An address in the place of the tensor there, which is not kept alive by it."""

    data_ptr = int.__int__


def is_watched(kernel) -> bool:
    """Whether somebody wants to know of each launch, as profilers do, or changes what is compiled."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks or runtime.debug
                or getattr(triton.knobs.compilation, "instrumentation_mode", "")
                or getattr(runtime, "add_stages_inspection_hook", None))


class Bound:
    """A kernel on one device, with its constants and options. What differs between its calls is nothing that Triton compiles apart: the
    addresses of operands of the same types, and numbers that it is told not to specialise or that have the same type and divisibility by
    16, and are 1 or are not. describe: of the first operands, which the kernel reads through TMA: the descriptor of a tensor.

    The first call goes through Triton, and so does each with an operand at an odd address, or while somebody hooks into launches.
    """

    def __init__(self, kernel, constants: dict, describe: tuple[Callable[[torch.Tensor], object], ...] = ()):
        self._kernel, self._constants, self._describe = kernel, constants, describe
        # Not in the interpreter; AMD's launcher is another one.
        self._may_bind = isinstance(kernel, triton.JITFunction) and not torch.version.hip
        # (grid of three, stream, arguments), once bound.
        self._launch: Callable | None = None
        self._compiled: object = None
        self._device = -1
        self._current_device: Callable = int
        self._current_stream: Callable = int
        # By index, address and rows of a dense operand: all that its descriptor says that another one's does not, so that none can be out
        # of date.
        self._descriptors: dict[tuple[int, int, int], tuple] = {}
        self._encode: tuple[tuple[Callable, Callable], ...] = ()

    def __call__(self, grid: tuple[int, int, int], operands: tuple[torch.Tensor, ...], *numbers: int | float) -> None:
        """Launches the kernel on the current stream of the first operand's device. operands: dense, all on that device."""
        launch = self._launch
        if launch is None or is_watched(self._kernel):
            return self._by_triton(grid, operands, numbers)
        device = self._device
        addresses, together = [], 0
        for operand in operands:
            if operand.get_device() != device:
                return self._by_triton(grid, operands, numbers)
            address = operand.data_ptr()
            together |= address
            addresses.append(address)
        if together % POINTER_ALIGNMENT:
            return self._by_triton(grid, operands, numbers)
        arguments = addresses
        if self._describe:
            arguments = []
            for index in range(len(self._describe)):
                key = index, addresses[index], operands[index].shape[0]
                arguments += self._descriptors.get(key) or self._descriptor(key, operands[index])
            arguments += addresses[len(self._describe):]
        try:
            if self._current_device() == device:
                launch(grid, self._current_stream(device), *arguments, *numbers)
            else:
                with torch.cuda.device(device):
                    launch(grid, self._current_stream(device), *arguments, *numbers)
        except TypeError as error:  # nothing has run: that is not what this Triton's launcher takes
            self._give_up(error)
            self._by_triton(grid, operands, numbers)

    def _by_triton(self, grid, operands, numbers) -> None:
        descriptors = [describe(operand) for describe, operand in zip(self._describe, operands)]
        with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
            compiled = self._kernel[grid](*descriptors, *operands[len(descriptors):], *numbers, **self._constants)
        if self._launch is not None or not self._may_bind:
            return
        device = operands[0].get_device()
        if any(operand.data_ptr() % POINTER_ALIGNMENT or operand.get_device() != device for operand in operands):
            return
        try:
            if not is_watched(self._kernel):
                self._bind(compiled, device, descriptors)
        except Exception as error:  # another Triton, whose kernels are launched otherwise
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._launch, self._may_bind = None, False
        logger.debug("INT8: Triton launches %s each time: %s: %s", self._kernel, type(error).__name__, error)

    def _bind(self, compiled, device: int, descriptors: list) -> None:
        names = [name for name in self._kernel.arg_names if name in self._constants]
        if self._kernel.arg_names[-len(names):] != names:
            raise ValueError("constants come before other parameters")
        constants = tuple(self._constants[name] for name in names)
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        direct = generated_launcher(run, len(self._describe))
        if direct is None:
            def launch(grid, stream, *arguments):
                run(*grid, stream, function, packed, None, None, None, *arguments, *constants)
            encoders = [_without_tensor] * len(self._describe)
        else:
            launcher, encoders = direct
            flags = run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None

            def launch(grid, stream, *arguments):
                launcher(*grid, stream, function, *flags, *arguments, *constants)
        self._encode = tuple(zip(self._describe, encoders))
        for encode, descriptor in zip(encoders, descriptors):
            encode(descriptor)  # may be another function in another Triton
        active = triton.runtime.driver.active
        self._current_device, self._current_stream = active.get_current_device, active.get_current_stream
        self._compiled = compiled  # unloads its module when it goes
        self._device, self._launch = device, launch

    def _descriptor(self, key: tuple[int, int, int], operand: torch.Tensor) -> tuple:
        """What the launch takes for an operand that is read through TMA."""
        describe, encode = self._encode[key[0]]
        made = tuple(encode(describe(operand)))
        if len(self._descriptors) >= MAX_DESCRIPTORS:
            self._descriptors.clear()
        self._descriptors[key] = made
        return made


def generated_launcher(run, descriptors: int) -> tuple[Callable, list[Callable]] | None:
    """(the function in C that Triton has generated for a kernel's types, what turns each descriptor into arguments of it); None where this
    Triton's launcher is another one. Triton's own way to it encodes every descriptor anew."""
    from triton.backends.nvidia import driver

    if getattr(driver, "_BASE_ARGS_FORMAT", "") != ARGUMENTS or run.global_scratch_size or run.profile_scratch_size:
        return None
    if not descriptors:
        return (run.launch, []) if inspect.isbuiltin(run.launch) else None
    if not inspect.isfunction(run.launch):
        return None
    inner = inspect.getclosurevars(run.launch).nonlocals
    launcher, metadata = inner.get("launcher"), inner.get("tensordesc_meta")
    if not inspect.isbuiltin(launcher) or not metadata or len(metadata) != descriptors or not all(metadata):
        return None
    return launcher, [functools.partial(_encoded, driver.make_tensordesc_arg, each) for each in metadata]


def _encoded(encode: Callable, metadata: dict, descriptor) -> list:
    return encode(descriptor, metadata)


def _without_tensor(descriptor) -> list:
    """The descriptor with an address in the place of its tensor."""
    bare = copy.copy(descriptor)
    bare.base = Address(descriptor.base.data_ptr())
    return [bare]
