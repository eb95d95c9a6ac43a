"""Pipelines with a transformer and autoencoder after Wan's: Lucy Edit, ChronoEdit, AnyFlow."""

from __future__ import annotations

from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
)

from . import Ask, Built, builds, parts, wan


@builds("LucyEditPipeline")
def lucy(kind: type) -> Built:
    """As published, with a timestep for each token, like the 5B model of Wan 2.2."""
    pipe = kind(
        **wan.text_parts(kind), vae=wan.wan_vae(), scheduler=wan.flow_scheduler(),
        transformer=wan.wan_transformer(in_channels=32), expand_timesteps=True,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return wan.wan_call(ask) | {"video": [parts.frames()] * len(ask.prompts) * ask.images}

    return Built(parts.quiet(pipe), call)


@builds("ChronoEditPipeline")
def chronoedit(kind: type) -> Built:
    transformer = wan.wan_transformer(ChronoEditTransformer3DModel, in_channels=36, image_dim=16, added_kv_proj_dim=24)
    pipe = kind(
        **wan.text_parts(kind), vae=wan.wan_vae(), scheduler=wan.flow_scheduler(), image_encoder=wan.vision(),
        image_processor=wan.vision_processor(), transformer=transformer,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return wan.wan_call(ask) | {"image": parts.pil(), "max_sequence_length": 512}

    return Built(parts.quiet(pipe), call, images=False)  # the embedded picture is repeated for each prompt only


@builds("AnyFlowPipeline")
def anyflow(kind: type) -> Built:
    pipe = kind(
        **wan.text_parts(kind), vae=wan.wan_vae(), scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=wan.wan_transformer(AnyFlowTransformer3DModel),
    )  # fmt: skip
    return Built(parts.quiet(pipe), wan.wan_call)


@builds("AnyFlowFARPipeline")
def anyflow_far(kind: type) -> Built:
    """Three chunks of one frame in time, one after the other; of each the keys and values are kept by another call."""
    transformer = wan.wan_transformer(AnyFlowFARTransformer3DModel, chunk_partition=(1, 1, 1), full_chunk_limit=2)
    pipe = kind(
        **wan.text_parts(kind), vae=wan.wan_vae(), scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=transformer,
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: wan.wan_call(ask) | {"num_frames": 9})
