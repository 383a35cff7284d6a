// Threads that share some work: those of the OpenMP runtime that the caller passes in, or
// std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace stof {

class Team {
 public:
  // parallel: GOMP_parallel of the runtime that torch uses, or null. threads: how many there may
  // be. grain: what a thread should have to do at least, in any unit.
  Team(void* parallel, int64_t threads, int64_t grain)
      : parallel_(parallel), threads_(threads), grain_(std::max<int64_t>(grain, 1)) {}

  // How many threads so much work deserves.
  int64_t threads(double work) const {
    return (int64_t)std::min((double)threads_, std::max(work / (double)grain_, 1.0));
  }

  // Calls work() on `threads` threads, or as many as there are, this one among them. What the first
  // of them throws is thrown here once all are back.
  template <typename Work>
  void run(int64_t threads, Work work) const {
    if (threads <= 1) return work();
    Shared<Work> shared{work};
    if (parallel_) {
      using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
      reinterpret_cast<Parallel>(parallel_)(Shared<Work>::enter, &shared, (unsigned)threads, 0);
    } else {
      // Stacks may take all memory that there is. So much is kept until the threads are there, and is then free
      // for what they need before any begins; where there is less, this one does all of it.
      auto room = std::unique_ptr<volatile char[]>(new (std::nothrow) volatile char[kRoom]);
      if (!room) return work();
      room[0] = 0;
      std::vector<std::thread> team;
      team.reserve(threads - 1);
      std::atomic<int> stage{0};
      std::atomic<size_t> ready{0};
      auto reach = [&](int wanted) {
        while (stage < wanted) std::this_thread::yield();
      };
      auto enter = [&] {
        reach(1);
        prepare_to_throw();
        ++ready;
        reach(2);
        Shared<Work>::enter(&shared);
      };
      try {
        for (int64_t i = 1; i < threads; ++i) team.emplace_back(enter);
      } catch (const std::exception&) {
        // The system gives no more threads: those there are do all of it.
      }
      room.reset();
      stage = 1;
      while (ready < team.size()) std::this_thread::yield();
      stage = 2;
      Shared<Work>::enter(&shared);
      for (std::thread& t : team) t.join();
    }
    if (shared.error) std::rethrow_exception(shared.error);
  }

  // Calls work(i) for each i below `count`, in any order.
  template <typename Work>
  void each(int64_t count, int64_t threads, Work work) const {
    std::atomic<int64_t> next{0};
    run(std::min(threads, count), [&] {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    });
  }

 private:
  // More than malloc would take from what it has: what is given back goes to the system.
  static constexpr size_t kRoom = 48 << 20;

  // What the C++ runtime keeps of a thread's exceptions is allocated when it is first asked for, and the process
  // ends where that fails. OpenMP's threads stay, so that each asks in the first work that it shares.
  static void prepare_to_throw() { (void)std::uncaught_exceptions(); }

  template <typename Work>
  struct Shared {
    Work& work;
    std::mutex lock = {};
    std::exception_ptr error = {};

    // What a thread throws may not leave it: that would end the process.
    static void enter(void* shared) {
      Shared& self = *static_cast<Shared*>(shared);
      prepare_to_throw();
      try {
        self.work();
      } catch (...) {
        std::lock_guard<std::mutex> guard(self.lock);
        if (!self.error) self.error = std::current_exception();
      }
    }
  };

  void* parallel_;
  int64_t threads_, grain_;
};

}  // namespace stof
