PYTHON ?= python3
RUN = .venv/bin/python

# Handwritten digits, from nothing to samples; steps that are done already are not repeated.
demo: .venv/ready
	$(RUN) train.py config/digits.py --resume=auto
	$(RUN) distill.py --out_dir=out/digits --resume=auto
	$(RUN) sample.py --out_dir=out/digits --show_trajectory=True

# Two halves run at the same time and take about equally long; SCRIPTS are the tests that run most scripts.
SCRIPTS = tests/test_scripts.py tests/test_faults.py tests/test_speedrun.py tests/test_workers.py
test: .venv/ready
	$(MAKE) --jobs=2 test-scripts test-parts
test-scripts: .venv/ready
	$(RUN) -m pytest -q $(SCRIPTS)
test-parts: .venv/ready
	$(RUN) -m pytest -q tests $(SCRIPTS:%=--ignore=%)

# Makes the notebook, with its outputs, from docs/tour.py, in less than three minutes.
tour: .venv/ready
	$(RUN) -m evidence.notebook docs/tour.py tour.ipynb

.venv/ready: requirements.txt
	@echo "installs into .venv what is missing of torch and six more packages, which takes minutes"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: demo tour test test-scripts test-parts
