# The two commands of the README are `make run` and `make test`; both set up the environment first. `make` alone: what there is.
PYTHON ?= python3
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SNAKEMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --cores all --resources gpu=1 --rerun-incomplete

.DEFAULT_GOAL := help
.PHONY: help setup run smoke paper test test-quick lint report verify unlock reference-claims bench gpu-check docs lock clean

$(READY): envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "curvspace needs Python 3.11 or later; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "this Python cannot make virtual environments; install its venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
ifeq ($(TORCH),)
	@echo "Setting up $(VENV), once. On Linux it takes 6.0 GB, 4.3 of them for NVIDIA GPUs; without these: make ... TORCH=cpu"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r envs/requirements.lock
else
	@echo "Setting up $(VENV), once, with torch for $(TORCH); torch itself comes from its makers and has no hash in the lock."
	$(PYTHON) -m venv $(VENV)
	$(PIP) uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps --torch-backend "$(TORCH)" $$($(PYTHON) envs/lock.py torch)
	$(PYTHON) envs/lock.py without-torch > $(VENV)/without-torch.lock
	$(PIP) --require-hashes -r $(VENV)/without-torch.lock
endif
	$(PIP) --no-deps --editable .
	@touch $@

help:  ## this list
	@echo "make TARGET [PYTHON=python3.12] [TORCH=cpu]; the first target sets up $(VENV) (2.3 minutes, 6.0 GB; TORCH=cpu: without the 4.3 GB for GPUs)"
	@awk -F ':.*## +' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "times: two cores, with a little other work beside; snakemake itself: $(BIN)/snakemake"

setup: $(READY)  ## the environment alone

run: $(READY)  ## the default study on real MNIST and CIFAR-10, no GPU needed (17 to 27 minutes)
	$(SNAKEMAKE)

smoke: $(READY)  ## the whole graph on embedded digits, no network (3 to 5 minutes)
	$(SNAKEMAKE) --configfile workflow/presets/smoke.yaml

paper: $(READY)  ## the papers' own scale; wants a GPU (not timed as a whole yet)
	$(SNAKEMAKE) --configfile workflow/presets/paper.yaml

test: $(READY)  ## the test suite, with the smoke preset in it (longer than smoke)
	$(BIN)/python -m pytest -n 2 -m "not network and not smoke and not slurm"
	$(BIN)/python -m pytest -m smoke

test-quick: $(READY)  ## the unit tests alone
	$(BIN)/python -m pytest -n 2 tests/unit tests/papers

lint: $(READY)  ## formatters, linters, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --lint

report: $(READY)  ## report.html: one offline page with all results of the last run
	$(SNAKEMAKE) --report report.html

reference-claims: $(READY)  ## one ledger of all reference results: results/reference/claims.md
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=lib:. $(BIN)/python -m workflow.reference

verify: $(READY)  ## which results are stale, whatever Snakemake remembers (seconds)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m workflow.verify

unlock: $(READY)  ## after a Snakemake that was killed, when none runs here: take its lock away, of all presets
	$(SNAKEMAKE) --unlock

bench: $(READY)  ## speed of ours and of other libraries, side by side
	$(PIP) "$(CURDIR)[bench]"
	$(BIN)/python -m benchmarks

DEVICE ?= cuda
gpu-check: $(READY)  ## all that depends on a device, in ten minutes; DEVICE=cpu runs the same on the CPU
	$(PIP) "$(CURDIR)[bench]"
	$(BIN)/python tests/gpu_check.py --device $(DEVICE)

docs: $(READY)  ## the documentation in site/, with the drawing of which part leans on which
	$(BIN)/python -m workflow.dependencies docs/dependencies.svg
	$(BIN)/mkdocs build --strict

lock: $(READY)  ## pin the tested set again after a change of pyproject.toml
	$(PIP) uv
	$(BIN)/python envs/lock.py

clean:  ## logs, unfinished runs, caches; never results, nor what Snakemake remembers of them
	rm -rf results/logs results/*/logs results/.state results/*/.state .snakemake/log .snakemake/scripts logs site
