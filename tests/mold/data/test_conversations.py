"""Rows of conversations and of common sets become questions, rationales and answers."""

import json
import time

import pytest

from mold.commands.recipe_data import row_of
from mold.data.conversations import checked_example, example_from_row, question_row
from mold.data.readers import read_examples


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 3?", "completion": "2 + 3 = 5.\n#### 5"}, ("2 + 3?", "2 + 3 = 5.", "5")),
        (
            {"prompt": "Q", "completion": "The answer is 1? No. So the final answer is: 2."},
            ("Q", "The answer is 1? No.", "2"),
        ),
        ({"prompt": "Q", "completion": "Half of 8.", "answer": 4}, ("Q", "Half of 8.", 4)),
        ({"prompt": "Q", "completion": "Half of 8.\nAnswer: four", "answer": "4"}, ("Q", "Half of 8.", "4")),
        ({"prompt": "Q", "completion": "<think>\nHalf of 8.\n</think>\n\n4"}, ("Q", "Half of 8.", "4")),
        (
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "It is 4.", "reasoning_content": "Half of 8."}],
            },
            ("Q", "Half of 8.", "It is 4."),
        ),
    ],
)
def test_conversations_become_question_rationale_and_answer(row, expected):
    fields = question_row(row, "here")
    assert (fields["question"], fields["rationale"], fields["answer"]) == expected
    assert fields["history"] == ()


def test_a_file_of_conversations_is_read(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "2 + 3?"}, '
        '{"role": "assistant", "content": "It is 5.\\nAnswer: 5"}]}\n'
        '{"prompt": "1 + 1?", "completion": "It is 2.\\nAnswer: 2", "correct": true, "id": "second"}\n'
    )
    examples, report = read_examples(path)
    assert report.kept == 2
    assert [(e.id, e.question, e.rationale, e.answer) for e in examples] == [
        ("chat-1", "2 + 3?", "It is 5.", "5"),
        ("second", "1 + 1?", "It is 2.", "2"),
    ]


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R\n#### 4"}]}, True),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "R\n#### 4"}]}, True),
        (
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "R\n#### 4"}],
            },
            True,
        ),
        ({"prompt": "Q", "completion": "R\n#### 4"}, False),
        ({"instruction": "Q", "input": "I", "output": "R\n#### 4"}, False),
        ({"problem": "Q", "solution": "R\n#### 4"}, False),
        ({"instruction": "Q", "output": "R\n#### 4", "system": "Be brief."}, True),
        ({"question": "Q", "rationale": "R", "answer": "4"}, False),
        ({"question": "Q", "rationale": "R", "answer": "4", "history": [["user", "U"]]}, True),
        ({"question": "Q", "rationale": "R", "answer": "4", "chat": True}, True),
    ],
)
def test_which_rows_are_chats(tmp_path, row, chat):
    assert example_from_row(row, "here").chat is chat
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (example,), _ = read_examples(path)
    assert example.chat is chat
    # As a stage of a recipe writes it for the next one.
    path.write_text(json.dumps(row_of(example)))
    assert read_examples(path)[0] == [example]
    with pytest.raises(ValueError, match="chat is 'no', must be true or false"):
        example_from_row({"question": "Q", "rationale": "R", "answer": "4", "chat": "no"}, "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q"}, "here: has a prompt, must have a completion too"),
        ({"prompt": "Q", "completion": "no idea"}, "here: no answer found in 'no idea'"),
        ({"messages": []}, r"here: messages is \[\], must be a text or a list"),
        (
            {"messages": [{"role": "user"}]},
            "here: messages holds .* must hold messages with the texts role and content",
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, "here: has messages of user; must end with user, assistant"),
        (
            {"prompt": "Q", "completion": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "here: completion holds tool calls",
        ),
        ({"question": "Q", "history": "no"}, r"here: history is 'no', must be a list of \[role, text\]"),
        ({"question": "Q", "rationale": "R"}, "here: has the keys question, rationale"),
    ],
)
def test_malformed_rows_are_refused_by_their_place(row, message):
    with pytest.raises(ValueError, match=message):
        example_from_row(row, "here")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (21.0, "21"),
        (-3, "-3"),
        (0.5, "0.5"),
        (1e20, "1" + 20 * "0"),
        (True, "yes"),
        (False, "no"),
        (" x ", "x"),
    ],
)
def test_an_answer_may_be_a_number_or_a_boolean(answer, text):
    row = {"id": 1, "question": " Q ", "rationale": "R\n", "answer": answer}
    example = checked_example(row)
    assert (example.id, example.question, example.rationale, example.answer) == ("1", "Q", "R", text)


@pytest.mark.parametrize("answer", [None, "", " ", [], [True], float("nan"), float("inf"), {}])
def test_other_answers_are_refused(answer):
    with pytest.raises(ValueError, match=r"answer is .*, must be a text that is not empty"):
        checked_example({"id": 1, "question": "Q", "rationale": "R", "answer": answer})


@pytest.mark.parametrize(
    ("content", "rationale", "answer"),
    [
        ("<think>\n\n</think>\nHalf of 8.\n**Answer:** 4", "Half of 8.", "4"),
        ("Half of 8.</think>4", "Half of 8.", "4"),
        ("<think>Half of 8.\n#### 4", "Half of 8.", "4"),
        ("<reasoning>Half of 8.</reasoning><answer>4</answer>", "Half of 8.", "4"),
        ("Half of 8.\n\n## Final answer\n\n4", "Half of 8.", "4"),
        ("Half of 8 is $\\boxed{4}$.", "Half of 8 is $\\boxed{4}$.", "4"),
        ("Half of 8.\n\\[\\boxed{\\frac{1}{2}}\\]", "Half of 8.", "\\frac{1}{2}"),
        ("Half of 8.\n\nThe final answer is: $\\boxed{4}$.", "Half of 8.", "4"),
        ("Half of 8.\nAnswer: \\boxed{x = \\sqrt{2}} or \\boxed{4}", "Half of 8.", "x = \\sqrt{2} or 4"),
        ("<think>Half of 8.</think>\nIt is \\boxed{4}.\n\nThis took\nno time.", "Half of 8.", "4"),
        (
            "<|begin_of_thought|>\n\nHalf of 8.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is half.\n\n"
            "The answer is \\(\\boxed{4}\\).\n\n<|end_of_solution|>",
            "Half of 8.",
            "4",
        ),
        (
            "<|begin_of_thought|>Half of 8.<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|>",
            "Half of 8.",
            "4",
        ),
        ("<|begin_of_solution|>\nHalf of 8.\n#### 4\n<|end_of_solution|>", "Half of 8.", "4"),
        ("[THINK]Half of 8.[/THINK]4", "Half of 8.", "4"),
    ],
)
def test_where_the_answer_of_a_message_is(content, rationale, answer):
    fields = question_row({"prompt": "Q", "completion": content}, "here")
    assert (fields["rationale"], fields["answer"]) == (rationale, answer)


@pytest.mark.parametrize(
    ("columns", "rationale"),
    [
        ({"reasoning": "Half of 8."}, "Half of 8."),
        ({"Complex_CoT": "Half of 8."}, "Half of 8."),
        ({"reasoning": "on"}, "It is half."),  # says whether it was asked to think
        ({"reasoning": None}, "It is half."),
    ],
)
def test_a_thought_in_a_column_of_its_own(columns, rationale):
    fields = question_row({"instruction": "Q", **columns, "output": "It is half.\nAnswer: 4"}, "here")
    assert (fields["rationale"], fields["answer"]) == (rationale, "4")
    marked = question_row({"instruction": "Q", **columns, "output": "<think>4 + 4.</think>Answer: 4"}, "here")
    assert (marked["rationale"], marked["answer"]) == ("4 + 4.", "4")


@pytest.mark.parametrize(
    "unit",
    [
        "<think>",
        "</think>",
        "[THINK]",
        "<|end_of_thought|>",
        "Answer: 7\n",
        "answer ",
        "\\boxed{",
        "####",
        "\n",
        " ",
        "*",
        "<answer>",
        "$",
    ],
)
def test_hostile_messages_end(unit):
    text = (unit * 100_000)[:100_000]
    begun = time.process_time()
    for content in (text, text + "\nAnswer: 7", "x" + text + "x"):
        question_row({"prompt": "Q", "completion": content, "answer": "7"}, "here")
    assert time.process_time() - begun < 3
