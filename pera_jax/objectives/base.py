"""The interface of a pre-training method: everything that differs between methods.

A method is one module that defines `OBJECTIVE`, a class that implements `Objective`, most simply by deriving from
`Base`; its own fields are in `config.<name>`. A training step calls `prepare`, `loss` (for its gradient) and `update`,
in this order; the loop, the plan, the report, the model card and the exports read the rest.
"""

import dataclasses
import zlib
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pera_jax.bands import Bands
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT
from pera_jax.objectives.declared import Freeze, Layout, Official, Schedule
from pera_jax.objectives.watched import COMMON_CONDITIONS, HealthChecks, Panel, Preview, common_averages

Params = Any  # nested dicts of arrays; `params["backbone"]` are those of `Objective.encoder`
State = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

BACKBONE = "backbone"


# ---------------------------------------------------------------- crops


class CropSpec(NamedTuple):
    """One crop type."""

    number: int  # crops per image
    size: int  # side in px
    area: tuple[float, float]  # range of the crop's area as a fraction of the image's area


def crop_specs(crops: Any) -> dict[str, CropSpec]:
    """The crop types of `config.crops`: "global" and, if there are any, "local"."""
    specs = {
        name: CropSpec(crops[f"{name}_number"], crops[f"{name}_size"], tuple(crops[f"{name}_area"]))
        for name in ("global", "local")
    }
    return {name: spec for name, spec in specs.items() if spec.number}


class HostDraws(Protocol):
    """Random draws that the data workers make with the crops, as further entries of the batch, for instance because
    drawing them is sequential. Passed to worker processes, so it must be picklable."""

    # Number of images that are drawn together: `group` neighbors in the global batch, which must lie on one device and
    # in one microbatch (`batches.check_group`).
    group: int

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draws for one group: leaves [group, ...] of fixed shapes and dtypes, a function of `rng` alone."""

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape without the axis of images, and dtype, by name; no name of a crop type."""


# ---------------------------------------------------------------- arguments of a step

# Streams that had a number before they had a name keep it, so that the draws of a run do not change.
_NUMBERS = {"init": 0, "step": 1, "warm_start": 2, "examples": 0, "drop_path": 1}


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of the stream `name` below `key`: `fold_in(key, number of the name)`."""
    return jax.random.fold_in(key, _NUMBERS.get(name, zlib.crc32(name.encode())))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """Named random streams: `streams("masks")` is a PRNG key that depends only on the seed, the name and the step."""

    key: jax.Array

    @classmethod
    def at(cls, seed: int, name: str, step: int | jax.Array) -> "Streams":
        """The streams of a step: `fold_in(fold_in(key(seed), name), step)` for the stream "step" or "warm_start"."""
        return cls(jax.random.fold_in(stream(jax.random.key(seed), name), step))

    def __call__(self, name: str) -> jax.Array:
        return stream(self.key, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Arguments of `Objective.loss` besides parameters, state and examples.

    Attributes:
      rngs: the random streams of this step; the same for each microbatch.
      scalars: this step's values of the schedules that `Objective.schedules` declares, and of the common schedules.
    """

    rngs: Streams
    scalars: dict[str, jax.Array]


# ---------------------------------------------------------------- the contract


class Objective(Protocol):
    """A pre-training method. The methods of a step are pure functions of parameters and state."""

    # Properties of the method, known without a config.
    name: ClassVar[str]  # of its group of fields in the config
    citation: ClassVar[str]  # authors, title, identifier
    teacher_keys: ClassVar[tuple[str, ...]]  # sub-trees of the parameters with an EMA; () without a teacher
    evaluated: ClassVar[str]  # "teacher" or "student": the network that is probed, fine-tuned and exported
    # sub-trees of the parameters that `optimizer.clip="groups"` clips by their common norm; (): each by its own
    clip_groups: ClassVar[tuple[tuple[str, ...], ...]]
    # its own config fields that must not change when a run resumes, such as "heads"
    fixed_fields: ClassVar[tuple[str, ...]]
    free_fields: ClassVar[tuple[str, ...]]  # its own config fields that do not change any computed number
    official: ClassVar[Official | None]  # the format of the official program's weights; None if none is known
    curves: ClassVar[tuple[tuple[str, tuple[Panel, ...]], ...]]  # (title, charts) of each group of charts in the report
    # (path regex, spec) for its leaves outside the encoder
    sharding_rules: ClassVar[tuple[tuple[str, PartitionSpec], ...]]
    decay_rules: ClassVar[tuple[tuple[str, bool], ...]]  # the same, for whether a leaf is one of the decayed "matrices"

    @classmethod
    def default_config(cls) -> ConfigDict:
        """`config.<name>` with the published defaults."""

    @classmethod
    def set_defaults(cls, config: ConfigDict) -> None:
        """Sets the common fields of the default config to the method's own defaults."""

    @classmethod
    def shrink(cls, config: ConfigDict) -> None:
        """Shrinks the method's fields of a config, for `:smoke`."""

    @classmethod
    def limit_groups(cls, config: ConfigDict, images: int) -> None:
        """Limits groups of images, within which a loss term is computed, to `images`."""

    @classmethod
    def validate(cls, config: ConfigDict, layout: Layout) -> None:
        """Raises UserError for an invalid config, including common fields that this method does not support."""

    @classmethod
    def from_config(cls, config: ConfigDict, bands: Bands, device: jax.Device | None = None) -> "Objective":
        """Builds the objective of a config. Raises UserError for inconsistent sizes."""

    @classmethod
    def schedules(cls) -> dict[str, Schedule]:
        """The scalars that `loss` reads from its context; with `teacher_keys` also "one_minus_momentum"."""

    # Properties of an objective, also read by jobs that never run a step.
    encoder: ViT  # the network that is probed, fine-tuned and exported; its parameters are `params["backbone"]`
    bands: Bands
    precision: Precision
    crops: dict[str, CropSpec]  # the crops in a batch, by crop type
    host_draws: HostDraws | None  # further entries of a batch
    frozen: tuple[Freeze, ...]  # parameters that are not trained, the first match by path counts

    def flops_per_image(self) -> dict[str, float]:
        """FLOPs per image of a training step, by part: the method's matrix products, without recomputation."""

    def health_checks(self, images: int) -> HealthChecks:
        """The health checks, for a batch of `images`."""

    def logged_scalars(self, scalars: dict[str, float]) -> dict[str, float]:
        """The scheduled scalars as they are logged, as "hyper/NAME"."""

    # The step.
    def init(self, key: jax.Array) -> Params:
        """The student's parameters."""

    def init_state(self) -> State:
        """The state besides parameters, such as a center or running statistics; {} if there is none."""

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> Any:
        """Adds all random draws to a batch of crops [B, V, H, W, C] and host draws [B, ...]. Axis 0 of every leaf of
        the result is the batch."""

    def loss(
        self, params: Params, teacher: Params, state: State, examples: Any, context: Context
    ) -> tuple[jax.Array, Any]:
        """The loss (a scalar) on (a microbatch of) the result of `prepare`, and `aux`; the mean of either over equal
        microbatches must be that of the batch."""

    def update(self, state: State, aux: Any) -> tuple[State, Metrics]:
        """The new state and the scalars to log, including "loss", from the `aux` of the whole batch."""

    # Warm start from weights, and the report.
    warm_start_batches: int  # number of batches over which `estimate` is averaged before the first step; 0 disables it

    def estimate(self, teacher: Params, examples: Any) -> Any:
        """An estimate of the initial state from loaded weights, as a mean over images."""

    def with_estimate(self, state: State, estimate: Any) -> tuple[State, str]:
        """The initial state, and a sentence that reports it."""

    def adapt(
        self, params: Params, new: Params, patch: int, source: tuple[str, ...], target: tuple[str, ...]
    ) -> Params:
        """Converts parameters trained on the bands `source` to the bands `target`; takes from `new` what cannot be
        converted."""

    def preview(
        self, networks: dict[str, Params], batch: dict[str, Any], rngs: Streams, channels: tuple[int, int, int]
    ) -> Preview | None:
        """The report's picture of the networks' inputs and outputs, with `channels` as red, green and blue; None for
        none."""


class Base:
    """Defaults for `Objective`: no teacher, no state, no config fields, no preview."""

    teacher_keys: ClassVar = ()
    evaluated: ClassVar = "teacher"
    clip_groups: ClassVar = ()
    fixed_fields: ClassVar = ()
    free_fields: ClassVar = ()
    curves: ClassVar = ()
    sharding_rules: ClassVar = ()
    decay_rules: ClassVar = ()
    official: ClassVar = None
    host_draws = None
    warm_start_batches = 0
    frozen = ()

    @classmethod
    def default_config(cls):
        return ConfigDict()

    @classmethod
    def set_defaults(cls, config):
        pass

    @classmethod
    def shrink(cls, config):
        pass

    @classmethod
    def limit_groups(cls, config, images):
        pass

    @classmethod
    def validate(cls, config, layout):
        pass

    @classmethod
    def schedules(cls):
        return {}

    def health_checks(self, images):
        return HealthChecks(COMMON_CONDITIONS, common_averages, lambda averages: {"excess_name": "loss"})

    def logged_scalars(self, scalars):
        if "one_minus_momentum" not in scalars:
            return scalars
        shown = {name: value for name, value in scalars.items() if name != "one_minus_momentum"}
        return shown | {"momentum": 1.0 - scalars["one_minus_momentum"]}

    def init_state(self):
        return {}

    def prepare(self, rngs, batch):
        return batch

    def update(self, state, aux):
        return state, aux

    def estimate(self, teacher, examples):
        raise NotImplementedError(f"{type(self).__name__} has warm_start_batches and no estimate")

    def with_estimate(self, state, estimate):
        raise NotImplementedError(f"{type(self).__name__} has warm_start_batches and no with_estimate")

    def adapt(self, params, new, patch, source, target):
        return params

    def preview(self, networks, batch, rngs, channels):
        return None


def networks(objective: Objective) -> tuple[str, ...]:
    """The names of the networks in a training state; the first one is evaluated and exported."""
    if not objective.teacher_keys:
        return ("student",)
    return ("student", "teacher") if objective.evaluated == "student" else ("teacher", "student")


def judged(objective: Objective, params: Params, teacher: Params) -> Params:
    """The parameters that are evaluated and exported."""
    return teacher if networks(objective)[0] == "teacher" else params

