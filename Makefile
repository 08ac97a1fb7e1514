# vllm-patches: `make apply` and `make test` do all set-up on a machine with Python >= 3.11, git and make.
#
#   make apply [PIN=0.20.2|all] [SRC=/path/to/checkout] [SDIST=FILE]   a patched tree under build/src, or a branch
#   make build [PIN=0.20.2] [WHEEL=FILE] [WITHOUT=0001-native]         a patched wheel in dist/, from the official one
#   make check [PIN=...] [SDIST=FILE] [TREE=DIR]                       do the patches still apply?
#   make test                                                          all tests
#   make ci                                                            what CI runs
#   make help                                                          every target

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/src
DIST ?= dist
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Given the source, apply, check and build need neither the network nor the one library that talks to the index:
# then the plain interpreter runs them, and no environment is made.
OFFLINE := $(strip $(SRC)$(SDIST)$(TREE)$(WHEEL))
RUN := PYTHONPATH=scripts $(if $(OFFLINE),$(PYTHON),$(BIN)/python) -m vllm_patches
RUN_ENV := $(if $(OFFLINE),,$(VENV)/run.stamp)

option = $(if $(strip $($(2))),--$(1) '$(strip $($(2)))')
json = $(if $(strip $(JSON)),--json)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: apply
apply: $(RUN_ENV) ## a patched work tree of a release (PIN=, SRC=, SDIST=, BUILD=, JSON=1)
	@$(RUN) apply $(call option,pin,PIN) $(call option,src,SRC) $(call option,sdist,SDIST) --build '$(BUILD)' $(json)

.PHONY: check
check: $(RUN_ENV) ## do the patches still apply? (PIN=, SDIST=, TREE=your checkout, JSON=1)
	@$(RUN) check $(call option,pin,PIN) $(call option,sdist,SDIST) $(call option,tree,TREE) $(json)

.PHONY: build
build: $(RUN_ENV) ## a patched wheel from the official one (PIN=, ARCH=, WHEEL=FILE, WITHOUT=0001-native, CUDA_ARCHS=, TORCH=)
	@$(RUN) build $(call option,pin,PIN) $(call option,arch,ARCH) $(call option,wheel,WHEEL) \
		$(call option,without,WITHOUT) $(call option,cuda-archs,CUDA_ARCHS) $(call option,torch,TORCH) \
		$(call option,sdist,SDIST) $(if $(strip $(THOROUGH)),--thorough) --out '$(DIST)' $(json)

.PHONY: verify
verify: ## which of the five an installed package, wheel, sdist or tree has (TREE=, WHEEL= or SDIST=, JSON=1)
	@PYTHONPATH=scripts $(PYTHON) -m vllm_patches verify $(foreach what,$(TREE) $(WHEEL) $(SDIST),'$(what)') $(json)

.PHONY: watch
watch: $(VENV)/run.stamp ## what upstream's newest release has of the five fixes (VERSION=, VERSION=all)
	@$(RUN) watch $(call option,version,VERSION) $(json)

.PHONY: new-pin
new-pin: $(VENV)/run.stamp ## add a release to the tables (VERSION=)
	@$(RUN) new-pin '$(VERSION)' $(json)

.PHONY: matrix
matrix: ## write the matrix release x fix into the README
	@PYTHONPATH=scripts $(PYTHON) -m vllm_patches matrix --write

.PHONY: export
export: ## write the commits of build/src/vllm-PIN to the patch files of its series (PIN=)
	@PYTHONPATH=scripts $(PYTHON) -m vllm_patches export $(call option,pin,PIN)

.PHONY: record
record: $(VENV)/run.stamp ## write HEAD and blobs of every pin to patches/releases.toml
	@$(RUN) record

.PHONY: test
test: $(VENV)/test.stamp $(VENV)/proof.stamp system-check ## all tests
	@$(BIN)/python -m pytest -n auto --dist load --ignore tests/gsm8k $(TESTS)

.PHONY: test-wheels
test-wheels: $(VENV)/test.stamp ## build from real wheels of four releases, install and unpack the results (1.4 GB from the index)
	@WHEEL_PINS="$${WHEEL_PINS:-0.18.1 0.19.1 0.20.2 0.21.0}" $(BIN)/python -m pytest tests/wheels

.PHONY: prove
prove: $(VENV)/test.stamp $(VENV)/proof.stamp system-check ## stock fails, patched passes: the table (PIN=all, FIX=0003, JSON=1)
	@$(BIN)/python tests/repro/proof.py $(call option,pin,PIN) $(call option,fix,FIX) $(json)

.PHONY: mutants
mutants: $(VENV)/test.stamp $(VENV)/proof.stamp system-check ## wrong half-fixes, each of which a proof must catch (PIN=, FIX=, JSON=1)
	@$(BIN)/python tests/repro/mutants.py $(call option,pin,PIN) $(call option,fix,FIX) $(json)

# gsm8k: the sides are the environment of GPU runs and a patched copy of its vLLM, unless STOCK= (and PATCHED=) are given.
GPU_PIN := $(or $(strip $(PIN)),0.20.2)
GPU_ENV := build/gpu-env/$(GPU_PIN)
GSM8K_OWN := $(strip $(STOCK)$(filter hf,$(MODE)))
GSM8K_OUT = build/gsm8k/$(GPU_PIN)-$(or $(strip $(SCENARIO)),plain)-$(subst :,-,$(notdir $(or $(strip $(MODEL)),model)))

.PHONY: gsm8k
gsm8k: $(if $(GSM8K_OWN),$(VENV)/gsm8k.stamp,$(GPU_ENV)/ready.stamp) ## gsm8k accuracy, stock against patched (MODEL=, PIN=, TP=, SCENARIO=, LIMIT=, MARGIN=, MODE=, STOCK=, PATCHED=)
	@PYTHONPATH=ci:scripts $(if $(GSM8K_OWN),$(BIN),$(GPU_ENV)/bin)/python -m gsm8k run --out '$(GSM8K_OUT)' \
		$(call option,model,MODEL) $(call option,tp,TP) $(call option,scenario,SCENARIO) $(call option,limit,LIMIT) \
		$(call option,margin,MARGIN) $(call option,mode,MODE) $(call option,stock,STOCK) $(call option,patched,PATCHED) \
		$(call option,engine,ENGINE)

.PHONY: gsm8k-train
gsm8k-train: $(VENV)/gsm8k.stamp ## train a tiny model of the offline fixture (SHAPE=dense, hybrid or dsa)
	@PYTHONPATH=ci $(BIN)/python -m gsm8k.train '$(SHAPE)' 'ci/gsm8k/models/$(SHAPE)'

.PHONY: test-gsm8k
test-gsm8k: $(VENV)/test.stamp $(VENV)/gsm8k.stamp ## the gsm8k harness and fixture, on a CPU
	@$(BIN)/python -m pytest tests/gsm8k

.PHONY: gpu-env
gpu-env: $(GPU_ENV)/ready.stamp ## an environment with vLLM and all pins of GPU runs (PIN=)

$(GPU_ENV)/ready.stamp: ci/requirements-gpu/$(GPU_PIN).txt
	@$(PYTHON) -m venv $(GPU_ENV)
	@echo "installing $<: several GB" >&2
	@$(GPU_ENV)/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

.PHONY: lint
lint: $(VENV)/test.stamp ## ruff, mypy, workflow and action schemas
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml

.PHONY: bench
bench: $(VENV)/test.stamp ## apply, check and build against the plain tools, ratios in one run
	@PYTHONPATH=scripts $(BIN)/python ci/bench.py

.PHONY: ci
ci: ## what CI runs
	@bash .ci/run

.PHONY: system-check
system-check: # what no pip can install: an error that says what to type, never a skip
	@missing=""; for tool in g++ patch quilt; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then echo "error: the tests need:$$missing"; \
	echo "  next:     sudo apt-get install --yes$$missing"; exit 1; fi >&2

.PHONY: venv
venv: $(VENV)/run.stamp ## the environment that apply, check and watch need

.PHONY: clean
clean: ## remove the environment and the tools' caches; patched trees under build/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@echo "making $(VENV)" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "  next:     sudo apt-get install --yes python3-venv" >&2; exit 1; }

$(VENV)/run.stamp: ci/requirements-run.txt ci/constraints.txt | $(VENV)/bin/python
	@echo "installing $$(grep $(<F) ci/download-sizes.txt)" >&2
	@$(PIP) install -c ci/constraints.txt -r $<
	@touch $@

$(VENV)/test.stamp: ci/requirements-test.txt ci/requirements-run.txt ci/constraints.txt | $(VENV)/bin/python
	@echo "installing $$(grep $(<F) ci/download-sizes.txt)" >&2
	@$(PIP) install -c ci/constraints.txt -r $<
	@touch $@

$(VENV)/proof.stamp: ci/requirements-proof.txt ci/constraints.txt | $(VENV)/bin/python
	@echo "installing $$(grep $(<F) ci/download-sizes.txt)" >&2
	@$(PIP) install -c ci/constraints.txt -r $<
	@touch $@

$(VENV)/gsm8k.stamp: ci/requirements-gsm8k.txt ci/constraints.txt | $(VENV)/bin/python
	@echo "installing $$(grep $(<F) ci/download-sizes.txt)" >&2
	@$(PIP) install -c ci/constraints.txt -r $<
	@touch $@
