"""Options of the compile nodes, made once at the node's edge and passed down whole."""
from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from dataclasses import dataclass

import torch

from .optional import OPTIONAL_BACKENDS, package_of

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = {"auto": None, "true": True, "false": False}
# Not in torch's public list, but useful to find out which stage fails, and what other packs' nodes offer.
DIAGNOSTIC_BACKENDS = ("eager", "aot_eager")
INVALID_OPTIONS = "Compilation failed due to invalid options"


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    backend: a name torch.compile takes, or one of OPTIONAL_BACKENDS. dynamic: as in torch.compile (None: torch decides).
    mark_sizes: the sizes of a block's inputs that may vary (batch, tokens, height, width) are dynamic from the first compile on.
    mode: one of MODES. options: a JSON object of inductor options, on top of the mode's own. blocks_only: compile the
    repeated blocks, not the whole object. cache_size_limit: recompiles allowed for a block class, 0 for torch's own limit.
    guard_filter: drop guards on the bookkeeping in transformer_options while no patch may read it. background: run eager until a
    separate process has compiled the blocks. log: a line for every
    compile, not only the first. title: the node's name, in front of every message.
    """

    backend: str = "inductor"
    fullgraph: bool = False
    dynamic: bool | None = None
    mark_sizes: bool = False
    mode: str = "default"
    options: str = "{}"
    blocks_only: bool = True
    cache_size_limit: int = 640
    guard_filter: bool = True
    background: bool = False
    log: bool = False
    title: str = "Compile Model"

    def torch_options(self) -> dict:
        """mode expanded into options, so that both can be given together; a fresh dict, since torch.compile pops from it."""
        options = json.loads(self.options)
        if self.backend == "inductor" and self.mode != "default":
            from torch._inductor import list_mode_options  # compile machinery: at the first compile, not at import
            options = {**list_mode_options(self.mode), **options}
        return options

    @property
    def artefact_refusal(self) -> str:
        """Why blocks compiled so cannot be kept on disk as artefacts of their own, empty where they can."""
        if self.backend != "inductor":
            return f"backend {self.backend} makes no artefacts that outlive the process"
        if self.mode != "default":
            return f"mode {self.mode} is not kept as an artefact"
        return "CUDA graphs are recorded anew in each process" if self.cuda_graphs else ""

    @property
    def cuda_graphs(self) -> bool:
        """Whether CUDA graphs are asked for, by the backend, the mode or an option."""
        return self.backend == "cudagraphs" or bool(self.torch_options().get("triton.cudagraphs"))

    def on_device(self, device: torch.device) -> tuple[CompileOptions, str]:
        """These options as they can be had on device, and why something is left out, if it is."""
        if not self.cuda_graphs:
            return self, ""
        if device.type != "cuda":
            reason = f"CUDA graphs do not exist on {device.type}"
        elif torch.cuda.get_allocator_backend() != "native":
            # torch/_inductor/cudagraph_trees.py walks the native allocator's pools.
            reason = ("CUDA graphs need PyTorch's own memory allocator; ComfyUI runs with cudaMallocAsync (start it with "
                      "--disable-cuda-malloc)")
        else:
            return self, ""
        changes = {"options": json.dumps({**self.torch_options(), "triton.cudagraphs": False}, sort_keys=True), "mode": "default"}
        if self.backend == "cudagraphs":
            changes = {"backend": "eager"}
        return dataclasses.replace(self, **changes), f"{reason}: compiling without them."


@functools.cache
def list_backends() -> list[str]:
    """Every backend torch lists here, the diagnostic ones and the optional packages, inductor first."""
    return list(dict.fromkeys(["inductor", *torch.compiler.list_backends(), *DIAGNOSTIC_BACKENDS, *OPTIONAL_BACKENDS]))


def require_backend(backend: str) -> None:
    """Raises RuntimeError for an optional backend whose package is absent, ValueError for an unknown one."""
    if backend in OPTIONAL_BACKENDS:
        package_of(backend)
    elif backend not in list_backends():
        raise ValueError(f"Unknown backend '{backend}'. Choose one of: {', '.join(list_backends())}.")


def parse_options(text: str, backend: str) -> str:
    """The options input of CompileModel, checked: a JSON object whose keys inductor knows, with values of its types.

    Returns canonical JSON. Raises ValueError that starts with INVALID_OPTIONS and names the key and its near matches.
    """
    if not text.strip():
        return "{}"
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{INVALID_OPTIONS}: not JSON ({error}). Write an object such as {{"epilogue_fusion": true}}.') from None
    if not isinstance(options, dict):
        raise ValueError(f'{INVALID_OPTIONS}: a JSON {type(options).__name__}, not an object. '
                         'Write an object such as {"epilogue_fusion": true}.')
    if backend == "inductor":
        _check_inductor(options)
    elif options and backend not in OPTIONAL_BACKENDS:
        raise ValueError(f"{INVALID_OPTIONS}: backend '{backend}' takes no options. Leave them empty, or set backend to inductor.")
    return json.dumps(options, sort_keys=True)


def _check_inductor(options: dict) -> None:
    from torch._inductor import config  # compile machinery: when options are given, not at import

    known = config.get_config_copy()
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "See torch._inductor.config for the names."
            raise ValueError(f"{INVALID_OPTIONS}: inductor has no option '{key}'. {hint}")
        want = type(known[name])
        if known[name] is not None and type(value) is not want:
            raise ValueError(f"{INVALID_OPTIONS}: '{key}' takes a {want.__name__}, not {json.dumps(value)}.")
