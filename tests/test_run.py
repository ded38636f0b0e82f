"""`python -m fma2d run`, which runs a program that knows models by their names only."""

import json
import sys

import pytest

from fma2d.__main__ import main

PROGRAM = """
import json, sys, pathlib
import timm
import neighbour
path, *words = sys.argv[1:]
told = dict(name=__name__, known=timm.is_model("fma2d_nano"), words=words)
told |= dict(neighbour=neighbour.HERE, program=sys.argv[0])
pathlib.Path(path).write_text(json.dumps(told))
sys.exit(3)
"""


@pytest.mark.parametrize("is_module", [False, True])
def test_a_program_runs_as_by_python_itself(is_module, tmp_path, monkeypatch):
    """Its arguments, its status, its neighbours; names of options are its own."""
    script = tmp_path / "program_that_knows_names.py"
    script.write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("HERE = True")
    monkeypatch.setattr(sys, "path", [str(tmp_path) if is_module else "elsewhere", *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    named = ["-m", script.stem] if is_module else [str(script)]
    with pytest.raises(SystemExit) as end:
        main(["run", *named, str(tmp_path / "told.json"), "-m", "--model", "fma2d_nano", "-h"])
    told = json.loads((tmp_path / "told.json").read_text())
    assert end.value.code == 3
    assert told == dict(
        name="__main__", known=True, words=["-m", "--model", "fma2d_nano", "-h"], neighbour=True, program=str(script)
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name a script, or -m and a module"),
        (["-m"], "name a script, or -m and a module"),
        (["--model", "x"], "name a script, or -m and a module"),
        (["nowhere.py"], "there is no script nowhere.py"),
        (["-m", "no.where"], "there is no module no.where"),
    ],
)
def test_a_program_that_is_not_there_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
