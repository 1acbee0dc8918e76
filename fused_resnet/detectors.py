"""Detection models of torchvision as something that can be compared: without the choice of boxes, which jumps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Regions that the heads are shown in place of those the model would choose, as parts of the image: x1, y1, x2, y2.
REGIONS = ((0.1, 0.1, 0.6, 0.7), (0.3, 0.2, 0.9, 0.8), (0.0, 0.0, 1.0, 1.0))


class WithoutChoice(nn.Module):
    """Features, and what all heads make of them; those that look at regions, of :data:`REGIONS`.

    ``forward(images [N, C, H, W])`` gives a list of tensors.
    """

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: one that :func:`is_detector` knows.
        """
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Any]:
        features = self.model.backbone(x)
        features = {"0": features} if isinstance(features, Tensor) else features
        levels = list(features.values())
        if not hasattr(self.model, "rpn"):
            return [*levels, self.model.head(levels)]
        made: list[Any] = [*levels, self.model.rpn.head(levels)]
        h, w = x.shape[-2:]
        regions = torch.tensor([[x1 * w, y1 * h, x2 * w, y2 * h] for x1, y1, x2, y2 in REGIONS]).to(x)
        heads, boxes, sizes = self.model.roi_heads, [regions] * len(x), [(int(h), int(w))] * len(x)
        made.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes))))
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"has_{kind}")():
                pool, head, predictor = (getattr(heads, f"{kind}_{part}") for part in ("roi_pool", "head", "predictor"))
                made.append(predictor(head(pool(features, boxes, sizes))))
        return made


def is_detector(model: nn.Module) -> bool:
    """Whether it is one of torchvision's, or of a class of the user's that is one."""
    ours = any(kind.__module__.startswith("torchvision.models.detection.") for kind in type(model).__mro__)
    parts = ("backbone", "transform", "head" if not hasattr(model, "rpn") else "roi_heads")
    return ours and all(hasattr(model, part) for part in parts)


def comparable(model: nn.Module) -> nn.Module:
    """The model, or of a detector :class:`WithoutChoice` of boxes."""
    return WithoutChoice(model) if is_detector(model) else model
