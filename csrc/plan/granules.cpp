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
        steps_(p, contents_) {
    std::vector<int32_t> ends;
    blocks_.reserve(rows_.tiles.size());
    int32_t at = 0;
    for (int32_t end : rows_.ends) {
      const int32_t ordinary = at + (int32_t)p.tile_rows;
      while (at < end) {
        const Rows::Tile& one = rows_.tiles[at];
        const bool paired = p.tiles == 2 && at + 1 < ordinary;
        if (rows_.repeats(at, 1 + paired)) {
          blocks_.push_back(steps_.shifted(blocks_.back(), &one, 1 + paired));
        } else if (!paired) {
          blocks_.push_back(steps_.block(rows_, one, nullptr));
        } else if (const Rows::Tile& two = rows_.tiles[at + 1]; rows_.alike(one, two)) {
          blocks_.push_back(steps_.block(rows_, one, &two));
        } else {
          blocks_.push_back(steps_.block(rows_, one, nullptr));
          blocks_.push_back(steps_.block(rows_, two, nullptr));
        }
        at += 1 + paired;
      }
      ends.push_back((int32_t)blocks_.size());
    }
    schedule_ = std::make_unique<Schedule>(p, blocks_, steps_.parts, ends);
  }

  // Counts and then offsets, as stof_hf/attention/granules.py reads them.
  void describe(int64_t* info) {
    *info++ = (int64_t)schedule_->items.size();
    *info++ = steps_.count();
    *info++ = steps_.contents();
    *info++ = (int64_t)rows_.lists.size() / kTile;
    *info++ = (int64_t)schedule_->merges.size();
    *info++ = (int64_t)schedule_->queue.size();
    *info++ = schedule_->slots;
    *info++ = append(schedule_->items);
    *info++ = append(steps_.count() * sizeof(Step), steps_.count(), 3,
                     [this](char* to, int64_t first, int64_t last) {
                       steps_.write((Step*)to, first, last);
                     });
    *info++ = append(steps_.contents() * 2 * kTile * sizeof(uint32_t), steps_.contents(), 200,
                     [this](char* to, int64_t first, int64_t last) {
                       steps_.write_bits((uint32_t*)to, first, last);
                     });
    *info++ = append(rows_.lists);
    *info++ = append(schedule_->merges);
    *info++ = append(schedule_->queue);
    *info++ = bytes();
  }

 private:
  Contents contents_;
  Rows rows_;
  Steps steps_;
  std::vector<Block> blocks_;
  std::unique_ptr<Schedule> schedule_;
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
