"""torch's process-wide settings, set for the time of a call and put back afterwards."""
from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from .absent import absent_values
from .membership import asked_of_numbers


class _Scope:
    """The settings of all calls under way: the first sets them, a later one sets more where it has a higher level, the last puts
    back what was there. A scope for each call would put back another's values when two threads (two GPUs) leave out of order."""

    def __init__(self, patch: Callable[[int], contextlib.AbstractContextManager]):
        self._patch = patch
        self._lock = threading.Lock()
        self._depth = 0
        self._level = 0
        self._stack: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def __call__(self, level: int = 0):
        with self._lock:
            if not self._depth:
                self._stack, self._level = contextlib.ExitStack(), -1
            if level > self._level:
                self._stack.enter_context(self._patch(level))
                self._level = level
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._stack.close()
                    self._stack = None


@contextlib.contextmanager
def _patch(limit: int):
    import torch._dynamo  # compile machinery: at the first compile, not at import
    import torch.fx.experimental._config as shape_config

    config = torch._dynamo.config
    name, total = _limit_names(config)
    values = {name: limit, total: max(limit, getattr(config, total))} if limit else {}
    # Packs set it for good (ComfyUI-NAG, as it is imported): an error is swallowed, a piece of a block runs eager, the rest is many graphs,
    # and nobody is told.
    values["suppress_errors"] = False
    with config.patch(**values), shape_config.patch(use_duck_shape=False), asked_of_numbers(), absent_values():
        yield


def _limit_names(config) -> tuple[str, ...]:
    # torch before 2.6 calls them cache_size_limit.
    return tuple(n if hasattr(config, n) else n.replace("recompile", "cache_size")
                 for n in ("recompile_limit", "accumulated_recompile_limit"))


def recompile_limit() -> int:
    """The limit in force, of torch or of the call under way."""
    import torch._dynamo

    return getattr(torch._dynamo.config, _limit_names(torch._dynamo.config)[0])


compile_settings = _Scope(_patch)
compile_settings.__doc__ = """compile_settings(limit): a context in which a block class may be compiled limit times (0: torch's own
limit), in which sizes that happen to be equal (256 tokens, hidden size 256) are not taken for the same size, which would
compile again at the next one, in which torch looks whether a number that varies is in a list, and in which no error is swallowed."""


class _Varying:
    """What torch takes for sizes that vary, of all calls under way."""

    def __init__(self):
        self._lock = threading.Lock()
        self._sources: Counter[str] = Counter()
        self._ones = 0
        self._before: dict = {}

    @contextlib.contextmanager
    def __call__(self, sources: Iterable[str], one: bool):
        sources = list(sources)
        with self._lock:
            self._count(sources, one, 1)
        try:
            yield
        finally:
            with self._lock:
                self._count(sources, one, -1)

    def _count(self, sources: list[str], one: bool, by: int) -> None:
        import torch.fx.experimental._config as shape_config  # compile machinery: at the first compile, not at import
        from torch._subclasses import fake_impls

        for source in sources:
            self._sources[source] += by
        self._ones += by * one
        self._sources = +self._sources
        # torch before 2.8 has no such list: it learns them at the second value.
        self._set(getattr(torch.compiler, "config", None), "dynamic_sources", bool(self._sources),
                  lambda before: ",".join(filter(None, (before, *self._sources))))
        self._set(shape_config, "backed_size_oblivious", self._ones > 0, lambda before: True)
        self._set(fake_impls, "_compute_stride", self._ones > 0, _without_guards)
        for name in ("_select_conv_backend", "_conv_determine_backend_memory_format"):
            self._set(torch._C, name, self._ones > 0, _any_batch)

    def _set(self, config, name: str, wanted: bool, value) -> None:
        if wanted and hasattr(config, name):
            setattr(config, name, value(self._before.setdefault(name, getattr(config, name))))
        elif name in self._before:
            setattr(config, name, self._before.pop(name))


@functools.cache
def _without_guards(compute_stride: Callable) -> Callable:
    """How a view of what is not dense lies in memory, for any size: inductor asks whether sizes are 1, unless they are unbacked."""
    return lambda *sizes_and_strides, size_oblivious=False: compute_stride(*sizes_and_strides, size_oblivious=True)


@functools.cache
def _any_batch(of_convolution: Callable) -> Callable:
    """What torch asks of a convolution while it traces: which library is for it, which on a CPU is another for a batch of 1, and how its
    result lies in memory, which is the same for all batches. The call that is compiled chooses its library anew."""
    def answer(*args, **kwargs):
        of_batch, _, *others = kwargs.get("input", args[0] if args else None).shape
        if not isinstance(of_batch, torch.SymInt):
            return of_convolution(*args, **kwargs)
        for size in others:
            bool(size > 1)  # by which the layout may be another
        with of_batch.node.shape_env.suppress_guards():
            return of_convolution(*args, **kwargs)
    return answer


varying = _Varying()
varying.__doc__ = """varying(sources, one): a context in which what torch compiles is for any value of the integers that it calls so
(L['args'][1]). one: sizes that vary may be 1 too, so that a batch of 2 and then of 1 is one graph. What asks for it is guarded, but by
squeeze(), see backend.py."""


def _capture_unknown_sizes(level: int) -> contextlib.AbstractContextManager:
    config = torch._dynamo.config
    return config.patch(capture_dynamic_output_shape_ops=True)


unknown_sizes = _Scope(_capture_unknown_sizes)
unknown_sizes.__doc__ = """unknown_sizes(): a context in which an operation of which only the call tells how large its result is does not
end a graph."""
