// The vector engine for CPUs with AVX-2; see attention_simd.h.
#if defined(__x86_64__)
#define LR_WIDTH 8
#define LR_TARGET __attribute__((target("avx2,fma")))
#define LR_MAKE make_avx2
#include "attention/attention_simd.h"
#endif
