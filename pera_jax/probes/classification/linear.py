"""Linear classification of frozen features: a whole hyperparameter grid is trained at once.

The protocol of Oquab et al., "DINOv2", arXiv:2304.07193, section 7: a grid over learning rates, {class token, class
token plus mean patch token} and the last {1, 4} blocks; here also over weight decays. All classifiers on one feature
variant see the same batches, so that a step is one matrix product, X [B, F] times W [F, G C]. Training: SGD with
momentum, cosine decay to 0, W = 0 at the start, features standardized with the statistics of the training images. The
loss is the cross-entropy; for multi-label images the sum of the binary cross-entropies of the classes.

Scores: `linear` (accuracy) and `linear_macro_f1`, or `linear_map_micro` and `linear_map_macro`; for details see
`supervised`. Ties go to the first choice.

Settings:
  learning_rates, weight_decays: the grid.
  momentum, batch: momentum and batch size of SGD.
  steps, epochs: minimum number of each.
  blocks, held_out, shares, seeds: see `supervised`.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.probes import sgd
from pera_jax.probes.classification import supervised
from pera_jax.probes.classification.labeled import Labeled

SETTINGS = supervised.SETTINGS | {
    "learning_rates": (0.01, 0.03, 0.1, 0.3, 1.0),
    "weight_decays": (0.0, 1e-3, 1e-2),
    "momentum": 0.9,
    "batch": 256,
    "steps": 1000,
    "epochs": 10,
}


@functools.partial(jax.jit, static_argnames="classes")
def _train(features, labels, order, rates, decays, momentum, classes):
    """Trains on features [N, F] with batches `order` [steps, B]; returns W [F, G, C], b [G, C]."""
    batch, dims, grid = order.shape[1], features.shape[1], len(rates)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def gradients(weights, bias, indices):
        x, y = features[indices], labels[indices]  # [B, F], [B] or [B, C]
        y, link = (jax.nn.one_hot(y, classes), jax.nn.softmax) if y.ndim == 1 else (y, jax.nn.sigmoid)
        logits = product(x, weights.reshape(dims, -1)).reshape(batch, grid, classes) + bias  # [B, G, C]
        error = (link(logits) - y[:, None]) / batch  # [B, G, C], the gradient of the mean loss
        gradient = product(x.T, error.reshape(batch, -1)).reshape(weights.shape) + decays[:, None] * weights
        return gradient, error.sum(axis=0)

    return sgd.minimize(gradients, order, dims, classes, rates, momentum)


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    rates: np.ndarray,
    decays: np.ndarray,
    seed: int,
    settings: dict[str, Any] = SETTINGS,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains G classifiers at once, classifier g with learning rate `rates[g]` and weight decay `decays[g]`.

    Args:
      features: [N, F]; standardized internally, the result applies to raw features.
      labels: int [N], below `classes`, or bool [N, classes].
      seed: seed of the order of the images.
      settings: momentum, batch, steps, epochs.

    Returns:
      (weights float32 [G, F, C], bias float32 [G, C]): `x @ weights[g] + bias[g]` are the logits of raw features x.
    """
    number = len(features)
    batch = min(settings["batch"], number)
    steps = max(settings["steps"], math.ceil(settings["epochs"] * number / batch))
    rng, per_epoch = np.random.default_rng(seed), number // batch
    epochs = math.ceil(steps / per_epoch)
    order = np.concatenate([rng.permutation(number)[: per_epoch * batch].astype(np.int32) for _ in range(epochs)])
    order = order.reshape(-1, batch)[:steps]

    features = np.asarray(features, np.float32)
    mean, scale = supervised.standardization(features)
    standard = supervised.standardized(features, mean, scale, np.float32)
    targets = np.asarray(labels, np.int32 if labels.ndim == 1 else np.float32)
    rates, decays = np.float32(rates), np.float32(decays)
    weights, bias = _train(standard, targets, order, rates, decays, np.float32(settings["momentum"]), classes)
    weights = np.asarray(weights, np.float64).transpose(1, 0, 2) * scale[:, None]  # [G, F, C]
    bias = np.asarray(bias, np.float64) - np.einsum("f,gfc->gc", mean, weights)
    return weights.astype(np.float32), bias.astype(np.float32)


def logits(weights: np.ndarray, bias: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Logits float32 [G, M, C] of features [M, F]; -inf for classifiers whose training diverged."""
    found = np.stack([features @ w + b for w, b in zip(weights, bias, strict=True)])
    return np.where(np.isnan(found), -np.inf, found)


def choose(train, labels, fit_part, held, classes, seed, settings):
    """See `supervised.Choose`; the table has the values by variant, learning rate and weight decay."""
    grid = list(itertools.product(settings["learning_rates"], settings["weight_decays"]))
    rates, decays = np.array(grid).T
    measure = next(iter(supervised.measures(labels.ndim == 2, classes).values()))
    table = {}
    for name in train:
        fitted, tests = train.cut(name, fit_part, held)
        models = fit(fitted, labels[fit_part], classes, rates, decays, seed, settings)
        table[name] = np.array([measure(found, labels[held]) for found in logits(*models, tests)])  # [G]
        del fitted, tests  # free memory before the next variant
    variant = max(table, key=lambda name: table[name].max())  # the first among equals
    rate, decay = grid[int(np.argmax(table[variant]))]
    choice = {"variant": variant, "learning_rate": rate, "weight_decay": decay}
    shape = (len(settings["learning_rates"]), -1)
    return choice, {name: values.reshape(shape).tolist() for name, values in table.items()}


def predict(choice, train, labels, test, classes, seed, settings):
    """See `supervised.Predict`."""
    rate, decay = np.array([choice["learning_rate"]]), np.array([choice["weight_decay"]])
    return logits(*fit(train, labels, classes, rate, decay, seed, settings), test)[0], {}


def run(data: Labeled, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores and details of `supervised.run`. Raises UserError as it does, and for invalid
    hyperparameters."""
    for name, least in (("learning_rates", 0), ("weight_decays", 0), ("batch", 1), ("steps", 1), ("epochs", 0)):
        values = settings[name] if isinstance(settings[name], (tuple, list)) else (settings[name],)
        if not values or min(values) < least:
            raise UserError(f"invalid {name}={settings[name]}; expected numbers >= {least}")
    yield from supervised.run("linear", data, settings, choose, predict, seeded=True)
