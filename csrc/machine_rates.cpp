// SPDX-License-Identifier: Apache-2.0
#include "machine_rates.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/target.h"
#include "cpu_features.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sparselt {
namespace {

// Independent sums: more than two units of four to six cycles each can have in flight.
constexpr int kSums = 12;
constexpr int64_t kRounds = 200000;
constexpr int kRepeats = 10;
// Sums tend to 2 and never leave the range of fast arithmetic. Each starts elsewhere: a compiler
// would compute equal ones once.
constexpr float kFactor = 0.5f;
inline float start(int j) { return static_cast<float>(1 + j); }

float multiply_add_scalar(int64_t rounds) {
  float sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = start(j);
  for (int64_t i = 0; i < rounds; ++i) {
    SPARSELT_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = sum[j] * kFactor + 1.0f;
  }
  return *std::max_element(sum, sum + kSums);
}

}  // namespace

#if defined(__x86_64__)
SPARSELT_TARGET_BEGIN("avx2,fma")
namespace {
float multiply_add_avx2(int64_t rounds) {
  const __m256 factor = _mm256_set1_ps(kFactor), one = _mm256_set1_ps(1.0f);
  __m256 sum[kSums];
  SPARSELT_UNROLL
  for (int j = 0; j < kSums; ++j) sum[j] = _mm256_set1_ps(start(j));
  for (int64_t i = 0; i < rounds; ++i) {
    SPARSELT_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = _mm256_fmadd_ps(sum[j], factor, one);
  }
  SPARSELT_UNROLL
  for (int j = 1; j < kSums; ++j) sum[0] = _mm256_max_ps(sum[0], sum[j]);
  return _mm256_cvtss_f32(sum[0]);
}
}  // namespace
SPARSELT_TARGET_END

SPARSELT_TARGET_BEGIN("avx512f")
namespace {
float multiply_add_avx512(int64_t rounds) {
  const __m512 factor = _mm512_set1_ps(kFactor), one = _mm512_set1_ps(1.0f);
  __m512 sum[kSums];
  SPARSELT_UNROLL
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_set1_ps(start(j));
  for (int64_t i = 0; i < rounds; ++i) {
    SPARSELT_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_fmadd_ps(sum[j], factor, one);
  }
  SPARSELT_UNROLL
  for (int j = 1; j < kSums; ++j) sum[0] = _mm512_maskz_max_ps(0xffff, sum[0], sum[j]);
  return _mm512_cvtss_f32(sum[0]);
}
}  // namespace
SPARSELT_TARGET_END
#elif defined(__aarch64__)
namespace {
float multiply_add_neon(int64_t rounds) {
  const float32x4_t factor = vdupq_n_f32(kFactor), one = vdupq_n_f32(1.0f);
  float32x4_t sum[kSums];
  SPARSELT_UNROLL
  for (int j = 0; j < kSums; ++j) sum[j] = vdupq_n_f32(start(j));
  for (int64_t i = 0; i < rounds; ++i) {
    SPARSELT_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = vfmaq_f32(one, sum[j], factor);
  }
  SPARSELT_UNROLL
  for (int j = 1; j < kSums; ++j) sum[0] = vmaxq_f32(sum[0], sum[j]);
  return vgetq_lane_f32(sum[0], 0);
}
}  // namespace
#endif

namespace {

struct Loop {
  float (*run)(int64_t rounds);
  int lanes;
};

Loop loop_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512:
      return {multiply_add_avx512, 16};
    case Isa::avx2:
      return {multiply_add_avx2, 8};
#elif defined(__aarch64__)
    case Isa::neon:
      return {multiply_add_neon, 4};
#endif
    default:
      return {multiply_add_scalar, 1};
  }
}

// In four streams, which reach memory's rate where one does not: hardware fetches ahead within a
// page only. The compiler widens this as far as the base instruction set goes, which is enough.
uint64_t read_all(const uint64_t* from, int64_t count) {
  constexpr int64_t kStreams = 4;
  constexpr int64_t kAhead = 512;  // 4 KiB
  const int64_t each = count / kStreams / 8 * 8;
  uint64_t seen[8] = {};
  for (int64_t i = 0; i < each; i += 8) {
    for (int64_t s = 0; s < kStreams; ++s) {
      const uint64_t* line = from + s * each + i;
      __builtin_prefetch(line + kAhead);
      for (int j = 0; j < 8; ++j) seen[j] |= line[j];
    }
  }
  for (int j = 1; j < 8; ++j) seen[0] |= seen[j];
  return seen[0];
}

// The least seconds of several runs of `work` on all threads at once. Its results are kept, so that
// no compiler can leave the work out.
template <class Work>
double least_seconds(const Work& work) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<double> results(static_cast<size_t>(threads));
  double least = 1e30;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        results[static_cast<size_t>(i)] = static_cast<double>(work(i, threads));
      }
    });
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    least = std::min(least, spent.count());
  }
  volatile double kept = *std::max_element(results.begin(), results.end());
  static_cast<void>(kept);
  return least;
}

}  // namespace

double multiply_add_rate() {
  const Loop loop = loop_of(current_isa());
  const double seconds = least_seconds([&](int64_t, int64_t) { return loop.run(kRounds); });
  const double threads = static_cast<double>(std::max(1u, torch::stable::get_num_threads()));
  return 2e-9 * kSums * loop.lanes * static_cast<double>(kRounds) * threads / seconds;
}

double read_rate(int64_t bytes) {
  const int64_t count = std::max<int64_t>(bytes, 64) / 8;
  const std::vector<uint64_t> buffer(static_cast<size_t>(count), 1);
  const double seconds = least_seconds([&](int64_t i, int64_t threads) {
    const int64_t begin = count * i / threads / 8 * 8;
    const int64_t end = i + 1 == threads ? count : count * (i + 1) / threads / 8 * 8;
    return read_all(buffer.data() + begin, end - begin);
  });
  return 8e-9 * static_cast<double>(count) / seconds;
}

}  // namespace sparselt
