#include "span_pieces.hpp"

#include <algorithm>

namespace mold {
namespace {

Range span_at(const View& spans, std::int64_t example, std::int64_t index, std::int64_t length) {
    const std::int32_t* span = spans.at<const std::int32_t>(example, index);
    const std::int64_t begin = std::clamp<std::int64_t>(span[0], 0, length);
    return {begin, std::clamp<std::int64_t>(span[1], begin, length)};
}

// An example's tokens, one after another: whether a span starts or ends there, and whether any holds it.
struct Walk {
    std::vector<std::int32_t> opened, closed;
    std::int64_t depth = 0;

    Walk(const View& spans, std::int64_t example, std::int64_t length) : opened(length + 1), closed(length + 1) {
        for (std::int64_t i = 0; i < spans.sizes[1]; ++i) {
            const Range span = span_at(spans, example, i, length);
            ++opened[span.begin];
            ++closed[span.end];
        }
    }

    bool marked(std::int64_t token) const { return opened[token] || closed[token]; }
    bool enter(std::int64_t token) {
        depth += opened[token] - closed[token];
        return depth > 0;
    }
};

void join_pieces(SpanPlan& plan) {
    for (std::int64_t p = 0; p < static_cast<std::int64_t>(plan.pieces.size()); ++p) {
        const Range rows = plan.pieces[p];
        const bool joins = !plan.runs.empty() && plan.runs.back().rows.end == rows.begin &&
            rows.end - plan.runs.back().rows.begin <= run_rows;
        if (!joins) plan.runs.push_back({{p, p}, rows});
        plan.runs.back().pieces.end = p + 1;
        plan.runs.back().rows.end = rows.end;
    }
}

void find_holders(SpanPlan& plan) {
    std::vector<std::int64_t> next(plan.pieces.size() + 1);
    for (const Range& step : plan.steps) {
        for (std::int64_t p = step.begin; p < step.end; ++p) ++next[p + 1];
    }
    for (std::size_t p = 1; p < next.size(); ++p) next[p] += next[p - 1];
    plan.holders_begin = next;
    plan.holders.resize(next.back());
    for (std::size_t s = 0; s < plan.steps.size(); ++s) {
        for (std::int64_t p = plan.steps[s].begin; p < plan.steps[s].end; ++p) {
            plan.holders[next[p]++] = static_cast<std::int64_t>(s);
        }
    }
}

}  // namespace

void span_pieces(
    const View& row_spans, const View& key_spans, std::int64_t rows, const View& row_piece, const View& row_start,
    const View& key_piece, const View& key_first, const View& before, const View& columns, const View& column_piece) {
    const std::int64_t row_length = row_piece.sizes[1] - 1, key_length = columns.sizes[1];
    for (std::int64_t b = 0; b < row_spans.sizes[0]; ++b) {
        const auto of = [b](const View& tensor) { return tensor.at<std::int32_t>(b); };
        Walk steps(row_spans, b, row_length), words(key_spans, b, key_length);
        std::int64_t pieces = 0, cut = 0, key_pieces = 0, count = 0;
        for (std::int64_t t = 0; t <= row_length; ++t) {
            const bool in_step = steps.enter(t);
            if (steps.marked(t)) cut = t;
            if ((t - cut) % rows == 0) of(row_start)[pieces++] = static_cast<std::int32_t>(2 * t + in_step);
            of(row_piece)[t] = static_cast<std::int32_t>(pieces - 1);
        }
        for (std::int64_t t = 0; t <= key_length; ++t) {
            const bool in_word = words.enter(t);
            of(key_piece)[t] = static_cast<std::int32_t>(key_pieces);
            of(before)[t] = static_cast<std::int32_t>(count);
            if (!in_word) continue;
            if (words.marked(t)) of(key_first)[key_pieces++] = static_cast<std::int32_t>(count);
            of(columns)[count] = static_cast<std::int32_t>(t);
            of(column_piece)[count++] = static_cast<std::int32_t>(key_pieces - 1);
        }
        std::fill(of(row_start) + pieces, of(row_start) + row_start.sizes[1], static_cast<std::int32_t>(2 * row_length));
        std::fill(of(key_first) + key_pieces, of(key_first) + key_first.sizes[1], static_cast<std::int32_t>(count));
    }
}

std::vector<SpanPlan> plan_spans(
    const View& row_spans, const View* key_spans, const View& row_piece, const View& row_start, const View& before,
    const View& columns, bool mean) {
    const std::int64_t row_length = row_piece.sizes[1] - 1, key_length = columns.sizes[1];
    std::vector<SpanPlan> plans(row_spans.sizes[0]);
    for (std::int64_t b = 0; b < row_spans.sizes[0]; ++b) {
        SpanPlan& plan = plans[b];
        const std::int32_t *column = before.at<const std::int32_t>(b), *piece = row_piece.at<const std::int32_t>(b),
                           *start = row_start.at<const std::int32_t>(b);
        plan.columns = columns.at<const std::int32_t>(b);
        plan.column_count = column[key_length];
        for (std::int64_t m = 0; m < (key_spans ? key_spans->sizes[1] : 0); ++m) {
            const Range word = span_at(*key_spans, b, m, key_length);
            plan.key_words.push_back({column[word.begin], column[word.end]});
        }
        std::vector<std::int64_t> held(row_start.sizes[1]);  // pieces before each that a step holds
        for (std::int64_t g = 0; g + 1 < row_start.sizes[1]; ++g) {
            const Range tokens{start[g] / 2, start[g + 1] / 2};
            if (start[g] % 2 && tokens.begin < tokens.end) plan.pieces.push_back(tokens);
            held[g + 1] = static_cast<std::int64_t>(plan.pieces.size());
        }
        for (std::int64_t s = 0; s < row_spans.sizes[1]; ++s) {
            const Range step = span_at(row_spans, b, s, row_length);
            plan.steps.push_back({held[piece[step.begin]], held[piece[step.end]]});
            plan.weights.push_back(mean ? 1.0 / std::max<std::int64_t>(1, step.end - step.begin) : 1.0);
        }
        join_pieces(plan);
        find_holders(plan);
    }
    return plans;
}

}  // namespace mold
