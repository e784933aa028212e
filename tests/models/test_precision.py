"""The precision policy: dtypes in the traced training step."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pera_jax.losses import koleo
from pera_jax.losses import prototypes as losses
from pera_jax.models import positions
from pera_jax.models.precision import Precision
from pera_jax.objectives.base import Context, Streams
from pera_jax.training import step as steps

BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
HYPER = {name: np.float32(value) for name, value in tiny.HYPER.items()}
# Of matrix products, biases and GELU; everything else that computes (reductions, norms, exponentials of softmax and
# losses) must not meet a bfloat16.
HALF = {
    "dot_general", "convert_element_type", "add", "add_any", "sub", "mul", "neg", "erf", "erfc", "broadcast_in_dim",
    "reshape", "transpose", "squeeze", "slice", "pad", "concatenate", "split", "gather", "copy", "select_n", "max",
    "while", "scan", "cond", "pjit", "jit", "remat2", "checkpoint", "custom_vjp_call", "custom_jvp_call", "name",
    "sharding_constraint", "optimization_barrier", "exp", "square", "integer_pow", "reduce_sum", "dynamic_slice",
    "dynamic_update_slice", "mul_add",
}  # fmt: skip


def equations(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def dtypes(variables):
    return {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}


def wide_products(jaxpr):
    """How many products of float32 operands there are, by shapes."""
    return collections.Counter(
        tuple(sorted(v.aval.shape for v in equation.invars))
        for equation in equations(jaxpr)
        if equation.primitive.name == "dot_general" and dtypes(equation.invars) == {F32}
    )


@pytest.fixture(scope="module", params=[True, False], ids=["scan", "unrolled"])
def traced(request):
    settings = tiny.config(precision="bfloat16", model__scan=request.param, model__remat="block")
    objective = tiny.objective(settings)
    optimizer = steps.make_optimizer(objective, settings.optimizer)
    state = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
    batch = tiny.batch(settings)
    rngs = Streams.at(0, "step", 0)
    arguments = state.params, state.teacher, state.objective, objective.prepare(rngs, batch), Context(rngs, HYPER)
    step = steps.make_step(objective, optimizer, 0, settings.optimizer)
    return {
        "objective": objective,
        "forward": jax.make_jaxpr(objective.loss)(*arguments).jaxpr,
        "step": jax.make_jaxpr(step)(state, batch, HYPER).jaxpr,
        "state": state,
        "new_state": jax.eval_shape(step, state, batch, HYPER)[0],
    }


@pytest.mark.parametrize("part", ["forward", "step"])
def test_matrix_products_take_bfloat16_save_a_named_few(traced, part):
    jaxpr, objective = traced[part], traced["objective"]
    products = [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]
    kinds = [dtypes(equation.invars) for equation in products]
    assert all(kind in ({BF16}, {F32}) for kind in kinds)  # never mixed, never anything else
    assert kinds.count({BF16}) > 20

    # What may stay wide: Gram matrices and distances of KoLeo, the center, the position embedding's resampling.
    head = objective.prototype_head
    units = jax.ShapeDtypeStruct((16, 2, head.bottleneck), F32)
    weights = jax.ShapeDtypeStruct((head.outputs, head.bottleneck), F32)
    grid = jax.ShapeDtypeStruct((4, 4, objective.encoder.width), F32)
    teacher = losses.Prototypes(jax.ShapeDtypeStruct((16, 4, head.bottleneck), F32), weights)
    policy = objective.precision

    def gradient(f):
        return lambda *x: jax.value_and_grad(lambda *y: jnp.sum(f(*y)), tuple(range(len(x))))(*x)

    allowed = [
        jax.make_jaxpr(gradient(lambda u, w: koleo.koleo(u, w, 4, policy)))(units, weights),
        jax.make_jaxpr(lambda t: losses.mean_output(t, policy))(teacher),
        jax.make_jaxpr(gradient(lambda g: positions.resample(g, 3, 3)))(grid),
    ]
    shapes = set().union(*(wide_products(jaxpr.jaxpr) for jaxpr in allowed))
    assert set(wide_products(jaxpr)) <= shapes
    for equation in products:
        if dtypes(equation.invars) == {F32}:  # and these are exact on devices that would round float32 operands
            assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}


def test_nothing_else_computes_in_bfloat16(traced):
    met = {e.primitive.name for e in equations(traced["step"]) if BF16 in dtypes(e.invars)}
    assert "dot_general" in met
    assert met <= HALF, met - HALF
    # Exponentials and sums in bfloat16 are only in the derivatives of GELU and of biases, none in the forward pass.
    forward = {e.primitive.name for e in equations(traced["forward"]) if BF16 in dtypes(e.invars)}
    assert not forward & {"exp", "reduce_sum", "reduce_max", "div", "log", "rsqrt", "sqrt"}, forward
    sums = [e for e in equations(traced["step"]) if e.primitive.name == "reduce_sum" and BF16 in dtypes(e.invars)]
    assert all(e.outvars[0].aval.ndim <= 3 and 16 not in e.outvars[0].aval.shape[:-1] for e in sums)


def test_the_residual_stream_is_float32(traced):
    width = traced["objective"].encoder.width
    norms = [
        e for e in equations(traced["forward"]) if e.primitive.name in ("rsqrt", "reduce_max", "exp", "log", "argmax")
    ]
    assert norms and all(dtypes(e.invars) <= {F32} for e in norms)
    carried = [
        v.aval
        for e in equations(traced["forward"])
        if e.primitive.name == "scan"
        for v in e.invars[e.params["num_consts"] : e.params["num_consts"] + e.params["num_carry"]]
        if getattr(v.aval, "ndim", 0) == 3 and v.aval.shape[-1] == width
    ]
    assert carried and {a.dtype for a in carried} == {F32}


def test_parameters_teacher_and_optimizer_are_float32(traced):
    for state in (traced["state"], traced["new_state"]):
        found = {leaf.dtype for leaf in jax.tree.leaves(state)}
        assert found == {F32, jnp.dtype("int32")}
    assert jax.tree.map(lambda a: (a.shape, a.dtype), traced["state"]) == jax.tree.map(
        lambda a: (a.shape, a.dtype), traced["new_state"]
    )


def test_prototype_logits_accumulate_in_float32():
    policy = Precision.from_names("bfloat16")
    rng = np.random.default_rng(0)
    u, w = np.float32(rng.normal(size=(5, 384))), np.float32(rng.normal(size=(40, 384)))
    logits, pull = jax.vjp(policy.logits, u, w)
    rounded = [np.float64(np.asarray(jnp.asarray(x, BF16), np.float32)) for x in (u, w)]
    assert logits.dtype == F32
    np.testing.assert_allclose(logits, rounded[0] @ rounded[1].T, rtol=1e-5, atol=1e-4)
    assert [g.dtype for g in pull(jnp.ones_like(logits))] == [F32, F32]


def test_bfloat16_stays_close_to_float32():
    results = {}
    for precision in ("bfloat16", "float32"):
        settings = tiny.config(precision=precision, pera__loss__koleo_group=0, crops__local_number=0)
        objective = tiny.objective(settings)
        optimizer = steps.make_optimizer(objective, settings.optimizer)
        state = jax.jit(lambda: steps.new_state(objective, optimizer, 0))()  # noqa: B023
        views = objective.make_views(objective.prepare(Streams(jax.random.key(1)), tiny.batch(settings)))

        @jax.jit
        def run(params, state, views):
            def loss(params):
                units = objective.outputs(params, state.teacher, views, None)[0].units  # noqa: B023
                value, means = objective.loss_on_views(params, state.teacher, state.objective, views, None, HYPER)  # noqa: B023
                return value, (units, means)

            grads, (units, means) = jax.grad(loss, has_aux=True)(params)
            _, metrics = objective.update(state.objective, means)  # noqa: B023
            return units, metrics, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

        results[precision] = run(state.params, state, views)
    (units, metrics, gradient), (wide_units, wide_metrics, wide_gradient) = results["bfloat16"], results["float32"]
    # Eight bits of mantissa and a handful of roundings on the way to a unit vector.
    error = float(jnp.max(jnp.abs(units - wide_units)))
    assert 1e-6 < error < 0.03
    for name in ("loss", "loss/class", "loss/pixel"):
        np.testing.assert_allclose(metrics[name], wide_metrics[name], rtol=0.01)
    cosine = gradient @ wide_gradient / jnp.linalg.norm(gradient) / jnp.linalg.norm(wide_gradient)
    assert cosine > 0.99
