"""What every compile needs first, done in the background while the checkpoint loads: the compiler's imports (2 s), and on a CPU the
probe of its vector instructions (12 s as torch does it) and the precompiled header of its kernels (5 s, once a machine)."""
from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from ...int8.files import system
from ...int8.files.folders import make_folders
from ...int8.files.owners import CacheError, require_folder
from .interrupt import INTERVAL, Interrupted

logger = logging.getLogger(__name__)

_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* x) { x[0] = 1.0f; }
"""
_lock = threading.Lock()
# device type -> set when a compile can begin, and at the end
_ready: dict[str, threading.Event] = {}
_over: dict[str, threading.Event] = {}


def start(device_type: str) -> None:
    """Begins, once a process and device type. Whatever fails here fails again, and is reported, when a model compiles."""
    with _lock:
        if device_type in _ready:
            return
        ready, over = _ready[device_type], _over[device_type] = threading.Event(), threading.Event()
    threading.Thread(target=_run, args=(device_type, ready, over), name="int8-compile warm-up", daemon=True).start()


def wait(interrupted: Callable[[], bool], entirely: bool = False) -> None:
    """Until what was begun can be used: a compile in its midst would do the same work a second time. The header is not waited for
    (tracing goes on beside the C++ compiler) but entirely. Raises Interrupted once interrupted() is true."""
    for ready in list((_over if entirely else _ready).values()):
        while not ready.wait(INTERVAL):
            if interrupted():
                raise Interrupted


def _run(device_type: str, ready: threading.Event, over: threading.Event):
    try:
        prepare(device_type)
        ready.set()
        if device_type == "cpu":
            _build_header()
    except Exception as error:
        logger.debug("warm-up: %s: %s", type(error).__name__, error)
    finally:
        ready.set()
        over.set()


def prepare(device_type: str) -> None:
    """The imports and, on a CPU, the probe. Raises CacheError as require_own_cache."""
    require_own_cache()
    import torch._inductor.compile_fx

    if device_type == "cpu":
        _probe_vector_instructions()
    else:
        import torch._inductor.runtime.triton_heuristics  # noqa: F401


def require_own_cache() -> None:
    """Makes the folder in which torch keeps its headers, and what it compiles and loads: for this user only, whatever the umask. Raises
    CacheError where it is another user's, as anybody can make it in /tmp before this one does."""
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    folder = Path(default_cache_dir())
    make_folders(folder)
    if not system.IS_POSIX:  # Windows has such a folder for each user
        return
    try:
        require_folder(folder)
        require_folder(Path(os.path.realpath(folder)))
    except CacheError:
        raise CacheError(f"{folder}, where torch keeps compiled code, belongs to another user or can be written by others: delete it, or "
                         "set TMPDIR to a folder of your own") from None


def _probe_vector_instructions():
    """Answers torch._inductor.cpu_vec_isa's question, cached in this process, without its five new Python processes.

    torch compiles a test kernel for each instruction set, to see that compiler, processor and libtorch all know it. The two latter are
    known: libtorch chose the set by itself. The compiler is asked without linking and loading.
    """
    from torch._inductor import config, cpu_vec_isa

    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" or (capability == "AVX2" and not torch.cpu._is_avx512_supported()):
        with config.patch({"cpp.vec_isa_ok": True}), mock.patch.object(cpu_vec_isa.VecISA, "check_build", _compiles):
            cpu_vec_isa.valid_vec_isa_list()


def _compiles(isa, code: str) -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = [get_cpp_compiler(), *isa._arch_flags.split(), "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=code.encode(), capture_output=True).returncode == 0


def _build_header():
    """By a kernel of no use: every real one then finds its header compiled."""
    from torch._inductor.async_compile import AsyncCompile

    kernel = AsyncCompile().cpp_pybinding(["float*"], _KERNEL)
    if hasattr(kernel, "result"):
        kernel.result()
