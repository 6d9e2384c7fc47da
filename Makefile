PYTHON ?= python3
RUN = .venv/bin/python

# Handwritten digits, from nothing to samples; what is done already is not done again.
demo: .venv/ready
	$(RUN) train.py config/digits.py --init_from=auto
	$(RUN) distill.py --out_dir=out/digits --init_from=auto
	$(RUN) sample.py --out_dir=out/digits --show_trajectory=True

test: .venv/ready
	$(RUN) -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: demo test
