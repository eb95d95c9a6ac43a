"""AltDiffusion."""

from __future__ import annotations

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from . import Ask, Built, builds, parts


@builds("AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline")
def alt_diffusion(kind: type) -> Built:
    changes = "Img2Img" in kind.__name__
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DPMSolverMultistepScheduler(**noise)
    if changes:
        scheduler = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
    pipe = kind(
        vae=parts.vae(), text_encoder=None, tokenizer=None, unet=parts.sd_unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = {"height": 8, "width": 8, "num_inference_steps": ask.steps}
        if changes:
            made = {"image": parts.picture(8), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        return parts.text(ask, 5, 32) | made | {
            "num_images_per_prompt": ask.images, "guidance_scale": 7.5 if ask.guided else 1.0,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
