"""timm's layers by themselves: BatchNorms that call their activation, and blocks of a convolution with one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nets import launches, randomise, train_step
from tolerances import CLOSE, relative_error
from torch import nn

from fused_resnet import explain, fuse

layers = pytest.importorskip("timm.layers")


def behind(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm)


#: Name -> (module, launches in eval mode without gradients).
MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "BatchNormAct2d": (lambda: behind(layers.BatchNormAct2d(8)), 1),
    "BatchNormAct2d, LeakyReLU": (lambda: behind(layers.BatchNormAct2d(8, act_layer=nn.LeakyReLU)), 1),
    "BatchNormAct2d, SiLU": (lambda: behind(layers.BatchNormAct2d(8, act_layer="silu")), 1),
    "BatchNormAct2d, no activation": (lambda: behind(layers.BatchNormAct2d(8, apply_act=False)), 1),
    "BatchNormAct2d, cumulative": (lambda: behind(layers.BatchNormAct2d(8, momentum=None)), 1),
    "FrozenBatchNormAct2d": (lambda: behind(layers.FrozenBatchNormAct2d(8)), 1),
    "ConvNormAct": (lambda: layers.ConvNormAct(3, 8, 3, stride=2), 1),
    "ConvNormAct, no activation": (lambda: layers.ConvNormAct(3, 8, 1, apply_act=False), 1),
    "ConvNormAct, GELU, grouped": (lambda: layers.ConvNormAct(3, 6, 3, groups=3, act_layer=nn.GELU), 1),
    "ConvNormAct, blur": (lambda: layers.ConvNormAct(3, 8, 3, stride=2, aa_layer="blurpc"), 1),
    "SeparableConvNormAct": (lambda: layers.SeparableConvNormAct(3, 8, 3), 1),
    "ConvNormAct, dropped": (lambda: layers.ConvNormAct(3, 8, 3, drop_layer=nn.Dropout2d), 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("name", MODULES)
def test_timms_layers(name: str) -> None:
    build, expected = MODULES[name]
    plain = randomise(build()).double()
    fused, x = fuse(copy.deepcopy(plain), backend="reference"), torch.randn(3, 3, 11, 10, dtype=torch.float64)
    for training in (True, False):
        for model in (plain, fused):
            for module in model.train(training).modules():
                if isinstance(module, nn.Dropout2d):
                    module.p = 0.0
        truth, found = train_step(plain, x), train_step(fused, x)
        assert truth.keys() == found.keys() and "gradient of x" in truth
        for key, value in truth.items():
            assert relative_error(found[key], value) < 1e-10, key
    with torch.no_grad():
        assert launches(fused, x) == expected
    assert relative_error(fused.float()(x.float()), plain.float()(x.float())) < CLOSE
    if not expected:
        assert "stands alone" in explain(fused, show=False).left_alone[0].note
