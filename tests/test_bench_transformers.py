"""bench.transformer_time with stand-ins for CUDA's graphs: every variant has a row, one that fails a line."""

import functools
import sys

import pytest
import torch

pytest.importorskip("diffusers")
from graph_stand_in import run_again
from test_transformer_no_host import attention, no_host  # noqa: F401

from bench import transformer_time
from dcdit.model.forward_graphs import GraphedForward

SMALL = {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}


def test_variants(monkeypatch, capsys, attention):  # noqa: F811
    def enable(model):
        if names[-1] == "a quarter kept, graph":
            raise RuntimeError("out of memory\nmore")
        model.forward = GraphedForward(model, capture=functools.partial(run_again, mode=no_host))
        return model.forward

    names, own = [], transformer_time.variant
    monkeypatch.setattr(transformer_time, "variant", lambda *args: names.append(args[-1]) or own(*args))
    monkeypatch.setattr(transformer_time, "enable_cuda_graph", enable)
    for table, small in (("SIZES", SMALL), ("LAYERS", (1, 1)), ("SIDE", 4), ("TEXT", 3)):
        monkeypatch.setitem(getattr(transformer_time, table), "cpu", small)
    monkeypatch.setitem(transformer_time.FORMS, "cpu", transformer_time.FORMS["cuda"])
    monkeypatch.setattr(sys, "argv", ["transformer_time", "--rounds", "2"])
    threads = torch.get_num_threads()
    transformer_time.main()
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    names.remove("a quarter kept, graph")
    assert [row[0].removeprefix("| ") for row in rows] == names and len(names) == 10
    assert "a quarter kept, graph: RuntimeError: out of memory\n" in out
    assert out.count("2 of 2 forwards replayed from 1 CUDA graphs, the bits of its own forward") == 3
    shares = {row[0].removeprefix("| "): float(row[1]) for row in rows}
    assert shares["half kept, graph"] == shares["half kept"] < 0.8


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--rounds", "-1"], ["--device", "cuda"]])
def test_options_that_cannot_be_used(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transformer_time", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        transformer_time.main()
    line = capsys.readouterr().err.splitlines()[-1]
    says = "expected an integer of at least 1, got" if words[0] == "--rounds" else "cuda needs a GPU"
    assert f"argument {words[0]}: {says}" in line
