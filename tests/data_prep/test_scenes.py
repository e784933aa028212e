"""Tiling of GeoTIFF scenes: generated scenes of every kind, and real ones if available."""

import functools
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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import scenes
from data_prep.geo import scene_file, scene_reader
from data_prep.geo.scene_grid import Grid, length
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records, statistics

rasterio = pytest.importorskip("rasterio", reason="the extra `scenes` is not installed")
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.windows import Window  # noqa: E402
from toy_scenes import NORTH_UP, cut, values, write  # noqa: E402

GEOTIFFS = pathlib.Path(os.environ.get("PERA_JAX_GEOTIFFS", pathlib.Path(__file__).parents[3] / "shared/data/geotiff"))
pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),
]  # of affine, to rasterio itself


command = functools.partial(toy_commands.run, scenes.main)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- where tiles lie


@given(st.integers(1, 400), st.integers(1, 100), st.integers(1, 150))
def test_tiles_lie_inside_and_leave_out_less_than_half_a_stride(side, tile, stride):
    grid = Grid.from_sides((side, 7), None, length(str(tile)), length(str(stride)), None)
    tiles = [grid.tile(place) for place in range(grid.number)]
    columns = sorted({column for column, *_ in tiles})
    widths = {width for _, _, width, _ in tiles}
    assert widths == {min(side, tile)} and columns[0] == 0 and columns[-1] + min(side, tile) <= side
    assert all(after - before == stride for before, after in zip(columns, columns[1:-1], strict=False))
    if side > tile:
        assert 2 * (side - tile - columns[-1]) < stride  # what is left out
        assert len(columns) < 2 or 2 * (columns[-1] - columns[-2]) >= stride  # no tile but a little moved


def test_meters_become_pixels_and_a_near_ground_sample_distance_keeps_the_scene():
    grid = Grid.from_sides((1000, 500), (5.0, 10.0), length("320m"), length("160m"), None)
    assert (grid.tile_sides, grid.stride, grid.step) == ((64, 32), (32, 16), (1.0, 1.0))
    grid = Grid.from_sides((1000, 500), (5.0, 10.0), length("320m"), length("16"), 20.0)
    assert (grid.tile_sides, grid.stride, grid.step, grid.sides) == ((16, 16), (16, 16), (4.0, 2.0), (250, 250))
    assert Grid.from_sides((101, 100), (9.9948, 9.9974), length("50"), length("50"), 10.0).step == (1.0, 1.0)


def meters(tmp_path, crs, transform):
    path = tmp_path / f"{time.monotonic_ns()}.tif"
    return scene_reader.describe(str(write(path, values((1, 64, 64)), crs=crs, transform=transform))).meters


def test_pixels_are_measured_on_the_ground(tmp_path):
    """A degree of latitude has 111.41 km at 60 degrees north, one of longitude 55.80 km (tables of WGS84)."""
    degrees = rasterio.Affine(0.001, 0, 24.968, 0, -0.001, 60.032)
    np.testing.assert_allclose(meters(tmp_path, "EPSG:4326", degrees), (55.80, 111.41), rtol=1e-4)
    mercator = rasterio.Affine(10, 0, 2_782_987, 0, -10, 8_400_057)  # 60 degrees north, where it doubles
    np.testing.assert_allclose(meters(tmp_path, "EPSG:3857", mercator), (5.0, 5.0), rtol=4e-3)
    turned = rasterio.Affine(3, 4, 500_000, 4, -3, 4_000_000)
    assert meters(tmp_path, "EPSG:32633", turned) == (5.0, 5.0)
    feet = rasterio.Affine(10, 0, 6_000_000, 0, -10, 2_000_000)
    np.testing.assert_allclose(meters(tmp_path, "EPSG:2227", feet), (3.048006, 3.048006), rtol=1e-6)
    assert meters(tmp_path, None, NORTH_UP) is None


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    "dtype, bands, options",
    [("uint8", 4, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}),
     ("uint16", 13, {"interleave": "band", "compress": "lzw"}), ("float32", 2, {}), ("uint8", 3, {"bigtiff": "yes"}),
     ("uint8", 1, {})],
)  # fmt: skip
def test_tiles_hold_the_pixels_of_their_windows(tmp_path, dtype, bands, options):
    pixels = values((bands, 70, 90), dtype)
    cuts, _ = cut([write(tmp_path / "a.tif", pixels, **options)])
    assert sorted(cuts) == [f"a.tif/{row:06d}_{column:06d}" for row in (0, 32) for column in (0, 32, 58)]
    for key, tile in cuts.items():
        row, column = (int(number) for number in key.split("/")[1].split("_"))
        window = pixels[:, row : row + 32, column : column + 32]
        np.testing.assert_array_equal(np.moveaxis(tile.pixels, 2, 0), window)
        assert np.all(tile.stored.histogram == statistics.count(np.moveaxis(window, 0, 2)))
        assert tile.place["window"] == [column, row, 32, 32] and tile.place["source"] == "a.tif"
        assert tile.pixels.dtype == dtype and tile.stored.changes == ()
        assert tile.stored.data.startswith(b"\x89PNG" if (dtype, bands) == ("uint8", 3) else b"II*\0")


@pytest.mark.parametrize("step", [(2, 2), (2.5, 3.3), (1.7, 1.0)])
def test_larger_pixels_are_means_weighed_by_area_without_what_is_no_data(tmp_path, step):
    pixels = values((2, 120, 120), "float32")
    pixels[0, 20:44, 30:50] = -9999
    transform = rasterio.Affine(60 / step[0], 0, 0, 0, -60 / step[1], 0)
    cuts, _ = cut(
        [write(tmp_path / "a.tif", pixels, transform=transform, nodata=-9999)], "12", gsd=60.0, max_nodata=0.99
    )

    def weights(step):
        edges = np.arange(int(120 / step + 1e-6) + 1)[:, None] * step
        left, right = np.maximum(edges[:-1], np.arange(120)), np.minimum(edges[1:], np.arange(1, 121))
        return np.maximum(right - left, 0)

    across, down = weights(step[0]), weights(step[1])
    valid = (pixels != -9999).astype(float)
    area = down @ valid @ across.T
    mean = np.where(area > 1e-9, (down @ (pixels * valid) @ across.T) / np.maximum(area, 1e-9), 0)
    assert len(cuts) >= 12
    for key, tile in cuts.items():
        row, column = (int(number) for number in key.split("/")[1].split("_"))
        part = np.s_[:, row : row + 12, column : column + 12]
        if tile.stored is None:
            assert (area[part] < 1e-9).all(axis=(1, 2)).any()
            continue
        np.testing.assert_allclose(np.moveaxis(tile.pixels, 2, 0), mean[part], rtol=1e-5)
        held = [counts.sum() for _, counts in map(statistics.table, tile.stored.histogram)]
        assert held == (area[part] > 1e-9).sum(axis=(1, 2)).tolist()
        assert tile.place["pixel_metres"] == [60, 60] and "resampled" in tile.stored.changes
        assert tile.place["transform"] == pytest.approx([60, 0, 60 * column, 0, -60, -60 * row])


def test_overviews_in_the_file_are_not_read_and_smaller_pixels_join_without_a_seam(tmp_path):
    path = write(tmp_path / "a.tif", values((1, 64, 64), "float32"))
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.nearest)
    (small,) = cut([path], "16", gsd=40.0)[0].values()
    with rasterio.open(path) as file:
        pixels = file.read(1)
        fine = file.read(1, out_shape=(128, 128), resampling=rasterio.enums.Resampling.cubic)
    np.testing.assert_allclose(small.pixels[..., 0], pixels.reshape(16, 4, 16, 4).mean(axis=(1, 3)), rtol=1e-5)
    for key, tile in cut([path], "32", gsd=5.0)[0].items():
        row, column = (int(number) for number in key.split("/")[1].split("_"))
        np.testing.assert_allclose(tile.pixels[..., 0], fine[row : row + 32, column : column + 32], rtol=1e-5)


def masked(tmp_path, kind):
    """A scene [3, 32, 32] with no data in rows 0 to 3 of all bands, and of band 2 in row 4 where bands differ in
    that."""
    dtype = "float32" if kind in ("NaN", "nodata of floats") else "uint16" if kind == "alpha of uint16" else "uint8"
    pixels = values((3, 32, 32), dtype)
    expected = np.ones((3, 32, 32), bool)
    expected[:, :4] = False
    options = {}
    if kind in ("NaN", "nodata", "nodata of floats"):
        expected[1, 4] = False
        mark = {"NaN": np.nan, "nodata": 0, "nodata of floats": -3.4e38}[kind]
        pixels[~expected] = mark
        options = {} if kind == "NaN" else {"nodata": mark}
        if kind == "NaN":
            pixels[1, 4, :9] = [np.inf, -np.inf, np.nan] * 3
    path = tmp_path / "a.tif"
    if kind.startswith("alpha"):
        alpha = expected[0] * (np.iinfo(dtype).max - 3)
        alpha[10] = 1  # nearly transparent still is data
        return (
            write(path, np.concatenate([pixels, alpha[None].astype(dtype)]), photometric="RGB", alpha="yes"),
            pixels,
            expected,
        )
    write(path, pixels, **options)
    if kind == "mask":
        with rasterio.open(path, "r+") as file:
            file.write_mask(expected[0])
    return path, pixels, expected


@pytest.mark.parametrize("kind", ["NaN", "nodata", "nodata of floats", "alpha", "alpha of uint16", "mask"])
def test_what_is_no_data_is_stored_as_0_not_counted_and_rejected_where_it_is_much(tmp_path, kind):
    path, pixels, expected = masked(tmp_path, kind)
    share = float(1 - expected.mean(axis=(1, 2)).min())
    (tile,) = cut([path], max_nodata=share)[0].values()
    least = np.minimum(pixels.min(axis=(1, 2), where=expected, initial=0), 0)[:, None, None]
    np.testing.assert_array_equal(np.moveaxis(tile.pixels, 2, 0), np.where(expected, pixels, least))
    whole = np.moveaxis(pixels, 0, 2)
    assert np.all(tile.stored.histogram == statistics.count(whole, np.moveaxis(expected, 0, 2)))
    assert tile.stored.changes == ("nodata to 0",)
    assert [tile.stored for tile in cut([path], max_nodata=share - 1e-6)[0].values()] == [None]


def test_a_band_without_any_data_is_rejected_whatever_the_share(tmp_path):
    pixels = values((2, 32, 32))
    pixels[1] = 0
    assert [tile.stored for tile in cut([write(tmp_path / "a.tif", pixels, nodata=0)], max_nodata=1.0)[0].values()] == [
        None
    ]


# ---------------------------------------------------------------- bands


def test_bands_are_chosen_by_number_and_name_in_each_scene(tmp_path):
    pixels = values((4, 32, 32), "uint8")
    one = write(tmp_path / "one.tif", pixels, ("red", "green", "blue", "nir"))
    two = write(tmp_path / "two.tif", pixels[::-1], ("nir", "blue", "green", "red"))
    cuts, names = cut([one, two], bands=["nir", "red"])
    assert names == ["nir", "red"]
    for tile in cuts.values():
        np.testing.assert_array_equal(np.moveaxis(tile.pixels, 2, 0), pixels[[3, 0]])
    assert cut([one], bands=["4", "red"])[1] == ["nir", "red"]
    assert cut([one], names=["a", "b", "c", "d"], bands=["d", "1"])[1] == ["d", "a"]
    bare = write(tmp_path / "bare.tif", pixels)
    assert cut([bare])[1] == ["band_1", "band_2", "band_3", "band_4"]
    colored = write(tmp_path / "color.tif", pixels, photometric="RGB", alpha="yes")
    assert cut([colored])[1] == ["red", "green", "blue"]
    both = cut([colored], names=["r", "g", "b", "n"], bands=["n", "1"])
    assert both[1] == ["n", "r"] and np.array_equal(
        np.moveaxis(both[0]["color.tif/000000_000000"].pixels, 2, 0), pixels[[3, 0]]
    )
    described = write(tmp_path / "described.tif", pixels, ("r", "g", "b", "nir"), photometric="RGB", alpha="yes")
    assert cut([described])[1] == ["r", "g", "b", "nir"]
    with rasterio.open(bare, "r+") as file:
        file.colorinterp = [ColorInterp.nir, ColorInterp.rededge, ColorInterp.rededge, ColorInterp.undefined]
    scene_file.opened.cache_clear()
    assert cut([bare])[1] == ["nir", "band_2", "band_3", "band_4"]


# ---------------------------------------------------------------- place


@pytest.mark.parametrize(
    "crs, transform",
    [("EPSG:32633", NORTH_UP), ("EPSG:4326", rasterio.Affine(1e-4, 0, 13.5, 0, -1e-4, 45.5)),
     ("EPSG:32633", rasterio.Affine(10, 0, 500_000, 0, 10, 4_000_000)),
     ("EPSG:32633", rasterio.Affine(8, 6, 500_000, 6, -8, 4_000_000)),
     ("+proj=laea +lat_0=12 +lon_0=34 +datum=WGS84 +units=m", NORTH_UP)],
    ids=["north up", "geographic", "south up", "turned", "no EPSG code"],
)  # fmt: skip
def test_place_says_where_a_tile_lies(tmp_path, crs, transform):
    path = write(tmp_path / "deep/x_2020-08-31.tif", values((1, 64, 64)), crs=crs, transform=transform)
    place = cut([tmp_path])[0]["deep/x_2020-08-31.tif/000032_000000"].place
    with rasterio.open(path) as file:
        assert place["transform"] == pytest.approx(list(file.window_transform(Window(0, 32, 32, 32))[:6]), rel=1e-14)
        corners = [file.transform * corner for corner in ((0, 32), (32, 32), (0, 64), (32, 64))]
        assert rasterio.CRS.from_user_input(place["crs"]) == file.crs
        assert (place["crs"] == crs) == crs.startswith("EPSG")
    xs, ys = zip(*corners, strict=True)
    assert place["bounds"] == pytest.approx([min(xs), min(ys), max(xs), max(ys)], rel=1e-14)
    assert place["date"] == "2020-08-31" and place["source"] == "deep/x_2020-08-31.tif"
    assert place["pixel_metres"] == pytest.approx([10, 10], rel=0.3)


@pytest.mark.parametrize(
    "name, stamp, date",
    [("naip_20200831.tif", "2021:01:02 03:04:05", "2020-08-31"), ("HLS.S30.T13RCN.2020208T.tif", "", "2020-07-26"),
     ("LC08_L1TP_042034_20130605_20170310_01.tif", "", "2013-06-05"),
     ("tile_99999999.tif", "2021:01:02 03:04:05", "2021-01-02"),
     ("x_20201331.tif", "", None), ("x.tif", "today", None)],
)  # fmt: skip
def test_dates(tmp_path, name, stamp, date):
    path = write(tmp_path / name, values((1, 32, 32)), tags={"TIFFTAG_DATETIME": stamp} if stamp else {})
    (tile,) = cut([path])[0].values()
    assert tile.place.get("date") == date


def test_a_picture_without_georeference_has_only_its_window(tmp_path):
    Image.fromarray(np.moveaxis(values((3, 32, 32), "uint8"), 0, 2)).save(tmp_path / "a.png")
    (tile,) = cut([tmp_path / "a.png"])[0].values()
    assert tile.place == {"source": "a.png", "window": [0, 0, 32, 32]}


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three scenes of 100 tiles each, and a text."""
    root = tmp_path_factory.mktemp("three")
    for number in range(3):
        write(root / f"{number}/s.TIF", values((2, 160, 160), seed=number))
    (root / "notes.txt").write_text("x")
    return root


def test_every_shard_holds_tiles_of_all_scenes_and_a_killed_conversion_goes_on_to_the_same_bytes(three, tmp_path):
    args = ["--input", three, "--split", "train", "--tile", "16", "--shard-size", "30", "--output"]
    done = command(*args, tmp_path / "whole/set", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "300 tiles of 3 scenes, band_1, band_2 of uint16" in done.stdout
    source = records.open_split(tmp_path / "whole/set", "train")
    assert source.info.has_places and source.info.class_names is None and source.split_info.shard_records == [30] * 10
    keys = [records.decode_record(source.read(i)).key for i in range(300)]
    assert len(set(keys)) == 300
    for shard in range(10):
        assert {key.split("/")[0] for key in keys[30 * shard : 30 * shard + 30]} == {"0", "1", "2"}
    report = json.loads((tmp_path / "whole/set/train.report.json").read_text())
    assert report["written"] == 300 and list(report["rejected"]["reasons"]) == ["ending .txt"]

    out = tmp_path / "killed/set"
    process = subprocess.Popen(  # it gives way, so that it is not done before the kill
        ["nice", sys.executable, "-m", "data_prep.scenes", *map(str, args), str(out), "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list((out / ".train.partial").glob("*-of-00010.json"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    scenes.main([str(arg) for arg in (*args, out, "--workers", "1")])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_scene_larger_than_memory_is_read_by_windows(tmp_path):
    """9 GB of pixels, nearly all of them not in the file, also where each tile spans 6,000 pixels."""
    with rasterio.open(tmp_path / "big.tif", "w", driver="GTiff", width=60_000, height=50_000, count=3, dtype="uint8",
                       tiled=True, blockxsize=512, blockysize=512, sparse_ok=True, crs="EPSG:32633",
                       transform=rasterio.Affine(0.5, 0, 0, 0, -0.5, 0)) as file:  # fmt: skip
        file.write(values((3, 50, 50), "uint8"), window=Window(50_000, 40_000, 50, 50))
    program = f"""
import json
from data_prep import scenes
from data_prep.geo import scene_file, scene_place, scene_plan, scene_reader, scene_tiles
from data_prep.geo.scene_grid import length
files, _ = scene_plan.list_scenes([scene_plan.pathlib.Path({str(tmp_path / "big.tif")!r})])
found, _, _ = scene_plan.look_at(files, 0.0)
bands, _ = scene_plan.choose_bands(files, found, None, None)
for gsd, tile, key in ((None, "256", "040000_050000"), (50.0, "60", "000400_000500")):
    stride = length("10000" if gsd is None else "100")
    items, _ = scene_tiles.plan_tiles(files, found, {{}}, bands, length(tile), stride, gsd)
    (item,) = [item for item in items if item.key.endswith(key)]
    print(scenes.convert_tile(item, 0.0).histogram[:, 1:].sum())
# What getrusage says begins with the memory of the process that started this one.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    near, far, megabytes = map(int, done.stdout.split())
    assert near == 3 * 50 * 50 and far == 3
    assert megabytes < 400


def test_damaged_scenes_are_named_and_what_can_be_read_of_them_is_kept(tmp_path):
    options = {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate"}
    whole = write(tmp_path / "in/a.tif", values((2, 128, 128)), **options).read_bytes()
    bad = {"cut.tif": whole[: len(whole) * 2 // 3], "zero.tif": b"", "head.tif": whole[:60], "html.tif": b"<html>"}
    for name, content in bad.items():
        (tmp_path / "in" / name).write_bytes(content)
    args = ["--input", tmp_path / "in", "--output", tmp_path / "deep/out", "--split", "train", "--tile", "32"]
    refused = command(*args)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and not (tmp_path / "deep").exists()
    assert "3 of 5 scenes cannot be read (the first is " in refused.stderr.splitlines()[-1]
    done = command(*args, "--max-corrupt-fraction", 0.6)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "deep/out/train.report.json").read_text())
    failed = {entry["key"]: entry["reason"] for entry in report["failed"]["first"]}
    assert failed["zero.tif"] == "is empty" and {"head.tif", "html.tif"} < set(failed)
    parts = [key for key in failed if key.startswith("cut.tif/")]
    assert 3 <= len(parts) <= 8 and report["written"] == 32 - len(parts)


def bad_inputs(tmp_path):
    """{sentence: arguments}, each of which ends the command before anything is written."""
    pixels = values((4, 40, 40), "uint8")
    write(tmp_path / "four/a.tif", pixels, ("red", "green", "blue", "nir"))
    write(tmp_path / "mixed/a.tif", pixels)
    write(tmp_path / "mixed/b.tif", pixels.astype("uint16"))
    write(tmp_path / "bands/a.tif", pixels, ("red", "green", "blue", "nir"))
    write(tmp_path / "bands/b.tif", pixels[:3], ("red", "green", "blue"))
    write(tmp_path / "int16/a.tif", pixels.astype("int16"))
    with rasterio.open(write(tmp_path / "palette/a.tif", pixels[:1], photometric="palette"), "r+") as file:
        file.write_colormap(1, {0: (1, 2, 3, 255)})
    write(tmp_path / "lost/a.tif", pixels, crs=None, transform=rasterio.Affine.identity())
    write(tmp_path / "twin/a.tif", pixels)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.txt").write_text("x")
    for name in "ab":
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{name}.tif").write_text("<html>")
    return {
        "has no GeoTIFFs (names ending in tif tiff), but 1 other files": ["none"],
        "nowhere does not exist; pass GeoTIFFs": ["nowhere"],
        "2 of 2 scenes cannot be read (the first is ": ["text"],
        "a.tif has no band 'swir'; choose --bands from 1 red, 2 green, 3 blue, 4 nir": [
            "four",
            "--bands",
            "red,swir",
        ],
        "a.tif has no band '5'": ["four", "--bands", "5"],
        "selects a band of a.tif twice": ["four", "--bands", "red,1"],
        "a.tif has 4 bands, but --band-names has 2": ["four", "--band-names", "x,y"],
        "mixed/b.tif has values of uint16, but ": ["mixed"],
        "b.tif has the bands red, green, blue, but a.tif has red, green, blue, nir; choose common --bands": [
            "bands"
        ],
        "a.tif has values of int16, expected uint8, uint16, float32": ["int16"],
        "has a palette": ["palette"],
        "has no georeference, so lengths in meters cannot be used": ["lost/a.tif", "--gsd", "10"],
        "give --tile and --stride in pixels": ["lost", "--stride", "10m"],
        "--tile 41 is larger than every scene: the largest, ": ["four", "--tile", "41"],
        "--tile 500m is larger than every scene: the largest, ": ["four", "--tile", "500m"],
        "is smaller than a pixel of --gsd 1000; use a smaller --gsd": ["four", "--gsd", "1000"],
        "have the same name; rename one": ["four/a.tif,twin"],
        "overlap": ["four", "--output", str(tmp_path / "four/out")],
        "is not a valid split name": ["four", "--split", "all"],
    }


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path):
    cases = bad_inputs(tmp_path)
    before = contents(tmp_path)
    for sentence, (inputs, *options) in cases.items():
        paths = [str(tmp_path / name) for name in inputs.split(",")]
        with pytest.raises(UserError) as caught:
            scenes.main(
                ["--input", *paths, "--output", str(tmp_path / "out"), "--split", "train", "--tile", "20", *options]
            )
        assert sentence in str(caught.value) and "\n" not in str(caught.value), sentence
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_scenes_without_data_end_the_command_and_leave_nothing(tmp_path):
    write(tmp_path / "in/a.tif", np.zeros((1, 40, 40), np.uint8), nodata=0)
    done = command("--input", tmp_path / "in", "--output", tmp_path / "deep/out", "--split", "train", "--tile", 20)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "deep").exists()
    assert done.stderr.splitlines()[-1].startswith("error: no images are left of 4 (the first is a.tif/")


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match=r"pip install pera_jax\[scenes\]"):
        scenes.main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--split", "train", "--tile", "9"])


# ---------------------------------------------------------------- real scenes


REAL = {
    "sentinel2_13band_uint16": (50, 13, "uint16"), "hls_10band_float32": (112, 10, "float32"),
    "landsat7_6band": (128, 6, "uint8"), "landsat_pucallpa_2020_4band": (128, 4, "uint8"), "naip_": (256, 4, "uint8"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", REAL)
def test_real_scenes_become_shards_that_tensorflow_datasets_opens(prefix, tmp_path):
    import tensorflow_datasets as tfds

    tile, bands, dtype = REAL[prefix]
    files = sorted(GEOTIFFS.glob(f"{prefix}*.tif"))
    if not files:
        pytest.skip(f"no {prefix}*.tif in {GEOTIFFS}; name a folder in PERA_JAX_GEOTIFFS")
    out = tmp_path / "out"
    scenes.main(
        ["--input", *map(str, files), "--output", str(out), "--split", "train", "--tile", str(tile), "--workers", "1"]
    )
    source = records.open_split(out, "train")
    assert (len(source.info.bands), source.info.dtype) == (bands, dtype)
    found = [records.decode_record(source.read(i)) for i in range(len(source))]
    assert {record.key.split("/")[0] for record in found} == {file.name for file in files}
    for record in found:
        place = json.loads(record.place)
        with rasterio.open(GEOTIFFS / place["source"]) as file:
            window = Window(*place["window"])
            expected = np.moveaxis(file.read(window=window), 0, 2)
            valid = np.moveaxis(file.read_masks(window=window), 0, 2) > 0
            assert place["bounds"] == pytest.approx(rasterio.windows.bounds(window, file.transform), rel=1e-12)
            assert rasterio.CRS.from_string(place["crs"]) == file.crs
        np.testing.assert_array_equal(codecs.decode_image(record.image), np.where(valid, expected, 0))
    for record, example in zip(found, tfds.builder_from_directory(out).as_data_source("train"), strict=True):
        assert (example["image"], example["place"].decode()) == (record.image, record.place)
    assert "tensorflow" not in sys.modules
