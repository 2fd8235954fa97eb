# Everything a fresh machine needs is installed by `make run` or `make test`: tools/setup does it, once.
PY := .venv/bin/python

.PHONY: run test test-vm check bench bench-burst bench-images bench-overhead bench-replay bench-sessions build clean setup

setup: .venv/.ready

.venv/.ready: tools/setup pyproject.toml hatch_build.py
	tools/setup

build: setup
	$(PY) -m agentrun_shim.native
	@for name in agentrun agentrun-oci; do \
	    cmp -s shim/agentrun_shim/_native/$$name .venv/bin/$$name || \
	    install -m 755 shim/agentrun_shim/_native/$$name .venv/bin/$$name; done  # else they stay as old as the setup

# The main job on real input: real tools, each in its own sandbox, on this checkout.
run: build
	tools/demo

check: build
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy --explicit-package-bases tests/vm bench

test: check
	$(PY) -m pytest -q

test-vm: build
	$(PY) -m pytest -q -m vm tests/vm

bench: build
	$(PY) -m pip install --quiet --disable-pip-version-check --group bench
	$(PY) -m bench --install
	$(PY) -m bench.sessions
	$(PY) -m bench.images

# Taking in an image of 1 GB, beside podman, tar and cp (ten minutes).
bench-images: build
	$(PY) -m bench.images

# Forks and rollbacks of sessions, beside podman and cp (two minutes).
bench-sessions: build
	$(PY) -m bench.sessions

# Memory enforcement beside polling; what it costs those who do nothing wrong; recorded agent tasks under one budget (half an hour).
bench-burst: build
	$(PY) -m bench.burst

bench-overhead: build
	$(PY) -m bench.overhead

bench-replay: build
	$(PY) -m bench.replay

clean:
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/out shim/agentrun_shim/_native
	find . -name __pycache__ -prune -exec rm -rf {} +
