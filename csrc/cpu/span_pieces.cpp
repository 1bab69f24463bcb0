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

void plan_rows(const std::vector<Range>& spans, std::int64_t piece_rows, SpanPlan& plan) {
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
        for (std::int64_t row = cuts[i].first; row < cuts[i + 1].first; row += piece_rows) {
            plan.pieces.push_back({row, std::min(row + piece_rows, cuts[i + 1].first)});
        }
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

void plan_keys(const std::vector<Range>& spans, bool every_key, SpanPlan& plan) {
    std::vector<Range> sorted;
    for (const Range& span : spans) {
        if (span.begin < span.end) sorted.push_back(span);
    }
    std::sort(sorted.begin(), sorted.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    std::vector<std::int64_t> before;  // columns before a run
    for (const Range& span : sorted) {
        if (plan.key_runs.empty() || plan.key_runs.back().end < span.begin) {
            before.push_back(plan.column_count);
            plan.key_runs.push_back({span.begin, span.begin});
        }
        Range& run = plan.key_runs.back();
        plan.column_count += std::max<std::int64_t>(0, span.end - run.end);
        run.end = std::max(run.end, span.end);
    }
    if (every_key) return;
    for (const Range& span : spans) {
        if (span.begin == span.end) {
            plan.key_words.push_back({0, 0});
            continue;
        }
        const auto begins_after = [](std::int64_t key, const Range& run) { return key < run.begin; };
        const auto next = std::upper_bound(plan.key_runs.begin(), plan.key_runs.end(), span.begin, begins_after);
        const std::int64_t index = next - plan.key_runs.begin() - 1;
        const std::int64_t first = before[index] + span.begin - plan.key_runs[index].begin;
        plan.key_words.push_back({first, first + span.end - span.begin});
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
    const View& row_spans, const View& key_spans, bool every_key, const SpanSizes& sizes, RowReduction reduction,
    bool list_columns) {
    std::vector<SpanPlan> plans(row_spans.sizes[0]);
    for (std::int64_t b = 0; b < row_spans.sizes[0]; ++b) {
        SpanPlan& plan = plans[b];
        plan.reduction = reduction;
        plan_rows(spans_of(row_spans, b, sizes.rows), sizes.piece_rows, plan);
        plan_keys(spans_of(key_spans, b, sizes.keys), every_key, plan);
        if (!list_columns) continue;
        for (const Range& run : plan.key_runs) {
            for (std::int64_t key = run.begin; key < run.end; ++key) plan.columns.push_back(static_cast<std::int32_t>(key));
        }
    }
    return plans;
}

}  // namespace mold
