"""Readers, on rows written by hand in the format of each data set."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest

from mold.data.examples import Example
from mold.data.readers import FORMATS, read_examples, read_mixture

GSM8K = [
    {
        "question": "Ben has 1200 stamps and sells half. How many are left?",
        "answer": "He sells 1200/2 = <<1200/2=600>>600.\nSo 1200-600 = <<1200-600=600>>600 are left.\n#### 600",
    },
    {"question": "And ten times that?", "answer": "It is $<<600*10=6000>>6,000.\n#### 6,000"},
]
SVAMP = [
    {"ID": "s-1", "Body": "A jar holds 7 nuts", "Question": "How many do 3 jars hold?", "Equation": "( 7.0 * 3.0 )"}
    | {"Answer": 21.0, "Type": "Multiplication"},
    {"ID": "s-2", "Body": "Kim had 9.5 dollars.", "Question": "How much is left after 2?", "Equation": "( 9.5 - 2.0 )"}
    | {"Answer": 7.5, "Type": "Subtraction"},
]
ASDIV_XML = """<?xml version="1.0" encoding="UTF-8"?>
<Machine-Reading-Corpus-File>
  <ProblemSet>
    <Problem ID="demo-1" Grade="2" Source="nowhere">
      <Body>Lea sees 4 cats &amp; 5 dogs.</Body>
      <Question>How many animals does she see?</Question>
      <Solution-Type>Sum</Solution-Type>
      <Answer>9 (animals)</Answer>
      <Formula>4+5=9</Formula>
    </Problem>
    <Problem ID="demo-2" Grade="5" Source="nowhere">
      <Body></Body>
      <Question>Sort 3 and 2.</Question>
      <Solution-Type>Sort</Solution-Type>
      <Answer>2 (low); 3 (high)</Answer>
      <Formula>2;3</Formula>
    </Problem>
  </ProblemSet>
</Machine-Reading-Corpus-File>
"""
ASDIV_EXAMPLES = [
    Example("demo-1", "Lea sees 4 cats & 5 dogs. How many animals does she see?", "", "9"),
    Example("demo-2", "Sort 3 and 2.", "", "2; 3"),
]
EQUATIONS = [{"iIndex": 4, "sQuestion": "A tile costs 0.6 . How much do 3 cost ?", "lEquations": ["x=3*0.6"]}]
EQUATIONS[0] |= {"lSolutions": [1.8], "lAlignments": [1, 2]}
CHOICES = {"label": ["A", "B"], "text": ["a wet shore", "cupboard"]}
COMMONSENSE = [
    {
        "id": "c1",
        "answerKey": "B",
        "question": {
            "stem": "Where do cups stand?",
            "question_concept": "cups",
            "choices": [{"label": "A", "text": "a wet shore"}, {"label": "B", "text": "cupboard"}],
        },
    }
]
COMMONSENSE_FLAT = [
    {"id": "c1", "question": "Where do cups stand?", "question_concept": "cups", "choices": CHOICES, "answerKey": "B"}
]
COMMONSENSE_EXAMPLE = Example(
    "c1",
    "Where do cups stand? Answer Choices: (A) a wet shore (B) cupboard",
    "",
    "B",
    ("cups", "a wet shore", "cupboard"),
)
STRATEGY = [
    {"qid": "q1", "term": "Snow", "description": "cold", "question": "Does snow burn?", "answer": False}
    | {"facts": ["Snow is water. ", "Water does not burn."], "decomposition": ["Is it?"]}
]


def write(path, rows):
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n")
    return path


def read(path, **options):
    return read_examples(path, **{"require_rationale": False} | options)[0]


def test_gsm8k_without_its_calculator_marks(tmp_path):
    examples, report = read_examples(write(tmp_path / "train.jsonl", GSM8K))
    assert examples == [
        Example("train-1", GSM8K[0]["question"], "He sells 1200/2 = 600.\nSo 1200-600 = 600 are left.", "600"),
        Example("train-2", "And ten times that?", "It is $6,000.", "6000"),
    ]
    assert str(report) == "2 rows, 2 kept"


def test_svamp(tmp_path):
    path = write(tmp_path / "SVAMP.json", SVAMP)
    assert read(path) == [
        Example("s-1", "A jar holds 7 nuts. How many do 3 jars hold?", "", "21"),
        Example("s-2", "Kim had 9.5 dollars. How much is left after 2?", "", "7.5"),
    ]
    with pytest.raises(ValueError, match=r"SVAMP\.json:2: rationale is None"):
        read_examples(path)


def test_equations_take_the_place_of_rationales(tmp_path):
    def rationales(path, **options):
        examples, report = read_examples(path, rationale_form="equations", **options)
        return [example.rationale for example in examples], str(report)

    path = write(tmp_path / "train.jsonl", GSM8K)
    assert rationales(path) == (["1200 / 2 = 600\n1200 - 600 = 600", "600 * 10 = 6000"], "2 rows, 2 kept")
    (tmp_path / "svamp").mkdir()
    write(tmp_path / "svamp" / "SVAMP.json", SVAMP)
    # Those beside the data set are texts.
    write(tmp_path / "svamp" / "rationales.jsonl", [{"question": "A jar?", "rationale": "A text."}])
    assert rationales(tmp_path / "svamp") == (["7 * 3 = 21", "9.5 - 2 = 7.5"], "2 rows, 2 kept")
    (tmp_path / "ASDiv.xml").write_text(ASDIV_XML)
    assert rationales(tmp_path / "ASDiv.xml") == (["4 + 5 = 9"], "2 rows, 1 kept, 1 without equations")
    assert rationales(write(tmp_path / "questions.json", EQUATIONS))[0] == ["3 * 0.6 = 1.8"]
    multi = {"iIndex": 1, "sQuestion": "How many?", "lEquations": ["X=((5.0+3.0)*2.0)"], "lSolutions": [16.0]}
    assert rationales(write(tmp_path / "MultiArith.json", [multi]))[0] == ["5 + 3 = 8\n8 * 2 = 16"]
    plain = [{"question": "How much?", "rationale": "That is 3 * 4 = 12 dollars.", "answer": "12"}]
    assert rationales(write(tmp_path / "plain.jsonl", plain))[0] == ["3 * 4 = 12"]


def test_rows_whose_equations_make_no_rationale_are_counted_and_kept_to_be_asked(tmp_path):
    wrong = [{**SVAMP[0], "ID": "w", "Body": "Other", "Equation": "( 7.0 + 3.0 )"}]
    unled = [{"question": "And then?", "answer": "It is <<2+2=4>>4, doubled.\n#### 8"}]
    none = [{"question": "Why?", "answer": "So it is.\n#### 3"}]
    examples, report = read_examples(write(tmp_path / "a.json", SVAMP + wrong), rationale_form="equations")
    assert [e.id for e in examples] == ["s-1", "s-2"]
    assert str(report) == "3 rows, 2 kept, 1 with a wrong equation"
    path = write(tmp_path / "b.jsonl", GSM8K + unled + none)
    _, report = read_examples(path, rationale_form="equations")
    assert str(report) == "4 rows, 2 kept, 1 whose equations do not lead to the answer, 1 without equations"
    examples = read(path, rationale_form="equations")
    assert [bool(e.rationale) for e in examples] == [True, True, False, False]
    with pytest.raises(ValueError, match="holds no usable example"):
        read_examples(write(tmp_path / "c.jsonl", none), rationale_form="equations")


def test_rationale_form_is_checked(tmp_path):
    path = write(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(ValueError, match="rationale_form: is 'equation', must be one of text, equations"):
        read_examples(path, rationale_form="equation")
    with pytest.raises(ValueError, match="rationales: is given, must not be with rationale_form='equations'"):
        read_examples(path, rationale_form="equations", rationales=path)


def test_asdiv_in_xml_and_json(tmp_path):
    (tmp_path / "ASDiv.xml").write_text(ASDIV_XML)
    assert read(tmp_path / "ASDiv.xml") == ASDIV_EXAMPLES
    rows = [
        {"Body": "Lea sees 4 cats & 5 dogs.", "Question": "How many animals does she see?"},
        {"Body": "", "Question": "Sort 3 and 2."},
    ]
    rows[0] |= {"Answer": "9 (animals)", "Formula": "4+5=9"}
    rows[1] |= {"Answer": "2 (low); 3 (high)", "Formula": "2;3"}
    published = [{**row, "ID": f"demo-{number}"} for number, row in enumerate(rows, 1)]
    assert read(write(tmp_path / "asdiv.json", published)) == ASDIV_EXAMPLES
    lower = [{key.lower(): value for key, value in row.items()} for row in rows]
    assert [vars(e) | {"id": f"demo-{n}"} for n, e in enumerate(read(write(tmp_path / "x.jsonl", lower)), 1)] == [
        vars(e) for e in ASDIV_EXAMPLES
    ]


def test_singleeq_and_multiarith(tmp_path):
    assert read(write(tmp_path / "questions.json", EQUATIONS)) == [
        Example("questions-1", "A tile costs 0.6 . How much do 3 cost ?", "", "1.8")
    ]
    rows = [{"question": " A tile costs 2. How much do 3 cost? ", "final_ans": "6"}]
    assert read(write(tmp_path / "multi.jsonl", rows)) == [
        Example("multi-1", "A tile costs 2. How much do 3 cost?", "", "6")
    ]


def test_commonsense_qa_as_published_and_flat(tmp_path):
    assert read(write(tmp_path / "dev.jsonl", COMMONSENSE)) == [COMMONSENSE_EXAMPLE]
    assert read(write(tmp_path / "flat.jsonl", COMMONSENSE_FLAT)) == [COMMONSENSE_EXAMPLE]


def test_strategyqa(tmp_path):
    assert read_examples(write(tmp_path / "train.json", STRATEGY))[0] == [
        Example("q1", "Does snow burn?", "Snow is water. Water does not burn.", "no", ("Snow",))
    ]


@pytest.mark.parametrize("column", ["answer", "Answer", "final_answer", "expected_answer"])
def test_answers_that_csv_writes_otherwise(tmp_path, column):
    """As pandas writes a column of whole numbers with a gap, and one of booleans."""
    written = ["21.0", " 21.0 ", "-7.0", "0.50", "1,200.0", "True", "FALSE", "21.05", "true north"]
    path = tmp_path / "a.csv"
    with path.open("w") as file:
        csv.writer(file).writerows([["question", "rationale", column], *([f"Q{a}", "R", a] for a in written)])
    answers = [example.answer for example in read_examples(path)[0]]
    assert answers == ["21", "21", "-7", "0.50", "1,200.0", "yes", "no", "21.05", "true north"]


def test_questions_of_true_or_false(tmp_path):
    rows = [{"question": f"Is it {a}?", "rationale": "So.", "answer": a} for a in (True, False)]
    assert [e.answer for e in read_examples(write(tmp_path / "a.jsonl", rows))[0]] == ["yes", "no"]
    (row,) = STRATEGY
    path = tmp_path / "s.csv"
    with path.open("w") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    assert read_examples(path)[0] == read_examples(write(tmp_path / "s.json", STRATEGY))[0]


def test_plain_rows(tmp_path):
    rows = [
        {"id": 7, "question": "What?", "rationale": " So. ", "answer": "the sea", "keywords": ["sea", "wave"]},
        {"question": "How many?", "rationale": "Two.", "answer": 2, "source": "mine"},
        {"question": "How much?", "rationale": "A lot.", "answer": 12345678.25},
    ]
    assert read_examples(write(tmp_path / "my.jsonl", rows))[0] == [
        Example("7", "What?", "So.", "the sea", ("sea", "wave")),
        Example("my-2", "How many?", "Two.", "2"),
        Example("my-3", "How much?", "A lot.", "12345678.25"),
    ]


def test_rationales_from_another_file(tmp_path):
    write(tmp_path / "SVAMP.json", SVAMP)
    rows = [
        {"question": "a jar holds 7 nuts.  How many do 3 jars hold", "rationale": "7 * 3 = 21.", "correct": True},
        {
            "question": "A jar holds 7 nuts. How many do 3 jars hold?",
            "rationale": "Three times 7.",
            "keywords": ["jar"],
        },
        {"question": "A jar holds 7 nuts. How many do 3 jars hold?", "rationale": "7 + 3 = 10.", "correct": False},
        {"question": "Who knows this one?", "rationale": "Nobody."},
    ]
    write(tmp_path / "rationales.jsonl", rows)
    examples, report = read_examples(tmp_path)
    assert [(e.id, e.rationale, e.keywords) for e in examples] == [
        ("s-1", "7 * 3 = 21.", None),
        ("s-1-2", "Three times 7.", ("jar",)),
    ]
    assert report.rows == 2
    reasons = {"without a rationale": 1, "with a wrong rationale": 1, "rationales of no question": 1}
    assert report.left_out == reasons
    assert "1 with a wrong rationale" in str(report)
    # For evaluation every question is there, once, whatever its rationales.
    examples, report = read_examples(tmp_path, require_rationale=False)
    assert [(e.id, e.rationale) for e in examples] == [("s-1", "7 * 3 = 21."), ("s-2", "")]
    # They take the place of those that the data set has.
    other = write(tmp_path / "teacher.jsonl", [{"question": GSM8K[0]["question"], "rationale": "Half of 1200 is 600."}])
    examples, report = read_examples(write(tmp_path / "train.jsonl", GSM8K), rationales=other)
    assert [e.rationale for e in examples] == ["Half of 1200 is 600."]
    assert report.left_out == {"without a rationale": 1}


def test_repeated_rows_are_left_out_and_counted(tmp_path):
    rows = [{"question": q, "rationale": r, "answer": "1"} for q, r in (("A b?", "x"), ("a  B", "x"), ("A b?", "y"))]
    examples, report = read_examples(write(tmp_path / "a.jsonl", rows))
    assert [example.id for example in examples] == ["a-1", "a-3"]
    assert report.left_out == {"repeated": 1}
    assert [example.id for example in read(tmp_path / "a.jsonl")] == ["a-1"]


def test_a_folder_and_its_splits(tmp_path):
    write(tmp_path / "train.jsonl", GSM8K)
    write(tmp_path / "test.jsonl", GSM8K[:1])
    assert len(read_examples(tmp_path, split="train")[0]) == 2
    assert read_examples(tmp_path, split="test")[0][0].id == "test-1"
    for split in (None, "t", "dev"):
        with pytest.raises(ValueError, match=r"holds test\.jsonl, train\.jsonl; name one of them, or dataset_split"):
            read_examples(tmp_path, split=split)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(COMMONSENSE_FLAT), tmp_path / "dev.parquet")
    assert read(tmp_path / "dev.parquet") == [COMMONSENSE_EXAMPLE]
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "a", "answer": None}]), tmp_path / "dev.parquet")
    with pytest.raises(ValueError, match=r"dev\.parquet, row 1: answer is None"):
        read(tmp_path / "dev.parquet")


def test_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if config == "gone":
            raise ValueError("no such configuration\nhere")
        return GSM8K

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    examples = read_examples("openai/gsm8k:main", split="test")[0]
    assert examples[1].id == "gsm8k-2"
    read_examples("some/gsm8k", split="train")
    assert calls == [("openai/gsm8k", "main", "test"), ("some/gsm8k", None, "train")]
    with pytest.raises(ValueError, match="dataset_split: is not given, must name a split of openai/gsm8k"):
        read_examples("openai/gsm8k")
    with pytest.raises(ValueError, match=r"cannot load openai/gsm8k from the hub: no such configuration$"):
        read_examples("openai/gsm8k:gone", split="test")


@pytest.mark.parametrize(("module", "path"), [("datasets", "a/b"), ("pyarrow.parquet", "a.parquet")])
def test_without_the_extra_it_is_named(monkeypatch, tmp_path, module, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'mold-distill\[data\]'"):
        read_examples(path, split="train")


# Files as others write them

ROW = {"question": "Où est l'œuf, 3 ou 4?", "rationale": "3 + 1 = 4.", "answer": "4"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_what_a_byte_order_mark_says_is_read(tmp_path, name, encoding):
    text = json.dumps(ROW, ensure_ascii=False)
    if name == "a.csv":
        text = "question,rationale,answer\r\n" + ",".join(f'"{value}"' for value in ROW.values())
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_examples(tmp_path / name)[0] == [Example("a-1", **ROW)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("form", ["lines", "blank lines", "array", "array of many lines", "windows"])
def test_json_is_read_by_what_it_holds(tmp_path, name, form):
    rows = [json.dumps(ROW | {"answer": str(number)}) for number in range(3)]
    text = {
        "lines": "\n".join(rows),
        "blank lines": "\n\n" + "\n \n".join(rows) + "\n",
        "array": f"[{','.join(rows)}]",
        "array of many lines": json.dumps([json.loads(row) for row in rows], indent=2),
        "windows": "\r\n".join(rows) + "\r\n",
    }[form]
    (tmp_path / name).write_bytes(text.encode())
    assert [example.answer for example in read_examples(tmp_path / name)[0]] == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_another_encoding_names_file_line_and_byte(tmp_path, name):
    head = b"question,rationale,answer\n" if name == "a.csv" else b""
    body = b"x" * 20_000 + b"\n\nd\xe9j\xe0"
    (tmp_path / name).write_bytes(head + (b"[" if name == "a.json" else b"") + body)
    if name == "a.jsonl":  # its first lines are read before the last
        (tmp_path / name).write_bytes(json.dumps(ROW).encode() + b"\n\nd\xe9j\xe0")
    line = 4 if head else 3
    with pytest.raises(ValueError, match=rf"{name}:{line}: holds the byte 0xe9, must be UTF-8 \(Latin-1 or another"):
        read_examples(tmp_path / name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, delimiter):
    rows = [
        ["id", "question", "rationale", "answer", "keywords", "correct"],
        ["1", '"Two\nlines, 3; and ""4""?"', '"3 + 4 = 7."', "7", "", "True"],
        [],
        ["2", "x" * 200_000, "Long.", "8", '"[""x""]"', ""],
        ["3", "Wrong?", "So.", "9", "", "False"],
    ]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(delimiter.join(row) for row in rows))
    examples, report = read_examples(path)
    assert examples[0] == Example("1", 'Two\nlines, 3; and "4"?', "3 + 4 = 7.", "7")
    assert examples[1] == Example("2", "x" * 200_000, "Long.", "8", ("x",))
    assert report.left_out == {"with a wrong rationale": 1}


@pytest.mark.parametrize(
    ("row", "history"),
    [
        ({"instruction": "What is 2 + 2?", "output": "2 + 2 = 4. The answer is 4."}, ()),
        ({"instruction": "What is 2 + 2?", "input": "", "output": "2 + 2 = 4.\n#### 4"}, ()),
        ({"instruction": "What is", "input": "2 + 2?", "output": "2 + 2 = 4.\n#### 4"}, ()),
        ({"problem": "What is 2 + 2?", "solution": "2 + 2 = 4.", "answer": "4"}, ()),
        ({"Problem": "What is 2 + 2?", "Solution": "2 + 2 = 4.", "Answer": 4}, ()),
        ({"query": "What is 2 + 2?", "response": "2 + 2 = 4. The answer is: 4", "original_question": "x"}, ()),
        ({"question": "What is 2 + 2?", "generated_solution": "2 + 2 = 4.", "expected_answer": "4"}, ()),
        ({"question": "What is 2 + 2?", "rationale": "2 + 2 = 4.", "final_answer": "4"}, ()),
        ({"system_prompt": "Hm.", "question": "What is 2 + 2?", "response": "2 + 2 = 4.\nAnswer: 4"}, ("system",)),
        (
            {"instruction": "What is 2 + 2?", "output": "2 + 2 = 4.\nAnswer: 4", "history": [["Hi", "Hello"]]},
            ("user", "assistant"),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "What is 2 + 2?"},
                    {"from": "gpt", "value": "2 + 2 = 4.\nAnswer: 4"},
                ]
            },
            (),
        ),
    ],
)
def test_the_columns_of_common_sets(tmp_path, row, history):
    ((example,), _) = read_examples(write(tmp_path / "a.jsonl", [row]))
    assert " ".join(example.question.split()) == "What is 2 + 2?"
    assert (example.rationale, example.answer) == ("2 + 2 = 4.", "4")
    assert tuple(role for role, _ in example.history) == history


THOUGHT = "Three boxes of four.\n\nPerhaps 3 + 4 = 7? No, four in each.\n\n3 * 4 = 12."
SOLUTION = "Each box holds 4 mugs.\n\nSo the answer is $\\boxed{12}$."
ASKED = "There are 3 boxes with 4 mugs each. How many mugs are there?"
TAGGED = f"<think>\n{THOUGHT}\n</think>\n\n{SOLUTION}"
PIPED = (
    f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n"
    f"<|begin_of_solution|>\n\n{SOLUTION}\n\n<|end_of_solution|>"
)
S1K = {"solution": "12", "question": ASKED, "cot_type": "math", "source_type": "a", "metadata": "{}", "cot": None}
S1K_GRADED = S1K | {
    "gemini_thinking_trajectory": THOUGHT,
    "gemini_attempt": SOLUTION,
    "deepseek_thinking_trajectory": "I guess 13.",
    "deepseek_attempt": "\\boxed{13}",
}
OPENR1 = {"problem": ASKED, "solution": "3 * 4 = 12", "answer": "12", "problem_type": "Algebra", "uuid": "u"}
GENERATIONS = {
    "generations": ["<think>\nI guess 13.\n</think>\n\\boxed{13}", TAGGED],
    "correctness_math_verify": [False, True],
    "correctness_llama": None,
}


@pytest.mark.parametrize(
    "row",
    [
        {
            "system": "Write a <|begin_of_thought|> first.",
            "conversations": [{"from": "user", "value": ASKED}, {"from": "assistant", "value": PIPED}],
        },
        {
            "problem": ASKED,
            "deepseek_reasoning": THOUGHT,
            "deepseek_solution": SOLUTION,
            "ground_truth_solution": "12",
            "domain": "math",
            "test_cases": None,
        },
        {"domain": "math", "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": TAGGED}]},
        S1K | {"thinking_trajectories": [THOUGHT], "attempt": SOLUTION},
        S1K_GRADED | {"deepseek_grade": "No", "gemini_grade": "Yes"},
        OPENR1
        | GENERATIONS
        | {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TAGGED}]},
        OPENR1 | GENERATIONS,
        OPENR1 | GENERATIONS | {"correctness_math_verify": None, "correctness_llama": [False, True]},
        OPENR1 | {**GENERATIONS, "generations": [TAGGED, TAGGED], "correctness_math_verify": [True, True]},
        OPENR1 | {"generations": ["<think>\n12 or", TAGGED], "is_reasoning_complete": [False, True]},
        OPENR1 | GENERATIONS | {"answer": None},
    ],
    ids=[
        "openthoughts",
        "its-metadata",
        "openthoughts3",
        "s1k",
        "s1k-1.1",
        "openr1",
        "raw",
        "judged-by-llama",
        "both",
        "not-judged",
        "no-answer",
    ],
)
def test_reasoning_traces_as_they_are_published(tmp_path, row):
    ((example,), _) = read_examples(write(tmp_path / "a.jsonl", [row]))
    assert (example.question, example.rationale, example.answer) == (ASKED, THOUGHT, "12")


def test_the_first_graded_thought_is_taken(tmp_path):
    ((example,), _) = read_examples(write(tmp_path / "a.jsonl", [S1K_GRADED]))
    assert (example.rationale, example.answer) == ("I guess 13.", "13")


@pytest.mark.parametrize(
    "row",
    [
        S1K_GRADED | {"deepseek_grade": "No", "gemini_grade": "No"},
        OPENR1 | {**GENERATIONS, "correctness_math_verify": [False, False]},
        OPENR1 | GENERATIONS | {"is_reasoning_complete": [True, False]},
        OPENR1 | {**GENERATIONS, "generations": []},
    ],
    ids=["s1k", "openr1", "openr1-cut", "openr1-empty"],
)
def test_traces_to_wrong_answers_are_left_out_and_counted(tmp_path, row):
    good = row | {"question": "And now?"} if "question" in row else row | {"problem": "And now?"}
    if "problem" in row:
        good |= GENERATIONS
    good |= {"deepseek_grade": "Yes", "correctness_math_verify": [True, False], "is_reasoning_complete": [True, False]}
    examples, report = read_examples(write(tmp_path / "a.jsonl", [row, good]))
    assert [(example.question, example.rationale) for example in examples] == [("And now?", "I guess 13.")]
    assert str(report) == "2 rows, 1 kept, 1 with a wrong rationale"


def test_conversations_without_an_answer_are_left_out_and_counted(tmp_path):
    """A set of traces has programs and proofs among its answers."""
    program = f"<think>\n{THOUGHT}\n</think>\n\n```python\nn = 12\nprint(n)\n```"
    rows = [{"prompt": ASKED, "completion": text} for text in (program, TAGGED)]
    examples, report = read_examples(write(tmp_path / "a.jsonl", rows))
    assert [example.answer for example in examples] == ["12"]
    assert str(report) == "2 rows, 1 kept, 1 without an answer"
    with pytest.raises(ValueError, match=r"\(1 rows, 0 kept, 1 without an answer\); .*a\.jsonl.*: no answer found in"):
        read_examples(write(tmp_path / "a.jsonl", rows[:1]))


def test_problems_without_solutions_are_for_evaluation(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"ID": "p-1", "Problem": "What is 2 + 2?", "Answer": 4}])
    assert read(path) == [Example("p-1", "What is 2 + 2?", "", "4")]
    with pytest.raises(ValueError, match=r"rationale is None, .*the row has ID, Problem, Answer$"):
        read_examples(path)


def test_aqua(tmp_path):
    row = {"question": "What is half of 10?", "options": ["A)4", "B) 5"], "rationale": "10/2 = 5.", "correct": "B"}
    question = "What is half of 10? Answer Choices: (A) 4 (B) 5"
    assert read_examples(write(tmp_path / "dev.jsonl", [row]))[0] == [Example("dev-1", question, "10/2 = 5.", "B")]
    with pytest.raises(ValueError, match="correct is 'C', must be the letter of one of the options"):
        read_examples(write(tmp_path / "dev.jsonl", [row | {"correct": "C"}]))


def test_hostile_answers_take_linear_time(tmp_path):
    row = {"Body": "", "Question": "How many?", "Formula": "1"}
    for filling in (" " * 1_000_000, "(" * 1_000_000, " (" * 500_000, "(a)" * 300_000):
        read(write(tmp_path / "a.jsonl", [row | {"Answer": f"9{filling}9"}]))


# Wrong input names file and line

GOOD = '{"question": "a", "rationale": "b", "answer": "c"}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", f"{GOOD}\n\n{{oops", r"a\.jsonl:3: is no JSON"),
        ("a.jsonl", f"{GOOD}\n[1]", r"a\.jsonl:2: is a list, must be an object"),
        ("a.jsonl", f'{GOOD}\n{{"question": "d", "rationale": "e"}}', r"a\.jsonl:2: answer is None, must be a text"),
        ("a.jsonl", '{"question": "d", "rationale": " ", "answer": "1"}', r"a\.jsonl:1: rationale is ' '"),
        ("a.jsonl", '{"question": "d", "rationale": "e", "answer": NaN}', r"a\.jsonl:1: answer is nan"),
        ("a.jsonl", '{"question": "d", "rationale": "e", "answer": [true]}', r"a\.jsonl:1: answer is \[True\]"),
        ("a.jsonl", '{"question": 5, "rationale": "e", "answer": "1"}', r"a\.jsonl:1: question is 5"),
        ("a.jsonl", '{"question": "d", "rationale": "e", "answer": "1", "keywords": "x"}', "keywords is 'x'"),
        ("a.jsonl", '{"messages": [], "prompt": "x"}', r"a\.jsonl:1: .*messages is \[\], must be a text or a list"),
        ("a.jsonl", f'{GOOD[:-1]}, "id": 1}}\n{GOOD[:-3]}d", "id": 1}}', r"a\.jsonl:2: has the id '1' of .*jsonl:1"),
        ("a.jsonl", "\n", "holds no usable example"),
        ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", r"a\.json:2: the array ends or goes on without a comma"),
        ("a.json", f"[\n{GOOD},\n\n7]", r"a\.json:4: is a int, must be an object"),
        ("a.json", f"[{GOOD},\n{{]", r"a\.json:2: is no JSON"),
        ("a.json", f"[{GOOD}", r"a\.json:1: the array ends"),
        ("a.json", GOOD[:-1], r"a\.json:1: is no JSON"),
        ("a.xml", "<a>\n<b></a>", r"a\.xml:2: is no XML"),
        ("a.txt", "question,answer", "must end in .jsonl, .json, .csv, .tsv, .xml, .parquet"),
        ("a.csv", "question,answer\n1,2,3", r"a\.csv:2: has 3 values, must have 2: question, answer"),
        ("a.csv", 'question,rationale,answer\n"a\nb",c,d\ne,"f"g,h', r"a\.csv:4: is no CSV"),
        ("a.csv", "question,question\n1,2", "must name each, once"),
        ("a.csv", "question,answer,rationale,keywords\na,b,c,d", r"a\.csv:2: keywords is 'd', must be a list in JSON"),
        ("a.json", "[" * 100_000, r"a\.json:1: is nested too deep"),
        ("a.jsonl", f'{GOOD}\n{{"a":' + "[" * 100_000, r"a\.jsonl:2: is nested too deep"),
        ("a.jsonl", f"{GOOD}\n" + "9" * 5000, r"a\.jsonl:2: cannot be read as JSON \(Exceeds the limit"),
        ("a.jsonl", f'{GOOD[:-2]}\\ud83d"}}', r"a\.jsonl:1: answer: holds '\\ud83d' at character 1, one half"),
        ("a.jsonl", f'{GOOD[:-1]}, "keywords": ["\\udc00"]}}', r"a\.jsonl:1: keywords: holds '\\udc00'"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}',
            r"jsonl:1: rationale is None, .*; the row has question, answer$",
        ),
        ("a.jsonl", '{"text": "a", "label": 1}', r"jsonl:1: .*has the columns text, label; must have question, answer"),
        ("a.jsonl", '{"problem": "a", "query": "b", "solution": "c"}', "has problem and query, which say the same"),
        ("a.jsonl", '{"instruction": "a", "output": "no end"}', "no answer found in 'no end'"),
        ("a.xml", '<?xml version="1.0" encoding="klingon"?><a/>', r"a\.xml:1: is no XML"),
        ("a.parquet", "question", r"a\.parquet: is no Parquet that can be read"),
        (
            "a.jsonl",
            json.dumps(GSM8K[0]) + '\n{"question": "a", "answer": "no mark"}',
            r":2: .*no '#### result'.*gsm8k",
        ),
        ("a.jsonl", json.dumps(GSM8K[0]) + '\n{"question": "a"}', r"a\.jsonl:2: has no 'answer' \(read as gsm8k\)"),
        ("a.json", json.dumps([SVAMP[0] | {"Body": 5}]), r"a\.json:1: is malformed: .*svamp"),
        ("a.json", json.dumps([EQUATIONS[0] | {"lSolutions": [1, 2]}]), r"a\.json:1: is malformed: .*singleeq"),
        ("a.jsonl", json.dumps(COMMONSENSE[0] | {"answerKey": "Z"}), "answerKey is 'Z', must be one of the choices"),
        ("a.json", json.dumps([STRATEGY[0] | {"answer": "maybe"}]), "answer is 'maybe', must be true or false"),
    ],
)
def test_malformed_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_what_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"dataset: .*none\.jsonl does not exist"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"dataset: nowhere\.json does not exist"):
        read_examples("nowhere.json")
    with pytest.raises(ValueError, match="holds no data file"):
        read_examples(tmp_path)
    path = write(tmp_path / "a.json", SVAMP)
    with pytest.raises(ValueError, match=r"rationales: .*none\.jsonl does not exist"):
        read_examples(path, rationales=tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=f"dataset_format: is 'csv', must be auto, {', '.join(FORMATS)}"):
        read_examples(path, "csv")
    write(tmp_path / "r.jsonl", [{"question": "a"}])
    with pytest.raises(ValueError, match=r"r\.jsonl:1: has question; must have the keys question and rationale"):
        read_examples(path, rationales=tmp_path / "r.jsonl")


def problem(number, **more):
    return {
        "question": f"What is {number} + 1?",
        "rationale": f"{number} + 1 = {number + 1}.",
        "answer": number + 1,
    } | more


@pytest.fixture
def two_sets(tmp_path):
    """A JSON-lines file of three problems, and a CSV file of the same name elsewhere that has one of them too."""
    first, second = tmp_path / "one/train.jsonl", tmp_path / "two/train.csv"
    for path in (first, second):
        path.parent.mkdir()
    first.write_text("".join(json.dumps(problem(number)) + "\n" for number in (1, 2, 3)))
    second.write_text(
        "instruction,output,id\n"
        + "".join(f'What is {n} + 1?,"{n} + 1 = {n + 1}.\nThe answer is {n + 1}",\n' for n in (4, 5))
    )
    return first, second


def test_a_mixture_has_each_place_in_its_own_format(two_sets):
    examples, reports = read_mixture(two_sets)
    assert [example.answer for example in examples] == ["2", "3", "4", "5", "6"]
    assert [str(report) for report in reports.values()] == ["3 rows, 3 kept", "2 rows, 2 kept"]
    assert [*reports] == [str(path) for path in two_sets]
    alone = [example for path in two_sets for example in read_examples(path)[0]]
    assert [vars(e) | {"id": None} for e in examples] == [vars(e) | {"id": None} for e in alone]
    # Both files are called train: their rows' ids are told apart by the places.
    assert [e.id for e in examples[:3]] == [e.id for e in alone[:3]]
    assert [e.id for e in examples[3:]] == ["two/train.csv: train-1", "two/train.csv: train-2"]


def test_an_example_that_two_places_have_is_left_out_and_said(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    rows = [[problem(1), problem(2)], [problem(2), problem(3)], [problem(2, rationale="2 and 1 are 3."), problem(3)]]
    for path, some in zip(paths, rows, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    examples, reports = read_mixture(paths)
    assert [example.id for example in examples] == ["a-1", "a-2", "b-2", "c-1"]
    assert [str(report) for report in reports.values()] == [
        "2 rows, 2 kept",
        f"2 rows, 1 kept, 1 that {paths[0]} has too",
        f"2 rows, 1 kept, 1 that {paths[1]} has too",
    ]
    asked, reports = read_mixture(paths, require_rationale=False)
    assert [example.id for example in asked] == ["a-1", "a-2", "b-2"]
    assert reports[str(paths[2])].kept == 0


def test_mixtures_that_cannot_be_read(two_sets, tmp_path):
    first, second = two_sets
    with pytest.raises(ValueError, match=r"dataset: is .*train.jsonl, .*train.jsonl, must name each once"):
        read_mixture([first, str(first)])
    with pytest.raises(ValueError, match="rationales: is given, must not be with several data sets"):
        read_mixture(two_sets, rationales=first)
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        read_mixture([first, tmp_path / "none.jsonl"])
    second.write_text("question,rationale,answer\na,b\n")
    with pytest.raises(ValueError, match=r"train\.csv:2: has 2 values, must have 3"):
        read_mixture(two_sets)
    copies = [tmp_path / name / "one/train.jsonl" for name in ("x", "y", "z")]
    for number, path in enumerate(copies):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(problem(10 + number, id="same")) + "\n")
    with pytest.raises(ValueError, match=r"z.one.train\.jsonl has the id 'one/train\.jsonl: same' of an earlier place"):
        read_mixture(copies)
