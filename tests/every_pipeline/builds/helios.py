"""Helios video pipelines: a video chunk by chunk, the pyramid's chunks from coarse to fine."""

from __future__ import annotations

from diffusers import HeliosScheduler, HeliosTransformer3DModel

from . import Ask, Built, builds, parts, wan


@builds("HeliosPipeline", "HeliosPyramidPipeline")
def helios(kind: type) -> Built:
    pyramid = "Pyramid" in kind.__name__
    pipe = kind(
        **wan.text_parts(kind), vae=wan.wan_vae(),
        scheduler=HeliosScheduler(
            stages=3 if pyramid else 1, use_dynamic_shifting=True,
            gamma=0.3,  # with 1/3, the default, the covariance of the pyramid's noise is singular in float32
        ),
        transformer=wan.wan_transformer(HeliosTransformer3DModel, rope_dim=(4, 4, 4), rope_max_seq_len=None),
    )  # fmt: skip

    def call(
        ask: Ask,
    ) -> dict:  # two chunks, each denoised in all steps (in the pyramid, in each of three sizes)
        asked = wan.wan_call(ask) | {"num_frames": 10, "num_latent_frames_per_chunk": 2}
        if pyramid:
            asked["pyramid_num_inference_steps_list"] = [asked.pop("num_inference_steps")] * 3
        return asked

    return Built(parts.quiet(pipe), call, images=False)  # the pipeline repeats the text but not the latents
