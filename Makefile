# make demo · make test · make lint · make bench. They need Python 3.10 or newer and a C++ compiler, nothing else.
PYTHON ?= python3
# The CPU build. A PYTHON that has torch already keeps its own.
TORCH ?= torch==2.13.0

# Where cores are shared, OpenMP threads that spin while they wait turn seconds into minutes.
export OMP_WAIT_POLICY ?= passive

VENV := .venv
PY := $(VENV)/bin/python
# Prints the package folders of the Python that runs it.
FOLDERS := import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")

.PHONY: demo test lint fuzz bench gpu bench-compare clean

demo: $(VENV)/installed-demo
	$(VENV)/bin/dcdit demo

# Two processes of one thread each: most tests are too small for two threads.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n 2 --dist worksteal

lint: $(VENV)/installed-dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# Bytes of all kinds for every parser, ten minutes.
fuzz: $(VENV)/installed-test
	FUZZ=4000 $(PY) -m pytest tests/test_fuzz.py -q -o faulthandler_timeout=0

# Measure on this machine, then write docs/benchmarks.md; under 10 minutes on 2 cores.
bench: $(VENV)/installed-test
	$(PY) -m bench.run
	$(PY) -m bench.report

# On a machine with a GPU: build in place, test, sanitise, measure, with the packages that PYTHON has; 12 minutes.
gpu:
	$(PYTHON) -m bench.gpu first; $(PYTHON) -m bench.gpu second

# make bench-compare BASE=main: the operators of this tree against those of another commit.
bench-compare: $(VENV)/installed-test
	$(PY) -m bench.compare $(or $(BASE),$(error BASE=<git ref> is missing))

clean:
	rm -rf $(VENV) demo build *.egg-info

# An environment that sees PYTHON's own packages where torch is among them, and has a torch of its own where not.
$(VENV)/torch:
	$(PYTHON) -m venv --clear $(VENV)
	if $(PYTHON) -c 'import torch' 2>/dev/null; \
	then $(PYTHON) -c '$(FOLDERS)' >"$$($(PY) -c '$(FOLDERS)')/outer.pth"; \
	else $(PY) -m pip install --quiet --disable-pip-version-check '$(TORCH)'; fi
	touch $@

$(VENV)/installed-%: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
