"""Labelled scenes for the dense tasks, from folders of images and masks.

    segmentation: FOLDER[/SPLIT]/image/NAME.* and FOLDER[/SPLIT]/label/NAME.png, values the class index, 255 no label
    change:       FOLDER[/SPLIT]/A/NAME.* and B/NAME.* (two dates), label/NAME.png, values 0 and 255 (or 1): changed

Images are JPEG, PNG or TIFF. With the subfolders of the splits there is one fold, from one split to the other; without
them the scenes are tested in turn, by a head that was trained on the others.
"""

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from pera_jax.bands import Bands
from pera_jax.data import codecs
from pera_jax.errors import UserError
from pera_jax.probes.overlap import IGNORE

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
CHANGE_CLASSES = ("unchanged", "changed")
CLASSES_FILE = "classes.txt"

Fold = tuple[tuple[int, ...], tuple[int, ...]]  # (training scenes, test scenes), by their places


@dataclasses.dataclass(frozen=True)
class Scene:
    """
    Attributes:
      key: the file's stem.
      images: stored values [H, W, C] of the encoder's bands; one, or two dates.
      mask: uint8 [H, W] of class indices, IGNORE without label.
    """

    key: str
    images: tuple[np.ndarray, ...]
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dense:
    """What a dense task gets.

    Attributes:
      folds: each scene is tested at most once.
      patch: px, the side of what a token stands for.
      tokens: (stored image [H, W, C], window px, stride px) -> float32 [n, ceil(H / patch), ceil(W / patch), D]: the
        patch tokens of the n last blocks, the last block last; see `dense.encode`.
    """

    scenes: tuple[Scene, ...]
    folds: tuple[Fold, ...]
    class_names: tuple[str, ...]
    patch: int
    tokens: Callable[[np.ndarray, int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Folder:
    """Labelled scenes as they were read; `dense` adds the encoder.

    Attributes:
      fingerprints: SHA-256 over names and contents of all files of the training and of the test split; twice the same
        where there are no splits.
    """

    scenes: tuple[Scene, ...]
    folds: tuple[Fold, ...]
    class_names: tuple[str, ...]
    fingerprints: tuple[str, str]

    def dense(self, patch: int, tokens: Callable[[np.ndarray, int, int], np.ndarray]) -> Dense:
        return Dense(self.scenes, self.folds, self.class_names, patch, tokens)


def load(
    folder: str | pathlib.Path,
    dates: int,
    bands: Bands,
    folds: int = 0,
    class_names: Sequence[str] = (),
    splits: tuple[str, str] = ("train", "test"),
) -> Folder:
    """Reads all scenes of a folder.

    Args:
      dates: 1 for segmentation, 2 for change.
      bands: of the encoder; images must have as many, of its dtype.
      folds: in how many parts the scenes of a folder without splits are tested; 0, or more than there are scenes: each
        by itself.
      class_names: of segmentation, where the folder has no classes.txt (one name a line); (): "class 0" and so on.
      splits: the subfolders to train and to test on, see `folders`.

    Raises:
      UserError: bad input, in one sentence that names the file.
    """
    folder = pathlib.Path(folder)
    places = folders(folder, splits)
    names = _class_names(folder, dates, class_names)
    parts = [_read_part(place, dates, bands, names) for place in places]
    scenes = tuple(scene for part, _ in parts for scene in part)
    if len(parts) == 2:
        first = len(parts[0][0])
        cut = ((tuple(range(first)), tuple(range(first, len(scenes)))),)
    else:
        cut = _cut(len(scenes), folds, places[0])
    names = names or tuple(f"class {index}" for index in range(_highest(scenes) + 1))
    for train, _ in cut:
        _check_training(folder, [scenes[index] for index in train])
    return Folder(scenes, cut, names, (parts[0][1], parts[-1][1]))


def folders(folder: pathlib.Path, splits: tuple[str, str]) -> tuple[pathlib.Path, ...]:
    """Where the training and the test scenes lie; one folder where they are the same ones, in folds.

    That is where neither split is a subfolder, or where one of them is "", none of its own: then the other, or without
    such a subfolder the folder itself.

    Raises:
      UserError: only one of two splits is there; twice the same split.
    """
    present = [split for split in splits if split and (folder / split).is_dir()]
    if not all(splits):
        return (folder / present[0],) if present else (folder,)
    if len(present) == 1:
        missing = splits[1 - splits.index(present[0])]
        raise UserError(f"{folder} has the split {present[0]!r} but not {missing!r}; add it, or do without both")
    if len(set(splits)) == 1 and present:
        raise UserError(f"the training and the test split are both {splits[0]!r}; a test needs scenes of its own")
    return tuple(folder / split for split in present) or (folder,)


def _class_names(folder, dates, given):
    """The names of the classes; () where masks alone tell their number."""
    if dates == 2:
        return CHANGE_CLASSES
    file = folder / CLASSES_FILE
    if not file.is_file():
        return tuple(given)
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as text; write one class name a line") from error
    if not 0 < len(names) <= IGNORE:
        raise UserError(f"{file} holds {len(names)} class names; write 1 to {IGNORE}, one a line")
    return names


def _cut(number: int, folds: int, folder: pathlib.Path) -> tuple[Fold, ...]:
    """Folds of neighbours in order of names, which often show one place; each scene is tested once."""
    if number < 2:
        raise UserError(f"{folder} holds one scene only; a test needs a scene of its own")
    if folds == 1 or folds < 0:
        raise UserError(f"folds={folds} leaves nothing to train on; take 0 (each scene by itself) or 2 and more")
    tests = np.array_split(np.arange(number), folds if 0 < folds <= number else number)
    return tuple((tuple(np.setdiff1d(np.arange(number), test).tolist()), tuple(test.tolist())) for test in tests)


def _highest(scenes: Sequence[Scene]) -> int:
    """The highest class index in any mask, -1 without labels."""
    values = np.unique(np.concatenate([np.unique(scene.mask) for scene in scenes]))
    return int(max(values[values != IGNORE], default=-1))


def _check_training(folder: pathlib.Path, scenes: Sequence[Scene]) -> None:
    classes = np.unique(np.concatenate([np.unique(scene.mask) for scene in scenes]))
    if np.sum(classes != IGNORE) < 2:
        keys = ", ".join(scene.key for scene in scenes[:3]) + (", ..." if len(scenes) > 3 else "")
        raise UserError(
            f"the training scenes {keys} of {folder} hold fewer than two classes; there is nothing to tell apart"
        )


def _read_part(folder, dates, bands, names) -> tuple[list[Scene], str]:
    """The scenes of a folder or of a split of it, in order of names, and their fingerprint."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    kinds = ("image",) if dates == 1 else ("A", "B")
    files = {kind: _files(folder / kind, SUFFIXES) for kind in kinds} | {"label": _files(folder / "label", (".png",))}
    for kind in (*kinds[1:], "label"):
        for one, other in ((kinds[0], kind), (kind, kinds[0])):
            for stem in sorted(files[one].keys() - files[other].keys()):
                raise UserError(f"{files[one][stem]} has no counterpart {stem!r} in {folder / other}; add or remove it")
    digest, scenes = hashlib.sha256(), []
    for stem in files["label"]:
        images = tuple(_image(files[kind][stem], bands, digest, folder) for kind in kinds)
        paths = [files[kind][stem] for kind in kinds]
        mask = _mask(files["label"][stem], dates, names, digest, folder)
        for path, shape in [(paths[-1], images[-1].shape[:2]), (files["label"][stem], mask.shape)]:
            if shape != images[0].shape[:2]:
                raise UserError(
                    f"{path} is {shape[1]} x {shape[0]} px and {paths[0]} is {images[0].shape[1]} x "
                    f"{images[0].shape[0]} px; they must be of one size"
                )
        scenes.append(Scene(stem, images, mask))
    return scenes, digest.hexdigest()


def _files(folder: pathlib.Path, suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """The images of a folder by their stems, ascending."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; images belong in image/ (or A/ and B/), masks in label/")
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in files:
                raise UserError(f"{files[path.stem]} and {path} have one name; rename or remove one of them")
            files[path.stem] = path
    if not files:
        raise UserError(f"{folder} holds no file {', '.join('*' + suffix for suffix in suffixes)}")
    return files


def _content(path: pathlib.Path, digest, folder: pathlib.Path) -> bytes:
    """A file's bytes, which with its name go into the digest."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    name = path.relative_to(folder).as_posix().encode()
    for part in (name, content):
        digest.update(len(part).to_bytes(8, "big"))  # so that no other names and contents give the same bytes
        digest.update(part)
    return content


def _image(path: pathlib.Path, bands: Bands, digest, folder: pathlib.Path) -> np.ndarray:
    try:
        pixels = codecs.decode_image(_content(path, digest, folder))
    except codecs.ImageDecodeError as error:
        raise UserError(f"{path} cannot be decoded; replace or remove it") from error
    if pixels.shape[2] != len(bands) or pixels.dtype != bands.dtype:
        raise UserError(
            f"{path} has {pixels.shape[2]} bands of {pixels.dtype}, and the encoder takes {len(bands)} of "
            f"{bands.dtype} ({', '.join(bands.names)})"
        )
    return pixels


def _mask(path: pathlib.Path, dates: int, names: Sequence[str], digest, folder: pathlib.Path) -> np.ndarray:
    """uint8 [H, W] of class indices and IGNORE."""
    try:
        with Image.open(io.BytesIO(_content(path, digest, folder))) as image:
            mask = np.array(image)  # indices where there is a palette
    except codecs.DECODE_ERRORS as error:
        raise UserError(f"{path} cannot be decoded; replace or remove it") from error
    if mask.ndim != 2:
        raise UserError(f"{path} has {mask.shape[2]} bands; a mask has one, of class indices")
    values = np.unique(mask)
    if dates == 2:
        if not (set(values.tolist()) <= {0, 1} or set(values.tolist()) <= {0, 255}):
            raise UserError(f"{path} holds the values {_listed(values)}; a mask of change holds 0 and 255, or 0 and 1")
        return (mask > 0).astype(np.uint8)
    limit = len(names) or IGNORE
    wrong = values[(values != IGNORE) & ((values < 0) | (values >= limit))]
    if len(wrong):
        raise UserError(f"{path} holds the class {_listed(wrong)}; classes are 0 to {limit - 1}, and {IGNORE} no label")
    return mask.astype(np.uint8)


def _listed(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:5].tolist())) + (", ..." if len(values) > 5 else "")
