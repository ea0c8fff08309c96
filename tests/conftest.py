"""What every test shares: two threads in all, no network, the embedded model, property tests without
deadlines."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from bitmill.source import embedded_model
from tests.tiny import make_model

settings.register_profile(
    "bitmill", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bitmill")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // side_by_side))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of the embedded model."""
    return embedded_model()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-block Llama with a tokenizer, as a Hugging Face folder. Tests only read it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Client checks import programs that only their own environments have: elsewhere they are not read."""
    if collection_path.parent.name != "oracles" or collection_path.suffix != ".py":
        return None
    wanted = config.getoption("markexpr") == "client"
    return None if wanted or "mark.client" not in collection_path.read_text(encoding="utf-8") else True
