"""Tensors computed from parameters: made once, made again when a source changes, dropped with their source."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from nets import TinyNet, randomise
from tolerances import assert_close, assert_no_worse, distance
from torch import Tensor

from fused_resnet import chain_function, fuse
from fused_resnet.backends import derived as module
from fused_resnet.backends.derived import channels_last_filters, derived


class Counter:
    """Counts how often the value is made."""

    def __init__(self, *sources: Tensor) -> None:
        self.sources = sources
        self.made = 0

    def __call__(self) -> Tensor:
        self.made += 1
        return sum(source.detach().sum() for source in self.sources)

    def get(self, purpose: object = "sum") -> Tensor:
        return derived(purpose, list(self.sources), self)


def test_made_once() -> None:
    counter = Counter(torch.randn(4, 3, 3, 3), torch.randn(4))
    assert counter.get() is counter.get()
    assert counter.made == 1


def test_each_purpose_is_made_for_itself() -> None:
    counter = Counter(torch.randn(4))
    counter.get("a"), counter.get("b"), counter.get("a")
    assert counter.made == 2


@pytest.mark.parametrize("which", [0, 1, 2])
def test_made_again_when_any_source_changes(which: int) -> None:
    counter = Counter(torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(4))
    counter.get()
    counter.sources[which].add_(1)
    assert torch.equal(counter.get(), counter())
    counter.sources[which].data.add_(1)  # not counted by PyTorch
    assert torch.equal(counter.get(), counter())
    counter.sources[which].numpy()[...] += 1
    assert torch.equal(counter.get(), counter())


def test_another_tensor_at_the_same_address_is_another_source() -> None:
    """Memory is used again after a tensor died; object, address and version may all look the same."""
    shift = torch.zeros(4)
    w = torch.randn(4, 2, 3, 3)
    counter = Counter(w, shift)
    counter.get()
    for other in (torch.ones(4), shift.clone(), shift[:]):
        changed = Counter(w, other)
        assert torch.equal(changed.get(), changed())


def test_nan_sources_are_never_wrong() -> None:
    counter = Counter(torch.full((4,), float("nan")))
    assert counter.get().isnan()
    counter.sources[0].data.fill_(1)
    assert counter.get() == 4


def test_the_value_dies_with_its_first_source() -> None:
    w = torch.randn(8, 3, 3, 3)
    value = derived("x", [w, torch.zeros(8)], lambda: torch.zeros(5))
    alive = weakref.ref(value)
    del value
    gc.collect()
    assert alive() is not None
    del w
    gc.collect()
    assert alive() is None


def test_sources_made_in_inference_mode() -> None:
    """They have no version counter."""
    with torch.inference_mode():
        w = torch.ones(4, 2, 3, 3)
        counter = Counter(w)
        counter.get()
        w.mul_(2)
        assert torch.equal(counter.get(), counter())


def test_no_graph_is_kept() -> None:
    w = torch.randn(4, requires_grad=True)
    assert derived("graph", [w], lambda: w * 2).grad_fn is None


@pytest.mark.parametrize("source", ["expanded", "sliced", "transposed", "empty", "scalar kernel"])
def test_sources_of_any_strides(source: str) -> None:
    """What is looked at must lie inside the tensor's memory."""
    tensor = {
        "expanded": torch.ones(1).expand(64, 3, 3, 3),
        "sliced": torch.randn(64, 6, 3, 6)[:, ::2, :, ::2],
        "transposed": torch.randn(3, 64, 3, 3).transpose(0, 1),
        "empty": torch.zeros(0, 3, 3, 3),
        "scalar kernel": torch.randn(1, 1, 1, 1),
    }[source]
    counter = Counter(tensor)
    assert torch.equal(counter.get(), counter.get())
    if tensor.numel():
        tensor.data[0, 0, 0, 0] = 7
        assert torch.equal(counter.get(), counter())


def test_channels_last_filters() -> None:
    w = torch.randn(4, 3, 3, 3)
    turned = channels_last_filters(w)
    assert turned.is_contiguous(memory_format=torch.channels_last) and torch.equal(turned, w)
    assert channels_last_filters(w) is turned
    assert channels_last_filters(turned) is turned, "already so: no copy"
    w.mul_(2)
    assert torch.equal(channels_last_filters(w), w)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_an_optimizer_that_writes_through_data_is_seen(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where contents are not looked at: steps copy the filters of an NCHW model anew, once, and so does eval."""
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "_look", lambda source: None)
    monkeypatch.setattr(chain_function, "_unseen", lambda tensor: True)
    net = TinyNet()
    randomise(net)
    eager = torch.nn.Sequential(net.basic, net.bottleneck)
    fused, exact = fuse(copy.deepcopy(eager), backend="triton", memory=memory), copy.deepcopy(eager).double()
    x = torch.randn(2, 8, 5, 7)
    for _ in range(2):
        with torch.no_grad():
            assert_close(fused.eval()(x), exact.eval()(x.double()), 9 * 16, layers=9)
        for net, given in ((fused, x), (eager, x), (exact, x.double())):
            net.train().zero_grad()
            net(given).square().sum().backward()
        ours, plain, right = ([p.grad for p in net.parameters()] for net in (fused, eager, exact))
        assert_no_worse(distance(list(zip(ours, right))), distance(list(zip(plain, right))), "gradients", floor=1e-5)
        for three in zip(fused.parameters(), eager.parameters(), exact.parameters(), strict=True):
            change = torch.randn_like(three[0]) * 0.1
            for parameter in three:
                parameter.data.add_(change)
