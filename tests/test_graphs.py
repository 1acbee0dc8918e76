"""graphed: when a call is replayed, and that every other call runs the model. The recording itself needs a GPU."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import randomise, tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resnet
from fused_resnet import fuse, graphs

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class FakeRecording:
    """What a recording does, without a graph: the model's parameters are read at the call, nothing else is looked at."""

    made = 0

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        FakeRecording.made += 1
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.model(x)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_Recording", FakeRecording)
    monkeypatch.setattr(graphs, "_check", lambda model, example: None)
    FakeRecording.made = 0


def test_on_a_cpu_it_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="graphed records CUDA graphs, and example is on cpu"):
        fused_resnet.graphed(tiny(), torch.randn(1, 3, 33, 35))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        fused_resnet.graphed("resnet18", torch.randn(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example must be a Tensor"):
        fused_resnet.graphed(tiny(), (1, 3, 33, 35))  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_named() -> None:
    """Of a fake tensor that says it is on a GPU."""
    with FakeTensorMode():
        example = torch.empty(1, 3, 33, 35, device="cuda")
        flat = torch.sparse_coo_tensor(size=(1, 3), device="cuda", check_invariants=False)
    with pytest.raises(RuntimeError, match=r"stem\.0\.weight of model is on cpu, and example is on cuda:0: expected one GPU"):
        fused_resnet.graphed(tiny(), example)
    with pytest.raises(TypeError, match=r"example must be a dense Tensor .*, got layout torch\.sparse_coo"):
        fused_resnet.graphed(tiny(), flat)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got type"):
        graphs.Graphed(nn.Linear, example)  # type: ignore[arg-type]
    assert isinstance(graphs.Graphed(nn.ReLU(), example), nn.Module), "a model without parameters is nowhere"


def test_reasons_do_not_pile_up(anywhere: None) -> None:
    net = fused_resnet.graphed(nn.ReLU().eval(), torch.empty(1, 3))
    for n in range(2, 2 * graphs.REASONS + 2):
        net(torch.empty(n, 3))
    with torch.no_grad():
        net(torch.empty(1, 3))
        net(torch.empty(2, 3))
    assert len(net.calls) == graphs.REASONS + 2 and net.calls["another reason"] == graphs.REASONS
    assert net.calls["replayed"] == 1 and sum(net.calls.values()) == 2 * graphs.REASONS + 2
    assert f"{graphs.REASONS} x another reason" in net.explain()


def test_replayed_or_why_not(anywhere: None) -> None:
    model = fuse(tiny())
    x = torch.randn(2, 3, 33, 35)
    net = fused_resnet.graphed(model, torch.empty_like(x))
    assert net.explain() == "not called yet" and not FakeRecording.made
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(net(x), expected) and torch.equal(net(x), expected)
        assert net.calls["replayed"] == 2 and FakeRecording.made == 1
        others = {
            "another shape": (torch.randn(3, 3, 33, 35), "another shape than the example's: (3, 3, 33, 35)"),
            "another layout": (x.contiguous(memory_format=torch.channels_last), "another strides"),
        }
        for given, message in others.values():
            assert message in str(net.reason(given))
            assert torch.equal(net(given), model(given))
        assert "another dtype" in str(net.reason(x.double())) and "is a list" in str(net.reason([x]))
        model.basic.train()
        assert "training mode" in str(net.reason(x))
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast is on" in str(net.reason(x))
        handle = model.fc.register_forward_hook(lambda *_: None)
        assert "a hook looks into the model" in str(net.reason(x))
        handle.remove()
        assert net.reason(x) is None
    assert "gradients are wanted" in str(net.reason(x))
    out = net(x)
    assert out.requires_grad and torch.equal(out, expected)
    assert FakeRecording.made == 1 and "2 x replayed" in net.explain()


def test_all_parts_are_looked_at_once() -> None:
    """As PyTorch's iterators find them: parts that are shared, absent, or below others; what only one of them has shows."""
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(3), shared, nn.Sequential(nn.Linear(3, 3, bias=False))))
    net.register_module("absent", None)
    net.requires_grad_(False).eval()
    seen = graphs._see(net)
    assert seen[:3] == (False, False, False)
    assert sorted(seen.places) == sorted(tensor.data_ptr() for tensor in (*net.parameters(), *net.buffers()))
    last = net[1][2][0]
    last.train()
    assert graphs._see(net)[:3] == (True, False, False)
    last.eval().weight.requires_grad_()
    assert graphs._see(net)[:3] == (False, True, False)
    last.weight.requires_grad_(False)
    last.register_forward_pre_hook(lambda *_: None)
    assert graphs._see(net)[:3] == (False, False, True) and graphs._see(net).places == seen.places
    last.weight.data = last.weight.data.clone()
    assert graphs._see(net).places != seen.places


def test_modes_of_parts_stay_as_they_are(anywhere: None) -> None:
    model = fuse(tiny()).train()
    model.basic.bn1.eval()  # frozen statistics in a model that trains
    before = {name: module.training for name, module in model.named_modules()}
    net = fused_resnet.graphed(model, torch.randn(1, 3, 33, 35))
    assert net.training and {name: module.training for name, module in model.named_modules()} == before
    assert not fused_resnet.graphed(model.eval(), torch.randn(1, 3, 33, 35)).training


def test_moved_parameters_are_recorded_anew_changed_ones_are_read(anywhere: None) -> None:
    model = fuse(tiny())
    x = torch.randn(2, 3, 33, 35)
    net = fused_resnet.graphed(model, x)
    with torch.no_grad():
        net(x)
        randomise(model)
        assert torch.equal(net(x), model(x)) and FakeRecording.made == 1
        model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))
        assert torch.equal(net(x), model(x)) and FakeRecording.made == 2


def test_a_copy_records_for_itself(anywhere: None) -> None:
    net = fused_resnet.graphed(fuse(tiny()), x := torch.randn(1, 3, 33, 35))
    with torch.no_grad():
        net(x)
        other = copy.deepcopy(net)
        assert torch.equal(other(x), net(x)) and FakeRecording.made == 2
    assert list(net.state_dict()) == [f"module.{key}" for key in net.module.state_dict()]
    assert not net.training and net.train().module.training


def test_what_cannot_be_recorded_runs_itself_and_says_why(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(model: nn.Module, example: Tensor) -> None:
        tries.append(model)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise ValueError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "_Recording", fails)
    model = fuse(tiny())
    net = fused_resnet.graphed(model, x := torch.randn(1, 3, 33, 35))
    why = "it could not be recorded: RuntimeError: operation not permitted when stream is capturing"
    with torch.no_grad():
        assert net.reason(x) is None
        for _ in range(3):
            assert torch.equal(net(x), model(x))
        assert net.reason(x) == why and dict(net.calls) == {why: 3} and len(tries) == 1
        model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))
        monkeypatch.setattr(graphs, "_Recording", FakeRecording)
        assert torch.equal(net(x), model(x)) and net.calls["replayed"] == 1, "parameters were moved: tried again"


def test_threads_share_one_recording(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [0], [0]

    class Slow(FakeRecording):
        def __call__(self, x: Tensor) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1
            return super().__call__(x)

    monkeypatch.setattr(graphs, "_Recording", Slow)
    net = fused_resnet.graphed(nn.ReLU().eval(), torch.empty(1, 3))
    threads = [threading.Thread(target=net, args=(torch.randn(1, 3),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and FakeRecording.made == 1 and net.calls["replayed"] == 6


def test_out_of_a_pickle(anywhere: None) -> None:
    net = fused_resnet.graphed(nn.ReLU().eval(), x := torch.randn(1, 3))
    net(x)
    other = pickle.loads(pickle.dumps(net))
    assert torch.equal(other(x), x.relu()) and FakeRecording.made == 2 and other.calls["replayed"] == 2


def test_where_it_is_recorded_and_what_another_stream_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch is asked for, in order; stand-ins for its streams and graphs write it down."""
    said: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            said.append((self.name, "waits for", other.name))

        def wait_event(self, event: Any) -> None:
            said.append((self.name, "waits for", event.at))

    class Event:
        at = None

        def record(self, stream: Any) -> None:
            self.at = f"a call on {stream.name}"

    @contextmanager
    def noted(*given: Any, **named: Any) -> Any:
        said.append((*(getattr(one, "name", str(one)) for one in given), *named.items()))
        yield
        said.append("out")

    here, there = Stream("here"), Stream("there")
    current = [here]
    graph = SimpleNamespace(name="graph", replay=lambda: said.append("replay"))
    stands = {
        "device": noted, "stream": noted, "graph": noted, "Event": Event, "CUDAGraph": lambda: graph,
        "Stream": lambda device: side, "current_stream": lambda device: current[0],
    }  # fmt: skip
    side = Stream("side")
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    recording = graphs._Recording(nn.ReLU(), torch.randn(3))
    capture = ("graph", ("stream", side), ("capture_error_mode", "thread_local"))
    assert said == [
        ("cpu",),
        ("side", "waits for", "here"),
        ("side",),
        capture,
        "out",
        "out",
        ("here", "waits for", "side"),
        "out",
    ]
    said.clear()
    recording(torch.randn(3))
    assert said == ["replay"], "the same stream has nothing to wait for"
    current[0] = there
    recording(torch.randn(3))
    current[0] = here
    recording(torch.randn(3))
    assert said[1:] == [
        ("there", "waits for", "a call on here"), "replay", ("here", "waits for", "a call on there"), "replay",
    ]  # fmt: skip


@ON_GPU
def test_recorded_on_a_gpu() -> None:
    """The same bits as the plain call, results that stay, parameters changed in place, other shapes in between."""
    model = fuse(tiny()).cuda()
    first, second = torch.randn(2, 3, 33, 35, device="cuda"), torch.randn(2, 3, 33, 35, device="cuda")
    net = fused_resnet.graphed(model, first)
    with torch.inference_mode():
        a = net(first)
        b = net(second)
        assert torch.equal(a, model(first)) and torch.equal(b, model(second))
        assert torch.equal(net(first[:1]), model(first[:1]))
    with torch.no_grad():
        randomise(model)
        assert torch.equal(net(first), model(first))
    assert net.calls["replayed"] == 3
