"""The tab of trainings: its controls, and what happens when something is pressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ldm.errors import UserError
from ldm.web import limits, training, view
from ldm.web.controls import NONE, QUIET, DrawingTab, chosen_adapter, go_to, guarded, plain
from ldm.web.studio import Studio


@dataclass
class TrainTab:
    """The controls of a training."""

    inputs: dict[str, Any]  # by the names that `Training.of` knows
    start: Any
    stop: Any
    use: Any
    live: Any
    samples: Any


def train_tab(studio: Studio, tiny: bool) -> TrainTab:
    """Build the controls inside the present tab."""
    most, ways = studio.limits, list(studio.ways.values())
    if not ways:
        gr.Markdown("To train this model here, start the page with `--train_base`, the yaml of a DreamBooth training.")
    inputs: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            inputs["photos"] = gr.Gallery(label="Photos of one thing", file_types=["image"], type="filepath", columns=5,
                                          height=230, interactive=True, sources=["upload"])  # fmt: skip
            inputs["class_word"] = gr.Textbox("toy" if tiny else "", label="Class word", max_lines=1,
                                              info="What kind of thing it is: dog, coffee mug, toy")  # fmt: skip
            inputs["way"] = gr.Dropdown([(f"{way.title}: {way.about}", way.title) for way in ways],
                                        value=ways[0].title if ways else None, label="How it is learnt",
                                        filterable=False)  # fmt: skip
            inputs["steps"] = gr.Slider(1, most.max_train_steps, _steps(studio, ways[0].title) if ways else 1, step=1,
                                        label="Steps")  # fmt: skip
            with gr.Row():
                start = gr.Button("Start training", variant="primary", size="lg", elem_id="train-go",
                                  elem_classes="studio-go", interactive=bool(ways))  # fmt: skip
                stop = gr.Button("Stop and keep", size="lg", interactive=False, elem_id="train-stop",
                                 elem_classes="studio-go")  # fmt: skip
            use = gr.Button("Use the result", size="lg", interactive=False, elem_id="train-use",
                            elem_classes="studio-go")  # fmt: skip
            with gr.Accordion("Advanced", open=False):
                inputs["prior"] = gr.Slider(0, 200, 32, step=8, label="Prior images",
                                            info="Drawn by the model, to keep what it knows of the class")  # fmt: skip
                inputs["every"] = gr.Slider(1, 500, 60, step=1, label="Sample pictures every (steps)")
                with gr.Row():
                    inputs["rate"] = gr.Number(None, label="Learning rate", info="Empty: the usual one")
                    inputs["seed"] = gr.Number(0, precision=0, label="Seed", info="Another one: another result",
                                               minimum=0)  # fmt: skip
                inputs["captions"] = gr.Textbox("", lines=3, label="Captions",
                                                info="One line a photo; empty: the class word's")  # fmt: skip
        with gr.Column(scale=6, min_width=380):
            live = gr.HTML(view.training(None), elem_id="train-live", padding=False)
            samples = gr.HTML("", elem_id="train-samples", padding=False)
    for name, component in inputs.items():
        component.elem_id = f"train-{name}"
        guarded(component, component.label)
    return TrainTab(inputs, start, stop, use, live, samples)


def _steps(studio: Studio, way: str) -> int:
    """What a way to train takes usually, as far as it is allowed."""
    return min(studio.ways[way].steps, studio.limits.max_train_steps)


def wire_training(studio: Studio, train: TrainTab, drawing: dict[str, DrawingTab], where: list[Any]) -> None:
    """Start, stop, and use what was learnt.

    Args:
        where: the outputs of `go_to`.
    """
    text = drawing["text"]

    @plain
    def start(*values: Any) -> None:
        asked = dict(zip(train.inputs, values, strict=True))
        asked["photos"] = [path for path, _ in asked["photos"] or []]
        before = training.start(studio, training.Training.of(studio, asked))
        if before:
            gr.Info(f"In the queue; {before} before it.", duration=3)

    @plain
    def stop() -> None:
        job = studio.jobs.current
        if job is not None and job.kind == "training":
            studio.jobs.stop()

    @plain
    def use() -> list[Any]:
        job = studio.jobs.latest("training")
        if job is None or not job.results:
            raise UserError("there is no result yet")
        (name,) = job.results
        menu = chosen_adapter(studio, name, choices=[NONE, *studio.shelf.all()], value=name)
        return [*go_to("text"), studio.shelf.prompt(name), menu, 1.0]

    @plain
    def usual_steps(way: Any) -> int:
        return _steps(studio, limits.choice("How it is learnt", way, list(studio.ways)))

    train.inputs["way"].input(usual_steps, train.inputs["way"], train.inputs["steps"], **QUIET)
    train.start.click(start, list(train.inputs.values()), None, show_progress="hidden")
    train.stop.click(stop, None, None, **QUIET)
    train.use.click(use, None, [*where, text.parts["prompt"], *text.slots[0]], **QUIET)
