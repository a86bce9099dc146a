# make demo   train a small language model here, in a few minutes      make test   what every change must pass
VENV ?= .venv
RUNS ?= runs
JOBS ?= 2
PYTEST_ARGS ?=
MATRIX_ARGS ?=

# One thread a process: the test processes share the cores. The rest keeps an installed libtpu from looking
# for TPUs, and lets two processes load it.
TEST_ENV = OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
# Where `make test-xla` has made its environment, the parity matrix runs the cells of torch-xla there.
XLA_PYTHON = $(addprefix PORTATRAIN_XLA_PYTHON=,$(wildcard $(VENV)-xla/bin/python))
PYTEST = $(TEST_ENV) $(XLA_PYTHON) $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

.PHONY: help demo demo-move setup test test-full test-rest test-meshes test-s3 test-skypilot test-xla test-engines matrix soak soak-engines plan-accuracy docs pages lint format clean

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## set up, then train tiny-lm into runs/demo
	@.ci/setup $(VENV) jax,data 3
	@if [ -e $(RUNS)/demo/run.json ]; then echo "demo: training $(RUNS)/demo anew"; rm -r $(RUNS)/demo; fi
	JAX_PLATFORMS=cpu $(VENV)/bin/launch --cluster local tiny-lm --run demo --runs $(RUNS)

demo-move:  ## a run killed twice, moved from JAX to torch and to four devices: one curve, runs/demo-move/moved/report.html
	@.ci/setup $(VENV) jax,torch,data 4
	$(TEST_ENV) $(VENV)/bin/python examples/move.py $(RUNS)/demo-move

setup:  ## an environment with both frameworks and all that the tests need
	@.ci/setup $(VENV) dev 5

test: setup lint  ## lint, types and the tests, in under 15 minutes on two cores
	$(PYTEST) -m "not full and not engines and not meshes and not soak"

test-rest: setup  ## only what `make test` leaves out
	$(PYTEST) -m "full and not engines and not meshes and not soak"

test-full: setup lint  ## everything that needs no scheduler
	$(PYTEST) -m "not engines and not meshes and not soak"

soak: setup  ## every bit of a checkpoint's headers flipped, a hundred thousand manifests fuzzed
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m soak --timeout 14400 tests/faults

matrix: setup  ## backends x meshes x recipes, into docs/measured/parity.md; goes on where it stopped (MATRIX_ARGS="--minutes 10")
	$(TEST_ENV) $(XLA_PYTHON) $(VENV)/bin/python -m benchmarks.matrix $(MATRIX_ARGS)

test-meshes: setup  ## backends on meshes of several processes; alone, as they need the cores
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "meshes and not full" tests/distributed

test-engines: setup  ## on a real Slurm, installed where apt-get can and started on loopback, and on loopback APIs
	@.ci/slurm
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "engines and not soak" tests/engines

soak-engines: setup  ## one run, 50 preemptions and kills at random moments on that Slurm; prints the table of docs/run/reliability.md
	@.ci/slurm
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -s -m "engines and soak" --timeout 14400 tests/engines

plan-accuracy:  ## the planner beside the real compilers, for TPUs and NVIDIA GPUs that are not there; hours
	@.ci/setup $(VENV)-plan dev,tpu,cuda 20
	$(TEST_ENV) $(VENV)-plan/bin/python -m benchmarks.plan_accuracy --write

test-s3:  ## checkpoints in a simulated S3, in an environment of its own
	@.ci/setup $(VENV)-s3 s3-test 3
	$(TEST_ENV) $(VENV)-s3/bin/python -m pytest $(PYTEST_ARGS) tests/faults/test_s3.py

test-skypilot:  ## task files by SkyPilot's own parser, in an environment of its own
	@.ci/setup $(VENV)-sky sky-test 3
	HOME=$(abspath $(VENV)-sky) $(TEST_ENV) $(VENV)-sky/bin/python -m pytest $(PYTEST_ARGS) tests/engines/test_skypilot.py

test-xla:  ## the torch-xla backend on simulated devices, in an environment of its own (7 GB)
	@.ci/setup $(VENV)-xla xla-test 16 constraints-xla.txt
	$(TEST_ENV) PJRT_DEVICE=CPU CPU_NUM_DEVICES=1 $(VENV)-xla/bin/python -m pytest $(PYTEST_ARGS) tests/xla

docs:  ## the site, into site/, in an environment of its own; a warning or a broken link is an error
	@.ci/setup $(VENV)-docs docs 2
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

pages: setup  ## write the pages and the picture that are made from the code
	$(VENV)/bin/python -m docs.tools.reference --write
	$(VENV)/bin/python -m docs.tools.draw_rooms --write
	$(VENV)/bin/python -m portatrain.system.environment > docs/run/environment.md

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment and caches; runs are kept
	rm -rf $(VENV) $(VENV)-s3 $(VENV)-sky $(VENV)-xla $(VENV)-docs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
