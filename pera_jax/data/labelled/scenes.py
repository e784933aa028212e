"""Labeled scenes for dense tasks, from folders of images and masks.

    segmentation: FOLDER[/SPLIT]/image/NAME.* and FOLDER[/SPLIT]/label/NAME.*, class indices, 255 for unlabeled pixels
    change:       FOLDER[/SPLIT]/A/NAME.* and B/NAME.* (two dates), label/NAME.*, 0 and 255 (or 1) for changed pixels

Images are JPEG, PNG, WebP or TIFF, masks PNG or TIFF. With split folders there is one fold, training split to test
split; without them, scenes are cross-validated.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from pera_jax.bands import Bands
from pera_jax.common import classes
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.data.images import foreign
from pera_jax.data.images.foreign import NO_LABEL as IGNORE
from pera_jax.data.labelled import scene_files
from pera_jax.data.labelled.scene_files import Scene
from pera_jax.parallel import distributed

CHANGE_CLASSES = ("unchanged", "changed")
CLASSES_FILE = "classes.txt"

Fold = tuple[tuple[int, ...], tuple[int, ...]]  # (training scenes, test scenes), by index


@dataclasses.dataclass(frozen=True)
class Dense:
    """The input of a dense task.

    Attributes:
      folds: each scene is tested at most once.
      patch: side of a patch in px.
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
    """Labeled scenes of a folder; `dense` adds the encoder.

    Attributes:
      fingerprints: SHA-256 over names and contents of all files, for the training and the test split; equal if there
        are no splits.
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
    max_corrupt_fraction: float = 0.0,
) -> Folder:
    """Reads all scenes of a folder.

    Args:
      dates: 1 for segmentation, 2 for change.
      bands: of the encoder; images must have the same number of bands and dtype.
      folds: number of cross-validation folds without splits; 0, or more than the number of scenes: leave one out.
      class_names: for segmentation without a classes.txt (one name per line); () gives "class 0", "class 1", ...
      splits: subfolders for training and test, see `folders`.
      max_corrupt_fraction: maximum fraction of damaged scenes, which are skipped with a warning.

    Raises:
      UserError: invalid input; the message names the file.
    """
    folder = pathlib.Path(folder)
    places = folders(folder, splits)
    names = _class_names(folder, dates, class_names)
    parts = [_read_part(place, dates, bands, names, max_corrupt_fraction) for place in places]
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
    """The folders of the training and the test scenes; a single folder for cross-validation.

    Cross-validation is used if neither split is a subfolder, on the folder itself, or if one split is "", on the other
    split if that is a subfolder.

    Raises:
      UserError: only one of two splits exists, or both are the same.
    """
    present = [split for split in splits if split and (folder / split).is_dir()]
    if not all(splits):
        return (folder / present[0],) if present else (folder,)
    if len(present) == 1:
        missing = splits[1 - splits.index(present[0])]
        raise UserError(f"{folder} has the split {present[0]!r} but not {missing!r}; add it, or remove both")
    if len(set(splits)) == 1 and present:
        raise UserError(f"the training and the test split are both {splits[0]!r}; choose different splits")
    return tuple(folder / split for split in present) or (folder,)


def _class_names(folder, dates, given):
    """The class names; () if their number follows from the masks."""
    if dates == 2:
        return CHANGE_CLASSES
    file = folder / CLASSES_FILE
    if not file.is_file():
        return tuple(given)
    return classes.read(file, IGNORE)


def _cut(number: int, folds: int, folder: pathlib.Path) -> tuple[Fold, ...]:
    """Folds of scenes with consecutive names, which often show the same place; each scene is tested once."""
    if number < 2:
        raise UserError(f"{folder} has only one scene; at least two are required")
    if folds == 1 or folds < 0:
        raise UserError(f"folds={folds} is invalid; choose 0 (leave one out) or >= 2")
    tests = np.array_split(np.arange(number), folds if 0 < folds <= number else number)
    return tuple((tuple(np.setdiff1d(np.arange(number), test).tolist()), tuple(test.tolist())) for test in tests)


def _highest(scenes: Sequence[Scene]) -> int:
    """The highest class index in any mask, -1 without labels."""
    values = np.unique(np.concatenate([np.unique(scene.mask) for scene in scenes]))
    return int(max(values[values != IGNORE], default=-1))


def _check_training(folder: pathlib.Path, scenes: Sequence[Scene]) -> None:
    classes = np.unique(np.concatenate([np.unique(scene.mask) for scene in scenes]))
    if np.sum(classes != IGNORE) < 2:
        keys = several(scene.key for scene in scenes)
        raise UserError(
            f"the training scenes {keys} of {folder} have fewer than two classes; at least two are required"
        )


def _read_part(folder, dates, bands, names, max_corrupt_fraction) -> tuple[list[Scene], str]:
    """The scenes of a folder or split, sorted by name, and their fingerprint."""
    found, digest = scene_files.files(folder, dates), hashlib.sha256()

    def seen(path, content):
        for part in (os.fsencode(path.relative_to(folder).as_posix()), content):
            digest.update(len(part).to_bytes(8, "big"))  # makes the encoding unambiguous
            digest.update(part)

    scenes, faults = [], []
    for key in found["label"]:
        try:
            scenes.append(scene_files.read(found, key, bands, names, seen))
        except scene_files.UnreadableScene as error:
            faults.append(error)
            if len(faults) > max_corrupt_fraction * len(found["label"]):
                raise
    if faults:
        total = len(found["label"])
        distributed.say(f"warning: {len(faults):,} of {total:,} scenes are skipped: {several(faults)}")
    changes = collections.Counter(change for scene in scenes for change in scene.changes if change in foreign.CHANGES)
    for name, number in changes.most_common():
        distributed.say(f"{name}: {number:,} scenes {foreign.CHANGES[name]}")
    return scenes, digest.hexdigest()
