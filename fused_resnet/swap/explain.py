"""explain: what runs for each layer of a model, in how many launches, and why something was left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import backends
from ..describe import Parts, WeightLayer, identity_of, is_norm, read, refusal
from ..fused import Fused
from ..inputs import transformed
from ..plan import backward_plan, forward_plan, nominal_size, trainable_slots
from .quantised import quantised
from .recognise import ABOUT_A_FORWARD, analysis, fused_forward, is_compiled
from .region import WAITING, FusedRegion, current, runs_chains
from .replace import stands_for


@dataclass(frozen=True)
class Row:
    """One chain, or one module left alone.

    Attributes:
        name: place in the model, dotted.
        what: the class, or the layers of the chain.
        backend: who runs it: a backend's name, or ``pytorch`` for modules run one by one.
        launches: launches of one forward.
        eager_launches: launches of the same modules one by one: a convolution, a BatchNorm, a ReLU, an add, a pooling each.
        note: the launches, or why it was left alone.
        backward: ``(backend, launches)`` pairs of the backward with all gradients; empty where PyTorch's autograd does it.
    """

    name: str
    what: str
    backend: str
    launches: int
    eager_launches: int
    note: str
    backward: tuple[tuple[str, int], ...] = ()

    @property
    def fused(self) -> bool:
        """Runs as launches of a plan."""
        return self.backend != "pytorch"


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str`` is a table."""

    rows: tuple[Row, ...]

    @property
    def launches(self) -> int:
        """Launches of one forward through all rows."""
        return sum(row.launches for row in self.rows)

    @property
    def eager_launches(self) -> int:
        """The same in eager mode."""
        return sum(row.eager_launches for row in self.rows)

    @property
    def left_alone(self) -> tuple[Row, ...]:
        """Rows that run in plain PyTorch."""
        return tuple(row for row in self.rows if not row.fused)

    def __str__(self) -> str:
        if not self.rows:
            return "no module is a convolution or a BatchNorm: nothing to fuse"
        head = ("layer", "what", "runs on", "launches", "eager", "how, or why not")
        lines = [(r.name, r.what, r.backend, str(r.launches), str(r.eager_launches), r.note) for r in self.rows]
        total = ("total", "", "", str(self.launches), str(self.eager_launches), "")
        widths = [max(len(line[i]) for line in (head, *lines, total)) for i in range(5)]
        text = []
        for line in (head, *lines, total):
            cells = [cell.rjust(w) if i >= 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=False))]
            text.append("  ".join([*cells, line[5]]).rstrip())
        backward: Counter[str] = Counter()
        for row in self.rows:
            backward.update(dict(row.backward))
        if backward:
            runs = ", ".join(
                f"{count} {'launch' if count == 1 else 'launches'} on {name}" for name, count in sorted(backward.items())
            )
            text.append(f"backward of the fused rows, if all gradients are wanted: {runs}")
        if any(row.note.startswith(ABOUT_A_FORWARD) for row in self.left_alone):
            text.append(
                'torch.compile(model, backend="fused_resnet") may find chains in forwards that cannot be traced here, '
                'and fuse(model, untraceable="compile") compiles these modules alone'
            )
        return "\n".join(text)


def _eager_launches(parts: Parts) -> int:
    identities = sum(isinstance(module, nn.Identity) for module in parts.modules)
    return len(parts.modules) - identities + int(parts.residual)


def _device_and_dtype(parts: Parts) -> tuple[torch.device, torch.dtype, bool]:
    """Where a chain's convolutions run and in which type, and whether autocast decides on that."""
    weight = parts.layers[0].conv.weight
    if not isinstance(weight, torch.Tensor):
        return torch.device("cpu"), torch.float32, False
    if weight.is_meta or weight.dtype == torch.float64 or not torch.is_autocast_enabled(weight.device.type):
        return weight.device, weight.dtype, False
    return weight.device, torch.get_autocast_dtype(weight.device.type), True


def _chain_row(name: str, what: str, module: Fused, parts: Parts) -> Row:
    eager = _eager_launches(parts)
    reading = read(parts, module.fused_memory)
    if reading.chain is None:
        return Row(name, what, "pytorch", eager, eager, reading.reason or "")
    if transformed():
        return Row(name, what, "pytorch", eager, eager, "a torch.func transform or forward-mode differentiation is on")
    device, dtype, autocast = _device_and_dtype(parts)
    if autocast and reading.frozen:
        return Row(name, what, "pytorch", eager, eager, "under autocast its frozen BatchNorm makes fp32, which no launch does")
    chosen = backends.choose(module.fused_backend, device)
    plan = forward_plan(reading.chain, *nominal_size(reading.chain), dtype)
    notes = []
    for launch in plan.launches:
        runner, reason = backends.assign(launch, chosen)
        if reason is None and (why := getattr(backends.executor(runner), "reason", None)) is not None:
            chosen_so = why(launch, device)
            notes.append(f"{launch} [{chosen_so}]" if chosen_so else str(launch))
        else:
            notes.append(str(launch) if reason is None else f"{launch} (on {runner}: {reason})")
    layers = zip((*parts.in_a_row, *parts.weight_layers[len(parts.layers) :]), reading.chain.weight_layers, strict=True)
    alone = [a.name for a, b in layers if isinstance(a.norm, nn.SyncBatchNorm) and a.norm.training and not b.group]
    if alone:
        notes.append(f"SyncBatchNorm of {', '.join(alone)}: no other ranks, an ordinary BatchNorm, as in PyTorch")
    if reading.dimensions != 4:
        notes.append(f"takes {'[N, C, L]' if reading.dimensions == 3 else '[N, C]'}, other inputs run unfused")
    if device.type == "cpu" and module.may_be_small(reading.dimensions):
        notes.append(backends.alone_up_to(reading.dimensions))
    gradients = trainable_slots(reading.chain)
    backward = backward_plan(reading.chain, *nominal_size(reading.chain), dtype, gradients)
    runners = Counter(backends.assign(launch, chosen)[0] for launch in backward.launches)
    return Row(name, what, chosen, len(plan.launches), eager, "; ".join(notes), tuple(sorted(runners.items())))


def _by_itself(module: nn.Module) -> str:
    """Why a layer that nothing around it says anything about is left alone."""
    if isinstance(module, nn.modules.conv._ConvNd):
        refused = refusal(Parts([WeightLayer("it", module)]), structure_only=True)
    else:
        refused = None if is_norm(module) else f"a {type(module).__name__} is no BatchNorm2d or BatchNorm1d"
    return refused or "stands alone: nothing around it to fuse with"


def _left_alone(name: str, module: nn.Module, reason: str) -> Row:
    return Row(name, type(module).__name__, "pytorch", 1, 1, reason)


class _Walk:
    """Goes through a model from the outside in; a chain is told of by the outermost module that runs it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.seen: set[int] = set()
        self.reasons: dict[int, str] = {}  # of single convolutions, as the region around them knows them
        self.traced = analysis()
        self.fallen: set[str] = set()  # reasons why modules run unfused now, with all that they stand for

    def visit(self, name: str, module: nn.Module, reason: str) -> None:
        """Rows of a module and of what is in it; ``reason`` is why what stands alone does, empty where nobody knows."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):  # of classes of its own, also inside
            self.rows.append(Row(name, module.original_name, "pytorch", 1, 1, "it is scripted or traced: its code is fixed"))
            return
        if runs_chains(module):
            reason = self._fused(name, module)
        elif is_norm(module) or isinstance(module, _LAYERS):  # a Linear by itself is nothing one would expect fused
            self.rows.append(_left_alone(name, module, self.reasons.get(id(module), reason) or _by_itself(module)))
            if is_norm(module):
                return
        else:
            reason = self._unfused(module, reason)
        for child_name, child in module.named_children():
            if not (isinstance(module, Fused) and stands_for(module, child)):
                self.visit(f"{name}.{child_name}" if name else child_name, child, reason)

    def _fused(self, name: str, module: Fused) -> str:
        chains, before = module.chains(), set(self.seen)
        region, reason = current(module) if isinstance(module, FusedRegion) else (None, None)
        for chain, parts in chains:
            layers = [layer.conv for layer in parts.weight_layers]
            if all(identity_of(conv) in before for conv in layers):  # of a module around this one
                continue
            whole = region is not None and not region.reasons and len(chains) == 1 and _is_all(module, parts)
            place = ".".join(filter(None, (name, "" if whole else chain)))
            self.rows.append(_chain_row(place, " + ".join(parts.names), module, parts))
            self.seen.update(id(part) for part in (*parts.modules, *parts.owners(module)))
            self.seen.update(map(identity_of, layers))
        if not isinstance(module, FusedRegion):
            return f"stands alone in a {module.unfused_class.__name__}"
        for place, why in region.reasons.items() if region is not None else ():
            self._tell(name, module, place, why)
        if reason is not None and reason != WAITING:
            self.fallen.add(reason)
        return reason or f"stands alone in a {module.unfused_class.__name__}: no chain reaches it"

    def _tell(self, name: str, module: nn.Module, place: str, why: str) -> None:
        """Note why a layer is in no chain; one that is called as a function has a row of its own."""
        found: Any = module
        for part in place.split("."):
            found = getattr(found, "_modules", {}).get(part)
        if isinstance(found, nn.Module):
            self.reasons.setdefault(id(found), why)
        else:
            self.rows.append(Row(f"{name}.{place}" if name else place, "function", "pytorch", 1, 1, why))

    def _unfused(self, module: nn.Module, reason: str) -> str:
        if reason in self.fallen:
            return reason
        if (prepared := quantised(module)) is not None:
            self.fallen.add(prepared)
            return prepared
        if type(module).forward is nn.Module.forward:  # a ModuleList: the module around it calls what is in it
            return reason
        fused, refused = fused_forward(module, self.traced)
        if refused is not None and is_compiled(module):
            return f"compiled at its first call, for the chains in Dynamo's graph: {refused}"
        if refused is not None:
            return refused if ":" in refused or "forward" not in refused else f"{refused}: {type(module).__name__}"
        if fused is not None:
            return "not fused yet: call fuse(model)"
        return reason


_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


def _is_all(module: nn.Module, parts: Parts) -> bool:
    """Whether a chain is all that a module has of layers."""
    inside = {id(part) for part in (*parts.modules, *parts.owners(module))}
    return all(id(part) in inside for part in module.modules() if isinstance(part, _LAYERS))


def explain(model: nn.Module, *, show: bool = True) -> Explanation:
    """What runs for each convolution and BatchNorm of ``model`` as it is now (mode, hooks, device, types, autocast).

    Args:
        model: any module, fused or not.
        show: print the table.

    Returns:
        The rows, with totals.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    walk = _Walk()
    walk.visit("", model, "")
    explanation = Explanation(tuple(walk.rows))
    if show:
        print(explanation)
    return explanation
