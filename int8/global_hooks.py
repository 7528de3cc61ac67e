"""Forward hooks that stand on all modules of the process: torch's own profiler and some packs use them."""
from __future__ import annotations

from torch.nn.modules import module as torch_module

_HOOKS = tuple(getattr(torch_module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks"))


def has_global_hooks() -> bool:
    return any(_HOOKS)
