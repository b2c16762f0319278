"""What the page shows of pictures of which somebody has taken some away by hand."""

import asyncio
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.state_holder import SessionState

from ldm.web import page
from ldm.web.jobs import Job
from ldm.web.studio import Studio
from tests.web.test_studio import ASKED


class Opened:
    """A page that was opened in a browser."""

    def __init__(self, studio: Studio) -> None:
        self.blocks = page.build(studio)
        self.state = SessionState(self.blocks)

    def call(self, name: str, **more: Any) -> dict[str, Any]:
        """What the first handler of a name answers, by the elements that it changes."""
        handler = next(one for one in self.blocks.fns.values() if one.name == name)
        asked = self.blocks.process_api(handler, [None] * len(handler.inputs), self.state, **more)
        answer = asyncio.run(asked)["data"]
        return {part.elem_id: value for part, value in zip(handler.outputs, answer, strict=True)}

    def look(self) -> tuple[list[str], str]:
        """The names of the results that are shown after a tick, and how the last one was made."""
        answer = self.call("look")
        return [one["image"]["orig_name"] for one in answer["results"]["value"]], answer["result-settings"]

    def press(self, index: int) -> str:
        """How the result was made that somebody presses on."""
        return self.call("choose", event_data=gr.EventData(None, {"index": index, "value": None}))["result-settings"]


def test_only_pictures_that_are_there_are_shown(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    job = Job("", lambda _: None)
    studio._draw(studio.request("text", ASKED | {"count": 3}), job)
    studio.jobs.past.append(job)
    first, second, third = (studio.gallery.pictures / name for name in job.results)

    first.unlink()
    third.with_suffix(".json").unlink()
    opened = Opened(studio)
    assert opened.look() == ([second.name, third.name], "")
    assert "Seed: 6," in opened.press(0)

    third.unlink()
    names, settings = Opened(studio).look()
    assert names == [second.name] and "Seed: 6," in settings
    second.unlink()
    assert Opened(studio).look() == ([], "")
