// The vector engine for every CPU; see attention_simd.h.
#define LR_WIDTH 4
#define LR_TARGET
#define LR_MAKE make_portable
#include "attention/attention_simd.h"
