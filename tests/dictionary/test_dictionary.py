"""Dictionaries on disk: what is written, what is read, what is refused."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from disk import same, state
from safetensors.torch import load_file, save_file

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.dictionary import CONFIG_NAME, LABELS_NAME, WEIGHTS_NAME

SITE = "mid_block"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    labels = {
        "red": {"factor": "colour", "value": "red", "features": [{"site": SITE, "latents": [1], "weights": [1.0]}]}
    }
    Dictionary({SITE: RTSAE(SITE, 8, [900, 500, 1], 16, 4)}, labels, {"base_model": "test"}).save(tmp_path)
    return tmp_path


def test_round_trip(folder):
    dictionary = load_dictionary(folder)
    assert list(dictionary.sites) == [SITE] and list(dictionary.labels) == ["red"]
    assert dictionary.config["base_model"] == "test"
    rtsae = dictionary.sites[SITE]
    assert not rtsae.training and not any(p.requires_grad for p in rtsae.parameters())
    assert rtsae.encoder.dtype == rtsae.dynamics.transition.dtype == torch.float16  # as stored
    assert rtsae.encoder_bias.dtype == rtsae.threshold.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        converted = load_dictionary(folder, dtype=dtype).sites[SITE]
        assert converted.encoder.dtype == converted.decoder.dtype == converted.dynamics.transition.dtype == dtype
        assert converted.encoder_bias.dtype == converted.threshold.dtype == torch.float32


def test_saved_rows_are_float16_and_statistics_float32(folder):
    weights = load_file(folder / SITE / WEIGHTS_NAME)
    assert weights["encoder"].dtype == weights["decoder"].dtype == torch.float16
    assert weights["threshold"].dtype == weights["dynamics.scale"].dtype == torch.float32


def test_nothing_half_written_is_left(folder):
    assert not list(folder.rglob("*.partial"))


def test_subfolder(folder):
    assert list(load_dictionary(folder.parent, subfolder=folder.name).sites) == [SITE]


def test_a_pickle_is_refused(folder):
    weights = folder / SITE / WEIGHTS_NAME
    weights.rename(folder / SITE / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors only"):
        load_dictionary(folder)
    weights.write_bytes(pickle.dumps({"encoder": 1}))
    with pytest.raises(OSError, match="damaged or no safetensors"):
        load_dictionary(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 2000])
def test_a_truncated_file(folder, kept):
    weights = folder / SITE / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(OSError, match="damaged"):
        load_dictionary(folder)


@pytest.mark.parametrize("site", ["../outside", "..", "/etc", "a/b", "a..b", ""])
def test_sites_cannot_leave_the_folder(folder, site):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sites": [site]}))
    with pytest.raises(ValueError, match="must list its `sites` as module paths"):
        load_dictionary(folder)


def test_a_cached_hub_repository_loads_offline_and_only_the_sites_asked_for(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    dictionary = load_dictionary("org/name", cache_dir=cache, local_files_only=True, layers=[SITE])
    assert list(dictionary.sites) == [SITE]


def test_half_precision_weights_still_compute_in_float32(folder):
    half = load_dictionary(folder, dtype=torch.float16).sites[SITE]
    assert half.threshold.dtype == half.dynamics.scale.dtype == torch.float32
    h = torch.randn(3, 3, 8)
    whole = load_dictionary(folder, dtype=torch.float32).sites[SITE]
    torch.testing.assert_close(half.encode(h), whole.encode(h))
    assert half.feature_trajectories().dtype == half.decode(half.encode(h)).dtype == torch.float32


@pytest.mark.parametrize("name", ["decoder", "threshold", "dynamics.transition", "mean_activation", "max_activation"])
def test_missing_tensors_are_never_made_up(folder, name):
    weights = load_file(folder / SITE / WEIGHTS_NAME)
    del weights[name]
    save_file(weights, folder / SITE / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"do not fit its config.json.*{name}"):
        load_dictionary(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["threshold", "encoder_bias", "dynamics.scale", "dynamics.transition"])
def test_weights_that_are_not_finite(folder, name, value):
    weights = load_file(folder / SITE / WEIGHTS_NAME)
    weights[name].flatten()[0] = value
    save_file(weights, folder / SITE / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"holds NaN or inf in '{name}'"):
        load_dictionary(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
@pytest.mark.parametrize("name", [CONFIG_NAME, LABELS_NAME, f"{SITE}/config.json"])
def test_json_that_is_no_object(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": [999]}, "names latent 999, but mid_block has 0 to 15"),
        ({"latents": [-3]}, "names latent -3"),
        ({"latents": [1.5]}, "names latent 1.5"),
        ({"where": [16]}, "names latent 16"),
        ({"weights": [1.0, 2.0]}, "as many weights as latents"),
        ({"latents": [], "weights": []}, "as many weights as latents"),
        ({"site": "up"}, "needs a site of"),
        ({"weights": [float("inf")]}, "must be finite numbers"),
    ],
)
def test_labels_that_name_what_is_not_there(folder, change, message):
    entry = {"site": SITE, "latents": [1], "weights": [1.0]} | change
    (folder / LABELS_NAME).write_text(json.dumps({"red": {"features": [entry]}}))
    with pytest.raises(ValueError, match=message):
        load_dictionary(folder)


@pytest.mark.parametrize("label", [3, {}, {"features": []}, {"features": [1]}, {"features": [{}], "edit": 3}])
def test_labels_of_another_form(folder, label):
    (folder / LABELS_NAME).write_text(json.dumps({"red": label}))
    with pytest.raises(ValueError, match="red"):
        load_dictionary(folder)


# Saving


def test_a_save_that_is_interrupted_leaves_the_old_dictionary(folder, monkeypatch):
    from diffusers_rtsae.dictionary import weights

    before = state(load_dictionary(folder).sites[SITE])

    def die(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        Dictionary({SITE: RTSAE(SITE, 8, [900, 500, 1], 16, 4)}).save(folder)
    assert same(state(load_dictionary(folder).sites[SITE]), before)
    assert not list(folder.rglob("*.partial"))


def test_a_save_that_is_interrupted_while_moving_leaves_no_dictionary(folder, monkeypatch):
    replace = os.replace

    def die_at_weights(source, target):
        if Path(target) == folder / SITE / WEIGHTS_NAME:
            raise KeyboardInterrupt
        replace(source, target)

    dictionary = load_dictionary(folder)
    monkeypatch.setattr(os, "replace", die_at_weights)
    with pytest.raises(KeyboardInterrupt):
        dictionary.save(folder)
    with pytest.raises(OSError, match=f"expected {CONFIG_NAME}"):
        load_dictionary(folder)


def test_saving_into_the_folder_that_is_mapped(folder):
    dictionary = load_dictionary(folder)
    before = state(dictionary.sites[SITE])
    for _ in range(2):
        dictionary.save(folder)
        assert same(state(dictionary.sites[SITE]), before)  # the old file is still whole
    assert same(state(load_dictionary(folder).sites[SITE]), before)


def test_weights_in_memory_are_not_those_on_disk(folder):
    rtsae = load_dictionary(folder).sites[SITE]
    rtsae.encoder[0] = 7.0
    assert not (load_dictionary(folder).sites[SITE].encoder[0] == 7.0).any()


def test_what_cannot_be_read_is_not_written(folder):
    before = state(load_dictionary(folder).sites[SITE])
    broken = RTSAE(SITE, 8, [900, 500, 1], 16, 4).requires_grad_(False)
    for value in (float("nan"), 1e6):  # float16 ends at 65504
        broken.decoder[3] = value
        with pytest.raises(ValueError, match="'decoder' of mid_block holds NaN, inf, or what is too large"):
            Dictionary({SITE: broken}).save(folder)
    label = {"features": [{"site": SITE, "latents": [99], "weights": [1.0]}]}
    with pytest.raises(ValueError, match="'red' names latent 99"):
        Dictionary(load_dictionary(folder).sites, {"red": label}).save(folder)
    with pytest.raises(TypeError, match="not JSON serializable"):
        Dictionary(load_dictionary(folder).sites, {}, {"dtype": torch.float16}).save(folder)
    assert same(state(load_dictionary(folder).sites[SITE]), before)


@pytest.mark.parametrize("site", ["../outside", "/etc", "a/b", "a..b", ""])
def test_a_site_is_no_way_out_when_saving(site):
    with pytest.raises(ValueError, match="A site is the path of a module"):
        Dictionary({site: RTSAE(site, 4, [900, 1], 8, 2)})


def test_nothing_is_written_through_links(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "precious").write_text("precious")
    dictionary = load_dictionary(folder)
    (folder / LABELS_NAME).unlink()
    (folder / LABELS_NAME).symlink_to(outside / "precious")
    (folder / f"{LABELS_NAME}.partial").symlink_to(outside / "precious")
    dictionary.save(folder)
    (folder / SITE).rename(folder / "moved")
    (folder / SITE).symlink_to(outside)
    with pytest.raises(OSError, match="is a link"):
        dictionary.save(folder)
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"


def test_some_of_the_sites_can_be_saved_alone(tmp_path):
    sites = {site: RTSAE(site, 8, [900, 1], 16, 4) for site in ("down", "up")}
    entries = {site: {"site": site, "latents": [2], "weights": [1.0]} for site in sites}
    labels = {"both": {"features": list(entries.values())}, "low": {"features": [entries["down"]]}}
    Dictionary(sites, labels, {"base_model": "test"}).save(tmp_path / "whole")
    part = load_dictionary(tmp_path / "whole", layers=["up"])
    part.save(tmp_path / "part")
    again = load_dictionary(tmp_path / "part")
    assert list(again.sites) == again.config["sites"] == ["up"] and again.config["base_model"] == "test"
    assert again.labels == {"both": {"features": [entries["up"]]}}


def test_files_have_the_permissions_of_any_new_file(folder):
    (folder / "new").touch()
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_site_is_a_diffusers_model(folder):
    model = RTSAE.from_pretrained(folder, subfolder=SITE)
    assert torch.equal(model.decoder, load_dictionary(folder, dtype=torch.float32).sites[SITE].decoder)


# The card


def test_the_card(folder):
    import yaml

    metrics = {SITE: {"dead": 0.25, "r2": [0.5, 0.75], "note": "none"}}
    measured = {"success": 0.875, "leakage": 0.125, "prompts": 8}
    labels = {"a|b <i>": {"factor": "colour", "features": load_dictionary(folder).labels["red"]["features"]}}
    labels["a|b <i>"] |= {"measured": measured, "edit": {"end": 0.7, "apply_to": "cond"}}
    config = {"base_model": "org/base", "license": "mit", "metrics": metrics, "sampler": "DDIM"}
    Dictionary(load_dictionary(folder).sites, labels, config).save(folder)
    card = (folder / "README.md").read_text()
    data = yaml.safe_load(card.split("---")[1])
    assert data["library_name"] == "diffusers-rtsae" and "diffusers-rtsae" in data["tags"]
    assert data["base_model"] == "org/base" and data["license"] == "mit" and data["sites"] == [SITE]
    for line in (
        "| mid_block | RTSAE | 8 | 16 | 4 | 900, 500, 1 | output |",
        "| dead | 0.25 |",
        "| r2 | 0.5, 0.75 |",
        "| sampler | DDIM |",
        r"| a\|b &lt;i&gt; | colour | mid_block: 1 | end=0.7, apply_to=cond | 0.875 | 0.125 | 8 |",
        'pipe.set_rtsae_features({"a|b <i>": 1.0})',
        'DiffusionPipeline.from_pretrained("org/base")',
        "## Intended use and limits",
    ):
        assert line in card


@pytest.mark.parametrize(
    "config",
    [{}, {"base_model": "/home/me/model"}, {"metrics": 3, "recipe": []}, {"metrics": {SITE: [1]}, "license": None}],
)
def test_a_card_claims_nothing_that_is_not_known(folder, config):
    import yaml

    Dictionary(load_dictionary(folder).sites, {}, config).save(folder)
    card = (folder / "README.md").read_text()
    data = yaml.safe_load(card.split("---")[1])
    assert data["license"] == "unknown" and "base_model" not in data
    assert "Measured" not in card and "No feature is labelled" in card


def test_a_card_of_ones_own_stays(folder):
    dictionary, card = load_dictionary(folder), folder / "README.md"
    card.write_text("old <!-- generated by diffusers-rtsae; remove this line to keep what you write here -->")
    dictionary.save(folder)
    assert "## Use" in card.read_text()
    card.write_text("My dictionary")
    dictionary.save(folder)
    assert card.read_text() == "My dictionary"


# Opening without reading


def write_sparse(folder: Path, num_latents: int, in_channels: int, anchors: list[int]) -> int:
    """A dictionary of any size whose weights are a hole in the file; returns its bytes."""
    with torch.device("meta"):
        tensors = RTSAE(SITE, in_channels, anchors, num_latents, 32).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        half = name in ("encoder", "decoder", "dynamics.transition")
        begin, end = end, end + tensor.numel() * (2 if half else 4)
        header[name] = {
            "dtype": "F16" if half else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / SITE).mkdir(parents=True)
    with open(folder / SITE / WEIGHTS_NAME, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {"_class_name": "RTSAE", "site": SITE, "in_channels": in_channels, "anchors": anchors}
    config |= {"num_latents": num_latents, "k": 32}
    (folder / SITE / "config.json").write_text(json.dumps(config))
    (folder / LABELS_NAME).write_text("{}")
    (folder / CONFIG_NAME).write_text(json.dumps({"format_version": 1, "sites": [SITE]}))
    return end


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_large_dictionary_is_opened_without_reading_its_rows(tmp_path):
    size = write_sparse(tmp_path, 20480, 1280, [961, 721, 481, 241, 1])  # that of an inner site of SD 1.5
    assert size > 500e6
    before = resident()
    rtsae = load_dictionary(tmp_path).sites[SITE]
    rows = rtsae.encoder[[3, 20000]].float(), rtsae.feature_trajectories([7, 15000])
    assert rows[1].shape == (2, 5, 1280)
    assert resident() - before < 0.25 * size


@pytest.mark.parametrize(
    "change",
    [
        {"num_latents": 10**12},
        {"num_latents": 2**31 - 1, "in_channels": 2**31 - 1},
        {"num_latents": 0},
        {"num_latents": -1},
        {"num_latents": True},
        {"num_latents": 16.0},
        {"num_latents": None},
        {"in_channels": "8"},
        {"in_channels": 10**30},
        {"k": []},
        {"anchors": []},
        {"anchors": 3},
        {"anchors": list(range(5000, 0, -1))},
        {"anchors": [900, 500, -1]},
        {"anchors": [900, 500, 10**7]},
        {"anchors": [900, 500, 1.0]},
        {"anchors": [1, 500, 900]},
        {"activation": "middle"},
        {"activation": []},
        {"site": "../other"},
        {"unheard_of": 1},
    ],
)
def test_impossible_claims_are_refused_before_memory_is_taken(folder, change):
    path = folder / SITE / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="config.json"):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(2)}, "'extra' is none of ours"),
        ({"threshold": torch.zeros(3, dtype=torch.float16)}, "'threshold' is F16 instead of F32"),
        ({"encoder": torch.zeros(16, 3, 8, dtype=torch.int64)}, "'encoder' is I64 instead of F16 or BF16 or F32"),
        ({"decoder": torch.zeros(16, 24)}, r"'decoder' has shape \[16, 24\] instead of \[16, 3, 8\]"),
    ],
)
def test_headers_that_do_not_fit(folder, change, message):
    save_file(load_file(folder / SITE / WEIGHTS_NAME) | change, folder / SITE / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"do not fit its config.json: .*{message}"):
        load_dictionary(folder)


@pytest.mark.parametrize(
    "edit",
    [
        {"operation": "remove"},
        {"start": "0"},
        {"strength": 2.0},
        {"mask": 1},
        {"unheard_of": 1},
        {"start": 0.9, "end": 0.1},
    ],
)
def test_labels_with_options_that_no_edit_has(folder, edit):
    label = json.loads((folder / LABELS_NAME).read_text())["red"]
    (folder / LABELS_NAME).write_text(json.dumps({"red": label | {"edit": edit}}))
    with pytest.raises(ValueError, match="'red' cannot be used"):
        load_dictionary(folder)


# Keywords


@pytest.mark.parametrize("source", ["folder", "dict", "hub"])
def test_misspelt_keywords(folder, source, pipe):
    source = {"folder": folder, "dict": load_dictionary(folder).sites, "hub": "org/name"}[source]
    with pytest.raises(TypeError, match="revison"):
        load_dictionary(source, revison="main")
    with pytest.raises(TypeError, match="revison"):
        pipe.load_rtsae(source, revison="main")


@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../../x", "/etc", "C:\\x", "..\\x", "\\\\host\\share\\x"])
def test_a_subfolder_lies_inside(folder, subfolder):
    for source in (folder, "org/name"):
        with pytest.raises(ValueError, match="`subfolder` must lie inside"):
            load_dictionary(source, subfolder=subfolder)
