# vllm-patches: `make apply` and `make test` do all set-up on a machine with Python >= 3.11, git and make.
#
#   make apply [PIN=0.20.2|all] [SRC=/path/to/checkout] [SDIST=FILE]   a patched tree under build/src, or a branch
#   make build [PIN=0.20.2] [WHEEL=FILE] [WITHOUT=0001-native]         a patched wheel in dist/, from the official one
#   make build MODE=source [VLLM_TARGET_DEVICE=cuda|rocm|cpu|empty]    the same by upstream's own full build
#   make dist [PIN=0.20.2] [FIXES="0003 0005"]                         release assets for packagers (docs/packaging.md)
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
# MODE=source NO_ISOLATION=1 builds with the environment's packages, unless BUILD_PYTHON names another interpreter.
OWN_PACKAGES := $(and $(filter source,$(MODE)),$(strip $(NO_ISOLATION)),$(if $(OFFLINE)$(strip $(BUILD_PYTHON)),,yes))
SOURCE_ENV := $(if $(OWN_PACKAGES),$(VENV)/proof.stamp $(VENV)/source.stamp)

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
build: $(RUN_ENV) $(SOURCE_ENV) ## a patched wheel from the official one (PIN=, ARCH=, WHEEL=FILE, WITHOUT=0001-native, CUDA_ARCHS=, TORCH=), or MODE=source
	@$(RUN) build $(call option,pin,PIN) $(call option,mode,MODE) $(if $(strip $(NO_ISOLATION)),--no-build-isolation) \
		$(call option,python,BUILD_PYTHON) $(call option,work,WORK) $(call option,arch,ARCH) $(call option,wheel,WHEEL) \
		$(call option,without,WITHOUT) $(call option,cuda-archs,CUDA_ARCHS) $(call option,torch,TORCH) \
		$(call option,sdist,SDIST) $(if $(strip $(THOROUGH)),--thorough) --out '$(DIST)' $(json)

.PHONY: dist
dist: $(RUN_ENV) ## release assets for packagers in dist/ (PIN=, FIXES='0003 0005', CHANNEL=, PROOF=FILE, SERIES=DIR, BELOW=1, BASE_URL=, SDIST_URL=)
	@$(RUN) dist $(call option,pin,PIN) $(call option,fixes,FIXES) $(foreach one,$(CHANNEL),--channel '$(one)') \
		$(call option,proof,PROOF) $(call option,with-series,SERIES) $(if $(strip $(BELOW)),--below) \
		$(call option,base-url,BASE_URL) $(call option,sdist-url,SDIST_URL) $(call option,sdist,SDIST) --out '$(DIST)' $(json)

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

.PHONY: test-packaging
test-packaging: $(VENV)/packaging.stamp $(VENV)/proof.stamp ## dist's output through the packagers' own tools, docs/packaging.md (QUICK=1: no lintian)
	@missing=""; while read -r tool package; do command -v $$tool >/dev/null || missing="$$missing $${package:-$$tool}"; done \
		< <(cat ci/system-packages-packaging.txt; $(if $(strip $(QUICK)),,echo lintian)); \
	if [ -n "$$missing" ]; then echo "error: the packaging tests need:$$missing"; \
	echo "  next:     sudo apt-get install --yes$$missing"; exit 1; fi >&2
	@PACKAGING=$(if $(strip $(QUICK)),quick,full) PACKAGING_VENV=$(abspath $(VENV)) $(BIN)/python -m pytest tests/packaging

.PHONY: test-source
test-source: $(VENV)/test.stamp $(VENV)/proof.stamp $(VENV)/source.stamp system-check ## upstream's own build: `empty` to its end, the others up to its CMake
	@$(BIN)/python -m pytest tests/source/build_real.py

NATIVE := NATIVE_CUDA=$(VENV)/cuda/nvidia/cu13 $(BIN)/python -m pytest -n 0 tests/native/compile_unit.py

.PHONY: test-native-quick
test-native-quick: $(VENV)/test.stamp $(VENV)/native.stamp system-check ## the compiled part of 0.19.1, by nvcc for sm_90
	@NATIVE_CASES=0.19.1:90 NATIVE_TORCH=$(VENV)/torch-headers/torch $(NATIVE)

.PHONY: test-native
test-native: $(VENV)/test.stamp $(VENV)/native-exact.stamp system-check ## the compiled part, two releases and three architectures (1 GB from the index)
	@NATIVE_CASES='0.19.1:90 0.18.1:90 0.19.1:80 0.19.1:newest' NATIVE_EXACT=1 NATIVE_TORCH=$(VENV)/torch-exact/torch $(NATIVE)

.PHONY: prove
prove: $(VENV)/test.stamp $(VENV)/proof.stamp system-check ## stock fails, patched passes: the table (PIN=all, FIX=0003, JSON=1)
	@$(BIN)/python tests/repro/proof.py $(call option,pin,PIN) $(call option,fix,FIX) $(json)

.PHONY: mutants
mutants: $(VENV)/test.stamp $(VENV)/proof.stamp system-check ## wrong half-fixes, each of which a proof must catch (PIN=, FIX=, JSON=1, RECORD=FILE)
	@$(BIN)/python tests/repro/mutants.py $(call option,pin,PIN) $(call option,fix,FIX) $(call option,record,RECORD) $(json)

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
	@$(BIN)/python -m pytest -n auto --dist loadfile tests/gsm8k

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
bench: $(VENV)/test.stamp ## apply, check and build against the plain tools, ratios in one run (PART=apply, check or wheel; ROUNDS=)
	@PYTHONPATH=scripts $(BIN)/python ci/bench.py $(PART)

.PHONY: bench-native
bench-native: $(VENV)/test.stamp $(VENV)/native.stamp ## the compiled part against a sample of upstream's compile jobs
	@NATIVE_CUDA=$(VENV)/cuda/nvidia/cu13 NATIVE_TORCH=$(VENV)/torch-headers/torch PYTHONPATH=scripts \
		$(BIN)/python ci/bench_native.py

# On a machine with an NVIDIA GPU. GPU_PYTHON is an interpreter with the torch that STOCK (a vLLM: site folder, wheel or
# tree) needs; PATCHED is made from it unless given. More options: tests/gpu/run.py --help.
GPU_PYTHON ?= python3
gpu_options = $(call option,patched,PATCHED) $(call option,site,SITE) $(call option,out,OUT) --python '$(GPU_PYTHON)'

.PHONY: test-gpu
test-gpu: ## stock fails, patched passes, on this machine's GPU (STOCK=, PATCHED=, CASE=, JOBS=, SITE=, OPERATORS=)
	@$(GPU_PYTHON) tests/gpu/run.py --stock '$(STOCK)' $(gpu_options) $(call option,operators,OPERATORS) \
		$(foreach name,$(CASE),--case '$(name)') $(call option,jobs,JOBS)

.PHONY: bench-gpu
bench-gpu: ## what the fixes cost on this machine's GPU (STOCK=, PATCHED=, SITE=, LATER=a tree of 0.22.0)
	@$(GPU_PYTHON) ci/bench_gpu.py --stock '$(STOCK)' $(gpu_options) $(call option,later,LATER)

.PHONY: gpu-table
gpu-table: ## what the recorded GPU runs say; writes the README's summary of them
	@$(PYTHON) ci/gpu_table.py --write

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

# ci/requirements-NAME.txt, installed. Below the recipe: the files that some of them take in.
$(VENV)/%.stamp: ci/requirements-%.txt ci/constraints.txt | $(VENV)/bin/python
	@echo "installing $$(grep $(<F) ci/download-sizes.txt)" >&2
	@$(PIP) install -c ci/constraints.txt -r $<
	@touch $@

$(VENV)/test.stamp $(VENV)/packaging.stamp: ci/requirements-run.txt
$(VENV)/packaging.stamp: ci/requirements-test.txt

# Apart from the environment's packages: nothing imports them. torch's headers are those of every platform, and the
# wheel for macOS is its smallest.
$(VENV)/native.stamp: ci/requirements-native.txt ci/native-torch.txt ci/constraints.txt | $(VENV)/bin/python
	@echo "installing $$(grep $(<F) ci/download-sizes.txt), and torch's headers, 80 MB" >&2
	@rm -rf $(VENV)/cuda $(VENV)/torch-headers
	@$(PIP) install --no-deps --target $(VENV)/cuda -c ci/constraints.txt -r $<
	@$(PIP) install --no-deps --no-compile --only-binary :all: --platform macosx_11_0_arm64 --python-version 3.12 \
		--target $(VENV)/torch-headers -r ci/native-torch.txt
	@touch $@

$(VENV)/native-exact.stamp: ci/native-torch.txt $(VENV)/native.stamp
	@echo "installing torch 2.10.0 for CUDA, 916 MB, without what it needs to run" >&2
	@rm -rf $(VENV)/torch-exact
	@$(PIP) install --no-deps --no-compile --only-binary :all: --platform manylinux_2_28_x86_64 --python-version 3.12 \
		--target $(VENV)/torch-exact -r ci/native-torch.txt
	@touch $@
