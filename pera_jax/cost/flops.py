"""FLOPs of what was traced: the matrix products of a program, counted.

What the method itself costs is arithmetic, `Objective.flops_per_image`: nothing is computed twice there, while
recomputation (`remat`) is a cost of the program.
"""

from collections.abc import Iterable
from typing import Any

from jax.extend import core


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
