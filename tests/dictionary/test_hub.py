"""Dictionaries on the Hub: the real client against a server on this machine."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time

import pytest
import torch
from disk import same, state
from hub_server import Repository
from huggingface_hub import constants

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.dictionary import CONFIG_NAME, LABELS_NAME, WEIGHTS_NAME, check_available, list_pretrained


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
