"""What the structural search finds in ComfyUI's own model classes: none of them is known by name."""
from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.model_families import FAMILIES, build

pytestmark = pytest.mark.comfy


# The weights of a UNet, and of ACE-Step's feed-forward, are convolutions, by and large.
TRANSFORMERS = [name for name in FAMILIES if name not in ("SD1.5", "SDXL", "SVD", "ACE-Step")]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_repeated_blocks_of_every_family_are_found(comfy, name):
    from int8_compile.compile.regions import find_regions

    model = build(name)
    regions = find_regions(model)
    blocks = Counter()
    for region in regions:
        blocks[region.name] += len(region.modules)
    assert blocks == FAMILIES[name][2]
    inside = sum(p.numel() for r in regions for m in r.modules for p in m.parameters())
    assert inside > 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_int8_covers_most_weights_of_every_transformer(comfy, name):
    from int8_compile.int8.quantize import eligible_linears

    model = build(name)
    covered = sum(model.get_submodule(n).weight.numel() for n in eligible_linears(model))
    assert covered > 0.7 * sum(p.numel() for p in model.parameters())
