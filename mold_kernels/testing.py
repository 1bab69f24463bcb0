"""Case makers and the one tolerance of this project, for tests and benchmarks alike."""

import torch


def assert_as_accurate_as(
    actual: torch.Tensor,
    reference_low: torch.Tensor,
    reference_float64: torch.Tensor,
    name: str,
    factor: float = 2.0,
) -> None:
    """Asserts that `actual` is at most `factor` times as far from the truth as the reference in the same dtype.

        rms(actual - truth) <= factor * rms(reference_low - truth) + u * rms(truth)

    u is half the spacing of `actual`'s dtype at 1 (an exact result rounded once passes), and 1000 spacings of float64,
    where the truth is no better than what it judges. Entries that are infinite in the truth must be so in `actual`;
    where the truth is all zero and the reference finds that, `actual` must be too.

    Args:
        actual: what the fast version gave.
        reference_low: what the reference gave on the same inputs in the tested dtype.
        reference_float64: what the reference gave on the same inputs in float64: the truth.
        name: the tensor's name, for the message.
        factor: how much worse than the reference is good enough.

    Raises:
        AssertionError: shape or dtype is not the reference's, or the error is too large.
    """
    if (actual.shape, actual.dtype) != (reference_low.shape, reference_low.dtype):
        raise AssertionError(
            f"{name} was {actual.dtype} {tuple(actual.shape)}, "
            f"must be {reference_low.dtype} {tuple(reference_low.shape)} as the reference is"
        )
    error, allowed = _rms_error(actual, reference_float64), _rms_error(reference_low, reference_float64)
    scale = _rms(reference_float64[reference_float64.isfinite()])
    spacings = 1000 if actual.dtype == torch.float64 else 0.5
    bound = factor * allowed + spacings * torch.finfo(actual.dtype).eps * scale
    if not error <= bound:  # also when the error is NaN
        raise AssertionError(
            f"{name}: relative RMS error {error / scale:.2e}, may be {bound / scale:.2e} "
            f"({factor:g} x the reference's {allowed / scale:.2e}, plus rounding)"
            if scale > 0
            else f"{name}: RMS error {error:.2e}, may be {bound:.2e} (the truth is 0)"
        )


def _rms_error(values: torch.Tensor, truth: torch.Tensor) -> float:
    values = values.to(torch.float64)
    return _rms(torch.where(values == truth, 0.0, values - truth))  # infinity - infinity would be NaN


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def random_spans(generator: torch.Generator, batch: int, count: int, length: int) -> torch.Tensor:
    """int32 [batch, count, 2] half-open token spans in random order, overlapping where chance has it.

    From three spans a row on, one is empty (0, 0), one holds a single token and one holds all `length` of them.
    """
    start = torch.randint(length, (batch, count), generator=generator)
    size = torch.randint(1, length + 1, (batch, count), generator=generator)
    spans = torch.stack([start, (start + size).clamp(max=length)], dim=-1)
    if count >= 3:
        spans[:, 0] = 0
        spans[:, 1, 1] = spans[:, 1, 0] + 1
        spans[:, 2] = torch.tensor([0, length])
    return spans[:, torch.randperm(count, generator=generator)].to(torch.int32)


def random_qkv(
    generator: torch.Generator,
    batch: int,
    query_heads: int,
    kv_heads: int,
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    strided: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, T, D], k and v [B, Hkv, T, D], normally distributed.

    `strided` ones lie in memory as [B, T, H, D], the way a projection leaves them; otherwise they are contiguous.
    """

    def make(heads: int) -> torch.Tensor:
        tensor = torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
        return tensor if strided else tensor.contiguous()

    return make(query_heads), make(kv_heads), make(kv_heads)


def random_mask(generator: torch.Generator, batch: int, length: int, padding: str) -> torch.Tensor:
    """bool [batch, length], False on a random number (at least one token stays) of "left", "right" or "no" padding."""
    if padding == "no":
        return torch.ones(batch, length, dtype=torch.bool)
    valid = torch.randint(1, length + 1, (batch, 1), generator=generator)
    right = torch.arange(length) < valid
    return right.flip(1) if padding == "left" else right
