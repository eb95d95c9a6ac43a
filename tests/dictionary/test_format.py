"""The words of the format are those of the rooms that act on them."""

import ast
from pathlib import Path

import pytest

import diffusers_rtsae
from diffusers_rtsae.dictionary import format as of_files
from diffusers_rtsae.steering import OPERATIONS
from diffusers_rtsae.steering.edits import APPLY_TO, INJECTIONS

PACKAGE = Path(diffusers_rtsae.__file__).parent
BELOW = {  # the rooms that each may use, beside `files` and `imports`
    "models": set(),
    "formats": {"models"},
    "dictionary": {"models", "formats", "worlds"},
}


def test_a_file_may_ask_for_whatever_steering_can_do():
    assert set(of_files.CHOICES["operation"]) == set(OPERATIONS)
    assert of_files.CHOICES["apply_to"] == APPLY_TO and of_files.CHOICES["injection"] == INJECTIONS


@pytest.mark.parametrize("room", BELOW)
def test_arrows_point_down_and_at_public_names(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                modules = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                assert set(modules) <= BELOW[room] | {"files", "imports"}, path
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path
