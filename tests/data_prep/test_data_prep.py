"""Conversion of image folders to dataset folders, and the demo scenes."""

import errno
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_commands
from PIL import Image

from data_prep import demo_scenes, images
from data_prep.convert import pixels
from pera_jax.common import lease
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, file_tree, records

COLORS = np.random.default_rng(5).integers(0, 256, (24, 32, 3), np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(encoded: bytes, **options) -> tuple[np.ndarray, tuple[str, ...]]:
    stored = pixels.convert(encoded, **options)
    image = codecs.decode_image(stored.data)
    assert Image.open(io.BytesIO(stored.data)).mode == "RGB"
    counts = [[np.sum(image[..., band] == value) for value in range(256)] for band in range(3)]
    np.testing.assert_array_equal(stored.histogram, counts)
    return image, stored.changes


def write_tree(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def photograph(seed: int, kind: str = "JPEG") -> bytes:
    gray = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return encode(Image.fromarray(gray).resize((40, 30)), kind)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Twenty photographs in two classes, with nested folders and endings in odd case."""
    endings = [("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("Png", "PNG"), ("tif", "TIFF"), ("TIFF", "TIFF"),
               ("webp", "WEBP")]  # fmt: skip
    files = {}
    for i in range(20):
        ending, kind = endings[i % len(endings)]
        files[f"{'town' if i % 2 else 'field'}/{'deep/er/' if i % 3 else ''}{i}.{ending}"] = photograph(i, kind)
    return write_tree(tmp_path_factory.mktemp("tree"), {**files, "field/notes.txt": b"", "town/.hidden.jpg": b"?"})


command = functools.partial(toy_commands.run, images.main)


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- pixels


def test_files_that_need_no_change_are_stored_byte_for_byte():
    image = Image.fromarray(COLORS)
    for kind in ("JPEG", "PNG"):
        stored = pixels.convert(encode(image, kind), max_side=32)
        assert stored.data == encode(image, kind) and stored.changes == ()
    lossless, changes = decoded(encode(image, "TIFF"))
    np.testing.assert_array_equal(lossless, COLORS)
    assert changes == ("format TIFF",)


def test_modes_become_rgb_by_the_stated_rules():
    gray, deep = COLORS[..., 0], COLORS[..., 0].astype(np.uint16) * 256 + COLORS[..., 1]
    three = np.repeat(gray[..., None], 3, axis=2)
    rgba = np.dstack([COLORS, COLORS[..., 0]])
    over_black = np.round(COLORS * (rgba[..., 3:] / 255.0))
    palette = Image.fromarray(COLORS).quantize(16)
    clear = encode(palette, "PNG", transparency=0)
    cut_out = np.array(palette.convert("RGB")) * (np.array(palette) != 0)[..., None]
    key = encode(Image.fromarray(COLORS), "PNG", transparency=tuple(int(value) for value in COLORS[3, 4]))
    without_key = COLORS * (COLORS != COLORS[3, 4]).any(axis=2, keepdims=True)
    cmyk = Image.fromarray(COLORS).convert("CMYK")
    cases = {
        "gray": (encode(Image.fromarray(gray), "PNG"), three, 0),
        "1 bit": (encode(Image.fromarray(gray).convert("1", dither=0), "PNG"), (three >= 128) * 255, 0),
        "gray JPEG": (encode(Image.fromarray(gray), "JPEG", quality=100), three, 3),
        "16 bit PNG": (encode(Image.fromarray(deep), "PNG"), three, 0),
        "16 bit TIFF": (encode(Image.fromarray(deep), "TIFF"), three, 0),
        "alpha": (encode(Image.fromarray(rgba), "PNG"), over_black, 1),
        "gray with alpha": (encode(Image.fromarray(np.dstack([gray, gray])), "PNG"),
                            np.round(three * (three / 255.0)), 1),
        "palette": (encode(palette, "PNG"), np.array(palette.convert("RGB")), 0),
        "palette with a clear entry": (clear, cut_out, 0),
        "transparent color": (key, without_key, 0),
        "CMYK": (encode(cmyk, "TIFF"), np.array(cmyk.convert("RGB")), 0),
        "CMYK JPEG": (encode(cmyk, "JPEG", quality=100), np.array(cmyk.convert("RGB")), 12),
    }  # fmt: skip
    for name, (encoded, expected, tolerance) in cases.items():
        image, changes = decoded(encoded)
        assert changes, name
        assert np.abs(image.astype(int) - expected).max() <= tolerance, name


def test_sixteen_bit_color_png_loses_its_lower_bytes():
    """Pillow writes no 16-bit color, so the file is put together here."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    deep = (COLORS.astype(">u2") * 256 + 77).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    head = struct.pack(">IIBBBBB", COLORS.shape[1], COLORS.shape[0], 16, 2, 0, 0, 0)
    encoded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    image, changes = decoded(encoded)
    np.testing.assert_array_equal(image, COLORS)
    assert changes == ("16 bit",)


def test_orientation_is_applied_and_size_limited():
    image = Image.fromarray(COLORS)
    exif = Image.Exif()
    for orientation, turned in ((3, np.rot90(COLORS, 2)), (6, np.rot90(COLORS, -1)), (8, np.rot90(COLORS))):
        exif[0x0112] = orientation
        found, changes = decoded(encode(image, "PNG", exif=exif))
        np.testing.assert_array_equal(found, turned)
        assert changes == ("orientation",)
        again, _ = decoded(encode(image, "JPEG", exif=exif))  # stored without the tag, so it is not applied twice
        assert again.shape == turned.shape
    assert decoded(encode(image, "JPEG"), max_side=16)[0].shape == (12, 16, 3)
    assert pixels.convert(encode(image, "PNG"), max_side=16, jpeg_quality=90).data.startswith(b"\xff\xd8")


@pytest.mark.parametrize(
    "encoded",
    [b"", b"<html>not found</html>", photograph(0)[:400], photograph(0, "PNG")[:400], photograph(0, "TIFF")[:400],
     encode(Image.fromarray(COLORS[..., 0].astype(np.float32)), "TIFF")],
    ids=["zero bytes", "text", "JPEG cut", "PNG cut", "TIFF cut", "float"],
)  # fmt: skip
def test_what_cannot_be_decoded(encoded):
    with pytest.raises(codecs.ImageDecodeError):
        pixels.convert(encoded)


# ---------------------------------------------------------------- the conversion


def test_round_trip_ours_and_tfds_with_statistics_and_classes(tree, tmp_path):
    import tensorflow_datasets as tfds

    out = tmp_path / "toy set"
    args = ["--input", tree, "--output", out, "--shard-size", 8]
    for split in ("train", "test"):
        done = command(*args, "--split", split)
        assert done.returncode == 0, done.stderr
    source = records.open_split(out, "train")
    info = source.info
    assert (info.name, info.class_names, info.bands) == ("toy_set", ["field", "town"], ["red", "green", "blue"])
    assert source.split_info.shard_records == [6, 7, 7] and list(info.splits) == ["train", "test"]
    found = [records.decode_record(source.read(i)) for i in range(len(source))]
    expected = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.*") if path.stem.isdecimal())
    assert [record.key for record in found] == expected and len(expected) == 20
    stack = np.stack([codecs.decode_image(record.image) for record in found]) / 255.0
    np.testing.assert_allclose(source.split_info.mean, stack.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(source.split_info.std, stack.std(axis=(0, 1, 2)), atol=1e-6)
    for record in found:
        original = (tree / record.key).read_bytes()
        assert info.class_names[record.label] == record.key.split("/")[0]
        assert (record.image == original) == record.key.lower().endswith(("jpg", "jpeg", "png"))
        np.testing.assert_array_equal(codecs.decode_image(record.image), np.array(Image.open(io.BytesIO(original))))
    report = json.loads((out / "train.report.json").read_text())
    assert report["rejected"]["reasons"] == {
        "ending .txt": {"number": 1, "first": ["field/notes.txt"]},
        file_tree.HIDDEN: {"number": 1, "first": ["town/.hidden.jpg"]},
    }
    assert (report["inputs"], report["written"], report["failed"]["number"]) == (22, 20, 0)
    assert report["changed"] == {"format TIFF": 6, "format WEBP": 2}

    theirs = tfds.builder_from_directory(out).as_data_source(split="train")
    assert len(theirs) == 20
    for record, example in zip(found, theirs, strict=True):
        np.testing.assert_array_equal(example["image"], codecs.decode_image(record.image))
        assert (example["label"], example["key"].decode()) == (record.label, record.key)
    assert "tensorflow" not in sys.modules

    before = contents(out)
    again = command(*args, "--split", "test")
    assert again.returncode == 0 and "already complete" in again.stdout and contents(out) == before
    other = command(*args, "--split", "test", "--max-side", 20)
    assert other.returncode == 1 and "of other images or options" in other.stderr and contents(out) == before


def test_images_outside_class_folders_have_no_labels(tmp_path):
    root = write_tree(tmp_path / "in", {"a/1.jpg": photograph(1), "2.jpg": photograph(2)})
    images.main(["--input", str(root), "--output", str(tmp_path / "out"), "--split", "train", "--workers", "1"])
    source = records.open_split(tmp_path / "out", "train")
    assert source.info.class_names is None
    assert [records.decode_record(source.read(i)).label for i in range(2)] == [-1, -1]


def test_shards_do_not_depend_on_the_number_of_workers_nor_the_fingerprint_on_the_shards(tree, tmp_path):
    for name, options in {"one/set": (1, 3), "three/set": (3, 3), "large/set": (2, 9)}.items():
        args = ["--input", tree, "--output", tmp_path / name, "--split", "train"]
        images.main([str(arg) for arg in (*args, "--workers", options[0], "--shard-size", options[1])])
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    one, large = (records.load_info(tmp_path / name).splits["train"] for name in ("one/set", "large/set"))
    assert one.fingerprint == large.fingerprint and one.shards != large.shards


def test_killed_conversion_goes_on_to_the_same_bytes(tmp_path):
    pictures = [photograph(i, "WEBP") for i in range(20)]
    tree = write_tree(tmp_path / "in", {f"a/{i:04d}.webp": pictures[i % 20] for i in range(800)})
    args = ["--input", str(tree), "--split", "train", "--shard-size", "20", "--output"]
    assert command(*args, tmp_path / "whole/set").returncode == 0
    # It gives way, so that it is not done before the kill.
    killed = ["nice", sys.executable, "-m", "data_prep.images", "--workers", "2", *args]
    out = tmp_path / "killed/set"
    partial = out / ".train.partial"
    for kept in (2, 10):
        process = subprocess.Popen([*killed, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(partial.glob("*-of-00040.json"))) < kept and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="has no info.json"):
        records.open_split(out, "train")
    changed = command(*args, out, "--max-side", 10)
    assert changed.returncode == 1 and "unfinished conversion of other images or with other options" in changed.stderr
    finished = command(*args, out)
    assert finished.returncode == 0 and "resuming after" in finished.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_corrupt_images_are_named_and_fatal_above_the_share(tree, tmp_path):
    bad = {"field/zero.jpg": b"", "town/page.png": b"<html>", "town/cut.JPG": photograph(3)[:300]}
    root = write_tree(tmp_path / "in", {**contents(tree), **bad, "field/bmp.jpg": photograph(4, "BMP")})
    (root / "town/gone.tif").symlink_to(root / "nowhere")
    args = ["--input", root, "--output", tmp_path / "deep/out", "--split", "train"]
    refused = command(*args, "--max-corrupt-fraction", 0.12)
    assert refused.returncode == 1 and "24 images cannot be decoded" in refused.stderr
    assert refused.stderr.count("Traceback") == 0 and not (tmp_path / "deep").exists()
    done = command(*args, "--max-corrupt-fraction", 0.13)
    assert done.returncode == 0, done.stderr
    assert "left out: 3 rejected, 3 failed" in done.stdout
    report = json.loads((tmp_path / "deep/out/train.report.json").read_text())
    assert sorted(entry["key"] for entry in report["failed"]["first"]) == sorted(bad)
    assert report["written"] == 21 and all(entry["reason"] for entry in report["failed"]["first"])
    table = (tmp_path / "deep/out/train.inputs.csv").read_text().splitlines()
    assert "rejected,town/gone.tif,a broken link" in table and sum(r.startswith("failed") for r in table) == 3
    source = records.open_split(tmp_path / "deep/out", "train")
    keys = [records.decode_record(source.read(i)).key for i in range(len(source))]
    assert len(keys) == 21 and "field/bmp.jpg" in keys  # judged by its content


def test_bad_input_is_one_sentence_and_leaves_nothing(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    texts = write_tree(tmp_path / "texts", {"a/b.txt": b"x"})
    lies = write_tree(tmp_path / "lies", {"a/b.jpg": b"x", "a/c.png": b"y"})
    full = write_tree(tmp_path / "full", {"thesis.doc": b"x"})
    out = tmp_path / "out"
    cases = {
        "does not exist": (tmp_path / "nowhere", out, "train"),
        "neither a folder nor an archive": (texts / "a/b.txt", out, "train"),
        "has no images": (tmp_path / "empty", out, "train"),
        "has no images (": (texts, out, "train"),
        "2 of 2 images cannot be decoded": (lies, out, "train"),
        "overlap": (tree, tree / "out", "train"),
        "overlap;": (tree, tree.parent, "train"),
        "is not a dataset folder": (tree, full, "train"),
        "is a file": (tree, full / "thesis.doc", "train"),
        "is not a valid split name": (tree, out, "../train"),
    }
    before = contents(tmp_path), contents(tree)
    for sentence, (source, output, split) in cases.items():
        done = command("--input", source, "--output", output, "--split", split, "--max-corrupt-fraction", 1)
        assert done.returncode == 1, sentence
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and sentence in last and "Traceback" not in done.stderr
    assert (contents(tmp_path), contents(tree)) == before and not out.exists()


def test_second_split_needs_the_same_classes(tree, tmp_path):
    args = ["--output", str(tmp_path / "out"), "--workers", "1"]
    images.main(["--input", str(tree), "--split", "train", *args])
    other = write_tree(tmp_path / "in", {"town/1.jpg": photograph(1), "wood/1.jpg": photograph(2)})
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="has class 'field', the input does not"):
        images.main(["--input", str(other), "--split", "test", *args])
    assert contents(tmp_path / "out") == before


def test_no_space_left(tree, tmp_path, monkeypatch):
    """The disk is full while shards are written, and then while the metadata is."""
    args = ["--input", tree, "--output", tmp_path / "a/out", "--split", "train", "--shard-size", 5, "--workers", 1]
    limit = ["bash", "-c", 'ulimit -f 90 && exec "$@"', "_"]  # KiB a file
    convert = [sys.executable, "-m", "data_prep.images", *map(str, args)]
    done = subprocess.run(limit + convert, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot write a shard: write() failed: File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "a").exists()

    real, full = os.replace, [True]

    def replace(source, target):
        if full[0] and str(target).endswith("info.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="No space left on device"):
        images.main([str(arg) for arg in args])
    assert not list((tmp_path / "a").rglob("*.tmp")) and not (tmp_path / "a/out/info.json").exists()
    full[0] = False
    images.main([str(arg) for arg in args])
    assert len(records.open_split(tmp_path / "a/out", "train")) == 20
    assert not (tmp_path / "a/out/.train.partial").exists()


def test_two_conversions_do_not_share_a_folder(tree, tmp_path):
    (tmp_path / "out").mkdir()
    with lease.held(tmp_path / "out", "--output"), pytest.raises(UserError, match="out is in use by"):
        images.main(["--input", str(tree), "--output", str(tmp_path / "out"), "--split", "train"])


# ---------------------------------------------------------------- the demo scenes


def test_demo_scenes_are_seeded_and_their_colors_say_little(tmp_path):
    names = list(demo_scenes.LAYOUTS)
    assert len(names) >= 8
    demo_scenes.main(["--output", str(tmp_path / "scenes"), "--images", "65", "--size", "48", "--seed", "3"])
    found = contents(tmp_path / "scenes")
    assert {name.split("/")[1] for name in found if "/" in name} == set(names)
    assert [sum(name.startswith(split) for name in found) for split in ("train/", "test/")] == [53, 12]
    demo_scenes.main(["--output", str(tmp_path / "again"), "--images", "65", "--size", "48", "--seed", "3"])
    assert contents(tmp_path / "again") == found
    with pytest.raises(UserError, match="already exists with other content"):
        demo_scenes.main(["--output", str(tmp_path / "again"), "--images", "65", "--size", "48", "--seed", "4"])

    features, labels = [], []
    for label, name in enumerate(names):
        for number in range(15):
            picture = demo_scenes.render(name, 96, np.random.default_rng([9, label, number])) / 255.0
            features.append([*picture.mean(axis=(0, 1)), *picture.std(axis=(0, 1))])
            labels.append(label)
    features, labels = np.array(features), np.array(labels)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    distance = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    assert np.mean(labels[distance.argmin(axis=1)] == labels) < 0.3
