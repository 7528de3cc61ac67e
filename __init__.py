"""INT8 Compile: INT8 layers and deferred torch.compile for any diffusion model in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import Int8CompileExtension  # needs a running ComfyUI; the engine below does not
    return Int8CompileExtension()
