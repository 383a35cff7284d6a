// What the product of a layer's rows with its weights is given (stof_hf/fusion/templates/gemm_cuda.py
// packs it). Each library exports
//
//   const char* stof_run(const stof::GemmProblem*, void* stream);   // null, or what went wrong
//   int64_t stof_problem_bytes();                                   // sizeof(GemmProblem)
#pragma once

#include <cstdint>

namespace stof {

// In the order of ACTIVATIONS in gemm_cuda.py.
enum Activation : int64_t { kNoActivation, kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu };

// out = act(x weight^T + bias) + residual; gated: act(x a^T) * (x b^T), where weight is a above b.
struct GemmProblem {
  const void* x;         // [rows, depth]
  const void* weight;    // [columns, depth], gated: [2 columns, depth]; transposed: [depth, columns]
  const void* bias;      // [columns], or null; null where gated
  const void* residual;  // [rows, columns], or null; null where gated
  void* out;             // [rows, columns], contiguous
  int64_t rows, columns, depth;
  int64_t x_row, weight_row, residual_row;  // strides in elements
  int64_t activation, gated, transposed;
  int64_t block_n;  // rows of the weight that a tile takes
  int64_t device;
  // gemm.cu only
  int64_t group;  // pairs of row tiles that are walked together
  // gemm_split_k.cu only
  int64_t block_m, split, stages;  // rows of a tile, blocks that share its depth, steps that are loaded ahead
  int64_t constant;                // whether no kernel in front writes the weight
  int32_t* overflow;               // [warps that compute], whether an element that one stores is infinite; or null
};

constexpr const char* kNotTransposed = "a gated weight must not be transposed";

}  // namespace stof
