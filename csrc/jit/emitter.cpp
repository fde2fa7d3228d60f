// SPDX-License-Identifier: Apache-2.0
//
// Encodings after Intel's Software Developer's Manual, volume 2, sections 2.1 (ModRM), 2.2.1 (REX)
// and 2.7 (EVEX). All vectors are 512 bits wide and unmasked.
#include "jit/emitter.h"

namespace sparselt::jit {
namespace {

constexpr unsigned kModShort = 1u << 6;
constexpr unsigned kModLong = 2u << 6;
constexpr unsigned kModRegister = 3u << 6;
constexpr unsigned kRexW = 0x48;

constexpr unsigned low_bits(unsigned index) { return index & 7; }
constexpr bool is_small(int32_t value) { return value >= -128 && value < 128; }
constexpr unsigned number(Gpr reg) { return static_cast<unsigned>(reg); }

}  // namespace

void Emitter::dword(int32_t value) {
  for (int shift = 0; shift < 32; shift += 8) byte(static_cast<uint32_t>(value) >> shift & 0xff);
}

// Bits that extend a register number are stored inverted.
void Emitter::evex(Map map, Prefix prefix, Zmm reg, Zmm second, bool is_broadcast, unsigned rm) {
  const auto inverted = [](unsigned index, unsigned bit) { return ~index >> bit & 1; };
  const unsigned r = reg.index;
  const unsigned v = second.index;
  byte(0x62);
  byte(inverted(r, 3) << 7 | inverted(rm, 4) << 6 | inverted(rm, 3) << 5 | inverted(r, 4) << 4 |
       map);
  byte((~v & 15) << 3 | 1u << 2 | prefix);
  byte(2u << 5 | (is_broadcast ? 1u : 0u) << 4 | inverted(v, 4) << 3);
}

void Emitter::vector(Map map, Prefix prefix, unsigned opcode, Zmm reg, Zmm second, Zmm rm) {
  evex(map, prefix, reg, second, false, rm.index);
  byte(opcode);
  byte(kModRegister | low_bits(reg.index) << 3 | low_bits(rm.index));
}

void Emitter::vector(Map map, Prefix prefix, unsigned opcode, Zmm reg, Zmm second, Address rm,
                     Unit unit) {
  evex(map, prefix, reg, second, unit == kOne, number(rm.base));
  byte(opcode);
  modrm(reg.index, rm, unit);
}

// None of the bases is rsp, rbp, r12 or r13, whose encodings mean something else.
void Emitter::modrm(unsigned reg, Address address, Unit unit) {
  const unsigned registers = low_bits(reg) << 3 | low_bits(number(address.base));
  const int32_t units = address.offset / unit;
  if (address.offset == 0) {
    byte(registers);
  } else if (units * unit == address.offset && is_small(units)) {
    byte(kModShort | registers);
    byte(static_cast<uint32_t>(units) & 0xff);
  } else {
    byte(kModLong | registers);
    dword(address.offset);
  }
}

void Emitter::lea(Gpr to, Address from) {
  byte(kRexW | (number(to) >> 3) << 2 | number(from.base) >> 3);
  byte(0x8d);
  modrm(number(to), from, kByte);
}

void Emitter::add(Gpr to, int32_t amount) {
  byte(kRexW | number(to) >> 3);
  byte(is_small(amount) ? 0x83 : 0x81);
  byte(kModRegister | low_bits(number(to)));
  if (is_small(amount)) {
    byte(static_cast<uint32_t>(amount) & 0xff);
  } else {
    dword(amount);
  }
}

}  // namespace sparselt::jit
