# Kvasir's commands. `make up` and `make test` are all a new machine needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FILE ?= manifests/smollm2-cpu.yaml
PORT ?= 8000

.PHONY: setup up test unit e2e e2e-binaries lint crds bench soak clean

setup: $(STAMP)

# torch first and by itself: a bare `torch` requirement would pull several GB of CUDA
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[engine,operator,dev]'
	touch $@

up: setup
	$(BIN)/kvasir up -f $(FILE) --port $(PORT)

# everything, the fast tests first
test: lint e2e-binaries
	$(BIN)/python -m pytest tests e2e

unit: setup
	$(BIN)/python -m pytest tests -m 'not dataplane'

e2e: setup e2e-binaries
	$(BIN)/python -m pytest e2e

# finds or builds etcd, kube-apiserver and the rest (KUBEBUILDER_ASSETS, the cache, then a build)
e2e-binaries: setup
	$(BIN)/python -m e2e.controlplane.binaries

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

# after a change of spec.py, status.py or cel.py
crds: setup
	$(BIN)/kvasir-operator crd > crds/serving.kvasir.dev_inferenceservices.yaml
	$(BIN)/kvasir-operator crd > charts/kvasir/files/crd.yaml
	$(BIN)/kvasir-operator crd --no-rules > charts/kvasir/files/crd-without-rules.yaml

bench: setup
	$(BIN)/python -m bench.serving --plot

soak: setup
	$(BIN)/python -m pytest tests -m soak

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
