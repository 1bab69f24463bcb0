#include "span_plan.hpp"

#include <algorithm>

namespace mold {
namespace {

std::vector<Range> ranges(const View& spans, std::int64_t example) {
    std::vector<Range> result;
    for (std::int64_t i = 0; i < spans.sizes[1]; ++i) {
        const std::int64_t* span = spans.at<const std::int64_t>(example, i);
        result.push_back({span[0], span[spans.strides[2]]});
    }
    return result;
}

// How many of the ranges hold each token.
std::vector<std::int64_t> coverage(const std::vector<Range>& ranges, std::int64_t length) {
    std::vector<std::int64_t> count(length + 1);
    for (const Range& range : ranges) {
        ++count[range.begin];
        --count[range.end];
    }
    for (std::int64_t t = 0; t < length; ++t) count[t + 1] += count[t];
    return count;
}

}  // namespace

std::vector<SpanPlan> plan_spans(
    const View& row_spans, const View& key_spans, std::int64_t length, bool mean, std::int64_t longest_piece) {
    std::vector<SpanPlan> plans(row_spans.sizes[0]);
    for (std::int64_t example = 0; example < row_spans.sizes[0]; ++example) {
        SpanPlan& plan = plans[example];

        const std::vector<Range> key_words = ranges(key_spans, example);
        const std::vector<std::int64_t> key_coverage = coverage(key_words, length);
        std::vector<std::int64_t> column(length + 1);  // columns before each token
        for (std::int64_t t = 0; t < length; ++t) {
            column[t] = static_cast<std::int64_t>(plan.columns.size());
            if (key_coverage[t]) plan.columns.push_back(t);
        }
        column[length] = static_cast<std::int64_t>(plan.columns.size());
        for (const Range& word : key_words) plan.key_words.push_back({column[word.begin], column[word.end]});

        const std::vector<Range> steps = ranges(row_spans, example);
        const std::vector<std::int64_t> step_coverage = coverage(steps, length);
        std::vector<bool> border(length + 1);
        for (const Range& step : steps) border[step.begin] = border[step.end] = true;
        std::vector<std::int64_t> piece(length + 1);  // pieces that begin before each token
        for (std::int64_t t = 0; t < length; ++t) {
            piece[t] = static_cast<std::int64_t>(plan.pieces.size());
            if (!step_coverage[t]) continue;
            const bool goes_on = !border[t] && !plan.pieces.empty() && plan.pieces.back().end == t &&
                                 t - plan.pieces.back().begin < longest_piece;
            if (goes_on) {
                ++plan.pieces.back().end;
            } else {
                plan.pieces.push_back({t, t + 1});
            }
        }
        piece[length] = static_cast<std::int64_t>(plan.pieces.size());
        for (const Range& step : steps) {
            plan.steps.push_back({piece[step.begin], piece[step.end]});
            plan.weights.push_back(mean ? 1.0 / std::max<std::int64_t>(1, step.end - step.begin) : 1.0);
        }
    }
    return plans;
}

}  // namespace mold
