# Predict human votes between chatbot answers. `make run` needs nothing else; `make help` lists the rest.
# VENV=path uses (or makes) another environment, PYTHON=python3.12 chooses the Python that makes it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Values from the command line reach the shell through the environment, so spaces in them survive.
export DATA TEST SET SPACE STORAGE GPU PROFILE SUBMISSION LABELS AGAINST
SUITE_OPTIONS = $(if $(PROFILE),--profile "$(PROFILE)") $(if $(DATA),--data "$$DATA") $(if $(TEST),--test "$$TEST") \
	$(if $(SET),--set "$$SET") $(if $(ARTIFACTS),--artifacts "$(ARTIFACTS)")
SUITE = $(BIN)/python -m src.utils.suite.run $(if $(NB),--only "$(NB)") $(SUITE_OPTIONS) \
	$(if $(filter-out 0,$(FORCE)),--force) $(if $(filter-out 0,$(LIST)),--list)

# These count only where they are typed: some systems export one.
typed = $(filter command,$(firstword $(origin $(1))))

.DEFAULT_GOAL := help
.PHONY: help run play plan test lint check gpu-check data train search score leaderboard kernel kernel-push rehearse bench docs gallery site notebook clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo "  run takes DATA=… TEST=… PROFILE=demo|small|full|file.yaml NB=02-05 SET=\"03.N_EPOCHS=1\" ARTIFACTS=… FORCE=1 LIST=1; it remembers PROFILE, DATA and TEST"

# uv installs several times as fast as pip, which is what remains where uv cannot be had. The build of torch that fits this
# machine comes from its makers' own index; where that is out of reach, the plain index's serves everywhere.
$(READY): requirements.txt pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "Python 3.11 or later is needed, $(PYTHON) is `$(PYTHON) -V 2>&1`. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }; \
		$(PYTHON) -m venv $(VENV); }
	@echo "Installing requirements.txt into $(VENV); the first time takes a minute or more."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	@export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" UV_INDEX_URL="$${UV_INDEX_URL:-$$PIP_INDEX_URL}"; \
		uv="$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt"; \
		$$uv --torch-backend=auto 2>/dev/null || $$uv 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)

# .play and .browser: the extra of that name, when it is first used; versions of everything else stay.
$(VENV)/.%: $(READY)
	@echo "Installing the packages of [$*] into $(VENV); only the first time."
	@export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" UV_INDEX_URL="$${UV_INDEX_URL:-$$PIP_INDEX_URL}"; \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.txt -e '.[$*]' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[$*]'
	@touch $@

run: $(READY)  ## raw battles to submission.csv: the notebooks in order, without those that are up to date
	@$(SUITE)

play: $(VENV)/.play  ## a page on this machine: paste two answers, see the predicted vote (MODEL=folder or hub id, PORT=7860, HOST=0.0.0.0)
	@$(BIN)/python -m src.utils.delivery.playground $(if $(call typed,MODEL),--model "$(MODEL)") \
		$(if $(call typed,HOST),--host "$(HOST)") $(if $(call typed,PORT),--port "$(PORT)")

plan: $(READY)  ## what PROFILE=full will need, before it starts: hours, memory, disk (GPU=24|16|2x16|80|T4|2xA100, NB=04, SET, DATA)
	@$(BIN)/python -m src.utils.training.plan --gpu "$$GPU" --only "$(NB)" $(if $(PROFILE),--profile "$(PROFILE)") \
		$(if $(DATA),--data "$$DATA") $(if $(SET),--set "$$SET") $(if $(ARTIFACTS),--artifacts "$(ARTIFACTS)")

test: $(VENV)/.play $(VENV)/.browser  ## every test, also those that train and run notebooks, two files at a time (JOBS=1 one)
	@$(BIN)/python -m pytest --numprocesses $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## style, types and who may import whom; notebooks carry no outputs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy
	@$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

check: lint  ## style and the fast tests, under two minutes
	@$(BIN)/python -m pytest -m "not slow"

gpu-check: $(READY)  ## what no CPU can show, on random weights of the real shapes, in about five minutes (WRITE=file.json keeps the table)
	@$(BIN)/python -m tests.gpu_checks $(if $(WRITE),--write "$(WRITE)")

data: $(READY)  ## the competition's battles into data/raw; NAME=arena-140k another set into data/arena-140k (arena-55k, arena-100k, wsdm, mt-bench)
	@$(BIN)/python -m src.utils.battles.download $(if $(call typed,NAME),"$(NAME)")

train: NB := 01-05
train: PROFILE := full
train: run  ## the real thing on a GPU, without inference: NB=01-05 PROFILE=full

search: $(READY)  ## a search over a notebook's parameters: SPACE=file.yaml NB=03 N=20 STORAGE=file or URL of a database; takes DATA, TEST, PROFILE, SET, ARTIFACTS too
	@$(BIN)/python -m src.utils.suite.search "$$SPACE" $(if $(NB),--notebook "$(NB)") $(if $(N),--n-trials "$(N)") \
		$(if $(STORAGE),--storage "$$STORAGE") $(SUITE_OPTIONS)

score: $(READY)  ## any submission on battles with votes: SUBMISSION=file.csv LABELS="a.csv b.csv" AGAINST=other.csv PARTIAL=1 WRITE=file.json
	@$(BIN)/python -m src.utils.delivery.score $(if $(SUBMISSION),"$$SUBMISSION") $(if $(LABELS),--labels "$$LABELS") \
		$(if $(AGAINST),--against "$$AGAINST") $(if $(filter-out 0,$(PARTIAL)),--partial) $(if $(WRITE),--write "$(WRITE)")

leaderboard: $(READY)  ## every run in ARTIFACTS=artifacts, compared on the same battles, with what choosing the best is worth
	@$(BIN)/python -m src.utils.stats.leaderboard $(if $(ARTIFACTS),"$(ARTIFACTS)")

KERNEL_NB = $(if $(NB),--notebook "$(NB)")

kernel: $(READY)  ## build/kaggle/NB, what is uploaded to Kaggle: NB=06 SET=… KERNELS="02 04" outputs it reads, RESUME=1 its own (06: BASELINE=1, EQUAL="02_baseline 04_qwen")
	@$(BIN)/python kaggle_kernel/build.py $(KERNEL_NB) $(if $(ARTIFACTS),--artifacts "$(ARTIFACTS)") \
		$(if $(PROFILE),--profile "$(PROFILE)") $(if $(SET),--set "$$SET") $(if $(KERNELS),--kernels $(KERNELS)) \
		$(if $(filter-out 0,$(RESUME)),--resume) $(if $(filter-out 0,$(BASELINE)),--baseline) $(if $(EQUAL),--equal $(EQUAL))

rehearse: kernel  ## the built kernel as Kaggle runs it: read-only inputs, no network, hidden rows or two sessions (NB=06 ROWS=25000 BASE=name=folder WRITE=file.json)
	@$(BIN)/python kaggle_kernel/rehearse.py $(KERNEL_NB) $(if $(ROWS),--rows $(ROWS)) $(if $(KERNEL_PYTHON),--python "$(KERNEL_PYTHON)") \
		$(foreach base,$(BASE),--base "$(base)") $(if $(WRITE),--write "$(WRITE)")

kernel-push: $(READY)  ## push build/kaggle/NB/kernel (NB=06), check that Kaggle has all of it, wait for its run; never submits
	@$(BIN)/python kaggle_kernel/push.py $(KERNEL_NB)

bench: $(READY)  ## every benchmark
	@for script in benchmarks/*.py; do $(BIN)/python -m benchmarks.$$(basename "$$script" .py) || exit 1; done

docs: $(READY)  ## docs/parameters.md, made anew from the settings
	@$(BIN)/python -m docs.parameters

gallery: $(READY)  ## docs/gallery, every notebook with its results, on the demo arena and on real battles (DATA=… PROFILE=…), and README's parts
	@$(BIN)/python -m docs.gallery $(if $(filter-out 0,$(AS_IS)),--as-is)

site: $(READY)  ## build/site: README and docs as web pages
	@$(BIN)/python -m docs.site build/site

notebook: $(READY)  ## Jupyter Lab in the notebooks folder
	@$(BIN)/jupyter lab --notebook-dir notebooks

clean:  ## remove build and caches, keep data, .venv and the trained models in artifacts (FORCE=1 removes artifacts, too)
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	@find src tests docs benchmarks kaggle_kernel -name __pycache__ -prune -exec rm -rf {} +
ifneq ($(filter-out 0,$(FORCE)),)
	rm -rf "$(or $(ARTIFACTS),artifacts)"
else
	@if [ -e "$(or $(ARTIFACTS),artifacts)" ]; then \
		echo "Kept: $(or $(ARTIFACTS),artifacts), with all trained models. make clean FORCE=1 removes it."; fi
endif
