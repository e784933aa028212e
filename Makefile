# make demo              trains, probes and reports a small example
# make test              runs the tests
# make test-quick        runs the tests that need no training and no compilation (about a minute)
# make test-beam         runs the tests that need Apache Beam (in .venv-beam, because Beam requires an older Pillow)
# make test-torch        runs the tests that need PyTorch and timm (in .venv-torch)
# make test-gpu-compile  compiles the published configs for H100s without a GPU (in .venv-gpu, about an hour)
#
# Each target first installs the pinned requirements into its environment, by default .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BEAM := .venv-beam
TORCH := .venv-torch
GPU := .venv-gpu
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# Python keeps the bytecode of what is imported, whatever the shell says: without it each process compiles for seconds.
export PYTHONDONTWRITEBYTECODE :=

DEMO := demo
# Tests without training, compilation of a step, or subprocesses.
QUICK := tests/test_house.py $(patsubst %,tests/common/test_%.py,digests json_files lease owned paths text) \
	$(patsubst %,tests/objectives/test_%.py,losses masking) tests/losses/test_terms.py \
	$(patsubst %,tests/models/test_%.py,initial_values) \
	$(patsubst %,tests/training/test_%.py,metrics resume schedules) \
	$(patsubst %,tests/data/test_%.py,crops foreign records samples) \
	$(patsubst %,tests/probes/test_%.py,classifiers probe_scores result_keys)

.PHONY: demo test test-quick test-beam test-torch test-gpu-compile clean

demo: $(VENV)/ready
	@date +%s > .demo-began
	$(PY) -m data_prep.demo_scenes --output $(DEMO)/scenes
	$(PY) -m data_prep.images --input $(DEMO)/scenes/train --output $(DEMO)/shards --split train
	$(PY) -m data_prep.images --input $(DEMO)/scenes/test --output $(DEMO)/shards --split test
	$(PY) -m data_prep.demo_mosaics --output $(DEMO)/mosaics
	$(PY) -m pera_jax.train --config configs/demo.py --workdir $(DEMO)/run
	$(PY) -m pera_jax.probe --run $(DEMO)/run --config configs/demo_probes.py --encoder pixels
	$(PY) -m pera_jax.probe --run $(DEMO)/run --config configs/demo_probes.py --encoder untrained
	$(PY) -m pera_jax.probe --run $(DEMO)/run --config configs/demo_probes.py
	$(PY) -m pera_jax.report --run $(DEMO)/run --data $(DEMO)/shards --output $(DEMO)/report
	@echo "demo: done in $$(( $$(date +%s) - $$(cat .demo-began) )) s after setup; results are in $(DEMO)/:"
	@echo "  scenes/, mosaics/  the images    shards/  the dataset    run/  checkpoints, metrics.jsonl, tb/, probe/"
	@echo "  report/index.html  the report    (to start over: make clean)"
	@rm -f .demo-began

test: $(VENV)/ready-test
	$(PY) -m pytest -q -rs -n 3 --dist loadfile --no-loadscope-reorder --durations=10 tests

test-quick: $(VENV)/ready-test
	$(PY) -m pytest -q -n 2 --dist loadfile --durations=10 $(QUICK)

test-beam: $(VENV)/ready $(BEAM)/ready
	$(BEAM)/bin/python -m pytest -q tests/data_prep/test_beam.py

test-torch: $(TORCH)/ready
	$(TORCH)/bin/python -m pytest -q tests/with_torch

test-gpu-compile: $(GPU)/ready
	$(GPU)/bin/python -m pytest -q -s tests/with_gpu_compiler

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/ready: requirements.txt | $(VENV)/made
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@

$(VENV)/ready-test: requirements-test.txt requirements.txt | $(VENV)/made
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-test.txt
	@touch $(VENV)/ready $@

$(BEAM)/ready: requirements-beam.txt
	$(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-beam.txt
	@touch $@

$(TORCH)/ready: requirements-torch.txt requirements.txt
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	@touch $@

$(GPU)/ready: requirements-gpu-compile.txt requirements.txt
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest==9.2.0
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-gpu-compile.txt
	@touch $@

clean:
	rm -rf $(DEMO) .cache
