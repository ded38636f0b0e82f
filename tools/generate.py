"""Goes on from a prompt with a language model of tools/train_text.py, printing as it writes.

    python tools/generate.py out/text/embedded/best.safetensors --prompt "import "
    python tools/generate.py out/text/embedded/best.safetensors --tokens 2000 --temperature 0.8 --top-p 0.95 < start.txt

The model reads and writes bytes. What is no whole UTF-8 character is printed as a replacement character. The time and
memory of a byte grow with the logarithm of the text before it.
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fma2d.text import CausalLM, load_model
from tools.ending import InputError, ending


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="file of a causal language model over bytes")
    add("--prompt", metavar="TEXT", help="what to go on from (standard input)")
    add("--tokens", type=int, default=512, metavar="N", help="bytes to write (512)")
    add("--temperature", type=float, default=1.0, metavar="X", help="below 1 safer, above 1 wilder, 0 likeliest (1)")
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest bytes only")
    add("--top-p", type=float, metavar="X", help="draw from the likeliest bytes that together reach this probability")
    add("--stop", metavar="CHAR", help="end after this ASCII character, e.g. $'\\n'")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N (a GPU if any)")
    add("--no-echo", action="store_true", help="do not print the prompt first")
    return parser.parse_args(argv)


@ending()
def main(argv: list[str] | None = None) -> None:
    """Load, check, and write; the speed goes to standard error."""
    args = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # also of the replacement character, which many consoles lack
    model, text = read_model(args.checkpoint, args.device), read_prompt(args.prompt)
    if args.stop is not None and not (len(args.stop) == 1 and args.stop.isascii()):
        raise InputError(f"--stop takes one ASCII character, got {args.stop!r}")
    prompt = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)[None].long().to(args.device)
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    options |= dict(eos=args.stop and ord(args.stop), generator=torch.Generator(args.device).manual_seed(args.seed))
    try:
        ids = model.stream(prompt, args.tokens, **options)
    except ValueError as error:
        raise InputError(error) from error
    if not args.no_echo:
        print(text, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start, first, count = time.perf_counter(), None, 0
    for token in ids:
        count += 1
        print(decoder.decode(bytes(token.tolist())), end="", flush=True)
        first = first or time.perf_counter()
    print(decoder.decode(b"", final=True))
    end = time.perf_counter()
    rate = f", then {(count - 1) / (end - first):.0f} a second" if count > 1 else ""
    print(f"{count} bytes, the first after {(first or end) - start:.2f} s{rate}", file=sys.stderr)


def read_model(path: Path, device: str) -> CausalLM:
    """The model of a checkpoint; InputError unless it is a causal one over bytes."""
    try:
        model = load_model(path, device)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; tools/train_text.py writes such files") from None
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: a device that is not there
        raise InputError(error) from error
    if not isinstance(model, CausalLM):
        raise InputError(f"{path} holds a {type(model).__name__}; only a CausalLM writes text")
    if model.note.get("tokens") != "bytes":
        raise InputError(f"{path} is of a model over {model.note.get('tokens', 'unknown tokens')}, not over bytes")
    return model


def read_prompt(prompt: str | None) -> str:
    """The prompt, from standard input where none is given; InputError where it is empty or no UTF-8."""
    if prompt is None and sys.stdin.isatty():
        raise InputError("there is no prompt: give --prompt TEXT, or text on standard input")
    try:
        text = sys.stdin.buffer.read().decode() if prompt is None else prompt
        text.encode()  # a command line's bytes that are no UTF-8 are told by this
    except UnicodeError as error:
        raise InputError(f"the prompt is not UTF-8 text: {error}") from error
    if not text:
        raise InputError("the prompt is empty: give at least one character to go on from, such as a newline")
    return text


if __name__ == "__main__":
    sys.exit(main())
