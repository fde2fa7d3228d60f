// SPDX-License-Identifier: Apache-2.0
#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace sparselt {
namespace {

// __builtin_cpu_supports asks CPUID and, for vector state, whether the operating system saves it.
bool cpu_has(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi");
    case Isa::avx512:
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
#elif defined(__aarch64__)
    case Isa::neon:
      return true;  // part of the base architecture
#endif
    default:
      return false;
  }
}

constexpr Isa kCpuLevels[] = {Isa::avx512, Isa::avx2, Isa::neon, Isa::scalar};  // best first

Isa detect() {
  const char* forced = std::getenv("SPARSELT_ISA");
  const std::string_view wanted = forced ? forced : "";
  for (Isa isa : kCpuLevels) {
    if (wanted.empty() ? cpu_has(isa) : wanted == isa_name(isa)) {
      if (cpu_has(isa)) return isa;
      throw std::runtime_error("SPARSELT_ISA: this CPU has no " + std::string(wanted) +
                               "; unset it or use scalar");
    }
  }
  throw std::runtime_error("SPARSELT_ISA: expected scalar, avx2, avx512 or neon, got '" +
                           std::string(wanted) + "'");
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::neon:
      return "neon";
    case Isa::sm80:
      return "sm80";
  }
  return "unknown";
}

std::vector<std::string_view> isa_features(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return {"avx2", "fma", "bmi"};
    case Isa::avx512:
      return {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"};
    case Isa::neon:
      return {"neon"};
    case Isa::sm80:
      return {"sm80"};
    default:
      return {};
  }
}

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

std::string why_unsupported(Isa isa) {
  if (!cpu_has(isa)) return "this CPU has no " + std::string(isa_name(isa));
  const Isa current = current_isa();
  const bool below =
      isa == Isa::scalar || isa == current || (isa == Isa::avx2 && current == Isa::avx512);
  return below ? "" : "SPARSELT_ISA=" + std::string(isa_name(current)) + " excludes it";
}

std::vector<std::string_view> cpu_features() {
  std::vector<std::string_view> features;
  for (Isa isa : kCpuLevels) {
    if (!cpu_has(isa)) continue;
    for (std::string_view feature : isa_features(isa)) {
      bool known = false;
      for (std::string_view other : features) known = known || other == feature;
      if (!known) features.push_back(feature);
    }
  }
  return features;
}

}  // namespace sparselt
