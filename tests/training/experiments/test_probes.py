"""Probes read what is linearly there, no more, and with few labels."""

import torch

from training.experiments.probes import DRAWS, LinearProbe, accuracies

FACTORS = {"colour": ("red", "blue", "green"), "size": ("small", "large")}


def pictures(count: int, seed: int, noise: float = 0.1):
    """Codes `(count, 20)`, in which a latent stands for each value but those of sizes, and what they show."""
    generator = torch.Generator().manual_seed(seed)
    colour, size = (torch.randint(n, (count,), generator=generator) for n in (3, 2))
    codes = noise * torch.randn(count, 20, generator=generator)
    codes[torch.arange(count), colour] += 1
    scenes = [{"colour": FACTORS["colour"][c], "size": FACTORS["size"][s]} for c, s in zip(colour, size, strict=True)]
    return codes, scenes


def test_a_probe_reads_a_colour_and_not_what_is_not_there():
    (codes, scenes), (others, truth) = pictures(300, 0), pictures(500, 1)
    found = accuracies(codes, scenes, {"here": (others, truth)}, {"colour": FACTORS["colour"]})["here"]
    assert found[10] > 0.8 and found[30] > 0.97 and found[300] > 0.99
    assert list(found) == [10, 30, 100, 300]  # of the numbers that there are enough pictures for
    chance = accuracies(codes, scenes, {"here": (others, truth)}, {"size": FACTORS["size"]})["here"]
    assert abs(chance[300] - 0.5) < 0.06 and DRAWS > 1


def test_what_a_probe_is_judged_on_is_another_sampler_or_other_codes():
    (codes, scenes), (others, truth) = pictures(100, 0), pictures(200, 1)
    tests = {"here": (others, truth), "mirrored": (-others, truth)}
    found = accuracies(codes, scenes, tests, {"colour": FACTORS["colour"]})
    assert found["here"][100] > 0.97 > 0.2 > found["mirrored"][100]


def test_what_the_others_say_of_a_picture_is_what_a_regression_on_them_says():
    """More latents than labelled pictures, as there always are."""
    generator = torch.Generator().manual_seed(0)
    codes, penalty = torch.randn(12, 40, generator=generator).double(), 3.0
    wanted = torch.nn.functional.one_hot(torch.arange(12) % 3, 3).double()
    _, left_out = LinearProbe(codes).ridge(wanted, penalty)
    for i in range(12):
        others = torch.arange(12) != i
        weight, _ = LinearProbe(codes[others]).ridge(wanted[others], penalty)
        centre = codes[others].mean(0)
        said = (codes[i] - centre) @ (codes[others] - centre).T @ weight + wanted[others].mean(0)
        torch.testing.assert_close(left_out[i], said)
