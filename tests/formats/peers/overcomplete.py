"""Dictionaries by overcomplete: `python overcomplete.py FOLDER`."""

import json
import sys
from pathlib import Path
from types import ModuleType

sys.path.append(sys.path.pop(0))  # this file has the package's name
models = ModuleType("overcomplete.models")  # vision models, which need torchvision; no autoencoder uses them
models.__getattr__ = lambda name: None if name[0] != "_" else getattr(ModuleType, name)
sys.modules["overcomplete.models"] = models

import torch  # noqa: E402
from common import SITE, D, K, M, activations, randomise, write  # noqa: E402
from overcomplete import sae as kinds  # noqa: E402
from overcomplete.sae.rasae import RAJumpSAE, RATopKSAE  # noqa: E402

POINTS = torch.randn(40, D, generator=torch.Generator().manual_seed(2))
CASES = {
    "SAE": lambda: kinds.SAE(D, M),
    "SAE, batch norm": lambda: kinds.SAE(D, M, encoder_module="mlp_bn_1"),
    "SAE, tied": lambda: kinds.SAE(D, M).tied(bias=True),
    "SAE, untied": lambda: kinds.SAE(D, M).untied(bias=True),
    **{
        f"SAE, {norm}": (
            lambda norm=norm: kinds.SAE(D, M, dictionary_params={"normalization": norm, "use_multiplier": True})
        )
        for norm in ("l1", "max_l2", "max_l1", "identity")
    },
    "TopKSAE": lambda: kinds.TopKSAE(D, M, top_k=K),
    "BatchTopKSAE": lambda: kinds.BatchTopKSAE(D, M, top_k=K * 64),
    "JumpSAE": lambda: kinds.JumpSAE(D, M),
    "QSAE, hard": lambda: kinds.QSAE(D, M, hard=True),
    "QSAE": lambda: kinds.QSAE(D, M),
    "RATopKSAE": lambda: RATopKSAE(D, M, points=POINTS, top_k=K),
    "RAJumpSAE": lambda: RAJumpSAE(D, M, points=POINTS),
}


@torch.no_grad()
def main(out: Path) -> None:
    for name, build in CASES.items():
        torch.manual_seed(0)
        sae, x = build(), activations()
        randomise(sae)
        for module in sae.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        if hasattr(sae, "thresholds"):
            sae.thresholds.fill_(-1.0)
        if "QSAE" in name:
            sae.Q.copy_(torch.tensor([-0.1, 0.0, 0.5, 1.3]))
        if "Batch" in name:  # a threshold is only there after a step of training
            sae.encode(x)
        sae.eval()
        z = sae.encode(x)[1]
        about = {"class": type(sae).__name__}
        about |= {
            key: float(value) if torch.is_tensor(value) else value
            for key, value in vars(sae).items()
            if key in ("top_k", "running_threshold", "hard")
        }
        if "RA" in name:
            about["dictionary.delta"] = sae.dictionary.delta
        for way, save in (("model", sae), ("state dict", sae.state_dict())):
            if way == "state dict" and "identity" in name:
                continue  # which is refused: nothing says that its rows are meant to have any length
            folder = out / f"{name}, {way}"
            (folder / "files" / SITE).mkdir(parents=True)
            torch.save(save, folder / "files" / SITE / "overcomplete.pt")
            if way == "state dict":
                (folder / "files" / SITE / "overcomplete.json").write_text(json.dumps(about))
            write(folder, "overcomplete", folder.name, x, z, sae.decode(z), sae.decode)


main(Path(sys.argv[1]))
