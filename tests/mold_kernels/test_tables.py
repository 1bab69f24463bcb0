"""The table of backends says what is true: every cell is tried, and the documentation has the table."""

from pathlib import Path

import pytest
import torch

from mold_kernels import (
    _triton,
    attention_lse,
    attention_with_lse,
    layer_mixture_kl,
    span_attention,
    tables,
    value_pool,
)
from mold_kernels.backends import FLOATS, RUNTIMES, dtype_name
from mold_kernels.testing import random_qkv

PACKED = torch.tensor([0, 4, 9], dtype=torch.int32)
OPTIONS = {
    "key_padding_mask": {"key_padding_mask": torch.ones(1, 9, dtype=torch.bool)},
    "sliding_window": {"sliding_window": 4},
    "softcap": {"softcap": 3.0},
    "cu_seqlens": {"cu_seqlens": PACKED},
    "causal=False": {"causal": False},
    "query_start": {"query_start": 0},
    "heads": {"heads": "group"},
    'row_reduction="max"': {"row_reduction": "max"},
    "key_spans=None": {"key_spans": None},
    "spans of sequences": {"cu_seqlens": PACKED, "row_spans": torch.tensor([[[0, 4]], [[1, 5]]])},
}
HERE = [
    (op, line)
    for op in tables.OPS
    for line in op.backends.values()
    if "cpu" in (RUNTIMES[line.name].devices or ("cpu",)) and RUNTIMES[line.name].why_missing() is None
]


def run(op, line, dtype, **options):
    q, k, v = random_qkv(torch.Generator().manual_seed(0), 1, 4, 2, 9, 8, dtype=dtype)
    options["backend"] = line.name
    match op.name:
        case "attention_with_lse":
            return attention_with_lse(q, k, v, **options)[0]
        case "attention_lse":
            return attention_lse(q, k, **options)
        case "span_attention":
            lse = torch.zeros(1, 4, 9, dtype=torch.promote_types(dtype, torch.float32))
            row_spans = options.pop("row_spans", torch.tensor([[[0, 4], [4, 9]]]))
            key_spans = options.pop("key_spans", row_spans)
            return span_attention(q, k, lse, row_spans, key_spans, **options)
        case "value_pool":
            return value_pool(v, torch.ones(1, 9, dtype=torch.bool), 1e-6, **options)
        case "layer_mixture_kl":
            maps, counts = torch.rand(3, 2, 4, 5).to(dtype), torch.tensor([2, 4])
            return layer_mixture_kl(maps, maps, torch.full((2, 3), 1 / 3, dtype=dtype), counts, counts, **options)


@pytest.mark.parametrize(("op", "line"), HERE, ids=lambda each: each.name)
def test_every_dtype_and_option_is_taken_or_refused(op, line):
    for dtype in FLOATS:
        for name in (None, *op.options):
            options = {} if name is None else OPTIONS[name]
            if dtype in line.dtypes and (name is None or line.options is None or name in line.options):
                assert run(op, line, dtype, **options).isfinite().all()
            else:
                lacking = name if dtype in line.dtypes else "takes|is torch"  # layer_mixture_kl has no narrow dtypes
                with pytest.raises(ValueError, match=lacking):
                    run(op, line, dtype, **options)


def test_the_first_line_that_can_is_chosen():
    q = torch.zeros(1, 4, 9, 8)
    for op in tables.OPS:
        names = [line.name for other, line in HERE if other is op and line.is_automatic(q.device)]
        assert op.choose("auto", q).name == names[0]


def test_rows():
    rows = tables.backend_rows()
    assert len(rows) == sum(len(op.backends) for op in tables.OPS)
    cuda = "span_attention", "cuda", "GPU", "float32, bfloat16, float16", "", "chosen by name only, D up to 256"
    assert cuda in rows
    assert all(len(row) == len(tables.HEADER) for row in rows)
    for op, name, _, dtypes, _, _ in rows:
        line = next(o for o in tables.OPS if o.name == op).backends[name]
        assert dtypes.split(", ") == [dtype_name(dtype) for dtype in line.dtypes]


@pytest.mark.skipif(_triton.INTERPRETED, reason="the interpreter runs on the CPU too")
def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs/backends.md").read_text()
    assert tables.markdown() in page, "write the output of `python -m mold_kernels.tables` into docs/backends.md"
