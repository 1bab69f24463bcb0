"""What a model card says."""

import pytest
from transformers import LlamaConfig

from mold.training.card import add_method_section, code

DRAFT = "---\ntags:\n- a\n---\n\n# name\n\nThis model {what} on an unknown dataset.\n\n## Results\n"
FROM_A_HUB = "is a fine-tuned version of [a/b](https://huggingface.co/a/b)"


@pytest.mark.parametrize("what", ["was trained from scratch", FROM_A_HUB])
def test_a_card_says_where_the_model_is_from(tmp_path, what):
    path = tmp_path / "README.md"
    path.write_text(DRAFT.format(what=what))
    student = LlamaConfig(num_hidden_layers=4, name_or_path="runs/`odd`|name")
    add_method_section(path, student, 7, {"template": "a|b"}, None, None)
    text = path.read_text()
    assert "This model has 4 layers; its weights are from `` runs/`odd`\\|name ``, trained on 7 examples.\n" in text
    assert "unknown dataset" not in text
    assert "from scratch" not in text
    assert "| `template` | `'a\\|b'` |" in text


def test_a_card_of_a_model_without_a_name(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DRAFT.format(what="was trained from scratch"))
    add_method_section(path, LlamaConfig(num_hidden_layers=2), None, {}, None, None)
    assert "This model has 2 layers; its weights are from a model that was made in Python.\n" in path.read_text()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("plain", "`plain`"), ("a\nb", "`a b`"), ("`", "`` ` ``"), ("``x`", "``` ``x` ```"), ("a|b", "`a\\|b`")],
)
def test_code(text, escaped):
    assert code(text) == escaped
