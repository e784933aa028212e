"""Values of GeoTIFFs: nodata, scales, masks, overviews, control points; inconsistent and malicious files."""

import contextlib
import json
import os
import random
import sys
import types

import numpy as np
import pytest
import toy_commands
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import scenes, verify
from data_prep.convert import processes
from data_prep.convert.pixels import Rejected
from data_prep.geo import scene_file, scene_hints, scene_plan, scene_reader, scene_resample, scene_tiles
from data_prep.geo.scene_grid import length
from data_prep.inspect.check_shard import with_data
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records, statistics

rasterio = pytest.importorskip("rasterio", reason="the extra `scenes` is not installed")
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402
from rasterio.shutil import copy  # noqa: E402
from toy_scenes import NORTH_UP, cut, values, write  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),
]  # of affine, to rasterio itself


@pytest.fixture(autouse=True)
def inline_workers(monkeypatch):
    monkeypatch.setattr(processes, "run", toy_commands.in_this_process)


def convert(inputs, out, *options, tile=32):
    """The command in this process: (DatasetInfo of the split, {key: (pixels, place)}, report)."""
    arguments = ["--input", *inputs, "--output", out, "--split", "train", "--tile", tile, "--workers", 1, *options]
    scenes.main([str(argument) for argument in arguments])
    source = records.open_split(out, "train")
    found = [records.decode_record(source.read(i)) for i in range(len(source))]
    tiles = {record.key: (codecs.decode_image(record.image), json.loads(record.place)) for record in found}
    return source.split_info, tiles, json.loads((out / "train.report.json").read_text())


def drawn(kind, shape=(2, 64, 64)):
    rng = np.random.default_rng(0)
    low, high = {"decibels": (-25, -5), "sea bottom": (-6000, -100), "vegetation": (-0.3, 0.9), "heights": (5, 900)}[
        kind
    ]
    return rng.uniform(low, high, shape).astype(np.float32)


@pytest.mark.parametrize("mark", [-9999, np.nan, -3.4028234663852886e38, 0, 9999])
@pytest.mark.parametrize("kind", ["decibels", "sea bottom", "vegetation", "heights"])
def test_what_has_no_data_is_never_brighter_than_data_and_the_folder_says_how_much_there_is(
    tmp_path, capsys, kind, mark
):
    pixels = drawn(kind)
    pixels[:, :5], pixels[1, 40, 3:50] = mark, mark
    path = write(tmp_path / "a.tif", pixels, nodata=mark)
    info, tiles, report = convert([path], tmp_path / "out", "--max-nodata", "0.5")
    lost = np.isnan(pixels) if np.isnan(mark) else pixels == np.float32(mark)
    low, high = np.array(info.ranges).T
    truth = np.moveaxis(np.where(lost, np.nan, pixels), 0, 2)
    np.testing.assert_allclose(
        [low, high], np.nanpercentile(truth, (1, 99), axis=(0, 1)), atol=0.02 * (high - low).max()
    )
    whole = np.zeros((64, 64, 2), np.float32)
    for image, place in tiles.values():
        column, row, width, height = place["window"]
        whole[row : row + height, column : column + width] = image
        gone = np.moveaxis(lost, 0, 2)[row : row + height, column : column + width]
        if gone.any():
            assert place["no_data"]["pixels"] == gone.sum(axis=(0, 1)).tolist()
            for band, value in enumerate(place["no_data"]["values"]):
                assert (image[..., band][gone[..., band]] == np.float32(value)).all()
                assert not gone[..., band].any() or value <= image[..., band][~gone[..., band]].min()
    kept = ~np.isnan(truth)
    np.testing.assert_array_equal(whole[kept], truth[kept])
    mapped = np.clip((whole - low) / (high - low), 0, 1)
    assert mapped[~kept].max() < 0.4
    name = "nodata to 0" if kind == "heights" else "nodata to the minimum"
    assert report["changed"] == {name: sum("no_data" in place for _, place in tiles.values())}
    assert f"changed: {name} in " in capsys.readouterr().out
    checked = verify.verify(tmp_path / "out", None, 1)
    assert checked["sound"] and checked["splits"]["train"]["histogram"] == f"equal ({(~kept).sum():,} without data)"


def test_a_false_word_on_what_has_no_data_is_found():
    image = drawn("decibels")[:, :4, :4].transpose(1, 2, 0)
    for facts in (
        {},
        {"pixels": [1], "values": [0]},
        {"pixels": [1, 0], "values": ["x", 0]},
        {"pixels": [3, 0], "values": [0, 0]},
    ):
        with pytest.raises(ValueError, match="place does not give|nodata pixels in band"):
            with_data(image, facts)


# ---------------------------------------------------------------- resampling


def area_mean(pixels, valid, step):
    """The loop: mean and share of data of every new pixel, [H, W] each."""
    rows, columns = (int(side / step + 1e-9) for side in pixels.shape)
    mean, share = np.zeros((rows, columns)), np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            weight = 0.0
            for i in range(int(r * step), min(int(np.ceil((r + 1) * step)), pixels.shape[0])):
                for j in range(int(c * step), min(int(np.ceil((c + 1) * step)), pixels.shape[1])):
                    area = (min(i + 1, (r + 1) * step) - max(i, r * step)) * (
                        min(j + 1, (c + 1) * step) - max(j, c * step)
                    )
                    if valid[i, j] and area > 1e-9:
                        mean[r, c] += area * float(pixels[i, j])
                        weight += area
            mean[r, c] = mean[r, c] / weight if weight else 0
            share[r, c] = weight
    return mean, share > 1e-9


@pytest.mark.parametrize("kind", ["NaN beside -9999", "NaN", "infinite", "a mask and -9999", "an alpha band"])
@pytest.mark.parametrize("gsd", [20.0, 25.0])
def test_what_has_no_data_does_not_spread_when_pixels_grow(tmp_path, kind, gsd):
    pixels, rng = drawn("decibels", (1, 60, 60)), np.random.default_rng(1)
    valid = rng.random((60, 60)) < 0.8
    valid[10:20, 30:44] = False
    options = {"nodata": -9999} if "-9999" in kind else {}
    mark = {"NaN": np.nan, "infinite": np.inf}.get(kind, -9999)
    if kind != "an alpha band":
        pixels[0, ~valid] = mark
        pixels[0, 5, 5:9], valid[5, 5:9] = (np.nan if "NaN" in kind else mark), False
    path = tmp_path / "a.tif"
    if kind == "an alpha band":
        write(
            path,
            np.concatenate([pixels, 255.0 * valid[None]]).astype(np.float32),
            photometric="minisblack",
            alpha="yes",
        )
    else:
        write(path, pixels, **options)
    if kind.startswith("a mask"):
        masked = rng.random((60, 60)) < 0.9
        with rasterio.open(path, "r+") as file:
            file.write_mask(masked)
        valid &= masked
    expected, there = area_mean(np.where(valid, pixels[0], 0), valid, gsd / 10)
    side = len(expected)
    ((key, tile),) = cut([path], str(side), gsd=gsd, max_nodata=0.9)[0].items()
    np.testing.assert_allclose(tile.pixels[..., 0][there], expected[there], rtol=1e-5)
    assert tile.pixels[..., 0][~there].size == tile.place["no_data"]["pixels"][0] == (~there).sum() > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.4, 0.4), (0.7, 1.9), (0.5, 3.2), (1.0, 0.8)]), st.booleans())
def test_smaller_pixels_keep_planes_and_do_not_depend_on_blocks(seed, steps, constant):
    """Cubic convolution keeps constants everywhere, also beside what has no data, and planes inside."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :50] + 0.5
    plane = (np.full((40, 50), -17.25) if constant else 3 * columns - 2 * rows)[None]
    valid = rng.random((1, 40, 50)) < (0.7 if constant else 1.1)
    held = np.where(valid, plane, np.nan)

    def read(column, row, width, height):
        part = np.s_[:, row : row + height, column : column + width]
        return held[part], valid[part]

    size = int(50 / steps[0]), int(40 / steps[1])
    window = (0.0, 0.0, size[0] * steps[0], size[1] * steps[1])
    found, there = scene_resample.resample(read, (50, 40), window, *size, np.dtype(np.float32))
    down, across = ((np.arange(number) + 0.5) * step for number, step in zip(size[::-1], steps[::-1], strict=True))
    expected = np.full(found.shape[1:], -17.25) if constant else 3 * across[None] - 2 * down[:, None]
    inner = np.s_[:, 8:-8, 8:-8] if not constant else np.s_[:]
    np.testing.assert_allclose(
        found[inner][there[inner]],
        np.broadcast_to(expected, found.shape)[inner][there[inner]],
        atol=1e-4 if max(steps) <= 1 or constant else 0.05,
    )
    assert (found[~there] == 0).all() and there.any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_resample, "_SIDE", 7)
        again, also = scene_resample.resample(read, (50, 40), window, *size, np.dtype(np.float32))
    np.testing.assert_array_equal(also, there)
    np.testing.assert_allclose(again, found, atol=1e-5)


# ---------------------------------------------------------------- values that nobody declared


def test_fill_values_are_named_beforehand_and_can_be_declared(tmp_path, capsys):
    pixels = drawn("vegetation", (1, 128, 128))
    pixels[:, :8], pixels[:, -2:] = -9999, -32768
    path = write(tmp_path / "a.tif", pixels)
    info, _, _ = convert([path], tmp_path / "one")
    told = capsys.readouterr().out
    assert told.index("pass --nodata -9999:") < told.index("band ", told.index("train: 16 records"))
    assert "pass --nodata -32768:" in told and told.count("--nodata -9999") == 1 and info.ranges[0][0] < -9000
    info, tiles, report = convert([path], tmp_path / "two", "--nodata", "-9999", "-32768", "--max-nodata", "0.3")
    assert "--nodata" not in capsys.readouterr().out and -0.3 <= info.ranges[0][0] < -0.28
    assert min(image.min() for image, _ in tiles.values()) >= -0.3
    assert report["changed"]["nodata to the minimum"] == 8
    with pytest.raises(UserError, match=r"--nodata -9999 is not a value of uint16"):
        convert([write(tmp_path / "b.tif", values((1, 64, 64)))], tmp_path / "three", "--nodata", "-9999")


@pytest.mark.parametrize("kind, dtype, fill", [("dark", "uint8", 0), ("bright", "uint8", 255), ("reflectance", "uint16",
    0), ("decibels", "float32", 0)])  # fmt: skip
def test_patches_of_a_fill_value_amid_the_others_are_told(tmp_path, kind, dtype, fill):
    rng = np.random.default_rng(1)
    low, high = {"decibels": (-25, 0), "reflectance": (1, 4000)}.get(kind, (0, 256))
    pixels = rng.uniform(low, high, (2, 96, 96)).astype(dtype)

    def hints(pixels):
        path = write(tmp_path / f"{pixels.sum()}.tif", pixels)
        files, _ = scene_plan.list_scenes([path])
        found, unreadable, _ = scene_plan.look_at(files, 0.0)
        choices, _ = scene_plan.choose_bands(files, found, None, None)
        tiles, _ = scene_tiles.plan_tiles(files, found, unreadable, choices, length("48"), length("48"), None)
        return scene_hints.beforehand(tiles, dtype, ["one", "two"], ())[0]

    assert hints(pixels) == {}
    pixels[1, 10:40, 10:40] = fill  # of one band alone: a shadow, water, a saturated band
    assert hints(pixels) == {}
    pixels[0, 10:40, 10:40] = fill
    assert [(value, line.partition(";")[0]) for value, line in hints(pixels).items()] == [
        (fill, f"{900 / 96**2:.2%} of the pixels checked are {fill} in all bands, in patches")
    ]


@pytest.mark.parametrize("dtype, mark, found", [("float32", 1e20, True), ("uint16", 65535, True), ("uint16", 1, False),
    ("float32", 0.05, False)])  # fmt: skip
def test_hints_are_given_of_values_far_from_all_others_only(dtype, mark, found):
    pixels = (np.random.default_rng(0).gamma(3, 0.1, (200, 200, 1)) * (1 if dtype == "float32" else 3000)).astype(dtype)
    pixels[:3] = mark
    hints = scene_hints.fills(statistics.count(pixels), dtype, ["red"])
    assert list(hints) == ([pytest.approx(mark)] if found else [])


# ---------------------------------------------------------------- scale and offset


def scaled_pair(tmp_path):
    ground = np.random.default_rng(0).integers(200, 800, (2, 64, 64)).astype(np.uint16)
    for name, add in (("old", 0), ("new", 1000)):
        with rasterio.open(write(tmp_path / f"in/{name}.tif", ground + add), "r+") as file:
            file.scales, file.offsets = (1e-4, 1e-3), (-1e-4 * add, -1e-3 * add)
    return ground


def test_scales_that_differ_need_a_word_and_applied_ones_make_scenes_comparable(tmp_path, capsys):
    ground = scaled_pair(tmp_path)
    with pytest.raises(UserError, match="scale 0.0001 and offset -0.1 .*--scale apply .* or --scale ignore") as caught:
        convert([tmp_path / "in"], tmp_path / "out")
    assert "old.tif scale 0.0001 and offset -0" in str(caught.value) and not (tmp_path / "out").exists()
    info, tiles, report = convert([tmp_path / "in"], tmp_path / "out", "--scale", "apply")
    assert report["changed"] == {"scale and offset": 8}
    assert "scale and offset of 2 scenes are applied" in capsys.readouterr().out
    for image, place in tiles.values():
        column, row, width, height = place["window"]
        truth = ground[:, row : row + height, column : column + width] * np.array([1e-4, 1e-3])[:, None, None]
        assert image.dtype == np.float32
        np.testing.assert_allclose(np.moveaxis(image, 2, 0), truth, atol=1e-6)
    assert info.ranges[0][1] < 0.0801 and verify.verify(tmp_path / "out", None, 1)["sound"]
    _, tiles, _ = convert([tmp_path / "in"], tmp_path / "raw", "--scale", "ignore")
    assert "differ between the scenes and are not applied" in capsys.readouterr().out
    assert {int(image.min()) // 1000 for image, _ in tiles.values()} == {0, 1}
    write(tmp_path / "in/plain.tif", ground)
    convert([tmp_path / "in"], tmp_path / "three", "--scale", "apply")
    assert "3 scenes are applied: the values are float32, but 1 of them have none" in capsys.readouterr().out
    convert([tmp_path / "in/new.tif"], tmp_path / "same")
    assert "scale and offset of the files (0.0001 and -0.1, 0.001 and -1) are not applied" in capsys.readouterr().out


def test_scaled_scenes_may_hold_signed_numbers_and_know_no_data_before_they_are_scaled(tmp_path):
    pixels = np.random.default_rng(0).integers(-2000, 9000, (1, 32, 32)).astype(np.int16)
    pixels[0, :2], pixels[0, 2] = -32768, -28672
    with rasterio.open(write(tmp_path / "a.tif", pixels, nodata=-32768), "r+") as file:
        file.scales, file.offsets = (1e-4,), (0.5,)
    (tile,) = cut([tmp_path / "a.tif"], nodata=(-28672,), scaled=True)[0].values()
    np.testing.assert_allclose(tile.pixels[3:, :, 0], pixels[0, 3:] * 1e-4 + 0.5, atol=1e-6)
    assert tile.place["no_data"] == {
        "pixels": [96],
        "values": [tile.pixels[3:].min().item() if tile.pixels[3:].min() < 0 else 0],
    }


# ---------------------------------------------------------------- bands


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_overviews_change_neither_names_nor_what_is_infrared(tmp_path, interleave):
    pixels = values((4, 600, 600), "uint8")
    pixels[3, :200] = 0  # water is black in the infrared
    whole = write(
        tmp_path / "a.tif", pixels, ("r", "g", "b", "nir"), photometric="RGB", alpha="yes", interleave=interleave
    )
    with rasterio.open(whole, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.nearest)
    with rasterio.open(whole) as file:
        assert file.overviews(1) and file.colorinterp[3] == ColorInterp.alpha
    cuts, names = cut([whole], "600")
    assert names == ["r", "g", "b", "nir"]
    np.testing.assert_array_equal(np.moveaxis(cuts["a.tif/000000_000000"].pixels, 2, 0), pixels)
    copy(whole, tmp_path / "c.tif", driver="COG", blocksize=256, overviews="AUTO")
    cuts, names = cut([tmp_path / "c.tif"], "600")
    assert names == ["r", "g", "b", "nir"]
    np.testing.assert_array_equal(np.moveaxis(cuts["c.tif/000000_000000"].pixels, 2, 0), pixels)


def test_an_alpha_band_that_looks_like_a_band_is_named(tmp_path, capsys):
    write(tmp_path / "a.tif", values((4, 64, 64), "uint8"), photometric="RGB", alpha="yes")
    convert([tmp_path / "a.tif"], tmp_path / "out")
    assert "in the alpha band, so it may be an ordinary band" in capsys.readouterr().out


# ---------------------------------------------------------------- places


def points(function, side=64, step=16):
    return [GroundControlPoint(row, column, *function(column, row))
            for row in range(0, side + 1, step) for column in range(0, side + 1, step)]  # fmt: skip


def test_scenes_with_control_points_lie_where_these_say(tmp_path, capsys):
    straight = write(tmp_path / "in/a.tif", values((1, 64, 64)), transform=None, crs="EPSG:32633",
                     gcps=points(lambda c, r: (500_000 + 8 * c + 6 * r, 4_000_000 + 6 * c - 8 * r)))  # fmt: skip
    assert scene_reader.describe(str(straight)).meters == pytest.approx((10, 10), rel=1e-6)
    bent = write(tmp_path / "in/b.tif", values((1, 64, 64)), transform=None, crs="EPSG:32633",
                 gcps=points(lambda c, r: (500_000 + 10 * c + 0.05 * r * r, 4_000_000 - 10 * r)))  # fmt: skip
    _, tiles, _ = convert([straight, bent], tmp_path / "out", "--gsd", "20", tile="320m")
    assert "2 scenes are georeferenced by their ground control points" in capsys.readouterr().out
    assert {place["georeference"] for _, place in tiles.values()} == {"gcps"}
    place = tiles["a.tif/000016_000000"][1]
    assert place["bounds"] == pytest.approx([500_192, 3_999_488, 500_640, 3_999_936], abs=0.1)
    assert (
        place["transform"] == pytest.approx([16, 12, 500_192, 12, -16, 3_999_744], abs=0.1)
        and place["crs"] == "EPSG:32633"
    )
    place = tiles["b.tif/000016_000016"][1]
    assert "transform" not in place
    column, row, width, height = place["window"]
    assert width == pytest.approx(32, rel=0.01) and height == pytest.approx(32 / np.hypot(1, 0.32), rel=0.01)
    lower = row + height
    assert place["bounds"] == pytest.approx(
        [500_000 + 10 * column + 0.05 * row**2, 4_000_000 - 10 * lower,
         500_000 + 10 * (column + width) + 0.05 * lower**2, 4_000_000 - 10 * row], abs=0.5,
    )  # fmt: skip


def test_scenes_with_rpcs_lie_where_these_say_at_their_middle_height(tmp_path):
    """Line and sample are linear in latitude and longitude here."""
    one, linear = [1.0] + [0.0] * 19, lambda at: [1.0 if i == at else 0.0 for i in range(20)]
    rpcs = RPC(
        height_off=100, height_scale=500, lat_off=50.0, lat_scale=0.01, line_den_coeff=one,
        line_num_coeff=[-value for value in linear(2)], line_off=31.5, line_scale=32, long_off=10.0, long_scale=0.01,
        samp_den_coeff=one, samp_num_coeff=linear(1), samp_off=31.5, samp_scale=32,
    )  # fmt: skip
    path = write(tmp_path / "a.tif", values((1, 64, 64)), transform=None, crs=None)
    with rasterio.open(path, "r+") as file:
        file.rpcs = rpcs
    (tile, *_) = [tile for key, tile in cut([path], "64")[0].items()]
    assert tile.place["georeference"] == "rpcs" and tile.place["crs"] == "EPSG:4326" and "transform" not in tile.place
    assert tile.place["bounds"] == pytest.approx([9.99, 49.99, 10.01, 50.01], abs=2e-4)
    across, down = scene_reader.describe(str(path)).meters
    assert across == pytest.approx(0.02 / 64 * 71_700, rel=0.01) and down == pytest.approx(
        0.02 / 64 * 111_230, rel=0.01
    )


# ---------------------------------------------------------------- unlike and hostile files


def test_a_few_unlike_scenes_are_left_out_named_and_counted(tmp_path, capsys):
    pixels = values((2, 64, 64))
    for number in range(6):
        write(tmp_path / f"in/{number}.tif", pixels, ("a", "b"))
    write(tmp_path / "in/deep.tif", pixels.astype(np.uint32), ("a", "b"))
    write(tmp_path / "in/signed.tif", pixels.astype(np.int16), ("a", "b"))
    write(tmp_path / "in/other.tif", pixels.astype(np.uint8), ("a", "b"))
    write(tmp_path / "in/bands.tif", pixels[:1], ("a",))
    write(tmp_path / "in/lost.tif", pixels, ("a", "b"), crs=None, transform=rasterio.Affine.identity())
    _, tiles, report = convert([tmp_path / "in"], tmp_path / "out", tile="320m")
    assert len(tiles) == 24 and report["rejected"]["number"] == 5 and report["inputs"] == 29
    told = capsys.readouterr().out
    assert "left out: 5 of 11 scenes: " in told and "deep.tif has values of uint32" in told and "and 2 more" in told
    reasons = " ".join(report["rejected"]["reasons"])
    for reason in ("has values of uint32", "has values of int16", "has values of uint8, but most scenes of uint16",
        "has the bands a, but most scenes have a, b",
                   "has no georeference"):  # fmt: skip
        assert reason in reasons
    for number in range(4):
        write(tmp_path / f"in/x{number}.tif", pixels.astype(np.uint32))
    os.remove(tmp_path / "in/0.tif"), os.remove(tmp_path / "in/1.tif"), os.remove(tmp_path / "in/2.tif")
    with pytest.raises(
        UserError, match=r"has values of uint32.*\(6 of 12 scenes have this problem\)|has values of uint32"
    ):
        os.remove(tmp_path / "in/3.tif")
        convert([tmp_path / "in"], tmp_path / "more")


@pytest.mark.parametrize(
    "options, sentence",
    [(["--tile", "64"], "has 1,048,576 x 1,048,576 pixels and 268,435,456 tiles, more than 20,000,000"),
     (["--tile", "9", "--stride", "1"], "and 1,099,4"), (["--tile", "300000"], "takes 83.8 GiB, more than 1"),
     (["--tile", "9", "--gsd", "100000"], "has more than 16,777,216 pixels per pixel of --gsd 100000")],
)  # fmt: skip
def test_a_file_that_claims_to_be_huge_is_refused_by_arithmetic(tmp_path, options, sentence):
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=1 << 20, height=1 << 20, count=1, dtype="uint8",
        tiled=True,
                       blockxsize=16384, blockysize=16384, sparse_ok=True, crs="EPSG:32633",
                       transform=NORTH_UP):  # fmt: skip
        pass
    assert (tmp_path / "a.tif").stat().st_size < 100_000
    arguments = ["--input", tmp_path / "a.tif", "--output", tmp_path / "out", "--split", "train", *options]
    with pytest.raises(UserError) as caught:
        scenes.main([str(argument) for argument in arguments])
    assert sentence in str(caught.value) and "; " in str(caught.value)


def test_what_gdal_does_not_undo_is_refused_and_further_pages_are_told(tmp_path, capsys):
    import tifffile
    from PIL import Image

    pixels = values((64, 64), "uint8")
    cases = {
        "white": "0 for white",
        "four": "values of 4 bits",
        "thumbnail": "thumbnail or mask as its first page",
        "turned": "orientation 6",
    }
    write(tmp_path / "white.tif", pixels[None], photometric="miniswhite")
    write(tmp_path / "four.tif", pixels[None] >> 4, nbits=4)
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as file:
        file.write(pixels[::2, ::2], subfiletype=1)
        file.write(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=turned)
    for name, reason in cases.items():
        path = tmp_path / (name + (".jpg" if name == "turned" else ".tif"))
        with pytest.raises(Rejected, match=reason):
            scene_reader.describe(str(path))
    assert scene_reader.describe(str(tmp_path / "four.tif"), scaled=True).dtype == "float32"
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([pixels, 255 - pixels]), photometric="minisblack")
    convert([tmp_path / "pages.tif"], tmp_path / "out", tile=64)
    assert "1 scenes have several pages, of which the first is used" in capsys.readouterr().out


def test_a_file_of_another_kind_is_not_opened_as_what_it_says(tmp_path):
    """A list of other files and addresses, called .tif."""
    write(tmp_path / "a.tif", values((1, 32, 32)))
    copy(tmp_path / "a.tif", tmp_path / "b.vrt", driver="VRT")
    (tmp_path / "b.vrt").rename(tmp_path / "b.tif")
    with pytest.raises(codecs.ImageDecodeError):
        scene_reader.describe(str(tmp_path / "b.tif"))


def test_what_rasterio_fails_to_say_of_a_damaged_file_does_not_reach_the_terminal(monkeypatch):
    """Cython prints errors of a callback of GDAL by these two hooks, and nobody can catch them."""
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: told.append(what))
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    ours, other = (types.SimpleNamespace(object=name) for name in ("rasterio._env.log_error", "something else"))
    with contextlib.suppress(codecs.ImageDecodeError), scene_file.reasons("x"):
        sys.excepthook(UnicodeDecodeError, None, None)
        sys.unraisablehook(ours)
        sys.unraisablehook(other)
        raise OSError("no TIFF")
    assert told == [other]
    sys.unraisablehook(ours)
    assert told == [other, ours]


def test_damaged_files_are_tiles_or_reasons(tmp_path):
    """Cut, flipped and overwritten."""
    rng, pixels = random.Random(0), values((4, 64, 64), "uint8")
    kinds = [dict(photometric="RGB", alpha="yes", tiled=True, blockxsize=32, blockysize=32, compress="deflate"),
             dict(names=("a", "b", "c", "d")), dict(compress="lzw", nodata=0)]  # fmt: skip
    wholes = [write(tmp_path / f"{i}.tif", pixels, **options).read_bytes() for i, options in enumerate(kinds)]
    outcomes = {"tiles": 0, "reasons": 0}
    for number in range(150):
        content = bytearray(rng.choice(wholes))
        at = rng.randrange(min(len(content), rng.choice([400, 10**9])))
        if rng.random() < 0.4:
            content = content[: at + 1]
        else:
            content[at : at + 4] = rng.randbytes(len(content[at : at + 4]))
        path = tmp_path / f"damaged_{number}.tif"
        path.write_bytes(content)
        try:
            cuts, _ = cut([path], "32")
            outcomes["tiles"] += bool(cuts)
        except (UserError, codecs.ImageDecodeError) as error:
            assert "\n" not in str(error)
            outcomes["reasons"] += 1
        scene_file.opened.cache_clear()
    assert min(outcomes.values()) > 20
