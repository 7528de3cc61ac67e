"""The backend that dynamo hands its graphs to: notes what was traced, and refuses what would be computed wrongly."""
from __future__ import annotations

import functools
import operator
import re
import threading
import types
from collections.abc import Callable
from pathlib import Path

import torch

from .any_batch import NotForOne, Unrun, Writes, name_of, require_one
from .artifacts.layouts import depends_on_layout
from .artifacts.origins import is_own
from .artifacts.source_guards import cached_function, made_by_metaclass, replaced_operators
from .artifacts.traced_calls import Recording

_AFTER_A_BREAK = "torch_dynamo_resume_in_"  # how dynamo names the rest of a function after a break
_SQUEEZE = re.compile(r"squeeze(_|_copy)?(\.\w+)?")
_DROPOUT = re.compile("(feature_)?(alpha_)?dropout[123]?d?_?")
_LIKE = {torch.rand_like: "uniform_", torch.randn_like: "normal_", torch.randint_like: "random_"}
_BY_NAME = frozenset({"input", "low", "high"})
_MOST = 2 ** 40  # elements of a dimension


class Refused(RuntimeError):
    """What dynamo would get wrong. holds: whether it still would."""

    def __init__(self, reason: str, holds: Callable[[], bool]):
        super().__init__(reason)
        self.holds = holds


class ByLayout(RuntimeError):
    """The block must have its inputs in the layout that they have."""


class ForMore(RuntimeError):
    """What is to be compiled for a batch of 1 is first to be tried for any."""


class OneApart(RuntimeError):
    """The block is better compiled for a size of 1 by itself."""


def graph_break_reasons() -> list:
    """Of all graph breaks in this process so far."""
    return getattr(torch._dynamo.utils, "graph_break_reasons", [])


class _Backend:
    """A backend for torch.compile that notes what dynamo has traced. Unequal to any other: dynamo shares frames that it compiled for equal
    backends (below a graph break), whatever was patched between."""

    def __init__(self, inner: Callable, name: str):
        self.__name__ = name
        self.traced: dict[types.CodeType, None] = {}
        self.refused: Refused | None = None
        self.by_layout = False  # see depends_on_layout
        self.gets_copies = False  # some inputs of the call that compiles are dense copies of the caller's
        self.one_apart = False  # a size that is 1 is compiled for by itself, see varying
        self.compiles_for_more = False  # see any_batch.py
        self.asks_for_more = 0  # a compile by this thread raises ForMore
        self.shared: set[int] = set()  # ids of what it is then given in the place of tensors that share memory
        self.sizes: list = []  # what torch knows of them (ShapeEnv), of each compile
        self._inner = inner
        self.has_made = False  # a graph
        self._breaks = len(graph_break_reasons())

    def __call__(self, graph: torch.fx.GraphModule, inputs, **options):
        context = torch._guards.TracingContext.try_get()
        traced = getattr(context, "traced_code", None) or ()  # from torch 2.8 on
        self.traced.update(dict.fromkeys(traced))
        if (environment := getattr(getattr(context, "fake_mode", None), "shape_env", None)) is not None:
            self.sizes.append(environment)
        resumes = any(code.co_name.startswith(_AFTER_A_BREAK) for code in traced)
        if traced and not resumes and self.has_breaks and not self.one_apart:
            self.compile_one_apart()
            raise OneApart("there is a break in the graph, which may be one that asks whether a size is 1")
        if self.asks_for_more == threading.get_ident() and not resumes:
            self.asks_for_more = -1
            raise ForMore
        try:
            _require_torchs_own(graph)
            if name := cached_function(self.traced):
                raise Refused(f"{name} keeps its results (functools.lru_cache), where torch would compute them anew: running uncompiled.",
                              lambda: True)
            if name := made_by_metaclass(self.traced):
                raise Refused(f"{name}, which torch does not call: running uncompiled.", lambda: True)
            if name := Recording.of(self.traced).gradient_reader():
                raise Refused(f"{name} asks whether a tensor needs a gradient, which torch takes for a constant: running uncompiled.",
                              lambda: True)
        except Refused as refused:
            self.refused = refused
            raise
        # What runs as Python between two graphs may ask for the layout, too.
        self.by_layout = (self.by_layout or self.has_breaks or Recording.of(self.traced).names_layout()
                          or depends_on_layout(graph, inputs, writes=_has_globals(graph)))
        if self.by_layout and self.gets_copies:
            raise ByLayout("the block writes into its inputs, or returns them, by their layout")
        _guard_squeezed(graph)
        _as_eager_computes(graph)
        if environment is not None:
            _bound_sizes(environment)
        writes = Writes.of(graph.graph)
        if writes.by_batch and not self.one_apart:
            self.compile_one_apart()
            raise OneApart("something is written into what is a copy for some batches only")
        if self.compiles_for_more:
            if self.shared and writes.into(self.shared):
                raise NotForOne  # it is another graph where inputs share memory, which these do not
            if environment is not None:
                require_one(environment)
        made = self._inner(graph, inputs, **options)
        self.has_made = True
        return Unrun(made, self) if self.compiles_for_more else made

    def compile_one_apart(self) -> None:
        """From the next compile on, to which the breaks of those before are nothing."""
        self.one_apart = True
        self._breaks = len(graph_break_reasons())

    @property
    def has_breaks(self) -> bool:
        """Whether there may be more graphs than one in a call."""
        return len(graph_break_reasons()) > self._breaks

    @property
    def may_have_run(self) -> bool:
        """Whether a call that the compiler ended may have run a graph before."""
        return self.has_made and self.has_breaks

    def __getattr__(self, name):
        return getattr(self._inner, name)  # reset, for cudagraphs


def _guard_squeezed(graph: torch.fx.GraphModule) -> None:
    """Makes torch guard that a size that squeeze() leaves is not 1: the one operator that asks that in silence, where it was traced for
    sizes that may be (see torch_internals/settings.py). As in eager a batch of 1 then takes another way."""
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            name = str(getattr(node.target, "__name__", node.target))
            if node.op not in ("call_method", "call_function") or not _SQUEEZE.fullmatch(name):
                continue
            value, *dims = [*node.args] + [node.kwargs[key] for key in ("input", "dim") if key in node.kwargs]
            shape = getattr(getattr(value, "meta", {}).get("example_value"), "shape", ())
            chosen = (dims[0],) if dims and isinstance(dims[0], int) else dims[0] if dims else range(len(shape))
            for dim in chosen if shape else ():
                bool(shape[dim] == 1)  # asked of a size that varies this is a guard


def _as_eager_computes(graph: torch.fx.GraphModule) -> None:
    """Writes out what torch computes otherwise than eager. A dropout that is off gives its input, before torch 2.14 a copy, by which what
    is written into it is lost; randn_like(x) draws in the order in which x lies in memory, in inductor in the order of indices."""
    for module in graph.modules():
        for node in list(module.graph.nodes) if isinstance(module, torch.fx.GraphModule) else ():
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            same = None
            if _DROPOUT.fullmatch(name):
                value, training = ((node.args[place:] or (node.kwargs.get(key),))[0] for place, key in ((0, "input"), (2, "training")))
                same = value if training is False else None
            elif node.target in _LIKE and not _BY_NAME.intersection(node.kwargs) and all(type(n) is int for n in node.args[1:]):
                with module.graph.inserting_before(node):
                    empty = module.graph.call_function(torch.empty_like, node.args[:1], dict(node.kwargs))
                    *low, high = node.args[1:] or (None,)  # of randint_like; torch cannot write random_(low, high) down
                    bound = () if high is None else (high - sum(low),)
                    same = module.graph.call_method(_LIKE[node.target], (empty, *bound))
                    same = module.graph.call_method("add_", (same, *low)) if low else same
            if isinstance(same, torch.fx.Node):
                node.replace_all_uses_with(same)
                module.graph.erase_node(node)
                module.recompile()


def _bound_sizes(environment) -> None:
    """Tells torch that sizes are finite. Where they may be 1 inductor does not look at them: it takes the end of x[:, n:], which is
    2^63 - 1, for one that may be within the tensor, and fails."""
    import torch.fx.experimental._config as shape_config  # compile machinery: at the first compile, not at import

    if getattr(shape_config, "backed_size_oblivious", False):  # from torch 2.8 on
        for symbol, sources in environment.var_to_sources.items():
            if any(".size()[" in name_of(source) for source in sources):
                environment.constrain_symbol_range(symbol, 0, _MOST)


def _has_globals(graph: torch.fx.GraphModule) -> bool:
    """Whether an input is neither of the call nor of the module."""
    sources = [getattr(node.meta.get("grapharg"), "source", None) for node in graph.graph.nodes if node.op == "placeholder"]
    return not all(name_of(source).startswith("L[") for source in sources if source is not None)


def _require_torchs_own(graph: torch.fx.GraphModule) -> None:
    """Raises Refused where a function of torch in graph, which calls it by its name, would be another one by then."""
    if replaced := replaced_operators():
        raise Refused(f"{replaced[0]} has been replaced (by another pack): running uncompiled while it is.",
                      lambda: replaced[0] in replaced_operators())
    for node in graph.graph.nodes:
        owner, name = None, getattr(node.target, "__name__", "")
        if node.op == "call_method" and not _is_tensors_own(node.target):
            owner, name = torch.Tensor, node.target
        elif node.op == "call_function" and getattr(operator, name, None) is node.target:
            replaced = [method for method in (f"__{name}__", f"__r{name}__") if not _is_tensors_own(method)]
            owner, name = (torch.Tensor, replaced[0]) if replaced else (None, "")
        elif node.op == "call_function" and getattr(node.target, "__module__", None) in (None, "torch", "torch.nn.functional"):
            owner = next((space for space in (torch.nn.functional, torch) if hasattr(space, name)
                          and _is_of(node.target, space) and getattr(space, name) is not node.target), None)
        if owner is not None:
            raise Refused(f"{_path_of(owner)}.{name} has been replaced (by another pack): running uncompiled while it is.",
                          functools.partial(_is_still, owner, name, getattr(owner, name)))


def _is_tensors_own(name: str) -> bool:
    """Whether a method of Tensor is torch's, and the one that it had when this pack was imported."""
    value = getattr(torch.Tensor, name, None)
    return value is None or (is_own(value, _TORCH) and value is _METHODS.get(name, value))


def _path_of(owner) -> str:
    return owner.__name__ if isinstance(owner, types.ModuleType) else f"torch.{owner.__name__}"


def _is_still(owner, name: str, value) -> bool:
    return getattr(owner, name, None) is value


def _is_of(function, space: types.ModuleType) -> bool:
    """Whether it would be called as space.its name. torch's builtins know no module."""
    module = getattr(function, "__module__", None)
    return module == space.__name__ or (module is None and space is torch)


_TORCH = str(Path(torch.__file__).parent)
_METHODS = {name: getattr(torch.Tensor, name) for name in dir(torch.Tensor) if callable(getattr(torch.Tensor, name, None))}
