PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train train-math train-hh train-smollm2 test test-slow gpu-check lint format tensorboard docker docker-lint docker-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile
	@echo 'ARGS="..." goes on to train..., test..., gpu-check and tensorboard; PYTHON=... picks the interpreter.'

train: .venv/.stamp ## train the smallest example
	$(BIN)/python -m tre_lightning fit --config configs/countdown_tiny.yaml $(ARGS)

train-math: .venv/.stamp ## train the smallest example of mathematics
	$(BIN)/python -m tre_lightning fit --config configs/math_tiny.yaml $(ARGS)

train-hh: .venv/.stamp runs/hh_reward_tiny/model ## train the smallest example of alignment
	$(BIN)/python -m tre_lightning fit --config configs/hh_tiny.yaml $(ARGS)

runs/hh_reward_tiny/model: | .venv/.stamp
	$(BIN)/python -m tre_lightning reward fit --config configs/reward/hh_tiny.yaml

train-smollm2: .venv/.stamp runs/models/smollm2 ## train a real language model, SmolLM2-135M-Instruct
	$(BIN)/python -m tre_lightning fit --config configs/smollm2.yaml $(ARGS)

runs/models/smollm2: | .venv/.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[gguf]'
	$(BIN)/python -m tre_lightning model smollm2 --out $@

test: .venv/.dev ## run the tests on all cores; fails under 90 % line coverage
	$(BIN)/python -m pytest -n logical --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=90 $(ARGS)

test-slow: .venv/.dev ## run the shipped examples in full; fails where their score does not rise
	$(BIN)/python -m pytest -m slow $(ARGS)

gpu-check: .venv/.dev ## check and time everything on a GPU, in at most 8 minutes (docs/gpu.md)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lint: .venv/.dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.dev ## apply the style fixes and the format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

tensorboard: .venv/.stamp ## show the curves under runs/
	$(BIN)/tensorboard --logdir runs $(ARGS)

docker: ## build the image with docker
	docker build -t tre_lightning .

docker-lint: .venv/.stamp ## check the Dockerfile with hadolint
	$(BIN)/pip install -q -c constraints.txt -e '.[docker]'
	$(BIN)/hadolint --failure-threshold warning Dockerfile

docker-test: ## as root, without docker: build the image and train in it with buildah
	scripts/build_image.sh

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# A run needs less than the tests do. Compiling apart uses all cores, and leaves out packages' tests.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1); pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile -c constraints.txt -e '.$(1)'
	@$(BIN)/python -m compileall -q -j 0 -x '/tests/' .venv/lib >/dev/null || true
endef

.venv/.stamp: pyproject.toml constraints.txt
	$(call install)
	@touch $@

.venv/.dev: pyproject.toml constraints.txt
	$(call install,[dev])
	@touch .venv/.stamp $@
