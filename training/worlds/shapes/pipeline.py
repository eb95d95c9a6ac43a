"""Train the bundled text-to-image pipeline from nothing: tokenizer, autoencoder, text encoder and denoiser.

    python -m training.worlds.shapes.pipeline training/recipes/shapes-sd.yaml --out examples/shapes-sd

Checkpoints go to `--work`; the same command continues a run that was stopped. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_rtsae.files import whole

from ...common.checkpoint import load_checkpoint, save_checkpoint
from ...common.seeds import step_generator
from .captions import captions
from .scenes import FACTORS, Scenes, render, render_layers, render_pictures, sample_scenes

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path, max_length: int) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's file format, learned from captions: frequent words are one token, any text still
    works."""
    corpus = captions(sample_scenes(20_000, seed=5), seed=5)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1400, initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    tokens = (
        sorted(alphabet)
        + [c + "</w>" for c in sorted(alphabet)]
        + ["".join(m.split(" ")) for m in merges]
        + [BOS, EOS]
    )
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, "errors": "replace",
        "add_prefix_space": False, "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def fingerprint(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


def train_autoencoder(recipe: dict, work: Path, device: str) -> AutoencoderKL:
    """Fit the autoencoder; pixels of the objects, few but telling, weigh eight times more."""
    settings = recipe["autoencoder"]
    mark = fingerprint({name: recipe[name] for name in ("seed", "autoencoder")})
    torch.manual_seed(recipe["seed"])
    vae = AutoencoderKL(**settings["config"]).to(device)
    steps, size = settings["steps"], settings["batch_size"]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings["learning_rate"], weight_decay=0.0)
    checkpoint, state = work / "vae.safetensors", dict(vae.state_dict())
    done = load_checkpoint(checkpoint, state, optimizer, mark)
    if done < steps:
        pictures, objects = render_pictures(settings["pictures"], seed=20_000_000, device=device)[:2]
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="autoencoder", unit="step", mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * min(1, (step + 1) / 200) * (1 - step / steps)
        generator = step_generator(recipe["seed"], step, device)
        chosen = torch.randint(len(pictures), (size,), generator=generator, device=device)
        images, weight = pictures[chosen].float() / 255, 1 + 7 * objects[chosen].float()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            posterior = vae.encode(images * 2 - 1).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator, device=device)
            output = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        error = output - (images * 2 - 1)
        edges = sum((error.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = (weight * (error.abs() + error**2)).mean() + edges + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", pixel_error=f"{error.abs().mean().item() / 2:.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
    with torch.no_grad():
        latents = vae.encode(render(sample_scenes(1024, seed=6).to(device)) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


CAPTIONS_PER_SCENE = 4
#: what the alignment probe reads from every token, with the number of values
ALIGNED = {"object": 2} | {name: len(values) for name, values in FACTORS.items() if name != "place"}


@torch.no_grad()
def encode_scenes(
    recipe: dict, vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, device: str
) -> dict[str, torch.Tensor]:
    """The training scenes, made once.

    Returns:
        `latents` `(scenes, 4, 16, 16)` float16; `tokens` `(scenes, CAPTIONS_PER_SCENE, length)` int16; `cells`
        `(scenes, 6, 8, 8)` int8, the value of every factor of `ALIGNED` in every eighth of the picture, -1 where it
        has none.
    """
    path = work / "scenes.safetensors"
    mark = fingerprint(
        {name: recipe.get(name) for name in ("seed", "autoencoder", "start_from", "scenes", "max_length")}
    )
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata()["fingerprint"] == mark:
                return {name: file.get_tensor(name).to(device) for name in file.keys()}
    latents, tokens, cells, chunk = [], [], [], 2000
    for start in tqdm(range(0, recipe["scenes"], chunk), desc="encoding scenes", unit="chunk", mininterval=5):
        count = min(chunk, recipe["scenes"] - start)
        scenes = sample_scenes(count, seed=30_000_000 + start, held_out=False)
        texts = [captions(scenes, seed=start + 1_000_000 * i) for i in range(CAPTIONS_PER_SCENE)]
        tokens.append(torch.stack([tokenize(tokenizer, t) for t in texts], 1).to(device, torch.int16))
        for first in range(0, count, 250):
            part = scenes[slice(first, first + 250)].to(device)
            images, _, silhouettes = render_layers(part)
            cells.append(factor_cells(part, silhouettes))
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                posterior = vae.encode(images * 2 - 1)
            latents.append((posterior.latent_dist.mean * vae.config.scaling_factor).half())
    stored = {
        name: torch.cat(x).contiguous() for name, x in (("latents", latents), ("tokens", tokens), ("cells", cells))
    }
    with whole(path) as partial:
        save_file(stored, partial, metadata={"fingerprint": mark})
    return stored


def factor_cells(scenes: Scenes, silhouettes: torch.Tensor) -> torch.Tensor:
    """`(batch, 6, 8, 8)` int8: the value of every factor of `ALIGNED` in cells of 8x8 pixels; object factors are -1
    where no object covers a quarter of the cell."""
    covered, owner = F.avg_pool2d(silhouettes, 8).max(1)
    seen = covered >= 0.25
    maps = [seen.long()]
    for name in list(ALIGNED)[1:]:
        code = getattr(scenes, name)
        if code.ndim == 2:
            maps.append(
                torch.where(seen, code[:, :, None, None].expand(-1, -1, 8, 8).gather(1, owner[:, None])[:, 0], -1)
            )
        else:
            maps.append(code[:, None, None].expand(-1, 8, 8))
    return torch.stack(maps, 1).to(torch.int8)


class Alignment(torch.nn.Module):
    """A linear probe on one site, trained with the denoiser, that reads from each token what it will show.

    A denoising loss alone hardly notices a wrong shape, so text and shape are connected late. Supervised features are
    an old remedy; for denoisers see REPA (arXiv 2410.06940). The probe is thrown away after training.
    """

    def __init__(self, site: torch.nn.Module, channels: int):
        super().__init__()
        self.probe = torch.nn.Linear(channels, sum(ALIGNED.values()))
        site.register_forward_hook(self._keep)

    def _keep(self, module, args, output) -> None:
        self.seen = output[0]

    def loss(self, cells: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over factors, at the activation last seen `(batch, channels, 8, 8)`."""
        logits = self.probe(self.seen.movedim(1, -1)).float().split(list(ALIGNED.values()), -1)
        return sum(
            F.cross_entropy(part.flatten(0, -2), cells[:, i].flatten().long(), ignore_index=-1)
            for i, part in enumerate(logits)
        )


def train_denoiser(recipe: dict, work: Path, out: Path, device: str, max_minutes: float) -> bool:
    """Train denoiser and text encoder jointly; returns whether all steps are done."""
    settings, seed = recipe["denoiser"], recipe["seed"]
    started, on_cuda = time.monotonic(), torch.device(device).type == "cuda"
    tokenizer = build_tokenizer(out / "tokenizer", recipe["max_length"])
    if recipe.get("start_from"):  # a pipeline whose autoencoder is kept and whose other weights are trained further
        trained = StableDiffusionPipeline.from_pretrained(recipe["start_from"])
        vae = trained.vae.to(device)
    else:
        trained, vae = None, train_autoencoder(recipe, work, device)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=recipe["max_length"],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **recipe["text_encoder"],
        )
    ).to(device)
    unet = UNet2DConditionModel(**settings["unet"]).to(device)
    if trained:
        unet.load_state_dict(trained.unet.state_dict())
        text_encoder.load_state_dict(trained.text_encoder.state_dict())
    align = Alignment(unet.get_submodule(settings["align"]["site"]), settings["align"]["channels"]).to(device)
    if not on_cuda:  # the backward pass of fused attention is slow on a CPU: a third of a training step
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    else:
        unet = unet.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    scheduler = DDIMScheduler(**recipe["scheduler"])
    trained_parts = {"unet": unet, "text": text_encoder, "align": align}
    names, parameters = zip(
        *[(f"{part}.{n}", p) for part, m in trained_parts.items() for n, p in m.named_parameters()], strict=True
    )
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.01, fused=on_cuda)
    state = dict(zip(names, parameters, strict=True)) | {f"ema.{n}": e for n, e in zip(names, ema, strict=True)}
    checkpoint = work / "denoiser.safetensors"
    mark = fingerprint(recipe)
    done, steps = load_checkpoint(checkpoint, state, optimizer, mark), settings["steps"]

    if done < steps:
        data = encode_scenes(recipe, vae, tokenizer, work, device)
        empty = tokenize(tokenizer, [""]).to(device, torch.int16)
    log = (work / "denoiser.jsonl").open("a")
    losses = []
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="denoiser", unit="step", mininterval=10)
    for step in progress:
        generator = step_generator(seed, step, device)
        rate = min((step + 1) / settings["warmup"], 0.5 * (1 + np.cos(np.pi * step / steps)) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * float(rate)
        size = settings["batch_size"]
        chosen = torch.randint(recipe["scenes"], (size,), generator=generator, device=device)
        version = torch.randint(CAPTIONS_PER_SCENE, (size,), generator=generator, device=device)
        dropped = torch.rand((size, 1), generator=generator, device=device) < settings["caption_dropout"]
        clean = data["latents"][chosen].float()
        text = torch.where(dropped, empty, data["tokens"][chosen, version]).long()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        # timesteps lean towards high noise, where layout and colour are decided
        place = torch.sigmoid(0.5 + 1.2 * torch.randn(size, generator=generator, device=device))
        timesteps = (place * 1000).long().clamp(0, 999)
        noisy, target = scheduler.add_noise(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            hidden = text_encoder(text).last_hidden_state
            prediction = unet(noisy, timesteps, hidden).sample
            alignment = align.loss(data["cells"][chosen])
        error = F.mse_loss(prediction.float(), target)
        loss = error + settings["align"]["weight"] * alignment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - min(settings["ema_decay"], (1 + step) / (10 + step)))
        losses.append(torch.stack([error, alignment]).detach())
        if (step + 1) % 100 == 0:
            mean = torch.stack(losses).mean(0).tolist()
            losses.clear()
            progress.set_postfix(loss=f"{mean[0]:.4f}", alignment=f"{mean[1]:.3f}")
            log.write(json.dumps({"step": step + 1, "loss": round(mean[0], 5), "alignment": round(mean[1], 4)}) + "\n")
            log.flush()
        out_of_time = time.monotonic() - started > 60 * max_minutes
        if (step + 1) % settings["checkpoint_every"] == 0 or step + 1 == steps or out_of_time:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
            done = step + 1
        if out_of_time:
            break
    with torch.no_grad():
        for parameter, average in zip(parameters, ema, strict=True):
            parameter.copy_(average)
    text_encoder.set_attn_implementation("sdpa")
    save_pipeline(out, vae, text_encoder, tokenizer, unet, scheduler)
    return done == steps


def save_pipeline(out: Path, vae, text_encoder, tokenizer, unet, scheduler) -> None:
    """Write a plain `StableDiffusionPipeline` folder with float16 weights."""
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to("cpu", torch.float16).save_pretrained(out)
    for part in ("unet", "vae"):  # without the path from which it was loaded
        path = out / part / "config.json"
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")
    # the tokenizer's file format of transformers 4, beside that of 5
    build_tokenizer(out / "tokenizer", tokenizer.model_max_length)
    path = out / "text_encoder" / "config.json"
    # transformers loads in the dtype the config names, diffusers in float32: make them agree
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, default=Path("examples/shapes-sd"))
    parser.add_argument("--work", type=Path, default=Path("runs/shapes-sd"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="checkpoint and stop after this long")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.recipe.read_text())
    arguments.work.mkdir(parents=True, exist_ok=True)
    finished = train_denoiser(recipe, arguments.work, arguments.out, arguments.device, arguments.max_minutes)
    print(f"saved to {arguments.out}" if finished else "stopped early; run the same command again to continue")


if __name__ == "__main__":
    main()
