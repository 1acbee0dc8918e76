"""Plans as data: which launches, in which order, what they read and write, what stays alive, and what they count."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from nets import CHAINS, TRAINING_CHAINS, chain_inputs, twin

from fused_resnet import backends
from fused_resnet.chain import Chain, Layer, Pool
from fused_resnet.launch import DGRAD_EPILOGUES, EPILOGUES, GRADIENTS, PROLOGUES, Geometry, PoolGeometry, output_size
from fused_resnet.plan import backward_plan, forward_plan, kept_slots, nominal_size, saved_slots, trainable_slots

FP32 = torch.float32

#: Eval mode, training mode, half of the BatchNorms frozen, and what is computed again.
ALL = {
    **{f"{name}, eval": row for name, row in CHAINS.items()},
    **{f"{name}, train": row for name, row in TRAINING_CHAINS.items()},
    **{f"{name}, low": (replace(spec, memory="low"), h, w) for name, (spec, h, w) in TRAINING_CHAINS.items()},
}


@pytest.mark.parametrize("name", CHAINS)
def test_one_launch_for_each_weight_layer_and_pooling(name: str) -> None:
    spec, h, w = CHAINS[name]
    plan = forward_plan(spec, 2, h, w, FP32)
    convolutions = len(spec.weight_layers) - (spec.entry is not None)
    assert [launch.kind for launch in plan.launches].count("conv") == convolutions
    assert len(plan.launches) == convolutions + (spec.pool is not None)
    assert plan.results == ("out",)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ALL)
def test_slots_are_made_before_they_are_read_and_dropped_after(name: str, backward: bool) -> None:
    """Executing by name alone, with only the declared inputs, never misses a slot; nothing but results is left at the end."""
    spec, h, w = ALL[name]
    needs = trainable_slots(spec)
    plan = backward_plan(spec, 2, h, w, FP32, needs) if backward else forward_plan(spec, 2, h, w, FP32, kept_slots(spec, needs))
    given = set(plan.reads())
    allowed = {"dout", *saved_slots(spec, needs)} if backward else {"x", *spec.parameter_slots}
    assert given <= allowed
    alive = set(given)
    for launch, dead in zip(plan.launches, plan.dead_after, strict=True):
        assert {slot for _, slot in launch.operands} <= alive, str(launch)
        assert dead <= {slot for _, slot in launch.operands}
        alive -= dead
        made = {slot for _, slot in launch.outputs}
        assert not made & alive, f"{launch} writes over a living slot"
        alive |= made
    made = {slot for launch in plan.launches for _, slot in launch.outputs}
    aliases = dict(plan.aliases)
    results = {aliases.get(slot, slot) for slot in (*plan.results, *plan.keep)}
    assert results <= alive
    unread = made - {slot for launch in plan.launches for _, slot in launch.operands}
    assert alive & made == (results & made) | unread


#: Of a BatchNorm in a prologue; of the last two there is one.
_VECTORS = {"x_gamma", "x_beta", "x_invstd", "x_var"}
#: Roles that may be absent where a prologue, a gradient or an epilogue lists them.
OPTIONAL = {
    "affine": {"gamma", "beta", "bias"}, "affine_add": {"gamma", "beta", "bias"},
    "stats": {"bias", "running_mean", "running_var", "batches"},
    **{prologue: _VECTORS for prologue in PROLOGUES if prologue.startswith("bn")}, "mask": {"a_previous", "z_previous"},
    "scale": {"gamma"}, "bn_backward": {"gamma", "count"}, "store": {"dshortcut"}, "bn_mask": {*_VECTORS, "dshortcut"},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_launches_carry_what_their_ends_read(name: str) -> None:
    """Each operand is one that the tables of launch.py list for the prologue, gradient and epilogue, and none is missing."""
    spec, h, w = ALL[name]
    plans = (forward_plan(spec, 2, h, w, FP32), backward_plan(spec, 2, h, w, FP32, trainable_slots(spec)))
    for launch in (launch for plan in plans for launch in plan.launches):
        if launch.kind not in ("conv", "dgrad"):
            continue
        if launch.kind == "conv":
            main, tables = {"x", "w"}, [(PROLOGUES, launch.prologue), (EPILOGUES, launch.epilogue)]
        else:
            main, tables = {"dz", "w"}, [(GRADIENTS, launch.gradient), (DGRAD_EPILOGUES, launch.epilogue)]
        listed = {role for table, key in tables for role in table[key]}
        optional = {role for _, key in tables for role in OPTIONAL.get(key, set())}
        assert listed - optional <= launch.roles - main <= listed, str(launch)
        assert len({"x_invstd", "x_var"} & launch.roles) == ("x_mean" in launch.roles), str(launch)


@pytest.mark.parametrize("name", ALL)
def test_the_shortcut_is_added_once_in_the_last_layer(name: str) -> None:
    spec, h, w = ALL[name]
    with_shortcut = [launch for launch in forward_plan(spec, 1, h, w, FP32).launches if "shortcut" in launch.roles]
    assert len(with_shortcut) == int(spec.residual)
    if spec.residual:
        assert with_shortcut[0].layer == spec.layers[-1].name
        assert with_shortcut[0].activation == spec.layers[-1].activation


def test_bottleneck_is_four_launches_with_a_projection() -> None:
    """The table of docs/fusion.md, in order: the projection before the layer that adds it."""
    spec, h, w = CHAINS["bottleneck_dilated"]
    plan = forward_plan(spec, 1, h, w, FP32)
    table = [(launch.layer, launch.epilogue, launch.activation) for launch in plan.launches]
    assert sorted(table) == [
        ("a", "affine", "relu"), ("b", "affine", "relu"), ("c", "affine_add", "relu"), ("d", "affine", "identity")
    ]  # fmt: skip
    assert [row[0] for row in table].index("d") < [row[0] for row in table].index("c")


def test_output_shape_follows_torch() -> None:
    for size, kernel, *window in [(7, 3, 2, 1, 1), (8, 3, 2, 1, 1), (9, 3, 1, 2, 2), (12, 7, 3, 0, 1), (5, 1, 2, 0, 1)]:
        conv = torch.nn.functional.conv2d(torch.zeros(1, 1, size, size), torch.zeros(1, 1, kernel, kernel), None, *window)
        assert output_size(size, kernel, *window) == conv.shape[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_shapes_and_types_are_known_ahead(name: str, dtype: torch.dtype) -> None:
    """Of all that a forward hands to the backward: as torch.compile is told, and as it comes out."""
    spec, h, w = ALL[name]
    keep = kept_slots(spec, trainable_slots(spec))
    told = spec.made(2, h, w, dtype)
    x, parameters = chain_inputs(spec, 2, h, w, dtype)
    slots = dict(zip(spec.parameter_slots, twin(parameters), strict=True), x=x)
    made = backends.execute(forward_plan(spec, 2, h, w, dtype, keep), slots, "reference")
    assert set(made) == {"out", *keep}
    assert {slot: (tuple(tensor.shape), tensor.dtype) for slot, tensor in made.items()} == {slot: told[slot] for slot in made}


def test_flops_and_bytes_of_a_known_layer() -> None:
    """3x3, 64 -> 64, 56x56, batch 2, fp16, with affine, shortcut and ReLU; counted by hand."""
    layer = Layer("a", 64, 64, (3, 3), padding=(1, 1), norm=True, affine=True, eps=1e-5, activation="relu")
    (launch,) = forward_plan(Chain((layer,), residual=True), 2, 56, 56, torch.float16).launches
    assert launch.flops == 2 * 2 * 56 * 56 * 64 * 64 * 9
    activation = 2 * 64 * 56 * 56 * 2
    assert dict(launch.sizes)["x"] == activation and dict(launch.sizes)["shortcut"] == activation
    assert launch.bytes == 3 * activation + 64 * 64 * 9 * 2 + 4 * 64 * 4


def test_grouped_flops() -> None:
    assert Geometry(1, 8, 8, 32, 32, 3, 3, padding=(1, 1), groups=32).flops == 2 * 64 * 32 * 9


@pytest.mark.parametrize("name", ALL)
def test_token_and_pickle_give_the_chain_back(name: str) -> None:
    spec, _, _ = ALL[name]
    assert Chain.parse(spec.token) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(Chain.parse(spec.token)) == hash(spec)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None, 1 / 3])
def test_token_keeps_the_momentum(momentum: float | None) -> None:
    spec = Chain((Layer("conv;1", 4, 3, (3, 3), norm=True, batch=True, tracked=True, momentum=momentum, group="a group"),))
    assert Chain.parse(spec.token) == spec


@pytest.mark.parametrize("name", ALL)
def test_nominal_size_is_accepted(name: str) -> None:
    spec, _, _ = ALL[name]
    n, h, w = nominal_size(spec)
    assert forward_plan(spec, n, h, w, FP32).launches


def test_nominal_size_copes_with_large_windows() -> None:
    big = Layer("a", 4, 3, (11, 3), (4, 1), (0, 0), (3, 1))
    spec = Chain((big,), pool=Pool((5, 5), (3, 3)))
    n, h, w = nominal_size(spec)
    out = forward_plan(spec, n, h, w, FP32).launches[-1].geometry
    assert min(out.P, out.Q) >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, r"groups=3 must divide .*\(8\).*\(6\)"),
        ({"groups": 0}, "groups=0"),
        ({"R": 9}, "output would be 0x6"),
        ({"stride": (0, 1)}, r"stride=\(0, 1\)"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\)"),
        ({"padding": (-1, 0)}, r"padding=\(-1, 0\)"),
    ],
)
def test_impossible_geometries_are_refused(change: dict, message: str) -> None:
    good = {"N": 1, "H": 8, "W": 8, "C": 8, "K": 6, "R": 3, "S": 3}
    Geometry(**good)
    with pytest.raises(RuntimeError, match=message):
        Geometry(**{**good, **change})


def test_impossible_pooling_is_refused() -> None:
    with pytest.raises(RuntimeError, match="max-pooling"):
        PoolGeometry(1, 2, 2, 4, (3, 3), (1, 1))


def test_a_shortcut_that_does_not_fit_is_refused_with_the_shapes() -> None:
    layer = Layer("a", 8, 4, (3, 3), padding=(1, 1))
    with pytest.raises(RuntimeError, match=r"\[1, 4, 6, 6\].*\[1, 8, 6, 6\]"):
        forward_plan(Chain((layer,), residual=True), 1, 6, 6, FP32)


def test_frozen_bottleneck_backward_is_seven_launches_and_a_mask() -> None:
    """Three dgrads, three wgrads, and bn_add_relu_backward; two more with a projection (design: docs/fusion.md)."""
    spec, h, w = CHAINS["bottleneck_groups"]
    assert len(backward_plan(spec, 1, h, w, FP32, trainable_slots(spec)).launches) == 7
    spec, h, w = CHAINS["bottleneck_dilated"]
    assert len(backward_plan(spec, 1, h, w, FP32, trainable_slots(spec)).launches) == 9
