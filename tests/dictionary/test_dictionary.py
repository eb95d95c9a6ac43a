"""Dictionaries on disk and on the Hub: what is written, what is read, what is refused."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import Repository
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.dictionary import CONFIG_NAME, LABELS_NAME, WEIGHTS_NAME, check_available, list_pretrained

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


def state(rtsae: RTSAE) -> dict[str, torch.Tensor]:
    """Copies, so that they outlive the file."""
    return {name: tensor.clone() for name, tensor in rtsae.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
        {"operation": "erase"},
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


# The Hub: the real client against a server on this machine


@pytest.fixture
def two_sites():
    torch.manual_seed(1)
    sites = {site: RTSAE(site, 8, [900, 500, 1], 16, 4) for site in ("down", "up")}
    labels = {"red": {"features": [{"site": "up", "latents": [1], "weights": [1.0]}]}}
    return Dictionary(sites, labels, {"base_model": "org/base"})


@pytest.fixture
def repository(hub, two_sites, tmp_path):
    """`org/name` on the server: a dictionary, and things that it is better to leave there."""
    two_sites.save(tmp_path / "pushed")
    files = {p.relative_to(tmp_path / "pushed").as_posix(): p.read_bytes()
             for p in (tmp_path / "pushed").rglob("*") if p.is_file()}  # fmt: skip
    files["up/diffusion_pytorch_model.bin"] = pickle.dumps({"encoder": 1})
    hub.repositories["org/name"] = Repository()
    hub.repositories["org/name"].commit(files)
    return hub.repositories["org/name"]


def expected(two_sites: Dictionary, site: str) -> dict[str, torch.Tensor]:
    """What the weights are once stored."""
    matrices = ("encoder", "decoder", "dynamics.transition")
    return {n: t.detach().half() if n in matrices else t for n, t in two_sites.sites[site].state_dict().items()}


def test_only_the_sites_asked_for_are_downloaded(hub, repository, two_sites):
    loaded = load_dictionary("org/name", layers=["up"])
    assert list(loaded.sites) == ["up"] and same(state(loaded.sites["up"]), expected(two_sites, "up"))
    assert sorted(hub.downloads()) == [LABELS_NAME, CONFIG_NAME, "up/config.json", f"up/{WEIGHTS_NAME}"]
    assert list(load_dictionary("org/name").sites) == ["down", "up"]
    assert sorted(hub.downloads()[4:]) == ["down/config.json", f"down/{WEIGHTS_NAME}"]


def test_what_is_in_the_cache_is_not_downloaded_again(hub, repository):
    load_dictionary("org/name")
    count = len(hub.downloads())
    load_dictionary("org/name")
    assert len(hub.downloads()) == count == 6
    load_dictionary("org/name", force_download=True)
    assert sorted(hub.downloads()[count:]) == sorted(hub.downloads()[:count])


@pytest.mark.parametrize("subfolder", ["v1", "deeper/v[1]*", "with space"])
def test_a_subfolder_of_a_repository(hub, repository, subfolder):
    files = repository.commits[repository.branches["main"]]
    hub.repositories["org/many"] = Repository()
    hub.repositories["org/many"].commit({f"{subfolder}/{name}": content for name, content in files.items()})
    hub.repositories["org/many"].commit({"v1x/rtsae_config.json": b"[]", "deeper/v1x/labels.json": b"[]"})
    assert list(load_dictionary("org/many", layers=["up"], subfolder=subfolder).sites) == ["up"]
    assert len(hub.downloads()) == 4
    with pytest.raises(OSError, match="'org/many' is no folder here, .* it has no other/rtsae_config.json"):
        load_dictionary("org/many", subfolder="other")
    with pytest.raises(OSError, match="it has no rtsae_config.json"):
        load_dictionary("org/many")


def test_revisions(hub, repository):
    first = repository.branches["main"]
    second = repository.commit({LABELS_NAME: b"{}"})
    repository.branches["v1"] = first
    for revision, count in ((first, 1), (second, 0), ("v1", 1), (None, 0), ("main", 0)):
        assert len(load_dictionary("org/name", revision=revision).labels) == count
    with pytest.raises(OSError, match="'org/name' is no folder here, .*: it has no revision 'v9'"):
        load_dictionary("org/name", revision="v9")


def test_weights_and_configuration_are_of_one_commit(hub, repository, two_sites, tmp_path):
    """Somebody pushes between our two requests."""
    other = Dictionary({"middle": RTSAE("middle", 4, [900, 1], 8, 2)})
    other.save(tmp_path / "other")

    def push(content):
        repository.commit({CONFIG_NAME: (tmp_path / "other" / CONFIG_NAME).read_bytes(), "up/config.json": b"{}"})
        return content

    hub.change[CONFIG_NAME] = push
    loaded = load_dictionary("org/name")
    assert same(state(loaded.sites["up"]), expected(two_sites, "up"))


def test_a_cut_connection_is_resumed(hub, repository, two_sites, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    path = f"up/{WEIGHTS_NAME}"
    hub.cut[path] = 1000
    loaded = load_dictionary("org/name", layers=["up"])
    assert same(state(loaded.sites["up"]), expected(two_sites, "up"))
    ranges = [headers.get("Range") for method, at, headers in hub.log if method == "GET" and at.endswith(path)]
    assert ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_closed_repositories(hub, repository, kind):
    setattr(repository, kind, True)
    message = {"private": "or it is private and needs a `token`", "gated": "its owner grants access on request"}[kind]
    for token in (None, False, "hf_wrong"):
        with pytest.raises(OSError, match=f"'org/name' is no folder here, .*{message}"):
            load_dictionary("org/name", token=token)
    assert not hub.downloads()
    assert list(load_dictionary("org/name", token=hub.token).sites) == ["down", "up"]
    stored_elsewhere = [headers for _, path, headers in hub.log if path.startswith("/cdn/")]
    assert len(stored_elsewhere) == 2 and not any("Authorization" in headers for headers in stored_elsewhere)


@pytest.mark.parametrize("name", ["org/none", "none", "a/b/c", "org/name/", "./none", "o rg/name"])
def test_repositories_that_do_not_exist(hub, name):
    with pytest.raises(OSError, match="is no folder here, and no dictionary that could be fetched from the Hub: ."):
        load_dictionary(name)


@pytest.mark.parametrize("status", [500, 503, 429, 403, 418])
def test_a_hub_that_is_out_of_order(hub, repository, status):
    hub.status = status
    with pytest.raises(OSError, match=f"'org/name' is no folder here, .*: the Hub answered {status}"):
        load_dictionary("org/name")
    hub.status = None
    load_dictionary("org/name")
    hub.status = status
    assert list(load_dictionary("org/name").sites) == ["down", "up"]  # what is cached is still there


@pytest.mark.parametrize("path", [f"up/{WEIGHTS_NAME}", f"down/{WEIGHTS_NAME}"])
def test_weights_that_arrive_damaged(hub, repository, path):
    hub.change[path] = lambda content: content[:-1] + bytes([content[-1] ^ 1])
    for _ in range(2):
        with pytest.raises(OSError, match="'org/name' is no folder here, .* arrived damaged: its SHA-256 is"):
            load_dictionary("org/name")
    hub.change.clear()
    assert list(load_dictionary("org/name").sites) == ["down", "up"]  # nothing damaged was kept


@pytest.mark.parametrize("change", [lambda content: content[:100], lambda content: content + b"more"])
def test_weights_of_another_size(hub, repository, change):
    hub.change[f"up/{WEIGHTS_NAME}"] = change
    with pytest.raises(OSError, match="'org/name' is no folder here, .*file should be of size"):
        load_dictionary("org/name")


@pytest.mark.parametrize("path", [CONFIG_NAME, LABELS_NAME, "up/config.json"])
def test_configurations_that_arrive_damaged(hub, repository, path):
    hub.change[path] = lambda content: b"[" + content[1:]
    with pytest.raises(ValueError, match=f"{path} is not valid JSON"):
        load_dictionary("org/name")


def test_a_repository_without_its_weights(hub, repository):
    commit = repository.commits[repository.branches["main"]]
    del commit[f"up/{WEIGHTS_NAME}"]
    with pytest.raises(OSError, match=rf"Expected config.json and {WEIGHTS_NAME} .* found \['config.json'\]"):
        load_dictionary("org/name")
    assert "up/diffusion_pytorch_model.bin" not in hub.downloads()


@pytest.mark.parametrize("sites", [["../../up"], ["/up"], ["up/../../x"], ["*"], "up", [], None, [["up"]]])
def test_a_repository_cannot_ask_for_other_files(hub, repository, sites):
    config = json.loads(repository.commits[repository.branches["main"]][CONFIG_NAME])
    repository.commit({CONFIG_NAME: json.dumps(config | {"sites": sites}).encode()})
    with pytest.raises(ValueError, match="must list its `sites` as module paths"):
        load_dictionary("org/name")
    assert sorted(hub.downloads()) == [LABELS_NAME, CONFIG_NAME]


def test_a_repository_cannot_place_files_elsewhere(hub, repository, tmp_path):
    repository.commit({"../evil": b"", "up/../../../evil": b"", "up/more.py": b"", "/evil": b""})
    load_dictionary("org/name", cache_dir=tmp_path / "here")
    assert not [path for path in hub.downloads() if "evil" in path or "more" in path]
    assert not list(tmp_path.rglob("evil*"))


def test_offline_from_the_cache(hub, repository, two_sites, monkeypatch):
    load_dictionary("org/name", layers=["up"])
    hub.stop()
    loaded = [
        load_dictionary("org/name", layers=["up"], local_files_only=True),
        load_dictionary("org/name", layers=["up"], local_files_only=True, revision=repository.branches["main"]),
        load_dictionary("org/name", layers=["up"]),  # nobody answers
    ]
    with pytest.raises(OSError, match="it is not in the cache, or not all of it"):
        load_dictionary("org/name", local_files_only=True)
    with pytest.raises(OSError, match="'org/other' is no folder here, .*ConnectError"):
        load_dictionary("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded.append(load_dictionary("org/name", layers=["up"]))
    assert all(same(state(each.sites["up"]), expected(two_sites, "up")) for each in loaded)
    with pytest.raises(OSError, match="'org/other' is no folder here, .*HF_HUB_OFFLINE is set"):
        load_dictionary("org/other")


def test_another_process_offline(hub, repository, tmp_path):
    cache = tmp_path / "home" / "hub"
    load_dictionary("org/name", cache_dir=cache)
    hub.stop()
    code = "from diffusers_rtsae import load_dictionary; print(*load_dictionary('org/name').sites)"
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": hub.endpoint,
    }
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == ["down", "up"], found.stderr


def test_push_and_load(hub, two_sites):
    url = two_sites.push_to_hub("org/new", token=hub.token, private=True, commit_message="the first")
    pushed = hub.repositories["org/new"]
    assert url == f"{hub.endpoint}/org/new/commit/{pushed.branches['main']}"
    assert pushed.private and pushed.messages == ["initial commit", "the first"]  # all in one commit
    sites = [f"{site}/{name}" for site in ("down", "up") for name in ("config.json", WEIGHTS_NAME)]
    files = pushed.commits[pushed.branches["main"]]
    assert sorted(files) == sorted([".gitattributes", "README.md", CONFIG_NAME, LABELS_NAME, *sites])
    assert b'pipe.load_rtsae("org/new")' in files["README.md"]
    loaded = load_dictionary("org/new", token=hub.token)
    assert loaded.labels == two_sites.labels and loaded.config["base_model"] == "org/base"
    assert all(same(state(loaded.sites[site]), expected(two_sites, site)) for site in ("down", "up"))


def test_pushing_again(hub, two_sites):
    first = two_sites.push_to_hub("org/new", token=hub.token)
    pushed = hub.repositories["org/new"]
    assert two_sites.push_to_hub("org/new", token=hub.token) == first and len(pushed.messages) == 2  # no change
    two_sites.labels["blue"] = two_sites.labels["red"]
    assert two_sites.push_to_hub("org/new", token=hub.token) != first
    assert len(load_dictionary("org/new").labels) == 2
    uploads = [path for method, path, _ in hub.log if method == "PUT"]
    assert len(uploads) == 2  # the weights, once


def test_pushing_leaves_a_card_that_somebody_wrote(hub, two_sites):
    two_sites.push_to_hub("org/new", token=hub.token)
    pushed = hub.repositories["org/new"]
    pushed.commit({"README.md": b"My dictionary"})
    two_sites.labels.clear()
    two_sites.push_to_hub("org/new", token=hub.token)
    assert pushed.commits[pushed.branches["main"]]["README.md"] == b"My dictionary"
    assert load_dictionary("org/new").labels == {}


def test_pushing_to_a_branch_and_as_a_pull_request(hub, two_sites):
    two_sites.push_to_hub("org/new", token=hub.token)
    pushed = hub.repositories["org/new"]
    before = pushed.branches["main"]
    pushed.branches["v2"] = before
    two_sites.labels["blue"] = two_sites.labels["red"]
    two_sites.push_to_hub("org/new", token=hub.token, revision="v2")
    url = two_sites.push_to_hub("org/new", token=hub.token, create_pr=True)
    assert pushed.branches["main"] == before and pushed.branches["v2"] != before
    assert url.endswith(pushed.branches["refs/pr/2"])
    with pytest.raises(OSError, match="'org/new' could not be pushed to the Hub: it has no revision 'v9'"):
        two_sites.push_to_hub("org/new", token=hub.token, revision="v9")


@pytest.mark.parametrize(
    ("status", "token", "message"),
    [(503, "hf_secret", "the Hub answered 503"), (None, False, "Invalid username or password")],
)
def test_a_push_that_is_refused(hub, two_sites, status, token, message):
    hub.status = status
    with pytest.raises(OSError, match=f"'org/new' could not be pushed to the Hub: .*{message}"):
        two_sites.push_to_hub("org/new", token=token)
    assert not hub.repositories


@pytest.mark.parametrize("name", ["a/b/c", "o rg/name", ""])
def test_pushing_to_what_is_no_name(hub, two_sites, name):
    with pytest.raises(OSError, match="could not be pushed to the Hub: ."):
        two_sites.push_to_hub(name, token=hub.token)


def test_a_pipeline_pushes_what_it_loaded(hub, steered):
    url = steered.push_rtsae_to_hub("org/shapes", token=hub.token)
    assert url.startswith(f"{hub.endpoint}/org/shapes/commit/")
    loaded = steered.get_list_rtsae()["default"]
    labels = steered.get_rtsae_features()
    steered.unload_rtsae()
    steered.load_rtsae("org/shapes")
    assert steered.get_list_rtsae() == {"default": loaded} and steered.get_rtsae_features() == labels


def test_the_index_of_known_dictionaries(hub):
    told = {"id", "base_model", "sites", "size", "license", "description", "ours"}
    assert all(told == entry.keys() for entry in list_pretrained())
    assert not any(entry["ours"] for entry in list_pretrained())  # none of ours is published yet
    assert not hub.log  # no network unless asked


def test_asking_the_hub_for_dictionaries(hub, two_sites, monkeypatch):
    names = [f"org/dictionary{i}" for i in range(5)]
    for name in names:
        two_sites.push_to_hub(name, token=hub.token, private=name.endswith("4"))
    hub.repositories["org/other"] = Repository()
    hub.repositories["org/other"].commit({"README.md": b"---\ntags:\n- other\n---\n"})
    hub.repositories["org/odd"] = Repository()
    hub.repositories["org/odd"].commit({"README.md": b"---\ntags:\n- diffusers-rtsae\nsites: 3\n---\n"})
    found = {entry["id"]: entry for entry in list_pretrained(refresh=True)}
    assert list(found) == [entry["id"] for entry in list_pretrained()] + names[:4] + ["org/odd"]
    assert found[names[0]]["base_model"] == "org/base" and found[names[0]]["sites"] == ["down", "up"]
    unknown = {"base_model": None, "sites": [], "size": None, "license": None, "description": ""}
    assert found["org/odd"] == {"id": "org/odd", "ours": True} | unknown
    assert found[names[0]]["ours"] and found[names[0]]["license"] == "unknown"
    assert names[4] in [entry["id"] for entry in list_pretrained(refresh=True, token=hub.token)]
    hub.stop()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts
    with pytest.raises(OSError, match="The Hub could not be asked for dictionaries: "):
        list_pretrained(refresh=True)


def test_a_hub_that_does_not_answer_is_said_soon(hub, monkeypatch):
    """Not after half a minute of the client's attempts: one question, and seconds."""
    monkeypatch.setattr("diffusers_rtsae.dictionary.hub._PATIENCE", 0.3)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tried again"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match="The Hub could not be asked for dictionaries: "):
            list_pretrained(refresh=True)
        with pytest.raises(OSError, match="not in the cache, and the Hub does not answer: "):
            check_available("org/none", "model_index.json")
