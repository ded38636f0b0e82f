"""Generation: drawing, prompts of different length, ends, the command line."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fma2d.text import CausalLM, MaskedLM, load_model, save_model
from fma2d.text.generation import sample
from tools import generate as tool


def make(attention="fma", vocab=13, **options):
    options = dict(attention=attention, cell_size=2, rank=2, context=16) | options
    model = CausalLM(vocab, 16, 2, 2, **options)
    for parameter in (p for p in model.parameters() if p.dim() > 1):
        torch.nn.init.normal_(parameter, std=0.6)
    torch.nn.init.constant_(model.norm.weight, -1.0)  # or tied embeddings would make it repeat the last token
    return model


@torch.no_grad()
def greedy(model, row, count):
    """By the whole sequence each time."""
    row = row.clone()[None]
    for _ in range(count):
        row = torch.cat((row, model(row)[:, -1:].argmax(-1)), 1)
    return row[0, -count:]


@pytest.mark.parametrize("attention", ["fma", "mean", "local", "full"])
def test_greedy_generation_repeats_the_whole_forward(attention):
    """For rows of different length; each is as if alone."""
    model = make(attention, dropout=0.5).double().train()
    prompt, lengths = torch.randint(13, (3, 21)), [21, 10, 1]
    out = model.generate(prompt, 25, lengths=lengths, temperature=0)
    model.eval()
    for row, ids, length in zip(prompt, out, lengths, strict=True):
        assert torch.equal(ids, greedy(model, row[:length], 25))
        assert len(set(ids.tolist())) > 1
    assert torch.equal(torch.stack(list(model.stream(prompt, 25, lengths=lengths, top_k=1)), 1), out)


@pytest.mark.parametrize("training", [True, False])
def test_streams_side_by_side_leave_the_model_as_it_is(training):
    """The mode was changed while a stream ran: training beside it had no dropout, and a second stream, when the first
    had ended, drew with dropout."""
    model, prompts = make(dropout=0.5).train(training), torch.randint(13, (2, 1, 9))
    alone = [model.generate(prompt, 12, temperature=0) for prompt in prompts]
    first, second = (model.stream(prompt, count, temperature=0) for prompt, count in zip(prompts, (4, 12), strict=True))
    outs = [[], []]
    for step in range(12):
        outs[1].append(next(second))
        if step < 4:
            outs[0].append(next(first))
        assert model.training == training and model.blocks[0].training == training
    assert torch.equal(torch.stack(outs[0], 1), alone[0][:, :4]) and torch.equal(torch.stack(outs[1], 1), alone[1])


def test_eos_ends_rows_one_by_one():
    model = make().eval()
    prompt = torch.randint(13, (4, 3))
    free = model.generate(prompt, 30, temperature=0)
    eos = free[0, 4].item()
    out = model.generate(prompt, 30, temperature=0, eos=eos)
    ends = [row.index(eos) if eos in row else 29 for row in free.tolist()]
    assert out.shape[1] == max(ends) + 1
    for row, expected, end in zip(out, free, ends, strict=True):
        stop = min(end + 1, out.shape[1])
        assert torch.equal(row[:stop], expected[:stop]) and (row[stop:] == eos).all()


def test_drawing_follows_the_probabilities_and_is_repeatable():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(20000, -1)

    def shares(**options):
        ids = sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(ids, minlength=4) / len(ids)

    for options, expected in [
        ({}, [0.1, 0.5, 0.25, 0.15]),
        (dict(temperature=0.5), [0.029, 0.725, 0.181, 0.065]),
        (dict(temperature=0), [0, 1.0, 0, 0]),
        (dict(temperature=1e-39), [0, 1.0, 0, 0]),
        (dict(top_k=2), [0, 2 / 3, 1 / 3, 0]),
        (dict(top_k=9), [0.1, 0.5, 0.25, 0.15]),
        (dict(top_p=0.7), [0, 2 / 3, 1 / 3, 0]),
        (dict(top_p=0.01), [0, 1.0, 0, 0]),
        (dict(top_p=1.0, top_k=3), [0, 5 / 9, 2.5 / 9, 1.5 / 9]),
    ]:
        found = shares(**options)
        assert torch.allclose(found, torch.tensor(expected), atol=0.015), options
        assert torch.equal(found > 0, torch.tensor(expected) > 0)
    model, prompt = make(), torch.randint(13, (2, 5))
    first, second = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_wrong_requests_are_named_before_anything_is_computed():
    model, prompt = make(), torch.randint(13, (2, 5))
    for change, error, words in [
        (dict(temperature=-1), ValueError, "temperature"),
        (dict(temperature=float("nan")), ValueError, "temperature"),
        (dict(top_k=0), ValueError, "top_k"),
        (dict(top_k=2.5), ValueError, "top_k"),
        (dict(top_p=0.0), ValueError, "top_p"),
        (dict(top_p=1.1), ValueError, "top_p"),
        (dict(max_new_tokens=-1), ValueError, "max_new_tokens"),
        (dict(eos=13), ValueError, "eos"),
        (dict(lengths=[5]), ValueError, "lengths"),
        (dict(lengths=[5, 0]), ValueError, "lengths must be 1 to 5"),
        (dict(lengths=[5, 6]), ValueError, "lengths must be 1 to 5"),
        (dict(lengths=torch.tensor([5.0, 1.0])), ValueError, "lengths"),
        (dict(prompt="import"), TypeError, "prompt must be an int64 tensor, got str"),
        (dict(prompt=prompt.float()), TypeError, "prompt must be an int64 tensor"),
        (dict(prompt=prompt[0]), ValueError, r"prompt must be \[B, N\]"),
        (dict(prompt=prompt[:, :0]), ValueError, "at least one token a row"),
        (dict(prompt=prompt + 13), ValueError, "prompt must be 0 to 12, got"),
    ]:
        with pytest.raises(error, match=words):
            model.stream(**dict(prompt=prompt, max_new_tokens=3) | change)
    assert model.generate(prompt, 0).shape == (2, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "model.safetensors"
    save_model(path, make(vocab=256), tokens="bytes")
    return path


def test_the_command_line_streams_what_the_model_generates(checkpoint, capsysbinary, monkeypatch):
    arguments = [str(checkpoint), "--tokens", "40", "--temperature", "0", "--device", "cpu"]
    assert tool.main([*arguments, "--prompt", "naïve "]) == 0
    out, err = capsysbinary.readouterr()
    prompt = torch.tensor(list("naïve ".encode()))[None]
    ids = load_model(checkpoint).generate(prompt, 40, temperature=0)[0]
    expected = "naïve " + bytes(ids.tolist()).decode(errors="replace") + "\n"
    assert out.decode() == expected and b"40 bytes" in err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("naïve ".encode()), isatty=lambda: False))
    assert tool.main(arguments) == 0
    assert capsysbinary.readouterr()[0] == out


def test_the_command_line_says_in_one_line_what_is_wrong(checkpoint, tmp_path, capsys, monkeypatch):
    def stdin(data, tty=False):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: tty))

    def error(*arguments):
        assert tool.main([*map(str, arguments), "--device", "cpu"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    masked, tokens = tmp_path / "masked.safetensors", tmp_path / "tokens.safetensors"
    save_model(masked, MaskedLM(256, 8, 1, 1), tokens="bytes")
    save_model(tokens, make(), tokens="words")
    assert "holds a MaskedLM" in error(masked, "--prompt", "a")
    assert "over words, not over bytes" in error(tokens, "--prompt", "a")
    assert "none.safetensors" in error(tmp_path / "none.safetensors", "--prompt", "a")
    assert "not a safetensors file" in error(Path(__file__), "--prompt", "a")
    assert "the prompt is empty" in error(checkpoint, "--prompt", "")
    assert "not UTF-8" in error(checkpoint, "--prompt", os.fsdecode(b"\xff\xfe"))
    stdin(b"\xff\xfe\x00")
    assert "not UTF-8" in error(checkpoint)
    stdin(b"", tty=True)
    assert "--prompt" in error(checkpoint)
    for option, value in [("--temperature", -1), ("--top-k", 0), ("--top-p", 2), ("--tokens", -1), ("--stop", "ab")]:
        name = option.strip("-").replace("-", "_")
        assert name in error(checkpoint, "--prompt", "a", option, value)
