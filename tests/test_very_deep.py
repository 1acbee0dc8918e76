"""Very deep networks: what a step keeps, outputs that are dropped and made again, and growth with the depth."""

from __future__ import annotations

import copy
import gc
import time
from itertools import pairwise

import pytest
import torch
from nets import randomise, saved_bytes, train_step
from tolerances import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from fused_resnet import count_launches, fuse, growth, kept, models, unfuse
from fused_resnet.cli import _parser
from fused_resnet.fused import Fused
from fused_resnet.train import Config, UsageError, networks, recipe


def ratio(fused: nn.Module, x: Tensor, memory: str | None = None) -> float:
    """Bytes saved for the backward, of what the same modules save in eager PyTorch."""
    eager = unfuse(copy.deepcopy(fused))
    for module in fused.modules():
        if isinstance(module, Fused) and memory is not None:
            module.fused_memory = memory
    return saved_bytes(fused, x) / saved_bytes(eager, x)


@pytest.mark.parametrize("depth", [110, pytest.param(1202, marks=pytest.mark.slow)])
def test_a_step_of_a_very_deep_network(depth: int) -> None:
    """Built, trained for a step of two images on the CPU executor; saved bytes as built and with memory="low"."""
    began = time.process_time()
    model = models.build(f"cifar_resnet{depth}").train()
    print(f"{depth} layers built in {time.process_time() - began:.1f} s of CPU time")  # shown by pytest -rP
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    began = time.process_time()
    with count_launches() as log:
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
    print(f"a step took {time.process_time() - began:.1f} s of CPU time")
    assert {runner for runner, _ in log.launches} == {"cpu"}
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    built, low, default = ratio(model, x), ratio(model, x, "low"), ratio(model, x, "default")
    print(f"saved for the backward, of eager: {built:.3f} as built, {low:.3f} low, {default:.3f} default")
    assert built <= 0.70 and low <= 0.50 and built < default < 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "lr", "steps"), [(110, 3e-3, 8), (1202, 1e-3, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_very_deep_network_learns(depth: int, lr: float, steps: int, seed: int) -> None:
    """Plain SGD on the same four images: their loss falls, by a step small enough for networks this deep without a warm-up."""
    torch.manual_seed(seed)
    model = models.build(f"cifar_resnet{depth}").train()
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 7, 2, 5])
    optimizer = torch.optim.SGD(model.parameters(), lr)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        with count_launches() as log:
            loss = nn.functional.cross_entropy(model(x), labels)
        assert {runner for runner, _ in log.launches} == {"cpu"}
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("depth", [56, pytest.param(1202, marks=pytest.mark.slow)])
def test_what_a_very_deep_network_holds(depth: int) -> None:
    """As the profile command reports it, of eager: between forward and backward, and at most, with each stage checkpointed."""
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model = models.build(f"cifar_resnet{depth}", memory="less").train()
    rows = {row.how: row for row in kept.by_mode(kept.Pair.of(model), x)}
    eager = rows["eager"]
    behind = {how: row.behind / eager.behind for how, row in rows.items()}
    most = {how: row.most / eager.most for how, row in rows.items()}
    print({how: (round(behind[how], 3), round(most[how], 3)) for how in rows})
    assert eager.behind == saved_bytes(unfuse(copy.deepcopy(model)), x)
    assert behind['fused, memory="less"'] <= 0.70 and behind['fused, memory="low"'] <= 0.50
    checkpointed = 'fused, memory="low", stages checkpointed'
    assert behind[checkpointed] <= 0.05 and most[checkpointed] <= 0.25
    assert most[checkpointed] < 0.45 * most["eager, stages checkpointed"]


@pytest.mark.parametrize(("memory", "launches"), [("default", 8), ("less", 8.5)])
def test_a_step_grows_with_the_depth_and_no_faster(memory: str, launches: float) -> None:
    """Each block is 3 launches forward and 5 backward (a bn_add_relu again for every second one), a node of autograd and one
    for each of its 6 parameters, and as many Python calls, however many blocks there are; blocks of one size share their plans.
    """
    found, plans = [], []
    for depth in (14, 26, 38):
        model = models.build(f"cifar_resnet{depth}", memory=memory).train()
        with count_launches() as log:
            found.append(growth.count(model, torch.randn(2, 3, 8, 8)))
        plans.append(len({launch for _, launch in log.launches}))
    assert [later.launches - before.launches for before, later in pairwise(found)] == [6 * launches] * 2
    assert [later.nodes - before.nodes for before, later in pairwise(found)] == [6 * 7] * 2
    first, second = (later.calls - before.calls for before, later in pairwise(found))
    assert 0 < second < 1.02 * first, "a few are the garbage collector's"
    assert len({*plans}) == 1


@pytest.mark.slow
def test_the_compilers_graph_grows_with_the_depth_and_no_faster() -> None:
    """As many nodes for each block, and no more Python calls to trace one."""
    found = [
        growth.count(models.build(f"cifar_resnet{n}").train(), torch.randn(2, 3, 8, 8), compiled=True) for n in (8, 20, 32)
    ]
    first, second = (later.graph - before.graph for before, later in pairwise(found))
    assert first == second > 0
    first, second = (later.compiling - before.compiling for before, later in pairwise(found))
    assert 0 < second < 1.3 * first


def test_python_calls_are_counted() -> None:
    """Of a network whose steps call a function as often as they are told, of Python and of C, forward."""

    class Calls(nn.Module):
        times = 0

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                abs(self.nothing())
            return x * self.weight

        def nothing(self) -> int:
            return 0

    model, numbers = Calls(), []
    model.weight = nn.Parameter(torch.ones(()))
    for model.times in (0, 10, 30):
        numbers.append(growth.count(model, torch.randn(1, 3, 4, 4)).calls)
    assert numbers[1] - numbers[0] == 20 and numbers[2] - numbers[1] == 40


# ------------------------------------------------------------------------------------------------- outputs made again


def stage(kind: str, memory: str, count: int = 5) -> tuple[nn.Module, nn.Module]:
    """A stage of several blocks, the first with a projection or padding: eager, and fused."""
    torch.manual_seed(0)
    if kind == "highway":
        eager = models.build(f"cifar_highway{6 * count + 2}").layer2
    elif kind == "padded":
        eager = models.build(f"cifar_resnet{6 * count + 2}").layer2
    else:
        block, planes = (Bottleneck, 4) if kind == "bottleneck" else (BasicBlock, 16)
        side = nn.Sequential(nn.Conv2d(16, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        eager = nn.Sequential(block(16, planes, 2, side), *(block(16, planes) for _ in range(count - 1)))
    if any(isinstance(module, Fused) for module in eager.modules()):
        eager = unfuse(eager)
    eager = randomise(eager).double().train()
    return eager, fuse(copy.deepcopy(eager), backend="reference", memory=memory)


@pytest.mark.parametrize("memory", ["less", "low"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "padded", "highway"])
def test_outputs_made_again_give_the_same_step(kind: str, memory: str) -> None:
    """float64 against eager: output, gradient of the input and of every parameter, running statistics (updated once)."""
    eager, fused = stage(kind, memory)
    x = torch.randn(2, 16, 7, 9).double()
    truth, actual = train_step(eager, x), train_step(fused, x)
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-10, what


@pytest.mark.parametrize("memory", ["less", "low"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "padded"])
def test_outputs_made_again_for_the_gradient_of_the_input_alone(kind: str, memory: str) -> None:
    """With frozen filters a block with a projection keeps neither x nor what is behind it: its output comes of y_L and y_d."""
    eager, fused = stage(kind, memory)
    x = torch.randn(2, 16, 7, 9).double()
    gradients = []
    for model in (eager, fused):
        model.requires_grad_(False)
        given = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(given).square().sum(), given)[0])
    assert relative_error(gradients[1], gradients[0]) < 1e-10


@pytest.mark.parametrize("memory", ["less", "low"])
def test_what_is_kept_of_a_stage(memory: str) -> None:
    """Five blocks: x, of each block y_1 (and y_2 if not low), and the outputs of the second, the fourth and the last."""
    _, fused = stage("basic", memory)
    fused = nn.Sequential(*list(fused.children())[1:]).float()  # identity shortcuts: four blocks
    fuse(unfuse(fused), memory=memory)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    activations = 1 + 4 * (2 if memory == "less" else 1) + 2
    vectors = 4 * 4 * 16 * 4
    assert activations * x.numel() * 4 <= saved_bytes(fused, x) <= activations * x.numel() * 4 + vectors


def test_backward_twice_and_in_parts() -> None:
    """With the graph retained the same gradients come out again; nothing of what was made again stays behind."""
    _, fused = stage("basic", "low")
    x = torch.randn(2, 16, 7, 9).double().requires_grad_()
    out = fused(x)
    first = torch.autograd.grad(out.square().sum(), [x, *fused.parameters()], retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), [x, *fused.parameters()], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    node = out.grad_fn
    while node is not None and hasattr(node, "made"):
        assert node.made is None
        node = node.next_functions[3][0] if len(node.next_functions) > 3 else None
    last = torch.autograd.grad(out.square().sum(), list(fused[-1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(last, again[-len(last) :]))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.square().sum(), list(fused[-1].parameters()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_stage(reentrant: bool) -> None:
    """Per stage, as in PyTorch: only its input is kept; statistics then move twice, as eager's do."""
    eager, fused = stage("basic", "low")
    results = []
    for model in (eager, fused):
        x = torch.randn(2, 16, 7, 9, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) < 1e-10


def test_a_watched_block_is_not_told_to_drop() -> None:
    """Who looks at a block's output may keep it: it is saved as ever."""
    _, fused = stage("basic", "less")
    seen: list[Tensor] = []
    handle = fused[2].register_forward_hook(lambda _m, _x, output: seen.append(output))
    x = torch.randn(2, 16, 7, 9).double()
    truth = train_step(stage("basic", "less")[0], x)
    actual = train_step(fused, x)
    handle.remove()
    assert len(seen) == 1 and all(relative_error(actual[what], value) < 1e-10 for what, value in truth.items())


def test_dropped_outputs_are_gone_from_memory() -> None:
    """Behind the forward: of five blocks the second's, the fourth's and the last's output are there."""
    _, fused = stage("basic", "less")
    out = fused(torch.randn(2, 16, 6, 10).double())
    gc.collect()
    shape = tuple(out.shape)
    tensors = [o for o in gc.get_objects() if type(o) is Tensor]
    assert sum(tuple(tensor.shape) == shape and tensor.grad_fn is not None for tensor in tensors) == 3


def test_memory_is_checked() -> None:
    with pytest.raises(ValueError, match="memory must be one of 'default', 'less', 'low'"):
        models.build("cifar_resnet20", memory="lower")
    with torch.device("meta"):
        kinds = {depth: models.build(f"cifar_resnet{depth}").fused_memory for depth in (56, 110)}
    assert kinds == {56: "default", 110: "less"}


def test_training_keeps_the_networks_own_memory() -> None:
    """By train's and paper's defaults, in every fused module; what is asked for holds for all of them."""

    def kinds(*more: str | None, name: str = "cifar_resnet110", **arguments: object) -> set[str]:
        with torch.device("meta"):
            model = networks.make(name, 10, "auto", *more, **arguments)
        return {module.fused_memory for module in model.modules() if isinstance(module, Fused)}

    told = _parser().parse_args(["train"]).memory
    assert told is None and Config(recipe.load("digits")).memory is None
    assert kinds(told) == kinds() == {"less"}
    assert kinds(told, name="fused_resnet.paper.networks:make", network="cifar_resnet110", pool=2) == {"less"}
    assert kinds(told, name="cifar_resnet20") == kinds("default") == {"default"}
    assert kinds("low") == {"low"}
    with pytest.raises(UsageError, match="memory must be one of 'default', 'less', 'low'"):
        kinds("lower")
