import torch

BLOCK = 64  # values that share a scale


def dequantize(data, kind, shape, dtype=None):
    """data int8: for each block a scale in fp32, and the values."""
    blocks = data.reshape(-1, 4 + BLOCK)
    return dequantize_functions[kind](blocks, dtype or torch.float16).reshape(shape)


def unpack_blocks(blocks, dtype):
    scale, values = torch.split(blocks, [4, BLOCK], dim=1)
    return values.to(dtype) * scale.view(torch.float32).to(dtype)


def is_torch_compatible(tensor):
    return tensor is None or getattr(tensor, "tensor_type", None) is None


def dequantize_tensor(tensor, dtype=None, dequant_dtype=None):
    if is_torch_compatible(tensor):
        return tensor.to(dtype)
    return dequantize(tensor.data, tensor.tensor_type, tensor.tensor_shape, dtype if dequant_dtype == "target" else dequant_dtype).to(dtype)


dequantize_functions = {"blocks": unpack_blocks}
