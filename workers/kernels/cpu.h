// What this CPU can run.
#pragma once

#include <cstdint>

#include "abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longreach {

#if defined(__x86_64__)
// AMX tiles need the consent of the kernel, once a process.
inline bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Configuration of eight AMX tiles of 16 rows of 64 bytes. A constant: compilers take the intrinsics that load it to
// read no more than a word, and would drop the writes to a local one.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kTileConfig;
#endif

inline int best_path() {
#if defined(__x86_64__)
    static const int best = [] {
        __builtin_cpu_init();
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (wide && __builtin_cpu_supports("avx512bf16")) return has_amx() ? kAmx : kAvx512Bf16;
        if (wide) return kAvx512;
        const bool middle =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        return middle ? kAvx2 : kPortable;
    }();
    return best;
#else
    return kPortable;
#endif
}

// The path that is the fastest one here. On Intel's processors since Sapphire Rapids a vdpbf16ps takes as long as
// several multiply-adds in float32 (measured with AMX switched off: attention 1.6 times, products 1.2 times), so that
// it is used on AMD's, and on Cooper Lake as nothing is known of that.
inline int fastest_path() {
    const int best = best_path();
#if defined(__x86_64__)
    constexpr unsigned kCooperLake = 0x55;
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool known = best == kAvx512Bf16 && __builtin_cpu_is("intel") && __get_cpuid(1, &a, &b, &c, &d);
    if (known && ((a >> 4 & 0xf) | (a >> 12 & 0xf0)) != kCooperLake) return kAvx512;
#endif
    return best;
}

}  // namespace longreach
