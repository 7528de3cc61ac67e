import comfy.lora
import comfy.ops
import torch

from .dequant import BLOCK, dequantize_tensor


class PackedTensor(torch.Tensor):
    """8 bits a value and a scale for each block of them."""

    @staticmethod
    def pack(weight):
        blocks = weight.float().reshape(-1, BLOCK)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        packed = torch.cat([scale.view(torch.int8), (blocks / scale).round().to(torch.int8)], 1)
        values = packed.reshape(weight.shape[0], -1).as_subclass(PackedTensor)
        values.tensor_type, values.tensor_shape, values.patches = "blocks", weight.shape, []
        return values

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        for name in ("tensor_type", "tensor_shape"):
            setattr(new, name, getattr(self, name, None))
        new.patches = getattr(self, "patches", []).copy()
        return new

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self

    def new_empty(self, size, *args, **kwargs):
        new = super().new_empty(size, *args, **kwargs).as_subclass(PackedTensor)
        new.tensor_type, new.tensor_shape, new.patches = self.tensor_type, size, self.patches.copy()
        return new

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()


class Ops(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        dequant_dtype = None

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))

        def get_weight(self, tensor, dtype):
            patches = [patch for found, _ in getattr(tensor, "patches", []) for patch in found]
            weight = dequantize_tensor(tensor, dtype, self.dequant_dtype)
            weight = torch.Tensor(weight) if isinstance(weight, PackedTensor) else weight
            return comfy.lora.calculate_weight(patches, weight, tensor.patches[0][1]) if patches else weight

        def forward_comfy_cast_weights(self, input):
            if not isinstance(self.weight, PackedTensor):
                return super().forward_comfy_cast_weights(input)
            bias = None if self.bias is None else self.bias.to(input)
            return torch.nn.functional.linear(input, self.get_weight(self.weight, input.dtype), bias)
