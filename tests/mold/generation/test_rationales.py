import json
import re
from dataclasses import replace

import pytest

from mold.data.examples import Example
from mold.data.readers import read_examples
from mold.generation.batches import Journal
from mold.generation.keywords import name_keywords, parse_keywords
from mold.generation.prompting import load_prompt
from mold.generation.rationales import Sampling, read_given, split_completion, write_rationales
from tests.mold.scripted_model import ScriptedModel
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
NAMES = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gus")
# The last question's answer is nobody's guess.
EXAMPLES = [Example(name.lower(), f"How many has {name}?", "", str(n)) for n, name in enumerate(NAMES, 3)]
SAMPLING = Sampling(batch_size=2, max_new_tokens=60)
PROMPT = load_prompt("math", 1)


def answer(prompt, options):
    """Right for Ada; wrong, empty, nonsense and too long for others; with the hint right for Ben and Cora, and Dan's
    speaks of the hint."""
    name = re.findall(r"How many has (\w+)", prompt)[-1]
    if found := re.search(r"The result is (\d+)", prompt):
        text = {"Ben": "1 + 3 = 4.", "Cora": "5 of them.", "Dan": "The hint says so."}.get(name, "No.")
        return f" {text}\nAnswer: {found[1] if name in ('Ben', 'Cora', 'Dan') else 99}"
    texts = {"Ada": " 1 + 2 = 3.\nAnswer: 3\nQuestion: And then?", "Ben": " 1 + 1 = 2.\nAnswer: 2", "Cora": ""}
    return (texts | {"Dan": " Bla bla.", "Eva": " so" * 100, "Finn": "\nAnswer: 8"}).get(name, " It is 1.")


def write(folder, model=None, sampling=SAMPLING, **options):
    journal = Journal(folder / "journal.jsonl", {})
    model = model or ScriptedModel(TOKENIZER, answer)
    return write_rationales(
        EXAMPLES, journal, sampling, teacher=(model, TOKENIZER), prompt=PROMPT, progress=False, **options
    )


def test_right_ones_are_kept_and_wrong_ones_tried_again_with_a_hint(tmp_path):
    model = ScriptedModel(TOKENIZER, answer)
    rows, counts = write(tmp_path, model)
    assert [(row["id"], row["correct"], row["stage"]) for row in rows] == [
        ("ada", True, "plain"),
        ("ben", True, "hint"),
        ("cora", True, "hint"),
        *((name, False, "hint") for name in ("dan", "eva", "finn", "gus")),
    ]
    assert (rows[0]["rationale"], rows[0]["prediction"]) == ("1 + 2 = 3.", "3")
    assert (rows[1]["rationale"], rows[2]["rationale"]) == ("1 + 3 = 4.", "5 of them.")
    assert dict(counts) == {
        "plain: right": 1,
        "plain: with a wrong answer": 2,
        "plain: empty": 2,
        "plain: without an answer": 1,
        "plain: cut off at max_new_tokens": 1,
        "hint: right": 2,
        "hint: that speak of the hint": 1,
        "hint: with a wrong answer": 3,
        "right": 3,
        "never right": 4,
    }
    assert sum(map(len, model.calls)) == 7 + 6  # Ada is not asked again
    hinted = [prompt for batch in model.calls[4:] for prompt in batch]
    assert all("The result is" in prompt for prompt in hinted)
    # What is written can be trained on.
    path = tmp_path / "rationales.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, report = read_examples(path)
    assert [example.id for example in examples] == ["ada", "ben", "cora"]
    assert report.left_out == {"with a wrong rationale": 4}


def test_without_a_hint_there_is_one_stage(tmp_path):
    rows, counts = write(tmp_path, sampling=replace(SAMPLING, hint=False))
    assert {row["stage"] for row in rows} == {"plain"}
    assert counts["never right"] == 6
    (folder := tmp_path / "no-hint-in-the-prompt").mkdir()
    journal, teacher = Journal(folder / "journal.jsonl", {}), (ScriptedModel(TOKENIZER, answer), TOKENIZER)
    rows, _ = write_rationales(
        EXAMPLES, journal, SAMPLING, teacher=teacher, prompt=replace(PROMPT, hint=""), progress=False
    )
    assert {row["stage"] for row in rows} == {"plain"}


@pytest.mark.parametrize("die_at", range(7))
def test_a_run_killed_at_any_batch_ends_as_an_undisturbed_one(tmp_path, die_at):
    whole = write(tmp_path / "whole")
    killed = ScriptedModel(TOKENIZER, answer, die_at)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", killed)
    goes_on = ScriptedModel(TOKENIZER, answer)
    assert write(tmp_path / "killed", goes_on) == whole
    assert len(goes_on.calls) == 7 - die_at
    assert (tmp_path / "killed/journal.jsonl").read_bytes() == (tmp_path / "whole/journal.jsonl").read_bytes()


def test_sampled_tries_go_on_until_one_is_right_and_are_decided_by_the_seed(tmp_path):
    model = make_model("llama", vocab=len(TOKENIZER), attention="sdpa", initializer_range=0.001)
    sampling = Sampling(temperature=1.0, num_tries=3, hint=False, batch_size=3, max_new_tokens=8, seed=1)
    first = write(tmp_path / "a", model, sampling)
    assert write(tmp_path / "b", model, sampling) == first
    journal = (tmp_path / "a/journal.jsonl").read_text()
    assert (tmp_path / "b/journal.jsonl").read_text() == journal
    texts = [row["text"] for line in journal.splitlines()[1:] for row in json.loads(line)["rows"]]
    assert len(texts) == len(set(texts)) == 21  # every try of every question is another
    other = write(tmp_path / "c", model, replace(sampling, seed=2))
    assert other != first


def test_only_wrong_ones_are_tried_again(tmp_path):
    tries = []

    def lucky(prompt, options):
        assert (options["do_sample"], options["temperature"], options["top_p"]) == (True, 0.7, 0.9)
        tries.append(prompt)
        return " It is 3.\nAnswer: 3" if len(tries) <= 7 else " It is 4.\nAnswer: 4"

    rows, counts = write(tmp_path, ScriptedModel(TOKENIZER, lucky), Sampling(0.7, 0.9, 2, hint=False))
    assert len(tries) == 7 + 6
    assert [row["correct"] for row in rows] == [True, True, *[False] * 5]
    assert counts["plain: right"] == 2


def test_rationales_from_elsewhere(tmp_path):
    path = tmp_path / "given.jsonl"
    given_rows = [
        {"id": "ada", "rationale": "It is 2 + 1 = 3."},
        {"question": "how many has BEN", "rationale": "Four.", "prediction": "4"},
        {"id": "cora", "rationale": "It is 4."},
        {"id": "cora", "rationale": "It is 2 + 3 = 5.\nAnswer: 5"},
        {"id": "dan", "rationale": "Nobody can tell.", "correct": True},
        {"id": "eva", "rationale": "7", "correct": False},
        {"question": "How many has Zoe?", "rationale": "It is 5."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    given, strangers = read_given(path, EXAMPLES)
    assert strangers == 1
    # Alone: checked.
    rows, counts = write_rationales(EXAMPLES, Journal(tmp_path / "a", {}), SAMPLING, given=given, progress=False)
    assert [row["correct"] for row in rows] == [True, True, True, True, False, False, False]
    assert rows[2]["rationale"] == "It is 2 + 3 = 5."
    assert [row["stage"] for row in rows] == ["given"] * 5 + [None] * 2
    assert (counts["given: right"], counts["given: with a wrong answer"]) == (4, 2)
    # With a teacher, who writes those that are missing or wrong.
    model = ScriptedModel(TOKENIZER, answer)
    write(tmp_path, model, given=given)
    assert sum(map(len, model.calls[:2])) == 3
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"given\.jsonl:1: has id; must have rationale, and id or question"):
        read_given(path, EXAMPLES)


def test_chats_are_not_cut_at_the_next_question(tmp_path):
    TOKENIZER.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<go>"
    try:
        prompts = []

        def chatty(prompt, options):
            assert "stop_strings" not in options
            prompts.append(prompt)
            return "It is 3.\nAnswer: 3"

        rows, _ = write(tmp_path, ScriptedModel(TOKENIZER, chatty), replace(SAMPLING, hint=False), chat=True)
    finally:
        TOKENIZER.chat_template = None
    assert prompts[0].endswith("?<go>")
    assert prompts[0].count("<assistant>") == 1
    assert rows[0]["correct"]


@pytest.mark.parametrize(
    ("completion", "rationale"),
    [
        ("2 + 1 = 3.\nAnswer: 3", "2 + 1 = 3."),
        ("**2 + 1 = 3.**\n\n**Answer:** 3", "2 + 1 = 3."),
        ("2 + 1 = 3.\n#### 3", "2 + 1 = 3."),
        ("So the answer is 3.", "So the answer is 3."),
        ("Answer: 3", ""),
    ],
)
def test_the_rationale_in_a_completion(completion, rationale):
    assert split_completion(completion) == rationale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: is -1, must be at least 0"),
        ({"top_p": 0}, "top_p: is 0, must be greater than 0"),
        ({"num_tries": 0}, "num_tries: is 0 at temperature 0.0"),
        ({"num_tries": 2}, "num_tries: is 2 at temperature 0.0, must be at least 1, and 1 for greedy generation"),
    ],
)
def test_sampling_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**options)


# Key words


@pytest.mark.parametrize(
    ("text", "keywords"),
    [
        (" wet; stand by the door ;water.", ["wet", "stand by the door", "water"]),
        ("Key words: wet; 'water'\nThe next line.", ["wet", "water"]),
        ("Here you are.\n**Key words:** wet", ["wet"]),
        ("wet; wet; ;", ["wet"]),
        ("", None),
        (";;", None),
        ("I think that the most important thing here is water", None),
        ("; ".join("abcdefghijklm"), None),
    ],
)
def test_lists_of_key_words(text, keywords):
    assert parse_keywords(text) == keywords


COMMONSENSE = [
    Example("a", "Where do cups stand? (A) shore (B) cupboard", "Cups stand in a cupboard.", "B", ("cups",)),
    Example("b", "Where do shoes stand?", "By the door.", "B", ("shoes",)),
    Example("c", "Where is the sea?", "At the coast.", "A"),
    Example("d", "Where is the moon?", "In the sky.", "A"),
]


def name_them(prompt, options):
    asked = re.findall(r"Question: (.*)", prompt)[-1]
    answers = {"cups": " cups; Cupboard; kitchen", "shoes": " I would say that they stand by the door of a house"}
    answers |= {"sea": " ocean; wave", "moon": " moon; sky\nQuestion: next"}
    return next(text for word, text in answers.items() if word in asked)


def test_key_words_are_checked_and_fallbacks_counted(tmp_path):
    model = ScriptedModel(TOKENIZER, name_them)
    arguments = (COMMONSENSE, Journal(tmp_path / "journal", {}), (model, TOKENIZER), load_prompt("keywords", 1))
    examples, counts = name_keywords(*arguments, batch_size=3, max_new_tokens=40, progress=False)
    assert [example.keywords for example in examples] == [("cups", "Cupboard"), ("shoes",), (), ("moon", "sky")]
    assert [replace(e, keywords=None) for e in examples] == [replace(e, keywords=None) for e in COMMONSENSE]
    assert dict(counts) == {
        "answers that are no list": 1,
        "key words named": 7,
        "key words not in the text": 3,
        "examples with key words of the teacher": 2,
        "examples that keep their own key words": 1,
        "examples without key words": 1,
    }
    again = (COMMONSENSE, Journal(tmp_path / "journal", {}), (ScriptedModel(TOKENIZER, None), TOKENIZER))
    assert name_keywords(*again, arguments[3], batch_size=3, max_new_tokens=40, progress=False) == (examples, counts)
