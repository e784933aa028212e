"""Linear classification on frozen, cached features: a whole grid of settings trained at once, chosen without the test.

The protocol of Oquab et al., "DINOv2", arXiv:2304.07193, section 7: learning rates x {class token, class token with the
mean of the patch tokens} x last {1, 4} blocks; here x weight decays too. All settings of one feature variant see the
same batches, so that they are one matrix product: X [B, F] times W [F, G C]. SGD with momentum, a cosine to zero, from
W = 0, on features standardised by the training images; the loss is the cross-entropy, or of several labels for an image
the sum of one binary cross-entropy for each class.

Scores: `linear` (accuracy) and `linear_macro_f1`, or `linear_map_micro` and `linear_map_macro`; `supervised` tells what
else. Of equal choices the first.

Settings:
  learning_rates, weight_decays: the grid.
  momentum, batch: of SGD.
  steps, epochs: at least so many of each.
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
from pera_jax.probes.classification import supervised
from pera_jax.probes.classification.labeled import Labelled

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
    """Features [N, F], order [steps, B] -> W [F, G, C], b [G, C]."""
    steps, batch = order.shape
    dims, grid = features.shape[1], len(rates)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def step(carry, inputs):
        weights, bias, weights_speed, bias_speed = carry
        indices, decline = inputs
        x, y = features[indices], labels[indices]  # [B, F], [B] or [B, C]
        y, link = (jax.nn.one_hot(y, classes), jax.nn.softmax) if y.ndim == 1 else (y, jax.nn.sigmoid)
        logits = product(x, weights.reshape(dims, -1)).reshape(batch, grid, classes) + bias  # [B, G, C]
        error = (link(logits) - y[:, None]) / batch  # [B, G, C], the gradient of the mean loss
        gradient = product(x.T, error.reshape(batch, -1)).reshape(weights.shape) + decays[:, None] * weights
        weights_speed = momentum * weights_speed + gradient
        bias_speed = momentum * bias_speed + error.sum(axis=0)
        rate = (rates * decline)[:, None]  # [G, 1]
        return (weights - rate * weights_speed, bias - rate * bias_speed, weights_speed, bias_speed), None

    zeros = lambda: (jnp.zeros((dims, grid, classes)), jnp.zeros((grid, classes)))
    decline = (1.0 + jnp.cos(jnp.pi * jnp.arange(steps) / steps)) / 2.0
    (weights, bias, *_), _ = jax.lax.scan(step, zeros() + zeros(), (order, decline))
    return weights, bias


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    rates: np.ndarray,
    decays: np.ndarray,
    seed: int,
    settings: dict[str, Any] = SETTINGS,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains G classifiers at once, setting g with learning rate `rates[g]` and L2 weight decay `decays[g]`.

    Args:
      features: [N, F]; each dimension is standardised by its own mean and deviation, which the result has undone.
      labels: int [N], below `classes`, or bool [N, classes].
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
    mean, scale = supervised.standardisation(features)
    standard = supervised.standardised(features, mean, scale, np.float32)
    targets = np.asarray(labels, np.int32 if labels.ndim == 1 else np.float32)
    rates, decays = np.float32(rates), np.float32(decays)
    weights, bias = _train(standard, targets, order, rates, decays, np.float32(settings["momentum"]), classes)
    weights = np.asarray(weights, np.float64).transpose(1, 0, 2) * scale[:, None]  # [G, F, C]
    bias = np.asarray(bias, np.float64) - np.einsum("f,gfc->gc", mean, weights)
    return weights.astype(np.float32), bias.astype(np.float32)


def logits(weights: np.ndarray, bias: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Float32 [G, M, C] of features [M, F]; -inf where a setting's training has diverged."""
    found = np.stack([features @ w + b for w, b in zip(weights, bias, strict=True)])
    return np.where(np.isnan(found), -np.inf, found)


def choose(train, labels, fit_part, held, classes, seed, settings):
    """See `supervised.Choose`; the table holds for each variant the values by learning rate and weight decay."""
    grid = list(itertools.product(settings["learning_rates"], settings["weight_decays"]))
    rates, decays = np.array(grid).T
    measure = next(iter(supervised.measures(labels.ndim == 2, classes).values()))
    table = {}
    for name in train:
        fitted, tests = train.cut(name, fit_part, held)
        models = fit(fitted, labels[fit_part], classes, rates, decays, seed, settings)
        table[name] = np.array([measure(found, labels[held]) for found in logits(*models, tests)])  # [G]
        del fitted, tests  # before the next ones are put together
    variant = max(table, key=lambda name: table[name].max())  # of equal ones the first
    rate, decay = grid[int(np.argmax(table[variant]))]
    choice = {"variant": variant, "learning_rate": rate, "weight_decay": decay}
    shape = (len(settings["learning_rates"]), -1)
    return choice, {name: values.reshape(shape).tolist() for name, values in table.items()}


def predict(choice, train, labels, test, classes, seed, settings):
    """See `supervised.Predict`."""
    rate, decay = np.array([choice["learning_rate"]]), np.array([choice["weight_decay"]])
    return logits(*fit(train, labels, classes, rate, decay, seed, settings), test)[0], {}


def run(data: Labelled, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores and details of `supervised.run`, with its errors; also for numbers that cannot train."""
    for name, least in (("learning_rates", 0), ("weight_decays", 0), ("batch", 1), ("steps", 1), ("epochs", 0)):
        values = settings[name] if isinstance(settings[name], (tuple, list)) else (settings[name],)
        if not values or min(values) < least:
            raise UserError(f"{name} is {settings[name]}; give numbers that are at least {least}")
    yield from supervised.run("linear", data, settings, choose, predict, seeded=True)
