# Everything from a fresh machine with Python 3.10+ and make. VENV= and PYTHON= can be overridden.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO ?= runs/demo
TEST_PROCESSES ?= 2
BENCH ?= runs/bench

.PHONY: demo demo-text test bench chaos soak lint venv clean-demo

demo: $(VENV)/.installed  ## train, sample and score handwritten digits: under five minutes on two CPU cores
	$(BIN)/python train_ddpm.py -c configs/ddpm_digits.yaml -e $(DEMO) -r auto
	@for sampler in fixed-large fixed-small ddim heun dpm++2m unipc; do \
	  $(BIN)/python sample_ddpm.py --weights $(DEMO) --n_samples 64 --save_dir $(DEMO)/images/$$sampler --sampler $$sampler --skip_steps 50 || exit 1; done
	$(BIN)/python sample_ddpm.py --weights $(DEMO) --n_samples 8 --save_dir $(DEMO)/images/denoise --mode denoise --n_denoise 10
	$(BIN)/python sample_ddpm.py --weights $(DEMO) --n_samples 8 --save_dir $(DEMO)/images/progressive --mode progressive --n_progressive 10
	$(BIN)/python evaluate_ddpm.py --weights $(DEMO) --reference digits --n_samples 1000
	@echo; echo "pictures:"; ls $(abspath $(DEMO))/curves.png $(abspath $(DEMO))/samples/*.png $(abspath $(DEMO))/images/*-grid.png
	@echo; $(BIN)/python -m utils.report $(DEMO)

demo-text: $(VENV)/.installed  ## train digits that are drawn as a prompt says, sample, score: under ten minutes on two CPU cores
	$(BIN)/python train_ddpm.py -c configs/ddpm_digits_text.yaml -e $(DEMO)-text -r auto
	$(BIN)/python sample_ddpm.py --weights $(DEMO)-text --n_samples 64 --save_dir $(DEMO)-text/images/prompts --prompt_file configs/prompts/digits.txt
	$(BIN)/python sample_ddpm.py --weights $(DEMO)-text --n_samples 10 --save_dir $(DEMO)-text/images/scales --labels all --guidance_scale 0 1 3 5
	$(BIN)/python sample_ddpm.py --weights $(DEMO)-text --n_samples 8 --save_dir $(DEMO)-text/images/between --mode interpolate --prompts three eight 1 seven
	$(BIN)/python sample_ddpm.py --weights $(DEMO)-text --n_samples 4 --save_dir $(DEMO)-text/images/denoise --mode denoise --n_denoise 10 --prompts one 7 "the digit five"
	$(BIN)/python evaluate_ddpm.py --weights $(DEMO)-text --reference digits --n_samples 1000
	@echo; echo "pictures:"; ls $(abspath $(DEMO))-text/curves.png $(abspath $(DEMO))-text/samples/*.png $(abspath $(DEMO))-text/images/*-grid.png
	@echo; $(BIN)/python -m utils.report $(DEMO)-text

test: $(VENV)/.installed-dev  ## the default test suite: about 15 minutes on two CPU cores, 24 on slow ones
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

bench: $(VENV)/.installed-dev  ## speed beside diffusers, denoising-diffusion-pytorch and a plain loop: about an hour on two CPU cores without bf16
	$(BIN)/python -m pip install --quiet --disable-pip-version-check denoising-diffusion-pytorch
	$(BIN)/python benchmarks/speed.py --preset cifar10 --out $(BENCH)/cifar10.json
	$(BIN)/python benchmarks/speed.py --preset digits --tasks train sample fixed-small --out $(BENCH)/digits.json
	$(BIN)/python benchmarks/scaling.py --out $(BENCH)

chaos: $(VENV)/.installed-dev  ## kill trainings and generations several hundred times: more than an hour
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

soak: $(VENV)/.installed  ## 50,000 steps: does anything grow?
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-explore.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean-demo:
	rm -rf $(DEMO)
