"""Dictionaries by SAELens: `python saelens.py FOLDER`."""

import shutil
import sys
import warnings
from pathlib import Path

import torch
from common import SITE, D, K, M, activations, randomise, write
from sae_lens import SAE, TrainingSAE, Transcoder  # noqa: F401 - registers the architectures
from sae_lens.registry import get_sae_class, get_sae_training_class

NORMS = ("layer_norm", "constant_norm_rescale")
CASES = {name: {} for name in ("standard", "jumprelu", "gated", "matching_pursuit")}
CASES |= {name: {"k": K} for name in ("topk", "abstopk")}
CASES |= {f"{name}, rescaled": {"k": K, "rescale_acts_by_decoder_norm": True} for name in ("topk", "abstopk")}
CASES |= {"matching_pursuit, k": {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False}}
CASES |= {"matching_pursuit, not centred": {"apply_b_dec_to_input": False}}
CASES |= {"standard, not centred": {"apply_b_dec_to_input": False}}
TEMPORAL = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": K}
CASES |= {"temporal": TEMPORAL, "temporal, two layers, ReLU": TEMPORAL | {"n_attn_layers": 2, "sae_diff_type": "relu"}}
CASES |= {"temporal, not tied": TEMPORAL | {"tied_weights": False, "apply_b_dec_to_input": False}}
CASES |= {
    "temporal, scaled": TEMPORAL
    | {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.3}
}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
CASES |= {name: {"apply_b_dec_to_input": False, "d_out": D} for name in TRANSCODERS}
for base in ("standard", "jumprelu", "temporal", *TRANSCODERS):
    CASES |= {f"{base}, {norm}": CASES[base] | {"normalize_activations": norm} for norm in NORMS}
CASES |= {"jumprelu, bfloat16": {"dtype": "bfloat16"}}
CHECKPOINTS = {  # of training, which become others for inference
    "batchtopk": {"k": float(K)},
    "batchtopk, not rescaled": {"k": float(K), "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": {"k": float(K), "matryoshka_widths": [32, M]},
}


def fill(sae) -> None:
    randomise(sae)
    with torch.no_grad():
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.rand(M) * 0.8)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.4)


def say(folder: Path, name: str, sae) -> None:
    x = activations()
    x = x[None] if name.startswith("temporal") else x
    x = x.to(sae.dtype)
    z = sae.encode(x)

    def decode(latents):
        sae.encode(x)  # which keeps what the normalisation is undone by
        return sae.decode(latents)

    decoded = decode(z) if not name.startswith("temporal") else sae(x)
    if "skip" in name:
        decoded = sae(x)
    write(folder, "sae-lens", name, x, z, decoded, decode)


@torch.no_grad()
def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    for folder in sorted(out.iterdir()):  # what was exported to its format
        loader = Transcoder if "transcoder" in folder.name else SAE
        say(folder, folder.name, loader.load_from_disk(folder / "files" / SITE))
    shape = {"d_in": D, "d_sae": M, "device": "cpu"}
    for name, options in CASES.items():
        torch.manual_seed(0)
        architecture, folder = name.split(",")[0], out / name
        kind, config = get_sae_class(architecture)
        sae = kind(config(**shape, **{"dtype": "float32"} | options))
        fill(sae)
        sae.save_model(folder / "files" / SITE)
        loader = Transcoder if "transcoder" in name else SAE
        say(folder, name, loader.load_from_disk(folder / "files" / SITE))
    name = "jumprelu, bfloat16 file in float32"
    sae = SAE.load_from_disk(out / "jumprelu, bfloat16" / "files" / SITE, dtype="float32")
    sae.save_model(out / name / "files" / SITE)
    shutil.copytree(out / "jumprelu, bfloat16" / "files", out / name / "files", dirs_exist_ok=True)
    say(out / name, name, sae)
    for name, options in CHECKPOINTS.items():
        torch.manual_seed(0)
        kind, config = get_sae_training_class(name.split(",")[0])
        sae = kind(config(**shape, dtype="float32", **options))
        fill(sae)
        for folder, save in (
            (out / f"{name}, checkpoint", sae.save_model),
            (out / f"{name}, saved for inference", sae.save_inference_model),
        ):
            save(folder / "files" / SITE)
            sae.save_inference_model(folder / "inference")
            say(folder, folder.name, SAE.load_from_disk(folder / "inference"))


main(Path(sys.argv[1]))
