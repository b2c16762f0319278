import pytest

from ldm.errors import UserError
from scripts.render_configs import main, render_all


def test_writes_what_is_not_current(tmp_path, capsys):
    main(["--outdir", str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == set(render_all())
    (tmp_path / "ffno-transo.yaml").write_text("edited by hand")
    capsys.readouterr()
    with pytest.raises(UserError, match="not current: ffno-transo.yaml"):
        main(["--outdir", str(tmp_path), "--check"])
    main(["--outdir", str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ffno-transo.yaml'}\n"
    main(["--outdir", str(tmp_path), "--check"])


def test_a_file_that_the_table_does_not_know_is_kept(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: 1")
    with pytest.raises(UserError, match="mine.yaml is not in the table"):
        main(["--outdir", str(tmp_path)])
    assert (tmp_path / "mine.yaml").read_text() == "model: 1"
