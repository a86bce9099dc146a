# make demo   train a small language model here, in a few minutes      make test   the checks that every change must pass
VENV ?= .venv
RUNS ?= runs
JOBS ?= 2
# One more for the tests that every change must pass, since many of them wait for a process that they started.
TEST_JOBS ?= 3
PYTEST_ARGS ?=
MATRIX_ARGS ?=
GPU_PROOF_ARGS ?=
MATRIX = tests/distributed/test_matrix.py

# One thread per process, because the test processes share the cores. The other variables keep an installed libtpu from
# looking for TPUs, and let two processes load it. XLA's compiled programs are kept between processes, since many tests
# compile the same ones.
CACHE_ENV = JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/jax-cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
TEST_ENV = $(CACHE_ENV) OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
# If `make test-xla` has made its environment, the parity matrix runs the torch-xla cells in it.
XLA_PYTHON = $(addprefix PORTATRAIN_XLA_PYTHON=,$(wildcard $(VENV)-xla/bin/python))
PYTEST = $(TEST_ENV) $(XLA_PYTHON) $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

.PHONY: help demo demo-move setup hall gpu-proof test test-full test-rest test-both test-hand test-matrix test-meshes test-s3 test-skypilot test-xla test-engines matrix soak soak-engines plan-accuracy docs pages lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## set up, then train tiny-lm into runs/demo
	@.ci/setup $(VENV) jax,data 3
	@if [ -e $(RUNS)/demo/run.json ]; then echo "demo: training $(RUNS)/demo anew"; rm -r $(RUNS)/demo; fi
	JAX_PLATFORMS=cpu $(VENV)/bin/launch --cluster local tiny-lm --run demo --runs $(RUNS)

demo-move:  ## kill a run twice and move it from JAX to torch and to four devices; writes runs/demo-move/moved/report.html
	@.ci/setup $(VENV) jax,torch,data 4
	$(TEST_ENV) $(VENV)/bin/python examples/move.py $(RUNS)/demo-move

setup:  ## make an environment with both frameworks and the packages of the tests
	@.ci/setup $(VENV) dev 5

test: setup lint  ## run ruff, mypy and the tests, in under 15 minutes on two cores
	$(PYTEST) -n $(TEST_JOBS) -m "not full and not hand and not engines and not meshes and not soak"

test-rest: setup  ## run only the tests that `make test` leaves out, but for the parity matrix and `make test-hand`
	$(PYTEST) -m "full and not hand and not engines and not meshes and not soak" --ignore $(MATRIX)

test-both: setup  ## run the tests of `make test` and `make test-rest` at once: workers collect once, files share runs
	$(PYTEST) -n $(TEST_JOBS) --timeout 450 -m "not hand and not engines and not meshes and not soak" --ignore $(MATRIX)

test-hand: setup  ## test what takes minutes in compilers; run it by hand, since .ci/run has no time for it
	$(PYTEST) -m "hand and not engines and not meshes and not soak"

hall: setup  ## build public faults of other trainers again in small, and show that the audit sees each; docs/understand/hall.md
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "not soak" tests/hall

test-matrix: setup  ## test all cells of the parity matrix; run it by hand, since .ci/run has no time for it
	$(PYTEST) -m "full and not soak" $(MATRIX)

test-full: setup lint  ## run every check that needs no scheduler
	$(PYTEST) -m "not engines and not meshes and not soak"

soak: setup  ## flip every bit of a checkpoint's headers, fuzz a hundred thousand manifests, send every signal in every phase, check every recipe on all meshes
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m soak --timeout 14400 tests/faults tests/distributed tests/contract

matrix: setup  ## compare backends x meshes x recipes, into docs/measured/parity.md; continues after a stop (MATRIX_ARGS="--minutes 10")
	$(TEST_ENV) $(XLA_PYTHON) $(VENV)/bin/python -m benchmarks.matrix $(MATRIX_ARGS)

test-meshes: setup  ## test backends on meshes of several processes; run it alone, because it needs all cores
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "meshes and not full and not soak" tests/distributed

test-engines: setup  ## test the launchers on a real Slurm on loopback (installed if apt-get can) and on loopback APIs
	@.ci/slurm
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "engines and not soak" tests/engines

soak-engines: setup  ## preempt and kill one run 50 times at random moments on that Slurm; prints the table of docs/run/reliability.md
	@.ci/slurm
	$(TEST_ENV) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -s -m "engines and soak" --timeout 14400 tests/engines

gpu-proof:  ## prove numbers, a move, kernels and speed on the one GPU of this machine; GPU_PYTHON=... if you have an environment
	$(if $(GPU_PYTHON),,@.ci/setup $(VENV)-gpu dev,cuda 20)
	$(or $(GPU_PYTHON),$(VENV)-gpu/bin/python) -m benchmarks.gpu_proof $(GPU_PROOF_ARGS)

plan-accuracy:  ## compare the planner with the real compilers for TPUs and NVIDIA GPUs, without the devices; takes hours
	@.ci/setup $(VENV)-plan dev,tpu,cuda 20
	$(TEST_ENV) $(VENV)-plan/bin/python -m benchmarks.plan_accuracy --write

test-s3:  ## test checkpoints, packed stores and blame in a simulated S3, in a separate environment
	@.ci/setup $(VENV)-s3 s3-test 3
	$(TEST_ENV) $(VENV)-s3/bin/python -m pytest $(PYTEST_ARGS) tests/faults/test_s3.py tests/faults/test_packed_s3.py tests/faults/test_blame_s3.py

test-skypilot:  ## test task files with SkyPilot's own parser, in a separate environment
	@.ci/setup $(VENV)-sky sky-test 3
	HOME=$(abspath $(VENV)-sky) $(TEST_ENV) $(VENV)-sky/bin/python -m pytest $(PYTEST_ARGS) tests/engines/test_skypilot.py

test-xla:  ## test the torch-xla backend on simulated devices, in a separate environment (7 GB)
	@.ci/setup $(VENV)-xla xla-test 16 constraints-xla.txt
	$(TEST_ENV) PJRT_DEVICE=CPU CPU_NUM_DEVICES=1 $(VENV)-xla/bin/python -m pytest $(PYTEST_ARGS) tests/xla

docs:  ## build the documentation into site/, in a separate environment; a warning or a broken link is an error
	@.ci/setup $(VENV)-docs docs 2
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

pages: setup  ## write the pages and the picture that are generated from the code
	$(VENV)/bin/python -m docs.tools.reference --write
	$(VENV)/bin/python -m docs.tools.draw_rooms --write
	$(VENV)/bin/python -m portatrain.system.environment > docs/run/environment.md

lint: setup  ## run ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup  ## format the code, and let ruff fix its findings
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment and the caches, but keep runs
	rm -rf $(VENV) $(VENV)-s3 $(VENV)-sky $(VENV)-xla $(VENV)-docs $(VENV)-gpu build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
