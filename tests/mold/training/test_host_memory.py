import re
import sys
from pathlib import Path
from unittest import mock

import pytest

from mold.training.host_memory import freed_memory_kept
from tests.tiny_runs import make_trainer

SIZE = 256 * 2**20


def resident():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def free_some():
    """Take and free memory, and say how much of it is still here."""
    before = resident()
    block = b"x" * SIZE
    del block
    return resident() - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_stays_until_the_end():
    assert free_some() < SIZE / 4
    with freed_memory_kept():
        assert free_some() > SIZE * 3 / 4
        held = resident()
        assert free_some() < SIZE / 4  # the same memory again
    assert resident() < held - SIZE * 3 / 4
    assert free_some() < SIZE / 4


@pytest.mark.parametrize("keep", [True, False])
def test_training_keeps_it_if_told(tmp_path, signals, keep):
    trainer = make_trainer(tmp_path, signals, keep_freed_memory=keep, use_cpu=True)
    with mock.patch("mold.training.trainer.freed_memory_kept", wraps=freed_memory_kept) as kept:
        trainer.train()
    assert kept.call_count == keep
