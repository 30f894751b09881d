# make demo   install, then profile -> solve -> judge -> export -> serve on recorded routing of a real model
# make test   install what tests need, then lint, type-check and test
# make check  the same with the quick tests only
# make long   the tests that `make test` leaves out, for a release: long searches, emulated clusters, compiling anew, whole models
# make matrix the quick tests on other Pythons and with the lowest versions of dependencies
# make site   the documentation as a site in build/site: python3 -m http.server -d build/site
# make audit  known vulnerabilities of the installed dependencies

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Tests start hundreds of processes: what they import is compiled once, whatever the caller's environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check lint types unit quick long matrix site audit clean

# A virtual environment is up to date when it was made after the last change of its requirements.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[service]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[torch,postgres,service,plot,test,test-torch,docs]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out $(DEMO)

test: lint types unit

# Beside each other: none of them keeps two cores at work throughout.
check: $(VENV)/.test
	$(MAKE) -j3 lint types quick

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The repository root is the package: mypy sees it as `moeplace` through a link.
types: $(VENV)/.test
	mkdir -p build/types && ln -sfn ../.. build/types/moeplace
	cd build/types && MYPY_NUM_WORKERS=2 $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p moeplace
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml ../../examples/*.py

unit: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not long'

long: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not long'

matrix:
	.ci/matrix

site: $(VENV)/.test
	$(BIN)/mkdocs build --strict

# Known vulnerabilities of what is installed. Where advisories cannot be reached it says so and passes.
audit: $(VENV)/.test
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/python .ci/audit.py

clean:
	rm -rf $(VENV) .venv-matrix build demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
