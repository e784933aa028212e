"""The terms of DINO, DINOv2 and MoCo v3 against plain formulas in float64, on one device and on meshes; edge cases;
memory and FLOPs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pera_jax.cost import flops
from pera_jax.losses import per_device, prototypes
from pera_jax.losses.contrastive import contrastive_term
from pera_jax.losses.crossed import crossed_term
from pera_jax.losses.koleo import koleo
from pera_jax.losses.masked import masked_term
from pera_jax.losses.prototypes import Prototypes
from pera_jax.losses.sinkhorn import sinkhorn_bias
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding

F64 = Precision.from_names("float64", "float64")
B, V, T, M, K, D = 8, 5, 2, 5, 16, 4  # images (and groups), the student's crops, the teacher's, rows, prototypes, width
STUDENT, TEACHER = 0.1, 0.05  # temperatures


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of rows on any mesh, the last one padded."""
    monkeypatch.setattr(per_device, "CHUNK", 8 * K // 4)


def draw(sharpness=3.0, empty=False):
    rng = np.random.default_rng(0)

    def units(*shape):
        x = rng.normal(size=(*shape, D))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def network(crops):
        return dict(
            units=units(B, crops), rows=units(B, M), weights=sharpness * rng.normal(size=(K, D)),
            patch_weights=sharpness * rng.normal(size=(K, D)), one=units(B), tokens=5 * rng.normal(size=(B, T, D)),
        )  # fmt: skip

    row_weights = rng.uniform(0.1, 1.0, size=(B, M)) * (rng.uniform(size=(B, M)) < 0.7)
    row_weights[:2] = 0  # also a group without a row
    fixed = dict(bias=rng.normal(size=K), row_weights=0 * row_weights if empty else row_weights)
    return network(V), network(T), fixed


def terms(student, teacher, fixed, precision):
    """-> (a number that depends on every differentiated term, all results)."""
    temperatures = np.asarray([STUDENT, TEACHER], precision.wide)
    crops = [Prototypes(net["units"], net["weights"]) for net in (student, teacher)]
    patches = [Prototypes(net["rows"], net["patch_weights"]) for net in (student, teacher)]
    bias = fixed["bias"] + sinkhorn_bias(crops[1].units, crops[1].weights, None, temperatures[1], precision)
    log_r = sinkhorn_bias(patches[1].units, patches[1].weights, fixed["row_weights"], temperatures[1], precision)
    crossed, of_crops = crossed_term(*crops, bias, *temperatures, precision)
    masked, of_patches = masked_term(*patches, fixed["bias"] + log_r, fixed["row_weights"], *temperatures, precision)
    contrastive, nearest = contrastive_term(student["one"], teacher["one"], 0.2, precision)
    found = dict(
        crossed=crossed, masked=masked, contrastive=contrastive, nearest=nearest,
        koleo=koleo(student["tokens"], None, B, precision), koleo_of_pairs=koleo(student["tokens"], None, 2, precision),
        targets=jax.nn.softmax(crops[1].units @ crops[1].weights.T / TEACHER + bias - fixed["bias"]),
        row_targets=jax.nn.softmax(patches[1].units @ patches[1].weights.T / TEACHER + log_r),
        mean_output=prototypes.mean_output(patches[1], precision, fixed["row_weights"]),
        of_crops=of_crops, of_patches=of_patches,
    )  # fmt: skip
    return total(found), found


def total(found):
    """Every crop with another factor, so that none can stand for another."""
    crossed = jnp.sum(found["crossed"] * jnp.arange(1, V + 1))
    return crossed + found["masked"] + found["contrastive"] + 0.3 * found["koleo"] + 0.7 * found["koleo_of_pairs"]


COMPUTE = jax.jit(jax.value_and_grad(terms, (0, 1, 2), has_aux=True), static_argnums=3)


def sinkhorn_targets(z, iterations=3):
    q = np.exp(np.asarray(z - np.max(z)) / TEACHER)  # [rows, K]
    for _ in range(iterations):
        q /= q.sum(axis=0) * q.shape[1]
        q /= q.sum(axis=1, keepdims=True) * len(q)
    return q * len(q)


def koleo_of_groups(tokens, group):
    loss, where = 0.0, np.arange(B)
    outside = (where[:, None] // group != where // group) | np.eye(B, dtype=bool)
    for v in range(T):
        x = tokens[:, v] / jnp.linalg.norm(tokens[:, v], axis=-1, keepdims=True)
        nearest = jnp.argmax(jnp.where(outside, -jnp.inf, x @ x.T), axis=1)
        loss -= jnp.mean(jnp.log(jnp.linalg.norm(x - x[nearest] + 1e-8, axis=-1) + 1e-8))
    return loss


def plain_statistics(p, weights):
    """Of probabilities [rows, K], each of which has a weight."""
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)
    used = np.isin(np.arange(K), np.argmax(p, axis=-1)[weights > 0])
    return dict(entropy=np.average(entropy, weights=weights), mean=np.average(p, axis=0, weights=weights), used=used)


def plainly(student, teacher, fixed):
    """`terms`, as their docstrings have it."""
    z = teacher["units"] @ teacher["weights"].T  # [B, T, K]
    targets = sinkhorn_targets(z.reshape(-1, K)).reshape(B, T, K)
    p = targets * np.exp(fixed["bias"])
    p /= p.sum(axis=-1, keepdims=True)
    log_s = jax.nn.log_softmax(student["units"] @ student["weights"].T / STUDENT)  # [B, V, K]
    crossed = []
    for v in range(V):
        of_crop = sum(-jnp.sum(p[:, i] * log_s[:, v]) / B for i in range(T) if i != v)
        crossed.append(of_crop * V / (2 * (1 + V - 2)))  # the mean over crops is then that over 2 (1 + NL) terms

    z = teacher["rows"] @ teacher["patch_weights"].T  # [B, M, K]
    weights = fixed["row_weights"].reshape(-1)
    row_targets = sinkhorn_targets(z.reshape(-1, K)[weights > 0])
    q = row_targets * np.exp(fixed["bias"])
    q /= q.sum(axis=-1, keepdims=True)
    log_s = jax.nn.log_softmax(student["rows"] @ student["patch_weights"].T / STUDENT).reshape(-1, K)[weights > 0]
    masked = -jnp.sum(weights[weights > 0, None] * q * log_s)
    cosines = student["one"] @ teacher["one"].T
    contrastive = -2 * 0.2 * jnp.mean(jnp.diag(jax.nn.log_softmax(cosines / 0.2)))
    found = dict(
        crossed=jnp.stack(crossed), masked=masked, contrastive=contrastive,
        nearest=jnp.mean(jnp.argmax(cosines, axis=1) == jnp.arange(B)), koleo=koleo_of_groups(student["tokens"], B),
        koleo_of_pairs=koleo_of_groups(student["tokens"], 2), targets=targets, row_targets=row_targets,
        mean_output=z.reshape(-1, K)[weights > 0].mean(axis=0),
        of_crops=plain_statistics(p.reshape(-1, K), np.ones(B * T)),
        of_patches=plain_statistics(q, weights[weights > 0]),
    )  # fmt: skip
    return total(found), found


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        student, teacher, fixed = draw()
        run = jax.jit(jax.value_and_grad(lambda student: plainly(student, teacher, fixed), has_aux=True))
        return jax.device_get(run(student))


def on(mesh):
    if mesh is None:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))]))


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), (1, 4, 1), (4, 1, 1)], ids=str)
def test_terms_and_their_gradients_are_those_of_plain_formulas(mesh, expected):
    with on(mesh):
        (_, found), (of_student, *of_others) = jax.device_get(COMPUTE(*draw(), F64))
    (_, plain), gradients = expected
    found["row_targets"] = found["row_targets"][draw()[2]["row_weights"] > 0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), of_student, gradients)
    assert min(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 0.01
    assert all(np.all(x == 0) for x in jax.tree.leaves(of_others))  # nothing flows to teacher, keys, bias and weights

    logged = prototypes.teacher_statistics(jnp.asarray(found["crossed"]), jax.tree.map(jnp.asarray, found["of_crops"]))
    np.testing.assert_allclose(logged["kl"], np.mean(plain["crossed"]) - plain["of_crops"]["entropy"], rtol=1e-9)
    assert logged["kl"] >= 0 and logged["prototypes_in_use"] == plain["of_crops"]["used"].sum()


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=str)
def test_sinkhorn_evens_out_the_use_of_prototypes(mesh):
    """Rows add up to 1, prototypes to rows / K in the limit; rows of weight 0 may hold anything."""
    _, teacher, fixed = draw()
    units, weights, valid = teacher["rows"], teacher["patch_weights"], fixed["row_weights"] > 0
    run = jax.jit(lambda units, iterations: sinkhorn_bias(units, *map(jnp.asarray, (weights, valid)), 0.5, F64,
                                                          iterations), static_argnums=1)  # fmt: skip
    with on(mesh):
        log_r, three = run(units, 100), run(units, 3)
        strange = run(np.where(valid[..., None], units, 1e3), 3)
    np.testing.assert_allclose(strange, three, rtol=1e-12)
    targets = jax.nn.softmax(units[valid] @ weights.T / 0.5 + log_r)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(targets.sum(axis=0), valid.sum() / K, rtol=1e-6)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=str)
def test_no_row_at_all_gives_zeros(mesh):
    student, teacher, fixed = draw(empty=True)
    with on(mesh):
        (_, found), (gradients, *_) = COMPUTE(student, teacher, fixed, F64)
    assert found["masked"] == 0 and not np.any(found["mean_output"])
    assert not any(np.any(x) for x in jax.tree.leaves(found["of_patches"]))
    assert not np.any(gradients["rows"]) and not np.any(gradients["patch_weights"])
    z = teacher["rows"] @ teacher["patch_weights"].T / TEACHER
    np.testing.assert_allclose(found["row_targets"], jax.nn.softmax(z), rtol=1e-9)  # log r is 0


def test_extreme_logits_and_equal_tokens_in_float32():
    """Logits of hundreds over a temperature of 0.05 have weights of exp(-20000): float32 stays finite and right."""
    student, teacher, fixed = draw(sharpness=100.0)
    student["tokens"][:3] = student["tokens"][0]
    student["tokens"][3] = 0
    narrow = jax.tree.map(np.float32, (student, teacher, fixed))
    wide = jax.tree.map(np.float64, narrow)
    (_, found), gradients = COMPUTE(*narrow, Precision())
    (_, right), _ = COMPUTE(*wide, F64)
    assert found["crossed"].dtype == found["masked"].dtype == found["contrastive"].dtype == np.float32
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((found, gradients)))
    for name in ("crossed", "masked", "contrastive"):
        np.testing.assert_allclose(found[name], right[name], rtol=1e-3)


def test_koleo_of_tokens_knows_no_length():
    tokens = draw()[0]["tokens"]
    longer = tokens * np.random.default_rng(1).uniform(0.1, 10, size=(B, T, 1))
    run = jax.jit(lambda tokens, weights: koleo(tokens, weights, 4, F64))
    np.testing.assert_allclose(run(longer, None), run(tokens, None), rtol=1e-9)
    np.testing.assert_allclose(run(tokens, np.eye(D)), run(tokens, None), rtol=1e-9)


def equations(jaxpr, in_loop=False):
    """All equations, those of inner jaxprs included, and whether each is in the body of a loop."""
    for equation in jaxpr.eqns:
        yield equation, in_loop
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner, in_loop or equation.primitive.name == "scan")


def largest(found):
    return max(v.aval.size for equation, _ in found for v in equation.outvars if hasattr(v.aval, "size"))


def test_only_numbers_per_row_are_summed_over_devices_for_each_crop_or_chunk():
    """Gradients of weights are summed once."""
    with on((2, 2, 2)):
        jaxpr = jax.make_jaxpr(jax.grad(terms, has_aux=True), static_argnums=3)(*draw(), F64).jaxpr
    found = [
        (e, inside) for e, inside in equations(jaxpr) if e.primitive.name.startswith(("psum", "pmax", "all_gather"))
    ]
    inside = [(e, True) for e, inside in found if inside]
    assert len(inside) > 10 and largest(inside) <= 8  # rows of a chunk, or the prototypes of a device
    assert largest(found) >= K * D // 4


def test_no_array_holds_all_logits_and_products_are_few(monkeypatch):
    """The backward pass computes the logits once more and both gradients: four products a row, where the teacher's
    logits of masked rows are also computed twice."""
    batch, crops, rows, outputs, width = 16, 10, 96, 512, 32
    monkeypatch.setattr(per_device, "CHUNK", 32 * outputs)

    def network(*shape):
        return Prototypes(jax.ShapeDtypeStruct((*shape, width), "float32"),
                          jax.ShapeDtypeStruct((outputs, width), "float32"))  # fmt: skip

    bias, weights = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((outputs,), (batch, rows)))
    wide = Precision()

    def traced(function, *arguments):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        return largest(equations(jaxpr)), flops.matrix_products(jaxpr) / (2 * batch * outputs * width)

    crossed = jax.grad(lambda *x: jnp.sum(crossed_term(*x, 0.1, 0.05, wide)[0]), allow_int=True)
    size, products = traced(crossed, network(batch, crops), network(batch, T), bias)
    assert size <= T * batch * outputs and products == T + 4 * crops
    masked = jax.grad(lambda *x: masked_term(*x, 0.1, 0.05, wide)[0])
    size, products = traced(masked, network(batch, rows), network(batch, rows), bias, weights)
    assert size <= max(per_device.CHUNK, batch * rows * width) and products == 6 * rows
    run = lambda net, weights: sinkhorn_bias(net.units, net.weights, weights, 0.05, wide)  # noqa: E731
    size, products = traced(run, network(batch, rows), weights)
    assert size <= max(per_device.CHUNK, batch * rows * width) and products == 3 * rows
