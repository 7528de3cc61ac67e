"""Real checkpoints through ComfyUI's own loader, sampler and ModelPatcher, in this process."""
from __future__ import annotations

from collections import Counter

import pytest
import torch
from older_comfyui import needs_for
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes so."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def load(comfy, models_dir):
    def load(name="tiny_flux"):
        needs_for(name)
        return comfy.sd.load_diffusion_model(str(models_dir / "models" / "diffusion_models" / f"{name}.safetensors"))
    return load


@pytest.fixture
def flux(load):
    return load("tiny_flux")


@pytest.fixture
def wan(load):
    return load("tiny_wan")


@pytest.fixture
def output_folder(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def lora(comfy, models_dir):
    def lora(model, name="tiny_flux_a", strength=1.0):
        weights = comfy.utils.load_torch_file(str(models_dir / "models" / "loras" / f"{name}.safetensors"))
        return comfy.sd.load_lora_for_models(model, None, weights, strength, 0)[0]
    return lora


@pytest.fixture
def vae(comfy, models_dir):
    sd = {}
    for part in ("encoder", "decoder"):
        weights = comfy.utils.load_torch_file(str(models_dir / "models" / "vae_approx" / f"taef1_{part}.safetensors"))
        sd.update({f"taesd_{part}.{name}": w for name, w in weights.items()})
    sd["vae_scale"], sd["vae_shift"] = torch.tensor(0.3611), torch.tensor(0.1159)
    return comfy.sd.VAE(sd=sd)


@pytest.fixture
def bypass(comfy, models_dir):
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRAs")
    from int8_compile.compile.comfyui.bypass_lora import patch_bypass_loras

    patch_bypass_loras()  # as the pack's start does

    def bypass(model, name="tiny_flux_a", strength=1.0):
        weights = comfy.utils.load_torch_file(str(models_dir / "models" / "loras" / f"{name}.safetensors"))
        return comfy.sd.load_bypass_lora_for_models(model, None, weights, strength, 0)[0]
    return bypass


def random_conds(tokens=20) -> list:
    """A positive and a negative conditioning, as a text encoder gives them."""
    generator = torch.Generator().manual_seed(7)
    return [[[torch.randn(1, tokens, 4096, generator=generator), {"pooled_output": torch.randn(1, 2048, generator=generator)}]]
            for _ in range(2)]


@pytest.fixture
def conds():
    return random_conds()


@pytest.fixture(scope="session")
def sample(comfy):
    """Two steps with a stock sampler: -> latent."""
    def sample(model, seed=1, batch=1, height=16, width=16, tokens=20, cfg=1.0):
        video = type(model.model.diffusion_model).__name__ == "WanModel"
        conds = random_conds(tokens)
        latent = torch.zeros(batch, 16, 2, height // 2, width // 2) if video else torch.zeros(batch, 16, height, width)
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(model, noise, 2, cfg, "euler", "simple", *conds, latent, disable_pbar=True, seed=seed)
    return sample


@pytest.fixture
def apply():
    """One step of a model of which about `share` of the weights is loaded; the rest is offloaded, as --lowvram does it."""
    def apply(model, share, tokens=20):
        model.unpatch_model(model.offload_device)
        model.patch_model(model.load_device, lowvram_model_memory=max(1, int(share * model.model_size())))
        generator = torch.Generator().manual_seed(3)
        x, context, y = (torch.randn(*shape, generator=generator) for shape in ((1, 16, 16, 16), (1, tokens, 4096), (1, 2048)))
        try:
            return model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context, y=y, guidance=torch.tensor([3.5]),
                                           transformer_options={"wrappers": model.wrappers})
        finally:
            assert all("weight_function" not in m.__dict__ or isinstance(m.weight_function, list) for m in model.model.modules())
    return apply


@pytest.fixture
def graphs():
    start = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - start


@pytest.fixture(scope="session")
def nodes(comfy):
    """The node classes, with the contract's defaults filled in: nodes.CompileModel(model, backend="aot_eager") -> its first output."""
    from int8_compile import nodes

    class Nodes:
        pass

    for cls in nodes.NODES:
        schema = cls.define_schema()
        defaults = {i.id: i.default for i in schema.inputs if i.id not in ("model", "after") and hasattr(i, "default")}

        def run(*model, _cls=cls, _defaults=defaults, _id=schema.node_id, **inputs):
            needs_for(_id)
            return _cls.execute(**dict(zip(["model"], model)), **{**_defaults, **inputs})[0]
        setattr(Nodes, schema.node_id, staticmethod(run))
    return Nodes


class Ops(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))
