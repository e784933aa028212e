# `make demo` runs the main job from nothing to scores and pictures; `make test` runs the tests.
# Both make what they need in .venv from the pinned requirements. `make test-beam` runs the tests that need Apache Beam,
# in .venv-beam: Beam does not go with the newest Pillow. `make test-torch` runs those that need PyTorch and timm, in
# .venv-torch.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BEAM := .venv-beam
TORCH := .venv-torch
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

DEMO := demo

.PHONY: demo test test-beam test-torch clean

demo: $(VENV)/ready
	@date +%s > .demo-began
	$(PY) -m data_prep.demo_scenes --output $(DEMO)/scenes
	$(PY) -m data_prep.images --input $(DEMO)/scenes/train --output $(DEMO)/shards --split train
	$(PY) -m data_prep.images --input $(DEMO)/scenes/test --output $(DEMO)/shards --split test
	$(PY) -m pera_jax.train --config configs/demo.py --workdir $(DEMO)/run
	$(PY) -m pera_jax.probe --run $(DEMO)/run --data $(DEMO)/shards --tasks colour,knn,linear --untrained
	$(PY) -m pera_jax.probe --run $(DEMO)/run --data $(DEMO)/shards --tasks knn,linear
	$(PY) -m pera_jax.report --run $(DEMO)/run --data $(DEMO)/shards --output $(DEMO)/report
	@echo "demo: done in $$(( $$(date +%s) - $$(cat .demo-began) )) s after set-up; everything lies in $(DEMO)/:"
	@echo "  scenes/  the images        shards/  the data set       run/     checkpoints, metrics.jsonl, tb/, probe/"
	@echo "  report/  the pictures      (start again from nothing: make clean)"
	@rm -f .demo-began

test: $(VENV)/ready-test
	$(PY) -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder tests

test-beam: $(VENV)/ready $(BEAM)/ready
	$(BEAM)/bin/python -m pytest -q tests/test_beam.py

test-torch: $(TORCH)/ready
	$(TORCH)/bin/python -m pytest -q tests/with_torch

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/ready-test: requirements-test.txt $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

$(BEAM)/ready: requirements-beam.txt
	$(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-beam.txt
	@touch $@

$(TORCH)/ready: requirements-torch.txt requirements.txt
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	@touch $@

clean:
	rm -rf $(DEMO) .cache
