// The vector engine for CPUs with AVX-512; see attention_simd.h.
#if defined(__x86_64__)
#define LR_WIDTH 16
#define LR_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LR_MAKE make_avx512
#include "attention/attention_simd.h"
#endif
