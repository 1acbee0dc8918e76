"""fuse and unfuse: a module is swapped by changing its class.

The object stays, and with it its parameters, buffers, hooks, name and place in the model. The new class has the fused forward
in front of the old one (so ``isinstance`` still holds), and goes back to the old one by :func:`unfuse`.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import backends, blocks, plain, plain_paper, plain_rows, watch
from ..compiling import fused_resnet
from ..describe import check_memory
from ..fused import Fused
from . import worth
from .analysis import Analysis
from .guards import descend
from .layout import FusedView, is_viewed, views_itself
from .quantised import quantised
from .recognise import ABOUT_A_FORWARD, OURS, analysis, fused_forward, is_compiled, layers_of, taken
from .region import FusedNetwork, FusedRegion, Later, Region, Regions, runs_chains
from .trusted import all_known

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[Fused]] = {
    plain.BasicBlock: blocks.BasicBlock,
    plain.Bottleneck: blocks.Bottleneck,
    plain.Stem: blocks.Stem,
    plain.ResNet: blocks.ResNet,
    plain_paper.HighwayBlock: blocks.HighwayBlock,
    plain_paper.HighwayBottleneck: blocks.HighwayBottleneck,
    plain_rows.ResidualMLP: blocks.ResidualMLP,
    plain_paper.CifarResNet: blocks.CifarResNet,
}


def _rebuild(original: type[nn.Module], fused: type[Fused]) -> nn.Module:
    kind: Any = fused_class(original, fused)
    module: nn.Module = kind.__new__(kind)
    return module


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickled as "the fused form of this class", since the class itself is made at run time."""
    kind: Any = type(self)
    state = self.__getstate__() if hasattr(kind, "__getstate__") else self.__dict__
    return _rebuild, (kind.unfused_class, kind.fused_forward_class), state


_made: dict[tuple[type[nn.Module], type[Fused]], type[Any]] = {}


def _signed(original: type[nn.Module], fused: type[Fused]) -> Callable[..., Any]:
    """A fused forward under the signature of the original class, by which torch.fx and trainers decide how to call it."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fused.forward(self, *args, **kwargs)

    return forward


def fused_class(original: type[nn.Module], fused: type[Fused]) -> type[Any]:
    """The class with ``fused``'s forward in front of ``original``; the same one each time."""
    if original in _OURS:
        return _OURS[original]
    if (original, fused) in _made:
        return _made[original, fused]
    namespace: dict[str, Any] = {
        "unfused_class": original,
        "fused_forward_class": fused,
        "__reduce_ex__": _reduce,
        "__module__": __name__,
        "__doc__": original.__doc__,
    }
    if is_viewed(original):
        namespace["gives_contiguous"] = True
    if fused in (FusedRegion, FusedNetwork, FusedView):
        namespace["forward"] = _signed(original, fused)
    return _made.setdefault((original, fused), type(f"Fused{original.__name__}", (fused, original), namespace))


def stands_for(module: Fused, child: nn.Module) -> bool:
    """Whether a chain of ``module`` does all that ``child`` does: it is not swapped, or counted, by itself."""
    inside = {id(part) for _, parts in module.chains() for part in (*parts.modules, *parts.owners(module))}
    return all(id(part) in inside for part in child.modules() if not list(part.children()))


@contextmanager
def _in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """All modules say that they are in one mode, without their ``train()`` being called."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = mode
        yield
    finally:
        for module, training in before:
            module.training = training


@dataclass
class _Swapping:
    """A model while it is being fused: what its modules were found to be, and which of them are called no longer, since chains
    of a region around them look out of them; by mode. ``rest``: modules to be compiled, if ``compiles``.
    """

    traced: dict[bool, Analysis] = field(default_factory=lambda: {mode: analysis() for mode in (True, False)})
    inside: dict[bool, set[int]] = field(default_factory=lambda: {mode: set() for mode in (True, False)})
    seen: set[int] = field(default_factory=set)
    compiles: bool = False
    rest: list[nn.Module] = field(default_factory=list)

    def forward_of(self, module: nn.Module, mode: bool) -> type[Fused] | None:
        """The fused forward of a module in a mode, if something is gained by it."""
        with _in_mode(module, mode):
            fused = fused_forward(module, self.traced[mode])[0]
            waiting = fused is FusedRegion and isinstance(self.traced[mode].region(module), Later)
            return None if waiting and id(module) in self.inside[mode] else fused

    def regions(self, module: nn.Module) -> Regions:
        """What a module was found to be; where its chains look out of what is in it, that is called no longer."""
        regions = Regions()
        for mode, known in self.traced.items():
            found = known.region(module)
            regions.add(mode, found)
            for path in found.inlined if isinstance(found, Region) else ():
                self.inside[mode].add(id(descend(module, path)))
        return regions

    def around(self, module: nn.Module) -> bool:
        """Whether a module can be traced that holds chains of modules inside alone."""
        if isinstance(module, torch.jit.ScriptModule) or is_compiled(module) or id(module) in self.inside[False]:
            return False
        if type(module).forward is nn.Module.forward or not list(module.children()):
            return False
        with _in_mode(module, False):
            reason = fused_forward(module, self.traced[False])[1] or taken(module, FusedNetwork)
        return reason is None and self.traced[False].found.get(id(module), "") is None

    def untraceable(self, module: nn.Module) -> bool:
        """Whether a module's forward calls layers where torch.fx cannot follow it, and Dynamo may."""
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if type(module).forward is nn.Module.forward or module._compiled_call_impl is not None or not any(layers_of(module)):
            return False
        for mode, known in self.traced.items():
            with _in_mode(module, mode):
                fused, reason = fused_forward(module, known)
            if fused is not None or reason is None or not reason.startswith(ABOUT_A_FORWARD):
                return False
        return True


def _swap(module: nn.Module, backend: str | None, memory: str, swapping: _Swapping, within: bool = False) -> None:
    """Swap ``module`` and what is in it, but for what is fused already: our own blocks in somebody's network.

    ``within``: it is part of a module that is, or may become, a fused one.
    """
    seen = swapping.seen
    if id(module) in seen or runs_chains(module) or quantised(module) is not None:
        return
    seen.add(id(module))
    if isinstance(module, FusedNetwork):  # in which something was replaced since
        for child in module.children():
            _swap(child, backend, memory, swapping, within=True)
        return
    found = {mode: swapping.forward_of(module, mode) for mode in (True, False)}
    fused = found[True] or found[False]
    around = fused is None and not within and swapping.around(module)
    if fused is not None:
        if fused is FusedRegion:
            cast(Any, module).fused_region = swapping.regions(module)
        _become(module, fused, backend, memory)
    elif swapping.compiles and swapping.untraceable(module):
        swapping.rest.append(module)
    for child in module.children():
        if not (isinstance(module, Fused) and stands_for(module, child)):
            _swap(child, backend, memory, swapping, within or around or fused is not None)
    inside = [inner for inner in module.modules() if isinstance(inner, Fused)] if around else []
    swapped = any(id(inner) in seen for inner in inside)  # not all of them were fused before
    if len(inside) > 1 and swapped and all_known(module):
        try:
            _become(module, FusedNetwork, backend, memory)
        except Exception:  # of a class that cannot be derived from, say: its chains are fused all the same
            _give_back(module)


def _become(module: Any, fused: type[Fused], backend: str | None, memory: str) -> None:
    """Swap one module."""
    module.__class__ = fused_class(type(module), fused)
    module.fused_backend = backend
    module.fused_memory = memory


def _compile(module: Any) -> None:
    """Chains in Dynamo's graphs of a forward, which is guarded and broken where Dynamo has to; the rest as PyTorch has it."""
    module.compile(backend=fused_resnet, options={"inner": "aot_eager"})
    setattr(module._compiled_call_impl, OURS, True)


def _check_untraceable(untraceable: str, backend: str | None) -> None:
    if untraceable not in ("leave", "compile"):
        raise ValueError(f"untraceable must be one of 'leave', 'compile', got {untraceable!r}")
    if untraceable == "compile" and backend is not None:
        raise ValueError(
            f"untraceable='compile' runs on the backend of the context or the device, got backend={backend!r}: "
            "use fused_resnet.backend(...) or FUSED_RESNET_BACKEND"
        )


def fuse(
    model: Model,
    *,
    backend: str | None = None,
    memory: str = "default",
    untraceable: str = "leave",
    example: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = True,
) -> Model:
    """Swap fused blocks into a model, without changing a parameter, a buffer or a name.

    Found by what a forward does, in modules of any class: convolutions with what is behind them (a bias, a BatchNorm, an
    activation, a sum with a shortcut or another tensor, a max-pooling), torchvision's ResNet blocks, and ``Sequential``s; also
    Conv1d or Linear with BatchNorm1d. What is not understood stays as it is: :func:`fused_resnet.explain` lists it, with
    the reason.

    Parameters and buffers stay the same objects, so optimizers, state_dicts, ``.to()``, copies, pickles and hooks go on
    working. Outputs of fused blocks are channels_last (use ``flatten`` or ``reshape`` on them; a ``view`` is looked after only
    in forwards that can be traced and in modules without children). On a GPU, a model in that memory format
    (``model.to(memory_format=torch.channels_last)``) saves a cached copy of its filters.

    Args:
        model: any module.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"`` for this model; None lets :func:`fused_resnet.backend`, the
            environment variable ``FUSED_RESNET_BACKEND`` or the tensors' device decide at each call.
        memory: what training keeps for the backward: ``"default"``, the outputs of all convolutions and blocks; ``"less"``,
            of the blocks in a stage every second one, the others are added up again; ``"low"``, besides all convolutions but
            the last one of each block and its projection, which are computed again. A fused module's attribute
            ``fused_memory`` can be set to another choice afterwards.
        untraceable: forwards that torch.fx cannot follow (control flow on data), with layers of their own: ``"leave"`` them as
            they are, or ``"compile"`` these modules in place (``nn.Module.compile``), for the chains in Dynamo's graphs; what
            is around the chains runs as it is. Compiled at their first call, for the default memory and the backend of context
            or device. As everywhere under torch.compile a hook on a module inside counts if it is there at the first call. A
            copy or a pickle of such a module is not compiled.
        example: an input, or a tuple of all inputs: the fused model is timed on it against the model as it was, in turn, for a
            second, in eval mode without gradients; where it is slower than 0.97x, it is left alone, with a warning. Hooks are
            called meanwhile; buffers and random numbers are as before. None: not timed.
        inplace: False works on a deep copy.

    Returns:
        The model (its own object if ``inplace``).

    Raises:
        TypeError: not a module, or a scripted one.
        ValueError: unknown backend, memory or ``untraceable``; a backend for what is to be compiled.
        RuntimeError: already fused, but for parts that are (our own blocks): these stay as they are; or the backend cannot be
            loaded here.

    Warns:
        UserWarning: nothing in the model could be fused, or it was left alone since it is slower on ``example``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a scripted module, whose code is fixed: fuse the nn.Module it was made from")
    if backend is not None:
        backends.executor(backend)
    check_memory(memory)
    _check_untraceable(untraceable, backend)
    if not inplace:
        model = copy.deepcopy(model)
    before = {id(module) for module in model.modules() if isinstance(module, Fused) or is_compiled(module)}
    swapping = _Swapping(compiles=untraceable == "compile")
    twin = None if example is None else worth.twin(model)
    ratio = None
    try:
        _swap(model, backend, memory, swapping)
        for module in swapping.rest:
            _compile(module)
        _make_views(model, swapping)
        if twin is not None and example is not None:
            with _in_mode(model, False), _in_mode(twin, False):
                ratio = worth.speedup(model, twin, example)
    except BaseException:  # a class that cannot be derived from, say: nothing is left half done
        _give_all_back(model, before)
        raise
    after = {id(module) for module in model.modules() if isinstance(module, Fused) or is_compiled(module)}
    if before and after == before:
        raise RuntimeError("model is already fused; unfuse(model) first to fuse it with other options")
    if not after:
        warnings.warn("fuse found no residual block, no layer with a BatchNorm it knows: the model is unchanged", stacklevel=2)
    elif ratio is not None and ratio < worth.LEAST:
        _give_all_back(model, before)
        warnings.warn(f"fused, the model is slower on the example ({ratio:.2f}x of its speed): it is unchanged", stacklevel=2)
    return model


def _make_views(model: nn.Module, swapping: _Swapping) -> None:
    """Where somebody views what a fused module gives, that is made contiguous."""
    if not any(isinstance(module, Fused) or is_compiled(module) for module in model.modules()):
        return
    for module in model.modules():
        if id(module) in swapping.seen and views_itself(module):  # not what is in a part that must stay as it is
            kind: Any = fused_class(type(module), FusedView)
            module.__class__ = kind


def unfuse(model: Model) -> Model:
    """Give every fused module its original class back, in place.

    Raises:
        TypeError: not a module.
        RuntimeError: nothing in the model is fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    fused = [module for module in model.modules() if isinstance(module, Fused) or is_compiled(module)]
    if not fused:
        raise RuntimeError("model is not fused: nothing to give back")
    for module in fused:
        _give_back(module)
    return model


def _give_all_back(model: nn.Module, before: set[int]) -> None:
    """All of a model as it was, but for what was fused before."""
    for module in model.modules():
        if id(module) not in before:
            _give_back(module)


def _give_back(module: nn.Module) -> None:
    """As it was before :func:`fuse`, which may have left it alone."""
    if is_compiled(module):
        module._compiled_call_impl = None
    if isinstance(module, Fused):
        for option in ("fused_backend", "fused_memory", "fused_region", watch.ATTRIBUTE):
            module.__dict__.pop(option, None)
        kind: type[Any] = module.unfused_class
        module.__class__ = kind
