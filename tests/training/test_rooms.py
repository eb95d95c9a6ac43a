"""The rooms of the trainer, lowest first."""

import ast
from collections.abc import Iterator
from pathlib import Path

TRAINING = Path(__file__).parents[2] / "training"


def imported(path: Path, inside: tuple[str, ...]) -> Iterator[str]:
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            whole = [*inside[: len(inside) - node.level], *(node.module or "").split(".")]
            yield from [name.name for name in node.names] if whole == [""] else [whole[0]]


def test_the_rooms_of_the_trainer_use_one_another_in_one_direction():
    """Each module imports from rooms that stand before its own, or from its own."""
    rooms = ["registry", "recipe", "common", "worlds", "data", "architectures", "kinds", "loop", "evaluation"]
    rooms += ["plan", "run", "commands", "train", "evaluate", "experiments"]
    present = {
        p.stem if p.is_file() else p.name for p in TRAINING.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))
    }
    assert present - {"__init__"} == set(rooms)
    for path in TRAINING.rglob("*.py"):
        inside = path.relative_to(TRAINING).with_suffix("").parts
        for used in imported(path, inside):
            assert rooms.index(used) <= rooms.index(inside[0]), f"{'.'.join(inside)} imports {used}"
