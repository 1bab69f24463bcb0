import dataclasses
import json

import pytest
import torch

from mold.data.encoding import encode_example
from mold.data.examples import DEFAULT_TEMPLATE, Example
from mold.data.problems import generate_problems
from mold.method import extraction
from mold.method.extraction import extract_signals
from mold.method.signals import SignalCache, SignalSettings
from tests.mold.training.test_exactness import pool_by_hand
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
EXAMPLES = generate_problems(11, seed=2)
BARE = Example("bare", "Who came first?", "The hen came first.", "the hen")


def make_teacher(**options):
    return make_model("qwen3", vocab=len(TOKENIZER), layers=4, heads=4, kv_heads=2, **options).eval()


def extract(folder, examples=EXAMPLES, teacher=None, tokenizer=TOKENIZER, **options):
    teacher = teacher or make_teacher()
    settings = SignalSettings.of(teacher, "tiny", DEFAULT_TEMPLATE, options.pop("row_reduction", "sum"))
    options = {"batch_size": 3, "shard_size": 4, "progress": False} | options
    return extract_signals(teacher, tokenizer, examples, folder, settings, **options)


def encode(example):
    return encode_example(example, TOKENIZER, DEFAULT_TEMPLATE)


def test_signals_are_the_eager_maps_pooled_by_hand(tmp_path):
    cache = extract(tmp_path)
    assert len(cache) == len(EXAMPLES)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    eager = make_teacher(attention="eager")
    for example in EXAMPLES:
        encoded = encode(example)
        with torch.no_grad():
            maps = eager(input_ids=torch.tensor([encoded.input_ids]), output_attentions=True).attentions
        expected = pool_by_hand(maps, torch.tensor([encoded.row_spans]), torch.tensor([encoded.key_spans]))[:, 0]
        torch.testing.assert_close(cache.signal(example, encoded), expected, rtol=1e-4, atol=1e-5)


def test_batching_and_sharding_change_nothing(tmp_path):
    one, many = extract(tmp_path / "one", batch_size=1, shard_size=100), extract(tmp_path / "many", batch_size=5)
    for example in EXAMPLES:
        pair = [cache.signal(example, encode(example)) for cache in (one, many)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_an_example_without_key_words_has_no_signal(tmp_path):
    cache = extract(tmp_path, [EXAMPLES[0], BARE])
    assert cache.signal(BARE, encode(BARE)) is None
    assert cache.signal(EXAMPLES[0], encode(EXAMPLES[0])) is not None


@pytest.mark.parametrize("killed_at", range(6))
def test_killed_at_any_write_it_goes_on(tmp_path, monkeypatch, killed_at):
    """Three shards and three manifests are written; the process dies at one of them, before or after the rename."""
    undisturbed = extract(tmp_path / "undisturbed")
    write, writes = extraction.write_atomically, []

    def dying_write(path, data):
        writes.append(path)
        if len(writes) == killed_at + 1:
            path.with_name(path.name + ".tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(extraction, "write_atomically", dying_write)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "killed")
    monkeypatch.setattr(extraction, "write_atomically", write)
    forwards = []
    teacher = make_teacher()
    teacher.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    resumed = extract(tmp_path / "killed", teacher=teacher)
    assert len(forwards) == {0: 5, 1: 5, 2: 3, 3: 3, 4: 1, 5: 1}[killed_at]  # shards of 4, 4, 3 in batches of 3
    for example in EXAMPLES:
        assert torch.equal(*(cache.signal(example, encode(example)) for cache in (undisturbed, resumed)))
    assert (tmp_path / "killed/manifest.json").read_bytes() == (tmp_path / "undisturbed/manifest.json").read_bytes()


def test_more_examples_are_added_to_a_cache(tmp_path):
    extract(tmp_path, EXAMPLES[:5])
    cache = extract(tmp_path, EXAMPLES)
    whole = extract(tmp_path.with_name("whole"))
    for example in EXAMPLES:
        pair = [c.signal(example, encode(example)) for c in (cache, whole)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_a_cache_of_other_settings_is_refused(tmp_path):
    extract(tmp_path)
    with pytest.raises(ValueError, match="row_reduction='sum', must be 'mean'"):
        extract(tmp_path, row_reduction="mean")
    with pytest.raises(ValueError, match=r"weights=.*must be"):
        extract(tmp_path, teacher=make_teacher(seed=1))
    with pytest.raises(ValueError, match="teacher='tiny', must be 'another'"):
        SignalCache(tmp_path).require(teacher="another")
    SignalCache(tmp_path).require(teacher="tiny", row_reduction="sum")


def test_another_text_is_refused(tmp_path):
    cache = extract(tmp_path)
    changed = dataclasses.replace(EXAMPLES[3], question=EXAMPLES[3].question + " Really?")
    with pytest.raises(ValueError, match=f"example {changed.id}: its text is not the one"):
        cache.signal(changed, encode(changed))
    with pytest.raises(ValueError, match=f"example {changed.id}: its text is not the one"):
        extract(tmp_path, [*EXAMPLES[:3], changed])
    with pytest.raises(ValueError, match="example bare: has no teacher signal"):
        cache.signal(BARE, encode(BARE))


def test_another_tokenization_is_refused(tmp_path):
    extract(tmp_path)
    with pytest.raises(ValueError, match=f"example {EXAMPLES[0].id}: its tokens are not those that"):
        extract(tmp_path, tokenizer=make_tokenizer("llama3"))


def test_a_signal_of_other_steps_is_refused(tmp_path):
    cache = extract(tmp_path)
    encoded = encode(EXAMPLES[0])
    fewer = dataclasses.replace(encoded, row_spans=encoded.row_spans[:-1])
    steps, keys = len(encoded.row_spans), len(encoded.key_spans)
    message = f"has {steps} steps and {keys} key words, the student's text {steps - 1} and {keys}"
    with pytest.raises(ValueError, match=message):
        cache.signal(EXAMPLES[0], fewer)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no manifest"):
        SignalCache(tmp_path)
    extract(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors was altered"):
        SignalCache(tmp_path)
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors was altered"):
        SignalCache(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        SignalCache(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        SignalCache(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        SignalCache(tmp_path)


def test_a_teacher_that_is_not_finite_names_the_example(tmp_path):
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"example {EXAMPLES[0].id}: the teacher's attention is not finite"):
        extract(tmp_path, EXAMPLES[:1], teacher=teacher)


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"example {EXAMPLES[0].id}: stands twice"):
        extract(tmp_path, [EXAMPLES[0], dataclasses.replace(EXAMPLES[1], id=EXAMPLES[0].id)])
