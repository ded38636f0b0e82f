"""Command line.

python -m fma2d doctor                   what is installed, what runs on this machine, and how to get the rest
python -m fma2d run SCRIPT ARGS...       a program that knows models by their names only, as timm's train.py
python -m fma2d run -m MODULE ARGS...    the same with a module
"""

import argparse
import os
import platform
import runpy
import sys
from importlib import metadata, util

import torch

import fma2d
from fma2d.ops import BACKENDS

# What is looked for: import name -> the distributions that provide it, each with its tested version (None: not tested).
PACKAGES = {
    "torch": {"torch": "2.11.0"},
    "timm": {"timm": "1.0.31"},
    "torchvision": {"torchvision": "0.26.0"},
    "triton": {"triton": "3.6.0"},
    "mmengine": {"onedl-mmengine": "0.10.12", "mmengine": None},
    "mmseg": {"onedl-mmsegmentation": "1.4.2", "mmsegmentation": None},
    "mmcv": {"mmcv-lite": "2.1.0", "mmcv": None, "onedl-mmcv": None},
}
HOW_TO_GET = {
    "torchvision": "pip install torchvision",
    "triton": "comes with torch for CUDA on Linux; everything runs without it",
    "mmengine": "for fma2d.mmseg: pip install onedl-mmengine  (or, in the repository, pip install '.[mmseg]')",
    "mmseg": "for fma2d.mmseg: pip install onedl-mmsegmentation  (or, in the repository, pip install '.[mmseg]')",
    "mmcv": "for fma2d.mmseg: pip install --no-deps mmcv-lite==2.1.0  (its dependencies would overwrite mmengine)",
}


def installed_version(distribution):
    """The installed version of a distribution, or None; nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def package_line(name):
    """One line on a package: its version and the tested one, or how to get it."""
    tested = " or ".join(f"{dist} {version}" for dist, version in PACKAGES[name].items() if version)
    found = [f"{dist} {version}" for dist in PACKAGES[name] if (version := installed_version(dist))]
    if not found:
        return f"missing: {HOW_TO_GET.get(name, 'pip install ' + name)}"
    if len(found) > 1:
        return f"{' and '.join(found)}: both provide {name}, uninstall both, then install {tested}"
    return found[0] if found[0] == tested else f"{found[0]}  (tested: {tested})"


def devices():
    """Every device at hand with a description: [(torch.device, text)]."""
    found = [(torch.device("cpu"), f"{torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
        found.append((torch.device("cuda", index), text))
    if torch.backends.mps.is_available():
        found.append((torch.device("mps"), "Apple GPU"))
    return found


def backend_line(backend, device):
    """One line: whether the backend runs, with a far field, on a small float32 image on the device."""
    try:
        q = torch.zeros(1, 1, 16, 16, 16, device=device)  # [B, heads, H, W, head_dim]
        if (reason := fma2d.why_not(backend, q)) is None:
            out = fma2d.multipole_attention(q, q, q, cell_size=2, rank=4, variant="linear", backend=backend)
            out.cpu()  # what fails on a GPU fails when the result is asked for
    except Exception as error:  # whatever a device that does not work raises, as with a driver that does not fit
        reason = (str(error) or type(error).__name__).splitlines()[0]
    return "runs" if reason is None else f"does not run: {reason}"


def doctor():
    """Print the report."""
    rows = [("fma2d", fma2d.__version__), ("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, package_line(name)) for name in PACKAGES]
    for device, text in devices():
        rows.append((str(device), text))
        rows += [(f"{device}/{backend}", backend_line(backend, device)) for backend in BACKENDS]
    if not torch.cuda.is_available():
        rows.append(("cuda", f"no device (torch is built for CUDA {torch.version.cuda or 'no version'})"))
    for name, text in rows:
        print(f"{name:<16} {text}")


def run(words, parser):
    """Run a script, or with -m a module, as Python itself would; fma2d's models are registered with timm by then."""
    is_module = words[:1] == ["-m"]
    name, *arguments = words[is_module:] or [None]
    if name is None or (name.startswith("-") and not is_module):
        parser.error("name a script, or -m and a module")
    sys.argv = [name, *arguments]
    if is_module:
        try:
            found = util.find_spec(name)
        except (ModuleNotFoundError, ValueError):
            found = None
        if found is None:
            parser.error(f"there is no module {name}")
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif not os.path.exists(name):
        parser.error(f"there is no script {name}")
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(name))
        runpy.run_path(name, run_name="__main__")


def main(argv=None):
    """Entry point of `python -m fma2d`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m fma2d", description="Fast Multipole Attention for PyTorch")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what runs on this machine, how to get the rest")
    text = "run a program that knows models by their names only, as timm's train.py, with fma2d's models there"
    program = commands.add_parser("run", help=text, usage="python -m fma2d run [-m] PROGRAM [ARGS ...]")
    program.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module; the rest is for it")
    if argv[:1] == ["run"] and argv[1:] not in (["-h"], ["--help"]):
        run(argv[1:], program)
    else:
        parser.parse_args(argv)
        doctor()


if __name__ == "__main__":
    main()
