import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths

from .ops import Ops, PackedTensor


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if key in self.patches and isinstance(weight, PackedTensor):
            weight = weight.to(device_to)
            weight.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, weight)
        elif key in self.patches:
            super().patch_weight_to_device(key, device_to, inplace_update)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters() if unpatch_weights else ():
            if isinstance(weight, PackedTensor):
                weight.patches = []
        super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        result = super().clone(*args, **kwargs)
        result.__class__ = PackedPatcher
        return result


def load(path):
    weights = comfy.utils.load_torch_file(path)
    packed = {name: PackedTensor.pack(value) if value.ndim == 2 and min(value.shape) >= 128 else value for name, value in weights.items()}
    model = comfy.sd.load_diffusion_model_state_dict(packed, model_options={"custom_operations": Ops})
    model.__class__ = PackedPatcher
    return model


class LoadPackedModel:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": (folder_paths.get_filename_list("diffusion_models"),)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, name):
        return (load(folder_paths.get_full_path("diffusion_models", name)),)


NODE_CLASS_MAPPINGS = {"LoadPackedModel": LoadPackedModel}
