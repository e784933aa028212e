"""Reading of dataset folders."""

import contextlib
import json
import math
import pickle
import re

import numpy as np
import pytest
import toy_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_jax.common.errors import UserError
from pera_jax.data import codecs, float_histogram, records, shard_files, statistics


def png(value: int) -> bytes:
    return toy_shards.png(np.full((3, 4 + value, 3), (value, 2 * value, 255 - value), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two shards of 3 and 2 records."""
    split = toy_shards.Split(
        [png(i) for i in range(5)], [i % 2 for i in range(5)], [f"a/{i}.png" for i in range(5)], shards=[3, 2],
        facts={"fingerprint": "f", "source": "s"},
    )  # fmt: skip
    return toy_shards.write(tmp_path / "toy", {"train": split}, class_names=["a", "b"])


@pytest.mark.parametrize("label", [None, 0, 1, 127, 128, 70_000])
def test_record_is_a_tf_example(label):
    from tensorflow_datasets.proto import tf_example_pb2

    image, key = bytes(range(256)) * 40, "wälder/tile 7.jpg"
    raw = records.encode_record(image, key, label)
    feature = tf_example_pb2.Example.FromString(raw).features.feature
    assert feature["image"].bytes_list.value[0] == image
    assert feature["key"].bytes_list.value[0].decode() == key
    assert list(feature["label"].int64_list.value) == ([] if label is None else [label])
    other_writer = tf_example_pb2.Example.FromString(raw).SerializeToString()  # features in protobuf's order
    expected = records.Record(image=image, key=key, label=-1 if label is None else label)
    assert records.decode_record(raw) == records.decode_record(other_writer) == expected


def test_damaged_record_is_a_value_error():
    raw = records.encode_record(png(3), "a/b.png", 300)
    for cut in range(len(raw)):
        with pytest.raises(ValueError):
            records.decode_record(raw[:cut])
    rng = np.random.default_rng(0)
    for _ in range(2000):  # any flipped byte: a value error or another record, but no other exception
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] = rng.integers(256)
        try:
            records.decode_record(bytes(damaged))
        except ValueError:
            pass


def test_source_reads_every_record_also_after_pickling(folder):
    source = records.open_split(folder, "train")
    source.read(0)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        found = [records.decode_record(copy.read(i)) for i in np.arange(len(copy))]
        assert [record.key for record in found] == [f"a/{i}.png" for i in range(5)]
        assert [record.label for record in found] == [0, 1, 0, 1, 0]
        assert [codecs.decode_image(record.image).shape for record in found] == [(3, 4 + i, 3) for i in range(5)]
        with pytest.raises(IndexError):
            copy.read(5)
    assert codecs.decode_image(png(7))[0, 0].tolist() == [7, 14, 248]


def test_damaged_record_in_a_shard_is_a_runtime_error_and_spares_the_others(folder):
    file = folder / "toy-train.array_record-00000-of-00002"
    content = bytearray(file.read_bytes())
    content[content.index(b"a/1.png")] ^= 255
    file.write_bytes(content)
    source = records.open_split(folder, "train")
    with pytest.raises(RuntimeError):
        source.read(1)
    assert [records.decode_record(source.read(i)).key for i in (0, 2)] == ["a/0.png", "a/2.png"]


@pytest.mark.parametrize("encoded", [b"", b"no image", png(5)[:40], png(200)[:-40]])
def test_undecodable_image(encoded):
    with pytest.raises(codecs.ImageDecodeError):
        codecs.decode_image(encoded)


@pytest.mark.parametrize("keep", [0, 100, 65_536, -1])
def test_truncated_shard_is_named(folder, keep):
    file = folder / "toy-train.array_record-00001-of-00002"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="toy-train.array_record-00001-of-00002 is damaged"):
        records.open_split(folder, "train")


def test_bad_folders_are_one_clear_sentence(folder, tmp_path_factory):
    shard = folder / "toy-train.array_record-00000-of-00002"
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        records.open_split(folder, "test")
    with pytest.raises(UserError, match="does not exist"):
        records.load_info(folder / "nowhere")
    with pytest.raises(UserError, match="has no info.json"):
        records.load_info(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="is damaged: expected 4 records, got 3"):
        shard_files.check_shard(shard, 4)
    zeros = folder / "zeros"
    zeros.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="truncated or damaged"):
        shard_files.check_shard(zeros, 3, shard.stat().st_size)
    shard.rename(folder / "moved")
    with pytest.raises(UserError, match="00000-of-00002 is missing"):
        records.open_split(folder, "train")
    toy_shards.edit_info(folder, dtype="int64")
    with pytest.raises(UserError, match="dtype is int64, expected one of uint8"):
        records.open_split(folder, "train")
    toy_shards.edit_info(folder, format_version=1, invented=1)
    with pytest.raises(UserError, match="format version 1, not 2"):
        records.load_info(folder)
    (folder / "info.json").write_text('{"format_version": 1, "na')
    with pytest.raises(UserError, match="info.json is damaged: it is not valid JSON"):
        records.load_info(folder)


def test_an_info_that_cannot_be_true_is_refused_naming_the_field(folder):
    sound = json.loads((folder / "info.json").read_text())
    split, size = sound["splits"]["train"], sum(sound["splits"]["train"]["shard_bytes"])
    shards = split["shards"]
    for changes, sentence in [
        ({"shards": ["../other/" + shards[0], shards[1]]}, "shards[0]: expected the name of a file in this folder"),
        ({"shards": ["/etc/passwd", shards[1]]}, "shards[0]: expected the name of a file in this folder"),
        ({"shards": [shards[0]] * 2}, "split 'train' names a shard twice"),
        ({"mean": [0.5, math.nan, 0.5]}, "mean[1]: expected a finite number"),
        ({"std": [0.1, -0.1, 0.1]}, "split 'train' has a negative standard deviation"),
        ({"ranges": [[0, 255], [5, 5], [0, 255]]}, "split 'train' has a range that is not low < high"),
        ({"ranges": [[0, 255], [0], [0, 255]]}, "ranges[1]: expected array of length >= 2"),
        (
            {"shard_records": [3, 10**9], "records": 10**9 + 3},
            f"claims 1,000,000,000 records in the {split['shard_bytes'][1]:,}",
        ),
        ({"records": 1}, "split 'train' has 1 records, but its shards"),
        ({"records": "7"}, "records: expected int, got str"),
        ({"shard_bytes": [size]}, "has 2 shards, but 2 record counts and 1 sizes"),
        ({"percentiles": {"50": [1.0]}}, "has percentile 50 for 1 bands, expected 3"),
        ({"percentiles": {"50": None}}, "expected array, got null"),
    ]:
        toy_shards.edit_info(folder, splits={"train": {**split, **changes}})
        with pytest.raises(UserError, match=f"info.json is damaged: .*{re.escape(sentence)}"):
            records.load_info(folder)
    for changes, sentence in [
        ({"bands": ["red", "red", "blue"]}, "bands must be a list of unique names"),
        ({"class_names": ["a", ""]}, "class_names[1]: expected str of length >= 1"),
        ({"class_names": ["a\n", "\ud800"]}, "bytes or escapes that are not valid UTF-8"),
        ({"splits": {"../train": split}}, "splits: expected the name of a file"),
        ({"splits": {}}, "it has no splits"),
        ({"splits": []}, "splits: expected object, got array"),
    ]:
        (folder / "info.json").write_text(json.dumps(sound | changes))
        with pytest.raises(UserError, match=f"info.json is damaged: .*{re.escape(sentence)}"):
            records.load_info(folder)
    (folder / "info.json").write_bytes(b'{"a":' * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        records.load_info(folder)


# ---------------------------------------------------------------- bands


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_tiff_keeps_every_bit_and_says_when_it_is_damaged(dtype, bands):
    rng = np.random.default_rng(bands)
    pixels = rng.normal(3000, 1000, (40, 37, bands)).clip(0, 65535).astype(dtype)
    encoded = codecs.encode_tiff(pixels)
    assert encoded == codecs.encode_tiff(pixels)
    found = codecs.decode_image(encoded)
    assert found.dtype == pixels.dtype and found.flags.writeable and found.flags.c_contiguous
    np.testing.assert_array_equal(found, pixels)
    for cut in (4, 8, 100, len(encoded) // 2):
        with pytest.raises(codecs.ImageDecodeError):
            codecs.decode_image(encoded[:cut])
    for _ in range(60):  # whatever a flipped bit does, it is either pixels or this error
        damaged = bytearray(encoded)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        with contextlib.suppress(codecs.ImageDecodeError):
            codecs.decode_image(bytes(damaged))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_statistics_of_histograms_are_those_of_the_pixels(dtype):
    rng = np.random.default_rng(1)
    pixels = rng.normal([[[90.0, 40.0, -20.0]]], 20.0, (50, 60, 3))
    pixels = (pixels if dtype == "float32" else np.abs(pixels) * (1 if dtype == "uint8" else 100)).astype(dtype)
    valid = rng.random((50, 60)) < 0.7
    counts = statistics.count(pixels[:20], valid[:20]) + statistics.count(pixels[20:], valid[20:])
    assert [held.sum() for _, held in map(statistics.table, counts)] == [valid.sum()] * 3
    held = pixels[valid].astype(np.float64)  # [N, 3]
    near = dict(rtol=1e-6) if dtype == "float32" else dict(rtol=1e-9)
    found = statistics.percentiles(counts, dtype, (1.0, 50.0, 99.0))
    np.testing.assert_allclose(found, np.percentile(held, (1, 50, 99), axis=0, method="inverted_cdf"), **near)
    ranges = [[10.0, 120.0], [0.0, 80.0], [-60.0, 30.0]]
    low, high = np.array(ranges).T
    mapped = np.clip((held - low) / (high - low), 0, 1)
    for got, wanted in zip(statistics.moments(counts, dtype, ranges), (mapped.mean(0), mapped.std(0)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6 if dtype == "float32" else 1e-9)
    chosen = statistics.default_ranges(counts, dtype)
    assert chosen == [[0.0, 255.0]] * 3 if dtype == "uint8" else np.allclose(chosen, found[[0, 2]].T)
    assert np.all(statistics.from_bytes(statistics.to_bytes(counts)) == counts)


@pytest.mark.parametrize(
    "mean, std",
    [(301, 0.3), (3000, 2), (3000, 0.01), (-1e6, 1), (0.2, 1e-5), (-15, 4), (0, 1), (1e-30, 1e-31), (1e30, 1e28)],
)
def test_floats_far_from_zero_have_the_statistics_of_their_values(mean, std):
    """Also where a few values lie all over the octave, and in others."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(mean, std, (500, 400)).astype(np.float32)
    odd = rng.random(pixels.shape) < 0.002
    pixels[odd] = rng.choice([-9999, 0, 0.5, 3e8, 1.5 * mean], odd.sum())
    counts = statistics.count(pixels[..., None])
    held = np.sort(pixels.ravel().astype(np.float64))
    truth = np.percentile(held, (1, 50, 99), method="inverted_cdf")
    found = statistics.percentiles(counts, "float32", (1.0, 50.0, 99.0))[:, 0]
    np.testing.assert_allclose(found, truth, atol=0.01 * std)
    ((low, high),) = statistics.default_ranges(counts, "float32")
    assert np.mean((held < low) | (held > high)) < 0.021
    mapped = np.clip((held - low) / (high - low), 0, 1)
    (got_mean,), (got_std,) = statistics.moments(counts, "float32", [[low, high]])
    np.testing.assert_allclose([got_mean, got_std], [mapped.mean(), mapped.std()], atol=1e-3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([20, 5000]))
@settings(max_examples=30, deadline=None)
def test_histograms_of_floats_do_not_depend_on_how_the_images_were_divided(seed, parts, cells):
    """Bit for bit, also where cells grow, and where parts are packed on the way."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(rng.normal(0, 100), rng.lognormal(0, 3), (40, 40, 2)).astype(np.float32)
    pixels[:5] = rng.choice([0.0, -0.0, -9999, 1e-42, 3e38], (5, 40, 2))
    whole, cuts = pixels.reshape(1, -1, 2), np.sort(rng.integers(0, 1601, parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_histogram, "MOST_CELLS", cells)
        patch.setattr(float_histogram, "_LOOSE", int(rng.integers(1, 2000)))
        at_once = statistics.count(whole)
        pieces = [statistics.count(part) for part in np.split(whole, cuts, axis=1)]
        joined = sum(statistics.from_bytes(statistics.to_bytes(pieces[i])) for i in rng.permutation(len(pieces)))
        assert joined == at_once and statistics.to_bytes(joined) == statistics.to_bytes(at_once)
        assert not any(more.any() for _, more in statistics.differences(joined, at_once))
    octaves = [np.bincount(band.keys >> 23) for band in at_once]
    assert max(held.max() for held in octaves) <= cells
    assert [band.total for band in at_once] == [1600, 1600]
    for band in range(2):
        values, held = statistics.table(at_once[band])
        if cells > 1600:
            np.testing.assert_array_equal(
                np.repeat(values, held),
                np.sort(np.where(abs(pixels[..., band]) < 1e-38, 0, pixels[..., band]), axis=None),
            )
        assert (np.diff(values) >= 0).all()


def test_histograms_of_floats_of_older_folders_are_read():
    """A bin for each pattern of the upper 16 bits, in the order of the values."""
    pixels = np.random.default_rng(0).normal(-3, 5, (60, 50, 1)).astype(np.float32)
    bits = pixels.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | (1 << 31)) >> 16
    old = np.bincount(ordered.ravel(), minlength=65536)[None]
    new = statistics.count(pixels)
    assert not any(more.any() for _, more in statistics.differences(new, statistics.current(old, "float32")))
    for shares in ((1.0,), (50.0,)):
        found, exact = (statistics.percentiles(counts, "float32", shares) for counts in (old, new))
        np.testing.assert_allclose(found, exact, rtol=1 / 128)
    ranges = [[-10.0, 6.0]]
    np.testing.assert_allclose(*(statistics.moments(counts, "float32", ranges) for counts in (old, new)), atol=2e-3)
    with pytest.raises(ValueError):
        arrays = new.arrays()
        float_histogram.FloatHistogram.from_arrays(**{**arrays, "cells": arrays["cells"] + 1})
