"""The world of people: pictures from packages that this test draws itself, captions, scorer targets and pipeline."""

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile

import pytest
import torch
from PIL import Image, ImageDraw

from diffusers_rtsae.analysis.scorer import FactorScorer
from training.data.collect import anchor_timesteps, collect
from training.data.prompts import read_samples
from training.data.store import TrajectoryStore
from training.recipe import Collect, Recipe
from training.worlds.people import pipeline as training
from training.worlds.people import scenes
from training.worlds.people.captions import PHRASES, caption
from training.worlds.people.evaluate import evaluate
from training.worlds.people.scenes import (
    FACTORS,
    PACKAGES,
    People,
    build,
    combinations,
    factors_of,
    is_held_out,
    load,
)
from training.worlds.people.scorer import FACTORS as READ
from training.worlds.people.scorer import flaws, targets
from training.worlds.pictures import load_pipeline

BASES = {
    "1F468-200D-1F692": "MAN FIREFIGHTER", "1F469-200D-1F692": "WOMAN FIREFIGHTER", "1F9D1-200D-1F692": "FIREFIGHTER",
    "1F3C4": "SURFER", "1F3C4-200D-2640-FE0F": "WOMAN SURFING", "1F469-200D-1F9B0": "WOMAN: RED HAIR",
    "1F936": "MOTHER CHRISTMAS",
}  # fmt: skip
TONES = ["1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"]


def picture(code: str, style: str) -> bytes:
    """A disc in a colour of the code points, on nothing."""
    size = 128 if style == "fluent" else 64
    image, colour = Image.new("RGBA", (size, size)), tuple(hashlib.sha256((style + code).encode()).digest()[:3])
    ImageDraw.Draw(image).ellipse([size // 4, size // 4, 3 * size // 4, 3 * size // 4], fill=colour)
    content = io.BytesIO()
    image.save(content, "WEBP" if style == "fluent" else "PNG", lossless=True)
    return content.getvalue()


def entry(unified: str, name: str, order: int, toned: bool = True, subcategory: str = "person-role") -> dict:
    def image(code: str) -> dict:
        return {"unified": code, "image": f"{code.lower()}.png"}

    first, *rest = unified.split("-")
    variations = {tone: image("-".join([first, tone, *rest])) for tone in TONES} if toned else {}
    return (
        image(unified)
        | {"name": name, "sort_order": order, "subcategory": subcategory}
        | ({"skin_variations": variations} if toned else {})
    )


NAMES = [entry(unified, name, i) for i, (unified, name) in enumerate(BASES.items())] + [
    entry("1F9DF", "ZOMBIE", 90, toned=False),
    entry("1F9CC", "TROLL", 91, toned=False),
    entry("1F464", "BUST IN SILHOUETTE", 92, toned=False, subcategory="person-symbol"),
    entry("1F436", "DOG FACE", 93, toned=False, subcategory="animal-mammal"),
]


def pack(folder, style: str, names=NAMES, spoil=None) -> scenes.Package:
    """Write a package; `spoil` changes its files by path."""
    package = PACKAGES[style]
    files = {scenes.NAMES: json.dumps(names).encode()}
    for name in names:
        for one in (name, *name.get("skin_variations", {}).values()):
            stem = one["image"].removesuffix(".png")
            files[package.pictures.format(stem)] = picture(stem, style)
    for path, content in (spoil or {}).items():
        del files[path]
        if content:
            files[path] = content
    with tarfile.open(folder / package.file, "w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sha256 = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
    return scenes.Package(package.name, package.version, sha256, package.pictures)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    build(folder, folder / "set", {style: pack(folder, style) for style in PACKAGES})
    return folder / "set"


def test_pictures_are_built_on_white_with_their_factors(pictures):
    images, people = load(pictures)
    assert images.shape == (3 * (6 * len(BASES) + 1), 3, 64, 64) and images.dtype == torch.uint8
    index = json.loads((pictures / "index.json").read_text())
    assert len(index) == len(people) and len({tuple(map(tuple, people.values(i).items())) for i in range(129)}) == 129
    for i, told in enumerate(index):
        assert people.values(i).items() <= told.items()
        colour = list(hashlib.sha256((told["style"] + told["picture"]).encode()).digest()[:3])
        assert images[i, :, 32, 32].tolist() == colour and images[i, :, 0].eq(255).all()
    by_picture = {(told["style"], told["picture"]): told for told in index}
    told = by_picture["twemoji", "1f469-1f3fd-200d-1f692"]
    assert (told["who"], told["role"], told["tone"]) == ("woman", "firefighter", "medium")
    assert by_picture["fluent", "1f936"] | {"held_out": 0} == {
        "style": "fluent", "picture": "1f936", "tone": "yellow", "who": "woman", "role": "santa", "held_out": 0,
    }  # fmt: skip
    assert "tone" not in by_picture["noto", "1f9df"]


def test_held_out_combinations_are_one_in_eleven_and_never_loaded_for_training(pictures):
    everyone = combinations()
    assert len(everyone) == 4392 and len(FACTORS["role"]) == 90
    assert 0.085 < is_held_out(everyone).float().mean() < 0.097
    for name, values in FACTORS.items():  # both halves have every value
        for half in (True, False):
            seen = getattr(everyone[is_held_out(everyone) == half], name)
            assert set(seen[seen >= 0].tolist()) == set(range(len(values)))
    assert is_held_out(load(pictures, held_out=True)[1]).all() and not is_held_out(load(pictures, False)[1]).any()
    assert len(load(pictures, True)[0]) + len(load(pictures, False)[0]) == len(load(pictures)[0])


def test_a_set_that_was_not_built_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="build them with `python -m training.worlds.people.scenes`"):
        load(tmp_path)


@pytest.mark.parametrize(
    "code, name, expected",
    [
        ("1F3C4-200D-2642-FE0F", "MAN SURFING", ("man", "surfing")),
        ("1F575-FE0F", "DETECTIVE", ("person", "detective")),
        ("1F9D1-200D-1F384", "MX CLAUS", ("person", "santa")),
        ("1F469", "WOMAN", ("woman", "portrait")),
        ("1F467", "GIRL", ("woman", "child")),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "WOMAN RUNNING FACING RIGHT", None),
        ("1F46F-200D-2642-FE0F", "MEN WITH BUNNY EARS", None),
    ],
)
def test_code_points_say_who_does_what(code, name, expected):
    assert factors_of(code, name) == expected


def bad(folder, **spoiled) -> dict[str, scenes.Package]:
    return {style: pack(folder, style, **spoiled.get(style, {})) for style in PACKAGES}


def test_what_is_wrong_with_packages_is_told_in_one_sentence_and_nothing_half_written(tmp_path):
    out, paths = tmp_path / "set", {style: tmp_path / package.file for style, package in PACKAGES.items()}

    def raises(error, match, packages):
        with pytest.raises(error, match=match) as raised:
            build(tmp_path, out, packages)
        assert "\n" not in str(raised.value) and not (out / "index.json").exists()
        assert not list(out.glob("*.partial"))

    raises(FileNotFoundError, r"no version of it: run `npm pack emoji-datasource-google@16.0.0`", PACKAGES)
    good = bad(tmp_path)
    older = paths["twemoji"].with_name("emoji-datasource-twitter-15.1.2.tgz")
    paths["twemoji"].rename(older)
    raises(FileNotFoundError, "lacks emoji-datasource-twitter-16.0.0.tgz and has emoji-datasource-twitter-15.1", good)
    older.rename(paths["twemoji"])
    raises(ValueError, "checksum .* it is another file", PACKAGES)
    spoilt = PACKAGES["twemoji"].pictures.format("1f3c4")
    raises(ValueError, "1f3c4.png cannot be read", bad(tmp_path, twemoji={"spoil": {spoilt: b"no picture"}}))
    raises(ValueError, "has no .*1f3c4.png", bad(tmp_path, twemoji={"spoil": {spoilt: None}}))
    unknown = [*NAMES, entry("1F9D1-200D-1F9F6", "KNITTER", 99)]
    raises(ValueError, r"KNITTER \(1F9D1-200D-1F9F6\) has no caption", bad(tmp_path, noto={"names": unknown}))


def test_a_stopped_build_continues(tmp_path, monkeypatch):
    packages, read = bad(tmp_path), []
    plain = scenes.read_pictures

    def stops_at_the_second(package, paths):
        read.append(package.name)
        if len(read) == 2:
            raise KeyboardInterrupt
        return plain(package, paths)

    monkeypatch.setattr(scenes, "read_pictures", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, tmp_path / "set", packages)
    build(tmp_path, tmp_path / "set", packages)
    assert len(read) == 4 and read[1] == read[2] != read[0]
    build(tmp_path, tmp_path / "set", packages)
    assert len(read) == 4 and len(load(tmp_path / "set")[0]) == 129


def test_captions_say_what_they_claim_to_name_and_nothing_else():
    everyone, rng = combinations(), random.Random(0)
    for i in rng.sample(range(len(everyone)), 300):
        text, named = caption(everyone, i, rng)
        values, words = everyone.values(i), text.replace(",", "").split()
        assert ("skin" in words) == ("tone" in named) and named <= set(values)
        assert (values["style"] in words) == ("style" in named) and bool(set(words) & set(PACKAGES)) == (
            "style" in named
        )
        if "tone" in named:
            assert values["tone"] in words
        role = PHRASES.get(values["role"], values["role"])
        assert (role in text) >= ("role" in named and values["role"] not in ("child", "older adult"))
        said = {"woman": {"woman", "girl"}, "man": {"man", "boy"}, "person": {"person", "gender-neutral"}}
        assert ("who" in named) == bool(said[values["who"]] & set(words))


def test_every_word_of_a_caption_is_one_token_and_other_words_are_spelled():
    tokenizer, everyone, rng = training.build_tokenizer(), combinations(), random.Random(1)
    for i in rng.sample(range(len(everyone)), 200):
        text, _ = caption(everyone, i, rng)
        assert tokenizer.tokenize(text) == [
            piece for word in text.split() for piece in ([f"▁{word.rstrip(',')}"] + [","] * word.endswith(","))
        ]
    ids = tokenizer("a quick brown zebra, 42!").input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, True) == "a quick brown zebra, 42!"


def test_what_the_standard_gives_no_tone_is_no_target():
    people = People(*torch.tensor([[0, -1, 1, 3], [2, 5, 0, 0]]).T)
    assert {name: code.tolist() for name, code in targets(people).items()} == {
        "style": [0, 2], "tone": [-100, 5], "who": [1, 0], "role": [3, 0], "valid": [1, 1],
    }  # fmt: skip


def test_flaws_move_a_picture_a_little(pictures):
    images = load(pictures)[0][:8].float() / 255
    seen = flaws(images, torch.Generator().manual_seed(0))
    assert seen.shape == images.shape and 0 < (seen - images).abs().mean() < 0.1


RECIPE = {
    "seed": 0,
    "precision": "float32",
    "autoencoder": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "config": {
        "block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 8, "norm_num_groups": 4, "sample_size": 64,
        "mid_block_add_attention": False, "scaling_factor": 1.0,
    }},
    "text_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
                     "dropout_rate": 0.0},
    "scheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "denoiser": {
        "steps": 3, "cooldown": 2, "batch_size": 4, "learning_rate": 1e-3, "learning_rate_others": 1e-3,
        "warmup": 1, "ema_decay": 0.9, "naming": 0.85, "caption_dropout": 0.1,
        "checkpoint_every": 1, "transformer": {
            "sample_size": 16, "patch_size": 2, "in_channels": 8, "out_channels": 8, "num_layers": 1,
            "num_attention_heads": 1, "attention_head_dim": 16, "cross_attention_dim": 16, "caption_channels": 16,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert training.train_denoiser(RECIPE, pictures, folder, folder / "pipeline", "cpu", float("inf"))
    return folder


def test_a_killed_training_continues_to_the_same_weights(trained, pictures, tmp_path, monkeypatch):
    def train(minutes=float("inf")):
        return training.train_denoiser(RECIPE, pictures, tmp_path, tmp_path / "pipeline", "cpu", minutes)

    plain, left = training.batch_of_text, iter((1, 1))

    def killed(*arguments):
        next(left)  # nothing is left in the third step
        return plain(*arguments)

    with monkeypatch.context() as patched, pytest.raises(StopIteration):
        patched.setattr(training, "batch_of_text", killed)
        train()
    assert not (tmp_path / "pipeline").exists()
    assert not train(minutes=0)  # saves what there is
    early = load_pipeline(tmp_path / "pipeline", "cpu").transformer.state_dict()
    assert train()
    whole, parts = (load_pipeline(path / "pipeline", "cpu").transformer.state_dict() for path in (trained, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], early[name]) for name in whole)


def test_a_training_may_begin_with_a_saved_pipeline(trained, pictures, tmp_path):
    def train(recipe):
        return training.train_denoiser(
            recipe, pictures, tmp_path, tmp_path / "further", "cpu", 1, trained / "pipeline"
        )

    assert train(RECIPE)
    begun, further = (load_pipeline(path, "cpu") for path in (trained / "pipeline", tmp_path / "further"))
    before, after = begun.vae.state_dict(), further.vae.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = begun.transformer.state_dict(), further.transformer.state_dict()
    moved = max((after[name] - before[name]).abs().max() for name in before)
    assert 0 < moved < 0.1
    deeper = RECIPE["denoiser"] | {"transformer": RECIPE["denoiser"]["transformer"] | {"num_layers": 2}}
    with pytest.raises(ValueError, match="has another num_layers than the recipe, 1"):
        train(RECIPE | {"denoiser": deeper})


def test_latents_are_standardised_without_changing_a_picture(trained, pictures):
    images = load(pictures, held_out=False)[0]
    vae = load_pipeline(trained / "pipeline", "cpu").vae
    latents = training.encode(vae, images).float()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), atol=0.02, rtol=0)
    with torch.no_grad():
        before = vae.decode(latents[:4]).sample
        spread = torch.linspace(0.5, 3, 8)[:, None, None]
        training.standardise(vae, latents * spread + 1)  # as if they had another scale and place
        posterior = vae.encode(images[:4].float() / 127.5 - 1).latent_dist
        moved = (latents[:4] - 1) / spread
        torch.testing.assert_close(posterior.mean, moved, atol=0.02, rtol=0.02)
        torch.testing.assert_close(vae.decode(posterior.mean).sample, vae.decode(moved).sample, atol=0.05, rtol=0.05)
    assert before.shape == (4, 3, 64, 64)


def test_the_card_names_every_source_and_its_licence(trained):
    card = (trained / "pipeline" / "README.md").read_text()
    for package, licence in zip(PACKAGES.values(), ("Apache-2.0", "CC BY 4.0", "MIT"), strict=True):
        assert f"`{package.name}` {package.version}" in card and licence in card


def test_the_trained_folder_is_a_plain_pipeline(trained):
    program = (
        "import sys\nfrom diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(trained / 'pipeline')!r})\n"
        "assert type(pipe).__name__ == 'PixArtAlphaPipeline'\n"
        "call = {'num_inference_steps': 2, 'use_resolution_binning': False, 'output_type': 'np'}\n"
        "assert pipe('a woman firefighter', **call).images.shape == (1, 64, 64, 3)\n"
        "assert not any(name.startswith(('diffusers_rtsae', 'training')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_the_evaluation_counts_what_the_scorer_reads(trained, pictures):
    people = load(pictures, held_out=True)[1]
    scorer = FactorScorer(READ)
    result, images = evaluate(load_pipeline(trained / "pipeline", "cpu"), scorer, people, 2, 3.0, 64)
    assert images.shape == (len(people), 3, 64, 64)
    assert set(result["right"]) == {*FACTORS, "role top 5", "valid"}
    read = [reading["who"] for reading in scorer.read(images)]
    right = sum(who == people.values(i)["who"] for i, who in enumerate(read)) / len(people)
    assert result["right"]["who"] == pytest.approx(right, abs=1e-4)


def test_trajectories_are_collected_at_the_size_and_with_the_sampler_of_the_pipeline(trained, tmp_path):
    pipe, site = load_pipeline(trained / "pipeline", "cpu"), "transformer_blocks.0"
    settings = {
        "prompts": "people",
        "count": 4,
        "steps": 4,
        "guidance_scale": 3.0,
        "batch_size": 2,
        "tokens_per_image": 10,
    }
    train = {"num_latents": 8, "k": 2, "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    recipe = Recipe(pipeline="x", base_model="x", sites=[site], anchors=3, collect=Collect(**settings), train=train)
    anchors = anchor_timesteps(pipe, recipe.collect, 3)
    assert anchors[0] == 999 and anchors == sorted(anchors, reverse=True)
    store = TrajectoryStore(tmp_path, "x")
    collect(pipe, read_samples(recipe.collect, 0)[:2], recipe, anchors, store)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert store.load(store.shards()[0], site).shape == (20, 3, 16)
