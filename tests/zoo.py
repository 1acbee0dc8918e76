"""Models of others, small: what each is built by, without a download. What they have to pass is in :mod:`zoo_check`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from nets import randomise
from torch import Tensor, nn

from fused_resnet.detectors import comparable

#: Name -> (package, builder, shape of the images, least fused share of the convolutions' FLOPs).
ZOO: dict[str, tuple[str, Callable[[Any], nn.Module], tuple[int, ...], float]] = {}


#: Images of a row whose BatchNorms stand behind a mean over each image. Of two such a BatchNorm has two values, and divides by
#: their difference: in fp32 the distance from float64 was 0.3 to 2.8 times eager's over twelve draws of resnest14d (0.8 in the
#: geometric mean), eager's own 3e-6 to 5e-5; of four images 0.7 to 2.2, of eight 0.9 to 1.3.
BEHIND_MEANS = 8


def _timm(name: str, share: float = 0.95, size: int = 64, images: int = 2, **options: Any) -> None:
    key = " ".join([name, *(f"{option}={value}" for option, value in options.items())])
    options.setdefault("num_classes", 7) if "features_only" not in options else None
    ZOO[f"timm {key}"] = ("timm", lambda timm: timm.create_model(name, **options), (images, 3, size, size), share)


def _vision(name: str, share: float = 0.95, size: int = 64, images: int = 2, **options: Any) -> None:
    def build(models: Any) -> nn.Module:
        if name == "googlenet":
            options.update(init_weights=False, aux_logits=False)
        if name == "inception_v3":
            options.update(init_weights=False, aux_logits=False)
        return models.get_model(name, weights=None, num_classes=7, **options)

    ZOO[f"torchvision {name}"] = ("torchvision.models", build, (images, 3, size, size), share)


for _name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "googlenet", "vgg11_bn"):
    _vision(_name)
_vision("densenet121", 1.0)
# inception_v3 ends in images of 2 x 2: with two images BatchNorm would divide by what is left of four values.
_vision("inception_v3", 0.95, 139, images=4)
for _name, _share in (("mnasnet0_5", 0.95), ("shufflenet_v2_x0_5", 0.95), ("mobilenet_v2", 0.9), ("squeezenet1_1", 0.95)):
    _vision(_name, _share)
for _name in ("efficientnet_b0", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf"):
    _vision(_name, 0.9)
# The rest of torchvision's that have a BatchNorm.
for _name in (
    "resnet34", "resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2",
    "vgg13_bn", "vgg16_bn", "vgg19_bn", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
    "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
):  # fmt: skip
    _vision(_name)
for _name in ("densenet161", "densenet169", "densenet201"):
    _vision(_name, 1.0)
# regnet_y_128gf, of 645 M parameters, has a test of its own: test_largest.py.
for _name in (
    "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5", "efficientnet_b6",
    "efficientnet_b7", "efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l", "mobilenet_v3_large",
    "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf",
    "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf",
):  # fmt: skip
    _vision(_name, 0.9)
_vision("maxvit_t", 0.5, 224, images=1)  # half of its convolutions are attention's neighbours
for _name in (
    "resnet18", "resnet26", "resnet26t", "resnet26d", "resnet50", "resnet50d", "resnet50s", "resnext26ts", "resnext50_32x4d",
    "wide_resnet50_2", "seresnet50", "ecaresnet26t", "resnetrs50", "regnetx_002", "regnety_002", "resnetblur18",
):  # fmt: skip
    _timm(_name)
_timm("resnetv2_50d", 0.99)
_timm("resnetv2_50", 0.97)  # in front of its max-pooling the stem is a convolution alone
_timm("resnet18", features_only=True)
_timm("resnet50", features_only=True, output_stride=8)
_timm("resnet26d", output_stride=16)
_timm("resnet18", drop_path_rate=0.3, drop_block_rate=0.2)
_timm("skresnet18", images=BEHIND_MEANS)
_timm("resnest14d", 0.9, images=BEHIND_MEANS)
_timm("densenet121", 1.0)


def _detection(name: str) -> None:
    def build(detection: Any) -> nn.Module:
        options = {"weights": None, "weights_backbone": None, "num_classes": 3}
        return comparable(getattr(detection, name)(**options))

    # In the heads of RetinaNet's second version GroupNorms stand behind convolutions without a bias: nothing to be fused with.
    share = 0.5 if name == "retinanet_resnet50_fpn_v2" else 0.95
    ZOO[f"torchvision {name} without the choice of boxes"] = ("torchvision.models.detection", build, (2, 3, 96, 96), share)


for _name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"):
    _detection(_name)
_detection("retinanet_resnet50_fpn")
_detection("retinanet_resnet50_fpn_v2")
for _name in ("fcn_resnet50", "deeplabv3_resnet50"):
    ZOO[f"torchvision {_name}"] = (
        "torchvision.models.segmentation",
        lambda models, name=_name: getattr(models, name)(weights=None, weights_backbone=None, num_classes=4, aux_loss=True),
        (BEHIND_MEANS if _name == "deeplabv3_resnet50" else 2, 3, 64, 64),
        0.85,
    )


def _transformers(kind: str, layer: str) -> None:
    def build(transformers: Any) -> nn.Module:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "layer_type": layer}
        return getattr(transformers, kind)(transformers.ResNetConfig(num_labels=5, **sizes))

    ZOO[f"transformers {kind} {layer}"] = ("transformers", build, (2, 3, 64, 64), 0.95)


def _detr(transformers: Any) -> nn.Module:
    """Frozen BatchNorms of its own class; what counts is what the encoder and decoder make of the backbone's features."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "layer_type": "bottleneck"}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    backbone = transformers.ResNetConfig(out_features=["stage4"], **sizes)
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        d_model=16, encoder_layers=1, decoder_layers=1, num_queries=5, dropout=0.0, **heads,
    )  # fmt: skip
    return transformers.DetrModel(config)


ZOO["transformers DetrModel"] = ("transformers", _detr, (2, 3, 64, 64), 0.95)
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
    (2, 3, 96, 96),
    0.95,
)
ZOO["open_clip RN50"] = (
    "open_clip",
    lambda clip: clip.create_model("RN50", pretrained=None).visual,
    (1, 3, 224, 224),
    0.95,
)
ZOO["open_clip ModifiedResNet"] = (
    "open_clip.modified_resnet",
    lambda clip: clip.ModifiedResNet([1, 2, 1, 1], output_dim=32, heads=8, image_size=64, width=16),
    (2, 3, 64, 64),
    0.95,
)


class PreActivation(nn.Module):
    """A pre-activation block as people write it: the projection reads what the first convolution reads."""

    def __init__(self, channels: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(filters), nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.relu(self.bn1(x))
        side = self.shortcut(out) if len(self.shortcut) else x
        out = self.conv1(out)
        out = self.conv2(nn.functional.relu(self.bn2(out)))
        out += side
        return out


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


class PreActivationNet(nn.Module):
    """He et al. 2016, identity mappings: a BatchNorm and a ReLU in front of each convolution, the sum as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(PreActivation(8, 8), PreActivation(8, 16, 2), PreActivation(16, 16))
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(self.blocks(self.conv(x)))).mean((2, 3))


ZOO["by hand PreActivationNet"] = ("torch", lambda _: PreActivationNet(), (2, 3, 33, 31), 0.9)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random state, and images for it; skips where its package is not installed."""
    package, make, shape, _ = ZOO[name]
    pytest.importorskip(package.split(".")[0])
    model = randomise(make(import_module(package)))
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # which draws in the order of memory, and the layout differs
            module.p = 0.0
    return model, torch.randn(shape)
