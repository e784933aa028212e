"""The weights of a run's checkpoint, without its objective, optimizer or config file: `meta["model"]` says what to build."""

import dataclasses
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
    """One network of a checkpoint and what is needed to use it."""

    params: dict[str, Any]  # with `backbone` and the heads the network has
    meta: dict[str, Any]
    step: int
    network: str  # "teacher" or "student"

    @property
    def backbone(self) -> dict[str, Any]:
        return self.params["backbone"]


def networks_of(meta: dict[str, Any]) -> tuple[str, ...]:
    """The networks that a checkpoint holds; the first one is what is judged and exported."""
    if backbone_alone(meta):
        return (TEACHER,)
    return tuple(meta.get("networks", (TEACHER, STUDENT)))


def backbone_alone(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint is an import that holds a teacher's backbone and nothing else."""
    return meta.get("imported", {}).get("backbone_alone", False)


def load_weights(
    run: str | pathlib.Path, step: int | None = None, which: str | None = None, verify: bool = True,
    parts: Sequence[str] | None = None,
) -> Weights:  # fmt: skip
    """The weights of a run, on the first device.

    Args:
      which: "teacher" or "student"; None: the teacher, or the student of a method without one.
      verify: compare the arrays with the digests of the save.
      parts: sub-trees of the parameters, such as ("backbone",); None: all.

    Raises:
      UserError: no such run, step or network, another format version, a backbone that is not the one of the metadata.
      Damaged: an unreadable checkpoint, or one with other values than were saved.
      Removed: training removed `step` meanwhile; where it is the latest, the next one is taken.
    """
    return checkpoint.while_kept(run, step, lambda chosen: _load(run, chosen, which, verify, parts))


def _load(run: str | pathlib.Path, step: int, which: str | None, verify: bool, parts: Sequence[str] | None) -> Weights:
    folder = pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)
    meta, digests = intact.meta_of(folder)
    networks = networks_of(meta)
    which = networks[0] if which is None else which
    if which not in networks:
        alone = "the teacher's backbone alone, and no student" if backbone_alone(meta) else f"no {which}: {' and '.join(networks)}"
        raise UserError(f"{run} holds {alone}; choose another network")
    item = TEACHER if which == TEACHER else "state"
    stored = intact.read(folder, lambda: ocp.checkpointables_metadata(folder).metadata[item])
    stored = stored if which == TEACHER else {"params": stored["params"]}
    if digests is not None:
        _check_complete(folder, item, stored, digests)
    wanted = _placed(stored)
    params = wanted if which == TEACHER else wanted["params"]
    check_backbone(params.get("backbone", {}), meta, str(folder))
    for name in set(params) - set(parts or params):
        del params[name]
    context = ocp.Context()
    context.pytree.loading.partial_load = True

    def load():
        with context:
            return ocp.load_checkpointables(folder, {item: wanted})[item]

    loaded = intact.read(folder, load)
    if verify:
        intact.check_arrays(folder, item, loaded, digests)
    return Weights(loaded if which == TEACHER else loaded["params"], meta, step, which)


def _placed(stored: Any) -> Any:
    """Shapes and dtypes of a tree of Orbax's metadata, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)


def _check_complete(folder: pathlib.Path, item: str, stored: Any, digests: dict[str, Any]) -> None:
    """Raises Damaged where the files describe other arrays than were saved."""
    saved = intact.saved_shapes(digests, item)
    if item == "state":
        saved = {path: leaf for path, leaf in saved.items() if path.startswith("params/")}
    found = intact.shapes_of(stored)
    if found != {path: tuple(leaf.shape) for path, leaf in saved.items()}:
        raise intact.Damaged(f"the checkpoint {folder} is damaged: its {item} has lost or changed arrays since it was saved")


def check_backbone(backbone: Any, meta: dict[str, Any], where: str) -> None:
    """Raises UserError where a backbone's leaves are not those of `meta["model"]`; names all that differ."""
    network, side = vit.build(meta["model"]), meta["model"]["image_size"]
    image = np.zeros((1, side, side, meta["model"]["bands"]), np.float32)
    abstract = jax.eval_shape(lambda: network.init(jax.random.key(0), image))["params"]
    differing = intact.differences(backbone, abstract)
    if differing:
        raise Misfit(f"{where} does not hold the backbone that its metadata describe: {every(differing)}")
