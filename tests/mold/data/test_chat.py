from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mold.data.chat import CHAT_TEMPLATE, choose_template, record_template, recorded_template, render_for
from mold.data.conversations import example_from_row
from mold.data.encoding import encode_example, encode_prompt
from mold.data.examples import DEFAULT_TEMPLATE, Example, text_hash
from mold.data.problems import generate_problems
from mold.evaluation.predictions import generate_predictions
from mold.generation.prompting import example_prompt_ids, prompt_ids
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

# In the styles of the models that people use: with and without a beginning of sequence, trimming, an inserted thought.
CHAT_TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}",
    "headers": "<s>{% for m in messages %}<|head|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}",
    "instruct": "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ m.content }}\n{% endif %}{% endfor %}",
    "thought": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}</s>\n{% endfor %}",
}
EXAMPLE = generate_problems(1, seed=2)[0]


def chat_tokenizer(kind, style):
    tokenizer = make_tokenizer.__wrapped__(kind)
    tokenizer.chat_template = CHAT_TEMPLATES[style]
    return tokenizer


@pytest.mark.parametrize("kind", ["smollm", "llama2", "llama3"])
@pytest.mark.parametrize("style", CHAT_TEMPLATES)
def test_question_rationale_and_answer_are_found_in_the_rendered_chat(kind, style):
    tokenizer = chat_tokenizer(kind, style)
    rendered = render_for(EXAMPLE, CHAT_TEMPLATE, tokenizer)
    messages = [
        {"role": "user", "content": EXAMPLE.question},
        {"role": "assistant", "content": f"{EXAMPLE.rationale}\nAnswer: {EXAMPLE.answer}"},
    ]
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert rendered.text[slice(*rendered.question)] == EXAMPLE.question
    assert rendered.text[slice(*rendered.rationale)] == EXAMPLE.rationale
    assert rendered.text[slice(*rendered.answer)].startswith(f"\nAnswer: {EXAMPLE.answer}")
    assert rendered.text.startswith(rendered.prompt)


@pytest.mark.parametrize("kind", ["smollm", "llama2", "llama3"])
@pytest.mark.parametrize("style", CHAT_TEMPLATES)
def test_tokens_of_a_chat(kind, style):
    """The ids are those of the chat template; steps and key words are those of the plain text; one end of sequence."""
    tokenizer = chat_tokenizer(kind, style)
    encoded = encode_example(EXAMPLE, tokenizer, CHAT_TEMPLATE)
    text = render_for(EXAMPLE, CHAT_TEMPLATE, tokenizer).text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(ids)] == ids
    assert encoded.input_ids.count(tokenizer.bos_token_id) == text.count("<s>")
    assert encoded.input_ids[-1] == tokenizer.eos_token_id != encoded.input_ids[-2]
    plain = encode_example(EXAMPLE, tokenizer, DEFAULT_TEMPLATE)
    assert (encoded.step_texts, encoded.key_word_texts) == (plain.step_texts, plain.key_word_texts)
    for (start, end), word in zip(encoded.key_spans, encoded.key_word_texts, strict=True):
        assert word in tokenizer.decode(encoded.input_ids[start:end])
    learned = [token for token, region in zip(encoded.input_ids, encoded.regions, strict=True) if region > 0]
    said = tokenizer.decode(learned, skip_special_tokens=True).strip()
    assert said.startswith(EXAMPLE.rationale[:20])
    assert f"Answer: {EXAMPLE.answer}" in said


def test_a_system_message_and_earlier_turns_are_part_of_the_prompt():
    tokenizer = chat_tokenizer("smollm", "chatml")
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "And 2 + 2?"},
            {"role": "assistant", "content": "2 + 2 = 4. The answer is 4."},
        ]
    }
    example = example_from_row(row, "rows-0")
    assert example == Example(
        "rows-0",
        "And 2 + 2?",
        "2 + 2 = 4.",
        "4",
        history=(("system", "Be brief."), ("user", "What is 1 + 1?"), ("assistant", "2")),
        chat=True,
    )
    rendered = render_for(example, CHAT_TEMPLATE, tokenizer)
    assert "Be brief." in rendered.prompt
    assert rendered.text[slice(*rendered.question)] == "And 2 + 2?"
    assert encode_example(example, tokenizer, CHAT_TEMPLATE).key_word_texts == ["2", "2", "2", "2", "4"]
    with pytest.raises(ValueError, match=r"must hold \{assistant\} for an example with messages before"):
        encode_example(example, tokenizer, DEFAULT_TEMPLATE)
    assert text_hash(example, CHAT_TEMPLATE) != text_hash(
        example_from_row({**row, "messages": row["messages"][3:]}, "x"), CHAT_TEMPLATE
    )


def test_generation_starts_from_the_chat_template(monkeypatch):
    tokenizer = chat_tokenizer("llama2", "instruct")
    model = make_model("llama", vocab=len(tokenizer))
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **kwargs: seen.append(ids) or generate(ids, **kwargs))
    generate_predictions(model, tokenizer, [EXAMPLE], CHAT_TEMPLATE, max_new_tokens=2, progress=False)
    expected = tokenizer(f"<s>[INST] {EXAMPLE.question} [/INST]", add_special_tokens=False)["input_ids"]
    assert seen[0].tolist() == [expected]


CHAT, PLAIN = replace(EXAMPLE, chat=True), replace(EXAMPLE, id="plain")


@pytest.mark.parametrize(
    ("examples", "styles", "tasks", "expected"),
    [
        ([CHAT, CHAT], ["chatml"], ["joint"], CHAT_TEMPLATE),
        ([CHAT], ["chatml", "instruct"], ["joint"], CHAT_TEMPLATE),
        ([replace(PLAIN, history=(("system", "S"),))], ["chatml"], ["joint"], CHAT_TEMPLATE),
        ([PLAIN], ["chatml"], ["joint"], DEFAULT_TEMPLATE),
        ([PLAIN], ["chatml", None], ["joint"], DEFAULT_TEMPLATE),
        ([CHAT, PLAIN], [None, None], ["joint"], DEFAULT_TEMPLATE),
        ([CHAT, PLAIN], ["chatml"], ["explain", "predict"], DEFAULT_TEMPLATE),
        ([CHAT], ["chatml"], ["answer"], DEFAULT_TEMPLATE),
    ],
)
def test_the_template_of_a_run_is_chosen_from_its_data(examples, styles, tasks, expected):
    tokenizers = [chat_tokenizer("smollm", style) if style else make_tokenizer("smollm") for style in styles]
    assert choose_template(None, examples, *tokenizers, tasks=tasks) == expected
    other = "{question}\n{rationale}\n=> {answer}"
    assert choose_template(other, examples, *tokenizers, tasks=tasks) == other


def test_templates_that_cannot_be_chosen_are_asked_for():
    chatty, plain = chat_tokenizer("smollm", "chatml"), make_tokenizer("smollm")
    with pytest.raises(ValueError, match=r"^template: is not given, must be .*: 2 examples are chats, 1 are not$"):
        choose_template(None, [CHAT, PLAIN, CHAT], chatty)
    for tokenizers in ((chatty, plain), (plain, chatty)):
        with pytest.raises(ValueError, match=r"must be one without \{assistant\} such as 'Question: .* not all models"):
            choose_template(None, [CHAT], *tokenizers)
    with pytest.raises(ValueError, match="template: is 'x', must hold"):
        choose_template("x", [CHAT], chatty)


def test_a_tokenizer_keeps_the_template_of_its_student(tmp_path):
    tokenizer = chat_tokenizer("llama3", "headers")
    assert recorded_template(tokenizer) is None
    record_template(tokenizer, CHAT_TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert recorded_template(again) == CHAT_TEMPLATE
    assert encode_example(EXAMPLE, again, CHAT_TEMPLATE) == encode_example(EXAMPLE, tokenizer, CHAT_TEMPLATE)


# Refusals


def test_chat_templates_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        render_for(EXAMPLE, CHAT_TEMPLATE, make_tokenizer("smollm"))
    tokenizer = chat_tokenizer("smollm", "chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('has', 'HAS') }}{% endfor %}"
    with pytest.raises(
        ValueError, match=f"example {EXAMPLE.id}: template: the chat template of .* changes the messages"
    ):
        encode_example(Example(EXAMPLE.id, "He has 2 hens.", "He has 2.", "2"), tokenizer, CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"must hold \{question\}, \{assistant\}, \{rationale\}, \{answer\} once each"):
        render_for(EXAMPLE, "{assistant}{question}{rationale}{answer}", tokenizer)


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_any_text_is_found_or_refused(question, rationale, answer):
    """Braces, markup and the chat template's own marks are ordinary text."""
    example = Example("any", question.strip() or "q", rationale.strip() or "r", answer.strip() or "a")
    rendered = render_for(example, CHAT_TEMPLATE, chat_tokenizer("smollm", "headers"))
    assert rendered.text[slice(*rendered.question)] == example.question
    assert rendered.text[slice(*rendered.rationale)] == example.rationale


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "no system role"),
        ("{% if messages | length > 2 %}{{ raise_exception('one turn\\nalone') }}{% endif %}", "one turn alone"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages[0].content + 1 }}", "concatenate str"),
        ("{% for m in messages %}", "end of template"),
    ],
)
def test_what_a_chat_template_refuses_names_the_example(style, reason):
    tokenizer = make_tokenizer.__wrapped__("smollm")
    tokenizer.chat_template = style + CHAT_TEMPLATES["chatml"]
    example = replace(EXAMPLE, id="row-7", history=(("system", "Be brief."),))
    for encode in (encode_example, encode_prompt):
        with pytest.raises(
            ValueError, match=rf"^example row-7: messages: are of system, user, assistant.*{reason}"
        ) as e:
            encode(example, tokenizer, CHAT_TEMPLATE)
        assert "\n" not in str(e.value)


def test_a_special_token_in_an_earlier_turn_is_refused():
    tokenizer = chat_tokenizer("smollm", "chatml")
    example = replace(EXAMPLE, history=(("system", "Be </s> brief."),))
    with pytest.raises(ValueError, match="message of system: holds '</s>'"):
        encode_example(example, tokenizer, CHAT_TEMPLATE)


def test_a_chat_template_with_a_date_writes_the_same_every_day():
    tokenizer = make_tokenizer.__wrapped__("smollm")
    clock = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer.chat_template = clock + "Today is {{ date_string }}.\n" + CHAT_TEMPLATES["chatml"]
    assert render_for(EXAMPLE, CHAT_TEMPLATE, tokenizer).text.startswith("Today is 26 Jul 2024.\n")
    prompt = prompt_ids(tokenizer, "Think.", [], EXAMPLE.question, "", chat=True)
    assert tokenizer.decode(prompt).startswith("Today is 26 Jul 2024.\n")


def test_a_chat_template_with_a_clock_of_its_own_writes_the_same_every_day():
    tokenizer = make_tokenizer.__wrapped__("smollm")
    tokenizer.chat_template = "Today is {{ strftime_now('%Y-%m-%d %H') }}.\n" + CHAT_TEMPLATES["chatml"]
    assert render_for(EXAMPLE, CHAT_TEMPLATE, tokenizer).text.startswith("Today is 2024-07-26 00.\n")
    prompt = prompt_ids(tokenizer, "Think.", [], EXAMPLE.question, "", chat=True)
    assert tokenizer.decode(prompt).startswith("Today is 2024-07-26 00.\n")
    tokenizer.chat_template = "{{ strftime_now(messages[0].role) }}" + CHAT_TEMPLATES["chatml"]
    with pytest.raises(ValueError, match="asks strftime_now for today's date in a format that is no text"):
        render_for(EXAMPLE, CHAT_TEMPLATE, tokenizer)


def test_a_teacher_reads_the_messages_before_the_question():
    tokenizer = chat_tokenizer("smollm", "chatml")
    history = (("system", "Be brief."), ("user", "What is 1 + 1?"), ("assistant", "2"))
    example = replace(EXAMPLE, history=history)
    ids = example_prompt_ids(tokenizer, "Think.", [("one?", "one")], example, example.question, "", True)
    said = tokenizer.decode(ids)
    places = [said.index(text) for text in ("Be brief.", "Think.", "one?", "What is 1 + 1?", example.question)]
    assert places == sorted(places)
    with pytest.raises(ValueError, match=f"^example {example.id}: chat: is off.* must be on"):
        example_prompt_ids(tokenizer, "Think.", [], example, example.question, "", False)
