"""FLOPs of a training step of PerA, computed from its sizes (Shen et al., arXiv:2505.19447, section III)."""

from typing import Any

from pera_jax.models import flops
from pera_jax.models.drop_path import kept_fraction


def flops_per_image(objective: Any) -> dict[str, float]:
    """FLOPs per image of a training step of a `PerA`, by part; their sum is the total.

    Counts the matrix products on the tokens that each block processes and the crops that drop path keeps. Does not
    count what is independent of the batch size (`W^T W` of the KoLeo term, position resampling, the center), nor the
    rest of the KoLeo term: for the published ViT-B/16, 0.05 % of a step of 1024 images and 3.4 % of one of 16. If drop
    path draws from the whole batch (group 0), the kept fraction is not rounded to whole crops.
    """
    vit, result = objective.encoder, {}
    for name, parts in objective.parts.items():
        crops = objective.crops[name].number
        kept = kept_fraction(objective.drop_path_rate, objective.drop_path_group, crops)
        joined = parts.learnable if name == "global" else 0
        lower, upper = 1 + parts.student, 1 + parts.student + joined
        blocks = vit.split * flops.block(vit, lower) + (vit.depth - vit.split) * flops.block(vit, upper)
        embedding = flops.embedding(vit, parts.student)
        result[f"student {name}"] = crops * (flops.TRAINED * kept * blocks + flops.TRAINED_FIRST * embedding)
        teacher = vit.depth * flops.block(vit, 1 + parts.teacher) + flops.embedding(vit, parts.teacher)
        result[f"teacher {name}"] = crops * flops.FORWARD * teacher
    pairs = sum(objective.crops[name].number for name in objective.parts)
    result["prototype head"] = pairs * (flops.TRAINED + flops.FORWARD) * flops.head(objective.prototype_head, vit.width)
    predicted = objective.crops["global"].number * objective.parts["global"].learnable
    result["pixel head"] = predicted * flops.TRAINED * flops.head(objective.pixel_head, vit.width)
    return result
