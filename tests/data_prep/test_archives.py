"""Damaged, truncated and malicious archives."""

import zipfile

import numpy as np
import pytest
from toy_files import encode, pack

from data_prep import images
from data_prep.inputs import archives, sources
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records


def test_classes_of_several_archives_are_the_folders_in_them(tmp_path):
    paths = [tmp_path / name for name in ("one.tar", "two.tar.gz", "three.zip")]
    held = (
        ["AID/port/1.jpg", "AID/farm/1.jpg"],
        ["port/2.jpg", "wood/x/3.jpg"],
        ["./top/in/wood/4.jpg", "top/in/farm/4.jpg"],
    )
    for path, names in zip(paths, held, strict=True):
        pack(path, dict.fromkeys(names, b"?"))
    inventory = sources.take_stock(paths)
    inventory.label()
    found = {item.key: inventory.class_names[item.label] for item in inventory}
    assert found == {
        "one.tar/AID/port/1.jpg": "port", "one.tar/AID/farm/1.jpg": "farm", "two.tar.gz/port/2.jpg": "port",
        "two.tar.gz/wood/x/3.jpg": "wood", "three.zip/top/in/wood/4.jpg": "wood", "three.zip/top/in/farm/4.jpg": "farm",
    }  # fmt: skip


def test_backslashes_in_a_zip_are_folders_and_are_told(tmp_path, capsys):
    """As Windows PowerShell 5 writes them; a name that leads out, or that is there twice, is rejected as ever."""
    image = encode(np.zeros((40, 40, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "win.zip", "w") as archive:
        for name in (
            "train\\",
            "train\\wood\\1.png",
            "train\\wood/1.png",
            "train\\sea\\2.png",
            "train\\..\\..\\3.png",
            "\\4.png",
        ):
            member = zipfile.ZipInfo("x")
            member.filename = name  # ZipInfo itself would cut at a backslash on Windows
            archive.writestr(member, b"" if name.endswith("\\") else image)
    images.main(
        ["--input", str(tmp_path / "win.zip"), "--output", str(tmp_path / "out"), "--split", "train", "--workers", "1"]
    )
    said = capsys.readouterr().out
    assert "5 names in " in said
    assert "have backslashes, which are read as folders" in said
    info = records.load_info(tmp_path / "out")
    assert info.class_names == ["sea", "wood"]
    assert info.splits["train"].records == 2
    table = (tmp_path / "out/train.inputs.csv").read_text()
    assert "another member has this name" in table
    assert table.count(archives.OUTSIDE) == 2


def test_backslashes_that_are_no_folders_are_told(tmp_path, capsys):
    pack(tmp_path / "in.tar", {f"wood\\{i}.png": encode(np.full((40, 40, 3), i, np.uint8)) for i in range(3)})
    images.main(
        ["--input", str(tmp_path / "in.tar"), "--output", str(tmp_path / "out"), "--split", "train", "--workers", "1"]
    )
    assert "3 names in " in (said := capsys.readouterr().out)
    assert "classes in them are not found" in said


def test_classes_that_no_list_of_names_can_hold_are_refused(tmp_path):
    pack(tmp_path / "in.tar", {"a\nerror: forged/1.png": b"?", "b/1.png": b"?"})
    inventory = sources.take_stock([tmp_path / "in.tar"])
    with pytest.raises(UserError, match=r"in.tar has class names .*'a\\nerror: forged'; rename them"):
        inventory.label()


def test_utf_8_in_a_zip_needs_no_flag(tmp_path):
    """As macOS writes it; code page 437, which such names should be in, is read as ever."""
    names = {
        "caf\xe9/1.png": b"caf\xc3\xa9/1.png",
        "stra\xdfe/2.png": b"stra\xe1e/2.png",
        "plain/3.png": b"plain/3.png",
    }
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for raw in names.values():
            archive.writestr(raw.decode("cp437").encode("ascii", "replace").decode(), b"?")
    content = (tmp_path / "mac.zip").read_bytes()
    for raw in names.values():
        content = content.replace(raw.decode("cp437").encode("ascii", "replace"), raw)
    (tmp_path / "mac.zip").write_bytes(content)
    assert [found.name for found in archives.members(tmp_path / "mac.zip")] == list(names)


def test_archives_one_behind_the_other_are_refused(tmp_path):
    for name in ("one", "two"):
        pack(tmp_path / f"{name}.tar", {f"{name}/1.jpg": b"?"})
    (tmp_path / "both.tar").write_bytes((tmp_path / "one.tar").read_bytes() + (tmp_path / "two.tar").read_bytes())
    with pytest.raises(UserError, match="both.tar continues after its end marker"):
        sources.take_stock([tmp_path / "both.tar"])


def test_classes_that_look_the_same_are_told(tmp_path):
    for folder in ("caf\xe9", "cafe\u0301", "Sea", "sea ", "wood"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(b"?")
    (told,) = sources.take_stock([tmp_path]).label()
    assert told.endswith(r"count as different: 'Sea', 'sea ', 'cafe\u0301', 'caf\xe9'")


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
    failed = []
    for item in sources.take_stock([tmp_path / "flip.zip"]):
        try:
            assert sources.read(item) == files[item.key]
        except codecs.ImageDecodeError:
            failed.append(item.key)
    assert failed == ["a/7.png"]
    pack(tmp_path / "short.tar", files)
    whole = (tmp_path / "short.tar").read_bytes()
    for cut in (40_000, 40_960, 512 * 13, 100):
        (tmp_path / "short.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="archive .*short.tar cannot be read"):
            sources.take_stock([tmp_path / "short.tar"])


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_packed_bombs_are_never_unpacked_into_memory(tmp_path, ending):
    good, zeros = encode(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)), bytes(70 << 20)
    pack(tmp_path / f"in.{ending}", {"bomb.png": zeros, "good.png": good, "bomb too.png": zeros})
    inventory = sources.take_stock([tmp_path / f"in.{ending}"])
    assert [(item.key, sources.read(item)) for item in inventory] == [("good.png", good)]
    bombs = [(name, reason) for name, reason in inventory.rejected if "bomb" in name]
    assert len(bombs) == 2 and all("compressed to less than" in reason for _, reason in bombs)


def test_damaged_bytes_of_archives_are_a_sentence_or_failed_images(tmp_path):
    """Whatever byte is damaged, the listing and the reading know no other errors, and read no more than was claimed."""
    rng = np.random.default_rng(3)
    files = {f"a/{i}.png": encode(rng.integers(0, 256, (9, 9, 3), np.uint8)) for i in range(3)}
    refused = failed = 0
    for ending in ("tar", "tar.gz", "tar.bz2", "zip"):
        pack(tmp_path / f"whole.{ending}", files | {"a/\u00fc" + "long" * 40 + ".png": files["a/0.png"]})
        whole = (tmp_path / f"whole.{ending}").read_bytes()
        path = tmp_path / f"in.{ending}"
        for _ in range(300):
            damaged = bytearray(whole)
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
            path.unlink(missing_ok=True)
            path.write_bytes(damaged)
            try:
                inventory = sources.take_stock([path])
                inventory.label()
            except UserError as error:
                assert "cannot be read" in str(error) or "holds no image" in str(error)
                refused += 1
                continue
            for item in inventory:
                try:
                    assert len(sources.read(item)) <= item.size
                except codecs.ImageDecodeError:
                    failed += 1
            archives.close_all()
    assert refused > 300 and failed > 20
