# The two commands of the README. Everything lives in .venv, made from the lock in constraints.txt.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed

.PHONY: demo test slow lint clean

demo: $(READY)
	$(VENV)/bin/python -m flows.quantize_model --params params.yaml

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow

lint: $(READY)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[lint]'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $(READY)

clean:
	rm -rf $(VENV) data/runs .prefect
