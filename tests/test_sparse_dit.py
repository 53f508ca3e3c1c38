"""SparseDiT against numbers of its public release, against the plain DiT, and on grids that are not square."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from dcdit.checkpoints import load_sparsedit
from dcdit.checkpoints.systems import sparse_key
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model import PlainDiT, SparseDiT, SparseDiTConfig
from dcdit.model.sparse_dit import pool, upsample
from dcdit_kernels import use_backend

DATA = Path(__file__).parent / "data" / "systems"
TINY = {"hidden_size": 32, "num_heads": 2, "num_classes": 5, "input_size": (14, 6)}


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "sparse_a.io.safetensors")


def released():
    return load_file(DATA / "sparse_a.state-1of2.safetensors") | load_file(DATA / "sparse_a.state-2of2.safetensors")


def model():
    return load_sparsedit(released(), num_heads=4, sparse_size=4)


def close(actual, wanted, bound, what):
    error = float((actual.detach() - wanted).norm() / wanted.norm())
    assert error <= bound, f"{what}: {error:.1e} > {bound}"


def block_outputs(net):
    """Each block's output (B, N, D) by our name, filled by a forward."""
    seen = {}

    def keep(name):
        def hook(module, inputs, stream):
            packing = inputs[2]
            seen[name] = stream.hidden(packing).unflatten(0, (packing.batch_size, -1))

        return hook

    for name, module in net.named_modules():
        if hasattr(module, "adaln") and module is not net:
            module.register_forward_hook(keep(name))
    return seen


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_release_outputs_and_gradients(golden, backend):
    net = model()
    seen = block_outputs(net)
    x = golden["in/x"].clone().requires_grad_()
    with use_backend(backend):
        out = net(x, golden["in/t"], golden["in/y"])
    loss = (out * golden["in/loss_weight"]).sum() / len(x)
    loss.backward()
    close(out, golden["out"], 1e-5, "out")
    close(loss, golden["loss"], 1e-5, "loss")
    with safe_open(DATA / "sparse_a.io.safetensors", "pt") as file:
        order = json.loads(file.metadata()["block_order"])
    assert [sparse_key(f"{name}.")[:-1] for name in order] == list(seen) and len(order) == net.config.depth == 16
    for name in order:
        close(seen[sparse_key(f"{name}.")[:-1]], golden[f"act/{name}"], 1e-5, name)
    close(x.grad, golden["grad_in/x"], 3e-5, "gradient of x")
    check_gradients(net, golden, "")


def check_gradients(net, golden, prefix):
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    norms = {
        key.removeprefix(f"{prefix}gradnorm/"): v for key, v in golden.items() if key.startswith(f"{prefix}gradnorm/")
    }
    assert {sparse_key(key) for key in norms} == grads.keys()
    for key, norm in norms.items():
        close(grads[sparse_key(key)].norm(), norm, 3e-5, f"norm of the gradient of {key}")
    for key, wanted in golden.items():
        if key.startswith(f"{prefix}grad/") and "final_layer.linear" not in key:  # rows in another order
            close(grads[sparse_key(key.removeprefix(f"{prefix}grad/"))], wanted, 3e-5, key)


@pytest.mark.parametrize("size", [3, 6, 8])
def test_release_at_other_sizes(golden, size):
    net = model()
    seen = block_outputs(net)
    out = net(golden["in/x"], golden["in/t"], golden["in/y"], sparse_size=size)
    ((out * golden["in/loss_weight"]).sum() / len(out)).backward()
    close(out, golden[f"size{size}/out"], 1e-5, "out")
    for ours, theirs in (("generate", "token_merge_blocks.0"), ("recover", "token_recover_blocks.0")):
        close(seen[f"groups.0.{ours}"], golden[f"size{size}/act/dumbbell_blocks.0.{theirs}"], 1e-5, theirs)
    check_gradients(net, golden, f"size{size}/")


def test_eps():
    """Tokens so small that LayerNorm's eps counts."""
    golden, net = load_file(DATA / "sparse_a.io.safetensors"), model()
    x, c = golden["probe_eps/x"], golden["probe_eps/c"]
    from dcdit.model.blocks import Stream
    from dcdit.model.dit_shell import dense_packing

    packing = dense_packing(len(x), x.shape[1], x.device)
    out = net.top[0](Stream(x.flatten(0, 1)), F.silu(c), packing).hidden(packing)
    close(out, golden["probe_eps/normal_blocks.0"].flatten(0, 1), 1e-5, "block")


def test_maps():
    """Pooling windows and upsampling tables of every grid of the release."""
    maps = load_file(DATA / "sparse_maps.safetensors")
    assert len(maps) > 10
    for key, wanted in maps.items():
        kind, sizes = key.split("/")
        g, s = (int(part[1:]) for part in sizes.split("_"))
        if kind == "pool":
            got = pool(torch.eye(g), (g, 1), (s, 1))
        else:
            got = upsample(torch.arange(float(s))[:, None], (s, 1), (g, 1)).flatten().int()
        assert torch.allclose(got, wanted), key


@pytest.mark.parametrize("size", [(7, 3), (3, 2), (1, 1), (5, 3)])
def test_uneven_grids_against_float64(size):
    """A formula in float64 of one group on a 7×3 grid, one sample alone and several."""
    torch.manual_seed(1)
    net = redrawn(SparseDiT(SparseDiTConfig(**TINY, pooling=1, groups=1, sparse=1, top=0, sparse_size=size)))
    x, t, y = torch.randn(3, 4, 14, 6), torch.tensor([3.0, 500.0, 999.0]), torch.tensor([0, 5, 2])
    out = net(x, t, y)
    close(out, by_hand(net, x, t, y, size), 1e-5, "out")
    close(net(x[1:2], t[1:2], y[1:2]), out[1:2].detach(), 1e-6, "one sample")


def redrawn(net):
    """adaLN and head of a fresh model are small; here every part counts."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def by_hand(net, x, t, y, size):
    net, (gh, gw), (sh, sw) = net.double(), net.grid, size
    lin = F.linear
    c = F.silu(net.time_embed(t.double()) + net.class_embed.weight[y])

    def norm(h, shift, scale):
        var, mean = torch.var_mean(h, -1, correction=0, keepdim=True)
        return (h - mean) / (var + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    def heads(h):
        return h.unflatten(-1, (2, -1)).transpose(1, 2)

    def attend(q, k, v):
        score = heads(q) @ heads(k).transpose(-1, -2) / 16**0.5
        return (score.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)

    def block(b, h, mix):
        s1, k1, g1, s2, k2, g2 = lin(c, b.adaln[1].weight, b.adaln[1].bias).chunk(6, 1)
        h = h + g1[:, None] * b.proj(mix(lambda z: norm(z, s1, k1), h))
        inner = b.fc1(norm(h, s2, k2))
        return h + g2[:, None] * b.fc2(F.gelu(inner, approximate="tanh"))

    h = net.stem(x.double()).flatten(2).transpose(1, 2) + net.pos_embed
    b = net.pooling[0]
    h = block(b, h, lambda mod, z: b.v(mod(z)).mean(1, keepdim=True))
    g = net.groups[0]
    windows = [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in ((gh, sh), (gw, sw))]
    cells = h.unflatten(1, (gh, gw))
    pooled = torch.stack([cells[:, a:b, c:d].mean((1, 2)) for a, b in windows[0] for c, d in windows[1]], 1)
    kv = lambda b, z: b.kv(z).chunk(2, -1)  # noqa: E731
    s = block(g.generate, pooled, lambda mod, z: attend(g.generate.q(mod(z)), *kv(g.generate, mod(h))))
    s = block(g.sparse[0], s, lambda mod, z: attend(*g.sparse[0].qkv(mod(z)).chunk(3, -1)))
    index = [i * sh // gh * sw + j * sw // gw for i in range(gh) for j in range(gw)]
    merged = g.merge_sparse(s[:, index]) + g.merge_dense(h)
    h = block(g.recover, merged, lambda mod, z: attend(g.recover.q(mod(z)), *kv(g.recover, mod(s))))
    h = block(g.dense[0], h, lambda mod, z: attend(*g.dense[0].qkv(mod(z)).chunk(3, -1)))
    shift, scale = lin(c, net.adaln[1].weight, net.adaln[1].bias).chunk(2, 1)
    out = net.head(norm(h, shift, scale)).transpose(1, 2).unflatten(2, (gh, gw))
    net.float()
    return F.pixel_shuffle(out, net.patch).detach().float()


@pytest.mark.parametrize("groups", [0, 2])
def test_full_density_is_the_plain_dit(groups):
    """Without pooling and at the dense size, the merge taking the sparse tokens alone, the blocks are a DiT's."""
    config = SparseDiTConfig(**TINY, pooling=0, groups=groups, top=2, sparse_size=(7, 3))
    plain = redrawn(PlainDiT(as_plain(config), config.patch))
    net = SparseDiT.from_dit(plain, config)
    for group in net.groups:
        torch.nn.init.eye_(group.merge_sparse.weight)
        torch.nn.init.zeros_(group.merge_dense.weight)
    x, t, y = torch.randn(2, 4, 14, 6), torch.tensor([3.0, 700.0]), torch.tensor([0, 5])
    with torch.no_grad():
        close(net(x, t, y), plain(x, t, y), 1e-5, "out")


def test_starts_from_a_dit():
    """Slices of qkv, merge layers 0 and identity."""
    config = SparseDiTConfig(**TINY, pooling=1, groups=1, top=1, sparse_size=(2, 2))
    plain = PlainDiT(as_plain(config), config.patch)
    net = SparseDiT.from_dit(plain, config)
    q, k, v = plain.blocks[1].qkv.weight.chunk(3)
    assert torch.equal(net.pooling[0].v.weight, plain.blocks[0].qkv.weight[64:])
    assert torch.equal(net.groups[0].generate.q.weight, q)
    assert torch.equal(net.groups[0].generate.kv.weight, torch.cat([k, v]))
    assert torch.equal(net.top[0].qkv.weight, plain.blocks[7].qkv.weight)
    assert torch.equal(net.groups[0].merge_dense.weight, torch.eye(32)) and not net.groups[0].merge_sparse.weight.any()
    with pytest.raises(ConfigError, match=r"depth 8.*has 7"):
        SparseDiT.from_dit(PlainDiT(as_plain(config, 7), config.patch), config)


def as_plain(config, depth=None):
    from dcdit.model import DyDiTConfig

    sizes = {key: getattr(config, key) for key in ("input_size", "patch", "hidden_size", "num_heads", "num_classes")}
    return DyDiTConfig(**sizes, depth=config.depth if depth is None else depth)


def test_bad_input():
    state = released()
    with pytest.raises(CheckpointError, match="expected the weights of SparseDiT, these look like DyDiT"):
        load_sparsedit(load_file(DATA / "dydit_a.state.safetensors"), num_heads=4, sparse_size=4)
    with pytest.raises(ConfigError, match=r"sparse_size must be at most the grid of tokens, \(8, 8\), got \(9, 9\)"):
        load_sparsedit(state, num_heads=4, sparse_size=9)
    with pytest.raises(ConfigError, match="num_heads, 5"):
        load_sparsedit(state, num_heads=5, sparse_size=4)
    state.pop("dumbbell_blocks.0.token_merge_blocks.0.attn.q.bias")
    with pytest.raises(CheckpointError, match=r"missing keys in checkpoint: groups\.0\.generate\.q\.bias"):
        load_sparsedit(state, num_heads=4, sparse_size=4)
    net = SparseDiT(SparseDiTConfig(**TINY, sparse_size=2))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4, 14, 6\), got \(1, 4, 6, 14\)"):
        net(torch.zeros(1, 4, 6, 14), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ConfigError, match="one or two positive integers"):
        net(torch.zeros(1, 4, 14, 6), torch.zeros(1), torch.zeros(1, dtype=torch.long), sparse_size=0)
