"""What torch keeps of a compile for good, though nobody asks for it any more."""
from __future__ import annotations

import re


def drop() -> None:
    """Frees what guards were about. For a guard_filter_fn torch evaluates each guard's expression (torch/_guards.py:
    ChainedSource.get_value); where that fails (a layer lacks an attribute) the object that it asked stays among the globals of all guards:
    a block of each model that was ever compiled. Within a compile, which torch lets one thread do at a time."""
    try:
        from torch._dynamo.guards import _get_closure_vars
    except ImportError:
        return
    known = _get_closure_vars()
    for name in [name for name in known if re.fullmatch(r"tmp\d*", name)]:
        del known[name]
