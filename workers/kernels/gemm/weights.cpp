// Quantised weights without intrinsics; see weights.h.
#include "gemm/weights.h"

#include <cstring>

namespace longreach::gemm {
namespace {

INLINE float from_half(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return as_float(sign | 0x3f800000u) * (as_float(rest << 13) * 0x1p112f);
}

// OCP 8-bit floating point, 4 bits of exponent and 3 of mantissa (float8_e4m3fn): 0x7f is NaN, there is no infinity.
INLINE float from_float8(std::uint8_t bits) {
    const std::uint32_t sign = std::uint32_t(bits & 0x80u) << 24, rest = bits & 0x7fu;
    if (rest == 0x7fu) return as_float(0x7fc00000u);
    return as_float(sign | 0x3f800000u) * (as_float(rest << 20) * 0x1p120f);
}

INLINE float number(const char* at, int type, long index) {
    std::uint32_t word;
    std::uint16_t half;
    switch (type) {
        case kFloat32:
            std::memcpy(&word, at + 4 * index, sizeof word);
            return as_float(word);
        case kBfloat16:
            std::memcpy(&half, at + 2 * index, sizeof half);
            return widen(half);
        case kFloat16:
            std::memcpy(&half, at + 2 * index, sizeof half);
            return from_half(half);
        case kInt8:
            return float(std::int8_t(at[index]));
        default:
            return float(std::uint8_t(at[index]));
    }
}

INLINE float code_value(const std::uint8_t* tile, int kind, long line, long place) {
    if (kind == kInt4) return float((tile[line / 2 * kDepth + place] >> (line % 2 * 4) & 15) - 8);
    const std::uint8_t code = tile[line * kDepth + place];
    return kind == kInt8 ? float(std::int8_t(code)) : from_float8(code);
}

INLINE const std::uint8_t* tile_at(const Weights& from, const Tiles& tiles, long tile) {
    const char* strip = from.values + from.bytes(tiles.strip * tiles.k_tiles * kTile);
    return reinterpret_cast<const std::uint8_t*>(strip + from.bytes((tiles.first + tile) * kTile));
}

INLINE void codes(bf16* out, const Weights& from, const Tiles& tiles) {
    for (long tile = 0; tile < tiles.count; ++tile) {
        const std::uint8_t* at = tile_at(from, tiles, tile);
        for (long line = 0; line < kStrip; ++line, out += kDepth) {
            for (long place = 0; place < kDepth; ++place) out[place] = narrow(code_value(at, from.kind, line, place));
        }
    }
}

INLINE float zero_of(const Weights& from, long index) {
    if (from.zeros == nullptr) return 0.0f;
    return number(from.zeros, from.zero_type, index) - (from.kind == kInt4 ? 8.0f : 0.0f);
}

INLINE void weights(bf16* out, const Weights& from, const Tiles& tiles) {
    const long groups = from.groups(tiles.k_tiles * kDepth);
    for (long tile = 0; tile < tiles.count; ++tile) {
        const std::uint8_t* at = tile_at(from, tiles, tile);
        for (long line = 0; line < kStrip; ++line, out += kDepth) {
            const long group = ((tiles.first + tile) * kDepth + 2 * line) / from.group;
            for (long place = 0; place < kDepth; ++place) {
                const long index = (tiles.strip * groups + group) * kStrip + place / 2;
                const float value = code_value(at, from.kind, line, place) - zero_of(from, index);
                out[place] = narrow(number(from.scales, from.scale_type, index) * value);
            }
        }
    }
}

INLINE void scales(GroupScales& out, const Weights& from, long strip, bool two, long groups, long group) {
    for (long s = 0; s < (two ? 2 : 1); ++s) {
        for (long n = 0; n < kStrip; ++n) {
            const long index = ((strip + s) * groups + group) * kStrip + n;
            out.scale[s][n] = number(from.scales, from.scale_type, index);
            out.zero[s][n] = zero_of(from, index);
        }
    }
}

constexpr Decoder kDecoder{codes, weights, scales, nullptr};

}  // namespace

const Decoder& decoder(int path) {
#if defined(__x86_64__)
    if (path >= kAvx512) return avx512_decoder(Path(path));
    if (path == kAvx2) return avx2_decoder();
#endif
    return kDecoder;
}

void sum_groups(float* out, const bf16* a, long rows, long k_tiles, long group) {
    for (long row = 0; row < rows; ++row) {
        const bf16* strip = a + row / kStrip * k_tiles * kTile + row % kStrip * kDepth;
        float lanes[kStrip] = {};
        for (long half = 0; half < 2 * k_tiles; ++half) {  // 16 values
            const bf16* values = strip + half / 2 * kTile + half % 2 * kStrip;
            for (long n = 0; n < kStrip; ++n) lanes[n] += widen(values[n]);
            if ((half + 1) * kStrip % group && half + 1 < 2 * k_tiles) continue;
            float sum = 0.0f;
            for (float& lane : lanes) sum += lane, lane = 0.0f;
            out[half * kStrip / group * rows + row] = sum;
        }
    }
}

}  // namespace longreach::gemm
