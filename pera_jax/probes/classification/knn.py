"""Weighted k-nearest-neighbor classification of frozen features.

The k nearest training images by cosine similarity vote for their classes with weight `exp(similarity / T)`, T = 0.07:
the protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978,
reported by self-supervised methods with k = 20.

Scores: the accuracies `knn10`, `knn20`, `knn100`, `knn200` of the class token of the last block; and `knn20_best`, with
the better of class token and class token plus mean patch token, chosen with k = 20 on held-out training images for each
seed. Multi-label: each neighbor votes for all of its labels, the score of a class is its fraction of the total weight,
and the metrics are `knn20_map_micro`, `knn20_map_macro` and so on. Without test images the evaluation is leave-one-out
on the training images, and nothing is chosen.

Settings:
  k: numbers of neighbors; values above the number of training images are skipped.
  temperature: T.
  held_out: fraction of the training images held out to choose hyperparameters.
  seeds: seeds of the held-out splits; the first one is also the seed of the bootstrap intervals.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.encoder import extract as features
from pera_jax.probes import scores, splits
from pera_jax.probes.classification.labeled import Labeled

SETTINGS = {"k": (10, 20, 100, 200), "temperature": 0.07, "held_out": 0.2, "seeds": (0, 1, 2)}
HEADLINE = 20  # the k of the comparison of variants
_SIMILARITIES = 2**24  # held at once: 64 MiB
_ROWS = 256  # queries per batch of the online monitor


# ---------------------------------------------------------------- neighbors and votes


@functools.partial(jax.jit, static_argnames="k")
def _nearest(train: jax.Array, queries: jax.Array, own: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    similarity = jnp.einsum("qd,nd->qn", queries, train, precision=jax.lax.Precision.HIGHEST)  # [q, N]
    # top_k orders -0 behind 0, but equal similarities must be ordered by index.
    similarity = jnp.where(similarity == 0.0, 0.0, similarity)
    similarity = jnp.where(jnp.arange(len(train)) == own[:, None], -jnp.inf, similarity)
    return jax.lax.top_k(similarity, k)


def nearest(
    train: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `train` [N, D] for each row of `queries` [M, D].

    Args:
      own: int [M], the row of `train` that is the query itself, to be excluded; requires k < N.

    Returns:
      (cosine similarities float32 [M, k] descending, indices int32 [M, k]); equal similarities by ascending index.
    """
    train, queries = jnp.asarray(unit(train)), unit(queries)
    own = np.full(len(queries), -1, np.int32) if own is None else np.asarray(own, np.int32)
    chunk = min(max(_SIMILARITIES // len(train), 1), len(queries))
    similarities, indices = [], []
    for first in range(0, len(queries), chunk):
        part = queries[first : first + chunk]
        padding = chunk - len(part)  # one shape, compiled once; the padding is removed below
        rows, selves = np.pad(part, ((0, padding), (0, 0))), np.pad(own[first : first + chunk], (0, padding))
        for result, values in zip((similarities, indices), _nearest(train, rows, selves, k), strict=True):
            result.append(np.asarray(values)[: len(part)])
    return np.concatenate(similarities), np.concatenate(indices)


def unit(x: np.ndarray) -> np.ndarray:
    """The rows of `x` [N, D] normalized to unit length, float32; zero rows stay zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def votes(similarities: np.ndarray, neighbors: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """The fraction of each class in the sum of weights `exp(similarity / temperature)`, float64 [M, classes].

    Args:
      similarities: [M, k], descending.
      neighbors: labels of the neighbors in the same order, int [M, k], or bool [M, k, classes] for multi-label images.
    """
    similarities = similarities.astype(np.float64)
    # Float64 sums in the fixed order of bincount: equal votes of two classes give equal sums.
    weights = np.exp((similarities - similarities[:, :1]) / temperature)  # [M, k]; the common factor avoids overflow
    total = weights.sum(axis=1, keepdims=True)
    if neighbors.ndim == 3:
        return np.einsum("mk,mkc->mc", weights, neighbors) / total
    cells = np.arange(len(weights))[:, None] * classes + neighbors  # [M, k]
    sums = np.bincount(cells.ravel(), weights.ravel(), minlength=len(weights) * classes)
    return sums.reshape(-1, classes) / total


def predict(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    ks: tuple[int, ...] = SETTINGS["k"],
    temperature: float = SETTINGS["temperature"],
    own: np.ndarray | None = None,
) -> dict[int, np.ndarray]:
    """Classifies queries with each k of `ks` that does not exceed the number of neighbors.

    Args:
      train: features [N, D] with `labels` int [N] below `classes`, or bool [N, classes].
      queries: features [M, D].
      own: as in `nearest`.

    Returns:
      By k: the class with the largest vote int64 [M], the lowest index among equals; for multi-label the votes [M,
      classes].
    """
    ks = [k for k in ks if k <= len(train) - (own is not None)]
    if not ks:
        return {}
    similarities, indices = nearest(train, queries, max(ks), own)
    found = {k: votes(similarities[:, :k], labels[indices[:, :k]], classes, temperature) for k in ks}
    return found if labels.ndim == 2 else {k: np.argmax(votes_, axis=1) for k, votes_ in found.items()}


def leave_one_out(
    features: jax.Array,
    labels: jax.Array,
    classes: int,
    k: int = HEADLINE,
    temperature: float = SETTINGS["temperature"],
) -> jax.Array:
    """Leave-one-out kNN accuracy in pure JAX, for use during training.

    Args:
      features: [N, D], N > k; labels: int [N] below `classes`; `classes` and `k` are static.

    Returns:
      float32 []. Computed in batches of rows, without an [N, N] array.
    """
    features = features.astype(jnp.float32)
    units = features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def right(index):
        similarity = jnp.matmul(units, units[index], precision=jax.lax.Precision.HIGHEST)  # [N]
        similarity = jnp.where(similarity == 0.0, 0.0, similarity)  # as in `_nearest`
        nearest, indices = jax.lax.top_k(jnp.where(jnp.arange(len(units)) == index, -jnp.inf, similarity), k)
        weights = jnp.exp((nearest - nearest[0]) / temperature)  # [k]
        return jnp.argmax(jax.ops.segment_sum(weights, labels[indices], classes)) == labels[index]

    return jnp.mean(jax.lax.map(right, jnp.arange(len(features)), batch_size=_ROWS), dtype=jnp.float32)


# ---------------------------------------------------------------- the task


def variants(tokens: features.Features) -> dict[str, np.ndarray]:
    """Feature variants [N, D] of the last block by name; the class token comes first."""
    plain = tokens.concatenated(1, patch_means=False)
    # Both parts have unit length, so the cosine of the concatenation is the mean of the two cosines.
    both = np.concatenate([unit(plain), unit(tokens.patch_means[:, -1])], axis=1)
    return {"class": plain, "class_mean": both}


def run(data: Labeled, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, score) for the scores above; with `knn20_best` also the details `chosen`, the variant of each seed,
    and `held_out`, the score on held-out images by seed, variant and k.

    Raises:
      UserError: fewer training images than the smallest k; labels or settings rejected by `splits`.
    """
    splits.check(data)
    splits.check_settings(settings)
    ks, seeds, classes = tuple(settings["k"]), settings["seeds"], data.classes
    vote = functools.partial(predict, classes=classes, temperature=settings["temperature"])
    train, labels, alone = variants(data.train), data.train_labels, data.test is None
    test, truth = (train, labels) if alone else (variants(data.test), data.test_labels)
    own = np.arange(len(labels)) if alone else None

    if not ks or min(ks) < 1:
        raise UserError(f"invalid k={ks}; expected at least one integer >= 1")
    if settings["temperature"] <= 0.0:
        raise UserError(f"invalid temperature={settings['temperature']}; expected a number > 0")
    if min(ks) > len(labels) - alone:
        raise UserError(
            f"the training split has {len(labels)} images, too few for k={min(ks)}; add training images or reduce k"
        )
    several = {"_map_micro": scores.map_micro, "_map_macro": scores.map_macro}
    measures = {"": scores.accuracy} if labels.ndim == 1 else several
    for k, predicted in vote(train["class"], labels, test["class"], ks=ks, own=own).items():
        for suffix, measure in measures.items():
            yield f"knn{k}{suffix}", scores.over_seeds(measure, [predicted], truth, seeds[0])
    if alone or HEADLINE not in ks or HEADLINE > len(labels):
        return

    measure, chosen, tables, predictions = next(iter(measures.values())), [], [], []
    for seed in seeds:
        fit, held = splits.hold_out(labels, settings["held_out"], seed)
        headline = min(HEADLINE, len(fit))  # with only 20 training images fewer remain after the split
        table = {}
        for name, rows in train.items():
            found = vote(rows[fit], labels[fit], rows[held], ks=tuple(sorted({headline, *ks})))
            table[name] = {str(k): measure(predicted, labels[held]) for k, predicted in found.items()}
        best = max(table, key=lambda name: table[name][str(headline)])  # the first among equals
        predictions.append(vote(train[best], labels, test[best], ks=(HEADLINE,))[HEADLINE])
        chosen.append({"seed": seed, "variant": best})
        tables.append(table)
    for suffix, measure in measures.items():
        yield f"knn{HEADLINE}_best{suffix}", scores.over_seeds(measure, predictions, truth, seeds[0])
    yield "chosen", chosen
    yield "held_out", tables
