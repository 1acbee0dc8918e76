"""BatchNorm of a training step on the CPU, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from nets import TRAINING_CHAINS, chain_inputs
from tolerances import assert_close, assert_no_worse, relative_error

from fused_resnet.backends import cpu, cpu_norm
from fused_resnet.functional import chain

#: Small, with PyTorch's operator; large, of few channels and of many, of sizes that divide into nothing.
SHAPES = [(3, 5, 7, 9), (4, 16, 64, 66), (5, 3, 131, 139), (2, 1, 367, 359), (4, 600, 11, 13)]


def problem(shape: tuple[int, ...], deviations: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """dz, y and what belongs to it; means are so many standard deviations."""
    channels = shape[1]
    dz, y = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    y.mul_(torch.rand(1, channels, 1, 1) + 0.5).add_(deviations * torch.randn(1, channels, 1, 1).sign())
    gamma, beta = torch.randn(channels), torch.randn(channels)
    mean, var = cpu_norm.moments(y)
    return dz, y, {"gamma": gamma, "beta": beta, "mean": mean, "invstd": (var + 1e-5).rsqrt()}


def truth(dz: torch.Tensor, y: torch.Tensor, operands: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """dy, dot and sum by autograd."""
    y, gamma, beta = (tensor.double().contiguous().requires_grad_() for tensor in (y, operands["gamma"], operands["beta"]))
    z = torch.nn.functional.batch_norm(y, None, None, gamma, beta, True, 0.0, 1e-5)
    return list(torch.autograd.grad(z, (y, gamma, beta), dz.double().contiguous()))


def ours(
    dz: torch.Tensor, y: torch.Tensor, operands: dict[str, torch.Tensor], in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy, dot, total = cpu_norm.sums(dz, y, operands, "")
    if dy is None:
        dy = cpu_norm.gradient(dz, y, {**operands, "dot": dot, "sum": total}, in_place)
    return dy, dot, total


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape: tuple[int, ...], affine: bool, in_place: bool) -> None:
    dz, y, operands = problem(shape)
    expected = truth(dz, y, operands if affine else {**operands, "gamma": torch.ones(shape[1])})
    given = operands if affine else {role: operands[role] for role in ("mean", "invstd")}
    before = dz.clone()
    dy, *sums = ours(dz, y, given, in_place)
    pixels = y.numel() // shape[1]
    assert_close(dy, expected[0], 4)
    for actual, exact in zip(sums, expected[1:], strict=True):
        assert_close(actual, exact, pixels)
    assert dy.is_contiguous(memory_format=torch.channels_last)
    large = y.numel() >= cpu_norm.LEAST_APART
    assert (dy.data_ptr() == dz.data_ptr()) is (in_place and large) and torch.equal(dz, before) is not (in_place and large)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("deviations", [30, 100, 1000])
def test_backward_of_large_means_is_no_worse_than_eagers(deviations: float, in_place: bool) -> None:
    """A factor of y and a shift that cancel would leave the rounding of both."""
    dz, y, operands = problem((4, 16, 64, 66), deviations)
    y[:, 1:] -= deviations * y[:, 1:].mean((0, 2, 3), keepdim=True).sign()  # one channel's alone
    operands["mean"], var = cpu_norm.moments(y)
    operands["invstd"] = (var + 1e-5).rsqrt()
    expected = truth(dz, y, operands)
    z_of = torch.ops.aten.native_batch_norm_backward
    vectors = operands["gamma"], None, None, operands["mean"], operands["invstd"]
    eagers = z_of(dz.contiguous(), y.contiguous(), *vectors, True, 1e-5, [True, True, True])
    for what, actual, eager, exact in zip(("dy", "dot", "sum"), ours(dz, y, operands, in_place), eagers, expected, strict=True):
        assert_no_worse(relative_error(actual, exact), relative_error(eager, exact), what)


@pytest.mark.parametrize("shape", [(8, 16, 64, 66), (4, 64, 56, 57), (2, 256, 28, 28), (1, 64, 251, 251)], ids=str)
def test_sums_are_nearly_as_exact_as_of_contiguous_tensors(shape: tuple[int, ...]) -> None:
    """Added up pixel after pixel they are 5 to 30 times as far from float64. Of values of one sign, as behind a pooling."""
    dz, y, operands = problem(shape)
    dz.abs_()
    _, _, exact = truth(dz, y, operands)
    _, _, eager = torch.ops.aten.native_batch_norm_backward(
        dz.contiguous(), y.contiguous(), None, None, None, operands["mean"], operands["invstd"], True, 1e-5, [True] * 3
    )
    assert relative_error(ours(dz, y, operands)[2], exact) <= 4 * relative_error(eager, exact)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_normalised(affine: bool, large: bool) -> None:
    """By the batch's statistics and by given ones."""
    shape = SHAPES[1 if large else 0]
    _, y, operands = problem(shape)
    gamma, beta = (operands.get(role).double() if affine else None for role in ("gamma", "beta"))
    given = {"mean": operands["mean"], **({role: operands[role] for role in ("gamma", "beta")} if affine else {})}
    var = operands["invstd"].double() ** -2 - 1e-5
    expected = torch.nn.functional.batch_norm(y.double(), given["mean"].double(), var, gamma, beta, False, 0.0, 1e-5)
    for statistics, eps in (({"invstd": operands["invstd"]}, 0.0), ({"var": var.float()}, 1e-5)):
        z = cpu_norm.normalised(y, {f"x_{role}": value for role, value in {**given, **statistics}.items()}, "x_", eps)
        assert_close(z, expected, 4)
        assert z.is_contiguous(memory_format=torch.channels_last) and z.data_ptr() != y.data_ptr()


def test_sums_by_given_statistics() -> None:
    for shape in SHAPES:
        dz, y, operands = problem(shape)
        var = torch.rand(shape[1]) + 0.5
        dy, dot, total = cpu_norm.sums(
            dz, y, {"x_mean": operands["mean"], "x_var": var, "x_gamma": operands["gamma"]}, "x_", 0.1
        )
        normal = (y.double() - operands["mean"].double().view(1, -1, 1, 1)) / (var.double() + 0.1).sqrt().view(1, -1, 1, 1)
        assert dy is None
        assert_close(dot, (dz.double() * normal).sum((0, 2, 3)), y.numel() // shape[1])
        assert_close(total, dz.double().sum((0, 2, 3)), y.numel() // shape[1])


def test_sums_of_a_large_tensor_are_nearly_as_exact_as_of_a_contiguous_one() -> None:
    """As it is decided: of 4 million values."""
    dz, y, operands = problem((4, 16, 256, 258))
    dz.abs_()
    dy, dot, total = cpu_norm.sums(dz, y, operands, "")
    assert dy is None and y.numel() > cpu_norm.LARGE
    assert relative_error(total, dz.double().sum((0, 2, 3))) < 4e-7
    normal = (y.double() - operands["mean"].double().view(1, -1, 1, 1)) * operands["invstd"].double().view(1, -1, 1, 1)
    assert relative_error(dot, (dz.double() * normal).sum((0, 2, 3))) < 2e-5, "of positive and negative products"


@pytest.mark.parametrize("name", sorted(TRAINING_CHAINS))
def test_what_is_written_over_nobody_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in place give the same as new ones, the caller's gradient stays what it was, and a second backward agrees."""
    monkeypatch.setattr(cpu_norm, "LEAST_APART", 0)
    spec, h, w = TRAINING_CHAINS[name]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    gradient = cpu_norm.gradient
    places: list[bool] = []

    def step(in_place: bool) -> list[torch.Tensor]:
        def one(dz: torch.Tensor, y: torch.Tensor, operands: dict[str, torch.Tensor], allowed: bool) -> torch.Tensor:
            places.append(allowed)
            return gradient(dz, y, operands, allowed and in_place)

        monkeypatch.setattr(cpu_norm, "gradient", one)
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        out = chain(x, parameters, spec, "cpu")
        dout = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view_as(out)
        dout = dout.contiguous(memory_format=torch.channels_last)
        before = dout.clone()
        first = torch.autograd.grad(out, wanted, dout, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(out, wanted, dout, allow_unused=True)
        assert torch.equal(dout, before)
        for one_, two in zip(first, again, strict=True):
            assert (one_ is None) is (two is None) and (one_ is None or torch.equal(one_, two))
        return [tensor for tensor in first if tensor is not None]

    for new, written_over in zip(step(False), step(True), strict=True):
        assert relative_error(written_over, new.double()) < 1e-5


def test_gradients_in_place_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers but those behind which a shortcut's gradient is still wanted."""
    allowed: list[bool] = []
    gradient = cpu_norm.gradient
    monkeypatch.setattr(cpu_norm, "LEAST_APART", 0)
    monkeypatch.setattr(cpu_norm, "gradient", lambda *args: allowed.append(args[3]) or gradient(*args))
    spec, h, w = TRAINING_CHAINS["basic"]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    chain(x, parameters, spec, "cpu").sum().backward()
    assert allowed == [False, True]
    assert cpu.shares
