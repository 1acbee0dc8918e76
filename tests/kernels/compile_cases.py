"""Compiles launches that compiled.json does not have (fp32, groups, given statistics, batch 1); prints what came out as JSON.

A process of its own, since the tests' own process interprets: ``python compile_cases.py sm_90 "32x4d" "stem fp32"``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from gradient_launches import dgrad, wgrad
from launches import conv, end_of_block, max_pool, max_pool_backward, zero_pad

from fused_resnet.backends.triton_compile import compile_launch, compile_prepared, prepare
from fused_resnet.launch import Launch

_POOL = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
_STEM = (64, 112, 112, 64)
_ENDS = ("y", "mean", "invstd", "gamma", "beta")
_ENDS += tuple(f"shortcut_{role}" for role in _ENDS[1:]) + ("shortcut",)
_GATE_GRADIENTS = ("dz", "sum", "dt", "dt_sum", "dside", "dot", "dside_sum", "shortcut_dot")
_ENDS_BACKWARD = ("dout", "out", "y", "mean", "invstd", "shortcut", "shortcut_mean", "shortcut_invstd")
_BEHIND_POOL = ("dy", "x", "indices", "x_mean", "x_invstd", "x_gamma", "x_beta")
_BF16 = {"dtype": torch.bfloat16, "activation": "relu", "without": ("bias",)}

#: Of what there is in both types, what ResNet-18 and ResNet-50 do not run in bf16; the rest is in compiled.json.
ELSEWHERE = (
    "depthwise + stats",
    "32x4d + stats",
    "gate",
    "gate_backward",
    "zero_pad",
    "zero_pad_backward",
    "max_pool_backward from x",
    "dgrad 32x4d",
    "dgrad mask",
    "wgrad 32x4d",
    "wgrad given",
)

CASES: dict[str, Launch] = {
    "32x4d": conv(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=32, epilogue="affine", **_BF16),
    "depthwise": conv(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=128, epilogue="affine", **_BF16),
    "3x3 at 7x7, batch 1": conv(1, 7, 7, 512, 512, 3, 3, padding=(1, 1), epilogue="affine", **_BF16),
    "dgrad 3x3 at 7x7, batch 1": dgrad(1, 7, 7, 512, 512, 3, 3, padding=(1, 1), dtype=torch.bfloat16),
    "3x3 fp32": conv(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), epilogue="affine", activation="relu"),
    "1x1 and shortcut fp32": conv(64, 14, 14, 256, 1024, 1, 1, epilogue="affine_add", activation="relu"),
    "stem fp32": conv(64, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3), epilogue="affine", activation="relu"),
    "32x4d fp32": conv(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=32, epilogue="affine", activation="relu"),
    **{
        f"{name}{suffix}": launch
        for suffix, dtype in (("", torch.bfloat16), (" fp32", torch.float32))
        for name, launch in {
            "3x3 + stats": conv(
                64, 56, 56, 64, 64, 3, 3, padding=(1, 1), prologue="bn_relu", epilogue="stats", without=("bias",), dtype=dtype
            ),
            "1x1 + stats": conv(64, 14, 14, 256, 1024, 1, 1, epilogue="stats", without=("bias",), dtype=dtype),
            "stem + stats": conv(
                64, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3), epilogue="stats", without=("bias",), dtype=dtype
            ),
            "depthwise + stats": conv(
                64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=128, prologue="bn_relu", epilogue="stats", dtype=dtype
            ),
            "32x4d + stats": conv(
                64,
                56,
                56,
                128,
                128,
                3,
                3,
                padding=(1, 1),
                groups=32,
                prologue="bn_relu",
                epilogue="stats",
                without=("bias",),
                dtype=dtype,
            ),
            "bn_add_relu": end_of_block(64, 14, 14, 1024, operands=_ENDS, dtype=dtype),
            "bn_add_relu_backward": end_of_block(
                64, 14, 14, 1024, operands=_ENDS_BACKWARD, outputs=("dz", "sum", "dot", "shortcut_dot"), dtype=dtype
            ),
            "gate": end_of_block(64, 14, 14, 1024, operands=("t", *_ENDS), dtype=dtype, kind="gate"),
            "gate_backward": end_of_block(
                64, 14, 14, 1024, operands=("dout", "t", *_ENDS), outputs=_GATE_GRADIENTS, dtype=dtype, kind="gate_backward"
            ),
            "zero_pad": zero_pad(128, 32, 32, 16, 32, stride=(2, 2), dtype=dtype),
            "zero_pad_backward": zero_pad(128, 32, 32, 16, 32, stride=(2, 2), dtype=dtype, backward=True),
            "max_pool and indices": max_pool(*_STEM, prologue="bn_relu", outputs=("y", "indices"), dtype=dtype, **_POOL),
            "max_pool_backward": max_pool_backward(
                *_STEM, operands=_BEHIND_POOL, outputs=("dx", "sum", "dot"), activation="relu", dtype=dtype, **_POOL
            ),
            "max_pool_backward from x": max_pool_backward(*_STEM, dtype=dtype, **_POOL),
        }.items()
        if suffix or name in ELSEWHERE
    },
}

_DGRAD = {"gradient": "bn_backward", "epilogue": "bn_mask", "activation": "relu"}
_WGRAD = {"gradient": "bn_backward", "prologue": "bn_relu"}
_STRIDED = {"stride": (2, 2), "padding": (1, 1)}
_GIVEN = {"gradient": "scale", "outputs": ("dw", "dbias", "dgamma", "dbeta")}

#: Training, and the backward of given statistics.
CASES |= {
    f"{name}{suffix}": launch
    for suffix, dtype in (("", torch.bfloat16), (" fp32", torch.float32))
    for name, launch in {
        "dgrad 3x3": dgrad(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype=dtype, **_DGRAD),
        "dgrad 3x3 at 14x14": dgrad(64, 14, 14, 256, 256, 3, 3, padding=(1, 1), dtype=dtype, **_DGRAD),
        "dgrad 3x3 stride 2": dgrad(64, 56, 56, 128, 128, 3, 3, dtype=dtype, **_STRIDED, **_DGRAD),
        "dgrad 1x1": dgrad(64, 14, 14, 256, 1024, 1, 1, dtype=dtype, **_DGRAD),
        "dgrad 1x1 stride 2": dgrad(64, 28, 28, 512, 1024, 1, 1, stride=(2, 2), gradient="bn_backward", dtype=dtype),
        "dgrad and shortcut": dgrad(64, 14, 14, 1024, 256, 1, 1, gradient="bn_backward", without=("count",), dtype=dtype),
        "dgrad 32x4d": dgrad(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=32, dtype=dtype, **_DGRAD),
        "dgrad mask": dgrad(
            64, 14, 14, 256, 256, 3, 3, padding=(1, 1), gradient="scale", epilogue="mask", activation="relu", dtype=dtype
        ),
        "wgrad 3x3": wgrad(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype=dtype, **_WGRAD),
        "wgrad 3x3 stride 2": wgrad(64, 56, 56, 128, 128, 3, 3, dtype=dtype, **_STRIDED, **_WGRAD),
        "wgrad 1x1": wgrad(64, 14, 14, 256, 1024, 1, 1, dtype=dtype, **_WGRAD),
        "wgrad stem": wgrad(64, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3), gradient="bn_backward", dtype=dtype),
        "wgrad 32x4d": wgrad(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=32, dtype=dtype, **_WGRAD),
        "wgrad given": wgrad(64, 14, 14, 256, 256, 3, 3, padding=(1, 1), dtype=dtype, **_GIVEN),
    }.items()
    if suffix or name in ELSEWHERE
}

_LOADED = {"epilogue": "stats", "without": ("bias",)}

#: Exponentials at each end.
CASES |= {
    f"{name}{suffix}": launch
    for suffix, dtype in (("", torch.bfloat16), (" fp32", torch.float32))
    for name, launch in {
        "silu on load 3x3": conv(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), prologue="bn_silu", dtype=dtype, **_LOADED),
        "gelu on load 3x3": conv(64, 14, 14, 256, 256, 3, 3, padding=(1, 1), prologue="bn_gelu", dtype=dtype, **_LOADED),
        "gelu on load 1x1": conv(64, 14, 14, 256, 1024, 1, 1, prologue="bn_gelu", dtype=dtype, **_LOADED),
        "gelu alone on load 3x3": conv(
            64, 14, 14, 256, 256, 3, 3, padding=(1, 1), prologue="gelu", epilogue="bias", dtype=dtype
        ),
        "silu 1x1 and shortcut": conv(
            64, 14, 14, 256, 1024, 1, 1, epilogue="affine_add", activation="silu", without=("bias",), dtype=dtype
        ),
        "dgrad silu 3x3": dgrad(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype=dtype, **{**_DGRAD, "activation": "silu"}),
        "dgrad gelu 1x1": dgrad(64, 14, 14, 256, 1024, 1, 1, dtype=dtype, **{**_DGRAD, "activation": "gelu"}),
        "wgrad silu 3x3": wgrad(
            64, 56, 56, 64, 64, 3, 3, padding=(1, 1), gradient="bn_backward", prologue="bn_silu", dtype=dtype
        ),
        "wgrad gelu 1x1": wgrad(64, 14, 14, 256, 1024, 1, 1, gradient="bn_backward", prologue="bn_gelu", dtype=dtype),
        "bn_add_relu gelu": end_of_block(64, 14, 14, 1024, operands=_ENDS, activation="gelu", dtype=dtype),
        "bn_add_relu_backward gelu": end_of_block(
            64, 14, 14, 1024, operands=("dout", *_ENDS), outputs=("dz", "sum", "dot", "shortcut_dot"), activation="gelu",
            dtype=dtype,
        ),
        "max_pool gelu and indices": max_pool(*_STEM, prologue="bn_gelu", outputs=("y", "indices"), dtype=dtype, **_POOL),
        "max_pool_backward gelu": max_pool_backward(
            *_STEM, operands=_BEHIND_POOL, outputs=("dx", "sum", "dot"), activation="gelu", dtype=dtype, **_POOL
        ),
    }.items()
}  # fmt: skip

_GIVEN_ON_LOAD = {"prologue": "bn_relu", "without": ("bias", "x_invstd")}
_IN_FRONT = {"gradient": "bn_backward", "epilogue": "bn_mask", "activation": "relu", "without": ("count", "x_invstd")}
_THROUGH = ("dz", "dshortcut", "gamma")

#: Around a chain's entry: given statistics on load and in front of a dgrad's end, and what stands without a convolution.
ENTRY = {
    f"{name}{suffix}": launch
    for suffix, dtype in (("", torch.bfloat16), (" fp32", torch.float32))
    for name, launch in {
        "entry 1x1": conv(64, 28, 28, 256, 128, 1, 1, epilogue="affine", activation="relu", dtype=dtype, **_GIVEN_ON_LOAD),
        "entry 3x3": conv(64, 14, 14, 256, 256, 3, 3, padding=(1, 1), dtype=dtype, **_GIVEN_ON_LOAD),
        "dgrad entry": dgrad(64, 28, 28, 256, 128, 1, 1, dtype=dtype, **_IN_FRONT),
        "wgrad entry": wgrad(
            64, 28, 28, 256, 128, 1, 1, gradient="bn_backward", prologue="bn_relu", without=("count", "x_invstd"), dtype=dtype
        ),
        "statistics": end_of_block(
            64, 28, 28, 256, operands=("x", "running_mean", "running_var", "batches"), outputs=("mean", "invstd"), dtype=dtype,
            kind="statistics", activation="identity",
        ),
        "output_gradient": end_of_block(
            64, 28, 28, 256, operands=(*_THROUGH, "y", "mean", "invstd", "sum", "dot"), outputs=("dy",), dtype=dtype,
            kind="output_gradient", gradient="bn_backward", activation="identity",
        ),
        "output_gradient given": end_of_block(
            64, 28, 28, 256, operands=(*_THROUGH, "var"), outputs=("dy",), dtype=dtype, kind="output_gradient",
            gradient="scale", activation="identity",
        ),
    }.items()
}  # fmt: skip
CASES |= ENTRY


def spills_with_all(launch: Launch, target: str, tf32: bool) -> int:
    """Bytes spilled where ptxas may use all registers of a thread, and does not aim at more programs at a time."""
    prepared = prepare(launch, target, tf32=tf32)
    options = {**prepared.options, **({"maxnreg": 255} if target.startswith("sm") else {})}
    return compile_prepared(replace(prepared, options=options), target).spills


def main(target: str, names: list[str]) -> None:
    results = []
    for name in names or CASES:
        for tf32 in (False, True) if "fp32" in name and target.startswith("sm") else (False,):
            compiled = compile_launch(CASES[name], target, tf32=tf32)
            results.append(
                {
                    "case": name,
                    "tf32": tf32,
                    "registers": compiled.registers,
                    "spills": compiled.spills,
                    "spills_with_all": spills_with_all(CASES[name], target, tf32) if compiled.spills else 0,
                    "shared": compiled.shared,
                    "warps": compiled.num_warps,
                    "stages": compiled.num_stages,
                    "partials": compiled.start.partials,
                    "tensor_core": compiled.tensor_core_instructions,
                    "tma": compiled.tma_loads,
                    "ldsm": compiled.count("LDSM"),
                    "async_copies": compiled.count("LDGSTS"),
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
