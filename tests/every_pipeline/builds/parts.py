"""Small components that many pipelines share."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

WORDS = 64


def prompt(seed: int) -> str:
    """A prompt of three words that `tokenizer` knows."""
    return " ".join(f"w{(7 * seed + i) % WORDS}" for i in range(3))


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    """Random text embeddings; the same seed and shape are the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def stacked(seeds: tuple[int, ...], *shape: int) -> torch.Tensor:
    """Random text embeddings of several prompts, `(prompts, *shape)`."""
    return torch.stack([embeddings(seed, *shape) for seed in seeds])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(size: int = 32, seed: int = 7) -> torch.Tensor:
    """A random image `(1, 3, size, size)` in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=generator(seed))


def pil(size: int = 32, seed: int = 7) -> Image.Image:
    """A random PIL image."""
    return Image.fromarray((picture(size, seed)[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, with a chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return wrapped


def clip_text(width: int = 32, layers: int = 2, projection: bool = False) -> CLIPTextModel:
    """A CLIP text encoder for `tokenizer`."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=WORDS + 4, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=16, projection_dim=width, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(latent_channels: int = 4, **changes) -> AutoencoderKL:
    """An autoencoder that does not change the size."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": [8], "norm_num_groups": 4, "latent_channels": latent_channels, "sample_size": 16,
        "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }  # fmt: skip
    return AutoencoderKL(**config | changes).eval()


def quiet(pipe):
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_unet(**changes) -> UNet2DConditionModel:
    """A U-Net as of Stable Diffusion 1, of two levels, for latents of 8x8 and text 32 wide."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes).eval()


def text(ask, *shape: int, end: str = "") -> dict[str, torch.Tensor]:
    """`prompt_embeds` and `negative_prompt_embeds` of random numbers, each `(prompts, *shape)`."""
    return {
        f"prompt_embeds{end}": stacked(ask.prompts, *shape),
        f"negative_prompt_embeds{end}": stacked((ask.negative,) * len(ask.prompts), *shape),
    }


def t5_text(width: int = 32, multilingual: bool = False):
    """A T5 (or UMT5) text encoder for `tokenizer`."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = {
        "vocab_size": WORDS + 4, "d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
    }  # fmt: skip
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**config)).eval()
    return T5EncoderModel(T5Config(**config)).eval()


def without_ftfy(kind: type) -> None:
    """Let a pipeline clean prompts where `ftfy`, which some call though it is optional, is not installed."""
    import sys
    from types import SimpleNamespace

    module = sys.modules[kind.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)  # our words have nothing to repair


def frames(count: int = 5, size: int = 32, seed: int = 7) -> list[Image.Image]:
    """A random video."""
    return [pil(size, seed + i) for i in range(count)]


def words(ask) -> dict:
    """`prompt` and `negative_prompt` of what is asked, as lists."""
    return {
        "prompt": [prompt(seed) for seed in ask.prompts],
        "negative_prompt": [prompt(ask.negative)] * len(ask.prompts),
    }


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.1):
    """The module with small random numbers in every parameter that is constant, such as zero-initialised layers."""
    made = generator(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
            if constant and not (name.endswith("weight") and float(parameter.flatten()[0]) == 1.0):
                parameter.copy_(torch.randn(parameter.shape, generator=made) * std)
    return module


def t5(width: int = 32):
    """`t5_text`."""
    return t5_text(width)


def clip_vision(width: int = 32, size: int = 32, projection: bool = True):
    """A CLIP image encoder of pictures of `size`, with `clip_pictures` to prepare them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, image_size=size,
        patch_size=size // 4, projection_dim=width,
    )  # fmt: skip
    return (CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config).eval()


def clip_pictures(size: int = 32):
    """The image processor for `clip_vision`."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def movq(**changes):
    """A quantised autoencoder as of Kandinsky, which does not change the size."""
    from diffusers import VQModel

    torch.manual_seed(0)
    config = {
        "block_out_channels": [32], "latent_channels": 4, "vq_embed_dim": 4, "num_vq_embeddings": 16,
        "norm_type": "spatial", "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"],
    }  # fmt: skip
    return VQModel(**config | changes).eval()


def clip_prior(words: int = 16, **changes):
    """A transformer that predicts a CLIP image embedding, 32 wide, from a text of `words`."""
    from diffusers import PriorTransformer

    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 32,
        "num_embeddings": words,
    }  # fmt: skip
    return randomise(PriorTransformer(**config | changes)).eval()


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")


def vision_tokenizer(length: int = 512) -> PreTrainedTokenizerFast:
    """`tokenizer` that also knows Qwen's special tokens; the first of them has the number WORDS + 4."""
    wrapped = tokenizer(length)
    wrapped.add_special_tokens({"additional_special_tokens": list(VISION)})
    return wrapped


def qwen2_vl_text(width: int = 32, layers: int = 2):
    """A Qwen 2.5 VL model for `vision_tokenizer`, of patches of 4 x 4 that it merges to 8 x 8."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    first = WORDS + 4
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": first + len(VISION), "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [width // 16, width // 32, width // 32],
                "rope_theta": 10000.0,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        vision_start_token_id=first, vision_end_token_id=first + 1, image_token_id=first + 2,
        video_token_id=first + 3,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50.0)  # as large as a trained model's
    return model


def qwen2_vl_processor(width: int = 32, length: int = 512):
    """A Qwen 2.5 VL processor for `qwen2_vl_text` that makes images small; videos need torchvision."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 16 * 16}
    )
    words = vision_tokenizer(length)
    return Processor(image_processor=pictures, tokenizer=words, chat_template=words.chat_template)


def qwen3_vl_text(width: int = 32, layers: int = 2, heads: int = 4, vision: int = 2):
    """A Qwen 3 VL model for `vision_tokenizer`, of patches of 4 x 4 that it merges to 8 x 8."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    first, head = WORDS + 4, width // heads
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": first + len(VISION), "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "head_dim": head, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [head // 4, head // 8, head // 8], "rope_theta": 10000.0,
            },
        },
        vision_config={
            "depth": vision, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
            "patch_size": 4, "spatial_merge_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [vision - 1],
        },
        vision_start_token_id=first, vision_end_token_id=first + 1, image_token_id=first + 2,
        video_token_id=first + 3,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50.0)  # as large as a trained model's
    return model


def qwen3_vl_processor(length: int = 512):
    """A Qwen 3 VL processor for `qwen3_vl_text` that makes images small. It has no videos, which need torchvision."""
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 16 * 16}
    )
    words = vision_tokenizer(length)
    return Processor(image_processor=pictures, tokenizer=words, chat_template=words.chat_template)
