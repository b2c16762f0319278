"""The pictures of the page in docs/webui.md, made anew: python tests/web/screenshots.py (some minutes)."""

from __future__ import annotations

import argparse
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
PROMPTS = (
    "a large red circle on a white background", "a small yellow star on a grey background",
    "a large green triangle on a black background", "a large orange cross on a white background",
    "a large purple ring on a cyan background", "a small pink square on a black background",
    "a large blue circle on a grey background",
)  # fmt: skip


def keep(browser: Any, name: str) -> None:
    """Write what the page shows as docs/images/webui-NAME.png."""
    browser.evaluate("window.scrollTo(0, 0)")
    browser.mouse.move(5, 5)
    browser.wait_for_timeout(1500)  # until nothing moves
    with Image.open(io.BytesIO(browser.screenshot())) as image:
        image.convert("RGB").save(IMAGES / f"webui-{name}.png", optimize=True)


def brush_over(browser: Any) -> None:
    """Paint over the middle of the image, with the largest brush."""
    browser.locator("#brush-size").fill("40")
    canvas = browser.locator("canvas#brush")
    canvas.hover()  # waits until it is in sight and stands still
    box = canvas.bounding_box()
    x, y, reach = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"] / 6
    browser.mouse.move(x - reach, y - reach)
    browser.mouse.down()
    for to_x, to_y in ((1, -1), (1, 1), (-1, 1), (-1, -1), (0, 0)):
        browser.mouse.move(x + to_x * reach, y + to_y * reach, steps=6)
    browser.mouse.up()


def draw(hand: Hand) -> None:
    """Text to image: what the gallery will show, four pictures at once, and one on its way."""
    hand.set("text-seed", 5)
    for prompt in PROMPTS:
        hand.write("text-prompt", prompt)
        hand.drawn("text-go")
    hand.write("text-prompt", "a large blue star on a white background")
    hand.set("text-count", 4)
    hand.drawn("text-go", 4)
    keep(hand.browser, "text")
    hand.write("text-prompt", "a large green ring on a white background")
    hand.set("text-steps", 150)
    hand.press("text-go")
    hand.browser.wait_for_selector(".studio-preview img")
    hand.browser.wait_for_timeout(2500)  # until something is to be seen
    keep(hand.browser, "live")
    hand.press("stop-now")
    hand.browser.wait_for_selector(".studio-stopped")


def repaint(hand: Hand) -> None:
    """Inpainting, and then the gallery."""
    hand.tab("Gallery")
    hand.browser.locator("#gallery button.thumbnail-item, #gallery .thumbnail-lg").last.click()
    hand.press("gallery-to-inpaint")
    brush_over(hand.browser)
    hand.write("inpaint-prompt", "a large yellow star on a white background")
    hand.set("inpaint-seed", 3)
    hand.drawn("inpaint-go")
    keep(hand.browser, "inpaint")
    hand.tab("Gallery")
    hand.browser.locator("#gallery button.thumbnail-item, #gallery .thumbnail-lg").nth(7).click()
    hand.browser.wait_for_selector("#gallery-settings")
    keep(hand.browser, "gallery")


def teach(hand: Hand, photos: list[Path]) -> None:
    """A training, at its end."""
    hand.tab("Training")
    hand.browser.locator("#train-photos input[type=file]").set_input_files([str(path) for path in photos])
    hand.press("train-go")
    until(lambda: hand.browser.locator("#train-live .studio-done").count(), 3600, every=1)
    keep(hand.browser, "train")


def main() -> None:
    """A page of its own, used as a person would."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as page, browser_page(1280, 900) as browser:
        browser.set_default_timeout(600_000)
        hand = Hand(browser, page)
        draw(hand)
        repaint(hand)
        teach(hand, write_subject_photos(Path(folder) / "photos", "ball", 5))


if __name__ == "__main__":
    main()
