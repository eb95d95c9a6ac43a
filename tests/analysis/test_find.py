"""Finding features with the bundled model: what the labels know is found again, and steering it does what it says."""

import pytest
import torch
from small_analysis import find_less

from diffusers_rtsae.analysis.find import find_features, rank, top_features
from diffusers_rtsae.analysis.plots import (
    plot_activations,
    plot_crops,
    plot_feature_trajectories,
    plot_heat_maps,
    plot_presence,
    plot_similarity,
)
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.dictionary import search_labels

SITE = "up_blocks.1.attentions.1"
CALL = {"num_inference_steps": 10, "guidance_scale": 3.0}
PLACES = ("on the left", "on the right", "at the top")


def scenes(colour: str) -> list[str]:
    return [f"a large {colour} {shape} {place}, flat, on white" for shape in ("square", "heart") for place in PLACES]


@pytest.fixture(scope="module")
def found(_pipeline, dictionary, scorer):
    """One search for all tests: red against blue, the best verified by the scorer."""

    def redness(images):
        pixels = torch.stack([torch.tensor(list(i.convert("RGB").getdata())).view(64, 64, 3) for i in images])
        readings = scorer.read(pixels.permute(0, 3, 1, 2) / 255)
        return [sum(v == "red" for k, v in r.items() if k.endswith(".colour")) for r in readings]

    _pipeline.load_rtsae(dictionary)
    asked = {"seeds": 1, "verify": 3, "scorer": redness} | CALL | {"num_inference_steps": 6}
    try:
        with pytest.MonkeyPatch.context() as patch:
            find_less(patch, passes=8, states=4)
            return find_features(_pipeline, scenes("red")[::2], scenes("blue")[::2], 5, **asked)
    finally:
        _pipeline.unload_rtsae()


def test_the_latents_of_a_label_are_found_and_verified(found, dictionary):
    labelled = set(dictionary.seen("red")[0]["latents"])
    assert labelled & {f.index for f in found[:3]} and any("red" in f.labels for f in found[:3])
    assert all(f.slope > 0 and f.score > 0 and f.specific <= 1 for f in found)
    assert [f.score for f in found[3:]] == sorted((f.score for f in found[3:]), reverse=True)
    verified = [f for f in found if f.verified]
    assert len(verified) == 3 and all(
        f.verified["image_distance"] > 0 and f.verified["prediction_change"] > 0 for f in verified
    )
    assert found[0].verified["gain"] >= found[1].verified["gain"]


def test_the_score_is_what_strength_one_does_on_other_noise_too(found):
    verified = [f for f in found if f.verified]
    assert [f.score for f in verified] == pytest.approx([f.verified["effect"] for f in verified], abs=0.15)
    assert max(f.score for f in verified) > 0.1


def test_little_memory_will_do(steered, monkeypatch):
    find_less(monkeypatch)
    seen, saving = [], set()
    hook = steered.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    kept = steered.unet.register_forward_pre_hook(lambda module, args: saving.add(module.is_gradient_checkpointing))
    asked = {"seeds": 1, "verify": 1, "batch_size": 1, "checkpointing": True, "num_inference_steps": 3}
    table = find_features(steered, scenes("red")[:2], scenes("blue")[:2], 1, **asked)
    hook.remove()
    kept.remove()
    assert table[0].verified["effect"] and saving == {True, False} and not steered.unet.is_gradient_checkpointing
    assert max(seen) == 4  # one pair with both guidance branches


def test_a_table_can_be_read_and_taken_elsewhere(found):
    lines = repr(found).splitlines()
    assert lines[0].split()[:3] == ["site", "index", "score"] and "gain" in lines[0] and len(lines) == len(found) + 1
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame["index"]) == [f.index for f in found]
    assert list(frame["slope"]) == [f.slope for f in found] != list(frame["effect"])


def test_duplicates_are_left_out_and_named(dictionary, latent):
    rtsae = dictionary.sites[SITE]
    a, b = latent("red"), latent("orange")
    present = torch.zeros(1, 2048)
    present[0, a], present[0, b] = 1.0, 0.5
    original = rtsae.decoder
    try:
        rtsae.decoder = torch.nn.Parameter(original.detach().clone())
        rtsae.decoder.data[b] = rtsae.decoder.data[a]
        table = rank(dictionary, SITE, [1.0], present, torch.zeros(1, 2048), 5)
    finally:
        rtsae.decoder = original
    assert [f.index for f in table] == [a] and table[0].duplicates == [b]


def test_what_is_active_everywhere_is_not_specific(dictionary, latent):
    rtsae = dictionary.sites[SITE]
    common = int((rtsae.mean_activation / rtsae.typical_activation).argmax())
    usual = (rtsae.mean_activation / rtsae.typical_activation)[common]
    present = torch.zeros(1, 2048)
    present[0, common], present[0, latent("red")] = usual, usual
    table = rank(dictionary, SITE, [1.0], present, torch.zeros(1, 2048), 5)
    assert [f.index for f in table] == [latent("red")]


def test_pictures_of_other_shapes_have_the_same_colour_features(steered, dictionary):
    generator = [torch.Generator().manual_seed(i) for i in range(6)]
    red, blue = (steered(scenes(colour), generator=generator, **CALL).images for colour in ("red", "blue"))
    squares, hearts = (
        find_features(steered, red[:3], blue[:3], count=5),
        find_features(steered, red[3:], blue[3:], count=5),
    )
    assert len({f.index for f in squares} & {f.index for f in hearts}) >= 2
    assert all(f.timestep in dictionary.sites[SITE].config.anchors for f in squares)


def test_a_region_tells_what_is_there(steered):
    prompt = "a large red square on the left of a large blue heart, flat, on white"
    recording = record(steered, prompt, generator=torch.Generator().manual_seed(1), **CALL)
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    here, there = (
        {label for feature in top_features(recording, mask=m, count=10) for label in feature.labels}
        for m in (mask, 1 - mask)
    )
    assert {"red", "square"} <= here and "heart" in there and not {"red", "square"} & there
    assert top_features(recording, count=5)[0].score > 0


def test_labels_are_found_by_text(dictionary):
    assert search_labels(dictionary, "e") and search_labels(dictionary, "RED") == ["red"]


def test_figures_show_what_they_should(steered, dictionary, found, tmp_path):
    recording = record(steered, scenes("red")[:2], **CALL)
    red = (SITE, dictionary.seen("red")[0]["latents"][0])
    dead = (SITE, int(dictionary.sites[SITE].density.argmin()))
    figures = {
        "heat": plot_heat_maps(recording, ["red", found[0], red, dead], columns=4),
        "presence": plot_presence(recording, ["red", "blue"]),
        "crops": plot_crops([recording], "red"),
        "activations": plot_activations([recording], "red"),
        "trajectories": plot_feature_trajectories(dictionary, ["red", red]),
        "similarity": plot_similarity(dictionary, list(dictionary.labels)),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 3000
    curves = figures["presence"].axes[0].get_lines()
    assert curves[0].get_ydata().max() > 3 * curves[1].get_ydata().max()  # a red picture
    assert len(figures["trajectories"].axes) == 3
    named = [axis.get_ylabel() for axis in figures["heat"].axes[: 4 * 5 : 5]]
    absent = sum("nowhere active" in name for name in named)
    assert "nowhere active" in named[3] and "nowhere active" not in named[0]
    assert len(figures["crops"].axes) == 2 and len(figures["heat"].axes) == 4 * 5 + 4 - absent  # with a colour bar
