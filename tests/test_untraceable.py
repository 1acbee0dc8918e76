"""fuse(model, untraceable="compile"): modules that torch.fx cannot follow are compiled in place, for their graphs' chains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from nets import randomise, train_step
from tolerances import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from fused_resnet import count_launches, explain, fuse, unfuse
from fused_resnet.fused import Fused


class OnData(nn.Module):
    """How deep it is depends on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.block = BasicBlock(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        if x.sum() > 0:
            y = torch.relu(self.bn2(self.conv2(y)) + y)
        return self.block(y)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.body = OnData()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x) + x.mean()).mean((2, 3))


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()


def launches(model: nn.Module, x: Tensor) -> int:
    with count_launches() as log:
        model(x)
    return len(log)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_either_way_it_computes_what_it_did(training: bool) -> None:
    plain = randomise(Network()).train(training)
    fused = fuse(copy.deepcopy(plain), untraceable="compile")
    assert type(fused.body) is OnData and isinstance(fused.stem, Fused) and isinstance(fused.body.block, Fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for sign, images in ((1, 2), (-1, 2), (1, 3), (-1, 4)):
        x = torch.randn(images, 3, 12, 11) + 2 * sign
        expected, actual = train_step(copy.deepcopy(plain).double(), x.double()), train_step(fused, x)
        assert list(actual) == list(expected)
        for what, value in expected.items():
            assert relative_error(actual[what], value) < 1e-4, what
        plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 12, 11)
    with torch.no_grad():
        deep, shallow = launches(fused, x + 3), launches(fused, x - 3)
    alone = launches(fuse(copy.deepcopy(plain)), x)  # the stem and the block
    assert deep > shallow > alone


def test_unfuse_copies_and_pickles() -> None:
    plain = randomise(Network()).eval()
    fused = fuse(copy.deepcopy(plain), untraceable="compile")
    x = torch.randn(2, 3, 12, 11)
    expected = plain(x)
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert relative_error(model(x), expected) < 1e-5
        assert type(unfuse(model).stem) is nn.Sequential and model.body._compiled_call_impl is None
        assert torch.equal(model(x), expected) and launches(model, x) == 0
        with pytest.raises(RuntimeError, match="not fused"):
            unfuse(model)
    alone = fuse(OnData(), untraceable="compile")
    assert alone._compiled_call_impl is not None and unfuse(alone)._compiled_call_impl is None


def test_explain_tells_both() -> None:
    left = {row.name: row.note for row in explain(fuse(Network().eval()), show=False).left_alone}
    told = explain(fuse(Network().eval(), untraceable="compile"), show=False)
    compiled = {row.name: row.note for row in told.left_alone}
    assert set(left) == set(compiled) == {f"body.{name}" for name in ("conv1", "bn1", "conv2", "bn2")}
    for name, note in left.items():
        assert note == "the control flow of its forward depends on data: OnData"
        assert compiled[name] == f"compiled at its first call, for the chains in Dynamo's graph: {note.rpartition(':')[0]}"
    assert 'fuse(model, untraceable="compile")' in str(explain(fuse(Network().eval()), show=False))


def test_what_is_compiled_already_stays_so() -> None:
    model = Network().eval()
    model.body.compile(backend="eager")
    before = model.body._compiled_call_impl
    assert fuse(model, untraceable="compile").body._compiled_call_impl is before
    assert unfuse(model).body._compiled_call_impl is before


def test_a_compile_of_somebody_else_afterwards_stays() -> None:
    fused = copy.deepcopy(fuse(OnData(), untraceable="compile"))
    fused.compile(backend="eager")
    before = fused._compiled_call_impl
    assert unfuse(fused)._compiled_call_impl is before


def test_fused_twice_and_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone(OnData):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Identity()

    fused = fuse(Alone(), untraceable="compile")
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(fused)

    def fails(self: nn.Module, *args: object, **kwargs: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(nn.Module, "compile", fails)
    model = Network()
    with pytest.raises(OSError, match="no room"):
        fuse(model, untraceable="compile")
    assert not any(isinstance(module, Fused) for module in model.modules())


def test_a_wrong_choice() -> None:
    with pytest.raises(ValueError, match="'compile' runs on the backend of the context or the device, got backend='cpu'"):
        fuse(Network(), untraceable="compile", backend="cpu")
    with pytest.raises(ValueError, match="untraceable must be one of 'leave', 'compile', got 'both'"):
        fuse(Network(), untraceable="both")


class OnTensor(nn.Module):
    """Control flow on what a tensor is."""

    def __init__(self, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.decide = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), decide

    def forward(self, x: Tensor) -> Tensor:
        if self.decide(x):
            x = x * 2
        return torch.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x.shape[2] > 4,
        lambda x: x.dim() == 4,
        lambda x: x.requires_grad,
        lambda x: x.dtype == torch.float32,
        lambda x: x.device.type == "cpu",
        lambda x: x.sum() > 0,
    ],
    ids=["shape", "dim", "requires_grad", "dtype", "device", "data"],
)
def test_what_decides_by_a_tensor_is_left_alone(decide: Callable[[Tensor], bool]) -> None:
    """docs/swap.md: not by its values alone."""
    plain = randomise(nn.Sequential(OnTensor(decide), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))).eval()
    fused = fuse(copy.deepcopy(plain))
    rows = [row for row in explain(fused, show=False).left_alone if row.name.startswith("0")]
    assert rows and all("control flow" in row.note for row in rows)
    for x in (torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9, requires_grad=True)):
        assert relative_error(fused(x), plain(x)) < 1e-5


class Checkpointed(nn.Module):
    """A BatchNorm whose forward is run again in the backward, in what only Dynamo can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.chain, x * 2 if x.sum() > 0 else x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y


def test_a_checkpoint_around_a_batch_norm_counts_as_under_torch_compile() -> None:
    """docs/swap.md: once a step, with any backend; eager's running statistics move in the backward again."""
    plain = randomise(nn.Sequential(Checkpointed())).train()
    fused, compiled = fuse(copy.deepcopy(plain), untraceable="compile"), copy.deepcopy(plain)
    compiled[0].compile(backend="aot_eager")
    x = torch.randn(2, 3, 9, 9)
    for model in (plain, fused, compiled):
        model(x).square().sum().backward()
    eager, ours, theirs = (dict(model.named_buffers()) for model in (plain, fused, compiled))
    count = next(name for name in eager if name.endswith("num_batches_tracked"))
    assert (int(eager[count]), int(ours[count]), int(theirs[count])) == (2, 1, 1)
    for name, value in theirs.items():
        assert relative_error(ours[name], value) < 1e-5, name
