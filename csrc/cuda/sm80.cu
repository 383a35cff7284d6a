// Block-wise attention through mma.sync, for every GPU from sm_80 on: head sizes up to 256, fp16 and
// bf16, softcap, bias, sinks, padding, rows of any alignment, another head size of the values.
//
// Tiling: a block has two halves of 4 warps, 64 query rows each: two row tiles of one head, two heads
// that share their keys, or one row tile, and then each half takes half of the keys of every step
// (problem.h). A warp computes 16 rows; queries stay in registers.
// Pipeline: blocks are persistent and take items in a fixed order. All threads copy, asynchronously
// and over item borders, into a ring of stages: the queries of an item, then its steps. A stage has
// room for 64 keys and their values, or for 128 queries; with head size 256, where two would be all of
// a small GPU's shared memory, for half of that. Each stage costs one barrier of the block. Rows are
// swizzled, so that neither copies nor matrix loads meet bank conflicts.
// Limits: at most 2^31 query rows. Heads smaller than STOF_HEAD_DIM are computed with zeros behind.
#include <cuda_runtime.h>

#include "fragments.cuh"
#include "items.cuh"
#include "merge.cuh"
#include "scores.cuh"
#include "sm80_ptx.cuh"

namespace stof {
namespace {

struct Call : Arguments {
  const void *query, *key, *value;
  Strides3 q, k, v;
  int kv_len, head_dim, by_elements;  // by_elements: rows are no multiples of 16 bytes
  ScoreMap map;
};

// What the score pipeline is compiled for: a positive scale and aligned rows, the same with padding,
// or anything.
enum Variant { kPlain, kPadded, kGeneral };

template <int D>
struct Config {
  static constexpr int kKeys = D <= 128 ? 64 : 32;    // of a stage
  static constexpr int kParts = kTile / kKeys;        // stages of a step, and of an item's queries
  static constexpr int kStages = 3;                   // at most 99 KB, what the smallest GPUs have
  static constexpr int kBlocks = D <= 64 ? 2 : 1;     // a multiprocessor
  static constexpr int kChunks = D / 8;               // of 16 bytes in a row
  static constexpr int kRowBytes = 16 * kChunks;
  static constexpr int kStageBytes = 2 * kKeys * kRowBytes;
  // Chunks of a row are swizzled in groups: the largest power of 2, up to 8, that divides a row. As
  // many threads copy a row.
  static constexpr int kGroup = (kChunks & -kChunks) < 8 ? kChunks & -kChunks : 8;
  static constexpr int kRows = kConsumers / kGroup;  // that the threads copy at once

  // Where a chunk of a row lies. Eight rows side by side have theirs in different banks.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk ^ row / (8 / kGroup) % kGroup) * 16;
  }
  // From the place of chunk 0 or 1 of a row to that of chunk 0 or 1 + `chunk`, which is even.
  static __device__ __forceinline__ uint32_t column(uint32_t place, int chunk) {
    return (place ^ chunk % kGroup * 16) + chunk / kGroup * kGroup * 16;
  }
};

// An item as the threads of a block know it: its words in the plan, and where what it reads begins.
template <typename T>
struct SharedItem {
  int word[8];
  const T *query, *key, *value;
  const uint64_t* valid;
  int batch, head;
};

enum ItemWord { kFirstKey = 2, kRun, kFirstStep, kList, kSlot };

template <typename T, int D>
struct Shared {
  using C = Config<D>;
  alignas(128) unsigned char stage[C::kStages][C::kStageBytes];
  alignas(8) uint16_t valid[C::kStages][4][4];  // the word of kv_valid that each granule lies in
  int step[C::kStages][8];                      // problem.h
  // The items that stages in flight belong to, and one more, which is looked up ahead.
  SharedItem<T> item[C::kStages + 1];
  float part_ml[2][kTile];

  // Stages that an item takes behind those of its queries.
  __device__ __forceinline__ int count(int ring) const {
    return C::kParts * (item[ring].word[kRun] + item[ring].word[kList]);
  }
  static __device__ __forceinline__ int next(int ring) { return ring == C::kStages ? 0 : ring + 1; }
};

// Fills one stage after another.
template <typename T, int D, Variant V>
class Loader {
  using C = Config<D>;

 public:
  __device__ __forceinline__ Loader(const Call& call, Shared<T, D>& shared)
      : a_(call), s_(shared), at_(blockIdx.x) {
    to_ = shared_address(s_.stage) + C::place(threadIdx.x / C::kGroup, threadIdx.x % C::kGroup);
    fetch(fetch_entry(a_, at_));
    begin_item();
  }

  // After a barrier of the block.
  __device__ __forceinline__ void load(int stage) {
    const SharedItem<T>& item = s_.item[ring_];
    if (item.word[0] == kNone) return;
    if (next_ < 0)
      load_queries(item, stage);
    else
      load_keys(item, stage);
    if (++next_ == s_.count(ring_)) {
      ring_ = Shared<T, D>::next(ring_);
      begin_item();
    }
  }

 private:
  // Looks up the item of the queue that `entry` at at_ is; each lane gets a word.
  __device__ __forceinline__ void fetch(int entry) {
    const int lane = threadIdx.x % 32;
    record_ = kNone;
    if (entry >= 0) {
      const Place place = find_place(a_, entry);
      if (lane < 8) record_ = __ldg(a_.plan.items + 8 * place.index + lane);
      if (lane == kBatch) record_ = place.batch;
      if (lane == kHead) record_ = place.head;
    }
    if (lane == kEntry) record_ = fetch_entry(a_, at_ + gridDim.x);
  }

  // Tells the block the next item that there is, or at the end an empty one.
  __device__ __forceinline__ void begin_item() {
    int record;
    auto word = [&](int lane) { return __shfl_sync(~0u, record, lane); };
    do {
      record = record_;
      if (at_ >= a_.n_queue) break;
      at_ += gridDim.x;
      fetch(word(kEntry));
    } while (word(0) == kNone);
    next_ = -C::kParts;
    const int first = word(kFirstStep), batch = word(kBatch), head = word(kHead);
    if (word(kList) > 0) listed_ = fetch_step(first);
    SharedItem<T>& item = s_.item[ring_];
    if (threadIdx.x < 8) item.word[threadIdx.x] = record;
    if (threadIdx.x == 0) {
      const int kv_head = a_.group.divide(head);
      item.query = static_cast<const T*>(a_.query) + batch * a_.q.batch + head * a_.q.head;
      item.key = static_cast<const T*>(a_.key) + batch * a_.k.batch + kv_head * a_.k.head;
      item.value = static_cast<const T*>(a_.value) + batch * a_.v.batch + kv_head * a_.v.head;
      item.valid = a_.kv_valid + batch * a_.valid_batch;
      item.batch = batch;
      item.head = head;
    }
  }

  __device__ __forceinline__ int fetch_step(int at) {
    return __ldg(a_.plan.steps + 8ll * at + threadIdx.x % 8);
  }

  __device__ __forceinline__ void load_queries(const SharedItem<T>& item, int stage) {
    const bool paired = !a_.two_heads && item.word[0] == item.word[1];
#pragma unroll
    for (int i = 0; i < 2 * C::kKeys / C::kRows; ++i) {
      const int own = (C::kParts + next_) * 2 * C::kKeys + threadIdx.x / C::kGroup + i * C::kRows;
      const int half = own / kTile, tile = item.word[half && !a_.two_heads];
      int row = -1;
      if (tile != kNone && !(paired && half == 1))
        row = tile >= 0 ? tile * kTile + own % kTile : __ldg(a_.plan.rows + (-1 - tile) * kTile + own % kTile);
      const T* from = item.query + row * a_.q.row + (a_.two_heads ? half * a_.q.head : 0);
      copy_row(stage, i, from, row >= 0 && row < a_.q_len, a_.head_dim);
    }
  }

  __device__ __forceinline__ void load_keys(const SharedItem<T>& item, int stage) {
    const int lane = threadIdx.x % 8, step = next_ / C::kParts, part = next_ % C::kParts;
    const int listed = step - item.word[kRun];
    int word = listed_;
    if (listed < 0)
      word = lane < 4 ? item.word[kFirstKey] + step * kTile + lane * kGranule : kFull;
    else if (part == C::kParts - 1 && listed + 1 < item.word[kList])
      listed_ = fetch_step(item.word[kFirstStep] + listed + 1);
    if (threadIdx.x < 8) s_.step[stage][lane] = word;
    if (V != kPlain && threadIdx.x < 4 && a_.kv_valid)
      copy_word_async(shared_address(s_.valid[stage][lane]), item.valid + word / kTile);
#pragma unroll
    for (int i = 0; i < 2 * C::kKeys / C::kRows; ++i) {
      const int own = threadIdx.x / C::kGroup + i * C::kRows, in_part = own % C::kKeys;
      const int key = __shfl_sync(~0u, word, (part * C::kKeys + in_part) / kGranule) + own % kGranule;
      if (C::kRows > C::kKeys ? own < C::kKeys : i * C::kRows < C::kKeys)
        copy_row(stage, i, item.key + (uint32_t)key * a_.k.row, key < a_.kv_len, a_.head_dim);
      else
        copy_row(stage, i, item.value + (uint32_t)key * a_.v.row, key < a_.kv_len, a_.value_dim);
    }
  }

  // What this thread has of one row: zeros behind its columns, or where there is no row.
  __device__ __forceinline__ void copy_row(int stage, int i, const T* row, bool there, int columns) {
    const uint32_t to = to_ + stage * C::kStageBytes + i * C::kRows * C::kRowBytes;
#pragma unroll
    for (int c = 0; c < C::kChunks; c += C::kGroup) {
      const int column = 8 * (c + threadIdx.x % C::kGroup);
      if (V == kGeneral && a_.by_elements)
        store_shared(to + 16 * c,
                     gather(reinterpret_cast<const uint16_t*>(row) + column, there ? columns - column : 0));
      else
        copy_async(to + 16 * c, row + column, there && column < columns);
    }
  }

  static __device__ __forceinline__ uint4 gather(const uint16_t* from, int count) {
    uint32_t x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < count ? __ldg(from + i) : 0;
    return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
  }

  // Lanes of record_ behind the item's words in the plan; kEntry: what stands behind it in the queue.
  enum { kBatch = 8, kHead, kEntry };

  const Call& a_;
  Shared<T, D>& s_;
  uint32_t to_;
  int at_, record_;  // the next item of the queue
  int ring_ = 0;     // of this item
  int next_;         // its stage; those of its queries are before 0
  int listed_ = 0;   // words of its next step
};

// x[16 x N] = q k^T. keys: where the lane's row of the first matrices begins.
template <typename T, int D, int N>
__device__ __forceinline__ void multiply_keys(float (&x)[N / 2], const uint32_t (&q)[D / 16][4], uint32_t keys) {
  using C = Config<D>;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) x[i] = 0;
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t k[4];
      load_matrices(k, C::column(keys, 2 * i) + n * 16 * C::kRowBytes);
      multiply_add<T>(x + 8 * n, q[i], k[0], k[1]);
      multiply_add<T>(x + 8 * n + 4, q[i], k[2], k[3]);
    }
}

// o[16 x D] += w v, N rows of v deep.
template <typename T, int D, int N>
__device__ __forceinline__ void add_values(float (&o)[D / 2], const float (&weights)[N / 2], uint32_t values) {
  using C = Config<D>;
#pragma unroll
  for (int n = 0; n < N / 16; ++n) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = pack<T>(weights[8 * n + 2 * i], weights[8 * n + 2 * i + 1]);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t v[4];
      load_transposed(v, C::column(values, 2 * i) + n * 16 * C::kRowBytes);
      multiply_add<T>(o + 8 * i, w, v[0], v[1]);
      multiply_add<T>(o + 8 * i + 4, w, v[2], v[3]);
    }
  }
}

template <typename T, int D, Variant V>
__global__ void __launch_bounds__(kConsumers, Config<D>::kBlocks)
    block_kernel(const __grid_constant__ Call a) {
  using C = Config<D>;
  extern __shared__ __align__(128) unsigned char memory[];
  auto& s = *reinterpret_cast<Shared<T, D>*>(memory);
  const int half = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int own_row = thread / 32 * 16 + lane / 4;
  const float scale = a.scale;
  const uint32_t stages = shared_address(s.stage);
  const uint32_t key_lane = stages + C::place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const uint32_t value_lane = stages + C::place(C::kKeys + lane % 16, lane / 16);

  Loader<T, D, V> loader(a, s);
  // Only what the plan holds was read so far: it was there before the kernel in front of this one.
  await_kernels_before();

  uint32_t q[D / 16][4];
  float o[D / 2];
  Softmax softmax;
  int stage = 1, ring = 0;
  bool begins = true;
  // Stage of the item, as the loader counts; first come rounds that only fill the ring.
  int at = -C::kParts - (C::kStages - 1);
  for (;; stage = stage == C::kStages - 1 ? 0 : stage + 1) {
    wait_copies<C::kStages - 2>();
    __syncthreads();
    // What the half sees of a step; queries have none.
    const int content = s.step[stage][4 + half];
    uint32_t bits = ~0u;
    if (at >= 0 && !begins && content >= 0) bits = load_early(a.plan.bits + 128ll * content + thread);
    loader.load(stage == 0 ? C::kStages - 1 : stage - 1);
    commit_copies();

    if (at < -C::kParts) {
      ++at;
      continue;
    }
    const SharedItem<T>& item = s.item[ring];
    if (begins) {
      if (item.word[0] == kNone) return;
      at = -C::kParts;
    }
    const bool paired = !a.two_heads && item.word[0] == item.word[1];
    const int tile = item.word[half && !a.two_heads];
    const bool active = tile != kNone;
    auto find_rows = [&](int (&rows)[2]) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = own_row + 8 * r;
        rows[r] = tile >= 0 ? tile * kTile + i : __ldg(a.plan.rows + (-1 - tile) * kTile + i);
        if (rows[r] >= a.q_len) rows[r] = -1;
      }
    };
    const uint32_t shift = stage * C::kStageBytes;
    if (at < 0) {
      const int from = paired ? 0 : half;
      if (active && (C::kParts == 1 || at + C::kParts == from)) {
        const int row = (C::kParts == 1 ? from * kTile : 0) + thread / 32 * 16 + lane % 16;
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
          load_matrices(q[i], C::column(stages + shift + C::place(row, lane / 16), 2 * i));
      }
      softmax = Softmax();
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0;
    } else {
      const int part = at % C::kParts;
      bool seen = active && content != kEmpty;
      if (V != kPlain && a.kv_valid && seen)
        seen = any_valid(s.valid[stage], s.step[stage]);
      // N keys of the stage from `first` on.
      auto attend = [&](auto keys, int first) {
        constexpr int N = decltype(keys)::value;
        const int in_step = part * C::kKeys + first;
        float x[N / 2];
        multiply_keys<T, D, N>(x, q, key_lane + shift + first * C::kRowBytes);
        if (V != kPlain && a.kv_valid) bits &= valid_fragment(s.valid[stage], s.step[stage], lane);
        bits >>= in_step / 2;
        if (V == kGeneral) {
          map_scores(x, a.map);
          if (a.map.bias) {
            int rows[2];
            find_rows(rows);
            add_bias(x, a.map, item.batch, item.head + (a.two_heads ? half : 0), rows,
                     s.step[stage] + in_step / kGranule, bits);
          }
        }
        if (V != kPlain || content != kFull) apply_bits(x, bits);
        float factor[2];
        // Without slack the largest weight of a row is 1, which rounding leaves as it is.
        if (softmax.update(x, scale, 0, factor)) scale_rows(o, factor);
        softmax.weigh<T>(x, scale);
        add_values<T, D, N>(o, x, value_lane + shift + first * C::kRowBytes);
      };
      if (seen) {
        if (paired)
          attend(std::integral_constant<int, C::kKeys / 2>(), half * (C::kKeys / 2));
        else
          attend(std::integral_constant<int, C::kKeys>(), 0);
      }
    }
    begins = ++at == s.count(ring);
    if (!begins) continue;

    softmax.l[0] = quad_sum(softmax.l[0]);
    softmax.l[1] = quad_sum(softmax.l[1]);
    if (paired) {
      // Through the stage that was read last, in as many parts as it takes.
      constexpr int kPart = D / 2 / C::kParts;
      float4* exchange = reinterpret_cast<float4*>(s.stage[stage]) + thread;
      const Softmax own = softmax;
#pragma unroll
      for (int p = 0; p < C::kParts; ++p) {
        float(&some)[kPart] = *reinterpret_cast<float(*)[kPart]>(o + p * kPart);
        __syncthreads();
        if (half == 1) {
#pragma unroll
          for (int i = 0; i < kPart; i += 4)
            exchange[i / 4 * 128] = make_float4(some[i], some[i + 1], some[i + 2], some[i + 3]);
          leave(softmax, s.part_ml, own_row);
        }
        __syncthreads();
        if (half == 0) {
          const Softmax other = take(s.part_ml, own_row);
          softmax = own;
          combine(softmax, some, other, reinterpret_cast<const float*>(exchange), 4 * 128, scale);
        }
      }
    }
    // Half 0 has the result of both where they share a row tile.
    if (active && !(paired && half == 1)) {
      const int batch = item.batch, head = item.head + (a.two_heads ? half : 0), slot = item.word[kSlot];
      const int64_t pair = (int64_t)batch * a.heads + head;
      if (slot >= 0) {
        store_piece<D>(a, pair, slot + (a.two_heads || paired ? 0 : half), o, softmax);
      } else {
        int rows[2];
        find_rows(rows);
        finish(softmax, o, rows, scale, a.sinks ? a.sinks + head : nullptr, a.lse, pair * a.q_len);
        T* out = static_cast<T*>(a.out) + ((int64_t)batch * a.q_len * a.heads + head) * a.value_dim;
        const int64_t out_row = (int64_t)a.heads * a.value_dim;
        if (V != kGeneral || a.value_dim % 8 == 0)
          store_rows<T>(o, rows, out, out_row, a.value_dim);
        else
          store_elements<T>(o, rows, out, out_row, a.value_dim);
      }
    }
    ring = Shared<T, D>::next(ring);
  }
}

// Whether every row of a tensor begins at a multiple of 16 bytes.
bool is_aligned(const void* data, const Strides3& strides, const int64_t (&sizes)[3]) {
  const int64_t far[3] = {strides.batch, strides.head, strides.row};
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned &= sizes[i] == 1 || far[i] % 8 == 0;
  return aligned;
}

template <typename T, int D, Variant V>
const char* launch(const Problem& p, const Call& call, cudaStream_t stream) {
  // Of the 100 KB that the smallest multiprocessors have, each block takes 1 KB more than it asks for.
  static_assert(Config<D>::kBlocks * (sizeof(Shared<T, D>) + 1024) <= 100 * 1024);
  const auto kernel = block_kernel<T, D, V>;
  constexpr int kBytes = (int)sizeof(Shared<T, D>);
  static Launcher launcher, merger;
  cudaError_t error = launcher.prepare(kernel, p.device, kBytes);
  if (error == cudaSuccess) error = launcher.launch(kernel, dim3((unsigned)p.grid), kConsumers, kBytes, 1, stream, call);
  if (error != cudaSuccess || p.plan.slots == 0) return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  error = merger.prepare(merge_kernel<T, D>, p.device, 0);
  if (error == cudaSuccess)
    error = merger.launch(merge_kernel<T, D>, dim3((unsigned)(p.batch * p.heads), (unsigned)p.plan.n_merges), 128, 0, 1,
                          stream, static_cast<const Arguments&>(call));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int D>
const char* run(const Problem& p, cudaStream_t stream) {
  if (p.head_dim > D || p.value_dim > D)
    return "head sizes larger than that of the kernel library: use the next larger one";
  if (p.bias && p.bias_dtype != kFloat32 && p.bias_dtype != kFloat16 && p.bias_dtype != kBFloat16)
    return "the bias must be float32, float16 or bfloat16";
  if (p.plan.slots > 0 && !p.workspace) return "a plan that splits items needs a workspace";
  if (p.grid == 0) return nullptr;
  const bool aligned = p.head_dim % 8 == 0 && p.value_dim % 8 == 0 &&
                       is_aligned(p.query, p.q, {p.batch, p.heads, p.q_len}) &&
                       is_aligned(p.key, p.k, {p.batch, p.kv_heads, p.kv_len}) &&
                       is_aligned(p.value, p.v, {p.batch, p.kv_heads, p.kv_len});
  // Running maxima are kept of unscaled scores: a scale must not make differences of them vanish.
  const bool plain = aligned && p.softcap == 0 && !p.bias && p.scale > 1e-30;
  const Call call = {{p, plain ? p.scale * kLog2e : 1},
                     p.query,
                     p.key,
                     p.value,
                     p.q,
                     p.k,
                     p.v,
                     (int)p.kv_len,
                     (int)p.head_dim,
                     !aligned,
                     ScoreMap(p)};
  if (!plain) return launch<T, D, kGeneral>(p, call, stream);
  return p.kv_valid ? launch<T, D, kPadded>(p, call, stream) : launch<T, D, kPlain>(p, call, stream);
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::Problem* problem, void* stream) {
  return stof::run<STOF_DTYPE, STOF_HEAD_DIM>(*problem, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::Problem); }
