"""Modules -> chain: reads a chain and its tensors off the modules a model has, or says why it cannot.

A module that was replaced, a BatchNorm that was switched to training, a hook that was added, all are seen at the next call:
:mod:`.watch` tells whether there is anything to read again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .chain import MEMORY, Chain, Layer, Pool
from .launch import DTYPES
from .plain import ZeroPad
from .watch import ALL, MATRICES, NONE

#: Dimensions of a weight layer's input -> its class. A Linear is a 1x1 convolution of images of one pixel, a Conv1d one of
#: images of one row.
LAYERS: dict[int, type[nn.Module]] = {4: nn.Conv2d, 3: nn.Conv1d, 2: nn.Linear}
_CONVOLUTIONS = {kind: dimensions for dimensions, kind in LAYERS.items()}
#: Modules whose results share memory with what they are given.
SHARING = (nn.Identity, nn.Flatten, nn.Unflatten)
#: Dimensions -> classes of the BatchNorm and of the max-pooling behind such a layer.
NORMS: dict[int, type[nn.Module]] = {4: nn.BatchNorm2d, 3: nn.BatchNorm1d, 2: nn.BatchNorm1d}
POOLS: dict[int, type[nn.Module]] = {4: nn.MaxPool2d, 3: nn.MaxPool1d}
#: Class of an activation -> its name in :mod:`.activations`.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_TENSORS = (nn.Parameter, Tensor)


class Called:
    """A layer that a forward calls as a function with tensors of its own: what the module has that computes the same.

    Attributes:
        kind: the class of that module.
        name: the place of its filters, or of the first of its vectors.
    """

    def __init__(self, kind: type[nn.Module], name: str, attributes: dict[str, Any]) -> None:
        self.kind, self.name = kind, name
        for key, value in attributes.items():
            setattr(self, key, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


#: What a layer of a chain is read off.
Module = nn.Module | Called


def identity_of(conv: Module) -> int:
    """What a convolution is told from others by: itself, or the filters that a function is called with."""
    return id(conv.weight) if isinstance(conv, Called) else id(conv)


#: PyTorch's classes that are known.
_PLAIN: dict[type[nn.Module], bool] = dict.fromkeys(
    (*_CONVOLUTIONS, *NORMS.values(), nn.SyncBatchNorm, *POOLS.values(), *_ACTIVATIONS), True
)
#: What a class may have that computes what the one it is derived from does.
_ADDED = frozenset(
    ("__init__", "__repr__", "extra_repr", "reset_parameters")
    + ("__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__", "__parameters__")
)


def class_of(module: Module | None) -> type:
    """The class whose computation a module does: one of PyTorch's that is known, if its own adds nothing but construction.

    Other subclasses may compute something else; so may PyTorch's own.
    """
    if isinstance(module, Called):
        return module.kind
    kind = type(module)
    return kind if module is None or kind in _PLAIN else _derived_from(kind)


def _derived_from(kind: type) -> type:
    for base in kind.__mro__:
        if base in _PLAIN:
            return base
        if base.__module__.startswith("torch.") or not _ADDED.issuperset(base.__dict__):
            return kind
    return kind


# PyTorch 2.11 cannot trace it. This is what torch.compiler.assume_constant_result sets, which would import the compiler here.
_derived_from._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_convolution(module: Module) -> bool:
    """A plain convolution of images or sequences, or a Linear."""
    return class_of(module) in _CONVOLUTIONS


def dimensions_of(conv: Module) -> int:
    """Dimensions of what :func:`is_convolution`'s modules take: 4 for images, 3 for sequences [N, C, L], 2 for rows [N, C]."""
    return _CONVOLUTIONS[class_of(conv)]


def is_norm(module: Module) -> bool:
    """BatchNorm over channels, a frozen one, or timm's with an activation of its own."""
    if class_of(module) in (*NORMS.values(), nn.SyncBatchNorm) or _is_frozen_norm(module):
        return True
    if not _is(module, _NORMS_WITH_ACTIVATION):
        return False
    with_activation: Any = module
    return class_of(with_activation.drop) is nn.Identity


def follows(conv: Module, module: Module) -> bool:
    """Whether ``module`` is a BatchNorm, or a max-pooling, of inputs with as many dimensions as ``conv`` gives."""
    dimensions = dimensions_of(conv)
    if is_norm(module):
        of_images = _is_frozen_norm(module) or _is(module, _NORMS_WITH_ACTIVATION)
        return class_of(module) in (NORMS[dimensions], nn.SyncBatchNorm) or (of_images and dimensions == 4)
    return class_of(module) is POOLS.get(dimensions)


def pools(conv: Module, module: Any) -> bool:
    """Whether ``module`` is a max-pooling of what ``conv`` gives that can be launched: in floor mode, without indices."""
    return not is_norm(module) and follows(conv, module) and not (module.ceil_mode or module.return_indices)


#: BatchNorms of others, by the end of the class's name and the start of its module's.
_FROZEN: dict[str, tuple[str, ...]] = {
    "FrozenBatchNorm2d": ("torchvision.ops", "transformers.models.", "detectron2.layers."),
    "FrozenBatchNormAct2d": ("timm.layers.",),
}
_NORMS_WITH_ACTIVATION: dict[str, tuple[str, ...]] = {
    "BatchNormAct2d": ("timm.layers.",),
    "SyncBatchNormAct": ("timm.layers.",),
    "FrozenBatchNormAct2d": ("timm.layers.",),
}


def _is(module: Module, classes: dict[str, tuple[str, ...]]) -> bool:
    kind = type(module)
    return any(kind.__name__.endswith(name) and kind.__module__.startswith(places) for name, places in classes.items())


def _is_frozen_norm(module: Module) -> bool:
    return _is(module, _FROZEN)


def activation_of(norm: Any) -> nn.Module | None:
    """The activation that timm's BatchNorms call by themselves."""
    return norm.act if _is(norm, _NORMS_WITH_ACTIVATION) else None


def _eps(norm: Any) -> float:
    """eps of a BatchNorm; those of transformers have 1e-5 written into their forward."""
    return getattr(norm, "eps", 1e-5)


def is_activation(module: nn.Module) -> bool:
    """An activation that exists as an epilogue."""
    return class_of(module) in _ACTIVATIONS


@dataclass
class WeightLayer:
    """Modules of one weight layer, by name for people (``conv1``), and what follows it."""

    name: str
    conv: Module
    norm: Module | None = None
    activation: nn.Module | None = None

    @property
    def modules(self) -> list[Module]:
        """The modules present, in the order in which they run."""
        return [module for module in (self.conv, self.norm, self.activation) if module is not None]


@dataclass
class Entry:
    """Modules in front of the first convolution: a BatchNorm, by name for people (``norm1``), and its activation."""

    name: str
    norm: Module
    activation: nn.Module | None = None

    @property
    def modules(self) -> list[Module]:
        """The modules present, in the order in which they run."""
        return [self.norm] if self.activation is None else [self.norm, self.activation]


@dataclass
class Parts:
    """Modules of one chain.

    ``containers`` are modules around some of them (the Sequential of a projection), which a hook may look into as well;
    ``gate`` is the convolution of a highway's gate; ``skip``: the shortcut starts from a second input; ``entry``: what stands
    in front of the first convolution; ``reason`` says why the modules are known not to be a chain; ``way``: modules on the way
    to others, whose children may be replaced.
    """

    layers: list[WeightLayer]
    residual: bool = False
    projection: WeightLayer | None = None
    pool: Module | None = None
    containers: tuple[nn.Module, ...] = ()
    reason: str | None = None
    gate: WeightLayer | None = None
    skip: bool = False
    entry: Entry | None = None
    way: tuple[nn.Module, ...] = ()

    @property
    def weight_layers(self) -> list[WeightLayer]:
        """All weight layers, behind those in a row the projection (or zero padding) and the gate."""
        return [*self.layers, *(layer for layer in (self.projection, self.gate) if layer is not None)]

    @property
    def in_a_row(self) -> list[Entry | WeightLayer]:
        """The entry, if there is one, and the layers behind it, in the order in which they run."""
        return [*([] if self.entry is None else [self.entry]), *self.layers]

    @property
    def norms(self) -> list[Module]:
        """The BatchNorms present."""
        found = [None if self.entry is None else self.entry.norm, *(layer.norm for layer in self.weight_layers)]
        return [norm for norm in found if norm is not None]

    @property
    def names(self) -> list[str]:
        """Names of the layers, the entry first."""
        return [*([] if self.entry is None else [self.entry.name]), *(layer.name for layer in self.weight_layers)]

    @property
    def modules(self) -> list[Module]:
        """All modules that the chain stands for, and what stands for functions."""
        behind = self.weight_layers[len(self.layers) :]
        modules = [module for layer in (*self.in_a_row, *behind) for module in layer.modules]
        return modules if self.pool is None else [*modules, self.pool]

    def owners(self, module: nn.Module) -> list[nn.Module]:
        """The modules inside ``module``, whose chain it is, that have the tensors of what is called as functions."""
        called = [part for part in self.modules if isinstance(part, Called) and part.name]
        found = [module.get_submodule(part.name.rpartition(".")[0]) for part in called]
        return [owner for owner in dict.fromkeys(found) if owner is not module]

    @property
    def watched(self) -> list[nn.Module]:
        """All modules that it is read off: of functions those that have their tensors, which are on the ``way``."""
        return [module for module in (*self.modules, *self.containers, *self.way) if isinstance(module, nn.Module)]


@dataclass
class Reading:
    """What :func:`read` found: a chain and the tensors it is called with, or the reason why there is none."""

    chain: Chain | None
    parameters: list[Tensor]
    reason: str | None = None
    frozen: bool = False  # a BatchNorm is torchvision's frozen one
    dimensions: int = 4  # of the input: 3 for sequences [N, C, L], 2 for rows [N, C]
    exact: bool = False  # a BatchNorm is a function, which takes inputs of other dimensions too
    batch: bool = False  # a BatchNorm normalises by the batch's statistics
    lasts: bool = False  # while the modules stay as they are: no hooks elsewhere, no process groups decide as well
    fitting: set[tuple[torch.dtype, torch.device]] = field(default_factory=set)  # inputs that the parameters were checked for
    met: set[Any] = field(default_factory=set)  # kinds of inputs that it had without gradients
    ready: dict[Any, Any] = field(default_factory=dict)  # those it had again -> the plan prepared for them, or None

    @cached_property
    def places(self) -> int:
        """Whose places the plans in ``ready`` do not look at, see :func:`.watch.unchanged`: they are given a Linear's filters
        as images, and read a BatchNorm in front as it is.
        """
        if self.chain is None or self.chain.entry is not None:
            return ALL
        return NONE if self.dimensions == 4 else MATRICES


_STATE = nn.modules.module


def hooked(module: nn.Module) -> bool:
    """Somebody watches or changes what goes in or out of this module (alone; see also :func:`hooks_everywhere`)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def hooks_everywhere() -> bool:
    """Somebody watches all modules."""
    return bool(
        _STATE._global_forward_hooks
        or _STATE._global_forward_pre_hooks
        or _STATE._global_backward_hooks
        or _STATE._global_backward_pre_hooks
    )


def _sides(value: Any, conv: Any) -> tuple[int, ...]:
    """A stride, padding or dilation as modules are made with, a tuple; set afterwards it may be a number or a list."""
    count = len(conv.kernel_size)
    sides = (value,) * count if isinstance(value, int) else tuple(value)
    return sides * count if len(sides) == 1 else sides


def _padding(conv: Any) -> tuple[int, ...] | None:
    """Padding in numbers, or None where it differs between the sides."""
    if not isinstance(conv.padding, str):
        return _sides(conv.padding, conv)
    if conv.padding == "valid":
        return tuple([0 for _ in conv.kernel_size])
    kernel_size = conv.weight.shape[2:]  # not conv's own: PyTorch does not read that either
    total = [dilation * (kernel - 1) for dilation, kernel in zip(_sides(conv.dilation, conv), kernel_size, strict=True)]
    return tuple([side // 2 for side in total]) if all(side % 2 == 0 for side in total) else None


def _windows(conv: Any) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups as a convolution of images has them."""
    if class_of(conv) is nn.Linear:
        return (1, 1), (0, 0), (1, 1), 1
    padding = _padding(conv)
    assert padding is not None
    if class_of(conv) is nn.Conv1d:
        return (1, *_sides(conv.stride, conv)), (0, *padding), (1, *_sides(conv.dilation, conv)), conv.groups
    return _sides(conv.stride, conv), padding, _sides(conv.dilation, conv), conv.groups


def _refuse_convolution(name: str, conv: Any) -> str | None:
    if not is_convolution(conv):
        return f"{name} is a {type(conv).__name__}, not an nn.Conv2d, Conv1d or Linear"
    if type(conv.weight) not in _TENSORS:
        return f"{name}'s weight is a {type(conv.weight).__name__}, a tensor subclass"
    if conv.weight.dtype not in DTYPES:
        return f"{name}'s weight is {conv.weight.dtype}, which no executor computes in"
    if isinstance(conv, Called) and (
        conv.weight.dim() != dimensions_of(conv) or not (conv.bias is None or conv.bias.dim() == 1)
    ):
        return f"{name} is given tensors of other dimensions than it has"
    if class_of(conv) is nn.Linear:
        return None
    if conv.padding_mode != "zeros":
        return f"{name} pads with {conv.padding_mode!r}, not with zeros"
    if _padding(conv) is None:
        return f"{name} pads its sides unequally (padding='same' with an even kernel)"
    return None


def _refuse_norm(place: str, conv: Any, norm: Any) -> str | None:
    """``place``: ``behind conv1``."""
    if not (is_norm(norm) and follows(conv, norm)):
        expected = NORMS[dimensions_of(conv)].__name__
        return f"the normalisation {place} is a {type(norm).__name__}, not a {expected}"
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if isinstance(norm, Called) and any(vector is not None and vector.dim() != 1 for vector in vectors):
        return f"the BatchNorm {place} is given tensors that are no vectors"
    if (norm.weight is None) != (norm.bias is None):
        return f"the BatchNorm {place} has only one of weight and bias"
    eps = _eps(norm)
    if not _is_frozen_norm(norm) and (eps < 0 or (eps == 0 and norm.training)):
        return f"the BatchNorm {place} has eps={eps}, which PyTorch may refuse"
    return None


def _refuse_entry(parts: Parts) -> str | None:
    first, entry = parts.layers[0], parts.entry
    if entry is None:
        return None
    place = f"in front of {first.name}"
    return _refuse_norm(place, first.conv, entry.norm) or _refuse_activation(place, entry.norm, entry.activation)


def _refuse_mixture(parts: Parts) -> str | None:
    """All weight layers are of one class, zero padding is of images; Linears have a BatchNorm between them, and no two layers
    the same one, whose statistics each call moves.
    """
    first = parts.layers[0]
    for layer in parts.weight_layers:
        kind, others = class_of(layer.conv), class_of(first.conv)
        if kind is not others and not (kind is ZeroPad and others is nn.Conv2d):
            return f"{layer.name} is a {type(layer.conv).__name__} where {first.name} is a {type(first.conv).__name__}"
    if class_of(first.conv) is nn.Linear and not parts.norms:
        return f"{first.name} is a Linear without a BatchNorm1d"
    if len({id(norm) for norm in parts.norms}) != len(parts.norms):
        return f"a BatchNorm behind {first.name} or a later layer is called twice"
    return None


def _refuse_activation(place: str, norm: Module | None, activation: nn.Module | None) -> str | None:
    """``place``: ``behind conv1``."""
    if activation is not None and class_of(activation) not in _ACTIVATIONS:
        known = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
        return f"the activation {place} is a {type(activation).__name__}, none of {known}"
    own = activation_of(norm)
    if own is not None and own is not activation and class_of(own) is not nn.Identity:
        return f"the {type(norm).__name__} {place} calls an activation of its own, a {type(own).__name__}"
    return None


def layer_refusal(layer: WeightLayer) -> str | None:
    """Why no chain can have this layer in it, or None."""
    reason = _refuse_convolution(layer.name, layer.conv)
    if reason is None and layer.norm is not None:
        reason = _refuse_norm(f"behind {layer.name}", layer.conv, layer.norm)
    return reason or _refuse_activation(f"behind {layer.name}", layer.norm, layer.activation)


def refusal(parts: Parts, structure_only: bool = False) -> str | None:
    """Why these modules cannot run as one chain now, or None.

    Args:
        structure_only: leave out what may be different at the next call: hooks.
    """
    if parts.reason is not None:
        return parts.reason
    for layer in parts.weight_layers:
        if type(layer.conv) is ZeroPad and layer.norm is layer.activation is None:
            continue
        reason = layer_refusal(layer)
        if reason is not None:
            return reason
    reason = _refuse_mixture(parts) or _refuse_entry(parts)
    if reason is not None:
        return reason
    pool: Any = parts.pool
    if pool is not None and not pools(parts.layers[0].conv, pool):
        return f"the pooling is {pool}, not a max-pooling of as many dimensions in floor mode without indices"
    if structure_only:
        return None
    if hooks_everywhere():
        return "a hook looks into all modules (torch.nn.modules.module.register_module_..._hook)"
    for module in (*parts.modules, *parts.containers):
        if isinstance(module, Called):
            continue
        for name in ("forward", "_conv_forward"):
            if name in module.__dict__:
                return f"{name} was replaced on its {type(module).__name__}"
        if hooked(module):
            return f"a hook looks into its {type(module).__name__}"
    return None


def check_memory(memory: str) -> str:
    """Return ``memory`` if it is a choice.

    Raises:
        ValueError: it is not.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
    return memory


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


#: ``(present, affine, eps, batch, tracked, counted, momentum, group)`` of no BatchNorm.
_NO_NORM: tuple[Any, ...] = (False, False, 0.0, False, False, False, 0.0, "")


def activation_name(module: Any) -> tuple[str, float]:
    """Name and slope of an activation, a key of :data:`.activations.ACTIVATIONS`."""
    name = "identity" if module is None else _ACTIVATIONS[class_of(module)]
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    return name, float(module.negative_slope) if name == "leaky_relu" else 0.0


def rewritable(module: Any) -> bool:
    """Whether PyTorch lets anyone write over what an activation made, though its derivative follows from that."""
    return class_of(module) in (nn.LeakyReLU, nn.ReLU6) and not module.inplace


def _layer(
    name: str,
    shape: tuple[int, ...],
    windows: tuple[Any, ...],
    bias: bool,
    norm: tuple[Any, ...],
    activation: str,
    slope: float,
    rewritable: bool,
) -> Layer:
    stride, padding, dilation, groups = windows
    kernel = (shape[2] if len(shape) == 4 else 1, shape[-1] if len(shape) > 2 else 1)
    present, affine, eps, *statistics = norm
    where = (stride, padding, dilation, groups)
    state = (present, affine, eps, activation, *statistics, slope, True, rewritable)
    return Layer(name, shape[0], shape[1] * groups, kernel, *where, bias, *state)


def _sync_group(norm: Any) -> str:
    """Name of the process group that shares the batch of a SyncBatchNorm; empty where PyTorch would not share it either."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return ""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    group: Any = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


def _read_norm(norm: Any, parameters: list[Tensor]) -> tuple[Any, ...]:
    """What a layer is told of its BatchNorm. Its tensors go behind ``parameters``."""
    if norm is None:
        return _NO_NORM
    affine = norm.weight is not None
    if affine:
        parameters += [norm.weight, norm.bias]
    batch = not _is_frozen_norm(norm) and (norm.training or norm.running_mean is None)
    if not batch:
        parameters += [norm.running_mean, norm.running_var]
        return (True, affine, _eps(norm), *_NO_NORM[3:])
    tracked = norm.training and norm.track_running_stats and norm.running_mean is not None
    counted = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    if tracked:
        parameters += [norm.running_mean, norm.running_var]
    if counted:
        parameters.append(norm.num_batches_tracked)
    momentum = norm.momentum if counted or norm.momentum is not None else 0.0
    return (True, affine, norm.eps, True, tracked, counted, momentum, _sync_group(norm))


def _read_layer(layer: WeightLayer, parameters: list[Tensor]) -> Layer:
    conv: Any = layer.conv
    if type(conv) is ZeroPad:
        return Layer(layer.name, conv.filters, conv.channels, (1, 1), (conv.stride, conv.stride), weights=False)
    weight, bias = conv.weight, conv.bias
    parameters.append(weight)
    if bias is not None:
        parameters.append(bias)
    state = _read_norm(layer.norm, parameters)
    windows = _windows(conv)
    make = _layer if torch.compiler.is_compiling() else _cached_layer  # the compiler warns of caches, and traces past them
    activation = (*activation_name(layer.activation), rewritable(layer.activation))
    return make(layer.name, tuple(weight.shape), windows, bias is not None, state, *activation)


def _entry_layer(name: str, channels: int, norm: tuple[Any, ...], activation: str, slope: float) -> Layer:
    present, affine, eps, *statistics = norm
    state = (present, affine, eps, activation, *statistics, slope, False)
    return Layer(name, channels, channels, (1, 1), (1, 1), (0, 0), (1, 1), 1, False, *state)


def _read_entry(parts: Parts, parameters: list[Tensor]) -> Layer | None:
    entry, conv = parts.entry, parts.layers[0].conv
    if entry is None:
        return None
    weight: Any = conv.weight
    state = _read_norm(entry.norm, parameters)
    channels = weight.shape[1] * _windows(conv)[3]
    make = _entry_layer if torch.compiler.is_compiling() else _cached_entry
    return make(entry.name, channels, state, *activation_name(entry.activation))


def convolutions(parts: Parts) -> tuple[Layer, ...]:
    """The layers in a row of :func:`refusal`'s structure, without what is behind the convolutions: their sizes."""
    return tuple(_read_layer(WeightLayer(layer.name, layer.conv), []) for layer in parts.layers)


def _chain(
    layers: tuple[Layer, ...],
    residual: bool,
    projection: Layer | None,
    pool: tuple[Any, ...] | None,
    memory: str,
    gate: Layer | None,
    skip: bool,
    entry: Layer | None,
) -> Chain:
    window = None if pool is None else Pool(*pool)
    return Chain(layers, residual, projection, window, check_memory(memory), gate, skip, entry)


_cached_layer = lru_cache(maxsize=4096)(_layer)
_cached_entry = lru_cache(maxsize=4096)(_entry_layer)
_cached_chain = lru_cache(maxsize=4096)(_chain)


def read(parts: Parts, memory: str = "default") -> Reading:
    """The chain that these modules compute now, with its tensors; or the reason why they must run one by one.

    Args:
        parts: the modules.
        memory: what training keeps for the backward, see :func:`fused_resnet.fuse`.
    """
    reason = refusal(parts)
    if reason is not None:
        return Reading(None, [], reason)
    parameters: list[Tensor] = []
    entry = _read_entry(parts, parameters)
    layers = tuple(_read_layer(layer, parameters) for layer in parts.layers)
    projection = None if parts.projection is None else _read_layer(parts.projection, parameters)
    gate = None if parts.gate is None else _read_layer(parts.gate, parameters)
    pool: Any = parts.pool
    dimensions = dimensions_of(parts.layers[0].conv)
    window = None
    if pool is not None:
        window = tuple(_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
        if dimensions == 3:
            window = tuple((one, pair[1]) for one, pair in zip((1, 1, 0, 1), window, strict=True))
    make = _chain if torch.compiler.is_compiling() else _cached_chain
    frozen = any(_is_frozen_norm(norm) for norm in parts.norms)
    chain = make(layers, parts.residual, projection, window, memory, gate, parts.skip, entry)
    lasts = not any(isinstance(norm, nn.SyncBatchNorm) for norm in parts.norms)
    exact = any(isinstance(norm, Called) for norm in parts.norms)
    return Reading(chain, parameters, None, frozen, dimensions, exact, chain.batch, lasts)
