import pytest

from ldm.errors import UserError
from scripts.render_configs import main, render_all


def test_writes_what_is_not_current(tmp_path, capsys):
    main(["--outdir", str(tmp_path)])
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("*/*")} == set(render_all())
    edited = tmp_path / "sd-inject-dreambooth" / "ffno-transo.yaml"
    edited.write_text("edited by hand")
    capsys.readouterr()
    with pytest.raises(UserError, match="not current: sd-inject-dreambooth/ffno-transo.yaml"):
        main(["--outdir", str(tmp_path), "--check"])
    main(["--outdir", str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {edited}\n"
    main(["--outdir", str(tmp_path), "--check"])


def test_a_file_that_the_table_does_not_know_is_kept(tmp_path):
    others, mine = (tmp_path / name / "mine.yaml" for name in ("autoencoder", "sd-inject-dreambooth"))
    for file in (others, mine):
        file.parent.mkdir()
        file.write_text("model: 1")
    with pytest.raises(UserError, match="sd-inject-dreambooth/mine.yaml is not in the table"):
        main(["--outdir", str(tmp_path)])
    mine.unlink()
    main(["--outdir", str(tmp_path)])
    assert others.read_text() == "model: 1"
