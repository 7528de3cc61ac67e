"""cpu_native.cpp, compiled for this processor at its first use and kept on disk, signed. Without a C++ compiler torch does the work."""
from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from ..echo import without_commands, writable
from ..files.folders import make_folder
from ..files.owners import CacheError
from ..files.private_load import load_privately
from ..files.signed import default_key_file, read_signed, signing_key, write_signed
from ..files.temporary import Sweeper, temporary_folder
from ..files.user_folder import user_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_native.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=off")
TIMEOUT = 120  # seconds for a compiler run
_LOCK = threading.Lock()


class Normed(ctypes.Structure):
    """Normed in cpu_native.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("mean", "rstd", "weight", "bias", "factor", "shift")] + [
        (name, ctypes.c_int64) for name in ("rows_of_factor", "rows_of_shift")]


def _compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else ("g++", "clang++", "c++")
    return next((path for name in names if (path := shutil.which(name))), None)


def _openmp_of_torch() -> str | None:
    """The OpenMP library that torch has loaded into this process: a second one would fight with its threads for the cores."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return None
    paths = {line.split()[-1] for line in lines if line.endswith((".so", ".so.1", ".so.5"))}
    return next((p for p in sorted(paths) if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))), None)


def cache_folder() -> Path:
    """Where what was built and measured for this machine is kept: INT8_COMPILE_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get("INT8_COMPILE_CACHE_DIR")
    return Path(chosen) if chosen else user_folder("XDG_CACHE_HOME", ".cache") / "int8-compile"


def _processor() -> str:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _build(compiler: str, openmp: str | None) -> bytes:
    """The library. Raises OSError, SubprocessError."""
    try:
        return _build_in(_folder(), compiler, openmp)
    except (CacheError, OSError, subprocess.SubprocessError):  # a full disk
        return _build_in(Path(tempfile.gettempdir()), compiler, openmp)


def _build_in(place: Path, compiler: str, openmp: str | None) -> bytes:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with temporary_folder(place) as folder:
        built, linked = folder / "kernel.o", folder / "kernel.so"
        compile_ = [compiler, "-c", *FLAGS, native, *(["-fopenmp"] if openmp else []), str(SOURCE), "-o", str(built)]
        link = [compiler, "-shared", str(built), *([openmp] if openmp else []), "-o", str(linked)]
        for command in (compile_, link):  # the compiler's own temporary files go with the folder
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT,
                           env={**os.environ, "TMPDIR": str(folder)})
        return linked.read_bytes()


def _folder() -> Path:
    """Raises CacheError, OSError where nothing can be kept."""
    folder = Path(os.path.abspath(cache_folder() / "native"))
    make_folder(folder)
    Sweeper().sweep(folder.iterdir())
    return folder


def _kept_or_built(compiler: str, openmp: str | None, name: str) -> bytes:
    """The library as this user has kept it under that name; else built, and kept if that can be. Raises OSError, SubprocessError."""
    try:
        key = signing_key(default_key_file(), cache_folder())
        path = _folder() / f"{name}-{hashlib.sha256(key).hexdigest()[:8]}.so"
    except (CacheError, OSError) as error:
        logger.warning("INT8: the CPU kernels are built anew at every start: %s", error)
        return _build(compiler, openmp)
    try:
        return read_signed(path, key)
    except (CacheError, OSError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("INT8: the CPU kernels that were kept are not used, and built again: %s", error)
    library = _build(compiler, openmp)
    try:
        write_signed(path, library, key)
    except (CacheError, OSError) as error:
        logger.warning("INT8: the CPU kernels are built anew at every start: %s", error)
    return library


@functools.cache
def _load() -> ctypes.CDLL | None:
    compiler = _compiler()
    if os.name != "posix" or compiler is None:
        logger.info("INT8: no C++ compiler found, so rows are quantized by torch: slower on the CPU. Install g++ to change that.")
        return None
    openmp = _openmp_of_torch()
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=TIMEOUT, text=True,
                                 errors="replace").stdout
        name = hashlib.sha256("\0".join((SOURCE.read_text(), version, _processor(), str(openmp), *FLAGS)).encode()).hexdigest()[:20]
        content = _kept_or_built(compiler, openmp, name)
        library = load_privately({"kernel.so": content}, lambda folder: ctypes.CDLL(str(folder / "kernel.so")),
                                           cache_folder() / "native", lasting=False)
    except (OSError, CacheError, UnicodeError, subprocess.SubprocessError) as error:
        cause = writable(without_commands((getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]))
        logger.warning("INT8: %s could not build the CPU kernels, so rows are quantized by torch: slower. %s", compiler, cause)
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.int8c_quant_rows.argtypes = [pointer, number, size, size, size, pointer, number, number, pointer, ctypes.c_float, pointer,
                                         pointer]
    library.int8c_epilogue.argtypes = [pointer, size, size, pointer, pointer, size, pointer, pointer, pointer, size, size, pointer, number]
    library.int8c_gemm.argtypes = [pointer, pointer, size, size, size, pointer]
    library.int8c_quant_rows.restype = library.int8c_epilogue.restype = library.int8c_gemm.restype = None
    library.int8c_has_gemm.argtypes, library.int8c_has_gemm.restype = [], number
    return library


def library() -> ctypes.CDLL | None:
    """The compiled library, built at the first call (a second or two); None where it cannot be."""
    with _LOCK:
        return _load()
