import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ldm.generation import SETTINGS, Place, Plan, draw_share, fingerprint, read_prompts
from ldm.outputs import Picture, Settings
from ldm.util import UserError


def picture(prompt: str, seed: int) -> Picture:
    """One that shows its seed and the length of its prompt."""
    settings = Settings(prompt, "", seed, 1, "DDIM", 1.0, 0.0, 8, 8)
    return Picture(Image.new("RGB", (8, 8), (seed % 256, len(prompt), 0)), settings)


def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
    return [picture(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world, batch_size", [(1, 4), (3, 2), (5, 7)])
def test_counts_prompts_and_seeds_do_not_depend_on_processes_and_batches(world, batch_size, tmp_path: Path) -> None:
    plan = Plan(tmp_path, ["a", "bb", "ccc"], 100, 20)
    drawn = []

    def counted(prompts: list[str], seeds: list[int]) -> list[Picture]:
        drawn.extend(seeds)
        return draw(prompts, seeds)

    for rank in reversed(range(world)):
        draw_share(plan, Place(rank, world), counted, batch_size, False, shown=False)
    assert sorted(drawn) == list(range(100, 120))
    rows = rows_of(tmp_path)
    assert rows[4] == {"file": "00000/000004.png", "prompt": "bb", "seed": 104} and len(rows) == 20
    for row in rows:
        with Image.open(tmp_path / row["file"]) as image:
            assert image.getpixel((0, 0))[:2] == (row["seed"], len(row["prompt"]))


def test_a_folder_holds_a_thousand() -> None:
    plan = Plan(Path("x"), ["a"], 0, 2001)
    assert [plan.name(i) for i in (0, 999, 1000, 1234567)] == [
        "00000/000000.png", "00000/000999.png", "00001/001000.png", "01234/1234567.png",
    ]  # fmt: skip


@pytest.mark.parametrize("exact, drawn", [(True, [4]), (False, [4, 5, 6, 7])])
def test_what_is_there_is_not_drawn_again(exact: bool, drawn: list[int], tmp_path: Path) -> None:
    plan, asked = Plan(tmp_path, ["a"], 0, 8), []

    def stops(prompts: list[str], seeds: list[int]) -> list[Picture]:
        asked.extend(seeds)
        if 4 in seeds and len(asked) <= 8:
            raise KeyboardInterrupt
        return draw(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        draw_share(plan, Place(), stops, 4, exact, shown=False)
    assert plan.present() == [0, 1, 2, 3] and len(rows_of(tmp_path)) == 4
    for i in (5, 6, 7):
        picture("a", i).save(tmp_path / plan.name(i))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.png")}
    asked[:] = range(9)
    draw_share(plan, Place(), stops, 4, exact, shown=False)
    assert asked[9:] == drawn
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert plan.present() == list(range(8)) and [row["seed"] for row in rows_of(tmp_path)] == list(range(8))


def test_a_manifest_lists_what_came_while_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(tmp_path, ["a"], 0, 2)
    picture("a", 0).save(tmp_path / plan.name(0))
    replace = os.replace

    def meanwhile(source: str, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "manifest.jsonl" and len(plan.present()) == 1:
            picture("a", 1).save(tmp_path / plan.name(1))

    monkeypatch.setattr(os, "replace", meanwhile)
    plan.write_manifest()
    assert len(rows_of(tmp_path)) == 2


def test_leftovers_of_a_kill_are_no_pictures_and_are_removed(tmp_path: Path) -> None:
    plan = Plan(tmp_path, ["a"], 0, 2)
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / ".000001.png.x1y2.tmp").write_bytes(b"half")
    assert plan.present() == []
    plan.clean()
    assert not list(tmp_path.glob("**/.*"))


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    Plan(tmp_path, ["a"], 0, 2).agree({"scale": 7.5, "solver": {}})
    Plan(tmp_path, ["a"], 0, 9).agree({"scale": 7.5, "solver": {}})
    with pytest.raises(UserError, match="scale was 7.5 and is 3.0; name another folder"):
        Plan(tmp_path, ["a"], 0, 2).agree({"scale": 3.0, "solver": {}})
    with pytest.raises(UserError, match="prompts was"):
        Plan(tmp_path, ["b"], 0, 2).agree({"scale": 7.5, "solver": {}})


def test_prompts_come_from_text_tables_folders_and_yaml(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\n\n dog\n")
    assert read_prompts(str(tmp_path / "labels.txt"), template="a photo of a {}") == [
        "a photo of a cat",
        "a photo of a  dog",
    ]
    (tmp_path / "t.csv").write_text("caption,other\na cat,x\na dog,y\n")
    assert read_prompts(str(tmp_path / "t.csv")) == ["a cat", "a dog"]
    assert read_prompts(str(tmp_path / "t.csv"), column="other") == ["x", "y"]
    (tmp_path / "manifest.jsonl").write_text('{"file": "x.png", "prompt": "a cat"}\n')
    assert read_prompts(str(tmp_path / "manifest.jsonl")) == ["a cat"]
    folder = tmp_path / "photos"
    for name in ("b", "a"):
        picture("", 0).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"photo {name}")
    assert read_prompts(str(folder)) == ["photo a", "photo b"]
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match="1 of 2 images have no caption"):
        read_prompts(str(folder))
    (folder / "metadata.csv").write_text("file_name,text\na.png,from the table\n")
    assert read_prompts(str(folder)) == ["from the table"]
    params = "{target: ldm.data.shapes.ShapesDataset, params: {split: test, length: 3}}"
    (tmp_path / "set.yaml").write_text(f"data: {{params: {{train: {params}}}}}")
    assert len(read_prompts(str(tmp_path / "set.yaml"))) == 3


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 4000)
    first = fingerprint(path)
    assert fingerprint(path) == first
    path.write_bytes(bytes(reversed(range(256))) * 4000)
    assert fingerprint(path) != first
    assert fingerprint(tmp_path) != fingerprint(path)


@pytest.mark.parametrize("damaged", ["", '{"seed": 1', "[1, 2]", "7"])
def test_a_damaged_record_of_settings_is_one_line(damaged: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text(damaged)
    with pytest.raises(UserError, match=r"^--outdir: '.*settings.json' cannot be read: .*; name another folder$"):
        Plan(tmp_path, ["a"], 0, 1).agree({"steps": 1})
