"""cuDNN attention without a GPU: JAX's support rules, and that padding does not change the result."""

import functools

import gpu_rules
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pera_jax import config as configs
from pera_jax.common.errors import UserError
from pera_jax.cost.program import Program
from pera_jax.models import attention, blocks
from pera_jax.models.precision import Precision
from pera_jax.objectives.pera import objective as pera
from pera_jax.parallel import sharding

BF16 = Precision.from_names("bfloat16")
PUBLISHED = ("pera_vitb16", "pera_vitg16_1024", "aid_small", "demo")
# Lengths that the published crops give (class token, visible patches, learnable ones), and the shortest.
LENGTHS = (1, 8, 15, 158, 315)


def on_h100(config, bands, device):
    del device
    return pera.PerA.from_config(config, bands, gpu_rules.H100)


def primitives(jaxpr) -> set[str]:
    """The names of all primitives in a traced program, those of inner programs as well."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= primitives(inner)
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in PUBLISHED] + [("demo", {"accumulate": 2, "model.remat": "dots"})],
)
def test_every_published_config_traces_with_the_rules_of_cudnn(name, changes, monkeypatch):
    gpu_rules.in_force(monkeypatch)
    config = configs.load(f"configs/{name}.py")
    config.update_from_flattened_dict({"precision": "bfloat16", "batch_size": 256} | changes)
    program = Program(config, make=on_h100)
    assert program.objective.encoder.attention == "cudnn"
    monkeypatch.setattr(attention, "_FUSED_FROM", 1)  # the lengths that are too short for it on an H100 as well
    found = primitives(program.trace().jaxpr.jaxpr)
    assert {"dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"} <= found


def test_auto_says_why_it_does_not_take_cudnn(monkeypatch):
    refusal = functools.partial(attention.cudnn_refusal, head_width=64, device=gpu_rules.H100)
    assert "cuDNN" in refusal(BF16)  # JAX finds none on this machine
    gpu_rules.in_force(monkeypatch)
    assert refusal(BF16) == "" and attention.choose("auto", BF16, 64, gpu_rules.H100) == "cudnn"
    assert "precision=bfloat16" in refusal(Precision())
    assert "got 12" in refusal(BF16, head_width=12) and "got 256" in refusal(BF16, head_width=256)
    assert "7.0" in refusal(BF16, device=gpu_rules.Device(compute_capability="7.0"))
    assert "CPU" in refusal(BF16, device=jax.devices()[0])
    assert attention.choose("auto", Precision(), 64, gpu_rules.H100) == "xla"
    with pytest.raises(UserError, match="is not supported here: expected precision=bfloat16"):
        attention.choose("cudnn", Precision(), 64, gpu_rules.H100)


def test_auto_takes_no_kernel_that_jax_refuses(monkeypatch):
    gpu_rules.in_force(monkeypatch)

    def refuses(*_, **__):
        raise NotImplementedError("Unsupported sequence length Q 4, KV 4.\nand a second line")

    monkeypatch.setattr(gpu_rules.rules, "check_is_flash_attention", refuses)
    assert attention.cudnn_refusal(BF16, 64, gpu_rules.H100) == "JAX says: Unsupported sequence length Q 4, KV 4"
    assert attention.choose("auto", BF16, 64, gpu_rules.H100) == "xla"


def kernel(query, key, value, key_value_seq_lengths=None, implementation=None):
    """What cuDNN's kernel computes, in any precision; like it, it is not given odd lengths."""
    assert implementation == "cudnn" and key.shape[1] % 2 == 0
    scores = jnp.einsum("bqhe,bkhe->bhqk", query, key) * query.shape[-1] ** -0.5
    if key_value_seq_lengths is not None:
        seen = jnp.arange(key.shape[1]) < key_value_seq_lengths[:, None]  # [B, N]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), value)


def block_and_gradients(implementation, heads, x, mesh=None):
    """One block's output on x [B, N, D], and the gradients of its parameters and of x."""
    wide = Precision.from_names("float64", "float64")
    block = blocks.Block(heads, 4.0, wide, implementation)
    rng = np.random.default_rng(0)
    born = jax.eval_shape(blocks.Block(heads, 4.0, wide, "xla").init, jax.random.key(0), x, None, None)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), born)
    weight = rng.normal(size=x.shape)

    def loss(params, x):
        x = sharding.constrain_batch(x)
        y, _ = block.apply(params, x, None, None)
        return jnp.sum(weight * y), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    if mesh is None:
        return run(params, x)
    with jax.set_mesh(mesh):
        return run(params, x)


@pytest.fixture
def without_cudnn(monkeypatch):
    monkeypatch.setattr(attention, "_FUSED_FROM", 1)  # short sequences as well
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_padded_step_equals_the_unpadded_one(tokens, without_cudnn):
    x = np.random.default_rng(tokens).normal(size=(2, tokens, 16))
    (_, padded), gradients = block_and_gradients("cudnn", 2, x)
    (_, plain), wanted = block_and_gradients("xla", 2, x)
    assert padded.shape == x.shape
    np.testing.assert_allclose(padded, plain, rtol=0, atol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * max(1, abs(np.asarray(theirs)).max()))


@pytest.mark.parametrize(("crops", "heads"), [(8, 2), (8, 3), (3, 2)])  # heads or crops that the mesh does not divide
def test_each_device_runs_the_kernel_on_its_own_crops_and_heads(crops, heads, without_cudnn):
    x = np.random.default_rng(0).normal(size=(crops, 7, 12))
    (_, padded), gradients = block_and_gradients("cudnn", heads, x, sharding.make_mesh(2, 2, 2))
    (_, plain), wanted = block_and_gradients("xla", heads, x)
    np.testing.assert_allclose(padded, plain, rtol=0, atol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)
