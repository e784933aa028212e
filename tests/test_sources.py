"""Folders and archives of whatever people keep there: every input is accounted for once, and nothing else is read."""

import csv
import functools
import io
import json
import os
import pathlib
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import command, folder, images, shards, sources
from pera_jax.data import codecs, records
from pera_jax.errors import UserError

SECRET = np.full((40, 40, 3), 123, np.uint8)  # lies outside; must never come in


def encode(pixels, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def contents(rng) -> dict[str, bytes]:
    """One file of each kind, by a name that says what must become of it."""
    colours = rng.integers(0, 256, (40, 48, 3), np.uint8)
    photo, exif = Image.fromarray(colours), Image.Exif()
    exif[0x0112] = 6
    jpeg, palette = encode(photo, "JPEG"), photo.quantize(8)
    return {
        "written/jpeg.jpg": jpeg,
        "written/cmyk.jpg": encode(photo.convert("CMYK"), "JPEG"),
        "written/deep.png": encode(rng.integers(0, 65536, (33, 32), np.uint16)),
        "written/palette.png": encode(palette, transparency=0),
        "written/turned.jpeg": encode(photo, "JPEG", exif=exif),
        "written/wrongly named.tif": encode(photo, "WEBP", lossless=True),
        "written/ünïcödé 🛰.PNG": encode(rng.integers(0, 256, (40, 40, 3), np.uint8)),
        f"written/{'long' * 50}.jpg": encode(photo, "JPEG", quality=50),
        "small/1 pixel.png": encode(colours[:1, :1]),
        "blank/blank.png": encode(np.full((50, 60, 3), int(rng.integers(256)), np.uint8)),
        "failed/cut.jpg": jpeg[: int(rng.integers(10, len(jpeg) // 2))],
        "failed/zero.png": b"",
        "failed/text.jpg": b"<html>404</html>",
        "failed/bomb.png": bomb(),
        "failed/noise.webp": rng.bytes(300),
        "rejected/notes.txt": b"hello",
        "rejected/no ending": b"",
        "rejected/archive.zip": b"PK",
    }


def twins(files: dict[str, bytes], rng) -> dict[str, bytes]:
    """Copies of some images that can be written, under names that come later."""
    names = [name for name in files if name.startswith("written/")]
    chosen = rng.choice(names, 3, replace=False)
    return {f"zz twin/{i}{os.path.splitext(name)[1]}": files[name] for i, name in enumerate(chosen)}


def convert(inputs: list[pathlib.Path], out: pathlib.Path, **options):
    """A conversion in this process, with all shares of failures allowed: (report, keys and images, rows of the table)."""

    def run(jobs, report):
        for job in jobs:
            yield shards.write_shard(job, functools.partial(images.convert_file, **options), report)

    inventory = sources.take_stock(inputs)
    inventory.label()
    split = images.make_split(inventory, out, "set", "train", 5, options)
    duplicates = []
    if "duplicates" in options.get("drop", ()):
        hashes = command._hashes(inventory[:], sources.read)
        duplicates = folder.later_equals(hashes).tolist()
    _, report = folder.write_split(
        folder.without(split, duplicates), None, workers=1, run=lambda jobs, report, **_: run(jobs, report),
        max_corrupt_share=0.99, rejected=inventory.rejected, duplicates=[inventory.keys[i] for i in duplicates],
    )  # fmt: skip
    assert report == json.loads((out / "train.report.json").read_text())
    source = records.open_split(out, "train")
    found = [records.decode_record(source.read(i)) for i in range(len(source))]
    rows = list(csv.reader(io.StringIO((out / "train.inputs.csv").read_text(encoding="utf-8"))))[1:]
    return report, {record.key: codecs.decode_image(record.image) for record in found}, rows


def check(report, written, rows, names: set[str], drop=()) -> None:
    """Every name exactly once, in the place that its folder says."""
    out = [name for outcome, name, _ in rows if outcome != "written"]
    assert sorted([*written, *out]) == sorted(names)
    assert report["inputs"] == len(names) == report["written"] + sum(
        report[kind]["number"] for kind in ("duplicates", "rejected", "failed")
    )
    wanted = {"written": "written", "failed": "failed", "rejected": "rejected", "zz twin": "written"}
    wanted |= {kind: "rejected" if kind in drop else "written" for kind in ("small", "blank")}
    outcomes = {name: outcome for outcome, name, _ in rows if outcome != "written"} | dict.fromkeys(written, "written")
    for name, outcome in outcomes.items():
        kind = next(part for part in name.split("/") if part in wanted)
        expected = "duplicate" if kind == "zz twin" and "duplicates" in drop else wanted[kind]
        assert outcome == expected, name
    finds = {(name, reason) for outcome, name, reason in rows if outcome == "written"}
    if not drop:
        assert {kind for _, kind in finds} == {"small", "blank", "duplicate"}
        assert {name for name, kind in finds if kind == "duplicate"} == {n for n in written if "zz twin" in n}
    assert not any((np.abs(image.astype(int) - 123) < 2).all() for image in written.values())  # nothing from outside


@pytest.mark.parametrize("seed", range(4))
def test_folders(tmp_path, seed):
    rng = np.random.default_rng(seed)
    files = contents(rng)
    files |= twins(files, rng)
    root, outside = tmp_path / "in", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(encode(SECRET))
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    links = {
        "rejected/secret.png": outside / "secret.png", "rejected/up": outside, "rejected/loop": root,
        "rejected/gone.png": root / "nowhere.png", "rejected/self.png": root / "rejected/self.png",
        "zz twin/link.jpg": root / "written/jpeg.jpg",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "rejected/pipe.png")
    strange = os.fsencode(root) + b"/rejected/\xff.png"
    pathlib.Path(os.fsdecode(strange)).write_bytes(encode(SECRET))
    names = {*files, *links, "rejected/pipe.png", "rejected/\\udcff.png"}
    drop = (command.DROPS, ())[seed % 2]
    check(*convert([root], tmp_path / "out", min_side=2, drop=drop), names, drop)


def pack(path: pathlib.Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
            link = zipfile.ZipInfo("all/rejected/link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "../../outside/secret.png")
        return
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("device.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"all/rejected/{name}")
            member.type, member.linkname = kind, "../../outside/secret.png"
            archive.addfile(member)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz", "zip"])
def test_archives(tmp_path, ending):
    rng = np.random.default_rng(len(ending))
    files = contents(rng)
    files |= twins(files, rng)
    files = {f"all/{name}": content for name, content in files.items()}
    secret = encode(SECRET)
    leading = {"../rejected/up.png": secret, "/rejected/root.png": secret, "all/../../rejected/x.png": secret}
    path, out = tmp_path / f"in.{ending}", tmp_path / "out"
    pack(path, files | leading)
    kinds = ["link.png"] if ending == "zip" else ["link.png", "hard.png", "device.png"]
    names = {*files, *leading, *(f"all/rejected/{kind}" for kind in kinds)}
    before = set(tmp_path.rglob("*"))
    report, written, rows = convert([path], out, min_side=2)
    check(report, written, rows, names)
    info = records.load_info(out)
    assert info.class_names == ["blank", "failed", "small", "written", "zz twin"]  # the folder around all is no class
    assert {p for p in tmp_path.rglob("*") if out not in (p, *p.parents)} == before  # nothing was unpacked
    for name, image in written.items():
        if name.endswith("jpeg.jpg"):
            np.testing.assert_array_equal(image, codecs.decode_image(files[name]))


def test_the_same_images_give_the_same_records_from_any_archive(tmp_path):
    rng = np.random.default_rng(1)
    files = {f"{kind}/{i}.png": encode(rng.integers(0, 256, (8, 9, 3), np.uint8)) for kind in "ab" for i in range(30)}
    root = tmp_path / "folder"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    prints = set()
    for ending in ("", "tar", "tar.gz", "zip"):
        path = tmp_path / f"in.{ending}" if ending else root
        if ending:
            with_order = dict(sorted(files.items()))
            pack(path, with_order)
        images.main(["--input", str(path), "--output", str(tmp_path / f"out{ending}/set"), "--split", "train",
                     "--workers", "2", "--shard-size", "7"])  # fmt: skip
        prints.add(records.load_info(tmp_path / f"out{ending}/set").splits["train"].fingerprint)
    assert len(prints) == 1


def test_damaged_archives_are_one_sentence_and_damaged_members_fail(tmp_path):
    rng = np.random.default_rng(0)
    files = {f"a/{i}.png": encode(rng.integers(0, 256, (40, 40, 3), np.uint8)) for i in range(20)}
    for ending in ("tar.gz", "tar.xz", "zip"):
        pack(tmp_path / f"in.{ending}", files)
        whole = (tmp_path / f"in.{ending}").read_bytes()
        for cut in (0, 5, len(whole) // 2, len(whole) - 5):
            (tmp_path / f"in.{ending}").write_bytes(whole[:cut])
            with pytest.raises(UserError, match=f"archive .*in.{ending} cannot be read"):
                sources.take_stock([tmp_path / f"in.{ending}"])
    pack(tmp_path / "flip.zip", files)
    content = bytearray((tmp_path / "flip.zip").read_bytes())
    content[content.index(b"a/7.png") + 300] ^= 4
    (tmp_path / "flip.zip").write_bytes(content)
    report, written, _ = convert([tmp_path / "flip.zip"], tmp_path / "out")
    assert report["failed"]["number"] == 1 and len(written) == 19
    pack(tmp_path / "short.tar", files)
    whole = (tmp_path / "short.tar").read_bytes()
    for cut in (40_000, 40_960, 512 * 13, 100):
        (tmp_path / "short.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="archive .*short.tar cannot be read"):
            sources.take_stock([tmp_path / "short.tar"])


def test_dropping_does_not_depend_on_workers(tmp_path):
    rng = np.random.default_rng(2)
    files = contents(rng)
    files |= twins(files, rng)
    pack(tmp_path / "in.tar.gz", files)
    for workers in (1, 3):
        images.main(["--input", str(tmp_path / "in.tar.gz"), "--output", str(tmp_path / f"{workers}/set"), "--split", "train",
                     "--drop", "duplicates,small,blank", "--workers", str(workers), "--shard-size", "3",
                     "--max-corrupt-share", "0.6"])  # fmt: skip
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / w / "set").iterdir()} for w in "13")
    assert one == three and json.loads(one["train.report.json"])["duplicates"]["number"] == 3
