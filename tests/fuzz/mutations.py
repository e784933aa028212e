"""Damages and hostile values for the fuzzing of files: of their bytes, of the fields of JSON, of names."""

import copy
import json
import random
from typing import Any

FORGED = "error: forged"
HOSTILE_TEXT = (
    "", " ", "a\n" + FORGED, "\x1b[31mred\x1b]0;title\x07", "\x9b31m\x85", "\u202egnp.exe", "\udce9", "\x00",
    "../../../etc/passwd",
    "/etc/passwd", "gs://bucket/x", "x" * 5000, "a\r" + FORGED, "\u2028" + FORGED, "nan", "<script>", "'\"`$(id)",
    "\U000e0041", "a/b",
)  # fmt: skip
_VALUES = (
    None, True, False, -1, 0, 1, 2, 255, 10**6, 10**9, 10**30, -(2**63), 2**64, 0.5, 1e308, -1e308, float("nan"),
    float("inf"),
    [], {}, [[]], [5, 5], [0, 1, 2], {"a": 1}, ["a", "a"], [None], {"": None}, *HOSTILE_TEXT,
)  # fmt: skip
_NESTED = 3000


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bits, bytes or stretches changed, cut, doubled, moved or put in."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not found:
            break
        at, length = rng.randrange(len(found)), rng.choice((1, 2, 4, 8, 64, 600))
        kind = rng.randrange(9)
        if kind <= 2:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            found[at : at + length] = rng.randbytes(len(found[at : at + length]))
        elif kind == 4:
            found[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * len(found[at : at + length])
        elif kind == 5:
            del found[at : at + length]
        elif kind == 6:
            found[at:at] = found[at : at + length]
        elif kind == 7:
            del found[at:]
        else:
            found[at:at] = rng.randbytes(length)
    return bytes(found)


def of_json(value: Any, rng: random.Random) -> str:
    """A JSON text like `value`, with a field of any depth put out, doubled or of another type or value; or no JSON at
    all."""
    whole = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(whole)))
        if rng.random() < 0.15 and holder is not whole:
            del holder[key]
        elif rng.random() < 0.1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif isinstance(holder[key], str) and rng.random() < 0.4:
            holder[key] += rng.choice(HOSTILE_TEXT)
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool) and rng.random() < 0.4:
            holder[key] = rng.choice(
                (-holder[key], str(holder[key]), [holder[key]], holder[key] + 1, float(holder[key]) / 3)
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    if rng.random() < 0.02:
        return rng.choice(("[", '{"a":')) * _NESTED
    return json.dumps(whole[""])


def _places(holder: Any):
    """(container, key) of everything below a container."""
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def name(rng: random.Random) -> str:
    """The name of a file or folder that Linux takes."""
    text = "".join(rng.choice(HOSTILE_TEXT) for _ in range(rng.choice((1, 1, 2))))
    text = text.replace("/", "_").replace("\0", "") or "a"
    while len(text.encode("utf-8", "surrogateescape")) > 100:
        text = text[:-10]
    return text if text not in (".", "..") else "a"
