"""Where a fused model of others is put in: training loops, averages, conversions, exports, checkpoints."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
from nets import launches, randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, nn
from torch.nn.utils import prune
from zoo import CifarNet

from fused_resnet import count_launches, explain, fuse, unfuse

FORWARD = {False: 8, True: 12}  # launches of a CifarNet


def nets() -> tuple[nn.Module, nn.Module]:
    plain = randomise(CifarNet())
    return plain, copy.deepcopy(plain)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 17, 15)


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    """A few steps of SGD on fixed images."""
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x, y = torch.randn(4, 3, 17, 15, generator=generator), torch.randint(0, 10, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model


def same(first: nn.Module, second: nn.Module, bound: float = 1e-4) -> None:
    """Equal keys, in order, and near values."""
    assert list(first.state_dict()) == list(second.state_dict())
    for (key, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items()):
        assert relative_error(b.double(), a.double()) < bound, key


def test_fuse_then_train_and_train_then_fuse() -> None:
    plain, fused = nets()
    same(train(plain), train(fuse(fused)), 1e-3)
    x = images()
    again = fuse(copy.deepcopy(plain)).eval()
    assert relative_error(again(x), plain.eval()(x)) < CLOSE and launches(again, x) == FORWARD[False]


@pytest.mark.parametrize("order", ["fuse, then load", "load, then fuse"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_load_state_dict_before_and_after(order: str, assign: bool) -> None:
    """After the model has run: what was folded from the old state is not used for the new."""
    plain, _ = nets()
    trained = train(plain, 1)
    stream, x = io.BytesIO(), images()
    torch.save(trained.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    model = CifarNet().eval()
    if order == "fuse, then load":
        fuse(model)(x)
    assert not any(model.load_state_dict(state, assign=assign))
    if order == "load, then fuse":
        fuse(model)
    assert relative_error(model(x), trained.eval()(x)) < CLOSE and launches(model, x) == FORWARD[False]
    same(train(trained), train(model), 1e-3)
    back = CifarNet()
    back.load_state_dict(model.state_dict())
    assert relative_error(back.eval()(x), model.eval()(x)) < CLOSE


def test_weights_of_a_fused_model_go_into_another_library_and_back() -> None:
    """safetensors-like: tensors by name, contiguous; the layout of filters is nobody's business."""
    _, fused = nets()
    fuse(fused).to(memory_format=torch.channels_last)
    flat = {key: value.contiguous().numpy() for key, value in fused.state_dict().items()}
    other = CifarNet().eval()
    other.load_state_dict({key: torch.from_numpy(value) for key, value in flat.items()})
    assert relative_error(fused.eval()(x := images()), other(x)) < CLOSE


@pytest.mark.parametrize("change", ["double", "channels_last", "bfloat16"])
def test_to_before_and_after(change: str) -> None:
    plain, fused = nets()

    def to(model: nn.Module) -> nn.Module:
        if change == "channels_last":
            return model.to(memory_format=torch.channels_last)
        return model.to(getattr(torch, change if change != "double" else "float64"))

    x = images().to(next(to(copy.deepcopy(plain)).parameters()).dtype)
    bound = 0.05 if change == "bfloat16" else CLOSE
    expected = to(plain).eval()(x)
    for model in (to(fuse(copy.deepcopy(fused))), fuse(to(copy.deepcopy(fused)))):
        with torch.no_grad():
            assert relative_error(model.eval()(x).double(), expected.double()) < bound
            assert launches(model, x) == FORWARD[False]


def test_averaged_models() -> None:
    plain, fused = nets()
    fuse(fused)
    x = images()
    results = []
    for model in (plain, fused):
        average = torch.optim.swa_utils.AveragedModel(model)
        train(model, 2)
        average.update_parameters(model)
        torch.optim.swa_utils.update_bn([images(4) * 0 + x], average)
        results.append(average.eval()(x))
    assert relative_error(results[1], results[0]) < 1e-3


def test_timms_moving_average() -> None:
    timm = pytest.importorskip("timm.utils")
    plain, fused = nets()
    fuse(fused)
    results = []
    for model in (plain, fused):
        average = timm.ModelEmaV3(model, decay=0.5)
        average.update(train(model, 2))
        results.append(average.module.eval()(images() * 0 + 1))
    assert relative_error(results[1], results[0]) < 1e-3 and launches(average.module, images()) == FORWARD[False]


def test_sync_batch_norm_before_and_after() -> None:
    for order in ("before", "after"):
        plain, fused = nets()
        if order == "before":
            fused = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(fused))
        else:
            fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(fused))
        x = images()
        assert relative_error(fused.eval()(x), plain.eval()(x)) < CLOSE
        assert launches(fused, x) == FORWARD[False], order
        assert any(isinstance(module, nn.SyncBatchNorm) for module in fused.modules())
        for model in (plain, fused):
            model.train()(x).square().sum().backward()
        for (key, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
            assert relative_error(b.grad, a.grad) < 1e-3, (order, key)
        for (key, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
            assert relative_error(b.double(), a.double()) < CLOSE, (order, key)


def test_freezing() -> None:
    plain, fused = nets()
    fuse(fused)
    for model in (plain, fused):
        model.train().stages[0].requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = images()
    for model in (plain, fused):
        model(x).square().sum().backward()
    for (key, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters()):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or relative_error(b.grad, a.grad) < 1e-4), key
    same(plain, fused)


def test_export_gives_what_the_modules_compute() -> None:
    plain, fused = nets()
    x = images()
    program = torch.export.export(fuse(fused).eval(), (x,))
    assert relative_error(program.module()(x), plain.eval()(x)) < CLOSE
    assert not [node for node in program.graph.nodes if "fused_resnet" in str(node.target)], "standard operators"


def test_onnx_gets_standard_operators() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    plain, fused = nets()
    program = torch.onnx.export(fuse(fused).eval(), (images(),), dynamo=True)
    kinds = {node.op_type for node in program.model.graph}
    assert "Conv" in kinds and not any("fused" in node.domain for node in program.model.graph)
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(program.model_proto)
    x = images()
    (result,) = evaluator.run(None, {program.model.graph.inputs[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(result), plain.eval()(x)) < CLOSE


@pytest.mark.parametrize("how", ["pruned", "weight norm"])
def test_reparametrised_filters_are_left_alone(how: str) -> None:
    _, fused = nets()
    block = fused.stages[0]
    if how == "pruned":
        prune.random_unstructured(block.conv1, "weight", 0.5)
    else:
        nn.utils.parametrizations.weight_norm(block.conv1)
    x = images()
    expected = fused.eval()(x)
    assert relative_error(fuse(fused)(x), expected) < CLOSE
    note = next(row.note for row in explain(fused, show=False).left_alone if row.name.startswith("stages.0"))
    assert "hook" in note or "Parametrized" in note


@pytest.fixture
def engine() -> Iterator[str]:
    """The engine for quantised operators, set."""
    before, known = torch.backends.quantized.engine, torch.backends.quantized.supported_engines
    found = [name for name in ("x86", "fbgemm", "qnnpack") if name in known]
    if not found:
        pytest.skip("this PyTorch has no engine for quantised operators")
    torch.backends.quantized.engine = found[0]
    yield found[0]
    torch.backends.quantized.engine = before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given_back", [True, False], ids=["after unfuse", "of a fused model"])
def test_quantisation_by_torch_ao(engine: str, given_back: bool) -> None:
    """Traced, observed and converted: bit by bit what comes of a model that was never fused."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    plain, fused = nets()
    x, made = images(), []
    fuse(fused.eval())(x)
    if given_back:
        unfuse(fused)
    for model in (plain.eval(), fused):
        prepared = prepare_fx(model, get_default_qconfig_mapping(engine), (x,))
        prepared(x)
        made.append(convert_fx(prepared))
    assert "QuantizedConvReLU2d" in str(made[1]) or "quantized" in str(made[1])
    assert torch.equal(made[0](x), made[1](x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given_back", [True, False], ids=["after unfuse", "of a fused model"])
def test_quantisation_by_torchao(given_back: bool) -> None:
    """Filters of Linears in int8: those of convolutions stay, and so do the chains."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain, fused = nets()
    fuse(fused.eval())
    if given_back:
        unfuse(fused)
    x, made = images(), []
    for model in (plain.eval(), fused):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        made.append(model(x))
    assert "Int8" in type(fused.linear.weight).__name__ and relative_error(made[1], made[0]) < CLOSE
    assert launches(fused, x) == (0 if given_back else FORWARD[False])


def test_torch_fx_traces_a_fused_model() -> None:
    """Its forward says which arguments it takes, as the original does; the graph holds the modules themselves."""
    plain, fused = nets()
    x = images()
    assert inspect.signature(fuse(fused).forward) == inspect.signature(plain.forward)
    graph = torch.fx.symbolic_trace(fused.eval())
    assert relative_error(graph(x), plain.eval()(x)) < CLOSE
    assert {node.op for node in graph.graph.nodes} >= {"placeholder", "call_module"}


def test_feature_extractors() -> None:
    """By torch.fx, which traces into the modules themselves, and by taking the layers one after another; both fuse again."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    getter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
    plain, fused = nets()
    x, nodes = images(), {"stages.0.bn1": "inside", "stages.2": "last"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = feature_extraction.create_feature_extractor(plain.eval(), nodes)(x)
        extractor = feature_extraction.create_feature_extractor(fuse(fused).eval(), nodes)
        found = extractor(x)
        assert launches(extractor, x) == 0 < launches(fuse(extractor), x)
        again = extractor(x)
    assert wanted.keys() == found.keys() == set(nodes.values())
    for key, value in wanted.items():
        assert relative_error(found[key], value) < CLOSE and relative_error(again[key], value) < CLOSE, key
    made = []
    for model in (plain, fused):
        body = nn.Sequential(OrderedDict(stem=model.conv1, bn=model.bn1, relu=nn.ReLU(), **dict(model.stages.named_children())))
        made.append(getter(body, {"1": "middle", "2": "last"}).eval())
    for key, value in made[0](x).items():
        assert relative_error(made[1](x)[key], value) < CLOSE, key
    assert launches(made[1], x) == FORWARD[False] - 1, "the stem's own module is gone"
    assert launches(fuse(unfuse(made[1])), x) == FORWARD[False]


def test_a_hook_on_a_block_of_a_fused_model() -> None:
    plain, fused = nets()
    x, seen = images(), []
    for model in (plain.eval(), fuse(fused).eval()):
        model.stages[1].register_forward_hook(lambda m, a, y: seen.append(y))
        with count_launches() as log:
            model(x)
    assert relative_error(seen[1], seen[0]) < CLOSE and len(log) == FORWARD[False]


@pytest.mark.slow
def test_accelerate_and_lightning_loops() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    plain, fused = nets()
    fuse(fused)
    data = torch.utils.data.TensorDataset(images(8), torch.randint(0, 10, (8,)))
    for model in (plain, fused):
        wrapped, optimizer, loader = accelerate.Accelerator(cpu=True).prepare(
            model.train(), torch.optim.SGD(model.parameters(), lr=0.05), torch.utils.data.DataLoader(data, 4)
        )
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    same(plain, fused, 1e-3)

    class Lit(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    for model in (plain, fused):
        options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(accelerator="cpu", enable_model_summary=False, **options)
        trainer.fit(Lit(model.train()), torch.utils.data.DataLoader(data, 4))
    same(plain, fused, 1e-3)
