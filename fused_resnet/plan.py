"""Chain -> launches, as data: what runs, in which order, what is kept for the backward.

Forward of a chain with running statistics (design: docs/fusion.md)::

    a_l = act(affine_l(conv_l(a_(l-1))))                     one launch a layer, epilogue affine
    d   = affine_d(conv_d(x))                                the projection, if any: its own launch
    out = act(affine_L(conv_L(a_(L-1))) + shortcut)          the shortcut is added in conv_L's epilogue

Backward, given ``dout`` (``dz_l`` is the gradient behind the activation's mask)::

    dz_L, sum_L  = act_backward(dout, out)
    dw_l, ...    = wgrad(dz_l, a_(l-1))                      dgamma needs no conv output: see docs/fusion.md
    dz_(l-1)     = dgrad(scale_l * dz_l, w_l) * act'(a_(l-1))
    dx           = dgrad(scale_1 * dz_1, w_1) + shortcut's gradient

What is kept for the backward is not written down anywhere: it is what the backward's launches read and do not make.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from .chain import Chain, Layer
from .launch import Geometry, HashedOnce, Launch, PoolGeometry, tensor_bytes


@dataclass(frozen=True)
class Plan(HashedOnce):
    """Launches in order, the slot that holds the result, and the slots that must outlive the plan.

    Attributes:
        launches: what runs.
        results: slots handed back (``out``, or gradients).
        keep: further slots that stay alive (saved for the backward).
        donated: slots read that the caller gives up: they may be written over after their last use.
    """

    launches: tuple[Launch, ...]
    results: tuple[str, ...]
    keep: tuple[str, ...] = ()
    donated: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return self.hash

    @property
    def flops(self) -> int:
        """Floating-point operations of all launches."""
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Algorithmic bytes of all launches (each operand read once, each output written once)."""
        return sum(launch.bytes for launch in self.launches)

    @cached_property
    def dead_after(self) -> tuple[frozenset[str], ...]:
        """For each launch the slots made here, or donated, that nothing reads afterwards: their memory may be written over."""
        live = {*self.results, *self.keep}
        made = {slot for launch in self.launches for _, slot in launch.outputs}.union(self.donated)
        dead: list[frozenset[str]] = []
        for launch in reversed(self.launches):
            read = {slot for _, slot in launch.operands}
            dead.append(frozenset((read & made) - live))
            live |= read
        return tuple(reversed(dead))

    def reads(self) -> tuple[str, ...]:
        """Slots the plan reads and does not make, in order of first use."""
        made = {slot for launch in self.launches for _, slot in launch.outputs}
        return tuple(dict.fromkeys(slot for launch in self.launches for _, slot in launch.operands if slot not in made))


def _operand_bytes(role: str, geometry: Geometry, dtype: torch.dtype) -> int:
    """Bytes of a convolution's operand or result by its role. Per-filter vectors are counted in fp32."""
    if role in ("x", "dx", "da", "a_previous"):
        return tensor_bytes(geometry.x_shape, dtype)
    if role in ("w", "dw"):
        return tensor_bytes(geometry.w_shape, dtype)
    if role in ("y", "shortcut", "dz", "out", "dout"):
        return tensor_bytes(geometry.y_shape, dtype)
    if role == "dshortcut":
        return tensor_bytes(geometry.x_shape, dtype)
    return tensor_bytes((geometry.C if role == "sum_previous" else geometry.K,), torch.float32)


def _sizes(roles: list[str], geometry: Geometry, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return tuple((role, _operand_bytes(role, geometry, dtype)) for role in roles)


def _conv(
    layer: Layer, geometry: Geometry, dtype: torch.dtype, x: str, y: str, shortcut: str | None, activation: str
) -> Launch:
    operands = [("x", x), *((role, layer.slot(role)) for role in layer.parameter_roles)]
    epilogue = layer.epilogue
    if shortcut is not None:
        operands.append(("shortcut", shortcut))
        epilogue = "add" if epilogue == "store" else f"{epilogue}_add"
    return Launch(
        "conv",
        layer.name,
        geometry,
        dtype,
        tuple(operands),
        (("y", y),),
        epilogue=epilogue,
        activation=activation,
        eps=layer.eps,
        sizes=_sizes([*(role for role, _ in operands), "y"], geometry, dtype),
    )


def _geometries(chain: Chain, n: int, h: int, w: int) -> dict[str, Geometry]:
    """The geometry of each weight layer by its name, given the chain's input size."""
    sizes = {}
    rows, columns = h, w
    for layer in chain.layers:
        sizes[layer.name] = layer.geometry(n, rows, columns)
        rows, columns = sizes[layer.name].P, sizes[layer.name].Q
    if chain.projection is not None:
        sizes[chain.projection.name] = chain.projection.geometry(n, h, w)
    return sizes


def _check_shortcut(chain: Chain, sizes: dict[str, Geometry]) -> None:
    """Raise where the shortcut does not fit: PyTorch would broadcast, or raise a RuntimeError as well."""
    if not chain.residual:
        return
    side = sizes[chain.layers[0].name].x_shape if chain.projection is None else sizes[chain.projection.name].y_shape
    shape = sizes[chain.layers[-1].name].y_shape
    if side != shape:
        raise RuntimeError(
            f"the shortcut of shape {list(side)} does not match the block's output {list(shape)}: "
            "it is added element by element and must have the same shape"
        )


def _pool_launch(geometry: PoolGeometry, dtype: torch.dtype, x: str) -> Launch:
    sizes = (("x", tensor_bytes(geometry.x_shape, dtype)), ("y", tensor_bytes(geometry.y_shape, dtype)))
    return Launch("max_pool", "pool", geometry, dtype, (("x", x),), (("y", "out"),), sizes=sizes)


def _input_slot(index: int) -> str:
    return "x" if index == 0 else f"a{index}"


def _output_slot(chain: Chain, index: int) -> str:
    last = index == len(chain.layers) - 1 and chain.pool is None
    return "out" if last else f"a{index + 1}"


@lru_cache(maxsize=4096)
def forward_plan(
    chain: Chain, n: int, h: int, w: int, dtype: torch.dtype, keep: tuple[str, ...] = (), donated: tuple[str, ...] = ()
) -> Plan:
    """Launches of a chain's forward with running statistics.

    Args:
        chain: what to compute.
        n, h, w: images, rows and columns of the input.
        dtype: element type of activations and filters.
        keep: slots that the backward will read.
        donated: inputs that may be written over.

    Raises:
        RuntimeError: a layer's output would be empty, or the shortcut does not fit.
    """
    sizes = _geometries(chain, n, h, w)
    _check_shortcut(chain, sizes)
    launches = []
    for index, layer in enumerate(chain.layers):
        shortcut = None
        if chain.residual and index == len(chain.layers) - 1:
            shortcut = "x"
            if chain.projection is not None:
                shortcut = "shortcut"
                side = chain.projection
                launches.append(_conv(side, sizes[side.name], dtype, "x", shortcut, None, side.activation))
        x, y = _input_slot(index), _output_slot(chain, index)
        launches.append(_conv(layer, sizes[layer.name], dtype, x, y, shortcut, layer.activation))
    if chain.pool is not None:
        last = sizes[chain.layers[-1].name]
        launches.append(
            _pool_launch(chain.pool.geometry(n, last.P, last.Q, last.K), dtype, _output_slot(chain, len(chain.layers) - 1))
        )
    return Plan(tuple(launches), ("out",), keep, donated)


def _gradient_launch(
    kind: str,
    layer: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    operands: list[tuple[str, str]],
    outputs: list[tuple[str, str]],
    activation: str = "identity",
) -> Launch:
    roles = [role for role, _ in (*operands, *outputs)]
    return Launch(
        kind,
        layer.name,
        geometry,
        dtype,
        tuple(operands),
        tuple(outputs),
        activation=activation,
        eps=layer.eps,
        sizes=_sizes(roles, geometry, dtype),
    )


def _wgrad(layer: Layer, geometry: Geometry, dtype: torch.dtype, x: str, dz: str, needs: frozenset[str]) -> Launch | None:
    """Gradients of a layer's parameters, those that are needed; ``None`` if none is."""
    wanted = [role for role in ("w", "bias", "gamma", "beta") if layer.slot(role) in needs]
    if not wanted:
        return None
    operands = [("dz", dz), ("sum", f"{dz}.sum")]
    contracts = "w" in wanted or "gamma" in wanted
    if contracts:
        operands += [("x", x), ("w", layer.slot("w"))]
    operands += [(role, layer.slot(role)) for role in layer.parameter_roles if role in ("bias", "gamma", "mean", "var")]
    return _gradient_launch(
        "wgrad", layer, geometry, dtype, operands, [(f"d{role}", f"d.{layer.slot(role)}") for role in wanted]
    )


def _dgrad(
    layer: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    dz: str,
    previous: tuple[str, str] | None,
    result: str,
    shortcut_gradient: str | None = None,
) -> Launch:
    """Gradient of a layer's input; behind the previous layer's activation where there is one (output's slot, activation)."""
    operands = [("dz", dz), *((role, layer.slot(role)) for role in layer.parameter_roles if role in ("w", "gamma", "var"))]
    outputs = [("dx", result)]
    activation = "identity"
    if previous is not None:
        slot, activation = previous
        operands.append(("a_previous", slot))
        outputs.append(("sum_previous", f"{result}.sum"))
    if shortcut_gradient is not None:
        operands.append(("dshortcut", shortcut_gradient))
    return _gradient_launch("dgrad", layer, geometry, dtype, operands, outputs, activation)


@lru_cache(maxsize=4096)
def backward_plan(chain: Chain, n: int, h: int, w: int, dtype: torch.dtype, needs: frozenset[str]) -> Plan:
    """Launches of a chain's backward with running statistics.

    Args:
        needs: slots (``x`` and parameters) whose gradient is wanted; nothing else is computed.

    Reads ``dout`` and what the forward kept; the gradient of slot ``s`` is in slot ``d.s``.
    """
    sizes = _geometries(chain, n, h, w)
    launches: list[Launch] = []
    last = chain.layers[-1]
    geometry = sizes[last.name]
    behind = "dout"
    if chain.pool is not None:
        pool = chain.pool.geometry(n, geometry.P, geometry.Q, geometry.K)
        big, small = tensor_bytes(pool.x_shape, dtype), tensor_bytes(pool.y_shape, dtype)
        behind = "d.pool"
        launches.append(
            Launch(
                "max_pool_backward",
                "pool",
                pool,
                dtype,
                (("dy", "dout"), ("x", _output_slot(chain, len(chain.layers) - 1))),
                (("dx", behind),),
                sizes=(("dy", small), ("x", big), ("dx", big)),
            )
        )
    operands = [("dout", behind)]
    if last.activation != "identity":
        operands.append(("out", _output_slot(chain, len(chain.layers) - 1)))
    dz = "dz"
    launches.append(
        _gradient_launch("act_backward", last, geometry, dtype, operands, [("dz", dz), ("sum", "dz.sum")], last.activation)
    )

    side_gradient: str | None = "dz" if chain.residual else None
    if chain.projection is not None:
        side = chain.projection
        launch = _wgrad(side, sizes[side.name], dtype, "x", "dz", needs)
        launches += [launch] if launch else []
        if "x" in needs:
            side_gradient = "d.shortcut"
            launches.append(_dgrad(side, sizes[side.name], dtype, "dz", None, side_gradient))

    for index in range(len(chain.layers) - 1, -1, -1):
        layer = chain.layers[index]
        x = _input_slot(index)
        launch = _wgrad(layer, sizes[layer.name], dtype, x, dz, needs)
        launches += [launch] if launch else []
        earlier = {earlier.slot(role) for earlier in chain.layers[:index] for role in earlier.parameter_roles}
        if index > 0 and ("x" in needs or earlier & needs):
            before = chain.layers[index - 1]
            result = f"dz{index}"
            launches.append(_dgrad(layer, sizes[layer.name], dtype, dz, (x, before.activation), result))
            dz = result
        elif index == 0 and "x" in needs:
            launches.append(_dgrad(layer, sizes[layer.name], dtype, dz, None, "d.x", side_gradient))
        else:
            break
    return Plan(tuple(launches), tuple(f"d.{slot}" for slot in ("x", *chain.parameter_slots) if slot in needs))


@lru_cache(maxsize=1024)
def nominal_size(chain: Chain) -> tuple[int, int, int]:
    """``(n, h, w)`` of a small image that the chain accepts: for what does not depend on sizes."""
    sides = []
    for axis in (0, 1):
        side = 8
        windows = [(layer.kernel, layer.stride, layer.padding, layer.dilation) for layer in chain.layers]
        if chain.pool is not None:
            windows.append((chain.pool.kernel, chain.pool.stride, chain.pool.padding, chain.pool.dilation))
        for kernel, stride, padding, dilation in reversed(windows):
            side = max((side - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis], 1)
        sides.append(side)
    return 1, sides[0], sides[1]


@lru_cache(maxsize=4096)
def saved_slots(chain: Chain, needs: frozenset[str]) -> tuple[str, ...]:
    """Slots that must outlive the forward so that :func:`backward_plan` can run: all it reads, except ``dout``."""
    plan = backward_plan(chain, *nominal_size(chain), torch.float32, needs)
    return tuple(slot for slot in plan.reads() if slot != "dout")


@lru_cache(maxsize=4096)
def kept_slots(chain: Chain, needs: frozenset[str]) -> tuple[str, ...]:
    """The part of :func:`saved_slots` that the forward makes on its way to ``out``."""
    made = chain.activation_shapes(*nominal_size(chain))
    return tuple(slot for slot in saved_slots(chain, needs) if slot in made and slot != "out")
