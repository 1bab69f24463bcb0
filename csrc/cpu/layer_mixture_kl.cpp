#include "level_kernels.hpp"
#include "simd.hpp"

// Formulas in mold_kernels/layer_mixture_kl.py. Everything after the mixture is made in float64: it is S x M numbers, and
// the divergence of nearly equal rows is a small difference. Reads every attention twice (teacher) or once (student).
namespace mold::MOLD_LEVEL {
namespace {

int64_t count_at(const View& counts, int64_t example) { return *counts.at<const int64_t>(example); }

// Steps and key words that are no padding. An example without key words has no valid step.
struct Valid {
    int64_t steps, keys;

    Valid(const View& num_steps, const View& num_keys, int64_t example, int64_t most_steps, int64_t most_keys)
        : steps(smaller(larger(count_at(num_steps, example), 0), most_steps)),
          keys(smaller(larger(count_at(num_keys, example), 0), most_keys)) {
        if (keys == 0) steps = 0;
    }
};

// The mean change between neighbouring key words of one layer, 0 where there is no pair.
template <typename T>
double mean_change(const View& attention, int64_t layer, int64_t example, const Valid& valid) {
    double total = 0;
    for (int64_t s = 0; s < valid.steps; ++s) {
        const T* row = attention.at<const T>(layer, example, s);
        const int64_t stride = attention.strides[3];
        for (int64_t m = 1; m < valid.keys; ++m) {
            total += std::fabs(static_cast<double>(row[m * stride]) - row[(m - 1) * stride]);
        }
    }
    return total / static_cast<double>(larger(1, valid.steps * (valid.keys - 1)));
}

void softmax(double* values, int64_t count) {
    double most = -HUGE_VAL, total = 0;
    for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
    for (int64_t i = 0; i < count; ++i) total += values[i] = std::exp(values[i] - most);
    for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

// row[m] = sum_l weights[l * stride] attention[l, example, step, m].
template <typename T, typename Weight>
void mix(
    const View& attention, int64_t example, int64_t step, const Weight* weights, int64_t stride, int64_t keys,
    double* row) {
    for (int64_t m = 0; m < keys; ++m) row[m] = 0;
    for (int64_t l = 0; l < attention.sizes[0]; ++l) {
        const T* source = attention.at<const T>(l, example, step);
        const double weight = weights[l * stride];
        if (attention.strides[3] == 1) {
#pragma omp simd
            for (int64_t m = 0; m < keys; ++m) row[m] += weight * source[m];
        } else {
            for (int64_t m = 0; m < keys; ++m) row[m] += weight * source[m * attention.strides[3]];
        }
    }
}

// Logarithms of the row made a distribution; returns what a row's gradient needs: its sum ("l1").
double log_row(double* row, int64_t keys, RowNorm row_norm, double l1_epsilon) {
    double most = -HUGE_VAL, total = 0;
    if (row_norm == RowNorm::l1) {
        for (int64_t m = 0; m < keys; ++m) total += row[m] += l1_epsilon;
        for (int64_t m = 0; m < keys; ++m) row[m] = std::log(row[m] / total);
        return total;
    }
    for (int64_t m = 0; m < keys; ++m) most = row[m] > most ? row[m] : most;
    for (int64_t m = 0; m < keys; ++m) total += std::exp(row[m] - most);
    for (int64_t m = 0; m < keys; ++m) row[m] -= most + std::log(total);
    return total;
}

template <typename T>
void forward(
    const View& teacher, const View& student, const View& weights, const View& num_steps, const View& num_keys,
    double tau, RowNorm row_norm, double l1_epsilon, const View& loss, const View& mixture_grad, int threads) {
    const int64_t teachers = teacher.sizes[0], batch = teacher.sizes[1], steps = teacher.sizes[2],
                  keys = teacher.sizes[3];
    const auto valid_of = [&](int64_t example) { return Valid(num_steps, num_keys, example, steps, keys); };
    const Memory memory((batch * teachers + batch * steps) * static_cast<int64_t>(sizeof(double)));
    double *teacher_weights = reinterpret_cast<double*>(memory.data), *divergence = teacher_weights + batch * teachers;

    parallel(threads, batch * teachers, [](Scratch&) { return 0; }, [&](int64_t task, int) {
        const int64_t example = task / teachers;
        teacher_weights[task] = mean_change<T>(teacher, task % teachers, example, valid_of(example)) / tau;
    });
    for (int64_t b = 0; b < batch; ++b) softmax(teacher_weights + b * teachers, teachers);

    struct Buffers {
        double *teacher, *student;
    };
    const auto make = [&](Scratch& scratch) { return Buffers{scratch.take<double>(keys), scratch.take<double>(keys)}; };
    parallel(threads, batch * steps, make, [&](int64_t task, Buffers& rows) {
        const int64_t example = task / steps, step = task % steps;
        const Valid valid = valid_of(example);
        T* gradient = mixture_grad.at<T>(example, step);
        for (int64_t m = 0; m < keys; ++m) gradient[m] = 0;
        divergence[task] = 0;
        if (step >= valid.steps) return;
        mix<T>(teacher, example, step, teacher_weights + example * teachers, 1, valid.keys, rows.teacher);
        mix<T>(student, example, step, weights.at<const T>(example), weights.strides[1], valid.keys, rows.student);
        log_row(rows.teacher, valid.keys, row_norm, l1_epsilon);
        const double total = log_row(rows.student, valid.keys, row_norm, l1_epsilon);
        const double count = count_at(num_steps, example);
        for (int64_t m = 0; m < valid.keys; ++m) {
            const double p = std::exp(rows.teacher[m]), q = std::exp(rows.student[m]);
            divergence[task] += p * (rows.teacher[m] - rows.student[m]);
            gradient[m] = static_cast<T>((row_norm == RowNorm::l1 ? (1 - p / q) / total : q - p) / count);
        }
    });
    for (int64_t b = 0; b < batch; ++b) {
        double total = 0;
        for (int64_t s = 0; s < steps; ++s) total += divergence[b * steps + s];
        *loss.at<T>(b) = static_cast<T>(total / static_cast<double>(larger(1, count_at(num_steps, b))));
    }
}

template <typename T>
void backward(
    const View& grad, const View& mixture_grad, const View& student, const View& weights, const View& dstudent,
    const View& dweights, int threads) {
    const int64_t layers = student.sizes[0], steps = student.sizes[2], keys = student.sizes[3];
    parallel(threads, layers * student.sizes[1], [](Scratch&) { return 0; }, [&](int64_t task, int) {
        const int64_t layer = task % layers, example = task / layers;
        const T upstream = *grad.at<const T>(example), weight = *weights.at<const T>(example, layer) * upstream;
        double total = 0;
        for (int64_t s = 0; s < steps; ++s) {
            const T* gradient = mixture_grad.at<const T>(example, s);
            const T* attention = student.at<const T>(layer, example, s);
            T* target = dstudent.at<T>(layer, example, s);
            for (int64_t m = 0; m < keys; ++m) target[m] = weight * gradient[m];
            if (student.strides[3] == 1) {
#pragma omp simd reduction(+ : total)
                for (int64_t m = 0; m < keys; ++m) total += static_cast<double>(attention[m]) * gradient[m];
            } else {
                for (int64_t m = 0; m < keys; ++m) {
                    total += static_cast<double>(attention[m * student.strides[3]]) * gradient[m];
                }
            }
        }
        *dweights.at<T>(example, layer) = static_cast<T>(upstream * total);
    });
}

}  // namespace

void layer_mixture_kl_forward(
    const View& teacher, const View& student, const View& weights, const View& num_steps, const View& num_keys,
    double tau, RowNorm row_norm, double l1_epsilon, const View& loss, const View& mixture_grad, int threads) {
    const auto run = student.dtype == Dtype::float32 ? forward<float> : forward<double>;
    run(teacher, student, weights, num_steps, num_keys, tau, row_norm, l1_epsilon, loss, mixture_grad, threads);
}

void layer_mixture_kl_backward(
    const View& grad, const View& mixture_grad, const View& student, const View& weights, const View& dstudent,
    const View& dweights, int threads) {
    const auto run = student.dtype == Dtype::float32 ? backward<float> : backward<double>;
    run(grad, mixture_grad, student, weights, dstudent, dweights, threads);
}

}  // namespace mold::MOLD_LEVEL
