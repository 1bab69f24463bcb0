"""Every operator passes torch.export with lengths that stay open, and AOTInductor."""

import shutil

import pytest
import torch
from torch.export import Dim, export

from mold_kernels import attention_lse, attention_with_lse, layer_mixture_kl, span_attention, value_pool


class Everything(torch.nn.Module):
    def forward(self, q, k, v, mask, row_spans, key_spans, teacher, num_steps, num_keys):
        out, lse = attention_with_lse(q, k, v)
        pooled = span_attention(q, k, lse, row_spans, key_spans)
        features = value_pool(v, mask, 1e-6)
        weights = features[:, :2].softmax(-1)
        loss = layer_mixture_kl(teacher, torch.stack([pooled, pooled / 2]), weights, num_steps, num_keys)
        return out, pooled, attention_lse(q, k), features, loss


def make_arguments(length, steps, keys, batch=3):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    rows, words = torch.arange(steps) * 3, torch.arange(keys) * 2
    row_spans, key_spans = (
        torch.stack([start, start + size], -1).int().repeat(batch, 1, 1) for start, size in ((rows, 3), (words, 1))
    )
    teacher = torch.rand(5, batch, steps, keys, generator=generator)
    counts = torch.full((batch,), steps), torch.full((batch,), keys)
    return q, k, v, torch.ones(batch, length, dtype=torch.bool), row_spans, key_spans, teacher, *counts


@pytest.fixture(scope="module")
def program():
    tokens, steps, keys = Dim("tokens", min=8, max=1 << 20), Dim("steps", min=2, max=4096), Dim("keys", min=2, max=4096)
    of_tokens, spans = ({2: tokens},) * 3, ({1: steps}, {1: keys})
    shapes = *of_tokens, {1: tokens}, *spans, {2: steps, 3: keys}, {}, {}
    return export(Everything(), make_arguments(40, 6, 7), dynamic_shapes=shapes)


@pytest.mark.parametrize("sizes", [(40, 6, 7), (100, 9, 5), (33, 4, 11)])
def test_exported_with_open_lengths(program, sizes):
    arguments = make_arguments(*sizes)
    torch.testing.assert_close(program.module()(*arguments), Everything()(*arguments))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_compiled_ahead_of_time(program, tmp_path):
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "everything.pt2"))
    arguments = make_arguments(64, 6, 7)
    found = torch._inductor.aoti_load_package(path)(*arguments)
    torch.testing.assert_close(tuple(found), Everything()(*arguments))
