"""What all tests share: the environment of the frameworks, Hypothesis' settings, a look at a folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any framework is imported; as in the Makefile, for a bare `pytest`. A test machine may have libtpu
# installed without a TPU: then JAX must not look for one, and two processes must be able to load it.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # Tests launch many small recipes of their own; test_unseen_recipes.py tests that `launch` checks such a recipe.
    "PORTATRAIN_CHECK": "0",
    # No test leaves compiled programs in the cache folder of whoever runs it.
    "PORTATRAIN_COMPILE_CACHE": "off",
    # Nor packed corpora; test_pack_cache.py has a cache of its own.
    "PORTATRAIN_PACK_CACHE": "off",
}.items():
    os.environ.setdefault(_name, _value)

from hypothesis import HealthCheck, settings  # noqa: E402

from tests.support import schedule  # noqa: E402
from tests.support.folders import listing  # noqa: E402

# The same examples in every run: a failure is a change of ours. `--hypothesis-profile=explore` looks for new ones.
settings.register_profile(
    "fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("explore", parent=settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile("fixed")


@pytest.fixture
def unchanged() -> Iterator[Callable[[Path], None]]:
    """``unchanged(folder)``: the test fails unless the folder is at its end as it is now."""
    before: dict[Path, dict[str, tuple[int, int, bytes]]] = {}

    def watch(folder: Path) -> None:
        before[folder] = listing(folder)

    yield watch
    for folder, files in before.items():
        assert listing(folder) == files


@pytest.fixture
def compiled_quickly() -> Iterator[None]:
    """The test's programs in jax are compiled without the costly passes of LLVM, in about half of the time.

    XLA's own passes are those of every program. For tests that compile much and compute little.
    """
    if importlib.util.find_spec("jax") is None:
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.hookimpl(trylast=True)  # when only the tests are left that run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it at the end."""
    schedule.sort(items)


@pytest.hookimpl(optionalhook=True)  # known only if xdist is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return schedule.scheduler(config, log)
