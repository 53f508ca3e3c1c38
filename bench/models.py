"""The problems of the model groups: a forward pass, a training step, a sampling loop; DC-DiT beside the plain DiT."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dcdit import DCDiT
from dcdit.model.flops import dcdit_flops, dit_flops
from dcdit.model.plain_dit import PlainDiT
from dcdit.model.precision import float32_products
from dcdit.model.routing import Routing
from dcdit.training.objectives import ratio_loss
from dcdit_kernels import use_backend

from .baselines.model import dcdit_forward, dit_block
from .cases import Case
from .operators import routed_prob
from .problem import Family, Problem, Tensors, Variant, Work
from .replay import CHAIN, Chain, Replay, ReplayedStep, Shipped, ShippedStep

SAMPLING_STEPS = {"cpu": 4, "cuda": 8}
UNCOND_DROP = 0.9  # ρ of the unconditional half of Lite-CFG
GUIDANCE = 1.25
RATIO_WEIGHT = 0.03


class FixedRouter(nn.Module):
    """The model's router with its values replaced, so that exactly the share of the case is kept with random weights.

    It costs as much as the router, and its gradient reaches the router.
    """

    def __init__(self, inner: nn.Module, prob: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.prob = prob  # not a buffer: it stays in float32 whatever the model is cast to

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.fix(self.inner(h, c))

    def fix(self, prob: torch.Tensor) -> torch.Tensor:
        repeats = prob.shape[0] // self.prob.shape[0]  # guidance runs two halves in one batch
        return self.prob.repeat(repeats, 1) + (prob - prob.detach())


class Nets:
    """One network in every requested dtype, with equal weights; `finish` is applied to each."""

    def __init__(self, master: nn.Module, finish: Callable[[nn.Module], nn.Module] = lambda net: net) -> None:
        self.master, self.finish, self.made = master, finish, {}
        self._optimizer: torch.optim.Optimizer | None = None

    def __getitem__(self, dtype: torch.dtype) -> nn.Module:
        if dtype not in self.made:
            self.made[dtype] = self.finish(cast_net(copy.deepcopy(self.master), dtype))
        return self.made[dtype]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW of the float32 weights, which leaves them as they are; made at the first step, after the gate."""
        if self._optimizer is None:
            parameters = self[torch.float32].parameters()
            self._optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
        return self._optimizer


def cast_net(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights in `dtype`; the method's float32 parts stay float32 when `dtype` is narrower."""
    wide = {name: copy.deepcopy(getattr(net, name)) for name in ("router", "residual_proj") if hasattr(net, name)}
    net.to(dtype)
    for name, module in wide.items():
        setattr(net, name, module if dtype.itemsize < 4 else module.to(dtype))
    return net


def make_net(kind: type[nn.Module], case: Case, device: str) -> nn.Module:
    """A network in float32 with random weights that the dtype of the case holds, none zero, so that no part is idle;
    a DC-DiT routes as the case says."""
    torch.manual_seed(0)
    with torch.device(device):
        net = kind(case.config)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if isinstance(net, DCDiT):
        net.router = FixedRouter(net.router, routed_prob(case, device))
    return cast_net(cast_net(net, case.torch_dtype), torch.float32)


def predict_dcdit(net: DCDiT, x, t, y, drop_fraction, routed: bool = False, **limits: int):
    """The prediction of the model as shipped; with `routed` also boundary_prob. Given `capacity`, no host waits."""
    if not routed:
        return net(x, t, y, drop_fraction, **limits)
    out, routing = net(x, t, y, drop_fraction, return_routing=True)
    return out, routing.boundary_prob


def predict_reference(net: DCDiT, *args, **kwargs):
    """The model as shipped on the reference operators."""
    with use_backend("reference"):
        return predict_dcdit(net, *args, **kwargs)


def predict_plain(net: DCDiT, x, t, y, drop_fraction, routed: bool = False, block=dit_block, pad: bool = False):
    """The straightforward operators on the model's weights; with `pad` also attention."""
    out, prob = dcdit_forward(net, x, t, y, drop_fraction, block, pad)
    return (out, prob) if routed else out


def predict_dit(net: PlainDiT, x, t, y, drop_fraction, routed: bool = False):
    """The plain DiT, which drops nothing and has no router."""
    out = net(x, t, y)
    return (out, None) if routed else out


def compile_parts(net: nn.Module) -> nn.Module:
    """As an owner would compile: the blocks of the plain DiT; of a DC-DiT the convolutions and the MLPs between the
    operators. Blocks are alike, so that one compilation serves all."""
    if isinstance(net, PlainDiT):
        for block in net.blocks:
            block.compile(dynamic=True)
        return net
    net.encoder.compile()
    net.decoder.compile()
    for block in net.main.blocks:
        block.mlp = torch.compile(block.mlp, dynamic=True)
    return net


def model_problem(case: Case, device: str, compiled: bool) -> Problem:
    """`dcdit`, `plain` operators on its weights, and `DiT/2`, the plain DiT of equal backbone."""
    task = {"forward": Forward, "train": Train, "sample": Sample}[case.group](case, device)
    tokens, longest = task.tokens()
    nets = Nets(make_net(DCDiT, case, device))
    master = make_net(PlainDiT, case, device)
    networks = {
        "dcdit": (nets, predict_dcdit),
        "dcdit reference": (nets, predict_reference),
        "plain": (nets, predict_plain),
        "DiT/2": (Nets(master), predict_dit),
    }
    if compiled:
        torch._dynamo.reset()  # functions compiled for other cases count towards the limit
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # past the limit a "compiled" variant would run eager
        block = torch.compile(dit_block, dynamic=True)
        networks["plain compiled"] = nets, functools.partial(predict_plain, block=block)
        networks["dcdit compiled"] = Nets(nets.master, compile_parts), predict_dcdit
        networks["DiT/2 compiled"] = Nets(master, compile_parts), predict_dit
    if case.group == "forward":
        networks["plain padded"] = nets, functools.partial(predict_plain, pad=True)
    graphs = TrainGraph(case, device) if case.group == "train" else task
    if device == "cuda" and case.group == "train":
        networks |= {f"{name} graph": networks[name] for name in ("dcdit", "DiT/2")}
    elif device == "cuda":
        for end in ("", " compiled") if compiled else ("",):
            ours, plain = networks["dcdit" + end][0], networks["DiT/2" + end][0]
            networks[f"dcdit{end} graph"] = ours, Shipped(capacity=tokens, max_seqlen=longest)
            networks[f"DiT/2{end} graph"] = plain, Replay(predict_dit)
        networks[CHAIN] = nets, Chain(capacity=tokens, max_seqlen=longest)
    variants = {}
    for name, network in networks.items():
        family = "DiT/2" if "DiT" in name else ""
        own = graphs if name.endswith(" graph") else task
        variants[name] = Variant(functools.partial(own.run, *network), family=family, timed=own.step(*network))
    families = {"": Family(reference="dcdit reference"), "DiT/2": Family(yardstick="DiT/2", reference="DiT/2")}
    ours, dit = task.gflop()
    work = Work(sum(p.nbytes for p in nets[case.torch_dtype].parameters()), 1e9 * case.batch * ours, tokens)
    gflop = {name: dit if "DiT" in name else ours for name in variants}
    reduction = case.side**2 * (case.batch if case.group == "train" else 1)  # weights sum over the batch
    return Problem(task.inputs, variants, families, work, reduction, clock="wall", gflop=gflop)


def products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """As training and sampling have it in half precision: a GPU computes the residual path in TF32."""
    return float32_products("high" if dtype.itemsize < 4 else None)


class Forward:
    """One forward pass."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device, config = case, device, case.config
        torch.manual_seed(1)
        x = torch.randn(case.batch, config.in_channels, *config.input_size, device=device).to(case.torch_dtype)
        t = 1000 * torch.rand(case.batch, device=device)
        self.inputs: Tensors = (x, t, torch.randint(config.num_classes, (case.batch,), device=device))

    def run(self, nets: Nets, predict: Callable, x, t, y) -> torch.Tensor:
        with products(x.dtype):
            return predict(nets[x.dtype], x, t, y, self.case.drop_fraction)

    def step(self, nets: Nets, predict: Callable) -> Callable[[], object] | None:
        return None

    def tokens(self) -> tuple[int, int]:
        """Packed rows of the whole batch and of its longest sample."""
        kept = kept_tokens(self.case, self.case.drop_fraction)
        return self.case.batch * kept, kept

    def gflop(self) -> tuple[float, float]:
        """GFLOP per image of DC-DiT and of the plain DiT, all that runs counted."""
        return gflops(self.case, self.case.drop_fraction)


class Train(Forward):
    """Squared error to a fixed target plus the ratio loss; the step that is timed adds autocast and AdamW.

    The gate sees the loss and the gradients of all weight matrices in float32: bfloat16 is gated operator by operator
    and on the forward pass, where its noise has not gone through the whole network twice.
    """

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.inputs = (self.inputs[0].float(), *self.inputs[1:])

    def run(self, nets: Nets, predict: Callable, x, t, y) -> Tensors:
        net = nets[x.dtype]
        with torch.enable_grad():
            loss = self.loss(net, predict, x, t, y)
            weights = [p for p in net.parameters() if p.dim() > 1]
            return loss.detach(), *torch.autograd.grad(loss, weights)

    def loss(self, net: nn.Module, predict: Callable, x, t, y) -> torch.Tensor:
        return self.distance(*predict(net, x, t, y, self.case.drop_fraction, routed=True))

    def distance(self, out: torch.Tensor, prob: torch.Tensor | None) -> torch.Tensor:
        loss = (
            (out - torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(self.inputs[0].dtype))
            .square()
            .mean()
        )
        if prob is not None:
            loss = loss + RATIO_WEIGHT * ratio_loss(prob, prob > 0.5, self.case.config.target_ratio)
        return loss

    def step(self, nets: Nets, predict: Callable) -> Callable[[], object]:
        x, t, y = self.inputs

        def step() -> None:
            net = nets[torch.float32]
            with products(self.case.torch_dtype):
                with self.autocast():
                    loss = self.loss(net, predict, x, t, y)
                loss.backward()
            nets.optimizer.step()
            nets.optimizer.zero_grad()

        return step

    def autocast(self) -> AbstractContextManager[None]:
        """As the step that is timed has it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.case.torch_dtype != torch.float32)

    def gflop(self) -> tuple[float, float]:
        ours, dit = super().gflop()
        return 3 * ours, 3 * dit


class TrainGraph(Train):
    """`Train` with forward and backward as CUDA graphs: as in `dcdit train cuda_graph=true`, and of the plain DiT.

    The host launches the optimiser; a DC-DiT's waits for the number of tokens, as in `dcdit train`.
    """

    def run(self, nets: Nets, predict: Callable, x, t, y) -> Tensors:
        net = nets[x.dtype]
        loss = self.backward(net, predict, (x, t, y))()
        grads = [p.grad for p in net.parameters() if p.dim() > 1]
        net.zero_grad()
        return loss, *grads

    def step(self, nets: Nets, predict: Callable) -> Callable[[], object]:
        made = []

        def step() -> None:
            net = nets[torch.float32]
            with products(self.case.torch_dtype):
                if not made:
                    made.append(self.backward(net, predict, self.inputs, self.autocast))
                made[0]()
            nets.optimizer.step()
            nets.optimizer.zero_grad()

        return step

    def backward(
        self, net: nn.Module, predict: Callable, inputs: Tensors, around: Callable = nullcontext
    ) -> Callable[[], torch.Tensor]:
        """A function that leaves the gradients of these inputs' loss in `grad`, which must be None, and returns it."""

        def losses(x, t, y, drop_fraction, **limits: int) -> tuple[dict[str, torch.Tensor], Routing]:
            with around():
                out, routing = net(x, t, y, drop_fraction, True, **limits)
                return {"loss": self.distance(out, routing.boundary_prob)}, routing

        def loss(*inputs: torch.Tensor) -> torch.Tensor:
            with around():
                return self.loss(net, predict, *inputs)

        if isinstance(net, DCDiT):
            return ShippedStep(losses, net, inputs, self.case.drop_fraction)
        return ReplayedStep(loss, net, inputs)


class Sample(Forward):
    """An Euler loop of the flow with Lite-CFG: both halves in one batch, the unconditional one on fewer tokens."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.inputs = self.inputs[0], self.inputs[2]
        self.steps = SAMPLING_STEPS[device]
        self.drop_fraction = torch.tensor([case.drop_fraction, UNCOND_DROP], device=device).repeat_interleave(
            case.batch
        )

    def run(self, nets: Nets, predict: Callable, x, y) -> torch.Tensor:
        channels, labels = x.shape[1], torch.cat([y, torch.full_like(y, self.case.config.num_classes)])
        for step in range(self.steps):
            t = torch.full((2 * len(y),), 1000 * (1 - step / self.steps), device=x.device)
            with products(x.dtype):
                out = predict(nets[x.dtype], torch.cat([x, x]), t, labels, self.drop_fraction)[:, :channels]
            cond, uncond = out.chunk(2)
            x = x - (uncond + GUIDANCE * (cond - uncond)) / self.steps
        return x

    def tokens(self) -> tuple[int, int]:
        rows, longest = super().tokens()
        return rows + self.case.batch * kept_tokens(self.case, UNCOND_DROP), longest

    def gflop(self) -> tuple[float, float]:
        halves = [gflops(self.case, drop) for drop in (self.case.drop_fraction, UNCOND_DROP)]
        return tuple(self.steps * (a + b) for a, b in zip(*halves, strict=True))


def kept_tokens(case: Case, drop_fraction: float) -> int:
    """Tokens of each sample after the tail drop."""
    kept = int((routed_prob(case, "cpu")[0] > 0.5).sum())
    return kept - int(torch.tensor(float(kept)) * torch.tensor(drop_fraction))


def gflops(case: Case, drop_fraction: float) -> tuple[float, float]:
    """GFLOP of one forward of one image through DC-DiT and through the plain DiT."""
    counted = dcdit_flops(case.config, kept_tokens(case, drop_fraction))
    return counted["total"] + counted["uncounted"], dit_flops(case.config, case.side**2 // 4)
