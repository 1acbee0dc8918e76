"""Reads assembly: the main loop, what its instructions are for, and where the matrix instructions take their operands from.

Two languages: SASS as ``nvdisasm`` prints it, with labels or bare addresses, and AMD's as the compiler writes it. All functions
are pure, on text.

The main loop is the innermost loop with the most matrix instructions. A loop is a branch back to an instruction through which
every way to the branch leads (a natural loop). What the compiler moved out of line (the retries of a wait) is left out: the mix
counts what lies between the loop's first instruction and its branch back. Instructions are counted where they stand, whether
all warps issue them or one does: on sm_100 a single thread issues the products, on sm_90 one issues the bulk loads.

=========  ====================================================  =========================================================
class      NVIDIA                                                AMD
=========  ====================================================  =========================================================
matrix     HMMA, HGMMA, UTCHMMA and their relatives              v_mfma, v_smfmac, v_wmma, v_swmmac
load       from memory (LDG, LDGSTS, UTMALDG), from shared       buffer_load, global_load, ds_read, and ds_write, the second
           memory (LDS, LDSM), from tensor memory (LDTM)         half of a load into shared memory
barrier    BAR, SYNCS, WARPGROUP.*, DEPBAR, LDGDEPBAR, UTCBAR,   s_waitcnt, s_barrier, s_nop (wait states)
           FENCE, MEMBAR, WARPSYNC
other      the rest: addresses, predicates, branches, the        the rest
           arithmetic of a prologue, stores to shared memory,
           constants (LDC), NOP
=========  ====================================================  =========================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CLASSES = ("matrix", "load", "barrier", "other")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with modifiers, ``HGMMA.64x128x16.F32.BF16``, ``v_mfma_f32_32x32x8_bf16``.
        operands: the rest of its line.
        target: index of the instruction it may jump to, if it is a branch.
        falls: whether the next instruction may follow it.
    """

    opcode: str
    operands: str = ""
    target: int | None = None
    falls: bool = True

    @property
    def root(self) -> str:
        """The opcode without modifiers: ``HGMMA``; AMD's has none."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """The main loop.

    Attributes:
        matrix, load, barrier, other: instructions of one iteration, by class.
        opcodes: all of them, most frequent first.
        loops: innermost loops with matrix instructions in the kernel; where warps have different tasks there may be several.
    """

    matrix: int
    load: int
    barrier: int
    other: int
    opcodes: dict[str, int] = field(default_factory=dict)
    loops: int = 1

    @property
    def instructions(self) -> int:
        """All of one iteration."""
        return self.matrix + self.load + self.barrier + self.other

    @property
    def other_share(self) -> float:
        """Part that is neither matrix, load nor barrier."""
        return self.other / max(self.instructions, 1)


@dataclass(frozen=True)
class Reading:
    """What the assembly of a kernel says.

    Attributes:
        matrix: the matrix instruction, ``HGMMA 64x128x16``, ``MFMA 32x32x8``; empty without.
        operands: where its two operands are: ``shared-shared``, ``register-shared``, ``tensor-shared``, ``registers``; several
            forms are joined by a plus.
        loads: how tiles come from memory, in the main loop (where there is none, in the kernel): ``TMA``, ``cp.async``,
            ``to LDS``, ``registers``.
        matrix_instructions, tma, cp_async: counts over the whole kernel.
        instructions: of the whole kernel.
        loop: the main loop, None where no loop has a matrix instruction.
    """

    matrix: str
    operands: str
    loads: tuple[str, ...]
    matrix_instructions: int
    tma: int
    cp_async: int
    instructions: int
    loop: Loop | None


_MATRIX = re.compile(r"[HIQDOB]MMA$|[HIQB]GMMA$|UTC[A-Z]*MMA$|v_mfma|v_smfmac|v_wmma|v_swmmac")
_LOAD = re.compile(
    r"(?:LD|LDG|LDS|LDSM|LDL|LDGSTS|LDTM|UTMALDG|UTMAPF|UBLKCP|UTCCP)$"
    r"|(?:buffer|global|flat|scratch)_load|ds_(?:read|load|write|store)|tensor_load"
)
_BARRIER = re.compile(
    r"(?:BAR|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|UTCBAR|FENCE|MEMBAR|WARPSYNC|ARRIVES|UTMACMDFLUSH|ERRBAR|CGAERRBAR|UCGABAR_\w+)$"
    r"|s_waitcnt|s_wait_|s_barrier|s_nop|s_sleep"
)

_LABEL = re.compile(r"^([.$\w]+):")
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_AMD = re.compile(r"^\s+((?:s|v|ds|buffer|global|flat|scratch|tensor|image|cluster)_\w+)\s*([^;]*)")
_JUMPS = ("BRA", "JMP")


def classify(opcode: str) -> str:
    """The class of an instruction, one of :data:`CLASSES`."""
    root = opcode.partition(".")[0]
    for name, pattern in (("matrix", _MATRIX), ("load", _LOAD), ("barrier", _BARRIER)):
        if pattern.match(root):
            return name
    return "other"


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel, SASS or AMD's, with their branches resolved."""
    return _parse_amd(text) if _is_amd(text) else _parse_sass(text)


def _is_amd(text: str) -> bool:
    return ".amdgcn_target" in text or re.search(r"^\s+s_endpgm", text, re.MULTILINE) is not None


def _parse_sass(text: str) -> list[Instruction]:
    places: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(found)
        elif match := _SASS.match(line):
            address, guard, opcode, operands = match.groups()
            places[f"0x{int(address, 16):x}"] = len(found)
            found.append((guard or "", opcode, operands.strip()))
    return [_sass_instruction(guard, opcode, operands, places) for guard, opcode, operands in found]


def _sass_instruction(guard: str, opcode: str, operands: str, places: dict[str, int]) -> Instruction:
    root = opcode.partition(".")[0]
    if root in _JUMPS:
        name = re.search(r"`\(([^)]+)\)|(0x[0-9a-f]+)", operands)
        always = not guard and operands.startswith(("`", "0x"))
        return Instruction(opcode, operands, places.get(name[1] or name[2]) if name else None, not always)
    return Instruction(opcode, operands, falls=bool(guard) or root not in ("EXIT", "RET"))


def _parse_amd(text: str) -> list[Instruction]:
    places: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(found)
        elif match := _AMD.match(line):
            found.append((match[1], match[2].strip()))
    made = []
    for opcode, operands in found:
        jumps = opcode.startswith(("s_cbranch", "s_branch"))
        ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
        made.append(Instruction(opcode, operands, places.get(operands) if jumps else None, not ends))
    return made


def natural_loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The loops of a program, each as the indices of its instructions between its first one and its last branch back."""
    leaders = {0} | {i.target for i in code if i.target is not None}
    leaders |= {index + 1 for index, i in enumerate(code) if i.target is not None or not i.falls}
    starts = sorted(leader for leader in leaders if leader < len(code))
    if not starts:
        return []
    block_of = {start: number for number, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    following: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        followers = [block_of[last.target]] if last.target is not None and last.target < len(code) else []
        if last.falls and end < len(code):
            followers.append(block_of[end])
        following.append(followers)
    before: list[list[int]] = [[] for _ in starts]
    for number, followers in enumerate(following):
        for follower in followers:
            before[follower].append(number)
    dominators = _dominators(following, before)

    latches: dict[int, list[int]] = {}
    for number, followers in enumerate(following):
        for header in followers:
            if dominators[number] >> header & 1:
                latches.setdefault(header, []).append(number)
    loops: list[frozenset[int]] = []
    for header, sources in latches.items():
        inside, waiting = {header}, [source for source in sources if source != header]
        while waiting:
            number = waiting.pop()
            if number not in inside:
                inside.add(number)
                waiting += before[number]
        last_block = max(sources)
        loops.append(
            frozenset(
                index for number in inside if header <= number <= last_block for index in range(starts[number], ends[number])
            )
        )
    return loops


def _dominators(following: list[list[int]], before: list[list[int]]) -> list[int]:
    """For each block the set of blocks, as bits, through which every way from the first leads; 0 where none does."""
    reached, waiting = {0}, [0]
    while waiting:
        for follower in following[waiting.pop()]:
            if follower not in reached:
                reached.add(follower)
                waiting.append(follower)
    everything = (1 << len(following)) - 1
    sets = [everything if number in reached else 0 for number in range(len(following))]
    sets[0] = 1
    changed = True
    while changed:
        changed = False
        for number in range(1, len(following)):
            if number not in reached:
                continue
            common = everything
            for earlier in before[number]:
                if earlier in reached:
                    common &= sets[earlier]
            common |= 1 << number
            if common != sets[number]:
                sets[number], changed = common, True
    return sets


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of the main loop (see the module), none where no loop has a matrix instruction."""
    return _main_loop(code)[0]


def _main_loop(code: Sequence[Instruction]) -> tuple[list[Instruction], int]:
    products = {index for index, instruction in enumerate(code) if _MATRIX.match(instruction.root)}
    loops = [loop for loop in natural_loops(code) if loop & products]
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    if not innermost:
        return [], 0
    chosen = max(innermost, key=lambda loop: (len(loop & products), -len(loop)))
    return [code[index] for index in sorted(chosen)], len(innermost)


def mix(body: Iterable[Instruction], loops: int = 1) -> Loop:
    """The classes of a loop's instructions."""
    body = list(body)
    classes = Counter(classify(instruction.opcode) for instruction in body)
    opcodes = Counter(instruction.root for instruction in body)
    return Loop(opcodes=dict(opcodes.most_common()), loops=loops, **{name: classes[name] for name in CLASSES})


def read(text: str) -> Reading:
    """Everything at once."""
    code = parse(text)
    body, loops = _main_loop(code)
    products = [instruction for instruction in code if _MATRIX.match(instruction.root)]
    in_loop = [instruction for instruction in body if _MATRIX.match(instruction.root)]
    roots = Counter(instruction.root for instruction in code)
    chosen = in_loop or products
    return Reading(
        matrix=" + ".join(dict.fromkeys(_name(instruction.opcode) for instruction in chosen)),
        operands=" + ".join(dict.fromkeys(_form(instruction) for instruction in chosen)),
        loads=_loads(body or code),
        matrix_instructions=len(products),
        tma=roots["UTMALDG"],
        cp_async=roots["LDGSTS"],
        instructions=len(code),
        loop=mix(body, loops) if body else None,
    )


def _name(opcode: str) -> str:
    """``HGMMA.64x128x16.F32.BF16`` as ``HGMMA 64x128x16``, ``v_mfma_f32_32x32x8_bf16`` as ``MFMA 32x32x8``."""
    root, _, rest = opcode.partition(".")
    if root.startswith("v_"):
        kind = re.match(r"v_(\w+?)_", root)
        size = re.search(r"\d+x\d+x\d+", root)
        return " ".join(filter(None, ((kind[1] if kind else root).upper(), size[0] if size else "")))
    size = re.match(r"\d+x\d+x\d+|\d{4,5}", rest)
    return " ".join(filter(None, (root, size[0] if size else "")))


def _form(instruction: Instruction) -> str:
    """Where a matrix instruction takes its operands from.

    SASS writes ``HGMMA R24, gdesc[UR8], R24`` where one register names both tiles in shared memory, and with the first operand
    in registers ``HGMMA R24, R92, gdesc[UR8], R24``. ``UTCHMMA`` lists the operands first, the accumulator after them.
    """
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    if instruction.root.startswith("UTC"):
        places = {"gdesc": "shared", "tmem": "tensor"}
        return "-".join(places.get(operand.partition("[")[0], "register") for operand in operands[:2])
    if instruction.root.endswith("GMMA"):
        return "shared-shared" if len(operands) > 1 and operands[1].startswith("gdesc") else "register-shared"
    return "registers"


def _loads(code: Iterable[Instruction]) -> tuple[str, ...]:
    """How tiles come from memory, the ways in the order of :class:`Reading`."""
    ways = set()
    for instruction in code:
        if instruction.root in ("UTMALDG", "UBLKCP"):
            ways.add("TMA")
        elif instruction.root == "LDGSTS":
            ways.add("cp.async")
        elif re.match(r"(?:buffer|global)_load", instruction.root):
            direct = re.search(r"\blds\b", instruction.operands) or "_lds" in instruction.root
            ways.add("to LDS" if direct else "registers")
        elif instruction.root == "LDG":
            ways.add("registers")
    return tuple(way for way in ("TMA", "cp.async", "to LDS", "registers") if way in ways)
