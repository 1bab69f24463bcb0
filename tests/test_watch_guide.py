"""The recipes of docs/guides/watch.md, against the same from eager attention's maps."""

import itertools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

import mold
from tests.mold.method.test_watching import eager_maps, float64_softmax, tiny_qwen2_vl, tiny_whisper
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

GUIDE = Path(__file__).parents[1] / "docs/guides/watch.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """What the guide's code defines, with a tiny model."""
    tokenizer = make_tokenizer.__wrapped__("smollm")
    tokenizer.chat_template = CHAT
    model = make_model("qwen2", vocab=len(tokenizer), attention="sdpa", dtype=torch.float64, eos_token_id=None).eval()
    folder = tmp_path_factory.mktemp("guide")
    found = {"__name__": "__main__"}
    with mock.patch("mold.load_model", return_value=(model, tokenizer)), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            exec(block, found)
    assert (folder / "answer.svg").read_text().count("<svg") == 1
    return found


def maps_of(guide, tokens):
    return eager_maps(guide["model"], tokens, torch.ones_like(tokens))


def generated(guide, **options):
    return guide["model"].generate(**guide["inputs"], max_new_tokens=8, do_sample=False, **options)


def test_every_recipe_is_short():
    for body in re.findall(r"^(def .*?)(?=^\S|\Z)", "\n".join(BLOCKS), re.DOTALL | re.MULTILINE):
        assert len(body.strip().splitlines()) <= 15, body


def test_phrases_of_the_prompt(guide):
    tokens = generated(guide)
    maps = maps_of(guide, tokens[:, :-1])
    for layer, seen in zip((0, 2), guide_of_first_block(guide), strict=True):
        rows = maps[layer].mean(1, keepdim=True)[:, :, -8:]
        expected = torch.stack([rows[..., start:end].sum(-1) for start, end in guide["keys"].tolist()], -1)
        torch.testing.assert_close(seen, expected)


def guide_of_first_block(guide):
    with mold.watch(guide["model"], guide["keys"], "last:1", [0, -1], "mean") as seen:
        generated(guide)
    return seen.attention


def test_snapkv_and_h2o_scores(guide):
    ids = guide["inputs"]["input_ids"]
    grouped = [layer.unflatten(1, (2, -1)).mean(2) for layer in maps_of(guide, ids)]
    with torch.no_grad(), mold.watch(guide["model"], rows="last:16", heads="group") as seen:
        guide["model"](**guide["inputs"])
    for scores, maps in zip(guide["snapkv_scores"](seen), grouped, strict=True):
        votes = maps[:, :, -16:, :-16].mean(2)
        around = torch.nn.functional.pad(votes, (2, 2)).unfold(-1, 5, 1).mean(-1)
        torch.testing.assert_close(scores[..., :-16], around)
        assert scores[..., -16:].isinf().all()
    length = ids.shape[1]
    with mold.watch(guide["model"], rows=[(0, length)], row_reduction="sum", heads="group") as seen:
        tokens = generated(guide)
    maps = maps_of(guide, tokens[:, :-1])
    for scores, layer in zip(guide["h2o_scores"](seen), maps, strict=True):
        torch.testing.assert_close(scores, layer.unflatten(1, (2, -1)).mean(2).sum(2))


def test_lookback_ratio(guide):
    context = guide["context"]
    with mold.watch(guide["model"], [(0, context)], rows="last:1") as seen:
        tokens = generated(guide)
    ratio = guide["lookback_ratio"](seen, context)
    assert ratio.shape == (1, 3, 4, 7)
    for layer, maps in enumerate(maps_of(guide, tokens[:, :-1])):
        for index in range(7):
            row = maps[0, :, context + index, : context + index + 1]
            old, new = row[:, :context].mean(-1), row[:, context:].mean(-1)
            torch.testing.assert_close(ratio[0, layer, :, index], old / (old + new))


def test_passage_scores(guide):
    tokenizer, passages, question = guide["tokenizer"], ["Sara has 12 apples.", "Tom has 3 pears."], "How many pears?"
    scores = guide["passage_scores"](guide["model"], tokenizer, passages, question)
    text = "\n\n".join([*passages, question])
    first, second, asked = mold.token_spans(tokenizer, text, [*passages, question]).tolist()
    maps = torch.stack(maps_of(guide, tokenizer(text, return_tensors="pt")["input_ids"])).mean((0, 1, 2))
    rows = maps[asked[0] : asked[1]].mean(0)
    torch.testing.assert_close(scores, torch.stack([rows[start:end].mean() for start, end in (first, second)]))


def test_image_scores(guide):
    model = tiny_qwen2_vl()
    ids = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 90).int()}
    inputs |= {"pixel_values": torch.randn(16, 96).double(), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with torch.no_grad(), mold.watch(model, rows=[(0, 10)], heads="mean", layers=[1]) as seen:
        model(**inputs)
    (scores,) = guide["image_scores"](seen, ids, 90)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        maps = model(**inputs, output_attentions=True).attentions[1]
    torch.testing.assert_close(scores, maps[0, :, :, 2:6].mean((0, 1)))


def test_the_heat_map_has_every_cell(guide):
    shares = torch.rand(3, 4).numpy()
    figure = guide["heat_map"](shares, ["a", "b", "c"], ["w", "x", "y", "z"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["w", "x", "y", "z"]
    (picture,) = axes.images
    assert (picture.get_array() == shares).all()
    assert guide["shares"].shape == (8, guide["context"] - 1)


def test_token_times(guide):
    model = tiny_whisper()
    features, start = torch.randn(1, 8, 40, dtype=torch.float64), torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad(), mold.watch(model, rows="all", layers="*.encoder_attn", heads="mean") as seen:
        model(features, decoder_input_ids=start)
    found = guide["token_times"](torch.stack(seen.attention).mean(0)[0, 0], seconds=1)
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_softmax():
        out = model(features, decoder_input_ids=start, output_attentions=True)
    maps = torch.stack(out.cross_attentions).mean((0, 1, 2))
    paths = itertools.combinations_with_replacement(range(20), 4)
    assert tuple(found) == max(paths, key=lambda path: sum(maps[token, frame] for token, frame in enumerate(path)))
