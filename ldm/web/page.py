"""The page: its tabs, and what happens when something is pressed. All work is done by the studio's worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.errors import UserError
from ldm.web import brush, training, view
from ldm.web.controls import NONE, QUIET, DrawingTab, chosen_adapter, drawing_tab, go_to, plain
from ldm.web.gallery import KINDS, Request
from ldm.web.studio import Studio
from ldm.web.train_tab import TrainTab, train_tab, wire_training

TICK = 0.8  # seconds between looks at the worker
PER_PAGE = 40  # pictures of the gallery
SMALL = 128  # pixels a side up to which pictures are shown as squares


@dataclass
class Stage:
    """Where pictures appear: the job that is running, its results, and what can be done with one of them."""

    column: Any
    live: Any
    stops: Any  # the row of these three
    after: Any
    now: Any
    clear: Any
    made: Any  # the column of what follows
    results: Any
    chosen: Any  # a State: the name of the picture that the buttons below are about
    settings: Any
    again: Any
    to_image: Any
    to_inpaint: Any


@dataclass
class GalleryTab:
    """All pictures, page by page."""

    grid: Any
    turn: Any  # the row of these three
    where: Any
    newer: Any
    older: Any
    hint: Any
    side: Any  # the column of what can be done with a picture
    page: Any  # a State: its number
    shown: Any  # a State: the names on it
    chosen: Any
    settings: Any
    again: Any
    to_image: Any
    to_inpaint: Any


def build(studio: Studio) -> gr.Blocks:
    """The whole page."""
    tiny = training.is_tiny(studio)
    small = max(studio.geometry.height, studio.geometry.width) <= SMALL
    name = "/".join(Path(studio.options.ckpt).parts[-2:])
    with gr.Blocks(title="Latent diffusion studio", analytics_enabled=False, delete_cache=(600, 3600),
                   fill_width=True) as page:  # fmt: skip
        gr.HTML(
            f'<div class="studio-head"><b>Latent diffusion studio</b><span>{view.escape(name)}</span></div>',
            padding=False,
        )
        seen = gr.State({})
        with gr.Row(elem_classes="studio-small" if small else None):
            with gr.Column(scale=5, min_width=400), gr.Tabs(selected="text", overflow_behavior="wrap") as tabs:
                drawing = {}
                for kind, title in KINDS.items():
                    with gr.Tab(title, id=kind):
                        drawing[kind] = drawing_tab(kind, studio, tiny)
                with gr.Tab("Training", id="train"):
                    train = train_tab(studio, tiny)
                with gr.Tab("Gallery", id="gallery") as gallery_item:
                    gallery = _gallery_tab()
            stage = _stage()
        _wire_drawing(studio, drawing)
        _wire_stage(studio, stage, seen)
        wire_training(studio, train, drawing, [tabs, stage.column])
        _wire_gallery(studio, gallery, gallery_item)
        for place in (stage, gallery):
            _wire_picture(studio, place, drawing, [tabs, stage.column])
        tabs.select(_stage_of_tab, None, stage.column, **QUIET)
        _wire_ticks(studio, page, seen, stage, train, drawing)
    return page


def _stage() -> Stage:
    with gr.Column(scale=6, min_width=400, elem_id="stage") as column:
        live = gr.HTML(view.stage(None, []), elem_id="live", padding=False)
        with gr.Row(visible=False) as stops:
            after = gr.Button("Stop after this picture", size="sm", min_width=120, elem_id="stop-after")
            now = gr.Button("Stop now", size="sm", variant="stop", min_width=120, elem_id="stop-now")
            clear = gr.Button("Empty the queue", size="sm", min_width=120, interactive=False, elem_id="clear-queue")
        chosen = gr.State(None)
        with gr.Column(visible=False) as made:
            results = gr.Gallery(show_label=False, columns=4, height=600, preview=True, object_fit="contain",
                                 interactive=False, elem_id="results", elem_classes="studio-results",
                                 buttons=["download", "fullscreen"])  # fmt: skip
            again, to_image, to_inpaint = _picture_buttons("result")
            settings = _settings_box("result")
    buttons = stops, after, now, clear
    return Stage(column, live, *buttons, made, results, chosen, settings, again, to_image, to_inpaint)


def _picture_buttons(prefix: str) -> tuple[Any, Any, Any]:
    with gr.Row():
        again = gr.Button("Use again", size="sm", min_width=120, elem_id=f"{prefix}-again")
        to_image = gr.Button("→ Image to image", size="sm", min_width=120, elem_id=f"{prefix}-to-image")
        to_inpaint = gr.Button("→ Inpainting", size="sm", min_width=120, elem_id=f"{prefix}-to-inpaint")
    return again, to_image, to_inpaint


def _settings_box(prefix: str) -> Any:
    return gr.Textbox(lines=3, max_lines=10, show_label=False, interactive=False, buttons=["copy"],
                      elem_classes="studio-settings", elem_id=f"{prefix}-settings")  # fmt: skip


def _gallery_tab() -> GalleryTab:
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            grid = gr.Gallery(
                show_label=False, columns=6, height="auto", interactive=False, object_fit="contain", elem_id="gallery",
                elem_classes="studio-grid", buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Row(visible=False, elem_classes="studio-turn") as turn:
                newer = gr.Button("Newer", size="sm", min_width=90)
                where = gr.HTML("", padding=False)
                older = gr.Button("Older", size="sm", min_width=90)
        with gr.Column(scale=4, min_width=320):
            hint = gr.HTML("", padding=False)
            with gr.Column(visible=False) as side:
                settings = _settings_box("gallery")
                again, to_image, to_inpaint = _picture_buttons("gallery")
    state = gr.State(0), gr.State([]), gr.State(None)
    controls = turn, where, newer, older, hint, side
    return GalleryTab(grid, *controls, *state, settings, again, to_image, to_inpaint)


# ---- what happens ----------------------------------------------------------------------------------------------


def _wire_drawing(studio: Studio, drawing: dict[str, DrawingTab]) -> None:
    for kind, tab in drawing.items():

        @plain
        def draw(*values: Any, tab: DrawingTab = tab, kind: str = kind) -> None:
            before = studio.draw(studio.request(kind, tab.asked(values)))
            if before:
                gr.Info(f"In the queue; {before} before it.", duration=3)

        inputs, js = tab.components, None
        if tab.mask is not None:
            inputs, js = [*inputs, tab.mask], brush.MASK
        gr.on([tab.button.click, tab.parts["prompt"].submit], draw, inputs, None, js=js, show_progress="hidden")
        for menu, _ in tab.slots:
            menu.input(plain(lambda name: chosen_adapter(studio, str(name))), menu, menu, **QUIET)


def _wire_stage(studio: Studio, stage: Stage, seen: Any) -> None:
    stage.now.click(plain(lambda: studio.jobs.stop()), None, None, **QUIET)
    stage.after.click(plain(lambda: studio.jobs.stop(after_picture=True)), None, None, **QUIET)
    stage.clear.click(plain(lambda: studio.jobs.clear()), None, None, **QUIET)

    @plain
    def choose(known: dict[str, Any], event: gr.SelectData) -> Any:
        return _chosen(studio, known.get("results", []), event)

    stage.results.select(choose, seen, [stage.chosen, stage.settings], **QUIET)


def _chosen(studio: Studio, names: list[str], event: gr.SelectData) -> tuple[str, str]:
    """(name, how it was made) of the picture that was pressed."""
    if type(event.index) is not int or not 0 <= event.index < len(names):
        raise UserError("there is no such picture (any more)")
    return names[event.index], str(studio.gallery.record(names[event.index]).get("parameters", ""))


def _wire_picture(studio: Studio, place: Stage | GalleryTab, drawing: dict[str, DrawingTab], where: list[Any]) -> None:
    """`Use again`, and the picture as the beginning of others."""
    every = [component for tab in drawing.values() for component in tab.components]

    @plain
    def again(name: Any) -> list[Any]:
        record = studio.gallery.record(_named(name))
        request = Request.of_record(record)
        values = {kind: [gr.skip()] * len(tab.components) for kind, tab in drawing.items()}
        values[request.kind] = drawing[request.kind].shown(studio, request)
        mask = brush.shown_again(studio.gallery.input(request.mask)) if request.mask else gr.skip()
        return [*go_to(request.kind), mask, *(value for kind in drawing for value in values[kind])]

    def send(kind: str) -> Callable[[Any], list[Any]]:
        @plain
        def start_from(name: Any) -> list[Any]:
            path = studio.gallery.path(_named(name))
            prompt = str(studio.gallery.record(name).get("prompt", ""))
            return [*go_to(kind), str(path), prompt]

        return start_from

    place.again.click(again, place.chosen, [*where, drawing["inpaint"].again, *every], **QUIET)
    for kind, button in (("image", place.to_image), ("inpaint", place.to_inpaint)):
        parts = drawing[kind].parts
        button.click(send(kind), place.chosen, [*where, parts["image"], parts["prompt"]], **QUIET)


def _named(name: Any) -> Any:
    if name is None:
        raise UserError("choose a picture first: press on it")
    return name


def _wire_gallery(studio: Studio, gallery: GalleryTab, item: Any) -> None:
    outputs = [gallery.grid, gallery.turn, gallery.where, gallery.newer, gallery.older, gallery.page, gallery.shown,
               gallery.hint, gallery.side]  # fmt: skip

    def turn(by: int) -> Callable[[Any], list[Any]]:
        @plain
        def show(page: Any) -> list[Any]:
            names = studio.gallery.names()
            pages = max(1, -(-len(names) // PER_PAGE))
            page = min(max(0, page + by), pages - 1) if by else 0
            shown = names[page * PER_PAGE : (page + 1) * PER_PAGE]
            paths = [str(studio.gallery.pictures / name) for name in shown]
            return [
                gr.Gallery(value=paths, selected_index=None, visible=bool(shown)),
                gr.Row(visible=pages > 1),
                view.pagination(page, pages, len(names)),
                gr.Button(interactive=page > 0),
                gr.Button(interactive=page < pages - 1),
                page,
                shown,
                gr.HTML(view.hint(len(names)), visible=True),
                gr.Column(visible=False),
            ]

        return show

    for listener, by in ((item.select, 0), (gallery.newer.click, -1), (gallery.older.click, 1)):
        listener(turn(by), gallery.page, outputs, **QUIET)

    @plain
    def choose(shown: Any, event: gr.SelectData) -> Any:
        return [*_chosen(studio, shown, event), gr.HTML(visible=False), gr.Column(visible=True)]

    outputs = [gallery.chosen, gallery.settings, gallery.hint, gallery.side]
    gallery.grid.select(choose, gallery.shown, outputs, **QUIET)


def _stage_of_tab(event: gr.SelectData) -> Any:
    return gr.Column(visible=event.value in KINDS.values())


def _wire_ticks(
    studio: Studio, page: gr.Blocks, seen: Any, stage: Stage, train: TrainTab, drawing: dict[str, DrawingTab]
) -> None:
    """Show what has changed, again and again; a page that is opened anew sees what is going on."""
    menus = [menu for tab in drawing.values() for menu, _ in tab.slots]
    outputs = [seen, stage.live, stage.stops, stage.clear, stage.made, stage.results, stage.chosen, stage.settings]
    outputs += [train.live, train.samples, train.stop, train.use, *menus]

    @plain
    def look(known: dict[str, Any]) -> list[Any]:
        jobs, known = studio.jobs, dict(known or {})
        version, shelf = jobs.version, list(studio.shelf.all())
        menu_updates = [gr.skip()] * len(menus)
        if known.get("shelf") != shelf:
            menu_updates = [gr.Dropdown(choices=[NONE, *shelf])] * len(menus)
        if known.get("version") == version and known.get("shelf") == shelf:
            return [gr.skip()] * len(outputs)
        running, waiting = jobs.current, list(jobs.waiting)
        drawn, trained = jobs.latest("picture"), jobs.latest("training")
        shown = studio.gallery.still_there(drawn.results) if drawn else []
        results = [gr.skip()] * 3
        if known.get("results") != shown:
            paths = [str(studio.gallery.pictures / name) for name in shown]
            gallery = gr.Gallery(value=paths, selected_index=len(shown) - 1 if shown else None)
            results = [gallery, shown[-1], studio.gallery.parameters(shown[-1])] if shown else [gallery, None, ""]
        drawing_now = running is not None and running.kind == "picture"
        live = view.live(running, drawn, waiting, bool(shown))
        buttons = [gr.Row(visible=running is not None), gr.Button(interactive=bool(waiting))]
        training_now = running is not None and running.kind == "training"
        usable = trained is not None and bool(trained.results)
        sampled = [trained.number, *(step for step, _ in trained.samples)] if trained else None
        samples = view.samples(trained) if known.get("sampled") != sampled else gr.skip()
        return [
            {"version": version, "shelf": shelf, "results": shown, "sampled": sampled},
            live,
            *buttons,
            gr.Column(visible=bool(shown) and not drawing_now),
            *results,
            view.training(trained),
            samples,
            gr.Button(interactive=training_now),
            gr.Button(interactive=usable, variant="primary" if usable else "secondary"),
            *menu_updates,
        ]

    gr.Timer(TICK).tick(look, seen, outputs, **QUIET)
    page.load(lambda: {}, None, seen, **QUIET)
