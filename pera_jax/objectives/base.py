"""What a pre-training method is to the trainer: everything that differs between methods is behind these names.

A method is one module with a class `OBJECTIVE` that fulfils `Objective`, most simply by deriving from `Base`; its own fields
live in `config.<name>`. The step asks for, in this order, `prepare`, `loss` (its gradient), `update`; everything else is
facts that the loop, the plan, the report, the model card and the exports read.
"""

import dataclasses
import zlib
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pera_jax.bands import Bands
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT
from pera_jax.objectives.watched import COMMON_CONDITIONS, HealthChecks, Panel, Preview, common_averages

Params = Any  # nested dicts of arrays; `params["backbone"]` are those of `Objective.encoder`
State = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

BACKBONE = "backbone"


# ---------------------------------------------------------------- what the host is asked for


class CropSpec(NamedTuple):
    """One crop type."""

    number: int  # per image
    size: int  # px
    area: tuple[float, float]  # range of a crop's share of its image's area


def crop_specs(crops: Any) -> dict[str, CropSpec]:
    """The crop types of `config.crops`: "global" and, where there are any, "local"."""
    specs = {
        name: CropSpec(crops[f"{name}_number"], crops[f"{name}_size"], tuple(crops[f"{name}_area"]))
        for name in ("global", "local")
    }
    return {name: spec for name, spec in specs.items() if spec.number}


# ---------------------------------------------------------------- what a step hands over

# Numbers of the streams that have had a number before they had a name: the draws of a run stay what they are.
_NUMBERS = {"init": 0, "step": 1, "warm_start": 2, "examples": 0, "drop_path": 1}


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of the stream `name` below `key`: `fold_in(key, number of the name)`."""
    return jax.random.fold_in(key, _NUMBERS.get(name, zlib.crc32(name.encode())))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """Randomness by name: `streams("masks")` is a PRNG key of its own, the same for the same seed, name and step."""

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
    """What `Objective.loss` is given beside parameters and examples.

    Attributes:
      rngs: of this step; the same for each part of a batch that is worked on in microbatches.
      scalars: the values of this step of what `Objective.schedules` declares, and of the common schedules.
    """

    rngs: Streams
    scalars: dict[str, jax.Array]


class Schedule(NamedTuple):
    """A scalar that depends on the step, declared; `training.schedules` evaluates it in float64 on the host.

    Attributes:
      form: "constant" (the field is a number), "cosine" (fields `start`, `end`), "ramp" (`start`, `end`, `warmup`) or
        "warmup_cosine" (`start`, `peak`, `end`, `warmup`).
      field: the config's, such as "schedules.learning_rate".
      positive: whether 0 is refused.
      highest: the largest value that is allowed.
      complement: whether 1 minus the value is handed to the step. Of an EMA's momentum near 1 a float32 has few digits.
    """

    form: str
    field: str
    positive: bool = False
    highest: float = float("inf")
    complement: bool = False


class Layout(NamedTuple):
    """How a batch is laid out: what configs are checked against."""

    batch_shards: int  # parts that a batch is cut into (data x fsdp)
    weight_shards: int  # parts that prototypes are cut into (fsdp x tensor)
    hosts: int  # processes that read data


# ---------------------------------------------------------------- the contract


class Objective(Protocol):
    """A pre-training method. Pure: parameters and state go in and come out."""

    # Facts of the method, known without a config.
    name: ClassVar[str]  # of its fields in the config
    citation: ClassVar[str]  # authors, title, identifier
    teacher_keys: ClassVar[tuple[str, ...]]  # sub-trees of the parameters with an EMA; (): the student is what is judged
    fixed_fields: ClassVar[tuple[str, ...]]  # config fields of its own that a run cannot change, such as "heads"
    free_fields: ClassVar[tuple[str, ...]]  # config fields of its own that change no number of a run
    curves: ClassVar[tuple[tuple[str, tuple[Panel, ...]], ...]]  # groups of charts, each with its title
    sharding_rules: ClassVar[tuple[tuple[str, PartitionSpec], ...]]  # of its leaves but the encoder's: (path regex, spec)
    decay_rules: ClassVar[tuple[tuple[str, bool], ...]]  # the same: whether a leaf is one of the decayed "matrices"

    @classmethod
    def default_config(cls) -> ConfigDict:
        """`config.<name>` with the published defaults."""

    @classmethod
    def shrink(cls, config: ConfigDict) -> None:
        """Makes the method's fields of a config small, for `:smoke`."""

    @classmethod
    def limit_groups(cls, config: ConfigDict, images: int) -> None:
        """Makes groups of images, over which a term is computed, no larger than `images`."""

    @classmethod
    def validate(cls, config: ConfigDict, layout: Layout) -> None:
        """Raises UserError for what is wrong in a config, also in common fields that this method cannot use."""

    @classmethod
    def from_config(cls, config: ConfigDict, bands: Bands, device: jax.Device | None = None) -> "Objective":
        """The objective of a config. Raises UserError for sizes that do not fit together."""

    @classmethod
    def schedules(cls) -> dict[str, Schedule]:
        """The scalars that `loss` reads from its context; with `teacher_keys` also "one_minus_momentum"."""

    # Facts of one objective, read also by jobs that never run a step.
    encoder: ViT  # its parameters are `params["backbone"]`: what is probed, fine-tuned and exported
    bands: Bands
    precision: Precision
    crops: dict[str, CropSpec]  # what the host must deliver

    def flops_per_image(self) -> dict[str, float]:
        """FLOPs of a training step per image, by part: matrix products of the method, nothing computed twice."""

    def health_checks(self, images: int) -> HealthChecks:
        """What is watched, for batches of so many images."""

    def logged_scalars(self, scalars: dict[str, float]) -> dict[str, float]:
        """The scheduled scalars as the metrics "hyper/NAME" show them."""

    # The step.
    def init(self, key: jax.Array) -> Params:
        """The student's parameters."""

    def init_state(self) -> State:
        """What is kept beside parameters: a center, running statistics; {} where there is nothing."""

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> Any:
        """Everything that is drawn for a batch of crops [B, V, H, W, C], with the crops. Axis 0 of each leaf is the image."""

    def loss(
        self, params: Params, teacher: Params, state: State, examples: Any, context: Context
    ) -> tuple[jax.Array, Any]:
        """The loss on (a microbatch of) what `prepare` gives, and `aux`, whose mean over equal microbatches is that of the
        batch."""

    def update(self, state: State, aux: Any) -> tuple[State, Metrics]:
        """The new state, and scalars to log, "loss" among them, from the `aux` of the whole batch."""

    # A start from weights, and the report.
    warm_start_batches: int  # over which `estimate` is averaged before the first step; 0: not at all

    def estimate(self, teacher: Params, examples: Any) -> Any:
        """What a state that begins from weights is estimated from, as a mean over images."""

    def with_estimate(self, state: State, estimate: Any) -> tuple[State, str]:
        """The state to begin with, and a sentence on it."""

    def adapt(self, params: Params, new: Params, patch: int, there: tuple[str, ...], here: tuple[str, ...]) -> Params:
        """Parameters of this method, trained on the bands `there`, for the bands `here`; from `new` where that is no use."""

    def preview(
        self, networks: dict[str, Params], batch: dict[str, Any], rngs: Streams, channels: tuple[int, int, int]
    ) -> Preview | None:
        """What the networks see of a batch and make of it, `channels` shown as red, green and blue; None: no picture."""


class Base:
    """The defaults: no teacher, no state, no fields, no picture."""

    teacher_keys: ClassVar = ()
    fixed_fields: ClassVar = ()
    free_fields: ClassVar = ()
    curves: ClassVar = ()
    sharding_rules: ClassVar = ()
    decay_rules: ClassVar = ()
    warm_start_batches = 0

    @classmethod
    def default_config(cls):
        return ConfigDict()

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
        return scalars

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

    def adapt(self, params, new, patch, there, here):
        return params

    def preview(self, networks, batch, rngs, channels):
        return None


def judged(objective: Objective, params: Params, teacher: Params) -> Params:
    """The parameters that are judged and exported: the teacher's, or the student's where there is no teacher."""
    return teacher if objective.teacher_keys else params

