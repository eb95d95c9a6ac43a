"""LTX 2 and 2.5, modular."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel

from . import Ask, Built, builds, ltx2, parts
from .modular import assemble

LEFT_OUT = ("text_encoder", "prompt_enhancer", "duration")


def guide(pipe, ask: Ask) -> None:
    """Classifier-free guidance without the two other guidances, which would each call the transformer once more."""
    for name in ("guider", "audio_guider"):
        old = getattr(pipe, name)
        new = old.new(guidance_scale=3.0 if ask.guided else 1.0, stg_scale=0.0, modality_scale=1.0)
        pipe.update_components(**{name: new})


def text(ask: Ask, video: int, audio: int) -> dict:
    """What the text connectors return."""
    given = {}
    for prefix, seeds in (("", ask.prompts), ("negative_", (ask.negative,) * len(ask.prompts))):
        given |= {
            f"{prefix}connector_prompt_embeds": parts.stacked(seeds, 8, video),
            f"{prefix}connector_audio_prompt_embeds": parts.stacked(seeds, 8, audio),
            f"{prefix}connector_attention_mask": torch.ones(len(seeds), 8),
        }
    return given


def decoder() -> LTX2VideoDiffusionDecoderModel:
    torch.manual_seed(0)
    made = LTX2VideoDiffusionDecoderModel(
        latent_channels=8, decoder_head_dim=16, decoder_stage_channels=(32, 16, 16), decoder_stage_depths=(1, 1, 2),
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3)), decoder_upsample_strides=((1, 2, 2), (2, 1, 1)),
        decoder_upsample_channel_reductions=(2, 1), decoder_stage5_kernel=(3, 3, 3), decoder_t_emb_dim=16,
        spatial_compression_ratio=8, temporal_compression_ratio=2,
    )  # fmt: skip
    return parts.randomise(made.eval())


@builds("LTX2ModularPipeline", "LTX25ModularPipeline")
def ltx_2(kind: type) -> Built:
    later = "LTX25" in kind.__name__
    changes = {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True}
    made = ltx2.ltx2_parts(**(changes | {"use_prompt_embeddings": False} if later else {}))
    components = {name: made[name] for name in ("transformer", "scheduler", "vae", "audio_vae")}
    if later:  # its own video decoder denoises too; the vocoder does not
        components["diffusion_decoder"] = decoder()
    decoding = ("decode.default.audio_decode", "decode.condition.audio_decode") if later else ("decode",)
    pipe = assemble(kind, without=(*LEFT_OUT, *decoding), **components)

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        if later:
            pipe.diffusion_decoder.decoder.default_num_inference_steps = ask.steps  # the call has no argument for it
        return text(ask, 32, 16 if later else 32) | {
            "height": 32, "width": 64, "num_frames": 3, "num_videos_per_prompt": ask.images,
            "batch_size": len(ask.prompts), "dtype": torch.float32, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output": ["latents", "audio_latents", *(["videos"] if later else [])],
        } | ({"output_type": "pt"} if later else {})  # fmt: skip

    return Built(pipe, call)


@builds("EchoModularPipeline")
def echo(kind: type) -> Built:
    """Distilled, without a scheduler, with remembered pictures before the tokens of the video."""
    made = ltx2.ltx2_parts(
        gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True,
        use_prompt_embeddings=False,
    )  # fmt: skip
    pipe = assemble(kind, transformer=made["transformer"], vae=made["vae"], audio_vae=made["audio_vae"])

    def call(ask: Ask) -> dict:
        given = {name: value for name, value in text(ask, 32, 16).items() if not name.startswith("negative")}
        return given | {
            "memory_images": [parts.pil()], "height": 32, "width": 64, "num_frames": 3,
            "num_videos_per_prompt": ask.images, "sigmas": [1.0 - step / ask.steps for step in range(ask.steps + 1)],
            "generator": parts.generator(), "output": ["latents", "audio_latents"],
        }  # fmt: skip

    return Built(pipe, call, guided=False, negative=False)
