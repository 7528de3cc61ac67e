"""A CUDA driver that does nothing, so that Triton compiles and launches on a machine without a GPU, with all that its launch costs the CPU.

Tensors are the CPU's, whose device Triton counts as -1 (torch's get_device of them). For a process of its own: Triton keeps its driver.
"""
from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SOURCE = Path(__file__).with_suffix(".c")
CPU = -1
# Bytes of a kernel's parameter, by its type in a signature.
SIZES = {"*": 8, "i1": 1, "i8": 1, "i32": 4, "i64": 8, "fp32": 4}
SCRATCH = (8, 8)


class _Launch(ctypes.Structure):
    _fields_ = [("function", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("grid", ctypes.c_uint64 * 3), ("block", ctypes.c_uint64),
                ("shared", ctypes.c_uint64), ("attributes", ctypes.c_uint64), ("bytes", ctypes.c_uint64),
                ("parameters", ctypes.c_ubyte * 2048)]


class Launch(NamedTuple):
    """What the driver was given: the handle of a kernel, the raw stream, sizes, and all its parameters as bytes (descriptors whole)."""
    function: int
    stream: int
    grid: tuple[int, int, int]
    block: int
    shared: int
    attributes: int
    parameters: bytes


class Driver:
    """device: the current one. streams: the current raw stream of each, 0 if not named."""

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self._folder = tempfile.TemporaryDirectory(prefix="no_driver-")  # while the process lives
        library = Path(self._folder.name) / "libcuda.so.1"
        subprocess.run(["gcc", "-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE], check=True)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on
        self._library.launched.restype = ctypes.POINTER(_Launch)
        self._library.launch_count.restype = self._library.map_count.restype = ctypes.c_uint64
        import triton

        triton.knobs.nvidia.libcuda_path = self._folder.name
        from triton.backends.nvidia.driver import CudaDriver

        self.device, self.streams = CPU, {}
        torch.cuda.get_device_capability = lambda device=None: capability
        torch.cuda.current_device = lambda: self.device
        torch.cuda.set_device = lambda device: setattr(self, "device", device)
        torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = self._exchange
        self.triton = CudaDriver()
        self.triton.get_current_stream = lambda device: self.streams.get(device, 0)
        triton.runtime.driver.set_active(self.triton)

    def _exchange(self, device: int) -> int:
        before = self.device
        if device >= 0:
            self.device = device
        return before

    def launches(self) -> int:
        return self._library.launch_count()

    def maps(self) -> int:
        """TMA descriptors that were made."""
        return self._library.map_count()

    @contextlib.contextmanager
    def recorded(self, signature: dict[str, str]) -> Iterator[list[Launch]]:
        """A context in which the last launch is kept; the list has it afterwards. signature: of the kernel, as it was compiled."""
        sizes = []
        for kind in signature.values():
            if kind.startswith("tensordesc"):
                sizes += (128, 4, 4, 8, 8)
            elif kind != "constexpr":
                sizes.append(SIZES.get(kind[:1]) or SIZES[kind])
        sizes += SCRATCH
        self._library.parameter_sizes((ctypes.c_int * len(sizes))(*sizes), len(sizes))
        found: list[Launch] = []
        yield found
        last = self._library.launched().contents
        found.append(Launch(last.function, last.stream, tuple(last.grid), last.block, last.shared, last.attributes,
                            bytes(last.parameters[:last.bytes])))
        self._library.parameter_sizes((ctypes.c_int * 1)(), 0)
