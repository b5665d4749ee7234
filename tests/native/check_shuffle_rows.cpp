// shuffle_rows against the shuffle of core/shuffle.h, draw by draw (tests).
#include "core/shuffle.h"

#include <utility>

#include "cpu/population.h"
#include "harness.h"

namespace {

using namespace native;

void check_order(int64_t count, Draw& draw, Report& report) {
  mlpkit::Dropout key;
  key.seed = draw.bits();
  key.offset = static_cast<uint32_t>(draw.bits());
  key.stream = mlpkit::kShuffleStream;
  Memory memory(4 * count, 4, draw);
  int32_t* order = reinterpret_cast<int32_t*>(memory.data());
  std::vector<int32_t> wanted(count);
  for (int64_t i = 0; i < count; ++i) order[i] = wanted[i] = static_cast<int32_t>(3 * i + 1);
  for (int64_t n = 0; n + 1 < count; ++n) {
    const mlpkit::Words words =
        mlpkit::mask_words(key, static_cast<uint64_t>(n / 128), static_cast<uint32_t>(n % 128 / 4));
    const int64_t last = count - 1 - n;
    std::swap(wanted[last], wanted[mlpkit::draw_below(static_cast<uint32_t>(last + 1), words.v[n % 4])]);
  }
  mlpkit::cpu::shuffle_rows({key.seed, key.offset, count, order});
  for (int64_t i = 0; i < count; ++i) report.that("row", i, order[i] == wanted[i]);
}

void shuffle_rows(Report& report) {
  Draw draw(61);
  for (const int64_t count : {1, 2, 3, 127, 128, 129, 130, 1000}) check_order(count, draw, report);
}

NATIVE_CHECK(shuffle_rows, shuffle_rows);

}  // namespace
