#pragma once

#include <sched.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "threads.hpp"
#include "view.hpp"

// The pieces that kernels are made of. Kernel sources are compiled once for every instruction set, each time with
// MOLD_LEVEL naming a namespace of its own. What has inline linkage must live in that namespace, std:: functions
// included: the linker keeps one copy of a shared inline function, which might be the one compiled for AVX-512.
namespace mold::MOLD_LEVEL {

using std::int64_t;

// ---- elements and vectors

enum class bfloat16 : std::uint16_t {};  // enums, not structs: GCC vectorises loops over them
enum class float16 : std::uint16_t {};

template <typename To, typename From>
inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return bits_of<float>(static_cast<std::uint32_t>(value) << 16); }

// 2^112 is what the biases of the exponents differ by; it makes subnormal numbers normal too.
inline float widen(float16 value) {
    const std::uint32_t half = static_cast<std::uint32_t>(value), size = (half & 0x7fff) << 13;
    const float finite = bits_of<float>(size) * 0x1p112f;
    const std::uint32_t wide = size < 0x0f800000 ? bits_of<std::uint32_t>(finite) : size | 0x7f800000;
    return bits_of<float>(wide | (half & 0x8000) << 16);
}

template <typename Element, typename T>
inline Element narrow(T value) {
    if constexpr (std::is_same_v<Element, bfloat16>) {
        const std::uint32_t bits = bits_of<std::uint32_t>(value);
        const std::uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return bfloat16(value == value ? nearest_even : 0x7fc0);  // NaN: rounding could carry it into infinity
    } else if constexpr (std::is_same_v<Element, float16>) {
        const std::uint32_t bits = bits_of<std::uint32_t>(value), size = bits & 0x7fffffff;
        // Below 2^-14 the spacing is that of the numbers around 1/2: adding 1/2 rounds.
        const std::uint32_t small = bits_of<std::uint32_t>(bits_of<float>(size) + 0.5f) - 0x3f000000;
        const std::uint32_t normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
        const std::uint32_t finite = size < 0x38800000 ? small : normal;
        const std::uint32_t special = size > 0x7f800000 ? 0x7e00 : 0x7c00;
        return float16((size < 0x477ff000 ? finite : special) | (bits >> 16 & 0x8000));  // from 65520 on: infinity
    } else {
        return static_cast<Element>(value);
    }
}

// Calls function(Element{}, T{}) for the types that `dtype` names; T is what sums are kept in.
template <typename Function>
inline void dispatch(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::float32: return function(float{}, float{});
        case Dtype::bfloat16: return function(bfloat16{}, float{});
        case Dtype::float16: return function(float16{}, float{});
        default: return function(double{}, double{});
    }
}

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(MOLD_VECTOR_BYTES)));
    using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    typedef Integer integers __attribute__((vector_size(MOLD_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int64_t lanes = MOLD_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vector<T> load(const T* source) {
    Vector<T> vector;
    std::memcpy(&vector, source, sizeof vector);
    return vector;
}

template <typename T>
inline void store(Vector<T> vector, T* target) {
    std::memcpy(target, &vector, sizeof vector);
}

template <typename T>
inline Vector<T> splat(T value) {
    return Vector<T>{} + value;
}

template <typename T>
inline T sum(Vector<T> vector) {
    T total = 0;
    for (int64_t lane = 0; lane < lanes<T>; ++lane) total += vector[lane];
    return total;
}

// Lane i of the result is lane I[i] of a, behind which stand the lanes of b.
template <typename T, std::size_t... I>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename VectorOf<T>::integers{I...});
#endif
}

template <typename T, std::size_t Half, std::size_t... I>
inline void exchange(Vector<T>& a, Vector<T>& b, std::index_sequence<I...>) {
    const Vector<T> first = shuffle<T>(a, b, std::index_sequence<((I & Half) ? lanes<T> + I - Half : I)...>{});
    b = shuffle<T>(a, b, std::index_sequence<((I & Half) ? lanes<T> + I : I + Half)...>{});
    a = first;
}

// Transposes a square of as many vectors as they have lanes: quarters change places, then those of the quarters.
template <typename T, std::size_t Half = lanes<T> / 2>
inline void transpose_square(Vector<T>* rows) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < lanes<T>; ++i) {
        if (!(i & Half)) exchange<T, Half>(rows[i], rows[i + Half], std::make_index_sequence<lanes<T>>{});
    }
    if constexpr (Half > 1) transpose_square<T, Half / 2>(rows);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---- exp

template <typename T>
struct Exponential;
template <>
struct Exponential<float> {
    static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f, shift = 0x1.8p23f;
    static constexpr float least = -87.33f, most = 88.37f;
    static constexpr int degree = 7, mantissa = 23, bias = 127;
};
template <>
struct Exponential<double> {
    static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33, shift = 0x1.8p52;
    static constexpr double least = -708.3, most = 709.4;
    static constexpr int degree = 13, mantissa = 52, bias = 1023;
};

// Of each vector e^x = 2^n e^r with |r| <= ln(2) / 2, where the Taylor polynomial errs by less than half a spacing. 0 below
// the smallest normal number, infinity above the largest, NaN of NaN. Several vectors take their steps together: of one
// each step waits for the one before.
template <typename T, int count>
inline void exponentials(Vector<T>* x) {
    using E = Exponential<T>;
    using Integers = typename VectorOf<T>::integers;
    Vector<T> shifted[count], r[count], polynomial[count];
    double factorial = 1;
    for (int i = 2; i <= E::degree; ++i) factorial *= i;
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) shifted[j] = x[j] * static_cast<T>(1.4426950408889634) + E::shift;  // low bits: n
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) r[j] = x[j] - (shifted[j] - E::shift) * E::ln2_high;
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) r[j] -= (shifted[j] - E::shift) * E::ln2_low;
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) polynomial[j] = splat<T>(static_cast<T>(1 / factorial));
#pragma GCC unroll 16
    for (int i = E::degree; i > 0; --i) {
        factorial /= i;
#pragma GCC unroll 4
        for (int j = 0; j < count; ++j) polynomial[j] = polynomial[j] * r[j] + static_cast<T>(1 / factorial);
    }
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
        Integers exponent;
        std::memcpy(&exponent, &shifted[j], sizeof exponent);
        exponent = (exponent + E::bias) << E::mantissa;
        Vector<T> power;
        std::memcpy(&power, &exponent, sizeof power);
        Vector<T> result = polynomial[j] * power;
        result = x[j] < E::least ? Vector<T>{} : result;
        x[j] = x[j] > E::most ? splat<T>(static_cast<T>(HUGE_VAL)) : result;
    }
}

template <typename T>
inline Vector<T> exponential(Vector<T> x) {
    exponentials<T, 1>(&x);
    return x;
}

// tanh x. Near 0 by Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))), which up to 1/2 errs by less
// than a spacing; (1 - e^-2x) / (1 + e^-2x) would cancel there.
template <typename T>
inline Vector<T> hyperbolic_tangent(Vector<T> x) {
    const Vector<T> square = x * x, size = x < 0 ? -x : x;
    Vector<T> numerator = splat<T>(17), denominator = splat<T>(1);
#pragma GCC unroll 8
    for (int odd = 15; odd > 0; odd -= 2) {
        const Vector<T> next = numerator * static_cast<T>(odd) + denominator * square;
        denominator = numerator;
        numerator = next;
    }
    const Vector<T> shrunk = exponential<T>(size * static_cast<T>(-2));
    const Vector<T> far = (1 - shrunk) / (1 + shrunk);
    return size < static_cast<T>(0.5) ? x * denominator / numerator : x < 0 ? -far : far;
}

// ---- visibility

// `visible_ranges` of mold_kernels/visibility.py, int32 [2, Tk], what positions see beside what causality hides; null
// where that is everything. Both of its rows ascend.
struct Ranges {
    const std::int32_t *starts, *ends;

    explicit Ranges(const View* view)
        : starts(view ? view->at<const std::int32_t>(0) : nullptr),
          ends(view ? view->at<const std::int32_t>(1) : nullptr) {}

    int64_t start(int64_t row) const { return starts ? starts[row] : 0; }
    // Positions from here on do not see the column; where there are none, `all`.
    int64_t end(int64_t column, int64_t all) const { return ends ? ends[column] : all; }
};

// ---- matrix product

// What products are made of: numbers of type T, or bfloat16 as it is where the machine adds products of two pairs to a
// float32 at once. `pack` numbers that follow each other in a sum then lie side by side, in a word: a matrix [n, width]
// that is summed over n is stacked as [n / pack][width][pack], with zeros where n is odd.
#ifdef __AVX512BF16__
template <typename Element, typename T>
using Number = std::conditional_t<std::is_same_v<Element, bfloat16>, bfloat16, T>;
#else
template <typename Element, typename T>
using Number = T;
#endif
template <typename N>
constexpr int64_t pack = std::is_same_v<N, bfloat16> ? 2 : 1;
template <typename N>
using Sum = std::conditional_t<std::is_same_v<N, bfloat16>, float, N>;

template <typename N>
inline Vector<Sum<N>> load_words(const N* source) {
    Vector<Sum<N>> words;
    std::memcpy(&words, source, sizeof words);
    return words;
}

template <typename N>
inline void multiply_add(Vector<Sum<N>>& sums, Vector<Sum<N>> row, const N* factor) {
    if constexpr (pack<N> == 1) {
        sums += row * *factor;
    } else {
#ifdef __AVX512BF16__
        std::int32_t word;
        std::memcpy(&word, factor, sizeof word);
        sums = (Vector<float>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)row, (__m512bh)_mm512_set1_epi32(word));
#endif
    }
}

// sums += the products of two rows, word by word.
template <typename N>
inline void multiply_add_rows(Vector<Sum<N>>& sums, Vector<Sum<N>> a, Vector<Sum<N>> b) {
    if constexpr (pack<N> == 1) {
        sums += a * b;
    } else {
#ifdef __AVX512BF16__
        sums = (Vector<float>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#endif
    }
}

// Stores the sums of a row and of those after it in the pack as numbers: as rows at that distance, stacked, or both (null:
// not). With a pack of one both are the same.
template <typename N>
inline void store_numbers(const Vector<Sum<N>>* sums, N* rows, [[maybe_unused]] int64_t row, N* stacked) {
    if constexpr (pack<N> == 1) {
        store<N>(sums[0], rows ? rows : stacked);
    } else {
#ifdef __AVX512BF16__
        typedef std::uint16_t Half __attribute__((vector_size(32)));
        typedef std::uint32_t Whole __attribute__((vector_size(64)));
        Half numbers[2];
        for (int e = 0; e < 2; ++e) {
            const __m256bh rounded = _mm512_cvtneps_pbh((__m512)sums[e]);
            std::memcpy(numbers + e, &rounded, sizeof rounded);
            if (rows) std::memcpy(rows + e * row, numbers + e, sizeof rounded);
        }
        const Whole words =
            __builtin_convertvector(numbers[0], Whole) | __builtin_convertvector(numbers[1], Whole) << 16;
        if (stacked) std::memcpy(stacked, &words, sizeof words);
#endif
    }
}

// Element (i, j) is at data[i * row + j * column]; of a word, its first number is.
template <typename N>
struct Matrix {
    const N* data;
    int64_t row, column;
};

// As many sums as the registers hold beside a row of b and an entry of a: 24 of 32, or 12 of 16.
constexpr int tile_rows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = 2;
#endif

template <typename T>
constexpr int64_t tile_width = tile_vectors * lanes<T>;

template <typename N, int Rows, int Vectors>
inline void multiply_tile(int64_t depth, Matrix<N> a, const N* b, int64_t b_row, Sum<N>* c, int64_t c_row, bool add) {
    constexpr int64_t step = lanes<Sum<N>>;
    Vector<Sum<N>> sums[Rows][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) sums[i][j] = add ? load(c + i * c_row + j * step) : Vector<Sum<N>>{};
    }
    for (int64_t p = 0; p < depth; p += pack<N>) {
        Vector<Sum<N>> row[Vectors];
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) row[j] = load_words(b + p * b_row + j * step * pack<N>);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < Vectors; ++j) multiply_add(sums[i][j], row[j], a.data + i * a.row + p * a.column);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) store(sums[i][j], c + i * c_row + j * step);
    }
}

template <typename N, int Vectors, int Rows = tile_rows>
inline void multiply_rows(
    int64_t rows, int64_t depth, Matrix<N> a, const N* b, int64_t b_row, Sum<N>* c, int64_t c_row, bool add) {
    for (; rows >= Rows; rows -= Rows, a.data += Rows * a.row, c += Rows * c_row) {
        multiply_tile<N, Rows, Vectors>(depth, a, b, b_row, c, c_row, add);
    }
    if constexpr (Rows > 1) {
        if (rows) multiply_rows<N, Vectors, Rows - 1>(rows, depth, a, b, b_row, c, c_row, add);
    }
}

// c[i, j] = sum_p a[i, p] b[p, j], added to what c holds if `add`: i < rows, j < width (a multiple of the lanes),
// p < depth (a multiple of the pack). b is stacked.
template <typename N, int Vectors = tile_vectors>
inline void multiply(
    int64_t rows, int64_t width, int64_t depth, Matrix<N> a, const N* b, int64_t b_row, Sum<N>* c, int64_t c_row,
    bool add) {
    constexpr int64_t step = Vectors * lanes<Sum<N>>;
    for (; width >= step; width -= step, b += step * pack<N>, c += step) {
        multiply_rows<N, Vectors>(rows, depth, a, b, b_row, c, c_row, add);
    }
    if constexpr (Vectors > 1) {
        if (width) multiply<N, Vectors - 1>(rows, width, depth, a, b, b_row, c, c_row, add);
    }
}

// Lane i of the result is the sum of rows[i], of as many vectors as they have lanes.
template <typename T, std::size_t Half = lanes<T> / 2>
inline Vector<T> add_lanes(Vector<T>* rows) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Half; ++i) {
        exchange<T, Half>(rows[i], rows[i + Half], std::make_index_sequence<lanes<T>>{});
        rows[i] += rows[i + Half];
    }
    if constexpr (Half > 1) return add_lanes<T, Half / 2>(rows);
    return rows[0];
}

// Of so few rows products with keys as they lie cost less than keys turned into panels.
constexpr int64_t few_rows = 12;

// So many rows further b is fetched into the cache: hardware does not foresee the next page, nor the next head.
constexpr int64_t few_ahead = 16;

template <typename N, int Rows>
inline void multiply_few_tile(
    int64_t width, const N* a, int64_t a_row, const N* b, int64_t b_row, Sum<N>* c, int64_t c_row) {
    constexpr int64_t side = lanes<Sum<N>>, together = Rows > 1 && side > 4 ? 4 : side;
    Vector<Sum<N>> products[Rows][side];
    for (int64_t j = 0; j < side; j += together) {
        Vector<Sum<N>> sums[Rows][together]{};
        for (int64_t d = 0; d < width; d += side * pack<N>) {
            Vector<Sum<N>> rows[Rows];
#pragma GCC unroll 4
            for (int i = 0; i < Rows; ++i) rows[i] = load_words(a + i * a_row + d);
#pragma GCC unroll 16
            for (int64_t n = 0; n < together; ++n) {
                const Vector<Sum<N>> column = load_words(b + (j + n) * b_row + d);
#pragma GCC unroll 4
                for (int i = 0; i < Rows; ++i) multiply_add_rows<N>(sums[i][n], rows[i], column);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
            for (int64_t n = 0; n < together; ++n) products[i][j + n] = sums[i][n];
        }
    }
    for (int i = 0; i < Rows; ++i) store<Sum<N>>(add_lanes<Sum<N>>(products[i]), c + i * c_row);
}

// c[i, j] = <a_i, b_j>, of rows as they lie: i < rows, j < columns (a multiple of the lanes), width a multiple of the
// lanes' words. Three rows of a at once: a row of b comes from memory once.
template <typename N>
inline void multiply_few(
    int64_t rows, int64_t columns, int64_t width, const N* a, int64_t a_row, const N* b, int64_t b_row, Sum<N>* c,
    int64_t c_row) {
    constexpr int64_t side = lanes<Sum<N>>, line = 64 / sizeof(N);
    for (int64_t j = 0; j < columns; j += side, b += side * b_row, c += side) {
        for (int64_t n = 0; n < side; ++n) {
            for (int64_t d = 0; d < width; d += line) __builtin_prefetch(b + (n + few_ahead) * b_row + d);
        }
        int64_t i = 0;
        for (; i + 3 <= rows; i += 3) multiply_few_tile<N, 3>(width, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
        if (i + 2 == rows) multiply_few_tile<N, 2>(width, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
        if (i + 1 == rows) multiply_few_tile<N, 1>(width, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
    }
}

// ---- memory and tasks

// Uninitialised memory, aligned for vectors.
struct Memory {
    char* data;
    explicit Memory(int64_t bytes) : data(static_cast<char*>(::operator new(bytes, std::align_val_t{64}))) {}
    ~Memory() { ::operator delete(data, std::align_val_t{64}); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
};

// Hands out parts of a memory. Without one (null) it only counts the bytes.
struct Scratch {
    char* memory = nullptr;
    int64_t used = 0;

    template <typename T>
    T* take(int64_t count) {
        T* part = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return part;
    }
};

// Calls task(index, buffers) for every index below count on up to `threads` threads; tasks start in ascending order.
// Each thread has buffers of its own, which make(scratch) takes from uninitialised memory.
template <typename Make, typename Task>
inline void parallel(int threads, int64_t count, const Make& make, const Task& task) {
    if (count == 0) return;
    threads = static_cast<int>(smaller(threads, count));
    Scratch counted;
    make(counted);
    const Memory memory(threads * counted.used);
    struct Shared {
        const Make& make;
        const Task& task;
        char* memory;
        int64_t bytes, count;
        std::atomic<int64_t> next_thread{0}, next_task{0};
    } shared{make, task, memory.data, counted.used, count};
    run_threads(
        threads,
        [](void* context) {
            Shared& shared = *static_cast<Shared*>(context);
            Scratch scratch{shared.memory + shared.bytes * shared.next_thread.fetch_add(1)};
            auto buffers = shared.make(scratch);
            for (int64_t i; (i = shared.next_task.fetch_add(1)) < shared.count;) shared.task(i, buffers);
        },
        &shared);
}

// Lets tasks that add to the same memory take turns chunk by chunk, always in the order of their indices, so that
// sums do not depend on the threads. The task that goes first must have at least as many chunks.
class Turns {
public:
    explicit Turns(int64_t tasks) : memory(tasks * static_cast<int64_t>(sizeof(std::atomic<int64_t>))) {
        finished = reinterpret_cast<std::atomic<int64_t>*>(memory.data);
        for (int64_t i = 0; i < tasks; ++i) new (finished + i) std::atomic<int64_t>(0);
    }
    void wait(int64_t before, int64_t chunk) const {
        while (finished[before].load(std::memory_order_acquire) <= chunk) sched_yield();
    }
    void finish(int64_t task, int64_t chunk) { finished[task].store(chunk + 1, std::memory_order_release); }

private:
    Memory memory;
    std::atomic<int64_t>* finished;
};

}  // namespace mold::MOLD_LEVEL
