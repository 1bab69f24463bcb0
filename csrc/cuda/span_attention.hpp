#pragma once

#include <string>

#include "tensor.hpp"

// The derivation is in mold_kernels/span_attention.py. All tensors but q, k, lse, dq and dk are contiguous:
//   row_spans int32 [B, S, 2]     half-open token ranges of the steps
//   columns int32 [B, N]          ascending distinct tokens of the key spans, padded with T to a multiple of 64
//   key_columns int32 [B, M, 2]   half-open ranges of the key spans among the columns
namespace mold::cuda {

// pooled [B, S, M]; partial [splits, B, S, N] is working memory.
void span_attention_forward(const std::string& dtype, const Tensor& q, const Tensor& k, const Tensor& lse,
                            const Tensor& row_spans, const Tensor& columns, const Tensor& key_columns, float scale,
                            bool mean, const Tensor& partial, const Tensor& pooled, Stream stream);

// dq, dlse [B, Hq, T] and dk, of grad [B, S, M] times *unit (so that the weights of grad fit float16's range).
//   column_index int32 [B, T]     where a token is among the columns, or -1
// Working memory: column_grad [B, S, N], touching int32 [B, ceil(T / 64) + N / 64, 2], partial [splits, B, Hkv, N, D16]
// with D16 = D rounded up to a multiple of 16.
void span_attention_backward(const std::string& dtype, const Tensor& grad, const Tensor& unit, const Tensor& q,
                             const Tensor& k, const Tensor& lse, const Tensor& row_spans, const Tensor& columns,
                             const Tensor& key_columns, const Tensor& column_index, float scale, bool mean,
                             const Tensor& column_grad, const Tensor& touching, const Tensor& partial, const Tensor& dq,
                             const Tensor& dk, const Tensor& dlse, Stream stream);

}  // namespace mold::cuda
