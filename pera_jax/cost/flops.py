"""FLOPs of a traced program, counted from its matrix products.

The FLOPs of a method, without recomputation (`remat`), are `Objective.flops_per_image`.
"""

from collections.abc import Iterable
from typing import Any

from jax.extend import core


def matrix_products(jaxpr: core.Jaxpr) -> float:
    """FLOPs of every `dot_general` in a traced program; the body of a `scan` counts once per iteration.

    (XLA's own cost analysis counts the body of a loop only once.) Of the branches of a `cond`, the most expensive one
    counts.

    Raises:
      ValueError: a matrix product inside a `while` loop, whose trip count is unknown.
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
            raise ValueError(
                "a matrix product inside a while loop cannot be counted, because the trip count is unknown; use scan"
            )
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
