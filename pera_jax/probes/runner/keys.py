"""Keys of probe results, and labels that distinguish results with different keys.

Two results are comparable if name, task, data (by fingerprint), splits, classes, image size and settings are equal.
Only comparable results share a table row, a line of a chart and, for one checkpoint of one run, a file.
"""

import collections
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pera_jax.common.text import printable

OWN = ".."  # path of the run relative to RUN/probe


def origin(base: str | os.PathLike, run: str | os.PathLike) -> str:
    """The path of the run relative to the results folder `base`, symlinks resolved; `OWN` for RUN/probe."""
    return os.path.relpath(os.path.realpath(run), os.path.realpath(base))


def row(entry: Mapping[str, Any]) -> str:
    """SHA-256 of what an entry measures, independent of the checkpoint; entries with equal values are comparable."""
    data, size = entry["data"], entry["checkpoint"].get("image_size") or 0
    parts = ("train_fingerprint", "test_fingerprint", "train_split", "test_split", "class_names")
    measured = {part: data.get(part) for part in parts} | {
        "name": entry["name"], "task": entry["task"], "image_size": size, "settings": entry.get("settings"),
    }  # fmt: skip
    return _digest(measured)


def stem(entry: Mapping[str, Any]) -> str:
    """The file name of an entry, without extension; unique to its run and what it measures."""
    key = _digest({"row": row(entry), "run": entry["checkpoint"].get("origin", OWN)})
    return f"{prefix(entry['name'])}-{key[:10]}"


def prefix(name: str) -> str:
    """A result's name as a safe prefix of a file name."""
    return re.sub(r"[^A-Za-z0-9_+.-]", "_", name)[:80]


def data_labels(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A short label of the data and settings of each row of `entries`, by `row`; distinct for rows with the same
    name."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["name"], {})[row(entry)] = entry
    return {key: text for rows in groups.values() for key, text in _words(rows).items()}


def _words(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`data_labels` for rows with the same name."""
    found = {key: _plain_words(entry) for key, entry in rows.items()}
    splits = {
        key: tuple(entry["data"].get(part) for part in ("train_split", "test_split")) for key, entry in rows.items()
    }
    if len(set(splits.values())) > 1:
        for key, (train, test) in splits.items():
            found[key].append(
                f"trained on {printable(train)}, tested on {printable(test)}"
                if test
                else f"leave-one-out on {printable(train)}"
            )
    settings = {key: entry.get("settings") or {} for key, entry in rows.items()}
    for name in dict.fromkeys(name for each in settings.values() for name in each):
        if len({json.dumps(each.get(name)) for each in settings.values()}) > 1:
            for key, each in settings.items():
                found[key].append(f"{name}={_setting(each[name])}" if name in each else f"no {name}")
    texts = {key: ", ".join(words) for key, words in found.items()}
    prints = {key: " and ".join(str(entry["data"].get(f"{part}_fingerprint"))[:8] for part in ("train", "test"))
              for key, entry in rows.items()}  # fmt: skip
    texts = _longer(texts, {key: f"fingerprints {printable(text)}" for key, text in prints.items()})
    return _longer(texts, {key: f"key {key[:10]}" for key in rows})  # the same images with other class names


def _longer(texts: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """`texts`, with `more` appended to those that are not unique."""
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
