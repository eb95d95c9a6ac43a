#!/usr/bin/env bash
# diffusers 0.42.1: with several prompts (or images) and several results of each, parts of the input are paired wrongly.
# Expected: each result depends on its own prompt, as in PixArt-Sigma, and is what it would be if asked for alone from
# the same noise. Seen: Sana repeats embeddings in the order 1 1 2 2 and attention masks in the order 1 2 1 2, Stable
# Video Diffusion so repeats embeddings and latents of its images: the second result of 1 is made with parts of 2.
# The (deprecated) panorama pipeline pairs latents in the order 1 1 2 2 with text in the order "negative, negative,
# positive, positive": of two results the first never sees the prompt, and the second is not guided.
# It matters to all who tell prompts apart by their place in the batch, as steering of one prompt among several does.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1 transformers==5.24.0
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import sys

import torch
import diffusers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPanoramaPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

print("diffusers", diffusers.__version__)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_alike(rows):
    """For each row the first that is the same."""
    return [next(j for j in range(len(rows)) if torch.allclose(rows[i], rows[j], atol=1e-5)) for i in range(len(rows))]


def as_alone(together, alone):
    return [torch.allclose(one, other, atol=1e-4) for one, other in zip(together, torch.cat(alone))]


def by_text(pipe, size, latents):
    """Two results of each of two texts, of which the first is short."""
    pipe.set_progress_bar_config(disable=True)
    text = numbers(0, 2, 6, 16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    masks = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["encoder_attention_mask"]), with_kwargs=True
    )

    def run(which, noise):
        return pipe(
            prompt_embeds=text[which], prompt_attention_mask=mask[which], negative_prompt=None, latents=noise,
            num_images_per_prompt=2, height=size, width=size, num_inference_steps=2, guidance_scale=1.0,
            use_resolution_binning=False, output_type="latent",
        ).images

    together = run([0, 1], latents)
    return masks[0].sum(1).tolist(), as_alone(together, [run([0], latents[:2]), run([1], latents[2:])])


def pixart():
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        cross_attention_dim=24, caption_channels=16, sample_size=16, use_additional_conditions=False,
    ).eval()
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=AutoencoderKL(), transformer=transformer, scheduler=DDIMScheduler()
    )
    return by_text(pipe, 16, numbers(1, 4, 4, 16, 16))


def sana():
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=8,
    ).eval()
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    )
    pipe = SanaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return by_text(pipe, 32, numbers(1, 4, 4, 8, 8))


def video():
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(32, 64),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, layers_per_block=1,
        cross_attention_dim=16, num_attention_heads=4, num_frames=2,
    ).eval()
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=16,
        )
    ).eval()
    size = {"height": 16, "width": 16}
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1
    )
    pipe = StableVideoDiffusionPipeline(
        vae=vae.eval(), image_encoder=encoder, unet=unet,
        feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction"),
    )
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    latents = numbers(1, 4, 2, 4, 8, 8)
    orders = []
    unet.register_forward_pre_hook(
        lambda module, args, kwargs: orders.append(
            (first_alike(kwargs["encoder_hidden_states"]), first_alike(args[0][:, :, 4:]))
        ),
        with_kwargs=True,
    )

    def run(which, noise):
        return pipe(
            images[which], height=8, width=8, num_frames=2, num_inference_steps=2, max_guidance_scale=1.0,
            noise_aug_strength=0.0, num_videos_per_prompt=2, latents=noise, output_type="latent",
        ).frames

    together = run([0, 1], latents)
    return orders[0], as_alone(together, [run([0], latents[:2]), run([1], latents[2:])])


def panorama():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipe = StableDiffusionPanoramaPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    latents = numbers(1, 2, 4, 8, 8)

    def run(positive, noise):
        return pipe(
            prompt_embeds=numbers(positive, 1, 4, 16), negative_prompt_embeds=numbers(3, 1, 4, 16), height=64,
            width=64, num_inference_steps=2, num_images_per_prompt=len(noise), guidance_scale=5.0, latents=noise,
            output_type="latent",
        ).images

    together = run(0, latents)
    follows = [not torch.equal(one, other) for one, other in zip(together, run(9, latents))]
    return follows, as_alone(together, [run(0, latents[:1]), run(0, latents[1:])])


seen = {make.__name__: make() for make in (pixart, sana, video, panorama)}
print("PixArt-Sigma, 2 texts of 2 and 6 words, 2 results each: words by mask, results as alone:", *seen["pixart"])
print("Sana, the same:", *seen["sana"])
print("Stable Video, 2 images, 2 videos each: order of (embeddings, latents), results as alone:", *seen["video"])
print("panorama, 1 prompt, 2 results: they change with the prompt, results as alone:", *seen["panorama"])
expected = {
    "pixart": ([2, 2, 6, 6], [True] * 4),
    "sana": ([2, 6, 2, 6], [True, False, False, True]),
    "video": (([0, 0, 2, 2], [0, 1, 0, 1]), [True, False, False, True]),
    "panorama": ([False, True], [False, False]),
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: results in the middle of a batch are made with parts of another prompt")
EOF
