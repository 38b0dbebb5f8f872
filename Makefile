# `make run` and `make test` do all the set-up there is. `make` alone lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run check test test-long coverage bench lab mlflow export pictures docs lock minikube image clean
MAKEFLAGS += --no-print-directory

# The Python to make .venv with; the first of these that exists.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell command -v $(name)),$(name))))
UV := uv==0.13.9
READY := .venv/.ready
# What is needed to work on the notebooks; an environment that has it already (nbdev-export on PATH) is taken as it is.
TOOLS = $(if $(shell command -v nbdev-export),,$(READY))

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export ORT_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: $(READY)  ## the pipeline: what has changed and what depends on it (ARGS="--set train.trials=20")
	@fraud run $(ARGS)

check: $(READY)  ## before a commit, in three minutes: formatting, lint, types, generated files, what the change touches
	@bash tests/check.sh

test: $(READY)  ## every test but the long ones; lists first what it needs, and at the end what it left out
	@bash tests/run.sh

test-long: $(READY)  ## the long ones: real data at full size, loops on several seeds, the jobs image, a real Kubernetes
	@bash tests/run.sh --long

coverage: $(READY)  ## the lines of the package that make test runs, notebooks and processes included (ARGS="pytest tests/test_serve.py")
	@bash tests/coverage.sh $(ARGS)

BENCHMARKS = serving streaming capacity features train scale rules
# The Fraud Detection Handbook's transactions, where they are: make bench HANDBOOK=transactions.parquet
HANDBOOK ?=

bench: $(READY)  ## every benchmark beside its peers, about an hour; one table: benchmarks/results.md (ARGS="--quick": does it run?)
	@. tests/tools.sh; NEEDED+=("wrk wrk the load of the benchmarks"); need_all
	@results=$$(mktemp -d); trap 'rm -rf $$results' EXIT; \
	for name in $(BENCHMARKS); do python benchmarks/$$name.py --json $$results/$$name.json $(ARGS); done; \
	$(if $(HANDBOOK),python benchmarks/handbook.py $(HANDBOOK) --folds 2018-05-02$(COMMA)2018-05-09$(COMMA)2018-05-16$(COMMA)2018-05-23;) \
	$(if $(filter --quick,$(ARGS)),:,python benchmarks/table.py $(BENCHMARKS:%=$$results/%.json))
COMMA := ,

lab: $(READY) .lab/explore  ## JupyterLab, with the exploration notebooks open (ARGS="--no-browser")
	@JUPYTERLAB_WORKSPACES_DIR="$(CURDIR)/.lab" exec jupyter lab --ServerApp.root_dir="$(CURDIR)" \
	  --LabApp.app_settings_dir="$(CURDIR)/nbs/explore/lab" --LabApp.default_url=/lab/workspaces/explore $(ARGS)

# Imported once, and anew when the project's own has changed: until then tabs stay as one leaves them.
.lab/explore: nbs/explore/lab/explore.jupyterlab-workspace | $(READY)
	@JUPYTERLAB_WORKSPACES_DIR="$(CURDIR)/.lab" jupyter lab workspaces import $< >/dev/null
	@touch $@

mlflow: $(READY)  ## MLflow's pages on runs and models, at http://127.0.0.1:5000 (ARGS="--port 5001")
	@mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 $(ARGS)

setup: $(READY)  ## the environment in .venv, as requirements.lock has it

$(READY): requirements.lock pyproject.toml
	@$(if $(PYTHON),:,echo "error: no Python here; Python 3.11 is needed: sudo apt-get install python3 python3-venv" >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "error: $$($(PYTHON) --version) is not 3.11 or 3.12; name another with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "error: this Python cannot make virtual environments; install that with: sudo apt-get install $$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; }
	@echo "setting up .venv (about 3 GB; once)"
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	@.venv/bin/uv pip install $$([ -t 2 ] || echo --quiet) --compile-bytecode --python .venv/bin/python --require-hashes -r requirements.lock
	@.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
	@touch $(READY)

export: $(TOOLS)  ## generated files anew: fraud_pkg/ (with the console's files), README.md, dvc.yaml, k8s/jobs/, jobs.yml, dashboards, k8s/base/settings.ini, docs/reference/; notebooks cleaned
	@nbdev-export
	@for assets in nbs/*/assets; do wing=$$(basename $$(dirname $$assets)); rm -rf fraud_pkg/$$wing/assets; cp -R $$assets fraud_pkg/$$wing/assets; done
	@nbdev-clean
	@nbdev-clean --fname jobs
	@python docs/record.py
	@jupyter nbconvert --log-level WARN --to markdown nbs/index.ipynb --output-dir . --output README
	@fraud jobs compile
	@python -m fraud_pkg.monitor.dashboards
	@python docs/reference.py
	@cp settings.ini k8s/base/settings.ini

pictures: $(READY)  ## the pictures of the docs and the figures that they quote (docs/run.json), of the last run, in Chromium
	@python docs/pictures.py

docs: $(READY)  ## the site of the docs, in site/: open site/index.html, without a server or a network (npm brings Mermaid)
	@python docs/site/build.py $(ARGS)

# What a function imports; what onnxruntime needs for other things than inference, and cel for its command line, stays out.
LAMBDA_LOCK = uv pip compile --quiet --only-binary :all: --generate-hashes --no-emit-index-url --no-header pyproject.toml --constraint .lambda.txt \
	$(foreach name,sympy mpmath coloredlogs humanfriendly flatbuffers protobuf packaging \
	  typer rich prompt-toolkit pygments shellingham markdown-it-py mdurl click wcwidth annotated-doc,--no-emit-package $(name))

lock: $(READY)  ## the lock files anew from pyproject.toml
	@uv pip compile --quiet --upgrade --universal --all-extras --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements.lock
	@uv pip compile --quiet --universal --extra serve --constraint requirements.lock --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements-serve.lock
	@uv pip compile --quiet --universal --extra jobs --constraint requirements.lock --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements-jobs.lock
	@sed -nE 's/^((pydantic|pydantic-core|typing-extensions|typing-inspection|annotated-types)==[^ ]*).*/\1/p' requirements.lock > .lambda.txt
	@$(LAMBDA_LOCK) --python-version 3.11 --python-platform x86_64-manylinux2014 --override chalice_app/python3.11.txt -o chalice_app/python3.11.lock
	@sed -nE 's/^((numpy|onnxruntime)==[^ ]*).*/\1/p' requirements.lock >> .lambda.txt
	@$(LAMBDA_LOCK) --python-version 3.12 --python-platform x86_64-manylinux_2_28 -o chalice_app/python3.12.lock
	@rm .lambda.txt
	@echo "checkov>=3.3" | uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header - -o tests/checkov.lock
	@printf 'zizmor\npre-commit\ndetect-secrets\npip-audit\n' | uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header - -o tests/workflows.lock
	@printf 'build\nsetuptools>=80\n' | uv pip compile --quiet --upgrade --universal --python-version 3.12 --generate-hashes --no-emit-index-url --no-header - -o .github/build.lock

minikube:  ## the service in Minikube, with the champion of the last run (docs/kubernetes.md)
	@k8s/minikube.sh

# Docker where it runs, else buildah, whose own image format knows no health check.
BUILD = $(if $(shell docker version >/dev/null 2>&1 && echo yes),docker build,buildah build --format docker --layers)
VERSION = $(shell sed -nE 's/^version = "(.*)"/\1/p' pyproject.toml)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)

image:  ## the container images fraud-api and fraud-jobs (ARGS="--build-arg PYTHON_IMAGE=...")
	@$(BUILD) $(ARGS) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --tag fraud-api:$(VERSION) .
	@$(BUILD) $(ARGS) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --tag fraud-jobs:$(VERSION) --file Dockerfile.jobs .

clean:  ## forget every run: data, models, registry, reports (not .venv)
	@rm -rf data models mlartifacts mlflow.db* params.json dvc.lock .dvc/cache .dvc/tmp .dvc_store spark-warehouse
	@find reports -mindepth 1 ! -name README.md -delete 2>/dev/null || true
