"""The batch that `Objective.prepare` receives: crops by crop type, and the entries of `Objective.host_draws`."""

import jax
import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.objectives.base import Layout, Objective


def layout(objective: Objective, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each entry of a batch of B = `images`: crops [B, V, H, W, C] in the stored dtype, and draws
    [B, ...]."""
    bands = objective.bands
    entries = {
        name: ((spec.number, spec.size, spec.size, len(bands)), bands.dtype) for name, spec in objective.crops.items()
    }
    entries |= objective.host_draws.shapes() if objective.host_draws else {}
    return {name: jax.ShapeDtypeStruct((images, *shape), np.dtype(dtype)) for name, (shape, dtype) in entries.items()}


def draws(objective: Objective, images: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The entries of `Objective.host_draws` for `images` images, drawn from one generator; {} without host draws."""
    source = objective.host_draws
    if source is None:
        return {}
    groups = [source.draw(rng) for _ in range(-(-images // source.group))]
    return {name: np.concatenate([each[name] for each in groups])[:images] for name in source.shapes()}


def random(objective: Objective, images: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch of `images` on the host without data: crops of noise in 0 to 255, and real host draws."""
    drawn = draws(objective, images, rng)
    return {
        name: drawn[name] if name in drawn else rng.integers(0, 256, entry.shape, np.uint8).astype(entry.dtype)
        for name, entry in layout(objective, images).items()
    }


def check_group(field: str, group: int, batch_size: int, accumulate: int, layout: Layout) -> None:
    """Checks the config field that sets `HostDraws.group`: each group must lie in one device's part of a microbatch.

    Raises:
      UserError: `group` is not a divisor of the images per device and microbatch.
    """
    local = batch_size // layout.batch_shards // accumulate
    if group < 1 or local % group:
        raise UserError(
            f"{field}={group} does not divide the {local} images per device and microbatch; choose a divisor of {local}"
        )


def check_neighbors(field: str, group: int, batch_size: int, accumulate: int, layout: Layout) -> None:
    """Checks the config field that sets among how many images nearest neighbors are searched, 0 for the whole batch.

    Raises:
      UserError: `group` does not divide the batch, or is neither a divisor nor a multiple of the images per device.
    """
    local = batch_size // layout.batch_shards // accumulate
    if group < 0 or (group and batch_size % group):
        raise UserError(
            f"batch_size={batch_size} is not divisible by {field}={group}; use a divisor, or 0 for the whole batch"
        )
    if group and local % group and (group % local or (batch_size // accumulate) % group):
        raise UserError(
            f"{field}={group} is neither a divisor nor a multiple of the {local} images per device and microbatch; "
            f"choose a divisor of {local}, or 0 for the whole batch"
        )
