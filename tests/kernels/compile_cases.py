"""Compiles launches of ResNet-50 and ResNeXt-50 inference, batch 64, and prints what came out as JSON. Run by test_compile.py.

A process of its own, since the tests' own process interprets: ``python compile_cases.py sm_90 "3x3" "stem"``.
"""

from __future__ import annotations

import json
import sys

import torch
from launches import conv, max_pool

from fused_resnet.backends.triton_compile import compile_launch
from fused_resnet.launch import Launch

_BF16 = {"dtype": torch.bfloat16, "activation": "relu", "without": ("bias",)}

CASES: dict[str, Launch] = {
    "3x3": conv(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), epilogue="affine", **_BF16),
    "3x3 at 14x14": conv(64, 14, 14, 256, 256, 3, 3, padding=(1, 1), epilogue="affine", **_BF16),
    "3x3 stride 2": conv(64, 56, 56, 128, 128, 3, 3, stride=(2, 2), padding=(1, 1), epilogue="affine", **_BF16),
    "1x1 and shortcut": conv(64, 14, 14, 256, 1024, 1, 1, epilogue="affine_add", **_BF16),
    "stem": conv(64, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3), epilogue="affine", **_BF16),
    "32x4d": conv(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=32, epilogue="affine", **_BF16),
    "depthwise": conv(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=128, epilogue="affine", **_BF16),
    "3x3 at 7x7, batch 1": conv(1, 7, 7, 512, 512, 3, 3, padding=(1, 1), epilogue="affine", **_BF16),
    "3x3 fp32": conv(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), epilogue="affine", activation="relu"),
    "1x1 and shortcut fp32": conv(64, 14, 14, 256, 1024, 1, 1, epilogue="affine_add", activation="relu"),
    "stem fp32": conv(64, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3), epilogue="affine", activation="relu"),
    "32x4d fp32": conv(64, 56, 56, 128, 128, 3, 3, padding=(1, 1), groups=32, epilogue="affine", activation="relu"),
    "3x3 behind a prologue": conv(64, 28, 28, 128, 128, 3, 3, padding=(1, 1), prologue="bn_relu", **_BF16),
    "max-pool": max_pool(64, 112, 112, 64, kernel=(3, 3), stride=(2, 2), padding=(1, 1), dtype=torch.bfloat16),
}


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
                    "shared": compiled.shared,
                    "warps": compiled.num_warps,
                    "stages": compiled.num_stages,
                    "tensor_core": compiled.tensor_core_instructions,
                    "tma": compiled.tma_loads,
                    "ldsm": compiled.count("LDSM"),
                    "async_copies": compiled.count("LDGSTS"),
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
