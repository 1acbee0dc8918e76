"""Bad input: PyTorch's exception type, and a message that names the argument, what it got and what is expected.

Each case is given to eager PyTorch too: the type is compared with what it raises, not with what we believe it raises.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from nets import copies, images, projection, randomise, tiny
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import count_launches, functional, fuse, resnet18, unfuse
from fused_resnet.chain import Chain, Layer


def norm_net() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


def grouped_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.ReLU())


def broken_groups() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.ReLU())
    net[0].groups = 3
    return net


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(5))


def middle(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(channels, 8, 3), nn.ReLU())


def norm_of(size: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(size).to(dtype), nn.ReLU())


X = torch.ones(2, 3, 9, 9)

#: Name -> (model, input, what the message says).
CASES: dict[str, tuple[Callable[[], nn.Module], object, str]] = {
    "1D": (norm_net, X[0, 0, 0], r"x.*4D.*1D"),
    "2D": (norm_net, X[0, 0], r"x.*4D.*2D"),
    "3D before a BatchNorm": (norm_net, X[0], r"x.*4D.*3D.*\[3, 9, 9\]"),
    "5D": (norm_net, X[None], r"x.*4D.*5D"),
    "2D without BatchNorm": (plain_net, X[0, 0], r"x.*4D.*2D"),
    "5D without BatchNorm": (plain_net, X[None], r"x.*4D.*5D"),
    "3D to a network": (tiny, X[0], r"x.*4D.*3D"),
    "too few channels": (norm_net, X[:, :2], r"x.*\[8, 3, 3, 3\].*\[2, 2, 9, 9\].*3 channels.*2 channels"),
    "too many channels": (norm_net, torch.ones(1, 4, 9, 9), r"3 channels.*4 channels"),
    "no channels": (norm_net, X[:, :0], r"3 channels.*0 channels"),
    "channels of a group": (grouped_net, X, r"groups=2.*6 channels.*3 channels"),
    "channels_last by mistake": (norm_net, torch.ones(2, 9, 9, 3), r"3 channels.*9 channels"),
    "groups that do not divide": (broken_groups, torch.ones(1, 9, 9, 9), r"groups"),
    "channels between two layers, fewer": (
        lambda: middle(4),
        X,
        r"2: .*\[8, 4, 3, 3\].*\[2, 8, 7, 7\].*4 channels.*8 channels",
    ),
    "channels between two layers, more": (
        lambda: middle(16),
        X,
        r"2: .*\[8, 16, 3, 3\].*\[2, 8, 7, 7\].*16 channels.*8 channels",
    ),
    "channels of a projection": (lambda: BasicBlock(3, 8, 1, projection(2, 8)), X, r"downsample: .*2 channels.*3 channels"),
    "BatchNorm of one channel": (lambda: norm_of(1), X, r"8.*1"),
    "BatchNorm of other channels": (lambda: norm_of(4), X, r"8.*4"),
    "BatchNorm in float64": (lambda: norm_of(8, torch.float64), X, r"(?i)float"),
    "BatchNorm in float16": (lambda: norm_of(8, torch.float16), X, r"(?i)float|half"),
    "x in float64": (norm_net, X.double(), r"torch.float64.*torch.float32"),
    "x in bfloat16": (norm_net, X.bfloat16(), r"torch.bfloat16.*torch.float32"),
    "model in bfloat16": (lambda: norm_net().bfloat16(), X, r"torch.float32.*torch.bfloat16"),
    "int64 images": (norm_net, X.long(), r"torch.int64.*torch.float32"),
    "uint8 images": (norm_net, X.to(torch.uint8), r"torch.uint8.*torch.float32"),
    "bool images": (plain_net, X.bool(), r"torch.bool.*torch.float32"),
    "complex images": (plain_net, X.to(torch.complex64), r"torch.complex64.*torch.float32"),
    "model on another device": (lambda: norm_net().to("meta"), X, r"cpu.*meta"),
    "x on another device": (norm_net, X.to("meta"), r"meta.*cpu"),
    "no rows left": (norm_net, X[:, :, :2], r"2x9.*3x3.*0x7"),
    "no rows at all": (norm_net, X[:, :, :0], r"0x9"),
    "nothing left for the pooling": (pooled, X[:, :, :6], r"4x7.*max-pooling.*\(5, 5\)"),
    "a string": (norm_net, "image.png", r"x must be a Tensor.*str"),
    "None": (plain_net, None, r"x must be a Tensor.*NoneType"),
    "a list": (norm_net, [[1.0]], r"x must be a Tensor.*list"),
    "shortcut of other channels": (lambda: BasicBlock(3, 8), X, r"shortcut.*\[2, 3, 9, 9\].*\[2, 8, 9, 9\]"),
    "shortcut of another size": (lambda: BasicBlock(3, 3, 2), X, r"shortcut.*\[2, 3, 9, 9\].*\[2, 3, 5, 5\]"),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_raises_what_eager_raises(name: str, grad: bool) -> None:
    build, x, message = CASES[name]
    model = build().eval()
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as eager:
            model(x)
        fuse(model)
        with pytest.raises(Exception, match=message) as ours:
            model(x)
    assert type(ours.value) is type(eager.value), f"eager raises {type(eager.value).__name__}: {eager.value}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        ("bn1", "running_mean", "running_mean of the BatchNorm behind conv1 must have 64 elements, one for each filter, got 3"),
        ("layer1.0.bn2", "running_var", "running_var of the BatchNorm behind conv2 must have 64 elements"),
        ("layer2.0.downsample.1", "weight", "weight of the BatchNorm behind downsample must have 128 elements"),
        ("layer2.0.bn1", "bias", "bias of the BatchNorm behind conv1 must have 128 elements"),
    ],
)
def test_a_tensor_of_the_wrong_length_is_named_as_its_module_names_it(
    place: str, name: str, message: str, training: bool
) -> None:
    """A layer of a chain has its convolution's name, but ``conv1.running_mean`` is nothing that the user could look at."""
    model = resnet18(num_classes=2).train(training)
    old = getattr(model.get_submodule(place), name)
    setattr(model.get_submodule(place), name, nn.Parameter(torch.ones(3)) if isinstance(old, nn.Parameter) else torch.ones(3))
    with pytest.raises(RuntimeError) as eager:
        unfuse(copies(model)[0])(torch.ones(2, 3, 32, 32))
    assert "elements not 3" in str(eager.value)
    with pytest.raises(RuntimeError, match=message):
        model(torch.ones(2, 3, 32, 32))


def test_the_entry_of_a_chain_has_its_batch_norms_name() -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_mean = torch.zeros(3)
    model = fuse(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(8, 8, 3)).eval())
    with pytest.raises(RuntimeError, match=r"^(?!.*behind).*0\.running_mean must have 8 elements, one for each filter, got 3"):
        model(torch.ones(2, 8, 9, 9))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("channels between", "channels of a p"))])
def test_no_kernel_is_started_that_would_read_channels_that_are_not_there(name: str) -> None:
    build, x, message = CASES[name]
    with pytest.raises(RuntimeError, match=message), count_launches() as log:
        fuse(build().eval(), backend="triton")(x)
    assert not len(log)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bad_input_in_training_mode_is_pytorchs_error(training: bool) -> None:
    net = fuse(norm_net()).train(training)
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.ones(1, 4, 9, 9))
    if training:
        fused_block = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).train()
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fused_block(torch.ones(1, 3, 3, 3))


ODD_BUT_FINE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "no images": (tiny, images(0)),
    "one pixel": (tiny, images(1, 1, 1)),
    "one image without batch, no BatchNorm": (plain_net, X[0]),
    "one image without batch, pooling": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), X[0]),
    "stride 2 without projection on one pixel": (lambda: BasicBlock(3, 3, 2), X[:, :, :1, :1]),
    "meta": (lambda: norm_net().to("meta"), X.to("meta")),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_what_eager_accepts_is_accepted(name: str, grad: bool) -> None:
    build, x = ODD_BUT_FINE[name]
    plain, fused = copies(build().eval())
    fuse(fused)
    with torch.set_grad_enabled(grad):
        expected, actual = plain(x), fused(x)
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if not x.is_meta:
        assert relative_error(actual, expected) < 1e-5


# ------------------------------------------------------------------------------------------- backends


def ran_on(net: nn.Module) -> set[str]:
    with torch.no_grad(), count_launches() as log:
        net(images(1))
    return {name for name, _ in log.launches}


def test_backend_order_argument_context_environment_device(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fuse(tiny())
    assert ran_on(net) == {"cpu"}
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "reference")
    assert ran_on(net) == {"reference"}
    with fused_resnet.backend("cpu"):
        assert ran_on(net) == {"cpu"}
        with fused_resnet.backend("reference"):
            assert ran_on(net) == {"reference"}
        assert ran_on(net) == {"cpu"}
    with fused_resnet.backend("cpu"):
        assert ran_on(fuse(tiny(), backend="reference")) == {"reference"}
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "")
    assert ran_on(net) == {"cpu"}, "empty is not set"
    with mock.patch("os.environ", {**os.environ, "FUSED_RESNET_BACKEND": "reference"}):
        assert ran_on(net) == {"reference"}, "a dict in the environment's place"


def test_context_is_left_after_an_error() -> None:
    net = fuse(tiny())
    with pytest.raises(KeyError), fused_resnet.backend("reference"):
        raise KeyError
    assert ran_on(net) == {"cpu"}


def test_context_is_of_its_thread() -> None:
    import threading

    net, seen = fuse(tiny()), []
    with fused_resnet.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ran_on(net)))
        thread.start()
        thread.join()
    assert seen == [{"cpu"}]


def test_backward_runs_on_the_backend_of_its_forward() -> None:
    """It runs in autograd's threads, where no context is set, perhaps after the context was left."""
    net = fuse(tiny())
    with fused_resnet.backend("reference"):
        out = net(images(1))
    with count_launches() as log:
        out.sum().backward()
    assert {name for name, _ in log.launches} == {"reference"}


def test_filters_of_the_wrong_shape_are_named() -> None:
    """Of a chain that was put together by hand; a module's own follows from its filters."""
    spec = Chain((Layer("conv1", 8, 6, (3, 3), groups=2), Layer("conv2", 4, 8, (1, 1))))
    x, good = torch.ones(2, 6, 9, 9), [torch.ones(8, 3, 3, 3), torch.ones(4, 8, 1, 1)]
    assert functional.chain(x, good, spec).shape == (2, 4, 7, 7)
    for index, shape, message in (
        (0, (8, 6, 3, 3), r"conv1\.weight must be \[K, C / groups, R, S\] = \[8, 3, 3, 3\], got \[8, 6, 3, 3\]"),
        (0, (8, 3, 3), r"conv1\.weight must be .*, got \[8, 3, 3\]"),
        (1, (5, 8, 1, 1), r"conv2\.weight must be .* = \[4, 8, 1, 1\], got \[5, 8, 1, 1\]"),
    ):
        given = [torch.ones(shape) if i == index else w for i, w in enumerate(good)]
        with pytest.raises(RuntimeError, match=message):
            functional.chain(x, given, spec)


def test_unknown_backends_are_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = "'triton', 'cpu', 'reference'"
    with pytest.raises(ValueError, match=f"backend must be one of {choices}, got 'cuda'"), fused_resnet.backend("cuda"):
        pass
    net = fuse(tiny())
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"FUSED_RESNET_BACKEND must be one of {choices}, got 'gpu'"):
        net(images(1))


def test_without_triton_the_cpu_default_runs_and_triton_is_a_clear_error() -> None:
    """macOS, Windows: in a fresh process that has no triton."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fused_resnet
net = fused_resnet.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
x = torch.ones(1, 3, 5, 5)
print(tuple(net(x).shape))
def fused_for_triton():
    fused_resnet.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), backend="triton")(x)
def in_context():
    with fused_resnet.backend("triton"):
        net(x)
for attempt in (fused_for_triton, in_context):
    try:
        attempt()
    except RuntimeError as error:
        print("RuntimeError", error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(fused_resnet.__file__).parents[1])}
    environment.pop("FUSED_RESNET_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "(1, 4, 3, 3)"
    assert len(lines) == 3
    for line in lines[1:]:
        assert line.startswith("RuntimeError backend='triton'") and "Triton is not installed" in line and "'cpu'" in line


def test_amd_gpus_whose_stores_are_not_waited_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = pytest.importorskip("fused_resnet.backends.triton")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for arch, refused in (("gfx942", False), ("gfx950", False), ("gfx1100", True), ("gfx1201", True)):
        monkeypatch.setattr(executor, "arch_of", lambda _, arch=arch: arch)
        with pytest.raises(RuntimeError, match=f"got {arch}.*backend='reference'") if refused else nullcontext():
            executor.check_available(torch.device("cuda"))


def test_cpu_backend_refuses_other_devices() -> None:
    net = fuse(norm_net().eval(), backend="cpu").to("meta")
    with pytest.raises(RuntimeError, match=r"backend='cpu'.*meta"):
        net(X.to("meta"))


# ---- arguments of constructors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": "3"}, "channels must be a whole number, got '3'"),
        ({"filters": 4.0}, "filters must be a whole number, got 4.0"),
        ({"filters": None}, "filters must be a whole number, got None"),
        ({"channels": -3}, "channels must be at least 0, got -3"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, 0)}, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": -1}, "kernel_size must be at least 1, got -1"),
        ({"kernel_size": "3"}, "kernel_size must be a whole number or two of them, got '3'"),
        ({"kernel_size": 3.0}, "kernel_size must be a whole number or two of them, got 3.0"),
        ({"kernel_size": (3,)}, r"kernel_size must be a whole number or two of them, got \(3,\)"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"stride": "1"}, "stride must be a whole number or two of them, got '1'"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"dilation": "1"}, "dilation must be a whole number or two of them, got '1'"),
        ({"groups": "1"}, "groups must be a whole number, got '1'"),
    ],
)
def test_arguments_of_a_block(arguments: dict[str, object], message: str) -> None:
    """The type is PyTorch's for the same layer, made and called; ours comes when it is made."""
    given = {"channels": 3, "filters": 4, "kernel_size": 3, **arguments}
    theirs = {"in_channels": given.pop("channels"), "out_channels": given.pop("filters"), **given}
    with pytest.raises((TypeError, RuntimeError)) as eager:
        nn.Conv2d(**theirs)(X)  # type: ignore[arg-type]
    with pytest.raises(eager.type, match=message) as ours:
        fused_resnet.ConvBNReLU(**{"channels": 3, "filters": 4, **arguments})  # type: ignore[arg-type]
    assert ours.type is eager.type


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": numpy.int64(3), "kernel_size": numpy.int64(3)},
        {"kernel_size": [3, 1]},
        {"stride": (2,)},
        {"dilation": (2,)},
        {"dilation": (2, 1), "kernel_size": (1, 3)},
        {"padding": "same"},
    ],
    ids=str,
)
def test_arguments_that_pytorch_takes(arguments: dict[str, object]) -> None:
    block = fused_resnet.ConvBNReLU(**{"channels": 3, "filters": 4, **arguments}).eval()  # type: ignore[arg-type]
    assert relative_error(block(X), nn.Sequential(*block)(X)) < 1e-6


@pytest.mark.parametrize("build", [fused_resnet.cifar_resnet, fused_resnet.cifar_plain, fused_resnet.cifar_highway])
@pytest.mark.parametrize("depth", ["20", 20.0, None, [20]], ids=str)
def test_depths_that_are_none(build: Callable[[object], nn.Module], depth: object) -> None:
    with pytest.raises(TypeError, match="depth must be a whole number, got ") as raised:
        build(depth)
    assert repr(depth) in str(raised.value)


@pytest.mark.parametrize("name", [5, None, b"resnet18"], ids=str)
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(TypeError, match="name must be a str such as 'resnet50' or 'cifar_resnet56', got ") as raised:
        fused_resnet.models.build(name)  # type: ignore[arg-type]
    assert repr(name) in str(raised.value)
