"""Every option of transformers and TRL is followed, without effect on the loss, or refused by name."""

import dataclasses

import pytest
from transformers import TrainingArguments

from mold import MoldConfig
from mold.training import training_options as table
from mold.training.training_options import SFT_REFUSED, check_followed


def names(options):
    return {option.name for option in dataclasses.fields(options)}


def test_the_table_has_every_option_of_transformers():
    rooms = [table.FOLLOWED, table.NO_EFFECT, table.REFUSED.keys()]
    unknown = names(TrainingArguments) - set().union(*rooms)
    assert not unknown, f"transformers has options that mold.training.training_options does not know: {unknown}"
    assert sum(map(len, rooms)) == len(set().union(*rooms))


def test_the_table_has_every_option_of_trl():
    trl = pytest.importorskip("trl")
    rooms = [table.SFT_FOLLOWED, table.SFT_NO_EFFECT, table.SFT_REFUSED.keys()]
    unknown = names(trl.SFTConfig) - names(TrainingArguments) - set().union(*rooms)
    assert not unknown, f"TRL has options that mold.training.training_options does not know: {unknown}"
    assert sum(map(len, rooms)) == len(set().union(*rooms))


def another(default):
    if isinstance(default, bool):
        return not default
    return 1 if isinstance(default, int) else 0.1 if isinstance(default, float) else "another"


def by_name(options, refused):
    return {option.name: option.default for option in dataclasses.fields(options) if option.name in refused}


@pytest.mark.parametrize(("name", "default"), by_name(MoldConfig, table.REFUSED).items())
def test_what_the_loss_does_not_follow_is_refused_by_name(tmp_path, name, default):
    value = ["loss"] if default is dataclasses.MISSING else another(default)
    with pytest.raises(ValueError, match=rf"^{name}: is .*, must be .*: \w+"):
        MoldConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: is 'group_by_length', must be"),
        ({"fp16": True, "use_cpu": True}, "fp16: is True, must be False on a CPU"),
    ],
)
def test_values_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MoldConfig(output_dir=str(tmp_path), **options)


def test_options_can_be_made_again_from_what_they_became(tmp_path):
    options = MoldConfig(output_dir=str(tmp_path), eval_strategy="steps", use_cpu=True)
    assert dataclasses.replace(options, seed=3).seed == 3


def test_what_the_mixin_does_not_follow_is_refused_by_name():
    trl = pytest.importorskip("trl")
    options = trl.SFTConfig(use_cpu=True, bf16=False)
    check_followed(options, SFT_REFUSED)
    for name, default in (by_name(trl.SFTConfig, SFT_REFUSED) | {"completion_only_loss": True}).items():
        changed = dataclasses.replace(options)
        object.__setattr__(changed, name, another(default))
        with pytest.raises(ValueError, match=f"^{name}: is .*, must be"):
            check_followed(changed, SFT_REFUSED)
