"""examples/vit.py: a vision transformer with timm's names, class token and pictures of different sizes in one batch."""

import runpy

import pytest
import torch
import torch.nn.functional as F

VIT = runpy.run_path("examples/vit.py")
SIZES = (3, 5), (6, 2), (1, 4)


def pictures(dtype=torch.float64):
    return [torch.randn(1, 4 * height, 4 * width, dtype=dtype) for height, width in SIZES]


def turned(x, rows, columns):
    """Heads (H, N, W) turned by complex numbers, a quarter of their channels by the row, a quarter by the column."""
    rate = 100.0 ** -torch.arange(0, 1, 4 / x.shape[2])
    angle = torch.cat([torch.outer(rows, rate), torch.outer(columns, rate)], 1)
    turns = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * turns).flatten(2)


def dense(model, picture):
    """The transformer written out for one picture of all its patches."""
    x = model.patch_embed.proj(picture[None])[0]
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in x.shape[1:]), indexing="ij")
    places = (rows * 8 + columns).long().flatten()
    x = torch.cat([model.cls_token[0], x.flatten(1).T])
    if model.pos_embed is not None:
        x = x + model.pos_embed[0][torch.cat([torch.zeros(1).long(), 1 + places])]
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(1, (3, 2, -1)).permute(1, 2, 0, 3)
        if model.pos_embed is None:
            q, k = (torch.cat([t[:, :1], turned(t[:, 1:], rows.flatten(), columns.flatten())], 1) for t in (q, k))
        x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x[0]))


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
def test_each_picture_is_as_alone(rotary):
    """All kept: the plain transformer of each picture; half kept: the packed batch is as each picture alone."""
    model = VIT["VisionTransformer"](rotary=rotary).double()
    given = pictures()
    want = torch.stack([dense(model, picture) for picture in given])
    names = list(model.state_dict())
    chunking = VIT["add_chunking"](model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(VIT["classify"](model, given), want, rtol=0, atol=1e-7 if rotary else 1e-12)
    assert chunking.routing.plan.lengths.tolist() == [height * width for height, width in SIZES]
    chunking.drop_fraction = 0.5
    together = VIT["classify"](model, given)
    assert chunking.routing.plan.lengths.tolist() == [8, 6, 2] and not torch.allclose(together, want, rtol=1e-3)
    alone = torch.cat([VIT["classify"](model, [picture]) for picture in given])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotary", [False, True])
def test_it_learns_from_a_quarter_of_the_patches(rotary, capsys):
    before, after, kept = VIT["main"](steps=20, rotary=rotary)
    assert after < 0.7 * before and kept < 0.3
    assert "of the patches" in capsys.readouterr().out


@torch.no_grad()
def test_timms_own_transformer():
    """All kept: as timm computes it."""
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=3, embed_dim=64, depth=2, num_heads=2, init_values=0.5
    ).eval()
    torch.nn.init.normal_(model.pos_embed)
    given = [torch.randn(1, 16, 16) for _ in range(2)]
    want = model(torch.stack(given))
    VIT["add_chunking"](model)
    torch.testing.assert_close(VIT["classify"](model, given), want, rtol=0, atol=1e-5)
