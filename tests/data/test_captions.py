import json
from pathlib import Path

import pytest

from ldm.data import captions
from ldm.errors import UserError


def test_tables_of_every_kind_say_the_same(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "caption": "red, then\nblue"}, {"file_name": "b.png", "caption": "grün\u2028"}]
    (tmp_path / "t.jsonl").write_text(
        "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    )
    (tmp_path / "t.csv").write_text('file_name,caption\na.png,"red, then\nblue"\nb.png,grün\u2028\n')
    (tmp_path / "t.tsv").write_text('caption\tfile_name\n"red, then\nblue"\ta.png\ngrün\u2028\tb.png\n')
    for kind in ("jsonl", "csv", "tsv"):
        assert captions.read_table(tmp_path / f"t.{kind}") == rows
    assert captions.pick_caption(rows[0], None, "x") == "red, then blue"


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("none.csv", None, "none.csv does not exist"),
        ("bad.jsonl", b'{"file_name": "a"}\n{"file', r"bad.jsonl, line 2 is no JSON"),
        ("list.jsonl", b"[1]", "line 1 is no JSON object"),
        ("binary.csv", b"\xff\xfe\x00\xd8", "binary.csv cannot be read"),
        ("table.xls", b"", "must be .jsonl, .csv or .tsv"),
    ],
)
def test_unusable_tables_are_clear_errors(tmp_path: Path, name: str, contents: bytes | None, message: str) -> None:
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message):
        captions.read_table(tmp_path / name)


def test_the_caption_is_the_named_column_or_the_first_that_speaks() -> None:
    fields = {"caption": " ", "text": "a  cat", "alt": "a dog", "number": 3}
    assert captions.pick_caption(fields, None, "x") == "a cat"
    assert captions.pick_caption(fields, "alt", "x") == "a dog"
    assert captions.pick_caption(fields, "caption", "x") == captions.pick_caption({"text": ""}, None, "x") == ""
    for column in ("number", "other"):
        with pytest.raises(UserError, match=f"x has no caption .{column}."):
            captions.pick_caption(fields, column, "x")


def test_an_empty_cell_is_no_caption(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file_name,caption,aesthetic\na.png,,5\n")
    (row,) = captions.read_table(tmp_path / "t.csv")
    assert row == {"file_name": "a.png", "caption": None, "aesthetic": "5"}
    with pytest.raises(UserError, match="x has no caption"):
        captions.pick_caption(row, None, "x")


def test_filters_keep_what_lies_within_both_bounds() -> None:
    bounds = captions.check_filters({"aesthetic": {"min": 5}, "width": {"min": 100, "max": 200}})
    assert captions.passes({"aesthetic": "5.0", "width": 200}, bounds)
    for fields in ({"aesthetic": 4.9, "width": 150}, {"aesthetic": 6, "width": 201}, {"aesthetic": 6}):
        assert not captions.passes(fields, bounds)
    for value in ("", "good", None, float("nan")):
        assert not captions.passes({"aesthetic": value, "width": 150}, bounds)
    assert captions.passes({}, captions.check_filters(None))
    for limits in ({"least": 5}, {"min": "5"}, {}, 5):
        with pytest.raises(UserError, match="the filter aesthetic is"):
            captions.check_filters({"aesthetic": limits})


def test_templates_have_one_place() -> None:
    captions.check_template("{}")
    for template in ("a photo", "{} and {}", "{0}", 5):
        with pytest.raises(UserError, match="template is"):
            captions.check_template(template)
