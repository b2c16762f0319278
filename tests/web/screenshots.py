"""The pictures of the page in docs/webui.md, made anew: python tests/web/screenshots.py (some minutes)."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from ldm.data.subjects import write_subject_photos
from tests.web.running import ROOT, browser_page, running, until
from tests.web.test_browser import Hand

IMAGES = ROOT / "docs" / "images"
PROMPTS = ("a large red circle on a white background", "a small blue star on a yellow background",
           "a large green triangle on a black background", "a medium purple square on a white background")  # fmt: skip


def keep(browser: Any, name: str) -> None:
    """Write what the page shows as docs/images/webui-NAME.png, in as few colours as look the same."""
    browser.wait_for_timeout(1500)
    with Image.open(io.BytesIO(browser.screenshot())) as image:
        image.convert("RGB").quantize(192).save(IMAGES / f"webui-{name}.png", optimize=True)


def brush_over(browser: Any) -> None:
    """Paint a bar over the middle of the image."""
    canvas = browser.locator("canvas#brush")
    canvas.hover()  # waits until it is in sight and stands still
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    browser.mouse.move(x - 50, y)
    browser.mouse.down()
    browser.mouse.move(x + 50, y, steps=6)
    browser.mouse.up()


def main(steps: int = 120) -> None:
    """A page of its own, used as a person would."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as page, browser_page(1280, 900) as browser:
        browser.set_default_timeout(600_000)
        hand = Hand(browser, page)
        hand.set("text-seed", 5)
        for prompt in PROMPTS:
            hand.write("text-prompt", prompt)
            hand.drawn("text-go")
        hand.press("text-go")
        browser.wait_for_selector(".studio-preview img")
        keep(browser, "live")
        until(lambda: len(hand.pictures()) == len(PROMPTS) + 1, 600)
        hand.set("text-count", 4)
        hand.drawn("text-go", 4)
        keep(browser, "text")
        hand.press("result-to-inpaint")
        brush_over(browser)
        hand.write("inpaint-prompt", "a small yellow star on a white background")
        hand.drawn("inpaint-go")
        keep(browser, "inpaint")
        hand.tab("Gallery")
        browser.wait_for_selector("#gallery img")
        keep(browser, "gallery")
        photos = write_subject_photos(Path(folder) / "photos", "ball", 5)
        hand.tab("Training")
        browser.locator("#train-photos input[type=file]").set_input_files([str(path) for path in photos])
        hand.set("train-steps", steps)
        hand.press("train-go")
        until(lambda: browser.locator("#train-live .studio-done").count(), 3600, every=1)
        keep(browser, "train")


if __name__ == "__main__":
    main()
