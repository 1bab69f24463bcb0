import re
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import ByT5Tokenizer

from mold.data.encoding import Collator, encode_example, encode_prompt
from mold.data.examples import ANSWER, DEFAULT_TEMPLATE, PROMPT, RATIONALE, Example, render
from mold.data.problems import generate_problems
from tests.tiny_tokenizers import KINDS, make_tokenizer

MESSY = Example(
    "messy",
    "Tom's shop sold 12 mugs at $1,200.50 each\nand Mr. Lee paid 1/2 of it at 9 a.m. on the 3rd.  How much?",
    "Step 1: Half of 1,200.50 is 600.25.\n2) For 12 mugs: 12 * 600.25 = 7203. So 48/2 = 24.",
    "7203",
)
EXAMPLES = [*generate_problems(25, seed=5), MESSY]


@pytest.mark.parametrize("kind", KINDS)
def test_spans_hold_the_words_they_stand_for(kind):
    tokenizer = make_tokenizer(kind)
    for example in EXAMPLES:
        encoded = encode_example(example, tokenizer, DEFAULT_TEMPLATE)
        for spans, texts in (
            (encoded.row_spans, encoded.step_texts),
            (encoded.key_spans, encoded.key_word_texts),
        ):
            for (start, end), text in zip(spans, texts, strict=True):
                decoded = tokenizer.decode(encoded.input_ids[start:end])
                shown, wanted = ("".join(part.split()) for part in (decoded, text))
                assert wanted in shown
                assert len(shown) - len(wanted) <= 3, f"{decoded!r} for {text!r}"  # "/2", "$1" share a token


def test_every_tokenizer_finds_the_same_steps_and_key_words():
    encoded = [[encode_example(e, make_tokenizer(kind), DEFAULT_TEMPLATE) for e in EXAMPLES] for kind in KINDS]
    for first, *others in zip(*encoded, strict=True):
        assert len(first.row_spans) >= 3
        assert len(first.key_spans) >= 6
        for other in others:
            assert (other.step_texts, other.key_word_texts) == (first.step_texts, first.key_word_texts)
            assert other.row_spans != first.row_spans or other.key_spans != first.key_spans


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_what_generation_must_produce(kind):
    tokenizer = make_tokenizer(kind)
    for example in EXAMPLES:
        encoded = encode_example(example, tokenizer, DEFAULT_TEMPLATE)
        prompt = tokenizer(render(example).prompt)["input_ids"]
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.regions[: len(prompt)] == [PROMPT] * len(prompt)
        assert set(encoded.regions[len(prompt) :]) == {RATIONALE, ANSWER}
        assert encoded.regions == sorted(encoded.regions)
        assert encoded.input_ids[-1] == tokenizer.eos_token_id
        learned = [t for t, r in zip(encoded.input_ids, encoded.regions, strict=True) if r == ANSWER]
        assert "".join(tokenizer.decode(learned, skip_special_tokens=True).split()).endswith(example.answer)


def test_without_end_of_sequence():
    tokenizer = make_tokenizer("smollm")
    ended = encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE)
    open_ended = encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE, append_eos=False)
    assert ended.input_ids == [*open_ended.input_ids, tokenizer.eos_token_id]


def test_a_text_that_is_too_long_is_refused_whole():
    tokenizer = make_tokenizer("smollm")
    length = len(encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE).input_ids)
    encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE, max_length=length)
    with pytest.raises(ValueError, match=rf"example messy: has {length} tokens, more than max_length={length - 1}"):
        encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE, max_length=length - 1)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer is a slow tokenizer"):
        encode_example(MESSY, ByT5Tokenizer(), DEFAULT_TEMPLATE)


def test_a_tokenizer_that_cannot_end_a_sequence_is_refused():
    tokenizer = make_tokenizer.__wrapped__("smollm")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE)


def test_an_empty_rationale_names_the_example():
    with pytest.raises(ValueError, match="example bare: rationale must hold text"):
        encode_example(Example("bare", "How many?", "", "3"), make_tokenizer("smollm"), DEFAULT_TEMPLATE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches(side):
    tokenizer = make_tokenizer("smollm")
    short, long, bare = (encode_example(e, tokenizer, DEFAULT_TEMPLATE) for e in (EXAMPLES[0], MESSY, EXAMPLES[1]))
    signals = [torch.rand(3, len(e.row_spans), len(e.key_spans)) for e in (short, long)]
    items = [
        {"example": short, "signal": signals[0]},
        {"example": long, "signal": signals[1]},
        {"example": bare, "signal": None},
    ]
    batch = Collator(tokenizer.pad_token_id, side, pad_to_multiple_of=16)(items)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["num_steps"].tolist() == [len(short.row_spans), len(long.row_spans), 0]
    assert batch["num_keys"].tolist() == [len(short.key_spans), len(long.key_spans), 0]
    for index, example in enumerate((short, long, bare)):
        real = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][real].tolist() == example.input_ids
        assert batch["regions"][index][real].tolist() == example.regions
        assert (batch["input_ids"][index][~real] == tokenizer.pad_token_id).all()
        assert (batch["regions"][index][~real] == PROMPT).all()
        assert real[-1 if side == "left" else 0]
        for spans, name in ((example.row_spans, "row_spans"), (example.key_spans, "key_spans")):
            padded = batch[name][index].tolist()
            for (start, end), (first, last) in zip(spans, padded, strict=False):
                assert batch["input_ids"][index, first:last].tolist() == example.input_ids[start:end]
            assert all(first == last for first, last in padded[len(spans) :])
    for index, signal in enumerate(signals):
        held = batch["teacher_attention"][index]
        assert torch.equal(held[:, : signal.shape[1], : signal.shape[2]], signal)
        assert held.sum().item() == pytest.approx(signal.sum().item(), rel=1e-5)
    assert not batch["teacher_attention"][2].any()
    assert "teacher_attention" not in Collator(0)([items[2]])


# Tokens that a text is made of, and no others

CODE = Example("code", "Ann has 7 pens.\n\tHow many?", "if a:\n    a = 7  # it\n\n\t  So 9 .\n  The end", "9  9")


def trimming(tokenizer, kind):
    """The tokenizer with offsets that lose their blanks, alone, as RoBERTa's, or as one of several processors."""
    byte_level = processors.ByteLevel(trim_offsets=True)
    ends = {name: (name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = {
        "alone": byte_level,
        "roberta": processors.RobertaProcessing(ends["</s>"], ends["<s>"], trim_offsets=True, add_prefix_space=False),
        "sequence": processors.Sequence(
            [byte_level, processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[*ends.values()])]
        ),
    }[kind]
    return tokenizer


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, "{question}\n{rationale}\n\n{answer}\n"])
@pytest.mark.parametrize("kind", ["alone", "roberta", "sequence"])
def test_blanks_are_learned_where_offsets_are_trimmed(kind, template):
    tokenizer = trimming(make_tokenizer.__wrapped__("gpt2"), kind)
    before = tokenizer.backend_tokenizer.post_processor.__getstate__()
    for example in (CODE, *EXAMPLES):
        encoded = encode_example(example, tokenizer, template)
        rendered = render(example, template)
        learned = [t for t, r in zip(encoded.input_ids, encoded.regions, strict=True) if r != PROMPT]
        assert tokenizer.decode(learned) == rendered.text[len(rendered.prompt) :] + "</s>"
        answer = [t for t, r in zip(encoded.input_ids, encoded.regions, strict=True) if r == ANSWER]
        assert tokenizer.decode(answer) == rendered.text[rendered.answer[0] :] + "</s>"
        plain = encode_example(example, make_tokenizer("gpt2"), template)
        shift = len(encoded.input_ids) - len(plain.input_ids)
        assert encoded.row_spans == [(start + shift, end + shift) for start, end in plain.row_spans]
    assert tokenizer.backend_tokenizer.post_processor.__getstate__() == before


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("end", ["</s>", "<pad>"])
def test_what_a_tokenizer_adds_behind_a_text_is_left_to_us(end, append_eos):
    tokenizer = make_tokenizer.__wrapped__("gpt2")
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", end)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}", special_tokens=special
    )
    encoded = encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE, append_eos=append_eos)
    plain = encode_example(MESSY, make_tokenizer("gpt2"), DEFAULT_TEMPLATE, append_eos=append_eos)
    assert encoded.input_ids == [tokenizer.bos_token_id, *plain.input_ids]
    assert encoded.regions == [PROMPT, *plain.regions]
    prompt = encode_prompt(MESSY, tokenizer, DEFAULT_TEMPLATE)
    assert encoded.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("part", ["question", "rationale", "answer"])
@pytest.mark.parametrize("spelling", ["</s>", "<s>", "<pad>", "<|im_end|>", "<|tool|>"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_spelling_of_a_special_token_is_refused(kind, spelling, part):
    tokenizer = make_tokenizer.__wrapped__(kind)
    assert encode_example(MESSY, tokenizer, DEFAULT_TEMPLATE).id == "messy"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    text = getattr(MESSY, part)
    example = replace(MESSY, **{part: f"{text[:5]}{spelling}{text[5:]}"})
    for encode in (encode_example, encode_prompt):
        with pytest.raises(ValueError, match=rf"example messy: {part}: holds {re.escape(repr(spelling))}"):
            encode(example, tokenizer, DEFAULT_TEMPLATE)
    # A template may hold them: whoever writes it means them.
    template = f"{spelling}{DEFAULT_TEMPLATE}"
    assert tokenizer.convert_tokens_to_ids(spelling) in encode_example(MESSY, tokenizer, template).input_ids


def test_positions_count_from_the_first_token_with_padding_on_the_left():
    tokenizer = make_tokenizer("smollm")
    items = [{"example": encode_example(e, tokenizer, DEFAULT_TEMPLATE)} for e in (MESSY, EXAMPLES[0])]
    assert "position_ids" not in Collator(tokenizer.pad_token_id)(items)
    batch = Collator(tokenizer.pad_token_id, "left", pad_to_multiple_of=16)(items)
    for item, positions, mask in zip(items, batch["position_ids"], batch["attention_mask"], strict=True):
        assert positions[mask.bool()].tolist() == list(range(len(item["example"].input_ids)))
        assert not positions[~mask.bool()].any()
