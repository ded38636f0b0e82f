"""Make the development environment: `python tools/make_venv.py REQUIREMENTS...` leaves it at `.venv`.

What is pinned is kept in a cache outside the clone, keyed by the pins and by the Python that runs this, so that several
clones share it; with `--cache ""` it is made in the clone. `.venv` is the clone's own: it takes the packages from there
and has the clone on its path, as `pip install -e .` would. An environment whose making was interrupted is made again.
Standard library only.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

VENV = Path(".venv").absolute()
STAMP = "made-by-make-venv"  # inside the environment: empty while it is being made, its key when it is whole


def key_of(requirements):
    """Name the environment by its pins and its Python; comments do not count."""
    pins = [line.split("#")[0].strip() for file in requirements for line in Path(file).read_text().splitlines()]
    text = "\n".join([*filter(None, pins), sys.version, sys.base_prefix])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_whole(folder, key):
    """Whether `folder` holds the finished environment of this key, with a Python that still starts."""
    stamp, python = folder / STAMP, folder / "bin" / "python"
    if not (stamp.exists() and stamp.read_text() == key and python.exists()):
        return False
    return subprocess.call([str(python), "-c", ""]) == 0


def make(folder, key, requirements):
    """Make the environment in place; the stamp gets its key last."""
    print(f"Making the Python environment in {folder} (once; about 6 GB, some minutes) ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / STAMP).write_text("")
    subprocess.check_call([sys.executable, "-m", "venv", str(folder)])
    # The pins are whole, so nothing is to be resolved: --no-deps keeps out whatever is not pinned.
    files = [part for file in requirements for part in ("-r", file)]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.check_call(pip + files)
    (folder / STAMP).write_text(key)


def packages_of(folder):
    """Where an environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))


def attach(folder):
    """Make `.venv` this clone's own environment, with the clone and the packages of `folder` on its path."""
    file, lines = packages_of(VENV) / "clone.pth", [str(VENV.parent)]
    if folder != VENV:
        lines.append(f"import site; site.addsitedir({str(packages_of(folder))!r})")
    text = "\n".join([*lines, ""])
    if file.exists() and file.read_text() == text and subprocess.call([str(VENV / "bin" / "python"), "-c", ""]) == 0:
        return
    if folder != VENV:
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, symlinks=True)
        (VENV / STAMP).write_text("")
    file.write_text(text)


def main():
    """Make or find the environment and link it; returns None, or what went wrong in one line."""
    if sys.version_info < (3, 11):
        return f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: name one with PYTHON=..."
    try:
        import ensurepip  # noqa: F401
        import fcntl
    except ImportError as error:
        return f"This Python cannot make environments ({error}): on Debian and Ubuntu, install python3-venv."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requirements", nargs="+")
    parser.add_argument("--cache", default="", help="folder for environments; empty: make it in the clone")
    args = parser.parse_args()

    key = key_of(args.requirements)
    folder = (Path(args.cache) / f"venv-{key}").absolute() if args.cache else VENV
    if VENV.is_dir() and not VENV.is_symlink() and not (VENV / STAMP).exists():
        return f"{VENV} is a folder that make did not make: move it away."
    try:
        if VENV.is_symlink():  # to the cache, as earlier versions had it
            VENV.unlink()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:  # two clones may come at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole(folder, key):
                make(folder, key, args.requirements)
        attach(folder)
    except OSError as error:
        return f"Could not write the environment ({error}): choose another folder with VENV_CACHE=..."
    except subprocess.CalledProcessError as error:
        return f"Making the environment stopped at: {' '.join(error.cmd)}. The reason stands above; run again to retry."


if __name__ == "__main__":
    sys.exit(main())
