import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from disk import full_disk
from huggingface_hub import constants
from PIL import Image
from rich.console import Console
from small_analysis import fit_less
from typer.testing import CliRunner

from diffusers_rtsae import cli, files, load_dictionary
from diffusers_rtsae.cli import app
from diffusers_rtsae.worlds import WORLDS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("world", ["shapes", pytest.param("people", marks=pytest.mark.slow)])
def test_demo_writes_its_pictures_and_measures(world, tmp_path):
    told = ["demo", "--world", world, "--out", str(tmp_path), "--steps", "8", "--prompts", "2"]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    for name in ("steering", "trajectories", "heat_maps"):
        picture = Image.open(tmp_path / f"{name}.png").convert("L")
        assert min(picture.size) > 200 and len(picture.getcolors(256)) > 20
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured and {row["factor"] for row in measured.values()} == {*WORLDS[world].scenes}
    for row in measured.values():
        assert {*row["success"]} == {"open", "contradicted"}
        assert all(0 <= share <= 1 for shares in row["success"].values() for share in shares.values())


COMMANDS = (
    "demo",
    "steer",
    "find",
    "fit",
    "explain",
    "inspect",
    "report",
    "app",
    "list",
    "push",
    "collect",
    "train",
    "evaluate",
)


def invoke(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_every_command_explains_itself_with_an_example():
    listed = invoke("--help")
    for name in COMMANDS[:-3]:  # the others are the trainer's
        assert name in listed
        told = " ".join(invoke(name, "--help").split())
        assert f"Example: diffusers-rtsae {name}" in told


def test_fit_makes_a_label_and_does_not_make_it_twice(tmp_path, monkeypatch):
    fit_less(monkeypatch)
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([["a star, on white", "a star, on navy"]]))
    out, options = tmp_path / "fitted", ("--name", "dusk", "--rank", 4, "--steps", 4, "--json")
    told = json.loads(invoke("fit", "--pairs", pairs, "--out", out, *options))
    assert told["label"] == "dusk" and -1 < told["measured"]["effect"] <= 1
    ((before, after, effect),) = told["effects"]
    assert (before, after) == ("a star, on white", "a star, on navy")
    assert told["measured"]["lowest"] <= effect <= 1 and told["measured"]["pairs"] == 1
    assert "map" in load_dictionary(out).labels["dusk"]["features"][0]
    before = (out / "labels.json").read_bytes()
    assert "has a label dusk already" in invoke("fit", "--pairs", pairs, "--out", out, *options[:-1])
    assert (out / "labels.json").read_bytes() == before
    steered = invoke("steer", "a star", "dusk=1", "--dictionary", out, "--steps", 2, "--out", tmp_path / "dusk.png")
    assert "dusk.png" in steered.replace("\n", "")


def test_explain_adds_up_and_writes_what_it_found(tmp_path):
    out, picture, graph = tmp_path / "heart.json", tmp_path / "a" / "heart.png", tmp_path / "graph.json"
    prompt, options = "a large heart on white", ("--steps", 4, "--count", 3, "--without", "a large object on white")
    files = ("--out", out, "--picture", picture, "--graph", graph)
    told = json.loads(invoke("explain", prompt, "heart", *options, *files, "--json"))
    assert told == json.loads(out.read_text()) and told["total"] == pytest.approx(1, abs=1e-3)
    assert told["entries"][0]["labels"] == ["heart"] and Image.open(picture).width > 300
    found = json.loads(graph.read_text())
    assert found["nodes"][0]["share"] and all(edge["target"] < len(found["nodes"]) for edge in found["edges"])
    assert "in all: what 'white' does" in invoke("explain", prompt, "white", "--steps", 1)


def test_steer_writes_both_pictures_and_says_what_it_did(tmp_path, scorer):
    out = tmp_path / "star.png"
    prompt = "a large red thing on the left, flat, on white"
    told = json.loads(invoke("steer", prompt, "square=1", "--out", out, "--steps", 12, "--json"))
    assert set(told) == {"steered", "plain", "report"} and told["report"]
    steered, plain = (np.asarray(Image.open(told[name]).convert("RGB")) for name in ("steered", "plain"))
    reading = scorer.read(torch.from_numpy(np.stack([steered, plain])).permute(0, 3, 1, 2) / 255)
    assert (reading[0]["left.shape"], reading[0]["left.colour"]) == ("square", "red")
    assert reading[1]["left.shape"] != "square"


def test_steer_by_mask_window_and_index(tmp_path, latent):
    mask = Image.new("L", (64, 64), 255)
    mask.save(tmp_path / "mask.png")
    site = f"up_blocks.1.attentions.1:{latent('red')}"
    options = [
        "--mask",
        tmp_path / "mask.png",
        "--start",
        0.2,
        "--end",
        0.9,
        "--steps",
        2,
        "--out",
        tmp_path / "a.png",
    ]
    assert "a.png" in invoke("steer", "a star", f"{site}=1.0", f"{latent('square')}=0.5", *options)


def test_find_and_inspect_speak_json():
    arguments = ["--with", "a red star", "--without", "a blue star", "--seeds", 1, "--steps", 4, "--json"]
    result = CliRunner().invoke(app, ["find", *map(str, arguments), "--count", "3"])
    found = json.loads(result.stdout)
    assert "There is a label for this already: 'red'" in result.stderr
    assert len(found) == 3 and found[0]["score"] >= found[1]["score"] > 0
    told = json.loads(invoke("inspect", "--label", "red", "--json"))
    assert list(told["labels"]) == ["red"] and told["sites"]["up_blocks.1.attentions.1"]["num_latents"] == 2048
    assert "red" in invoke("inspect") and "2,048 latents" in invoke("inspect")
    known = json.loads(invoke("list", "--json"))
    assert "bcywinski/SAeUron" in [entry["id"] for entry in known] and not any(entry["ours"] for entry in known)
    listed = invoke("list")
    assert "BatchTopK, k = 32, of blocks' outputs (arXiv 2501.18052)" in listed
    assert max(map(len, listed.splitlines())) <= 80


def test_training_commands_hand_their_arguments_on(tmp_path):
    recipe = ROOT / "training" / "recipes" / "shapes.yaml"
    command = [sys.executable, "-m", "diffusers_rtsae.cli", "train", str(recipe), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "98,304 trajectories" in done.stdout
    done = subprocess.run([*command[:3], "train", "none.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "none.yaml" in done.stderr and "Traceback" not in done.stderr


def test_collect_stops_when_the_trajectories_are_there(tmp_path):
    recipe = ROOT / "training" / "recipes" / "shapes.yaml"
    fewer = ["collect.count=4", "collect.batch_size=2", "collect.steps=5", "collect.tokens_per_image=8"]
    command = [sys.executable, "-m", "diffusers_rtsae.cli", "collect", str(recipe), "--work", str(tmp_path), "--set"]
    done = subprocess.run([*command, *fewer], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "trajectories").glob("shard-*.safetensors"))) == 2
    assert not (tmp_path / "checkpoints").exists()


def test_report_writes_its_page(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\n\na blue heart\n")
    page = tmp_path / "made" / "report.html"
    few = ["--count", 4, "--steered", 1, "--steps", 3]
    assert "open it in a browser" in invoke("report", "--prompts", prompts, "--out", page, *few)
    assert "a blue heart" in page.read_text() and not list(page.parent.glob("*.partial"))
    result = CliRunner().invoke(app, ["report", "--pipeline", "somewhere", "--out", str(page)])
    assert "needs --prompts" in str(result.exception)


def test_app_listens_on_this_machine_alone():
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusers_rtsae.cli", "app", "--port", str(port)]
    with subprocess.Popen(command) as run:
        try:
            for _ in range(600):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert run.poll() is None
                time.sleep(0.2)
            with socket.socket() as outside, pytest.raises(ConnectionRefusedError):
                outside.connect((socket.gethostbyname(socket.gethostname()), port))
                if outside.getpeername()[0].startswith("127."):  # this machine knows itself by no other name
                    raise ConnectionRefusedError
            assert b"<html" in urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read()
        finally:
            run.terminate()


@pytest.mark.parametrize("arguments, message", [
    (["steer", "a star"], "Expected either features, like red=1.5, or --preset."),
    (["steer", "a star", "red"], "Expected FEATURE=STRENGTH, like red=1.5 or 1234=-0.5, got 'red'."),
    (["steer", "a star", "redd=1"], "no feature labelled 'redd'"),
    (["steer", "a cook", "red=1", "--world", "people"], "It has style: noto, twemoji, fluent; tone: yellow, light,"),
    (["inspect", "nowhere/at-all"], "is no folder here"),
    (["push", "nowhere/at-all", "you/name"], "is no folder here"),
    (["demo", "--dictionary", "examples"], "expected rtsae_config.json in it"),
    (["steer", "a star", "red=1", "--out", "no.doc"], "no.doc must end in .png,"),
    (["steer", "a star", "[/foo]=1"], "no feature labelled '[/foo]'"),
    (["steer", "a star", "red=1", "--preset", "[red]"], "Expected either features"),
    (["steer", "a star", "--preset", "[red]"], "no preset '[red]'"),
    (["steer", "a star", "red=1", "--mask", "README.md"], "cannot identify image file 'README.md'"),
    (["inspect", "examples/shapes-rtsae/up_blocks.1.attentions.1"], "Did you mean ['examples/shapes-rtsae']?"),
    (["find", "--with", "", "--without", "a star"], "A prompt of --with is empty"),
    (["report", "--prompts", "examples/pictures/steering.png"], "steering.png, line 1: expected text in UTF-8"),
    (["report", "--prompts", "nowhere.txt"], "nowhere.txt: No such file or directory."),
    (["report", "--out", "report.pdf"], "report.pdf must end in .html"),
])  # fmt: skip
def test_what_a_user_got_wrong_is_one_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, told = started(arguments, monkeypatch, capsys)
    assert code == 1 and message in told.err and not told.out
    assert told.err.startswith("error: ") and told.err.count("\n") == 1


def started(arguments: list, monkeypatch, capsys):
    """What the installed command returns and prints."""
    monkeypatch.setattr(sys, "argv", ["diffusers-rtsae", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    for module, name in ((cli.common, "console"), (cli, "errors")):
        monkeypatch.setattr(module, name, Console(stderr=name == "errors", emoji=False, highlight=False))
    with pytest.raises(SystemExit) as end:
        cli.run()
    return end.value.code or 0, capsys.readouterr()


@pytest.mark.parametrize("missing, extra", [("matplotlib", "analysis"), ("gradio", "app"), ("pydantic", "train")])
def test_what_is_not_installed_is_one_sentence_with_its_extra(missing, extra, monkeypatch, capsys):
    commands = {"analysis": ["demo"], "app": ["app"], "train": ["train", "--help"]}
    monkeypatch.setitem(sys.modules, missing, None)  # what Python finds where it is not installed
    code, told = started(commands[extra], monkeypatch, capsys)
    assert (code, told.err) == (1, f'error: This needs {missing}: pip install "diffusers-rtsae[{extra}]"\n')


@pytest.mark.parametrize(
    "option", [["--seed", "-1"], ["--seed", str(2**63)], ["--steps", "0"], ["--guidance", "nan"], ["--world", "mars"]]
)
def test_what_is_out_of_range_is_said_without_a_model(option):
    result = CliRunner().invoke(app, ["steer", "a star", "red=1", *option])
    assert result.exit_code == 2 and option[0] in result.output


@pytest.mark.parametrize("wrong, message", [
    (["red=1", "--start", 0.9, "--end", 0.1], "Expected 0 <= start <= end <= 1"),
    (["red=1", "--operation", "paint"], "`operation` must be one of"),
    (["red=1", "--operation", "transfer"], "needs a `source` feature"),
    (["99999=1"], "Feature 99999 does not exist"),
])  # fmt: skip
def test_nothing_is_drawn_before_everything_is_known_to_be_right(wrong, message, tmp_path, monkeypatch):
    def drawn(*arguments, **options):
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", drawn)
    out = tmp_path / "made" / "star.png"
    result = CliRunner().invoke(app, ["steer", "a star", *map(str, wrong), "--out", str(out)])
    assert message in str(result.exception) and not out.parent.exists()


def test_paths_can_be_copied_and_nothing_in_them_is_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-rtsae"])
    long = tmp_path / f"[red]{'a-long-name-' * 12}:smile:[/foo]"
    for say in (cli.common.say, cli.fail):
        monkeypatch.setattr(cli.common, "console", Console(width=80, emoji=False, highlight=False))
        monkeypatch.setattr(cli, "errors", Console(width=80, emoji=False, highlight=False))
        with contextlib.suppress(SystemExit):
            say(f"{long} is here")
        assert f"{long} is here\n" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(tmp_path):
    picture = Image.effect_noise((64, 64), 60)
    for write in (lambda path: picture.save(path, "PNG"), lambda path: files.write_text(path, "a" * 5000)):
        with full_disk(1000), pytest.raises(OSError), files.whole(tmp_path / "star.png") as partial:
            write(partial)
    assert not list(tmp_path.iterdir())
    with files.whole(tmp_path / "star.png") as partial:
        picture.save(partial, "PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["star.png"] and Image.open(tmp_path / "star.png").size


def test_steering_says_where_its_pictures_are_and_nothing_else(tmp_path):
    """No deprecation, no note on packages that nothing needs, no bar of what is loaded in a moment."""
    command = [sys.executable, "-m", "diffusers_rtsae.cli", "steer", "a star", "red=1", "--steps", "1", "--json"]
    environment = os.environ | {"PYTHONWARNINGS": "default::FutureWarning"}
    done = subprocess.run([*command, "--out", tmp_path / "a.png"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["steered"] == str(tmp_path / "a.png")
    left = [line for line in re.split("[\r\n]", done.stderr) if line.strip() and "/1 [" not in line]  # bars of drawing
    assert not left


def test_the_trainer_is_that_of_the_package(tmp_path):
    """Whatever else is called training: in the working directory, or installed."""
    for folder in (tmp_path / "training", tmp_path / "site" / "training"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('another')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")])}
    command = [sys.executable, "-m", "diffusers_rtsae.cli", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: diffusers-rtsae train "), done.stderr
