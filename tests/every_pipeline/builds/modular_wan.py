"""Wan 2.1 and 2.2, modular."""

from __future__ import annotations

from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from . import Ask, Built, builds, parts, wan
from .modular import assemble, guide


@builds(
    "WanModularPipeline",
    "WanImage2VideoModularPipeline",
    "Wan22ModularPipeline",
    "Wan22Image2VideoModularPipeline",
    "Wan22VaceModularPipeline",
)
def modular_wan(kind: type) -> Built:
    two, image, vace = "Wan22" in kind.__name__, "Image2Video" in kind.__name__, "Vace" in kind.__name__
    transformer, changes = WanTransformer3DModel, {}
    components = {"vae": wan.wan_vae()} if image or vace else {}
    if vace:
        transformer, changes = WanVACETransformer3DModel, {"vace_layers": [0, 1], "vace_in_channels": 2 * 16 + 4 * 4}
    elif image:
        changes = {"in_channels": 36}
    if image and not two:
        changes |= {"image_dim": 16, "added_kv_proj_dim": 24}
        components |= {"image_encoder": wan.vision(), "image_processor": wan.vision_processor()}
    if two:
        components["transformer_2"] = wan.wan_transformer(transformer, 1, **changes)
    pipe = assemble(
        kind, transformer=wan.wan_transformer(transformer, **changes), **components, scheduler=wan.flow_scheduler()
    )

    def call(ask: Ask) -> dict:
        guide(pipe, ask, 4.0, *(["guider", "guider_2"] if two else ["guider"]))
        size = 32 if image or vace else 64  # the latents are 8x8
        options = {"image": parts.pil(32)} if image else {"reference_images": parts.pil(32)} if vace else {}
        return options | parts.text(ask, 7, 32) | {
            "num_videos_per_prompt": ask.images, "num_inference_steps": ask.steps, "num_frames": 5, "height": size,
            "width": size, "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    # the embeddings of an image are not repeated for several videos, and VACE refuses more than one
    several = not vace and not (image and not two)
    return Built(pipe, call, many=several, images=several)
