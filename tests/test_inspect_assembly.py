"""Assembly read: the main loop, its instructions by class and the forms of products, on pieces of real listings.

``tests/listings/`` has the main loops of four kernels with what stands around them, as Triton 3.8's tools wrote them. What is
expected of them was counted with grep.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_resnet.backends.cubin import split_listing
from fused_resnet.inspect import assembly
from fused_resnet.inspect.assembly import classify, parse, read
from fused_resnet.inspect.facts import pipelined_stages

LISTINGS = Path(__file__).parent / "listings"


def listing(arch: str) -> str:
    return (LISTINGS / f"{arch}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arch", "matrix", "operands", "loads", "counts", "opcodes"),
    [
        ("sm_80", "HMMA 16816", "registers", ("cp.async", "registers"), (32, 25, 4, 90), {"LDSM": 16, "LDGSTS": 4, "PRMT": 37}),
        (
            "sm_90",
            "HGMMA 64x128x16",
            "shared-shared",
            ("TMA",),
            (4, 2, 8, 71),
            {"HGMMA": 4, "UTMALDG": 2, "SYNCS": 2, "BAR": 4},
        ),
        ("sm_100", "UTCHMMA", "shared-shared", ("TMA",), (4, 2, 10, 68), {"UTCHMMA": 4, "UTMALDG": 2, "UTCBAR": 1, "BRA": 4}),
        (
            "gfx942",
            "MFMA 32x32x8",
            "registers",
            ("registers",),
            (32, 32, 20, 67),
            {"buffer_load_dwordx4": 8, "ds_write_b128": 4, "s_waitcnt": 15},
        ),
    ],
)
def test_main_loops(
    arch: str,
    matrix: str,
    operands: str,
    loads: tuple[str, ...],
    counts: tuple[int, int, int, int],
    opcodes: dict[str, int],
) -> None:
    """On sm_90 and sm_100 the retries of a wait stand behind the kernel's end, jumped to from the loop: they do not count."""
    found = read(listing(arch))
    assert (found.matrix, found.operands, found.loads) == (matrix, operands, loads)
    loop = found.loop
    assert loop is not None and loop.loops == 1
    assert (loop.matrix, loop.load, loop.barrier, loop.other) == counts
    assert loop.instructions == sum(counts) and loop.other_share == counts[3] / sum(counts)
    assert {name: loop.opcodes[name] for name in opcodes} == opcodes and sum(loop.opcodes.values()) == sum(counts)
    assert found.matrix_instructions == counts[0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_addresses_do_for_labels(arch: str) -> None:
    """As the disassembler writes branches where it knows no labels."""
    text = listing(arch)
    address: dict[str, str] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"([.\w]+):", line):
            waiting.append(label[1])
        elif place := re.match(r"\s*/\*(\w+)\*/", line):
            address |= {name: f"0x{int(place[1], 16):x}" for name in waiting}
            waiting = []
    bare = re.sub(r"`\(([.\w]+)\)", lambda match: address.get(match[1], "0xfffff0"), re.sub(r"(?m)^[.\w]+:\n", "", text))
    assert ".L_" not in bare
    assert read(bare) == read(text)


def sass(*lines: str) -> str:
    """A kernel of these instructions; a line that ends in a colon is a label."""
    number, text = 0, []
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{16 * number:04x}*/                   {line} ;")
            number += 1
    return "\n".join(text)


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def test_the_innermost_loop_with_the_most_products() -> None:
    """One loop in another, a smaller one behind them, and one that has none."""
    text = sass(
        "MOV R0, R1", ".L_0:", "IADD3 R1, R1, 0x1, RZ", MMA, ".L_1:", "LDS R3, [R2]", MMA, MMA, "@P0 BRA `(.L_1)", "NOP",
        "@P1 BRA `(.L_0)", ".L_2:", MMA, "@P2 BRA `(.L_2)", ".L_3:", "LDG.E R3, desc[UR4][R2.64]", "@P3 BRA `(.L_3)", "EXIT",
    )  # fmt: skip
    loop = read(text).loop
    assert loop is not None
    assert (loop.matrix, loop.load, loop.barrier, loop.other, loop.loops) == (2, 1, 0, 1, 2)


def test_a_loop_is_what_every_way_to_its_branch_leads_through() -> None:
    """A jump back to a place that is also reached from elsewhere makes none; nor does a branch forward."""
    text = sass("@P0 BRA `(.L_1)", ".L_0:", MMA, ".L_1:", "NOP", "@P1 BRA `(.L_0)", "@P2 BRA `(.L_2)", MMA, ".L_2:", "EXIT")
    assert read(text).loop is None
    assert read(text).matrix == "HMMA 16816" and read(text).matrix_instructions == 2


def test_two_branches_back_are_one_loop() -> None:
    text = sass("NOP", ".L_0:", MMA, "@P0 BRA `(.L_0)", "NOP", "BAR.SYNC 0x0", "@P1 BRA `(.L_0)", "EXIT")
    loop = read(text).loop
    assert loop is not None and (loop.matrix, loop.barrier, loop.other, loop.loops) == (1, 1, 3, 1)


def test_without_products_the_loads_are_the_kernels() -> None:
    found = read(sass("LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "EXIT"))
    assert found.loop is None and found.matrix == found.operands == "" and found.loads == ("registers",)
    assert read("").instructions == 0


@pytest.mark.parametrize(
    ("instruction", "name", "form"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "HGMMA 64x128x16", "shared-shared"),
        ("HGMMA.64x256x8.F32.TF32 R24, R92, gdesc[UR8], R24", "HGMMA 64x256x8", "register-shared"),
        ("UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR18], idesc[UR19], UP1", "UTCHMMA", "shared-shared"),
        ("UTCHMMA tmem[UR12], gdesc[UR14], tmem[UR8], tmem[UR18], idesc[UR19], UP1", "UTCHMMA", "tensor-shared"),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "HMMA 1688", "registers"),
    ],
)
def test_forms_of_products(instruction: str, name: str, form: str) -> None:
    found = read(sass(".L_0:", instruction, "@P0 BRA `(.L_0)", "EXIT"))
    assert (found.matrix, found.operands) == (name, form)


@pytest.mark.parametrize(
    ("kind", "opcodes"),
    [
        (
            "matrix",
            "HMMA.16816 HGMMA.64x64x16 UTCHMMA UTCQMMA IMMA.16832 DMMA v_mfma_f32_16x16x16_bf16 v_wmma_f32_16x16x16_f16",
        ),
        ("load", "LDG.E LDGSTS.E LDS.128 LDSM.16.M88.4 UTMALDG.4D LDTM.x32 buffer_load_dwordx4 ds_read_b128 ds_write_b64"),
        ("barrier", "BAR.SYNC SYNCS.PHASECHK WARPGROUP.ARRIVE DEPBAR.LE LDGDEPBAR FENCE.VIEW s_waitcnt s_barrier s_nop"),
        ("other", "IMAD LDC LDCU STS STG UTMASTG HFMA2 HADD2 BRA NOP ULEA v_add_u32_e32 s_mov_b32 global_store_dwordx4"),
    ],
)
def test_classes(kind: str, opcodes: str) -> None:
    assert {opcode: classify(opcode) for opcode in opcodes.split()} == dict.fromkeys(opcodes.split(), kind)


def test_both_languages_are_told_apart() -> None:
    assert parse(listing("gfx942"))[0].opcode == "v_mov_b32_e32"
    assert assembly.main_loop(parse(listing("sm_80")))[-1].opcode == "BRA"


def test_a_listing_of_several_kernels_is_taken_apart() -> None:
    """Addresses begin at 0, branches find their labels; an address of a neighbour is no label, nor is one past the end."""
    one = sass("MOV R0, R1", MMA, "@P0 BRA 0x10", "EXIT")
    other = sass(MMA, "@!P1 BRA 0x40", "BRA 0x90", "EXIT")
    shifted = re.sub(r"/\*(\w+)\*/", lambda match: f"/*{int(match[1], 16) + 64:04x}*/", other)
    first, second = split_listing(f"\t.headerflags\n{one}\n{shifted}\n", [64, 64])
    assert first == sass("MOV R0, R1", ".L_0:", MMA, "@P0 BRA `(.L_0)", "EXIT") + "\n"
    assert second == sass(".L_0:", MMA, "@!P1 BRA `(.L_0)", "BRA 0x90", "EXIT") + "\n"
    loop = read(second).loop
    assert loop is not None and loop.matrix == 1


def test_what_is_said_of_scheduling_is_left_out() -> None:
    """Triton 3.6's disassembler says it of sm_120; branches in its listing led nowhere, in kernels that were not the first."""
    plain = sass("@P0 BRA 0x50", MMA, "@!P1 BRA 0x40", "EXIT")
    told = plain.replace(";", " &req={5,1} &rd=0x0 ?WAIT4_END_GROUP;", 1).replace("0x40;", "0x40  ?trans5;")
    told = re.sub(r"/\*(\w+)\*/", lambda match: f"/*{int(match[1], 16) + 48:04x}*/", told)
    (_, text) = split_listing(sass(MMA, "BRA 0x0", "EXIT") + "\n" + told, [48, 64])
    assert text == sass("@P0 BRA `(.L_1)", ".L_0:", MMA, ".L_1:", "@!P1 BRA `(.L_0)", "EXIT") + "\n"


def test_pipelined_buffers() -> None:
    """Barriers, vectors and what is not taken by an index do not count."""
    ttgir = """
      %a = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable>
      %b = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
      %c = ttg.local_alloc : () -> !ttg.memdesc<4x1xi64, #shared1, #smem, mutable>
      %d = ttg.local_alloc : () -> !ttg.memdesc<2x64xf32, #shared, #smem, mutable>
      %e = ttg.local_alloc : () -> !ttg.memdesc<2x128x64xbf16, #shared, #smem, mutable>
      %1 = ttg.memdesc_index %a[%i] : x
      %2 = ttg.memdesc_index %b[%i] : x
      %3 = ttg.memdesc_index %c[%i] : x
      %4 = ttg.memdesc_index %d[%i] : x
    """
    assert pipelined_stages(ttgir) == (3, 4)
    assert pipelined_stages("") == (1, 1)
