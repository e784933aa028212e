"""Logistic regression on frozen features, solved to convergence: the linear probe that no schedule can spoil.

The objective is scikit-learn's `LogisticRegression`: with the features standardised by the mean and deviation of the
training images (constant ones are zero) it is `C sum_n loss_n + |W|^2 / 2`, the bias without penalty. The loss is the
multinomial cross-entropy; with two classes the binomial one, as there; of several labels for an image the sum of a
binomial loss for each class.

Scores: `logistic` (accuracy) and `logistic_macro_f1`, or `logistic_map_micro` and `logistic_map_macro`; `supervised`
tells what else. The variant of the features and C are chosen on a part of the training images that is held out: for
each variant C rises by decades, each solution the start of the next, until `PATIENCE` further ones are no better though
the training images are fitted; for the best variant then by `REFINEMENT` around its best decade. They are fitted where
their loss is below `FITTED` times the one without features: as long as C is so small that it is not, predictions may not
change over many decades and get better afterwards. Of equal choices the first variant and the smallest C count.

Settings:
  smallest, largest: the decades of C, as powers of ten; those of the authors of DINOv2. `chosen` has an `end` and
    `at_the_end` a sentence where one of the two was the best and others beyond it may be better.
  tolerance: length of the gradient of `objective / (C N)` by the weights of the standardised features, at which a last
    solution has converged; `chosen` and `unconverged` tell where it has not. On 4,800 images, 768 dimensions and 30
    classes a tenth of it changed no prediction. The settings are chosen with `ROUGH`.
  iterations: at most, of L-BFGS.
  blocks, held_out, shares, seeds: see `supervised`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from pera_jax.common.errors import UserError
from pera_jax.probes.classification import supervised
from pera_jax.probes.classification.labeled import Labelled

SETTINGS = supervised.SETTINGS | {"smallest": -6, "largest": 5, "tolerance": 1e-5, "iterations": 2000}
PATIENCE = 2
FITTED = 0.5
REFINEMENT = (-0.5, -0.25, 0.25, 0.5)  # in powers of ten
ROUGH = 1e-3  # the tolerance while settings are chosen


@dataclasses.dataclass(frozen=True)
class Solution:
    """
    Attributes:
      weights, bias: float64 [F, classes], [classes]: `x @ weights + bias` are the logits of raw features x.
      gradient: the length of the gradient of `objective / (C N)` that was left.
      loss: the mean loss of the training images, without the penalty.
    """

    weights: np.ndarray
    bias: np.ndarray
    gradient: float
    loss: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Float64 [M, classes] of raw features [M, F]."""
        found = [features[rows] @ self.weights for rows in supervised.pieces(len(features))]
        return np.concatenate(found) + self.bias


class Problem:
    """The training images of one regression, for any number of C.

    Args:
      features: [N, F]; targets: int [N] below `classes`, or bool [N, classes].

    A class without an image, or one of several labels that all images carry, is not fitted: its weights are 0 and its
    bias is the logarithm of its odds, half an image added to both sides.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, classes: int):
        self.multinomial = targets.ndim == 1
        truth = np.eye(classes, dtype=bool)[targets] if self.multinomial else targets  # [N, classes]
        images, self.number, self.classes = truth.sum(axis=0), len(truth), classes
        self.fitted = np.flatnonzero((images > 0) & (images < self.number))
        # The softmax of two classes has two opposite columns, which share the penalty of the one that scikit-learn has.
        self.share = 0.5 if self.multinomial and len(self.fitted) == 2 else 1.0
        self.truth = np.ascontiguousarray(truth[:, self.fitted].T, np.float64)  # [classes, N]
        self.absent = np.log((images + 0.5) / (self.number - images + 0.5))  # [classes]
        self.mean, self.scale = supervised.standardisation(features)
        standard = supervised.standardised(features, self.mean, self.scale, np.float64)  # [N, F]
        # Neither the loss nor the penalty change under a rotation of the features: in their principal axes they are
        # uncorrelated, and axes in which no image differs keep the weight 0, so that at most N are left.
        if standard.shape[1] <= self.number:
            self.squares, self.axes = scipy.linalg.eigh(standard.T @ standard)
        else:
            self.squares, axes = scipy.linalg.eigh(standard @ standard.T)
            self.axes = standard.T @ (axes / np.sqrt(np.maximum(self.squares, 1e-300)))
        kept = self.squares > 1e-12 * max(self.squares.max(), 1e-300)
        self.squares, self.axes = self.squares[kept], self.axes[:, kept]
        for rows in supervised.pieces(self.number):  # where they stand: in float64 they are the most that is held
            standard[rows, : len(self.squares)] = standard[rows] @ self.axes
        self.rotated = standard[:, : len(self.squares)]  # [N, A]
        self.start = np.zeros((len(self.fitted), self.axes.shape[1] + 1))  # of weights in principal axes, then the bias

    def solve(self, c: float, tolerance: float, iterations: int) -> Solution:
        """The optimum for C = `c`, from the one found last.

        Args:
          tolerance: of the gradient; times C N where that is below 1, as the logits are then that small.
        """
        tolerance *= min(1.0, c * self.number)
        if not len(self.fitted):
            return Solution(np.zeros((len(self.mean), self.classes)), self.absent, 0.0, 0.0)
        strength = 1.0 / (c * self.share * self.number)  # of |W|^2 / 2, beside the mean loss
        # Each axis is scaled by the curvature that the loss has there at most, times the spread of the probabilities.
        spread = np.mean(self.truth.mean(axis=1) * (1.0 - self.truth.mean(axis=1)))
        curvature = np.append(spread * self.squares / self.number + strength, spread)
        scale = 1.0 / np.sqrt(curvature)  # [A + 1]

        latest = None  # the gradient at the last point that was tried, which is the one that an iteration accepts

        def objective(flat):
            nonlocal latest
            value, latest = self._objective(flat.reshape(self.start.shape) * scale, strength)
            return value, (latest * scale).ravel()

        def finished(intermediate_result):
            if np.linalg.norm(latest) <= tolerance:
                raise StopIteration

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
    def loss_of_shares(self) -> float:
        """The mean loss of a bias alone, which is the least without features: the entropy of the classes."""
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


def choose(train, labels, fit, held, classes, seed, settings):
    """See `supervised.Choose`: C and variant, and what each reached on the held-out part."""
    several = labels.ndim == 2
    measure = next(iter(supervised.measures(several, classes).values()))
    table, best = {}, (-np.inf,)  # value, variant, problem and held-out features of the best so far; one is kept

    def reached(name, problem, tests, power):
        solution = problem.solve(10.0**power, ROUGH, settings["iterations"])
        table[name][power] = measure(solution.logits(tests), labels[held])
        return solution.loss < FITTED * problem.loss_of_shares

    for name in train:
        fitted, tests = train.cut(name, fit, held)
        problem, table[name] = Problem(fitted, labels[fit], classes), {}
        del fitted
        for power in range(settings["smallest"], settings["largest"] + 1):
            fits = reached(name, problem, tests, power)
            if fits and power - _best(table[name]) >= PATIENCE:
                break
        value = max(table[name].values())
        if value > best[0]:  # of equal ones the first
            best = value, name, problem, tests
        del problem, tests  # before the next ones are put together
    _, chosen, *best = best
    decade = _best(table[chosen])
    for step in REFINEMENT:
        reached(chosen, *best, decade + step)
    power, end = _best(table[chosen]), {}
    # Where a smaller C gives the same, nothing beyond the largest is better; a smallest one that is no better than the
    # next lies where C no longer matters.
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
    """See `supervised.Predict`; the notes tell the gradient that was left and whether that is convergence."""
    solution = Problem(train, labels, classes).solve(choice["C"], settings["tolerance"], settings["iterations"])
    notes = {"converged": solution.gradient <= settings["tolerance"], "gradient": solution.gradient}
    return solution.logits(test), notes


def run(data: Labelled, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores and details; `at_the_end` and `unconverged`, sentences, only where there is something to tell.

    Raises:
      UserError: see `supervised.run`.
    """
    if settings["smallest"] > settings["largest"]:
        raise UserError(f"smallest is {settings['smallest']} and largest {settings['largest']}; give them in order")
    for name in ("tolerance", "iterations"):
        if settings[name] <= 0:
            raise UserError(f"{name} is {settings[name]}; it must be above 0")
    left, ends = [0.0], set()  # gradients of the final solutions, and where their C lies at an end
    for name, value in supervised.run("logistic", data, settings, choose, predict, seeded=False):
        if name.startswith("chosen"):
            left += [choice["gradient"] for choice in value]
            ends |= {choice["end"] for choice in value if "end" in choice}
        yield name, value
    for name in sorted(ends):
        power = settings[name]
        further = power + (2 if name == "largest" else -2)
        yield "at_the_end", f"C = 1e{power} was the best, the {name} tried; set logistic.{name} to {further}"
    if max(left) > settings["tolerance"]:
        yield (
            "unconverged",
            (
                f"a gradient of {max(left):.1e} was left after at most {settings['iterations']} iterations where "
                f"{settings['tolerance']:.1e} was asked for; raise iterations"
            ),
        )
