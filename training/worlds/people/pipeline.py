"""Train the pipeline of the world of people from nothing: tokenizer, autoencoder, text encoder and transformer.

    python -m training.worlds.people.pipeline training/recipes/people-dit.yaml --out examples/people-dit

A `PixArtAlphaPipeline` with rectified flow (arXiv 2209.03003): the transformer predicts noise minus picture on the
straight line between them. Checkpoints go to `--work`; the same command continues a run that was stopped, and with
`--max-minutes 0` it saves the pipeline of the last checkpoint, also of a run that is under way. `--start` begins with
the weights of a pipeline that was saved, where no checkpoints are left.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from ...common.checkpoint import load_checkpoint, save_checkpoint
from ...common.seeds import step_generator
from ..muon import Muon, split
from .captions import caption, subject
from .scenes import FACTORS, PACKAGES, ROLES, People, load

#: parts of the names of weights that are not matrices of hidden layers
OUTER = (
    "pos_embed",
    "adaln_single",
    "scale_shift_table",
    "proj_out",
    "shared",
    "embed_tokens",
    "relative_attention_bias",
)
MAX_LENGTH = 120  # tokens to which the pipeline pads a prompt
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
tags: [pixart, flow-matching]
---
# People: a small pipeline that draws emoji of people in the styles of three foundries

```python
import diffusers_rtsae

pipe = diffusers_rtsae.load_bundled("people-dit")
image = pipe("a woman firefighter with dark skin in noto style").images[0]  # 64x64
```

With diffusers alone, `PixArtAlphaPipeline.from_pretrained(folder)` needs to be told not to look for the size of a
published model: `pipe(prompt, guidance_scale=3.0, use_resolution_binning=False)`.

Prompts name who (woman, man, person or gender-neutral), what (firefighter, surfing, with red hair …), the skin tone
(light, medium-light, medium, medium-dark, dark, yellow) and the style (noto, twemoji, fluent), or leave them open. It
knows no other words and draws nothing else. It draws by default what its pictures show, which is a fact about
them and no norm.

It was trained from nothing on pictures of three packages of the npm registry, which it does not contain:

- Noto Emoji, © Google, images under Apache-2.0 (`emoji-datasource-google` {noto})
- Twemoji, © Twitter, Inc. and other contributors, graphics under CC BY 4.0,
  https://creativecommons.org/licenses/by/4.0/ (`emoji-datasource-twitter` {twemoji}); composed on white
- Fluent Emoji 3D, © Microsoft, MIT, packed by LobeHub (`@lobehub/fluent-emoji-3d` {fluent}); composed on white, made
  smaller

Their names are those of their foundries, which have no part in this model.
"""


def build_tokenizer() -> T5Tokenizer:
    """A unigram model in T5's form: every word of the captions is one token, other words are spelled."""
    words = Counter()
    for role in (None, *ROLES):
        for who in (None, *FACTORS["who"]):
            words.update(subject(role, who).split())
    words.update(" ".join([*FACTORS["tone"], *FACTORS["style"]]).split())
    words.update("a picture of an emoji with skin tone in style drawn by the".split())
    total = sum(words.values())
    characters = ["▁", *(chr(i) for i in range(33, 127) if not chr(i).isupper())]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"▁{word}", math.log(count / total)) for word, count in sorted(words.items())]
    vocabulary += [(character, -20.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_LENGTH)


def fingerprint(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


def precision(recipe: dict, device: str) -> torch.autocast:
    """bfloat16 halves the time on a GPU, and on a CPU that multiplies matrices in it; on others it costs time."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=recipe["precision"] == "bfloat16")


def train_autoencoder(recipe: dict, images: torch.Tensor, work: Path, device: str) -> AutoencoderKL:
    """Fit the autoencoder to `images` uint8 `(n, 3, 64, 64)`; pixels that are not white weigh five times more."""
    settings = recipe["autoencoder"]
    mark = fingerprint({name: recipe[name] for name in ("seed", "autoencoder")})
    torch.manual_seed(recipe["seed"])
    vae = AutoencoderKL(**settings["config"]).to(device)
    steps, size = settings["steps"], settings["batch_size"]
    optimizer = Muon(*split(vae, ("conv_in", "conv_out")), settings["learning_rate"], lr_others=2e-3, weight_decay=0.0)
    checkpoint, state = work / "vae.safetensors", dict(vae.state_dict())
    done = load_checkpoint(checkpoint, state, optimizer, mark)
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="autoencoder", unit="step", mininterval=5)
    for step in progress:
        optimizer.set_rate(min(1, (step + 1) / 50) * (1 - step / steps))
        generator = step_generator(recipe["seed"], step, device)
        chosen = torch.randint(len(images), (size,), generator=generator, device=device)
        pictures = images[chosen].float() / 127.5 - 1
        weight = 1 + 4 * (pictures < 0.98).any(1, keepdim=True).float()
        with precision(recipe, device):
            posterior = vae.encode(pictures).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator, device=device)
            output = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        error = output - pictures
        edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = (weight * (error.abs() + error**2)).mean() + edges + 5e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", pixel_error=f"{error.abs().mean().item() / 2:.4f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
    standardise(vae, encode(vae, images).float())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents `(n, 8, 16, 16)` float16 of `images` uint8 `(n, 3, 64, 64)`."""
    latents = []
    for batch in images.split(200):
        latents.append(vae.encode(batch.float() / 127.5 - 1).latent_dist.mean.half())
    return torch.cat(latents)


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Change the layers next to the latents so that every channel of them has mean 0 and standard deviation 1."""
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    shift = torch.cat([mean, 2 * deviation.log()])  # of the mean, and of the logarithm of the variance
    scale = torch.cat([deviation, torch.ones_like(deviation)])
    vae.quant_conv.weight.div_(scale[:, None, None, None])
    vae.quant_conv.bias.sub_(shift).div_(scale)
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[..., 0, 0] @ mean)
    vae.post_quant_conv.weight.mul_(deviation[None, :, None, None])


def batch_of_text(people: People, chosen: list[int], tokenizer: T5Tokenizer, settings: dict, rng: random.Random):
    """Token ids and attention mask `(batch, longest)` of one caption for each of `chosen`, some of them empty."""
    naming = dict.fromkeys(FACTORS, settings["naming"])
    texts = ["" if rng.random() < settings["caption_dropout"] else caption(people, i, rng, naming)[0] for i in chosen]
    tokens = tokenizer(texts, padding="longest", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def train_denoiser(
    recipe: dict, pictures: Path, work: Path, out: Path, device: str, max_minutes: float, start: Path | None = None
) -> bool:
    """Train transformer and text encoder jointly, from nothing or from those of the pipeline `start`; returns whether
    all steps are done."""
    settings, seed = recipe["denoiser"], recipe["seed"]
    started, on_cuda = time.monotonic(), torch.device(device).type == "cuda"
    images, people = load(pictures, held_out=False)
    images = images.to(device)
    tokenizer = build_tokenizer()
    if start is None:
        vae = train_autoencoder(recipe, images, work, device)
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **recipe["text_encoder"])).to(device)
        transformer = PixArtTransformer2DModel(**settings["transformer"]).to(device)
    else:
        begun = PixArtAlphaPipeline.from_pretrained(start).to(device)
        vae, text_encoder, transformer = begun.vae, begun.text_encoder, begun.transformer
        for model, expected in ((transformer, settings["transformer"]), (text_encoder, recipe["text_encoder"])):
            if other := [name for name, value in expected.items() if getattr(model.config, name) != value]:
                raise ValueError(f"{start} has another {other[0]} than the recipe, {getattr(model.config, other[0])}.")
    if not on_cuda:  # the backward pass of fused attention is slow on a CPU
        transformer.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    scheduler = DPMSolverMultistepScheduler(**recipe["scheduler"])
    trained = torch.nn.ModuleDict({"transformer": transformer, "text": text_encoder})
    names, parameters = zip(*trained.named_parameters(), strict=True)
    ema = [p.detach().clone() for p in parameters]
    optimizer = Muon(*split(trained, OUTER), settings["learning_rate"], lr_others=settings["learning_rate_others"])
    state = dict(zip(names, parameters, strict=True)) | {f"ema.{n}": e for n, e in zip(names, ema, strict=True)}
    checkpoint, steps = work / "denoiser.safetensors", settings["steps"]
    mark = fingerprint(recipe | {"denoiser": {k: v for k, v in settings.items() if k != "steps"}, "start": str(start)})
    done = load_checkpoint(checkpoint, state, optimizer, mark)

    latents = encode(vae, images) if max_minutes > 0 and done < steps else None
    log = (work / "denoiser.jsonl").open("a")
    losses = []
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="denoiser", unit="step", mininterval=10)
    for step in progress:
        if time.monotonic() - started >= 60 * max_minutes:
            if losses:
                save_checkpoint(checkpoint, done, state, optimizer, mark)
            break
        generator = step_generator(seed, step)  # of the host, which looks up what the pictures show
        optimizer.set_rate(min((step + 1) / settings["warmup"], 1, (steps - step) / settings["cooldown"]))
        size = settings["batch_size"]
        chosen = torch.randint(len(people), (size,), generator=generator)
        text, mask = batch_of_text(people, chosen.tolist(), tokenizer, settings, random.Random(f"{seed}-{step}"))
        clean = latents[chosen.to(device)].float()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = (1000 * torch.sigmoid(torch.randn(size, generator=generator))).round().to(device)
        text, mask, sigma = text.to(device), mask.to(device), timesteps[:, None, None, None] / 1000
        with precision(recipe, device):
            hidden = text_encoder(text, attention_mask=mask).last_hidden_state
            prediction = transformer(
                (1 - sigma) * clean + sigma * noise,
                encoder_hidden_states=hidden,
                encoder_attention_mask=mask,
                timestep=timesteps,
            ).sample
        loss = F.mse_loss(prediction.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - min(settings["ema_decay"], (1 + step) / (10 + step)))
        losses.append(loss.detach())
        done = step + 1
        if done % 100 == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            progress.set_postfix(loss=f"{mean:.4f}")
            log.write(json.dumps({"step": done, "loss": round(mean, 5)}) + "\n")
            log.flush()
        if done % settings["checkpoint_every"] == 0 or done == steps:
            save_checkpoint(checkpoint, done, state, optimizer, mark)
    with torch.no_grad():
        for parameter, average in zip(parameters, ema, strict=True):
            parameter.copy_(average)
    save_pipeline(out, vae, text_encoder, tokenizer, transformer, scheduler)
    return done == steps


def save_pipeline(out: Path, vae, text_encoder, tokenizer, transformer, scheduler) -> None:
    """Write a plain `PixArtAlphaPipeline` folder with float16 weights."""
    pipe = PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    pipe.to("cpu", torch.float16).save_pretrained(out)
    (out / "README.md").write_text(CARD.format(**{style: package.version for style, package in PACKAGES.items()}))
    path = out / "text_encoder" / "config.json"
    # transformers loads in the dtype the config names, diffusers in float32: make them agree
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--pictures", type=Path, default=Path("runs/people"), help="what `scenes` built")
    parser.add_argument("--out", type=Path, default=Path("examples/people-dit"))
    parser.add_argument("--work", type=Path, default=Path("runs/people-dit"))
    parser.add_argument("--start", type=Path, help="pipeline whose weights to begin with; none by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="checkpoint and stop after this long")
    a = parser.parse_args()
    recipe = yaml.safe_load(a.recipe.read_text())
    a.work.mkdir(parents=True, exist_ok=True)
    finished = train_denoiser(recipe, a.pictures, a.work, a.out, a.device, a.max_minutes, a.start)
    print(f"saved to {a.out}" + ("" if finished else "; run the same command again to train further"))


if __name__ == "__main__":
    main()
