# `make` lists the targets. You need Python 3.11 or newer, git and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do command -v $$p > /dev/null && echo $$p && break; done)
VENV ?= .venv
STAMP := $(VENV)/.installed
PORT ?= 5000
# All tests of a file run in one worker, so that they share fixtures; tests/conftest.py orders the files.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_SYSTEM_CERTS ?= true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONDONTWRITEBYTECODE

FIND_REMOTE = test -z "$${DVC_REMOTE:-}" || dvc remote add --local -q -f -d store "$$DVC_REMOTE"; \
  test -n "$$(dvc remote list)" || { echo "no DVC remote: DVC_REMOTE=/a/folder make $@ (docs/ci.md has S3, GCS, SSH)"; exit 1; }
# Installs the package that DVC needs for the remote's scheme; a remote in a folder needs none.
INSTALL_REMOTE = case "$$(dvc remote list)" in *s3://*) extra=s3;; *gs://*) extra=gs;; *ssh://*) extra=ssh;; \
    *azure://*) extra=azure;; *) extra=;; esac; \
  test -z "$$extra" || python -c "import dvc_$$extra" 2> /dev/null \
    || { echo "installing dvc[$$extra] ..."; uv pip install -q --python $(VENV)/bin/python "dvc[$$extra]" -c requirements.lock; }

.PHONY: help setup repository repro run gate ci push pull experiments test test-robustness test-ray test-server coverage check audit hooks docs table readme pictures ui lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the pinned versions (the other targets do this when needed)

$(STAMP): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "compactgpt needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) ..."
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	@{ awk '/^[^ ]/ { on = /^uv==/ } on' requirements.lock \
	     | $(VENV)/bin/python -m pip install -q --require-hashes -r /dev/stdin \
	  && $(VENV)/bin/uv pip install -q --python $(VENV)/bin/python -r requirements.lock \
	  && $(VENV)/bin/uv pip install -q --python $(VENV)/bin/python --no-deps -e . ; } \
	  || { echo "set-up failed: check the connection to the package index, then run the same command again"; exit 1; }
	@touch $@

# Comes first: without a git repository, DVC fails only after minutes of set-up.
repository:
	@git rev-parse -q --verify HEAD > /dev/null 2>&1 || { echo 'this folder is not a git repository with a commit (an' \
	  'unpacked ZIP has none): run `git init && git add . && git commit -m "first commit"`, then make again'; exit 1; }

repro: repository $(STAMP) ## run the whole pipeline (only what changed), print the table
	@compactgpt repair
	@compactgpt check
	@# Restores deleted outputs from the cache. Otherwise DVC would run their stages again: its run cache has no stages
	@# with outputs outside of the cache. Errors are left to `dvc repro`, which reports them, too.
	@dvc checkout -q --allow-missing < /dev/null 2> /dev/null || true
	@dvc repro
	@python -m stages.comparison --show
	@echo
	@compactgpt sync --warn
	@echo "The page:                   reports/index.html"
	@echo "The table with its sources: reports/comparison.md"
	@echo "The runs, side by side:     make ui   (MLflow on http://127.0.0.1:$(PORT))"
	@echo "Next: change a number in params.yaml and run make repro again, or dvc exp run -S training.seed=1"

test: $(STAMP) ## run the tests
	@python -m pytest $(TWO_WORKERS)

test-ray: $(STAMP) ## run the tests of the Ray engine (installs Ray into .state, not into .venv)
	@test -d .state/ray || uv pip install -q --python $(VENV)/bin/python --target .state/ray -c requirements.lock ray==2.60.0
	@PYTHONPATH=$(CURDIR)/.state/ray python -m pytest tests/data/test_engines.py

test-robustness: $(STAMP) ## kill stages, dvc repro and torchrun, fill the disk, damage inputs (10 minutes)
	@BAD_INPUTS=50 python -m pytest -m 'robustness or not robustness' $(TWO_WORKERS) tests/robustness tests/training/test_launch.py

test-server: $(STAMP) ## run the tests that start MLflow servers and DVC queues (five minutes)
	@TEST_SERVER=1 python -m pytest tests/tracking/test_server.py

coverage: $(STAMP) ## run the tests and measure the coverage of the library and the stage scripts (at least 95 %)
	@mkdir -p .state/coverage
	@COVERAGE_FOLDER=$(CURDIR)/.state/coverage python -m pytest $(TWO_WORKERS) --cov

check: $(STAMP) ## check lint, format, types, workflows and words
	@ruff check .
	@ruff format --check .
	@mypy
	@python scripts/vocabulary.py
	@check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@zizmor -q --offline --no-progress .github

audit: $(STAMP) ## check every pinned package for known vulnerabilities (asks pypi.org; fails for a package that is not there)
	@test -d .state/audit || uv pip install -q --python $(VENV)/bin/python --target .state/audit -c requirements.lock pip-audit==2.10.1
	@awk '/^[^ ]/ { sub(/ \\$$/, ""); print }' requirements.lock > .state/audit/audited   # pip-audit wants all hashes or none
	@PYTHONPATH=$(CURDIR)/.state/audit python -m pip_audit --strict -r .state/audit/audited --no-deps --disable-pip --progress-spinner off

hooks: repository $(STAMP) ## run lint, format and types before each of your commits (pre-commit)
	@uv pip install -q --python $(VENV)/bin/python -c requirements.lock pre-commit==4.7.0
	@pre-commit install

docs: $(STAMP) ## build the documentation site: site/index.html; a warning is an error
	@test -x .state/docs/bin/zensical || { uv venv -q --clear --python $(VENV)/bin/python .state/docs \
	  && uv pip install -q --python .state/docs/bin/python zensical==0.0.73 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11; }
	@.state/docs/bin/zensical build --strict --clean 2>&1 | tee .state/docs/log
	@! grep -q '^griffe' .state/docs/log

run: repository $(STAMP) ## run a named experiment in this folder: make run EXPERIMENT=note
	@compactgpt experiment apply "$${EXPERIMENT:?give a name: make run EXPERIMENT=note}"
	@$(MAKE) --no-print-directory repro

gate: $(STAMP) ## check that the model is not worse than the accepted one (docs/ci.md)
	@compactgpt gate

ci: repository $(STAMP) ## run the pipeline with a tiny configuration in a scratch clone, and the gate on its metrics
	@scripts/tiny_pipeline

push: repository $(STAMP) ## send data and models to the DVC remote (DVC_REMOTE, or the one of .dvc/config.local)
	@$(FIND_REMOTE)
	@$(INSTALL_REMOTE)
	@dvc push --run-cache

pull: repository $(STAMP) ## fetch data and models from the DVC remote: no stage of a fresh clone needs to run then
	@$(FIND_REMOTE)
	@$(INSTALL_REMOTE)
	@dvc pull --run-cache

# By default DVC shows all of params.yaml and every dependency, and no setting changes that.
experiments: $(STAMP) ## compare the experiments: dvc exp show without hashes and equal parameters
	@dvc exp show --no-pager --only-changed --drop '^(src|stages|data|models|reports|results|corpus)(/|$$)|\.yaml$$|^Created$$'

table: $(STAMP) ## print the table of the last run
	@python -m stages.comparison --show

readme: $(STAMP) ## update the tables of README.md from the last run
	@python -m stages.comparison --quote README.md

pictures: $(STAMP) ## write docs/page.png, docs/page.txt and docs/mlflow.png from the last run (needs Chromium, and make ui in another terminal)
	@python scripts/pictures.py

ui: $(STAMP) ## start the MLflow UI for this machine only
	@python -c "import socket; socket.create_server(('127.0.0.1', $(PORT)))" 2> /dev/null \
	  || { echo "port $(PORT) is in use: make ui PORT=$$(($(PORT) + 1))"; exit 1; }
	@compactgpt sync --warn
	@test -z "$${MLFLOW_TRACKING_URI:-}" \
	  || echo "These pages show mlflow.db. Runs go to another store, the one named above: MLFLOW_TRACKING_URI is set."
	@echo "The charts: http://127.0.0.1:$(PORT)/#/experiments/1/runs?viewStateShareKey=pipelines&compareRunsMode=CHART"
	@mlflow server --backend-store-uri "sqlite:///$(CURDIR)/mlflow.db" --artifacts-destination "$(CURDIR)/mlartifacts" \
	  --host 127.0.0.1 --port $(PORT) --workers 1 --allowed-hosts "localhost:$(PORT),127.0.0.1:$(PORT)"

lock: $(STAMP) ## compile requirements.in to requirements.lock, with the hash of every file but torch's
	@# without the hashes of torch and its CUDA libraries: there are several builds of one version
	@mkdir -p .state
	@UV_FIND_LINKS= uv pip compile -q --universal --python-version 3.11 requirements.in --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links --no-annotate \
	  | awk '/^[^ ]/ { keep = !/^(nvidia-|cuda-|triton|torch==)/ } /^torch==/ { sub(/ \\$$/, ""); print } keep' > .state/lock
	@mv .state/lock requirements.lock

clean: ## delete data, models and .state; make repro then restores the first two from DVC's cache
	@rm -rf data models .state
