"""Each loss compared with plain loops in float64; gradients; edge cases; properties."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_jax.losses import koleo, pixels
from pera_jax.losses import prototypes as losses
from pera_jax.losses.prototypes import Prototypes
from pera_jax.models.precision import Precision
from pera_jax.models.vit import patchify

F64 = Precision.from_names("float64", "float64")
B, V, K, D = 6, 3, 10, 4
GROUPS = (1, 2, 3, 6)



def class_term(*arguments, precision=F64):
    loss, statistics = losses.class_term(*arguments, precision)
    return loss, losses.teacher_statistics(loss, statistics)


CLASS = jax.jit(class_term)
KOLEO = jax.jit(lambda u, w, group: koleo.koleo(u[:, None], w, group, F64), static_argnums=2)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed, sharpness=3.0):
    rng = np.random.default_rng(seed)
    nets = [Prototypes(unit(rng.normal(size=(B, V, D))), sharpness * rng.normal(size=(K, D))) for _ in range(2)]
    return *nets, rng.normal(size=K)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def class_loop(student, teacher, center, student_temperature, teacher_temperature):
    """-> (loss of each pair, entropy, KL, entropy of the mean, prototypes in use), one crop after the other."""
    loss, entropies, probabilities = np.zeros(V), [], []
    for v in range(V):
        for b in range(B):
            p_t = softmax((teacher.weights @ teacher.units[b, v] - center) / teacher_temperature)
            p_s = softmax(student.weights @ student.units[b, v] / student_temperature)
            loss[v] -= np.sum(p_t * np.log(p_s)) / B
            entropies.append(-np.sum(p_t * np.log(np.maximum(p_t, 1e-300))))
            probabilities.append(p_t)
    mean = np.mean(probabilities, axis=0)
    used = len(set(np.argmax(probabilities, axis=1)))
    return loss, np.mean(entropies), loss.mean() - np.mean(entropies), -np.sum(mean * np.log(mean)), used


@few
@given(seeds, st.floats(0.05, 2.0), st.floats(0.02, 2.0))
def test_class_term_is_its_loop(seed, student_temperature, teacher_temperature):
    arguments = *draw(seed), student_temperature, teacher_temperature
    with jax.enable_x64(True):  # hypothesis runs the examples outside the fixture's context
        loss, statistics = CLASS(*arguments)
    expected, entropy, kl, entropy_of_mean, used = class_loop(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(statistics["teacher_entropy"], entropy, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics["kl"], kl, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics["teacher_entropy_of_mean"], entropy_of_mean, rtol=1e-9)
    assert statistics["prototypes_in_use"] == used
    assert kl >= -1e-12


@few
@given(seeds, st.floats(-50, 50))
def test_class_term_knows_no_constant_and_no_order(seed, shift):
    student, teacher, center = draw(seed)
    with jax.enable_x64(True):
        loss, _ = CLASS(student, teacher, center, 0.1, 0.04)
        shifted, _ = CLASS(student, teacher, center + shift, 0.1, 0.04)
        order = np.random.default_rng(seed).permutation(B)
        turned, _ = CLASS(*(Prototypes(x.units[order], x.weights) for x in (student, teacher)), center, 0.1, 0.04)
    np.testing.assert_allclose(shifted, loss, rtol=1e-8)
    np.testing.assert_allclose(turned, loss, rtol=1e-9)


def test_class_term_gradient():
    student, teacher, center = jax.tree.map(jnp.asarray, draw(0))

    def naive(student, teacher, center):
        p_t = jax.nn.softmax((jnp.einsum("bvd,kd->bvk", teacher.units, teacher.weights) - center) / 0.05)
        p_s = jax.nn.log_softmax(jnp.einsum("bvd,kd->bvk", student.units, student.weights) / 0.1)
        return -jnp.sum(jax.lax.stop_gradient(p_t) * p_s) / (B * V)

    def ours(student, teacher, center):
        return jnp.mean(CLASS(student, teacher, center, 0.1, 0.05)[0])

    gradients = jax.grad(ours, (0, 1, 2))(student, teacher, center)
    expected = jax.grad(naive)(student, teacher, center)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradients[0], expected)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 0.01
    assert all(np.all(x == 0) for x in jax.tree.leaves(gradients[1:]))  # nothing flows to teacher and center


def test_class_term_at_extreme_logits_in_float32():
    """Logits of some hundreds over a temperature of 0.02: float32 stays finite and right."""
    student, teacher, center = draw(1, sharpness=40.0)
    wide, _ = CLASS(student, teacher, center, 0.1, 0.02)
    narrow = jax.tree.map(jnp.float32, (student, teacher, center))
    value, statistics = class_term(*narrow, np.float32(0.1), np.float32(0.02), precision=Precision())
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, wide, rtol=1e-3)
    assert all(np.isfinite(x) for x in statistics.values())


def koleo_loop(units, weights, group):
    x = [weights @ u / np.linalg.norm(weights @ u) for u in units]
    loss = 0.0
    for start in range(0, len(x), group):
        members = range(start, start + group)
        for i in members:
            others = [j for j in members if j != i]
            if others:
                j = max(others, key=lambda j: x[i] @ x[j])
                loss -= np.log(np.linalg.norm(x[i] - x[j] + 1e-8) + 1e-8) / len(x)
    return loss


@few
@given(seeds, st.sampled_from(GROUPS), st.floats(1e-5, 1e3))
def test_koleo_is_its_loop_in_each_group(seed, group, scale):
    student, *_ = draw(seed)
    units, weights = student.units[:, 0], student.weights
    with jax.enable_x64(True):
        value = KOLEO(units, weights, group)
        scaled = KOLEO(units, scale * weights, group)
        within = np.concatenate([g[::-1] for g in units.reshape(-1, group, D)])
        turned = KOLEO(within, weights, group)
    np.testing.assert_allclose(value, koleo_loop(units, weights, group), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(scaled, value, rtol=1e-7, atol=1e-9)  # only directions count
    np.testing.assert_allclose(turned, value, rtol=1e-8, atol=1e-10)


def test_koleo_sums_over_crops():
    student, *_ = draw(2)
    with jax.enable_x64(True):
        together = koleo.koleo(jnp.asarray(student.units), jnp.asarray(student.weights), GROUPS[-1], F64)
    apart = sum(koleo_loop(student.units[:, v], student.weights, GROUPS[-1]) for v in range(V))
    np.testing.assert_allclose(together, apart, rtol=1e-8)


def test_koleo_gradient_flows_through_both_samples():
    student, *_ = draw(3)
    units, weights = jnp.asarray(student.units[:, 0]), jnp.asarray(student.weights)

    def naive(units, weights):
        z = units @ weights.T
        x = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        inner = jnp.where(jnp.eye(B, dtype=bool), -jnp.inf, x @ x.T)
        return -jnp.mean(jnp.log(jnp.linalg.norm(x - x[jnp.argmax(inner, axis=1)] + 1e-8, axis=-1) + 1e-8))

    gradients = jax.grad(KOLEO, (0, 1))(units, weights, B)
    for ours, expected in zip(gradients, jax.grad(naive, (0, 1))(units, weights)):
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-5])
def test_koleo_near_duplicates_in_float32(distance):
    """`2 - 2 cos` would have no digit left here. The units are rounded first, so the loop sees the same pair."""
    student, *_ = draw(4)
    units = student.units[:, 0].copy()
    units[1] = units[0] + distance * np.array([1.0, -1.0, 0.5, 0.25])
    units, weights = np.float32(units), np.float32(student.weights)
    value = koleo.koleo(jnp.asarray(units[:, None]), jnp.asarray(weights), 2, Precision())
    np.testing.assert_allclose(value, koleo_loop(np.float64(units), np.float64(weights), 2), rtol=1e-2)


def test_koleo_of_duplicates_is_finite():
    units = np.repeat(unit(np.random.default_rng(0).normal(size=(1, D))), B, axis=0)
    weights = draw(5)[0].weights
    value, gradients = jax.value_and_grad(KOLEO, (0, 1))(units, weights, B)
    np.testing.assert_allclose(value, -np.log(np.sqrt(K) * 1e-8 + 1e-8), rtol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_koleo_of_groups_of_one_is_zero():
    student, *_ = draw(6)
    value, gradient = jax.value_and_grad(KOLEO)(student.units[:, 0], student.weights, 1)
    assert value == 0 and np.all(gradient == 0)


@few
@given(seeds, st.floats(-3, 3))
def test_pixel_term_is_its_loop(seed, factor):
    predicted, target = np.random.default_rng(seed).normal(size=(2, 4, 5, 12))
    expected = sum(np.sum((predicted[n, t] - target[n, t]) ** 2) for n in range(4) for t in range(5)) / 20
    with jax.enable_x64(True):
        predicted, target = jnp.asarray(predicted), jnp.asarray(target)
        np.testing.assert_allclose(pixels.pixel_term(predicted, target), expected, rtol=1e-10)
        moved = pixels.pixel_term(target + factor * (predicted - target), target)
    np.testing.assert_allclose(moved, factor**2 * expected, rtol=1e-8, atol=1e-12)


def test_a_shape_that_would_broadcast_is_refused():
    """By the import hook of conftest.py, which checks all annotations of arrays in the tests."""
    with pytest.raises(jaxtyping.TypeCheckError, match="target"):
        pixels.pixel_term(jnp.zeros((4, 5, 12)), jnp.zeros((4, 1, 12)))


def test_pixel_values_are_ordered_row_column_channel():
    images = np.random.default_rng(0).normal(size=(2, 6, 9, 2))
    patches = patchify(images, 3)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                block = images[b, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
                values = [block[p, q, c] for p in range(3) for q in range(3) for c in range(2)]
                np.testing.assert_array_equal(patches[b, 3 * row + column], values)


@few
@given(seeds)
def test_the_mean_output_is_that_of_all_outputs(seed):
    _, teacher, _ = draw(seed)
    outputs = [teacher.weights @ teacher.units[b, v] for b in range(B) for v in range(V)]
    with jax.enable_x64(True):
        mean = losses.mean_output(jax.tree.map(jnp.asarray, teacher), F64)
    np.testing.assert_allclose(mean, np.mean(outputs, axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_direction_tells_how_alike_tokens_are(seed):
    tokens = np.random.default_rng(seed).normal(size=(3, 4, 5)) * 7 + np.arange(5) * seed
    units = (tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)).reshape(12, 5)
    with jax.enable_x64(True):
        mean = losses.mean_direction(jnp.asarray(tokens))
    np.testing.assert_allclose(mean, units.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(np.square(mean).sum(), np.mean([a @ b for a in units for b in units]), atol=1e-12)
