"""docs/training.md names what the tests run on, and nothing else."""

import re
from pathlib import Path

from mold.training.config import METHODS
from tests.mold.training.test_savers import SAVERS
from tests.tiny_models import FAMILIES, make_model

PAGE = (Path(__file__).parents[3] / "docs/training.md").read_text()


def test_families_of_the_page_are_those_of_the_tests():
    named = set(re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", PAGE))
    assert named == {type(make_model(family)).__name__ for family in FAMILIES}


def test_methods_and_savers_of_the_page():
    for name in METHODS:
        assert f"`{name}`" in PAGE
    for options in SAVERS.values():
        for option in options.keys() - {"per_device_train_batch_size"}:
            assert option in PAGE
