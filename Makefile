# The two commands that matter: `make quickstart` and `make test`. Everything runs in .venv, which
# any target builds when it is missing; see tools/setup.sh.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
SHELL := /bin/sh

PY := .venv/bin/python
# The interpreter that .venv is built with; the first fit one on PATH unless named.
PYTHON ?=
# Extras of pyproject.toml to add with `make setup`, such as EXTRAS="cuda wandb".
EXTRAS ?=
# Test processes. Each imports JAX and compiles for itself.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)
# More words for pytest, such as ARGS="-k adapters -x", or for quickstart and bench.
ARGS ?=

SETUP := PYTHON="$(PYTHON)" sh tools/setup.sh
# A file stays on one process, since its tests share what its fixtures trained.
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile
CODE := mos_jax experiments configs notebooks tests tools

.PHONY: fields planner planner-test plans site notebooks help setup interop quickstart test parity lint format fuzz bench step scaling accelerator quantized support serving soak study coverage wheel clean distclean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## Build or update .venv; EXTRAS="cuda wandb" adds extras
	@$(SETUP) $(EXTRAS)

interop: setup
	@$(SETUP) interop

quickstart: setup ## Fine-tune the default base on a small task and evaluate it
	$(PY) experiments/quickstart.py --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)

test: setup ## All tests that need no torch
	$(PYTEST) -m "not parity and not planner" $(ARGS)

parity: interop ## Compare with torch, transformers and peft (installs them)
	$(PYTEST) -m parity $(ARGS)

lint: setup ## ruff, format, types, and the rules of tools/check_tree.py
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy
	$(PY) tools/check_tree.py

planner: ## Build .venv-tpu, where the TPU compiler lives: experiments/plan.py needs it
	@PYTHON="$(PYTHON)" sh tools/setup_planner.sh

planner-test: setup planner ## Tests with the TPU compiler
	$(PYTEST) -m planner $(ARGS)

plans: setup planner ## LLaMA2 on TPU slices, MoS beside LoRA: results/plans.md (hours; resumes)
	$(PY) experiments/plans.py --out=results/plans.json --report=results/plans.md $(ARGS)

format: setup ## Rewrite the code as ruff wants it
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

bench: interop ## Time training steps against the reference implementations
	$(PY) experiments/bench_training.py $(ARGS)

step: setup ## Numbers of docs/fastest_step.md: remat, limits of logits, cold start (minutes; resumes)
	$(PY) experiments/bench_step.py --out=results/fastest_step.json --report=results/fastest_step.md $(ARGS)

scaling: setup ## How the cost of a step grows with its sizes: numbers and pictures (minutes; resumes)
	$(PY) experiments/scaling.py --out=results/scaling.json --pictures=results $(ARGS)

accelerator: setup ## Check the accelerator that JAX finds against the CPU: results, time, memory
	$(PY) experiments/check_accelerator.py $(ARGS)

fields: setup ## The fields of a config, from the code: docs/reference/config.md
	$(PY) -m tools.config_page

support: setup ## What works with what, tried on tiny models: docs/support.md
	$(PY) tools/support_table.py

quantized: setup ## A base in fp32, bf16, int8 and NF4: bytes, loss, time of a step (minutes)
	$(PY) experiments/bench_quantized.py --out=results/bench_quantized.json --report=results/quantized.md $(ARGS)

fuzz: setup ## Damaged files against every reader; ARGS="--format=gguf --case=12" for one
	$(PY) -m tests.fuzz $(ARGS)

serving: interop ## Tokens/s, first token, bytes and swaps of many tenants, LoRA, PEFT (an hour; resumes)
	$(PY) experiments/bench_serving.py --workdir=runs/bench_serving --out=results $(ARGS)

soak: setup ## Random load on the engine for 20 minutes: nothing lost, memory where it was
	JAX_PLATFORMS=cpu $(PY) -m tests.soak --out=results $(ARGS)

study: setup ## The core study and the memory probe, with their reports (hours; resumes)
	$(PY) experiments/sweep.py --config=configs/core_study.py --workdir=runs/core $(ARGS)
	$(PY) experiments/report.py --workdir=runs/core --out=results/core_study
	$(PY) experiments/sweep.py --config=configs/memory_study.py --workdir=runs/memory $(ARGS)
	$(PY) experiments/report.py --workdir=runs/memory --out=results/memory_study

coverage: setup ## Whether the intervals of reports hold what they promise (minutes)
	$(PY) experiments/coverage.py $(ARGS)

site: setup ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

notebooks: setup ## Run all notebooks and keep their outputs (an hour); ARGS="02 05" for some
	$(PY) tools/notebooks.py --run $(ARGS)

wheel: setup ## Build the wheel and the source archive into dist/
	rm -rf build dist
	$(PY) -m build

clean: ## Remove caches and build outputs
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## The same, and .venv; runs/ stays
	rm -rf .venv .venv-tpu
