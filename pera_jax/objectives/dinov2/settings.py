"""`config.dinov2`: the fields of DINOv2, and its defaults of common fields (Oquab et al., arXiv:2304.07193, section 4
and appendix B; default configuration of the official program)."""

from ml_collections import ConfigDict

from pera_jax.common.errors import UserError
from pera_jax.objectives import batches, ibot_masks, independent_views
from pera_jax.objectives.base import Layout

TARGETS = ("sinkhorn", "centering")


def default() -> ConfigDict:
    """The official default recipe, with Sinkhorn-Knopp and separate heads as in the published models."""
    own = ConfigDict()
    own.views = dict(
        global_1=independent_views.fields(blur=1.0, solarize=0.0),
        global_2=independent_views.fields(blur=0.1, solarize=0.2),
        local=independent_views.fields(blur=0.5, solarize=0.0),
    )
    own.mask_probability = 0.5  # fraction of the global crops that are masked
    own.mask_ratio = (0.1, 0.5)  # range of the masked fraction of a masked crop
    own.mask_group = 16  # images whose masks are drawn together, on one device
    own.layer_scale = 1e-5  # initial value of LayerScale; 0.0: none
    own.heads = dict(hidden=2048, bottleneck=256, prototypes=65536, patch_prototypes=65536)
    own.separate_heads = True  # False: patches use the head of class tokens
    own.targets = "sinkhorn"  # of the teacher: "sinkhorn" (Sinkhorn-Knopp) or "centering"
    own.loss = dict(
        koleo_weight=0.1,
        koleo_group=16,  # images among which nearest neighbors are searched; 0: the whole batch
        center_momentum=0.9,  # of both centers, with centering
    )
    own.teacher_momentum = dict(start=0.992, end=1.0)  # of the EMA, a cosine
    own.teacher_temperature = dict(start=0.04, end=0.07, warmup="30 epochs")
    own.student_temperature = 0.1
    own.freeze_last_layer = "1 epochs"  # the learning rate of the last layers is 0 during this time
    return own


def set_defaults(config: ConfigDict) -> None:
    config.total = "100 epochs"
    config.crops.update(dict(global_area=(0.32, 1.0), local_area=(0.05, 0.32)))
    config.optimizer.update(
        dict(exact_bias_correction=True, eps=1e-8, clip="groups", clip_norm=3.0, decay="no_bias_or_norm")
    )
    config.optimizer.update(dict(layer_decay=0.9, rate_factors=((r"patch_projection", 0.2),)))
    config.schedules.learning_rate.update(dict(start=0.0, peak=4e-3, end=1e-6, warmup="10 epochs"))
    config.schedules.weight_decay.update(dict(start=0.04, end=0.4))


def shrink(config: ConfigDict) -> None:
    config.dinov2.heads.update(dict(hidden=32, bottleneck=16, prototypes=64, patch_prototypes=64))
    config.dinov2.teacher_temperature.warmup = "2 steps"
    config.dinov2.freeze_last_layer = "1 steps"
    limit_groups(config, 2)


def limit_groups(config: ConfigDict, images: int) -> None:
    own = config.dinov2
    own.loss.koleo_group = min(own.loss.koleo_group, images)
    own.mask_group = min(own.mask_group, images)


def validate(config: ConfigDict, layout: Layout) -> None:
    """Checks `config.dinov2`. Raises UserError for the first invalid field."""
    own, parts = config.dinov2, config.accumulate
    if config.crops.global_number != 2:
        raise UserError(f"crops.global_number={config.crops.global_number} must be 2 for DINOv2")
    if own.targets not in TARGETS:
        raise UserError(f"dinov2.targets={own.targets!r} is invalid; expected one of {', '.join(TARGETS)}")
    if not own.layer_scale >= 0:
        raise UserError(f"dinov2.layer_scale={own.layer_scale} must be >= 0 (0.0: no LayerScale)")
    if not 0 <= own.loss.center_momentum <= 1:
        raise UserError(f"dinov2.loss.center_momentum={own.loss.center_momentum} must lie in [0, 1]")
    for field in ("prototypes", "patch_prototypes"):
        if own.heads[field] % layout.weight_shards:
            raise UserError(
                f"dinov2.heads.{field}={own.heads[field]} is not divisible by the {layout.weight_shards} shards of the "
                "mesh (fsdp x tensor); choose a multiple, or a smaller mesh.fsdp"
            )
    ibot_masks.check(own, "dinov2")
    batches.check_group("dinov2.mask_group", own.mask_group, config.batch_size, parts, layout)
    if parts > 1 and own.targets == "sinkhorn":
        raise UserError(
            f"accumulate={parts} would compute Sinkhorn-Knopp targets within each microbatch instead of the batch; set "
            "accumulate=1, or dinov2.targets=centering"
        )
    batches.check_neighbors("dinov2.loss.koleo_group", own.loss.koleo_group, config.batch_size, parts, layout)
    local = config.batch_size // layout.batch_shards // parts
    if parts > 1 and own.loss.koleo_weight and (not own.loss.koleo_group or local % own.loss.koleo_group):
        raise UserError(
            f"accumulate={parts} would change the groups of dinov2.loss.koleo_group={own.loss.koleo_group}, which must "
            f"lie in the {local} images per device and microbatch; choose a divisor of {local}, or accumulate=1"
        )
