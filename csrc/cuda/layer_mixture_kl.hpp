#pragma once

#include <string>

#include "tensor.hpp"

// The derivation is in mold_kernels/layer_mixture_kl.py. Everything is float32 but num_steps and num_keys, int64 [B].
namespace mold::cuda {

// loss [B] and mixture_grad [B, S, M], the gradient of each example's loss in its student mixture. The maps
// [L, B, S, M] and weights [B, L2] have any strides; teacher_mixture [B, S, M] is working memory; all else contiguous.
void layer_mixture_kl_forward(const Tensor& teacher_attention, const Tensor& student_attention, const Tensor& weights,
                              const Tensor& num_steps, const Tensor& num_keys, float tau, const std::string& row_norm,
                              double l1_epsilon, const Tensor& teacher_mixture, const Tensor& mixture_grad, const Tensor& loss,
                              Stream stream);

// attention_grad [L2, B, S, M] and weights_grad [B, L2] of grad [B].
void layer_mixture_kl_backward(const Tensor& grad, const Tensor& mixture_grad, const Tensor& student_attention,
                               const Tensor& weights, const Tensor& attention_grad, const Tensor& weights_grad,
                               Stream stream);

}  // namespace mold::cuda
