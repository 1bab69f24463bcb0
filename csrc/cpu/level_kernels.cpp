#include "level_kernels.hpp"

namespace mold::MOLD_LEVEL {

const Kernels kernels = {
    attention_forward,
    attention_backward,
    span_attention_forward,
    span_attention_backward,
    layer_mixture_forward,
    layer_mixture_backward,
    value_pool_forward,
    value_pool_backward,
};

}  // namespace mold::MOLD_LEVEL
