"""What every test shares: no network, one thread, a fixed seed, hypothesis without deadlines."""

import os

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch

# The models are tiny: a second thread costs more than it brings, and one thread makes sums repeatable.
torch.set_num_threads(1)

# A first call compiles and loads; wall-clock limits per example would only measure the machine.
hypothesis.settings.register_profile(
    "moe_lens",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("moe_lens")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _types_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("untyped") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
