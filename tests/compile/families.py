"""ComfyUI's own model classes, at the shapes of real models but few blocks, for the meta device."""
from __future__ import annotations

import importlib

UNET = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False)
FLUX = dict(in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=3,
            depth_single_blocks=4, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
COSMOS = dict(max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
              model_channels=1024, num_blocks=3, num_heads=8, crossattn_emb_channels=1024, pos_emb_cls="rope3d")
WAN = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)

# name -> (class, arguments, {block class: number of blocks})
FAMILIES = {
    "Flux": ("flux.model.Flux", FLUX, {"DoubleStreamBlock": 3, "SingleStreamBlock": 4}),
    "Flux2": ("flux.model.Flux", {**FLUX, "vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False,
                                  "ops_bias": False, "axes_dim": [32, 32, 32, 32], "mlp_ratio": 3.0, "in_channels": 128, "patch_size": 1,
                                  "out_channels": 128}, {"DoubleStreamBlock": 3, "SingleStreamBlock": 4}),
    "Chroma": ("chroma.model.Chroma", {**{k: v for k, v in FLUX.items() if k != "guidance_embed"}, "in_dim": 64, "out_dim": 3072,
                                       "hidden_dim": 5120, "n_layers": 5, "in_channels": 64, "out_channels": 64},
               {"DoubleStreamBlock": 3, "SingleStreamBlock": 4, "MLPEmbedder": 5}),
    "Wan": ("wan.model.WanModel", WAN, {"WanAttentionBlock": 4}),
    "Wan VACE": ("wan.model.VaceWanModel", {**WAN, "vace_layers": 2, "vace_in_dim": 96},
                 {"WanAttentionBlock": 4, "VaceWanAttentionBlock": 2}),
    "Qwen-Image": ("qwen_image.model.QwenImageTransformer2DModel", dict(num_layers=3), {"QwenImageTransformerBlock": 3}),
    "Lumina2": ("lumina.model.NextDiT", dict(dim=2304, n_layers=4, n_refiner_layers=2, n_heads=24, n_kv_heads=8, qk_norm=True,
                                             cap_feat_dim=2304, axes_dims=[32, 32, 32], axes_lens=[300, 512, 512]),
                {"JointTransformerBlock": 8}),
    "Z-Image": ("lumina.model.NextDiT", dict(dim=3840, n_layers=4, n_refiner_layers=2, n_heads=30, n_kv_heads=30, qk_norm=True,
                                             cap_feat_dim=2560, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
                                             z_image_modulation=True, ffn_dim_multiplier=8 / 3), {"JointTransformerBlock": 8}),
    "HunyuanVideo": ("hunyuan_video.model.HunyuanVideo",
                     {**{k: v for k, v in FLUX.items() if k != "txt_ids_dims"}, "patch_size": [1, 2, 2], "theta": 256, "byt5": False,
                      "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False},
                     {"DoubleStreamBlock": 3, "SingleStreamBlock": 4, "TokenRefinerBlock": 2}),
    "LTXV": ("lightricks.model.LTXVModel", dict(num_layers=3), {"BasicTransformerBlock": 3}),
    "SD3": ("modules.diffusionmodules.mmdit.MMDiT",
            dict(depth=4, input_size=None, in_channels=16, adm_in_channels=2048, pos_embed_max_size=192, num_patches=36864,
                 context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}}),
            {"JointBlock": 4}),
    "HiDream": ("hidream.model.HiDreamImageTransformer2DModel",
                dict(patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=3, caption_channels=[4096, 4096],
                     axes_dims_rope=(64, 32, 32), llama_layers=list(range(5))), {"HiDreamImageBlock": 5}),
    "AuraFlow": ("aura.mmdit.MMDiT", dict(n_layers=6, n_double_layers=2), {"MMDiTBlock": 2, "DiTBlock": 4}),
    "Cosmos": ("cosmos.model.GeneralDIT", COSMOS, {"GeneralDITTransformerBlock": 3}),
    "Cosmos Predict2": ("cosmos.predict2.MiniTrainDIT", COSMOS, {"Block": 3}),
    "PixArt": ("pixart.pixartms.PixArtMS", dict(depth=3, input_size=32), {"PixArtMSBlock": 3}),
    "SD1.5": ("modules.diffusionmodules.openaimodel.UNetModel",
              {**UNET, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8, "context_dim": 768,
               "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
               "transformer_depth_middle": 1}, {"ResBlock": 22, "SpatialTransformer": 16}),
    "SDXL": ("modules.diffusionmodules.openaimodel.UNetModel",
             {**UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_head_channels": 64, "context_dim": 2048,
              "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
              "transformer_depth_middle": 10, "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential"},
             {"ResBlock": 17, "SpatialTransformer": 11}),
}


def build(name: str):
    """A family's diffusion model on the meta device."""
    import comfy.ops
    import torch

    path, arguments, _ = FAMILIES[name]
    module, _, cls = path.rpartition(".")
    return getattr(importlib.import_module(f"comfy.ldm.{module}"), cls)(
        **arguments, device=torch.device("meta"), dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
