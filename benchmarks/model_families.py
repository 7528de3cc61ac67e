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
    # Newer ones, with their own defaults and few blocks.
    "ACE-Step": ("ace.model.ACEStepTransformer2DModel", dict(num_layers=6), {"LinearTransformerBlock": 6, "ConformerEncoderLayer": 6}),
    "Anima": ("anima.model.Anima", COSMOS, {"Block": 3, "TransformerBlock": 6}),
    "Stable Audio": ("audio.dit.AudioDiffusionTransformer", dict(depth=3), {"TransformerBlock": 3}),
    "Boogu": ("boogu.model.BooguTransformer2DModel", dict(num_layers=3, num_double_stream_layers=2),
              {"OmniGen2TransformerBlock": 9, "BooguDoubleStreamBlock": 2}),
    "CogVideoX": ("cogvideo.model.CogVideoXTransformer3DModel", dict(num_layers=3), {"CogVideoXBlock": 3}),
    "Ernie-Image": ("ernie.model.ErnieImageModel", dict(num_layers=3), {"ErnieImageSharedAdaLNBlock": 3}),
    "Mochi": ("genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
              dict(depth=3, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0, mlp_ratio_y=4.0, in_channels=12,
                   qk_norm=True, qkv_bias=False, patch_embed_bias=True, attend_to_padding=False, timestep_scale=1000.0, use_t5=True,
                   t5_feat_dim=4096, t5_token_length=256, learn_sigma=False), {"AsymmetricJointBlock": 3}),
    "HiDream-O1": ("hidream_o1.model.HiDreamO1Transformer",
                   dict(text_config_overrides={"num_hidden_layers": 12}, vision_config_overrides={"depth": 2}),
                   {"Qwen35VisionBlock": 2, "TransformerBlock": 12}),
    "Hunyuan3D 2.0": ("hunyuan3d.model.Hunyuan3Dv2", dict(depth=3, depth_single_blocks=4),
                      {"DoubleStreamBlock": 3, "SingleStreamBlock": 4}),
    "Hunyuan3D 2.1": ("hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain", dict(depth=8), {"HunYuanDiTBlock": 8}),
    "HunyuanDiT": ("hydit.models.HunYuanDiT", dict(depth=8), {"HunYuanDiTBlock": 8}),
    "Ideogram 4": ("ideogram4.model.Ideogram4Transformer2DModel", dict(num_layers=4), {"Ideogram4TransformerBlock": 4}),
    "JoyImage": ("joyimage.model.JoyImageTransformer3DModel", dict(num_layers=3), {"JoyImageTransformerBlock": 3}),
    "Kandinsky 5": ("kandinsky5.model.Kandinsky5", dict(num_visual_blocks=3),
                    {"TransformerEncoderBlock": 2, "TransformerDecoderBlock": 3}),
    "Krea 2": ("krea2.model.SingleStreamDiT", dict(layers=3), {"SingleStreamBlock": 3, "TextFusionBlock": 4}),
    "Lens": ("lens.model.LensTransformer2DModel", dict(num_layers=3), {"LensTransformerBlock": 3}),
    "LTX-AV": ("lightricks.av_model.LTXAVModel", dict(num_layers=3), {"BasicTransformerBlock1D": 4, "BasicAVTransformerBlock": 3}),
    "Z-Image pixel space": ("lumina.model.NextDiTPixelSpace", dict(n_layers=3), {"JointTransformerBlock": 7, "PixelResBlock": 4}),
    "Mage-Flow": ("mage_flow.model.MageFlowTransformer2DModel", dict(num_layers=3), {"QwenImageTransformerBlock": 3}),
    "MiniMax H3": ("minimax.model.MiniMaxH3Model", dict(num_layers=3), {"RefinerBlock": 2, "DiTBlock": 3}),
    "MiniMax Music 3": ("minimax_music.dit.MiniMaxMusic3DiT", {}, {"TransformerBlock": 36}),
    "OmniGen2": ("omnigen.omnigen2.OmniGen2Transformer2DModel", dict(num_layers=3), {"OmniGen2TransformerBlock": 9}),
    "PixelDiT": ("pixeldit.model.PixDiT_T2I", dict(patch_depth=3), {"MMDiTBlockT2I": 3, "PiTBlock": 2}),
    "PiD": ("pixeldit.pid.PidNet", dict(patch_depth=3), {"MMDiTBlockT2I": 3, "PiTBlock": 2, "ResBlock": 4}),
    "Trellis 2": ("trellis2.model.Trellis2", dict(resolution=32),
                  {"ModulatedSparseTransformerCrossBlock": 60, "ModulatedTransformerCrossBlock": 30}),
    "TripoSplat": ("triposplat.model.LatentSeqMMFlowModel", dict(num_blocks=3),
                   {"RePo3DRotaryEmbedding": 7, "UnifiedTransformerBlock": 7}),
    "Wan causal": ("wan.ar_model.CausalWanModel", dict(num_layers=3), {"CausalWanAttentionBlock": 3}),
    "Wan camera": ("wan.model.CameraWanModel", dict(num_layers=6), {"WanAttentionBlock": 6}),
    "HuMo": ("wan.model.HumoWanModel", dict(num_layers=3), {"WanAttentionBlockAudio": 3}),
    "SCAIL": ("wan.model.SCAILWanModel", dict(num_layers=3), {"WanAttentionBlock": 3}),
    "SCAIL 2": ("wan.model.SCAIL2WanModel", dict(num_layers=3), {"WanAttentionBlock": 3}),
    "Wan S2V": ("wan.model.WanModel_S2V", dict(num_layers=4, audio_inject_layers=[0, 1]),
                {"WanAttentionBlock": 4, "WanT2VCrossAttention": 2}),
    "Wan Animate": ("wan.model_animate.AnimateWanModel", dict(num_layers=10), {"WanAttentionBlock": 10, "FaceBlock": 2}),
    "Wan Animate 2": ("wan.model_animate2.WanAnimate2Model", dict(num_layers=3), {"WanAnimate2Block": 3}),
    "WanDancer": ("wan.model_wandancer.WanDancerModel", dict(num_layers=3, audio_inject_layers=[0, 1]),
                  {"WanAttentionBlock": 3, "WanT2VCrossAttention": 2, "MusicEncoderLayer": 2}),
}


def build(name: str):
    """A family's diffusion model on the meta device."""
    import comfy.ops
    import torch

    path, arguments, _ = FAMILIES[name]
    module, _, cls = path.rpartition(".")
    return getattr(importlib.import_module(f"comfy.ldm.{module}"), cls)(
        **arguments, device=torch.device("meta"), dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
