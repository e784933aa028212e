"""Nearest neighbours among the training images: what frozen features tell without any training.

k nearest by cosine similarity, each voting for its class with the weight `exp(similarity / T)`, T = 0.07: the protocol
of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978, that
self-supervised methods report with k = 20.

Scores, of the last block's class token as the field reports it: `knn10`, `knn20`, `knn100`, `knn200`, accuracies;
`knn20_best` of the better of class token and class token with the mean of the patch tokens, chosen for k = 20 on a part
of the training images that is held out, once for each seed. Of several labels for an image each neighbour votes for all
of its own, a class's score is its share of the weights, and the scores are `knn20_map_micro` and so on.
Without test images each training image is classified by all the others (leave-one-out), and nothing is chosen.

Settings:
  k: numbers of neighbours; those above the number of training images are left out.
  temperature: T.
  held_out: share of the training images to choose on.
  seeds: of the held-out parts; the first one also of the bootstrap intervals.
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
from pera_jax.probes.classification.labeled import Labelled

SETTINGS = {"k": (10, 20, 100, 200), "temperature": 0.07, "held_out": 0.2, "seeds": (0, 1, 2)}
HEADLINE = 20  # the k of the comparison of variants
_SIMILARITIES = 2**24  # that are held at once: 64 MiB
_ROWS = 256  # queries of the online monitor at once


# ---------------------------------------------------------------- neighbours and votes


@functools.partial(jax.jit, static_argnames="k")
def _nearest(train: jax.Array, queries: jax.Array, own: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    similarity = jnp.einsum("qd,nd->qn", queries, train, precision=jax.lax.Precision.HIGHEST)  # [q, N]
    # The order of top_k is total and puts -0 behind 0, but equal similarities must keep the order of the index.
    similarity = jnp.where(similarity == 0.0, 0.0, similarity)
    similarity = jnp.where(jnp.arange(len(train)) == own[:, None], -jnp.inf, similarity)
    return jax.lax.top_k(similarity, k)


def nearest(
    train: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `train` [N, D] for each row of `queries` [M, D].

    Args:
      own: int [M], the row of `train` that a query is itself and that is no neighbour of it; then k < N.

    Returns:
      (cosine similarities float32 [M, k] descending, indices int32 [M, k]); equal similarities by ascending index.
    """
    train, queries = jnp.asarray(unit(train)), unit(queries)
    own = np.full(len(queries), -1, np.int32) if own is None else np.asarray(own, np.int32)
    chunk = min(max(_SIMILARITIES // len(train), 1), len(queries))
    similarities, indices = [], []
    for first in range(0, len(queries), chunk):
        part = queries[first : first + chunk]
        padding = chunk - len(part)  # one shape, compiled once; the padding is cut off below
        rows, selves = np.pad(part, ((0, padding), (0, 0))), np.pad(own[first : first + chunk], (0, padding))
        for result, values in zip((similarities, indices), _nearest(train, rows, selves, k), strict=True):
            result.append(np.asarray(values)[: len(part)])
    return np.concatenate(similarities), np.concatenate(indices)


def unit(x: np.ndarray) -> np.ndarray:
    """The rows of `x` [N, D] divided by their lengths, float32; a row of zeros stays."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def votes(similarities: np.ndarray, neighbours: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """The share of each class in the sum of `exp(similarity / temperature)`, float64 [M, classes].

    Args:
      similarities: [M, k], descending.
      neighbours: the neighbours' labels in the same order, int [M, k] or, of several labels, bool [M, k, classes].
    """
    similarities = similarities.astype(np.float64)
    # In float64 and one after the other, as bincount adds: equal votes of two classes give equal sums.
    weights = np.exp((similarities - similarities[:, :1]) / temperature)  # [M, k]; a common factor spares overflow
    total = weights.sum(axis=1, keepdims=True)
    if neighbours.ndim == 3:
        return np.einsum("mk,mkc->mc", weights, neighbours) / total
    cells = np.arange(len(weights))[:, None] * classes + neighbours  # [M, k]
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
    """What the neighbours say, for each k of `ks` that is not larger than their number.

    Args:
      train: features [N, D] with `labels` int [N] below `classes`, or bool [N, classes].
      queries: features [M, D].
      own: as in `nearest`.

    Returns:
      By k the class of the largest vote, of equal ones the lowest, int64 [M]; of several labels all votes [M, classes].
    """
    ks = [k for k in ks if k <= len(train) - (own is not None)]
    if not ks:
        return {}
    similarities, indices = nearest(train, queries, max(ks), own)
    found = {k: votes(similarities[:, :k], labels[indices[:, :k]], classes, temperature) for k in ks}
    return found if labels.ndim == 2 else {k: np.argmax(shares, axis=1) for k, shares in found.items()}


def leave_one_out(
    features: jax.Array,
    labels: jax.Array,
    classes: int,
    k: int = HEADLINE,
    temperature: float = SETTINGS["temperature"],
) -> jax.Array:
    """The accuracy of kNN where each image is classified by all the others: pure JAX, for use inside a training.

    Args:
      features: [N, D], N > k; labels: int [N] below `classes`; `classes` and `k` are static.

    Returns:
      float32 []. The rows are worked on in pieces, so that no [N, N] array is held.
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
    """Features [N, D] of the last block by the name of the variant, the plain one first."""
    plain = tokens.concatenated(1, patch_means=False)
    # Each part with length 1, so that the cosine of the pair is the mean of the two cosines.
    both = np.concatenate([unit(plain), unit(tokens.patch_means[:, -1])], axis=1)
    return {"class": plain, "class_mean": both}


def run(data: Labelled, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores above, and with `knn20_best` as details `chosen`, the variant of each seed, and `held_out`, the
    score on the held-out part by seed, variant and k.

    Raises:
      UserError: fewer training images than any k, or labels and settings that `splits` refuses.
    """
    splits.check(data)
    splits.check_settings(settings)
    ks, seeds, classes = tuple(settings["k"]), settings["seeds"], data.classes
    vote = functools.partial(predict, classes=classes, temperature=settings["temperature"])
    train, labels, alone = variants(data.train), data.train_labels, data.test is None
    test, truth = (train, labels) if alone else (variants(data.test), data.test_labels)
    own = np.arange(len(labels)) if alone else None

    if not ks or min(ks) < 1:
        raise UserError(f"k is {ks}; give at least one whole number above 0")
    if settings["temperature"] <= 0.0:
        raise UserError(f"temperature is {settings['temperature']}; it must be above 0")
    if min(ks) > len(labels) - alone:
        raise UserError(
            f"the training split holds {len(labels)} images, and {min(ks)} nearest neighbours ask for more; give it "
            "more images or set k to smaller numbers"
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
        headline = min(HEADLINE, len(fit))  # a training set of just 20 has fewer to fit
        table = {}
        for name, rows in train.items():
            found = vote(rows[fit], labels[fit], rows[held], ks=tuple(sorted({headline, *ks})))
            table[name] = {str(k): measure(predicted, labels[held]) for k, predicted in found.items()}
        best = max(table, key=lambda name: table[name][str(headline)])  # of equal ones the first
        predictions.append(vote(train[best], labels, test[best], ks=(HEADLINE,))[HEADLINE])
        chosen.append({"seed": seed, "variant": best})
        tables.append(table)
    for suffix, measure in measures.items():
        yield f"knn{HEADLINE}_best{suffix}", scores.over_seeds(measure, predictions, truth, seeds[0])
    yield "chosen", chosen
    yield "held_out", tables
