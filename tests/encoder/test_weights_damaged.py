"""Damaged and malicious weight files: one error lists all problems, no code is run, no partial file is written."""

import errno
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import toy_weights

from pera_jax import export
from pera_jax.common import files
from pera_jax.common.errors import UserError
from pera_jax.formats import arrays
from pera_jax.weights import imports


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Run:
    def __reduce__(self):
        return eval, ("1",)


def refused(file: pathlib.Path, tmp_path: pathlib.Path, *extra: str) -> str:
    """The sentence with which the command refuses a file; nothing is written."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        export.main(["import-released", str(file), "--output", str(tmp_path / "run"), "--heads", "2", *extra])
    assert {path.name for path in tmp_path.iterdir()} == before
    assert "\n" not in str(error.value) and file.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_with_code_is_refused_and_not_run(protocol, tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps({"model": {"a": Touch(marker)}, "b": Run()}, protocol)
    (tmp_path / "plain.params").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.params", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    (tmp_path / "legacy.params").write_bytes(b"".join(pickle.dumps(x, 2) for x in (1, 1001, {})) + content)
    for name in ("plain", "zip", "legacy"):
        said = refused(tmp_path / f"{name}.params", tmp_path)
        assert "posix.mkdir" in said and "eval" in said and "nothing was loaded" in said
    assert not marker.exists()


def test_a_name_that_hides_behind_an_allowed_one_is_refused(tmp_path):
    remembered = b"\x8c\x05posix\x94\x8c\x05mkdir\x94"
    decoys = b"\x8c\x0bcollections0\x8c\x0bOrderedDict0"
    call = b"h\x00h\x01\x93\x8c\x06marker\x85R."  # the two from memory, then posix.mkdir("marker")
    (tmp_path / "a.params").write_bytes(b"\x80\x04" + remembered + decoys + call)
    said = refused(tmp_path / "a.params", tmp_path)
    assert "collections.OrderedDict (from the stack)" in said and "nothing was loaded" in said


def test_without_pytorch_an_honest_dictionary_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.params").write_bytes(pickle.dumps({"model": {}}, 2))
    assert "needs PyTorch" in refused(tmp_path / "a.params", tmp_path)


def test_cut_files_and_other_files_are_refused(tmp_path):
    content = pickle.dumps({"model": list(range(1000))}, 2)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", content)
    file = tmp_path / "cut.params"
    for cut in (content[:-100], archive.getvalue()[:-100], b"", b"no weights at all", bytes(1000)):
        file.write_bytes(cut)
        assert "not a torch.save file, or is truncated" in refused(file, tmp_path)
    arrays.write(tmp_path / "whole.safetensors", toy_weights.dictionary(np.random.default_rng(0)))
    whole = (tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:5], b"", b"\xff" * 8 + whole[8:]):
        file.write_bytes(cut)
        assert "not a safetensors file, or is truncated" in refused(file, tmp_path)
    assert "cannot read" in refused(tmp_path / "nowhere.params", tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_every_name_that_is_wrong_is_told(seed, tmp_path):
    rng = np.random.default_rng(seed)
    named = toy_weights.dictionary(rng)
    # Not those that tell the sizes: with them wrong all others are.
    plain = sorted(name for name in named if name.endswith(("norm1.weight", "proj.bias", "qkv.weight", "mlp.2.weight")))
    first, second, third = np.array_split(rng.permutation(plain), 3)
    lacking = {name: array for name, array in named.items() if name not in first}
    lacking |= {f"{name}.extra": named[name] for name in second}
    for name in third:
        lacking[name] = np.full_like(named[name], rng.choice([np.nan, np.inf]))
    arrays.write(tmp_path / "a.safetensors", lacking)
    said = refused(tmp_path / "a.safetensors", tmp_path)
    missing, extra, wrong = said.split("; ")
    for text, names in ((missing, first), (extra, [f"{name}.extra" for name in second]), (wrong, third)):
        listed = text.split(": ")[-1].split(" lacks the arrays ")[-1].split(" in ")[-1]
        assert sorted(listed.split(", ")) == sorted(names)

    misshapen = named | {name: np.concatenate([named[name]] * 2) for name in first}
    arrays.write(tmp_path / "a.safetensors", misshapen)
    said = refused(tmp_path / "a.safetensors", tmp_path)
    assert all(
        f"{name} (expected {list(named[name].shape)}, got {list(misshapen[name].shape)})" in said for name in first
    )
    assert said.count("(expected [") == len(first)
    # All of it in one sentence, however much it is.
    mixed = {name: array for name, array in misshapen.items() if name not in second}
    mixed |= {f"x{number}.{'y' * 40}": np.zeros(1, np.float32) for number in range(200)}
    arrays.write(tmp_path / "a.safetensors", mixed)
    said = refused(tmp_path / "a.safetensors", tmp_path)
    assert (
        said.count("(expected [") == len(first) and said.count("y" * 40) == 200 and all(name in said for name in second)
    )


def test_arrays_of_nothing_but_zeros_are_told(tmp_path):
    named, file = toy_weights.dictionary(np.random.default_rng(0)), tmp_path / "a.safetensors"
    kernel, bias = "teacher.backbone.blocks.1.mlp.fc2.weight", "teacher.backbone.blocks.1.mlp.fc2.bias"
    arrays.write(file, named | {name: np.zeros_like(named[name]) for name in (kernel, bias)})
    meta = imports.import_released(file, tmp_path / "run", imports.Options(heads=2), teacher_only=True)
    assert [line for line in imports.summary(meta) if line.endswith(f"incomplete download: {kernel}")]


def test_sizes_that_make_no_network_are_refused(tmp_path):
    named, file = toy_weights.dictionary(np.random.default_rng(0)), tmp_path / "a.safetensors"
    name = "teacher.backbone.pos_embed"
    arrays.write(file, named | {name: named[name][:, :-1], "teacher.backbone.cls_token": np.zeros(16, np.float32)})
    assert "is not a ViT" in refused(file, tmp_path) and "teacher.backbone.cls_token [16]" in refused(file, tmp_path)
    arrays.write(file, named | {name: named[name][:, :-1]})
    assert f"{name} [1, 16, 16]" in refused(file, tmp_path)
    arrays.write(file, named | {"s_mask_token": np.zeros((1, 1, 16), np.int32), "steps": np.zeros(1, np.int64)})
    assert "not floating-point arrays: s_mask_token, steps" in refused(file, tmp_path)
    arrays.write(file, named)
    assert "not a multiple of 3 heads" in refused(file, tmp_path, "--heads", "3")
    assert "has 3 band(s), got 2 band names (a, b); give 3 names with --bands" in refused(
        file, tmp_path, "--bands", "a,b"
    )
    assert "needs --mean and --std; give one number for each of the bands a, b, c" in refused(
        file, tmp_path, "--bands", "a,b,c"
    )
    assert "not a multiple of 0 heads" in refused(file, tmp_path, "--heads", "0")
    arrays.write(file, {name: array for name, array in named.items() if name.startswith("teacher.")})
    assert "has no student; import only the teacher's backbone with --teacher-only" in refused(file, tmp_path)
    imports.import_released(file, tmp_path / "alone", imports.Options(heads=2), teacher_only=True)
    with pytest.raises(UserError, match="alone already exists; choose another --output"):
        imports.import_released(file, tmp_path / "alone", imports.Options(heads=2), teacher_only=True)


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def wrapped(*_):
        raise ValueError("NOT_FOUND: Error writing: No space left on device\nmore")

    arrays.write(tmp_path / "a.safetensors", toy_weights.dictionary(np.random.default_rng(0)))
    main = ["import-released", str(tmp_path / "a.safetensors"), "--heads", "2", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(imports.ocp, "save_checkpointables", wrapped)
        with pytest.raises(UserError, match="cannot write .*run: .*No space left on device; free disk space"):
            export.main(main)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    export.main(main)
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_json", full)
        with pytest.raises(UserError, match="cannot write .*out: No space left on device; free disk space"):
            export.main(["timm", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "run"]


@pytest.mark.parametrize(
    ("shape", "data", "sentence"),
    [
        ([1 << 38], b"1234", "is not a safetensors file, or is truncated"),
        ([0, 1 << 62], b"", r"impossible shapes: a\\n\\x1b\[31m \[0, 4611686018427387904\]"),
        ([1] * 101, b"1234", r"impossible shapes: a\\n\\x1b\[31m \[1, 1, .*, 101 dimensions"),
    ],
)
def test_absurd_shapes_and_names_are_one_printable_sentence(tmp_path, shape, data, sentence):
    header = json.dumps({"a\n\x1b[31m": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(UserError, match=sentence) as error:
        arrays.read(tmp_path / "a.safetensors")
    assert str(error.value).isprintable()
