# make demo, test, lint and bench each make the environment in $(VENV) first and refresh it when pyproject.toml or
# constraints.txt changed; make venv does only that.
#
#   PYTHON=       the interpreter to make the environment with: 3.11 or newer, with venv
#   VENV=         where the environment stands
#   TORCH_INDEX=  address of a package index with another build of torch, such as a CPU-only one
#   ARGS=         options for `repflow demo` or pytest

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
# Written last, so that an interrupted install leaves none. It holds the interpreter that was asked for.
STAMP := $(VENV)/.installed

# An interpreter that is named, and is not the one that the environment was made with, makes it anew.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell cat $(STAMP)),$(PYTHON))
CLEAR := --clear
.PHONY: $(STAMP)
endif
endif
endif

define CHECK_PYTHON
import sys
problem = None
if sys.version_info < (3, 11):
    problem = "it is Python %d.%d" % sys.version_info[:2]
else:
    try:
        import ensurepip, venv
    except ImportError as error:
        problem = "it cannot make a virtual environment (%s; on Debian: apt install python3-venv)" % error
if problem:
    sys.exit("make: repflow needs Python 3.11 or newer with venv, but of '$(PYTHON)' %s; name another: make PYTHON=..." % problem)
endef
export CHECK_PYTHON

.PHONY: venv demo test lint bench

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v '$(PYTHON)' > /dev/null || { echo "make: no '$(PYTHON)' here; name a Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@rm -f $@
	@echo "Installing repflow and what it needs into $(VENV): minutes the first time, then only when the dependencies change."
	$(if $(CLEAR),,@$(BIN)/python -m pip --version > /dev/null 2>&1 ||) $(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') -e '.[all,dev]'
	@echo '$(PYTHON)' > $@

demo: $(STAMP)
	$(BIN)/repflow demo $(ARGS)

# The tests that look at the report in a browser are left out where there is none, so that Python and make are enough.
BROWSER = $(shell { command -v chromium || command -v google-chrome; } > /dev/null && command -v chromedriver)
WITHOUT_BROWSER = --ignore-glob='*/test_browser*.py'

# All tests are spread over the cores; those that ARGS chooses run in one process.
SPREAD = -n logical --maxprocesses 4 --dist loadfile

test: $(STAMP)
	@$(if $(BROWSER),:,echo "make test: leaving out test_browser*.py, for want of chromium and chromedriver")
	$(if $(ARGS),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(if $(BROWSER),,$(WITHOUT_BROWSER)) $(or $(ARGS),$(SPREAD))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

NO_GPU = make bench: it measures a CUDA GPU and PyTorch finds none here; nothing was measured

bench: $(STAMP)
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('$(NO_GPU)')"
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/offline.py
	$(BIN)/python benchmarks/table.py
