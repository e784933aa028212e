"""An encoder as one StableHLO file, weights included, that runs without pera_jax and without Flax.

Running it needs JAX and flatbuffers, on CPU, NVIDIA GPU or TPU:

    import jax

    with open("aid.stablehlo", "rb") as file:
        network = jax.export.deserialize(bytearray(file.read()))
    tokens = network.call(images)      # stored values [B, H, W, C]; network.in_avals says H, W, C and the dtype
    tokens["class_token"]              # float32 [B, D]
    tokens["patch_map"]                # float32 [B, H / patch, W / patch, D]

The batch size B is free, and normalization is part of the exported function. `jax.jit(network.call)` caches the
compiled program. JAX guarantees to read such a file for six months after the release that wrote it. It does not detect
damaged files; `sha256sum -c aid.stablehlo.sha256` does.
"""

import hashlib
import pathlib
import re

import jax
from jax import export as jax_export

from pera_jax.common import files, owned
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.encoder import fit
from pera_jax.encoder.load import Weights
from pera_jax.encoder.model import Model

_SUMS = re.compile(r"[0-9a-f]{64}  [^/]*\n", re.DOTALL)
PLATFORMS = ("cpu", "cuda", "tpu")
_LARGEST = 2**31 - 2**24  # bytes of parameters: the limit of flatbuffers, minus room for the program


def export(weights: Weights, size: tuple[int, int] | None, output: pathlib.Path) -> str:
    """Writes the file atomically, and its SHA-256 beside it.

    Args:
      size: (height, width) of the images in px; None for the size of the global crops in training.

    Returns:
      A description of inputs and outputs, to print.

    Raises:
      UserError: sides that are not multiples of the patch size; too many parameters; a file that cannot be written;
        flatbuffers is not installed.
    """
    try:
        import flatbuffers  # noqa: F401  (JAX needs it for `serialize` below)
    except ImportError as error:
        raise UserError("exporting StableHLO needs the package flatbuffers; run pip install flatbuffers") from error
    sums = checksum_path(output)
    owned.check(output, _ours)
    owned.check(sums, lambda file: _SUMS.fullmatch(file.read_text(errors="replace")) is not None)
    model = Model.from_metadata(weights.backbone, weights.meta)
    if sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) > _LARGEST:
        raise UserError(
            "the network has more than 2 GB of parameters, the limit of jax.export; use `export timm` instead"
        )
    height, width = size or (model.network.image_size,) * 2
    fit.check_size(height, width, model.network.patch)

    def tokens(images):
        # vmap over single images: only JAX's own operations see the symbolic batch size.
        found = jax.vmap(lambda image: model.apply(model.params, image))(images)
        return {"class_token": found.class_token, "patch_map": found.patch_map}

    (batch,) = jax_export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, len(model.bands)), model.bands.dtype)
    exported = jax_export.export(jax.jit(tokens), platforms=PLATFORMS)(images)
    try:
        content = exported.serialize()
        sums.unlink(missing_ok=True)  # of an earlier file
        files.write(output, content)
        files.write(sums, f"{hashlib.sha256(content).hexdigest()}  {output.name}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror}; free disk space or choose another --output"
        ) from error
    rows, columns, channels = exported.out_avals[1].shape[1:]
    return (
        f"input: {model.bands.dtype} [B, {height}, {width}, {len(model.bands)}] with bands "
        f"{', '.join(model.bands.names)}; output: class_token [B, {channels}] and patch_map [B, {rows}, {columns}, "
        f"{channels}]\nSHA-256 in {printable(sums.name)}; check it with sha256sum -c, since JAX does not detect "
        "damaged files"
    )


def checksum_path(output: pathlib.Path) -> pathlib.Path:
    """The path of a file's SHA-256, in the format of sha256sum."""
    return output.with_name(f"{output.name}.sha256")


def _ours(file: pathlib.Path) -> bool:
    try:
        found = jax_export.deserialize(bytearray(file.read_bytes()))
        return "patch_map" in str(found.out_tree)
    except Exception:  # flatbuffers and JAX raise anything on foreign bytes
        return False
