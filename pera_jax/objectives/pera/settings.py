"""`config.pera`: PerA's own fields with the published defaults (Shen et al., arXiv:2505.19447, section IV-A)."""

from ml_collections import ConfigDict

from pera_jax.common.errors import UserError
from pera_jax.objectives import batches
from pera_jax.objectives.base import Layout


def default() -> ConfigDict:
    """The published ViT-B/16."""
    own = ConfigDict()
    own.masks = dict(student=0.2, teacher=0.6)  # fractions of the patches; the rest is learnable
    own.views = dict(
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        student_change=0.8,  # probability that the student's view is augmented at all
        student_grayscale=0.1,  # fraction of these that become grayscale; the others get color jitter
        teacher_jitter=0.1,  # probability that the teacher's view gets color jitter
    )
    own.heads = dict(hidden=2048, bottleneck=384, prototypes=131072)
    own.loss = dict(
        koleo_weight=0.1,
        koleo_group=16,  # images among which nearest neighbors are searched; 0: the whole batch
        pixel_weight=0.01,
        center_momentum=0.9,
    )
    own.teacher_momentum = dict(start=0.992, end=1.0)  # of the EMA, a cosine
    own.teacher_temperature = dict(start=0.03, end=0.05, warmup="30 epochs")
    own.student_temperature = 0.1
    # With `init_from`, the center starts as the teacher's mean output over this many batches. 0: it starts at 0, as
    # without `init_from`.
    own.center_batches = 16
    return own


def shrink(config: ConfigDict) -> None:
    config.pera.heads.update(dict(hidden=32, bottleneck=16, prototypes=64))
    config.pera.teacher_temperature.warmup = "2 steps"
    limit_groups(config, 2)


def limit_groups(config: ConfigDict, images: int) -> None:
    config.pera.loss.koleo_group = min(config.pera.loss.koleo_group, images)


def validate(config: ConfigDict, layout: Layout) -> None:
    """Checks `config.pera`. Raises UserError for the first invalid field."""
    own = config.pera
    if own.heads.prototypes % layout.weight_shards:
        raise UserError(
            f"pera.heads.prototypes={own.heads.prototypes} is not divisible by the {layout.weight_shards} shards of "
            "the mesh (fsdp x tensor); choose a multiple, or a smaller mesh.fsdp"
        )
    if own.center_batches < 0:
        raise UserError(f"pera.center_batches={own.center_batches} must be >= 0 (0: the center starts at 0)")
    batches.check_neighbors("pera.loss.koleo_group", own.loss.koleo_group, config.batch_size, config.accumulate, layout)
