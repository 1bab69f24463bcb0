import pytest
import torch

from mold_kernels.testing import assert_as_accurate_as, random_mask, random_qkv, random_spans


def test_the_bound_is_twice_the_reference_and_rounding(generator):
    truth = torch.randn(1000, dtype=torch.float64, generator=generator)
    low = (truth * (1 + 1e-3)).float()
    assert_as_accurate_as((truth * (1 + 1.9e-3)).float(), low, truth, "lse")
    assert_as_accurate_as(truth.bfloat16(), truth.bfloat16(), truth, "lse")
    with pytest.raises(AssertionError, match=r"lse: relative RMS error 2\.10e-03, may be 2\.00e-03"):
        assert_as_accurate_as((truth * (1 + 2.1e-3)).float(), low, truth, "lse")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.0])
def test_one_wrong_entry_is_found(wrong):
    truth = torch.tensor([0.0, float("-inf")], dtype=torch.float64)
    low = truth.float()
    assert_as_accurate_as(low, low, truth, "lse")
    for position in range(2):
        actual = low.clone()
        actual[position] = wrong
        with pytest.raises(AssertionError, match="lse"):
            assert_as_accurate_as(actual, low, truth, "lse")


def test_shape_and_dtype_are_the_references():
    truth = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"dq was torch.float32 \(3,\), must be torch.float32 \(2,\)"):
        assert_as_accurate_as(torch.zeros(3), truth.float(), truth, "dq")
    with pytest.raises(AssertionError, match=r"dq was torch.float32 \(2,\), must be torch.bfloat16"):
        assert_as_accurate_as(truth.float(), truth.bfloat16(), truth, "dq")


@pytest.mark.parametrize("length", [1, 37])
def test_random_spans(generator, length):
    spans = random_spans(generator, 4, 6, length)
    assert spans.shape == (4, 6, 2)
    assert spans.dtype == torch.int32
    sizes = spans[..., 1] - spans[..., 0]
    assert ((spans >= 0) & (spans <= length)).all()
    assert (sizes >= 0).all()
    for special in (0, 1, length):
        assert (sizes == special).any(1).all()


def test_random_qkv_and_mask(generator):
    q, k, v = random_qkv(generator, 2, 9, 3, 37, 16, torch.bfloat16)
    assert (q.shape, k.shape, v.shape) == ((2, 9, 37, 16), (2, 3, 37, 16), (2, 3, 37, 16))
    assert q.transpose(1, 2).is_contiguous()
    assert q.dtype == torch.bfloat16
    for padding, kept in (("left", -1), ("right", 0)):
        mask = random_mask(generator, 8, 37, padding)
        assert mask[:, kept].all()
        assert not mask.all()
    assert random_mask(generator, 8, 37, "no").all()
