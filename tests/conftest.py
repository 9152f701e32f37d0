"""Fixtures shared by all tests."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from ranks import Pools

from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.models.summarize import summarize

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


@pytest.fixture(scope="module")
def deepseek(kept_summaries: None) -> ModelSummary:
    return summarize("deepseek-ai/DeepSeek-R1")


@pytest.fixture(scope="module")
def llama(kept_summaries: None) -> ModelSummary:
    return summarize("meta-llama/Llama-3.1-70B")


@pytest.fixture(scope="module")
def summary_of(
    kept_summaries: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ModelSummary]:
    """The summary of a shipped model, or of a tiny one of the zoo."""
    import zoo  # transformers, which is to find the environment as this file leaves it

    folder = tmp_path_factory.mktemp("configs")

    def make(name: str) -> ModelSummary:
        if "/" in name:
            return summarize(name)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(zoo.config(name).to_dict() | {"dtype": "bfloat16"}))
        return summarize(str(path))

    return make


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    pytest.importorskip("playwright", reason="playwright is missing: pip install playwright")
    import browser
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = browser.launch(playwright)
        if found is None:
            pytest.skip(browser.MISSING)
        yield found
        found.close()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite tests/snapshots as they are now"
    )
