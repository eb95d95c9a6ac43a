"""Motif Video pipelines."""

from __future__ import annotations

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, MotifVideoTransformer3DModel
from transformers import SiglipVisionConfig

from . import Ask, Built, builds, parts, wan


def motif_text():
    """The text encoder, which is needed where several videos a prompt are made (negative embeddings are not repeated),
    and whose vision tower sees the picture."""
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig, T5Gemma2TextConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    torch.manual_seed(0)
    text = T5Gemma2TextConfig(
        vocab_size=parts.WORDS + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, dropout_rate=0.0,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    first = parts.WORDS + 4
    config = T5Gemma2EncoderConfig(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=first,
        eoi_token_index=first + 1, image_token_index=first + 2,
    )  # fmt: skip
    return T5Gemma2Encoder(config, eoi_token_index=first + 1).eval()


@builds("MotifVideoPipeline", "MotifVideoImage2VideoPipeline")
def motif_video(kind: type) -> Built:
    from_image = "Image2Video" in kind.__name__
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=3, num_decoder_layers=1,
        mlp_ratio=2.0, text_embed_dim=32, image_embed_dim=16, rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    ).eval()  # fmt: skip
    tokenizer = parts.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    extractor = None
    if from_image:
        from transformers import SiglipImageProcessor

        extractor = SiglipImageProcessor(size={"height": 16, "width": 16})
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=wan.wan_vae(),
        text_encoder=motif_text(), tokenizer=tokenizer, transformer=transformer,
        guider=ClassifierFreeGuidance(guidance_scale=4.0), feature_extractor=extractor,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        pipe.guider.guidance_scale = 4.0 if ask.guided else 1.0  # the call has no argument for it
        asked = wan.wan_call(ask) | ({"image": parts.pil()} if from_image else {})
        del asked["guidance_scale"]
        return asked

    several = not from_image  # there is one picture, and its latents are not repeated
    return Built(parts.quiet(pipe), call, many=several, images=several)
