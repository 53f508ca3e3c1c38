"""Inputs that no model, wrapper or graph can take are named."""

import dataclasses
import functools
import re

import pytest
import torch
from torch import nn

from dcdit import DynamicChunking, graphed
from dcdit.errors import ConfigError
from dcdit.model import DyDiT, PlainDiT, SparseDiT
from dcdit.model.config import PRESETS
from dcdit.model.dcdit import DCDiT
from dcdit.model.patch_dit import PatchDiT
from dcdit.model.rival_macs import dydit_on, patch_on, sparse_on

SYSTEMS = {"PlainDiT": PlainDiT, "SparseDiT": SparseDiT, "DyDiT": DyDiT, "PatchDiT": PatchDiT, "DCDiT": DCDiT}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_names_bad_inputs(name):
    """A t of one sample is not taken for all samples."""
    config = dataclasses.replace(PRESETS["digits"], input_size=(8, 8), hidden_size=64, num_heads=2)
    on = {"SparseDiT": sparse_on, "DyDiT": dydit_on, "PatchDiT": functools.partial(patch_on, scales=(1, 2))}
    model = SYSTEMS[name](on.get(name, lambda config: config)(config)).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([1, 2])
    assert model(x, t, y).shape == x.shape and model(x[:0], t[:0], y[:0]).shape == x[:0].shape
    for words, call in (
        ("t must have shape (2,), got 5.0", (x, 5.0, y)),
        ("t must have shape (2,), got (1,)", (x, t[:1], y)),
        ("y must have shape (2,), got None", (x, t, None)),
        ("y must hold integer class ids, got torch.float32", (x, t, y.float())),
        ("class ids must be in [0, 10], got 10 to 11", (x, t, y + 9)),
        ("class ids must be in [0, 10], got -1 to 0", (x, t, y - 2)),
        ("got (2, 3, 8, 8)", (x[:, :3], t, y)),
        ("got (4, 8, 8)", (x[0], t, y)),
        ("got NoneType", (None, t, y)),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            model(*call)


def test_what_is_no_model_or_no_configuration_is_named():
    with pytest.raises(ConfigError, match=r"config must be a DCDiTConfig, got .*: DCDiTConfig.from_dict makes one"):
        DCDiT({"depth": 1})
    with pytest.raises(ConfigError, match="graphed takes a DCDiT, got a Linear"):
        graphed(nn.Linear(2, 2))
    model = DCDiT(PRESETS["digits"])
    inputs = torch.randn(1, 4, 14, 14), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="routing must be a Routing for a batch of one size, got a int"):
        model(*inputs, routing=3)
    chunking = DynamicChunking([nn.Identity()], 32, (4, 6), run=lambda blocks, tokens, plan: None)
    with pytest.raises(ValueError, match=r"run must return tokens of shape \(24, 32\), got NoneType"):
        chunking(torch.randn(1, 24, 32))
    with pytest.raises(ValueError, match="h must have the router's 32 channels, got 16"):
        chunking(torch.randn(1, 24, 16))
    with pytest.raises(ValueError, match=r"router must be a module, called as router\(h\), got a function"):
        DynamicChunking([nn.Identity()], 32, (4, 6), router=lambda h: h)
    with pytest.raises(ValueError, match=r"called as block\(tokens, plan\), Linear takes 1 arguments: give run="):
        DynamicChunking([nn.Linear(32, 32)], 32, (4, 6))
