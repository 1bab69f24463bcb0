import pytest
import yaml

from mold.data.answers import answer_kind, answers_match, extract_answer
from mold.data.examples import Example, question_key
from mold.data.segmentation import find_keywords
from mold.generation.keywords import parse_keywords
from mold.generation.prompting import load_prompt, prompt_for, prompt_ids, use_chat
from tests.tiny_tokenizers import make_tokenizer

TASKS = {"math": "number", "commonsense": "choice", "yes_no": "yes_no"}
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHAT
    yield tokenizer
    tokenizer.chat_template = None


@pytest.mark.parametrize("name", TASKS)
def test_packaged_prompts_are_whole(name):
    prompt = load_prompt(name)
    assert len({question_key(shot["question"]) for shot in prompt.shots}) == len(prompt.shots) >= 3
    for shot in prompt.shots:
        assert answer_kind(shot["answer"]) == TASKS[name]
        assert answers_match(extract_answer(f"{shot['rationale']}\nAnswer: {shot['answer']}"), shot["answer"])
        if name == "math":
            assert answers_match(extract_answer(shot["rationale"]), shot["answer"])
        if name == "commonsense":
            assert f"({shot['answer']}) " in shot["question"]
    assert prompt.hint.format(question="Q?", answer="7").startswith("Q?\n")
    assert "7" in prompt.hint.format(question="Q?", answer="7")
    assert load_prompt(name, 0).shots == ()
    assert load_prompt(name, 2).shots == prompt.shots[:2]


def test_the_key_words_of_the_packaged_prompt_stand_in_its_texts():
    for shot in load_prompt("keywords").shots:
        assert parse_keywords("; ".join(shot["keywords"])) == shot["keywords"]
        for word in shot["keywords"]:
            assert find_keywords(f"{shot['question']} {shot['rationale']}", [word]), word


def test_a_prompt_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"instruction": "Do.", "shots": []}))
    assert load_prompt(str(path)).instruction == "Do."
    assert load_prompt(str(path)).hint == ""
    for text in ("shots: []", "- 1", "instruction: a\nshots: 5", "a: [", "instruction: a\nshots: []\nhint: '{other}'"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"prompt: .*mine\.yaml must hold instruction, shots and maybe hint"):
            load_prompt(str(path))


def test_prompts_that_there_are_not():
    with pytest.raises(ValueError, match="prompt: is 'maths', must be one of commonsense, keywords, math, yes_no, or"):
        load_prompt("maths")
    for number in (-1, 5):
        with pytest.raises(ValueError, match=f"num_shots: is {number}, must be from 0 to the 4 that 'math' has"):
            load_prompt("math", number)


def test_the_prompt_for_a_data_set():
    def examples(*answers):
        return [Example("a", "q", "", answer) for answer in answers]

    assert prompt_for(examples("5", "-2.5")) == "math"
    assert prompt_for(examples("A", "E")) == "commonsense"
    assert prompt_for(examples("yes", "no")) == "yes_no"
    with pytest.raises(ValueError, match="prompt: is auto, but the answers are of the kinds number, text"):
        prompt_for(examples("5", "Paris"))


def test_plain_and_chat_prompts(chat_tokenizer):
    turns = [("Question: 1?", "One.\nAnswer: 1")]

    def text(chat):
        return chat_tokenizer.decode(prompt_ids(chat_tokenizer, "Do.", turns, "Question: 2?", "\nReasoning:", chat))

    assert text(False) == "Do.\n\nQuestion: 1?\nReasoning: One.\nAnswer: 1\n\nQuestion: 2?\nReasoning:"
    assert text(True) == ("[user] Do.\n\nQuestion: 1?\n[assistant] One.\nAnswer: 1\n[user] Question: 2?\n[go]")


def test_whether_to_chat(chat_tokenizer):
    assert [use_chat(chat_tokenizer, chat) for chat in ("auto", "on", "off")] == [True, True, False]
    chat_tokenizer.chat_template = None
    assert [use_chat(chat_tokenizer, chat) for chat in ("auto", "off")] == [False, False]
    with pytest.raises(ValueError, match="chat: is 'on', but the teacher's tokenizer has no chat template"):
        use_chat(chat_tokenizer, "on")
    with pytest.raises(ValueError, match="chat: is 'yes', must be 'auto', 'on' or 'off'"):
        use_chat(chat_tokenizer, "yes")
