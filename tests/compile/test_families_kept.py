"""Model families in the compile cache: kept, and what is kept gives what eager gives, for every batch. benchmarks/families.py does all."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_right_under_change import cached, exported, inference, refused  # noqa: F401
from toys import difference

from benchmarks.small_families import SMALL
from benchmarks.tiny_models import fill

pytestmark = pytest.mark.comfy


@pytest.mark.rotating
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


@pytest.mark.rotating
def test_the_levels_of_a_vae_are_no_blocks_and_what_is_in_them_is(comfy, tmp_path):
    """Stable Diffusion's VAE keeps its residual blocks in bare modules, which nobody calls."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 4, 4], num_res_blocks=1,
                  attn_resolutions=[], dropout=0.0)
    vae = fill(AutoencoderKL(ddconfig=config, embed_dim=4).requires_grad_(False).eval(), seed=1)
    compiled = cached(tmp_path / "cache")
    for size in (8, 8, 12):
        latent = torch.randn(1, 4, size, 8)
        want, got = (call() for call in (lambda latent=latent: vae.decode(latent), lambda latent=latent: compiled.run(
            vae, lambda: vae.decode(latent), filter_guards=True, passthrough=lambda error: False)))
        assert difference(got, want) < 1e-4
    assert {name for name, _ in compiled.report.regions} == {"ResnetBlock"}
    assert compiled.report.last_calls["artifact"] > 0, refused(compiled)
