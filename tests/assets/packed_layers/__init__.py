"""A pack with layers like ComfyUI-GGUF's, for the tests: weights are tensors of a class of its own, with the LoRA as an attribute.

What ComfyUI-GGUF's layers are asked for, by the same names; written for this repository.
"""
from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]
