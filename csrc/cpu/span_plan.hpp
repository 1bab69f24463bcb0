#pragma once

#include <cstdint>
#include <vector>

#include "view.hpp"

namespace mold {

struct Range {
    std::int64_t begin, end;
};

// One example's spans, resolved. The key words' distinct tokens, ascending, are its columns, so a key word is a range
// of columns. The rows are cut wherever a step begins or ends, so a step is a range of pieces. Overlaps need no more.
struct SpanPlan {
    std::vector<std::int64_t> columns;
    std::vector<Range> key_words;  // [M], of columns
    std::vector<Range> pieces;     // of tokens; only those that a step holds, ascending
    std::vector<Range> steps;      // [S], of pieces
    std::vector<double> weights;   // [S]: 1, or 1 / rows of the step for the mean
};

// A plan for each example of row_spans [B, S, 2] and key_spans [B, M, 2], int64. No piece is longer than
// `longest_piece` tokens.
std::vector<SpanPlan> plan_spans(
    const View& row_spans, const View& key_spans, std::int64_t length, bool mean, std::int64_t longest_piece);

}  // namespace mold
