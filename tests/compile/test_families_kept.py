"""Model families in the compile cache: kept, and what is kept gives what eager gives, for every batch. benchmarks/families.py does all."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_right_under_change import cached, difference, exported, inference  # noqa: F401

from benchmarks.small_families import SMALL

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", ["Ideogram 4", "MiniMax H3", "Flux2", "Chroma", "SD3", "LTXV", "SD1.5"])
def test_a_family_is_kept_and_right(comfy, tmp_path, name):
    family = SMALL[name]
    model, compiled = family.build(), cached(tmp_path / "cache")
    for batch in (1, 2) if name in ("LTXV", "SD3") else (1,):
        want = family.call(model, batch=batch)
        for _ in range(2):
            got = compiled.run(model, lambda batch=batch: family.call(model, batch=batch), filter_guards=True,
                               passthrough=lambda error: False)
            assert difference(got, want) < 1e-4
        assert compiled.report.last_calls["artifact"] > 0 and compiled.report.last_calls["eager"] == 0, compiled.report.fallbacks
