// The whole of equations 4 to 6 in one launch, its gradient in another.
//
// Forward: a block an example, because the teacher's layer weights need all its steps before the first mixture can be
// made. It reads the teacher's maps twice and the student's once: for 30 layers, 20 steps and 50 key words 360 KB, a
// few microseconds of one multiprocessor. Backward: a block a layer and example. Every sum has one order.
//
// The divergence of two rows that are nearly alike is a small difference of large logarithms, so rows are normalised in
// float64; sums over a whole map are float64 across rows, and their error does not grow with the map.

#include <cmath>

#include "../row_norm.hpp"
#include "device.cuh"
#include "layer_mixture_kl.hpp"

namespace mold::cuda {
namespace {

constexpr int threads = 512;
constexpr int warps = threads / warp_size;

template <typename Value>
__device__ Value warp_sum(Value value) {
    for (int mask = 1; mask < warp_size; mask *= 2) value += shuffle_xor(value, mask);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int mask = 1; mask < warp_size; mask *= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// One value a warp -> their sum, in every thread.
__device__ inline double block_sum(double value, double* of_warps) {
    if (threadIdx.x % warp_size == 0) of_warps[threadIdx.x / warp_size] = value;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += of_warps[warp];
    return sum;
}

struct Maps {
    const float* data;
    Strides<4> strides;

    __device__ const float* row(int layer, int b, int step) const {
        return data + layer * strides.along[0] + b * strides.along[1] + step * strides.along[2];
    }
};

struct Forward {
    Maps teacher, student;
    const float* weights;
    Strides<2> weights_strides;
    const std::int64_t *num_steps, *num_keys;
    float *teacher_mixture, *mixture_grad, *loss;
    float tau;
    RowNorm row_norm;
    double l1_epsilon;
    int teacher_layers, student_layers, steps, keys;
};

// A step's row of one mixture, m = lane, lane + 32, ...: only this thread reads again what it writes.
__device__ inline void mix(const Maps& maps, int layers, const float* weights, int b, int step, int keys,
                           float* mixture) {
    for (int m = threadIdx.x % warp_size; m < keys; m += warp_size) {
        float sum = 0;
        for (int layer = 0; layer < layers; ++layer) {
            sum += weights[layer] * maps.row(layer, b, step)[m * maps.strides.along[3]];
        }
        mixture[m] = sum;
    }
}

// log sum_m exp of a warp's row.
__device__ inline double row_logsumexp(const float* row, int keys) {
    float largest = -INFINITY;
    for (int m = threadIdx.x % warp_size; m < keys; m += warp_size) largest = fmaxf(largest, row[m]);
    largest = warp_max(largest);
    double sum = 0;
    for (int m = threadIdx.x % warp_size; m < keys; m += warp_size) sum += exp(static_cast<double>(row[m]) - largest);
    return largest + log(warp_sum(sum));
}

// sum_m of (row + epsilon) of a warp's row.
__device__ inline double row_mass(const float* row, int keys, double l1_epsilon) {
    double sum = 0;
    for (int m = threadIdx.x % warp_size; m < keys; m += warp_size) sum += row[m] + l1_epsilon;
    return warp_sum(sum);
}

// One block a multiprocessor: there are few examples, and registers for two would spill.
__global__ void __launch_bounds__(threads, 1) forward_kernel(Forward p) {
    auto* of_warps = reinterpret_cast<double*>(shared_memory());
    float* teacher_weights = reinterpret_cast<float*>(of_warps + warps);
    float* student_weights = teacher_weights + p.teacher_layers;

    const int b = blockIdx.x, warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const int keys = static_cast<int>(min(p.num_keys[b], static_cast<std::int64_t>(p.keys)));
    const int steps = keys > 0 ? static_cast<int>(min(p.num_steps[b], static_cast<std::int64_t>(p.steps))) : 0;

    for (int layer = threadIdx.x; layer < p.student_layers; layer += threads) {
        student_weights[layer] = p.weights[b * p.weights_strides.along[0] + layer * p.weights_strides.along[1]];
    }
    const double pairs = max(static_cast<double>(steps) * (keys - 1), 1.0);
    for (int layer = warp; layer < p.teacher_layers; layer += warps) {
        double change = 0;
        for (int step = 0; step < steps; ++step) {
            const float* row = p.teacher.row(layer, b, step);
            const std::int64_t along = p.teacher.strides.along[3];
            for (int m = lane; m + 1 < keys; m += warp_size) change += fabsf(row[(m + 1) * along] - row[m * along]);
        }
        change = warp_sum(change);
        if (lane == 0) teacher_weights[layer] = static_cast<float>(change / pairs / p.tau);
    }
    __syncthreads();
    if (warp == 0) {
        const double logsumexp = row_logsumexp(teacher_weights, p.teacher_layers);
        for (int layer = lane; layer < p.teacher_layers; layer += warp_size) {
            teacher_weights[layer] = static_cast<float>(exp(teacher_weights[layer] - logsumexp));
        }
    }
    __syncthreads();

    const bool softmax = p.row_norm == RowNorm::softmax;
    double divergence = 0;
    for (int step = warp; step < p.steps; step += warps) {
        const std::int64_t offset = (static_cast<std::int64_t>(b) * p.steps + step) * p.keys;
        float *teacher = p.teacher_mixture + offset, *student = p.mixture_grad + offset;
        const int valid = step < steps ? keys : 0;
        mix(p.teacher, p.teacher_layers, teacher_weights, b, step, valid, teacher);
        mix(p.student, p.student_layers, student_weights, b, step, valid, student);
        const double teacher_norm = softmax ? row_logsumexp(teacher, valid) : row_mass(teacher, valid, p.l1_epsilon);
        const double student_norm = softmax ? row_logsumexp(student, valid) : row_mass(student, valid, p.l1_epsilon);
        for (int m = lane; m < p.keys; m += warp_size) {
            double gradient = 0;
            if (m < valid && softmax) {
                const double log_p = teacher[m] - teacher_norm, log_q = student[m] - student_norm, prob = exp(log_p);
                divergence += prob * (log_p - log_q);
                gradient = exp(log_q) - prob;
            } else if (m < valid) {
                const double mass = student[m] + p.l1_epsilon, prob = (teacher[m] + p.l1_epsilon) / teacher_norm;
                divergence += prob * log(prob * student_norm / mass);
                gradient = 1 / student_norm - prob / mass;
            }
            student[m] = static_cast<float>(gradient / max(steps, 1));
        }
    }
    divergence = warp_sum(divergence);
    divergence = block_sum(divergence, of_warps);
    if (threadIdx.x == 0) p.loss[b] = static_cast<float>(divergence / max(steps, 1));
}

struct Backward {
    const float *grad, *mixture_grad;
    Maps student;
    const float* weights;
    Strides<2> weights_strides;
    float *attention_grad, *weights_grad;
    int batch, layers, steps, keys;
};

__global__ void __launch_bounds__(threads) backward_kernel(Backward p) {
    auto* of_warps = reinterpret_cast<double*>(shared_memory());
    const int layer = blockIdx.x, b = blockIdx.y, warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const float grad = p.grad[b];
    const float weight = grad * p.weights[b * p.weights_strides.along[0] + layer * p.weights_strides.along[1]];
    double along_mixture = 0;
    for (int step = warp; step < p.steps; step += warps) {
        const float* row = p.student.row(layer, b, step);
        const float* mixture_grad = p.mixture_grad + (static_cast<std::int64_t>(b) * p.steps + step) * p.keys;
        float* attention_grad =
            p.attention_grad + ((static_cast<std::int64_t>(layer) * p.batch + b) * p.steps + step) * p.keys;
        float sum = 0;
        for (int m = lane; m < p.keys; m += warp_size) {
            const float gradient = mixture_grad[m];
            attention_grad[m] = weight * gradient;
            sum += gradient != 0 ? gradient * row[m * p.student.strides.along[3]] : 0;  // padding may hold anything
        }
        along_mixture += warp_sum(sum);
    }
    along_mixture = block_sum(along_mixture, of_warps);
    if (threadIdx.x == 0) p.weights_grad[b * p.layers + layer] = static_cast<float>(grad * along_mixture);
}

}  // namespace

void layer_mixture_kl_forward(const Tensor& teacher_attention, const Tensor& student_attention, const Tensor& weights,
                              const Tensor& num_steps, const Tensor& num_keys, float tau, const std::string& row_norm,
                              double l1_epsilon, const Tensor& teacher_mixture, const Tensor& mixture_grad, const Tensor& loss,
                              Stream stream) {
    const int teacher_layers = teacher_attention.size(0), student_layers = student_attention.size(0);
    const Forward arguments{.teacher = {teacher_attention.data<const float>(), Strides<4>(teacher_attention)},
                            .student = {student_attention.data<const float>(), Strides<4>(student_attention)},
                            .weights = weights.data<const float>(),
                            .weights_strides = Strides<2>(weights),
                            .num_steps = num_steps.data<const std::int64_t>(),
                            .num_keys = num_keys.data<const std::int64_t>(),
                            .teacher_mixture = teacher_mixture.data<float>(),
                            .mixture_grad = mixture_grad.data<float>(),
                            .loss = loss.data<float>(),
                            .tau = tau,
                            .row_norm = row_norm_named(row_norm),
                            .l1_epsilon = l1_epsilon,
                            .teacher_layers = teacher_layers,
                            .student_layers = student_layers,
                            .steps = student_attention.size(2),
                            .keys = student_attention.size(3)};
    launch("layer_mixture_kl_forward", forward_kernel, dim3(student_attention.size(1)), threads,
           sizeof(double) * warps + sizeof(float) * (teacher_layers + student_layers), arguments, stream);
}

void layer_mixture_kl_backward(const Tensor& grad, const Tensor& mixture_grad, const Tensor& student_attention,
                               const Tensor& weights, const Tensor& attention_grad, const Tensor& weights_grad,
                               Stream stream) {
    const Backward arguments{.grad = grad.data<const float>(),
                             .mixture_grad = mixture_grad.data<const float>(),
                             .student = {student_attention.data<const float>(), Strides<4>(student_attention)},
                             .weights = weights.data<const float>(),
                             .weights_strides = Strides<2>(weights),
                             .attention_grad = attention_grad.data<float>(),
                             .weights_grad = weights_grad.data<float>(),
                             .batch = student_attention.size(1),
                             .layers = student_attention.size(0),
                             .steps = student_attention.size(2),
                             .keys = student_attention.size(3)};
    launch("layer_mixture_kl_backward", backward_kernel, dim3(student_attention.size(0), student_attention.size(1)),
           threads, sizeof(double) * warps, arguments, stream);
}

}  // namespace mold::cuda
