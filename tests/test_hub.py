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
    with pytest.raises(OSError, match="neither a folder nor a dictionary"):
        load_dictionary(tmp_path / "nowhere", local_files_only=True)


def test_a_hub_id_that_is_not_in_the_cache(tmp_path):
    with pytest.raises(OSError, match="'org/none' is neither a folder nor a dictionary"):
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
