"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from ranks import Pools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# ranks compile for themselves: workers of Inductor would each import torch first
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# a slow machine is no failure
hypothesis.settings.register_profile(
    "fgtp", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fgtp")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pools]:
    """`ranks(n)`: a pool of n real ranks; see ranks.Pool.run."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def kept_summaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found of a model is kept for all modules of a worker, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FGTP_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "summaries"))
        yield


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite tests/snapshots as they are now"
    )
