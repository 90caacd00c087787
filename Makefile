# The two commands of the README are `make run` and `make test`; both set up the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SNAKEMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --cores all --resources gpu=1 --rerun-incomplete --show-failed-logs

.PHONY: run smoke paper test test-quick lint report verify reference-claims bench gpu-check docs lock clean

$(READY): envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "curvspace needs Python 3.11 or later; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "this Python cannot make virtual environments; install its venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r envs/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

run: $(READY)  ## the default study: real data, minutes on a laptop without a GPU
	$(SNAKEMAKE)

smoke: $(READY)  ## the whole graph on embedded data, no network
	$(SNAKEMAKE) --configfile workflow/presets/smoke.yaml

paper: $(READY)  ## the papers' own scale, for a GPU
	$(SNAKEMAKE) --configfile workflow/presets/paper.yaml

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest -n 2 -m "not network and not smoke"
	$(BIN)/python -m pytest -m smoke

test-quick: $(READY)  ## the unit tests only
	$(BIN)/python -m pytest -n 2 tests/unit tests/papers

lint: $(READY)  ## formatters, linters, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --lint

report: $(READY)  ## one offline page with all results of the last run
	$(SNAKEMAKE) --report report.html

reference-claims: $(READY)  ## one ledger of all reference results: results/reference/claims.md
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=lib:. $(BIN)/python -m workflow.reference

verify: $(READY)  ## which results are stale, whatever Snakemake remembers
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m workflow.verify

bench: $(READY)  ## speed of ours and of other libraries, side by side
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(CURDIR)[bench]"
	$(BIN)/python -m benchmarks

DEVICE ?= cuda
gpu-check: $(READY)  ## all that depends on a device, in ten minutes; DEVICE=cpu runs the same on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(CURDIR)[bench]"
	$(BIN)/python tests/gpu_check.py --device $(DEVICE)

docs: $(READY)
	$(BIN)/mkdocs build --strict

lock: $(READY)  ## pin the tested set again after a change of pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python envs/lock.py

clean:  ## logs, unfinished runs, caches; never results, nor what Snakemake remembers of them
	rm -rf results/logs results/*/logs results/.state results/*/.state .snakemake/log .snakemake/scripts logs site
