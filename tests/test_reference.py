"""The reference executor, launch by launch, against float64 autograd: it is what the other executors are held to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import PLAIN_ACTIVATIONS
from tolerances import assert_close, relative_error
from torch import Tensor

from fused_resnet.activations import from_output
from fused_resnet.backends import reference
from fused_resnet.launch import ACTIVATIONS, EPILOGUES, PROLOGUES, Geometry, Launch, PoolGeometry
from fused_resnet.tuning.classes import EXPONENTIAL

F64 = torch.float64

#: Those that end in one tensor; the batch's statistics have tests of their own.
ONE_RESULT = [epilogue for epilogue in EPILOGUES if epilogue != "stats"]

GEOMETRIES = {
    "3x3": Geometry(2, 6, 7, 4, 6, 3, 3, padding=(1, 1)),
    "3x3 stride 2": Geometry(2, 7, 8, 4, 6, 3, 3, (2, 2), (1, 1)),
    "1x1": Geometry(2, 5, 4, 4, 6, 1, 1),
    "1x1 stride 2": Geometry(1, 5, 6, 4, 6, 1, 1, (2, 2)),
    "groups": Geometry(1, 6, 5, 4, 6, 3, 3, padding=(1, 1), groups=2),
    "depthwise": Geometry(1, 6, 5, 6, 6, 3, 3, padding=(1, 1), groups=6),
    "dilated": Geometry(1, 8, 7, 4, 6, 3, 3, (2, 1), (2, 2), (2, 2)),
    "1x7": Geometry(1, 5, 9, 4, 6, 1, 7, (1, 1), (0, 3)),
    "7x7 stride 2": Geometry(1, 11, 10, 3, 6, 7, 7, (2, 2), (3, 3)),
    "stride 3, uneven": Geometry(1, 11, 10, 3, 6, 5, 3, (3, 2), (0, 1)),
    "one channel, one column": Geometry(4, 6, 2, 1, 2, 3, 3, (1, 2), (0, 1)),
}


def tensors(g: Geometry, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Everything a launch could read, by role."""
    vector = {role: torch.randn(g.K, dtype=dtype) for role in ("bias", "gamma", "beta", "mean")}
    made = {"x": torch.randn(g.x_shape, dtype=dtype), "w": torch.randn(g.w_shape, dtype=dtype) * 0.3}
    return {**made, **vector, "var": 0.5 + torch.rand(g.K, dtype=dtype), "shortcut": torch.randn(g.y_shape, dtype=dtype)}


def make(
    kind: str, g: Geometry | PoolGeometry, roles: list[str], outputs: list[str], dtype: torch.dtype = F64, **rest: object
) -> Launch:
    return Launch(kind, "layer", g, dtype, tuple((r, r) for r in roles), tuple((o, o) for o in outputs), **rest)


def convolve(g: Geometry, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, w, bias, g.stride, g.padding, g.dilation, g.groups)


def truth(g: Geometry, epilogue: str, activation: str, t: dict[str, Tensor], eps: float) -> Tensor:
    t = {role: tensor.double() for role, tensor in t.items()}
    y = convolve(g, t["x"], t["w"], t.get("bias"))
    if "affine" in epilogue:
        y = F.batch_norm(y, t["mean"], t["var"], t.get("gamma"), t.get("beta"), eps=eps)
    if "add" in epilogue:
        y = y + t["shortcut"]
    return PLAIN_ACTIVATIONS[activation](y, 0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", ONE_RESULT)
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "groups", "1x1"])
def test_every_epilogue_and_activation(name: str, epilogue: str, activation: str) -> None:
    g = GEOMETRIES[name]
    roles = ["x", "w", *EPILOGUES[epilogue]]
    given = {role: tensor for role, tensor in tensors(g).items() if role in roles}
    launch = make("conv", g, roles, ["y"], epilogue=epilogue, activation=activation, eps=1e-3)
    assert relative_error(reference.run(launch, given), truth(g, epilogue, activation, given, 1e-3)) < 1e-13


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("absent", [(), ("bias",), ("gamma", "beta"), ("bias", "gamma", "beta")], ids=str)
def test_affine_without_some_of_its_vectors(name: str, absent: tuple[str, ...]) -> None:
    g = GEOMETRIES[name]
    roles = [role for role in ("x", "w", *EPILOGUES["affine_add"]) if role not in absent]
    given = {role: tensor for role, tensor in tensors(g).items() if role in roles}
    launch = make("conv", g, roles, ["y"], epilogue="affine_add", activation="relu", eps=1e-5)
    assert relative_error(reference.run(launch, given), truth(g, "affine_add", "relu", given, 1e-5)) < 1e-13


def test_one_channel_in_channels_last() -> None:
    """Found by test_training_networks: oneDNN is silently wrong for it, in eager PyTorch too."""
    g = GEOMETRIES["one channel, one column"]
    t = {role: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
         for role, tensor in tensors(g, torch.float32).items()}  # fmt: skip
    given = {"x": t["x"].as_strided(g.x_shape, (12, 1, 2, 1)), "w": t["w"].as_strided(g.w_shape, (9, 1, 3, 1))}
    y = reference.run(make("conv", g, ["x", "w"], ["y"], torch.float32), given)
    assert_close(y, convolve(g, t["x"].double(), t["w"].double()), g.R * g.S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Sums and epilogue in fp32, one rounding at the store."""
    g = GEOMETRIES["3x3"]
    given = tensors(g, dtype)
    launch = make(
        "conv", g, ["x", "w", *EPILOGUES["affine_add"]], ["y"], dtype, epilogue="affine_add", activation="relu", eps=1e-5
    )
    y = reference.run(launch, given)
    assert y.dtype == dtype
    assert_close(y, truth(g, "affine_add", "relu", given, 1e-5), g.C * g.R * g.S)


POOLS = [
    PoolGeometry(2, 9, 8, 3, (3, 3), (2, 2), (1, 1)),
    PoolGeometry(1, 6, 7, 4, (2, 2), (2, 2)),
    PoolGeometry(1, 9, 9, 2, (3, 2), (1, 2), (1, 0), (2, 1)),
    PoolGeometry(1, 18, 21, 2, (17, 16), (1, 2), (2, 3)),
]


@pytest.mark.parametrize("g", POOLS, ids=str)
def test_max_pooling_and_its_backward(g: PoolGeometry) -> None:
    """With ties (values are rounded to halves): the gradient goes to the first maximum, as in eager PyTorch."""
    x = ((torch.randn(g.x_shape, dtype=F64) * 2).round() / 2).requires_grad_()
    y = F.max_pool2d(x, g.kernel, g.stride, g.padding, g.dilation)
    dy = torch.randn_like(y)
    assert torch.equal(reference.run(make("max_pool", g, ["x"], ["y"]), {"x": x.detach()}), y)
    dx = reference.run(make("max_pool_backward", g, ["dy", "x"], ["dx"]), {"dy": dy, "x": x.detach()})
    assert torch.equal(dx, torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bn_add_relu_backward(activation: str) -> None:
    g = GEOMETRIES["3x3"]
    z = torch.randn(g.y_shape, dtype=F64, requires_grad=True)
    out = PLAIN_ACTIVATIONS[activation](z * 1, 0.0)
    dout = torch.randn(g.y_shape, dtype=F64)
    read = {"dout": dout, **({"out": out.detach()} if from_output(activation, 0.0) else {"y": z.detach()})}
    launch = make("bn_add_relu_backward", g, [*read], ["dz", "sum"], activation=activation)
    dz, total = reference.run(launch, read)
    expected = torch.autograd.grad(out, z, dout)[0]
    assert torch.equal(dz, expected)
    assert relative_error(total, expected.sum((0, 2, 3))) < 1e-13


@pytest.mark.parametrize("behind", ["nothing", *ACTIVATIONS])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_dgrad(name: str, affine: bool, behind: str) -> None:
    """Gradient of ``batch_norm(conv(act(z))) `` for z, plus a shortcut's gradient where there is no activation in front."""
    g = GEOMETRIES[name]
    t = tensors(g)
    z = torch.randn(g.x_shape, dtype=F64, requires_grad=True)
    a = PLAIN_ACTIVATIONS["identity" if behind == "nothing" else behind](z * 1, 0.0)
    y = convolve(g, a, t["w"])
    if affine:
        y = F.batch_norm(y, t["mean"], t["var"], t["gamma"], t["beta"], eps=1e-3)
    dz = torch.randn_like(y)
    expected = torch.autograd.grad(y, z, dz)[0]
    given = {"dz": dz, "w": t["w"], **({"gamma": t["gamma"], "var": t["var"]} if affine else {})}
    ends = {"gradient": "scale" if affine else "identity", "eps": 1e-3}
    if behind == "nothing":
        given["dshortcut"] = torch.randn(g.x_shape, dtype=F64)
        dx = reference.run(make("dgrad", g, [*given], ["dx"], **ends), given)
        assert relative_error(dx, expected + given["dshortcut"]) < 1e-13
        return
    given |= {"a_previous": a.detach()} if from_output(behind, 0.0) else {"z_previous": z.detach()}
    ends |= {"epilogue": "mask", "activation": behind}
    dx, total = reference.run(make("dgrad", g, [*given], ["dx", "sum_previous"], **ends), given)
    assert relative_error(dx, expected) < 1e-13
    assert relative_error(total, expected.sum((0, 2, 3))) < 1e-12


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", ["affine", "norm", "none"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_wgrad(name: str, norm: str, bias: bool) -> None:
    """Gradients of filters, bias, gamma and beta; that of gamma without the convolution's output."""
    g = GEOMETRIES[name]
    t = {role: tensor.requires_grad_() for role, tensor in tensors(g).items()}
    wanted = ["w", *(["bias"] if bias else []), *(["gamma", "beta"] if norm == "affine" else [])]
    y = convolve(g, t["x"], t["w"], t["bias"] if bias else None)
    mean, var = t["mean"].detach(), t["var"].detach()
    if norm != "none":
        gamma, beta = (t["gamma"], t["beta"]) if norm == "affine" else (None, None)
        y = F.batch_norm(y, mean, var, gamma, beta, eps=1e-3)
    dz = torch.randn_like(y)
    expected = torch.autograd.grad(y, [t[role] for role in wanted], dz)
    roles = ["dz", "sum", "x", "w", *(["bias"] if bias else []), *(["gamma"] if norm == "affine" else [])]
    roles += [] if norm == "none" else ["mean", "var"]
    given = {"dz": dz, "sum": dz.sum((0, 2, 3)), **{role: t[role].detach() for role in roles[2:]}}
    gradient = "identity" if norm == "none" else "scale"
    actual = reference.run(make("wgrad", g, roles, [f"d{role}" for role in wanted], gradient=gradient, eps=1e-3), given)
    for role, a, e in zip(wanted, actual if len(wanted) > 1 else [actual], expected, strict=True):
        assert relative_error(a, e) < 1e-12, role


def test_autocast_does_not_change_a_launch() -> None:
    """The plan has chosen the types."""
    g = GEOMETRIES["3x3"]
    given = tensors(g, torch.float32)
    launch = make("conv", g, ["x", "w"], ["y"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.run(launch, given)
    assert torch.equal(inside, reference.run(launch, given))


# ------------------------------------------------------------------------------------- the batch's statistics


def statistics(x: Tensor, eps: float, prefix: str) -> dict[str, Tensor]:
    """What BatchNorm with the batch's statistics reads for ``x``, by role; some gammas negative."""
    channels = x.shape[1]
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    gamma, beta = torch.randn(channels, dtype=x.dtype), torch.randn(channels, dtype=x.dtype) * 0.3
    made = {"mean": mean, "invstd": (var + eps).rsqrt(), "gamma": gamma, "beta": beta}
    return {f"{prefix}{role}": tensor.detach() for role, tensor in made.items()}


def batch_norm(x: Tensor, vectors: dict[str, Tensor], prefix: str, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, vectors.get(f"{prefix}gamma"), vectors.get(f"{prefix}beta"), training=True, eps=eps)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_prologue(name: str, prologue: str, affine: bool) -> None:
    """The padding is of what the prologue gives: zero behind the ReLU, not BatchNorm of zero."""
    g = GEOMETRIES[name]
    t = tensors(g)
    given = {"x": t["x"], "w": t["w"]}
    a = t["x"]
    if prologue.startswith("bn"):
        vectors = statistics(t["x"], 1e-3, "x_")
        given.update({role: v for role, v in vectors.items() if affine or role in ("x_mean", "x_invstd")})
        a = batch_norm(t["x"], given, "x_", 1e-3)
    launch = make("conv", g, [*given], ["y"], prologue=prologue)
    a = PLAIN_ACTIVATIONS[launch.x_activation](a, 0.0)
    y = reference.run(launch, given)
    assert relative_error(y, convolve(g, a, t["w"])) < 1e-13


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.3, 1.0, 0.0, None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ["3x3", "1x1 stride 2", "groups"])
def test_statistics_of_what_is_stored(name: str, bias: bool, momentum: float | None, dtype: torch.dtype) -> None:
    """The batch's mean and 1 / sqrt(var + eps) of the rounded y, the running ones with the unbiased variance."""
    g = GEOMETRIES[name]
    t = tensors(g, dtype)
    given = {"x": t["x"], "w": t["w"], **({"bias": t["bias"]} if bias else {})}
    given |= {"running_mean": torch.randn(g.K), "running_var": torch.rand(g.K) + 0.5, "batches": torch.tensor(4)}
    if dtype == F64:
        given |= {role: given[role].double() for role in ("running_mean", "running_var")}
    old = {role: tensor.clone() for role, tensor in given.items()}
    launch = make("conv", g, [*given], ["y", "mean", "invstd"], dtype, epilogue="stats", eps=1e-3, momentum=momentum)
    y, mean, invstd = reference.run(launch, given)
    assert y.dtype == dtype and mean.dtype == invstd.dtype == (F64 if dtype == F64 else torch.float32)
    assert_close(y, convolve(g, *(tensor.double() if tensor is not None else None for tensor in
        (t["x"], t["w"], t["bias"] if bias else None))), g.C * g.R * g.S)  # fmt: skip
    stored, few = y.double(), 1e-13 if dtype == F64 else 1e-6
    assert relative_error(mean, stored.mean((0, 2, 3))) < few
    assert relative_error(invstd, (stored.var((0, 2, 3), correction=0) + 1e-3).rsqrt()) < few
    assert given["batches"] == 5
    factor = 1 / 5 if momentum is None else momentum
    for role, new in (("running_mean", stored.mean((0, 2, 3))), ("running_var", stored.var((0, 2, 3), correction=1))):
        assert relative_error(given[role], (1 - factor) * old[role].double() + factor * new) < few, role


def test_statistics_without_running_ones() -> None:
    g = GEOMETRIES["3x3"]
    t = tensors(g)
    given = {role: t[role] for role in ("x", "w")}
    y, mean, _ = reference.run(make("conv", g, ["x", "w"], ["y", "mean", "invstd"], epilogue="stats", eps=1e-5), given)
    assert relative_error(mean, y.mean((0, 2, 3))) < 1e-13
    y, mean, var = reference.run(make("conv", g, ["x", "w"], ["y", "mean", "var"], epilogue="stats", eps=1e-5), given)
    assert relative_error(var, y.var((0, 2, 3), correction=0)) < 1e-13, "the share of one rank: biased, and not inverted"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shortcut", ["none", "identity", "batch statistics"])
@pytest.mark.parametrize("last", ["batch statistics", "given"])
def test_bn_add_relu_and_its_backward(last: str, shortcut: str, activation: str) -> None:
    """``act(bn(y) + shortcut)``; backward dz, its sum, and its sums with the normalised inputs: dbeta and the dgammas."""
    shape = (3, 4, 5, 6)
    y, side = (torch.randn(shape, dtype=F64, requires_grad=True) for _ in range(2))
    given, z = {"y": y.detach()}, y
    if last == "batch statistics":
        given |= statistics(y, 1e-3, "")
        given["gamma"].requires_grad_()
        z = batch_norm(y, given, "", 1e-3)
    if shortcut != "none":
        given["shortcut"] = side.detach()
        if shortcut == "batch statistics":
            given |= statistics(side, 1e-3, "shortcut_")
            given["shortcut_gamma"].requires_grad_()
        z = z + (batch_norm(side, given, "shortcut_", 1e-3) if shortcut == "batch statistics" else side)
    z.retain_grad()
    out = PLAIN_ACTIVATIONS[activation](z * 1, 0.0)
    g = Geometry(3, 5, 6, 4, 4, 1, 1)
    with torch.no_grad():
        assert (
            relative_error(reference.run(make("bn_add_relu", g, [*given], ["out"], activation=activation), given), out) < 1e-13
        )
    dout = torch.randn(shape, dtype=F64)
    out.backward(dout)
    wanted = {"dz": z.grad, "sum": z.grad.sum((0, 2, 3))}
    read = {"dout": dout, **({"out": out.detach()} if activation != "identity" else {})}
    if not from_output(activation, 0.0):
        read = {"dout": dout, **{role: tensor.detach() for role, tensor in given.items()}}
    if last == "batch statistics":
        read |= {role: given[role] for role in ("y", "mean", "invstd")}
        wanted["dot"] = given["gamma"].grad
    if shortcut == "batch statistics":
        read |= {role: given[role] for role in ("shortcut", "shortcut_mean", "shortcut_invstd")}
        wanted["shortcut_dot"] = given["shortcut_gamma"].grad
    launch = make("bn_add_relu_backward", g, [*read], [*wanted], activation=activation)
    for (role, expected), actual in zip(wanted.items(), reference.run(launch, read), strict=True):
        assert relative_error(actual, expected) < 1e-12, role


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_through_batch_statistics_on_both_sides(name: str, affine: bool, activation: str) -> None:
    """dgrad and wgrad of ``bn(conv(act(bn(x))))``: dy from dz and y, the activation from x, both on load."""
    g = GEOMETRIES[name]
    x = torch.randn(g.x_shape, dtype=F64)
    w = (torch.randn(g.w_shape, dtype=F64) * 0.3).requires_grad_()
    before = statistics(x, 1e-3, "x_")
    z_before = batch_norm(x, before if affine else {}, "x_", 1e-3).requires_grad_()
    y = convolve(g, PLAIN_ACTIVATIONS[activation](z_before * 1, 0.0), w)
    behind = statistics(y.detach(), 1e-3, "")
    z = batch_norm(y, behind if affine else {}, "", 1e-3)
    dz = torch.randn_like(z)
    dx, dw = torch.autograd.grad(z, [z_before, w], dz)
    centred = (y.detach() - behind["mean"].view(1, -1, 1, 1)) * behind["invstd"].view(1, -1, 1, 1)
    vectors = {"y": y.detach(), **{role: behind[role] for role in ("mean", "invstd", *(["gamma"] if affine else []))}}
    vectors |= {"sum": dz.sum((0, 2, 3)), "dot": (dz * centred).sum((0, 2, 3))}
    inputs = {"x": x, **{role: v for role, v in before.items() if affine or role in ("x_mean", "x_invstd")}}
    given = {"dz": dz, "w": w.detach(), **vectors, **inputs}
    ends = {"gradient": "bn_backward", "epilogue": "bn_mask", "activation": activation, "eps": 1e-3}
    launch = make("dgrad", g, [*given], ["dx", "sum_previous", "dot_previous"], **ends)
    actual, total, dot = reference.run(launch, given)
    assert relative_error(actual, dx) < 1e-12
    normal = (x - before["x_mean"].view(1, -1, 1, 1)) * before["x_invstd"].view(1, -1, 1, 1)
    scale = dx.abs().sum()  # a sum itself may be zero: BatchNorm's gradients are free of the mean
    assert (total - dx.sum((0, 2, 3))).abs().max() < 1e-13 * scale
    assert (dot - (dx * normal).sum((0, 2, 3))).abs().max() < 1e-13 * scale
    del given["w"]
    prologue = "bn" if activation == "identity" else f"bn_{activation}"
    launch = make("wgrad", g, [*given], ["dw", "dbias"], prologue=prologue, gradient="bn_backward", eps=1e-3)
    actual, bias = reference.run(launch, given)
    assert relative_error(actual, dw) < 1e-12
    assert torch.equal(bias, torch.zeros(g.K, dtype=F64)), "BatchNorm subtracts what a bias adds"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("g", POOLS, ids=str)
def test_pooling_of_what_it_normalises(g: PoolGeometry, activation: str) -> None:
    """``max_pool(act(bn(y)))`` with the place of each maximum, in a byte if that can; with ties, at the first, as in eager.

    Ties only where the activation is exact: PyTorch's exponentials give the same input another last bit at the end of a tensor
    (AVX-512), and the end is elsewhere in another layout.
    """
    x = torch.randn(g.x_shape, dtype=F64) * 2
    if activation not in EXPONENTIAL:
        x = x.round() / 2
    vectors = statistics(x, 1e-3, "x_")
    z = batch_norm(x, vectors, "x_", 1e-3).requires_grad_()
    expected = F.max_pool2d(PLAIN_ACTIVATIONS[activation](z * 1, 0.0), g.kernel, g.stride, g.padding, g.dilation)
    dy = torch.randn_like(expected)
    (dz,) = torch.autograd.grad(expected, z, dy)
    prologue = "bn" if activation == "identity" else f"bn_{activation}"
    launch = make("max_pool", g, ["x", *vectors], ["y", "indices"], prologue=prologue)
    y, indices = reference.run(launch, {"x": x, **vectors})
    assert relative_error(y, expected) < 1e-13
    assert indices.dtype == (torch.uint8 if g.kernel[0] < 16 else torch.int32)
    assert int(indices.min()) >= 0 and int(indices.max()) < g.kernel[0] * g.kernel[1]
    given = {"dy": dy, "x": x, "indices": indices, **vectors} | ({"out": y} if from_output(activation, 0.0) else {})
    launch = make("max_pool_backward", g, [*given], ["dx", "sum", "dot"], activation=activation)
    dx, total, dot = reference.run(launch, given)
    assert relative_error(dx, dz) < 1e-13
    assert relative_error(total, dz.sum((0, 2, 3))) < 1e-12
    normal = (x - vectors["x_mean"].view(1, -1, 1, 1)) * vectors["x_invstd"].view(1, -1, 1, 1)
    assert relative_error(dot, (dz * normal).sum((0, 2, 3))) < 1e-12
