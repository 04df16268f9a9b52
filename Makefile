# Every target sets up all that it needs: an environment in .venv here, HTCondor in your cache directory.
PYTHON ?= python3
VENV := .venv/bin/python
ONLY ?=
ARGS ?=
# Processes of pytest. Those of `make test` have a pool, a gateway and a Prefect server each, and take whole files, the
# longest first (tests/support/file_order.py).
JOBS ?=
TEST_JOBS := $(or $(JOBS),3)
CHECK_JOBS := $(or $(JOBS),2)

.DEFAULT_GOAL := help
.PHONY: help venv check demo test test-faults faults-report bench docs lint clean

help:
	@echo "make demo               run a CMS dimuon analysis on HTCondor workers behind a Dask Gateway, here"
	@echo "make check              lint, types, and every quick test that starts no daemon; 2 minutes"
	@echo "make test               every test, on a real pool, gateway and Prefect server; ARGS='-k name' for some,"
	@echo "                        JOBS=n in so many processes at once ($(TEST_JOBS)); JOBS=0 one after the other"
	@echo "make test-faults        every row of the fault matrix: what is left after each kind of end; about 30 minutes"
	@echo "make faults-report      the same as one table; exit status 0 only if all rows that can be run here"
	@echo "                        are met (those that cut the network need root; ARGS=--complete counts them too)"
	@echo "make bench              every benchmark, one line of JSON each; ONLY=name,name for some"
	@echo "make docs               the documentation as a site of plain files, in site/"
	@echo "make lint               ruff and mypy"
	@echo "make clean              remove what these targets made in this directory, except results/"
	@echo "Nothing needs root or a running service. PYTHON=... names the interpreter (3.10 to 3.13; $(PYTHON))."

venv:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed (apt-get install python3)"; exit 1; }
	@$(PYTHON) tools/bootstrap.py

demo: venv
	@$(VENV) -m tools.demo

# The other tests are planned only: one that asks for a fixture which is not there fails here, not in an hour.
DAEMONS := pool or prefect_api or local_pool or daemons or slow or faults or faults_long or soak
check: lint
	@plan=$$($(VENV) -m pytest --setup-plan -qq -m "$(DAEMONS)" 2>&1) || { echo "$$plan"; exit 1; }
	@$(VENV) -m pytest -n $(CHECK_JOBS) -q --durations=0 --durations-min=5 -m "not ($(DAEMONS))" $(ARGS)

test: venv
	@$(VENV) -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-faults: venv
	@$(VENV) -m pytest tests/faults -m faults $(ARGS)

faults-report: venv
	@$(VENV) -m tools.faults_report $(ARGS)

bench: venv
	@$(VENV) -m benchmarks --only "$(ONLY)"

docs: venv
	@$(VENV) -m mkdocs build --quiet
	@echo "The documentation is in site/index.html. To search in it: python3 -m http.server --directory site"

lint: venv
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy

clean:
	@rm -rf .venv .cache build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
