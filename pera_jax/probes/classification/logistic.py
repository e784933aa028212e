"""Logistic regression on frozen features, solved to convergence: a linear probe without a training schedule.

The objective is that of scikit-learn's `LogisticRegression`, `C sum_n loss_n + |W|^2 / 2` without a penalty on the
bias, on features standardized with the statistics of the training images (constant features become 0). The loss is the
multinomial cross-entropy; with two classes the binomial one, as in scikit-learn; for multi-label images the sum of the
binomial losses of the classes.

Scores: `logistic` (accuracy) and `logistic_macro_f1`, or `logistic_map_micro` and `logistic_map_macro`; for details see
`supervised`. Feature variant and C are chosen on held-out training images. For each variant C increases by decades,
each solution warm-starting the next, until `PATIENCE` decades bring no improvement and the training images are fitted;
for the best variant C is then refined by `REFINEMENT` around the best decade. Images count as fitted if their loss is
below `FITTED` times the loss without features: for smaller C the predictions may stay the same over many decades and
improve later. Ties go to the first variant and the smallest C.

Settings:
  smallest, largest: range of C in powers of ten; default as in DINOv2. If the best C is at an end of the range, so that
    a wider range may be better, `chosen` has the field `end` and `at_the_end` is a sentence.
  tolerance: norm of the gradient of `objective / (C N)` with respect to the weights of the standardized features at
    which the final solution counts as converged; otherwise see `chosen` and `unconverged`. On 4,800 images with 768
    dimensions and 30 classes, a tenth of the default changed no prediction. Hyperparameters are chosen with the
    tolerance `ROUGH`.
  iterations: maximum number of L-BFGS iterations.
  blocks, held_out, shares, seeds: see `supervised`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import threadpoolctl

from pera_jax.common.errors import UserError
from pera_jax.probes.classification import supervised
from pera_jax.probes.classification.labeled import Labeled

SETTINGS = supervised.SETTINGS | {"smallest": -6, "largest": 5, "tolerance": 1e-5, "iterations": 2000}
PATIENCE = 2
FITTED = 0.5
REFINEMENT = (-0.5, -0.25, 0.25, 0.5)  # powers of ten
ROUGH = 1e-3  # the tolerance while hyperparameters are chosen


@dataclasses.dataclass(frozen=True)
class Solution:
    """
    Attributes:
      weights, bias: float64 [F, classes], [classes]: `x @ weights + bias` are the logits of raw features x.
      gradient: final norm of the gradient of `objective / (C N)`.
      loss: mean loss of the training images, without the penalty.
    """

    weights: np.ndarray
    bias: np.ndarray
    gradient: float
    loss: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits float64 [M, classes] of raw features [M, F]."""
        found = [features[rows] @ self.weights for rows in supervised.chunks(len(features))]
        return np.concatenate(found) + self.bias


class Problem:
    """Logistic regression on one set of training images, for any number of values of C.

    A class without images, or a label that all images have, is not fitted: its weights are 0 and its bias is the log
    odds with half an image added to both sides.

    Args:
      features: [N, F]; targets: int [N] below `classes`, or bool [N, classes].
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, classes: int):
        self.multinomial = targets.ndim == 1
        truth = np.eye(classes, dtype=bool)[targets] if self.multinomial else targets  # [N, classes]
        images, self.number, self.classes = truth.sum(axis=0), len(truth), classes
        self.fitted = np.flatnonzero((images > 0) & (images < self.number))
        # A softmax over two classes has two opposite columns, which share the penalty of scikit-learn's single column.
        self.penalty = 0.5 if self.multinomial and len(self.fitted) == 2 else 1.0
        self.truth = np.ascontiguousarray(truth[:, self.fitted].T, np.float64)  # [classes, N]
        self.absent = np.log((images + 0.5) / (self.number - images + 0.5))  # [classes]
        self.mean, self.scale = supervised.standardization(features)
        standard = supervised.standardized(features, self.mean, self.scale, np.float64)  # [N, F]
        # Loss and penalty are invariant under rotations of the features. In the principal axes the features are
        # uncorrelated, and axes without variance keep weight 0, so at most N axes remain.
        if standard.shape[1] <= self.number:
            self.squares, self.axes = scipy.linalg.eigh(standard.T @ standard)
        else:
            self.squares, axes = scipy.linalg.eigh(standard @ standard.T)
            self.axes = standard.T @ (axes / np.sqrt(np.maximum(self.squares, 1e-300)))
        kept = self.squares > 1e-12 * max(self.squares.max(), 1e-300)
        self.squares, self.axes = self.squares[kept], self.axes[:, kept]
        for rows in supervised.chunks(self.number):  # in place: in float64 this is the largest array
            standard[rows, : len(self.squares)] = standard[rows] @ self.axes
        self.rotated = standard[:, : len(self.squares)]  # [N, A]
        self.start = np.zeros((len(self.fitted), self.axes.shape[1] + 1))  # weights in principal axes, then the bias

    def solve(self, c: float, tolerance: float, iterations: int) -> Solution:
        """Solves for C = `c`, starting from the previous solution.

        Args:
          tolerance: of the norm of the gradient; multiplied by C N if that is below 1, since the logits are as small
            then.
          iterations: maximum number of L-BFGS iterations.
        """
        tolerance *= min(1.0, c * self.number)
        if not len(self.fitted):
            return Solution(np.zeros((len(self.mean), self.classes)), self.absent, 0.0, 0.0)
        strength = 1.0 / (c * self.penalty * self.number)  # factor of |W|^2 / 2 relative to the mean loss
        # Preconditioning: each axis is scaled by an upper bound of the curvature of the loss, times the class variance.
        spread = np.mean(self.truth.mean(axis=1) * (1.0 - self.truth.mean(axis=1)))
        curvature = np.append(spread * self.squares / self.number + strength, spread)
        scale = 1.0 / np.sqrt(curvature)  # [A + 1]

        latest = None  # gradient at the last evaluated point, which is the one that L-BFGS accepts

        def objective(flat):
            nonlocal latest
            value, latest = self._objective(flat.reshape(self.start.shape) * scale, strength)
            return value, (latest * scale).ravel()

        def finished(intermediate_result):
            if np.linalg.norm(latest) <= tolerance:
                raise StopIteration

        with _blas_of_scipy().limit(limits=1):
            found = scipy.optimize.minimize(
                objective, (self.start / scale).ravel(), jac=True, method="L-BFGS-B", callback=finished,
                options={"maxiter": iterations, "maxfun": 2 * iterations, "gtol": 0.0, "ftol": 0.0, "maxcor": 20},
            )  # fmt: skip
        self.start = found.x.reshape(self.start.shape) * scale
        value, gradient = self._objective(self.start, strength)
        loss = value - strength * np.sum(self.start[:, :-1] ** 2) / 2.0
        weights, bias = np.zeros((len(self.mean), self.classes)), self.absent.copy()
        weights[:, self.fitted] = self.scale[:, None] * (self.axes @ self.start[:, :-1].T)
        bias[self.fitted] = self.start[:, -1] - self.mean @ weights[:, self.fitted]
        return Solution(weights, bias, float(np.linalg.norm(gradient)), float(loss))

    @functools.cached_property
    def bias_only_loss(self) -> float:
        """The mean loss of the best classifier without features, which is the entropy of the classes."""
        p = self.truth.mean(axis=1)
        terms = scipy.special.entr(p) if self.multinomial else scipy.special.entr(p) + scipy.special.entr(1.0 - p)
        return float(terms.sum())

    def _objective(self, weights, strength):
        """Mean loss + strength |W|^2 / 2 and its gradient at [classes, A + 1]."""
        logits = weights[:, :-1] @ self.rotated.T + weights[:, -1:]  # [classes, N]
        if self.multinomial:
            loss = -np.sum(logits * self.truth)
            top = logits.max(axis=0)
            error = np.exp(logits - top)
            total = error.sum(axis=0)
            loss += np.sum(top + np.log(total))
            error = error / total - self.truth
        else:
            loss = np.sum(np.logaddexp(0.0, logits) - self.truth * logits)
            error = scipy.special.expit(logits) - self.truth
        gradient = np.hstack([error @ self.rotated, error.sum(axis=1, keepdims=True)]) / self.number
        gradient[:, :-1] += strength * weights[:, :-1]
        return loss / self.number + strength * np.sum(weights[:, :-1] ** 2) / 2.0, gradient


@functools.cache
def _blas_of_scipy() -> threadpoolctl.ThreadpoolController:
    """The BLAS that SciPy's wheel brings along, besides NumPy's.

    It gets one thread while it minimizes; the matrix products of the objective are NumPy's and keep theirs. The vectors
    of L-BFGS are short, and the waiting threads of both libraries take the cores from each other: with two threads
    each, a fit on two cores takes three times as long.
    """
    loaded = threadpoolctl.ThreadpoolController()
    files = [library.filepath for library in loaded.select(user_api="blas").lib_controllers]
    return loaded.select(filepath=[file for file in files if {"scipy.libs", "scipy"} & set(pathlib.Path(file).parts)])


def choose(train, labels, fit, held, classes, seed, settings):
    """See `supervised.Choose`: chooses C and variant; the table has the held-out score of each."""
    several = labels.ndim == 2
    measure = next(iter(supervised.measures(several, classes).values()))
    table, best = {}, (-np.inf,)  # value, variant, problem and held-out features of the best variant so far

    def evaluate(name, problem, tests, power):
        solution = problem.solve(10.0**power, ROUGH, settings["iterations"])
        table[name][power] = measure(solution.logits(tests), labels[held])
        return solution.loss < FITTED * problem.bias_only_loss

    for name in train:
        fitted, tests = train.cut(name, fit, held)
        problem, table[name] = Problem(fitted, labels[fit], classes), {}
        del fitted
        for power in range(settings["smallest"], settings["largest"] + 1):
            fits = evaluate(name, problem, tests, power)
            if fits and power - _best(table[name]) >= PATIENCE:
                break
        value = max(table[name].values())
        if value > best[0]:  # the first among equals
            best = value, name, problem, tests
        del problem, tests  # free memory before the next variant
    _, chosen, *best = best
    decade = _best(table[chosen])
    for step in REFINEMENT:
        evaluate(chosen, *best, decade + step)
    power, end = _best(table[chosen]), {}
    # If a smaller C ties with the largest, a larger range does not help; if the smallest ties with the next one, C no
    # longer matters there.
    if settings["smallest"] < settings["largest"]:
        if power >= settings["largest"]:
            end = {"end": "largest"}
        elif power <= settings["smallest"] and table[chosen][power] > table[chosen][settings["smallest"] + 1]:
            end = {"end": "smallest"}
    choice = {"variant": chosen, "C": 10.0**power} | end
    return choice, {name: {f"{10.0**power:.4g}": row[power] for power in sorted(row)} for name, row in table.items()}


def _best(row: dict[float, float]) -> float:
    """The smallest power of ten with the largest value."""
    return min(power for power, value in row.items() if value == max(row.values()))


def predict(choice, train, labels, test, classes, seed, settings):
    """See `supervised.Predict`; the notes have the final norm of the gradient and whether it has converged."""
    solution = Problem(train, labels, classes).solve(choice["C"], settings["tolerance"], settings["iterations"])
    notes = {"converged": solution.gradient <= settings["tolerance"], "gradient": solution.gradient}
    return solution.logits(test), notes


def run(data: Labeled, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores and details; the sentences `at_the_end` and `unconverged` only if they apply.

    Raises:
      UserError: see `supervised.run`.
    """
    if settings["smallest"] > settings["largest"]:
        raise UserError(
            f"invalid range smallest={settings['smallest']}, largest={settings['largest']}; expected smallest <= "
            "largest"
        )
    for name in ("tolerance", "iterations"):
        if settings[name] <= 0:
            raise UserError(f"invalid {name}={settings[name]}; expected a number > 0")
    left, ends = [0.0], set()  # gradients of the final solutions, and ends of the range of C that were chosen
    for name, value in supervised.run("logistic", data, settings, choose, predict, seeded=False):
        if name.startswith("chosen"):
            left += [choice["gradient"] for choice in value]
            ends |= {choice["end"] for choice in value if "end" in choice}
        yield name, value
    for name in sorted(ends):
        power = settings[name]
        further = power + (2 if name == "largest" else -2)
        yield "at_the_end", f"the best C = 1e{power} is the {name} in the range; set logistic.{name} to {further}"
    if max(left) > settings["tolerance"]:
        yield (
            "unconverged",
            (
                f"not converged after at most {settings['iterations']} iterations: the gradient is {max(left):.1e}, "
                f"above the tolerance {settings['tolerance']:.1e}; raise iterations"
            ),
        )
