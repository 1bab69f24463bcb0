#pragma once

// CUDA threads as fibers on one host thread: enough of the machine to run the kernels of this directory unchanged on
// host memory, for tests. Threads switch only where they wait (__syncthreads, a warp's collective instruction). They
// are resumed in an order that the stream's handle seeds, and one warp goes on until it has to wait for another: if the
// result depends on the order, a barrier is missing. Shared memory has the exact size that was asked for and starts as
// NaN, so that the address sanitizer sees a step outside it, and a test an element that was never written. A block
// whose threads wait at different barriers raises an error.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int2 {
    int x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

namespace mold::cuda::emulation {

inline std::mt19937 order_of_threads;

class Block {
   public:
    explicit Block(int threads) : threads_(threads), warps_((threads + warp_size - 1) / warp_size) {
        for (Thread& thread : threads_) thread.stack.resize(stack_bytes);
    }

    // Runs `body` once in each thread.
    void run(const std::function<void()>& body) {
        body_ = &body;
        for (Thread& thread : threads_) {
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &scheduler_;
            thread.done = false;
            makecontext(&thread.context, enter, 0);
        }
        unfinished_ = static_cast<int>(threads_.size());
        while (unfinished_ > 0) {
            bool progress = false;
            for (int warp : shuffled(static_cast<int>(warps_.size()))) {
                do {
                    progress_ = false;
                    for (int lane : shuffled(std::min<int>(warp_size, threads_.size() - warp * warp_size))) {
                        resume(warp * warp_size + lane);
                    }
                    progress = progress || progress_;
                } while (progress_);
            }
            if (!progress) throw std::logic_error("the threads of a block wait at different barriers");
        }
    }

    void wait_for_block() {
        meet(all_, static_cast<int>(threads_.size()), [] {});
    }

    // Each lane of the running thread's warp gives a value of its own; the last to come calls together(all 32).
    template <typename Value, typename Together>
    void wait_for_warp(Value& value, Together together) {
        Warp& warp = warps_[running_ / warp_size];
        warp.values[running_ % warp_size] = &value;
        meet(warp.meeting, warp_size, [&] {
            Value* values[warp_size];
            for (int lane = 0; lane < warp_size; ++lane) values[lane] = static_cast<Value*>(warp.values[lane]);
            together(values);
        });
    }

    static inline Block* current = nullptr;

   private:
    static constexpr std::size_t stack_bytes = 64 * 1024;

    struct Thread {
        ucontext_t context;
        std::vector<char> stack;
        bool done;
    };
    struct Meeting {
        int arrived = 0;
        std::uint64_t held = 0;
    };
    struct Warp {
        Meeting meeting;
        void* values[warp_size];
    };

    static std::vector<int> shuffled(int count) {
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), order_of_threads);
        return order;
    }

    void resume(int index) {
        if (threads_[index].done) return;
        running_ = index;
        threadIdx = dim3(static_cast<unsigned>(index));
        swapcontext(&scheduler_, &threads_[index].context);
    }

    static void enter() {
        Block& block = *current;
        (*block.body_)();
        block.threads_[block.running_].done = block.progress_ = true;
        --block.unfinished_;
    }

    template <typename Last>
    void meet(Meeting& meeting, int expected, Last last) {
        const std::uint64_t held = meeting.held;
        if (++meeting.arrived == expected) {
            last();
            meeting.arrived = 0;
            ++meeting.held;
            progress_ = true;
        }
        while (meeting.held == held) swapcontext(&threads_[running_].context, &scheduler_);
    }

    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Meeting all_;
    ucontext_t scheduler_;
    const std::function<void()>* body_ = nullptr;
    int running_ = 0, unfinished_ = 0;
    bool progress_ = false;
};

inline unsigned char* shared_bytes = nullptr;

inline float widen(bfloat16, std::uint32_t bits) {
    const std::uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline float widen(float16, std::uint32_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return bits >> 15 & 1 ? -magnitude : magnitude;
}

inline std::uint32_t narrow(bfloat16, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

inline std::uint32_t narrow(float16, float value) {
    const std::uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    if (!(value == value)) return 0x7fff;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520) return sign | 0x7c00;
    int exponent = -14;  // of the spacing's binade: subnormals share that of 2^-14
    if (magnitude >= std::ldexp(1.f, -14)) exponent = std::ilogb(magnitude);
    // In units of the spacing; nearbyint rounds to nearest even, and a carry moves into the exponent by itself.
    const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return sign | (units + (static_cast<std::uint32_t>(exponent + 14) << 10));
}

}  // namespace mold::cuda::emulation

inline void __syncthreads() { mold::cuda::emulation::Block::current->wait_for_block(); }

inline void __syncwarp() {
    int nothing = 0;
    mold::cuda::emulation::Block::current->wait_for_warp(nothing, [](int**) {});
}

namespace mold::cuda {

using std::max, std::min;

inline unsigned char* shared_memory() { return emulation::shared_bytes; }

template <typename Value>
Value shuffle_xor(Value value, int mask) {
    struct Exchange {
        Value given, taken;
    } exchange{value, value};
    emulation::Block::current->wait_for_warp(exchange, [mask](Exchange** lanes) {
        for (int lane = 0; lane < warp_size; ++lane) lanes[lane]->taken = lanes[lane ^ mask]->given;
    });
    return exchange.taken;
}

template <typename Element>
std::uint32_t pack(Element, float low, float high) {
    return emulation::narrow(Element{}, low) | emulation::narrow(Element{}, high) << 16;
}

template <typename Element>
void multiply(Element, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
    struct Fragments {
        float* c;
        const std::uint32_t *a, *b;
    } fragments{c, a, b};
    emulation::Block::current->wait_for_warp(fragments, [](Fragments** lanes) {
        float left[16][16], right[16][8];
        const auto half = [](std::uint32_t packed, int index) {
            return emulation::widen(Element{}, packed >> 16 * index & 0xffff);
        };
        for (int lane = 0; lane < warp_size; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; ++i) {
                for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half(lanes[lane]->a[r], i);
                for (int r = 0; r < 2; ++r) right[2 * t + i + r * 8][g] = half(lanes[lane]->b[r], i);
            }
        }
        for (int lane = 0; lane < warp_size; ++lane) {
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
                for (int k = 0; k < 16; ++k) lanes[lane]->c[r] += left[row][k] * right[k][column];
            }
        }
    });
}

template <bool transposed>
void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
    struct Request {
        std::uint32_t* matrices;
        const void* row;
    } request{matrices, row};
    emulation::Block::current->wait_for_warp(request, [](Request** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            std::uint16_t rows[8][8];
            for (int r = 0; r < 8; ++r) {
                const uint4 row = *static_cast<const uint4*>(lanes[matrix * 8 + r]->row);  // must be aligned
                std::memcpy(rows[r], &row, sizeof row);
            }
            for (int lane = 0; lane < warp_size; ++lane) {
                const int g = lane / 4, t = lane % 4;
                const std::uint32_t low = transposed ? rows[2 * t][g] : rows[g][2 * t];
                const std::uint32_t high = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
                lanes[lane]->matrices[matrix] = low | high << 16;
            }
        }
    });
}

inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) { load_matrices<false>(matrices, row); }

inline void load_transposed(std::uint32_t (&matrices)[4], const void* row) { load_matrices<true>(matrices, row); }

template <typename Arguments>
void launch(const char*, void (*kernel)(Arguments), dim3 grid, int threads, std::size_t shared_bytes,
            const Arguments& arguments, Stream stream) {
    // sm_80 has the least of the three architectures that are built.
    if (shared_bytes > 163 * 1024) throw std::logic_error("a block may have 163 KiB of shared memory");
    if (grid.y > 65535 || grid.z > 65535) throw std::logic_error("a grid may have 65535 blocks in y and z");
    emulation::order_of_threads.seed(static_cast<unsigned>(stream.handle));
    emulation::Block block(threads);
    emulation::Block::current = &block;
    blockDim = dim3(static_cast<unsigned>(threads));
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx.x = x, blockIdx.y = y, blockIdx.z = z;
                // malloc: aligned to 16 bytes, and exact under the sanitizer.
                const std::unique_ptr<unsigned char, decltype(&std::free)> memory(
                    static_cast<unsigned char*>(std::malloc(shared_bytes)), &std::free);
                std::memset(memory.get(), 0xff, shared_bytes);
                emulation::shared_bytes = memory.get();
                block.run([&] { kernel(arguments); });
            }
        }
    }
}

}  // namespace mold::cuda
