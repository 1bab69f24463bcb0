#pragma once

// Everything that the kernels use of the hardware, one small function each, in two versions: the instruction under
// nvcc, and what the PTX manual says it does under a host compiler (emulation.hpp). The kernels know no difference, so
// their indices and arithmetic run, and are tested, on machines without a GPU.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "tensor.hpp"

namespace mold::cuda {

struct bfloat16 {
    std::uint16_t bits;
};

struct float16 {
    std::uint16_t bits;
};

constexpr int warp_size = 32;

}  // namespace mold::cuda

#ifndef __CUDACC__
#include "emulation.hpp"
#else

namespace mold::cuda {

extern __shared__ uint4 dynamic_shared_memory[];

__device__ inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(dynamic_shared_memory); }

template <typename Value>
__device__ Value shuffle_xor(Value value, int mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
}

// Two values rounded to nearest even, the first in the low half.
__device__ inline std::uint32_t pack(bfloat16, float low, float high) {
    std::uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ inline std::uint32_t pack(float16, float low, float high) {
    std::uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// c [16, 8] += a [16, 16] b [16, 8], each spread over the lanes of a warp. With g = lane / 4, t = lane % 4:
//   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), two neighbours in k a register
//   b: (2t.., g), (2t + 8.., g), likewise      c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#define MOLD_MMA(TYPE)                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ inline void multiply(bfloat16, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
    MOLD_MMA("bf16");
}

__device__ inline void multiply(float16, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
    MOLD_MMA("f16");
}

#undef MOLD_MMA

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i, and every
// lane gets elements 2t, 2t + 1 of row g of each. `load_transposed` gives elements (2t, g) and (2t + 1, g).
__device__ inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

__device__ inline void load_transposed(std::uint32_t (&matrices)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename Arguments>
void launch(const char* name, void (*kernel)(Arguments), dim3 grid, int threads, std::size_t shared_bytes,
            const Arguments& arguments, Stream stream) {
    check(cudaSetDevice(stream.device), name);
    // More than 48 KiB of dynamic shared memory has to be asked for.
    if (shared_bytes > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              name);
    }
    kernel<<<grid, threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream.handle)>>>(arguments);
    check(cudaGetLastError(), name);
}

}  // namespace mold::cuda

#endif
