PYTHON ?= python3
RUN = .venv/bin/python

# Handwritten digits, from nothing to samples; what is done already is not done again.
demo: .venv/ready
	$(RUN) train.py config/digits.py --resume=auto
	$(RUN) distill.py --out_dir=out/digits --resume=auto
	$(RUN) sample.py --out_dir=out/digits --show_trajectory=True

# In two halves at a time, about equally long; one of them is what runs most scripts.
SCRIPTS = tests/test_scripts.py tests/test_faults.py tests/test_speedrun.py tests/test_workers.py
test: .venv/ready
	$(MAKE) --jobs=2 test-scripts test-parts
test-scripts: .venv/ready
	$(RUN) -m pytest -q $(SCRIPTS)
test-parts: .venv/ready
	$(RUN) -m pytest -q tests $(SCRIPTS:%=--ignore=%)

# The notebook, from docs/tour.py, with its outputs; under three minutes.
tour: .venv/ready
	$(RUN) -m evidence.notebook docs/tour.py tour.ipynb

.venv/ready: requirements.txt
	@echo "installs into .venv what is missing of torch and six more packages, which takes minutes"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: demo tour test test-scripts test-parts
