PYTHON ?= python3
RUN = .venv/bin/python

test: .venv/installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest tests --ignore=tests/test_aot.py -n 2 --dist worksteal
	$(RUN) -m pytest tests/test_aot.py

demo: .venv/installed
	$(RUN) -m examples.demo $(if $(MESH),--mesh "$(MESH)") $(if $(UP),--up $(UP))
	$(RUN) -m examples.round_trip $(if $(MESH),--mesh "$(MESH)") $(if $(UP),--up $(UP))

bench: .venv/installed
	$(RUN) -m pytest benchmarks/test_speed.py

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m mypy ssa reference_model benchmarks examples

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info < (3, 14), f'Python 3.10-3.13 needed, got {sys.version}'"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --quiet --constraint constraints.txt --editable ".[bench,reference,dev,spconv]"
	touch $@

clean:
	rm -rf .venv

.PHONY: test demo bench lint clean
