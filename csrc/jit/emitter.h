// SPDX-License-Identifier: Apache-2.0
//
// Writes the few x86-64 instructions that generated panel code consists of. Knows no torch, and
// writes bytes only: nothing here is executed. tests/test_jit.py reads them back by a disassembler.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace sparselt::jit {

// The registers that a function may change under the System V calling convention.
enum class Gpr : uint8_t { rax = 0, rcx = 1, rdx = 2, rsi = 6, rdi = 7, r8 = 8, r9, r10, r11 };

// zmm0 to zmm31.
struct Zmm {
  uint8_t index;
};

struct Address {
  Gpr base;
  int32_t offset;
};

class Emitter {
 public:
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  size_t size() const { return bytes_.size(); }

  void vmovaps(Zmm to, Address from) { vector(kMap0F, kNone, 0x28, to, {}, from, kWhole); }
  void vmovaps(Address to, Zmm from) { vector(kMap0F, kNone, 0x29, from, {}, to, kWhole); }
  void vaddps(Zmm to, Zmm a, Address b) { vector(kMap0F, kNone, 0x58, to, a, b, kWhole); }
  void vxorps(Zmm to, Zmm a, Zmm b) { vector(kMap0F, kNone, 0x57, to, a, b); }
  // From here on, b is one float, taken for every lane.
  void vaddps_broadcast(Zmm to, Zmm a, Address b) { vector(kMap0F, kNone, 0x58, to, a, b, kOne); }
  void vmulps_broadcast(Zmm to, Zmm a, Address b) { vector(kMap0F, kNone, 0x59, to, a, b, kOne); }
  // to += a * b, rounded once.
  void vfmadd231ps_broadcast(Zmm to, Zmm a, Address b) {
    vector(kMap0F38, k66, 0xb8, to, a, b, kOne);
  }
  void lea(Gpr to, Address from);
  void add(Gpr to, int32_t amount);
  void ret() { byte(0xc3); }

 private:
  enum Map { kMap0F = 1, kMap0F38 = 2 };
  enum Prefix { kNone = 0, k66 = 1 };
  // Bytes of memory that an instruction meets, which is what a one-byte offset counts in.
  enum Unit { kByte = 1, kOne = 4, kWhole = 64 };

  void byte(unsigned value) { bytes_.push_back(static_cast<uint8_t>(value)); }
  void dword(int32_t value);
  void evex(Map map, Prefix prefix, Zmm reg, Zmm second, bool is_broadcast, unsigned rm);
  void vector(Map map, Prefix prefix, unsigned opcode, Zmm reg, Zmm second, Zmm rm);
  void vector(Map map, Prefix prefix, unsigned opcode, Zmm reg, Zmm second, Address rm, Unit unit);
  void modrm(unsigned reg, Address address, Unit unit);

  std::vector<uint8_t> bytes_;
};

}  // namespace sparselt::jit
