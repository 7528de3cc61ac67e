"""A compile cache for methods of any torch.nn.Module, after TorchAir's cache_compile.

TorchAir (torchair.inference.cache_compile, github.com/Ascend/torchair) keeps one trace of a method per process rank and throws it away at
the second; here a method has an artifact for each kind of call, its parameters are inputs, and the key covers code, versions and hardware.
"""
from __future__ import annotations

import functools
import inspect
import logging
import os
import stat
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...int8.echo import writable
from ...int8.files.folders import is_reserved
from ...int8.global_hooks import has_global_hooks
from ...int8.kernels.native import cache_folder
from ..torch_internals import warmup
from ..torch_internals.block_tree import Hooks
from . import key as cache_key
from .artifact import FILES, Artifact
from .block import copy_skeleton, structure_of
from .block_guards import BlockGuards, ClassGuards, Weights, WeightSpecs, classes_of, module_classes
from .call import Call, flatten
from .compilers import READABLE
from .describe import Names
from .entry import Damaged
from .export import build
from .job import dynamic_dims_of_rank, job_of
from .option_reads import transformer_options_match
from .records import classes_in
from .runtime import MAX_SIGNATURES
from .source_guards import CodeFingerprint
from .store import CacheError, CacheStore, default_key_file
from .values import Unsupported

logger = logging.getLogger(__name__)


def cache_compile(func: Callable, *, config: Mapping | None = None, dynamic: bool | Mapping[str, list[int]] = True,
                  cache_dir: str | os.PathLike | None = None, global_rank: int | None = None, tp_rank: int | None = None,
                  pp_rank: int | None = None, custom_decompositions: Mapping | None = None, aoti_cache: bool = False,
                  **kwargs) -> Callable:
    """func, a method of a torch.nn.Module instance, compiled as one graph for inference and kept on disk. Nothing is compiled or read
    before the first call of the result.

    config: inductor's options. dynamic: True: every size of the inputs but their channels may vary; False: none; {argument: dims}: those.
    cache_dir: default INT8_COMPILE_CACHE_DIR, else a folder of the user's cache. global_rank, tp_rank, pp_rank: part of the path; the first
    counts where torch.distributed runs with more than one process, and is asked of it if absent. custom_decompositions: {op: function}, as
    torch.export's. aoti_cache: keep an AOTInductor package, which loads in ms without the compiler, but takes longer to build. kwargs:
    backend ("inductor", or {"config": ...} which must equal config) and fullgraph (True), for code that passes them to torch.compile.

    A call that no artifact can be made of runs by torch.compile or as it is, with one warning.

    Raises ValueError for anything but a method of a Module, for a config that is not backend's, and for a cache_dir of another user.
    """
    if isinstance(func, CachedMethod):
        func = func.method
    if not isinstance(func, types.MethodType):
        raise ValueError(f"Only method can be cached now, got {func}")
    if not isinstance(func.__self__, torch.nn.Module):
        raise ValueError(f"Only torch.nn.Module method can be cached now, got {func}")
    backend, fullgraph = kwargs.pop("backend", "inductor"), kwargs.pop("fullgraph", True)
    if kwargs:
        raise TypeError(f"cache_compile takes no {', '.join(sorted(kwargs))}. Give options of inductor as config.")
    if isinstance(backend, Mapping):
        if dict(backend.get("config") or {}) != dict(config or {}):
            raise ValueError("config in current backend is different from the config during cache generation.")
    elif backend != "inductor":
        raise ValueError(f"Only the inductor backend makes artifacts that can be kept, not {backend}.")
    if not fullgraph:
        raise ValueError("A cached method is one graph: leave fullgraph at True.")
    folder = Path(cache_dir) if cache_dir is not None else cache_folder() / "methods"
    if os.name == "posix" and folder.exists() and folder.stat().st_uid != os.getuid():
        raise ValueError(f"Cache dir {folder} must be owned by the current user")
    ranks = functools.partial(cache_key.distribution, global_rank, tp_rank, pp_rank)
    return CachedMethod(func, dict(config or {}), dynamic, folder, ranks, dict(custom_decompositions or {}), aoti_cache)


class CachedMethod:
    """What cache_compile returns. Thread-safe. tier: what the last call ran: aoti, aot, fx or eager."""

    def __init__(self, method: types.MethodType, config: dict, dynamic, folder: Path, ranks: Callable[[], str], decompositions: Mapping,
                 aoti_cache: bool):
        self.method = method
        self.tier = ""
        self._config = config
        self._dynamic = dynamic
        self._folder = folder
        self._ranks = ranks
        self._decompositions = decompositions
        self._tiers = ("aoti", "aot") if aoti_cache else ("aot",)
        self._lock = threading.RLock()
        self._store: CacheStore | None = None
        self._groups: dict[str, list[_Method]] = {}  # by what the module is now: a cast or a replaced parameter makes another
        self._built = 0
        self._jit: Callable | None = None
        self._classes: ClassGuards | None = None  # of what _jit was compiled from
        self._hooks: Hooks | None = None
        functools.update_wrapper(self, method)

    def __reduce__(self):
        # Modules keep it as an attribute: copies of them are made without.
        return _nothing, ()

    def __call__(self, *args, **kwargs):
        if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in (*args, *kwargs.values())):
            raise RuntimeError("Backward cache compilation is not supported yet")
        with self._lock, torch.no_grad():
            try:
                call = flatten(args, kwargs, self.method.__self__)
                known = next((known for known in self._known(call) if known.fits(call)), None)
                if known is None and self._jit is None and self._built < MAX_SIGNATURES:
                    known = self._build(call, args, kwargs)
                if known is not None:
                    self.tier = known.artifact.kind
                    try:
                        return known.artifact(known.weights.get(), call.leaves, call.options)
                    except RuntimeError:
                        return self.method(*args, **kwargs)  # the error is the method's own, and says more
            except Unsupported as error:
                self._without(str(error))
            return self._run_jit(args, kwargs)

    def _known(self, call: Call) -> list[_Method]:
        place = self._place(call)
        if place not in self._groups:
            self._groups[place] = []
            for entry in self._open().entries(place):
                self._add(place, entry, call)
        return self._groups[place]

    def _open(self) -> CacheStore:
        if self._store is None:
            try:
                self._store = CacheStore(self._folder, default_key_file())
            except CacheError as error:
                raise Unsupported(str(error)) from None
        return self._store

    def _place(self, call: Call) -> str:
        module = self.method.__self__
        tier = "aoti" if "aoti" in self._tiers else "aot"
        structure = [structure_of(module), repr(self._dynamic), sorted(map(str, self._decompositions))]
        group = cache_key.group(type(module).__name__, bool(self._dynamic), tier, structure, self._config, _device(call), {})
        name = self.method.__name__  # aux is a good one in Python
        return f"{group}/{self._ranks() or 'single'}/{name}{'_' * is_reserved(name)}"

    def _add(self, place: str, entry, call: Call) -> _Method | None:
        try:
            known = _Method(self.method.__self__, entry, call)
        except Unsupported as error:
            logger.info("compile cache: %s is not used: %s", entry.folder.name, error)
            return None
        except Damaged as error:
            self._store.set_aside(entry.folder, str(error))
            return None
        except (RuntimeError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # of this process or this machine now
            logger.warning("compile cache: %s cannot be loaded: %s", entry.folder.name, writable(str(error).partition("\n")[0]))
            return None
        self._store.touch(entry)
        self._groups[place].append(known)
        return known

    def _build(self, call: Call, args: tuple, kwargs: dict) -> _Method:
        """Raises Unsupported where there is no artifact of this call."""
        self._built += 1
        place, store, module, device = self._place(call), self._open(), self.method.__self__, _device(call)
        job = job_of(type(module).__name__, module, call, device, self._dims(args, kwargs), self._config, self.method.__name__,
                     copy_skeleton)
        name = cache_key.entry_name(job)
        try:
            with torch.inference_mode(False):
                warmup.prepare(device.type)
                store.build_once(place, name, functools.partial(build, job, tiers=self._tiers, decompositions=self._decompositions),
                                 replace=(store.base / place / name).exists())  # made of other code
            known = self._add(place, store.entry(store.base / place / name), call)
        except Unsupported:
            raise
        except Exception as error:  # whatever the compiler or the disk refuses: the method still runs
            raise Unsupported(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        if known is None:
            raise Unsupported("the artifact does not fit the call that it was made for")
        return known

    def _dims(self, args: tuple, kwargs: dict) -> Callable[[torch.Tensor], tuple[int, ...]]:
        if not isinstance(self._dynamic, Mapping):
            return lambda leaf: tuple(dynamic_dims_of_rank(leaf.dim())) if self._dynamic else ()
        names = {id(value): name for name, value in inspect.signature(self.method).bind(*args, **kwargs).arguments.items()}
        return lambda leaf: tuple(self._dynamic.get(names.get(id(leaf)), ()))

    def _without(self, reason: str):
        if self._jit is None:
            logger.warning("compile cache: %s is not kept on disk: %s", self.method.__qualname__, reason)
            self._jit = torch.compile(self.method, dynamic=None if self._dynamic else False, options=self._config or None)
            kinds = module_classes(self.method.__self__)
            self._classes = ClassGuards(kinds, classes_of(kinds, Names(None), lenient=True), Names(None), lenient=True)
            self._hooks = Hooks(self.method.__self__)

    def _run_jit(self, args, kwargs):
        if self._jit is None:
            self._without(f"it was built for {MAX_SIGNATURES} kinds of calls already")
        if self._classes.difference() or self._hooks or has_global_hooks():  # patched since, which torch does not look at
            self.tier = "eager"
            return self.method(*args, **kwargs)
        try:
            if self._jit is not self.method:
                warmup.require_own_cache()
            result, self.tier = self._jit(*args, **kwargs), "fx"
        except (torch._dynamo.exc.TorchDynamoException, CacheError) as error:
            logger.warning("compile cache: %s runs uncompiled: %s", self.method.__qualname__, writable(str(error).partition("\n")[0]))
            self._jit = self.method
            result, self.tier = self.method(*args, **kwargs), "eager"
        return result


class _Method:
    """An artifact of a module's method. Raises Unsupported where the module or the code is not what it was made of."""

    def __init__(self, module: torch.nn.Module, entry, call: Call):
        names = Names(entry.body["names"])
        self.sources = CodeFingerprint(entry.body["sources"], names)
        if changed := self.sources.mismatch():
            raise Unsupported(f"{changed} has changed")
        self.artifact = Artifact(entry, _device(call))
        self.weights = Weights(module, WeightSpecs.of(module), _device(call))
        self._guards = BlockGuards(module, self.artifact.attributes, names)
        self._classes = ClassGuards([*module_classes(module), *classes_in(self.artifact.structure)], self.artifact.classes, names)
        self._hooks = Hooks(module)
        if not self._guards.is_unchanged() or self._classes.difference():
            raise Unsupported(f"{self._guards.difference or self._classes.difference()} differs")

    def fits(self, call: Call) -> bool:
        artifact = self.artifact
        return (artifact.structure == call.structure and artifact.accepts(call.leaves) and not self.sources.mismatch()
                and all(map(transformer_options_match, call.options, artifact.options)) and not self._hooks and not has_global_hooks()
                and not self._classes.difference()
                and self._guards.is_unchanged() and self.weights.get() is not None)


def _nothing():
    return None


def _device(call: Call) -> torch.device:
    return next((leaf.device for leaf in call.leaves), torch.device("cpu"))


def readable_cache(path: str | os.PathLike, print_output: bool = True, file: str | os.PathLike | None = None) -> str:
    """An artifact as a person can read it: what it was made for and from, and its graph as Python.

    path: an entry's folder or artifact. print_output: write it to standard output too. file: write it there too, owner-only.
    Raises ValueError for a missing path, a symbolic link, and for a file of another user or that others can read.
    """
    path = Path(path)
    if path.is_symlink() or not path.exists():
        raise ValueError(f"{path} must be an existing file or folder, not a symbolic link")
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).is_file() for name in FILES.values()):
        raise ValueError(f"{path} is no artifact of the compile cache")
    source = folder / READABLE
    if source.is_symlink() or not source.is_file():
        raise ValueError(f"{source} must be an existing file, not a symbolic link")
    if os.name == "posix" and source.stat().st_uid != os.getuid():
        raise ValueError(f"{source} must be owned by the current user")
    text = source.read_text(encoding="utf-8")
    if file is not None:
        target = Path(file)
        if target.is_symlink():
            raise ValueError(f"{target} must not be a symbolic link")
        if os.name == "posix" and target.exists():
            info = target.stat()
            if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) != 0o600:
                raise ValueError(f"{target} must be owned by the current user, with mode 0600")
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as output:
            output.write(text)
    if print_output:
        print(text)
    return text
