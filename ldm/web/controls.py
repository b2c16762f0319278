"""The controls of the three tabs that draw, their values as `Studio.request` wants them; and what all tabs share."""

from __future__ import annotations

import functools
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ldm.cli_checks import MAX_SEED
from ldm.errors import UserError
from ldm.samplers import SAMPLERS, SCHEDULES
from ldm.web import brush, limits
from ldm.web.gallery import Request
from ldm.web.studio import ADAPTER_WEIGHTS, Studio

SLOTS = 3  # adapters at a time
NONE = "none"
NAMES = {"dpm_solver": "DPM-Solver++ 2M"}  # of samplers that have no title of their own
UNIFORM = "The model's own"
QUIET = {"queue": False, "show_progress": "hidden"}


def guarded(component: Any, name: str) -> Any:
    """The component, which answers values of a wrong kind in one line."""
    preprocess = component.preprocess

    def check(payload: Any) -> Any:
        try:
            return preprocess(payload)
        except gr.Error:
            raise
        except Exception as error:  # whatever a browser may send
            raise gr.Error(f"{name}: this value cannot be read.", print_exception=False) from error

    component.preprocess = check
    return component


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, whose errors are one clear message on the page."""

    @functools.wraps(function)
    def handler(*args: Any) -> Any:
        try:
            return function(*args)
        except gr.Error:
            raise
        except UserError as error:
            raise gr.Error(str(error), title="That does not work", print_exception=False) from error
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            message = "Something went wrong that should not have; the program's own output says what."
            raise gr.Error(message, title="Sorry", print_exception=False) from error

    return handler


def go_to(kind: str) -> tuple[Any, Any]:
    """A tab that draws, and the stage beside it."""
    return gr.Tabs(selected=kind), gr.Column(visible=True)


@dataclass
class DrawingTab:
    """One tab's controls: `parts` by the names in `Request`, and adapters' names with their sliders."""

    kind: str
    parts: dict[str, Any]
    slots: list[tuple[Any, Any]]
    button: Any
    mask: Any = None  # of inpainting: what the brush has painted
    again: Any = None  # and what it is to take up

    @property
    def components(self) -> list[Any]:
        """All of them, in the order of `asked` and `shown`."""
        return [*self.parts.values(), *(component for slot in self.slots for component in slot)]

    def asked(self, values: Sequence[Any]) -> dict[str, Any]:
        """What `Studio.request` takes, from the components' values."""
        asked = dict(zip(self.parts, values[: len(self.parts)], strict=True))
        slots = values[len(self.parts) : len(self.components)]
        asked["adapters"] = [(n if n != NONE else None, w) for n, w in zip(slots[::2], slots[1::2], strict=True)]
        if asked["seed"] == -1:
            asked["seed"] = random.randrange(2**31)
        if self.kind != "text":
            asked["image"] = limits.open_image("Image", asked["image"])
        if self.mask is not None:
            asked["mask"] = brush.mask_of(values[-1], asked["image"].size)
        return asked

    def shown(self, studio: Studio, request: Request) -> list[Any]:
        """The components' values for pictures that were made, to make them again."""
        values: dict[str, Any] = {name: getattr(request, name, None) for name in self.parts}
        values["schedule"] = request.schedule or "uniform"
        if self.kind != "text":
            values["image"] = str(studio.gallery.input(request.image))
        known = studio.shelf.all()
        worn = [(name, weight) for name, weight in request.adapters.items() if name in known][:SLOTS]
        worn += [(NONE, 1.0)] * (SLOTS - len(worn))
        return [*values.values(), *(value for slot in worn for value in slot)]


def drawing_tab(kind: str, studio: Studio, tiny: bool) -> DrawingTab:
    """Build the controls inside the present tab."""
    parts: dict[str, Any] = {}
    example = "a large red circle on a white background" if tiny else ""
    parts["prompt"] = gr.Textbox(example, label="Prompt", lines=2, max_lines=6,
                                 placeholder="What the picture shows")  # fmt: skip
    if kind != "text":
        parts["image"] = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image",
                                  height=280 if kind == "image" else 380, elem_classes="studio-source")  # fmt: skip
    again = None
    if kind == "inpaint":
        gr.HTML(brush.TOOLS)
        again = gr.HTML("", elem_id="inpaint-again", visible="hidden")
    with gr.Row():
        button = gr.Button("Draw", variant="primary", size="lg", elem_id=f"{kind}-go", elem_classes="studio-go")
    with gr.Group(elem_classes="studio-controls"):
        with gr.Row():
            parts["sampler"] = gr.Dropdown(_samplers(), value="dpm_solver", label="Sampler", filterable=False,
                                           info="How the noise is taken away")  # fmt: skip
            parts["schedule"] = gr.Dropdown(_schedules(), value="uniform", label="Schedule", filterable=False,
                                            interactive=False, info="Its levels of noise; Euler and later")  # fmt: skip
        with gr.Row():
            parts["steps"] = gr.Slider(1, studio.limits.max_steps, 20, step=1, label="Steps")
            parts["scale"] = gr.Slider(1, 20, 3.0 if tiny else 7.5, step=0.5, label="Guidance")
        with gr.Row():
            parts |= _sizes(kind, studio)
        with gr.Row():
            parts["count"] = gr.Slider(1, studio.limits.max_pictures, 1, step=1, label="Pictures")
            parts["seed"] = gr.Number(-1, precision=0, label="Seed", info="-1: another one each time",
                                      minimum=-1, maximum=MAX_SEED)  # fmt: skip
    with gr.Accordion("Adapters", open=False):
        slots = [_slot(f"{kind}-adapter-{i + 1}", i, list(studio.shelf.all())) for i in range(SLOTS)]
    with gr.Accordion("Advanced", open=False):
        parts["negative_prompt"] = gr.Textbox("", label="Negative prompt", info="What the picture should not show")
        with gr.Row():
            parts["eta"] = gr.Number(None, label="Eta", minimum=0, maximum=1, step=0.1,
                                     info="Noise of the steps, 0 to 1; empty: as the sampler has it")  # fmt: skip
            parts["clip_skip"] = gr.Number(None, label="Clip skip", precision=0, minimum=1, maximum=12,
                                           info="Stop the text encoder early; empty: as trained")  # fmt: skip
        parts["prompt_weighting"] = gr.Checkbox(False, label="(word:1.2) in prompts is a weight")
    for name, component in parts.items():
        component.elem_id = f"{kind}-{name}"
        guarded(component, component.label or name)
    parts["sampler"].change(
        plain(_offer_schedule), parts["sampler"], parts["schedule"], queue=False, show_progress="hidden"
    )
    mask = gr.Textbox("", visible=False, label="Mask") if kind == "inpaint" else None
    return DrawingTab(kind, parts, slots, button, mask, again)


def _sizes(kind: str, studio: Studio) -> dict[str, Any]:
    step, geometry, most = studio.geometry.multiple, studio.geometry, studio.limits.max_size
    if kind == "text":
        return {
            "width": gr.Slider(step, most, geometry.width, step=step, label="Width"),
            "height": gr.Slider(step, most, geometry.height, step=step, label="Height"),
        }
    usual = 0.75 if kind == "image" else 1.0
    return {
        "strength": gr.Slider(0.05, 1, usual, step=0.05, label="Strength"),
        "side": gr.Slider(step, most, max(geometry.width, geometry.height), step=step, label="Longer side"),
    }


def _slot(elem_id: str, i: int, known: list[str]) -> tuple[Any, Any]:
    with gr.Row():
        name = gr.Dropdown([NONE, *known], value=NONE, label=f"Adapter {i + 1}", allow_custom_value=True,
                           elem_id=elem_id)  # fmt: skip
        weight = gr.Slider(*ADAPTER_WEIGHTS, 1.0, step=0.05, label="Weight (1 as trained)")
    return guarded(name, "Adapter"), guarded(weight, "Weight")


def chosen_adapter(studio: Studio, name: str, **more: Any) -> Any:
    """What becomes of a menu of adapters: below it stands what a prompt calls the subject."""
    called = studio.shelf.prompt(name) if name != NONE else ""
    return gr.Dropdown(info=f"In prompts: {called}" if called else "", **more)


def _samplers() -> list[tuple[str, str]]:
    return [(choice.title or NAMES.get(name, name), name) for name, choice in SAMPLERS.items()]


def _schedules() -> list[tuple[str, str]]:
    return [(words or UNIFORM, name) for name, words in SCHEDULES.items()]


def _offer_schedule(sampler: str) -> Any:
    scheduled = SAMPLERS[limits.choice("Sampler", sampler, list(SAMPLERS))].scheduled
    return gr.Dropdown(interactive=True) if scheduled else gr.Dropdown(value="uniform", interactive=False)
