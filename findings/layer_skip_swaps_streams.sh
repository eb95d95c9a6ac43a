#!/usr/bin/env bash
# diffusers 0.42.1: LayerSkipConfig swaps image and text where a block returns the text first.
# Expected: a skipped block returns what it was given, in the order in which it returns; the library keeps that order
# per class of block (TransformerBlockRegistry), and its caches heed it. Seen: the hook that skips always returns
# (image, text). Flux, Qwen-Image and SD3 blocks return (text, image), so all that follows takes text tokens for the
# image: the prediction has as many tokens as the text, or, where both are as long, is silently made of the text.
# It matters to all who ablate blocks or use SkipLayerGuidance: what they measure is not the block's part.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import sys

import torch
import diffusers
from diffusers import (
    CogView4Transformer2DModel,
    FluxTransformer2DModel,
    LayerSkipConfig,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.hooks import apply_layer_skip

print("diffusers", diffusers.__version__)
IMAGE = 16  # tokens


def flux(text):
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )
    return model, dict(
        hidden_states=torch.randn(1, IMAGE, 4), encoder_hidden_states=torch.randn(1, text, 32),
        pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]), img_ids=torch.zeros(IMAGE, 3),
        txt_ids=torch.zeros(text, 3),
    )


def qwen(text):
    model = QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )
    return model, dict(
        hidden_states=torch.randn(1, IMAGE, 4), encoder_hidden_states=torch.randn(1, text, 16),
        encoder_hidden_states_mask=torch.ones(1, text, dtype=torch.long), timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
    )


def sd3(text):
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return model, dict(
        hidden_states=torch.randn(1, 4, 4, 4), encoder_hidden_states=torch.randn(1, text, 32),
        pooled_projections=torch.randn(1, 32), timestep=torch.tensor([500.0]),
    )


def cogview4(text):  # its blocks return the image first
    model = CogView4Transformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4,
    )
    return model, dict(
        hidden_states=torch.randn(1, 4, 4, 4), encoder_hidden_states=torch.randn(1, text, 16),
        timestep=torch.tensor([500]), original_size=torch.tensor([[32, 32]]), target_size=torch.tensor([[32, 32]]),
        crop_coords=torch.tensor([[0, 0]]),
    )


@torch.no_grad()
def last_block_gets(make, text):
    """Image and text tokens that the last of three blocks receives when the one before is skipped."""
    torch.manual_seed(0)
    model, inputs = make(text)
    got = []

    def note(block, args, kwargs):
        image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        words = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        got.append((image.shape[1], words.shape[1]))

    model.eval().transformer_blocks[2].register_forward_pre_hook(note, with_kwargs=True)
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    try:
        shape = tuple(model(**inputs, return_dict=False)[0].shape)
    except RuntimeError as error:
        shape = type(error).__name__
    return *got, shape


class Passing(torch.nn.Module):
    """A block of Flux that changes nothing."""

    def forward(self, hidden_states, encoder_hidden_states, **others):
        return encoder_hidden_states, hidden_states


@torch.no_grad()
def as_long():
    """Shapes of Flux' prediction with a text as long as the image: skipped by hand and by the hook; are they equal?"""
    torch.manual_seed(0)
    model, inputs = flux(IMAGE)
    model.eval()
    block, model.transformer_blocks[1] = model.transformer_blocks[1], Passing()
    right = model(**inputs, return_dict=False)[0]
    model.transformer_blocks[1] = block
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    hooked = model(**inputs, return_dict=False)[0]
    return right.shape == hooked.shape, torch.allclose(right, hooked, atol=1e-4)


seen = {make.__name__: last_block_gets(make, 7) for make in (cogview4, flux, qwen, sd3)}
for name, (tokens, shape) in seen.items():
    print(f"{name:9} 16 image and 7 text tokens; after a skip: {tokens[0]} and {tokens[1]}; prediction: {shape}")
seen["as long"] = as_long()
print("flux, 16 image and 16 text tokens: prediction of the right shape, right values:", seen["as long"])
expected = {
    "cogview4": ((16, 7), (1, 4, 4, 4)), "flux": ((7, 16), (1, 7, 4)), "qwen": ((7, 16), "RuntimeError"),
    "sd3": ((7, 16), "RuntimeError"), "as long": (True, False),
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: a skipped block hands image tokens on as text, and text tokens as the image")
EOF
