import dataclasses
import json

import pytest
import torch
from torch.utils.data import DataLoader

from mold.data.encoding import Collator, encode_example
from mold.data.examples import DEFAULT_TEMPLATE, Example
from mold.data.problems import generate_problems
from mold.data.segmentation import SEGMENTATION_VERSION, SegmentOptions
from mold.method import signal_files
from mold.method.extraction import extract_signals
from mold.method.loss import visible_keys
from mold.method.signal_settings import SignalSettings
from mold.method.signals import SignalCache
from mold_kernels import reference
from tests.mold.training.test_exactness import pool_by_hand
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
EXAMPLES = generate_problems(11, seed=2)
BARE = Example("bare", "Who came first?", "The hen came first.", "the hen")


_STORED = ("signal_dtype", "signal_layers", "tau_1", "teacher_layers_left_out")


def make_teacher(**options):
    return make_model("qwen3", vocab=len(TOKENIZER), layers=4, heads=4, kv_heads=2, **options).eval()


def extract(folder, examples=EXAMPLES, teacher=None, tokenizer=TOKENIZER, **options):
    teacher = teacher or make_teacher()
    stored = {name: options.pop(name) for name in _STORED if name in options}
    settings = SignalSettings.of(teacher, "tiny", DEFAULT_TEMPLATE, options.pop("row_reduction", "sum"), **stored)
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
    write, writes = signal_files.write_atomically, []

    def dying_write(path, data):
        writes.append(path)
        if len(writes) == killed_at + 1:
            path.with_name(path.name + ".tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(signal_files, "write_atomically", dying_write)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "killed")
    monkeypatch.setattr(signal_files, "write_atomically", write)
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
    for change in (
        {"question": EXAMPLES[3].question + " Really?"},
        {"rationale": EXAMPLES[3].rationale + " Yes."},
        {"answer": "-1"},
        {"keywords": ("apples",)},
        {"history": (("system", "Think."),)},
    ):
        changed = dataclasses.replace(EXAMPLES[3], **change)
        with pytest.raises(ValueError, match=f"example {changed.id}: has no teacher signal"):
            cache.signal(changed, encode(EXAMPLES[3]))


def test_signals_are_found_by_content(tmp_path):
    """Other names need no other forward, and any name will do."""
    cache = extract(tmp_path)
    names = ["__metadata__", "x" * 10000, "\ud800".encode("utf-8", "replace").decode(), "../up", "", "same", "same"]
    renamed = [dataclasses.replace(e, id=name) for e, name in zip(EXAMPLES, names, strict=False)]
    teacher, forwards = make_teacher(), []
    teacher.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    again = extract(tmp_path, renamed[::-1], teacher=teacher)
    assert not forwards
    for example, other in zip(EXAMPLES, renamed, strict=False):
        assert torch.equal(cache.signal(example, encode(example)), again.signal(other, encode(other)))
    assert len(extract(tmp_path / "named", renamed)) == len(renamed)
    repeated = extract(tmp_path / "repeated", [EXAMPLES[0], dataclasses.replace(EXAMPLES[0], id="again")])
    assert len(repeated) == 1


def test_a_teacher_is_known_by_its_weights(tmp_path):
    extract(tmp_path)
    teacher = make_teacher()
    settings = SignalSettings.of(teacher, "models/../tiny/", DEFAULT_TEMPLATE, "sum", "main")
    assert extract_signals(teacher, TOKENIZER, EXAMPLES, tmp_path, settings, progress=False).settings.teacher == "tiny"


@pytest.mark.parametrize(
    "version",
    [
        *(0, SEGMENTATION_VERSION - 1, SEGMENTATION_VERSION + 1, True, None),
        *(str(SEGMENTATION_VERSION), float(SEGMENTATION_VERSION)),
    ],
)
def test_another_segmentation_is_refused_by_every_way_in(tmp_path, version):
    cache = extract(tmp_path, EXAMPLES[:2])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["settings"]["segmentation"] = version
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for way_in in (lambda: SignalCache(tmp_path), lambda: extract(tmp_path)):
        with pytest.raises(ValueError, match=r"manifest\.json: segmentation: is .*, must be"):
            way_in()
    with pytest.raises(ValueError, match=r"segmentation: is .*, must be"):
        dataclasses.replace(cache.settings, segmentation=version)


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


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no manifest"):
        SignalCache(tmp_path)
    extract(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    flipped = (0, 7, 8, header // 2, header - 1)
    for damaged in (b"", whole[:5], whole[:header], whole[:-10], whole + b"0", *(flip(whole, at) for at in flipped)):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors was altered"):
            SignalCache(tmp_path)
    # A signal is checked when it is read: the one that was altered is found, the others are served.
    for at in (header, len(whole) - 1):
        shard.write_bytes(flip(whole, at))
        cache, messages = SignalCache(tmp_path), []
        for example in EXAMPLES:
            try:
                cache.signal(example, encode(example))
            except ValueError as error:
                messages.append(str(error))
        assert [("shard-00001.safetensors was altered" in message) for message in messages] == [True]
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        SignalCache(tmp_path)


def change(*path, value=None):
    """A manifest's text with a value in place of one of its, or without it."""

    def changed(manifest):
        *way, last = path
        place = manifest
        for key in way:
            place = place[next(iter(place)) if key is any else key]
        last = next(iter(place)) if last is any else last
        if value is None:
            del place[last]
        else:
            place[last] = value
        return json.dumps(manifest)

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: "{",
        lambda manifest: json.dumps(manifest)[:-30],
        lambda manifest: "",
        lambda manifest: "null",
        lambda manifest: json.dumps([manifest]),
        lambda manifest: "[" * 100_000,
        lambda manifest: '{"format": ' + "9" * 10_000 + "}",
        change("format"),
        change("format", value=99),
        change("format", value=[]),
        change("settings"),
        change("settings", value=[]),
        change("settings", "weights"),
        change("settings", "weights", value=5),
        change("settings", "template", value=["{question}"]),
        change("settings", "more", value="a"),
        change("shards", value="shard-00000.safetensors"),
        change("shards", any, value=7),
        change("shards", "../shard-00000.safetensors", value="0" * 64),
        change("settings", "signal_dtype", value="int8"),
        change("settings", "signal_layers", value=["all"]),
        change("settings", "signal_layers", value="mixture"),
        change("settings", "tau_1", value=0.1),
        change("shards", any, value="0" * 64),
    ],
)
def test_a_manifest_of_a_wrong_form_is_named(tmp_path, damage):
    extract(tmp_path, EXAMPLES[:2])
    path = tmp_path / "manifest.json"
    path.write_text(damage(json.loads(path.read_text())))
    for way_in in (lambda: SignalCache(tmp_path), lambda: extract(tmp_path)):
        with pytest.raises(ValueError, match=r"^signals: .*; delete the folder and extract again$") as caught:
            way_in()
        assert str(tmp_path) in str(caught.value)
        assert len(str(caught.value)) < 500


def test_manifests_that_are_no_text(tmp_path):
    extract(tmp_path, EXAMPLES[:2])
    path = tmp_path / "manifest.json"
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(ValueError, match=r"manifest\.json:1: holds the byte 0xff"):
        SignalCache(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"signals: .*manifest\.json: .*directory"):
        SignalCache(tmp_path)


def test_a_teacher_that_is_not_finite_names_the_example(tmp_path):
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"example {EXAMPLES[0].id}: the teacher's attention is not finite"):
        extract(tmp_path, EXAMPLES[:1], teacher=teacher)


def test_how_texts_are_split_is_a_setting(tmp_path):
    """Joined steps and chosen key words are pooled as they are; another splitting is refused by name."""
    teacher, options = make_teacher(), SegmentOptions("line", max_reasoning_steps=2, max_key_words=3)
    settings = SignalSettings.of(teacher, "tiny", DEFAULT_TEMPLATE, "sum", segments=options)
    short = extract_signals(teacher, TOKENIZER, EXAMPLES[:3], tmp_path / "short", settings, progress=False)
    eager = make_teacher(attention="eager")
    for example in EXAMPLES[:3]:
        encoded, full = encode_example(example, TOKENIZER, DEFAULT_TEMPLATE, segments=options), encode(example)
        assert (len(encoded.row_spans), len(encoded.key_spans)) == (2, 3)
        assert encoded.key_words_left_out == len(full.key_spans) - 3
        with torch.no_grad():
            maps = eager(input_ids=torch.tensor([encoded.input_ids]), output_attentions=True).attentions
        expected = pool_by_hand(maps, torch.tensor([encoded.row_spans]), torch.tensor([encoded.key_spans]))[:, 0]
        torch.testing.assert_close(short.signal(example, encoded), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="was extracted with step_unit='line', must be 'sentence'"):
        short.require_same(dataclasses.replace(settings, step_unit="sentence"))


@pytest.mark.parametrize(("name", "value"), [("step_unit", "word"), ("max_reasoning_steps", 1), ("max_key_words", "3")])
def test_a_manifest_of_wrong_limits_is_named(tmp_path, name, value):
    extract(tmp_path, EXAMPLES[:2])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["settings"][name] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json: {name}: is {value!r}, must be"):
        SignalCache(tmp_path)


@pytest.mark.parametrize(("dtype", "relative", "absolute"), [("bfloat16", 2**-8, 0), ("float16", 2**-11, 2**-25)])
def test_what_is_stored_in_half_the_bytes_is_as_near_as_stated(tmp_path, dtype, relative, absolute):
    whole, half = (extract(tmp_path / name, signal_dtype=name) for name in ("float32", dtype))
    for example in EXAMPLES:
        expected, found = (cache.signal(example, encode(example)) for cache in (whole, half))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)
        assert not torch.equal(found, expected)
    with pytest.raises(ValueError, match=f"was extracted with signal_dtype='float32', must be '{dtype}'"):
        extract(tmp_path / "float32", signal_dtype=dtype)


@pytest.mark.parametrize("left_out", [[], [0, -1]])
def test_a_mixture_is_the_mixture_of_all(tmp_path, left_out):
    every = extract(tmp_path / "every", [*EXAMPLES, BARE])
    options = {"signal_layers": "mixture", "tau_1": 0.05, "teacher_layers_left_out": left_out}
    mixed = extract(tmp_path / "mixed", [*EXAMPLES, BARE], **options)
    kept = slice(1, 3) if left_out else slice(None)
    for example in EXAMPLES:
        signal, found = (cache.signal(example, encode(example)) for cache in (every, mixed))
        counts = torch.tensor([signal.shape[1]]), torch.tensor([signal.shape[2]])
        weights = reference.teacher_layer_weights(signal[kept, None], *counts, 0.05)
        assert found.shape == (1, *signal.shape[1:])
        torch.testing.assert_close(found[0], torch.einsum("l,lsm->sm", weights[0], signal[kept]), rtol=1e-5, atol=1e-7)
    assert mixed.signal(BARE, encode(BARE)) is None
    with pytest.raises(ValueError, match=r"was extracted with tau_1=0\.05, must be 0\.1"):
        extract(tmp_path / "mixed", **options | {"tau_1": 0.1})


def test_nothing_is_stored_of_what_no_step_sees(tmp_path):
    cache = extract(tmp_path, shard_size=100)
    seen = whole = 0
    for example in EXAMPLES:
        encoded = encode(example)
        visible = visible_keys(torch.tensor([encoded.row_spans]), torch.tensor([encoded.key_spans]))[0]
        seen, whole = seen + visible.sum().item(), whole + visible.numel()
        signal = cache.signal(example, encoded)
        assert (signal[:, ~visible] == 0).all()
        assert (signal[:, visible] > 0).all()
    (shard,) = tmp_path.glob("*.safetensors")
    data = shard.read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == seen * 4 * 4
    assert seen < 0.8 * whole


@pytest.mark.slow
def test_signals_are_read_when_a_batch_is_made(tmp_path, monkeypatch):
    """In the process that makes it: this one, one that was forked, or one that opens the cache for itself."""
    cache, read = extract(tmp_path), []
    really = SignalCache.read
    with monkeypatch.context() as counted:
        counted.setattr(SignalCache, "read", lambda self, content: read.append(content) or really(self, content))
        items = cache.items(EXAMPLES, TOKENIZER)
        assert not read
        here = [batch["teacher_attention"] for batch in DataLoader(items, 4, collate_fn=Collator(0))]
        assert len(read) == len(EXAMPLES)
    items = cache.items(EXAMPLES, TOKENIZER)
    for way in ("fork", "spawn"):
        loader = DataLoader(items, 4, collate_fn=Collator(0), num_workers=2, multiprocessing_context=way)
        for one, other in zip(loader, here, strict=True):
            assert torch.equal(one["teacher_attention"], other)


@pytest.mark.parametrize(("visible", "keys"), [([0, 0], 3), ([3, 3], 3), ([1, 2, 5], 5), ([2], 2), ([0, 1, 1], 4)])
def test_cells_are_packed_and_unpacked(visible, keys):
    signal = torch.rand(2, len(visible), keys)
    for step, count in enumerate(visible):
        signal[:, step, count:] = 0
    cells = signal_files.packed(signal, visible)
    assert cells.shape == (2, sum(visible))
    assert torch.equal(signal_files.unpacked(cells, visible, keys), signal)
