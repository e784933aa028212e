"""What a run has written, for tests that compare runs."""

import json
import pathlib

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from pera_jax.parallel import sharding


def metrics_of(workdir) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def everything(run, step: int) -> dict[str, np.ndarray]:
    """All arrays and numbers of a checkpoint but `meta`, by path."""
    folder = pathlib.Path(run).absolute() / "checkpoints" / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    metadata = ocp.checkpointables_metadata(folder).metadata
    wanted = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata[name])
        for name in ("state", "teacher")
        if name in metadata
    }
    items = ocp.load_checkpointables(folder, wanted | {"data": None})
    leaves = jax.tree_util.tree_flatten_with_path(items)[0]
    return {sharding.path_of(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path, strict=True)
