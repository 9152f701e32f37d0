"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from ranks import Pools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pools]:
    """`ranks(n)`: a pool of n real ranks; see ranks.Pool.run."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite tests/snapshots as they are now"
    )
