"""Loads the weights of a checkpoint without its objective, optimizer or config: `meta["model"]` describes the
network."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pera_jax.common.errors import Misfit, UserError
from pera_jax.common.text import every
from pera_jax.models import vit
from pera_jax.training.checkpoints import checkpoint, intact, ocp

TEACHER, STUDENT = "teacher", "student"


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of one network of a checkpoint, with the metadata needed to use them."""

    params: dict[str, Any]  # `backbone`, and the heads if the network has any
    meta: dict[str, Any]
    step: int
    network: str  # "teacher" or "student"

    @property
    def backbone(self) -> dict[str, Any]:
        return self.params["backbone"]


def networks_of(meta: dict[str, Any]) -> tuple[str, ...]:
    """The names of the networks in a checkpoint; the first one is evaluated and exported."""
    if backbone_alone(meta):
        return (TEACHER,)
    return tuple(meta.get("networks", (TEACHER, STUDENT)))


def backbone_alone(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint was imported and holds only the backbone of a teacher."""
    return meta.get("imported", {}).get("backbone_alone", False)


def load_weights(
    run: str | pathlib.Path, step: int | None = None, which: str | None = None, verify: bool = True,
    parts: Sequence[str] | None = None,
) -> Weights:  # fmt: skip
    """Loads the weights of a run onto the first device.

    Args:
      run: the run folder.
      step: step of the checkpoint; None for the latest.
      which: "teacher" or "student"; None for the teacher, or for the student of a method without a teacher.
      verify: check the arrays against the digests stored in the checkpoint.
      parts: sub-trees of the parameters to load, such as ("backbone",); None for all.

    Raises:
      UserError: a run, step or network that does not exist; an unsupported format version; a backbone that does not
        match the metadata.
      Damaged: the checkpoint cannot be read, or its values differ from those that were saved.
      Removed: training removed the checkpoint of `step` while it was read. With `step=None` the next one is loaded
        instead.
    """
    return checkpoint.read_while_present(run, step, lambda chosen: _load(run, chosen, which, verify, parts))


def _load(run: str | pathlib.Path, step: int, which: str | None, verify: bool, parts: Sequence[str] | None) -> Weights:
    folder = pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)
    meta, digests = intact.load_meta_and_digests(folder)
    networks = networks_of(meta)
    which = networks[0] if which is None else which
    if which not in networks:
        held = "only the teacher's backbone" if backbone_alone(meta) else f"only {' and '.join(networks)}"
        raise UserError(f"{run} has no {which}, {held}; choose another network")
    item = TEACHER if which == TEACHER else "state"
    stored = intact.read(folder, lambda: ocp.metadata(folder, item).metadata)
    stored = stored if which == TEACHER else {"params": stored["params"]}
    if digests is not None:
        _check_complete(folder, item, stored, digests)
    wanted = _placed(stored)
    params = wanted if which == TEACHER else wanted["params"]
    check_backbone(params.get("backbone", {}), meta, str(folder))
    for name in set(params) - set(parts or params):
        del params[name]
    loaded = _read(folder, item, wanted, digests, verify)
    return Weights(loaded if which == TEACHER else loaded["params"], meta, step, which)


def load_state(run: str | pathlib.Path, step: int, verify: bool = True) -> dict[str, jax.Array]:
    """The objective's own state in a checkpoint, such as a center; {} if it has none. Raises as `load_weights`."""
    folder = pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)
    _, digests = intact.load_meta_and_digests(folder)
    stored = intact.read(folder, lambda: ocp.metadata(folder, "state").metadata)
    wanted = _placed({"objective": stored.get("objective") or {}})
    if not wanted["objective"]:
        return {}
    return _read(folder, "state", wanted, digests, verify)["objective"]


def _read(folder: pathlib.Path, item: str, wanted: Any, digests: dict[str, Any] | None, verify: bool) -> Any:
    """The leaves `wanted` of an item of a checkpoint; `verify`: compared with `digests`, and finite."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True

    def load():
        with context:
            return ocp.load_checkpointables(folder, {item: wanted})[item]

    loaded = intact.read(folder, load)
    if verify:
        intact.check_arrays(folder, item, loaded, digests)
    return loaded


def _placed(stored: Any) -> Any:
    """The shapes and dtypes of a tree of Orbax metadata, placed on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)


def _check_complete(folder: pathlib.Path, item: str, stored: Any, digests: dict[str, Any]) -> None:
    """Raises Damaged if the stored arrays are not those that were saved."""
    saved = intact.saved_shapes(digests, item)
    if item == "state":
        saved = {path: leaf for path, leaf in saved.items() if path.startswith("params/")}
    found = intact.shapes_of(stored)
    if found != {path: tuple(leaf.shape) for path, leaf in saved.items()}:
        raise intact.Damaged(f"the checkpoint {folder} is damaged: arrays of its {item} are missing or differ in shape")


def check_backbone(backbone: Any, meta: dict[str, Any], where: str) -> None:
    """Raises Misfit if the leaves of a backbone are not those of `meta["model"]`; the error names every leaf that
    differs."""
    differing = intact.differences(backbone, _abstract_backbone(json.dumps(meta["model"], sort_keys=True)))
    if differing:
        raise Misfit(f"the backbone in {where} does not match its metadata: {every(differing)}; use another checkpoint")


@functools.lru_cache(maxsize=8)
def _abstract_backbone(model: str) -> Any:
    """The shapes of the backbone of a `meta["model"]` as JSON; tracing takes longer than reading a small checkpoint."""
    described = json.loads(model)
    side = described["image_size"]
    image = np.zeros((1, side, side, described["bands"]), np.float32)
    return jax.eval_shape(lambda: vit.build(described).init(jax.random.key(0), image))["params"]
