"""What a type checker knows: a pipeline's new methods, and what the package itself exports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-diffusers_rtsae.*]
follow_imports = silent
"""
CODE = """
from diffusers import StableDiffusionPipeline
from diffusers_rtsae import RTSAELoaderMixin, load_dictionary

pipe = StableDiffusionPipeline.from_pretrained("somewhere")
pipe.load_rtsae("not known yet, and no error")
assert isinstance(pipe, RTSAELoaderMixin)
reveal_type(pipe.load_rtsae)
reveal_type(load_dictionary("somewhere").labels)
pipe.load_rtsae("somewhere", adapter_name=3)
images = pipe("a star").images
"""


def test_a_type_checker_knows_the_methods_of_a_pipeline(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "known.py").write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "known.py"]
    environment = {"MYPYPATH": str(Path(__file__).parents[1])}
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment).stdout
    revealed = re.findall(r'Revealed type is "(.*)"', told)
    assert (
        revealed[0].startswith("def (pretrained_model_name_or_path_or_dict: ") and "adapter_name: str | None" in told
    )
    assert revealed[1].startswith("dict[str, dict")
    errors = re.findall(r"known\.py:(\d+): error", told)
    assert errors == ["10"], told  # the wrong adapter name, and nothing else
