"""
What a stranger's dictionary can do: thousands of damaged and malicious files, seeded. Each loads or is refused with a
`ValueError` or `OSError` of reasonable length, in bounded time and memory, and nothing outside its folder is touched.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from foreign import CASES
from kinds import random_dictionary

import diffusers_rtsae.formats.pickles  # noqa: F401 - is imported when it is needed, which opens its file
from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.dictionary import CONFIG_NAME, LABELS_NAME, WEIGHTS_NAME, convertible, model_card
from diffusers_rtsae.models import Step

SITE = "mid_block"
CONFIG, WEIGHTS = f"{SITE}/config.json", f"{SITE}/{WEIGHTS_NAME}"
OTHERS = ["SparseAutoencoder", "TIDE, TopK", "MixtureSAE"]
COUNTS = {
    "bytes of the weights": 3000,
    "header of the weights": 2200,
    CONFIG: 2000,
    LABELS_NAME: 2000,
    CONFIG_NAME: 2000,
}
FUZZ = bool(os.environ.get("FUZZ"))  # as many damaged files as `COUNTS` says, for every kind; without it a tenth
FEWER = 1 if FUZZ else 10
OF_KIND = [(kind, target) for kind in OTHERS for target in COUNTS if FUZZ or SITE in target or "weights" in target]
DEEP, LONG = "\N{DOWNWARDS ARROW}", "\N{RIGHTWARDS ARROW}"  # stand for what `json.dumps` would not write
NASTY = [
    None, True, False, 0, 1, -1, 7, 8, 2**31, 2**53, 2**63, 2**64, 10**12, 10**30, -(10**30), 10**400, 0.5, -0.0,
    1e308, float("nan"), float("inf"), "", "x", "0", "..", "../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x",
    "\0", "\ud800", "mid_block", "up", "ablate", "transfer", "F32", "F16", "I64", "F8_E4M3", "BOOL", "a" * 10000,
    [], {}, [[]], [{}], [0], [1, 0], [8], [-1], ["x"], [None], [0] * 3000, {"": {}}, {"__class__": "os.system"},
    DEEP, LONG,
]  # fmt: skip

_seen: list[tuple] | None = None
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)


def _audit(event: str, arguments: tuple) -> None:
    if _seen is not None and (event == "open" or event in _CHANGES or event in _NEVER or event.startswith("shutil.")):
        _seen.append((event, *arguments))


sys.addaudithook(_audit)  # cannot be taken away again, and is idle outside `attempt`


def write(folder: Path, kind: str = "RTSAE") -> None:
    entry = {"site": SITE, "latents": [1, 3], "weights": [1.0, 0.5], "where": [2]}
    labels = {"red": {"factor": "colour", "features": [entry], "edit": {"start": 0.1}, "measured": {"success": 1.0}}}
    config = {"base_model": "test", "signature": {"class": "UNet2DConditionModel"}, "metrics": {SITE: {"r2": [0.5]}}}
    Dictionary({SITE: random_dictionary(kind, SITE, 4, [900, 1], 8, 2)}, labels, config).save(folder)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "inside" / "dictionary")
    return tmp_path / "inside" / "dictionary"


def attempt(folder: Path, load=load_dictionary, **options) -> Dictionary | None:
    """Load and use; `None` if refused. Anything but a clear refusal is an error here."""
    global _seen
    started, _seen = time.thread_time(), []
    try:
        dictionary = load(folder, **options)
    except (ValueError, OSError) as error:
        assert 0 < len(str(error)) < 2500, f"{len(str(error))} characters: {str(error)[:300]}"
        return None
    finally:
        seen, _seen = _seen, None
        assert time.thread_time() - started < 2
        for event, *arguments in seen:
            assert event == "open", f"{event} {arguments}"
            path, mode, flags = arguments
            inside = Path(os.path.abspath(path)).is_relative_to(folder)
            assert inside and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), f"{path} was opened with {mode}"
    use(dictionary)
    return dictionary


def use(dictionary: Dictionary) -> None:
    """What was loaded must work."""
    for label in dictionary.labels:
        dictionary.features(label)
    for rtsae in dictionary.sites.values():
        for name in ("threshold", "encoder_bias", "typical_activation", "density"):
            assert torch.isfinite(getattr(rtsae, name)).all()
        assert rtsae.feature_trajectories([0]).shape[1:] == (len(rtsae.config.anchors), rtsae.config.in_channels)
        with contextlib.suppress(ValueError):  # rows may hold NaN
            reader = rtsae.reader([0], torch.device("cpu"))
            reader.read(reader.begin(), torch.zeros(1, 1, rtsae.config.in_channels), Step(900, 0.0))
    assert model_card(dictionary.sites, dictionary.labels, dictionary.config)
    denoiser = torch.nn.Identity()
    denoiser.config = {"in_channels": 4}
    with contextlib.suppress(ValueError):  # its signature may be that of another model
        dictionary.check(denoiser)


def places(content, at: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON document."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def mutate_json(text: bytes, chance: random.Random) -> bytes:
    """One to three changes of values or keys, or now and then of bytes."""
    if chance.random() < 0.15:
        return mutate_bytes(text, chance)
    content = json.loads(text)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *way, key = ("root", *chance.choice(places(content)))
        holder = parent = {"root": content}
        for step in way:
            parent = parent[step]
        kind, value = chance.random(), copy.deepcopy(chance.choice(NASTY))
        if kind < 0.6:
            parent[key] = value
        elif kind < 0.75:
            del parent[key]
        elif kind < 0.85:
            parent[key] = [parent[key]] * chance.choice([1, 2, 500])
        elif isinstance(parent, dict):
            parent[value if isinstance(value, str) else "more"] = parent[key] if kind < 0.95 else value
        else:
            parent.insert(0, value)
        content = holder.get("root")
    text = json.dumps(content)
    text = text.replace(json.dumps(DEEP), "[" * 20000 + "]" * 20000).replace(json.dumps(LONG), "9" * 5000)
    return text.encode()


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bits flipped, cut off, left out, put in, or doubled."""
    content, kind = bytearray(content), chance.random()
    at = chance.randrange(len(content))
    if kind < 0.6:
        for _ in range(chance.choice([1, 1, 2, 8, 64])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind < 0.75:
        del content[at:]
    elif kind < 0.85:
        del content[at : at + chance.choice([1, 8, 100])]
    elif kind < 0.95:
        content[at:at] = chance.randbytes(chance.choice([1, 8, 100]))
    else:
        content += content[at:]
    return bytes(content)


def mutate_header(content: bytes, chance: random.Random) -> bytes:
    """The JSON before the weights changed, its length right, or wrong, or enormous."""
    length = int.from_bytes(content[:8], "little")
    header, rest = mutate_json(content[8 : 8 + length], chance), content[8 + length :]
    stated, kind = len(header), chance.random()
    if kind < 0.1:
        stated = chance.choice([0, 1, stated - 1, stated + 1, stated + len(rest), 10**8, 2**32, 2**63, 2**64 - 1])
    if 0.1 < kind < 0.5:  # aligned as the format asks
        header += b" " * (-len(header) % 8)
        stated = len(header)
    return stated.to_bytes(8, "little") + header + rest


def test_there_are_enough():
    assert sum(COUNTS.values()) >= 10_000


@pytest.mark.parametrize("kind, target", [*(("RTSAE", target) for target in COUNTS), *OF_KIND])
def test_damaged_files(tmp_path, kind, target):
    folder, count = tmp_path / "inside" / "dictionary", COUNTS[target] // FEWER
    write(folder, kind)
    chance, loaded = random.Random(target), 0
    path = folder / (WEIGHTS if "weights" in target else target)
    mutate = {"bytes of the weights": mutate_bytes, "header of the weights": mutate_header}.get(target, mutate_json)
    intact = path.read_bytes()
    assert attempt(folder) is not None
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    again = folder.parents[1] / "again"
    again.mkdir()
    outside = sorted(path for path in folder.parents[1].rglob("*") if again not in path.parents)
    for i in range(count):
        path.unlink()  # what was loaded before maps the old file
        path.write_bytes(mutate(intact, chance))
        try:
            dictionary = attempt(folder)
            loaded += dictionary is not None
            if dictionary is not None and mutate is mutate_json and loaded % 20 == 0:
                dictionary.save(again)
                assert attempt(again).labels == dictionary.labels
        except BaseException:
            shutil.copytree(folder, folder.parents[1] / "kept")
            print(f"number {i} is kept in {folder.parents[1] / 'kept'}")
            raise
    assert sorted(path for path in folder.parents[1].rglob("*") if again not in path.parents) == outside
    assert 0.01 * count < loaded < 0.7 * count  # changes that matter, and some that do not
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * (
        2**20 if sys.platform == "darwin" else 2**10
    )


FOREIGN = {  # layout -> files that are damaged
    "sparsify, BatchTopK": ("cfg.json", "sae.safetensors"),
    "SAELens, jumprelu": ("cfg.json", "sae_weights.safetensors"),
    "SAELens, gated": ("sae_weights.safetensors",),
    "SDLens, safetensors": ("config.json", "state_dict.safetensors"),
    "DifFRACT, sae_txt_6.safetensors": ("sae_txt_6.safetensors",),
}
PICKLED = {
    "SDLens": ("config.json", "state_dict.pth", "mean.pt"),
    "overcomplete, pickled": ("overcomplete.json",),
    "dictionary_learning, BatchTopKSAE": ("ae.pt",),
}


@pytest.mark.filterwarnings("ignore:.*how active its latents are")
@pytest.mark.parametrize(
    "layout, name", [(layout, name) for layout, names in (FOREIGN | PICKLED).items() for name in names]
)
def test_damaged_files_of_others(tmp_path, layout, name):
    folder = CASES[layout]().write(tmp_path / "inside" / "theirs")
    path = next(folder.rglob(name))
    pickled = layout in PICKLED
    intact, chance, loaded = path.read_bytes(), random.Random(layout + name), 0
    kinds = (mutate_json,) if name.endswith(".json") else (mutate_bytes,) if pickled else (mutate_bytes, mutate_header)
    outside = sorted(tmp_path.rglob("*"))
    for i in range(3000 if FUZZ else 150):
        path.unlink()  # what was loaded before maps the old file
        path.write_bytes(kinds[i % len(kinds)](intact, chance))
        loaded += attempt(folder, convertible if pickled else load_dictionary) is not None
    assert sorted(tmp_path.rglob("*")) == outside and loaded > 0


@pytest.mark.parametrize("name", [CONFIG_NAME, LABELS_NAME, CONFIG])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10**6, "is not valid JSON"),
        (b'{"a":' * 10**6 + b"1" + b"}" * 10**6, "is not valid JSON"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 levels deep"),
        (b'{"a": ' + b"9" * 10**6 + b"}", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"{" + b" " * (65 * 2**20) + b"}", "is too large"),
    ],
    ids=["open", "deep", "nested", "digits", "bytes", "empty", "large"],
)
def test_json_that_wants_to_exhaust(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{Path(name).name}.* {message}"):
        load_dictionary(folder)
    assert attempt(folder) is None


@pytest.mark.parametrize(
    "sites", [["../bait/mid_block"], ["../../bait.mid_block"], ["mid_block", "../bait"], ["/"], ["."], ["mid_block/"]]
)
def test_sites_lead_nowhere_else(folder, sites):
    write(folder.parent / "bait")
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sites": sites}))
    assert attempt(folder) is None


@pytest.mark.parametrize("subfolder", ["../bait", "..", "mid_block/../../bait", "{outside}", "..\\bait"])
def test_subfolders_lead_nowhere_else(folder, subfolder):
    write(folder.parent / "bait")
    assert attempt(folder, subfolder=subfolder.format(outside=folder.parent / "bait")) is None


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "\x1b[2J", "<script>", "---\n", "```\n", "a" * 10**5, "\ud800"]
)
def test_labels_are_text_and_nothing_else(folder, name):
    labels = json.loads((folder / LABELS_NAME).read_text())
    (folder / LABELS_NAME).write_text(json.dumps({name: labels["red"]}))
    outside = sorted(folder.parents[1].rglob("*"))
    dictionary = attempt(folder)
    assert list(dictionary.labels) == [name]
    assert sorted(folder.parents[1].rglob("*")) == outside
    dictionary.save(folder.parent / "again")
    assert list(attempt(folder.parent / "again").labels) == [name]
    card = (folder.parent / "again" / "README.md").read_text()
    assert card.count("\n```") == 2 and card.count("\n---\n") == 1 and "<script>" not in card.rpartition("\n```")[2]


@pytest.mark.parametrize("name", [CONFIG_NAME, LABELS_NAME, CONFIG, WEIGHTS, SITE])
@pytest.mark.parametrize("kind", ["text", "folder", "itself", "nothing", "/dev/zero", "/dev/stdin", "pipe", "another"])
def test_links_are_read_at_most(folder, name, kind):
    """Caches consist of links, so these are followed; what they lead to is checked like any file and never changed."""
    outside = folder.parents[1] / "outside"
    write(outside)
    (outside / "text").write_text("precious")
    (outside / "folder").mkdir()
    os.mkfifo(outside / "pipe")
    target = {"itself": folder / name, "another": outside / name}.get(kind, outside / kind)
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(kind if kind.startswith("/dev") else target)
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    dictionary = attempt(folder)
    assert (dictionary is not None) == (kind == "another")
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before
    if dictionary is not None and name != SITE:
        dictionary.save(folder)  # replaces the link, not what it leads to
        assert not path.is_symlink() and attempt(folder) is not None
    elif dictionary is not None:
        with pytest.raises(OSError, match="is a link"):
            dictionary.save(folder)
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before


def test_a_pickle_is_never_opened(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "evil"),)

    import pickle

    for suffix in ("bin", "safetensors", "pt"):
        (folder / SITE / f"diffusion_pytorch_model.{suffix}").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), folder / SITE / "pytorch_model.bin")
    assert attempt(folder) is None
    (folder / WEIGHTS).unlink()
    assert attempt(folder) is None
    assert not (folder / "evil").exists()
