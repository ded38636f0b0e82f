"""The GPU programme: its order, what it records, and all of it in small on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import programme as gpu_programme
from benchmarks.gpu.programme import Piece, main
from benchmarks.harness import GateError
from benchmarks.peers import WINDOW, peer
from fma2d import cover

ROOT = Path(__file__).resolve().parents[1]


def test_list_names_every_piece_once_gates_first(capsys, tmp_path):
    assert main(["--list", "--out", str(tmp_path)]) == 0
    names = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    assert len(set(names)) == len(names) and names[0].startswith("gate")
    kinds = [name.split(":")[0].split()[0] for name in names]
    assert list(dict.fromkeys(kinds)) == ["gate", "tests", "card", "operator", "kernels", "models"]


def pieces(monkeypatch, calls, **results):
    """Replace the pieces; each takes its results from a list, the last for ever."""

    def piece(name, left):
        def work():
            calls.append(name)
            result = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(result, Exception):
                raise result
            return result

        return Piece(name, work)

    made = [piece(name, list(left)) for name, left in results.items()]
    monkeypatch.setattr(gpu_programme.Programme, "pieces", lambda self: made)


def test_a_wrong_result_ends_the_programme_and_a_later_call_goes_on(monkeypatch, tmp_path, capsys):
    calls, command = [], ["--smoke", "--out", str(tmp_path)]
    pieces(monkeypatch, calls, a=[True], b=[GateError("b is wrong"), True], c=[False, True])
    assert main(command) == 1
    assert calls == ["a", "b"] and "b is wrong" in capsys.readouterr().err
    assert main(command) == 0
    assert calls == ["a", "b", "b", "c", "c"]  # c needed two calls
    assert set(json.loads((tmp_path / "done.json").read_text())) == {"a", "b", "c"}
    assert main(command) == 0 and len(calls) == 5
    assert main([*command, "--piece", "0"]) == 0 and calls[5:] == ["a"]
    with pytest.raises(SystemExit):
        main([*command, "--piece", "3"])


def test_tests_that_fail_are_told_at_every_end_and_run_again_only_if_asked(monkeypatch, tmp_path, capsys):
    calls, command = [], ["--smoke", "--out", str(tmp_path)]
    pieces(monkeypatch, calls, a=[gpu_programme.TestsFailed("two of them"), True], b=[True])
    for _ in range(2):
        assert main(command) == 1
        assert calls == ["a", "b"] and "failed: two of them" in capsys.readouterr().err
    assert main([*command, "--piece", "0"]) == 0 == main(command)


def test_a_single_piece_that_is_not_done_says_so(monkeypatch, tmp_path):
    pieces(monkeypatch, [], a=[False])
    assert main(["--smoke", "--out", str(tmp_path), "--piece", "0"]) == 3
    assert not (tmp_path / "done.json").exists()


@pytest.mark.parametrize("name", ["window", "sdpa", "flex"])
def test_peers_attend_to_what_they_say(name):
    """On a ragged grid: all tokens, a window's, or those of the near field."""
    height, width, cell_size = 19, 21, 4
    q, k, v = torch.randn(3, 1, 1, height, width, 8)
    out = peer(name, height=height, width=width, cell_size=cell_size, device="cpu")(q, k, v)
    for y, x in ((0, 0), (7, 10), (18, 20)):
        keys, values = k, v
        if name == "window":
            box = (slice(None), slice(None), *(slice(n // WINDOW * WINDOW, (n // WINDOW + 1) * WINDOW) for n in (y, x)))
            short = WINDOW**2 - k[box].shape[2:4].numel()  # padding is attended to: zeros
            keys, values = (torch.cat((t[box].flatten(2, 3), t.new_zeros(1, 1, short, 8)), 2) for t in (k, v))
        elif name == "flex":
            at = torch.tensor([a * width + b for a, b in cover((height, width), cell_size, (y, x))[0]])
            keys, values = (t.flatten(2, 3)[:, :, at] for t in (k, v))
        else:
            keys, values = (t.flatten(2, 3) for t in (k, v))
        weights = (q[:, :, y, x, None] @ keys.mT * 8**-0.5).softmax(-1)
        torch.testing.assert_close(out[:, :, y, x], (weights @ values)[:, :, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_smoke(tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "benchmarks/gpu/programme.py", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"card.csv", "done.json", "model.csv", "operator.csv"}


def test_short_is_planned_for_fifteen_minutes_with_what_is_worth_most_first(capsys):
    assert main(["--short", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    names, seconds = zip(*[line.split()[:2] for line in lines], strict=True)
    assert names[:4] == ("gate", "operator", "kernels", "models") and names[-2:] == ("tests", "all")
    assert int(seconds[-1]) <= 15 * 60 - 180  # a machine takes minutes to start


def test_short_stops_at_a_wrong_result_and_goes_on_from_results_carried_in(monkeypatch, tmp_path):
    short = gpu_programme.short
    calls = []

    def work(name, outcome=None):
        def run():
            calls.append(name)
            if outcome:
                raise outcome

        return short.Part(name, 1, "", run)

    parts = [work("a"), work("b", GateError("b is wrong")), work("c")]
    monkeypatch.setattr(short.Short, "parts", lambda self: parts)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--short", "--smoke", "--out", str(first)]) == 1 and calls == ["a", "b"]
    parts[1] = work("b")
    assert main(["--short", "--smoke", "--resume", str(first), "--out", str(second)]) == 0
    assert calls == ["a", "b", "b", "c"]


@pytest.mark.slow
def test_short_smoke(tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "benchmarks/gpu/programme.py", "--short", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"done.json", "model.csv", "operator.csv"}
    assert set(json.loads((tmp_path / "done.json").read_text()).values()) == {"done"}
