"""The model families of model_families.py as small random models on the CPU, called as ComfyUI's sampler calls them."""
from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.tiny_models import fill

from .model_families import FAMILIES

CONTEXT = 48  # width of the text embedding
POOLED = 40  # and of the pooled one
REFERENCE = (24, 28)  # height and width of a reference image's latent


@dataclass(frozen=True)
class SmallFamily:
    """arguments: on top of those in model_families.py. latent: channels, and frames of a video. timestep: as model_sampling gives it.
    extra: (a function that draws a tensor, batch, tokens, height, width) -> what else comfy.model_base passes to the model. scale: of
    height and width. context: width of the text embedding. audio: shape of a second stream without its batch. steps: that a call samples,
    of a model that keeps something from its first (a prefix). reset: forgets that. batches: whether it takes more than one. area: what
    the latent has in place of a height and a width. process_timestep: as in comfy.model_base. frames: that count as members of a batch.
    What extra names "context" stands for it."""

    name: str
    arguments: dict
    latent: tuple[int, ...] = (16,)
    timestep: float = 700.0
    extra: Callable[..., dict] = lambda draw, batch, tokens, height, width: {}
    scale: int = 1
    context: int = CONTEXT
    audio: tuple[int, ...] = ()
    steps: int = 1
    reset: Callable[[torch.nn.Module], None] = lambda model: None
    batches: bool = True
    area: Callable[[int, int], tuple[int, ...]] = lambda height, width: (height, width)
    process_timestep: Callable[[torch.Tensor], torch.Tensor] = lambda timestep: timestep
    frames: int = 1

    def build(self) -> torch.nn.Module:
        import comfy.ops

        path, arguments, _ = FAMILIES[self.name]
        module, _, cls = path.rpartition(".")
        model = getattr(importlib.import_module(f"comfy.ldm.{module}"), cls)(
            **{**arguments, **self.arguments}, device=torch.device("cpu"), dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        fill(model.requires_grad_(False).eval(), seed=1)
        random = torch.Generator().manual_seed(2)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            # Tables of positions and tokens, which fill takes for the weight of a wide layer or, being a buffer, leaves empty.
            if name.endswith(("pos_embed", "positional_encoding", "_tokens", "_token")):
                tensor.copy_(torch.randn(tensor.shape, generator=random) / 4)
            if name.endswith("rotary_pos_emb.inv_freq"):  # a checkpoint has it
                tensor.copy_(10000.0 ** -torch.linspace(0, 1, len(tensor) + 1)[:-1])
        return model

    def call(self, model: torch.nn.Module, batch=1, height=36, width=40, tokens=20) -> torch.Tensor:
        random = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(shape, generator=random)

        timestep = torch.full((batch * self.frames,), self.timestep)
        options = {"wrappers": {}, "callbacks": {}, "sample_sigmas": torch.linspace(1, 0, 5), "sigmas": timestep[:1],
                   "cond_or_uncond": list(range(batch)), "uuids": [uuid.uuid4() for _ in range(batch)], "prefetch_dynamic_vbars": False}
        batch, height, width = batch * self.frames, height * self.scale, width * self.scale
        self.reset(model)
        x, results = draw(batch, *self.latent, *self.area(height, width)), []
        x = [x, draw(batch, *self.audio)] if self.audio else x
        given = {"context": draw(batch, tokens, self.context), **self.extra(draw, batch, tokens, height, width)}
        for _ in range(self.steps):
            result = model(x, self.process_timestep(timestep), control=None, transformer_options=options, **given)
            results += [part.flatten() for part in result] if isinstance(result, list) else [result.flatten()]
        return torch.cat(results)


def _pooled(draw, batch, *_):
    return {"y": draw(batch, POOLED)}


def _pooled_and_guidance(draw, batch, *_):
    return {**_pooled(draw, batch), "guidance": torch.full((batch,), 3.5)}


def _guidance_and_reference(draw, batch, *_):
    return {"guidance": torch.full((batch,), 3.5), "ref_latents": [draw(batch, 32, *REFERENCE)]}


def _mask_and_frame_rate(draw, batch, tokens, *_):
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[:, tokens // 2:] = 0
    return {"attention_mask": mask, "frame_rate": 25}


def _tokens_of_pixels(draw, batch, tokens, height, width):
    from comfy.ldm.hidream_o1.conditioning import build_extra_conds

    found = build_extra_conds(torch.arange(tokens)[None] % 100 + 5, torch.empty(batch, 3, height, width))
    return {name: value if isinstance(value, int) else value.expand(batch, *value.shape[1:]) for name, value in found.items()}


_FLUX = dict(hidden_size=128, num_heads=2, axes_dim=[16, 24, 24], context_in_dim=CONTEXT, vec_in_dim=POOLED, depth=2,
             depth_single_blocks=3)
_WAN = dict(dim=128, ffn_dim=320, num_heads=2, text_dim=CONTEXT)
_LUMINA = dict(in_channels=16, n_layers=3, multiple_of=32, cap_feat_dim=CONTEXT)
_COSMOS = dict(model_channels=128, num_heads=2, crossattn_emb_channels=CONTEXT, use_adaln_lora=True, adaln_lora_dim=32)
# Three levels, the lowest without attention (SD1.5) or with deeper transformers (SDXL). Each new width is five more ResBlocks to compile.
_UNET = dict(model_channels=32, num_res_blocks=[1, 1, 1], context_dim=CONTEXT)

SMALL = {family.name: family for family in (
    SmallFamily("Flux", _FLUX, timestep=0.7, extra=_pooled_and_guidance),
    SmallFamily("Flux2", {**_FLUX, "vec_in_dim": None, "axes_dim": [16] * 4, "in_channels": 32, "out_channels": 32, "txt_ids_dims": [3]},
                (32,), 0.7, _guidance_and_reference),
    SmallFamily("Chroma", {**_FLUX, "out_dim": 128, "hidden_dim": 160, "n_layers": 3}, timestep=0.7,
                extra=lambda draw, batch, *_: {"guidance": torch.zeros(batch)}),
    SmallFamily("Wan", {**_WAN, "num_layers": 3}, (16, 2)),
    SmallFamily("Wan VACE", {**_WAN, "num_layers": 3, "vace_layers": 3}, (16, 2), extra=lambda draw, batch, tokens, height, width: {
        "vace_context": draw(batch, 1, 96, 2, height, width), "vace_strength": [0.8]}),
    SmallFamily("Qwen-Image", dict(attention_head_dim=64, num_attention_heads=2, axes_dims_rope=(16, 24, 24), joint_attention_dim=CONTEXT),
                (16, 1), 0.7, lambda draw, batch, *_: {"ref_latents": [draw(batch, 16, 1, *REFERENCE)]}),
    SmallFamily("Lumina2", {**_LUMINA, "dim": 128, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [8, 12, 12]}, timestep=0.7,
                extra=lambda draw, batch, tokens, *_: {"num_tokens": tokens}),
    # Its modulation is 256 wide, and the model not narrower.
    SmallFamily("Z-Image", {**_LUMINA, "dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "pad_tokens_multiple": 32,
                            "time_scale": 1000.0, "rope_theta": 256.0}, timestep=0.7,
                extra=lambda draw, batch, tokens, *_: {"num_tokens": tokens}),
    SmallFamily("HunyuanVideo", _FLUX, (16, 2), extra=_pooled_and_guidance),
    SmallFamily("LTXV", dict(in_channels=16, cross_attention_dim=128, attention_head_dim=64, num_attention_heads=2,
                             caption_channels=CONTEXT), (16, 2), 0.7, _mask_and_frame_rate),
    SmallFamily("SD3", dict(adm_in_channels=POOLED, pos_embed_max_size=32, num_patches=32 * 32, context_embedder_config={
        "target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 256}}), extra=_pooled),
    SmallFamily("HiDream", dict(attention_head_dim=64, num_attention_heads=2, axes_dims_rope=(32, 16, 16), text_emb_dim=POOLED,
                                caption_channels=[CONTEXT, CONTEXT]),
                extra=lambda draw, batch, tokens, *_: {**_pooled(draw, batch),
                                                       "encoder_hidden_states_llama3": draw(batch, 5, tokens, CONTEXT)}),
    SmallFamily("AuraFlow", dict(dim=128, n_heads=2, n_layers=4, global_conddim=128, cond_seq_dim=CONTEXT), (4,), 0.7),
    SmallFamily("Cosmos", {**_COSMOS, "block_x_format": "THWBD", "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
                           "extra_per_block_abs_pos_emb_type": "learnable"}, (16, 2), 0.25, lambda *_: {"fps": None}),
    SmallFamily("Cosmos Predict2", {**_COSMOS, "pos_emb_learnable": True, "rope_enable_fps_modulation": False}, (16, 2), 0.7,
                lambda *_: {"fps": None}),
    SmallFamily("PixArt", dict(hidden_size=192, num_heads=4, caption_channels=CONTEXT), (4,)),
    SmallFamily("SD1.5", {**_UNET, "channel_mult": [1, 2, 2], "num_heads": 2, "transformer_depth": [1, 1, 0],
                          "transformer_depth_output": [1, 1, 1, 1, 0, 0]}, (4,)),
    SmallFamily("SDXL", {**_UNET, "channel_mult": [1, 1, 1], "num_head_channels": 16, "adm_in_channels": POOLED,
                         "transformer_depth": [0, 1, 2], "transformer_depth_output": [0, 0, 1, 1, 2, 2],
                         "transformer_depth_middle": 2}, (4,), extra=_pooled),
    # Its blocks get their attention as a function made anew in each step, and what its first step keeps of the text.
    SmallFamily("HiDream-O1", dict(
        text_config_overrides=dict(vocab_size=151936, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                                   num_key_value_heads=2, head_dim=32, rope_dims=[6, 5, 5]),
        vision_config_overrides=dict(hidden_size=64, num_heads=2, intermediate_size=128, depth=2, deepstack_visual_indexes=(0,))),
                (3,), 700.0, _tokens_of_pixels, scale=8, steps=2, reset=lambda model: model.clear_kv_cache()),
    SmallFamily("Ideogram 4", dict(in_channels=16, num_layers=3, num_attention_heads=2, attention_head_dim=64, intermediate_size=256,
                                   adaln_dim=64, llm_features_dim=CONTEXT, mrope_section=(12, 10, 10)), timestep=0.7),
    # Its blocks write into their input.
    SmallFamily("MiniMax H3", dict(hidden_size=128, num_attention_heads=2, attention_head_dim=96, ffn_hidden_size=256, latents_dim=16,
                                   text_dim=CONTEXT, time_embed_hidden_size=128, time_embed_dim=64), (16, 2), audio=(32, 2, 6),
                batches=False),
    # Its blocks take and give two streams.
    SmallFamily("LTX-AV", dict(in_channels=16, cross_attention_dim=128, audio_cross_attention_dim=64, attention_head_dim=64,
                               audio_attention_head_dim=32, num_attention_heads=2, audio_num_attention_heads=2, caption_channels=CONTEXT,
                               audio_in_channels=128, connector_attention_head_dim=24, connector_num_attention_heads=2),
                (16, 2), 0.7, lambda *_: {"frame_rate": 25}, context=2 * CONTEXT, audio=(8, 6, 16)),
)}


def _mask(batch, tokens, length):
    return (torch.arange(length) < tokens).long().expand(batch, length)


def _reference(*shape):
    return lambda draw, batch, tokens, *_: {"num_tokens": tokens, "ref_latents": [draw(batch, *shape, *REFERENCE)]}


def _clip(draw, batch):
    return {"clip_fea": draw(batch, 257, 1280)}


def _guidance_and_glyphs(draw, batch, *_):
    return {"guidance": torch.full((batch,), 6.0), "txt_byt5": draw(batch, 12, 1472)}


_OMNIGEN = dict(hidden_size=128, num_layers=3, num_attention_heads=4, num_kv_heads=2, multiple_of=32, axes_dim_rope=(8, 12, 12),
                timestep_scale=1000.0)
_CASCADE = dict(c_cond=64, c_r=32)
_VIDEO = {**_WAN, "num_layers": 3}

# More of them: newer, older or less used, and those for sounds and shapes.
MORE = {family.name: family for family in (
    # Its text goes through its adapter before the sampler, and is padded.
    SmallFamily("Anima", dict(model_channels=128, num_heads=2, use_adaln_lora=True, adaln_lora_dim=32, rope_enable_fps_modulation=False),
                (16, 1), 0.7, lambda draw, batch, tokens, *_: {
                    "context": torch.nn.functional.pad(draw(batch, tokens, 1024), (0, 0, 0, 512 - tokens))}),
    SmallFamily("Stable Audio", dict(embed_dim=128, num_heads=2, cond_token_dim=64, global_cond_dim=2 * 64), (64,), 0.7,
                lambda draw, batch, *_: {"global_embed": draw(batch, 2 * 64)}, context=64,
                area=lambda height, width: (height * width // 4,)),
    # Its encoder of lyrics has one size, whatever its arguments are.
    SmallFamily("ACE-Step", dict(num_layers=3, num_attention_heads=2, text_embedding_dim=CONTEXT), (8, 16), 700.0,
                lambda draw, batch, tokens, *_: {"lyric_token_idx": torch.arange(tokens).expand(batch, tokens) + 5,
                                                 "speaker_embeds": torch.zeros(batch, 512), "lyrics_strength": 1.0},
                area=lambda height, width: (height * width // 4,)),
    SmallFamily("HunyuanDiT", dict(hidden_size=128, num_heads=2, depth=6, text_states_dim=CONTEXT, text_states_dim_t5=64,
                                   attn_precision=torch.float32), (4,), 700.0,
                lambda draw, batch, tokens, height, width: {
                    "context": draw(batch, 77, CONTEXT), "text_embedding_mask": _mask(batch, tokens, 77),
                    "encoder_hidden_states_t5": draw(batch, 256, 64), "text_embedding_mask_t5": _mask(batch, tokens, 256),
                    "image_meta_size": torch.tensor([[8.0 * height, 8.0 * width, 8.0 * height, 8.0 * width, 0, 0]] * batch)}),
    SmallFamily("Hunyuan3D 2.0", dict(hidden_size=128, num_heads=2, depth=2, depth_single_blocks=3, context_in_dim=CONTEXT), (64,), 0.7,
                lambda draw, batch, *_: {"guidance": torch.full((batch,), 5.0)}, area=lambda height, width: (height * width // 4,)),
    # The last of its blocks are mixtures of experts.
    SmallFamily("Hunyuan3D 2.1", dict(hidden_size=128, num_heads=2, depth=7, num_moe_layers=2, context_dim=CONTEXT,
                                      guidance_cond_proj_dim=None), (64,), 0.7,
                lambda draw, batch, *_: {"guidance": torch.full((batch,), 5.0)}, area=lambda height, width: (height * width // 4,)),
    SmallFamily("OmniGen2", {**_OMNIGEN, "text_feat_dim": CONTEXT}, timestep=0.7, extra=_reference(16)),
    SmallFamily("Boogu", {**_OMNIGEN, "instruction_feat_dim": CONTEXT}, timestep=0.7, extra=_reference(16)),
    # The tokens of its text that count are cut out of it in each block.
    SmallFamily("Mochi", dict(hidden_size_x=128, hidden_size_y=64, mlp_ratio_x=96.0, num_heads=2, t5_feat_dim=CONTEXT), (12, 2), 0.7,
                lambda draw, batch, tokens, *_: {"context": draw(batch, 256, CONTEXT), "attention_mask": _mask(batch, tokens, 256),
                                                 "num_tokens": tokens}),
    SmallFamily("CogVideoX", dict(num_attention_heads=2, time_embed_dim=64, text_embed_dim=CONTEXT, use_rotary_positional_embeddings=True),
                (16, 2), 700.0, lambda draw, batch, *_: {"context": draw(batch, 226, CONTEXT)}),
    SmallFamily("Kandinsky 5", dict(model_dim=128, ff_dim=256, time_dim=64, in_text_dim=CONTEXT, in_text_dim2=POOLED), (33, 2),
                extra=_pooled),
    SmallFamily("Krea 2", dict(features=128, heads=2, kvheads=1, txtdim=64, txtlayers=4, txtheads=2, txtkvheads=2), (16, 1), 0.7,
                context=4 * 64),
    SmallFamily("Lens", dict(in_channels=32, out_channels=8, num_attention_heads=2, enc_hidden_dim=CONTEXT), (32,), 0.7,
                lambda draw, batch, tokens, *_: {"attention_mask": _mask(batch, tokens, tokens)}, context=4 * CONTEXT),
    SmallFamily("Ernie-Image", dict(hidden_size=128, num_attention_heads=2, ffn_hidden_size=256, in_channels=32, out_channels=32,
                                    text_in_dim=CONTEXT, rope_axes_dim=(16, 24, 24)), (32,), 700.0),
    SmallFamily("JoyImage", dict(hidden_size=128, num_attention_heads=2, text_dim=CONTEXT, rope_dim_list=[16, 24, 24], theta=10000),
                (16, 1), 700.0, lambda draw, batch, *_: {"ref_latents": [draw(batch, 16, 1, *REFERENCE)]}),
    SmallFamily("PixelDiT", dict(hidden_size=128, num_groups=2, pixel_attn_hidden_size=128, pixel_num_groups=2, txt_embed_dim=CONTEXT),
                (3,), 700.0, scale=8),
    SmallFamily("Z-Image pixel space", dict(
        dim=256, n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512], multiple_of=32, cap_feat_dim=CONTEXT,
        ffn_dim_multiplier=8 / 3, qk_norm=True, z_image_modulation=True, pad_tokens_multiple=32, time_scale=1000.0, rope_theta=256.0,
        patch_size=16, in_channels=3, decoder_hidden_size=128), (3,), 0.7,
                lambda draw, batch, tokens, *_: {"num_tokens": tokens}, scale=8),
    SmallFamily("Mage-Flow", dict(in_channels=32, out_channels=32, attention_head_dim=64, num_attention_heads=2,
                                  joint_attention_dim=CONTEXT, axes_dims_rope=(16, 24, 24)), (32,), 0.7,
                lambda draw, batch, *_: {"ref_latents": [draw(batch, 32, *REFERENCE)]},
                process_timestep=lambda timestep: timestep.to(torch.bfloat16)),
    SmallFamily("Wan camera", {**_VIDEO, "in_dim": 32}, (32, 2), extra=lambda draw, batch, tokens, height, width: {
        **_clip(draw, batch), "camera_conditions": draw(batch, 24, 2, 8 * height, 8 * width)}),
    SmallFamily("HuMo", _VIDEO, (16, 2), extra=lambda draw, batch, tokens, height, width: {
        "audio_embed": draw(batch, 2, 8, 5, 1280), "reference_latent": draw(batch, 16, 1, height, width)}),
    SmallFamily("Wan S2V", {**_VIDEO, "audio_dim": 64, "audio_inject_layers": [0, 2]}, (16, 2),
                extra=lambda draw, batch, tokens, height, width: {
                    "audio_embed": draw(batch, 25, 64, 8), "reference_latent": draw(batch, 16, 1, height, width),
                    "control_video": draw(batch, 16, 2, height, width)}),
    # Its first block of five is followed by one that looks at a face, of a fixed size.
    SmallFamily("Wan Animate", {**_WAN, "num_layers": 10, "in_dim": 36}, (36, 2), extra=lambda draw, batch, tokens, height, width: {
        **_clip(draw, batch), "pose_latents": draw(batch, 16, 1, height, width), "face_pixel_values": draw(batch, 3, 1, 512, 512)}),
    SmallFamily("SCAIL", _VIDEO, (20, 2), extra=lambda draw, batch, tokens, height, width: {
        **_clip(draw, batch), "reference_latent": draw(batch, 20, 1, height, width),
        "pose_latents": draw(batch, 20, 2, height // 2, width // 2)}),
    SmallFamily("Chroma Radiance", {**_FLUX, "vec_in_dim": None, "depth": 2, "out_dim": 128, "hidden_dim": 160, "n_layers": 3,
                                    "nerf_hidden_size": 16, "nerf_depth": 2}, (3,), 0.7,
                lambda draw, batch, *_: {"guidance": torch.zeros(batch)}, scale=8),
    SmallFamily("Hunyuan Image 2.1", {**_FLUX, "vec_in_dim": None, "axes_dim": [32, 32]}, (64,), 700.0, _guidance_and_glyphs,
                area=lambda height, width: (height // 2, width // 2)),
    SmallFamily("HunyuanVideo 1.5", {**_FLUX, "vec_in_dim": None, "depth": 3, "depth_single_blocks": 0}, (65, 2), 700.0,
                lambda draw, batch, *_: {**_guidance_and_glyphs(draw, batch), "clip_fea": draw(batch, 49, 1152)},
                area=lambda height, width: (height // 2, width // 2)),
    SmallFamily("Stable Cascade C", {**_CASCADE, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]], "c_clip_text": CONTEXT,
                                     "c_clip_text_pooled": POOLED, "c_clip_img": 32}, (16,), 0.7,
                lambda draw, batch, tokens, *_: {
                    "context": None, "clip_text": draw(batch, tokens, CONTEXT), "clip_text_pooled": draw(batch, 1, POOLED),
                    "clip_img": torch.zeros(batch, 1, 32), "sca": torch.zeros(batch), "crp": torch.zeros(batch)}),
    SmallFamily("Stable Cascade B", {**_CASCADE, "c_hidden": [32, 32, 64, 64], "nhead": [-1, -1, 2, 2], "c_clip": POOLED,
                                     "blocks": [[1, 1, 2, 1], [1, 2, 1, 1]], "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]]}, (4,), 0.7,
                lambda draw, batch, *_: {"context": None, "clip": draw(batch, 1, POOLED), "effnet": draw(batch, 16, *REFERENCE),
                                         "sca": torch.zeros(batch)}, scale=2),
    SmallFamily("Stable Audio 3", dict(embed_dim=128, num_heads=2, io_channels=32, cond_token_dim=64, global_cond_dim=64,
                                       num_memory_tokens=8, local_add_cond_dim=33), (32,), 0.7,
                lambda draw, batch, tokens, height, width: {
                    "global_embed": draw(batch, 64), "local_add_cond": torch.zeros(batch, 33, height * width // 4)}, context=64,
                area=lambda height, width: (height * width // 4,)),
    SmallFamily("SVD", {**_UNET, "channel_mult": [1, 1, 1], "num_head_channels": 16, "adm_in_channels": POOLED,
                        "transformer_depth": [1, 1, 0], "transformer_depth_output": [1, 1, 1, 1, 0, 0]}, (8,), 0.25,
                lambda draw, batch, *_: {"context": draw(batch, 1, CONTEXT), **_pooled(draw, batch), "num_video_frames": 3}, frames=3),
)}
