"""UniDiffuser, from a text to a picture."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, UniDiffuserModel, UniDiffuserTextDecoder

from . import Ask, Built, builds, parts


@builds("UniDiffuserPipeline")
def unidiffuser(kind: type) -> Built:
    torch.manual_seed(0)
    unet = UniDiffuserModel(
        text_dim=16, clip_img_dim=32, num_text_tokens=16, num_attention_heads=4, attention_head_dim=8, in_channels=4,
        out_channels=4, num_layers=4, sample_size=8, patch_size=2, activation_fn="gelu", attention_bias=False,
        block_type="unidiffuser", use_data_type_embedding=True, ff_final_dropout=True,
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    decoder = UniDiffuserTextDecoder(
        prefix_length=16, prefix_inner_dim=32, prefix_hidden_dim=16, vocab_size=parts.WORDS + 4, n_positions=32,
        n_embd=32, n_layer=1, n_head=2,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=3
    )
    pipe = kind(
        vae=parts.vae(), text_encoder=parts.clip_text(), image_encoder=parts.clip_vision(), clip_image_processor=None,
        clip_tokenizer=parts.tokenizer(), text_decoder=decoder, text_tokenizer=None, unet=unet, scheduler=scheduler,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "height": 8, "width": 8,
            "num_images_per_prompt": ask.images, "guidance_scale": 8.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)  # what is guided away from is a text of noise
