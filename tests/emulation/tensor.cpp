// ldmatrix and mma.sync by the fragments that the PTX ISA documents (emulation).
#include "block.h"

namespace mlpkit::device {
namespace {

// A[16, depth], B[depth, 8] and C[16, 8] of a warp, in double: products and sums of 16 terms are as good as exact.
struct Product {
  double a[16][16] = {}, b[16][8] = {};
};

uint32_t first_thread() { return current / kWarp * kWarp; }

template <class T>
void take_pairs(const uint32_t* words, int lane, Product& to) {
  const int group = lane / 4, column = lane % 4 * 2;
  const auto put = [](uint32_t pair, double& low, double& high) {
    low = widen(T{static_cast<uint16_t>(pair)});
    high = widen(T{static_cast<uint16_t>(pair >> 16)});
  };
  for (int i = 0; i < 4; ++i) {
    double* row = to.a[group + i % 2 * 8] + column + i / 2 * 8;
    put(words[i], row[0], row[1]);
  }
  for (int i = 0; i < 2; ++i) put(words[4 + i], to.b[column + i * 8][group], to.b[column + i * 8 + 1][group]);
}

// tf32 has the sign, the exponent and 10 bits of a float's fraction; the instruction does not look at the rest.
void take_tf32(const uint32_t* words, int lane, Product& to) {
  const int group = lane / 4, column = lane % 4;
  const auto number = [](uint32_t bits) { return math::bits_as<float>(bits & 0xffffe000u); };
  for (int i = 0; i < 4; ++i) to.a[group + i % 2 * 8][column + i / 2 * 4] = number(words[i]);
  for (int i = 0; i < 2; ++i) to.b[column + i * 4][group] = number(words[4 + i]);
}

float to_nearest(double sum) { return static_cast<float>(sum); }
// How tensor cores end their sums; told of tf32 alone, where a kernel answers to fp32.
float cut_off(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::abs(static_cast<double>(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// D = A B + C, rounded once; every lane's part of D takes the place of what it gave.
void finish(Given& given, int depth, void (*take)(const uint32_t*, int, Product&), float (*round)(double)) {
  Product product;
  for (int lane = 0; lane < kWarp; ++lane) take(given[lane], lane, product);
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      double sum = math::bits_as<float>(given[lane][6 + i]);
      for (int k = 0; k < depth; ++k) sum += product.a[row][k] * product.b[k][col];
      given[lane][10 + i] = math::bits_as<uint32_t>(round(sum));
    }
}

// Lane 8 i + r has given the address of row r of matrix i. A lane gets two elements of each matrix; it is the one that
// must be allowed to read them.
void finish_load(Given& given, int count, bool transposed) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < count; ++i) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int row = transposed ? lane % 4 * 2 + k : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + k;
        const unsigned char* from;
        memcpy(&from, given[8 * i + row], sizeof(from));
        if (reinterpret_cast<uintptr_t>(from) % 16) fail("a row of ldmatrix is not aligned to 16 bytes");
        check_of(first_thread() + lane, from + 2 * col, 2, false);
        memcpy(&pair[k], from + 2 * col, 2);
      }
      given[lane][4 + i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

}  // namespace

void matrix_product(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static constexpr struct {
    const char* name;
    void (*finish)(Given&);
  } kFormats[] = {{"mma of bfloat16", [](Given& given) { finish(given, 16, take_pairs<BFloat16>, to_nearest); }},
                  {"mma of float16", [](Given& given) { finish(given, 16, take_pairs<Half>, to_nearest); }},
                  {"mma of tf32", [](Given& given) { finish(given, 8, take_tf32, cut_off); }}};
  const auto& by = kFormats[static_cast<int>(format)];
  uint32_t words[10];
  memcpy(words, a, sizeof(a));
  memcpy(words + 4, b, sizeof(b));
  memcpy(words + 6, d, sizeof(d));
  memcpy(d, meet(by.name, words, sizeof(words), by.finish)[current % kWarp] + 10, sizeof(d));
}

template <int count, bool transposed>
void load_matrices_of(const char* what, const void* row, uint32_t* to) {
  const auto finish = [](Given& given) { finish_load(given, count, transposed); };
  memcpy(to, meet(what, &row, sizeof(row), finish)[current % kWarp] + 4, count * sizeof(uint32_t));
}

void matrix_load(const void* row, bool transposed, int count, uint32_t* to) {
  const auto load = count == 4   ? (transposed ? load_matrices_of<4, true> : load_matrices_of<4, false>)
                    : count == 2 ? (transposed ? load_matrices_of<2, true> : load_matrices_of<2, false>)
                                 : (transposed ? load_matrices_of<1, true> : load_matrices_of<1, false>);
  load(transposed ? "transposed ldmatrix" : "ldmatrix", row, to);
}

}  // namespace mlpkit::device
