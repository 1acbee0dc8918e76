"""Models that other packages build by more than a name, for ``fused-resnet zoo bench/others.py:NAME`` and ``fuse-check``.

Their own defaults, random weights, nothing downloaded. The packages come with ``pip install '.[zoo]'``.
"""

from __future__ import annotations

from torch import nn


def transformers_resnet50() -> nn.Module:
    """``ResNetForImageClassification`` as its configuration is by default."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig())


def transformers_rtdetr_backbone() -> nn.Module:
    """The backbone of RT-DETR."""
    from transformers import RTDetrResNetBackbone, RTDetrResNetConfig

    return RTDetrResNetBackbone(RTDetrResNetConfig())


def transformers_detr() -> nn.Module:
    """DETR with a ResNet-50 of transformers, without the heads that name boxes; without dropout, which no two models share."""
    from transformers import DetrConfig, DetrModel, ResNetConfig

    backbone = ResNetConfig(out_features=["stage4"])
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone}
    return DetrModel(DetrConfig(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, **own))


def smp_unet_resnet34() -> nn.Module:
    """The U-Net of segmentation_models_pytorch as it is by default."""
    from segmentation_models_pytorch import Unet

    return Unet("resnet34", encoder_weights=None)


def smp_unet_resnet50() -> nn.Module:
    """The same on ResNet-50."""
    from segmentation_models_pytorch import Unet

    return Unet("resnet50", encoder_weights=None)


def open_clip_rn50() -> nn.Module:
    """What open_clip's RN50 looks at images with; of 224 x 224 pixels only (``--size 224``)."""
    from open_clip import create_model

    model: nn.Module = create_model("RN50", pretrained=None).visual
    return model
