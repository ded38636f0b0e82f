"""Who imports whom: research and benchmarks may import tools, tools import the library alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "fma2d": {"fma2d"},
    "tools": {"fma2d", "tools"},
    "benchmarks": {"fma2d", "tools", "benchmarks"},
    "research": {"fma2d", "tools", "benchmarks", "research"},
}


def imported(source):
    """The first part of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    wrong = {}
    for file in files:
        if found := set(imported(file.read_text())) & MAY_IMPORT.keys() - MAY_IMPORT[folder]:
            wrong[str(file.relative_to(ROOT))] = found
    assert wrong == {}
