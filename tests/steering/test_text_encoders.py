"""Sites in text encoders: what is changed of a prompt, in which guidance branch, and for whom."""

import copy
import threading
import warnings

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from every_pipeline.__main__ import pipeline_classes
from every_pipeline.builds import BUILDS, Ask, flux, load_all, parts, stable_diffusion_xl
from foreign import concept_steerers
from small_pipelines import changed_unet

from diffusers_rtsae import SparseAutoencoder, list_sites
from diffusers_rtsae.analysis.prompts import read_prompt
from diffusers_rtsae.analysis.record import Recorder, record
from diffusers_rtsae.analysis.statistics import measure
from diffusers_rtsae.denoiser import Tap, get_site, get_text_encoders
from diffusers_rtsae.dictionary import convertible
from diffusers_rtsae.pipeline import get_dictionary

SITE, WIDTH = "text_encoder.text_model.encoder.layers.1", 192
XL = "text_encoder.text_model.encoder.layers.0+text_encoder_2.text_model.encoder.layers.1"
PROMPTS = ["a star", "a large blue heart on the left"]


def sae(site: str = SITE, width: int = WIDTH, sparsity: str = "topk") -> SparseAutoencoder:
    torch.manual_seed(0)
    made = SparseAutoencoder(site, width, [961, 1], 32, 4, sparsity=sparsity)
    made.typical_activation.fill_(5.0)
    return made


class Outputs:
    """What layers of text encoders return inside the `with` block, call by call, as the network goes on with it."""

    def __init__(self, pipe, *sites: str):
        self.layers = [get_site(getattr(pipe, site.split(".")[0]), site) for site in sites]

    def __enter__(self):
        calls = []
        self.hooks = [layer.register_forward_hook(lambda m, a, out: calls.append(out)) for layer in self.layers]
        return calls

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def encode(pipe, prompt=PROMPTS, **call):
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, True, **call)


@pytest.mark.parametrize("site", [SITE, "text_encoder.encoder.layers.1"])
def test_the_prompt_alone_is_changed(pipe, site):
    made = sae(site)
    given = []  # to the denoiser: rows of the negative prompt, and of the prompt
    hook = pipe.unet.register_forward_pre_hook(
        lambda m, a, k: given.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    with Outputs(pipe, site) as plain, torch.no_grad():
        pipe(PROMPTS, num_inference_steps=1)
    pipe.load_rtsae({site: made})
    pipe.set_rtsae_features({3: [2.0, -1.0]}, clip=False)
    with Outputs(pipe, site) as steered, torch.no_grad():
        pipe(PROMPTS, num_inference_steps=1)
    hook.remove()
    changed = (given[-1] != given[0]).any((1, 2))
    assert changed.tolist() == [False, False, True, True]
    added = torch.tensor([2.0, -1.0])[:, None, None] * 5.0 * made.decoder[3]
    torch.testing.assert_close(steered[0], plain[0] + added)
    assert torch.equal(steered[1], plain[1])
    (row,) = pipe.rtsae_report()[site]
    assert row["timestep"] == 1000 and row["edited"] == 1.0


def test_contrast_and_all_change_the_negative_prompt_too(pipe):
    made = sae()
    with Outputs(pipe, SITE) as plain:
        encode(pipe, negative_prompt=["a heart"] * 2)
    pipe.load_rtsae({SITE: made})
    for apply_to, sign in {"contrast": -1, "all": 1}.items():
        with pipe.rtsae_steering({3: 2.0}, clip=False, apply_to=apply_to), Outputs(pipe, SITE) as steered:
            encode(pipe, negative_prompt=["a heart"] * 2)
        torch.testing.assert_close(steered[0], plain[0] + 10.0 * made.decoder[3])
        torch.testing.assert_close(steered[1], plain[1] + sign * 10.0 * made.decoder[3])


def test_a_prompt_that_is_the_negative_one_comes_first(pipe):
    pipe.load_rtsae({SITE: sae()})
    text, negative = encode(pipe, "")
    assert torch.equal(text, negative)
    with pipe.rtsae_steering({3: 2.0}, clip=False):
        steered, left = encode(pipe, "")
    assert torch.equal(left, negative) and not torch.equal(steered, text)


@torch.no_grad()
def test_what_a_latent_reads_decides_where(pipe):
    """`ablate` takes away what is there, where it is there."""
    made = sae()
    with Recorder(pipe, [SITE]) as recorder:
        encode(pipe)
    codes = made.encode_step(recorder.trajectories(SITE)[:, :, 0], 961)
    latent = int((codes > 0).float().mean((0, 1)).sub(0.5).abs().argmin())
    pipe.load_rtsae({SITE: made})
    with Outputs(pipe, SITE) as plain:
        encode(pipe)
    with pytest.warns(UserWarning, match="all 32 are computed"):  # noqa: SIM117
        with pipe.rtsae_steering({latent: 1.0}, operation="ablate"), Outputs(pipe, SITE) as steered:
            encode(pipe)
    there = codes[..., latent, None]
    assert 0 < (there > 0).float().mean() < 1
    torch.testing.assert_close(steered[0], plain[0] - there * made.decoder[latent], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_is_steered_by_the_codes_of_another(pipe, tmp_path, monkeypatch):
    """As Concept Steerers do: relu(W (x − b) + c) of a steering prompt, token by token, decoded, times a strength,
    added to the prompt and taken from the negative one."""
    monkeypatch.setattr("foreign.D", WIDTH)
    case = concept_steerers(SITE)
    dictionary = convertible(case.write(tmp_path))
    with Outputs(pipe, SITE) as plain:
        encode(pipe)
        encode(pipe, "a blue heart")
    pipe.load_rtsae(dictionary)
    pipe.set_rtsae_features({0: 9.0}, clip=False)  # does not act while a prompt is read
    codes = read_prompt(pipe, "a blue heart")
    expected = case.encode(plain[2][0], k=24)
    torch.testing.assert_close(codes.codes, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(codes.vectors, expected @ case.directions, atol=1e-3, rtol=1e-4)
    assert (codes.codes > 0).sum(1).max() > 3  # more than k
    assert codes.tokens[:4] == ["<|startoftext|>", "a</w>", "blue</w>", "heart</w>"] and len(codes.tokens) == 32
    index, highest, _ = codes.top(1)[0]
    assert highest == codes.codes.max() == codes.codes[:, index].max()
    pipe.set_rtsae_features({codes: -0.5}, apply_to="contrast")
    with Outputs(pipe, SITE) as steered:
        encode(pipe)
    torch.testing.assert_close(steered[0], plain[0] - 0.5 * codes.vectors)
    torch.testing.assert_close(steered[1], plain[1] + 0.5 * codes.vectors)


def xl() -> StableDiffusionXLPipeline:
    encoders = {
        "text_encoder": parts.clip_text(16), "tokenizer": parts.tokenizer(), "tokenizer_2": parts.tokenizer(),
        "text_encoder_2": parts.clip_text(32, layers=3, projection=True),
    }  # fmt: skip
    unet, scheduler = stable_diffusion_xl.unet(), stable_diffusion_xl.euler()
    pipe = StableDiffusionXLPipeline(
        vae=parts.vae(), unet=unet, scheduler=scheduler, **encoders, add_watermarker=False
    )
    return parts.quiet(pipe)


@torch.no_grad()
def test_two_encoders_side_by_side():
    """The hidden state before the last layer is what SDXL takes: the edited one, also if it was asked for before."""
    pipe, made, call = xl(), sae(XL, 48), {"device": "cpu", "negative_prompt": "w9"}
    plain = pipe.encode_prompt("w1 w2 w3", **call)
    pipe.load_rtsae({XL: made})
    with pipe.rtsae_steering({3: 2.0}, clip=False):
        steered = pipe.encode_prompt("w1 w2 w3", **call)
    torch.testing.assert_close(steered[0], plain[0] + 10.0 * made.decoder[3])
    assert torch.equal(steered[1], plain[1]) and torch.equal(steered[3], plain[3])
    assert not torch.equal(steered[2], plain[2])  # the pooled text, which comes later
    codes = read_prompt(pipe, "w5 w6")
    other = pipe.encode_prompt("w5 w6", **call)[0][0]
    torch.testing.assert_close(codes.codes, made.encode_all(other, 961), atol=1e-5, rtol=1e-4)
    with pipe.rtsae_steering({codes: 1.0}, apply_to="contrast"):
        steered = pipe.encode_prompt("w1 w2 w3", **call)
    torch.testing.assert_close(steered[0], plain[0] + codes.vectors)
    torch.testing.assert_close(steered[1], plain[1] - codes.vectors)
    pipe.unload_rtsae()
    assert all(map(torch.equal, pipe.encode_prompt("w1 w2 w3", **call), plain))


@torch.no_grad()
def test_t5_of_flux_with_true_guidance():
    """Both texts go through the same functions, under the same names."""
    built = flux.flux(FluxPipeline)
    site = "text_encoder_2.encoder.block.0"
    made, ask = sae(site, flux.TEXT), Ask(steps=1)
    with Outputs(built.pipe, site) as plain:
        built.pipe(**built.call(ask))
    built.pipe.load_rtsae({site: made})
    built.pipe.set_rtsae_features({3: 2.0}, clip=False)
    with Outputs(built.pipe, site) as steered:
        built.pipe(**built.call(ask))
    torch.testing.assert_close(steered[0][0], plain[0][0] + 10.0 * made.decoder[3])
    assert len(steered) == len(plain) == 2 and torch.equal(steered[1][0], plain[1][0])


class OnlySecond:
    """Changes the second of two prompts."""

    def begin(self, call, arguments):
        assert call.rows == 2

    def site(self, name, call, block, block_input, hidden_states):
        assert block.to_tokens(hidden_states).shape == (2, 5, 32)
        edited = hidden_states.clone()
        edited[block.rows(edited, slice(1, 2))] += 1
        return edited


@torch.no_grad()
def test_the_text_encoder_of_kolors_has_tokens_first():
    sizes = {"hidden_size": 32, "ffn_hidden_size": 32, "kv_channels": 8, "num_attention_heads": 4, "seq_length": 16}
    encoder = ChatGLMModel(ChatGLMConfig(num_layers=2, padded_vocab_size=64, original_rope=True, **sizes)).eval()
    for parameter in encoder.parameters():  # which it leaves as the memory was
        torch.nn.init.normal_(parameter, std=0.1)
    call = {
        "input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(5).expand(2, 5), "output_hidden_states": True,
    }  # fmt: skip
    plain, observer = encoder(**call).hidden_states[-1], OnlySecond()
    with Tap(observer).watching({"text_encoder": encoder}, ["text_encoder.encoder.layers.0"]):
        changed = (encoder(**call).hidden_states[-1] != plain).any(-1)
    assert changed.T.tolist() == [[False] * 5, [True] * 5]


def chunks(pipe, numbers):
    return torch.cat([pipe.text_encoder(numbers[:, i : i + 32].clone())[0] for i in (0, 30)], 1)


class InWindows(StableDiffusionPipeline):
    """Encodes long prompts in two windows, by a function that knows nothing of guidance."""

    def encode_prompt(self, prompt, device, *_, negative_prompt=None, **call):
        texts = [prompt] if isinstance(prompt, str) else prompt
        options = {"padding": "max_length", "max_length": 62, "truncation": True, "return_tensors": "pt"}
        prompt_tokens = self.tokenizer(texts, **options).input_ids
        uncond_tokens = self.tokenizer([negative_prompt or ""] * len(texts), **options).input_ids
        return chunks(self, prompt_tokens), chunks(self, uncond_tokens)


@torch.no_grad()
def test_windows_of_a_long_prompt(pipe):
    long = InWindows(**pipe.components, requires_safety_checker=False)
    prompt, made = " ".join(["a large blue heart"] * 12), sae()
    with Outputs(long, SITE) as plain:
        long.encode_prompt(prompt, "cpu")
    long.load_rtsae({SITE: made})
    with long.rtsae_steering({3: 2.0}, clip=False, apply_to="contrast"), Outputs(long, SITE) as steered:
        long.encode_prompt(prompt, "cpu")
    for i, sign in enumerate((1, 1, -1, -1)):
        torch.testing.assert_close(steered[i], plain[i] + sign * 10.0 * made.decoder[3])
    with Recorder(long, [SITE]) as recorder:
        long.encode_prompt(["a star"] * 3, "cpu")  # the last one stays
        long.encode_prompt(prompt, "cpu")
    torch.testing.assert_close(recorder.trajectories(SITE)[:, :, 0], torch.cat(plain[:2], 1))


def test_embeddings_are_steered_where_they_are_made(pipe):
    text, negative = encode(pipe)
    call = {"prompt_embeds": text, "negative_prompt_embeds": negative, "num_inference_steps": 1}
    pipe.load_rtsae({SITE: sae()})
    pipe.set_rtsae_features({3: 2.0}, clip=False)
    with pytest.warns(UserWarning, match="change nothing here: StableDiffusionPipeline was given embeddings"):
        pipe(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a star", num_inference_steps=1)
        steered, left = encode(pipe)
        assert not torch.equal(steered, text) and torch.equal(left, negative)
        with pipe.rtsae_steering({5: 1.0}, clip=False):  # as of another request meanwhile
            pass
        pipe(prompt_embeds=steered, negative_prompt_embeds=left, num_inference_steps=1)
    other = copy.deepcopy(pipe.text_encoder)
    pipe.unload_rtsae()
    pipe.load_rtsae({SITE: sae()})
    pipe.set_rtsae_features({3: 2.0}, clip=False)
    first, pipe.text_encoder = pipe.text_encoder, other
    try:
        with pytest.warns(UserWarning, match="or a text encoder that it did not have when they were set"):
            pipe("a star", num_inference_steps=1)
        pipe.set_rtsae_features({3: 2.0}, clip=False)
        assert torch.equal(encode(pipe)[0], steered)
    finally:
        pipe.text_encoder = first


def test_nothing_is_changed_or_left_without_features(pipe, draw):
    before, plain = encode(pipe), draw(pipe, steps=2)
    pipe.load_rtsae({SITE: sae()})
    for features in ({3: 0.0}, {}):
        pipe.set_rtsae_features(features, clip=False)
        assert all(map(torch.equal, encode(pipe), before)) and (draw(pipe, steps=2) == plain).all()
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in pipe.text_encoder.modules())
    pipe.set_rtsae_features({3: 1.0}, clip=False)
    assert not torch.equal(encode(pipe)[0], before[0])
    pipe.disable_rtsae()
    assert torch.equal(encode(pipe)[0], before[0])
    pipe.enable_rtsae()
    pipe.unload_rtsae()
    assert all(map(torch.equal, encode(pipe), before))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in pipe.text_encoder.modules())
    assert not any("rtsae" in name for name in vars(pipe.text_encoder))


def test_whose_features_act(pipe):
    """A pipeline on the same denoiser, one with a denoiser of its own, and threads with a block each."""
    plain = encode(pipe)[0]
    pipe.load_rtsae({SITE: sae()})
    pipe.set_rtsae_features({3: 1.0}, clip=False)
    steered = encode(pipe)[0]
    assert torch.equal(encode(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))[0], steered)
    components = pipe.components | {"unet": changed_unet(pipe)}
    other = StableDiffusionPipeline(**components, requires_safety_checker=False)
    assert torch.equal(encode(other)[0], plain)
    other.load_rtsae({SITE: sae()})
    with other.rtsae_steering({5: 1.0}, clip=False):
        assert torch.equal(encode(pipe)[0], steered)
        own = encode(other)[0]
    assert not torch.equal(own, steered) and not torch.equal(own, plain)
    other.unload_rtsae()
    assert torch.equal(encode(pipe)[0], steered)
    pipe.set_rtsae_features({})
    found, lock = {}, threading.Lock()  # a fast tokenizer must not be used by several threads at once

    def request(latent):
        with pipe.rtsae_steering({latent: 1.0}, clip=False), lock:
            found[latent] = encode(pipe)[0]

    threads = [threading.Thread(target=request, args=(latent,)) for latent in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[3], steered) and torch.equal(found[5], own)
    assert torch.equal(encode(pipe)[0], plain)


def test_offloaded_and_copied(pipe):
    small = xl()
    small.load_rtsae({XL: sae(XL, 48)})
    small.set_rtsae_features({3: 1.0}, clip=False)
    steered = small.encode_prompt("w1", device="cpu")
    for encoder in (small.text_encoder, small.text_encoder_2):
        accelerate.cpu_offload(encoder, "cpu")
    assert all(map(torch.equal, small.encode_prompt("w1", device="cpu"), steered))
    made = copy.deepcopy(pipe)
    plain = encode(made)[0]
    made.load_rtsae({SITE: sae()})
    made.set_rtsae_features({3: 1.0}, clip=False)
    copied, steered = copy.deepcopy(made), encode(made)[0]
    made.set_rtsae_features({})
    assert torch.equal(encode(copied)[0], steered) and torch.equal(encode(made)[0], plain)
    copied.unload_rtsae()
    assert torch.equal(encode(copied)[0], plain)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in copied.text_encoder.modules())


@pytest.mark.slow
def test_compiled():
    pipe, made = xl(), sae(XL, 48)
    pipe.load_rtsae({XL: made})
    pipe.text_encoder.compile(backend="eager")
    plain = pipe.encode_prompt("w1", device="cpu")
    for strength in (1.0, 2.0):
        with pipe.rtsae_steering({3: strength}, clip=False, apply_to="contrast"), torch.no_grad():
            steered = pipe.encode_prompt("w1", device="cpu")
        change = strength * 5.0 * made.decoder[3]
        torch.testing.assert_close(steered[0] - plain[0], change.expand_as(plain[0]), atol=1e-5, rtol=1e-4)
    assert all(map(torch.equal, pipe.encode_prompt("w1", device="cpu"), plain))


def test_recorded_and_measured(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    made = sae()
    pipe.load_rtsae({SITE: made})
    recording = record(pipe, PROMPTS, num_inference_steps=2)
    tokens = recording.trajectories[SITE]
    assert tokens.shape == (2, 32, 1, WIDTH) and recording.timesteps == [1000.0]
    torch.testing.assert_close(recording.maps([3])[:, 0, 0, 0], made.encode_step(tokens[:, :, 0], 961)[..., 3] / 5)
    measure(pipe, dictionary := get_dictionary(pipe), PROMPTS, num_inference_steps=1)
    codes = made.encode_step(tokens[:, :, 0].half().float(), 961).flatten(0, 1)
    torch.testing.assert_close(dictionary.sites[SITE].density, (codes > 0).float().mean(0))
    assert "encoder.layers.2" in list_sites(pipe.text_encoder)


class Texts:
    """The role of each call of the text encoders, with what they are called with."""

    def __init__(self, pipe):
        self.calls, self.taps = [], []
        for component, encoder in get_text_encoders(pipe).items():
            self.taps.append(Tap(self))
            self.taps[-1].watch({component: encoder}, [f"{component}.{list_sites(encoder)[0]}"])

    def begin(self, call, arguments):
        if call.encoder:
            self.calls.append((call.parts[0].role, arguments.sample))

    def site(self, *read):
        """Nothing is edited."""


def test_a_text_encoder_outlives_the_pipeline(pipe):
    plain, count = encode(pipe)[0], len([*pipe.text_encoder.modules()])
    components = pipe.components | {"unet": changed_unet(pipe)}
    other = StableDiffusionPipeline(**components, requires_safety_checker=False)
    other.load_rtsae({SITE: sae()})
    other.set_rtsae_features({3: 1.0}, clip=False)
    assert any(one._forward_hooks for one in pipe.text_encoder.modules())
    del other, components
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in pipe.text_encoder.modules())
    assert torch.equal(encode(pipe)[0], plain) and count == len([*pipe.text_encoder.modules()])


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusion3Pipeline", "WanPipeline", "Kandinsky3Pipeline", "JoyImageEditPipeline",
        "StableDiffusionPipelineSafe", "LTXI2VLongMultiPromptPipeline", "SemanticStableDiffusionPipeline",
        "LEditsPPPipelineStableDiffusionXL",
    ],
)  # fmt: skip
def test_roles_are_those_of_what_changes(name):
    """A call is conditional if it is another when the prompt is, unconditional if it is when the negative one is."""
    load_all()
    built, told = BUILDS[name](pipeline_classes()[name]), []
    for ask in (Ask(steps=1), Ask(prompts=(3,), steps=1), Ask(negative=4, steps=1)):
        texts = Texts(built.pipe)
        built.pipe(**built.call(ask))
        told.append(texts.calls)
        del texts
    assert len(told[0]) == len(told[1]) == len(told[2]) >= 2
    for (role, text), (_, prompt), (_, negative) in zip(*told, strict=True):
        changed = [other.shape != text.shape or not torch.equal(other, text) for other in (prompt, negative)]
        assert changed == {"cond": [True, False], "uncond": [False, True], "other": [False, False]}[role]


def test_the_prompt_and_the_negative_one_in_one_call_are_refused():
    load_all()
    built = BUILDS["DreamLitePipeline"](pipeline_classes()["DreamLitePipeline"])
    texts = Texts(built.pipe)
    with pytest.raises(ValueError, match="encodes the prompt and the negative one in one call"):
        built.pipe(**built.call(Ask(steps=1)))
    assert not texts.calls
