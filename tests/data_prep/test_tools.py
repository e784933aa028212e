"""The commands verify, stats and browse."""

import csv
import dataclasses
import errno
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import toy_data
import toy_shards
from PIL import Image

from data_prep import browse, stats, verify
from data_prep.convert import tfds_metadata
from data_prep.inspect import check_shard, histogram_picture, survey
from pera_jax.common import html
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records, statistics

EVIL = '<script>alert("1")</script>&amp;'
PLACE = {"source": "scene<b>", "crs": "EPSG:32633", "date": "2020-08-31", "bounds": [0, 0, 320, 320]}


def write_set(
    folder: pathlib.Path, images: list[bytes], *, bands: tuple[str, ...] = records.RGB, dtype: str = "uint8",
    class_names: list[str] | None = None, counts: np.ndarray | None = None, shards: int = 2, **options,
) -> pathlib.Path:  # fmt: skip
    """Writes a dataset folder of one split, `train`, whose metadata fit the images, or the given `counts`.

    Args:
      options: of `toy_shards.Split`: labels, keys, places.
    """
    if counts is None:
        counts = sum(statistics.count(codecs.decode_image(image)) for image in images)
    ranges = statistics.default_ranges(counts, dtype)
    mean, std = (values.tolist() for values in statistics.moments(counts, dtype, ranges))
    percentiles = {"50": statistics.percentiles(counts, dtype, (50.0,))[0].tolist()}
    bounds = [len(images) * k // shards for k in range(shards + 1)]
    split = toy_shards.Split(
        images, shards=np.diff(bounds).tolist(), **options,
        facts={"ranges": ranges, "mean": mean, "std": std, "percentiles": percentiles},
    )  # fmt: skip
    toy_shards.write(folder, {"train": split}, bands=bands, dtype=dtype, class_names=class_names)
    tfds_metadata.write(folder, folder, records.load_info(folder))
    (folder / statistics.file_name("train")).write_bytes(statistics.to_bytes(counts))
    return folder


def photographs(number: int = 10) -> list[bytes]:
    return [toy_shards.png(np.random.default_rng(i).integers(0, 256, (12, 16, 3), np.uint8)) for i in range(number)]


def deep(number: int = 6, dtype: str = "uint16") -> list[np.ndarray]:
    """[number, 20, 24, 4], some of them zero."""
    values = np.random.default_rng(3).integers(0, 4000, (number, 20, 24, 4))
    return list((values * (values > 100)).astype(dtype) - (100 if dtype == "float32" else 0))


@pytest.fixture
def sound(tmp_path):
    return write_set(
        tmp_path / "sound", photographs(), labels=[i % 2 for i in range(10)], class_names=["field", "town"]
    )


@pytest.fixture
def in_process(monkeypatch):
    """Without processes: starting them takes a second."""

    def serial(tasks, workers, report):
        return [(task, check_shard.check(task, report)) for task in tasks]

    monkeypatch.setattr(verify, "check_all", serial)


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, timeout=120)


def shard(folder: pathlib.Path, number: int = 0) -> pathlib.Path:
    return sorted(folder.glob("*.array_record-*"))[number]


def flip(file: pathlib.Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


# ---------------------------------------------------------------- verify


def test_a_sound_folder_and_one_with_every_kind_of_damage(sound, tmp_path):
    done = command("data_prep.verify", sound, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"{sound} is valid" in done.stdout and "verify: 10/10 records" in done.stderr
    assert re.search(r"train +2 +10 +10 .* 12 +16 +equal +equal", done.stdout)

    first, second = shard(sound), shard(sound, 1)
    flip(first, first.read_bytes().index(records.decode_record(_record(sound, 3)).image) + 100)
    second.write_bytes(second.read_bytes()[:-1])
    (sound / "features.json").unlink()
    done = command("data_prep.verify", sound, "--json", tmp_path / "found.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{first.name}, record 3: its bytes are damaged" in done.stdout
    assert f"{second.name}: cannot be read: it is truncated" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"error: {sound} is damaged")
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["sound"] and found["splits"]["train"]["read"] == 4
    assert {"split": "train", "shard": first.name, "records": [3, 3]}.items() <= found["problems"][0].items()
    assert "features.json is missing" in found["problems"][-1]["text"]


def _record(folder: pathlib.Path, i: int) -> bytes:
    return records.open_split(folder, "train").read(i)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_no_damage_of_a_shard_passes_or_ends_the_check(tmp_path, kind):
    """Whatever is changed: either all records are what they were, or the shard or a record is named."""
    if kind == "PNG":
        folder = write_set(tmp_path / "set", photographs(), shards=1)
    else:
        folder = write_set(tmp_path / "set", [codecs.encode_tiff(image) for image in deep()], bands=tuple("abcd"),
                           dtype="uint16", shards=1)  # fmt: skip
    task = check_shard.Task(folder, "train", 0, records.load_info(folder))
    whole, file = check_shard.check(task, lambda done: None), shard(folder)
    assert not whole.shard_problems + whole.record_problems
    content, rng = file.read_bytes(), random.Random(0)
    used = len(content.rstrip(b"\0"))
    named = 0
    for trial in range(300):
        damaged = bytearray(content)
        place = rng.choice(
            [rng.randrange(len(content)), rng.randrange(used), rng.randrange(200), used - rng.randrange(1, 99)]
        )
        if trial % 3 == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif trial % 3 == 1:
            damaged = damaged[:place]
        else:
            damaged[place : place + 500] = rng.randbytes(len(damaged[place : place + 500]))
        file.write_bytes(damaged)
        reported = []
        found = check_shard.check(task, reported.append)
        assert sum(reported) == task.records
        bad = bool(found.shard_problems or found.record_problems)
        assert bad or (found.digests == whole.digests and trial % 3 != 1)
        named += bad
    assert named > 150  # the rest lies in padding


def test_a_worker_that_dies_is_a_finding_of_its_shard(sound):
    class Deadly(records.DatasetInfo):
        def __reduce__(self):
            return os._exit, (7,)

    info = records.load_info(sound)
    deadly = Deadly(**{field.name: getattr(info, field.name) for field in dataclasses.fields(info)})
    tasks = [check_shard.Task(sound, "train", 0, deadly), check_shard.Task(sound, "train", 1, info)]
    done = []
    found = {task.index: findings for task, findings in check_shard.check_all(tasks, 1, done.append)}
    assert found[0].shard_problems == ["cannot be checked: the worker process ended with status 7"]
    assert len(found[1].digests) == 5 and sum(done) == 10


def test_what_records_and_metadata_say_is_compared(tmp_path, in_process):
    pictures = photographs(4)
    names = ["field", "town"]

    def texts(folder, split=None) -> str:
        return "\n".join(verify._sentence(problem) for problem in verify.verify(folder, split, 1)["problems"])

    bad = write_set(tmp_path / "labels", pictures, labels=[0, 2, 3, 3], class_names=names, shards=1)
    assert "record 1: it has the label 2, but the dataset has 2 classes" in texts(bad)
    assert "records 2 to 3: it has the label 3" in texts(bad)
    bad = write_set(tmp_path / "unlabeled", pictures, class_names=names)
    assert "it has no label" in texts(bad)
    bad = write_set(
        tmp_path / "bands", [*pictures[:3], codecs.encode_tiff(deep()[0])], counts=np.ones((3, 256), np.int64)
    )
    assert "expected 3 bands of uint8, got 4 of uint16" in texts(bad)

    good = write_set(tmp_path / "good", pictures, labels=[0, 1, 0, 1], class_names=names)
    assert texts(good) == ""
    split = json.loads((good / records.INFO_FILE).read_text())["splits"]["train"]
    for changes, sentence in {
        "fingerprint": ("the fingerprint of the records is", "0" * 64),
        "mean": ("mean and std in info.json do not match", [0.5, 0.5, 0.5]),
        "percentiles": ("percentile 50 in info.json", {"50": [1.0, 2.0, 3.0]}),
        "shard_bytes": ("bytes, expected 5", [5, 5]),
    }.items():
        toy_shards.edit_info(good, splits={"train": {**split, changes: sentence[1]}})
        assert sentence[0] in texts(good)
    toy_shards.edit_info(good, splits={"train": split}, class_names=["field", "city"])
    assert "label.labels.txt lists other classes" in texts(good)
    for changes in ({"shards": split["shards"][:1]}, {"records": 3}, {"ranges": []}, {"mean": None}):
        toy_shards.edit_info(good, splits={"train": {**split, **changes}})
        with pytest.raises(UserError, match="info.json is damaged: .*; copy it again"):
            verify.verify(good, None, 1)
    toy_shards.edit_info(good, splits={"train": split}, class_names=names)
    file = good / statistics.file_name("train")
    counts = statistics.from_bytes(file.read_bytes())
    counts[0, [0, 255]] += 1, -1
    file.write_bytes(statistics.to_bytes(counts))
    assert "2 pixels of band red have other values" in texts(good)
    content, rng = file.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        place = rng.randrange(len(content))
        damaged[place : place + 9] = rng.randbytes(len(damaged[place : place + 9]))
        file.write_bytes(damaged)
        assert "histogram.npz" in texts(good)


def test_where_the_histogram_need_not_be_equal(tmp_path, in_process):
    """Pixels without data are 0 and not counted; decoders of JPEG differ by a gray level."""
    images = deep(dtype="float32")
    images = [np.where(image == -100, np.float32(0), image) for image in images]
    counts = sum(statistics.count(image, (image != 0).all(axis=2)) for image in images)
    assert 0 < counts[0].total < np.size(images) // 4
    encoded = [codecs.encode_tiff(image) for image in images]
    options = {"bands": tuple("abcd"), "dtype": "float32", "places": [json.dumps(PLACE)] * 6}
    partly = sum(statistics.count(image, image != 0) for image in images)
    tiles = write_set(tmp_path / "tiles", encoded, counts=partly, **options)
    result = verify.verify(tiles, None, 1)
    assert result["sound"] and re.fullmatch(r"equal \([\d,]+ without data\)", result["splits"]["train"]["histogram"])
    tiles = write_set(tmp_path / "fewer", encoded, counts=counts, **options)
    assert "does not match the pixels" in verify.verify(tiles, None, 1)["problems"][0]["text"]

    info = records.load_info(write_set(tmp_path / "set", photographs()))
    ours = np.full((3, 256), 50)
    near, far = (np.roll(ours * np.arange(256), shift, axis=1) for shift in (1, 9))
    assert verify.compare(ours * np.arange(256), near, info, lossy=True)[1] is None
    assert verify.compare(ours * np.arange(256), near, info, lossy=False)[1] is not None
    assert "means differ" in verify.compare(ours * np.arange(256), far, info, lossy=True)[1]
    assert (
        "band red has +50 pixels"
        in verify.compare(ours[:, :256] * 1, ours + 50 * (np.arange(256) == 9), info, lossy=True)[1]
    )


# ---------------------------------------------------------------- stats


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_statistics_are_those_of_the_pixels(tmp_path, capsys, dtype):
    bands = ("a", "b", "green", "d")
    folder = pathlib.Path(toy_data.write(tmp_path / "toy", images=6, bands=bands, dtype=dtype))
    source = records.open_split(folder, "train")
    pixels = np.concatenate([
        codecs.decode_image(records.decode_record(source.read(i)).image).reshape(-1, 4) for i in range(6)
    ]).astype(np.float64)  # fmt: skip
    shard(folder).unlink()  # the histogram is enough
    stats.main([str(folder), "--output", str(tmp_path / "out/statistics")])
    with open(tmp_path / "out/statistics/train.statistics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["band"] for row in rows] == list(bands) and {row["pixels"] for row in rows} == {str(len(pixels))}
    relative = 1e-6 if dtype == "float32" else 1e-12
    for row, column in zip(rows, pixels.T, strict=True):
        expected = {"minimum": column.min(), "maximum": column.max(), "mean": column.mean(), "std": column.std()}
        expected |= {
            f"p{share:g}": np.percentile(column, share, method="inverted_cdf") for share in (0.1, 1, 50, 99, 99.9)
        }
        low, high = (0, 255) if dtype == "uint8" else (float(row["p1"]), float(row["p99"]))
        mapped = np.clip((column - low) / (high - low), 0, 1)
        for name, value in expected.items():
            np.testing.assert_allclose(float(row[name]), value, rtol=relative, atol=1e-30, err_msg=name)
        np.testing.assert_allclose([float(row["low"]), float(row["high"])], [low, high])
        found = [float(row["mean_in_range"]), float(row["std_in_range"])]
        np.testing.assert_allclose(found, [mapped.mean(), mapped.std()], atol=2e-3)
    described = json.loads((tmp_path / "out/statistics/train.statistics.json").read_text())
    assert [band["mean"] for band in described["bands"]] == [float(row["mean"]) for row in rows]
    picture = Image.open(tmp_path / "out/statistics/train.histograms.png").convert("RGB")
    assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 5
    assert capsys.readouterr().out.count("green") == 1

    info = records.load_info(folder)
    counts = statistics.load(folder, "train")[1]
    low, high = pixels[:, 1].min() - 1, pixels[:, 1].max() * 1.02
    drawn = histogram_picture.densities(counts, low, high, 40)
    np.testing.assert_allclose(drawn.sum(), len(pixels), rtol=1e-3)
    truth, _ = np.histogram(pixels[:, 1], 40, (low, high))
    assert np.abs(drawn - truth).sum() < 0.12 * len(pixels)
    assert histogram_picture.draw(info, "train", statistics.load(folder, "train")).size == picture.size


# ---------------------------------------------------------------- browse


def test_page_of_hostile_text_is_whole_and_runs_nothing(tmp_path):
    images = [codecs.encode_tiff(image) for image in deep()]
    folder = write_set(
        tmp_path / "set", images, bands=("nir", "red", "green", "blue"), dtype="uint16",
        keys=[f"{EVIL}/{i}" for i in range(6)],
        labels=[0, 1, 0, 1, 0, 0], class_names=[EVIL, "b' onload='x"],
        places=[json.dumps(PLACE), "[]", json.dumps({"crs": 3, "bounds": "x"}), *[json.dumps(PLACE)] * 3],
    )  # fmt: skip
    (folder / "train.report.json").write_text(json.dumps({
        "inputs": 1234, "failed": [{"key": EVIL, "reason": EVIL}], "later": {"x": [1, {"y": EVIL}]}, "none": None,
        "rejected": {"number": 1200, "reasons": {EVIL: {"number": 1200, "first": [EVIL, 3]}}}, "lone": "\udce9",
        "empty": {},
    }))  # fmt: skip
    flip(shard(folder), shard(folder).read_bytes().index(images[1]) + 60)
    output = tmp_path / "page.html"
    done = command("data_prep.browse", folder, "--output", output)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "<script" not in text and "<b>scene" not in text and "scene<b>" not in text and "' onload" not in text
    assert not re.search(r'(src|href)="(?!data:image|#)', text) and "://" not in text and "@import" not in text
    assert text.count("data:image/jpeg") == 5 and text.count("data:image/png") == 1
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;amp;/0" in text
    for said in ("red, green, blue as red, green, blue", "Damaged records: 1;", "1,234", "1,200", "EPSG:32633",
                 "2020-08-31", "the record is damaged", "24 × 20", "default-src 'none'"):  # fmt: skip
        assert said in text, said
    first = output.read_bytes()
    browse.main([str(folder), "--output", str(output)])
    assert output.read_bytes() == first
    browse.main([str(folder), "--output", str(output), "--seed", "1", "--images", "2", "--bands", "nir"])
    assert "nir as gray" in output.read_text() and output.read_text().count("data:image/jpeg") <= 2
    (folder / "train.report.json").write_text("{")
    shard(folder, 1).unlink()
    browse.main([str(folder), "--output", str(output)])
    assert "train.report.json cannot be read" in output.read_text() and "Damaged records: 4;" in output.read_text()


def test_thumbnails_are_stretched_by_the_stored_ranges_and_a_survey_is_bounded(tmp_path, monkeypatch):
    image = np.zeros((400, 200, 4), np.uint16)
    image[..., 0], image[..., 1], image[..., 2] = 1000, 3000, np.linspace(0, 6000, 200).astype(np.uint16)
    counts = np.zeros((4, 65536), np.int64)
    counts[:, [1000, 2000, 3000]] = 1
    folder = write_set(
        tmp_path / "set", [codecs.encode_tiff(image)] * 5, bands=tuple("abcd"), dtype="uint16", counts=counts
    )
    source = records.open_split(folder, "train")
    shown = survey.thumbnails(source, [0, 1, 2], 3, seed=0)
    assert [found.size for found in shown] == [(200, 400)] * 3 and len({found.number for found in shown}) == 3
    pixels = np.asarray(Image.open(io.BytesIO(shown[0].jpeg))).astype(int)
    assert pixels.shape == (160, 80, 3)
    assert pixels[..., 0].max() < 25 and pixels[..., 1].min() > 230  # chroma of JPEG is coarse
    assert pixels[80, 5, 2] < 30 and pixels[80, 40, 2] > 220
    monkeypatch.setattr(survey, "MOST_RECORDS", 2)
    found = survey.survey(source, seed=0)
    assert (found.looked, found.total, found.sizes) == (2, 5, {(200, 400): 2})
    assert survey.shown_bands(source.info, None) == [0, 1, 2] and survey.shown_bands(source.info, "d") == [3, 3, 3]


def test_many_sizes_are_counted_in_steps():
    found = survey.Survey(300)
    found.sizes.update((40 + i, 30) for i in range(300))
    text = browse._sizes(found)
    assert "300 sizes: width 40 to 339 px, height 30 to 30 px" in text
    assert sum(map(int, re.findall(r'"count">(\d+)<', text))) == 300
    assert html.bars([("nothing", 0)]).count("width:0.00%") == 1


def test_every_command_replaces_its_own_files_alone(sound, tmp_path, in_process):
    page, found, out = tmp_path / "page.html", tmp_path / "found.json", tmp_path / "out"
    commands = {
        page: lambda: browse.main([str(sound), "--output", str(page)]),
        found: lambda: verify.main([str(sound), "--json", str(found)]),
        out / "train.statistics.csv": lambda: stats.main([str(sound), "--split", "train", "--output", str(out)]),
        out / "train.statistics.json": lambda: stats.main([str(sound), "--split", "train", "--output", str(out)]),
        out / "train.histograms.png": lambda: stats.main([str(sound), "--split", "train", "--output", str(out)]),
    }
    for file, command in commands.items():
        command()
        command()  # over its own output
        file.write_bytes(b"my notes")
        with pytest.raises(UserError, match=f"{file.name} already exists and was not written by this command"):
            command()
        assert file.read_bytes() == b"my notes"
        file.unlink()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_no_temporary_file(sound, tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, step, full)
    for command in (
        lambda: browse.main([str(sound), "--output", str(out / "page.html")]),
        lambda: stats.main([str(sound), "--output", str(out / "statistics")]),
    ):
        with pytest.raises(UserError, match="cannot write .*: No space left on device; free disk space"):
            command()
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_bad_input_is_one_sentence_and_leaves_nothing(sound, tmp_path, in_process):
    toy = pathlib.Path(toy_data.write(tmp_path / "toy", images=4))
    (toy / statistics.file_name("train")).unlink()
    out = str(tmp_path / "page.html")
    nowhere = str(tmp_path / "nowhere/page.html")
    cases = [
        (verify, [str(tmp_path / "nowhere")], "does not exist; make one with"),
        (verify, [str(tmp_path)], "has no info.json"),
        (verify, [str(sound), "--split", "test"], "has no split 'test'; it has train"),
        (verify, [str(sound), "--workers", "0"], "--workers is 0"),
        (verify, [str(sound), "--json", nowhere], "--json .* does not exist"),
        (stats, [str(toy)], "train.histogram.npz cannot be read"),
        (stats, [str(sound), "--output", str(sound / "info.json")], "cannot write to .*info.json"),
        (browse, [str(toy), "--output", out], "train.histogram.npz cannot be read"),
        (browse, [str(sound), "--output", nowhere], "--output .* is a folder, or its folder does not exist"),
        (browse, [str(sound), "--output", str(tmp_path)], "is a folder"),
        (
            browse,
            [str(sound), "--output", out, "--bands", "red,nir,blue"],
            "unknown band 'nir'; the dataset has red, green",
        ),
        (browse, [str(sound), "--output", out, "--bands", "red,blue"], "has 2 bands; expected three"),
        (browse, [str(sound), "--output", out, "--images", "-1"], "--images is -1"),
        (browse, [str(sound), "--output", out, "--seed", "-1"], "--seed is -1"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for module, args, sentence in cases:
        with pytest.raises(UserError, match=sentence) as error:
            module.main(args)
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
