"""FLOPs of a training step of DINOv2, computed from its sizes."""

from typing import Any

from pera_jax.models import flops
from pera_jax.models.drop_path import kept_fraction


def flops_per_image(objective: Any) -> dict[str, float]:
    """FLOPs per image of a training step of a `DINOv2`, by part; their sum is the total.

    Counts the matrix products on the tokens that each block processes and the crops that drop path keeps, and the patch
    head on the rows of the index buffer, of which a few are padding. Does not count the inner products of the KoLeo
    term, the centers, nor the passes of Sinkhorn-Knopp, which compute the teacher's logits again: three for each of the
    teacher's class tokens and masked patches, `2 bottleneck prototypes` FLOPs each.
    """
    vit, result = objective.encoder, {}
    for name, spec in objective.crops.items():
        kept = kept_fraction(objective.drop_path_rate, objective.drop_path_group, spec.number)
        patches = (spec.size // vit.patch) ** 2
        blocks, embedding = vit.depth * flops.block(vit, 1 + patches), flops.embedding(vit, patches)
        result[f"student {name}"] = spec.number * (flops.TRAINED * kept * blocks + flops.TRAINED_FIRST * embedding)
        if name == "global":
            result["teacher global"] = spec.number * flops.FORWARD * (blocks + embedding)
    both, masks = flops.TRAINED + flops.FORWARD, objective.masks
    student = sum(spec.number for spec in objective.crops.values())
    teacher = objective.crops["global"].number
    head = flops.head(objective.prototype_head, vit.width)
    result["class head"] = (student * flops.TRAINED + teacher * flops.FORWARD) * head
    patch_head = flops.head(objective.patch_prototype_head or objective.prototype_head, vit.width)
    result["patch head"] = masks.bound / masks.group * both * patch_head
    return result
