"""Kandinsky 5."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel

from . import Ask, Built, builds, parts


def clip() -> CLIPTextModel:
    """As long as the pipelines ask for."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=parts.WORDS + 4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


@builds("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline")
def kandinsky5(kind: type) -> Built:
    start, end = kind.__name__.removeprefix("Kandinsky5").removesuffix("Pipeline").split("2")
    video = end == "V"
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=video or start == "I",
    )  # fmt: skip
    levels = 4
    torch.manual_seed(0)
    if video:
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * levels,
            up_block_types=("HunyuanVideoUpBlock3D",) * levels, block_out_channels=(8,) * levels, layers_per_block=1,
            norm_num_groups=4, scaling_factor=0.5,
        ).eval()  # fmt: skip
    else:
        vae = parts.vae(
            block_out_channels=[8] * levels, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=1,
        )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    processor = parts.qwen2_vl_processor()
    pipe = kind(
        parts.randomise(transformer.eval()), vae, parts.qwen2_vl_text(), processor, clip(),
        parts.tokenizer(77), scheduler,
    )  # fmt: skip
    # so many of our tokenizer's tokens come before the prompt
    pipe.prompt_template_encode_start_idx = len(processor.tokenizer(pipe.prompt_template.split("{}")[0]).input_ids) - 1
    if not video:
        pipe.resolutions = [(64, 64)]  # all others are large

    def call(ask: Ask) -> dict:
        # words, since embeddings are not repeated for several images
        given = {"num_images_per_prompt": ask.images}
        if video:  # from an image, the first four frames of latents are changed at the end to be like the others
            given = {"num_frames": 21 if start == "I" else 9, "num_videos_per_prompt": ask.images}
        if start == "I":
            given["image"] = [parts.pil(64)] * (len(ask.prompts) * ask.images)
        return given | parts.words(ask) | {
            "height": 64, "width": 64, "max_sequence_length": 64, "guidance_scale": 5.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    # an edited image must be there once for each text and once for each result
    return Built(parts.quiet(pipe), call, images=video or start == "T")
