# The two commands of the README, and what CI runs. Everything they need is installed into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PACKAGES := -e . -e plugins/sdxl_edm -e plugins/sdxl_snr -e plugins/sdxl_timestep_bias -e plugins/sdxl_lpw
EXAMPLES := $(patsubst %,-e %,$(patsubst %/pyproject.toml,%,$(wildcard examples/plugins/*/pyproject.toml)))
MANIFESTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)

.PHONY: demo test ascend parity soak lint clean

demo: $(VENV)/ready  ## trains a small model with two plugins on the carried images
	$(VENV)/bin/sdxl-host train --plugins edm,snr

test: $(VENV)/ready-dev  ## the test suite, without what takes long or needs Ascend's compiler
	$(VENV)/bin/python -m pytest -m "not soak and not ascend" -n 2 --dist loadfile --no-loadscope-reorder

parity: $(VENV)/ready-dev $(VENV)-parity/ready  ## our networks against diffusers and transformers, live
	$(VENV)-parity/bin/python tests/golden/make_golden.py --check
	rm -rf build/golden && mkdir -p build/golden
	$(VENV)-parity/bin/python tests/golden/make_golden.py --out build/golden
	SDXL_HOST_GOLDEN=build/golden $(VENV)/bin/python -m pytest -m parity
	rm -rf build/parity && mkdir -p build/parity
	$(VENV)-parity/bin/python tests/parity/make_pipeline.py build/parity/pipeline
	set -e; for objective in eps v edm; do \
	  ours=build/parity/$$objective; \
	  $(VENV)/bin/python tests/parity/round_trip.py build/parity/pipeline $$ours $$objective; \
	  $(VENV)-parity/bin/python tests/parity/check_export.py $$ours/folder \
	    $$ours/single.safetensors build/parity/pipeline $$ours/expected.npz; \
	done
	$(VENV)/bin/python tests/parity/train_lora.py build/parity/pipeline build/parity/lora
	$(VENV)-parity/bin/python tests/parity/check_lora.py build/parity/pipeline \
	  build/parity/lora/run/checkpoints/latest/lora.safetensors build/parity/lora/expected.npz

ascend: $(VENV)/ready-dev  ## law 11: MindSpore's Ascend backend compiles our steps, without an Ascend
	@command -v g++ >/dev/null || { echo "make ascend: g++ is missing; apt install g++ binutils"; exit 1; }
	$(VENV)/bin/python -m pytest -m ascend -n 2 --dist loadfile tests/ascend

soak: $(VENV)/ready-dev  ## the long forms of the tests
	$(VENV)/bin/python -m pytest -m soak

lint: $(VENV)/ready-dev  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else "Python 3.10 to 3.12 is needed, not %d.%d; make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: $(VENV)/bin/python $(MANIFESTS)
	$(PIP) install --quiet $(PACKAGES)
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt $(wildcard examples/plugins/*/pyproject.toml)
	$(PIP) install --quiet -r requirements-dev.txt $(EXAMPLES)
	touch $@

$(VENV)-parity/ready: tests/golden/requirements.txt
	$(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-parity build dist
