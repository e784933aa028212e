"""From a run and images to the page: draws every picture, writes the files, the page last."""

import pathlib

import numpy as np
from PIL import Image

from pera_jax import checkpoint, files
from pera_jax.bands import Bands
from pera_jax.data import records
from pera_jax.errors import UserError
from pera_jax.probes import features
from pera_jax.reports import folder, grid, images, neighbours, page, pairs, tokens
from pera_jax.reports.folder import Folder
from pera_jax.reports.page import Section, pictured

PAGE = "index.html"


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
) -> pathlib.Path:
    """Writes `output`/index.html and a PNG for each picture beside it; arguments as the command's options.

    Returns:
      The page.

    Raises:
      UserError: no such run, step, data or split; data of other bands; numbers that do not fit; an output that cannot be
        written.
    """
    for option, value in (("--pairs", number_of_pairs), ("--images", number)):
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be at least 0")
    found = folder.read(run, step)
    data = _data_of(found.meta) if data is None else data
    before, after, scenes = page.of_the_folder(found)
    pictures: dict[str, Image.Image] = {f"{_file_name(name)}": grid.picture(of) for name, of in scenes.items()}
    if data is None or found.step is None:
        middle = _left_out(page.NO_CHECKPOINT if found.step is None else page.NO_DATA)
        if split is not None or image_size is not None:
            raise UserError("--split and --image-size are of images; name a data set folder with --data")
    else:
        middle = _pictures(found, data, split, number, number_of_pairs, image_size, seed, pictures)
    content = page.assembled(found, [*before, *middle, *after])
    _write(pathlib.Path(output), {f"{name}.png": grid.png(of) for name, of in pictures.items()} | {PAGE: content})
    return pathlib.Path(output) / PAGE


def _data_of(meta) -> str | None:
    """The (first) data set folder that the run was trained on, if it lies where it did."""
    path = meta["config"]["data"]["path"].split(",")[0].strip()
    return path if path and (pathlib.Path(path) / records.INFO_FILE).is_file() else None


def _left_out(why: str) -> list[Section]:
    return [
        Section(place, title, "", "", why)
        for place, title in (("pairs", "Pairs"), ("tokens", "Patch tokens"), ("attention", "Attention of the class token"),
                             ("neighbours", "Nearest neighbours"))
    ]  # fmt: skip


def _pictures(
    found: Folder, data: str, split: str | None, number: int, number_of_pairs: int, image_size: int | None, seed: int,
    pictures: dict[str, Image.Image],
) -> list[Section]:
    """The sections of pictures of images; each picture is also put into `pictures`."""
    meta, trained_on = found.meta, found.meta["config"]["data"]["split"]
    info = records.load_info(data)
    split = split or ("test" if "test" in info.splits else trained_on)
    source = records.open_split(data, split)
    bands, names = Bands.of(meta), info.class_names
    bands.places(info, source.path)  # raises where a band is missing
    channels = images.visible(bands, tuple(meta["config"]["views"]["rgb"]))
    for option, value in (("--pairs", number_of_pairs), ("--images", number)):
        if value > len(source):
            raise UserError(f"{option} is {value}, but the split of {data} holds {len(source)} images; ask for fewer")
    size = tokens.default_size(meta["model"]) if image_size is None else image_size
    features.check_image_size(size, meta)

    columns, explained = pairs.pairs(
        checkpoint.load_weights(found.path, found.step, which="student"), source, number_of_pairs, seed
    )
    share = f"The guess explains {explained:.0%} of the variance of the learnable patches' pixels."
    drawn = pairs.grid(columns)
    title = f"{meta['config']['name']}, step {found.step:,}"
    pictures["pairs"] = grid.picture(drawn, f"{title}: {share}")
    sections = [pictured("pairs", "Pairs", pairs.READING, drawn, "", share)]

    weights = checkpoint.load_weights(found.path, found.step)
    chosen = images.choose(images.labels_of(source), number, seed)
    shown = [images.read(source, bands, index, size) for index in chosen]
    rgb = np.stack([images.as_bytes(bands.mapped(entry.pixels), channels) for entry in shown])
    untrained = checkpoint.load_weights(found.path, found.step, untrained=True)
    looked, before = tokens.look(meta, (weights.backbone, untrained.backbone), [entry.pixels for entry in shown])
    if not (np.isfinite(looked.patches).all() and np.isfinite(looked.attention).all()):
        raise UserError(f"the checkpoint of step {found.step} gives tokens that are not finite; choose an earlier --step")
    maps, shares = tokens.colours(looked.patches)
    drawn = tokens.pca_grid(shown, rgb, {"trained": maps, "untrained": tokens.colours(before.patches)[0]}, names)
    pictures["tokens"] = grid.picture(drawn, f"{title}: principal components of the patch tokens")
    side = looked.patches.shape[1]
    where = f"Whole images of split “{split}”, resized to {size} x {size} px: {side} x {side} patches."
    axes = ", ".join(f"{share:.0%}" for share in shares)
    caption = f"{where} The components hold {axes} of the variance of the trained network's tokens."
    sections.append(pictured("tokens", "Patch tokens", tokens.PCA_READING, drawn, "", caption))
    drawn = tokens.attention_grid(shown, rgb, looked.attention, names)
    pictures["attention"] = grid.picture(drawn, f"{title}: attention of the class token, last block")
    reading = tokens.ATTENTION_READING.format(full=tokens.BRIGHT, even=1.0 / looked.attention.shape[2])
    itself = looked.attention[:, :, 0].mean()
    caption = f"The same images. The class token takes {itself:.1%} from itself, on average over heads and images."
    sections.append(pictured("attention", "Attention of the class token", reading, drawn, "", caption))
    sections.append(_neighbours(weights, source, data, split, trained_on, chosen, channels, seed, title, pictures))
    return sections


def _neighbours(weights, source, data, split, trained_on, chosen, channels, seed, title, pictures) -> Section:
    """Queries are the images that the other sections show; they are searched for among the images trained on."""
    if trained_on not in source.info.splits:
        missing = f"{data} has no split {trained_on!r}, on which the run was trained, to find neighbours in."
        return Section("neighbours", "Nearest neighbours", "", "", missing)
    bands, size = Bands.of(weights.meta), weights.meta["model"]["image_size"]
    train = source if split == trained_on else records.open_split(data, trained_on)
    searched = np.arange(len(train))
    if len(train) > neighbours.MOST:
        drawn = np.random.default_rng(seed).choice(len(train), neighbours.MOST, replace=False)
        searched = np.sort(np.union1d(drawn, chosen) if train is source else drawn)
    extractor = features.Extractor(weights.backbone, weights.meta)

    def tokens_of(of, indices):
        subset = images.Subset(of, indices)
        return features.extract(extractor, subset, bands, size, 256).class_tokens[:, -1]

    candidates = tokens_of(train, searched)
    own = np.searchsorted(searched, chosen) if train is source else None
    order = np.argsort(chosen)  # a subset is read in ascending order
    queries = candidates[own] if own is not None else tokens_of(source, chosen)[np.argsort(order)]
    cosines, places = neighbours.nearest(candidates, queries, neighbours.NUMBER, own)
    found = [[images.read(train, bands, searched[place], size) for place in row] for row in places]
    asked = [images.read(source, bands, index, size) for index in chosen]
    names = source.info.class_names
    shown = neighbours.grid(asked, found, cosines, bands, channels, names)
    caption = f"Searched: {len(searched):,} of {len(train):,} images of split “{trained_on}”, resized to {size} x {size} px."
    if names:
        same = np.mean([of.label == query.label for query, row in zip(asked, found, strict=True) for of in row])
        caption += f" Of the neighbours shown {same:.0%} are of the query's class."
    pictures["neighbours"] = grid.picture(shown, f"{title}: nearest neighbours by cosine of the class token")
    reading = neighbours.READING + (neighbours.FRAMES if names else "")
    return pictured("neighbours", "Nearest neighbours", reading, shown, "", caption)


def _file_name(name: str) -> str:
    """A result's name as that of a file, whatever it holds."""
    return "scenes_" + "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _write(output: pathlib.Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        try:
            files.write(output / name, content)
        except OSError as error:
            raise UserError(
                f"cannot write {output / name}: {error.strerror}; make room or choose another --output"
            ) from error
