"""For mkdocs: puts the help texts of the programs into the page that lists them."""

import contextlib
import io
import re
import runpy
import sys
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- help: (.+) -->$", re.M)


def on_page_markdown(markdown, **_):
    """Replace each line `<!-- help: tools/X.py [COMMAND] -->` by what that program prints for --help."""
    return MARK.sub(lambda match: f"```text\n{help_text(*match[1].split())}```", markdown)


def help_text(program, *command):
    """The output of `python PROGRAM COMMAND --help`, made in this process: torch is imported once for all of them."""
    text = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *command, "--help"]),
        mock.patch.object(sys, "path", [str(ROOT / "tools"), str(ROOT), *sys.path]),
        mock.patch.dict("os.environ", COLUMNS="100"),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(text),
    ):
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{program} --help ended with {end.code}") from None
    return text.getvalue().replace(f"{ROOT}/", "")
