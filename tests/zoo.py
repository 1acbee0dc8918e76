"""Models of others, small: what each is built by, without a download, and the comparison that all of them have to pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from nets import randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_resnet import count_launches, fuse, unfuse

#: Name -> (package, builder, shape of the images, least fused share of the convolutions' FLOPs).
ZOO: dict[str, tuple[str, Callable[[Any], nn.Module], tuple[int, ...], float]] = {}


def _timm(name: str, share: float = 0.95, size: int = 64, **options: Any) -> None:
    key = " ".join([name, *(f"{option}={value}" for option, value in options.items())])
    options.setdefault("num_classes", 7) if "features_only" not in options else None
    ZOO[f"timm {key}"] = ("timm", lambda timm: timm.create_model(name, **options), (2, 3, size, size), share)


def _vision(name: str, share: float = 0.95, size: int = 64, **options: Any) -> None:
    def build(models: Any) -> nn.Module:
        if name == "googlenet":
            options.update(init_weights=False, aux_logits=False)
        if name == "inception_v3":
            options.update(init_weights=False, aux_logits=False)
        return models.get_model(name, weights=None, num_classes=7, **options)

    ZOO[f"torchvision {name}"] = ("torchvision.models", build, (2, 3, size, size), share)


for _name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "googlenet", "vgg11_bn"):
    _vision(_name)
_vision("densenet121", 0.85)
for _name, _share in (("mnasnet0_5", 0.95), ("shufflenet_v2_x0_5", 0.95), ("mobilenet_v2", 0.9), ("squeezenet1_1", 0.95)):
    _vision(_name, _share)
for _name in ("efficientnet_b0", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf"):
    _vision(_name, 0.9)
_vision("inception_v3", 0.95, 96)
for _name in (
    "resnet18", "resnet26", "resnet26t", "resnet26d", "resnet50", "resnet50d", "resnet50s", "resnext26ts", "resnext50_32x4d",
    "wide_resnet50_2", "seresnet50", "ecaresnet26t", "resnetrs50", "regnetx_002", "regnety_002", "resnetblur18", "skresnet18",
):  # fmt: skip
    _timm(_name)
_timm("resnetv2_50d", 0.9)  # its projections have nothing behind them
_timm("resnet18", features_only=True)
_timm("resnet50", features_only=True, output_stride=8)
_timm("resnet26d", output_stride=16)
_timm("resnet18", drop_path_rate=0.0, drop_block_rate=0.0)
_timm("resnest14d", 0.9)
_timm("densenet121", 0.85)


def _detection(name: str) -> None:
    def build(detection: Any) -> nn.Module:
        options = {"weights": None, "weights_backbone": None, "num_classes": 3}
        return _Backbone(getattr(detection, name)(**options))

    # The plain FPN's convolutions have neither BatchNorm nor activation behind them: nothing to be fused with.
    share = 0.85 if name.endswith("v2") else 0.65
    ZOO[f"torchvision {name} backbone"] = ("torchvision.models.detection", build, (2, 3, 96, 96), share)


class _Backbone(nn.Module):
    """The backbone, the neck and the heads of a detection model, without the choice of boxes, which jumps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        features = list(self.model.backbone(x).values())
        if hasattr(self.model, "rpn"):
            return features, self.model.rpn.head(features)
        return features, self.model.head(features)


for _name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"):
    _detection(_name)
_detection("retinanet_resnet50_fpn")
_detection("retinanet_resnet50_fpn_v2")
for _name in ("fcn_resnet50", "deeplabv3_resnet50"):
    ZOO[f"torchvision {_name}"] = (
        "torchvision.models.segmentation",
        lambda models, name=_name: getattr(models, name)(weights=None, weights_backbone=None, num_classes=4, aux_loss=True),
        (2, 3, 64, 64),
        0.85,
    )


def _transformers(kind: str, layer: str) -> None:
    def build(transformers: Any) -> nn.Module:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "layer_type": layer}
        return getattr(transformers, kind)(transformers.ResNetConfig(num_labels=5, **sizes))

    ZOO[f"transformers {kind} {layer}"] = ("transformers", build, (2, 3, 64, 64), 0.95)


_transformers("ResNetModel", "basic")
_transformers("ResNetForImageClassification", "bottleneck")


def _rt_detr(transformers: Any) -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "layer_type": "basic"}
    return transformers.RTDetrResNetBackbone(transformers.RTDetrResNetConfig(**sizes))


ZOO["transformers RTDetrResNetBackbone"] = ("transformers", _rt_detr, (2, 3, 64, 64), 0.95)


def _unet(smp: Any) -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 16))


ZOO["smp Unet resnet18"] = ("segmentation_models_pytorch", _unet, (2, 3, 64, 64), 0.95)
ZOO["smp Unet resnet50"] = (
    "segmentation_models_pytorch",
    lambda smp: smp.Unet("resnet50", encoder_weights=None),
    (1, 3, 64, 64),
    0.95,
)
ZOO["open_clip ModifiedResNet"] = (
    "open_clip.modified_resnet",
    lambda clip: clip.ModifiedResNet([1, 2, 1, 1], output_dim=32, heads=8, image_size=64, width=16),
    (2, 3, 64, 64),
    0.95,
)


class CifarBlock(nn.Module):
    """A block as people write it for CIFAR: functions, a shortcut that is always a Sequential."""

    def __init__(self, channels: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return nn.functional.relu(out)


class CifarNet(nn.Module):
    """A small ResNet for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.stages = nn.ModuleList([CifarBlock(8, 8), CifarBlock(8, 16, 2), CifarBlock(16, 16)])
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        return self.linear(nn.functional.avg_pool2d(x, x.shape[-2:]).flatten(1))


ZOO["by hand CifarNet"] = ("torch", lambda _: CifarNet(), (2, 3, 33, 31), 1.0)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random state, and images for it; skips where its package is not installed."""
    package, make, shape, _ = ZOO[name]
    pytest.importorskip(package.split(".")[0])
    model = randomise(make(import_module(package)))
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # which draws in the order of memory, and the layout differs
            module.p = 0.0
    return model, torch.randn(shape)


def outputs(made: Any) -> list[Tensor]:
    """The floating-point tensors of any result."""
    values = made.values() if isinstance(made, dict) else made
    leaves = tree_leaves(dict(values=list(values)) if isinstance(made, dict) else made)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _far(actual: Tensor, truth: Tensor) -> float:
    difference, scale = (actual.detach().double() - truth.detach().double()).norm(), truth.detach().double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


@torch.no_grad()
def _fill(model: nn.Module, x: Tensor) -> None:
    """Running statistics near the true ones, of which deep random networks in eval mode keep their numbers in range."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 0.7
    model(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by name, of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    out = outputs(model(x))
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in out if y.requires_grad
    )
    total.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, {"x": x.grad, **gradients}


def check(name: str, training: bool) -> int:
    """Compare a model of the zoo before and after ``fuse``, and after ``unfuse``; returns the number of launches.

    In float64 all must agree to the rounding: in fp32 a ReLU whose input rounds to the other side of zero moves gradients of
    deep random networks by percents, eager's among them. In fp32 outputs are held against float64.
    """
    plain, x = build(name)
    _fill(plain, x)
    plain.train(training)
    fused, exact, wide = (copy.deepcopy(plain) for _ in range(3))
    kinds = [type(module) for module in fused.modules()]
    fuse(fused), exact.double(), fuse(wide.double())
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    truth, wanted = _step(exact, x.double())
    with count_launches() as log:
        results, gradients = _step(wide, x.double())
    assert len(log) > 0 and gradients.keys() == wanted.keys() and len(results) == len(truth)
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for a, t in zip(results, truth, strict=True):
        assert a.shape == t.shape and _far(a, t) < 1e-9, _far(a, t)
    for key, t in wanted.items():
        assert float((gradients[key] - t).norm()) <= 1e-7 * float(t.norm()) + 1e-10 * scale, key
    for key, t in exact.state_dict().items():
        assert _far(wide.state_dict()[key], t) < 1e-9, key
    with torch.no_grad():
        for a, e, t in zip(outputs(fused(x)), outputs(plain(x)), truth, strict=True):
            assert a.shape == e.shape and a.dtype == e.dtype
            assert _far(a, t) <= max(3 * _far(e, t), 1e-5), f"output: {_far(a, t):.1e}, eager's own {_far(e, t):.1e}"
            assert _far(a, t) <= (1e-3 if training else 1e-4)
    assert list(fused.state_dict()) == list(plain.state_dict()) == list(state)
    for key, value in fused.state_dict().items():
        assert _far(value, plain.state_dict()[key]) < 1e-4, key
        if not training:
            assert torch.equal(value, state[key]), key
    unfuse(fused)
    assert [type(module) for module in fused.modules()] == kinds
    assert not any(key.startswith("fused_") for module in fused.modules() for key in module.__dict__)
    return len(log)
