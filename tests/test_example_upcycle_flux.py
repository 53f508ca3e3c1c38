"""examples/upcycle_flux.py: a FLUX-like model distilled by block and trained with a quarter of its image tokens."""

import runpy

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("mlxtend")


def test_each_stage_of_upcycling_lowers_the_loss(capsys):
    found = runpy.run_path("examples/upcycle_flux.py")["main"](steps=10, teacher_steps=5)
    assert found["trained"] < found["a quarter, untrained"] and found["last"] < found["first"]
    assert capsys.readouterr().out.count(":") == len(found)
