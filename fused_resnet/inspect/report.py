"""What is known of a network's launches, as one document that can be stored, shown and compared.

The document is plain data (:func:`make`). Under ``counted`` is what follows from sizes, under ``compiled`` what was read off
the compiler's output, under ``predicted`` what the model of :mod:`fused_resnet.tuning.model` expects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, counts
from ..launch import Geometry, Launch
from ..models import MODELS
from ..network import Use, distinct, launches, network
from ..stored import NONE, NUMBER, OBJECT, TEXT, Fields, fields, hold
from ..swap import unfuse
from ..tuning.choice import eager_seconds
from ..tuning.devices import Device, devices, limits
from ..tuning.model import predict, resident, roofline_seconds
from .compiling import Job, Outcome
from .started import started

#: Columns of tensor memory that the programs of a multiprocessor share (sm_100).
TENSOR_MEMORY = 512

#: Of the document. A reader refuses others.
SCHEMA = 1
WHAT = "fused_resnet inspect"
GRADES = {
    "counted": "follows from sizes",
    "compiled": "read off what Triton's compiler made for the architecture; nothing ran there",
    "predicted": "from the model in fused_resnet/tuning/model.py and the device's published limits; not measured",
}


@dataclass(frozen=True)
class Request:
    """What is inspected.

    Attributes:
        model: a key of :data:`fused_resnet.models.MODELS`.
        batch, size: images, their rows and columns.
        dtype: fp32, fp16 or bf16.
        mode: ``infer`` or ``train``.
        devices: architecture -> the device that times are predicted for.
        layer: shell pattern of the layers wanted, a part of the name suffices; None for all.
        tf32: whether fp32 is multiplied as tf32.
    """

    model: str
    batch: int
    size: int
    dtype: torch.dtype
    mode: str
    devices: Mapping[str, Device]
    layer: str | None = None
    tf32: bool = False


def architectures() -> list[str]:
    """Those of which a device is known, hence predictions can be made."""
    return list(dict.fromkeys(device.arch for device in devices().values()))


#: The distinct launches that start a kernel, architecture by architecture.
Wanted = Mapping[str, Sequence[Use]]


def wanted(request: Request) -> Wanted:
    """What is asked for.

    Raises:
        ValueError: no such model, no layer of that name, or a batch that has no statistics.
        RuntimeError: images too small for the network.
    """
    named = launches(network(request.model), request.batch, request.size, request.dtype, request.mode)
    if request.layer is not None:
        names = list(dict.fromkeys(layer for layer, _ in named))
        matching = {layer for layer in names if matches(layer, request.layer)}
        if not matching:
            raise ValueError(f"no layer matches {request.layer!r}: {request.model} has {', '.join(names[:4])} ... {names[-1]}")
    else:
        matching = {layer for layer, _ in named}
    return {
        arch: distinct((layer, launch) for layer, launch in started(named, arch, _tf32(request, arch)) if layer in matching)
        for arch in request.devices
    }


def _tf32(request: Request, arch: str) -> bool:
    return request.tf32 and arch.startswith("sm_")


def matches(layer: str, pattern: str) -> bool:
    """``layer1.*.conv2`` as in a shell; without a wildcard any part of the name."""
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return fnmatchcase(layer, pattern)


def jobs(request: Request, chosen: Wanted) -> list[Job]:
    """All launches, architecture by architecture."""
    return [Job(use.launch, arch, _tf32(request, arch)) for arch, part in chosen.items() for use in part]


def label(launch: Launch) -> str:
    """A launch in a few words: ``conv 3x3/2 128>128 56x56 bn_relu+stats``, of the forward's sizes."""
    g = launch.geometry
    if not isinstance(g, Geometry):
        size = f"{g.kernel[0]}x{g.kernel[1]}/{g.stride[0]} {g.C} {g.H}x{g.W}"
    elif launch.kind.startswith("bn_add_relu") or launch.kind in ("statistics", "output_gradient"):
        size = f"{g.K} {g.P}x{g.Q}"
    else:
        size = f"{g.R}x{g.S}{f'/{g.stride[0]}' if max(g.stride) > 1 else ''} {g.C}>{g.K} {g.H}x{g.W}"
        size += f" g{g.groups}" if g.groups > 1 else ""
    ends = [end for end in (launch.prologue, launch.gradient) if end != "identity"]
    ends += [launch.epilogue] if launch.epilogue != "store" else []
    ends += [launch.activation] if launch.kind == "conv" and launch.activation != "identity" else []
    ends += [name for role, name in (("dshortcut", "dshortcut"), ("shortcut_mean", "projection")) if role in launch.roles]
    if launch.kind.startswith("bn_add_relu") and "shortcut" not in launch.roles and launch.kind == "bn_add_relu":
        ends.append("no shortcut")
    return " ".join(filter(None, (launch.kind, size, "+".join(ends))))


def make(request: Request, chosen: Wanted, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The document.

    Args:
        request: what was asked.
        chosen: :func:`wanted` of it.
        outcomes: of :func:`jobs`, in their order.
    """
    whole = request.layer is None
    eager, outside = _beside(request) if whole else ([], [])
    of_arch = {}
    left = iter(outcomes)
    for arch, device in request.devices.items():
        tf32 = _tf32(request, arch)
        rows = {use.launch.signature: _row(use, next(left), arch, device, tf32) for use in chosen[arch]}
        totals = _totals(chosen[arch], rows, device, tf32)
        if whole:
            totals |= _network(totals, eager, outside, device, request.dtype, tf32)
        of_arch[arch] = {"device": device.name, "launches": rows, "totals": totals}
    return {
        "schema": SCHEMA,
        "what": WHAT,
        "grades": GRADES,
        "request": {
            "model": request.model,
            "batch": request.batch,
            "size": request.size,
            "dtype": {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(request.dtype, "fp32"),
            "mode": request.mode,
            "layer": request.layer,
            "tf32": request.tf32,
        },
        "versions": {"fused_resnet": __version__, "torch": torch.__version__, "triton": triton_version()},
        "architectures": of_arch,
    }


def triton_version() -> str:
    """Of the installed Triton."""
    return metadata.version("triton")


def _row(use: Use, outcome: Outcome, arch: str, device: Device, tf32: bool) -> dict[str, Any]:
    """One launch on one architecture."""
    launch, facts = use.launch, outcome.facts
    row: dict[str, Any] = {
        "label": label(launch),
        "kind": launch.kind,
        "layers": list(use.layers),
        "counted": {"flops": launch.flops, "bytes": launch.bytes},
        "error": outcome.error,
        "compiled": None,
        "tile": None,
    }
    if facts is not None:
        limit = limits(arch)
        held, what = resident(limit, facts.registers, facts.shared, facts.num_warps)
        if facts.tensor_memory * held > TENSOR_MEMORY:
            held, what = TENSOR_MEMORY // facts.tensor_memory, "tensor memory"
        occupancy = {"programs": held, "warps": held * facts.num_warps / limit.warps, "limited_by": what}
        row["compiled"] = {**facts.as_json(), "occupancy": occupancy}
    if outcome.planned is not None and outcome.planned.tile is not None:
        tile = outcome.planned.tile
        row["tile"] = asdict(tile)
        # A kernel that does not compile is expected to need what the model assumes.
        known = {} if facts is None else {"registers": facts.registers, "shared": facts.shared}
        row["predicted"] = asdict(predict(launch, tile, device, tf32=tf32, **known))
    else:
        seconds = roofline_seconds(launch.flops, launch.bytes, device, launch.dtype, tf32)
        bound = "matrix" if launch.flops / device.rate(launch.dtype, tf32) > launch.bytes / device.bandwidth else "memory"
        row["predicted"] = {"seconds": seconds, "bound": bound, "memory_bytes": launch.bytes}
    return row


def _totals(chosen: Sequence[Use], rows: Mapping[str, dict[str, Any]], device: Device, tf32: bool) -> dict[str, Any]:
    """What the launches add up to."""
    compiled = [row["compiled"] for row in rows.values() if row["compiled"] is not None]
    each = [(use, rows[use.launch.signature]) for use in chosen]

    def roofline(launch: Launch) -> float:
        return roofline_seconds(launch.flops, launch.bytes, device, launch.dtype, tf32)

    return {
        "counted": {
            "launches": sum(use.times for use in chosen),
            "flops": sum(use.times * use.launch.flops for use in chosen),
            "bytes": sum(use.times * use.launch.bytes for use in chosen),
        },
        "compiled": {
            "distinct": len(compiled),
            "failed": sum(bool(row["error"]) for row in rows.values()),
            "spilling": sum(facts["spills"] > 0 for facts in compiled),
            "registers": max((facts["registers"] for facts in compiled), default=0),
            "shared": max((facts["shared"] for facts in compiled), default=0),
        },
        "predicted": {
            "launches_seconds": sum(use.times * row["predicted"]["seconds"] for use, row in each),
            "roofline_seconds": sum(use.times * roofline(use.launch) for use in chosen),
        },
    }


def _beside(request: Request) -> tuple[list[counts.Kernel], list[counts.Kernel]]:
    """Kernels of the eager network, and those of the fused one that are no launches (average pooling, the classifier)."""
    with torch.device("meta"):
        x = torch.empty(request.batch, 3, request.size, request.size, dtype=request.dtype)
        eager = unfuse(MODELS[request.model]())
    sides = []
    for model in (eager, network(request.model)):
        model = model.to(request.dtype).train(request.mode == "train")
        sides.append(list(counts.step(model, x).kernels) if request.mode == "train" else counts.kernels(model, x))
    return sides[0], [kernel for kernel in sides[1] if not kernel.fused]


def _network(
    totals: Mapping[str, Any],
    eager: Sequence[counts.Kernel],
    outside: Sequence[counts.Kernel],
    device: Device,
    dtype: torch.dtype,
    tf32: bool,
) -> dict[str, Any]:
    """The totals with the rest of the network and eager PyTorch beside them."""

    def seconds(kernels: Sequence[counts.Kernel]) -> float:
        return sum(eager_seconds(kernel, device, dtype, tf32) for kernel in kernels)

    def at_the_ceilings(kernels: Sequence[counts.Kernel]) -> float:
        return sum(roofline_seconds(kernel.flops, kernel.bytes + kernel.reread, device, dtype, tf32) for kernel in kernels)

    fused = totals["predicted"]["launches_seconds"] + seconds(outside)
    fused_roofline = totals["predicted"]["roofline_seconds"] + at_the_ceilings(outside)
    return {
        "counted": {
            **totals["counted"],
            "eager_kernels": len(eager),
            "eager_bytes": sum(kernel.bytes + kernel.reread for kernel in eager),
            "outside_kernels": len(outside),
        },
        "predicted": {
            **totals["predicted"],
            "outside_seconds": seconds(outside),
            "fused_seconds": fused,
            "eager_seconds": seconds(eager),
            "ratio": seconds(eager) / fused,
            "eager_roofline_seconds": at_the_ceilings(eager),
            "roofline_ratio": at_the_ceilings(eager) / fused_roofline,
        },
    }


def load(path: Path) -> dict[str, Any]:
    """A stored document.

    Raises:
        ValueError: not there, not JSON, not a document of this command, or of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} is damaged: no report is nested so deep") from error
    if not isinstance(document, dict) or document.get("what") != WHAT:
        raise ValueError(f"{str(path)!r} was not written by inspect --json")
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {document.get('schema')!r}, expected {SCHEMA}: write it again")
    _check(document, str(path))
    return document


def _check(document: dict[str, Any], name: str) -> None:
    """Raise where something is missing that :func:`.show.compare` reads."""
    hold(document, fields("request versions architectures", OBJECT), name)
    asked: Fields = {**fields("model dtype mode", TEXT), **fields("batch size", NUMBER), "layer": (str, NONE), "tf32": (bool,)}
    hold(document["request"], asked, f"{name}: request")
    hold(document["versions"], fields("triton torch", TEXT), f"{name}: versions")
    for arch, part in document["architectures"].items():
        place = f"{name}: {arch}"
        hold(part, fields("launches totals", OBJECT), place)
        hold(part["totals"], {"predicted": OBJECT}, f"{place}: totals")
        hold(part["totals"]["predicted"], {"launches_seconds": NUMBER}, f"{place}: totals")
        for signature, row in part["launches"].items():
            _check_row(row, f"{place}: {signature!r}")


def _check_row(row: Any, place: str) -> None:
    hold(row, {"label": TEXT, "predicted": OBJECT, "error": TEXT, **fields("compiled tile", (dict, NONE))}, place)
    hold(row["predicted"], {"seconds": NUMBER}, place)
    made = row["compiled"]
    if made is None:
        return
    hold(made, {**fields("registers spills shared num_warps", NUMBER), "stages": (list,), "reading": OBJECT}, place)
    if len(made["stages"]) != 2:
        raise ValueError(f"{place}: not whole: 'stages': expected the least and the most, got {made['stages']!r}")
    hold(made["reading"], {**fields("matrix operands", TEXT), "loop": (dict, NONE)}, place)
    if made["reading"]["loop"]:
        hold(made["reading"]["loop"], fields("matrix load barrier other", NUMBER), place)
