"""The ten networks: builders against torchvision's, and the fused networks against eager PyTorch."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torchvision
from nets import randomise
from tolerances import NETWORK_FP32, relative_error
from torchvision.models.segmentation import fcn_resnet50

import fused_resnet
from fused_resnet.models import MODELS

TEN = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip
_LARGE = {"resnet152", "wide_resnet101_2", "resnext101_64x4d"}


def theirs(name: str, **arguments: object) -> torch.nn.Module:
    return getattr(torchvision.models, name)(weights=None, **arguments)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Keys in the same order, and shapes and types."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert (left[key].shape, left[key].dtype) == (right[key].shape, right[key].dtype), key


def test_all_ten_are_there() -> None:
    assert list(MODELS) == TEN
    for name in TEN:
        assert getattr(fused_resnet, name) is MODELS[name]
        assert MODELS[name].__name__ == name and MODELS[name].__doc__


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in _LARGE else []) for name in TEN])
def test_logits_through_the_cpu_executor(name: str) -> None:
    """Random affine parameters and running statistics, fp32: relative error of the logits at most 1e-5 against eager."""
    model = randomise(theirs(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        fused_resnet.fuse(model)
        with fused_resnet.count_launches() as log:
            actual = model(x)
    assert expected.std() > 0 and expected.isfinite().all()
    assert {backend for backend, _ in log.launches} == {"cpu"}
    assert relative_error(actual, expected) <= NETWORK_FP32


@pytest.mark.parametrize("name", TEN)
def test_structure_is_torchvisions(name: str) -> None:
    """Same keys in the same order, same shapes, same parameters in the same order (what optimizers number by)."""
    with torch.device("meta"):
        ours, reference = MODELS[name](), theirs(name)
    same_state(ours, reference)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in reference.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in reference.named_modules()]
    for (n, a), (_, b) in zip(ours.named_modules(), reference.named_modules(), strict=True):
        if isinstance(b, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.BatchNorm2d, torch.nn.ReLU)):
            assert type(a) is type(b) and a.extra_repr() == b.extra_repr(), n


def group_norm(channels: int) -> torch.nn.Module:
    return torch.nn.GroupNorm(4, channels)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"num_classes": 7}),
        ("resnet18", {"zero_init_residual": True}),
        ("resnet50", {"zero_init_residual": True}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet50", {"replace_stride_with_dilation": (True, False, True), "num_classes": 3}),
        ("resnet50", {"groups": 4, "width_per_group": 16}),
        ("resnet50", {"width_per_group": 32}),
        ("resnet18", {"norm_layer": group_norm}),
        ("wide_resnet50_2", {"num_classes": 11}),
        ("resnext50_32x4d", {"num_classes": 11}),
        ("wide_resnet50_2", {"width_per_group": 128}),
    ],
    ids=lambda value: str(getattr(value, "keys", lambda: value)()),  # the same in all processes: no addresses
)
def test_arguments_give_torchvisions_network(name: str, arguments: dict) -> None:
    with torch.device("meta"):
        ours, reference = MODELS[name](**arguments), theirs(name, **arguments)
    same_state(ours, reference)
    for (n, a), (_, b) in zip(ours.named_modules(), reference.named_modules(), strict=True):
        assert a.extra_repr() == b.extra_repr(), n


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero", [False, True])
def test_same_seed_same_weights(name: str, zero: bool) -> None:
    torch.manual_seed(3)
    ours = MODELS[name](zero_init_residual=zero)
    torch.manual_seed(3)
    reference = theirs(name, zero_init_residual=zero)
    for (key, a), (_, b) in zip(ours.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_state_dicts_move_both_ways_and_give_the_same_logits(name: str) -> None:
    reference = randomise(theirs(name, num_classes=10)).eval()
    ours = MODELS[name](num_classes=10).eval()
    assert str(ours.load_state_dict(reference.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        assert relative_error(ours(x), reference(x)) <= NETWORK_FP32
        back = theirs(name, num_classes=10).eval()
        back.load_state_dict(randomise(ours).state_dict())
        assert relative_error(ours(x), back(x)) <= NETWORK_FP32


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dilated_network_agrees(name: str) -> None:
    arguments = {"replace_stride_with_dilation": [False, True, True]} if name == "resnet50" else {}
    reference = randomise(theirs(name, num_classes=4, **arguments)).eval()
    ours = MODELS[name](num_classes=4, **arguments).eval()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert relative_error(ours(x), reference(x)) <= NETWORK_FP32


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_step_is_eagers(name: str) -> None:
    """Train mode: loss, every gradient and running statistics are those of torchvision's network."""
    reference = randomise(theirs(name, num_classes=5)).double().train()
    ours = MODELS[name](num_classes=5).double().train()
    ours.load_state_dict(reference.state_dict())
    x, y = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 3])
    for model in (ours, reference):
        torch.nn.functional.cross_entropy(model(x), y).backward()
    for (key, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-9, key
    for (key, a), (_, b) in zip(ours.named_buffers(), reference.named_buffers(), strict=True):
        assert relative_error(a, b) < 1e-12, key


def test_launches_of_resnet50_when_it_runs() -> None:
    """53 convolutions and one pooling; explain says the same."""
    model = theirs("resnet50").eval()
    fused_resnet.fuse(model)
    with torch.inference_mode(), fused_resnet.count_launches() as log:
        model(torch.randn(1, 3, 32, 32))
    assert len(log) == 54 == fused_resnet.explain(model, show=False).launches


@pytest.mark.parametrize(
    ("name", "launches"), [("resnet18", 21), ("resnet34", 37), ("resnet101", 105), ("resnext50_32x4d", 54)]
)
def test_planned_launches(name: str, launches: int) -> None:
    with torch.device("meta"):
        assert fused_resnet.explain(MODELS[name]().eval(), show=False).launches == launches


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "IMAGENET1K_V7"}, ValueError, "IMAGENET1K_V1.*resnet18.*IMAGENET1K_V7"),
        ({"weights": torchvision.models.ResNet50_Weights.DEFAULT}, TypeError, "ResNet18_Weights.*resnet18.*ResNet50_Weights"),
        ({"weights": True}, TypeError, "weights must be of type ResNet18_Weights.*bool"),
        ({"weights": "DEFAULT", "num_classes": 10}, ValueError, "num_classes must be 1000.*got 10"),
        ({"backend": "cuda"}, ValueError, "backend must be one of.*'cuda'"),
        ({"replace_stride_with_dilation": [True]}, ValueError, "3-element"),
        ({"groups": 2}, ValueError, "groups=2"),
        ({"width_per_group": 128}, ValueError, "base_width=128"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    """Found before anything is downloaded."""
    with torch.device("meta"), pytest.raises(error, match=message):
        fused_resnet.resnet18(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"), [("wide_resnet50_2", {"width_per_group": 64}), ("resnext50_32x4d", {"groups": 2})], ids=str
)
def test_what_makes_the_network_cannot_be_changed(name: str, arguments: dict) -> None:
    for build in (MODELS[name], getattr(torchvision.models, name)):
        with torch.device("meta"), pytest.raises(ValueError, match=next(iter(arguments))):
            build(**arguments)


def test_dilated_basic_blocks_are_refused_as_by_torchvision() -> None:
    for build in (fused_resnet.resnet18, torchvision.models.resnet18):
        with torch.device("meta"), pytest.raises(NotImplementedError):
            build(replace_stride_with_dilation=[False, True, False])


def test_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network: torchvision's entry hands over a state_dict of ours."""
    state = randomise(theirs("resnet18")).state_dict()
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, *args, **kwargs: state)
    for weights in (entry, "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"):
        model = fused_resnet.resnet18(weights=weights)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, module, None)
    with torch.device("meta"), pytest.raises(ImportError, match=r"fused_resnet\[models\]"):
        fused_resnet.resnet18(weights="DEFAULT")


def test_backend_argument_reaches_every_block() -> None:
    model = fused_resnet.resnet18(num_classes=3, backend="reference").eval()
    with torch.no_grad(), fused_resnet.count_launches() as log:
        model(torch.randn(1, 3, 32, 32))
    assert {backend for backend, _ in log.launches} == {"reference"}


def test_segmentation_network_with_a_dilated_backbone() -> None:
    """IntermediateLayerGetter holds the stem's modules one by one; the blocks inside are fused."""
    model = randomise(fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        expected = model(x)["out"]
        fused_resnet.fuse(model)
        with fused_resnet.count_launches() as log:
            actual = model(x)["out"]
    assert len(log) >= 52
    assert relative_error(actual, expected) <= NETWORK_FP32


def test_detection_backbone_with_frozen_batch_norm() -> None:
    """FrozenBatchNorm2d is applied in train mode too, with gradients for the stages that train."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    model = randomise(resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=2)).train()
    fused = fused_resnet.fuse(copy.deepcopy(model))
    x = torch.randn(1, 3, 64, 64)
    expected, actual = model(x), fused(x)
    assert list(actual) == list(expected)
    for key in expected:
        assert relative_error(actual[key], expected[key]) <= NETWORK_FP32, key
    sum(out.square().sum() for out in expected.values()).backward()
    sum(out.square().sum() for out in actual.values()).backward()
    for (key, a), b in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        assert a.grad is None or relative_error(a.grad, b.grad) <= 1e-4, key


def test_feature_extraction_by_getter() -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    model = randomise(theirs("resnet18")).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        expected = IntermediateLayerGetter(model, {"layer2": "a", "layer4": "b"})(x)
        actual = IntermediateLayerGetter(fused_resnet.fuse(model), {"layer2": "a", "layer4": "b"})(x)
    for key in expected:
        assert relative_error(actual[key], expected[key]) <= NETWORK_FP32
