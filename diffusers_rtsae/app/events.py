"""What happens on the page when something is clicked, moved, typed or painted."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ..analysis.explain import ERROR, FEATURE, OTHERS, PATHS, REST, explain
from ..analysis.find import find_features
from ..analysis.fit import FittedFeature, fit_feature
from ..analysis.plots import plot_heat_maps, plot_ledger
from ..analysis.record import record
from ..analysis.report import STRENGTHS
from ..dictionary import parse_feature, search_names
from ..pairs import HELD_OUT_FROM, judgement, labels_between, more_pairs, prompts_to_show
from ..pipeline import own_size
from ..steering import OPERATIONS
from ..worlds import World
from .layout import DEFAULT_OPTIONS, FEATURES, choices_of
from .script import as_code
from .studio import Studio, Wish, side_by_side

LABELS = 48  # of which there are thumbnails
_HISTORY = 24  # pictures
_RANK = 8  # of the map of a feature that is made here
_TOLD = 0.4  # seconds between two steps of a progress bar


def read_mask(png: str) -> np.ndarray | None:
    """Where something is painted, from a canvas' data address, `(height, width)`: 1 there, 0 elsewhere; `None` if
    nothing is."""
    with Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2]))) as image:
        mask = (np.asarray(image.convert("RGBA"))[..., 3] > 127).astype(np.float32)
    return mask if mask.any() else None


@contextlib.contextmanager
def _shown_errors():
    """Whatever goes wrong is said on the page."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        expected = isinstance(error, OSError | ValueError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        raise gr.Error(message, print_exception=not expected) from error


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _numbers(fitted: FittedFeature, pairs: int) -> str:
    """What a feature that was fitted to so many pairs was measured to do, as a table."""
    rows, judged = judgement(fitted.measured, pairs, fitted.effects)
    table = [f"| {name} | **{figure}** | {meaning} |" for name, figure, meaning in rows]
    return "\n".join(["| | | |", "| --- | --- | --- |", *table, "", judged])


class Events:
    """
    The handlers of the page's events.

    Args:
        studio (`Studio`): draws.
        components (`SimpleNamespace`): of the page.
        pipeline, dictionary (`str`): where they came from, for the code that is shown.
        world (`World`, *optional*): whose pipeline it is, if it is a bundled one.
    """

    def __init__(
        self, studio: Studio, components: SimpleNamespace, pipeline: str, dictionary: str, world: World | None
    ):
        self.studio, self.c, self.pipeline, self.source, self.world = studio, components, pipeline, dictionary, world
        self.pipe, self.dictionary, self.folder = studio.pipe, studio.dictionary, Path(studio.folder.name)
        self.made: set[str] = set()  # labels made here

    @functools.cached_property
    def restored(self) -> list:
        """The fields that a picture of the history brings back."""
        c = self.c
        return [
            c.text, c.negative, c.width, c.height, c.images, c.count, c.scale, c.seed, *c.options.values()
        ]  # fmt: skip

    # ---- what is asked for

    def known(self, name: str) -> str | None:
        """The feature that was typed: itself, or the first label that begins with it or contains it, or
        the latent that is most surely named so."""
        try:
            self.dictionary.features(parse_feature(name, self.dictionary))
            return name
        except ValueError as error:
            typed = name.strip().lower()
            matches = [label for label in self.dictionary.labels if typed and typed in label.lower()]
            if matches:
                return min(matches, key=lambda label: (label.lower() != typed, not label.lower().startswith(typed)))
            if typed and (named := search_names(self.dictionary, typed)):
                site, index, _ = named[0]
                return f"{site}:{index}" if len(self.dictionary.sites) > 1 else str(index)
            gr.Warning(str(error))
            return None

    def options_of(self, features: dict, chosen: dict) -> dict:
        """The options that are not what the features do by themselves."""
        verified = [self.dictionary.features(feature)[1] for feature in features]

        def differ(*keys: str) -> bool:
            return any(label.get(key, DEFAULT_OPTIONS[key]) != chosen[key] for label in verified for key in keys)

        if differ("operation"):  # a label's options are for its own
            return chosen
        return {k: chosen[k] for keys in (("start", "end"), ("apply_to",)) if differ(*keys) for k in keys}

    def wish_of(self, data: dict) -> Wish:
        c = self.c
        if not data[c.text].strip():
            raise ValueError("Say what to draw: the prompt is empty.")
        if data[c.seed] is None:
            raise ValueError("The seed is empty: expected a number.")
        call = own_size(self.pipe) | {"prompt": data[c.text].strip(), "num_inference_steps": int(data[c.count])}
        call |= {"guidance_scale": data[c.scale]}
        call |= {"negative_prompt": data[c.negative].strip()} if (data[c.negative] or "").strip() else {}
        call |= {name: int(data[side]) for name, side in (("width", c.width), ("height", c.height)) if data[side]}
        call |= {"num_images_per_prompt": int(data[c.images])} if data[c.images] > 1 else {}
        named = zip(data[c.shown], (data[slider] for slider in c.strengths), strict=False)
        features = {parse_feature(name, self.dictionary): strength for name, strength in named}
        options = self.options_of(features, {name: data[option] for name, option in c.options.items()})
        if data[c.operation] == "erase" and data[c.mask] is not None:  # all that is painted
            features = features or {(site, 0): 1.0 for site in self.dictionary.sites}
            options |= {"operation": "erase", "apply_to": data[c.apply_to], "where": "everywhere"}
        return Wish(call, int(data[c.seed]), features, options, data[c.mask])

    def one_picture(self, data: dict) -> Wish:
        """Of the prompt, without features."""
        wish = self.wish_of(data)
        return Wish({k: v for k, v in wish.call.items() if k != "num_images_per_prompt"}, wish.seed)

    # ---- drawing

    def hurry(self, request: gr.Request):
        """What is drawn for this person is no longer wanted."""
        self.studio.wishes[request.session_hash] += 1

    @_shown_errors()
    def generate(self, data, request: gr.Request, progress=gr.Progress()):  # noqa: B008 - how gradio hands it over
        c, number, wish = self.c, self.studio.wishes[request.session_hash], self.wish_of(data)

        told = time.monotonic()

        def on_step(step: int, steps: int):
            nonlocal told
            if time.monotonic() - told > _TOLD:  # the browser draws each on the cores that the pipeline needs
                told = time.monotonic()
                progress((step, steps), desc="drawing", unit="steps")

        def wanted() -> bool:
            return self.studio.wishes[request.session_hash] == number

        drawn = self.studio.draw_both(wish, on_step, wanted)
        if drawn is None:
            return [gr.skip()] * 5 + ["Stopped."]
        (plain, _), (steered, share) = drawn
        without, with_it = self.studio.file(side_by_side(plain)), self.studio.file(side_by_side(steered))
        caption = ", ".join(f"{n} {wish.features[parse_feature(n, self.dictionary)]:g}" for n in data[c.shown])
        entry = {"file": with_it, "caption": caption or "without", "data": [data[field] for field in self.restored]}
        entry |= {"names": list(data[c.shown]), "strengths": [data[slider] for slider in c.strengths]}
        history = [old for old in data[c.past] if old["file"] != with_it and Path(old["file"]).exists()]
        below = f"gradio_api/file={self.studio.file(plain[0])}"
        said = [self.status(wish, share), *(self.world.remarks(wish.call["prompt"]) if self.world else [])]
        return without, with_it, (without, with_it), [entry, *history][:_HISTORY], below, " ".join(said)

    def status(self, wish: Wish, share: float | None) -> str:
        """What was steered, in a sentence."""
        if share is None:
            return "Choose a feature to see what it does."
        if share == 0:
            return (
                "Nothing changed: at strength 0 nothing does, and a feature that only acts where it is active is "
                "nowhere active in this picture."
            )
        if wish.mask is not None:
            return (
                f"Painted: {wish.mask.mean():.0%} of the picture, which is a part of {share:.0%} of the places on the "
                "model's coarser grid."
            )
        return f"Steered on {share:.0%} of the picture."

    def sliders_of(self, names: list[str], values: Sequence[float]) -> list:
        moved = [gr.update(visible=True, label=n, value=v) for n, v in zip(names, values, strict=False)]
        return moved + [gr.update(visible=False)] * (FEATURES - len(moved))

    @_shown_errors()
    def choose(self, names, shown, *values):
        """
        Sliders for the chosen features, which keep their value; a name that is no feature is taken back. A label
        brings the options it was verified with.
        """
        chosen = list(dict.fromkeys(filter(None, map(self.known, names))))
        if len(chosen) > FEATURES:
            gr.Warning(f"At most {FEATURES} features have sliders.")
        chosen, before, brought = chosen[:FEATURES], dict(zip(shown, values, strict=False)), {}
        for name in chosen:
            brought |= {} if name in shown else self.dictionary.features(parse_feature(name, self.dictionary))[1]
        options = [brought.get(name, gr.skip()) for name in self.c.options]
        sliders = self.sliders_of(chosen, [before.get(name, 1.0) for name in chosen])
        return [gr.skip() if chosen == names else chosen, chosen, *options, *sliders]

    def restore(self, past, event: gr.SelectData):
        """All that a picture of the history was made with, but for what was painted."""
        entry = past[event.index]
        names, sliders = entry["names"], self.sliders_of(entry["names"], entry["strengths"])
        return [*entry["data"], names, names, random.random(), *sliders]

    def size_warning(self, width, height, warned: bool) -> bool:
        """Say once that the model was made for another size."""
        own = self.studio.size
        if warned or not own or all(not side or int(side) == own for side in (width, height)):
            return warned
        gr.Warning(f"This model was made for {own} × {own} pixels: at another size it may draw something else.")
        return True

    # ---- what is written

    def code(self, data):
        try:
            wish = self.wish_of(data)
        except ValueError as error:
            return f"# {error}"
        made_here = [name for name in data[self.c.shown] if name in self.made]
        dictionary = "dictionary" if made_here else self.source
        code = as_code(self.pipeline, dictionary, self.pipe.dtype, self.pipe.device.type, wish)
        return f"# dictionary: what “Save” in “Make a feature” gives, unpacked\n{code}" if made_here else code

    @_shown_errors()
    def export(self, data):
        wish = self.wish_of(data)
        if not wish.features:
            raise ValueError("Choose a feature first: a preset of none does nothing.")
        features = [[list(f) if isinstance(f, tuple) else f, s] for f, s in wish.features.items()]
        name = (data[self.c.preset_name] or "").strip() or "preset"
        path = self.folder / "presets.json"
        content = {name: {"features": features, "options": wish.options}}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return gr.update(value=str(path), visible=True)

    # ---- where

    @_shown_errors()
    def paint(self, event: gr.EventData):
        mask = read_mask(event.png)
        if mask is None:
            return None, "Nothing is painted: features act everywhere."
        return mask, f"Features act on the painted {mask.mean():.0%} of the picture."

    @_shown_errors()
    def save_mask(self, mask):
        if mask is None:
            raise ValueError("Nothing is painted: features act everywhere.")
        path = self.folder / "mask.png"
        Image.fromarray((mask * 255).astype(np.uint8)).save(path)
        return gr.update(value=str(path), visible=True)

    @_shown_errors()
    def remove(self, mask, shown):
        """Erase what is painted or, if nothing is, the chosen features."""
        if mask is None and not shown:
            raise ValueError("Paint over what is to go, or choose a feature first.")
        return "erase", OPERATIONS["erase"].apply_to, random.random()

    # ---- when

    @_shown_errors()
    def look(self, data):
        if not data[self.c.shown]:
            raise ValueError("Choose a feature first, then see where it is active.")
        wish = self.one_picture(data)
        generator, call = torch.Generator().manual_seed(wish.seed), dict(wish.call)

        def recorded():
            with self.pipe.rtsae_steering({}):
                return record(self.pipe, call.pop("prompt"), generator=generator, **call)

        recording = self.studio.run(recorded)
        features = list(self.wish_of(data).features)
        absent = [str(f) for f, m in zip(features, recording.maps(features)[0], strict=True) if not m.any()]
        said = [f"{name} is nowhere active in this picture, so it cannot be scaled or taken away." for name in absent]
        return plot_heat_maps(recording, features), "\n\n".join(said)

    # ---- why

    @_shown_errors()
    def explain(self, data, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        """What a word does to the picture without steering, as a sentence, a table and a figure."""
        word, instead = (data[self.c.word] or "").strip(), (data[self.c.instead] or "").strip()
        if not word:
            raise ValueError("Type a word of the prompt first, then see what it does.")
        wish = self.one_picture(data)
        call, features = dict(wish.call), 3 * FEATURES
        prompt, said = call.pop("prompt"), {"seed": wish.seed, "features": features, "progress": True}
        ledger = self.studio.run(explain, self.pipe, prompt, word, instead or None, **said, **call)
        kinds = {what: ledger.share(what) for what in (FEATURE, OTHERS, REST, PATHS, ERROR)}
        told = ", ".join(f"{'features' if what == FEATURE else what} {share:.2f}" for what, share in kinds.items())
        several = len(self.dictionary.sites) > 1
        rows = [
            [
                f"{entry.site}:{entry.index}" if several else str(entry.index),
                ", ".join([*entry.labels, *([f"makes {entry.makes}"] if entry.makes else [])]),
                *(round(value, 3) for value in (entry.share, entry.ablated, entry.present)),
            ]
            for entry in ledger.features
        ]
        total = f"Compared with “{ledger.without}”: {told}; in all {ledger.total:.2f}."
        return total, gr.update(value=rows, visible=True), plot_ledger(ledger)

    # ---- finding

    @_shown_errors()
    def find(self, positive, negative, steps, guidance, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        with_it, without = _lines(positive), _lines(negative)
        by = "effect" if len(with_it) == len(without) else "presence"
        call = {"num_inference_steps": int(steps), "guidance_scale": guidance}

        def run():
            with self.pipe.rtsae_steering({}):
                return find_features(self.pipe, with_it, without, by=by, progress=True, **call)

        table = self.studio.run(run)
        names = [f"{f.site}:{f.index}" if len(self.dictionary.sites) > 1 else str(f.index) for f in table]
        rows = [
            [
                name,
                ", ".join([*f.labels, *([f"makes {f.makes}"] if f.makes else [])]),
                None if f.slope is None else round(f.score, 3),
                round(f.present, 3),
            ]
            for name, f in zip(names, table, strict=True)
        ]
        return gr.update(value=rows, visible=True)

    def say_labels(self, positive, negative):
        """Labels that stand for what is looked for already."""
        labels = labels_between(self.dictionary.labels, _lines(negative), _lines(positive))
        if not labels:
            return ""
        named = ", ".join(f"**{label}**" for label in labels)
        return f"There is a label for this already: {named}. Choose it among the features; the table has its latents."

    def take_row(self, names, event: gr.SelectData):
        return [*names, event.row_value[0]]

    def take_thumbnail(self, names, event: gr.SelectData):
        return [*names, event.value["caption"]]

    def thumbnails(self, data):
        with _shown_errors():
            plain, pictures = self.one_picture(data), []
            for name in list(self.dictionary.labels)[:LABELS]:
                images, _ = self.studio.draw(replace(plain, features={name: 1.0}), lambda step, steps: None)
                pictures.append((self.studio.file(images[0]), name))
                yield pictures

    @_shown_errors()
    def strip(self, data, name: str, progress) -> list[tuple[str, str]]:
        plain, pictures = self.one_picture(data), []
        for strength in progress.tqdm(STRENGTHS, desc=f"{name} at all strengths", unit="pictures"):
            features = {parse_feature(name, self.dictionary): strength}
            wish = replace(plain, features=features) if strength else plain
            images, _ = self.studio.draw(wish, lambda step, steps: None)
            pictures.append((self.studio.file(images[0]), f"{strength:g}".replace("-", "−")))
        return pictures

    @_shown_errors()
    def strip_of_chosen(self, data, progress=gr.Progress()):  # noqa: B008
        if not data[self.c.shown]:
            raise ValueError("Choose a feature first, then see what its strengths do.")
        return self.strip(data, data[self.c.shown][-1], progress)

    # ---- making a feature

    def pairs_of(self, data) -> list[tuple[str, str]]:
        before, after = _lines(data[self.c.before_lines]), _lines(data[self.c.after_lines])
        if len(before) != len(after):
            raise ValueError(f"Expected as many prompts with it as without, got {len(after)} and {len(before)}.")
        return list(zip(before, after, strict=True))

    @_shown_errors()
    def more(self, data):
        """Further pairs that differ in the same words."""
        pairs = self.pairs_of(data)
        if not pairs:
            raise ValueError("Give one pair of prompts first: the others are made like it.")
        pairs += more_pairs(pairs, self.world, max(HELD_OUT_FROM - len(pairs), 0))
        if len(pairs) < HELD_OUT_FROM:
            gr.Warning("No more pairs of this kind are known: write some that differ in the same words.")
        return "\n".join(before for before, _ in pairs), "\n".join(after for _, after in pairs)

    @_shown_errors()
    def make(self, data, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        c, name = self.c, data[self.c.new].strip()
        if not name:
            raise ValueError("The new feature needs a name.")
        if name in self.dictionary.labels and name not in self.made:
            raise ValueError(f"There is a feature {name!r} already: choose another name.")
        pairs, unchanged = self.pairs_of(data), _lines(data[c.same_lines])
        call = {"num_inference_steps": int(data[c.count]), "guidance_scale": data[c.scale]}
        fitted = self.studio.run(fit_feature, self.pipe, pairs, unchanged=unchanged, rank=_RANK, **call)
        self.studio.run(self.pipe.add_rtsae_label, name, fitted)
        self.made.add(name)
        self.studio.forget()
        chosen = [*(n for n in data[c.names] if n != name), name]
        numbers = _numbers(fitted, len(pairs))
        choices = choices_of(self.dictionary.labels)
        return "Made.", numbers, gr.update(choices=choices, value=chosen), gr.update(visible=True)

    @_shown_errors()
    def show_made(self, data) -> list[tuple[str, str]]:
        """Pictures without and with the feature: of a prompt that leaves it open, and of one that contradicts it."""
        name, plain, pictures = data[self.c.new].strip(), self.one_picture(data), []
        for prompt in prompts_to_show(self.pairs_of(data)):
            wish = replace(plain, call=plain.call | {"prompt": prompt}, features={name: 1.0})
            (without, _), (with_it, _) = self.studio.draw_both(wish, lambda step, steps: None)
            pictures += [(self.studio.file(without[0]), prompt), (self.studio.file(with_it[0]), f"{prompt}: {name}")]
        return pictures

    @_shown_errors()
    def save(self):
        def saved() -> str:
            self.dictionary.save(self.folder / "dictionary")
            return shutil.make_archive(str(self.folder / "dictionary"), "zip", self.folder / "dictionary")

        return gr.update(value=self.studio.run(saved), visible=True)
