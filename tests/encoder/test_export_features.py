"""Exported features and StableHLO: content, resuming after a kill, invalid input."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import labelled_toys
import numpy as np
import pytest

from pera_jax import export
from pera_jax.common import errors, files, lease
from pera_jax.common.errors import UserError
from pera_jax.data import codecs
from pera_jax.data.decode import resized
from pera_jax.data.images import foreign
from pera_jax.data.labelled.samples import open_images
from pera_jax.encoder import feature_folder, stablehlo
from pera_jax.encoder import model as features

LABELS = [0, 1, 2] * 7  # 21 images
on_one_device = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return labelled_toys.write_run(tmp_path_factory.mktemp("run"), [(1, 0)])


@pytest.fixture(scope="module")
def model(run) -> features.Model:
    return features.load(run)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return labelled_toys.write_folders(tmp_path_factory.mktemp("data"), {"train": LABELS})


def command(run, data, output, *extra: str) -> list[str]:
    return ["features", "--run", str(run), "--input", str(data), "--output", str(output), *extra]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arrays_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    names = json.loads((folder / "features.json").read_text())["arrays"]
    return {name: np.concatenate([np.load(file) for file in sorted(folder.glob(f"{name}-*.npy"))]) for name in names}


def index_of(folder: pathlib.Path) -> list[dict[str, str]]:
    with open(folder / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


@on_one_device
def test_arrays_and_index(run, model, data, tmp_path):
    extra = ["--split", "train", "--image-size", "40", "--maps", "--blocks", "2,0", "--part-size", "8"]
    export.main(command(run, data, tmp_path / "out", *extra))
    samples = open_images(str(data), "train")
    found = model(np.stack([resized(samples.decode(samples.raw(i)), 40) for i in range(21)]), blocks=(2, 0))
    wanted = {
        "class_token": found.class_token, "patch_mean": found.patch_map.mean(axis=(1, 2)), "patch_map": found.patch_map,
        "block_class_tokens": np.stack(found.block_class_tokens, 1), "block_maps": np.stack(found.block_maps, 1),
    }  # fmt: skip
    got = arrays_of(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], values, atol=1e-5)
    rows = index_of(tmp_path / "out")
    assert [row["key"] for row in rows] == list(samples.keys)
    assert [row["label"] for row in rows] == [row["key"].split("/")[0] for row in rows]
    assert [(int(row["part"]), int(row["row"])) for row in rows] == [(i // 8, i % 8) for i in range(21)]
    assert [len(np.load(tmp_path / f"out/class_token-0000{part}.npy")) for part in range(3)] == [8, 8, 5]


def test_neither_batches_nor_devices_change_parts_or_features(run, data, tmp_path):
    weights, samples = features.load_weights(run), open_images(str(data), "train")
    for devices, batch in ((1, 7), (1, 32), (8, 7), (8, 100)):
        place = tmp_path / f"{devices}_{batch}"
        feature_folder.write(weights, samples, place, part_size=12, batch_size=batch, devices=jax.devices()[:devices])
        for name in ("features.json", "index.csv"):
            assert (place / name).read_bytes() == (tmp_path / "1_7" / name).read_bytes()
        for file in sorted(place.glob("*.npy")):
            np.testing.assert_allclose(np.load(file), np.load(tmp_path / "1_7" / file.name), atol=1e-5)


@on_one_device
@pytest.mark.parametrize("kind", ["flat", "classes", "nested", "shards"])
def test_any_folder_of_images_is_taken(run, model, tmp_path, kind):
    """The same images and features wherever they lie; labels where every image lies in one class folder."""
    folder = tmp_path / "in"
    if kind == "shards":
        labelled_toys.write_shards(folder, {"only": LABELS[:5]})
    for i, (label, image) in enumerate(zip(LABELS[:5], labelled_toys.pictures(LABELS[:5]), strict=True)):
        place = {"flat": "", "nested": "some/where", "classes": labelled_toys.CLASSES[label]}.get(kind)
        if place is not None:
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"{i}.png").write_bytes(image)
    export.main(command(run, folder, tmp_path / "out"))
    rows, tokens = index_of(tmp_path / "out"), arrays_of(tmp_path / "out")["class_token"]
    labeled = kind in ("classes", "shards")
    names = [labelled_toys.CLASSES[label] for label in LABELS[:5]]
    order = [int(pathlib.Path(row["key"]).stem) for row in rows]
    assert sorted(order) == list(range(5)) and ("label" in rows[0]) == labeled
    assert not labeled or [row["label"] for row in rows] == [names[i] for i in order]
    samples = open_images(str(folder))
    for token, i in zip(tokens, range(5), strict=True):
        np.testing.assert_allclose(token, model(resized(samples.decode(samples.raw(i)), 48)).class_token, atol=1e-5)


@on_one_device
def test_killed_and_begun_again_gives_the_same_bytes(run, data, tmp_path, capsys):
    """Killed with some parts written, then cut, robbed and littered as crashes of machines may leave a folder."""
    extra = ["--part-size", "3", "--batch-size", "3", "--maps"]
    export.main(command(run, data, tmp_path / "whole", *extra))
    wanted, out = contents(tmp_path / "whole"), tmp_path / "killed"
    one = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pera_jax.export", *command(run, data, out, *extra)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=os.environ | one,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (out / "patch_mean-00002.npy").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = contents(out)
    assert "index.csv" not in left and 8 < len([name for name in left if name.endswith(".npy")]) < 21
    (out / "class_token-00000.npy").write_bytes(left["class_token-00000.npy"][:-1])
    (out / "patch_map-00001.npy").unlink()
    (out / "patch_map-00006.npy.tmp").write_bytes(b"half")
    capsys.readouterr()
    export.main(command(run, data, out, *extra))
    assert contents(out) == wanted
    assert "of 7 parts; resuming" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    export.main(command(run, data, out, *extra))
    assert "already complete, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    shutil.rmtree(out)  # killed as it wrote its first file
    out.mkdir()
    (out / "features.json.tmp").write_bytes(b"{")
    export.main(command(run, data, out, *extra))
    assert contents(out) == wanted


# ---------------------------------------------------------------- StableHLO

LOADER = """
import sys
import jax
import numpy as np

file, images, output = sys.argv[1:]
with open(file, "rb") as opened:
    network = jax.export.deserialize(bytearray(opened.read()))
images = np.load(images)
found = {f"{size}_{name}": values for size in (1, 3) for name, values in network.call(images[:size]).items()}
assert not {"pera_jax", "flax"} & {name.split(".")[0] for name in sys.modules}
np.savez(output, platforms=network.platforms, **found)
"""


def test_stablehlo_runs_without_this_program(run, model, tmp_path):
    export.main(["stablehlo", "--run", str(run), "--output", str(tmp_path / "a.stablehlo"), "--image-size", "40x24"])
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 24, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    arguments = [str(tmp_path / name) for name in ("a.stablehlo", "images.npy", "out.npz")]
    subprocess.run([sys.executable, "-c", LOADER, *arguments], check=True, cwd=tmp_path, timeout=120)
    found = np.load(tmp_path / "out.npz")
    assert list(found["platforms"]) == ["cpu", "cuda", "tpu"]
    for size in (1, 3):
        wanted = model(images[:size])
        np.testing.assert_allclose(found[f"{size}_class_token"], wanted.class_token, atol=1e-5)
        np.testing.assert_allclose(found[f"{size}_patch_map"], wanted.patch_map, atol=1e-5)


def test_damage_to_stablehlo_is_seen_by_the_sum_beside_it(run, tmp_path):
    command = ["stablehlo", "--run", str(run), "--output", str(tmp_path / "a b.stablehlo"), "--image-size", "24"]
    export.main(command)
    check = ["sha256sum", "--status", "-c", "a b.stablehlo.sha256"]
    assert subprocess.run(check, cwd=tmp_path).returncode == 0
    content = bytearray((tmp_path / "a b.stablehlo").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a b.stablehlo").write_bytes(content)
    assert subprocess.run(check, cwd=tmp_path).returncode == 1
    (tmp_path / "a b.stablehlo").unlink()
    (tmp_path / "a b.stablehlo.sha256").write_text("mine")
    with pytest.raises(UserError, match="a b.stablehlo.sha256 already exists and was not written by this command"):
        export.main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["a b.stablehlo.sha256"]


def test_stablehlo_of_too_many_parameters_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "_LARGEST", 1000)
    with pytest.raises(UserError, match="more than 2 GB of parameters"):
        export.main(["stablehlo", "--run", str(run), "--output", str(tmp_path / "a")])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--input", "{tmp}/nothing"], "the dataset .*nothing does not exist"),
        (["--input", "{tmp}"], "has no images"),
        (["--input", "tfds:eurosat"], "tfds:eurosat needs a split; choose one with --split"),
        (["--input", "{shards}"], "has the splits test, train; choose one with --split"),
        (["--split", "val"], "has no folder 'val' for the split; it has train"),
        (
            ["--run", "{tmp}"],
            "is not a run folder .no checkpoints/. and not an exported folder .no model.safetensors.; give one of the "
            "two",
        ),
        (["--step", "3"], "has no checkpoint of step 3; choose one of 1"),
        (["--image-size", "50"], "the image size 50 is not a multiple of the checkpoint's patch size 8 px; try 48"),
        (["--image-size", "0"], "the image size 0 is not a multiple"),
        (["--blocks", "1,4"], "block 4 does not exist; the network has blocks 0 to 3"),
        (["--blocks", "last5"], "blocks=5 is out of range; expected a number of last blocks from 0 to 4"),
        (["--part-size", "0"], "the part size is 0; it must be >= 1"),
        (["--batch-size", "0"], "the batch size is 0"),
        (["--output", "{tmp}/foreign"], "foreign is not empty and not a features folder; choose another --output"),
        (["--output", "{tmp}/file"], "cannot write .*file"),
    ],
)
def test_bad_input_is_one_sentence(run, data, tmp_path, capsys, extra, sentence):
    places = {"tmp": str(tmp_path)}
    if extra[1] == "{shards}":
        places["shards"] = str(labelled_toys.write_shards(tmp_path / "shards", {"test": [0], "train": [1]}))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        errors.run(
            lambda: export.main(command(run, data, tmp_path / "out", *(part.format(**places) for part in extra)))
        )
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("folders are not used as classes")]
    assert ended.value.code == 1 and said.out == "" and len(lines) == 1
    assert re.match(f"error: .*{sentence}", lines[0])
    assert sorted(tmp_path.rglob("*")) == before


@on_one_device
def test_other_features_are_not_mixed(run, data, tmp_path):
    other = labelled_toys.write_run(tmp_path / "other", [(1, 5)])
    export.main(command(run, data, tmp_path / "out"))
    before = contents(tmp_path / "out")
    less = pathlib.Path(shutil.copytree(data, tmp_path / "less"))
    file = next(less.rglob("*.png"))
    file.write_bytes(file.read_bytes() + b"\0")
    for given, name in (
        (command(other, data, tmp_path / "out"), "weights"),
        (command(run, less, tmp_path / "out"), "data"),
        (command(run, data, tmp_path / "out", "--image-size", "40"), "image_size"),
        (command(run, data, tmp_path / "out", "--blocks", "last1"), "blocks"),
        (command(run, data, tmp_path / "out", "--maps"), "arrays"),
        (command(run, data, tmp_path / "out", "--part-size", "7"), "part_size"),
    ):
        with pytest.raises(
            UserError, match=f"has features with another {name} .*; choose another --output, or delete the folder"
        ):
            export.main(given)
        assert contents(tmp_path / "out") == before


def test_two_exports_do_not_share_a_folder(run, data, tmp_path):
    with lease.held(tmp_path / "out", "--output"):
        with pytest.raises(
            lease.InUse, match="out is in use by process .*; wait until it ends, or choose another --output"
        ):
            export.main(command(run, data, tmp_path / "out", "--split", "train"))
    assert not (tmp_path / "out").exists()
    with files.whole_folder(tmp_path / "vit") as begun, pytest.raises(lease.InUse, match="vit is in use by"):
        (begun / "weights").write_bytes(b"half")
        with files.whole_folder(tmp_path / "vit"):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["vit", "weights"]


@on_one_device
def test_an_image_that_does_not_fit_is_named(run, data, tmp_path, monkeypatch):
    """Before anything is written; where it turns bad later, the parts before it are whole."""
    copy, out = pathlib.Path(shutil.copytree(data, tmp_path / "in")), tmp_path / "out"
    sound = sorted(copy.rglob("*.png"))[-1]
    content = sound.read_bytes()
    sound.write_bytes(codecs.encode_tiff(np.zeros((60, 60, 4), np.uint8)))  # judged by its content
    options = ("--part-size", "5", "--batch-size", "5", "--max-corrupt-fraction", "0")
    with pytest.raises(UserError, match=f"{sound.name} .*4 bands of uint8, but most images have 3 of uint8"):
        export.main(command(run, copy, out, *options))
    assert not out.exists()
    sound.write_bytes(content)
    read = foreign.read

    def torn(encoded, *args):
        if encoded == content:
            raise foreign.ImageDecodeError("it was written anew")
        return read(encoded, *args)

    with monkeypatch.context() as patch:
        patch.setattr(foreign, "read", torn)
        with pytest.raises(
            UserError,
            match=f"image train/.*/{sound.name} of .* cannot be decoded .it was written anew.; repair or remove the "
                  "file",
        ):
            export.main(command(run, copy, out, *options))
    assert (out / "class_token-00002.npy").exists() and not (out / "index.csv").exists()
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    sound.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="has features with another data"):
        export.main(command(run, copy, out, *options))


@on_one_device
def test_a_part_that_is_not_as_it_was_written_is_made_again(run, data, tmp_path, capsys):
    export.main(command(run, data, tmp_path / "out", "--part-size", "3"))
    whole = contents(tmp_path / "out")
    lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == sorted(set(whole) - {"features.json", "SHA256SUMS"})
    for name in ("class_token-00001.npy", "index.csv", "SHA256SUMS"):
        file = tmp_path / "out" / name
        file.write_bytes(file.read_bytes()[:-2] + bytes([file.read_bytes()[-2] ^ 4]) + file.read_bytes()[-1:])
        export.main(command(run, data, tmp_path / "out", "--part-size", "3"))
        assert contents(tmp_path / "out") == whole
        assert ("class_token-00001.npy in" in capsys.readouterr().err) == (name == "class_token-00001.npy")
