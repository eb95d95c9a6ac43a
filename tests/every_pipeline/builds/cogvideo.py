"""CogVideoX."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)

from . import Ask, Built, builds, parts


@builds(
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "CogVideoXFunControlPipeline",
)
def cogvideo(kind: type) -> Built:
    name = kind.__name__
    image, control, video = (word in name for word in ("Image", "Control", "VideoToVideo"))
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8 if image or control else 4, out_channels=4,
        time_embed_dim=16, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
        temporal_compression_ratio=2, max_text_seq_length=6, patch_size=2,
        use_rotary_positional_embeddings=name != "CogVideoXPipeline", ofs_embed_dim=16 if image else None,
    ).eval()  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        temporal_compression_ratio=2, sample_height=16, sample_width=16, scaling_factor=0.7,
    ).eval()  # fmt: skip
    scheduler = (CogVideoXDPMScheduler if image or video else CogVideoXDDIMScheduler)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=1.0 if image or video else 3.0,
    )  # fmt: skip
    pipe = kind(None, None, vae, parts.randomise(transformer), scheduler)

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        if image:
            given = {"image": [parts.pil(16)] * count, "num_frames": 5}
        elif control:
            given = {"control_video": [parts.frames(5, 16)] * count}
        elif video:
            given = {"video": [parts.frames(5, 16)] * count, "strength": 1.0}
        else:
            given = {"num_frames": 5}
        return given | parts.text(ask, 6, 32) | {
            "height": 16, "width": 16, "guidance_scale": 6.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False)  # it sets the number of videos a prompt to 1
