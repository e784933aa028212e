"""Folders and archives with arbitrary content: every file is listed once, and nothing else is read."""

import csv
import functools
import io
import json
import os
import pathlib

import numpy as np
import pytest
from toy_files import contents, encode, pack, twins

from data_prep import images
from data_prep.convert import command, folder, pixels, shards, split_plan
from data_prep.convert import duplicates as duplicate_files
from data_prep.inputs import sources
from pera_jax.data import codecs, records

SECRET = np.full((40, 40, 3), 123, np.uint8)  # lies outside; must never come in


def convert(inputs: list[pathlib.Path], out: pathlib.Path, labels: bool = True, **options):
    """A conversion in this process, with all shares of failures allowed: (report, keys and images, rows of the
    table)."""

    def run(jobs, report):
        for job in jobs:
            yield shards.write_shard(job, functools.partial(images.convert_file, **options), report)

    inventory = sources.take_stock(inputs)
    if labels:
        inventory.label()
    split = images.make_split(inventory, out, "set", "train", 5, options)
    duplicates = []
    if "duplicates" in options.get("drop", ()):
        duplicates = duplicate_files.find(inventory, sources.read, 1)
    _, report = folder.write_split(
        split_plan.without(split, duplicates), None, workers=1, run=lambda jobs, report, **_: run(jobs, report),
        max_corrupt_fraction=0.99, rejected=inventory.rejected, duplicates=[inventory.keys[i] for i in duplicates],
    )  # fmt: skip
    assert report == json.loads((out / "train.report.json").read_text())
    source = records.open_split(out, "train")
    found = [records.decode_record(source.read(i)) for i in range(len(source))]
    rows = list(csv.reader(io.StringIO((out / "train.inputs.csv").read_bytes().decode("utf-8"), newline="")))[1:]
    return report, {record.key: codecs.decode_image(record.image) for record in found}, rows


def check(report, written, rows, names: set[str], drop=()) -> None:
    """Every name exactly once, in the place that its folder says."""
    out = [name for outcome, name, _ in rows if outcome != "written"]
    assert sorted([*written, *out]) == sorted(names)
    assert report["inputs"] == len(names) == report["written"] + sum(
        report[kind]["number"] for kind in ("duplicates", "rejected", "failed")
    )
    wanted = {name: name for name in ("written", "failed", "rejected")} | {".store": "rejected", "zz twin": "written"}
    wanted |= {kind: "rejected" if kind in drop else "written" for kind in ("small", "blank")}
    outcomes = {name: outcome for outcome, name, _ in rows if outcome != "written"} | dict.fromkeys(written, "written")
    for name, outcome in outcomes.items():
        kind = next(part for part in reversed(name.split("/")) if part in wanted)
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
        "rejected/parent": root / "rejected", "zz twin/link.jpg": root / "written/jpeg.jpg",
        "zz twin/more": root / ".store",
    }  # fmt: skip
    (root / ".store/deep").mkdir(parents=True)
    (root / ".store/deep/copy.jpg").write_bytes(files["written/jpeg.jpg"])
    (root / ".store/deep/rejected").symlink_to(root / ".store")
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "rejected/pipe.png")
    strange = os.fsencode(root) + b"/rejected/\xff.png"
    pathlib.Path(os.fsdecode(strange)).write_bytes(encode(SECRET))
    names = {*files, *links, "rejected/pipe.png", "rejected/\\udcff.png", ".store"} - {"zz twin/more"}
    names |= {"zz twin/more/deep/copy.jpg", "zz twin/more/deep/rejected"}
    drop = (command.DROPS, ())[seed % 2]
    check(*convert([root], tmp_path / "out", min_side=2, drop=drop), names, drop)


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


def test_dropping_does_not_depend_on_workers(tmp_path):
    rng = np.random.default_rng(2)
    files = contents(rng)
    files |= twins(files, rng)
    pack(tmp_path / "in.tar.gz", files)
    for workers in (1, 3):
        images.main(["--input", str(tmp_path / "in.tar.gz"), "--output", str(tmp_path / f"{workers}/set"), "--split",
            "train",
                     "--drop", "duplicates,small,blank", "--workers", str(workers), "--shard-size", "3",
                     "--max-corrupt-fraction", "0.6"])  # fmt: skip
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / w / "set").iterdir()} for w in "13")
    assert one == three and json.loads(one["train.report.json"])["duplicates"]["number"] == 3


@pytest.mark.parametrize("seed", range(6))
def test_random_folders_of_files_and_links(tmp_path, seed):
    """Whatever lies where, and whatever links to whatever: every entry once, and nothing from outside."""
    rng = np.random.default_rng(100 + seed)
    pieces, secret = contents(rng), encode(SECRET)
    outside, root = tmp_path / "outside", tmp_path / "in"
    (outside / "deep").mkdir(parents=True)
    for name in ("secret.png", "deep/secret.png"):
        (outside / name).write_bytes(secret)
    folders, files = [root], []
    steps = ["a", "b.png", ".c", "ü 🛰", "new\nline", "x" * 200]
    for _ in range(12):
        folders.append(folders[rng.integers(len(folders))] / f"{rng.choice(steps)}{len(folders)}")
        folders[-1].mkdir(parents=True)
    for i in range(40):
        content = pieces[rng.choice(sorted(pieces))]
        name = f"{rng.choice(steps)}{i}.{rng.choice(['png', 'JPG', 'tif', 'txt'])}"
        files.append(folders[rng.integers(len(folders))] / name)
        files[-1].write_bytes(content)
    targets = [*folders, *files, outside, outside / "deep", outside / "secret.png", root / "nowhere", pathlib.Path("/")]
    links = []
    for i in range(20):
        links.append(folders[rng.integers(len(folders))] / f"link{i}.png")
        target = targets[rng.integers(len(targets))] if rng.random() < 0.7 else links[rng.integers(len(links))]
        links[-1].symlink_to(target if rng.random() < 0.5 else os.path.relpath(target, links[-1].parent))
    report, written, rows = convert([root], tmp_path / "out", labels=False)
    out = [name for outcome, name, _ in rows if outcome != "written"]
    names = [*written, *out]
    assert len(set(names)) == len(names) == report["inputs"]
    hidden = {path for path in (*files, *links) if "/." in str(path)[len(str(root)) :]}
    assert {path.relative_to(root).as_posix() for path in files if path not in hidden} <= set(names)
    for link in set(links) - hidden:  # itself, or what lies behind it
        name = link.relative_to(root).as_posix()
        behind = link.is_dir() and link.resolve().is_relative_to(root)
        assert name in names or (behind and (any(n.startswith(name + "/") for n in names) or not any(link.iterdir())))
    for name, image in written.items():
        assert (root / name).resolve().is_relative_to(root) and not (image == 123).all()


def test_links_to_folders_come_to_an_end(tmp_path):
    """Twelve folders that all link to each other and to the folder around them: some 10^9 paths."""
    for i in range(12):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/image.png").write_bytes(b"")
        for j in range(12):
            (tmp_path / f"{i}/to{j}").symlink_to(tmp_path / f"{j}")
        (tmp_path / f"{i}/up").symlink_to(tmp_path)
    inventory = sources.take_stock([tmp_path])
    real = [os.path.realpath(item.path) for item in inventory]
    assert len(set(real)) == 12 and all(real.count(path) == 2 for path in real)
    assert len(set(inventory.keys)) == len(real)
    again = sources.take_stock([tmp_path])
    assert list(again.keys) == list(inventory.keys) and again.rejected == inventory.rejected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_damaged_images_are_pixels_or_undecodable(kind):
    rng = np.random.default_rng(4)
    whole = encode(rng.integers(0, 256, (20, 20, 3), np.uint8), kind)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(min(len(whole), 200), size=rng.integers(4)):
            damaged[place] = rng.integers(256)
        try:
            outcomes.add(len(pixels.convert(bytes(damaged[: rng.integers(len(whole) // 2, 2 * len(whole))])).data) > 0)
        except codecs.ImageDecodeError as error:
            assert str(error)
            outcomes.add(False)
    assert outcomes == {True, False}


def test_report_stays_short_and_the_table_is_whole(tmp_path):
    files = {f"a/{i}.ending{i % 300}": b"" for i in range(1000)} | {"a/1.png": encode(np.zeros((40, 40, 3), np.uint8))}
    pack(tmp_path / "in.tar", files)
    report, _, rows = convert([tmp_path / "in.tar"], tmp_path / "out")
    rejected = report["rejected"]
    shown = sum(reason["number"] for reason in rejected["reasons"].values())
    assert len(rejected["reasons"]) == 50 and shown + rejected["other_reasons"]["number"] == rejected["number"] == 1003
    assert sum(outcome == "rejected" for outcome, _, _ in rows) == 1003


def test_a_stray_image_takes_no_labels_and_links_are_followed_where_they_are_to_be(tmp_path, capsys):
    rng, root = np.random.default_rng(6), tmp_path / "aid"
    for name in ("train/port/1.png", "train/port/2.png", "train/park/3.png", "train/logo.png", "test/port/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(rng.integers(0, 256, (40, 40, 3), np.uint8)))
    (tmp_path / "far").mkdir()
    (tmp_path / "far/5.png").write_bytes((root / "test/port/4.png").read_bytes())
    (root / "train/river").symlink_to(tmp_path / "far")
    for source in (root / "train", tmp_path / "train.tar"):
        if source.suffix:
            pack(source,
                {f"all/{path.relative_to(root / 'train')}": path.read_bytes() for path in root.glob("train/p*/*.png")}
                 | {"all/logo.png": (root / "train/logo.png").read_bytes()})  # fmt: skip
        images.main(["--input", str(source), "--output", str(tmp_path / f"out {source.name}"), "--split", "train",
                     "--workers", "1"])  # fmt: skip
        told, info = capsys.readouterr().out, records.load_info(tmp_path / f"out {source.name}")
        assert info.class_names == ["park", "port"] and info.splits["train"].records == 3
        assert (
            "1 image lies outside the folders of the 2 classes park, port and is left out" in told
            and "logo.png" in told
        )
        assert ("1 link leads out of" in told) == (not source.suffix)
    images.main(["--input", str(root / "train"), "--output", str(tmp_path / "followed"), "--split", "train",
        "--workers", "1",
                 "--follow-links"])  # fmt: skip
    assert records.load_info(tmp_path / "followed").class_names == ["park", "port", "river"]
    capsys.readouterr()
    images.main(["--input", str(root), "--output", str(tmp_path / "both"), "--split", "train", "--workers", "1"])
    assert "classes are test, train, which look like splits; if they are, pass --input" in (
        told := capsys.readouterr().out
    )
    assert "aid/train, which contains park, port" in told
