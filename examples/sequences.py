"""A dictionary of something that is no picture: the states of a recurrent network that reads text.

    python examples/sequences.py

Trains a small network on the docstrings of Python's standard library, then two dictionaries of its states over eight
characters, with as many active latents in all: one with a code for a whole trajectory, one with a code for each step.
Takes about two minutes on one core.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import save
from matplotlib.figure import Figure

from diffusers_rtsae import load_dictionary

sys.path.insert(0, str(Path(__file__).parents[1]))  # the trainer is part of the clone, not of the package
from training import fit  # noqa: E402
from training.experiments.sequences import CHARACTERS, WINDOW, contexts, docstrings, trained  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=400, help="of training, of the network and of each dictionary")
parser.add_argument("--out", type=Path, default=Path("runs/examples"))
a = parser.parse_args()
a.out.mkdir(parents=True, exist_ok=True)

ids = contexts(docstrings())
network = trained("recurrent", ids, a.steps, a.out / f"sequences-network-{a.steps}.safetensors")
with torch.no_grad():
    states, _ = network.trajectories(ids[::5])  # (samples, steps, width)
windows = ids[::5, :-1].unflatten(1, (-1, WINDOW))[:, 1:].flatten(0, 1)  # the characters of each sample

settings = {"num_latents": 512, "steps": a.steps, "batch_size": 256, "learning_rate": 2e-3}
dictionaries = {
    "rtsae": fit(states, k=16, base_model="a recurrent network", **settings),
    "topk": fit(states, k=2, base_model="a recurrent network", kind="static", architecture="topk", **settings),
}
dictionaries["rtsae"].save(a.out / "sequences")
sae = load_dictionary(a.out / "sequences", dtype=torch.float32).sites["states"]

codes = sae.encode(states).detach()  # (samples, latents)
often = sae.density.topk(24).indices
for feature in often[:5].tolist():
    best = codes[:, feature].topk(6).indices
    print(feature, ["".join(CHARACTERS[i] for i in windows[sample]) for sample in best])
error = (sae.decode(codes) - states).square().mean((0, 2)) / (states - states.mean(0)).square().mean((0, 2))
print("unexplained at each step, also of what was trained on:", [round(value, 2) for value in error.tolist()])

figure = Figure(figsize=(9, 3), layout="constrained")
left, right = figure.subplots(1, 2)
for name, dictionary in dictionaries.items():
    left.plot(dictionary.config["metrics"]["states"]["fvu_online_per_anchor"], marker="o", label=name)
left.set(xlabel="step", ylabel="unexplained variance, held out", ylim=(0, None))
left.legend()
image = right.imshow(sae.feature_times(often).length, aspect="auto", interpolation="nearest")
right.set(xlabel="step", ylabel="the 24 most frequent features")
figure.colorbar(image, label="length of the direction")
save(figure, a.out / "sequences.png")
