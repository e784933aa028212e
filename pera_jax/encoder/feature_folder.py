"""Features of a data set as NumPy arrays in a folder.

    python -m pera_jax.export features --run runs/aid --input images --output features

writes

    features.json                     what they are of: weights, images, options; the arrays and their shape for one image
    class_token-00000.npy             float32 [n, D] of the first n images (--part-size), -00001 of the next n, and so on
    patch_mean-00000.npy              float32 [n, D], the mean of an image's patch tokens
    patch_map-00000.npy               float32 [n, h, w, D], with --maps
    block_class_tokens-00000.npy      float32 [n, blocks, D], with --blocks
    block_maps-00000.npy              float32 [n, blocks, h, w, D], with both
    index.csv                         a line for each image: key, label where there are classes, part, row
    SHA256SUMS                        of all of these but features.json, for `sha256sum -c SHA256SUMS`

A file is whole or not there, index.csv comes last. A command that was killed goes on with the parts that are not there, to
the same bytes on the same devices; a part that is not as it was written is made again.
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
    """Writes the folder; goes on with one that is begun.

    Args:
      image_size: px, to which each image is resized as a whole; None: the training's global crops.
      blocks: also the tokens of these, see `Model.apply`.
      maps: also the maps of patch tokens.
      part_size: images in a file.
      batch_size: images that are decoded ahead and held; changes no feature.
      devices: the devices to use, all of this host by default.

    Returns:
      what is there now, in words.

    Raises:
      UserError: images or options that do not fit the weights; an image that cannot be read; a folder of other features, or
        that cannot be written.
    """
    paths.local(output)
    for name, value in (("part size", part_size), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"the {name} is {value}; it must be at least 1")
    model = Model.of(weights.backbone, weights.meta)
    size = weights.meta["model"]["image_size"] if image_size is None else image_size
    features.check_image_size(size, weights.meta)
    samples = samples.suited_to(model.bands)
    model.bands.indices_in(samples, samples.path)  # raises where a band is missing
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
        return _go_on(output, plan, parts, encode, model, samples, batch_size, devices)


def _go_on(output, plan, parts, encode, model, samples, batch_size, devices) -> str:
    """Writes what is not there yet of a folder that this process holds; returns what is there, in words."""
    arrays, size = plan["arrays"], plan["image_size"]
    said = f"{len(samples):,} images in {len(parts)} parts: {', '.join(arrays)}"
    try:
        _begin(output, plan)
        wanted = {INDEX, *(_file(output, name, number).name for number in range(len(parts)) for name in arrays)}
        sums = {name: digest for name, digest in _read_sums(output).items() if name in wanted}
        missing = [number for number in range(len(parts)) if not _whole(output, number, arrays, sums)]
        if not missing and _same(output / INDEX, sums):
            return f"{said}: finished, there is nothing to do"
        if len(missing) < len(parts):
            distributed.say(f"{output} has {len(parts) - len(missing)} of {len(parts)} parts; going on")
        if missing:
            over_devices = features.OverDevices(encode, devices)
            run = functools.partial(over_devices, over_devices.placed(model.params))
            _write_parts(run, model, samples, size, output, {number: parts[number] for number in missing}, batch_size, sums)
        index = _index(samples, parts)
        _write_sums(output, sums | {INDEX: hashlib.sha256(index).hexdigest()})
        files.write(output / INDEX, index)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; make room or choose another --output, and start again"
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
    """Writes the plan into a new folder. Raises UserError: one of another plan, or of other things."""
    own = (f"{PLAN}.tmp", lease.NAME)  # the first is left where a command was killed as it wrote the plan
    if all(path.name in own or path.name.startswith(f"{lease.NAME}.") for path in output.iterdir()):
        files.write_json(output / PLAN, plan)
        return
    try:
        found = json_files.parse((output / PLAN).read_bytes(), dict[str, Any])
        differing = [name for name in plan if name not in found or found[name] != plan[name]]
    except (OSError, json_files.Invalid) as error:
        raise UserError(f"{output} is not empty and holds no features; choose another --output") from error
    if differing:
        name = differing[0]
        raise UserError(
            f"{output} holds features of other {name} ({_short(found.get(name))}, now {_short(plan[name])}); choose another "
            "--output, or remove it"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _whole(output: pathlib.Path, number: int, arrays: dict[str, list[int]], sums: dict[str, str]) -> bool:
    """Whether the files of a part are as they were written; tells those that are not."""
    places = [_file(output, name, number) for name in arrays]
    changed = [place.name for place in places if place.is_file() and place.name in sums and not _same(place, sums)]
    if changed:
        distributed.say(f"{several(changed)} in {output}: not as written, made again")
    return not changed and all(_same(place, sums) for place in places)


def _same(place: pathlib.Path, sums: dict[str, str]) -> bool:
    return place.is_file() and sums.get(place.name) == digests.of_file(place)


def _read_sums(output: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file by its name; of none where there is no list, or one that is damaged."""
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
    # Batches begin anew with each part, so that its bytes do not depend on where a command began.
    batches = [(number, batch) for number, rows in parts.items() for batch in features.batched(rows, batch_size)]
    resize = lambda image: features.resized(image, size)  # noqa: E731
    read = features.read(samples, model.bands, resize, [batch for _, batch in batches], "features")
    found = []
    for (number, batch), images in zip(batches, read, strict=True):
        found.append(run(images))
        if batch.stop == parts[number].stop:
            contents = {name: _npy(np.concatenate([each[name] for each in found])) for name in found[0]}
            places = {_file(output, name, number): content for name, content in contents.items()}
            sums |= {place.name: hashlib.sha256(content).hexdigest() for place, content in places.items()}
            _write_sums(output, sums)  # first: a file that a killed command has written is known to be whole
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
