#include "level_kernels.hpp"

namespace mold::MOLD_LEVEL {

const Kernels kernels = {
    attention_with_lse_forward,
    attention_with_lse_backward,
    span_attention_forward,
    key_attention_forward,
    span_attention_backward,
    layer_mixture_kl_forward,
    layer_mixture_kl_backward,
    value_pool_forward,
    value_pool_backward,
};

}  // namespace mold::MOLD_LEVEL
