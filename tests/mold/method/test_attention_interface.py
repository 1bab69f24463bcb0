"""The "mold" attention in transformers: ordinary use equals sdpa, spans give pooled attention, the rest is refused."""

from unittest import mock

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache
from transformers.masking_utils import create_chunked_causal_mask

from mold.method.attention_interface import LayerAttention, mold_attention_forward, stack_attention, use_mold_attention
from tests.tiny_models import FAMILIES, make_model, plain_attention

SPANS = {
    "row_spans": torch.tensor([[[0, 5], [5, 12]], [[2, 9], [0, 0]]], dtype=torch.int32),
    "key_spans": torch.tensor([[[1, 2], [6, 8], [9, 10]], [[3, 5], [0, 0], [0, 0]]], dtype=torch.int32),
}


def make_inputs(padding=None, length=12):
    ids = torch.randint(1, 97, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, length, dtype=torch.int64)
    if padding == "left":
        mask[1, :2] = 0
    elif padding == "right":
        mask[1, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_spans_it_is_an_ordinary_attention(family, padding):
    inputs = make_inputs(padding)
    results = []
    for attention in ("mold", plain_attention(family)):
        model = make_model(family, attention=attention).train()
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.detach().abs().max())


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_and_left_padding(family, cache):
    inputs = make_inputs("left")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"use_cache": False} if cache is None else {"cache_implementation": cache}
    generated = [
        make_model(family, attention=name).eval().generate(**inputs, **options)
        for name in ("mold", plain_attention(family))
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_change_no_output_and_give_one_map_a_layer(family):
    model = make_model(family).eval()
    inputs = make_inputs("left")
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
        out = model(**inputs, **SPANS, output_attentions=True, value_features=True, use_cache=False)
    torch.testing.assert_close(out.logits, plain, rtol=1e-5, atol=1e-5)
    assert stack_attention(out.attentions).shape == (3, 2, 2, 3)
    assert not stack_attention(out.attentions)[:, 1, 1:].any()
    for layer in out.attentions:
        assert isinstance(layer, LayerAttention)
        assert layer.value_features.shape == (2, 64 if family in ("gpt2", "gpt_neox") else 32)
    with torch.no_grad():
        means = model(**inputs, **SPANS, output_attentions=True, row_reduction="mean", use_cache=False).attentions
    lengths = torch.tensor([[5, 7], [7, 1]])[:, :, None]
    torch.testing.assert_close(means[0].attention * lengths, out.attentions[0].attention)
    assert means[0].value_features is None


def test_padding_is_not_attended_to():
    model = make_model("llama").eval()
    inputs = make_inputs("left")
    with torch.no_grad():
        padded = model(**inputs, **SPANS, output_attentions=True, value_features=True, use_cache=False)
        alone = model(
            input_ids=inputs["input_ids"][1:, 2:],
            row_spans=SPANS["row_spans"][1:, :1] - 2,
            key_spans=SPANS["key_spans"][1:, :1] - 2,
            output_attentions=True,
            value_features=True,
            use_cache=False,
        )
    for with_padding, without in zip(padded.attentions, alone.attentions, strict=True):
        torch.testing.assert_close(with_padding.attention[1:, :1, :1], without.attention)
        torch.testing.assert_close(with_padding.value_features[1:], without.value_features, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_counts_only_where_it_is_shorter_than_the_text():
    inputs = make_inputs()
    plain = make_model("mistral").eval()(**inputs, **SPANS, output_attentions=True, use_cache=False)
    for window in (12, 6):
        out = make_model("mistral", sliding_window=window).eval()(
            **inputs, **SPANS, output_attentions=True, use_cache=False
        )
        assert torch.equal(out.attentions[0].attention, plain.attentions[0].attention) == (window == 12)


def test_attention_in_chunks_is_no_window_and_refused():
    model = make_model("mistral", sliding_window=None).eval()
    chunked = create_chunked_causal_mask
    model.config.attention_chunk_size = 5
    with mock.patch("transformers.models.mistral.modeling_mistral.create_causal_mask", chunked):
        model(**make_inputs(), use_cache=False)
        with pytest.raises(ValueError, match="chunked attention"):
            model(**make_inputs(), **SPANS, output_attentions=True, use_cache=False)


def test_packed_sequences_are_refused_with_spans_and_right_without():
    positions = torch.tensor([[*range(7), *range(5)]] * 2)
    ids = make_inputs()["input_ids"]
    model = make_model("llama").eval()
    expected = make_model("llama", attention="sdpa").eval()(input_ids=ids, position_ids=positions, use_cache=False)
    actual = model(input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(actual.logits, expected.logits)
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=ids, position_ids=positions, use_cache=False, **SPANS)


def test_attention_dropout_is_refused_by_its_option():
    with pytest.raises(ValueError, match=r"attn_pdrop: is 0\.1"):
        make_model("gpt2", attn_pdrop=0.1).train()(**make_inputs(), **SPANS, use_cache=False)
    with pytest.raises(ValueError, match=r"attention_dropout: is 0\.2"):
        make_model("llama", attention_dropout=0.2).train()(**make_inputs(), **SPANS, use_cache=False)
    make_model("llama", attention_dropout=0.2).eval()(**make_inputs(), **SPANS, use_cache=False)
    make_model("gpt2", attn_pdrop=0.1).train()(**make_inputs("left"))


@pytest.mark.parametrize(
    ("causal", "width", "options", "message"),
    [
        (True, 8, {}, "v: is torch.float32"),
        (False, 16, {}, "Linear: is a bidirectional attention, must be causal"),
        (True, 16, {"position_bias": torch.zeros(1)}, "Linear: uses position_bias"),
    ],
)
def test_attention_of_another_kind_is_refused(causal, width, options, message):
    module = torch.nn.Linear(1, 1)
    module.is_causal = causal
    states = [torch.zeros(2, 2, 12, size) for size in (16, 16, width)]
    with pytest.raises(ValueError, match=message):
        mold_attention_forward(module, *states, None, **SPANS, **options)


def test_packed_texts_are_told_by_cu_seqlens():
    """Each text as if it stood alone, whatever its neighbours are; padding beside it is refused."""
    model = make_model("llama").eval()
    ids = make_inputs()["input_ids"]
    options = {"output_attentions": True, "value_features": True, "use_cache": False}
    packed = {"input_ids": ids.reshape(1, -1), "position_ids": torch.arange(12).repeat(2)[None]}
    ones = torch.ones(1, 24, dtype=torch.int64)
    with torch.no_grad():
        apart = model(input_ids=ids, **SPANS, **options)
        together = model(
            **packed, attention_mask=ones, cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32), **SPANS, **options
        )
        ordinary = model(
            **packed, attention_mask=ones, cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32), use_cache=False
        )
        for layer in model.train().model.layers:
            layer.self_attn.attention_dropout = 1e-9
        with_dropout = model(
            **packed, attention_mask=ones, cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32), use_cache=False
        )
    model.eval()
    for out in (together, ordinary, with_dropout):
        torch.testing.assert_close(out.logits.reshape(apart.logits.shape), apart.logits, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(together.attentions, apart.attentions, strict=True):
        torch.testing.assert_close(mine.attention, theirs.attention)
        torch.testing.assert_close(mine.value_features, theirs.value_features)
    ones[0, -1] = 0
    with pytest.raises(ValueError, match="cu_seqlens: is given with padding or a mask"):
        model(
            **packed, attention_mask=ones, cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32), **SPANS, **options
        )


def test_spans_over_a_cache_and_single_spans_are_refused():
    model = make_model("llama").eval()
    inputs = make_inputs()
    cache = DynamicCache()
    model(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="whole sequence"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, **SPANS)
    with pytest.raises(ValueError, match="key_spans: is None"):
        model(**inputs, row_spans=SPANS["row_spans"], use_cache=False)


def test_an_empty_capture_is_an_error():
    inputs = make_inputs()
    for attention, options in (("sdpa", {"output_attentions": True}), ("mold", {}), ("mold", SPANS)):
        out = make_model("llama", attention=attention).eval()(**inputs, **options, use_cache=False)
        with pytest.raises(ValueError, match="attentions: holds nothing"):
            stack_attention(out.attentions or ())
    eager = make_model("llama", attention="eager").eval()(**inputs, output_attentions=True, use_cache=False)
    with pytest.raises(ValueError, match="attentions: holds 3 of Tensor"):
        stack_attention(eager.attentions)


def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM: its attention cannot be replaced"):
        use_mold_attention(model)
