"""The package as a whole: a quiet and cheap import, one version, short files, the doctor."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fma2d
from fma2d import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ["fma2d.mmseg", "fma2d.text", "fma2d.visualize", "mmengine", "mmseg", "mmcv", "matplotlib"]

# Imports the package argv[2] where no triton can be found, and writes to the file argv[1] which modules came in and
# which files asked for triton. The file that asks is the first one below the import machinery on the stack.
PROBE = """
import json, sys

askers = []

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            askers.append(frame.f_code.co_filename)
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, NoTriton())
__import__(sys.argv[2])
with open(sys.argv[1], "w") as file:
    json.dump({"modules": sorted(sys.modules), "askers": askers}, file)
"""


def run(*arguments, path=ROOT, cwd):
    """A fresh Python with `path` importable: the finished process, its output captured."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def probe(package, path, cwd):
    """Import a package in a fresh Python without triton: (process, modules, its own files that ask for triton)."""
    report = cwd / "report.json"
    process = run("-c", PROBE, str(report), package, path=path, cwd=cwd)
    assert process.returncode == 0, process.stderr
    found = json.loads(report.read_text())
    own = path / package
    return process, set(found["modules"]), [file for file in found["askers"] if Path(file).is_relative_to(own)]


def test_import_is_quiet_and_brings_nothing_optional(tmp_path):
    process, modules, askers = probe("fma2d", ROOT, tmp_path)
    assert "fma2d" in modules
    assert (process.stdout, process.stderr) == ("", "")
    assert modules.isdisjoint(OPTIONAL)
    assert askers == []


@pytest.mark.parametrize(
    "statement", ["import triton", "import importlib\n    importlib.import_module('triton.language')"]
)
def test_the_probe_sees_an_import_of_triton(tmp_path, statement):
    """The twin of the test above: a package that does import triton is found out, however it asks."""
    package = tmp_path / "leaky"
    package.mkdir()
    (package / "__init__.py").write_text("from . import inner\n")
    (package / "inner.py").write_text(f"try:\n    {statement}\nexcept ImportError:\n    pass\n")
    _, _, askers = probe("leaky", tmp_path, tmp_path)
    assert askers == [str(package / "inner.py")]


def test_one_version(tmp_path):
    """A build takes the version from fma2d/__init__.py, and from nowhere else."""
    process = run(str(ROOT / "setup.py"), "--version", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == fma2d.__version__
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(), re.M)


def test_no_long_file():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in ROOT.glob("fma2d/**/*.py")}
    assert "fma2d/__init__.py" in lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_doctor_runs(tmp_path):
    process = run("-m", "fma2d", "doctor", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    report = dict(line.split(maxsplit=1) for line in process.stdout.splitlines())
    assert report["fma2d"] == fma2d.__version__
    assert report["torch"].startswith(f"torch {metadata.version('torch')}")
    assert report["timm"].startswith(f"timm {metadata.version('timm')}")
    assert report["cpu/reference"] == report["cpu/torch"] == "runs"
    assert "cpu/triton" in report


def test_doctor_says_how_to_get_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "installed_version", lambda distribution: None)
    command_line.main(["doctor"])
    report = capsys.readouterr().out
    assert re.search(r"^mmseg +missing: .*pip install onedl-mmsegmentation", report, re.M)
    assert re.search(r"^mmcv +missing: .*pip install --no-deps mmcv-lite", report, re.M)


def test_doctor_runs_what_it_says_runs(monkeypatch):
    """It asked `why_not` alone, which does not know what a device cannot do."""

    def fail(*_, **__):
        raise TypeError("this device has no float64\nand more lines")

    monkeypatch.setattr(fma2d, "multipole_attention", fail)
    assert command_line.backend_line("torch", "cpu") == "does not run: this device has no float64"


def test_doctor_warns_of_two_distributions_over_the_same_files(monkeypatch):
    monkeypatch.setattr(command_line, "installed_version", lambda distribution: "1.0")
    assert "both provide mmengine" in command_line.package_line("mmengine")


def test_doctor_names_the_locked_versions():
    """The versions that the doctor calls tested are those of the lock."""
    locked = "\n".join((ROOT / "requirements" / name).read_text() for name in ("dev.txt", "no-deps.txt")).splitlines()
    tested = {
        f"{dist}=={version}" for dists in command_line.PACKAGES.values() for dist, version in dists.items() if version
    }
    assert len(tested) == len(command_line.PACKAGES)
    assert tested <= set(locked)
