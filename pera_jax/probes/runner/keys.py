"""Which results may stand side by side: the key of a result, and words that tell apart those that may not.

Two results measure the same thing where name, task, data (by fingerprint), splits, classes, image size and settings are
equal. Only such results share a row of a table, a line of a chart and, of one checkpoint of one run, a file.
"""

import collections
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pera_jax.common.text import printable

OWN = ".."  # where a run lies as seen from RUN/probe


def origin(base: str | os.PathLike, run: str | os.PathLike) -> str:
    """Where the run lies as seen from the folder of results `base`: `OWN` for RUN/probe, however either is spelled."""
    return os.path.relpath(os.path.realpath(run), os.path.realpath(base))


def row(entry: Mapping[str, Any]) -> str:
    """SHA-256 of what an entry measures, whatever the checkpoint; equal ones may be compared."""
    data, size = entry["data"], entry["checkpoint"].get("image_size") or 0
    parts = ("train_fingerprint", "test_fingerprint", "train_split", "test_split", "class_names")
    measured = {part: data.get(part) for part in parts} | {
        "name": entry["name"], "task": entry["task"], "image_size": size, "settings": entry.get("settings"),
    }  # fmt: skip
    return _digest(measured)


def stem(entry: Mapping[str, Any]) -> str:
    """The name of an entry's files in the folder of its checkpoint, unique to its run and what it measures."""
    key = _digest({"row": row(entry), "run": entry["checkpoint"].get("origin", OWN)})
    return f"{prefix(entry['name'])}-{key[:10]}"


def prefix(name: str) -> str:
    """A result's name as the beginning of a file's, whatever it holds."""
    return re.sub(r"[^A-Za-z0-9_+.-]", "_", name)[:80]


def told_apart(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each row of `entries` was measured on, in a few words, by `row`; rows of one name get different words."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["name"], {})[row(entry)] = entry
    return {key: text for rows in groups.values() for key, text in _words(rows).items()}


def _words(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`told_apart` for rows of one name."""
    found = {key: _plain_words(entry) for key, entry in rows.items()}
    splits = {key: tuple(entry["data"].get(part) for part in ("train_split", "test_split")) for key, entry in rows.items()}
    if len(set(splits.values())) > 1:
        for key, (train, test) in splits.items():
            found[key].append(f"fitted to {printable(train)}, tested on {printable(test)}" if test else f"within {printable(train)}")
    settings = {key: entry.get("settings") or {} for key, entry in rows.items()}
    for name in dict.fromkeys(name for of in settings.values() for name in of):
        if len({json.dumps(of.get(name)) for of in settings.values()}) > 1:
            for key, of in settings.items():
                found[key].append(f"{name}={_setting(of[name])}" if name in of else f"no {name}")
    texts = {key: ", ".join(words) for key, words in found.items()}
    prints = {key: " and ".join(str(of["data"].get(f"{part}_fingerprint"))[:8] for part in ("train", "test"))
              for key, of in rows.items()}  # fmt: skip
    texts = _longer(texts, {key: f"fingerprints {printable(text)}" for key, text in prints.items()})
    return _longer(texts, {key: f"key {key[:10]}" for key in rows})  # the same images under other names of classes


def _longer(texts: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """`texts` with `more` behind those that are equal to another."""
    times = collections.Counter(texts.values())
    return {key: f"{text}, {more[key]}" if times[text] > 1 else text for key, text in texts.items()}


def _plain_words(entry: Mapping[str, Any]) -> list[str]:
    data, size = entry["data"], entry["checkpoint"].get("image_size")
    number = data.get("test_images")
    words = [printable(data.get("name") or data.get("path") or "", 60)]
    words += [f"{number:,} images"] if isinstance(number, int) else []
    return words + ([f"{size} px"] if size else [])


def _setting(value: Any) -> str:
    return " ".join(map(printable, value)) if isinstance(value, (list, tuple)) else printable(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
