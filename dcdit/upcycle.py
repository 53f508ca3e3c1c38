"""Upcycling: a DC-DiT that starts from a pretrained DiT and is distilled from it (arXiv 2603.06351 v1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .blocks import sincos_2d
from .checkpoints import load_state
from .config import DCDiTConfig
from .errors import CheckpointError, ConfigError
from .model import DCDiT, Routing
from .plain_dit import PlainDiT
from .release import PARTS
from .state_dict import inverse, read_state, shape_of, swap_parts, swap_prefix
from .train_config import TrainConfig
from .training import Trainer

# Prefixes of the original DiT and ours; the blocks are the release's.
_OUTER = (
    ("x_embedder.proj.", "stem."),
    ("t_embedder.", "time_embed."),
    ("y_embedder.embedding_table.", "class_embed."),
    ("final_layer.linear.", "head."),
    ("final_layer.adaLN_modulation.", "adaln."),
)
# Layers of a diffusers block and ours; its q, k and v are three.
_DIFFUSERS = (
    ("attn1.to_out.0", "proj"),
    ("ff.net.0.proj", "fc1"),
    ("ff.net.2", "fc2"),
    ("norm1.linear", "adaln.1"),
)


def from_dit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PlainDiT's state dict from that of the original DiT, such as DiT-XL-2-256x256.pt. Raises CheckpointError."""
    ours = {swap_prefix(key, _OUTER) or swap_parts(key, PARTS): tensor for key, tensor in state.items()}
    if "pos_embed" in ours:
        ours["pos_embed"] = ours["pos_embed"].squeeze(0)
    return _reorder_head(ours, to_ours=True)


def to_dit(model: PlainDiT) -> dict[str, torch.Tensor]:
    """The inverse of `from_dit`: `model` in the names and shapes of the original DiT."""
    outer, parts = inverse(_OUTER), inverse(PARTS)
    state = _reorder_head(model.state_dict(), to_ours=False)
    state["pos_embed"] = state["pos_embed"][None]
    return {swap_prefix(key, outer) or swap_parts(key, parts): tensor for key, tensor in state.items()}


def from_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PlainDiT's state dict, without the position table, from that of diffusers' DiTTransformer2DModel.

    There each block has an embedder of time and class of its own, all equal in DiT as published; ours is block 0's.
    """
    top = "transformer_blocks.0.norm1.emb."
    layers = [
        ("pos_embed.proj", "stem"),
        (f"{top}timestep_embedder.linear_1", "time_embed.mlp.0"),
        (f"{top}timestep_embedder.linear_2", "time_embed.mlp.2"),
        ("proj_out_1", "adaln.1"),
        ("proj_out_2", "head"),
    ]
    blocks = {key.split(".")[1] for key in state if key.startswith("transformer_blocks.")}
    layers += [(f"transformer_blocks.{i}.{a}", f"blocks.{i}.{b}") for i in blocks for a, b in _DIFFUSERS]
    ours = {"class_embed.weight": state[f"{top}class_embedder.embedding_table.weight"]}
    for part in ("weight", "bias"):
        ours |= {f"{mine}.{part}": state[f"{theirs}.{part}"] for theirs, mine in layers}
        for i in blocks:
            qkv = [state[f"transformer_blocks.{i}.attn1.to_{x}.{part}"] for x in "qkv"]
            ours[f"blocks.{i}.qkv.{part}"] = torch.cat(qkv)
    return _reorder_head(ours, to_ours=True)


def _reorder_head(state: dict[str, torch.Tensor], to_ours: bool) -> dict[str, torch.Tensor]:
    """DiT's output is (cell of the patch, channel), ours (channel, cell)."""
    if "head.weight" not in state or "stem.weight" not in state:
        raise CheckpointError("this is no DiT: expected final_layer.linear.weight and x_embedder.proj.weight")
    cells = shape_of(state, "stem.weight", 4)[-1] ** 2
    shape = (cells, -1) if to_ours else (-1, cells)
    heads = {}
    for key, dims in (("head.weight", 2), ("head.bias", 1)):
        found = shape_of(state, key, dims)
        if found[0] % cells:
            raise CheckpointError(f"{key}: expected rows for each of the patch's {cells} cells, found shape {found}")
        heads[key] = state[key].unflatten(0, shape).transpose(0, 1).reshape(found)
    return {**state, **heads}


def load_dit(source: str | Path, config: DCDiTConfig) -> PlainDiT:
    """The pretrained DiT that a DC-DiT of `config` can start from, in eval mode.

    `source` is a `.pt` in the original DiT's layout, or what diffusers' `from_pretrained` takes: a directory or
    Hub repository of DiTTransformer2DModel or of a whole DiTPipeline. Raises CheckpointError naming the key and the
    shapes that do not fit.
    """
    if Path(source).is_file():
        state = from_dit(read_state(source)[0])
    else:
        state = from_diffusers(_read_diffusers(source, config))
    patch, head = state["stem.weight"].shape[-1], state["head.weight"].shape[0]
    if any(n % patch for n in config.input_size):
        raise CheckpointError(f"{source} has patches of {patch}×{patch} cells, which do not fill {config.input_size}")
    # Only the blocks are used: the teacher may have learned a variance that the student does not, or not.
    model = PlainDiT(dataclasses.replace(config, learn_sigma=head == 2 * config.in_channels * patch**2), patch)
    state.setdefault("pos_embed", model.pos_embed)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval()


def _read_diffusers(source: str | Path, config: DCDiTConfig) -> dict[str, torch.Tensor]:
    from diffusers import DiTTransformer2DModel

    pipeline = (Path(source) / "model_index.json").is_file() or not Path(source).exists()
    try:
        model, loaded = DiTTransformer2DModel.from_pretrained(
            source, subfolder="transformer" if pipeline else None, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} is neither a .pt nor a DiT that diffusers can read: {reason}") from error
    if loaded["missing_keys"]:
        raise CheckpointError(f"missing keys in checkpoint: {', '.join(sorted(loaded['missing_keys'])[:4])}")
    if model.config.num_attention_heads != config.num_heads:
        raise CheckpointError(
            f"num_heads: expected {config.num_heads} as in the configuration, found {model.config.num_attention_heads}"
        )
    for name, known in (
        ("activation_fn", ("gelu-approximate",)),
        ("attention_bias", (True,)),
        ("norm_elementwise_affine", (False,)),
        ("norm_eps", (1e-6, 1e-5)),  # DiT's own, and diffusers' default, which conversions of DiT's weights have
    ):
        if model.config[name] not in known:
            raise CheckpointError(f"{name}: expected {' or '.join(map(str, known))}, found {model.config[name]}")
    return model.state_dict()


def upcycle(teacher: PlainDiT, config: DCDiTConfig) -> DCDiT:
    """A DCDiT with the teacher's blocks and frozen embedders; everything else is fresh.

    Needs `config.cond_norm`. The position table counts in the teacher's patches, the unit that the blocks know.
    """
    if not config.cond_norm:
        raise ConfigError("an upcycled model needs cond_norm=True in its configuration")
    model = DCDiT(config)
    for ours, theirs in (
        (model.main.blocks, teacher.blocks),
        (model.time_embed, teacher.time_embed),
        (model.class_embed, teacher.class_embed),
    ):
        ours.load_state_dict(theirs.state_dict())
    model.pos_embed.copy_(sincos_2d(config.hidden_size, config.input_size, teacher.patch))
    model.time_embed.requires_grad_(False)
    model.class_embed.requires_grad_(False)
    return model


def distillation_loss(
    outputs: list[torch.Tensor], targets: list[torch.Tensor], routing: Routing, patch: int
) -> torch.Tensor:
    """Distance of the student's block outputs from the teacher's, mean over the blocks; 1 for outputs of zero.

    A teacher's token stands for patch×patch cells, of which the student kept some, or none. Its state is compared with
    the mean of the student's rows inside its patch; patches without a row are left out. The rows of one patch
    stay free to differ, which is what a token for each cell is for. Squares are relative to the teacher's own, so that
    the growing residual stream of late blocks does not outweigh the others.

    Args:
        outputs: (T, D) for each block, packed by `routing.plan`.
        targets: (B, M, D) for each block, M patches in raster order.
    """
    plan = routing.plan
    height, width = plan.grid
    cell = plan.token_index.long() % plan.cells
    place = cell // width // patch * (width // patch) + cell % width // patch
    patches = height // patch * (width // patch)
    index = plan.sample_index.long() * patches + place
    count = torch.bincount(index, minlength=plan.batch_size * patches)
    seen = count.nonzero().flatten()
    losses = []
    for output, target in zip(outputs, targets, strict=True):
        sums = output.new_zeros(len(count), output.shape[1], dtype=torch.float32).index_add(0, index, output.float())
        mean, known = sums[seen] / count[seen, None], target.flatten(0, 1)[seen].float()
        losses.append((mean - known).square().mean() / known.square().mean())
    return torch.stack(losses).mean()


class Upcycler(Trainer):
    """Training that starts from `config.upcycle.source`.

    `distillation_loss` is added in the first `upcycle.distill_steps` steps. The squared distance between the two
    predictions has a share of the diffusion loss, from `upcycle.output_share` in the first step to 0 in the last.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(dataclasses.replace(config, model=dataclasses.replace(config.model, cond_norm=True)))

    def make_net(self) -> DCDiT:
        self.teacher: PlainDiT | None = load_dit(self.config.upcycle.source, self.config.model).to(self.device)
        self.targets: list[torch.Tensor] = []
        for block in self.teacher.blocks:
            block.register_forward_hook(lambda _, inputs, output: self.targets.append(output))
        net = upcycle(self.teacher, self.config.model)
        net.main.record = []
        return net

    def teach(
        self, diffusion: torch.Tensor, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, routing: Routing
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, loss, parts = self.config.upcycle, diffusion, {}
        by_block = self.step < config.distill_steps
        if not by_block:
            self.net.main.record = None
        if not (by_block or config.output_share):
            self.teacher = None
            return loss, parts
        with torch.no_grad(), self.accelerator.autocast():
            known = self.teacher(*inputs).float()
        if config.output_share:
            # Where one of them learns a variance, its channels are the second half.
            channels = self.config.model.in_channels
            parts["output_loss"] = (output[:, :channels] - known[:, :channels]).square().mean()
            share = config.output_share * (1 - self.step / self.config.steps)
            loss = torch.lerp(loss, parts["output_loss"], share)
        if by_block:
            parts["distillation_loss"] = config.distill_weight * distillation_loss(
                self.net.main.record, self.targets, routing, self.teacher.patch
            )
            loss = loss + parts["distillation_loss"]
            self.net.main.record.clear()
        self.targets.clear()
        return loss, parts
