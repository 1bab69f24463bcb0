#include "span_pieces.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

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

std::vector<Range> spans_of(const View& spans, std::int64_t example, std::int64_t length) {
    std::vector<Range> all;
    all.reserve(spans.sizes[1]);
    for (std::int64_t i = 0; i < spans.sizes[1]; ++i) all.push_back(span_at(spans, example, i, length));
    return all;
}

// The tokens that are no padding, moved by `shift`.
std::vector<Range> real_tokens(const View* mask, std::int64_t example, std::int64_t length, std::int64_t shift) {
    if (!mask) return {{0, length}};
    const bool* real = mask->at<const bool>(example);
    std::vector<Range> runs;
    for (std::int64_t t = 0; t < mask->sizes[1]; ++t) {
        if (!real[t * mask->strides[1]]) continue;
        if (runs.empty() || runs.back().end != t + shift) runs.push_back({t + shift, t + shift});
        runs.back().end = t + shift + 1;
    }
    return runs;
}

// Calls visit(part) for what `range` has of these ascending ranges.
template <typename Visit>
void visit_parts(const Range& range, const std::vector<Range>& others, const Visit& visit) {
    const auto ends_before = [](const Range& other, std::int64_t at) { return other.end <= at; };
    auto other = std::lower_bound(others.begin(), others.end(), range.begin, ends_before);
    for (; other != others.end() && other->begin < range.end; ++other) {
        visit(Range{std::max(range.begin, other->begin), std::min(range.end, other->end)});
    }
}

void plan_rows(
    const std::vector<Range>& spans, const std::vector<Range>& real, std::int64_t piece_rows, SpanPlan& plan) {
    std::vector<std::pair<std::int64_t, std::int64_t>> cuts;  // (row, spans that begin there less those that end)
    for (const Range& span : spans) {
        if (span.begin == span.end) continue;
        cuts.push_back({span.begin, 1});
        cuts.push_back({span.end, -1});
    }
    std::sort(cuts.begin(), cuts.end());
    std::int64_t depth = 0;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        depth += cuts[i].second;
        if (depth == 0) continue;
        visit_parts({cuts[i].first, cuts[i + 1].first}, real, [&](const Range& part) {
            for (std::int64_t row = part.begin; row < part.end; row += piece_rows) {
                plan.pieces.push_back({row, std::min(row + piece_rows, part.end)});
            }
        });
    }
    const auto pieces_before = [&](std::int64_t row) {
        const auto begins_before = [](const Range& piece, std::int64_t at) { return piece.begin < at; };
        return std::lower_bound(plan.pieces.begin(), plan.pieces.end(), row, begins_before) - plan.pieces.begin();
    };
    for (const Range& span : spans) {
        plan.steps.push_back({pieces_before(span.begin), pieces_before(span.end)});
        plan.slots.push_back(plan.steps.back().end - plan.steps.back().begin > 1 ? plan.joined++ : -1);
        const std::int64_t rows = std::max<std::int64_t>(1, span.end - span.begin);
        plan.weights.push_back(plan.reduction == RowReduction::mean ? 1.0 / rows : 1.0);
    }
    join_pieces(plan);
    find_holders(plan);
}

void plan_keys(const std::vector<Range>& spans, const std::vector<Range>& real, bool every_key, SpanPlan& plan) {
    std::vector<Range> sorted, held;
    for (const Range& span : spans) {
        if (span.begin < span.end) sorted.push_back(span);
    }
    std::sort(sorted.begin(), sorted.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (const Range& span : sorted) {
        if (held.empty() || held.back().end < span.begin) held.push_back(span);
        held.back().end = std::max(held.back().end, span.end);
    }
    std::vector<std::int64_t> before;  // columns before a run
    for (const Range& span : held) {
        visit_parts(span, real, [&](const Range& part) {
            before.push_back(plan.column_count);
            plan.key_runs.push_back(part);
            plan.column_count += part.end - part.begin;
        });
    }
    if (every_key) {
        for (const Range& run : plan.key_runs) {
            for (std::int64_t key = run.begin; key < run.end; key += block_columns) {
                plan.key_blocks.push_back({key, std::min(key + block_columns, run.end)});
            }
        }
        if (plan.key_blocks.empty()) plan.key_blocks.push_back({0, 0});
        return;
    }
    const auto columns_before = [&](std::int64_t key) -> std::int64_t {
        const auto begins_after = [](std::int64_t at, const Range& run) { return at < run.begin; };
        const auto next = std::upper_bound(plan.key_runs.begin(), plan.key_runs.end(), key, begins_after);
        if (next == plan.key_runs.begin()) return 0;
        const std::int64_t index = next - plan.key_runs.begin() - 1;
        return before[index] + std::min(key, plan.key_runs[index].end) - plan.key_runs[index].begin;
    };
    for (const Range& span : spans) plan.key_words.push_back({columns_before(span.begin), columns_before(span.end)});
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

RowReduction row_reduction_named(const std::string& name) {
    if (name == "sum") return RowReduction::sum;
    if (name == "mean") return RowReduction::mean;
    if (name == "max") return RowReduction::max;
    throw std::invalid_argument("row_reduction: was " + name + ", must be sum, mean or max");
}

std::int64_t SpanPlan::rows() const {
    std::int64_t count = 0;
    for (const Range& piece : pieces) count += piece.end - piece.begin;
    return count;
}

std::vector<SpanPlan> plan_spans(
    const View& row_spans, const View& key_spans, bool every_key, const SpanSizes& sizes, const Padding& padding,
    RowReduction reduction, bool list_columns) {
    std::vector<SpanPlan> plans(row_spans.sizes[0]);
    for (std::int64_t b = 0; b < row_spans.sizes[0]; ++b) {
        SpanPlan& plan = plans[b];
        plan.reduction = reduction;
        const View* rows_mask = padding.causal ? padding.mask : nullptr;
        const std::int64_t first = padding.first ? *padding.first->at<const std::int32_t>(b) : 0;
        const std::vector<Range> rows = real_tokens(rows_mask, b, sizes.rows, -first);
        plan_rows(spans_of(row_spans, b, sizes.rows), rows, sizes.piece_rows, plan);
        const std::vector<Range> keys = real_tokens(padding.mask, b, sizes.keys, 0);
        plan_keys(spans_of(key_spans, b, sizes.keys), keys, every_key, plan);
        if (!list_columns) continue;
        for (const Range& run : plan.key_runs) {
            for (std::int64_t key = run.begin; key < run.end; ++key) plan.columns.push_back(static_cast<std::int32_t>(key));
        }
    }
    return plans;
}

}  // namespace mold
