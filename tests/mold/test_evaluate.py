import json

import pytest
import torch

from mold.data import render
from mold.evaluate import accuracy, generate_predictions, write_jsonl
from mold.problems import generate_problems
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
EXAMPLES = generate_problems(7, seed=3)
MARKER = "\nAnswer: "


class Oracle(torch.nn.Module):
    """A stand-in for a model that has learned some examples by heart: `generate` answers from the texts."""

    device = torch.device("cpu")

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def generate(self, ids, attention_mask, max_new_tokens, pad_token_id, eos_token_id, **options):
        assert options["do_sample"] is False
        rows = []
        for row, mask in zip(ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padded on the left
            prompt = TOKENIZER.decode(row[mask.bool()], skip_special_tokens=True)
            (text,) = (text for text in self.texts if text.startswith(prompt))
            tokens = TOKENIZER(text[len(prompt) :])["input_ids"] + eos_token_id
            rows.append((tokens + [pad_token_id] * max_new_tokens)[:max_new_tokens])
        return torch.cat([ids, torch.tensor(rows)], dim=1)


def test_right_and_wrong_answers_are_told_apart():
    texts = [render(example).text for example in EXAMPLES]
    texts[2] = texts[2].replace(MARKER, MARKER + "9")
    texts[4] = render(EXAMPLES[4]).prompt + " I do not know."
    rows = generate_predictions(Oracle(texts), TOKENIZER, EXAMPLES, batch_size=3, max_new_tokens=150, progress=False)
    assert [row["id"] for row in rows] == [example.id for example in EXAMPLES]
    assert [row["correct"] for row in rows] == [True, True, False, True, False, True, True]
    assert rows[2]["prediction"] == "9" + EXAMPLES[2].answer
    assert rows[4]["prediction"] is None
    assert not any(row["truncated"] for row in rows)
    assert accuracy(rows) == pytest.approx(5 / 7)


def test_completions_that_hit_the_limit_are_marked():
    texts = [render(example).text for example in EXAMPLES]
    rows = generate_predictions(Oracle(texts), TOKENIZER, EXAMPLES, max_new_tokens=5, progress=False)
    assert all(row["truncated"] for row in rows)


@pytest.mark.parametrize("attention", ["mold", "sdpa"])
def test_batches_change_no_prediction(attention):
    model = make_model("llama", vocab=len(TOKENIZER), attention=attention)
    rows = [
        generate_predictions(model, TOKENIZER, EXAMPLES, batch_size=size, max_new_tokens=12, progress=False)
        for size in (1, 7)
    ]
    assert rows[0] == rows[1]
    assert len({row["completion"] for row in rows[0]}) > 1


def test_rows_are_written_whole(tmp_path):
    rows = [{"id": "a", "text": "½ 五 \n"}, {"id": "b", "text": None}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()] == rows
