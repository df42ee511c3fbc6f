# Every target works on a fresh machine: the virtual environment and the build are made when they are missing.
VENV   ?= .venv
PYTHON ?= python3
# CI and CPU machines pin torch (constraints.txt). To use a torch that is already there: make VENV=... TORCH=torch
TORCH  ?= torch
PIP    := $(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt
RUN    := PYTHONSAFEPATH=1 $(VENV)/bin/python
NATIVE := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint page-check bench gpu-check clean

demo: $(VENV)/.demo $(VENV)/.built  ## train a small network on real digits, measure its Fisher, write table, plot and file
	PYTHONSAFEPATH=1 $(VENV)/bin/fisherfast info --model fisherfast.demo:model --data fisherfast.demo:data --out out/digits

test: lint  ## everything CI runs, one thread per worker (609 s on two cores; with two threads each, 1,173 s)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -q -n 2

lint: $(VENV)/.dev $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -type f)

page-check: $(VENV)/.dev $(VENV)/.built  ## the report's page in a headless browser; needs chromium and chromedriver
	@command -v chromium && command -v chromedriver || { echo "page-check: needs chromium and chromedriver; on Debian: apt-get install chromium chromium-driver"; exit 1; }
	$(PIP) selenium
	$(RUN) -m pytest tests/test_page.py -q -m browser

bench: $(VENV)/.bench $(VENV)/.built  ## measure here, write bench/results/, regenerate docs/performance.md
	$(RUN) bench/performance.py

gpu-check:  ## on a machine with an NVIDIA GPU, without a network: all of it, or make gpu-check STAGES="bench --seconds 200"
	PYTHONSAFEPATH=1 $(PYTHON) bench/gpu_check.py $(STAGES)

clean:
	rm -rf $(VENV) build dist out *.egg-info fisherfast/_C*.so
	find fisherfast/kernels -maxdepth 0 -type l -delete 2>/dev/null || true

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) setuptools wheel ninja
	touch $@

# In place, through build/: what did not change is not compiled again, as it would be by each pip install of the project.
$(VENV)/.built: $(VENV)/.torch setup.py $(NATIVE)
	$(VENV)/bin/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py
	FISHERFAST_NATIVE=none $(PIP) --no-build-isolation -e .[$*]
	$(if $(filter bench,$*),$(PIP) --no-deps -r bench/requirements.txt)
	touch $@
