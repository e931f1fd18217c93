// The vector engine for CPUs with AVX-512 BF16, for bfloat16 queries; see attention_simd.h.
#if defined(__x86_64__)
#define LR_WIDTH 16
#define LR_PAIRS 1
#define LR_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define LR_MAKE make_bf16
#include "attention/attention_simd.h"
#endif
