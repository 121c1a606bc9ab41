# Every target installs what it needs; CI runs `check` and `test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
PIP_INSTALL = -m pip install -q -c constraints.txt
# Packages that must reach 100% branch coverage.
GATED = transformer_lens/model_bridge/supported_architectures/*,transformer_lens/model_bridge/generalized_components/*,transformer_lens/model_bridge/views.py,transformer_lens/model_bridge/ports.py,transformer_lens/model_bridge/architecture_adapter.py
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-full check test-oldest pictures notebooks fmt shapes test-collect test-swarm demo-swarm mutants bench bench-peers bench-swarm gpu docs clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e ".[cli,viz]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.demo

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/python -m transformer_lens demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not browser and not swarm" -n 2 --dist loadfile

test-full: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not gpu and not browser and not swarm" -n 2

# Pictures in a real browser; Debian's Chromium where there is none yet.
pictures: $(VENV)/.dev
	command -v chromium >/dev/null || (apt-get update -q && apt-get install -y -q --no-install-recommends chromium)
	$(BIN)/python -m pytest -q -m browser

# Every notebook in a fresh kernel; an error or a warning of ours fails.
notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python demos/build_notebooks.py run --jobs 2

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 tests/adapters tests/properties tests/twins/test_core.py tests/test_imports.py --cov=transformer_lens --cov-report=
	$(BIN)/python -m coverage report --include="$(GATED)" --show-missing --fail-under=100

test-oldest: constraints.txt pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) "transformers==5.13.0" -e ".[dev]"
	$(OLDEST)/bin/python -m pytest -q -m "oldest and not gpu"

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every signature of the package that names axes is held to them while these tests run.
shapes: $(VENV)/.dev
	PYTHONPATH=tests/shape_checker $(BIN)/python -m pytest -q -n 0 --jaxtyping-packages=transformer_lens,shape_checker.checked \
		tests/twins/test_core.py tests/twins/test_experts.py tests/equivalence/test_gradients.py tests/equivalence/test_mathematics.py

# Kills a job hundreds of times at random moments, and compares the bytes it ends with; some minutes.
test-collect: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/collect

$(VENV)/.swarm: $(VENV)/.dev
	$(BIN)/python $(PIP_INSTALL) -e ".[swarm]"
	touch $@

# Servers as processes, in a network of their own: nothing but loopback is there, so nothing can leave the machine.
test-swarm: $(VENV)/.swarm
	OMP_NUM_THREADS=1 unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python -m pytest -q -n 0 tests/swarm'

$(VENV)/.demo-swarm: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e ".[cli,viz,swarm]"
	touch $@

# In a network of its own where the system lets us make one; elsewhere on loopback, the only place its servers listen on.
demo-swarm: $(VENV)/.demo-swarm
	@if unshare -rn sh -c 'ip link set lo up' 2>/dev/null; \
	then unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python demos/swarm.py'; \
	else $(BIN)/python demos/swarm.py; fi

# Round trips, steps, throughput, starting and recovering, on servers in a network of their own.
bench-swarm: $(VENV)/.swarm
	OMP_NUM_THREADS=1 unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python -m benchmarks.swarm'

# Breaks each line of the twins' formulas in a scratch copy and names what no test notices; about an hour.
mutants: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mutants

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench

bench-peers: $(VENV)/.dev
	$(BIN)/python -m benchmarks.peers

docs: $(VENV)/.dev
	$(BIN)/python $(PIP_INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

# Uses the python on the PATH as it is: a GPU machine has its own torch, and may have no network.
gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) $(OLDEST) build dist out
