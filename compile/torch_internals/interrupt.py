"""Ends a compile that is under way. torch's compiler runs for seconds to minutes without a call of ours.

It ends as by Ctrl-C: an exception comes up in the compiling thread, between two of its instructions. What waits for a kernel's build or is
in C++ gets it when that returns.
"""
from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable

INTERVAL = 0.1  # seconds between two looks
SETTLE = 100  # turns of a loop, each of which lets a pending exception come up
RETRY_INTERVAL = 1.0  # seconds until it comes up again: a callback of the garbage collector swallows it
# What would not be done again, or leave something locked or registered by half: Python's import, torch's patterns, ends of contexts.
_IMPORT = "<frozen importlib"
_UNINTERRUPTIBLE = frozenset({"__enter__", "__exit__", "__del__", "install_callbacks", "lazy_init"})


class Interrupted(BaseException):
    """A compile was ended from outside. No Exception, which the compiler would take for an error of its own."""


@contextlib.contextmanager
def interruptible(interrupted: Callable[[], bool]):
    """What torch compiles in this context, in this thread, ends with Interrupted once interrupted() is true. It is asked in another
    thread."""
    from torch._dynamo.callback import callback_handler  # compile machinery: at the first compile, not at import

    thread, lock, over = threading.get_ident(), threading.Lock(), threading.Event()

    def begins(*_):
        if threading.get_ident() == thread:
            over.clear()
            threading.Thread(target=_watch, args=(thread, interrupted, lock, over), name="int8-compile interrupt", daemon=True).start()

    def ends(*_):
        if threading.get_ident() != thread:
            return
        try:
            with lock:
                over.set()
            # What has been raised and not come up does so here: whoever interrupts asks again after the compile. (Taking it back by
            # PyThreadState_SetAsyncExc(NULL) would leave Python 3.11 looking for it for ever, and hang it under a profiler.)
            for _ in range(SETTLE):
                pass
        except Interrupted:
            over.set()

    callback_handler.register_start_callback(begins)
    callback_handler.register_end_callback(ends)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begins)
        callback_handler.remove_end_callback(ends)


def _watch(thread: int, interrupted: Callable[[], bool], lock: threading.Lock, over: threading.Event):
    raised = -RETRY_INTERVAL
    while not over.wait(INTERVAL):
        if not interrupted() or time.monotonic() - raised < RETRY_INTERVAL:
            continue
        with lock:
            if not over.is_set() and _may_end(sys._current_frames().get(thread)):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Interrupted))
                raised = time.monotonic()


def _may_end(frame) -> bool:
    while frame is not None:
        if frame.f_code.co_name in _UNINTERRUPTIBLE or frame.f_code.co_filename.startswith(_IMPORT):
            return False
        frame = frame.f_back
    return True
