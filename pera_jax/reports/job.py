"""Builds the report of a run: draws every figure and writes the files, the page last."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
from PIL import Image

from pera_jax import objectives
from pera_jax.bands import Bands, as_bytes, visible
from pera_jax.common import files, lease, owned, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import records
from pera_jax.data.labelled import samples
from pera_jax.encoder import extract as features
from pera_jax.encoder.load import Weights, backbone_alone, load_weights, networks_of
from pera_jax.reports import folder, page
from pera_jax.reports.drawing import grid, images
from pera_jax.reports.folder import Folder
from pera_jax.reports.page import Section, pictured
from pera_jax.reports.sections import neighbors, pairs, tokens
from pera_jax.training.checkpoints import checkpoint

PAGE = "index.html"
_TITLES = {
    "pairs": "Pairs", "tokens": "Patch tokens", "attention": "Attention of the class token",
    "neighbors": "Nearest neighbors",
}  # fmt: skip


def report(
    run: str,
    output: str,
    *,
    data: str | None = None,
    step: int | None = None,
    split: str | None = None,
    number: int = 8,
    number_of_pairs: int = 6,
    image_size: int | None = None,
    seed: int = 0,
    verify: bool = True,
) -> pathlib.Path:
    """Writes `output`/index.html and a PNG for each figure beside it; the arguments are the options of the command.

    Returns:
      The path of the page.

    Raises:
      UserError: a run, step, dataset or split that does not exist; data with other bands; invalid numbers; an output
        that cannot be written.
    """
    for option, value in (("--pairs", number_of_pairs), ("--images", number)):
        if value < 1:
            raise UserError(f"{option} is {value}; it must be >= 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be >= 0")
    for path in (run, output, data or ""):
        paths.local(path)
    if pathlib.Path(output).exists() and not pathlib.Path(output).is_dir():
        raise UserError(f"cannot write to {output}: it is a file; choose another --output")
    with lease.held(output, "--output", name=".report.lease"):
        return _report(run, output, data, step, split, number, number_of_pairs, image_size, seed, verify)


def _report(run, output, data, step, split, number, number_of_pairs, image_size, seed, verify) -> pathlib.Path:
    owned.check(pathlib.Path(output) / PAGE)

    def read(chosen: int | None) -> tuple[Folder, dict[str, Weights]]:
        """Reads at once everything that a running training may remove; keeps the weights in host memory."""
        found = folder.read(run, chosen)
        if found.step is None or (data is None and _training_data(found.meta) is None):
            return found, {}
        networks = networks_of(found.meta)
        loaded = {which: load_weights(run, found.step, which, verify) for which in networks}
        params = {which: jax.tree.map(np.asarray, weights.params) for which, weights in loaded.items()}
        return found, {which: dataclasses.replace(loaded[which], params=params[which]) for which in networks}

    beside_training = pathlib.Path(run).is_dir() and (step is not None or checkpoint.saved_steps(run))
    found, networks = checkpoint.read_while_present(run, step, read) if beside_training else read(step)
    data = _training_data(found.meta) if data is None else data
    subject = None if data is None or found.step is None else _Subject.open(found, networks, data, split, seed)
    found.faults.extend(subject.faults if subject else ())
    for fault in found.faults:
        print(printable(fault, None), file=sys.stderr)
    before, after, scenes = page.folder_sections(found)
    pictures = {_file_name(name): grid.picture(scene) for name, scene in scenes.items()}
    if subject is None:
        missing = page.NO_CHECKPOINT if found.step is None else page.NO_DATA
        middle = [Section(place, title, "", "", missing) for place, title in _TITLES.items()]
    else:
        size = tokens.default_size(found.meta["model"]) if image_size is None else image_size
        features.check_image_size(size, found.meta)
        weights, chosen = next(iter(networks.values())), images.pick(subject.source, number, seed)
        made = [_pairs(subject, number_of_pairs), *_tokens(subject, weights, chosen, size)]
        made.append(_neighbors(subject, weights, chosen))
        middle = [section for section, _ in made]
        pictures |= {section.place: picture for section, picture in made if picture is not None}
    content = page.assembled(found, [*before, *middle, *after])
    _write(
        pathlib.Path(output),
        {f"{name}.png": owned.png(picture, optimize=True) for name, picture in pictures.items()} | {PAGE: content},
    )
    return pathlib.Path(output) / PAGE


def _training_data(meta) -> str | None:
    """The (first) training dataset of the run, if the folder still exists."""
    path = meta["config"]["data"]["path"].split(",")[0].strip()
    return path if path and (pathlib.Path(path) / records.INFO_FILE).is_file() else None


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A checkpoint, and the split whose images are shown.

    Attributes:
      networks: by name, "teacher" and "student" as far as the checkpoint has them.
      names: class names, or None.
      channels: indices of the bands shown as red, green and blue.
      title: title of the checkpoint, for the figures.
    """

    found: Folder
    networks: dict[str, Weights]
    source: records.RecordSource
    bands: Bands
    names: list[str] | None
    channels: tuple[int, int, int]
    seed: int
    title: str

    @property
    def faults(self) -> list[str]:
        """A warning if the images are not the training data of the run."""
        card, info = self.found.meta["data"], self.source.info
        trained_on = info.splits.get(self.found.meta["config"]["data"]["split"])
        prints = [card["fingerprint"], *(each["fingerprint"] for each in card.get("sets", []) if "fingerprint" in each)]
        if "imported" in self.found.meta or (trained_on and trained_on.fingerprint in prints):
            return []
        return [f"The images of {self.source.path} are not the training data of this run: their fingerprint differs."]

    @classmethod
    def open(cls, found: Folder, networks: dict[str, Weights], data: str, split: str | None, seed: int) -> "_Subject":
        config, info = found.meta["config"], records.load_info(data)
        split = split or ("test" if "test" in info.splits else config["data"]["split"])
        source, bands = records.open_split(data, split), Bands.from_metadata(found.meta)
        if not len(source):
            raise UserError(f"the split {split!r} of {data} has no images; choose another --split")
        bands.indices_in(info, source.path)  # raises if a band is missing
        channels = visible(bands, tuple(config["data"]["rgb"]))
        return cls(
            found, networks, source, bands, info.class_names, channels, seed, f"{config['name']}, step {found.step:,}"
        )


def _pairs(subject: _Subject, number: int) -> tuple[Section, Image.Image | None]:
    number = min(number, len(subject.source))
    if backbone_alone(subject.found.meta):
        raise UserError(
            f"{subject.found.path} has no student, only the teacher's backbone; give the run folder of a training"
        )
    shown = pairs.preview(subject.networks, subject.source, number, subject.seed)
    if shown is None:
        return Section("pairs", _TITLES["pairs"], "", "", "the method of this run has no figure of its views."), None
    drawn = pairs.grid(shown)
    section = pictured("pairs", _TITLES["pairs"], shown.reading, drawn, shown.caption)
    return section, grid.picture(drawn, f"{subject.title}: {shown.caption}")


def _tokens(
    subject: _Subject, weights: Weights, chosen: np.ndarray, size: int
) -> tuple[tuple[Section, Image.Image], tuple[Section, Image.Image]]:
    """Patch tokens and attention on the chosen images."""
    found, bands = subject.found, subject.bands
    shown = [images.read(subject.source, bands, index, size) for index in chosen]
    rgb = np.stack([as_bytes(bands.mapped(entry.pixels), subject.channels) for entry in shown])
    backbones = (weights.backbone, objectives.untrained(found.meta)["backbone"])
    trained, untrained = tokens.encode(found.meta, backbones, [entry.pixels for entry in shown])
    if not (np.isfinite(trained.patches).all() and np.isfinite(trained.attention).all()):
        raise UserError(
            f"step {found.step} of {found.path} gives tokens with NaN or infinite values; choose an earlier --step"
        )

    maps, fractions = tokens.colors(trained.patches)
    drawn = tokens.pca_grid(
        shown, rgb, {"trained": maps, "untrained": tokens.colors(untrained.patches)[0]}, subject.names
    )
    side, axes = trained.patches.shape[1], ", ".join(f"{fraction:.0%}" for fraction in fractions)
    caption = (
        f"Images of the split “{subject.source.split}”, resized to {size} x {size} px: {side} x {side} patches. The "
        f"components explain {axes} of the variance of the trained network's tokens."
    )
    section = pictured("tokens", _TITLES["tokens"], tokens.PCA_READING, drawn, caption)
    token_section = section, grid.picture(drawn, f"{subject.title}: principal components of the patch tokens")

    drawn = tokens.attention_grid(shown, rgb, trained.attention, subject.names)
    reading = tokens.ATTENTION_READING.format(full=tokens.BRIGHT, even=1.0 / trained.attention.shape[2])
    itself = trained.attention[:, :, 0].mean()
    caption = (
        f"The same images. The attention of the class token to itself is {itself:.1%}, averaged over heads and images."
    )
    section = pictured("attention", _TITLES["attention"], reading, drawn, caption)
    return token_section, (section, grid.picture(drawn, f"{subject.title}: attention of the class token, last block"))


def _neighbors(
    subject: _Subject, weights: Weights, chosen: np.ndarray
) -> tuple[Section, Image.Image | None]:
    """Nearest neighbors, in the training split, of the images shown in the other sections."""
    source, bands, names = subject.source, subject.bands, subject.names
    size, trained_on = weights.meta["model"]["image_size"], weights.meta["config"]["data"]["split"]
    if trained_on not in source.info.splits:
        missing = f"{source.path} has no split {trained_on!r}, the training split of the run, to search for neighbors."
        return Section("neighbors", _TITLES["neighbors"], "", "", missing), None
    within = source.split == trained_on
    train = source if within else records.open_split(source.path, trained_on)
    searched = np.arange(len(train))
    if len(train) > neighbors.MOST:
        drawn = np.random.default_rng(subject.seed).choice(len(train), neighbors.MOST, replace=False)
        searched = np.union1d(drawn, chosen) if within else np.sort(drawn)
    extractor = features.Extractor(weights.backbone, weights.meta)

    def class_tokens(source, indices):
        return features.extract(extractor, samples.from_source(images.Subset(source, indices)), size, 256).class_tokens[
            :, -1
        ]

    candidates = class_tokens(train, searched)
    own = np.searchsorted(searched, chosen) if within else None
    queries = candidates[own] if within else class_tokens(source, chosen)
    cosines, ranked = neighbors.nearest(candidates, queries, neighbors.NUMBER, own)
    found = [[images.read(train, bands, searched[index], neighbors.SHOWN) for index in row] for row in ranked]
    asked = [images.read(source, bands, index, neighbors.SHOWN) for index in chosen]
    shown = neighbors.grid(asked, found, cosines, bands, subject.channels, names)
    number = f"{len(searched):,} of {len(train):,} images"
    caption = f"Searched: {number} of the split “{trained_on}”, resized to {size} x {size} px."
    if names and cosines.size:
        same = np.mean([each.label == query.label for query, row in zip(asked, found, strict=True) for each in row])
        caption += f" {same:.0%} of the neighbors shown have the class of the query."
    reading = neighbors.READING + (neighbors.FRAMES if names else "")
    section = pictured("neighbors", _TITLES["neighbors"], reading, shown, caption)
    return section, grid.picture(shown, f"{subject.title}: nearest neighbors by cosine similarity of the class token")


def _file_name(name: str) -> str:
    """A safe file name for the figure of a result, from the stem of the result's file."""
    return "scenes_" + "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _write(output: pathlib.Path, contents: dict[str, bytes]) -> None:
    for name in contents:
        owned.check(output / name)
    for name, content in contents.items():
        try:
            files.write(output / name, content)
        except OSError as error:
            raise UserError(
                f"cannot write {output / name}: {error.strerror}; free disk space or choose another --output"
            ) from error
