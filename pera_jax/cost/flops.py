"""FLOPs of one training step: by arithmetic from the sizes, and by counting what was traced.

The count is of the method (Shen et al., arXiv:2505.19447, section III): matrix products only, 2 m n k each, on exactly
the tokens that each block sees and the crops that stochastic depth keeps. A backward pass costs twice its forward pass,
and nothing is computed twice: recomputation (`remat`) is a cost of the program, not of the method.
"""

from collections.abc import Iterable
from typing import Any

from jax.extend import core

from pera_jax.models.stochastic_depth import kept_of
from pera_jax.objectives.pera.pera import PerA

# Forward, gradient of the inputs, gradient of the weights. Pixels need no gradient.
_TRAINED, _TRAINED_FIRST, _FORWARD = 3, 2, 1


def per_image(objective: PerA) -> dict[str, float]:
    """FLOPs per image of a training step, by part; their sum is the whole.

    Left out is what does not grow with the batch (`W^T W` of the spreading term, resampled positions, the centre), and
    the rest of the spreading term: for the published ViT-B/16 0.05 % of a step of 1024 images, 3.4 % of one of 16.
    Where stochastic depth draws from the whole batch (group 0) the share that it keeps is not rounded to whole crops.
    """
    vit = objective.vit
    result = {}
    for kind, parts in objective.parts.items():
        crops = objective.crops[kind][0]
        group = objective.depth_group * crops
        kept = 1.0
        if objective.depth_rate:
            kept = kept_of(group, objective.depth_rate) / group if group else 1.0 - objective.depth_rate
        joined = parts.learnable if kind == "global" else 0
        lower, upper = 1 + parts.student, 1 + parts.student + joined
        blocks = vit.split * _block(vit, lower) + (vit.depth - vit.split) * _block(vit, upper)
        embedding = _embedding(vit, parts.student)
        result[f"student {kind}"] = crops * (_TRAINED * kept * blocks + _TRAINED_FIRST * embedding)
        teacher = vit.depth * _block(vit, 1 + parts.teacher) + _embedding(vit, parts.teacher)
        result[f"teacher {kind}"] = crops * _FORWARD * teacher
    pairs = sum(objective.crops[kind][0] for kind in objective.parts)
    prototypes = _head(objective.prototype_head, vit.width)
    result["prototype head"] = pairs * (_TRAINED + _FORWARD) * prototypes
    predicted = objective.crops["global"][0] * objective.parts["global"].learnable
    result["pixel head"] = predicted * _TRAINED * _head(objective.pixel_head, vit.width)
    return result


def _block(vit, tokens: int) -> float:
    """Forward FLOPs of one block on one crop of `tokens` tokens."""
    width, hidden = vit.width, int(vit.width * vit.mlp_ratio)
    projections = 2 * tokens * width * (3 * width + width)  # query, key, value; output
    attention = 2 * 2 * tokens * tokens * width  # scores; mixing
    return projections + attention + 2 * 2 * tokens * width * hidden


def _embedding(vit, patches: int) -> float:
    return 2 * patches * vit.patch**2 * vit.bands * vit.width


def _head(head, width: int) -> float:
    """Forward FLOPs of a projection head and its last layer on one token."""
    mlp = width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck
    return 2 * (mlp + head.bottleneck * head.outputs)


def matrix_products(jaxpr: core.Jaxpr) -> float:
    """FLOPs of every `dot_general` in a traced program, bodies of loops times their trips.

    Unlike XLA's own analysis, which counts a loop's body once. `while` loops, whose trips are not known, must hold no
    product; of the branches of a conditional the dearest counts.

    Raises:
      ValueError: a product in a `while` loop.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            ((contracted, _), _) = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = 1
            for axis in contracted:
                length *= shape[axis]
            total += 2.0 * equation.outvars[0].aval.size * length
            continue
        inner = [matrix_products(sub) for sub in _inner(params.values())]
        if name == "while" and any(inner):
            raise ValueError("a matrix product inside a while loop cannot be counted: its trips are not known")
        total += max(inner, default=0.0) if name == "cond" else params.get("length", 1) * sum(inner)
    return total


def _inner(values: Iterable[Any]) -> Iterable[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)
