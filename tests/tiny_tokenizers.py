"""Small real tokenizers of the kinds that models have, trained on generated problems."""

import functools
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mold.data.examples import render
from mold.data.problems import generate_problems

KINDS = ["gpt2", "smollm", "llama2", "llama3", "bert"]


@functools.cache
def make_tokenizer(kind, vocab=400):
    """A fast tokenizer with bos, eos and padding tokens.

    gpt2: byte-level BPE, the space before a word is part of its token and of its offsets, numbers are one word.
    smollm: likewise, with every digit a token.
    llama2: metaspace BPE with byte fallback, a space is put before the text, bos is added.
    llama3: byte-level BPE with digits in groups of three, bos is added, the text's offsets include spaces.
    bert: WordPiece, spaces are dropped.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama2", unk_token=None))
    special = ["<s>", "</s>", "<pad>"]
    options = {"vocab_size": vocab, "special_tokens": special, "show_progress": False}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
    if kind == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    elif kind == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif kind == "llama3":
        words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    elif kind == "llama2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
        )
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    elif kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special.append("<unk>")
        options["initial_alphabet"] = list(string.printable)
    if kind in ("gpt2", "smollm", "llama3"):
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if kind == "llama2":
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        options["vocab_size"] = vocab + 256
    trainer = trainers.WordPieceTrainer(**options) if kind == "bert" else trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator([render(e).text for e in generate_problems(60, seed=9)], trainer)
    if kind in ("llama2", "llama3"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    elif kind in ("gpt2", "smollm"):
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
