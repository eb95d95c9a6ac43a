"""Files in the formats of others, written with random weights, with the formulas of their publishers."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import save_file

SITE, D, M, K = "up_blocks.1.attentions.1", 6, 24, 3


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / math.sqrt(shape[-1])


def topk(values: torch.Tensor, k: int) -> torch.Tensor:
    kept = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)


def of_picture(values: torch.Tensor, k: int) -> torch.Tensor:
    return topk(values.flatten(), k).view_as(values)


class Case:
    """What to write, and the formulas: `encode(x, t)` and `decode(z, x)` of tokens `(N, d)`."""

    activation, kind = "output", "SparseAutoencoder"

    def __init__(self, files: dict, encode, decode, **more):
        self.files, self.encode, self.decode = files, encode, decode
        for name, value in more.items():
            setattr(self, name, value)

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".json"):
                path.write_text(json.dumps(content))
            elif name.endswith(".safetensors"):
                save_file(content, path)
            else:
                torch.save(content, path)
        return folder


def sdlens(suffix: str = "pth") -> Case:
    t = {"encoder.weight": rand(M, D), "decoder.weight": rand(D, M), "pre_bias": rand(D), "latent_bias": rand(M)}
    t["stats_last_nonzero"] = torch.zeros(M, dtype=torch.long)
    config = {"n_dirs_local": M, "d_model": D, "k": K, "auxk": 4, "dead_steps_threshold": 100}
    mean, std = torch.rand(M), torch.rand(M)
    inside = f"unet.{SITE}_k{K}_hidden{M}_auxk4_bs4096_lr0.0001/final"
    files = {f"{inside}/config.json": config}
    if suffix == "pth":
        files |= {f"{inside}/state_dict.pth": {"state_dict": t}, f"{inside}/mean.pt": mean, f"{inside}/std.pt": std}
    else:
        files[f"{inside}/state_dict.safetensors"] = t
    return Case(
        files,
        lambda x, _: topk((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"], K).relu(),
        lambda z, x: z @ t["decoder.weight"].T + t["pre_bias"],
        activation="update", directions=t["decoder.weight"].T, typical=mean + 2.326 * std,
    )  # fmt: skip


def concept_steerers(site: str = "text_encoder.text_model.encoder.layers.9", suffix: str = "pth") -> Case:
    t = {"encoder.weight": rand(M, D), "decoder.weight": rand(D, M), "pre_bias": rand(D), "latent_bias": rand(M)}
    t["stats_last_nonzero"] = torch.zeros(M, dtype=torch.long)
    config = {"n_dirs_local": M, "d_model": D, "k": K, "auxk": 4, "dead_steps_threshold": 100, "auxk_coef": 1 / 32}
    inside = f"{site}_k{K}_hidden{M}_auxk4_bs4096_lr0.0004_2025-01-09T21:29:10.453881/final"
    weights = {"state_dict": t} if suffix == "pth" else t

    def encode(x, _=None, k=K):
        pre_activations = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
        return topk(pre_activations, k).relu()

    return Case(
        {f"{inside}/config.json": config, f"{inside}/state_dict.{suffix}": weights},
        encode, lambda z, x: z @ t["decoder.weight"].T + t["pre_bias"], directions=t["decoder.weight"].T, site=site,
    )  # fmt: skip


def sparsify(**config) -> Case:
    t = {"encoder.weight": rand(M, D), "encoder.bias": rand(M), "W_dec": rand(M, D), "b_dec": rand(D)}
    if config.get("skip_connection"):
        t["W_skip"] = rand(D, D)
    base = {"expansion_factor": M // D, "normalize_decoder": True, "num_latents": 0, "k": K, "batch_topk": False}
    config = base | {"sample_topk": False, "input_unit_norm": False, "multi_topk": False, "d_in": D} | config
    unit, transcode = config["input_unit_norm"], config.get("transcode", False)

    def moments(x):
        centred = x - x.mean(-1, keepdim=True)
        return (x.mean(-1, keepdim=True), centred.std(-1, keepdim=True)) if unit else (torch.zeros(1), torch.ones(1))

    def encode(x, _):
        mean, std = moments(x)
        seen = (x - mean) / (std + 1e-5) if unit else x
        values = ((seen if transcode else seen - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        if config.get("activation") == "groupmax":
            groups = values.unflatten(1, (K, -1))
            return (groups * (groups == groups.amax(-1, keepdim=True))).flatten(1)
        if config["batch_topk"]:
            return of_picture(values, K * len(x))
        return of_picture(values, K) if config["sample_topk"] else topk(values, K)

    def decode(z, x):
        mean, std = moments(x)
        return (z @ t["W_dec"] + t["b_dec"]) * std + mean + (x @ t["W_skip"].T if "W_skip" in t else 0)

    files = {f"unet.{SITE}/cfg.json": config, f"unet.{SITE}/sae.safetensors": t}
    return Case(files, encode, decode, activation="input" if transcode else "output", directions=t["W_dec"])


def saelens(architecture: str, **config) -> Case:
    t = {"W_enc": rand(D, M), "W_dec": rand(M, D), "b_dec": rand(D)}
    names = ["b_gate", "b_mag", "r_mag"] if architecture == "gated" else ["b_enc"]
    t |= {name: rand(M) for name in names}
    if "jumprelu" in architecture or "batchtopk" in architecture:
        t["threshold"] = torch.rand(M) / 4
    if "batchtopk" in architecture and config.get("rescale_acts_by_decoder_norm"):
        t["topk_threshold"] = t.pop("threshold")[0].double()
    if "skip" in architecture:
        t["W_skip"] = rand(D, D)
    base = {"d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    base |= {"normalize_activations": "none", "reshape_activations": "none", "architecture": architecture}
    config = base | ({"k": K} if "top" in architecture else {}) | config
    norm, transcode = config["normalize_activations"], "transcoder" in architecture
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    length = t["W_dec"].norm(dim=1) if rescaled else torch.ones(M)

    def encode(x, _):
        if norm == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + 1e-5)
        if norm == "constant_norm_rescale":
            x = x * D**0.5 / x.norm(dim=-1, keepdim=True)
        x = x - t["b_dec"] if config["apply_b_dec_to_input"] and not transcode else x
        if architecture == "gated":
            magnitude = x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
            return (x @ t["W_enc"] + t["b_gate"] > 0) * magnitude.relu()
        values = (x @ t["W_enc"] + t["b_enc"]) * length
        if architecture == "topk":
            return topk(values, K).relu()
        if architecture == "abstopk":
            return values * (topk(values.abs(), K) > 0)
        return values.relu() * (values > t.get("threshold", t.get("topk_threshold", torch.zeros(M))))

    def decode(z, x):
        y = (z / length) @ t["W_dec"] + t["b_dec"]
        if transcode:
            return y + (x @ t["W_skip"].T if "W_skip" in t else 0)
        if norm == "layer_norm":
            return y * (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        return y * x.norm(dim=-1, keepdim=True) / D**0.5 if norm == "constant_norm_rescale" else y

    files = {f"{SITE}/cfg.json": config, f"{SITE}/sae_weights.safetensors": t}
    directions = t["W_dec"] / length[:, None]
    return Case(files, encode, decode, activation="input" if transcode else "output", directions=directions)


def dictionary_learning(name: str) -> Case:
    t = {"encoder.weight": rand(M, D), "encoder.bias": rand(M), "decoder.weight": rand(D, M)}
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    bias, trainer = bias.get(name, "b_dec"), {"dict_class": name, "dict_size": M, "activation_dim": D}
    t[bias] = rand(D)
    if name == "GatedAutoEncoder":
        del t["encoder.bias"]
        t |= {part: rand(M) for part in ("r_mag", "gate_bias", "mag_bias")}
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        t = {"W_enc": rand(D, M), "b_enc": rand(M), "W_dec": rand(M, D), "b_dec": rand(D)}
    if "BatchTopK" in name or name == "JumpReluAutoEncoder":
        t["threshold"] = torch.tensor(0.2) if "BatchTopK" in name else torch.rand(M) / 4
    if "TopK" in name:
        t["k"], trainer["k"] = torch.tensor(K), K
    encoder = t["encoder.weight"] if "encoder.weight" in t else t["W_enc"].T
    decoder = t["decoder.weight"].T if "decoder.weight" in t else t["W_dec"]
    length = decoder.norm(dim=1) if name == "AutoEncoder" else torch.ones(M)  # the package makes these rows unit ones
    decoder = decoder / length[:, None]

    def encode(x, _):
        x = x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - t[bias]
        if name == "GatedAutoEncoder":
            values = x @ encoder.T
            return (values + t["gate_bias"] > 0) * (t["r_mag"].exp() * values + t["mag_bias"]).relu()
        values = x @ encoder.T + t["encoder.bias" if "encoder.bias" in t else "b_enc"]
        if name == "AutoEncoderTopK":
            return topk(values.relu(), K)
        if name == "JumpReluAutoEncoder":
            return (values * (values > t["threshold"])).relu()
        return length * values.relu() * (values > t.get("threshold", torch.zeros(())))

    files = {f"{SITE}/config.json": {"trainer": trainer}, f"{SITE}/ae.pt": t}
    return Case(files, encode, lambda z, x: z @ decoder + t[bias], directions=decoder)


def diffract(name: str) -> Case:
    t = {"encoder.weight": rand(M, D), "encoder.bias": rand(M), "decoder.weight": rand(D, M), "decoder.bias": rand(D)}
    t |= {f"time_mlp.{i}.weight": rand(8, 8) for i in (0, 2)} | {f"time_mlp.{i}.bias": rand(8) for i in (0, 2)}
    t |= {"mod_linear.weight": rand(2 * D, 8), "mod_linear.bias": rand(2 * D)}

    def encode(x, timestep):
        seen = get_timestep_embedding(torch.tensor([timestep]), 8)
        for i in (0, 2):
            seen = F.silu(seen @ t[f"time_mlp.{i}.weight"].T + t[f"time_mlp.{i}.bias"])
        scale, shift = (seen @ t["mod_linear.weight"].T + t["mod_linear.bias"]).chunk(2, dim=-1)
        return ((x * (1 + scale) + shift) @ t["encoder.weight"].T + t["encoder.bias"]).relu()

    return Case(
        {name: t}, encode, lambda z, x: z @ t["decoder.weight"].T + t["decoder.bias"], kind="TIDE",
        activation="input" if "transcoder" in name else "output", directions=t["decoder.weight"].T,
        site="transformer_blocks.6.ff" + ("_context" if "txt" in name else ""),
    )  # fmt: skip


def pursuit(**config) -> Case:
    t = {"W_dec": F.normalize(rand(M, D), dim=1), "b_dec": rand(D)}
    base = {"d_in": D, "d_sae": M, "architecture": "matching_pursuit", "max_iterations": K}
    base |= {"residual_threshold": 0.5, "stop_on_duplicate_support": True}

    def encode(x, _):
        latents = torch.zeros(len(x), M)
        for token, left in zip(latents, x - t["b_dec"], strict=True):
            for _ in range(K):
                value, j = (left @ t["W_dec"].T).max(0)
                is_again = token[j] > 0 or value <= 0
                token[j] += value.relu()
                left = left - value.relu() * t["W_dec"][j]
                if is_again or left.norm() < 0.5:
                    break
        return latents

    return Case(
        {f"{SITE}/cfg.json": base | config, f"{SITE}/sae_weights.safetensors": t}, encode,
        lambda z, x: z @ t["W_dec"] + t["b_dec"], directions=t["W_dec"], kind="MatchingPursuitSAE",
    )  # fmt: skip


def temporal() -> Case:
    heads, keys = 2, 4
    t = {"W_dec": rand(M, D), "b_dec": rand(D)}
    for name, rows in (("q_target", keys), ("k_ctx", keys), ("v_ctx", M), ("c_proj", M)):
        t |= {f"attn_layers.0.{name}.weight": rand(rows, M), f"attn_layers.0.{name}.bias": rand(rows)}
    config = {"d_in": D, "d_sae": M, "architecture": "temporal", "n_heads": heads, "n_attn_layers": 1}
    config |= {"kval_topk": K, "sae_diff_type": "topk", "tied_weights": True}

    def parts(x):
        rest, encoder = x - t["b_dec"], t["W_dec"].T / (4 * D)
        codes = (rest @ encoder).relu()
        before = torch.cat([torch.zeros(1, M), codes[:-1]])

        def layer(name, given):
            return given @ t[f"attn_layers.0.{name}.weight"].T + t[f"attn_layers.0.{name}.bias"]

        query, key, value = layer("q_target", codes), layer("k_ctx", before), layer("v_ctx", before)
        later = torch.ones(len(x), len(x)).triu(1) > 0
        attended = torch.cat([
            (q @ k.T / (keys // heads) ** 0.5).masked_fill(later, -math.inf).softmax(1) @ v
            for q, k, v in zip(*(part.chunk(heads, 1) for part in (query, key, value)), strict=True)
        ], 1)  # fmt: skip
        along = layer("c_proj", attended).relu() @ t["W_dec"]
        predicted = (along * rest).sum(1, keepdim=True) / (along.norm(dim=1, keepdim=True) + 1e-6) ** 2 * along
        return topk((rest - predicted) @ encoder, K).relu(), predicted

    return Case(
        {f"{SITE}/cfg.json": config, f"{SITE}/sae_weights.safetensors": t}, lambda x, _: parts(x)[0],
        lambda z, x: z @ t["W_dec"] + t["b_dec"] + parts(x)[1], directions=t["W_dec"], kind="TemporalSAE",
    )  # fmt: skip


def overcomplete(name: str, suffix: str = "safetensors") -> Case:
    about = {"class": name} | ({"top_k": K} if "TopK" in name else {}) | ({"hard": True} if name == "QSAE" else {})
    t = {"encoder.final_block.0.weight": rand(M, D), "encoder.final_block.0.bias": rand(M)}
    t["dictionary.multiplier"] = torch.tensor(0.3)
    if name.startswith("RA"):
        t |= {"dictionary.C": rand(9, D), "dictionary.W": torch.rand(M, 9), "dictionary.Relax": rand(M, D)}
        mixed = t["dictionary.W"] / t["dictionary.W"].sum(1, keepdim=True) @ t["dictionary.C"]
        relaxed = t["dictionary.Relax"] * (0.2 / t["dictionary.Relax"].norm(dim=1, keepdim=True)).clamp(max=1)
        rows, about["dictionary.delta"] = mixed + relaxed, 0.2
    else:
        rows = t["dictionary._weights"] = F.normalize(rand(M, D), dim=1)
    rows = rows * t["dictionary.multiplier"].exp()
    if "Jump" in name:
        t["thresholds"] = torch.full((M,), -1.0)
    if name == "QSAE":
        t["Q"] = torch.tensor([0.0, 0.5, 1.3])
    if name == "BatchTopKSAE":
        about["running_threshold"] = 0.4

    def encode(x, _):
        values = x @ t["encoder.final_block.0.weight"].T + t["encoder.final_block.0.bias"]
        if name == "QSAE":
            return t["Q"][(values[..., None] - t["Q"]).abs().argmin(-1)]
        if name.endswith("TopKSAE") and "Batch" not in name:
            return topk(values.relu(), K)
        least = math.exp(-1) if "Jump" in name else about.get("running_threshold", 0)
        return values.relu() * (values >= least)

    files = {f"{SITE}/overcomplete.json": about, f"{SITE}/overcomplete.{suffix}": t}
    kind = "QuantizedSAE" if name == "QSAE" else "SparseAutoencoder"
    return Case(files, encode, lambda z, x: z @ rows, directions=rows, kind=kind)


CASES = {
    "SDLens": sdlens,
    "SDLens, safetensors": lambda: sdlens("safetensors"),
    "Concept Steerers": concept_steerers,
    "Concept Steerers, safetensors": lambda: concept_steerers(suffix="safetensors"),
    "sparsify": sparsify,
    "sparsify, num_latents": lambda: sparsify(num_latents=M, expansion_factor=99),
    "sparsify, BatchTopK": lambda: sparsify(batch_topk=True),
    "sparsify, SampleTopK": lambda: sparsify(sample_topk=True),
    "sparsify, unit norm": lambda: sparsify(input_unit_norm=True),
    "sparsify, groupmax": lambda: sparsify(activation="groupmax"),
    "sparsify, skip transcoder": lambda: sparsify(transcode=True, skip_connection=True),
    "sparsify, transcoder": lambda: sparsify(transcode=True, activation="topk"),
    "SAELens, standard": lambda: saelens("standard"),
    "SAELens, not centred": lambda: saelens("standard", apply_b_dec_to_input=False),
    "SAELens, topk": lambda: saelens("topk"),
    "SAELens, topk rescaled": lambda: saelens("topk", rescale_acts_by_decoder_norm=True),
    "SAELens, jumprelu": lambda: saelens("jumprelu"),
    "SAELens, matryoshka": lambda: saelens("matryoshka_batchtopk"),
    "SAELens, gated": lambda: saelens("gated"),
    "SAELens, layer norm": lambda: saelens("jumprelu", normalize_activations="layer_norm"),
    "SAELens, constant norm": lambda: saelens("jumprelu", normalize_activations="constant_norm_rescale"),
    "SAELens, batchtopk checkpoint": lambda: saelens("batchtopk", rescale_acts_by_decoder_norm=True),
    "SAELens, matching pursuit": pursuit,
    "SAELens, temporal": temporal,
    "SAELens, skip transcoder": lambda: saelens("skip_transcoder", apply_b_dec_to_input=False, d_out=D),
    "SAELens, transcoder with layer norm": lambda: saelens(
        "jumprelu_transcoder", apply_b_dec_to_input=False, d_out=D, normalize_activations="layer_norm"
    ),
    "SAELens, transcoder with constant norm": lambda: saelens(
        "transcoder", apply_b_dec_to_input=False, d_out=D, normalize_activations="constant_norm_rescale"
    ),
    "SAELens, transcoder": lambda: saelens("transcoder", apply_b_dec_to_input=False, d_out=D),
    "SAELens, jumprelu transcoder": lambda: saelens("jumprelu_transcoder", apply_b_dec_to_input=False, d_out=D),
    **{f"dictionary_learning, {name}": (lambda name=name: dictionary_learning(name)) for name in (
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    )},
    **{f"overcomplete, {name}": (lambda name=name: overcomplete(name)) for name in (
        "SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "QSAE", "RATopKSAE",
    )},
    "overcomplete, pickled": lambda: overcomplete("SAE", "pt"),
    **{f"DifFRACT, {name}": (lambda name=name: diffract(f"temporal-aware/{name}")) for name in (
        "sae_img_6.pt", "sae_txt_6.safetensors", "transcoder_img_6.pt",
    )},
}  # fmt: skip
