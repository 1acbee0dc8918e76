"""Small networks with random state, and the plain way to compute what a chain computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.ops import FrozenBatchNorm2d
except ImportError:  # a machine with a GPU may have PyTorch alone: the same networks of our own parts
    from fused_resnet.plain import BasicBlock, Bottleneck

    FrozenBatchNorm2d = nn.BatchNorm2d

from fused_resnet import backends, count_launches, measure
from fused_resnet.chain import BUFFERS, Chain, Layer, Pool
from fused_resnet.launch import Launch
from fused_resnet.plan import Plan


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Random affine parameters (some gammas negative) and running statistics (var 0.5 to 2, means not zero); in place.

    Fresh BatchNorms are the identity, and would hide a fold that forgets one of the four vectors.
    """
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
            if module.running_mean is not None:
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.weight[torch.rand_like(module.weight) < 0.25] *= -1
                module.bias.uniform_(-0.5, 0.5)
    return model


def look_at_launches(patch: pytest.MonkeyPatch, look: Callable[[Launch, Mapping[str, Tensor]], object]) -> None:
    """Call ``look(launch, operands)`` in front of every launch, whatever runs it."""
    program = backends._program

    def looking(run: Callable[..., Any]) -> Callable[..., Any]:
        def running(launch: Launch, operands: Mapping[str, Tensor], *rest: Any) -> Any:
            look(launch, operands)
            return run(launch, operands, *rest)

        return running

    def looked_at(plan: Plan, name: str, joined: bool = False) -> Any:
        return tuple(replace(step, run=looking(step.run)) for step in program(plan, name))

    patch.setattr(backends, "_program", looked_at)


def projection(channels: int, filters: int, stride: int = 1) -> nn.Sequential:
    """A projection shortcut as torchvision's models have it."""
    return nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))


class TinyNet(nn.Module):
    """A stem, a BasicBlock with a projection, a Bottleneck without one, a classifier: torchvision's parts in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.basic = BasicBlock(8, 16, 2, projection(8, 16, 2))
        self.bottleneck = Bottleneck(16, 4)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bottleneck(self.basic(self.stem(x))).mean((2, 3)))


#: Launches of one forward of a fused TinyNet in eval mode: stem 2, BasicBlock with projection 3, Bottleneck 3.
TINY_LAUNCHES = 8


def tiny() -> TinyNet:
    """A TinyNet with random state in eval mode."""
    net = TinyNet()
    randomise(net)
    return net.eval()


#: Launches of one forward of a fused TinyNet in training mode: stem 2, BasicBlock with projection 4, Bottleneck 4.
TINY_TRAINING_LAUNCHES = 10


def images(n: int = 2, h: int = 33, w: int = 35) -> Tensor:
    """Small images with odd sides."""
    return torch.randn(n, 3, h, w)


def launches(model: nn.Module, x: Tensor) -> int:
    """How many launches run when ``model`` is called."""
    with count_launches() as log:
        model(x)
    return len(log)


def copies(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two equal models, one to leave alone and one to fuse."""
    return copy.deepcopy(model), copy.deepcopy(model)


# ---------------------------------------------------------------------------------------------- chains


def _conv(name: str, channels: int, filters: int, kernel: int = 3, **options: object) -> Layer:
    defaults = {"padding": (kernel // 2, kernel // 2), "norm": True, "affine": True, "eps": 1e-5, "activation": "relu"}
    return Layer(name, filters, channels, (kernel, kernel), **{**defaults, **options})


_PLAIN = {"norm": False, "affine": False, "eps": 0.0}


def _entry(channels: int, **options: object) -> Layer:
    defaults = {"norm": True, "affine": True, "eps": 0.03, "activation": "relu", "weights": False}
    return Layer("e", channels, channels, (1, 1), **{**defaults, **options})


#: One chain for each thing a chain can have: name -> (chain, rows, columns).
CHAINS: dict[str, tuple[Chain, int, int]] = {
    "store": (Chain((_conv("a", 3, 5, activation="identity", **_PLAIN),)), 7, 9),
    "store_relu": (Chain((_conv("a", 3, 5, **_PLAIN),)), 7, 9),
    "bias": (Chain((_conv("a", 3, 5, bias=True, activation="identity", **_PLAIN),)), 7, 9),
    "bias_relu": (Chain((_conv("a", 3, 5, bias=True, **_PLAIN),)), 7, 9),
    "affine": (Chain((_conv("a", 3, 5, activation="identity"),)), 7, 9),
    "affine_relu": (Chain((_conv("a", 3, 5),)), 7, 9),
    "affine_with_bias": (Chain((_conv("a", 3, 5, bias=True),)), 7, 9),
    "norm_without_affine": (Chain((_conv("a", 3, 5, affine=False),)), 7, 9),
    "add": (Chain((_conv("a", 4, 4, **_PLAIN),), residual=True), 6, 5),
    "add_without_relu": (Chain((_conv("a", 4, 4, activation="identity", **_PLAIN),), residual=True), 6, 5),
    "bias_add": (Chain((_conv("a", 4, 4, bias=True, **_PLAIN), _conv("b", 4, 4, bias=True, **_PLAIN)), residual=True), 6, 5),
    "basic_with_biases": (Chain((_conv("a", 6, 4, bias=True), _conv("b", 4, 6, bias=True)), residual=True), 6, 7),
    "norm_then_bias_add": (Chain((_conv("a", 4, 4), _conv("b", 4, 4, bias=True, **_PLAIN)), residual=True), 6, 5),
    "basic": (Chain((_conv("a", 6, 6), _conv("b", 6, 6)), residual=True), 9, 7),
    "pre_add_identity": (Chain((_conv("a", 6, 6), _conv("b", 6, 6, activation="identity")), residual=True), 9, 7),
    "basic_projection": (
        Chain(
            (_conv("a", 4, 6, stride=(2, 2)), _conv("b", 6, 6)),
            residual=True,
            projection=_conv("d", 4, 6, 1, stride=(2, 2), activation="identity"),
        ),
        9,
        7,
    ),
    "plain_projection": (
        Chain(
            (_conv("a", 4, 6, bias=True, **_PLAIN),),
            residual=True,
            projection=_conv("d", 4, 6, 1, bias=True, activation="identity", **_PLAIN),
        ),
        5,
        6,
    ),
    "bottleneck_groups": (
        Chain((_conv("a", 8, 4, 1), _conv("b", 4, 4, groups=2), _conv("c", 4, 8, 1)), residual=True),
        5,
        8,
    ),
    "bottleneck_dilated": (
        Chain(
            (_conv("a", 6, 4, 1), _conv("b", 4, 4, dilation=(2, 2), padding=(2, 2)), _conv("c", 4, 12, 1)),
            residual=True,
            projection=_conv("d", 6, 12, 1, activation="identity"),
        ),
        7,
        6,
    ),
    "depthwise": (Chain((_conv("a", 6, 6, groups=6), _conv("b", 6, 12, 1))), 7, 6),
    "stem": (Chain((_conv("a", 3, 8, 7, stride=(2, 2)),), pool=Pool((3, 3), (2, 2), (1, 1))), 19, 17),
    "two_layers_and_pool": (Chain((_conv("a", 3, 4), _conv("b", 4, 5)), pool=Pool((2, 2), (2, 2))), 9, 8),
    "pool_without_relu": (Chain((_conv("a", 3, 4, activation="identity"),), pool=Pool((3, 3), (2, 2), (1, 1))), 9, 8),
    "no_activation_between": (Chain((_conv("a", 3, 4, activation="identity"), _conv("b", 4, 5))), 6, 7),
    "rectangles": (
        Chain(
            (
                Layer("a", 4, 3, (1, 7), (1, 2), (0, 3), norm=True, affine=True, eps=1e-3, activation="relu"),
                Layer("b", 5, 4, (5, 1), (3, 1), (2, 0), bias=True, activation="relu"),
            )
        ),
        10,
        11,
    ),
    "entry": (Chain((_conv("a", 5, 8, 1), _conv("b", 8, 4, activation="identity", **_PLAIN)), entry=_entry(5)), 6, 7),
    "entry_without_affine": (
        Chain((_conv("a", 5, 4, activation="identity", **_PLAIN),), entry=_entry(5, affine=False, activation="identity")),
        5,
        6,
    ),
    "entry_and_shortcut": (
        Chain((_conv("a", 6, 6), _conv("b", 6, 6, activation="identity", **_PLAIN)), residual=True, entry=_entry(6)),
        7,
        5,
    ),
    "entry_and_projection": (
        Chain(
            (_conv("a", 5, 6, stride=(2, 2)), _conv("b", 6, 6, activation="identity", **_PLAIN)),
            residual=True,
            projection=_conv("d", 5, 6, 1, stride=(2, 2), activation="identity", **_PLAIN),
            entry=_entry(5),
        ),
        9,
        7,
    ),
    "entry_and_late_sum": (
        Chain((_conv("a", 4, 6),), True, _conv("d", 4, 6, 1, activation="identity"), entry=_entry(4, activation="silu")),
        6,
        5,
    ),
    "entry_and_pool": (Chain((_conv("a", 5, 4),), pool=Pool((2, 2), (2, 2)), entry=_entry(5)), 8, 6),
}


def live(layer: Layer, **how: object) -> Layer:
    """The same layer with the batch's statistics, running ones tracked: an ``nn.BatchNorm2d`` in training mode."""
    options = {"batch": True, "tracked": True, "counted": True, "momentum": 0.3, **how}
    return replace(layer, **options) if layer.norm else layer  # type: ignore[arg-type]


def in_training(spec: Chain, every: int = 1, first: int = 0, memory: str = "default", **how: object) -> Chain:
    """The chain with every ``every``-th BatchNorm, from the ``first`` on, in training mode; the others stay frozen."""
    index, made = -1, []
    for layer in spec.weight_layers:
        index += layer.norm
        made.append(live(layer, **how) if index % every == first else layer)
    side = None if spec.projection is None else made.pop()
    entry = None if spec.entry is None else made.pop(0)
    return replace(spec, layers=tuple(made), projection=side, memory=memory, entry=entry)


def with_activation(spec: Chain, name: str, slope: float = 0.0) -> Chain:
    """The chain with another activation in the place of each ReLU."""

    def changed(layer: Layer) -> Layer:
        return replace(layer, activation=name, slope=slope) if layer.activation == "relu" else layer

    entry = None if spec.entry is None else changed(spec.entry)
    return replace(spec, layers=tuple(changed(layer) for layer in spec.layers), entry=entry)


def _norms(spec: Chain) -> int:
    return sum(layer.norm for layer in spec.weight_layers)


#: The chains that have BatchNorms, all of them in training mode; then with half of them frozen, one way and the other.
TRAINING_CHAINS: dict[str, tuple[Chain, int, int]] = {
    **{name: (in_training(spec), h, w) for name, (spec, h, w) in CHAINS.items() if _norms(spec)},
    **{
        f"{name}, {which} frozen": (in_training(spec, 2, first), h, w)
        for name, (spec, h, w) in CHAINS.items()
        for first, which in enumerate(("second", "first"))
        if _norms(spec) > 1
    },
}


def chain_inputs(spec: Chain, n: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Random x and parameters of a chain. Running statistics need no gradient, all else does."""
    x = torch.randn(n, spec.layers[0].channels, h, w, dtype=dtype, requires_grad=True)
    made: dict[str, Callable[[Layer], Tensor]] = {
        "w": lambda layer: torch.randn(layer.filters, layer.channels // layer.groups, *layer.kernel, dtype=dtype) * 0.4,
        "bias": lambda layer: torch.randn(layer.filters, dtype=dtype) * 0.3,
        "gamma": lambda layer: torch.randn(layer.filters, dtype=dtype).sign() * (0.5 + torch.rand(layer.filters, dtype=dtype)),
        "beta": lambda layer: torch.randn(layer.filters, dtype=dtype) * 0.3,
        "mean": lambda layer: torch.randn(layer.filters, dtype=dtype) * 0.3,
        "var": lambda layer: 0.5 + 1.5 * torch.rand(layer.filters, dtype=dtype),
        "running_mean": lambda layer: torch.randn(layer.filters, dtype=dtype) * 0.3,
        "running_var": lambda layer: 0.5 + 1.5 * torch.rand(layer.filters, dtype=dtype),
        "batches": lambda layer: torch.tensor(3),
    }
    parameters = []
    for layer in spec.weight_layers:
        for role in layer.parameter_roles:
            parameters.append(made[role](layer).requires_grad_(role not in BUFFERS))
    return x, parameters


def twin(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that share nothing with the originals, floating-point ones in ``dtype``."""
    made = []
    for tensor in tensors:
        change = dtype if tensor.is_floating_point() and dtype is not None else tensor.dtype
        made.append(tensor.detach().clone().to(change).requires_grad_(tensor.requires_grad))
    return made


def _plain_layer(layer: Layer, x: Tensor, tensors: dict[str, Tensor], layout: torch.memory_format) -> Tensor:
    bias = tensors.get(f"{layer.name}.bias")
    stride = layer.stride
    if (layer.kernel, layer.padding) == ((1, 1), (0, 0)):
        # The same convolution of only the pixels it reads. Without AVX-512 oneDNN's weights' gradient of a strided 1x1
        # convolution writes past its memory where channels are few (jit_avx2_1x1, found by valgrind; PyTorch 2.14.1).
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    y = F.conv2d(x, tensors[f"{layer.name}.w"], bias, stride, layer.padding, layer.dilation, layer.groups)
    y = y.contiguous(memory_format=layout)
    return _plain_norm(layer, y, tensors) if layer.norm else y


def _plain_norm(layer: Layer, y: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    roles = ("mean", "var", "gamma", "beta")
    if layer.batch:
        roles = ("running_mean", "running_var", "gamma", "beta")
        momentum = layer.momentum
        if layer.counted:
            tensors[f"{layer.name}.batches"].add_(1)
            momentum = 1 / tensors[f"{layer.name}.batches"].item() if momentum is None else momentum
        vectors = [tensors.get(f"{layer.name}.{role}") for role in roles]
        return F.batch_norm(y, *vectors, training=True, momentum=momentum or 0.0, eps=layer.eps)
    mean, var, gamma, beta = (tensors.get(f"{layer.name}.{role}") for role in roles)
    return F.batch_norm(y, mean, var, gamma, beta, training=False, eps=layer.eps)


#: Name -> the function as torch.nn.functional has it, with LeakyReLU's slope.
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "relu6": lambda z, slope: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, slope: F.silu(z),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, slope: F.hardswish(z),
}


def plain_chain(
    spec: Chain,
    x: Tensor,
    parameters: Sequence[Tensor],
    layout: torch.memory_format = torch.contiguous_format,
    skip: Tensor | None = None,
) -> Tensor:
    """What a chain computes, written with torch.nn.functional and nothing of ours but the description.

    In training mode the running statistics among the parameters are updated. ``layout`` is the convolutions' outputs', in which
    PyTorch's BatchNorm sums in another order.
    """
    slots = [f"{layer.name}.{role}" for layer in spec.weight_layers for role in layer.parameter_roles]
    tensors = dict(zip(slots, parameters, strict=True))
    y = seen = x
    if spec.entry is not None:
        seen = PLAIN_ACTIVATIONS[spec.entry.activation](_plain_norm(spec.entry, x, tensors), spec.entry.slope)
        y = seen
    for index, layer in enumerate(spec.layers):
        y = _plain_layer(layer, y, tensors, layout)
        if spec.residual and index == len(spec.layers) - 1:
            start = skip if skip is not None else x if spec.projection is None else seen
            y = y + (start if spec.projection is None else _plain_layer(spec.projection, start, tensors, layout))
        y = PLAIN_ACTIVATIONS[layer.activation](y, layer.slope)
    if spec.pool is not None:
        y = F.max_pool2d(y, spec.pool.kernel, spec.pool.stride, spec.pool.padding, spec.pool.dilation)
    return y


# ---------------------------------------------------------------------------------------------- memory


def saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that autograd keeps for the backward of ``model(*inputs)``, parameters and buffers left out."""
    return measure.saved_bytes(lambda: model(*inputs), (*model.parameters(), *model.buffers()))


# ---------------------------------------------------------------------------------------------- training steps


def train_step(model: nn.Module, x: Tensor, dout: Tensor | None = None) -> dict[str, Tensor]:
    """Forward and backward; a copy of all that comes out: the output, gradients of x and the parameters, the buffers.

    ``dout`` None: that of a fixed random gradient, the same for every model.
    """
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = model(x)
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(dout.to(out.dtype))
    made = {"out": out, "gradient of x": x.grad}
    made |= {f"gradient of {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: tensor.detach().clone() for key, tensor in (made | dict(model.named_buffers())).items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}
