"""Builders of API-format prompts made of stock nodes, for the checkpoints of tiny_models.py.

Node ids are words ("unet", "sampler", ...), so that errors read well and a caller can edit a prompt.
model_nodes are (class_type, inputs without "model") pairs, put in order between the loader, with its LoRA,
and the sampler; their ids are "model_1", "model_2", ... A unet that is not a file name is such a pair too, and
stands in for the stock loader.
"""

from collections.abc import Sequence

Node = tuple[str, dict]


def flux_prompt(
    *,
    width: int = 256,
    height: int = 256,
    batch: int = 1,
    steps: int = 4,
    seed: int = 1,
    cfg: float = 1.0,
    text: str = "a red fox",
    lora: tuple[str, float] | None = None,
    model_nodes: Sequence[Node] = (),
    prefix: str = "flux",
    image: bool = False,
    unet: str | Node = "tiny_flux.safetensors",
) -> dict:
    """Text to image: saves a latent [batch, 16, height/8, width/8] and, with image, one PNG per picture."""
    latent = ("EmptySD3LatentImage", {"width": width, "height": height, "batch_size": batch})
    prompt = _sampling_prompt(unet, lora, model_nodes, latent, text, steps, seed, cfg, prefix)
    if image:
        prompt["vae"] = _node("VAELoader", vae_name="taef1")
        prompt["decode"] = _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])
        prompt["save_image"] = _node("SaveImage", images=["decode", 0], filename_prefix=prefix)
    return prompt


def wan_prompt(
    *,
    width: int = 64,
    height: int = 64,
    frames: int = 5,
    batch: int = 1,
    steps: int = 4,
    seed: int = 1,
    cfg: float = 3.0,
    text: str = "a red fox",
    lora: tuple[str, float] | None = None,
    model_nodes: Sequence[Node] = (),
    prefix: str = "wan",
    unet: str | Node = "tiny_wan.safetensors",
) -> dict:
    """Text to video: saves a latent [batch, 16, (frames - 1)/4 + 1, height/8, width/8]. frames is 4n + 1."""
    latent = ("EmptyHunyuanLatentVideo", {"width": width, "height": height, "length": frames, "batch_size": batch})
    return _sampling_prompt(unet, lora, model_nodes, latent, text, steps, seed, cfg, prefix)


def sd15_prompt(
    *,
    width: int = 128,
    height: int = 128,
    batch: int = 1,
    steps: int = 4,
    seed: int = 1,
    cfg: float = 3.0,
    text: str = "a red fox",
    lora: tuple[str, float] | None = None,
    model_nodes: Sequence[Node] = (),
    prefix: str = "sd15",
    unet: str | Node = "tiny_sd15.safetensors",
) -> dict:
    """Text to image: saves a latent [batch, 4, height/8, width/8]."""
    latent = ("EmptyLatentImage", {"width": width, "height": height, "batch_size": batch})
    return _sampling_prompt(unet, lora, model_nodes, latent, text, steps, seed, cfg, prefix, clip_type="stable_diffusion")


def zimage_prompt(
    *,
    width: int = 64,
    height: int = 64,
    batch: int = 1,
    steps: int = 2,
    seed: int = 1,
    cfg: float = 1.0,
    text: str = "a red fox",
    lora: tuple[str, float] | None = None,
    model_nodes: Sequence[Node] = (),
    prefix: str = "zimage",
    unet: str | Node = "tiny_zimage.safetensors",
) -> dict:
    """Text to image: saves a latent [batch, 16, height/8, width/8]."""
    latent = ("EmptySD3LatentImage", {"width": width, "height": height, "batch_size": batch})
    return _sampling_prompt(unet, lora, model_nodes, latent, text, steps, seed, cfg, prefix, clip_type="stable_diffusion")


def sampled_again(prompt: dict, number: int) -> dict:
    """The same prompt to its image, but not to ComfyUI, which would serve the sampler's latent of last time: the empty latent is multiplied
    by another number, which leaves it empty."""
    prompt["again"] = _node("LatentMultiply", samples=["latent", 0], multiplier=1 + number / 1024)
    prompt["sampler"]["inputs"]["latent_image"] = ["again", 0]
    return prompt


def _sampling_prompt(unet, lora, model_nodes, latent, text, steps, seed, cfg, prefix, clip_type="sd3") -> dict:
    if isinstance(unet, str):
        unet = ("UNETLoader", {"unet_name": unet, "weight_dtype": "default"})
    prompt = {
        "unet": _node(unet[0], **unet[1]),
        "clip": _node("CLIPLoader", clip_name="tiny_clip_l.safetensors", type=clip_type),
        "positive": _node("CLIPTextEncode", text=text, clip=["clip", 0]),
        "negative": _node("CLIPTextEncode", text="", clip=["clip", 0]),
        "latent": _node(latent[0], **latent[1]),
    }
    chain = [(f"model_{n}", node) for n, node in enumerate(model_nodes, 1)]
    if lora:
        chain.insert(0, ("lora", ("LoraLoaderModelOnly", {"lora_name": lora[0], "strength_model": lora[1]})))
    model = "unet"
    for node_id, (class_type, inputs) in chain:
        prompt[node_id] = _node(class_type, model=[model, 0], **inputs)
        model = node_id
    prompt["sampler"] = _node(
        "KSampler", model=[model, 0], positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
        seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0,
    )
    prompt["save_latent"] = _node("SaveLatent", samples=["sampler", 0], filename_prefix=prefix)
    return prompt


def _node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def reports(outputs: dict) -> list[dict]:
    """What this pack's nodes say in a prompt's outputs that they did: "status", "warnings" and "details", in the order of their ids."""
    return [entry for node in sorted(outputs) for entry in outputs[node].get("int8_compile", [[]])[0]]


# Inputs of the example workflows -> the small models, pictures and compilers of tests.
SMALL = {
    "UNETLoader": {"unet_name": "tiny_flux.safetensors"},
    "LoadINT8Model": {"unet_name": "tiny_flux.safetensors"},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "KSampler": {"steps": 2},
    "VAELoader": {"vae_name": "taef1"},
}


def with_small_models(prompt: dict) -> dict:
    """An example workflow in API format that runs here in seconds."""
    for node in prompt.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "DualCLIPLoader":
            node.update(class_type="CLIPLoader", inputs={"clip_name": "tiny_clip_l.safetensors", "type": "sd3"})
        elif node["class_type"] == "CompileModel" and not node["inputs"]["is_patcher"]:
            node["inputs"]["backend"] = "aot_eager"
    return prompt
