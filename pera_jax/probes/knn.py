"""Nearest neighbours among the training images: what frozen features tell without any training.

k nearest by cosine similarity, each voting for its class with the weight `exp(similarity / T)`, T = 0.07: the protocol
of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978, that
self-supervised methods report with k = 20.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.errors import UserError
from pera_jax.probes import scores

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
HEADLINE = 20
HELD_OUT = 0.2
_SIMILARITIES = 2**24  # that are held at once: 64 MiB


@functools.partial(jax.jit, static_argnames="k")
def _nearest(train: jax.Array, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    similarity = jnp.einsum("qd,nd->qn", queries, train, precision=jax.lax.Precision.HIGHEST)  # [q, N]
    # The order of top_k is total and puts -0 behind 0, but equal similarities must keep the order of the index.
    similarity = jnp.where(similarity == 0.0, 0.0, similarity)
    return jax.lax.top_k(similarity, k)


def nearest(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `train` [N, D] for each row of `queries` [M, D].

    Returns:
      (cosine similarities float32 [M, k] descending, indices int32 [M, k]); equal similarities by ascending index.
    """
    train, queries = jnp.asarray(unit(train)), unit(queries)
    chunk = min(max(_SIMILARITIES // len(train), 1), len(queries))
    similarities, indices = [], []
    for first in range(0, len(queries), chunk):
        part = queries[first : first + chunk]
        padded = np.zeros((chunk, part.shape[1]), part.dtype)  # one shape, compiled once; the padding is cut off below
        padded[: len(part)] = part
        for result, values in zip((similarities, indices), _nearest(train, padded, k), strict=True):
            result.append(np.asarray(values)[: len(part)])
    return np.concatenate(similarities), np.concatenate(indices)


def unit(x: np.ndarray) -> np.ndarray:
    """The rows of `x` [N, D] divided by their lengths, float32; a row of zeros stays."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def vote(
    similarities: np.ndarray, neighbour_labels: np.ndarray, classes: int, temperature: float = TEMPERATURE
) -> np.ndarray:
    """The class with the largest sum of `exp(similarity / temperature)`; of equal ones the lowest. int64 [M].

    Args:
      similarities, neighbour_labels: [M, k], in the same order of neighbours.
    """
    queries = len(similarities)
    # In float64 and one after the other, as bincount adds: equal votes of two classes give equal sums.
    weights = np.exp((similarities.astype(np.float64) - 1.0) / temperature)  # [M, k]; a common factor spares overflow
    cells = np.arange(queries)[:, None] * classes + neighbour_labels  # [M, k]
    sums = np.bincount(cells.ravel(), weights.ravel(), minlength=queries * classes)
    return np.argmax(sums.reshape(queries, classes), axis=1)


def predict(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, np.ndarray]:
    """Predicted classes int64 [M] for each k of `ks` that is not larger than the training set.

    Args:
      train: features [N, D] with `labels` int [N] below `classes`; queries: features [M, D].
    """
    ks = [k for k in ks if k <= len(train)]
    if not ks:
        return {}
    similarities, indices = nearest(train, queries, max(ks))
    return {k: vote(similarities[:, :k], labels[indices[:, :k]], classes, temperature) for k in ks}


def probe(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    classes: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores on `test`, with the feature variant chosen on a part of `train` that is held out.

    Args:
      train, test: features [N, D] by the name of the variant; the first one is the plain one.

    Returns:
      A dict of
        scores: `knn20_PLAIN` (the field's standard number) and `knn20` (the chosen variant), accuracies on `test` with
          k = 20, each a dict of value, low, high (bootstrap, 95 %);
        chosen: the variant;
        held_out: accuracy on the held-out part by variant and k;
        settings: temperature, k, share held out, seed.

    Raises:
      UserError: fewer than 20 training images, or none that can be held out.
    """
    if len(train_labels) < HEADLINE:
        raise UserError(
            f"the training split holds {len(train_labels)} images, and k = {HEADLINE} nearest neighbours need at least "
            "that many; give it more images"
        )
    fit, held = scores.hold_out(train_labels, HELD_OUT, seed)
    headline = min(HEADLINE, len(fit))  # a training set of just 20 has fewer to fit
    table = {}
    for name, features in train.items():
        ks = sorted({headline, *KS})
        predicted = predict(features[fit], train_labels[fit], features[held], classes, ks)
        table[name] = {k: scores.accuracy(values, train_labels[held]) for k, values in predicted.items()}
    chosen = max(table, key=lambda name: table[name][headline])  # of equal ones the first
    results = {}
    for label, name in ((f"knn{HEADLINE}", chosen), (f"knn{HEADLINE}_{next(iter(train))}", next(iter(train)))):
        predicted = predict(train[name], train_labels, test[name], classes, (HEADLINE,))[HEADLINE]
        low, high = scores.bootstrap_interval(predicted == test_labels, seed)
        results[label] = {"value": scores.accuracy(predicted, test_labels), "low": low, "high": high}
    settings = {"temperature": TEMPERATURE, "k": list(KS), "held_out": HELD_OUT, "seed": seed}
    return {"scores": results, "chosen": chosen, "held_out": table, "settings": settings}
