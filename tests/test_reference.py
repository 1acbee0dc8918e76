"""The reference executor, launch by launch, against float64 autograd: it is what the other executors are held to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, relative_error
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.launch import ACTIVATIONS, EPILOGUES, Geometry, Launch, PoolGeometry

F64 = torch.float64

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
    return F.relu(y) if activation == "relu" else y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
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
    out = F.relu(z) if activation == "relu" else z * 1
    dout = torch.randn(g.y_shape, dtype=F64)
    roles = ["dout", "out"] if activation == "relu" else ["dout"]
    launch = make("bn_add_relu_backward", g, roles, ["dz", "sum"], activation=activation)
    dz, total = reference.run(launch, {"dout": dout, "out": out.detach()} if activation == "relu" else {"dout": dout})
    expected = torch.autograd.grad(out, z, dout)[0]
    assert torch.equal(dz, expected)
    assert relative_error(total, expected.sum((0, 2, 3))) < 1e-13


@pytest.mark.parametrize("behind", ["nothing", "relu", "identity"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_dgrad(name: str, affine: bool, behind: str) -> None:
    """Gradient of ``batch_norm(conv(act(z))) `` for z, plus a shortcut's gradient where there is no activation in front."""
    g = GEOMETRIES[name]
    t = tensors(g)
    z = torch.randn(g.x_shape, dtype=F64, requires_grad=True)
    a = F.relu(z) if behind == "relu" else z * 1
    y = convolve(g, a, t["w"])
    if affine:
        y = F.batch_norm(y, t["mean"], t["var"], t["gamma"], t["beta"], eps=1e-3)
    dz = torch.randn_like(y)
    expected = torch.autograd.grad(y, z, dz)[0]
    given = {"dz": dz, "w": t["w"], **({"gamma": t["gamma"], "var": t["var"]} if affine else {})}
    if behind == "nothing":
        given["dshortcut"] = torch.randn(g.x_shape, dtype=F64)
        (dx,) = reference.run(make("dgrad", g, [*given], ["dx"], eps=1e-3), given)
        assert relative_error(dx, expected + given["dshortcut"]) < 1e-13
        return
    given["a_previous"] = a.detach()
    dx, total = reference.run(make("dgrad", g, [*given], ["dx", "sum_previous"], activation=behind, eps=1e-3), given)
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
    actual = reference.run(make("wgrad", g, roles, [f"d{role}" for role in wanted], eps=1e-3), given)
    for role, a, e in zip(wanted, actual, expected, strict=True):
        assert relative_error(a, e) < 1e-12, role


def test_autocast_does_not_change_a_launch() -> None:
    """The plan has chosen the types."""
    g = GEOMETRIES["3x3"]
    given = tensors(g, torch.float32)
    launch = make("conv", g, ["x", "w"], ["y"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.run(launch, given)
    assert torch.equal(inside, reference.run(launch, given))
