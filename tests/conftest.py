import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a wrong name must not wait for a network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers must not wait for each other

import pytest
import torch

from mold_kernels import native


def pytest_collection_modifyitems(items):
    """The slow ones first, or in the end one process has them and the others nothing."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fills fresh torch.empty with NaN, so that an output which a kernel leaves unwritten fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def use_backend(name):
    """The backend to ask for; "native avx2" first switches the compiled module to that instruction set."""
    backend, _, level = name.partition(" ")
    if level:
        native.set_level(level)
    return backend


LEVELS = [f"native {level}" for level in native.supported_levels()] if native.is_available() else []


@pytest.fixture(params=["torch", *LEVELS])
def backend(request):
    """Every fast backend, the native one at every instruction set that this CPU has."""
    yield use_backend(request.param)
    if LEVELS:
        use_backend(LEVELS[-1])
