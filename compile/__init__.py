"""The compile core: wraps ModelPatcher objects, knows ComfyUI and torch.compile; knows no node."""
