# Every target sets itself up: .venv is made when it is missing or older than what it is made from.
PYTHON ?= python3
PORT ?= 5000
BIN := .venv/bin
READY := .venv/.ready
LAB := .venv/lab/.ready

.PHONY: sweep test test-heavy soak lint bench ui docs clean

sweep: $(READY)  ## search on the bundled digits, to the end; goes on if it was interrupted
	$(BIN)/python -m ftd_ray.sweep sweeps/digits.yaml --resume $(ARGS)

test: $(READY) lint  ## lint, types and every test that is not heavy
	$(BIN)/python tests/run_lanes.py quick $(ARGS)

test-heavy: $(READY) $(LAB)  ## the tests that take minutes
	$(BIN)/python tests/run_lanes.py heavy $(ARGS)

soak: $(READY)  ## kill a sweep's processes at random, seed by seed, until Ctrl-C or ARGS="--seeds 20"
	$(BIN)/python tests/chaos.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure; writes benchmarks/results.json and benchmarks/README.md
	$(BIN)/python -m benchmarks $(ARGS)

ui: $(READY)  ## MLflow on this machine, at the newest sweep
	$(BIN)/python -m ftd_ray.ui --port $(PORT) $(ARGS)

docs: $(READY)  ## rewrite docs/configuration.md from the code
	$(BIN)/python docs/generate.py

clean:  ## remove .venv and what tools left; runs, store and MLflow's data stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than Python 3.11. Install a newer one, or say make PYTHON=python3.12." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# What the hosts of the tests' lab run: the packages above, and what `ray job submit` takes beside
# them. Were it in .venv, every cluster of the other tests would start a dashboard, which costs more
# than they do.
$(LAB): $(READY)
	rm -rf .venv/lab
	$(BIN)/python -m venv .venv/lab
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		>"$$(echo .venv/lab/lib/python3*/site-packages)/above.pth"
	.venv/lab/bin/pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[default]'
	printf '#!%s\nfrom ray.scripts.scripts import main\n\nmain()\n' "$(CURDIR)/.venv/lab/bin/python" \
		>.venv/lab/bin/ray
	chmod +x .venv/lab/bin/ray
	@touch $@
