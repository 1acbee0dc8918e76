"""Networks by name, fused or eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, importing, models
from ..describe import check_memory
from ..fused import Fused
from ..models import NAMES
from ..specimens import torchvision_models
from ..swap import fuse, unfuse
from . import seeds
from .errors import UsageError
from .metrics import amp_dtype


def make(name: str, classes: int, backend: str = "auto", memory: str | None = None, **arguments: Any) -> nn.Module:
    """The network ``name`` with ``classes`` outputs and random weights from PyTorch's generator.

    Args:
        name: of :func:`fused_resnet.models.build`, one of torchvision's, or ``module:function`` or
            ``file.py:function``, which is called with ``num_classes`` and ``arguments`` and returns an nn.Module, fused or not.
        classes: outputs.
        backend: ``eager`` for the unfused network, ``auto`` or a backend for the fused one.
        memory: see :func:`fused_resnet.fuse`; None for the network's own.
        **arguments: for the builder.

    Raises:
        UsageError: no such network, arguments it does not take, or whatever its builder raises.
    """
    build = _builder(name)
    try:
        model = build(num_classes=classes, **arguments)
        if memory is not None:
            check_memory(memory)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error) if name in str(error) else f"model {name}: {error}") from error
    except Exception as error:  # the code of others
        raise UsageError(f"model {name}: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name}: returned a {type(model).__name__}, expected an nn.Module")
    fused = any(isinstance(module, Fused) for module in model.modules())
    if backend == "eager":
        return unfuse(model) if fused else model
    if not fused:
        fuse(model)
    for module in model.modules():
        if isinstance(module, Fused):
            module.fused_backend = None if backend == "auto" else backend
            if memory is not None:
                module.fused_memory = memory
    return model


def _builder(name: str) -> Callable[..., Any]:
    if ":" in name:
        try:
            build = importing.load(name)
        except ValueError as error:
            raise UsageError(f"model {name}: {error}") from error
        if not callable(build):
            raise UsageError(f"model {name}: is a {type(build).__name__}, expected a function that returns an nn.Module")
        return build
    vision = torchvision_models()
    if name not in NAMES and vision is not None and name in vision.list_models(module=vision):
        return partial(vision.get_model, name, weights=None)
    return partial(models.build, name)


def _told(error: Exception) -> str:
    """An error of the code of others in one line."""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def try_out(
    model: nn.Module,
    name: str,
    classes: int,
    size: int,
    device: torch.device,
    amp: str = "off",
    batch: int = 2,
    trained: bool = True,
) -> None:
    """Two images through the network, in eval mode and, since some answer otherwise there, in training mode. Where it does not
    take two, a batch: some want a multiple.

    It is left as it was, but in the last of these modes: its buffers (running statistics) are put back, and so are the random
    numbers.

    Args:
        model: on ``device``.
        name: for messages.
        classes: outputs that it should have; more are never the answer.
        size: rows and columns of the images.
        amp: element type of autocast.
        batch: images of a step, in this process.
        trained: it is to be trained; else eval mode is all that it is tried in.

    Raises:
        UsageError: it has nothing to train, does not take such images, or does not return scores of them.
    """
    if trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"model {name}: has no parameters to train")
    # On a GPU two images would be kernels of their own, which take a minute to compile.
    on = partial(backends.backend, "reference") if device.type == "cuda" else nullcontext
    for training in (False, True) if trained else (False,):
        model.train(training)
        mode = "training" if training else "eval"

        def scores_of(images: int, training: bool = training) -> Any:
            x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
            x = x.contiguous(memory_format=torch.channels_last)
            with (
                _put_back(model, device),
                on(),
                torch.set_grad_enabled(training),
                torch.autocast(device.type, dtype=amp_dtype(amp), enabled=amp != "off"),
            ):
                return model(x)

        try:
            images, scores = 2, scores_of(2)
        except Exception as error:  # the code of others
            try:
                images, scores = batch, scores_of(batch)
            except Exception:
                told = f"fails in {mode} mode on images of {size}x{size}: {_told(error)}"
                raise UsageError(f"model {name}: {told}") from error
        _check_scores(scores, name, classes, images, mode)


@contextmanager
def _put_back(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers and random numbers are afterwards what they were, the buffers the same tensors too."""
    random = seeds.states(device)
    before = [
        (module, {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        seeds.restore(random, device)
        with torch.no_grad():
            for module, buffers in before:
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer
                    if buffer is None or value is None or buffer.is_inference():
                        continue
                    if buffer.shape != value.shape:
                        buffer.data = value
                    elif not torch.equal(buffer, value):
                        buffer.copy_(value)


def _check_scores(scores: Any, name: str, classes: int, images: int, mode: str) -> None:
    if not isinstance(scores, Tensor):
        got = f"a {type(scores).__name__}"
    elif scores.dim() != 2 or len(scores) != images or scores.shape[1] < classes or not scores.is_floating_point():
        got = f"{list(scores.shape)} of {str(scores.dtype).removeprefix('torch.')}"
    else:
        return
    wanted = f"a tensor [images, {classes} or more] of floats"
    raise UsageError(f"model {name}: must return {wanted}, got {got} for {images} images in {mode} mode")


def check_backend(backend: str, device: torch.device) -> None:
    """A backend can run on ``device``.

    Raises:
        UsageError: it cannot: why.
    """
    if backend == "eager":
        return
    try:
        backends.resolve(None if backend == "auto" else backend, device)
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
