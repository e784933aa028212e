"""A network as one file of StableHLO that runs without this program, without Flax and without its parameters at hand.

It needs JAX and flatbuffers, on CPUs, NVIDIA GPUs or TPUs:

    import jax

    with open("aid.stablehlo", "rb") as file:
        network = jax.export.deserialize(bytearray(file.read()))
    tokens = network.call(images)      # stored values [B, H, W, C]; network.in_avals says H, W, C and the dtype
    tokens["class_token"]              # float32 [B, D]
    tokens["patch_map"]                # float32 [B, H / patch, W / patch, D]

B is any number from 1; stored values are normalised inside. `jax.jit(network.call)` keeps what is compiled. JAX reads such a
file for six months after the release that wrote it, and longer where nothing in it has changed; it notices no damage, for
which `sha256sum -c aid.stablehlo.sha256` is there.
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
_LARGEST = 2**31 - 2**24  # bytes of parameters: what flatbuffers can hold, less room for the program


def export(weights: Weights, size: tuple[int, int] | None, output: pathlib.Path) -> str:
    """Writes the file, whole or not at all, and its SHA-256 beside it.

    Args:
      size: (height, width) of the images, px; None: the training's global crops.

    Returns:
      what it takes and gives, in words.

    Raises:
      UserError: sides that the patch does not divide; too many parameters; a file that cannot be written; no flatbuffers.
    """
    try:
        import flatbuffers  # noqa: F401  (JAX wants it for `serialize` below)
    except ImportError as error:
        raise UserError("writing StableHLO needs flatbuffers: pip install flatbuffers") from error
    sums = place_of_sums(output)
    owned.check(output, _ours)
    owned.check(sums, lambda file: _SUMS.fullmatch(file.read_text(errors="replace")) is not None)
    model = Model.of(weights.backbone, weights.meta)
    if sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) > _LARGEST:
        raise UserError("the network has more than 2 GB of parameters, too many for a file of jax.export; export it for timm")
    height, width = size or (model.network.image_size,) * 2
    fit.check_size(height, width, model.network.patch)

    def tokens(images):
        # One by one under vmap: sizes of the batch that are not known yet meet JAX's own operations only.
        found = jax.vmap(lambda image: model.apply(model.params, image))(images)
        return {"class_token": found.class_token, "patch_map": found.patch_map}

    (batch,) = jax_export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, len(model.bands)), model.bands.dtype)
    exported = jax_export.export(jax.jit(tokens), platforms=PLATFORMS)(images)
    try:
        content = exported.serialize()
        sums.unlink(missing_ok=True)  # of a file that was there
        files.write(output, content)
        files.write(sums, f"{hashlib.sha256(content).hexdigest()}  {output.name}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; make room or choose another --output") from error
    rows, columns, channels = exported.out_avals[1].shape[1:]
    return (
        f"takes {model.bands.dtype} [B, {height}, {width}, {len(model.bands)}] of {', '.join(model.bands.names)}; gives "
        f"class_token [B, {channels}] and patch_map [B, {rows}, {columns}, {channels}]\n"
        f"SHA-256 is in {printable(sums.name)}, for sha256sum -c: JAX notices no damage as it reads the file"
    )


def place_of_sums(output: pathlib.Path) -> pathlib.Path:
    """Where the SHA-256 of a file lies, in the format of sha256sum."""
    return output.with_name(f"{output.name}.sha256")


def _ours(file: pathlib.Path) -> bool:
    try:
        found = jax_export.deserialize(bytearray(file.read_bytes()))
        return "patch_map" in str(found.out_tree)
    except Exception:  # whatever flatbuffers and JAX say of other bytes
        return False
