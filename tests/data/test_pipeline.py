"""The stream of batches: what it depends on, and how damaged records are replaced."""

import dataclasses
import io
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_data
import toy_shards
from PIL import Image

from pera_jax.common.errors import UserError
from pera_jax.data import codecs, pipeline, records
from pera_jax.data.mixture import Mixture
from pera_jax.objectives import ibot_masks

RECORDS, BATCH = 50, 12  # Epochs of four batches; two records are left out of each.
SETTINGS = dict(
    global_size=32,
    global_number=2,
    global_area=(0.4, 1.0),
    local_size=16,
    local_number=3,
    local_area=(0.05, 0.4),
    aspect=(0.75, 1.33),
    flip=0.5,
)
CROPS = toy_data.crops(SETTINGS)


def encoded_image(index: int) -> bytes:
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (*rng.integers(24, 60, 2), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if index % 2 else "JPEG")
    return file.getvalue()


def write_records(folder: pathlib.Path, images: list[bytes]) -> records.RecordSource:
    """A dataset of two shards; labels are record numbers."""
    split = toy_shards.Split(images, list(range(len(images))), shards=[20, len(images) - 20], facts={"fingerprint": ""})
    toy_shards.write(folder, {"train": split})
    return records.RecordSource(folder, records.load_info(folder), "train")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [encoded_image(i) for i in range(RECORDS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, images) -> records.RecordSource:
    return write_records(tmp_path_factory.mktemp("records"), images)


def take(source, number: int, crops: pipeline.Crops = CROPS, **settings) -> list[dict[str, np.ndarray]]:
    settings = {"batch_size": BATCH, "seed": 5, **settings}
    stream = pipeline.make_pipeline(Mixture.from_source(source), crops, **settings)
    batches = [{name: value.copy() for name, value in next(stream).items()} for _ in range(number)]
    stream.close()
    return batches


def assert_same(actual: list[dict], wanted: list[dict]) -> None:
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


@pytest.fixture(scope="module")
def stream(source) -> list[dict[str, np.ndarray]]:
    return take(source, 9)


def test_batches_have_the_shapes_and_types_that_are_promised(source, stream):
    shapes = {name: (value.shape, value.dtype) for name, value in stream[0].items()}
    assert shapes == {
        "global": ((BATCH, 2, 32, 32, 3), np.uint8),
        "local": ((BATCH, 3, 16, 16, 3), np.uint8),
        "label": ((BATCH,), np.int32),
        "set": ((BATCH,), np.int64),
        "index": ((BATCH,), np.int64),
        "replaced": ((BATCH,), np.bool_),
    }
    no_locals = toy_data.crops(SETTINGS | {"local_number": 0})
    batches = pipeline.make_pipeline(Mixture.from_source(source), no_locals, batch_size=BATCH, seed=5)
    assert "local" not in next(batches)
    batches.close()


def test_an_epoch_shows_no_record_twice_and_epochs_differ(stream):
    epochs = [np.concatenate([batch["index"] for batch in stream[start : start + 4]]) for start in (0, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == 4 * BATCH and epoch.max() < RECORDS
        assert np.mean(np.diff(epoch) == 1) < 0.3
    assert np.mean(epochs[0] == epochs[1]) < 0.3
    assert set(epochs[0]) != set(epochs[1])  # What is left out changes too.
    for batch in stream:
        np.testing.assert_array_equal(batch["label"], batch["index"])
        assert not batch["replaced"].any()


def test_crops_change_with_the_epoch_and_with_the_seed(source, stream):
    def crops_of(batches: list[dict], record: int) -> np.ndarray:
        return next(b["global"][b["index"] == record][0] for b in batches if record in b["index"])

    record = next(iter(set(stream[0]["index"]) & set(np.concatenate([b["index"] for b in stream[4:8]]))))
    first, second = crops_of(stream[:4], record), crops_of(stream[4:8], record)
    assert (first != second).mean() > 0.5
    assert (first[0] != first[1]).mean() > 0.5
    other = take(source, 1, seed=6)[0]
    assert (other["index"] != stream[0]["index"]).any()


def with_masks(group: int) -> pipeline.Crops:
    return dataclasses.replace(CROPS, draws=ibot_masks.BlockMasks(side=4, group=group))


@pytest.fixture(scope="module")
def masked(source) -> list[dict[str, np.ndarray]]:
    return take(source, 8, crops=with_masks(3))


# Rows of a batch by host: runs of them, mixed up as by a mesh of another order, and shared by hosts.
HOSTS = {
    "two": [range(0, 6), range(6, 12)],
    "four": [range(i, i + 3) for i in (0, 3, 6, 9)],
    "mixed": [(0, 1, 2, 9, 10, 11), (3, 4, 5, 6, 7, 8)],
    "shared": [(0, 1, 2, 6, 7, 8), (0, 1, 2, 6, 7, 8), range(3, 6), range(9, 12)],
}


@pytest.mark.parametrize(("hosts", "workers"), [("two", 0), ("four", 0), ("mixed", 0), ("shared", 0), ("mixed", 2)])
def test_the_rows_of_the_hosts_make_up_the_same_global_batches(source, masked, hosts, workers):
    """Also from a batch that the second of two workers makes; of all rows: see the mixture of test_bands."""
    for rows in HOSTS[hosts][:1] if workers else HOSTS[hosts]:
        wanted = [{name: value[list(rows)] for name, value in batch.items()} for batch in masked[3:]]
        assert_same(take(source, 5, crops=with_masks(3), rows=rows, start_batch=3, workers=workers), wanted)
    assert set().union(*HOSTS[hosts]) == set(range(BATCH))


def test_draws_for_groups_of_images_differ_and_leave_the_crops_alone(source, stream, masked):
    masks = [batch["masks"] for batch in masked]
    assert {(each.shape, each.dtype) for each in masks} == {((BATCH, 2, 16), np.dtype(np.uint8))}
    groups = np.concatenate(masks).reshape(-1, 3 * 2 * 16)
    assert np.all(groups.any(axis=1)) and len(np.unique(groups, axis=0)) == len(groups)
    rest = [{name: value for name, value in batch.items() if name != "masks"} for batch in masked]
    assert_same(rest, stream[:8])
    other_seed = take(source, 1, crops=with_masks(3), seed=6)[0]["masks"]
    assert np.any(other_seed != masks[0])


@pytest.mark.parametrize("rows", [range(2, 8), range(4), (0, 1, 2, 3, 5, 4), (0, 1, 2, 2, 3, 4)])
def test_rows_that_split_a_group_are_an_error(source, rows):
    with pytest.raises(UserError, match="draws for groups of 3 images, and the rows of the batch on this host are not"):
        take(source, 1, crops=with_masks(3), rows=rows)
    with pytest.raises(UserError, match="draws for groups of 5 images"):
        take(source, 1, crops=with_masks(5))


def test_rows_that_a_batch_does_not_have_are_an_error(source):
    with pytest.raises(ValueError, match="out of range for batch_size=12"):
        take(source, 1, rows=[3, BATCH])


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_reading_goes_on_from_any_batch(source, stream, start):
    assert_same(take(source, min(3, 9 - start), start_batch=start), stream[start : start + 3])


def test_damaged_records_are_replaced_and_leave_the_others_alone(tmp_path, images, stream):
    images = list(images)
    images[30] = images[30][: len(images[30]) // 2]  # An image cut short: it cannot be decoded.
    images[31] = b""
    source = write_records(tmp_path, images)
    shard = tmp_path / toy_shards.shard(tmp_path.name, "train", 0, 2)
    content = bytearray(shard.read_bytes())
    content[content.index(images[11]) + 5] ^= 1  # One bit of the file: ArrayRecord cannot read record 11.
    shard.write_bytes(content)
    with pytest.raises(RuntimeError):
        source.read(11)

    for actual, wanted in zip(take(source, 9), stream, strict=True):
        np.testing.assert_array_equal(actual["index"], wanted["index"])
        np.testing.assert_array_equal(actual["replaced"], np.isin(wanted["index"], [11, 30, 31]))
        after = {11: 12, 30: 32, 31: 32}
        np.testing.assert_array_equal(actual["label"], [after.get(i, i) for i in wanted["index"]])
        intact = ~actual["replaced"]
        for name in ("global", "local"):
            np.testing.assert_array_equal(actual[name][intact], wanted[name][intact])


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_to_shards_is_counted_and_leaves_good_records_alone(tmp_path, images, stream, seed):
    """Bits flipped anywhere in one shard, also in its head and foot; every other seed cuts the other shard off."""
    rng, source = np.random.default_rng(seed), write_records(tmp_path, images)
    for k, name in enumerate(source.split_info.shards):
        content = bytearray((tmp_path / name).read_bytes())
        for place in rng.integers(len(content), size=4):
            content[place] ^= 1 << rng.integers(8)
        if seed % 2 and k == 1:
            content = content[: rng.integers(len(content))]
        (tmp_path / name).write_bytes(content)
    try:
        source = records.open_split(tmp_path, "train", skip_damaged=True)
    except UserError as error:  # no shard at all can be opened
        assert "damaged" in str(error)
        return
    bad = set()
    for i in range(RECORDS):
        try:
            codecs.decode_image(records.decode_record(source.read(i)).image)
        except (RuntimeError, ValueError):
            bad.add(i)
    assert bool(source.damaged) <= bool(bad)
    for actual, wanted in zip(take(source, 9), stream, strict=True):
        np.testing.assert_array_equal(actual["index"], wanted["index"])
        np.testing.assert_array_equal(actual["replaced"], np.isin(wanted["index"], list(bad)))
        good = ~actual["replaced"]
        np.testing.assert_array_equal(actual["global"][good], wanted["global"][good])
        assert not bad & set(actual["label"])  # what replaces a bad record is a good one


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_a_good_image_ends_with_one_sentence(tmp_path, workers):
    with pytest.raises(UserError, match="100 records of .* cannot be decoded, starting with record"):
        take(write_records(tmp_path, [b"no image"] * RECORDS), 1, workers=workers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": RECORDS + 1}, "reduce batch_size"),
        ({"seed": -1}, "out of range"),
        pytest.param(
            {"workers": 10**9},
            "shared memory",
            marks=pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory is no folder here"),
        ),
    ],
)
def test_wrong_settings_end_with_one_sentence(source, settings, message):
    with pytest.raises(UserError, match=message):
        take(source, 1, **settings)


PROGRAM = """
import multiprocessing, os, pickle, signal, sys, time
from pera_jax.data import pipeline
from pera_jax.data.mixture import Mixture

def main():
    with open(sys.argv[1], "rb") as file:
        source, crops = pickle.load(file)
    stream = pipeline.make_pipeline(Mixture.from_source(source), crops, batch_size=12, seed=0, workers=1)
    for _ in range(3):
        next(stream)
    workers = [process.pid for process in multiprocessing.active_children()]
    print(*workers, flush=True)
    if sys.argv[2] == "hang":
        time.sleep(600)
    for worker in workers:  # As a terminal and a scheduler do: the whole group gets the signal.
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    for _ in range(6):
        next(stream)
    stream.close()
    stream.close()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path, source) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "arguments").write_bytes(pickle.dumps((source, CROPS)))
    return [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "arguments")]


def test_workers_outlive_signals_to_the_group_and_end_without_noise(program):
    done = subprocess.run([*program, "close"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 1


def test_workers_end_when_their_parent_is_killed(program):
    with subprocess.Popen([*program, "hang"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 1 and all(alive(pid) for pid in workers)
        parent.send_signal(signal.SIGKILL)
    for _ in range(300):
        if not any(alive(pid) for pid in workers):
            return
        time.sleep(0.1)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    pytest.fail("workers live on after their parent")


def alive(pid: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
