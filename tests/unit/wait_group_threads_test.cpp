// wait_group.hpp among threads: who ends when, who is too many, who is in the middle of a section, and a
// group that is gone the moment that wait() has returned.
#include <lastcall/wait_group.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/wait_group_tools.hpp"

#include <pthread.h>
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <thread>
#include <vector>

using lastcall::Clock;
using lastcall::WaitGroup;
using lastcall::detail::WaitGroupAccess;
using support::make_busy;
using support::prepare;
using support::WaitingThread;
using namespace std::chrono_literals;
using Guard = WaitGroup::Guard;

namespace {

/// A thread that stays inside a section of the group.
class StuckInside {
 public:
  explicit StuckInside(WaitGroup& group) {
    thread_.start([this, &group] {
      auto* const word = WaitGroupAccess::own_word(group);
      if (word != nullptr) word->open(word->value(), lastcall::detail::thread_state.stamp);
      inside_.open();
      leave_.wait();
      if (word != nullptr) word->close(word->value());
    });
    came_ = inside_.wait();
  }
  bool came() const { return came_; }
  void leave() {
    leave_.open();
    thread_.join();
  }

 private:
  support::Gate inside_;
  support::Gate leave_;
  bool came_ = false;
  support::Threads thread_;
};

}  // namespace

TEST_CASE("any thread may release a guard") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::vector<Guard> guards;
  for (int number = 0; number < 100; ++number) {
    guards.push_back(number % 3 == 0 ? group.enter("named") : group.enter());
  }
  std::thread([&] { guards.erase(guards.begin() + 50, guards.end()); }).join();
  CHECK(group.count() == 50);
  CHECK_FALSE(group.wait_for(0s));
  std::thread([&] { guards.clear(); }).join();
  CHECK(group.count() == 0);
  CHECK(group.wait_for(0s));
  CHECK(group.members().empty());
}

TEST_CASE("a thread may end with its guards out") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::vector<Guard> guards;
  for (int number = 0; number < 100; ++number) {
    std::thread([&] {
      guards.push_back(group.enter());
      guards.push_back(group.enter());
      guards.erase(guards.begin());
    }).join();
  }
  CHECK(group.count() == 100);
  CHECK_FALSE(group.wait_for(0s));
  CHECK(group.count() == 100);
  guards.clear();
  CHECK(group.wait_for(0s));
}

TEST_CASE("a group that is waited for over and over goes on with what its slots hold") {
  WaitGroup group;
  std::vector<Guard> guards;
  for (int round = 0; round < 5; ++round) {
    make_busy(group);
    REQUIRE(WaitGroupAccess::is_fast(group));
    // More enter here than leave here, and the other way round.
    std::thread([&] {
      for (int at = 0; at < 10; ++at) guards.push_back(group.enter());
    }).join();
    CHECK(group.count() == 10);
    guards.resize(3);
    CHECK(group.count() == 3);
    CHECK_FALSE(group.wait_for(0s));
    CHECK_FALSE(WaitGroupAccess::is_fast(group));
    CHECK(group.count() == 3);
    guards.clear();
    CHECK(group.count() == 0);
    CHECK(group.wait_for(0s));
  }
}

TEST_CASE("the place of a thread that has ended goes to another") {
  WaitGroup group;
  make_busy(group);
  int without_place = 0;
  for (int number = 0; number < 2100; ++number) {  // twice as many as there are places
    std::thread([&] {
      const Guard guard = group.enter();
      if (lastcall::detail::thread_state.sections == nullptr) ++without_place;
    }).join();
  }
  CHECK(without_place == 0);
  CHECK(group.count() == 0);
}

TEST_CASE("a guard that a thread_local holds leaves when the thread ends") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::thread([&] {
    static thread_local Guard late;
    late = group.enter();
  }).join();
  CHECK(group.count() == 0);
  CHECK(group.wait_for(0s));
}

TEST_CASE("more threads than a group has slots are counted as well") {
  // The table has 1008 places, one for each live thread.
  constexpr int threads_wanted = support::under_sanitizer ? 1100 : 1500;
  WaitGroup group;
  make_busy(group);
  struct Shared {
    WaitGroup& group;
    support::Gate& all_in;
    support::Gate& all_out;
    std::atomic<int> inside{0};
  };
  support::Gate all_in;
  support::Gate all_out;
  Shared shared{group, all_in, all_out};
  std::vector<pthread_t> threads;
  pthread_attr_t small;
  ::pthread_attr_init(&small);
  ::pthread_attr_setstacksize(&small, std::size_t{128} << 10U);
  for (int number = 0; number < threads_wanted; ++number) {
    pthread_t thread{};
    const int failed = ::pthread_create(
        &thread, &small,
        [](void* argument) -> void* {
          Shared& with = *static_cast<Shared*>(argument);
          for (int turn = 0; turn < 10; ++turn) const Guard brief = with.group.enter();
          Guard guard = with.group.enter();
          ++with.inside;
          with.all_in.wait();
          guard.release();
          for (int turn = 0; turn < 10; ++turn) const Guard brief = with.group.enter();
          return nullptr;
        },
        &shared);
    if (failed != 0) break;
    threads.push_back(thread);
  }
  ::pthread_attr_destroy(&small);
  const int started = static_cast<int>(threads.size());
  CHECK(support::eventually([&] { return shared.inside == started; }));
  CHECK(group.count() == threads.size());
  CHECK(WaitGroupAccess::is_fast(group));
  CHECK_FALSE(group.wait_for(0s));
  CHECK(group.count() == threads.size());
  all_in.open();
  group.wait();
  for (const pthread_t thread : threads) ::pthread_join(thread, nullptr);
  CHECK(group.count() == 0);
  if (started < 1009) WARN("only " << started << " threads could be had");
}

TEST_CASE("close() races with try_enter(): a guard was given and is waited for, or refused") {
  const bool busy = GENERATE(false, true);
  for (int round = 0; round < 300; ++round) {
    WaitGroup group;
    prepare(group, busy);
    std::atomic<int> inside{0};
    std::atomic<int> given{0};
    std::atomic<bool> refused_then_given{false};
    support::Threads threads;
    support::StartingLine line(3);
    for (int number = 0; number < 2; ++number) {
      threads.start([&] {
        line.ready_steady_go();
        bool refused = false;
        for (int turn = 0; turn < 200; ++turn) {
          if (Guard guard = group.try_enter()) {
            ++given;
            ++inside;
            if (refused) refused_then_given = true;
            --inside;
          } else {
            refused = true;
          }
        }
      });
    }
    line.ready_steady_go();
    if (round % 2 == 0) std::this_thread::yield();
    group.close();
    group.wait();
    // From here on nobody can be in between: entered() and waited for, or refused for ever.
    const int inside_after = inside;
    const int given_after = given;
    threads.join();
    REQUIRE(inside_after == 0);
    REQUIRE(given == given_after);
    REQUIRE_FALSE(refused_then_given);
    REQUIRE(group.count() == 0);
  }
}

TEST_CASE("the group may be destroyed the moment that wait() has returned") {
  const bool busy = GENERATE(false, true);
  constexpr int members = 3;
  const int rounds = support::under_sanitizer ? 1000 : 4000;
  std::atomic<std::uintptr_t> handed{0};
  std::atomic<int> entered{0};
  std::atomic<bool> over{false};
  support::Threads threads;
  support::StartingLine line(members + 1);
  for (int number = 0; number < members; ++number) {
    threads.start([&, number] {
      for (;;) {
        line.ready_steady_go();
        if (over) return;
        auto* const group = reinterpret_cast<WaitGroup*>(handed.load());
        Guard guard = number == 0 ? group->enter("named") : group->enter();
        ++entered;
        guard.release();  // the last that this thread has to do with the group
      }
    });
  }
  for (int round = 0; round < rounds; ++round) {
    auto group = std::make_unique<WaitGroup>();
    if (busy) make_busy(*group);
    entered = 0;
    handed = reinterpret_cast<std::uintptr_t>(group.get());
    line.ready_steady_go();
    while (entered != members) std::this_thread::yield();
    group->wait();
    group.reset();
  }
  over = true;
  line.ready_steady_go();
  threads.join();
  SUCCEED("no leaver touched a group that was gone, or the sanitizer would have said so");
}

TEST_CASE("the group may be destroyed by whoever of several waiters returns first") {
  for (int round = 0; round < 300; ++round) {
    auto* const group = new WaitGroup;
    Guard guard = group->enter();
    std::atomic<bool> taken{false};
    support::Threads threads;
    for (int number = 0; number < 3; ++number) {
      threads.start([&] {
        group->wait();
        if (!taken.exchange(true)) delete group;
      });
    }
    const bool all_wait =
        support::eventually([&] { return WaitGroupAccess::waiters(*group) == 3; });
    guard.release();
    threads.join();
    REQUIRE(all_wait);
  }
  SUCCEED("nobody used it afterwards");
}

TEST_CASE("a group becomes fast when it is busy, exact when it is waited for, and fast again") {
  WaitGroup group;
  {
    const Guard guard = group.enter();
    CHECK_FALSE(WaitGroupAccess::is_fast(group));
  }
  make_busy(group);
  CHECK(WaitGroupAccess::is_fast(group));
  Guard guard = group.enter();
  CHECK(WaitGroupAccess::is_fast(group));
  CHECK(group.count() == 1);
  CHECK_FALSE(group.wait_for(0s));
  CHECK_FALSE(WaitGroupAccess::is_fast(group));
  CHECK(group.count() == 1);
  make_busy(group);
  CHECK(WaitGroupAccess::is_fast(group));  // the one that waited in vain is forgotten
  {
    const WaitingThread waiter(group);
    CHECK_FALSE(WaitGroupAccess::is_fast(group));
    make_busy(group);
    CHECK_FALSE(WaitGroupAccess::is_fast(group));  // not while somebody waits
    guard.release();
    CHECK(waiter.returns());
  }
  make_busy(group);
  CHECK(WaitGroupAccess::is_fast(group));
  guard = group.enter();
  group.close();
  CHECK(WaitGroupAccess::is_fast(group));
  CHECK_FALSE(static_cast<bool>(group.try_enter()));
  guard.release();
  group.wait();
  CHECK_FALSE(WaitGroupAccess::is_fast(group));
}

TEST_CASE("a deadline holds also while a thread is stuck inside a section") {
  WaitGroup group;
  make_busy(group);
  StuckInside stuck(group);
  const bool zero = group.wait_for(20ms);
  const bool still_fast = WaitGroupAccess::is_fast(group);
  Guard guard = group.enter();
  const std::size_t count = group.count();
  std::atomic<pid_t> id{0};
  std::atomic<bool> returned{false};
  std::thread patient([&] {
    id = support::thread_id();
    group.wait();
    returned = true;
  });
  support::let_it_block(id);
  const bool early = returned;
  const bool second = group.wait_for(20ms);  // the other one has the lock, and that doesn't matter
  make_busy(group);
  CHECK_FALSE(WaitGroupAccess::is_fast(group));  // or there would be two who settle the count
  stuck.leave();
  guard.release();
  patient.join();
  CHECK(stuck.came());
  CHECK_FALSE(zero);
  CHECK(still_fast);
  CHECK(count == 1);
  CHECK_FALSE(early);
  CHECK_FALSE(second);
  CHECK(returned);
}

namespace {

// Called in forked children before the library's own hook, which is younger.
std::function<void()> first_in_child;
const int hooked = ::pthread_atfork(nullptr, nullptr, [] {
  if (first_in_child) first_in_child();
});

}  // namespace

TEST_CASE("a thread that a hook starts in the child before ours has no place from before") {
  REQUIRE(hooked == 0);
  WaitGroup group;
  make_busy(group);
  std::atomic<int> without_place{0};
  std::atomic<bool> over{false};
  std::optional<std::thread> early;
  first_in_child = [&] {
    std::atomic<bool> entered{false};
    early.emplace([&] {
      const Guard guard = group.enter();
      if (lastcall::detail::thread_state.sections == nullptr) ++without_place;
      entered = true;
      while (!over) std::this_thread::yield();
    });
    while (!entered) std::this_thread::yield();
  };
  const int failures = support::in_child_process([&] {
    const std::size_t count = group.count();
    over = true;
    early->join();
    return (without_place == 1 && count == 1 && group.wait_for(support::patience)) ? 0 : 1;
  });
  first_in_child = nullptr;
  CHECK(failures == 0);
  // The parent gives places as before.
  std::thread([&] {
    const Guard guard = group.enter();
    if (lastcall::detail::thread_state.sections == nullptr) ++without_place;
  }).join();
  CHECK(without_place == 0);
}

TEST_CASE("the sum of the word and the slots is right however far they ran apart") {
  using lastcall::detail::GroupCount;
  using lastcall::detail::SectionWord;
  constexpr std::uint64_t bias = GroupCount::bias;
  const std::uintptr_t one = SectionWord::one;
  CHECK(GroupCount::members_of(bias, 0) == 0);
  CHECK(GroupCount::members_of(bias + 2, 3 * one) == 5);
  CHECK(GroupCount::members_of(bias - 3, 5 * one) == 2);
  CHECK(GroupCount::members_of(bias + 5, std::uintptr_t{0} - 3 * one) == 2);
  // Beyond what a slot's word can hold: it wraps, and the word has gone as far the other way.
  const std::uint64_t far = std::numeric_limits<std::uintptr_t>::max() / one + 8;
  CHECK(GroupCount::members_of(bias - far, static_cast<std::uintptr_t>(far + 1) * one) == 1);
  CHECK(GroupCount::members_of(bias + far,
                               std::uintptr_t{0} - static_cast<std::uintptr_t>(far) * one) == 0);
}

TEST_CASE("a forked child doesn't wait for a thread of its parent's that was inside a section") {
  WaitGroup group;
  make_busy(group);
  StuckInside stuck(group);
  const auto in_child = [&] {
    Guard guard = group.enter();
    const bool zero_too_early = group.wait_for(1ms);
    guard.release();
    if (zero_too_early || !group.wait_for(support::patience)) return 1;
    make_busy(group);
    int failures = 0;
    // The number of the thread that is no more goes to another, with what is in its slot.
    std::thread([&] {
      const Guard own = group.enter();
      failures += group.count() == 1 ? 0 : 1;
    }).join();
    return failures + (group.wait_for(support::patience) ? 0 : 1);
  };
  const int failures = support::in_child_process(in_child);
  const int of_grandchild =
      support::in_child_process([&] { return support::in_child_process(in_child); });
  stuck.leave();
  CHECK(stuck.came());
  CHECK(failures == 0);
  CHECK(of_grandchild == 0);
  CHECK(group.wait_for(0s));
}

TEST_CASE("in a forked child threads have places of their own, the one that forked among them") {
  WaitGroup group;
  make_busy(group);
  const int failures = support::in_child_process([&] {
    if (WaitGroupAccess::own_word(group) == nullptr) return 1;
    const auto come_and_go = [&] {
      for (int turn = 0; turn < 200'000; ++turn) const Guard guard = group.enter();
    };
    std::thread other(come_and_go);
    come_and_go();
    other.join();
    return group.count() == 0 && group.wait_for(support::patience) ? 0 : 2;
  });
  CHECK(failures == 0);
}

TEST_CASE("in a forked child all places are free but that of the thread that forked") {
  using lastcall::detail::ChunkPlace;
  using lastcall::detail::thread_state;
  constexpr std::size_t threads = 70;  // more than there are bits in a word of the table
  WaitGroup group;
  make_busy(group);
  support::Threads others;  // have the first places of the parent
  std::atomic<std::size_t> entered{0};
  support::Gate over;
  const auto take_place = [&] {
    const Guard guard = group.enter();
    ++entered;
    over.wait();
  };
  for (std::size_t number = 0; number < threads; ++number) others.start(take_place);
  support::eventually([&] { return entered == threads; });
  const int code = support::in_child_process([&] {
    std::atomic<std::size_t> came{0};
    std::atomic<int> wrong{0};
    std::atomic<bool> leave{false};
    std::vector<std::atomic<int>> owners(ChunkPlace::capacity);
    const std::uintptr_t stamp = thread_state.stamp;
    const auto note_place = [&] {
      const std::size_t index = ChunkPlace::first_size * ((1U << thread_state.chunk) - 1) +
                                thread_state.offset / lastcall::detail::cache_line;
      if (thread_state.sections == nullptr || thread_state.stamp != stamp) ++wrong;
      if (owners.at(index)++ != 0) ++wrong;
    };
    note_place();
    std::vector<std::thread> children;
    for (std::size_t number = 0; number < threads; ++number) {
      children.emplace_back([&] {
        const Guard guard = group.enter();
        note_place();
        ++came;
        while (!leave) std::this_thread::sleep_for(1ms);
      });
    }
    const bool all_came = support::eventually([&] { return came == threads; });
    leave = true;
    for (std::thread& child : children) child.join();
    if (!all_came) return 1;
    if (wrong != 0) return 2;
    // Places are given from the first one on, so nobody has one beyond them all.
    for (std::size_t index = threads + 1; index < owners.size(); ++index) {
      if (owners[index] != 0) return 3;
    }
    return 0;
  });
  over.open();
  others.join();
  CHECK(code == 0);
}

TEST_CASE("in a forked child a new group works, whatever the parent's threads were doing") {
  alignas(WaitGroup) unsigned char room[sizeof(WaitGroup)];
  auto* const group = ::new (static_cast<void*>(room)) WaitGroup;
  make_busy(*group);
  std::atomic<bool> over{false};
  support::Threads threads;
  for (int number = 0; number < 2; ++number) {
    threads.start([&] {
      while (!over) const Guard guard = group->enter();
    });
  }
  int failures = 0;
  for (int round = 0; round < 20; ++round) {
    failures += support::in_child_process([&] {
      // At the same address, where the parent's threads may have been in the middle of a section.
      auto* const mine = ::new (static_cast<void*>(room)) WaitGroup;
      make_busy(*mine);
      Guard guard = mine->enter();
      if (mine->wait_for(0s)) return 1;
      guard.release();
      return mine->wait_for(10s) ? 0 : 1;
    });
  }
  over = true;
  threads.join();
  CHECK(failures == 0);
  group->wait();
  group->~WaitGroup();
}

TEST_CASE("waiting still works when a filter takes membarrier away after it was granted") {
  WaitGroup group;
  make_busy(group);
  const int ended = support::in_child_process([&] {
    if (!support::forbid_membarrier()) return 77;
    Guard guard = group.enter();
    if (!WaitGroupAccess::is_fast(group) || group.wait_for(0s)) return 1;
    make_busy(group);
    guard.release();
    return group.wait_for(10s) ? 0 : 2;
  });
  if (ended == 77) WARN("no filter can be had here");
  CHECK((ended == 0 || ended == 77));
}
