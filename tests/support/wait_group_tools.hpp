// What tests of the WaitGroup need: a busy group, a thread that is known to wait, a kernel without
// membarrier(2).
#pragma once

#include <lastcall/wait_group.hpp>

#include "support/seccomp.hpp"
#include "support/threads.hpp"

#if LASTCALL_LINUX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <thread>

namespace support {

using lastcall::Clock;
using lastcall::WaitGroup;
using lastcall::detail::WaitGroupAccess;

// Enters and leaves until the group counts in slots. It always does where there is memory.
inline void make_busy(WaitGroup& group) {
  for (int turn = 0; turn < 1000 && !WaitGroupAccess::is_fast(group); ++turn) {
    const WaitGroup::Guard guard = group.enter();
  }
}

// A group as young as it is made, or a busy one.
inline void prepare(WaitGroup& group, bool busy) {
  if (busy) make_busy(group);
}

// A thread in wait(): when it is made, the group has one waiter more (or the wait is over).
class WaitingThread {
 public:
  explicit WaitingThread(const WaitGroup& group) : WaitingThread(group, Clock::time_point::max()) {}
  WaitingThread(const WaitGroup& group, Clock::time_point deadline)
      : thread_([this, &group, deadline, before = WaitGroupAccess::waiters(group)] {
          waiters_before_ = before;
          if (deadline == Clock::time_point::max()) {
            group.wait();
            result_ = true;
          } else {
            result_ = group.wait_until(deadline);
          }
          returned_ = true;
        }) {
    support::eventually(
        [&] { return returned_.load() || WaitGroupAccess::waiters(group) > waiters_before_; });
  }
  ~WaitingThread() { thread_.join(); }
  bool has_returned() const { return returned_; }
  bool returns() const {
    return support::eventually([this] { return returned_.load(); });
  }
  bool result() const { return result_; }

 private:
  std::atomic<std::size_t> waiters_before_{static_cast<std::size_t>(-1)};
  std::atomic<bool> returned_{false};
  std::atomic<bool> result_{false};
  std::thread thread_;
};

// From here on this process's membarrier(2) fails with ENOSYS, as in an old kernel or a sandbox. False
// where no filter can be had.
inline bool forbid_membarrier() {
#if LASTCALL_LINUX
  return refuse_call(SYS_membarrier, ENOSYS) && ::syscall(SYS_membarrier, 0, 0) == -1 &&
         errno == ENOSYS;
#else
  return false;
#endif
}

}  // namespace support
