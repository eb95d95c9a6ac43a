"""BLIP-Diffusion: a picture of a subject becomes words of the prompt; here with a ControlNet."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin, PNDMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from transformers import CLIPTextConfig

from . import Ask, Built, builds, parts
from .controlnet import controlnet
from .stable_diffusion import BETAS, SIZE, WIDTH

PICTURE = 16
QUERIES = 4


class QFormer(ModelMixin, ConfigMixin):
    """A few words from a picture. The real `Blip2QFormerModel` fails with transformers 5, which it builds upon."""

    @register_to_config
    def __init__(self, num_query_tokens: int = QUERIES):
        super().__init__()
        self.look = torch.nn.Conv2d(3, WIDTH, PICTURE // 2, stride=PICTURE // 2)

    def forward(self, image_input: torch.Tensor, text_input: list[str], return_dict: bool = True) -> torch.Tensor:
        return self.look(image_input).flatten(2).transpose(1, 2)


def qformer() -> QFormer:
    torch.manual_seed(0)
    return QFormer().eval()


def text_encoder() -> ContextCLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=parts.WORDS + 4, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return ContextCLIPTextModel(config).eval()


def components() -> dict:
    """What a BLIP-Diffusion pipeline has; it counts on an autoencoder as deep as the U-Net."""
    deeper = {
        "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    return {
        "tokenizer": parts.tokenizer(), "text_encoder": text_encoder(), "vae": parts.vae(**deeper),
        "unet": parts.sd_unet(), "scheduler": PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        "qformer": qformer(), "image_processor": BlipImageProcessor(size={"height": PICTURE, "width": PICTURE}),
    }  # fmt: skip


def called(ask: Ask) -> dict:
    """What one is called with; the negative prompt is one for all."""
    count = len(ask.prompts)
    return {
        "prompt": [parts.prompt(seed) for seed in ask.prompts], "reference_image": [parts.pil(PICTURE)] * count,
        "source_subject_category": ["w40"] * count, "target_subject_category": ["w41"] * count,
        "neg_prompt": parts.prompt(ask.negative), "guidance_scale": 7.5 if ask.guided else 1.0,
        "height": 2 * SIZE, "width": 2 * SIZE, "num_inference_steps": ask.steps, "generator": parts.generator(),
        "output_type": "pt",
    }  # fmt: skip


@builds("BlipDiffusionControlNetPipeline")
def blip_diffusion(kind: type) -> Built:
    made = components()
    pipe = kind(**made, controlnet=controlnet(made["unet"], conditioning_embedding_out_channels=(8, 8)))

    def call(ask: Ask) -> dict:
        return called(ask) | {"condtioning_image": parts.pil(2 * SIZE)}

    return Built(parts.quiet(pipe), call, images=False)
