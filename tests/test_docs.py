"""README and docs: links lead somewhere, what they mention exists, examples print what is said. Nothing is built."""

import contextlib
import io
import os
import re
from argparse import PARSER, ArgumentParser
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import griffe
import pytest
import yaml
from markdown.extensions.toc import slugify

from benchmarks.model_benchmark import DEFAULT, MODES
from benchmarks.records import latest, read_rows, total_mib

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = ("benchmarks", "checkpoints", "configs", "research")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(page for d in FOLDERS for page in (ROOT / d).glob("*.md"))])
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?<![\w./-])((?:\.ci|benchmarks|configs|docs|fma2d|requirements|research|tests|tools)/[\w./-]+\.\w+)\b"
)
NAME = re.compile(r"(?<![\w./-])fma2d\.(?!md\b)([A-Za-z_][\w.]*\w)")
COMMAND = re.compile(r"(?<![\w./-])((?:tools|benchmarks)/\w+\.py|-m (?:benchmarks|research)[\w.]*)((?:\\\n|[^\n#`|])*)")
OPTION = re.compile(r"(?<!\S)--[a-z][\w-]*")


def anchors(page):
    """Ids of the headings of a page, as mkdocs and GitHub make them."""
    text = FENCE.sub("", page.read_text())
    return {slugify(heading.strip("# `"), "-") for heading in re.findall(r"^#+ .+$", text, re.M)}


def broken_links(page):
    """Links of a page to a file or heading that is not there; in docs/ also those that leave it, as mkdocs has them."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = not page.is_relative_to(DOCS) or target.is_relative_to(DOCS)
        if not target.exists() or not inside or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@cache
def options_of(program):
    """The options of a program and of its subcommands, from its parser; nothing is parsed."""
    pytest.importorskip("fma2d.ops.triton_backend")  # before a program that reads Triton's settings otherwise
    with patch.dict(os.environ):  # benchmarks/gpu/kernel_report.py sets them for its own process
        module = program.removesuffix(".py").removeprefix("-m ").replace("/", ".")
        main = import_module(f"{module}.__main__" if module == "benchmarks" else module).main
    with (
        patch.object(ArgumentParser, "parse_args", autospec=True, side_effect=SystemExit) as parse_args,
        pytest.raises(SystemExit),
    ):
        main([])
    parsers = [parse_args.call_args.args[0]]
    for parser in parsers:
        for action in parser._actions:
            if action.nargs == PARSER:
                parsers += action.choices.values()
    return {name for parser in parsers for action in parser._actions for name in action.option_strings}


def unknown_options(text):
    """Options in the commands of a text that their programs do not have."""
    return [
        f"{program} {option}"
        for program, arguments in COMMAND.findall(text)
        if program.startswith("-m ") or (ROOT / program).exists()
        for option in OPTION.findall(arguments)
        if option not in options_of(program)
    ]


def wrong_output(page):
    """Of the examples that show what they print, as lines of comment, those that print something else."""
    wrong = []
    for code in PYTHON.findall(page.read_text()):
        shown = re.findall(r"^# (.*)$", code, re.M)
        if shown:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, str(page), "exec"), {})
            if printed.getvalue().splitlines() != shown:
                wrong.append(code + printed.getvalue())
    return wrong


def everywhere(check):
    """What a check finds wrong, by page."""
    return {str(page.relative_to(ROOT)): found for page in PAGES if (found := check(page))}


def test_links():
    assert everywhere(broken_links) == {}


def test_files_that_are_mentioned_exist():
    assert everywhere(lambda page: [f for f in FILE.findall(page.read_text()) if not (ROOT / f).exists()]) == {}


def test_options_that_are_mentioned_exist():
    assert everywhere(lambda page: unknown_options(page.read_text())) == {}


def test_names_that_are_mentioned_exist():
    package = griffe.load("fma2d", search_paths=[ROOT])

    def unknown(page):
        return [name for name in NAME.findall(page.read_text()) if not exists(package, name)]

    assert everywhere(unknown) == {}
    assert exists(package, "ops.multipole_attention") and not exists(package, "ops.gone")


def exists(package, name):
    """Whether `fma2d.NAME` is a module or a name in one; read from the sources, nothing is imported."""
    try:
        return bool(package[name])
    except KeyError:
        return False


def test_examples_print_what_they_show():
    assert everywhere(wrong_output) == {}


COMPARED = ("fma2d-torch", "sdpa")


def test_readme_shows_the_operator_benchmark_as_it_was_recorded():
    """The table's rows, from the last result of each; a failure shows the rows to paste."""
    recorded = (r for r in latest(read_rows(RESULTS / "operator.csv")) if r["variant"] != "loglinear")
    rows = {(r["name"], r["mode"], int(r["height"])): r for r in recorded}
    expected = [
        readme_row(side, mode, *(rows[name, mode, side] for name in COMPARED))
        for side in (32, 64, 128, 256)
        for mode in ("forward", "forward+backward")
    ]
    caption = "{} instead of {} at 256 x 256 tokens".format(*(clock(rows[name, "forward", 256]) for name in COMPARED))
    text = (ROOT / "README.md").read_text()
    assert [line for line in expected if line not in text.splitlines()] == []
    assert caption in text


def clock(row):
    ms = float(row["median_ms"])
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.{1 if ms < 20e3 else 0}f} s"


def readme_row(side, mode, fma, dense):
    """A row of the README's table: times, and what a call takes beyond its inputs, a token."""

    def each(row):
        return f"{float(row['peak_mib']) * 2**20 / int(row['tokens']):.0f}"

    cells = [f"{side} x {side}", mode.replace("+", " + "), clock(fma), "not run", "", "", each(fma), ""]
    if dense["status"] == "ok":
        times = float(dense["median_ms"]) / float(fma["median_ms"])
        cells[3:6] = (
            clock(dense),
            f"{times:.{1 if times < 10 else 0}f}x",
            f"{int(dense['macs']) / int(fma['macs']):.0f}",
        )
        cells[7] = each(dense)
    return " ".join(f"| {cell}" if cell else "|" for cell in cells) + " |"


def test_the_page_on_resolution_shows_the_model_benchmark_as_it_was_recorded():
    """Rows as in the test above; a failure shows the rows to paste."""
    rows = {(r["mode"], r["height"], r["name"]): r for r in latest(read_rows(RESULTS / "model.csv"))}
    text = (DOCS / "resolution.md").read_text().splitlines()
    expected = [resolution_row(size, mode, rows) for mode in MODES for size in ("224", "512", "1024", "2048", "4096")]
    assert [line for line in expected if line not in text] == []


def resolution_row(size, mode, rows):
    """A row of that page: for each model seconds and GiB of a call, weights included, or why not."""

    def cell(row):
        if row is None:
            return "not run"
        if row["status"] != "ok":
            return row["status"].split(":")[0]
        return f"{float(row['median_ms']) / 1000:.3g} s, {total_mib(row) / 1024:.2g} GiB"

    return f"| {size} | {' | '.join(cell(rows.get((mode, size, name))) for name in DEFAULT)} |"


def test_every_page_is_in_the_navigation():
    def entries(node):
        if isinstance(node, str):
            return {node}
        return set().union(*(entries(child) for child in (node.values() if isinstance(node, dict) else node)))

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert entries(nav) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_program_has_its_help_text_in_the_docs():
    text = (DOCS / "api" / "tools.md").read_text()
    programs = [file for file in (ROOT / "tools").glob("*.py") if "ArgumentParser(" in file.read_text()]
    assert len(programs) > 10
    assert [p.name for p in programs if f"<!-- help: tools/{p.name}" not in text and p.name != "make_venv.py"] == []


def test_the_checks_find_what_is_wrong(tmp_path):
    """The twin of the tests above."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[a](gone.md) [b](#a-page) [c](#gone) [d](https://example.org/x)\n```\n[e](code)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "#gone"]
    page.write_text("```python\nprint(1 + 1)\n# 2\n```\n```python\nprint(1 + 1)\n# 3\n```\n")
    assert wrong_output(page) == ["print(1 + 1)\n# 3\n2\n"]
    assert unknown_options("python tools/demo.py \\\n    --out y --gone  # --comment") == ["tools/demo.py --gone"]
    assert unknown_options("python -m benchmarks draw x --gone") == ["-m benchmarks --gone"]
    commands = "tools/train_text.py --lr 1 --rate 1\ntools/generate.py model.safetensors --seed 1 --lr 1"
    assert unknown_options(commands) == ["tools/train_text.py --rate", "tools/generate.py --lr"]
