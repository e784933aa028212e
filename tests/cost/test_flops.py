"""FLOPs: the arithmetic equals what is traced, product by product; the benchmark prints both."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from benchmarks import step as benchmark
from pera_jax.cost import flops
from pera_jax.losses import koleo as koleo_term
from pera_jax.models import positions
from pera_jax.models.drop_path import kept_of
from pera_jax.training import step as steps

ROOT = pathlib.Path(__file__).resolve().parents[2]


def traced(function, *arguments) -> float:
    return flops.matrix_products(jax.make_jaxpr(function)(*arguments).jaxpr)


@functools.cache
def of_step(**changes) -> float:
    config = tiny.config(**changes)
    objective = tiny.objective(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    state = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
    return traced(steps.make_step(objective, optimizer, 0, config.optimizer), state, tiny.batch(config), tiny.HYPER)


def scores(objective, kind: str) -> float:
    """Of the student's attention, query times key, over all blocks on the crops that one image has of a kind."""
    vit, parts, group = objective.encoder, objective.parts[kind], objective.drop_path_group
    crops = objective.crops[kind][0]
    kept = kept_of(group * crops, objective.drop_path_rate) / (group * crops) if objective.drop_path_rate else 1.0
    lower = 1 + parts.student
    upper = lower + (parts.learnable if kind == "global" else 0)
    return crops * kept * 2 * vit.width * (vit.split * lower**2 + (vit.depth - vit.split) * upper**2)


def beside_the_method(config) -> float:
    """The products that the count leaves out: spreading term, center, resampled positions; class logits and attention
    scores once more.

    The class term keeps no logits, of either network, and the student's blocks no scores: the backward pass computes
    them.
    """
    objective = tiny.objective(config)
    heads, side = config.pera.heads, config.crops.global_size // config.model.patch
    units = jnp.ones((config.batch_size, config.crops.global_number, heads.bottleneck))
    weights = jnp.ones((heads.prototypes, heads.bottleneck))
    group = config.pera.loss.koleo_group or config.batch_size

    def koleo(units, weights):
        return koleo_term.koleo(units, weights, group, objective.precision)

    total = traced(jax.grad(koleo, (0, 1)), units, weights)
    logits = 2 * heads.prototypes * heads.bottleneck
    total += logits  # W mean(u)
    total += config.batch_size * sum(scores(objective, kind) for kind in objective.parts)
    total += 2 * config.batch_size * (config.crops.global_number + config.crops.local_number) * logits
    if config.crops.local_number:
        local = config.crops.local_size // config.model.patch
        grid = jnp.ones((side, side, config.model.width))
        forward = traced(lambda grid: positions.resample(grid, local, local), grid)
        both = traced(jax.grad(lambda grid: positions.resample(grid, local, local).sum()), grid)
        total += both + forward  # of the student, of the teacher
    return total


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_size=4),
        dict(batch_size=8, model__depth=5, model__scan=False, model__mlp_ratio=3.0),
        dict(
            batch_size=6,
            drop_path__rate=0.0,
            pera__loss__koleo_group=0,
            crops__local_number=0,
            pera__masks__student=0.3,
        ),
        dict(batch_size=4, crops__local_number=5, crops__global_number=1, drop_path__group=4),
    ],
    ids=str,
)
def test_the_count_is_what_is_traced_to_the_last_product(changes):
    config = tiny.config(**changes)
    counted = config.batch_size * sum(tiny.objective(config).flops_per_image().values())
    assert of_step(**changes) == counted + beside_the_method(config)


def test_recomputation_is_seen_and_is_no_part_of_the_count():
    plain, remat = tiny.config(batch_size=4), tiny.config(batch_size=4, model__remat="block")
    assert tiny.objective(plain).flops_per_image() == tiny.objective(remat).flops_per_image()
    blocks = {name: value for name, value in tiny.objective(plain).flops_per_image().items() if "student" in name}
    more = of_step(batch_size=4, model__remat="block") - of_step(batch_size=4)
    assert 0.15 < more / (4 * sum(blocks.values())) < 1 / 3  # at most one more forward pass of three


def test_loops_are_counted_by_their_trips():
    matrix = jnp.ones((3, 3))

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ matrix, None), x, None, length=7)[0]

    def choice(x):
        return jax.lax.cond(x[0, 0] > 0, loop, lambda x: x, x)

    assert traced(loop, jnp.ones((2, 3))) == traced(choice, jnp.ones((2, 3))) == 7 * 2 * 2 * 3 * 3
    with pytest.raises(ValueError, match="while loop"):
        traced(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ matrix, x), jnp.ones((2, 3)))


def test_the_benchmark_of_the_step_prints_and_writes_its_numbers(tmp_path, monkeypatch, capsys, one_device):
    file = tmp_path / "step.json"
    command = ["benchmarks/step.py", "--config", str(ROOT / "configs/mae_vitb16.py:smoke"), "--steps", "2"]
    small = ["--set", "model.depth=2", "--set", "model.remat=none", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", [*command, *small, "--json", str(file)])
    monkeypatch.setattr(benchmark, "_SIDE", 256)
    benchmark.main()
    found = json.loads(file.read_text())
    count = found["flops_per_image"]
    assert found["batch_size"] == 4
    assert count["method"] == sum(count["parts"].values())
    assert count["method"] < count["traced"] < count["xla"]
    assert min(found["bytes"].values()) > 0 and found["cpu_seconds_per_image"] > 0 and 0 < found["share_of_matmul"] < 1
    printed = capsys.readouterr().out
    for words in ("encoder", "decoder", "CPU seconds per image", "temporaries", "256 x 256"):
        assert words in printed
    # As from a shell: the script finds the package by itself.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *command, "--set", "model.deep=2"]
    wrong = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: the config has no field model.deep")


def test_the_benchmark_of_the_step_imports_no_data_library():
    code = "import sys, benchmarks.step; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pera_jax.cost.flops" in loaded.split()
    assert not {"grain", "array_record", "tensorflow_datasets", "pera_jax.data"} & set(loaded.split())
