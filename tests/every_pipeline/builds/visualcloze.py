"""VisualCloze: Flux Fill on a grid of pictures, alone and followed by an upsampling run."""

from __future__ import annotations

from . import Ask, Built, builds, flux, parts


@builds("VisualClozeGenerationPipeline", "VisualClozePipeline")
def visualcloze(kind: type) -> Built:
    both = kind.__name__ == "VisualClozePipeline"
    pipe = kind(
        scheduler=flux.scheduler(), vae=parts.vae(1), transformer=flux.transformer(12), resolution=8,
        **flux.encoders(),
    )  # fmt: skip
    if both:
        parts.quiet(pipe.generation_pipe)
        parts.quiet(pipe.upsampling_pipe)

    def call(ask: Ask) -> dict:
        words = parts.words(ask)["prompt"]
        grid = [[parts.pil(8, 7), parts.pil(8, 8)], [parts.pil(8, 9), None]]  # an example, and what is asked for
        made = {
            "task_prompt": words, "content_prompt": words, "image": [grid] * len(words),
            "num_images_per_prompt": ask.images, "generator": parts.generator(), "num_inference_steps": ask.steps,
            "guidance_scale": 30.0, "output_type": "latent", "max_sequence_length": 64,
        }  # fmt: skip
        return made | ({"upsampling_height": 16, "upsampling_width": 16} if both else {})

    return Built(parts.quiet(pipe), call, guided=False, negative=False)
