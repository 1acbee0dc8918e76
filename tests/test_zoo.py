"""fuse on the models that people have: outputs, gradients, running statistics, state_dict, the share that is fused."""

from __future__ import annotations

import pytest
import torch
import zoo
import zoo_check

from fused_resnet import fuse
from fused_resnet.counts import fused_share

#: What `make test` takes; `make test-all` takes all.
SAMPLE = ("by hand CifarNet", "by hand PreActivationNet", "timm resnet18 features_only=True", "timm regnety_002")
ALL = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_it_did(name: str, training: bool) -> None:
    zoo_check.check(name, training)


@pytest.mark.parametrize("name", ALL)
def test_the_fused_share_of_the_convolutions(name: str) -> None:
    model, x = zoo.build(name)
    fuse(model.eval())
    with torch.no_grad():
        share = fused_share(model, x)
    assert share >= zoo.ZOO[name][3], share
