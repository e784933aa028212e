"""JSON files: an invalid value raises a one-sentence error that names the field."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from data_prep.convert import folder as shard_folders
from data_prep.convert import split_plan
from data_prep.convert.shards import Part
from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.json_files import Invalid
from pera_jax.data import records, statistics
from pera_jax.probes.runner import entries
from pera_jax.training.checkpoints import meta_fields, run_meta
from pera_jax.weights import timm

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@dataclasses.dataclass
class Things:
    number: json_files.Count
    value: json_files.Finite
    file: json_files.FileName
    inner: dict[str, list[int]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"number": -1}, "number: expected int >= 0"),
        ({"number": True}, "number: expected int, got bool"),
        ({"value": math.nan}, "value: expected a finite number"),
        ({"value": math.inf}, "value: expected a finite number"),
        ({"file": "a/b"}, "file: expected the name of a file in this folder"),
        ({"file": ".."}, "file: expected the name of a file in this folder"),
        ({"inner": {"a\n": [1, "x"]}}, "inner[...][1]: expected int, got str"),
        ({"inner": None}, "inner: expected object, got null"),
    ],
)
def test_a_field_that_does_not_fit_is_named(changes, sentence):
    sound = {"number": 1, "value": 2, "file": "a.json", "inner": {"a": [1]}, "of a later version": 3}
    assert json_files.convert(sound, Things) == Things(1, 2.0, "a.json", {"a": [1]})
    with pytest.raises(Invalid) as error:
        json_files.parse(json.dumps(sound | changes), Things)
    assert str(error.value) == sentence


@given(JSON | st.binary())
def test_any_json_is_of_the_type_or_invalid_in_one_printable_line(value):
    text = value if isinstance(value, bytes) else json.dumps(value)
    for kind in (Things, entries._Entry, records.DatasetInfo, meta_fields._Meta, Part, timm._Config, dict[str, int]):
        try:
            json_files.parse(text, kind)
        except Invalid as error:
            assert str(error).isprintable()


def test_json_that_is_none():
    for text, sentence in ((b"[" * 100_000, "nested too deeply"), (b"\xff", "not valid UTF-8"),
        (b'"\\ud800"', "not valid UTF-8"),
                           (b"{", "not valid JSON"), (b"", "not valid JSON"),
                           (b"1" * 5000, "not valid JSON")):  # fmt: skip
        with pytest.raises(Invalid, match=sentence):
            json_files.loads(text)
    assert json_files.loads(rb'"\udce9"') == "\udce9"  # an undecodable byte of a file name


def test_a_meta_that_no_run_has_is_refused():
    config = tiny.config()
    card = {"name": "toy", "split": "train", "records": 10, "fingerprint": "f", "class_names": None}
    sound = json.loads(json.dumps(run_meta.describe(config, tiny.objective(config), card)))
    meta_fields.check_meta(sound)
    for path, value, sentence in [
        ("model.width", -3, "model.width: expected int >= 1"),
        ("model.width", 99, "model.width is 99, but the config has 16"),
        ("std", [0.1, 0.0, 0.1], "std[1]: expected float > 0"),
        ("ranges", [[0, 255]] * 2, "ranges has 2 bands, but bands has 3 names"),
        ("ranges", [[0, 255], [5, 5], [0, 255]], "expected ranges with low < high"),
        ("dtype", "int8", "dtype: unknown value 'int8'"),
        ("config.model.depth", "4", "config.model.depth: expected int, got str"),
        ("config.pera.masks", 3, "config.pera.masks: expected a group of fields, got int"),
        ("config.data.path", None, "config.data.path: expected str, got NoneType"),
        ("data", None, "data: expected object, got null"),
    ]:
        meta = copy.deepcopy(sound)
        *holders, last = path.split(".")
        holder = meta
        for name in holders:
            holder = holder[name]
        holder[last] = value
        with pytest.raises(Invalid) as error:
            meta_fields.check_meta(meta)
        assert sentence in str(error.value)
    older = copy.deepcopy(sound)
    del older["config"]["stall_seconds"]  # a field that came later
    meta_fields.check_meta(older)


def test_results_plans_and_parts_name_the_file_and_the_field(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"name": "knn", "task": "knn", "checkpoint": {"step": "4"}}')
    with pytest.raises(
        UserError, match=r"a.json is not a probe result \(checkpoint.step: expected int, got str\); move the file away"
    ):
        entries.read(tmp_path / "a.json")
    split = shard_folders.Split(tmp_path, "set", "train", list(records.RGB), "uint8", None, False, [], 1, "f")
    split.partial.mkdir()
    (split.partial / "plan.json").write_text('{"source": 3}')
    with pytest.raises(
        UserError,
        match=r"plan.json is damaged: source: expected str, got int; remove .*partial, and re-run the command",
    ):
        split_plan.check_unfinished(split)

    part = Part(
        "s",
        5,
        1,
        bytes(32),
        bytes(16),
        statistics.to_bytes(np.ones((3, 256), np.int64)),
        [("k", "x")],
        [],
        [],
        {"c": 1},
    )
    part.save(split.partial)
    assert Part.load(split.partial, "s") == part
    file = split.partial / "s.json"
    for changes in ({"records": 2}, {"histogram": "AAAA"}, {"digests": 3}, {"shard": "t"}, {"corrupt": [["k"]]}):
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        assert Part.load(split.partial, "s") is None
        assert "written again" in capsys.readouterr().out
        part.save(split.partial)
