"""JoyImage, to edit one image or several."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
)

from . import Ask, Built, builds, parts


@builds("JoyImageEditPipeline", "JoyImageEditPlusPipeline")
def joyimage(kind: type) -> Built:
    plus = "Plus" in kind.__name__
    torch.manual_seed(0)
    transformer = (JoyImageEditPlusTransformer3DModel if plus else JoyImageEditTransformer3DModel)(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=4, text_dim=32, mlp_width_ratio=2.0,
        num_layers=2, rope_dim_list=[2, 2, 4],
    )  # fmt: skip
    vae = AutoencoderKLWan(  # of large patches, since each picture is made one of a million pixels
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False] * 3,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_temporal=1, scale_factor_spatial=128,
        patch_size=16, in_channels=3 * 256, out_channels=3 * 256,
    ).eval()  # fmt: skip
    processor = parts.qwen3_vl_processor()
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5), vae=vae, text_encoder=parts.qwen3_vl_text(),
        tokenizer=processor.tokenizer, transformer=parts.randomise(transformer.eval()), processor=processor,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        torch.manual_seed(0)  # an image's latents are sampled without the generator
        image = {"image": parts.pil(32), "num_images_per_prompt": ask.images}
        if plus:
            image = {"images": [[parts.pil(32, 7), parts.pil(32, 8)]] * len(ask.prompts), "height": 512, "width": 512}
        return image | parts.words(ask) | {
            "guidance_scale": 4.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=not plus)
