"""Dictionaries by dictionary_learning: `python dictionary_learning.py FOLDER`."""

import json
import sys
from pathlib import Path

sys.path.append(sys.path.pop(0))  # this file has the package's name

import torch  # noqa: E402
from common import SITE, D, K, M, activations, randomise, write  # noqa: E402
from dictionary_learning import dictionary as kinds  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

CLASSES = [kinds.AutoEncoder, kinds.AutoEncoderNew, kinds.GatedAutoEncoder, kinds.JumpReluAutoEncoder]
CLASSES += [AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE]


@torch.no_grad()
def main(out: Path) -> None:
    for kind in CLASSES:
        torch.manual_seed(0)
        name, more = kind.__name__, {}
        if "TopK" in name:
            more["k"] = K
        if "Matryoshka" in name:
            more["group_sizes"] = [32, M - 32]
        ae = kind(D, M, **more)
        randomise(ae)
        if hasattr(ae, "threshold"):
            ae.threshold.copy_(torch.full_like(ae.threshold, 0.6))
        files = out / name / "files" / SITE
        files.mkdir(parents=True)
        torch.save(ae.state_dict(), files / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": M} | ({"k": K} if "k" in more else {})
        (files / "config.json").write_text(json.dumps({"trainer": trainer}))
        ae, x = kind.from_pretrained(files / "ae.pt"), activations()
        z = ae.encode(x)
        write(out / name, "dictionary-learning", name, x, z, ae.decode(z), ae.decode)


main(Path(sys.argv[1]))
