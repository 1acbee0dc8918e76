"""What a chain takes: errors for inputs that PyTorch would not take either, and inputs for which its modules run one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .chain import Chain, Layer, shape_behind
from .describe import Reading
from .launch import accumulation_dtype

_traced, _functorch = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack

#: Types and devices of x for which a chain's parameters were found to be right.
Fitting = set[tuple[torch.dtype, torch.device]]


def check(
    chain: Chain, x: Tensor, parameters: Sequence[Tensor], skip: Tensor | None = None, fitting: Fitting | None = None
) -> None:
    """Raise what PyTorch raises for an input a chain cannot take.

    Args:
        fitting: what is known of these parameters, where they are known to be the same; what is found is added.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: rank other than 4 in front of a BatchNorm.
        RuntimeError: rank, channels, dtype or device do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor of shape [N, C, H, W], got {type(x).__name__}")
    first = chain.layers[0]
    if x.dim() != 4:  # PyTorch's convolutions take one image as well, its BatchNorm does not
        error = ValueError if x.dim() == 3 else RuntimeError
        raise error(f"x: expected 4D input [N, C, H, W] (got {x.dim()}D input of size {list(x.shape)})")
    if x.shape[1] != first.channels:
        raise RuntimeError(
            f"x: given groups={first.groups} and weight of size "
            f"{[first.filters, first.channels // first.groups, *first.kernel]}, expected input of size {list(x.shape)} "
            f"to have {first.channels} channels, but got {x.shape[1]} channels instead"
        )
    if fitting is None or (x.dtype, x.device) not in fitting:
        index = 0
        for layer in chain.weight_layers:
            for role in layer.parameter_roles:
                _check_parameter(layer, role, parameters[index], x)
                index += 1
        if fitting is not None:
            fitting.add((x.dtype, x.device))
    if chain.skip or skip is not None:
        _check_skip(chain, x, skip)


def _check_skip(chain: Chain, x: Tensor, skip: Tensor | None) -> None:
    if not chain.skip or not isinstance(skip, Tensor):
        expected = "a Tensor, the chain's second input" if chain.skip else "None: the chain has one input"
        raise TypeError(f"skip must be {expected}, got {type(skip).__name__}")
    if skip.device != x.device or skip.dtype != x.dtype:
        raise RuntimeError(f"skip is {skip.dtype} on {skip.device}, expected it as x is, {x.dtype} on {x.device}")
    if not skip_fits(chain, x, skip):
        made = list(shape_behind(chain.layers, x.shape[0], *x.shape[2:]))
        behind = f"{made}" if chain.projection is None else f"what {chain.projection.name} makes {made} of"
        raise RuntimeError(f"skip of shape {list(skip.shape)} does not match the block's output: expected {behind}")


def as_image(tensor: Tensor) -> Tensor:
    """[N, C] as [N, C, 1, 1], [N, C, L] as [N, C, 1, L]; filters likewise. Images are images."""
    if tensor.dim() == 4:
        return tensor
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor.unsqueeze(2)


def as_it_came(out: Tensor, dimensions: int) -> Tensor:
    """What a chain made of :func:`as_image`, with as many dimensions as its input had."""
    return out if dimensions == 4 else out.flatten(1) if dimensions == 2 else out.squeeze(2)


def skip_fits(chain: Chain, x: Tensor, skip: Tensor) -> bool:
    """Whether a second input, behind the projection if there is one, has the shape of what it is added to."""
    made, side = shape_behind(chain.layers, x.shape[0], *x.shape[2:]), chain.projection
    if side is None:
        return tuple(skip.shape) == made
    if skip.dim() != 4 or skip.shape[1] != side.channels:
        return False
    return shape_behind((side,), skip.shape[0], *skip.shape[2:]) == made


#: Roles of a BatchNorm's tensors, by what the module calls them.
_OF_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "batches": "num_batches_tracked",
}


def _told(layer: Layer, role: str) -> str:
    """A tensor as its owner is known outside: a layer has its convolution's name, but ``conv1`` has no ``running_mean``."""
    if role not in _OF_NORM:
        return f"{layer.name}.{'weight' if role == 'w' else role}"
    # A chain's entry is a BatchNorm alone, and has that one's name.
    return f"{_OF_NORM[role]} of the BatchNorm behind {layer.name}" if layer.weights else f"{layer.name}.{_OF_NORM[role]}"


def _check_parameter(layer: Layer, role: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(
            f"x is on {x.device} but {_told(layer, role)} is on {tensor.device}: expected all tensors on the same device"
        )
    if role in ("w", "bias"):
        if tensor.dtype != x.dtype:
            raise RuntimeError(
                f"input type ({x.dtype}) and weight type ({tensor.dtype}, {_told(layer, role)}) should be the same"
            )
    elif role != "batches" and tensor.dtype != x.dtype and tensor.dtype != accumulation_dtype(x.dtype):
        raise RuntimeError(
            f"{_told(layer, role)} is {tensor.dtype}: expected BatchNorm's tensors in x's type, {x.dtype}, or in float32"
        )
    if role == "w" and tuple(tensor.shape) != (layer.filters, layer.channels // layer.groups, *layer.kernel):
        expected = [layer.filters, layer.channels // layer.groups, *layer.kernel]
        raise RuntimeError(f"{_told(layer, role)} must be [K, C / groups, R, S] = {expected}, got {list(tensor.shape)}")
    if role not in ("w", "batches") and tensor.shape[0] != layer.filters:
        raise RuntimeError(
            f"{_told(layer, role)} must have {layer.filters} elements, one for each filter, got {tensor.shape[0]}"
        )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def promotes(reading: Reading, x: Tensor) -> bool:
    """Whether autocast would make a result wider than its own type, which no launch does: such a chain runs unfused.

    That is so where fp32 images go straight into a block with an identity shortcut, and behind torchvision's frozen BatchNorm,
    which multiplies by fp32 buffers in plain arithmetic. And in front of a BatchNorm that reads wider images as they are.
    """
    if not isinstance(x, Tensor) or not autocasts(x):
        return False
    spec = reading.chain
    if spec is not None and spec.entry is not None and x.dtype != torch.get_autocast_dtype(x.device.type):
        return True
    identity = spec is not None and spec.residual and not spec.skip
    identity = identity and spec is not None and (spec.projection is None or not spec.projection.weights)
    return reading.frozen or (identity and x.dtype != torch.get_autocast_dtype(x.device.type))


def _skip_unfit(spec: Chain, x: Tensor, skip: Any) -> bool:
    """Whether the sum with this second input is another one in eager PyTorch: of broadcast shapes, of promoted types."""
    if not isinstance(skip, Tensor) or not isinstance(x, Tensor) or x.dim() != 4 or skip.device != x.device:
        return True
    if not autocasts(x):
        same = skip.dtype == x.dtype
    else:
        same = spec.projection is not None or skip.dtype == torch.get_autocast_dtype(x.device.type)
    return not same or not skip_fits(spec, x, skip)


def unfit(reading: Reading, x: Tensor, skip: Any = None) -> bool:
    """Whether these inputs must run unfused: autocast would promote one, there are no images to make statistics of, or the
    shortcut is not of the shape and type of what it is added to.

    A rank without images takes part in a SyncBatchNorm all the same: the others wait for its share.
    """
    dimensions = x.dim() if isinstance(x, Tensor) else 0
    exact = reading.dimensions != 4 or reading.exact  # a Linear takes any number, or PyTorch has an error
    if exact and dimensions != reading.dimensions:
        return True
    spec = reading.chain
    if spec is None:
        return promotes(reading, x)
    empty = reading.batch and dimensions == reading.dimensions and x.shape[0] == 0
    if empty and not any(layer.group for layer in spec.weight_layers):
        return True
    own = spec.residual and not spec.skip and dimensions == reading.dimensions and not torch.compiler.is_compiling()
    if own and _broadcasts(spec, *(1,) * (4 - dimensions), *x.shape[2:]):
        return True
    if spec.skip and reading.dimensions != 4:
        if not isinstance(skip, Tensor) or skip.dim() != reading.dimensions:
            return True
        return _skip_unfit(spec, as_image(x), as_image(skip)) or promotes(reading, x)
    return (spec.skip and _skip_unfit(spec, x, skip)) or promotes(reading, x)


@lru_cache(maxsize=4096)
def _broadcasts(spec: Chain, h: int, w: int) -> bool:
    """Whether the shortcut from a chain's own input has another shape than what it is added to, and PyTorch adds them still."""
    channels = spec.layers[0].channels if spec.entry is None else spec.entry.channels
    try:
        made = shape_behind(spec.layers, 1, h, w)
        side = (1, channels, h, w) if spec.projection is None else shape_behind((spec.projection,), 1, h, w)
    except RuntimeError:  # PyTorch has an error of its own
        return False
    return made != side and all(a == b or 1 in (a, b) for a, b in zip(made, side, strict=True))


def transformed() -> bool:
    """Whether forward-mode differentiation, torch.func or torch.jit.trace looks into operators: chains run unfused."""
    return not torch.compiler.is_compiling() and transformed_eagerly()


def transformed_eagerly() -> bool:
    """As :func:`transformed`, for those who know that nothing is compiled."""
    return _traced() is not None or forward_ad._current_level >= 0 or _functorch() is not None
