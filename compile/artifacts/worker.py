"""The other process of a Builder. Imports nothing but Python until it says that it lives: a process that hangs at its start is noticed.

Both directions are frames: a size, and a pickle to it, JSON from it. An empty frame from it is a sign of life.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BEAT_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1  # man 2 prctl
TEMPORARY = "TMPDIR", "TEMP", "TMP"  # the variables for it of all systems
# The server's path before anything is imported: python -c looks into the current folder first. Then this pack under the name that it has
# here (ComfyUI names packs by their path), so that what is pickled is found.
_BOOT = """
import sys
sys.path[:] = {path!r}
import importlib, importlib.util
name, root = sys.argv[1:3]
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
sys.modules[name] = importlib.util.module_from_spec(spec)
importlib.import_module(name + ".compile.artifacts.worker").main(sys.argv[3], float(sys.argv[4]))
"""


def command(pack: str, root: Path, folder: Path) -> list[str]:
    """The Python of this process, with its flags: what it does not look at (-s: the user's packages) that process does not either. pack:
    the name of this pack, which is at root. folder: for its temporary files."""
    flags = subprocess._args_from_interpreter_flags()  # what multiprocessing uses, too
    if sys.version_info >= (3, 11):
        flags.append("-P")  # before that the current folder is taken off first, see _BOOT
    boot = _BOOT.format(path=[os.path.abspath(path) for path in sys.path])
    return [sys.executable, *flags, "-u", "-c", boot, pack, str(root), str(folder), str(BEAT_SECONDS)]


def send(stream, content: bytes) -> None:
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def receive(stream) -> bytes:
    """Raises EOFError where the other end was closed."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("it closed its output")
    content = stream.read(size := struct.unpack("<Q", header)[0])
    if len(content) < size:
        raise EOFError("it closed its output")
    return content


def main(folder: str, beat_seconds: float) -> None:
    """folder: for temporary files."""
    _give_way()
    _end_with_the_server()
    jobs: queue.Queue = queue.Queue()
    output = _Output(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what compilers print is no answer
    threading.Thread(target=_read, args=(os.fdopen(os.dup(0), "rb"), jobs), daemon=True).start()
    threading.Thread(target=_beat, args=(output, beat_seconds), daemon=True).start()
    setup = pickle.loads(jobs.get())
    import importlib

    # It keeps precompiled headers, 100 MB, in what is the folder for temporary files when it is imported. The rest goes with this process.
    import torch._inductor.codecache  # noqa: F401

    from ...pack import PACKAGE
    from ..torch_internals import warmup
    from .export import build

    os.environ.update(dict.fromkeys(TEMPORARY, folder))
    tempfile.tempdir = None
    sys.meta_path.append(_OtherPacks)
    failed = ""
    if setup is not None:
        module, function, arguments = setup
        try:
            getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)(*arguments)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    while True:
        try:
            job, folder = pickle.loads(jobs.get())
            warmup.prepare(job.device)
            answer = {"error": failed} if failed else {"body": build(job, Path(folder))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        output.send(json.dumps(answer).encode())


_DOT = "_x_"  # in the names that ComfyUI gives packs


class _OtherPacks:
    """Finds the modules of ComfyUI's other packs, whose classes a block may be made of. ComfyUI names a pack by its path. As of
    this pack, what starts it in a server (its __init__) is not run."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        import importlib.machinery

        for folder in (name, name.replace(_DOT, ".")) if os.path.isabs(name) else ():
            if os.path.isdir(folder):
                spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [folder]
                return spec
        return None


def _give_way() -> None:
    """To sampling, which waits at each barrier for its slowest thread: a task of lowest priority still ends its slice before a thread of
    sampling gets the core back, one of Linux's idle class does not. Its threads and processes inherit this."""
    if os.name == "posix":
        os.nice(19)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if hasattr(os, "getsid") and os.getsid(0) == os.getpid():  # a session of its own: see builder
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def _end_with_the_server() -> None:
    """What is stopped does not see that its input has ended."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # at the end of the thread that started it, which ends it itself


class _Output:
    """Thread-safe."""

    def __init__(self, stream):
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, content: bytes) -> None:
        with self._lock:
            send(self._stream, content)


def _beat(output: _Output, seconds: float):
    with contextlib.suppress(OSError):  # nobody listens any more
        while True:
            output.send(b"")
            time.sleep(seconds)


def _read(source, jobs: queue.Queue):
    """Jobs, until the other end is closed: then this process and its compilers end at once."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put(receive(source))
    sys.stderr.flush()
    if os.name == "posix":
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(0)
