"""Options of the compile nodes, made once at the node's edge and passed down whole."""
from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

import torch

from ..int8.echo import echo
from .allowed_options import INVALID_OPTIONS, MAX_CHARACTERS, check_options
from .third_party_backends import OPTIONAL_BACKENDS, package_of

TORCH_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = {"auto": None, "true": True, "false": False}
# Not in torch's public list, but useful to find out which stage fails, and what other packs' nodes offer.
DIAGNOSTIC_BACKENDS = ("eager", "aot_eager")
MAX_RECOMPILES = 2048
MAX_PATH = 200  # characters of the path of a module, or of a file below ComfyUI's output folder
# Settings that are true or false.
SWITCHES = ("fullgraph", "mark_sizes", "blocks_only", "guard_filter", "background", "log")


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

    @property
    def compiles_each_size(self) -> bool:
        return self.dynamic is False and not self.mark_sizes

    def __post_init__(self):
        """Raises ValueError, and RuntimeError for an optional backend whose package is absent: wherever the values come from (a node, a
        linked input, the settings of a mode, a file), none of them reaches torch unchecked."""
        if self.mode not in TORCH_COMPILE_MODES:
            raise ValueError(f"{self.title}: unknown mode '{echo(self.mode)}'. Choose one of: {', '.join(TORCH_COMPILE_MODES)}.")
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{self.title}: {name} is true or false, not {echo(getattr(self, name))}.")
        if self.dynamic is not None and type(self.dynamic) is not bool:
            raise ValueError(f"{self.title}: dynamic is true, false or nothing, not {echo(self.dynamic)}.")
        if type(self.cache_size_limit) is not int or not 0 <= self.cache_size_limit <= MAX_RECOMPILES:
            raise ValueError(f"{self.title}: dynamo_cache_size_limit is from 0 to {MAX_RECOMPILES}, not {echo(self.cache_size_limit)}.")
        if isinstance(self.backend, str) and self.backend not in ("inductor", "cudagraphs"):  # those are always there
            require_backend(self.backend)
        parse_options(self.options, self.backend)

    def torch_options(self) -> dict:
        """mode expanded into options, so that both can be given together; a fresh dict, since torch.compile pops from it."""
        options = json.loads(self.options)
        if self.backend == "inductor" and self.mode != "default":
            from torch._inductor import list_mode_options  # compile machinery: at the first compile, not at import
            options = {**list_mode_options(self.mode), **options}
        return options

    @property
    def artifact_refusal(self) -> str:
        """Why blocks compiled so cannot be kept on disk as artifacts of their own, empty where they can."""
        if self.backend != "inductor":
            return f"backend {self.backend} makes no artifacts that outlive the process"
        if self.mode != "default":
            return f"mode {self.mode} is not kept as an artifact"
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
        elif self.backend == "cudagraphs":
            # Where sizes vary, torch's backend of that name replays the graph of another size (2.11): it tells calls apart by those
            # inputs that are integers when it compiles, and there they are symbols.
            return dataclasses.replace(self, dynamic=False, mark_sizes=False), ""
        else:
            return self, ""
        options = json.dumps({**self.torch_options(), "triton.cudagraphs": False}, sort_keys=True)
        changes: dict[str, Any] = {"options": options, "mode": "default"}
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
        raise ValueError(f"Unknown backend '{echo(backend)}'. Choose one of: {', '.join(list_backends())}.")


def check_path(path: str, name: str = "object_to_patch") -> None:
    """Raises ValueError for a path, of a module or file, that is longer than any: the nearest that exists is not looked for."""
    if len(path) > MAX_PATH:
        raise ValueError(f"{name}: a path of {len(path)} characters; {MAX_PATH} are the limit.")


def parse_options(text: str, backend: str) -> str:
    """The options input of CompileModel, checked: a JSON object of options that a workflow may set, see allowed_options.

    Returns canonical JSON. Raises ValueError that starts with INVALID_OPTIONS and names the key and its near matches.
    """
    if isinstance(text, str) and not text.strip():
        return "{}"
    if isinstance(text, str) and len(text) > MAX_CHARACTERS:
        raise ValueError(f"{INVALID_OPTIONS}: {len(text)} characters; {MAX_CHARACTERS} are the limit.")
    try:
        options = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:  # over the API it may be anything
        raise ValueError(f'{INVALID_OPTIONS}: not JSON ({echo(str(error))}). '
                         'Write an object such as {"epilogue_fusion": true}.') from None
    if not isinstance(options, dict):
        raise ValueError(f'{INVALID_OPTIONS}: a JSON {type(options).__name__}, not an object. '
                         'Write an object such as {"epilogue_fusion": true}.')
    if options and backend != "inductor" and backend not in OPTIONAL_BACKENDS:
        raise ValueError(f"{INVALID_OPTIONS}: backend '{echo(backend)}' takes no options. Leave them empty, or set backend to inductor.")
    if options:
        check_options(options)  # velocator and xelerate hand them on to inductor
    return json.dumps(options, sort_keys=True)
