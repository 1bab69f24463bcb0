import json

import pytest
import torch

from mold.data.encoding import encode_example
from mold.data.examples import DEFAULT_TEMPLATE, Example
from mold.data.problems import generate_problems
from mold.evaluation.analysis import key_word_mass
from mold.report import drawing, plots
from tests.mold.command_line import refusal
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("llama3")
EXAMPLES = [*generate_problems(5, seed=2), Example("bare", "Who came first?", "The hen came first.", "the hen")]


def by_hand(model, example, bins):
    """Eager attention maps, one example at a time: sums and counts of each bin."""
    encoded = encode_example(example, TOKENIZER, DEFAULT_TEMPLATE, append_eos=False)
    with torch.no_grad():
        maps = model(torch.tensor([encoded.input_ids]), output_attentions=True).attentions
    attention = torch.stack(maps)[:, 0].mean(1).double()
    mass, even = torch.zeros(len(maps), bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
    count = len(encoded.row_spans)
    for step, (first, last) in enumerate(encoded.row_spans):
        for place in range(bins):
            share = bins * max(0, min((step + 1) / count, (place + 1) / bins) - max(step / count, place / bins))
            for row in range(first, last):
                for start, end in encoded.key_spans:
                    mass[:, place] += share * attention[:, row, start:end].sum(-1) / (last - first)
                    even[place] += share * max(0, min(end, row + 1) - start) / (row + 1) / (last - first)
    return mass, even


@pytest.mark.parametrize("bins", [1, 3, 7])
def test_the_mass_is_that_of_eager_maps(bins):
    options = {"vocab": len(TOKENIZER), "initializer_range": 0.2}
    eager = make_model("qwen3", attention="eager", **options).eval()
    expected = [by_hand(eager, example, bins) for example in EXAMPLES[:-1]]
    mass, even = (torch.stack(parts).mean(0) for parts in zip(*expected, strict=True))
    model = make_model("qwen3", attention="sdpa", **options)
    found = key_word_mass(model, TOKENIZER, EXAMPLES, bins=bins, batch_size=2, progress=False)
    torch.testing.assert_close(torch.tensor(found["mass"]).double(), mass, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["even"]).double(), even, rtol=1e-4, atol=1e-6)
    assert (found["examples"], found["without_key_words"]) == (5, 1)


def test_a_rationale_of_fewer_steps_than_bins_is_in_all_of_them():
    model = make_model("llama", vocab=len(TOKENIZER), attention="sdpa")
    example = Example("a", "Is it 3?", "It is 3.", "3")
    found = key_word_mass(model, TOKENIZER, [example], bins=4, progress=False)
    for values in (found["even"], found["mass"][0]):
        assert values == pytest.approx([values[0]] * 2 + [values[3]] * 2)
        assert values[0] != values[3]
    with pytest.raises(ValueError, match="none of its 1 examples has key words"):
        key_word_mass(model, TOKENIZER, EXAMPLES[-1:], progress=False)


def test_the_plot():
    pytest.importorskip("matplotlib")
    entry = {"mass": [[0.1, 0.2, 0.3], [0.2, 0.2, 0.4]], "even": [0.1, 0.1, 0.2]}
    figure = plots.key_word_attention({"teacher": entry, "$student": entry})
    assert [axes.get_title("left") for axes in figure.axes if axes.images and axes.get_title("left")] == [
        "teacher",
        "$student",
    ]
    curves = [line.get_ydata()[0] for line in figure.axes[0].lines if len(line.get_ydata())]
    assert curves == pytest.approx([15, 10] * 2)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["teacher", "$student", "spread evenly over the text so far"]
    assert "<svg" in drawing.figure_to_svg(figure)
    with pytest.raises(ValueError, match="models: is empty"):
        plots.key_word_attention({})


def test_the_command(mold, models, problems, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--dataset", problems, "--output_dir", tmp_path / "run", "--disable_tqdm", "true"]
    status, out, _ = mold("analyse", *options, "--models", models / "teacher", models / "student", "--eval_limit", "6")
    assert status in (0, None)
    found = json.loads((tmp_path / "run/analysis.json").read_text())
    assert {name: len(entry["mass"]) for name, entry in found.items()} == {"teacher": 4, "student": 3}
    assert found["teacher"]["examples"] == 6
    assert (tmp_path / "run/analysis.svg").read_text().startswith("<svg")
    assert "teacher" in out
    assert "models: is not given" in refusal(mold("analyse", *options))
