"""Shared fixtures: the bundled pipeline, dictionary and scorer, which are real and trained."""

import os

# Workers share the cores, and threads that wait for each other would take most of the time. Read as torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Transformers says where torchvision is missing, whoever imports diffusers.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from hub_server import HubServer
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

import diffusers_rtsae  # noqa: F401 - gives pipelines their methods
from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer

EXAMPLES = Path(__file__).parents[1] / "examples"

for _logging in (diffusers_logging, transformers_logging):
    _logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    """What a test draws at random does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(_pipeline):
    """The bundled pipeline, without any dictionary and with its own scheduler before and after each test."""
    scheduler = _pipeline.scheduler
    yield _pipeline
    _pipeline.scheduler = scheduler
    _pipeline.unload_rtsae()


@pytest.fixture(scope="session")
def dictionary():
    return load_dictionary(EXAMPLES / "shapes-rtsae")


@pytest.fixture(scope="session")
def latent(dictionary):
    """`latent("red")`: the latent that is most active where a label of the bundled dictionary is."""
    return lambda label: dictionary.seen(label)[0]["latents"][0]


@pytest.fixture
def steered(pipe, dictionary):
    """The bundled pipeline with its dictionary."""
    pipe.load_rtsae(dictionary)
    return pipe


@pytest.fixture(scope="session")
def scorer():
    return FactorScorer.from_pretrained(EXAMPLES / "shapes-scorer")


@pytest.fixture(scope="session")
def draw():
    """Generate reproducibly: `draw(pipe, prompts, steps, seed, **call)` -> images `(n, 64, 64, 3)`."""

    def generate(pipe, prompts=("a star", "a large blue heart on the left"), steps=4, seed=0, **call) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        call = {"guidance_scale": 4.0, "output_type": "np", "num_inference_steps": steps} | call
        prompts = list(prompts) if not isinstance(prompts, str) else prompts
        return pipe(prompts, generator=generator, **call).images

    return generate


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: the system's, or the one that `playwright install chromium` brought."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=quiet)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A Hub on the loopback interface, and an empty cache."""
    import huggingface_hub

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        getattr(huggingface_hub, "close_session", lambda: None)()  # a session keeps the proxies it started with
        yield server
        getattr(huggingface_hub, "close_session", lambda: None)()
