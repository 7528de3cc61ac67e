"""What torch remembers of the numbers that varied from compile to compile of a code (automatic dynamic shapes)."""
from __future__ import annotations

import types
from collections.abc import Iterable


def forget(code: types.CodeType, sources: Iterable[str]) -> None:
    """Takes what these sources (L['args'][2]['block'][1]) hold for constants at the next compile of code too. As a number that varies
    torch would guard it where a guard_filter_fn cannot see it: a graph for each block. torch before 2.6 keeps this elsewhere."""
    try:
        from torch._dynamo.pgo import CodeId, get_code_state
    except ImportError:
        return
    varied = get_code_state()[CodeId.make(code)].automatic_dynamic
    for source in sources:
        varied.pop(source, None)
