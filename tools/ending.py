"""How the tools end: with a status, and with one line on stderr where there is something to say."""

import functools
import sys
from collections.abc import Callable

GOES_ON = "interrupted; the same command goes on where it stopped"
OURS = ("benchmarks", "fma2d", "research", "tools")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the name is another than that of the import


class InputError(Exception):
    """What the user gave cannot be used; the message, one line, says what is wrong and what to do."""


def ending(*errors: type[Exception], interrupted: str = "interrupted") -> Callable[[Callable], Callable[..., int]]:
    """Decorate a tool's `main`: its status is what it returns, 1 for an error that the user can act on, 130 for Ctrl-C.

    An error that the user can act on is also a package that is imported in `main` and not installed.

    Args:
        errors: whose message is all that is said, as that of `InputError`; others are bugs, with
            a traceback.
        interrupted: said for Ctrl-C; what is kept, and how to go on.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def tool(argv: list[str] | None = None) -> int:
            try:
                return main(argv) or 0
            except (InputError, *errors) as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            except ModuleNotFoundError as error:
                package = (error.name or "").partition(".")[0]
                if package in ("", *OURS):
                    raise
                distribution = DISTRIBUTIONS.get(package, package)
                print(f"error: {distribution} is not installed: pip install {distribution}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"\n{interrupted}", file=sys.stderr)
                return 130

        return tool

    return decorate
