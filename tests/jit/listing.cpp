// SPDX-License-Identifier: Apache-2.0
//
// Writes every instruction of the emitter, with every register and with offsets at the edges of
// their encodings, to the file named by its argument, and on standard output what a disassembler
// should make of it (AT&T syntax, one line each).
#include <cinttypes>
#include <cstdio>

#include "jit/emitter.h"

namespace {

using namespace sparselt::jit;

constexpr Gpr kBases[] = {Gpr::rax, Gpr::rcx, Gpr::rdx, Gpr::rsi, Gpr::rdi,
                          Gpr::r8,  Gpr::r9,  Gpr::r10, Gpr::r11};
const char* name(Gpr reg) {
  const char* names[] = {"rax", "rcx", "rdx", "", "", "", "rsi", "rdi", "r8", "r9", "r10", "r11"};
  return names[static_cast<int>(reg)];
}

void print_address(Address at) {
  if (at.offset < 0) std::printf("-0x%" PRIx32, static_cast<uint32_t>(-at.offset));
  if (at.offset > 0) std::printf("0x%" PRIx32, static_cast<uint32_t>(at.offset));
  std::printf("(%%%s)", name(at.base));
}

// mnemonic at{1to16},%zmm,%zmm
void print_three(const char* mnemonic, Address at, bool is_broadcast, Zmm a, Zmm to) {
  std::printf("%s ", mnemonic);
  print_address(at);
  std::printf("%s,%%zmm%d,%%zmm%d\n", is_broadcast ? "{1to16}" : "", a.index, to.index);
}

void list(Emitter& code, Zmm to, Zmm a, Address at) {
  code.vmovaps(to, at);
  std::printf("vmovaps ");
  print_address(at);
  std::printf(",%%zmm%d\n", to.index);
  code.vmovaps(at, to);
  std::printf("vmovaps %%zmm%d,", to.index);
  print_address(at);
  std::printf("\n");
  code.vaddps(to, a, at);
  print_three("vaddps", at, false, a, to);
  code.vaddps_broadcast(to, a, at);
  print_three("vaddps", at, true, a, to);
  code.vmulps_broadcast(to, a, at);
  print_three("vmulps", at, true, a, to);
  code.vfmadd231ps_broadcast(to, a, at);
  print_three("vfmadd231ps", at, true, a, to);
}

void list_integers(Emitter& code, Gpr to, Address at) {
  code.lea(to, at);
  std::printf("lea ");
  print_address(at);
  std::printf(",%%%s\n", name(to));
  code.add(to, at.offset);
  std::printf("add $0x%" PRIx64 ",%%%s\n", static_cast<uint64_t>(int64_t{at.offset}), name(to));
}

}  // namespace

int main(int, char** arguments) {
  Emitter code;
  for (uint8_t to = 0; to < 32; ++to) {
    for (uint8_t a = 0; a < 32; ++a) {
      code.vxorps({to}, {a}, {static_cast<uint8_t>(31 - a)});
      std::printf("vxorps %%zmm%d,%%zmm%d,%%zmm%d\n", 31 - a, a, to);
    }
  }
  // One-byte offsets count bytes, floats or vectors: both sides of -128 and 127 of each, and what
  // is no multiple.
  const int32_t offsets[] = {0,       1,          4,    64,    127,  128,   -128,  -129,
                             508,     512,        -512, -516,  8128, 8192,  -8192, -8256,
                             1 << 20, -(1 << 20), 8100, -8100, 505,  30000, -30000};
  uint8_t reg = 0;
  for (const Gpr base : kBases) {
    for (const int32_t offset : offsets) {
      list(code, {reg}, {static_cast<uint8_t>((7 * reg + 3) % 32)}, {base, offset});
      reg = (reg + 5) % 32;
      for (const Gpr to : kBases) list_integers(code, to, {base, offset});
    }
  }
  code.ret();
  std::printf("ret\n");
  std::FILE* file = std::fopen(arguments[1], "wb");
  if (!file) return 1;
  const bool is_written = std::fwrite(code.bytes().data(), 1, code.size(), file) == code.size();
  return std::fclose(file) == 0 && is_written ? 0 : 1;
}
