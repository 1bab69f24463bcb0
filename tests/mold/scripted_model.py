"""A stand-in for a causal language model that answers what a function says."""

import torch


class ScriptedModel(torch.nn.Module):
    """`generate` decodes each prompt, asks `answer(prompt, options)` and returns its tokens.

    calls: the prompts of each batch so far. die_at: raises KeyboardInterrupt at that batch, as a killed run ends.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, tokenizer, answer, die_at=None):
        super().__init__()
        self.tokenizer, self.answer, self.die_at, self.calls = tokenizer, answer, die_at, []

    def generate(self, ids, attention_mask, max_new_tokens, pad_token_id, eos_token_id, **options):
        if self.die_at == len(self.calls):
            raise KeyboardInterrupt
        rows, prompts = [], []
        for row, mask in zip(ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padded on the left
            prompts.append(self.tokenizer.decode(row[mask.bool()], skip_special_tokens=True))
            tokens = self.tokenizer(self.answer(prompts[-1], options))["input_ids"] + eos_token_id
            rows.append((tokens + [pad_token_id] * max_new_tokens)[:max_new_tokens])
        self.calls.append(prompts)
        return torch.cat([ids, torch.tensor(rows)], dim=1)
