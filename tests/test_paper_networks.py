"""The networks that He et al. 2016 compares: sizes as in the paper's tables, values against the plain modules in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import randomise, train_step
from tolerances import NETWORK_FP32, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import count_launches, explain, fuse, models, plain, unfuse
from fused_resnet.blocks import HighwayBlock, HighwayBottleneck
from fused_resnet.fused import Fused
from fused_resnet.plain_paper import HighwayBlock as PlainHighwayBlock
from fused_resnet.plain_paper import HighwayBottleneck as PlainHighwayBottleneck
from fused_resnet.plain_paper import blocks_of


def sized(name: str, **arguments: object) -> nn.Module:
    """The network's plain modules, on the meta device."""
    with torch.device("meta"):
        return unfuse(models.build(name, **arguments)).eval()


def millions(name: str, **arguments: object) -> float:
    return sum(parameter.numel() for parameter in sized(name, **arguments).parameters()) / 1e6


def multiply_adds(model: nn.Module, convolutions_only: bool = False) -> float:
    """In units of 1e9, as PyTorch counts them: convolutions and linear layers."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    by_operator = counter.get_flop_counts()["Global"]
    return sum(count for op, count in by_operator.items() if not convolutions_only or "conv" in str(op)) / 2e9


# ------------------------------------------------------------------------------------------------------ the paper's tables


@pytest.mark.parametrize(
    ("depth", "paper"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), pytest.param(1202, 19.4, marks=pytest.mark.slow)],
)
def test_parameters_of_the_networks_for_cifar(depth: int, paper: float) -> None:
    """Table 6, in millions. Option A has no parameters: plain and residual networks are equal in size."""
    digits = 2 if paper < 1 else 1
    for kind in ("resnet", "plain"):
        net = sized(f"cifar_{kind}{depth}")
        assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, digits) == paper
        assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules()) == depth


@pytest.mark.parametrize(
    ("name", "paper"),
    [("plain18", 1.8), ("resnet18_a", 1.8), ("resnet18", 1.8), ("plain34", 3.6), ("resnet34_a", 3.6), ("resnet50_1x1", 3.8),
     ("resnet101_1x1", 7.6), ("resnet152_1x1", 11.3)],
)  # fmt: skip
def test_multiply_adds_of_the_networks_for_imagenet(name: str, paper: float) -> None:
    """Table 1, in 1e9, to the paper's digit; of ResNet-50, 3.858, it cuts what follows, and rounds the others."""
    assert abs(multiply_adds(sized(name)) - paper) < 0.06


def test_multiply_adds_of_vgg() -> None:
    """Section 4.1: 15.3 and 19.6. The first is of the convolutions, the second of the classifier as well."""
    with torch.device("meta"):
        vgg16, vgg19 = torchvision.models.vgg16().eval(), torchvision.models.vgg19().eval()
    assert round(multiply_adds(vgg16, convolutions_only=True), 1) == 15.3
    assert round(multiply_adds(vgg19), 1) == 19.6
    assert multiply_adds(sized("resnet152_1x1")) < multiply_adds(vgg16), "152 layers cost less than VGG's 16"


def test_places_of_the_stride_and_options_of_the_shortcut() -> None:
    """Named in the argument or behind the name."""
    for name in ("resnet50_1x1", "resnet50"):
        block = sized(name).layer2[0]
        strides = (block.conv1.stride, block.conv2.stride)
        assert strides == (((2, 2), (1, 1)) if name.endswith("1x1") else ((1, 1), (2, 2)))
    assert millions("resnet50", stride_in="1x1") == millions("resnet50")
    for option, projections, paddings in (("a", 0, 2), ("b", 2, 0), ("c", 9, 0)):
        net = sized(f"cifar_resnet20_{option}")
        kinds = [type(block.downsample) for stage in (net.layer1, net.layer2, net.layer3) for block in stage]
        assert kinds.count(nn.Sequential) == projections and kinds.count(plain.ZeroPad) == paddings
    assert millions("cifar_resnet20_b") == millions("cifar_resnet20", shortcut="B") > millions("cifar_resnet20")
    assert millions("resnet18_a") == millions("plain18")


def test_every_name_builds() -> None:
    for name in models.NAMES:
        if (name.startswith("cifar") and not name.endswith(("20", "32"))) or name in models.MODELS:
            continue
        with torch.device("meta"):
            net = models.build(name, num_classes=3)
        assert isinstance(net, Fused) and net.fc.out_features == 3
    with torch.device("meta"):
        assert models.build("cifar_plain20").fc.out_features == 10 and models.build("plain34").fc.out_features == 1000
        assert models.build("cifar_resnet26").depth == 26, "any depth of 6n + 2"
    assert {models.image_size(name) for name in models.NAMES} == {32, 224}


@pytest.mark.parametrize("depth", [0, 2, 19, 21, 52, -4])
def test_another_depth_is_an_error(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 .*got {depth}"):
        fused_resnet.cifar_resnet(depth)
    with pytest.raises(ValueError, match="6n"):
        models.build(f"cifar_plain{depth}")
    with pytest.raises(ValueError, match="6n"):
        blocks_of(depth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar_resnet"}, "unknown model 'cifar_resnet'"),
        ({"name": "resnet51"}, "unknown model 'resnet51'; did you mean"),
        ({"name": "cifar_resnet20_d"}, "unknown model"),
        ({"name": "cifar_plain20_a"}, "has no shortcuts"),
        ({"name": "plain34", "shortcut": "B"}, "has no shortcuts"),
        ({"name": "cifar_resnet20", "shortcut": "D"}, "shortcut must be one of 'A', 'B', 'C', got 'D'"),
        ({"name": "cifar_resnet20_a", "shortcut": "B"}, "shortcut must be 'A'"),
        ({"name": "resnet50", "stride_in": "2x2"}, "stride_in must be one of '1x1', '3x3', got '2x2'"),
        ({"name": "resnet18_1x1"}, "networks of Bottlenecks"),
        ({"name": "cifar_resnet20", "backend": "gpu"}, "backend must be one of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.build(**arguments)


@pytest.mark.parametrize("name", ["cifar_plain20", "cifar_resnet20", "cifar_highway20", "plain18", "resnet18"])
def test_an_argument_nobody_takes_is_an_error(name: str) -> None:
    with torch.device("meta"), pytest.raises(TypeError, match=r"unexpected .*argument 'gate_bais'"):
        models.build(name, gate_bais=-1.0)


def test_a_shortcut_cannot_drop_channels() -> None:
    with pytest.raises(ValueError, match="filters must be at least channels"):
        plain.ZeroPad(8, 4)


# ------------------------------------------------------------------------------------------------------------------ values

#: One of each kind: options, places of the stride, plain, highway, both families.
KINDS = (
    "cifar_resnet8", "cifar_resnet8_b", "cifar_resnet8_c", "cifar_plain14", "cifar_highway8", "cifar_highway8_b",
    "cifar_highway8_c", "plain18", "highway18", "highway50", "resnet18_a", "resnet50_1x1",
)  # fmt: skip
#: Launches of one forward in training mode: the first layer 2, a block 3 (4 with a side, 4 and 5 with a gate).
IN_TRAINING = {"cifar_resnet8": 13, "cifar_resnet8_c": 14, "cifar_plain14": 2 + 3 * 5, "cifar_highway8": 16}


def bottlenecks(shortcut: str, block: type[plain.Bottleneck] = plain.Bottleneck) -> nn.Module:
    """Two of a network's blocks for each of two stages, with this option of the shortcut; gates neither open nor closed."""
    stages = plain.Stages()
    stages._prepare(6, None, shortcut)
    made = nn.Sequential(stages._stage(block, 3, 2), stages._stage(block, 4, 2, 2))
    for module in made.modules():
        if isinstance(module, PlainHighwayBottleneck):
            nn.init.uniform_(module.gate.bias, -1, 1)
    return made


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", [*(name for name in KINDS if "50" not in name), "resnet18_c"])
def test_a_training_step_in_float64(name: str, memory: str) -> None:
    """Output, every gradient and the running statistics; in training mode, then with frozen statistics."""
    eager = randomise(unfuse(models.build(name, num_classes=5))).double()
    if "highway" in name:
        nn.init.uniform_(eager.layer2[0].gate.bias, -1, 1)
    fused = fuse(copy.deepcopy(eager), backend="reference", memory=memory)
    x = (torch.randn(3, 3, 17, 15) if name.startswith("cifar") else torch.randn(2, 3, 35, 33)).double()
    for training in (True, False):
        eager.train(training)
        fused.train(training)
        with count_launches() as log:
            fused(x)
        assert not explain(fused, show=False).left_alone
        if training and name in IN_TRAINING:
            assert len(log) == IN_TRAINING[name]
        fused.load_state_dict(eager.state_dict())
        truth, actual = train_step(eager, x), train_step(fused, x)
        assert list(actual) == list(truth)
        for what, expected in truth.items():
            assert relative_error(actual[what], expected) < 1e-10, what


@pytest.mark.parametrize("block", [plain.Bottleneck, PlainHighwayBottleneck])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("shortcut", ["A", "C"])
def test_bottlenecks_with_each_shortcut(shortcut: str, memory: str, block: type[plain.Bottleneck]) -> None:
    """Zeros where channels are added, or projections everywhere: a step as that of the plain modules."""
    eager = randomise(bottlenecks(shortcut, block)).double().train()
    fused = fuse(copy.deepcopy(eager), backend="reference", memory=memory)
    assert not explain(fused, show=False).left_alone and all(isinstance(block, Fused) for stage in fused for block in stage)
    x = torch.randn(2, 6, 9, 7).double()
    truth, actual = train_step(eager, x), train_step(fused, x)
    assert list(actual) == list(truth)
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-10, what


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "50" in name else []) for name in KINDS])
def test_logits_through_the_cpu_executor(name: str) -> None:
    model = randomise(unfuse(models.build(name))).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        with count_launches() as log:
            actual = fuse(model)(x)
    assert {runner for runner, _ in log.launches} == {"cpu"}
    assert expected.std() > 0 and relative_error(actual, expected) <= NETWORK_FP32


@pytest.mark.parametrize("stride_in", plain.STRIDE_IN)
def test_a_bottleneck_with_its_stride_in_either_place(stride_in: str) -> None:
    projection = nn.Sequential(plain.conv1x1(12, 16, 2), nn.BatchNorm2d(16))
    eager = randomise(plain.Bottleneck(12, 4, 2, projection, stride_in=stride_in)).double().train()
    x = torch.randn(2, 12, 9, 7).double()
    fused = fuse(copy.deepcopy(eager), backend="reference")
    truth, actual = train_step(eager, x), train_step(fused, x)
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-11, what


def test_the_padded_shortcut_by_hand() -> None:
    """Every second pixel from the first, the channels in front, zeros behind."""
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    y = plain.ZeroPad(3, 7, 2)(x)
    assert y.shape == (2, 7, 3, 2) and not y[:, 3:].any()
    assert torch.equal(y[:, :3], F.conv2d(x, torch.eye(3).view(3, 3, 1, 1), stride=2))


def test_the_gate_by_hand() -> None:
    """An open gate is the branch, a closed one the shortcut; it starts nearly closed."""
    block = randomise(PlainHighwayBlock(4, 4)).eval()
    assert torch.equal(block.gate.bias, torch.full((4,), -2.0))
    x = torch.randn(2, 4, 5, 6)
    for value, expected in ((100.0, block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))), (-100.0, x)):
        nn.init.constant_(block.gate.bias, value)
        assert torch.allclose(block(x), expected, atol=1e-6)
        assert torch.allclose(fuse(block, inplace=False)(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "block", "count"), [("cifar_highway8", HighwayBlock, 3), ("highway50", HighwayBottleneck, 16)]
)
def test_fuse_and_unfuse_keep_the_classes(name: str, block: type[nn.Module], count: int) -> None:
    built = models.build(name)
    assert isinstance(built.layer1[0], block)
    taken = unfuse(copy.deepcopy(built))
    assert not any(isinstance(module, Fused) for module in taken.modules())
    again = fuse(copy.deepcopy(taken))
    assert [type(m) for m in again.modules() if isinstance(m, block)] == [block] * count
    assert list(again.state_dict()) == list(built.state_dict())


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_plain8", "cifar_highway8"])
def test_autocast_gives_what_eager_gives(name: str) -> None:
    model = randomise(unfuse(models.build(name))).train()
    x = torch.randn(4, 3, 16, 16)
    outputs: list[Tensor] = []
    for net in (model, fuse(copy.deepcopy(model))):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        out.float().sum().backward()
        outputs.append(out)
    assert outputs[0].dtype == outputs[1].dtype
    assert relative_error(outputs[1], outputs[0]) < 0.05


def test_compiled_as_one_graph() -> None:
    model = nn.Sequential(randomise(HighwayBlock(4, 6, 2, plain.ZeroPad(4, 6, 2))), HighwayBlock(6, 6)).double().train()
    x = torch.randn(2, 4, 9, 7).double()
    truth = train_step(copy.deepcopy(model), x)
    made = train_step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for what, expected in truth.items():
        found = next(value for key, value in made.items() if key.replace("_orig_mod.", "") == what)
        assert relative_error(found, expected) < 1e-9, what


@pytest.mark.parametrize("name", ["cifar_highway8_b", "cifar_resnet8", "bottlenecks"])
def test_a_step_through_the_kernels(name: str) -> None:
    """Interpreted (or on a GPU): no launch falls back."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "bottlenecks":
        eager = nn.Sequential(plain.conv3x3(3, 12), randomise(bottlenecks("B", PlainHighwayBottleneck))[1]).to(device).train()
    else:
        eager = randomise(unfuse(models.build(name, num_classes=3))).to(device).train()
        eager.layer1, eager.layer3 = nn.Identity(), nn.Identity()
        eager.fc = nn.Linear(32, 3, device=device)
    fused = fuse(copy.deepcopy(eager), backend="triton")
    told = str(explain(fused, show=False))
    assert "on reference" not in told
    x = torch.randn(2, 3, 6, 5, device=device)
    truth = train_step(copy.deepcopy(eager).double(), x.double())
    with count_launches() as log:
        actual = train_step(fused, x)
    assert {runner for runner, _ in log.launches} == {"triton"}
    padded = {launch.kind for _, launch in log.launches if launch.kind.startswith("zero_pad")}
    assert padded == ({"zero_pad", "zero_pad_backward"} if name == "cifar_resnet8" else set())
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-3, what
