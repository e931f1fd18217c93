// What every exported function shares with its caller, workers/kernels/abi.py: types, instruction sets, statuses.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace longreach {

enum Type : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kFloat16 = 3, kUint8 = 4 };
// Instruction sets, the best one last.
enum Path : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
enum Status : int { kOk = 0, kInvalid = 1, kNoMemory = 2 };

}  // namespace longreach
