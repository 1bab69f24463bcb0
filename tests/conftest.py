import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a wrong name must not wait for a network

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fills fresh torch.empty with NaN, so that an output which a kernel leaves unwritten fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
