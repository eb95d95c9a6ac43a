"""Which event of the page calls which handler, with what."""

from __future__ import annotations

import random

import gradio as gr

from .events import Events
from .layout import CLOSE_LIST, ON_LOAD


def connect(page: gr.Blocks, events: Events) -> None:
    """Let what is clicked, moved, typed or painted on the page call its handler."""
    c, options = events.c, list(events.c.options.values())
    asked = {*events.restored, c.shown, c.mask, *c.strengths}
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
    at_once = {"queue": False, "trigger_mode": "always_last", "show_progress": "hidden"}

    moved = [field.input for field in (*c.strengths, *options, c.count, c.scale, c.images)]
    typed = [event for field in (c.negative, c.width, c.height) for event in (field.submit, field.blur)]
    redraws = [
        c.run.click, page.load, c.seed.change, c.shown.change, c.mask.change, c.again.change, *moved, *typed
    ]  # fmt: skip
    gr.on(redraws, events.hurry, None, None, **at_once).then(
        events.generate, asked | {c.past}, [c.plain, c.steered, c.compared, c.past, c.canvas, c.status],
        show_progress_on=[c.steered], trigger_mode="always_last", **one_at_a_time,
    )  # fmt: skip
    c.stop.click(events.hurry, None, None, **at_once)
    page.load(None, js=ON_LOAD)
    c.examples.load_input_event.then(random.random, None, c.again, show_progress="hidden")
    c.another.click(lambda: random.randrange(2**31), None, c.seed, queue=False)
    c.names.change(
        events.choose, [c.names, c.shown, *c.strengths], [c.names, c.shown, *options, *c.strengths],
        show_progress="hidden",
    )  # fmt: skip
    c.names.change(None, js=CLOSE_LIST)
    sizes = [event for field in (c.width, c.height) for event in (field.submit, field.blur)]
    # in the queue, without which gradio shows no warnings
    gr.on(sizes, events.size_warning, [c.width, c.height, c.warned], c.warned, show_progress="hidden")
    gr.on([page.load, *(field.change for field in asked)], events.code, asked, c.script, **at_once)

    c.canvas.input(events.paint, None, [c.mask, c.where], show_progress="hidden", trigger_mode="always_last")
    c.remove.click(events.remove, [c.mask, c.shown], [c.operation, c.apply_to, c.again], show_progress="hidden")
    c.keep_mask.click(events.save_mask, c.mask, c.mask_file)
    c.past.change(
        lambda past: [(one["file"], one["caption"]) for one in past], c.past, c.pictures, show_progress="hidden"
    )
    c.pictures.select(
        events.restore, c.past, [*events.restored, c.names, c.shown, c.again, *c.strengths], show_progress="hidden"
    )
    c.watch.click(events.look, asked, [c.plot, c.nowhere], **one_at_a_time)
    c.explain.click(events.explain, asked | {c.word, c.instead}, [c.total, c.carriers, c.ledger], **one_at_a_time)
    c.carriers.select(events.take_row, c.names, c.names, **at_once)
    c.draw_strip.click(events.strip_of_chosen, asked, c.strip, **one_at_a_time)
    drawing = c.all_features.select(events.thumbnails, asked, c.labels, concurrency_id="thumbnails")
    c.stop.click(None, cancels=drawing)
    c.labels.select(events.take_thumbnail, c.names, c.names, **at_once)
    c.search.click(events.say_labels, [c.positive, c.negative_lines], c.is_label, **at_once)
    c.search.click(events.find, [c.positive, c.negative_lines, c.count, c.scale], c.table, **one_at_a_time)
    c.table.select(events.take_row, c.names, c.names, **at_once)
    lines = {c.before_lines, c.after_lines}
    c.more.click(events.more, lines, [c.before_lines, c.after_lines], show_progress="hidden")
    made = c.make.click(
        events.make, asked | {c.names, c.new, c.same_lines} | lines, [c.progress, c.numbers, c.names, c.keep],
        show_progress_on=[c.progress], **one_at_a_time,
    )  # fmt: skip
    made.success(events.show_made, asked | {c.new} | lines, c.made, **one_at_a_time)
    c.keep.click(events.save, None, c.kept_file)
    c.write.click(events.export, asked | {c.preset_name}, c.preset_file)
