"""Dictionaries on disk: what is written, what is refused."""

import json
import pickle

import pytest
import torch

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.hub import CONFIG_NAME, LABELS_NAME, WEIGHTS_NAME

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
    assert all(p.dtype == torch.float32 for p in dictionary.sites[SITE].parameters())
    assert load_dictionary(folder, dtype=torch.float16).sites[SITE].encoder.dtype == torch.float16


def test_saved_rows_are_float16_and_statistics_float32(folder):
    from safetensors.torch import load_file

    weights = load_file(folder / SITE / WEIGHTS_NAME)
    assert weights["encoder"].dtype == weights["decoder"].dtype == torch.float16
    assert weights["threshold"].dtype == weights["dynamics.scale"].dtype == torch.float32


def test_nothing_half_written_is_left(folder):
    assert not list(folder.rglob("*.partial"))


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="is no folder here, and no dictionary"):
        load_dictionary(tmp_path / "nowhere", local_files_only=True)


def test_a_hub_id_that_is_not_in_the_cache(tmp_path):
    with pytest.raises(OSError, match="'org/none' is no folder here, and no dictionary"):
        load_dictionary("org/none", cache_dir=tmp_path, local_files_only=True)


def test_a_folder_that_is_no_dictionary(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(OSError, match=rf"expected {CONFIG_NAME} in it, found \['model.bin'\]"):
        load_dictionary(tmp_path)


def test_subfolder(folder):
    assert list(load_dictionary(folder.parent, subfolder=folder.name).sites) == [SITE]


def test_unknown_layer(folder):
    with pytest.raises(ValueError, match=rf"no site 'down'; it has \['{SITE}'\]"):
        load_dictionary(folder, layers=["down"])


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


def test_weights_that_do_not_fit_their_config(folder):
    path = folder / SITE / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_latents": 17}))
    with pytest.raises(ValueError, match="do not fit its config.json"):
        load_dictionary(folder)


def test_damaged_json(folder):
    (folder / LABELS_NAME).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_dictionary(folder)


def test_another_format_version(folder):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, this version reads 1"):
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
    torch.testing.assert_close(half.encode(h), load_dictionary(folder).sites[SITE].encode(h), atol=1e-3, rtol=1e-2)
    assert half.feature_trajectories().dtype == half.decode(half.encode(h)).dtype == torch.float32


@pytest.mark.parametrize("name", ["decoder", "threshold", "dynamics.transition"])
def test_missing_tensors_are_never_made_up(folder, name):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / SITE / WEIGHTS_NAME)
    del weights[name]
    save_file(weights, folder / SITE / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"do not fit its config.json.*{name}"):
        load_dictionary(folder)


def test_weights_that_are_not_finite(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / SITE / WEIGHTS_NAME)
    weights["encoder"][0] = float("nan")
    save_file(weights, folder / SITE / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="holds NaN or inf"):
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


@pytest.mark.parametrize("source", [None, "", 3])
def test_no_source_at_all(source):
    with pytest.raises(ValueError, match="Expected a Hub id, a folder or a dict"):
        load_dictionary(source)


@pytest.mark.parametrize("sites", [{}, {SITE: 3}, {SITE: RTSAE("up", 8, [900, 1], 8, 2)}])
def test_dicts_that_hold_no_dictionary(sites):
    with pytest.raises(ValueError, match="at least one site|Expected an RTSAE of site"):
        load_dictionary(sites)


def test_layers_is_a_list(folder):
    with pytest.raises(ValueError, match="as a list of sites"):
        load_dictionary(folder, layers=SITE)


def test_a_save_that_is_interrupted_leaves_no_dictionary_behind(folder, monkeypatch):
    dictionary = load_dictionary(folder)

    def die(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(RTSAE, "save_pretrained", die)
    with pytest.raises(KeyboardInterrupt):
        dictionary.save(folder)
    with pytest.raises(OSError, match=f"expected {CONFIG_NAME}"):
        load_dictionary(folder)
