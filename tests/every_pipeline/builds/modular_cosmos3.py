"""Cosmos 3, modular: the prompt's tokens and those of the video are one sequence, without a batch dimension."""

from __future__ import annotations

import torch
from diffusers import Cosmos3OmniTransformer, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from . import Ask, Built, builds, parts
from .modular import WITHOUT, assemble


def tokens(seed: int, count: int = 6) -> list[int]:
    """Of a prompt; the transformer embeds them itself."""
    return torch.randint(0, 64, (count,), generator=parts.generator(1000 + seed)).tolist()


@builds("Cosmos3OmniModularPipeline", "Cosmos3DistilledModularPipeline")
def cosmos3(kind: type) -> Built:
    guided = "Distilled" not in kind.__name__
    torch.manual_seed(0)
    transformer = Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=4, latent_patch_size=2,
        num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, vocab_size=64,
        rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    if guided:
        scheduler = UniPCMultistepScheduler(
            use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0,
            sigma_min=0.01,
        )  # fmt: skip
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    after = ("after_decode",) if guided else ()
    pipe = assemble(
        kind, without=(*WITHOUT, "vae_encoder", *after), transformer=parts.randomise(transformer.eval()),
        scheduler=scheduler,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        if guided:
            options = {"guidance_scale": 6.0 if ask.guided else 1.0, "num_inference_steps": ask.steps}
        else:  # it has a fixed number of steps
            options = {}
            pipe.update_components(distilled_sigmas=[1.0 - step / ask.steps for step in range(ask.steps)])
        return options | {
            "cond_input_ids": tokens(ask.prompts[0]), "uncond_input_ids": tokens(ask.negative, 4), "num_frames": 5,
            "height": 128, "width": 128, "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call, many=False, images=False, guided=guided, negative=guided)
