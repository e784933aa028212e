"""Linear classification on frozen, cached features: a whole grid of settings trained at once, chosen without the test.

The protocol of Oquab et al., "DINOv2", arXiv:2304.07193, section 7: learning rates x {class token, class token with the
mean of the patch tokens} x last {1, 4} blocks; here x weight decays too. All settings of one feature variant see the
same batches, so that they are one matrix product: X [B, F] times W [F, G C].
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.probes import scores

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)
MOMENTUM = 0.9
BATCH = 256
STEPS = 1000  # at least, and at least EPOCHS epochs
EPOCHS = 10
HELD_OUT = 0.2


@functools.partial(jax.jit, static_argnames="classes")
def _train(features, labels, order, rates, decays, classes):
    """SGD with momentum and a cosine to zero from W = 0: features [N, F], order [steps, B] -> W [F, G, C], b [G, C]."""
    steps, batch = order.shape
    dims, grid = features.shape[1], len(rates)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def step(carry, inputs):
        weights, bias, weights_speed, bias_speed = carry
        indices, decline = inputs
        x, y = features[indices], jax.nn.one_hot(labels[indices], classes)  # [B, F], [B, C]
        logits = product(x, weights.reshape(dims, -1)).reshape(batch, grid, classes) + bias  # [B, G, C]
        error = (jax.nn.softmax(logits) - y[:, None]) / batch  # [B, G, C], the gradient of the mean cross-entropy
        gradient = product(x.T, error.reshape(batch, -1)).reshape(weights.shape) + decays[:, None] * weights
        weights_speed = MOMENTUM * weights_speed + gradient
        bias_speed = MOMENTUM * bias_speed + error.sum(axis=0)
        rate = (rates * decline)[:, None]  # [G, 1]
        return (weights - rate * weights_speed, bias - rate * bias_speed, weights_speed, bias_speed), None

    zeros = lambda: (jnp.zeros((dims, grid, classes)), jnp.zeros((grid, classes)))  # noqa: E731
    decline = (1.0 + jnp.cos(jnp.pi * jnp.arange(steps) / steps)) / 2.0
    (weights, bias, *_), _ = jax.lax.scan(step, zeros() + zeros(), (order, decline))
    return weights, bias


def fit(
    features: np.ndarray, labels: np.ndarray, classes: int, rates: np.ndarray, decays: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Trains G classifiers at once, setting g with learning rate `rates[g]` and L2 weight decay `decays[g]`.

    Args:
      features: [N, F]; each dimension is standardised by its own mean and deviation, which the result has undone.
      labels: int [N], below `classes`.

    Returns:
      (weights float32 [G, F, C], bias float32 [G, C]): `x @ weights[g] + bias[g]` are the logits of raw features x.
    """
    number = len(features)
    batch = min(BATCH, number)
    steps = max(STEPS, math.ceil(EPOCHS * number / batch))
    rng, per_epoch = np.random.default_rng(seed), number // batch
    epochs = math.ceil(steps / per_epoch)
    order = np.concatenate([rng.permutation(number)[: per_epoch * batch].astype(np.int32) for _ in range(epochs)])
    order = order.reshape(-1, batch)[:steps]

    features = np.asarray(features, np.float32)
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6 * (1.0 + np.abs(mean)), 1.0 / np.maximum(std, 1e-12), 0.0)  # constants tell nothing
    standard = ((features - mean) * scale).astype(np.float32)
    weights, bias = _train(
        standard, np.asarray(labels, np.int32), order, np.float32(rates), np.float32(decays), classes
    )
    weights = np.asarray(weights, np.float64).transpose(1, 0, 2) * scale[:, None]  # [G, F, C]
    bias = np.asarray(bias, np.float64) - np.einsum("f,gfc->gc", mean, weights)
    return weights.astype(np.float32), bias.astype(np.float32)


def predict(weights: np.ndarray, bias: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The predicted classes int64 [G, M] of features [M, F]; of equal logits the lowest class."""
    return np.stack([np.argmax(features @ w + b, axis=1) for w, b in zip(weights, bias, strict=True)])


def probe(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    classes: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Chooses variant, learning rate and weight decay on a held-out part of `train`, refits on all of it, tests once.

    Args:
      train, test: features [N, F] by the name of the variant.

    Returns:
      A dict of
        scores: `linear` (accuracy on `test`: value, low, high of the bootstrap, 95 %) and `linear_macro_f1` (value);
        chosen: variant, learning_rate, weight_decay;
        held_out: for each variant the accuracies by learning rate and weight decay, nested lists;
        per_class: accuracy on `test` of each class, None for a class without test images;
        settings: the grid, batch, steps, share held out, seed.

    Raises:
      UserError: no images that can be held out.
    """
    fit_part, held = scores.hold_out(train_labels, HELD_OUT, seed)
    grid = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))
    rates, decays = np.array(grid).T
    table = {}
    for name, features in train.items():
        models = fit(features[fit_part], train_labels[fit_part], classes, rates, decays, seed)
        table[name] = np.mean(predict(*models, features[held]) == train_labels[held], axis=1)  # [G]
    chosen = max(table, key=lambda name: table[name].max())  # of equal ones the first
    rate, decay = grid[int(np.argmax(table[chosen]))]
    model = fit(train[chosen], train_labels, classes, np.array([rate]), np.array([decay]), seed)
    predicted = predict(*model, test[chosen])[0]

    low, high = scores.bootstrap_interval(predicted == test_labels, seed)
    by_class = scores.accuracy_by_class(predicted, test_labels, classes)
    return {
        "scores": {
            "linear": {"value": scores.accuracy(predicted, test_labels), "low": low, "high": high},
            "linear_macro_f1": {"value": scores.macro_f1(predicted, test_labels, classes)},
        },
        "chosen": {"variant": chosen, "learning_rate": rate, "weight_decay": decay},
        "held_out": {name: values.reshape(len(LEARNING_RATES), -1).tolist() for name, values in table.items()},
        "per_class": [None if np.isnan(value) else float(value) for value in by_class],
        "settings": {
            "learning_rates": list(LEARNING_RATES),
            "weight_decays": list(WEIGHT_DECAYS),
            "momentum": MOMENTUM,
            "batch": BATCH,
            "least_steps": STEPS,
            "least_epochs": EPOCHS,
            "held_out": HELD_OUT,
            "seed": seed,
        },
    }
