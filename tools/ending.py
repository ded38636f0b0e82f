"""How the tools end: with a status, and one line on stderr where there is something to say; and where they write."""

import contextlib
import errno
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

GOES_ON = "interrupted; the same command goes on where it stopped"
OURS = ("benchmarks", "fma2d", "research", "tools")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the name is another than that of the import
# Of an OSError: what the user's disk, folders and rights are the reason of, and no mistake of ours.
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


class InputError(Exception):
    """What the user gave cannot be used; the message, one line, says what is wrong and what to do."""


def ending(*errors: type[Exception], interrupted: str = "interrupted") -> Callable[[Callable], Callable[..., int]]:
    """Decorate a tool's `main`: its status is what it returns, 1 for an error that the user can act on, 130 for Ctrl-C.

    An error that the user can act on is also a package that is imported in `main` and not installed, and what cannot be
    written: to a full disk, or to a pipe that is closed.

    Args:
        errors: whose message is all that is said, as that of `InputError`; others are bugs, with
            a traceback.
        interrupted: said for Ctrl-C; what is kept, and how to go on.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def tool(argv: list[str] | None = None) -> int:
            say_anything()
            try:
                status = main(argv) or 0
                sys.stdout.flush()  # here, where an error can still be told
                return status
            except Exception as error:
                line = str(error) if isinstance(error, errors) else told(error)
                if line is None:
                    raise
                print(f"error: {line}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"\n{interrupted}", file=sys.stderr)
                return 130

        return tool

    return decorate


def say_anything() -> None:
    """Have the console take any text: what it has no character for is escaped. A log that it lost stops nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False


def told(error: Exception) -> str | None:
    """What to say of an error that the user can act on, one line; None for a bug."""
    if isinstance(error, InputError):  # that of a data loader's process is its traceback
        return str(error).strip().splitlines()[-1].rpartition("InputError: ")[2]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        distribution = DISTRIBUTIONS.get(package, package)
        return None if package in ("", *OURS) else f"{distribution} is not installed: pip install {distribution}"
    if isinstance(error, BrokenPipeError):
        drop_output()
        return "what reads the output was closed before the end"
    if isinstance(error, OSError) and error.errno in DISK:
        if error.filename is None:  # a stream, maybe the console's, which Python would write to once more at its end
            drop_output()
        return f"{error.filename or 'cannot write'}: {error.strerror}"
    return None


def drop_output() -> None:
    """Let what is still to be printed go nowhere, if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # io.UnsupportedOperation too: a stream without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_folder(path: Path) -> Path:
    """Make the folder that results will go to.

    Raises:
        InputError: now, before any work, if a megabyte cannot be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(2**20))
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise InputError(f"cannot write to the folder {path}: {reason}") from None
    return path
