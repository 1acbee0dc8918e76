"""Whole detection models, the choice of boxes included: losses, gradients and running statistics, then detections."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import randomise
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d
from zoo_check import fill

from fused_resnet import count_launches, explain, fuse, unfuse
from fused_resnet.cli import main
from fused_resnet.detectors import REGIONS, comparable
from fused_resnet.swap.region import WAITING

NAMES = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2",
)  # fmt: skip
#: Losses over all anchors. Others are over boxes that are chosen by their scores, and in fp32 one on the edge may be another.
ALL_BOXES = ("loss_objectness", "loss_rpn_box_reg", "classification", "bbox_regression")
SIZES = {"min_size": 64, "max_size": 96}

Target = dict[str, Tensor]


def small() -> nn.Module:
    """A FasterRCNN on ResNet-18 with frozen BatchNorms and frozen first stages, as it is fine-tuned."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    chosen = {"rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 30, "box_batch_size_per_image": 16}
    heads = {"box_head": TwoMLPHead(256 * 49, 32), "box_predictor": FastRCNNPredictor(32, 3)}
    return detection.FasterRCNN(backbone, **SIZES, **chosen, **heads)


def build(name: str) -> nn.Module:
    if name == "small":
        return randomise(small())
    options = {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 16, "box_detections_per_img": 10}
    if name.startswith("retinanet"):
        options = {"score_thresh": 0.0, "detections_per_img": 20}
    return randomise(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **SIZES, **options))


def images() -> list[Tensor]:
    """Of two sizes, as such models take them."""
    return [torch.rand(3, 64, 80), torch.rand(3, 70, 61)]


def targets(dtype: torch.dtype) -> list[Target]:
    """Boxes, labels, masks and keypoints; each model reads its own."""
    made: list[Target] = []
    for boxes in ([[4, 6, 40, 50], [20, 10, 70, 60]], [[10, 5, 50, 66]]):
        n = len(boxes)
        masks, keypoints = torch.zeros(n, 70, 80, dtype=torch.uint8), torch.ones(n, 17, 3)
        masks[:, 10:40, 10:40] = 1
        keypoints[..., :2] = torch.linspace(12, 48, 17)[:, None]
        made.append({"boxes": torch.tensor(boxes, dtype=dtype), "labels": torch.arange(n) % 2 + 1, "keypoints": keypoints})
        made[-1]["masks"] = masks[:, :64] if n == 2 else masks[..., :61]
    return made


def step(model: nn.Module, x: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one training step; which boxes are sampled is drawn anew from the same seed."""
    torch.manual_seed(5)
    model.zero_grad()
    losses = model.train()(x, targets(x[0].dtype))
    sum(losses.values()).backward()
    return losses, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def detect(model: nn.Module, x: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", ["small", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_it_trains_and_detects_as_before(name: str) -> None:
    """In float64, where the same boxes are chosen; then losses and detections in fp32."""
    plain, x = build(name), images()
    fill(plain, x)
    kinds, state = [type(module) for module in plain.modules()], list(plain.state_dict())
    fused = fuse(copy.deepcopy(plain))
    exact, wide, precise = copy.deepcopy(plain).double(), fuse(copy.deepcopy(plain).double()), [part.double() for part in x]

    (truth, wanted), (losses, gradients) = step(exact, precise), step(wide, precise)
    assert losses.keys() == truth.keys() and gradients.keys() == wanted.keys() and len(wanted) > 10
    for key, value in truth.items():
        assert value > 0 and relative_error(losses[key], value) < 1e-9, key
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert float((gradients[key] - gradient).norm()) <= 1e-7 * float(gradient.norm()) + 1e-10 * scale, key
    for key, value in exact.state_dict().items():
        assert relative_error(wide.state_dict()[key], value) < 1e-9, key
    for one, other in zip(detect(wide, precise), detect(exact, precise), strict=True):
        assert one.keys() == other.keys() and len(other["boxes"]) > 0
        for key, value in other.items():
            assert relative_error(one[key], value) < 1e-7, key

    with count_launches() as log:
        ours, _ = step(fused, x)
    assert len(log) > 20
    for key, value in step(plain, x)[0].items():
        if key in ALL_BOXES:
            assert relative_error(ours[key], value) < 1e-3, key
        else:
            assert 0 < ours[key] < float("inf"), key
    assert list(fused.state_dict()) == state
    assert [type(module) for module in unfuse(fused).modules()] == kinds


def test_what_chooses_boxes_is_left_alone() -> None:
    model = fuse(small().eval())
    fused = [name for name, module in model.named_modules() if "Fused" in type(module).__name__]
    assert "" not in fused and not any(name in fused for name in ("rpn", "roi_heads", "transform")) and "rpn.head" in fused
    notes = {row.name: row.note for row in explain(model, show=False).left_alone}
    assert notes == dict.fromkeys(("rpn.head.cls_logits", "rpn.head.bbox_pred"), WAITING)


def test_fuse_check_compares_a_detector_but_for_its_choice_of_boxes(capsys: pytest.CaptureFixture[str]) -> None:
    """Which on random images names none: nothing could be compared."""
    assert main(["fuse-check", f"{__file__}:small", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "a detector: features and heads" in said and said.count("  ok") == 2 and said.endswith("agrees with eager\n")


def test_what_is_compared_is_what_a_detector_computes() -> None:
    """Its own heads, on regions that are given: the same that the model gives them, where it chooses these."""
    model = randomise(small()).eval()
    x, seen = torch.rand(1, 3, 64, 96), []
    regions = torch.tensor([[part * side for part, side in zip(region, (96, 64, 96, 64))] for region in REGIONS])
    model.roi_heads.box_predictor.register_forward_hook(lambda _m, _x, made: seen.append(made))
    with torch.no_grad():
        made = comparable(model)(x)[-1]
        features = model.backbone(x)
        model.roi_heads(features, [regions], [(64, 96)])
    for ours, theirs, own in zip(made, *seen, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(ours, own) and ours.shape[0] == len(REGIONS)
    backbone = model.backbone
    assert comparable(backbone) is backbone
