# pkgindex: build, serve, test. Everything goes into .venv; the one command to know is `make help`.

VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
STORE ?= file:./pkgindex-data
SERVE_ARGS ?=
PYTEST_ARGS ?= -n 3 --dist worksteal
BENCH_ARGS ?=
TORTURE_ARGS ?=
SIMULATION_ARGS ?=

# The first interpreter that is new enough. It is run, not only found: a shim may lead nowhere.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c '$(IS_NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)

CYTHON_SOURCES := $(wildcard $(foreach e,pyx pxd pxi,pkgindex/*.$e pkgindex/store/*.$e))
COMPILED_PYTHON := pkgindex/protocol.py
HEADERS := $(wildcard pkgindex/*.h pkgindex/store/*.h)
LINTED := pkgindex tests $(wildcard benchmarks) setup.py

.DELETE_ON_ERROR:
.PHONY: help serve build test testinstalled check bench bench-quick bench-cluster bench-core profile sdist sanitize \
	torture torture-quick torture-long torture-cluster simulation clean tools

help:
	@echo "make serve          build, then serve on port 8080 of this machine from $(STORE)"
	@echo "make test           build, then run the tests"
	@echo "make testinstalled  run the tests against what a user gets: the sdist, installed"
	@echo "make check          lint and type-check"
	@echo "make bench          measure all of it, beside other servers and the machine's limits: 40 minutes"
	@echo "                    (BENCH_ARGS='--only changes' measures a part, '--list' names the parts)"
	@echo "make bench-quick    the main rates beside the machine's limits alone, in a minute"
	@echo "make bench-cluster  several servers on one folder, beside one alone"
	@echo "make bench-core     measure the core alone: ns a message, bytes a package"
	@echo "make profile        show where the server's time goes (needs perf)"
	@echo "make sdist          make dist/pkgindex-*.tar.gz"
	@echo "make sanitize       run the tests of the compiled parts under ASan and UBSan"
	@echo "make torture        run every fault campaign that fits into an hour, whole; torture-quick: all, reduced;"
	@echo "                    torture-long: half an hour of load; torture-cluster: an hour of failovers"
	@echo "                    (TORTURE_ARGS='--only kill --seed 7' runs one again)"
	@echo "make simulation     100,000 random schedules of the takeover protocol, each with its seed"
	@echo "make clean          remove what was built (not the index)"

serve: $(VENV)/.with-load
	$(BIN)/pkgindex serve --store $(STORE) $(SERVE_ARGS)

build: $(VENV)/.built

test: $(VENV)/.with-test
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(VENV)/.with-dev
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" cython-lint $(CYTHON_SOURCES)

bench: $(VENV)/.with-bench
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-quick: $(VENV)/.built
	$(BIN)/python benchmarks/bench.py --quick $(BENCH_ARGS)

bench-cluster: $(VENV)/.built
	$(BIN)/python benchmarks/cluster.py $(BENCH_ARGS)

bench-core: $(VENV)/.with-bench
	$(BIN)/python benchmarks/core.py $(BENCH_ARGS)

profile: $(VENV)/.built
	$(BIN)/python benchmarks/where.py $(BENCH_ARGS)

torture: FORM := --full
torture-quick: FORM := --quick
torture-long: FORM := --long
torture-cluster: FORM := --cluster
torture torture-quick torture-long torture-cluster: $(VENV)/.with-torture
	$(BIN)/python -m tests.torture $(FORM) $(TORTURE_ARGS)

simulation: $(VENV)/.with-test
	$(BIN)/python -m tests.simulation $(SIMULATION_ARGS)

sdist: $(VENV)/.with-test
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist

# --- what the targets above stand on --------------------------------------------------------------

# One line for each thing that a fresh machine may lack, before anything else can fail on it.
succeeds = $(shell { $(1); } >/dev/null 2>&1 && echo yes)
need = $(if $(call succeeds,$(1)),,$(error $(2)))
PYTHON_NAME = $(notdir $(PYTHON))
HAS_HEADER = import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")

tools:
	$(call need,$(PYTHON) -c '$(IS_NEW_ENOUGH)',no Python 3.11 or later found; on Debian 12 or later: apt-get install python3)
	$(call need,command -v $${CC:-gcc},no C compiler found; on Debian: apt-get install gcc)
	$(call need,$(PYTHON) -c 'import ensurepip$(comma) venv',$(PYTHON) cannot make a virtual environment; on Debian: apt-get install $(PYTHON_NAME)-venv)
	$(call need,$(PYTHON) -c '$(HAS_HEADER)',$(PYTHON) has no Python.h; on Debian: apt-get install $(PYTHON_NAME)-dev)

$(VENV)/.made: | tools
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip 'setuptools>=77' 'Cython>=3.1'
	@touch $@

# Editable: the sources of this checkout run, and only a changed extension is built again.
$(VENV)/.built: $(VENV)/.made setup.py pyproject.toml $(CYTHON_SOURCES) $(COMPILED_PYTHON) $(HEADERS)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

# The extras of the package just installed; `pkgindex` itself is already there, so pip leaves it alone.
$(VENV)/.with-%: pyproject.toml $(VENV)/.built
	$(BIN)/python -m pip install --quiet 'pkgindex[$*]'
	@touch $@

# --- the same tests against other builds, each in an environment of its own -----------------------

# In a copy of the tests alone: beside the sources, Python would take those and not what is installed.
tests_alone = rm -rf $(1) && mkdir -p $(1) \
	&& cp -r tests pyproject.toml $(wildcard README.md docs packaging benchmarks) $(1) \
	&& ln -sfn ../../shared $(dir $(1))shared
ABOUT_SOURCES := $(addprefix --ignore=tests/,test_install.py test_architecture.py)

testinstalled: sdist
	rm -rf .venv-installed
	$(PYTHON) -m venv .venv-installed
	.venv-installed/bin/python -m pip install --quiet "$$(echo dist/pkgindex-*.tar.gz)[test]"
	$(call tests_alone,build/installed)
	cd build/installed && $(CURDIR)/.venv-installed/bin/pytest $(PYTEST_ARGS) $(ABOUT_SOURCES)

# Python itself leaks by ASan's measure, and loads the extension late: so no leak check, and a preload.
sanitize: | tools
	rm -rf .venv-sanitize build/lib*
	$(PYTHON) -m venv .venv-sanitize
	PKGINDEX_DEBUG=1 PKGINDEX_SANITIZE=1 .venv-sanitize/bin/python -m pip install --quiet '.[test]'
	$(call tests_alone,build/sanitized)
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CC:-gcc} -print-file-name=libasan.so)" \
		$(CURDIR)/.venv-sanitize/bin/pytest --timeout 600 $(PYTEST_ARGS) $(ABOUT_SOURCES)

clean:
	rm -rf build dist *.egg-info .venv .venv-installed .venv-sanitize .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find pkgindex tests \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
