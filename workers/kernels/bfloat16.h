// bfloat16 as the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE __attribute__((always_inline)) inline  // into code for any instruction set

namespace longreach {

using bf16 = std::uint16_t;

INLINE float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float widen(bf16 value) { return as_float(std::uint32_t(value) << 16); }

INLINE bf16 narrow(float value) {  // to the nearest, ties to even; a NaN stays one
    const std::uint32_t bits = bits_of(value);
    return value != value ? bf16(0x7fc0) : bf16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace longreach
