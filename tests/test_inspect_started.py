"""What inspect says is started, against what the Triton backend starts: in pieces where the choice says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from nets import TinyNet, randomise

pytest.importorskip("triton")

from fused_resnet import fuse, network
from fused_resnet.backends import triton, triton_apart, triton_gradients
from fused_resnet.inspect import started
from fused_resnet.launch import Launch
from fused_resnet.tuning import Choice, choose
from fused_resnet.tuning.pieces import pieces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Which launches run apart, of those that can.
APART: dict[str, Callable[[Launch], bool]] = {
    "all": lambda launch: True,
    "wgrad": lambda launch: launch.kind == "wgrad",  # its dgrad follows, for the dy is there
    "dgrad": lambda launch: launch.kind == "dgrad",  # and leaves a dy that nobody takes
}


@pytest.mark.parametrize("which", APART)
def test_every_start_of_a_training_step(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures, in order; the projection's dgrad and wgrad read the dz of the block's last layer, behind another norm."""

    def chosen(launch: Launch, *rest: Any, **how: Any) -> Choice:
        real = choose(launch, *rest, **how)
        apart = APART[which](launch) and not how.get("whole_only") and pieces(launch, "apart") is not None
        return Choice("apart", None, None, "test") if apart else real

    ran: list[str] = []

    def recording(module: Any) -> None:
        plan_start = module.plan_start

        def record(launch: Launch, *rest: Any, **more: Any) -> Any:
            ran.append(launch.signature)
            return plan_start(launch, *rest, **more)

        monkeypatch.setattr(module, "plan_start", record)

    monkeypatch.setattr(triton, "choose", chosen)
    monkeypatch.setattr(started, "choose", chosen)
    for module in (triton, triton_gradients, triton_apart):
        recording(module)
    model = fuse(randomise(TinyNet()).to(DEVICE), backend="triton").train()
    model(torch.randn(2, 3, 32, 32, device=DEVICE)).sum().backward()

    with torch.device("meta"):
        named = network.launches(fuse(TinyNet()), 2, 32, torch.float32, "train")
    arch = triton.arch_of(torch.device(DEVICE))
    expected = [launch.signature for _, launch in started.started(named, arch)]
    assert ran == expected
    assert len(ran) > len(named)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_whole_network(arch: str) -> None:
    """Convolutions and gradients stay, in their order; what is put in front of them is made once for all that read it."""
    named = network.launches(network.network("resnet50"), 256, 224, torch.bfloat16, "train")
    parts = list(started.started(named, arch))

    def products(launches: Sequence[tuple[str, Launch]]) -> list[tuple[str, str]]:
        return [(layer, launch.kind) for layer, launch in launches if launch.flops]

    assert products(parts) == products(named)
    made = [(layer, launch.outputs[0][1]) for layer, launch in parts if launch.kind == "output_gradient"]
    assert made and len(set(made)) == len(made)
    in_front = [launch for _, launch in parts if launch.kind == "bn_add_relu" and "shortcut" not in launch.roles]
    assert len(parts) == len(named) + len(made) + len(in_front)
