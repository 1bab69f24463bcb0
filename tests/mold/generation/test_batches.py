import json

import pytest
import torch

from mold.generation.batches import Journal, batch_seed, batches_by_length, generate_all, generate_batch
from tests.mold.scripted_model import ScriptedModel
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("Ada has 5 apples.", "The museum", "Omar drives 3 hours at 40")]


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab=len(TOKENIZER), attention="sdpa").eval()


def complete(model, prompts=PROMPTS, **options):
    return generate_batch(model, TOKENIZER, prompts, **{"max_new_tokens": 12} | options)


def test_padding_changes_no_completion(model):
    assert complete(model) == [complete(model, [prompt])[0] for prompt in PROMPTS]


def test_sampling_is_decided_by_its_seed_and_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    first = complete(model, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert complete(model, temperature=1.0, seed=3) == first
    assert complete(model, temperature=1.0, seed=4) != first
    assert complete(model, temperature=1.0, top_p=1e-6, seed=5) == complete(model)


def test_the_models_own_generation_defaults_do_not_count(model):
    plain = complete(model)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=1000)
    try:
        assert complete(model) == plain
    finally:
        model.generation_config.update(do_sample=False, temperature=None, repetition_penalty=None, top_k=None)


def test_a_static_cache_changes_no_completion(model):
    assert complete(model, static_cache=True) == complete(model)


def test_a_stop_text_ends_a_completion():
    def answer(prompt, options):
        assert options["stop_strings"] == ["\nQuestion:"]
        return " It is 5.\nQuestion: And then? It is six."

    model = ScriptedModel(TOKENIZER, answer)
    assert complete(model, stop="\nQuestion:", max_new_tokens=200)[0] == (" It is 5.", False)


def test_what_hits_the_limit_is_truncated():
    model = ScriptedModel(TOKENIZER, lambda prompt, options: " It is a long way." if "Omar" in prompt else " 5")
    assert [completion.truncated for completion in complete(model, max_new_tokens=5)] == [False, False, True]


def test_a_chat_models_own_end_of_turn_ends_a_completion(model):
    seen = []
    model.generation_config.eos_token_id = [7, TOKENIZER.eos_token_id]
    try:
        generate, model.generate = model.generate, lambda *a, **k: seen.append(k["eos_token_id"]) or generate(*a, **k)
        complete(model)
    finally:
        del model.generate
        model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    assert seen == [sorted([7, TOKENIZER.eos_token_id])]


def test_batches_hold_every_prompt_once_and_like_lengths_together():
    batches = batches_by_length([[0] * n for n in (5, 1, 9, 2, 5)], 2)
    assert batches == [[1, 3], [0, 4], [2]]
    assert len({batch_seed(seed, name) for seed in (0, 1) for name in ("plain-0-0", "plain-0-1")}) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_prompts_are_completed_in_their_order_and_once(model, tmp_path, temperature):
    def run(prompts=PROMPTS, model=model):
        journal = Journal(tmp_path / "journal.jsonl", {})
        return generate_all(
            *(model, TOKENIZER, prompts, "stage"),
            **{"batch_size": 2, "journal": journal, "max_new_tokens": 12, "temperature": temperature},
            progress=False,
        )

    first = run()
    if temperature == 0:
        assert first == complete(model)
    assert run(model=ScriptedModel(TOKENIZER, None)) == first
    # Other prompts under the same name are other batches, never the answers of the old ones.
    other = [PROMPTS[0], PROMPTS[2], [*PROMPTS[1], *PROMPTS[1]]]
    assert run(other) != first
    assert run(model=ScriptedModel(TOKENIZER, None)) == first


def test_a_journal_keeps_whole_batches_and_cuts_a_torn_one(tmp_path):
    path = tmp_path / "deep/journal.jsonl"
    settings = {"teacher": "t", "sizes": (1, 2)}
    journal = Journal(path, settings)
    journal.append("a", [{"id": "1", "text": "é\n"}])
    whole = path.read_bytes()
    journal.append("b", [{"id": "2", "text": "x"}])
    for length in range(len(whole), path.stat().st_size):
        path.write_bytes(path.read_bytes()[:length] if length < path.stat().st_size else whole)
        assert Journal(path, settings).batches == {"a": [{"id": "1", "text": "é\n"}]}
        assert path.read_bytes() == whole
        Journal(path, settings).append("b", [{"id": "2", "text": "x"}])
    assert list(Journal(path, settings).batches) == ["a", "b"]
    for length in (0, 3):  # killed in the first line
        path.write_bytes(whole[:length])
        assert Journal(path, settings).batches == {}
        assert json.loads(path.read_text()) == {"settings": {"teacher": "t", "sizes": [1, 2]}}


def test_a_journal_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"teacher": "t", "seed": 1}).append("a", [])
    with pytest.raises(ValueError, match=r"journal\.jsonl: was written with seed=1, this run has 2; choose another"):
        Journal(path, {"teacher": "t", "seed": 2})
    with pytest.raises(ValueError, match="was written with seed=1, this run has None"):
        Journal(path, {"teacher": "t"})
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="is no journal of mold"):
        Journal(path, {"teacher": "t"})
