"""Log-likelihoods of held-out rationales and answers, an example each: they tell models apart before accuracy does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.encoding import Collator, EncodedExample, encode_example
from mold.data.examples import ANSWER, DEFAULT_TEMPLATE, RATIONALE, Example
from mold.generation.batches import batches_by_length
from mold.training.adapters import without_adapter
from mold.training.heads import keeps_logits

TERMS = {"rationale": RATIONALE, "answer": ANSWER}
_NEEDS_RATIONALE = ("joint", "explain")


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: str = DEFAULT_TEMPLATE,
    tasks: Sequence[str] = ("joint",),
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> list[dict]:
    """Log-likelihood of every example's rationale and answer, summed over their tokens.

        rationale = sum over rationale tokens of log p(token | text before),   answer likewise

    Args:
        model: a causal language model; put into evaluation mode.
        tokenizer: its tokenizer, a fast one.
        examples: with the rationales and answers that are measured.
        template, tasks: of the texts that the model was trained on (see `mold.data.examples.render`). An answer's
            likelihood is that behind a rationale in the joint task and that without one in the others, so only models
            of the same tasks can be compared.
        batch_size: texts a forward.
        max_length: most tokens a text may have; nothing is cut.
        progress: whether to show a progress bar.

    Returns:
        A dictionary an example, in their order: id; rationale and answer, natural logarithms; rationale_tokens and
        answer_tokens. None and 0 for what no text has: a rationale where the task asks for the answer alone, and both
        where the joint task meets an example without a rationale.

    Raises:
        ValueError: an example does not fit (see `encode_example`), or a likelihood is not finite; names the example.
    """
    model.eval()
    rows = [
        {"id": e.id} | {key: empty for name in TERMS for key, empty in ((name, None), (f"{name}_tokens", 0))}
        for e in examples
    ]
    texts = [
        (row, encode_example(example, tokenizer, template, task=task, max_length=max_length))
        for row, example in zip(rows, examples, strict=True)
        for task in tasks
        if example.rationale.strip() or task not in _NEEDS_RATIONALE
    ]
    collate = Collator(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    batches = batches_by_length([encoded.input_ids for _, encoded in texts], batch_size)
    for chosen in tqdm(batches, "Log-likelihoods", disable=not progress, leave=False):
        sums = _sums(model, collate, [texts[index][1] for index in chosen])
        for index, found in zip(chosen, sums, strict=True):
            for (name, region), value in zip(TERMS.items(), found, strict=True):
                row, encoded = texts[index]
                if count := encoded.regions.count(region):
                    row |= {name: value, f"{name}_tokens": count}
    return rows


@torch.no_grad()
def _sums(model, collate: Collator, encoded: Sequence[EncodedExample]) -> list[list[float]]:
    """Log-likelihoods of each text's terms."""
    batch = {name: tensor.to(model.device) for name, tensor in collate([{"example": e} for e in encoded]).items()}
    targets, regions = batch["input_ids"][:, 1:], batch["regions"][:, 1:]
    positions = batch["learned_positions"]
    arguments = {"logits_to_keep": positions} if keeps_logits(without_adapter(model)) else {}
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **arguments).logits
    logits = logits if arguments else logits[:, positions]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets[:, positions].flatten(), reduction="none")
    losses = losses.view(len(encoded), -1).double()
    sums = torch.stack([-losses.masked_fill(regions[:, positions] != region, 0).sum(1) for region in TERMS.values()], 1)
    for example, found in zip(encoded, sums.isfinite().all(1).tolist(), strict=True):
        if not found:
            raise ValueError(f"example {example.id}: its log-likelihood is not finite; are the model's weights?")
    return sums.tolist()
