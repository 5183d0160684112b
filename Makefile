# Everything a person or CI does with this checkout. It needs make, and a python3 of 3.11 or later with venv and pip; the rest is
# installed into .venv, exactly as requirements-dev.lock says. ARGS="..." adds arguments to the command of a target.

PYTHON ?= python3
UV_VERSION := 0.13.9
ARGS ?=

.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:

BIN := .venv/bin
ENV := .venv/.stamp
DATA := data/ml-100k
PROMETHEUS := .tools/prometheus
PEERS := .cache/venv-peers/.stamp

# uv does not read pip's settings: pass on a mirror that pip is told of, and trust the certificates that this machine trusts.
export UV_SYSTEM_CERTS ?= 1
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
# One interpreter and one environment, whatever else uv finds on the machine.
export UV_PYTHON_DOWNLOADS := never
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH
# Images of containers often forbid Python to keep what it compiled of modules. Each start would compile torch anew, for five seconds.
unexport PYTHONDONTWRITEBYTECODE

COMPILE := uv pip compile pyproject.toml --quiet --python-version 3.11 --no-emit-index-url

.PHONY: help env data demo demo-kafka test lint types format ci ablation evaluate kill-demo bench bench-kafka bench-restore kafka chaos kafka-cluster kafka-down lock test-lowest prometheus clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: data ## run the system over all of MovieLens-100K; leaves runs/demo/report.html
	$(BIN)/coldstream demo --data $(DATA) --out runs/demo $(ARGS)

demo-kafka: data ## the same on a real Apache Kafka, each process on its own, with a live view of all (needs Java 17 and Maven)
	@$(BIN)/python -m tests.kafka_demo --data $(DATA) --out runs/demo-kafka $(ARGS)

test: $(ENV) ## run all tests
	@$(MAKE) --no-print-directory prometheus || echo "the tests that need Prometheus are skipped"
	$(BIN)/pytest $(ARGS)

lint: $(ENV) ## check formatting, lint rules and the direction of imports
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-cache

types: $(ENV) ## check types with mypy, strictly
	$(BIN)/mypy

format: $(ENV) ## format all files and repair what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ci: ## what CI runs: lint, types, test
	.ci/run

ablation: data ## compare memories, local adaptations and presets on MovieLens-100K
	$(BIN)/python -m benchmarks.ablation $(ARGS)

evaluate: data ## the paper's protocol: the four scenarios of warm and cold users and items
	$(BIN)/coldstream evaluate $(ARGS)

kill-demo: data ## the demo, killed with kill -9 at ten random moments; its scores must not change
	$(BIN)/python -m benchmarks.kill_demo $(ARGS)

bench: data ## measure speed, each beside what does the same: adapting, learning, the best of a catalogue; the stream; growth (half an hour)
	$(BIN)/python -m benchmarks.adaptation
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.embedded_log
	$(BIN)/python -m benchmarks.performance

bench-kafka: data $(PEERS) ## measure end to end on a real Apache Kafka, quixstreams beside it (needs Java 17 and Maven; half an hour)
	$(BIN)/python -m benchmarks.end_to_end $(ARGS)

bench-restore: $(ENV) ## measure restoring: a million users' support sets from the changelog (4 GB of disk for a while)
	$(BIN)/python -m benchmarks.restore $(ARGS)

chaos: $(ENV) ## ten runs of 100,000 events on three brokers, each disturbed 50 times at random moments (over an hour)
	$(BIN)/python -m tests.chaos $(or $(ARGS),$(foreach seed,1 2 3 4 5 6 7 8 9 10,--seed $(seed)))

kafka: $(ENV) ## start a real Apache Kafka of one node on 127.0.0.1:9092 (needs Java 17 and Maven)
	@$(BIN)/python -m tests.kafka_cluster up .kafka/local $(ARGS)

kafka-cluster: $(ENV) ## the same with three nodes, on ports 9092 to 9094, of which one may fail
	@$(BIN)/python -m tests.kafka_cluster up .kafka/local --nodes 3 $(ARGS)

kafka-down: $(ENV) ## end either, and delete what it held
	@$(BIN)/python -m tests.kafka_cluster down .kafka/local

env: $(ENV) ## make or renew the environment in .venv

data: $(ENV) ## fetch MovieLens-100K into data/
	@$(BIN)/python -m consumers.demo_data --out $(DATA)

prometheus: $(PROMETHEUS)/promtool ## fetch Prometheus and promtool from Debian's packages into .tools/ (no root needed)

lock: $(ENV) ## renew the locks: the newest versions that pyproject.toml allows
	$(BIN)/$(COMPILE) --group dev --universal --generate-hashes --upgrade --custom-compile-command "make lock" -o requirements-dev.lock
	$(BIN)/$(COMPILE) -c requirements-dev.lock --universal --generate-hashes --custom-compile-command "make lock" -o deploy/requirements.lock

test-lowest: $(ENV) ## run all tests with every dependency at the lower bound that pyproject.toml states
	@mkdir -p .cache
	$(BIN)/$(COMPILE) --resolution lowest-direct -o .cache/lowest.txt
	$(PYTHON) -m venv .cache/venv-lowest
	$(BIN)/uv pip install --quiet -p .cache/venv-lowest/bin/python -r .cache/lowest.txt --group dev
	$(BIN)/uv pip install --quiet -p .cache/venv-lowest/bin/python --no-deps --no-build-isolation -e .
	@# What old versions of others deprecate is no failure of ours, so warnings are only shown.
	.cache/venv-lowest/bin/pytest -o filterwarnings=default $(ARGS)

clean: ## delete caches and builds; .venv, data/ and runs/ stay
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find $(wildcard model streaming consumers benchmarks tests) -name __pycache__ -type d -prune -exec rm -rf {} +

# apt checks what it fetches against Debian's signatures. Its lists and caches are kept here, so that neither root nor fresh lists of the
# machine's own are needed. Nothing is installed: both are single files that need libc alone.
$(PROMETHEUS)/promtool:
	@command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { \
	  echo "Prometheus comes from Debian's packages, and this machine has no apt-get: put prometheus and promtool on the PATH" >&2; exit 1; }
	@echo "fetching Prometheus into $(PROMETHEUS) (once)"
	@rm -rf $(PROMETHEUS) .tools/apt && mkdir -p .tools/apt/lists/partial .tools/apt/archives/partial
	@cd .tools/apt && \
	  set -- -qq -o "Dir::State::Lists=$$PWD/lists" -o "Dir::Cache=$$PWD" -o APT::Sandbox::User= -o Acquire::Languages=none \
	    -o Acquire::Retries=1 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10 && \
	  timeout 60 apt-get "$$@" update && timeout 60 apt-get "$$@" download prometheus && dpkg-deb -x prometheus_*.deb unpacked || { \
	    echo "Prometheus could not be fetched from Debian's packages" >&2; exit 1; }
	@mkdir -p $(PROMETHEUS) && mv .tools/apt/unpacked/usr/bin/prometheus .tools/apt/unpacked/usr/bin/promtool $(PROMETHEUS)
	@rm -rf .tools/apt

# What is measured beside us, and the load's client, have an environment of their own: nothing of it is needed to run Coldstream.
$(PEERS): benchmarks/requirements-peers.txt $(ENV)
	@echo "making the environment of quixstreams in $(@D) (once)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(BIN)/uv pip install --quiet -p $(@D)/bin/python -r benchmarks/requirements-peers.txt
	@touch $@

# A .venv of another Python than $(PYTHON) is made anew, any other is brought up to date in place.
$(ENV): pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Coldstream needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@echo "making the environment in .venv (about a minute, once)"
	@want=$$($(PYTHON) -c 'import sys; print(sys.version)'); \
	  have=$$($(BIN)/python -c 'import sys; print(sys.version)' 2>/dev/null || true); \
	  if [ "$$want" = "$$have" ]; then clear=; else clear=--clear; fi; \
	  $(PYTHON) -m venv $$clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip sync --quiet -p $(BIN)/python requirements-dev.lock
	@$(BIN)/uv pip install --quiet -p $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@
