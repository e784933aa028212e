"""The command `plan`: collectives read from HLO, the search for the largest batch, and a run on local devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from pera_jax import plan
from pera_jax.common.errors import UserError
from pera_jax.cost import hlo
from pera_jax.cost.program import Memory
from pera_jax.parallel import chips, sharding

# A loop of three iterations as the TPU compiler leaves it: no trip count, a counter incremented by 2, an asynchronous
# collective in two fusions, one with start and done, and one whose size depends on its operand.
TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: bf16[1,48,3]) -> bf16[16,48,3] {
  %param_0 = bf16[1,48,3]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,48,3]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=5, dimensions={0}
}

%fused_computation.2 (param_0: bf16[1,48,3]) -> bf16[16,48,3] {
  %param_0 = bf16[1,48,3]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,48,3]{2,1,0} all-gather(%param_0), channel_id=5, dimensions={0}
}

%body (arg: (u32[], bf16[1,48,3])) -> (u32[], bf16[1,48,3]) {
  %two = u32[]{:T(128)} constant(2)
  %arg = (u32[]{:T(128)}, bf16[1,48,3]{2,1,0}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[1,48,3]{2,1,0} get-tuple-element(%arg), index=1
  %f1 = bf16[16,48,3]{2,1,0} fusion(%x), kind=kCustom, calls=%fused_computation.1
  %f2 = bf16[16,48,3]{2,1,0} fusion(%x), kind=kCustom, calls=%fused_computation.2
  %start = (bf16[1,48,3]{2,1,0}, bf16[1,48,3]{2,1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=6
  %done = bf16[1,48,3]{2,1,0} collective-permute-done(%start)
  %next = u32[]{:T(128)} add(%counter, %two), metadata={op_name="jit(step)/while"}
  ROOT %out = (u32[]{:T(128)}, bf16[1,48,3]{2,1,0}) tuple(%next, %done)
}

%condition (arg.1: (u32[], bf16[1,48,3])) -> pred[] {
  %limit = u32[]{:T(128)} constant(6)
  %arg.1 = (u32[]{:T(128)}, bf16[1,48,3]{2,1,0}) parameter(0)
  %seen = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%seen, %limit), direction=LT
}

ENTRY %main (p: bf16[1,48,3], q: f32[64]) -> f32[4] {
  %p = bf16[1,48,3]{2,1,0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %zero = u32[] constant(0)
  %init = (u32[], bf16[1,48,3]{2,1,0}) tuple(%zero, %p)
  %loop = (u32[], bf16[1,48,3]{2,1,0}) while(%init), condition=%condition, body=%body
  %sum = (f32[64]{0}, /*index=1*/f32[2,2]{1,0}) all-reduce(%q, %q), channel_id=7, to_apply=%add
  ROOT %part = f32[4]{0} reduce-scatter(%q), channel_id=8, replica_groups=[1,16]<=[16], dimensions={0}, to_apply=%add
}
"""


def test_collectives_are_read_from_the_text_of_a_program():
    size = 48 * 3 * 2
    assert hlo.by_kind(hlo.collectives(TEXT)) == {
        "all-gather": dict(places=1, count=3, bytes=3 * 16 * size),
        "all-reduce": dict(places=1, count=1, bytes=4 * (64 + 4)),
        "reduce-scatter": dict(places=1, count=1, bytes=4 * 64),
        "collective-permute": dict(places=1, count=3, bytes=3 * size),
    }


def test_collectives_of_a_program_compiled_here():
    mesh = sharding.make_mesh()
    where = jax.sharding.NamedSharding(mesh, sharding.BATCH)

    def local(x):
        return jax.lax.scan(lambda sum, _: (jax.lax.psum(sum, "data"), None), x, None, length=5)[0]

    spec = dict(mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH, check_vma=False)
    compiled = (
        jax.jit(jax.shard_map(local, **spec)).lower(jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=where)).compile()
    )
    found = hlo.by_kind(hlo.collectives(compiled.as_text()))
    assert found == {"all-reduce": dict(places=1, count=5, bytes=5 * 3 * 4)}


@pytest.mark.parametrize("first", [1, 4, 16, 64])
@pytest.mark.parametrize("limit", [7, 40, 1000])
def test_the_search_finds_the_largest_batch_in_few_compilations(first, limit):
    """Memory with a constant part and steps, like that of real buffers; the compiler runs out of memory if it is far
    too large."""
    asked = []

    def memory(count):
        bytes_ = 1000 + 100 * count + 30 * (count % 3)
        return Memory(0, bytes_) if count < 4 * limit else None

    def measure(count):
        asked.append(count)
        return memory(count)

    limit_bytes = 1000 + 100 * limit + 30 * (limit % 3)
    best = plan.largest(measure, 1, limit_bytes, (first, memory(first)))
    fits = [n for n in range(1, 2 * limit) if memory(n).total <= limit_bytes]
    assert best == max(fits) and len(asked) <= plan.TRIALS
    assert len(set(asked)) == len(asked)


def test_the_needed_memory_is_read_from_an_out_of_memory_error():
    for said in (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.35G of 15.75G hbm. Exceeded by 1.60G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.35G) exceeds "
        "available HBM (15.75G).",
    ):
        assert plan._memory_in_error(said) == Memory(0, int(17.35 * 2**30))
    assert plan._memory_in_error("RESOURCE_EXHAUSTED") is None


def test_nothing_fits():
    assert plan.largest(lambda count: None, 4, 100.0, (16, None)) == 0


def test_the_command_on_local_devices(tmp_path, capsys):
    file = tmp_path / "plan.json"
    config = toy_runs.write_config(tmp_path)
    arguments = ["--config", config, "--topology", "local", "--set", "mesh.fsdp=8", "--per_device_batch", "2"]
    plan.main([*arguments, "--images", "160", "--set", "total=10 epochs", "--json", str(file)])
    found, table = json.loads(file.read_text()), capsys.readouterr().out
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and found["batch_size"] == 16
    assert found["run"]["steps"] == 100
    assert found["memory"]["arguments"] > 0 and found["memory"]["temporaries"] > 0
    assert found["collectives"]["all-gather"]["bytes"] > 0 and "all-to-all" not in found["collectives"]
    for words in ("GiB per chip", "FLOPs per image", "all-gather", "100 steps"):
        assert words in table
    with pytest.raises(UserError, match="accumulate=2 does not divide the 3 images"):
        plan.main([*arguments[:-1], "3", "--set", "accumulate=2"])


def test_numbers_that_could_not_be_written_are_found_out_first(monkeypatch):
    monkeypatch.setattr(plan, "plan", None)
    with pytest.raises(UserError, match="cannot write /proc/new/plan.json: .*; choose another --json"):
        plan.main(["--config", "demo:smoke", "--topology", "local", "--json", "/proc/new/plan.json"])


def test_a_topology_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu; run pip install"):
        plan.devices_of("v5e:4x4")


def test_chips_are_known_by_the_names_of_their_devices():
    names = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
             "NVIDIA A100-SXM4-40GB": "A100 40 GB", "NVIDIA L4": "L4", "NVIDIA L40S": "L40S", "NVIDIA H200": "H200",
             "NVIDIA GH200 480GB": "GH200", "NVIDIA A10G": "A10G"}  # fmt: skip
    assert {kind: chips.chip_of(kind).name for kind in names} == names
    assert chips.chip_of("cpu") is None
    assert np.isclose(chips.chip_of("TPU v5 lite").peak_flops, 197e12)
