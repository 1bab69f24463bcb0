"""What a model card says."""

import pytest
from transformers import LlamaConfig

from mold.models import config_of_layers
from mold.training.card import add_method_section, add_section, block, code, escaped

DRAFT = "---\ntags:\n- a\n---\n\n# name\n\nThis model {what} on an unknown dataset.\n\n## Results\n"
TRL = "---\ntags:\n- trl\n---\n\n# Model Card for run_<1>\n\n" + (
    "This model is a fine-tuned version of [None](https://huggingface.co/None).\nIt has been trained using TRL.\n\n"
    "## Quick start\n\n"
)
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


def test_a_card_of_trl_says_no_version_of_none(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TRL + 'pipeline("text-generation", model="None")\n')
    add_method_section(path, LlamaConfig(num_hidden_layers=2, name_or_path="runs/a"), 3, {"beta": 1.0}, None, None)
    text = path.read_text()
    assert "None" not in text
    assert f'model="{tmp_path.name}"' in text
    assert "# run\\_\\<1\\>\n\nThis model has 2 layers; its weights are from `runs/a`, trained on 3 examples.\n" in text


def test_a_student_of_some_layers_is_called_so(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DRAFT.format(what="was trained from scratch"))
    student = config_of_layers(LlamaConfig(num_hidden_layers=6, name_or_path="big"), [0, 2, 5])
    add_method_section(path, student, None, {}, None, None)
    assert "This model has 3 layers; its weights are from `big with 3 of 6 layers (0, 2, 5)`.\n" in path.read_text()


def test_empty_sections_go_and_what_is_no_hub_name_is_no_base_model(tmp_path):
    path = tmp_path / "README.md"
    for base, kept in (("owner/name", True), ("smollm2-135m-instruct", False), ("a b/c", False)):
        empty = "\n## Model description\n\nMore information needed\n\n## Training procedure\n\nLong.\n"
        path.write_text(f"---\nbase_model: {base}\n---\n\n# n\n\nThis model is a fine-tuned version of x.\n{empty}")
        add_method_section(path, LlamaConfig(num_hidden_layers=2, name_or_path=base), None, {}, None, None)
        text = path.read_text()
        assert ("base_model: owner/name" in text) == kept
        assert "More information" not in text
        assert "## Training procedure\n\nLong.\n" in text


def test_a_model_that_was_not_taught_attention_does_not_say_that_it_was(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DRAFT.format(what="was trained from scratch"))
    add_method_section(path, LlamaConfig(num_hidden_layers=2), 7, {"beta": 0.0}, None, None, trains_attention=False)
    text = path.read_text()
    assert "cross-entropy alone" in text
    assert "was taught where" not in text
    assert "router" not in text


def test_sections_take_the_place_of_theirs(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags:\n- a\n---\n\n# name\n\nOrigin.\n\n## Training\n\nLong.\n")
    for text in ("one\n\n### part", "two"):
        add_section(path, "Results", text, first=True)
        add_section(path, "Data", f"of {text}")
    body = path.read_text().partition("# name")[2]
    assert body == "\n\nOrigin.\n\n## Results\n\ntwo\n\n## Training\n\nLong.\n\n## Data\n\nof two\n"


def test_blocks():
    assert block("a 'b\nc'") == "```\na 'b\nc'\n```"
    assert block("````") == "`````\n````\n`````"


def test_escaped():
    assert escaped("a_b*<c>\n[d](e)") == r"a\_b\*\<c\> \[d\](e)"
