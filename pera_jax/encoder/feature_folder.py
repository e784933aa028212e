"""Writes the features of a dataset as NumPy arrays to a folder.

    pera-jax export features --run runs/aid --input images --output features

writes

    features.json                     weights, images and options of the export; names and per-image shapes of the
    arrays class_token-00000.npy             float32 [n, D] of the first n images (--part-size); -00001 of the next n,
    and so on patch_mean-00000.npy              float32 [n, D], the mean of an image's patch tokens
    patch_map-00000.npy               float32 [n, h, w, D], with --maps
    block_class_tokens-00000.npy      float32 [n, blocks, D], with --blocks
    block_maps-00000.npy              float32 [n, blocks, h, w, D], with both
    index.csv                         one line per image: key, label if the images have classes, part, row
    SHA256SUMS                        of all files except features.json, for `sha256sum -c SHA256SUMS`

Files are written atomically, index.csv last. After an interruption, re-run the same command to resume: it computes the
missing parts, and those that were modified. On the same devices the result is bitwise the same as without the
interruption.
"""

import csv
import functools
import hashlib
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.common import digests, files, json_files, lease, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.data.decode import resized
from pera_jax.data.labelled.samples import Samples
from pera_jax.encoder import extract as features
from pera_jax.encoder.cache import digest
from pera_jax.encoder.load import Weights
from pera_jax.encoder.model import Model
from pera_jax.parallel import distributed

PLAN, INDEX, SUMS = "features.json", "index.csv", "SHA256SUMS"
_FORMAT_VERSION = 1


def write(
    weights: Weights,
    samples: Samples,
    output: pathlib.Path,
    *,
    image_size: int | None = None,
    blocks: int | tuple[int, ...] = (),
    maps: bool = False,
    part_size: int = 1024,
    batch_size: int = 256,
    devices: list | None = None,
) -> str:
    """Writes the folder, or completes one from an interrupted export.

    Args:
      image_size: side in px to which images are resized; None for the size of the global crops in training.
      blocks: blocks whose tokens are written too, see `Model.apply`.
      maps: write the maps of patch tokens too.
      part_size: images per file.
      batch_size: images decoded at a time; does not change the features.
      devices: default: all local devices.

    Returns:
      A summary of what was written, to print.

    Raises:
      UserError: images or options that do not fit the weights; an image that cannot be read; a folder with other
        features, or one that cannot be written.
    """
    paths.local(output)
    for name, value in (("part size", part_size), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"the {name} is {value}; it must be >= 1")
    model = Model.from_metadata(weights.backbone, weights.meta)
    size = weights.meta["model"]["image_size"] if image_size is None else image_size
    features.check_image_size(size, weights.meta)
    samples = samples.suited_to(model.bands)
    model.bands.indices_in(samples, samples.path)  # raises if a band is missing
    encode = _encoder(model, blocks, maps)
    image = jax.ShapeDtypeStruct((1, size, size, len(model.bands)), model.bands.dtype)
    arrays = {name: list(each.shape[1:]) for name, each in jax.eval_shape(encode, model.params, image).items()}
    parts = features.batched(range(len(samples)), part_size)
    plan = {
        "format_version": _FORMAT_VERSION,
        "weights": digest(weights.backbone),
        "step": weights.step,
        "data": {"name": samples.name, "split": samples.split, "fingerprint": samples.fingerprint},
        "images": len(samples),
        "image_size": size,
        "blocks": blocks if isinstance(blocks, int) else list(blocks),
        "part_size": part_size,
        "parts": len(parts),
        "arrays": arrays,
    }
    with lease.held(output, "--output"):
        return _complete(output, plan, parts, encode, model, samples, batch_size, devices)


def _complete(output, plan, parts, encode, model, samples, batch_size, devices) -> str:
    """Writes the missing files of a folder for which this process holds the lease; returns the summary."""
    arrays, size = plan["arrays"], plan["image_size"]
    said = f"{len(samples):,} images in {len(parts)} parts: {', '.join(arrays)}"
    try:
        _begin(output, plan)
        wanted = {INDEX, *(_file(output, name, number).name for number in range(len(parts)) for name in arrays)}
        sums = {name: digest for name, digest in _read_sums(output).items() if name in wanted}
        missing = [number for number in range(len(parts)) if not _intact(output, number, arrays, sums)]
        if not missing and _same(output / INDEX, sums):
            return f"{said}: already complete, nothing to do"
        if len(missing) < len(parts):
            distributed.say(f"{output} has {len(parts) - len(missing)} of {len(parts)} parts; resuming")
        if missing:
            over_devices = features.OverDevices(encode, devices)
            run = functools.partial(over_devices, over_devices.placed(model.params))
            _write_parts(
                run, model, samples, size, output, {number: parts[number] for number in missing}, batch_size, sums
            )
        index = _index(samples, parts)
        _write_sums(output, sums | {INDEX: hashlib.sha256(index).hexdigest()})
        files.write(output / INDEX, index)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; free disk space and re-run the same command to resume, "
            "or choose another --output"
        ) from error
    return said


def _encoder(model: Model, blocks, maps: bool):
    def encode(params, images):
        tokens = model.apply(params, images, blocks=blocks)
        found = {"class_token": tokens.class_token, "patch_mean": tokens.patch_map.mean(axis=(1, 2))}
        if maps:
            found["patch_map"] = tokens.patch_map
        if tokens.block_maps:
            found["block_class_tokens"] = jnp.stack(tokens.block_class_tokens, axis=1)
            if maps:
                found["block_maps"] = jnp.stack(tokens.block_maps, axis=1)
        return found

    return encode


def _begin(output: pathlib.Path, plan: dict[str, Any]) -> None:
    """Writes the plan to a new folder. Raises UserError if the folder has another plan or other files."""
    own = (f"{PLAN}.tmp", lease.NAME)  # the first remains if a command was killed while it wrote the plan
    if all(path.name in own or path.name.startswith(f"{lease.NAME}.") for path in output.iterdir()):
        files.write_json(output / PLAN, plan)
        return
    try:
        found = json_files.parse((output / PLAN).read_bytes(), dict[str, Any])
        differing = [name for name in plan if name not in found or found[name] != plan[name]]
    except (OSError, json_files.Invalid) as error:
        raise UserError(f"{output} is not empty and not a features folder; choose another --output") from error
    if differing:
        name = differing[0]
        raise UserError(
            f"{output} has features with another {name} (expected {_short(plan[name])}, got "
            f"{_short(found.get(name))}); choose another --output, or delete the folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _intact(output: pathlib.Path, number: int, arrays: dict[str, list[int]], sums: dict[str, str]) -> bool:
    """Whether all files of a part exist and match their checksums; reports those that were modified."""
    places = [_file(output, name, number) for name in arrays]
    changed = [place.name for place in places if place.is_file() and place.name in sums and not _same(place, sums)]
    if changed:
        distributed.say(f"{several(changed)} in {output}: modified after writing, computed again")
    return not changed and all(_same(place, sums) for place in places)


def _same(place: pathlib.Path, sums: dict[str, str]) -> bool:
    return place.is_file() and sums.get(place.name) == digests.file_digest(place)


def _read_sums(output: pathlib.Path) -> dict[str, str]:
    """SHA-256 by file name; empty if SHA256SUMS is missing or damaged."""
    try:
        lines = (output / SUMS).read_text("ascii").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write_sums(output: pathlib.Path, sums: dict[str, str]) -> None:
    files.write(output / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode("ascii"))


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _file(output: pathlib.Path, name: str, number: int) -> pathlib.Path:
    return output / f"{name}-{number:05d}.npy"


def _write_parts(run, model, samples, size, output, parts: dict[int, range], batch_size, sums: dict[str, str]) -> None:
    # A batch never spans two parts, so the bytes of a part do not depend on where the command resumed.
    batches = [(number, batch) for number, rows in parts.items() for batch in features.batched(rows, batch_size)]
    resize = lambda image: resized(image, size)  # noqa: E731
    read = features.read(samples, model.bands, resize, [batch for _, batch in batches], "features")
    found = []
    for (number, batch), images in zip(batches, read, strict=True):
        found.append(run(images))
        if batch.stop == parts[number].stop:
            contents = {name: _npy(np.concatenate([each[name] for each in found])) for name in found[0]}
            places = {_file(output, name, number): content for name, content in contents.items()}
            sums |= {place.name: hashlib.sha256(content).hexdigest() for place, content in places.items()}
            _write_sums(output, sums)  # first: files written before an interruption are then known to be intact
            for place, content in places.items():
                files.write(place, content)
            found = []


def _index(samples: Samples, parts: list[range]) -> bytes:
    names, text = samples.class_names, io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["key", *(["label"] if names else []), "part", "row"])
    for number, part in enumerate(parts):
        for row, image in enumerate(part):
            label = int(samples.labels[image])
            rows.writerow([samples.keys[image], *([names[label] if label >= 0 else ""] if names else []), number, row])
    return text.getvalue().encode("utf-8", "surrogateescape")
