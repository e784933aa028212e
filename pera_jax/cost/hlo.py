"""The collectives of a compiled program: kind, count and bytes, parsed from its HLO text.

The body of a loop counts once per iteration. The trip count is XLA's annotation if there is one, or else follows from
the condition `counter < constant` and the constant that the body adds to the counter.
"""

import collections
import dataclasses
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^%?([\w.\-]+) = [su]32\[\](?:\{[^ ]*\})? constant\((\d+)\)")
_LESS = re.compile(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_OPERATION = re.compile(r"([a-z][a-z0-9\-]*)\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      shapes: (dtype, dimensions) of its operands and results.
      bytes: size of its operand or result on one device, whichever is larger, per execution.
      times: number of executions.
      name: JAX's name of the operation, from the HLO metadata.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    times: int
    name: str


def collectives(text: str) -> list[Collective]:
    """The collectives of the program with HLO `text`."""
    bodies, entry = _computations(text)
    found: list[Collective] = []
    if entry:
        _walk(bodies, entry, 1, found, set())
    return found


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Totals by kind: `places` (instructions), `count` (executions), `bytes` (of all executions, on one device)."""
    table: dict[str, dict[str, int]] = collections.defaultdict(lambda: dict(places=0, count=0, bytes=0))
    for one in found:
        row = table[one.kind]
        row["places"] += 1
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
    return {kind: table[kind] for kind in KINDS if kind in table}


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    bodies, entry, current = {}, None, None
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if line == "}":
            current = None
        elif current is None and line.endswith("{") and (match := _COMPUTATION.match(line)):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None:
            current.append(line)
    return bodies, entry


def _walk(bodies, name: str, times: int, found: list[Collective], channels: set[str]) -> None:
    """Adds the collectives of a computation, and of those that it calls, to `found`.

    Args:
      times: number of executions of the computation.
      channels: channels already seen in fusions; an asynchronous collective may span several fusions with one channel.
    """
    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match or not (operation := _OPERATION.search(_without_shapes(match[1]))):
            continue
        kind = operation[1].removesuffix("-start")
        if kind in KINDS:
            channel = _CHANNEL.search(line)
            if "fused" in name or "fusion" in name:
                if channel and channel[1] in channels:
                    continue
                channels.add(channel[1] if channel else line)
            found.append(_collective(kind, match[1], times))
            continue
        inner_times = times * _trip_count(bodies, line) if operation[1] == "while" else times
        called = _CALLED.findall(line) + [c.strip().lstrip("%") for b in _BRANCHES.findall(line) for c in b.split(",")]
        for other in called:
            _walk(bodies, other, inner_times, found, channels)


def _trip_count(bodies: dict[str, list[str]], loop: str) -> int:
    """The trip count of a loop; 1 if unknown."""
    if match := _TRIP_COUNT.search(loop):
        return int(match[1])
    condition, body = (bodies.get(pattern.search(loop)[1], []) for pattern in (_CONDITION, _BODY))
    less = next((m for line in condition if (m := _LESS.search(line))), None)
    limit = _constants(condition).get(less[2]) if less else None
    counter = rf"%?{re.escape(less[1])} = .*index=(\d+)" if less else ""
    index = next((m for line in condition if less and (m := re.match(counter, line))), None)
    if limit is None or index is None:
        return 1
    return -(-limit // _increment(body, int(index[1])))


def _increment(body: list[str], index: int) -> int:
    """What the body of a loop adds to its counter, element `index` of the carry; 1 if unknown."""
    root = next((line for line in body if line.startswith("ROOT") and " tuple(" in line), "")
    carried = re.findall(r"%?([\w.\-]+)", root[root.rfind(" tuple(") + 7 :].split(")")[0])
    if index >= len(carried):
        return 1
    update = next((line for line in body if re.match(rf"%?{re.escape(carried[index])} = ", line)), "")
    added = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", update)
    return max((_constants(body).get(name, 1) for name in added.groups()), default=1) if added else 1


def _constants(lines: list[str]) -> dict[str, int]:
    return {match[1]: int(match[2]) for line in lines if (match := _CONSTANT.match(line))}


def _without_shapes(text: str) -> str:
    """The instruction without the type of its result, whose layout may contain parentheses, e.g. T(8,128)."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            return text[index:]
    return text


def _collective(kind: str, text: str, times: int) -> Collective:
    end = text.find(", channel_id=")
    shapes = tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text[: end if end > 0 else len(text)])
        if dtype in _BYTES
    )
    result = text[: len(text) - len(_without_shapes(text))]
    sizes = [_size(*shape) for shape in _parse(result)]
    # The result of an asynchronous start is a tuple of operand and result; of a combined collective, a tuple of
    # results.
    operand_and_result = "-start(" in text and len(sizes) > 1
    moved = max(sizes, default=0) if operand_and_result else sum(sizes)
    if kind == "reduce-scatter":  # the operand is larger than the result
        groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", text) or re.search(r"replica_groups=\{\{([\d,]+)\}", text)
        moved *= (int(groups[2]) if groups.lastindex == 2 else groups[1].count(",") + 1) if groups else 1
    where = _NAME.search(text)
    return Collective(kind, shapes, moved, times, where[1] if where else "")


def _parse(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = _SHAPE.findall(text)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found if dtype in _BYTES]


def _size(dtype: str, dimensions: tuple[int, ...]) -> int:
    size = _BYTES[dtype]
    for n in dimensions:
        size *= n
    return size
