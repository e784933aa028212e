"""Arbitrary image files: one reader, so that a file gives the same pixels everywhere."""

import errno
import functools
import io
import json
import pathlib
import re
import zipfile

import numpy as np
import pytest
import toy_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import images
from data_prep.convert import pixels
from data_prep.geo import scene_reader
from pera_jax.bands import Bands
from pera_jax.common import environment
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records
from pera_jax.data.images import foreign, image_errors, tiff_files
from pera_jax.data.labelled import folders, samples, scene_files
from pera_jax.encoder import extract as features


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The forty files in two classes."""
    root = tmp_path_factory.mktemp("kinds") / "all"
    for number, (name, (content, _)) in enumerate(toy_images.every_kind().items()):
        place = root / "ab"[number % 2] / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return root


def test_forty_files_give_the_same_pixels_on_every_path(folder, tmp_path, capsys):
    wanted = {name: expected for name, (_, expected) in toy_images.every_kind().items()}
    assert len(wanted) == 40
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(folder.rglob("*.*")):
            opened.write(path, path.relative_to(folder))
    paths = {"the reader": {path.name: foreign.read(path.read_bytes()).pixels for path in folder.rglob("*.*")}}
    for source in (folder, archive):
        out = tmp_path / f"shards{source.suffix}"
        images.main(["--input", str(source), "--output", str(out), "--split", "train", "--workers", "1"])
        shards = records.open_split(out, "train")
        found = [records.decode_record(shards.read(index)) for index in range(len(shards))]
        name = lambda record: pathlib.Path(record.key).name  # noqa: E731
        paths[f"training on {out.name}"] = {name(each): codecs.decode_image(each.image) for each in found}
        paths[f"probe of {out.name}"] = _read(samples.open_samples(str(out), "train"))
    paths["probe of the folder"] = _read(samples.open_samples(str(folder.parent), "all"))
    paths["export of the folder"] = _read(samples.open_images(str(folder)))
    paths["scenes for dense probes"] = {
        path.name: scene_files._image(path, Bands.plain(), lambda *seen: None).pixels for path in folder.rglob("*.*")
    }
    for path, found in paths.items():
        assert found.keys() == wanted.keys(), path
        for name, expected in wanted.items():
            np.testing.assert_array_equal(found[name], expected, err_msg=f"{name} through {path}")
    told = capsys.readouterr().out
    changed = json.loads((tmp_path / "shards" / "train.report.json").read_text())["changed"]
    assert changed["16 bit"] == 4 and changed["orientation"] == 9 and changed["alpha left out"] == 1
    for name in set(changed) & set(foreign.CHANGES):
        assert re.search(rf"changed, {name}: {changed[name]} images? {re.escape(foreign.CHANGES[name])}", told)


def _read(found: samples.Samples) -> dict[str, np.ndarray]:
    """Each image as probes and exports read it."""
    rows = [range(index, index + 1) for index in range(len(found))]
    batches = features.read(found, Bands.plain(), lambda image: image, rows, "test")
    return {pathlib.Path(key).name: batch[0] for key, batch in zip(found.keys, batches, strict=True)}


def test_tiffs_that_scenes_take_have_the_pixels_of_the_reader(folder):
    pytest.importorskip("rasterio")
    read = 0
    for path in sorted(folder.rglob("*.tif*")):
        try:
            scene = scene_reader.describe(str(path))
        except pixels.Rejected as error:
            assert ("stored rotated" in str(error)) == (path.name == "turned.tif")
            continue
        if len(scene.names) != 3 or scene.alpha or path.name == "subsampled.tif":
            continue  # GDAL enlarges the colors of a JPEG inside by a rule of its own
        width, height = scene.sides
        tile = scene_reader.Tile((0, 0, width, height), width, height, tuple(scene.names), None)
        found, valid = scene_reader.read(str(path), tile)
        np.testing.assert_array_equal(found, foreign.read(path.read_bytes(), colors=False).pixels, err_msg=path.name)
        assert valid.all() and scene.dtype == found.dtype
        read += 1
    assert read == 7


# ---------------------------------------------------------------- all combinations

_COMPRESSIONS = (None, "lzw", "deflate", "zstd", "packbits", "lzma")


@st.composite
def tiffs(draw) -> tuple[bytes, np.ndarray, int, dict]:
    """(bytes, upright values [H, W, C], bits, how it was written)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    depth, bands = draw(st.sampled_from([8, 16])), draw(st.sampled_from([1, 2, 3, 4, 5, 13]))
    values = rng.integers(0, 1 << depth, (height, width, bands), np.uint16).astype(f"uint{depth}")
    values[0, 0, :3] = (1 << depth) - 1  # all of the bits are used
    orientation = draw(st.integers(1, 8))
    compression = draw(st.sampled_from(_COMPRESSIONS))
    how = {
        "planar": draw(st.booleans()), "orientation": orientation, "compression": compression,
        "byteorder": draw(st.sampled_from("<>")), "bigtiff": draw(st.booleans()),
        "predictor": compression not in (None, "packbits") and draw(st.booleans()),
    }  # fmt: skip
    how |= {"tile": (16, 32)} if draw(st.booleans()) else {"rowsperstrip": draw(st.integers(1, 50))}
    stored = np.ascontiguousarray(toy_images.TURNED[orientation](values))
    extra = (2 if bands == 2 else 0,) * (bands - 1 if bands < 3 else bands - 3)
    return toy_images.tiff(stored, extra=extra, **how), values, depth, how | {"extra": extra}


@settings(max_examples=150, deadline=None)
@given(tiffs())
def test_tiffs_of_any_layout(case):
    encoded, values, depth, _ = case
    found = foreign.read(encoded, colors=False)
    np.testing.assert_array_equal(found.pixels, values)
    assert found.pixels.dtype == values.dtype and found.pixels.flags.writeable and len(found.bands) == values.shape[2]
    upper, bands = (values >> (depth - 8)).astype(np.uint8), values.shape[2]
    if bands in (1, 3, 4):
        np.testing.assert_array_equal(
            foreign.read(encoded).pixels, np.repeat(upper, 3, 2) if bands == 1 else upper[..., :3]
        )
    elif bands > 4:
        with pytest.raises(foreign.ImageDecodeError, match=f"has {bands} bands"):
            foreign.read(encoded, colors=True)
        np.testing.assert_array_equal(foreign.read(encoded).pixels, values)
    if bands == 1:
        np.testing.assert_array_equal(foreign.read_indices(encoded), values)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pngs_of_any_depth(data):
    depth, bands = data.draw(
        st.sampled_from([(1, 1), (2, 1), (4, 1), *((d, b) for d in (8, 16) for b in (1, 2, 3, 4))])
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(
        0, 1 << depth, (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), bands), np.uint16
    )
    values[0, 0] = (1 << depth) - 1
    orientation = data.draw(st.integers(1, 8))
    clear = values[-1, -1].tolist() if bands in (1, 3) and data.draw(st.booleans()) else ()
    stored = np.ascontiguousarray(toy_images.TURNED[orientation](values))
    encoded = toy_images.png(stored, depth, transparent=clear, orientation=orientation)
    bytes_ = (values >> 8 if depth == 16 else values * (255 // ((1 << depth) - 1))).astype(np.uint8)
    expected = toy_images.over_black(bytes_) if bands in (2, 4) else bytes_
    if clear:
        expected = expected * (values != clear).any(axis=2, keepdims=True)
    expected = expected if expected.shape[2] == 3 else np.repeat(expected, 3, axis=2)
    np.testing.assert_array_equal(foreign.read(encoded).pixels, expected)
    stored = pixels.convert(encoded)
    np.testing.assert_array_equal(codecs.decode_image(stored.data), expected)
    if bands == 1:
        np.testing.assert_array_equal(foreign.read_indices(encoded), values)  # no value is changed, whatever its bits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]), st.integers(1, 8))
def test_palettes(seed, depth, orientation):
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (1 << depth, 3), np.uint8)
    numbers = rng.integers(0, 1 << depth, (9, 13, 1))
    opacity = rng.integers(0, 256, rng.integers(1, (1 << depth) + 1)).tolist()
    stored = np.ascontiguousarray(toy_images.TURNED[orientation](numbers))
    encoded = toy_images.png(stored, depth, palette, opacity, orientation)
    full = np.full(1 << depth, 255, np.uint8)
    full[: len(opacity)] = opacity
    expected = toy_images.over_black(np.concatenate([palette, full[:, None]], axis=1)[numbers[..., 0]])
    np.testing.assert_array_equal(foreign.read(encoded).pixels, expected)
    np.testing.assert_array_equal(foreign.read_indices(encoded), numbers)


# ---------------------------------------------------------------- what is no opacity, narrow values, frames


def test_what_a_raster_calls_alpha_is_opacity_only_where_it_says_all_or_nothing():
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (40, 40, 3), np.uint8)
    edges = np.zeros((40, 40, 1), np.uint8)
    edges[:20], edges[20] = 255, 128
    for kind in (1, 2):  # multiplied already, and not
        found = foreign.read(toy_images.tiff(np.concatenate([rgb, edges], axis=2), extra=(kind,)))
        expected = rgb if kind == 1 else toy_images.over_black(np.concatenate([rgb, edges], axis=2))
        np.testing.assert_array_equal(found.pixels, expected)
        assert "alpha" in found.changes
    full = foreign.read(toy_images.tiff(np.concatenate([rgb, edges * 0 + 255], axis=2), extra=(2,)))
    assert full.changes == ("format TIFF",)
    infrared = toy_images.tiff(np.concatenate([rgb, rgb[..., :1] // 2 + 20], axis=2), extra=(2,))
    assert foreign.read(infrared).changes == ("format TIFF", "alpha left out")
    np.testing.assert_array_equal(foreign.read(infrared).pixels, rgb)
    assert foreign.read(infrared, colors=False).bands == ("red", "green", "blue", "band_4")


def test_narrow_values_of_sixteen_bits_need_a_range(tmp_path, capsys):
    rng = np.random.default_rng(4)
    reflectance = rng.integers(0, 3001, (40, 40, 3), np.uint16)
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.tif").write_bytes(toy_images.tiff(reflectance))
    command = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--split", "train", "--workers", "1"]
    with pytest.raises(UserError, match=r"has a maximum of 3000 of 65535 .* --range 0,3000"):
        images.main(command)
    images.main([*command, "--range", "0,2000"])
    assert "changed, range: 2 images of 9 to 16 bits, mapped by --range" in capsys.readouterr().out
    source = records.open_split(tmp_path / "out", "train")
    found = codecs.decode_image(records.decode_record(source.read(0)).image)
    np.testing.assert_array_equal(found, np.floor(reflectance.clip(0, 2000) * 255.0 / 2000 + 0.5).astype(np.uint8))
    with pytest.raises(UserError, match="another split|other images or options"):
        images.main([*command, "--range", "0,2001"])
    twelve = tmp_path / "twelve.tif"
    twelve.write_bytes(toy_images.tiff(reflectance, bitspersample=12))  # it says how many bits there are
    np.testing.assert_array_equal(foreign.read(twelve.read_bytes()).pixels, (reflectance >> 4).astype(np.uint8))
    black = foreign.read(toy_images.tiff(np.zeros((5, 5, 3), np.uint16)))
    assert not black.pixels.any()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_the_first_of_several_frames_is_taken(kind):
    rng = np.random.default_rng(5)
    first, second = (Image.fromarray(rng.integers(0, 256, (20, 24), np.uint8)) for _ in range(2))
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = toy_images.pillow(first, kind, save_all=True, append_images=[second], **options)
    found = foreign.read(encoded)
    np.testing.assert_array_equal(found.pixels[..., 0], np.asarray(first))
    assert "several frames" in found.changes


def test_a_thumbnail_or_mask_before_the_picture_is_none(tmp_path):
    import tifffile

    rgb = np.random.default_rng(8).integers(0, 256, (32, 48, 3), np.uint8)
    for name, small, flag, inner in (
        ("pages", rgb[::4, ::4], 1, 0),
        ("inner", rgb[::4, ::4], 1, 1),
        ("mask", rgb[..., 0] > 99, 4, 0),
    ):
        with tifffile.TiffWriter(tmp_path / name) as file:
            file.write(small, photometric="rgb" if small.ndim == 3 else "minisblack", subfiletype=flag, subifds=inner)
            file.write(rgb, photometric="rgb", subfiletype=0)
        found = foreign.read((tmp_path / name).read_bytes(), colors=True)
        np.testing.assert_array_equal(found.pixels, rgb)
        assert "several frames" not in found.changes
    tifffile.imwrite(tmp_path / "alone", rgb, photometric="rgb", subfiletype=1)  # an overview in a file of its own
    np.testing.assert_array_equal(foreign.read((tmp_path / "alone").read_bytes(), colors=True).pixels, rgb)


def test_a_failing_machine_is_no_plain_head_of_a_tiff(tmp_path, monkeypatch):
    import tifffile

    tifffile.imwrite(tmp_path / "sound.tif", np.zeros((8, 8), np.uint8))
    monkeypatch.setattr(
        tiff_files, "_orientation", lambda page: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many"))
    )
    with pytest.raises(environment.EnvironmentFault, match="sound.tif"):
        tiff_files.head_of(str(tmp_path / "sound.tif"))
    monkeypatch.setattr(tiff_files, "_auxiliary", lambda page: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(environment.EnvironmentFault):
        foreign.read((tmp_path / "sound.tif").read_bytes())
    (tmp_path / "damaged.tif").write_bytes(b"II*\0damaged")
    assert tiff_files.head_of(str(tmp_path / "damaged.tif")) == tiff_files.Head()


def test_a_palette_tiff_has_its_colors_in_both_readings(tmp_path):
    import tifffile

    numbers, palette = (
        np.arange(256, dtype=np.uint8).reshape(16, 16),
        np.random.default_rng(3).integers(0, 65536, (3, 256), np.uint16),
    )
    tifffile.imwrite(tmp_path / "palette.tif", numbers, photometric="palette", colormap=palette)
    for colors in (True, None, False):
        found = foreign.read((tmp_path / "palette.tif").read_bytes(), colors)
        np.testing.assert_array_equal(found.pixels, (palette >> 8).astype(np.uint8).T[numbers])
        assert found.bands == ("red", "green", "blue")


def test_images_unlike_most_of_a_folder_are_left_out_and_counted(tmp_path):
    import tifffile

    rng = np.random.default_rng(5)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{number}.png")
    tifffile.imwrite(
        tmp_path / "0_five.tif", np.zeros((5, 16, 16), np.uint8), photometric="minisblack", planarconfig="separate"
    )
    tifffile.imwrite(tmp_path / "1_float.tif", np.zeros((16, 16, 3), np.float32), photometric="rgb")
    tifffile.imwrite(tmp_path / "2_deep.tif", np.full((16, 16, 3), 60000, np.uint16), photometric="rgb")
    with pytest.raises(UserError, match=r"0_five.tif .*5 bands of uint8, but most images have 3 of uint8.*2 of 9"):
        samples.open_images(str(tmp_path))
    found = samples.open_images(str(tmp_path), reading=folders.Reading(max_corrupt_fraction=0.3))
    assert list(found.keys) == ["0.png", "1.png", "2.png", "2_deep.tif", "3.png", "4.png", "5.png"]
    assert (found.bands, found.dtype) == (("red", "green", "blue"), "uint8")
    assert found.decode(found.raw(3))[0, 0].tolist() == [60000 >> 8] * 3


def test_overviews_of_a_tiff_are_no_further_pictures():
    import tifffile

    rgb = np.random.default_rng(6).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(rgb, photometric="rgb", tile=(16, 16))
        writer.write(rgb[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1)
    assert foreign.read(buffer.getvalue()).changes == ("format TIFF",)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.zeros((5, 5, 1), np.int16), "has values of int16"), (np.zeros((5, 5, 3), np.uint32), "has values of "
                                                                                                 "uint32"),
        (np.zeros((5, 5, 1), np.float64), "has values of float64"),
        (np.zeros((5, 5, 1), np.complex64), "has values of complex64"),
    ],
)  # fmt: skip
def test_kinds_of_values_that_are_not_read(values, sentence):
    for colors in (True, False, None):
        with pytest.raises(foreign.ImageDecodeError, match=sentence):
            foreign.read(toy_images.tiff(values), colors)


def test_floats_are_values_and_no_colors():
    values = np.random.default_rng(7).normal(size=(9, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(foreign.read(toy_images.tiff(values)).pixels, values)
    with pytest.raises(foreign.ImageDecodeError, match="has values of float32 with unknown range"):
        foreign.read(toy_images.tiff(values), colors=True)


def test_cut_files_are_undecodable():
    for name, (encoded, _) in toy_images.every_kind().items():
        for share in (0.02, 0.3, 0.6):
            for read in (foreign.read, functools.partial(foreign.read, colors=False), foreign.read_indices):
                with pytest.raises(foreign.ImageDecodeError) as error:
                    read(encoded[: int(len(encoded) * share)])
                assert str(error.value), name


def test_the_limit_of_size_is_one_of_memory(monkeypatch):
    mask = np.random.default_rng(9).integers(0, 5, (50, 60, 1), np.uint8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, which sound masks pass
    files = toy_images.pillow(mask[..., 0], "PNG"), toy_images.tiff(mask, compression="zstd")
    for content in files:
        np.testing.assert_array_equal(foreign.read_indices(content), mask)
    np.testing.assert_array_equal(codecs.decode_image(files[0]), np.repeat(mask, 3, axis=2))
    monkeypatch.setattr(image_errors, "MOST_BYTES", mask.size - 1)
    for content in files:
        for read in (foreign.read_indices, foreign.read, codecs.decode_image):
            with pytest.raises(foreign.ImageDecodeError, match="is 60 x 50 px and would take .* GiB when decoded"):
                read(content)


def test_masks_keep_their_values_and_follow_their_scene(tmp_path):
    rng = np.random.default_rng(8)
    for place in ("image", "label"):
        (tmp_path / place).mkdir()
    scene, mask = rng.integers(0, 256, (30, 40, 3), np.uint8), rng.integers(0, 4, (30, 40, 1), np.uint8)
    for orientation, turn in toy_images.TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "image/a.png").write_bytes(
            toy_images.png(np.ascontiguousarray(turn(scene)), 8, orientation=orientation)
        )
        for stored in (
            toy_images.png(np.ascontiguousarray(turn(mask)), 2, orientation=orientation),
            toy_images.png(mask, 2),
        ):
            (tmp_path / "label/a.png").write_bytes(stored)  # turned as its scene, or upright already
            found = scene_files.read(scene_files.files(tmp_path, 1), "a", Bands.plain(), ())
            np.testing.assert_array_equal(found.images[0], scene)
            np.testing.assert_array_equal(found.mask, mask[..., 0])
    (tmp_path / "label/a.png").write_bytes(toy_images.pillow(mask[..., 0], "JPEG"))
    with pytest.raises(UserError, match="cannot be decoded as a mask .not a PNG, TIFF, GIF or BMP"):
        scene_files.read(scene_files.files(tmp_path, 1), "a", Bands.plain(), ())
    (tmp_path / "label/a.png").write_bytes(toy_images.png(mask[:29], 2))
    with pytest.raises(UserError, match="is 40 x 29 px and .* is 40 x 30 px; they must have the same size"):
        scene_files.read(scene_files.files(tmp_path, 1), "a", Bands.plain(), ())


def test_masks_may_be_tiffs_and_what_they_declare_is_no_class(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    for place in ("image", "label"):
        (tmp_path / place).mkdir()
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path / "image/a.png")
    mask = np.random.default_rng(2).integers(0, 4, (24, 32), np.uint8)
    mask[0, :5] = 255

    def read(dtype="uint8", nodata=None, values=mask):
        with rasterio.open(tmp_path / "label/a.tif", "w", driver="GTiff", width=32, height=24, count=1, dtype=dtype,
            nodata=nodata,
                           compress="deflate") as file:  # fmt: skip
            file.write(values.astype(dtype), 1)
        return scene_files.read(scene_files.files(tmp_path, 1), "a", Bands.plain(), ()).mask

    for dtype, nodata in (("uint8", None), ("int16", None), ("uint8", 255), ("uint8", 9), ("int32", -9999)):
        np.testing.assert_array_equal(read(dtype, nodata), mask)
    with pytest.raises(UserError, match="has pixels with its nodata value 0; store 255 there"):
        read(nodata=0)
    with pytest.raises(UserError, match="bands of float32; a mask must have one"):
        read("float32")


@pytest.mark.parametrize(
    "dtype, nodata", [("uint8", 255), ("uint8", 0), ("uint16", 65535), ("float32", -9999), ("float32", float("nan"))]
)
def test_what_a_tiff_declares_to_be_no_data_is_as_in_scenes(tmp_path, dtype, nodata):
    rasterio = pytest.importorskip("rasterio")
    rng = np.random.default_rng(4)
    pixels = (
        rng.uniform(-25, -1, (3, 24, 32))
        if dtype == "float32"
        else rng.integers(1, 250, (3, 24, 32)) * (1 if dtype == "uint8" else 200)
    ).astype(dtype)
    pixels[:, :6, :9] = pixels[1, 20, 20] = nodata
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=32, height=24, count=3, dtype=dtype,
        nodata=nodata,
                       photometric="RGB") as file:  # fmt: skip
        file.write(pixels)
    encoded = (tmp_path / "a.tif").read_bytes()
    tile = scene_reader.Tile((0, 0, 32, 24), 32, 24, (1, 2, 3), None)
    scene, valid = scene_reader.read(str(tmp_path / "a.tif"), tile)
    found = foreign.read(encoded, colors=False)
    np.testing.assert_array_equal(found.pixels, scene)
    assert ("no data" in found.changes) == (nodata != 0) and np.isfinite(found.pixels).all()
    if dtype != "float32":
        colors = foreign.read(encoded, colors=True)
        np.testing.assert_array_equal(colors.pixels, scene if dtype == "uint8" else scene >> 8)
        assert ("no data" in colors.changes) == (nodata != 0) and not colors.pixels[~valid].any()
