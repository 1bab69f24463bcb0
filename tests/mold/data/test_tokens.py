"""Phrases of a text become spans of its tokens."""

import pytest
from transformers import PreTrainedTokenizer

import mold
from mold.data.tokens import tokenize
from tests.tiny_tokenizers import KINDS, make_tokenizer

TEXT = "Sara has 12 apples and 3 pears. Sara eats 12 pears: how many apples are left?"


def texts_of(tokenizer, spans, text=TEXT, **options):
    """What the tokens of each span stand for."""
    offsets = tokenize(tokenizer, text, **options)[1]
    return [text[offsets[start][0] : offsets[end - 1][1]].strip() for start, end in spans.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_phrases_are_found_by_their_tokens(kind):
    tokenizer = make_tokenizer(kind)
    first = mold.token_spans(tokenizer, TEXT, ["apples", "12 pears", "Sara"])
    assert texts_of(tokenizer, first) == ["apples", "12 pears", "Sara"]
    assert first[2, 0] == (kind in ("llama2", "llama3"))  # behind the token that begins a text
    last = mold.token_spans(tokenizer, TEXT, ["apples", "Sara"], which="last")
    assert texts_of(tokenizer, last) == ["apples", "Sara"]
    assert (last > first[[0, 2]]).all()
    every = mold.token_spans(tokenizer, TEXT, ["Sara", "apples"], which="all")
    assert every.tolist() == [*(spans[row].tolist() for row in (0, 1) for spans in (first[[2, 0]], last[[1, 0]]))]


def test_a_phrase_has_every_token_that_has_a_character_of_it():
    tokenizer = make_tokenizer("gpt2")
    whole = mold.token_spans(tokenizer, TEXT, ["many apples"])
    inside = mold.token_spans(tokenizer, TEXT, ["any apple"])
    assert inside.tolist() == whole.tolist()
    assert len(mold.token_spans(tokenizer, "aaa", ["aa"], which="all")) == 2  # occurrences may overlap


def test_the_text_of_a_chat_template_holds_its_special_tokens():
    tokenizer = make_tokenizer("llama3")
    text = "<s>" + TEXT
    (span,) = mold.token_spans(tokenizer, text, ["Sara"], special_tokens=False).tolist()
    assert span[0] == 1
    assert tokenizer(text, add_special_tokens=False)["input_ids"][span[0]] != tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("phrases", "options", "message"),
    [
        (["pear", "plum"], {}, "phrases: holds 'plum', which the text does not have"),
        (["pear", ""], {}, "phrases: is .* none of them empty"),
        ([], {}, "phrases: is .* must be a list"),
        ("pear", {}, "phrases: is 'pear', must be a list"),
        (["pear"], {"which": "second"}, "which: is 'second'"),
    ],
)
def test_what_cannot_be_found_is_refused(phrases, options, message):
    with pytest.raises(ValueError, match=message):
        mold.token_spans(make_tokenizer("gpt2"), TEXT, phrases, **options)


def test_blanks_that_no_token_has_are_refused():
    with pytest.raises(ValueError, match="' ' at character 4 has no token"):
        mold.token_spans(make_tokenizer("bert"), TEXT, [" "])


def test_a_slow_tokenizer_is_refused():
    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self):
            return {}

    with pytest.raises(ValueError, match="tokenizer: is Slow, must be a fast one: slow ones"):
        mold.token_spans(Slow(), TEXT, ["apples"])
