"""The page in a real browser, from the first picture to one of a subject that was taught on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data.subjects import write_subject_photos
from tests.web.running import Running, browser_page, chromium, until

SECONDS = 300


class Hand:
    """What a person does on the page, and what then lies in its folder."""

    def __init__(self, browser: Any, page: Running, name: str = "", password: str = "") -> None:
        self.browser, self.outdir, self.first = browser, page.outdir, ""
        browser.goto(page.address)
        if name:
            browser.get_by_label("username").fill(name)
            browser.get_by_label("password").fill(password)
            browser.get_by_role("button", name="Login").click()
        browser.wait_for_selector("#text-go")

    def tab(self, title: str) -> None:
        self.browser.get_by_role("tab", name=title).click()

    def set(self, name: str, value: object) -> None:
        """Type a value into a slider's or number's field."""
        field = self.browser.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def write(self, name: str, text: str) -> None:
        self.browser.locator(f"#{name} textarea, #{name} input").first.fill(text)

    def press(self, name: str) -> None:
        self.browser.locator(f"#{name}").click()

    def pictures(self) -> list[Path]:
        return sorted((self.outdir / "pictures").glob("*.png"))

    def drawn(self, button: str, count: int = 1) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Press a button, and wait until the pictures are there and the page shows the last one."""
        before = len(self.pictures())
        self.press(button)
        until(lambda: len(self.pictures()) == before + count, SECONDS)
        new = self.pictures()[before:]
        self.browser.wait_for_selector(f'#results img[src*="{new[-1].name}"]')
        return [(np.asarray(Image.open(path)), json.loads(path.with_suffix(".json").read_text())) for path in new]


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_a_person_draws_changes_teaches_and_uses_what_was_taught(page: Running, tmp_path: Path) -> None:
    with browser_page() as browser:
        hand, said = Hand(browser, page, "ann", "secret"), len(page.said())
        first = draw(hand)
        vary(hand, first)
        repaint(hand)
        use_again(hand, first)
        stop(hand)
        name = teach(hand, write_subject_photos(tmp_path / "photos", "ball", 3))
        use_what_was_taught(hand, name)
        survives_a_closed_tab(hand, page)
        assert "Traceback" not in browser.content()
        elsewhere = [url for url in browser.requested if not url.startswith((page.address, "data:", "blob:"))]
        assert not elsewhere, "nothing is fetched from another place"
    assert "Traceback" not in page.said()[said:]


def draw(hand: Hand) -> np.ndarray:
    hand.write("text-prompt", "a large blue circle on a white background")
    for name, value in (("steps", 4), ("seed", 11), ("count", 2)):
        hand.set(f"text-{name}", value)
    (one, record), (two, _) = hand.drawn("text-go", 2)
    hand.first = hand.pictures()[-2].name
    assert one.shape == (64, 64, 3) and not np.array_equal(one, two)
    assert record["prompt"] == "a large blue circle on a white background" and record["seed"] == 11
    assert (one[28:36, 28:36, 2].astype(int) - one[28:36, 28:36, 0]).mean() > 40, "it is blue"
    return one


def vary(hand: Hand, first: np.ndarray) -> None:
    hand.browser.locator("#results .thumbnails button, #results button.thumbnail-item").first.click()
    until(lambda: "Seed: 11," in hand.browser.locator("#result-settings textarea").input_value(), SECONDS)
    hand.press("result-to-image")
    hand.browser.wait_for_selector("#image-image img")
    hand.set("image-steps", 4)
    hand.set("image-strength", 0.5)
    ((varied, record),) = hand.drawn("image-go")
    assert record["kind"] == "image" and record["strength"] == 0.5
    assert np.array_equal(Image.open(hand.outdir / "inputs" / record["image"]).convert("RGB"), first)
    assert 0 < np.abs(varied.astype(int) - first).mean() < 60, "it is another picture of the same"


def repaint(hand: Hand) -> None:
    hand.press("result-to-inpaint")
    canvas = hand.browser.locator("canvas#brush")
    canvas.hover()  # waits until it is in sight and stands still
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    hand.browser.mouse.move(x - 30, y)
    hand.browser.mouse.down()
    hand.browser.mouse.move(x + 30, y, steps=5)
    hand.browser.mouse.up()
    assert hand.browser.evaluate("window.studioMask().length") > 100
    hand.set("inpaint-steps", 2)
    ((painted, record),) = hand.drawn("inpaint-go")
    image, hole = (Image.open(hand.outdir / "inputs" / record[key]) for key in ("image", "mask"))
    outside = np.asarray(hole.convert("L")) < 128
    assert 0.3 < outside.mean() < 1, "a part of it was brushed"
    assert np.array_equal(painted[outside], np.asarray(image.convert("RGB"))[outside]), "the rest stays as it is"


def use_again(hand: Hand, first: np.ndarray) -> None:
    hand.tab("Gallery")
    hand.browser.locator(f'#gallery button:has(img[src*="{hand.first}"])').first.click()
    until(lambda: "Seed: 11," in hand.browser.locator("#gallery-settings textarea").input_value(), SECONDS)
    hand.press("gallery-again")
    until(lambda: hand.browser.locator("#text-seed input").input_value() == "11", SECONDS)
    ((again, _),) = hand.drawn("text-go")
    assert np.array_equal(again, first), "the same settings give the same picture"


def stop(hand: Hand) -> None:
    before = len(hand.pictures())
    hand.set("text-steps", 150)
    hand.set("text-count", 16)
    hand.press("text-go")
    hand.browser.wait_for_selector(".studio-preview img")
    hand.press("stop-now")
    hand.browser.wait_for_selector(".studio-stopped")
    assert len(hand.pictures()) < before + 16
    hand.set("text-steps", 4)
    hand.set("text-count", 1)


def teach(hand: Hand, photos: list[Path]) -> str:
    hand.tab("Training")
    hand.browser.locator("#train-photos input[type=file]").set_input_files([str(path) for path in photos])
    hand.browser.wait_for_selector("#train-photos img")
    hand.write("train-class_word", "toy")
    hand.set("train-steps", 2)
    hand.browser.get_by_text("Advanced").last.click()
    hand.set("train-prior", 0)
    hand.set("train-every", 50)
    hand.press("train-go")
    hand.browser.wait_for_selector("#train-use:not([disabled])", timeout=1000 * 2 * SECONDS)
    hand.browser.wait_for_selector(".studio-curve polyline")
    hand.browser.wait_for_selector("#train-live .studio-done")
    hand.browser.wait_for_selector("#train-samples img")
    assert list(hand.outdir.glob("trainings/toy-1/logs/*/images/train/prompts_samples_gs-000001*.png"))
    (adapters,) = (hand.outdir / "adapters").iterdir()
    assert adapters.name == "toy-1 Adapters, 2 steps" and (adapters / "adapters" / "adapter_config.json").is_file()
    assert not list(hand.outdir.glob("trainings/*/logs/*/checkpoints/*.ckpt"))
    return adapters.name


def use_what_was_taught(hand: Hand, name: str) -> None:
    hand.press("train-use")
    until(lambda: hand.browser.locator("#text-prompt textarea").input_value() == "a photo of a sks toy", SECONDS)
    ((taught, record),) = hand.drawn("text-go")
    assert record["adapters"] == {name: 1}
    hand.browser.get_by_text("Adapters").first.click()
    hand.write("text-adapter-1", "none")
    hand.browser.locator("#text-adapter-1 input").press("Enter")
    ((plain, record),) = hand.drawn("text-go")
    assert record["adapters"] == {} and not np.array_equal(taught, plain)


def survives_a_closed_tab(hand: Hand, page: Running) -> None:
    hand.set("text-steps", 12)
    hand.set("text-count", 2)
    before = len(hand.pictures())
    hand.press("text-go")
    hand.browser.wait_for_selector(".studio-bar")
    hand.browser.goto("about:blank")
    hand.browser.goto(page.address)
    until(lambda: len(hand.pictures()) == before + 2, SECONDS)
    hand.browser.wait_for_selector(f'#results img[src*="{hand.pictures()[-1].name}"]')
