// Guards of a group beside a bare pair of read-modify-writes, and beside a mutex with a condition variable.
#include "batch.hpp"
#include "cases.hpp"

#include <lastcall/wait_group.hpp>

#include <condition_variable>
#include <memory>
#include <mutex>

namespace bench {

void add_group_cases() {
  using lastcall::WaitGroup;
  add_pair("guard", "lastcall", [] {
    return [group = std::make_shared<WaitGroup>()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        WaitGroup::Guard guard = group->enter();
        benchmark::DoNotOptimize(guard);
      }
    };
  });
  struct alignas(128) Counter {
    std::atomic<std::size_t> value{0};
  };
  add_pair("guard", "bare", [] {
    return [counter = std::make_shared<Counter>()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        counter->value.fetch_add(1, std::memory_order_acq_rel);
        counter->value.fetch_sub(1, std::memory_order_acq_rel);
      }
    };
  });
  struct Locked {
    std::mutex mutex;
    std::condition_variable empty;
    std::size_t count = 1;  // somebody else is in: nobody is notified
  };
  add_pair("guard", "std", [] {
    return [group = std::make_shared<Locked>()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        {
          const std::lock_guard<std::mutex> lock(group->mutex);
          ++group->count;
        }
        const std::lock_guard<std::mutex> lock(group->mutex);
        if (--group->count == 0) group->empty.notify_all();
      }
    };
  });
}

}  // namespace bench
