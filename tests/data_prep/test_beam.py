"""The Beam converter writes the same files as the local one. Run by `make test-beam`, in an environment without JAX."""

import functools
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from data_prep import beam, images, scenes
from data_prep.convert import beam_jobs, folder, pixels, shards, split_plan
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records, statistics

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
ROOT = pathlib.Path(__file__).resolve().parents[2]
DIRECT = ["--runner=DirectRunner"]
run_on_beam = functools.partial(beam_jobs.run_jobs, options=DIRECT)
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="Apache Beam is not installed: make test-beam")


def encode(values: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What is kept and what is stored anew: JPEG, PNG, TIFF, WebP, GIF, gray, alpha, 16 bit; and a corrupt file."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(3)
    for i in range(30):
        values = rng.integers(0, 256, (rng.integers(20, 90), rng.integers(20, 40), 3), np.uint8)
        deep = values[..., 0].astype(np.uint16) * 257
        name, content = [
            ("kept.jpg", encode(values, "JPEG")), ("kept.png", encode(values, "PNG")),
            ("anew.tif", encode(values, "TIFF", compression="tiff_lzw")), ("anew.webp", encode(values, "WEBP")),
            ("gray.jpg", encode(values[..., 0], "JPEG")), ("deep.png", encode(deep, "PNG")),
            ("deep.tif", encode(deep, "TIFF")), ("alpha.png", encode(np.dstack([values, values[..., 0]]), "PNG")),
        ][i % 8]  # fmt: skip
        place = root / ("town" if i % 2 else "field") / f"{i:02d}.{name}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    (root / "field/00.cut.jpg").write_bytes(encode(values, "JPEG")[:300])
    return root


def convert(tree, output, *extra, driver=shards.run_jobs, split="train"):
    args = ["--input", tree, "--output", output, "--split", split, "--shard-size", 6, *extra]
    images.main([str(arg) for arg in args], driver=driver)


@needs_beam
@pytest.mark.parametrize("extra", [(), ("--max-side", "24", "--jpeg-quality", "85")], ids=["as they are", "reduced"])
def test_both_drivers_and_both_environments_write_the_same_folder(tree, tmp_path, extra):
    import tensorflow_datasets

    convert(tree, tmp_path / "local/set", *extra, "--workers", 1)
    convert(tree, tmp_path / "beam/set", *extra, driver=run_on_beam)
    expected = contents(tmp_path / "local")
    assert contents(tmp_path / "beam") == expected and len(expected) == 13  # 6 shards and 7 files about them
    source = records.open_split(tmp_path / "beam/set", "train")
    found = [records.decode_record(source.read(i)) for i in range(len(source))]
    assert len(found) == 30 and {record.label for record in found} == {0, 1}
    report = json.loads(expected["set/train.report.json"])
    assert [entry["key"] for entry in report["failed"]["first"]] == ["field/00.cut.jpg"]
    theirs = tensorflow_datasets.builder_from_directory(tmp_path / "beam/set").as_data_source("train")
    for record, example in zip(found, theirs, strict=True):
        np.testing.assert_array_equal(example["image"], codecs.decode_image(record.image))
    assert "tensorflow" not in sys.modules

    program = ROOT / ".venv/bin/python"  # its Pillow is newer
    if not program.exists():
        pytest.skip("no .venv to compare with: make test-beam makes it")
    args = ["--input", tree, "--output", tmp_path / "main/set", "--split", "train", "--shard-size", 6, *extra]
    command = [str(arg) for arg in (program, "-m", "data_prep.images", *args)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert contents(tmp_path / "main") == expected


@needs_beam
def test_scenes_come_out_the_same(tmp_path):
    import rasterio

    values = np.random.default_rng(8).integers(1, 9000, (4, 90, 130)).astype(np.uint16)
    profile = {"driver": "GTiff", "width": 130, "height": 90, "count": 4, "dtype": "uint16", "crs": "EPSG:32633",
               "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)}  # fmt: skip
    with rasterio.open(tmp_path / "a.tif", "w", **profile) as file:
        file.write(values)
    args = ["--input", tmp_path / "a.tif", "--split", "train", "--tile", 32, "--gsd", 15, "--shard-size", 2, "--output"]
    scenes.main([str(arg) for arg in (*args, tmp_path / "local/set", "--workers", 1)])
    beam.main(["scenes", *map(str, args), str(tmp_path / "beam/set"), "--", *DIRECT])
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")
    assert len(records.open_split(tmp_path / "beam/set", "train")) == 6


@needs_beam
def test_the_command_runs_on_worker_processes(tree, tmp_path):
    """Workers import the package anew, and know paths only as they are given."""
    convert(tree, tmp_path / "local/set", "--workers", 1)
    (tmp_path / "here").symlink_to(tree)
    args = ["images", "--input", "here", "--output", "beam/set", "--split", "train", "--shard-size", "6"]
    options = [*DIRECT, "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    command = [sys.executable, "-m", "data_prep.beam", *args, "--", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "30 records" in done.stdout and contents(tmp_path / "beam") == contents(tmp_path / "local")


def store_bands(item: shards.Item) -> pixels.Stored:
    """A tile of five bands of uint16 that depends on its number only."""
    values = np.random.default_rng(item.part[0]).integers(0, 10_000, (16, 24, 5)).astype(np.uint16)
    place = json.dumps({"crs": "EPSG:32633", "bounds": [item.part[0], 0, 1, 1]})
    content = pixels.content_hash(values.tobytes())
    return pixels.Stored(codecs.encode_tiff(values), statistics.count(values), ("tile",), content, place=place)


def bands_split(output: pathlib.Path) -> split_plan.Split:
    items = [shards.Item("scene.tif", f"scene.tif#{i}", None, 0, (i,)) for i in range(20)]
    bands = ["B2", "B3", "B4", "B8", "B11"]
    return split_plan.Split(output, "tiles", "train", bands, "uint16", None, True, items, 4, "source")


def write_bands(output: pathlib.Path, run=shards.run_jobs, convert=store_bands) -> None:
    folder.write_split(bands_split(output), convert, workers=1, run=run, max_corrupt_fraction=0.05)


@needs_beam
def test_bands_come_out_the_same(tmp_path):
    import tensorflow_datasets

    write_bands(tmp_path / "local/tiles")
    write_bands(tmp_path / "beam/tiles", run_on_beam)
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")
    theirs = tensorflow_datasets.builder_from_directory(tmp_path / "beam/tiles").as_data_source("train")
    for i, example in enumerate(theirs):
        expected = store_bands(bands_split(tmp_path).items[i])
        assert (example["image"], example["place"].decode()) == (expected.data, expected.place)
    assert len(theirs) == 20 and "tensorflow" not in sys.modules


def fail_late(item: shards.Item, marker: str) -> pixels.Stored:
    if item.part[0] == 17 and os.path.exists(marker):
        raise OSError(28, os.strerror(28), item.path)
    return store_bands(item)


@needs_beam
def test_a_pipeline_that_failed_goes_on_after_finished_shards(tmp_path):
    marker, out = tmp_path / "full", tmp_path / "beam/tiles"
    marker.touch()
    converting = functools.partial(fail_late, marker=str(marker))
    with pytest.raises(UserError, match="the pipeline failed: .*No space left on device.*resume after") as caught:
        write_bands(out, run_on_beam, converting)
    assert "\n" not in str(caught.value)
    partial = out / ".train.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*-of-00004")}
    assert 0 < len(kept) < 4 and not list(partial.glob("*.job")) and not list(partial.glob("*.tmp"))
    marker.unlink()
    write_bands(out, run_on_beam, converting)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    write_bands(tmp_path / "local/tiles")
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


if HAS_BEAM:
    from apache_beam.runners import runner
    from apache_beam.runners.direct.direct_runner import DirectRunner

    class AwayResult(runner.PipelineResult):
        canceled = 0

        def cancel(self):
            AwayResult.canceled += 1
            self._state = runner.PipelineState.CANCELLED

    class AwayRunner(runner.PipelineRunner):
        """Returns before the end, as a cluster does; `--job_name=lost` does nothing and fails, `stuck` never ends."""

        def run_pipeline(self, pipeline, options):
            result = AwayResult(runner.PipelineState.RUNNING)
            name = options.get_all_options()["job_name"]

            def work():
                if name != "lost":
                    DirectRunner().run_pipeline(pipeline, options)
                result._state = runner.PipelineState.FAILED if name == "lost" else runner.PipelineState.DONE

            if name == "stuck":
                DirectRunner().run_pipeline(pipeline, options)
            else:
                threading.Thread(target=work, daemon=True).start()
            return result


def run_away(name: str):
    return functools.partial(beam_jobs.run_jobs, options=["--runner=test_beam.AwayRunner", f"--job_name={name}"])


@needs_beam
def test_runners_that_return_at_once(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_jobs, "_INTERVAL", 0.05)
    write_bands(tmp_path / "away/tiles", run_away("sound"))
    write_bands(tmp_path / "local/tiles")
    assert contents(tmp_path / "away") == contents(tmp_path / "local")
    with pytest.raises(UserError, match="ended as FAILED without shard tiles-train"):
        write_bands(tmp_path / "lost/tiles", run_away("lost"))
    assert not (tmp_path / "lost").exists() and AwayResult.canceled == 0
    with pytest.raises(UserError, match="cannot be decoded"):  # found while the pipeline runs, which ends it
        convert(tree, tmp_path / "stuck/set", "--max-corrupt-fraction", 0, driver=run_away("stuck"))
    assert AwayResult.canceled == 1


@needs_beam
def test_a_job_that_is_given_twice_is_written_once(tmp_path):
    job = bands_split(tmp_path / "tiles").job(1)
    job.folder.mkdir(parents=True)
    file = str(beam_jobs._write_job_file(job, store_bands))
    assert beam_jobs.write_job(file) == job.shard
    written = (job.folder / job.shard).stat().st_mtime_ns
    beam_jobs.write_job(file)
    assert (job.folder / job.shard).stat().st_mtime_ns == written
    (job.folder / job.shard).unlink()  # its part file alone is no finished shard
    beam_jobs.write_job(file)
    assert shards.Part.load(job.folder, job.shard).records == 5 and (job.folder / job.shard).exists()


@needs_beam
def test_bad_options_are_one_sentence_and_leave_nothing(tree, tmp_path):
    own = ["images", "--input", str(tree), "--output", str(tmp_path / "out"), "--split", "train"]
    with pytest.raises(UserError, match="Unexpected pipeline runner: Nope"):
        beam.main([*own, "--", "--runner=Nope"])
    with pytest.raises(UserError, match="--workers only applies to local processes"):
        beam.main([*own, "--workers=2", "--", *DIRECT])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(HAS_BEAM, reason="Apache Beam is installed")
def test_without_beam_the_extra_is_named(tree, tmp_path):
    args = ["--input", str(tree), "--output", str(tmp_path / "out"), "--split", "train", "--", *DIRECT]
    with pytest.raises(UserError, match=r"requirements-beam.txt, or install the extra pera_jax\[beam\]"):
        beam.main(["images", *args])
    assert not (tmp_path / "out").exists()
