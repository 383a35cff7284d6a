// What the CUDA tensor-core kernels stream, derived from a mask's runs: see
// stof_hf/attention/granules.py for what it is asked for and csrc/cuda/problem.h for what it makes.
//
// The time that this takes is part of what a user pays for a new mask, so all of it is proportional
// to the size of the mask and of the plan: nothing is sorted but the items, which are few.

#include <cstdlib>
#include <memory>

#include "../masks/result.h"
#include "schedule.h"
#include "work.h"

namespace stof {

class Plan : public Result {
 public:
  explicit Plan(const PlanRequest& p)
      : Result(p.threads),
        contents_(p, team_),
        rows_(p, contents_, team_),
        blocks_(p, rows_, contents_, team_),
        schedule_(p, blocks_.blocks, blocks_.parts, blocks_.ends) {}

  // Counts and then offsets, as stof_hf/attention/granules.py reads them.
  void describe(int64_t* info) {
    *info++ = (int64_t)schedule_.items.size();
    *info++ = blocks_.steps();
    *info++ = blocks_.contents();
    *info++ = (int64_t)rows_.lists.size() / kTile;
    *info++ = (int64_t)schedule_.merges.size();
    *info++ = (int64_t)schedule_.queue.size();
    *info++ = schedule_.slots;
    *info++ = append(schedule_.items);
    *info++ = append(blocks_.steps() * sizeof(Step), blocks_.steps(), 3,
                     [this](char* to, int64_t first, int64_t last) {
                       blocks_.write_steps((Step*)to, first, last);
                     });
    *info++ = append(blocks_.contents() * 2 * kTile * sizeof(uint32_t), blocks_.contents(), 200,
                     [this](char* to, int64_t first, int64_t last) {
                       blocks_.write_bits((uint32_t*)to, first, last);
                     });
    *info++ = append(rows_.lists);
    *info++ = append(schedule_.merges);
    *info++ = append(schedule_.queue);
    *info++ = bytes();
  }

 private:
  Contents contents_;
  Rows rows_;
  Blocks blocks_;
  Schedule schedule_;
};

}  // namespace stof

extern "C" __attribute__((visibility("default"))) void* stof_plan(const stof::PlanRequest* request,
                                                                  int64_t* info) {
  try {
    auto plan = std::make_unique<stof::Plan>(*request);
    plan->describe(info);
    return static_cast<stof::Result*>(plan.release());
  } catch (...) {
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) bool stof_work(const stof::PlanRequest* request,
                                                                 stof::Work* work) {
  try {
    stof::measure(*request, work);
    return true;
  } catch (...) {
    return false;
  }
}
