"""What every test shares: no network, one thread, a fixed seed, hypothesis without deadlines; and our own options."""

import gc
import os
import sys

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Generator, Iterator

import hypothesis
import jaxtyping
import pytest
import torch

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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe_lens")
    group.addoption("--typed", action="store_true", help="check every annotation of the package at every call")
    group.addoption("--reach", action="store_true", help="with --typed: fail if a function was never checked")
    group.addoption("--threads", type=int, default=1, help="of torch; a second costs tiny models more than it brings")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.option.threads)
    if config.option.typed:  # before a test module imports the package
        if "moe_lens" in sys.modules:
            raise pytest.UsageError(
                "--typed: moe_lens is imported already, by a conftest or plugin, and would not be checked"
            )
        from tests import type_hook

        type_hook.install()
        if config.option.reach:
            config.pluginmanager.register(type_hook.Reach(config))


@pytest.fixture(autouse=True)
def _types_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("untyped") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _shared_models_are_left_as_they_were() -> Iterator[None]:
    yield
    if shared := sys.modules.get("tests.wrapped"):
        shared.check_shared()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """No garbage is looked for while tests are collected, nor later in what was imported: it is large, and stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
