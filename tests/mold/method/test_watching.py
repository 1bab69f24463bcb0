"""What a watch sees is what eager attention computes, and what it watches computes what it does without."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, Cache, DynamicCache, StaticCache
from transformers.models.bloom.modeling_bloom import BloomConfig, BloomForCausalLM

import mold
from mold.method import watched_interfaces, watched_layer, watched_rows
from tests.covering import covering
from tests.tiny_models import FAMILIES, make_model, plain_attention

GENERATION = {"max_new_tokens": 17, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PADDING = 3
GENERATIONS = covering(
    FAMILIES,
    ["eager", "sdpa", "mold"],
    ["dynamic", "static"],
    [0, PADDING],
    possible=lambda family, attention, *_: attention != "sdpa" or plain_attention(family) == "sdpa",
)


def make_inputs(padding=0, length=14, batch=2):
    ids = torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@contextmanager
def float64_softmax():
    """Eager attention rounds to float32 in its softmax, whatever the model's dtype is."""
    plain = torch.nn.functional.softmax

    def softmax(scores, dim=-1, dtype=None, **options):
        return plain(scores, dim=dim, dtype=scores.dtype if scores.dtype == torch.float64 else dtype)

    with mock.patch("torch.nn.functional.softmax", softmax):
        yield


@torch.no_grad()
def eager_maps(model, tokens, mask, name="attentions", **inputs):
    """Maps of all layers [B, H, T, T]; zero in rows that are padding, which eager attention spreads evenly."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    position_ids = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with float64_softmax():
        out = model(
            input_ids=tokens, attention_mask=mask, **position_ids, **inputs, output_attentions=True, use_cache=False
        )
    return [maps.nan_to_num() * mask[:, None, :, None] for maps in out[name]]


def grown(mask, length):
    return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], 1)


def generate(model, inputs, **options):
    return model.generate(**inputs, **(GENERATION | options))


def assert_equal(seen, expected):
    assert len(seen) == len(expected)
    for actual, maps in zip(seen, expected, strict=True):
        torch.testing.assert_close(actual, maps, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "attention", "cache", "padding"), GENERATIONS)
def test_every_row_of_a_generation_is_that_of_eager(family, attention, cache, padding, monkeypatch):
    monkeypatch.setattr(watched_layer, "_WAITING", 5)
    if cache == "dynamic":
        monkeypatch.setattr(watched_rows, "_BLOCK_ELEMENTS", 500)
    model = make_model(family, attention=attention, dtype=torch.float64).eval()
    inputs = make_inputs(padding)
    with float64_softmax():
        plain = generate(model, inputs, cache_implementation=cache)
        with mold.watch(model, rows="all") as seen:
            watched = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(plain, watched)
    mask = grown(inputs["attention_mask"], plain.shape[1])[:, :-1]
    assert_equal(seen.attention, eager_maps(model, plain[:, :-1], mask))
    assert seen.positions == list(range(30))


def test_flex_attention():
    """Its mask is a function; uncompiled, since compiling it takes a minute."""
    model = make_model("gemma2", attention="flex_attention", dtype=torch.float64).eval()
    inputs = make_inputs(PADDING)

    def plain(function):
        return lambda *args, _compile=None, training=None, **options: function(*args, **options)

    with (
        mock.patch("transformers.masking_utils.create_block_mask", plain(create_block_mask)),
        mock.patch("transformers.integrations.flex_attention.compile_friendly_flex_attention", plain(flex_attention)),
        mold.watch(model, rows="all") as seen,
    ):
        tokens = generate(model, inputs, max_new_tokens=3)
    mask = grown(inputs["attention_mask"], tokens.shape[1])[:, :-1]
    assert_equal(seen.attention, eager_maps(model, tokens[:, :-1], mask))


@pytest.fixture(params=["whole", "blocks"])
def block_size(request, monkeypatch):
    """Rows in one block, or in kernels and, where a mask is there, in several blocks."""
    if request.param == "blocks":
        monkeypatch.setattr(watched_rows, "_BLOCK_ELEMENTS", 300)


@pytest.mark.parametrize(
    ("heads", "padding", "block_size"),
    covering(["all", "group", "mean"], [0, PADDING], ["whole", "blocks"]),
    indirect=["block_size"],
)
@pytest.mark.usefixtures("block_size")
def test_last_rows_heads_and_key_spans(heads, padding):
    """Seven query heads of one key head, windows in some layers; spans of the prompt and of what is generated."""
    model = make_model("gemma3", attention="sdpa", heads=7, kv_heads=1, dtype=torch.float64).eval()
    inputs = make_inputs(padding)
    with float64_softmax(), mold.watch(model, [(3, 6), (14, 20), (0, 0)], "last:4", [1, -1], heads) as seen:
        tokens = generate(model, inputs)
    mask = grown(inputs["attention_mask"], tokens.shape[1])[:, :-1]
    maps = eager_maps(model, tokens[:, :-1], mask)
    maps = [of_heads(maps[layer][:, :, 10:], heads, 1) for layer in (1, 2)]
    assert_equal(
        seen.attention, [torch.stack([m[..., 3:6].sum(-1), m[..., 14:20].sum(-1), 0 * m[..., 0]], -1) for m in maps]
    )
    assert seen.names == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert seen.positions == list(range(10, 30))


def of_heads(maps, heads, groups):
    if heads == "all":
        return maps
    return maps.unflatten(1, (groups if heads == "group" else 1, -1)).mean(2)


@pytest.mark.parametrize(
    ("reduction", "attention", "chunks", "padding", "block_size"),
    covering(["mean", "sum", "max"], ["sdpa", "mold"], [False, True], [0, PADDING], ["whole", "blocks"], strength=3),
    indirect=["block_size"],
)
@pytest.mark.usefixtures("block_size")
def test_row_spans_of_the_prompt_and_a_row_for_each_generated_token(reduction, attention, chunks, padding):
    model = make_model("mistral_window", attention=attention, dtype=torch.float64).eval()
    inputs, spans = make_inputs(padding), [[(0, 6), (5, 12)], [(4, 5), (0, 0)]]
    options = {"prefill_chunk_size": 5} if chunks else {}
    with mold.watch(model, rows=spans, row_reduction=reduction) as seen:
        tokens = generate(model, inputs, **options)
    mask = grown(inputs["attention_mask"], tokens.shape[1])[:, :-1]
    expected = []
    for maps in eager_maps(model, tokens[:, :-1], mask):
        pooled = maps.new_zeros(2, 4, 2, 30)
        for example, of_example in enumerate(spans):
            for index, (start, end) in enumerate(of_example):
                if start < end:
                    rows = maps[example, :, start:end]
                    pooled[example, :, index] = rows.amax(1) if reduction == "max" else getattr(rows, reduction)(1)
        expected.append(torch.cat([pooled, maps[:, :, 14:]], 2))
    for actual, maps in zip(seen.attention, expected, strict=True):
        torch.testing.assert_close(actual, maps, rtol=1e-9, atol=1e-11)
    assert seen.positions == [-1, -1, *range(14, 30)]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "mold"])
@pytest.mark.parametrize("rows", ["all", "last:5", [(2, 9)]])
def test_without_a_cache_rows_are_those_with_one(attention, rows):
    model = make_model("llama", attention=attention, dtype=torch.float64).eval()
    seen = []
    for use_cache in (False, True):
        with float64_softmax(), mold.watch(model, rows=rows) as one:
            generate(model, make_inputs(), use_cache=use_cache)
        seen.append(one)
    assert_equal(seen[0].attention, seen[1].attention)
    assert seen[0].positions == seen[1].positions


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "mold"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt_oss"])
def test_rows_behind_padding_and_windows_take_the_kernels(family, attention, padding, monkeypatch):
    if attention == "sdpa" and plain_attention(family) != "sdpa":
        pytest.skip("sdpa leaves out sinks")
    monkeypatch.setattr(watched_rows, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(watched_rows, "_in_blocks", mock.Mock(side_effect=AssertionError("no kernel was taken")))
    model = make_model(family, attention=attention, dtype=torch.float64).eval()
    inputs = make_inputs(padding)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), float64_softmax(), mold.watch(model, rows="all", heads="group") as seen:
        model(**inputs, position_ids=position_ids)
    expected = eager_maps(model, inputs["input_ids"], inputs["attention_mask"])
    assert_equal(seen.attention, [of_heads(maps, "group", 2) for maps in expected])


def test_a_row_of_padding_on_the_right_is_zero():
    """Whatever a model computes there; in one block as in kernels."""
    model = make_model("llama", attention="sdpa", dtype=torch.float64).eval()
    inputs = {name: tensor.flip(1) for name, tensor in make_inputs(PADDING).items()}
    with torch.no_grad(), mold.watch(model, rows="all") as seen:
        model(**inputs)
    assert_equal(seen.attention, eager_maps(model, inputs["input_ids"], inputs["attention_mask"]))


@pytest.mark.parametrize("change", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("window", [None, 7])
def test_a_mask_that_is_more_than_padding_and_a_window_is_read(change, window):
    model = make_model("mistral", attention="sdpa", dtype=torch.float64, sliding_window=window).eval()
    inputs = make_inputs(PADDING)
    making = transformers.models.mistral.modeling_mistral
    name = "create_causal_mask" if window is None else "create_sliding_window_causal_mask"
    plain = getattr(making, name)
    even = {change: lambda batch, head, row, key: key % 2 == 0}
    with torch.no_grad(), mock.patch.object(making, name, lambda *args, **options: plain(*args, **options, **even)):
        with mold.watch(model, rows="all") as seen:
            model(**inputs)
        model.set_attn_implementation("eager")
        with float64_softmax():
            expected = model(**inputs, output_attentions=True).attentions
    for actual, maps in zip(seen.attention, expected, strict=True):
        torch.testing.assert_close(actual[0], maps[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(actual[1, :, PADDING + 1 :], maps[1, :, PADDING + 1 :], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("family", "without"), [("mistral_window", 0), ("gemma2", 1), ("gpt_oss", 1)])
def test_the_log_sum_exp_of_our_own_attention_is_taken(family, without, monkeypatch):
    """A layer is without that is whole, and torch's attention computes."""
    monkeypatch.setattr(watched_rows, "_BLOCK_ELEMENTS", 300)
    model = make_model(family, attention="mold", dtype=torch.float64).eval()
    inputs = make_inputs()
    again = mock.Mock(wraps=watched_rows.attention_lse)
    monkeypatch.setattr(watched_rows, "attention_lse", again)
    with torch.no_grad():
        plain = model(**inputs).logits
        with mold.watch(model, rows="all", heads="mean") as seen:
            watched = model(**inputs).logits
    assert torch.equal(plain, watched)
    assert again.call_count == without
    expected = eager_maps(model, inputs["input_ids"], inputs["attention_mask"])
    assert_equal(seen.attention, [of_heads(maps, "mean", 1) for maps in expected])


@pytest.mark.parametrize("rows", ["last:5", "last:12", "all"])
def test_rows_of_a_prompt_wait_for_those_of_its_tokens(rows, monkeypatch):
    """Whether they are settled before, between or behind."""
    model = make_model("llama", attention="sdpa", dtype=torch.float64).eval()
    inputs, found = make_inputs(), []
    for waiting in (1, 7, 16, 256):
        monkeypatch.setattr(watched_layer, "_WAITING", waiting)
        with mold.watch(model, rows=rows) as seen:
            tokens = generate(model, inputs)
        found.append(seen)
    first = {"last:5": 9, "last:12": 2, "all": 0}[rows]
    expected = eager_maps(model, tokens[:, :-1], torch.ones_like(tokens[:, :-1]))
    for seen in found:
        assert seen.positions == list(range(first, 30))
        assert_equal(seen.attention, [maps[:, :, first:] for maps in expected])


def test_a_prompt_cached_before_and_a_forward_over_it():
    """Tq != Tk, and both kinds of caches of any length."""
    model = make_model("qwen2", attention="sdpa", dtype=torch.float64).eval()
    inputs = make_inputs()
    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=40)):
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, :9], past_key_values=cache)
            with mold.watch(model, rows="all") as seen:
                model(input_ids=inputs["input_ids"][:, 9:], past_key_values=cache)
        expected = eager_maps(model, **{"tokens": inputs["input_ids"], "mask": inputs["attention_mask"]})
        assert_equal(seen.attention, [maps[:, :, 9:] for maps in expected])
        assert seen.positions == list(range(9, 14))


def test_rejected_drafts_leave_no_row():
    model = make_model("llama", attention="sdpa", dtype=torch.float64).eval()
    draft = make_model("llama", attention="sdpa", dtype=torch.float64, seed=1, layers=1).eval()
    inputs = make_inputs(batch=1)
    with mold.watch(model, rows="all") as seen:
        tokens = generate(model, inputs, assistant_model=draft)
    assert seen.positions == list(range(30))
    assert_equal(seen.attention, eager_maps(model, tokens[:, :-1], torch.ones_like(tokens[:, :-1])))


@pytest.mark.parametrize("rows", ["all", [(0, 9)]])
def test_drafts_rejected_at_the_end_leave_neither_row_nor_key(rows):
    """Of a prompt that repeats itself more is drafted than is to be written."""
    model = make_model("llama", attention="sdpa", dtype=torch.float64).eval()
    ids = make_inputs(batch=1)["input_ids"].repeat(1, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with mold.watch(model, rows=rows, heads="mean") as seen:
        tokens = generate(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=9)
    maps = eager_maps(model, tokens[:, :-1], torch.ones_like(tokens[:, :-1]))
    maps = [of_heads(layer, "mean", 1) for layer in maps]
    if rows == "all":
        assert seen.positions == list(range(36))
    else:
        maps = [
            torch.cat([layer[:, :, :9].mean(2, keepdim=True), layer[:, :, seen.positions[1:]]], 2) for layer in maps
        ]
    assert_equal(seen.attention, maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_models_are_seen_in_float32(dtype):
    model = make_model("llama", attention="sdpa", dtype=dtype, head_dim=18).eval()
    inputs = make_inputs(PADDING)
    with torch.no_grad(), mold.watch(model, rows="all") as seen:
        model(**inputs)
    expected = eager_maps(model, inputs["input_ids"], inputs["attention_mask"])
    for actual, maps in zip(seen.attention, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, maps.float(), rtol=0.1, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
        torch.testing.assert_close(actual.sum(-1)[:, :, -1], torch.ones(2, 4))


# --- other models than decoders ---


def tiny_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return transformers.BertForMaskedLM(config)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, PADDING])
def test_an_encoder(attention, padding):
    model = tiny_bert().double().eval()
    model.set_attn_implementation(attention)
    inputs = make_inputs(padding)
    with torch.no_grad(), float64_softmax(), mold.watch(model, rows="all") as seen:
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        expected = model(**inputs, output_attentions=True).attentions
    assert_equal(seen.attention, expected)
    assert seen.names[1] == "bert.encoder.layer.1.attention.self"


def test_an_image_encoder():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=12, patch_size=4
    )
    model = transformers.ViTModel(config).double().eval()
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad(), float64_softmax(), mold.watch(model, rows=[(0, 1)], heads="mean", layers=[-1]) as seen:
        model(pixels)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        expected = model(pixels, output_attentions=True).attentions
    assert_equal(seen.attention, [expected[1].mean(1, keepdim=True)[:, :, :1]])


def tiny_whisper():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **{"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8},
        **{"max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    )
    return transformers.WhisperForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cross_attention_while_generating(attention):
    model = tiny_whisper()
    model.set_attn_implementation(attention)
    features = torch.randn(2, 8, 40, dtype=torch.float64)
    start = torch.tensor([[1, 5, 7], [1, 8, 9]])
    run = transformers.GenerationMixin.generate  # Whisper's own cuts audio into pieces
    options = {**GENERATION, "decoder_input_ids": start}
    with float64_softmax():
        plain = run(model, features, **options)
        with (
            mold.watch(model, rows="all", layers="*.encoder_attn") as cross,
            mold.watch(model, rows="all") as own,
            mold.watch(model, rows="all", layers=["model.encoder.*"]) as encoder,
        ):
            tokens = run(model, features, **options)
    assert torch.equal(tokens, plain)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        out = model(features, decoder_input_ids=tokens[:, :-1], output_attentions=True, use_cache=False)
    assert_equal(cross.attention, out.cross_attentions)
    assert_equal(own.attention, out.decoder_attentions)
    assert_equal(encoder.attention, out.encoder_attentions)
    assert cross.names == [f"model.decoder.layers.{layer}.encoder_attn" for layer in (0, 1)]
    assert own.names == [f"model.decoder.layers.{layer}.self_attn" for layer in (0, 1)]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_decoder_with_an_encoder_and_every_cache(cache):
    torch.manual_seed(0)
    config = transformers.BartConfig(
        **{"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).double().eval()
    inputs = make_inputs(PADDING)
    with mold.watch(model, rows="all", layers="*encoder_attn") as cross, mold.watch(model, rows="all") as own:
        tokens = generate(model, inputs, cache_implementation=cache)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        out = model(**inputs, decoder_input_ids=tokens[:, :-1], output_attentions=True, use_cache=False)
    assert_equal(cross.attention, out.cross_attentions)
    assert_equal(own.attention, out.decoder_attentions)


def test_windows_on_both_sides():
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    )
    model = transformers.ModernBertModel(config).double().eval()
    model.set_attn_implementation("sdpa")
    inputs = make_inputs(PADDING)
    with torch.no_grad(), mold.watch(model, rows="all") as seen:
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        expected = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for actual, maps in zip(seen.attention, expected, strict=True):
        torch.testing.assert_close(actual[0], maps[0])
        torch.testing.assert_close(actual[1, :, real[1]], maps[1, :, real[1]])


def test_a_position_bias():
    torch.manual_seed(0)
    config = transformers.T5Config(
        **{
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    inputs = make_inputs(PADDING)
    names = ["encoder.*", "*.SelfAttention", "*.EncDecAttention"]
    with float64_softmax(), mold.watch(model, rows="all", layers=names) as seen:
        tokens = generate(model, inputs, max_new_tokens=6)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        out = model(**inputs, decoder_input_ids=tokens[:, :-1], output_attentions=True, use_cache=False)
    if not out.encoder_attentions:
        pytest.skip("this version of transformers returns no maps of T5")
    found = dict(zip(seen.names, seen.attention, strict=True))
    assert len(found) == 6
    for part, kind, expected in (
        ("encoder", "SelfAttention", out.encoder_attentions),
        ("decoder", "SelfAttention", out.decoder_attentions),
        ("decoder", "EncDecAttention", out.cross_attentions),
    ):
        assert_equal([found[name] for name in found if name.startswith(part) and name.endswith(kind)], expected)


def tiny_qwen2_vl():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        **{"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
    )
    return transformers.Qwen2VLForConditionalGeneration(config).double().eval()


def test_a_vision_language_model():
    """Numbers are of its text; the images of its vision tower do not see each other."""
    model = tiny_qwen2_vl()
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    images = [92, *[90] * 4, 93, 92, 90, 90, 93]
    ids = torch.tensor([[5, *images, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid}
    inputs |= {"pixel_values": torch.randn(24, 3 * 2 * 16, dtype=torch.float64)}
    inputs |= {"mm_token_type_ids": (ids == 90).int()}
    with float64_softmax():
        options = {"bad_words_ids": [[90], [91]]}  # no images are generated
        plain = generate(model, inputs, **options)
        with mold.watch(model, rows="all") as seen, mold.watch(model, rows="all", layers="model.visual*") as vision:
            tokens = generate(model, inputs, **options)
    assert torch.equal(tokens, plain)
    assert seen.names == [f"model.language_model.layers.{layer}.self_attn" for layer in (0, 1)]
    model.set_attn_implementation("eager")
    inputs["input_ids"], inputs["attention_mask"] = tokens[:, :-1], torch.ones_like(tokens[:, :-1])
    inputs["mm_token_type_ids"] = (tokens[:, :-1] == 90).int()
    with torch.no_grad(), float64_softmax():
        expected = model(**inputs, output_attentions=True, use_cache=False).attentions
    assert_equal(seen.attention, expected)
    for maps in vision.attention:
        assert maps.shape == (1, 2, 24, 24)
        assert not maps[:, :, :16, 16:].any()
        assert not maps[:, :, 16:, :16].any()
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


# --- nothing changes, and all is restored ---


def is_open():
    return (AttentionInterface.get_interface, Cache.crop) != tuple(
        watched_interfaces._plain[key] for key in ((AttentionInterface, "get_interface"), (Cache, "crop"))
    )


def assert_closed(model):
    assert not is_open()
    assert not watched_interfaces._watched
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_watches_are_nested_and_other_models_run_beside_them():
    model, other = (make_model("llama", attention="sdpa", seed=seed).eval() for seed in (0, 1))
    inputs = make_inputs()
    with torch.no_grad():
        expected = other(**inputs).logits
        with mold.watch(model, rows="all") as outer:
            with mold.watch(model, rows="last:1", layers=[0]) as inner:
                model(**inputs)
            assert is_open()
            assert torch.equal(other(**inputs).logits, expected)
    torch.testing.assert_close(outer.attention[0][:, :, -1:], inner.attention[0], rtol=1e-5, atol=1e-6)
    assert_closed(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "mold"])
def test_a_training_step_is_the_same_bit_for_bit(attention):
    gradients = []
    for watched in (False, True):
        model = make_model("llama", attention=attention).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = make_inputs()
        if watched:
            with mold.watch(model) as seen:
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            assert not seen.attention[0].requires_grad
            assert seen.attention[0].shape == (2, 4, 14, 14)
        else:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding", [0, PADDING])
def test_a_gradient_where_it_is_asked_for(padding, checkpointing):
    gradients = []
    inputs = make_inputs(padding)
    real = inputs["attention_mask"][:, None, :, None]
    for attention in ("sdpa", "eager"):
        model = make_model("llama", attention=attention, dtype=torch.float64).train()
        if attention == "sdpa":
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with mold.watch(model, rows="all", grad=True) as seen:
                model(**inputs, use_cache=False)
                sum((maps * real).square().sum() for maps in seen.attention).backward()
        else:
            with float64_softmax():
                maps = model(**inputs, use_cache=False, output_attentions=True).attentions
                sum((m.nan_to_num() * real).square().sum() for m in maps).backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_reentrant_checkpoints_which_cut_the_gradient_are_refused():
    model = make_model("llama", attention="sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    ids = make_inputs()["input_ids"]
    with mold.watch(model, rows="all", grad=True):
        loss = model(input_ids=ids, labels=ids).loss
        with pytest.raises(ValueError, match="use_reentrant"):
            loss.backward()


def test_an_error_inside_restores_the_model():
    model = make_model("llama", attention="sdpa").eval()
    with pytest.raises(KeyError, match="mine"), mold.watch(model):
        raise KeyError("mine")
    assert_closed(model)
    message = "keys: are spans of 3 examples, must be of 1 or 2"
    with pytest.raises(ValueError, match=message), mold.watch(model, keys=[[(0, 1)]] * 3):
        model(**make_inputs())
    assert_closed(model)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "some"}, "heads: is 'some', must be one of 'mean', 'group', 'all'"),
        ({"row_reduction": "median"}, "row_reduction: is 'median'"),
        ({"rows": "last:0"}, "rows: is 'last:0', must be \"last:N\""),
        ({"rows": "first"}, "rows: is 'first'"),
        ({"rows": [(5, 3)]}, r"rows: holds \[5, 3\], must be half-open"),
        ({"keys": [(-1, 3)]}, r"keys: holds \[-1, 3\]"),
        ({"keys": []}, r"keys: is \[\], must be spans"),
        ({"keys": [[]]}, r"keys: is \[\[\]\], must be spans"),
        ({"keys": [1, 2]}, r"keys: is \[1, 2\], must be spans"),
        ({"keys": torch.rand(2, 2)}, "keys: is tensor"),
        ({"keys": 3}, "keys: is 3, must be spans"),
        ({"layers": [3]}, r"layers: is \[3\], must be numbers of model.layers.0.self_attn to .* \(0 to 2\), or names"),
        ({"layers": [-4]}, r"layers: is \[-4\]"),
        ({"layers": []}, r"layers: is \[\]"),
        ({"layers": "*.cross"}, r"layers: '\*.cross' is no attention module .* model.layers.\*.self_attn"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    model = make_model("llama", attention="sdpa")
    with pytest.raises(ValueError, match=message), mold.watch(model, **options):
        pass
    assert_closed(model)


def test_a_layer_alone_needs_no_list():
    model = make_model("llama", attention="sdpa").eval()
    with torch.no_grad(), mold.watch(model, layers=-1) as seen:
        model(**make_inputs())
    assert seen.names == ["model.layers.2.self_attn"]


def test_a_model_that_is_not_loaded_is_refused():
    with pytest.raises(ValueError, match="model: is 'gpt2', must be a loaded model"), mold.watch("gpt2"):
        pass


def test_a_model_that_cannot_be_watched_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM: its attention cannot be watched"), mold.watch(model):
        pass


def test_nothing_seen_is_an_error():
    model = make_model("llama", attention="sdpa").eval()
    message = r"saw nothing of model\.layers\.0\.self_attn to model\.layers\.2\.self_attn"
    with pytest.raises(ValueError, match=message), mold.watch(model) as seen:
        pass
    assert_closed(model)
    with pytest.raises(ValueError, match=r"attention: nothing was seen of model\.layers\.0"):
        _ = seen.attention


def test_a_model_that_was_compiled_before_is_an_error():
    model = make_model("llama", attention="sdpa").eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**make_inputs(), use_cache=False)
        with pytest.raises(ValueError, match=r"saw nothing of .*what torch\.compile made"), mold.watch(model):
            compiled(**make_inputs(), use_cache=False)


def test_spans_behind_the_text_are_an_error():
    model = make_model("llama", attention="sdpa").eval()
    for name in ("keys", "rows"):
        message, spans = f"{name}: reach to 15, must end within the 14", {name: [(0, 2), (13, 15)]}
        with pytest.raises(ValueError, match=message), mold.watch(model, **spans):
            model(**make_inputs())


def test_a_second_text_is_an_error_unless_the_first_was_cleared():
    model = make_model("llama", attention="sdpa").eval()
    inputs = make_inputs()
    with torch.no_grad(), mold.watch(model, rows="all") as seen:
        model(**inputs)
        first = seen.attention[0]
        with pytest.raises(ValueError, match="must go on with the same text"):
            model(**inputs)
        seen.clear()
        model(**make_inputs(length=9))
        assert seen.attention[0].shape == (2, 4, 9, 9)
        assert first.shape == (2, 4, 14, 14)
        seen.clear()


def test_a_cache_that_loses_keys_is_an_error():
    model = make_model("llama", attention="sdpa").eval()
    cache, ids = DynamicCache(), make_inputs()["input_ids"]
    with torch.no_grad(), mold.watch(model) as seen:
        model(input_ids=ids, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
        with pytest.raises(ValueError, match="no token of which left its cache"):
            model(input_ids=ids[:, :1], past_key_values=cache)
    assert seen.attention[0].shape == (2, 4, 14, 14)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_is_refused(use_cache):
    model = make_model("llama", attention="sdpa").eval()
    with pytest.raises(ValueError, match="num_beams: beam search"), mold.watch(model):
        generate(model, make_inputs(), num_beams=2, use_cache=use_cache)
    assert_closed(model)
    cache = DynamicCache()
    with torch.no_grad(), mold.watch(model) as seen:
        model(**make_inputs(), past_key_values=cache)
        with pytest.raises(ValueError, match="num_beams: beam search"):
            cache.reorder_cache(torch.tensor([1, 0]))
    assert seen.attention[0].shape == (2, 4, 14, 14)
    assert generate(model, make_inputs(), num_beams=2).shape == (2, 31)


def test_options_that_are_not_followed_are_refused():
    model = make_model("llama", attention="sdpa").eval()
    message = r"model\.layers\.0\.self_attn has an attention with cu_seqlens"
    with pytest.raises(ValueError, match=message), mold.watch(model):
        model(**make_inputs(), cu_seqlens=[0, 3])
