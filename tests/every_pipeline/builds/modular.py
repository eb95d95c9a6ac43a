"""What the builds of the modular pipelines share: their blocks without text encoder and decoder."""

from __future__ import annotations

import diffusers

from . import Ask

WITHOUT = ("text_encoder", "decode")


def hush(blocks) -> None:
    """Turn off every progress bar: the pipeline's own setter reaches the first level alone."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in (blocks.sub_blocks or {}).values():
        hush(block)


def assemble(kind: type, without: tuple[str, ...] = WITHOUT, **components):
    """The pipeline of the class's default blocks but those at the paths in `without`, with these components."""
    blocks = getattr(diffusers, kind.default_blocks_name)()
    for path in without:
        *parents, name = path.split(".")
        inside = blocks
        for parent in parents:
            inside = inside.sub_blocks[parent]
        inside.sub_blocks.pop(name)
    hush(blocks)
    pipe = kind(blocks)
    pipe.update_components(**components)
    return pipe


def guide(pipe, ask: Ask, scale: float = 4.0, *names: str) -> None:
    """Guidance is a component here, so it is turned on and off in the pipeline; call this before each call."""
    for name in names or ("guider",):
        old = getattr(pipe, name)
        off = 0.0 if old.config.get("use_original_formulation") else 1.0
        pipe.update_components(**{name: old.new(guidance_scale=scale if ask.guided else off, enabled=True)})
