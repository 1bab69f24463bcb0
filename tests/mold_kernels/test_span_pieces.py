"""Pieces of spans: every backend finds the same, and they are what they are said to be."""

import pytest
import torch
from hypothesis import given, settings

from mold_kernels import SpanPlan, native, reference, span_attention
from mold_kernels.span_pieces import SPAN_PIECES, Pieces
from mold_kernels.testing import random_spans
from tests.mold_kernels.test_span_attention import spans

BACKENDS = ["torch", *(["native"] if native.is_available() else [])]


def make_pieces(backend, row_spans, key_spans, length, rows, key_length=None):
    return Pieces(*SPAN_PIECES.operator(row_spans, key_spans, length, key_length or length, rows, backend))


def check_pieces(backend, row_spans, key_spans):
    """Every span is a run of pieces, no row piece is longer than asked, the columns are the held tokens."""
    length, rows = 23, 4
    row_spans, key_spans = (torch.tensor([each], dtype=torch.int32) for each in (row_spans, key_spans))
    pieces = make_pieces(backend, row_spans, key_spans, length, rows)
    held = set()
    for start, end in key_spans[0].tolist():
        held |= set(range(start, end))
        first, last = pieces.key_piece[0, start], pieces.key_piece[0, end]
        inside = (pieces.column_piece[0, : pieces.before[0, -1]] >= first) & (
            pieces.column_piece[0, : pieces.before[0, -1]] < last
        )
        assert pieces.columns[0, : pieces.before[0, -1]][inside].tolist() == list(range(start, end))
    assert pieces.before[0, -1] == len(held)
    assert pieces.columns[0, : len(held)].tolist() == sorted(held)
    assert (pieces.columns[0, len(held) :] == length).all()
    assert (pieces.key_first[0] <= len(held)).all()

    starts, covered = pieces.row_start[0] // 2, pieces.row_start[0] % 2
    assert starts[0] == 0
    assert starts[-1] == length
    assert ((starts.diff() >= 0) & (starts.diff() <= rows)).all()
    tokens = torch.repeat_interleave(torch.arange(pieces.row_count), starts.diff())
    assert torch.equal(tokens.int(), pieces.row_piece[0, :length])
    in_step = torch.zeros(length, dtype=torch.int32)
    for start, end in row_spans[0].tolist():
        in_step[start:end] = 1
        assert start == end or starts[pieces.row_piece[0, start]] == start
    assert torch.equal(covered[:-1][tokens], in_step)


@settings(deadline=None, max_examples=100)
@given(spans(4), spans(5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces(backend, row_spans, key_spans):
    check_pieces(backend, row_spans, key_spans)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_every_backend_finds_the_same(rows):
    generator = torch.Generator().manual_seed(rows)
    for length, steps, keys in ((1, 1, 1), (40, 5, 9), (130, 40, 3)):
        both = random_spans(generator, 3, steps, length), random_spans(generator, 3, keys, length)
        first, *others = [make_pieces(backend, *both, length, rows) for backend in BACKENDS]
        for other in others:
            for name, a, b in zip(Pieces._fields, first, other, strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_spans_outside_the_text_are_cut(backend):
    """The operator itself: whatever was checked before it, it writes nowhere else."""
    wild = torch.tensor([[[-5, 3], [4, 100], [7, 2], [2**31 - 1, -(2**31)]]], dtype=torch.int32)
    cut = torch.tensor([[[0, 3], [4, 9], [7, 7], [9, 9]]], dtype=torch.int32)
    for a, b in zip(make_pieces(backend, wild, wild, 9, 4), make_pieces(backend, cut, cut, 9, 4), strict=True):
        assert torch.equal(a, b)


def test_columns():
    key_spans = torch.tensor([[[3, 9], [8, 11], [0, 0]], [[0, 0], [29, 30], [4, 4]]])
    plan = SpanPlan(torch.tensor([[[0, 30]], [[0, 30]]]), key_spans, 30)
    tokens, before = plan.columns(4)
    assert tokens.tolist() == [list(range(3, 11)), [29, *[30] * 7]]
    assert before[:, -1].tolist() == [8, 1]
    tokens, _ = plan.columns(64)
    assert tokens.shape == (2, 64)
    assert (tokens[:, 8:] == 30).all()
    assert plan.columns(64)[0] is tokens
    assert SpanPlan(key_spans, torch.zeros_like(key_spans), 30).columns(4)[0].shape == (2, 0)


def test_pieces_are_made_once(monkeypatch):
    spans_ = torch.tensor([[[0, 3], [3, 9]]])
    plan, calls = SpanPlan(spans_, spans_, 9), []
    operator = SPAN_PIECES.operator
    monkeypatch.setattr(SPAN_PIECES, "operator", lambda *arguments: calls.append(arguments) or operator(*arguments))
    assert plan.pieces(4) is plan.pieces(4)
    plan.columns(1), plan.columns(64)
    assert len(calls) == 1


def test_a_plan_is_of_its_tensors_as_they_were():
    rows, keys = torch.tensor([[[0, 3]]]), torch.tensor([[[1, 2]]])
    plan = SpanPlan(rows, keys, 9)
    assert plan.is_of(rows, keys, 9)
    assert not plan.is_of(rows, keys, 10)
    assert not plan.is_of(rows.clone(), keys, 9)
    keys += 1
    assert not plan.is_of(rows, keys, 9)


def test_a_plan_of_inference_mode_serves_training():
    rows, keys = torch.tensor([[[0, 3], [3, 9]]]), torch.tensor([[[1, 2]]])
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    lse = reference.attention_lse(q, q)
    for backend in BACKENDS:
        with torch.inference_mode():
            plan = SpanPlan(rows, keys, 9)
            expected = span_attention(q, q, lse, rows, keys, plan=plan, backend=backend)
        pooled = span_attention(q, q, lse, rows, keys, plan=plan, backend=backend)
        pooled.sum().backward(retain_graph=True)
        assert torch.equal(pooled, expected)


def test_a_plan_of_other_spans_is_refused():
    rows, q = torch.tensor([[[0, 3]]]), torch.randn(1, 2, 9, 16)
    with pytest.raises(ValueError, match="plan: is of other spans, must be made of row_spans and key_spans"):
        span_attention(q, q, q[..., 0], rows, rows, plan=SpanPlan(rows, rows.clone(), 9))


@pytest.mark.parametrize(
    ("row_spans", "key_spans", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 2).int(), "row_spans: dtype is torch.float32"),
        (torch.tensor(3), torch.zeros(2, 3, 2).int(), r"row_spans: shape is \[\]"),
        (torch.zeros(2, 3, 2).int(), torch.zeros(3, 3, 2).int(), r"key_spans: shape is \[3, 3, 2\], must be \[2,"),
        (torch.tensor([[[0, 10]]]), torch.zeros(1, 3, 2).int(), r"row_spans: span 0 of example 0 is \[0, 10\]"),
        (torch.tensor([[[0, 9]]]), torch.zeros(1, 3, 2).int().to("meta"), "key_spans: is on meta, must be on cpu"),
    ],
)
def test_wrong_spans(row_spans, key_spans, message):
    with pytest.raises(ValueError, match=message):
        SpanPlan(row_spans, key_spans, 9)
