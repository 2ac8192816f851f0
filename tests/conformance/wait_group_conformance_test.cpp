// What Go's sync/waitgroup_test.go and tokio-util's task_tracker.rs check of their groups, asked of ours.
// Where ours differs on purpose (waiting needs no close; guards instead of tokens), the test says so.
#include <lastcall/wait_group.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/wait_group_tools.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

using lastcall::WaitGroup;
using lastcall::detail::WaitGroupAccess;
using support::make_busy;
using namespace std::chrono_literals;
using Guard = WaitGroup::Guard;

namespace {

// Go has goroutines, cheap enough for a new set in each round. Here the same threads run every round.
class Crew {
 public:
  explicit Crew(int size) : line_(size + 1) {
    for (int number = 0; number < size; ++number) {
      threads_.start([this] {
        for (;;) {
          line_.ready_steady_go();
          if (over_) return;
          (*job_)();
        }
      });
    }
  }
  ~Crew() {
    over_ = true;
    line_.ready_steady_go();
  }
  // Each of the crew runs `job` once; begun when this returns, not finished.
  void begin(const std::function<void()>& job) {
    job_ = &job;
    line_.ready_steady_go();
  }

 private:
  support::StartingLine line_;
  std::atomic<bool> over_{false};
  const std::function<void()>* job_ = nullptr;
  support::Threads threads_;
};

}  // namespace

// --- Go -------------------------------------------------------------------------------------------

TEST_CASE("two groups with 16 waiters each, reused, are never early and never stuck") {
  constexpr int size = 16;
  const bool guards = GENERATE(false, true);
  const int rounds = support::under_sanitizer ? 30 : 200;
  WaitGroup first;
  WaitGroup second;
  Crew crew(size);
  for (int round = 0; round < rounds; ++round) {
    std::vector<Guard> of_first;
    std::vector<Guard> of_second;
    std::atomic<std::size_t> next{0};
    if (guards) {
      if (round % 3 == 0) make_busy(first);
      if (round % 5 == 0) make_busy(second);
      for (int number = 0; number < size; ++number) {
        of_first.push_back(first.enter());
        of_second.push_back(second.enter());
      }
    } else {
      first.add(size);
      second.add(size);
    }
    std::atomic<int> exited{0};
    std::atomic<int> begun{0};
    const std::function<void()> job = [&] {
      ++begun;
      if (guards) {
        of_first[next++].release();
      } else {
        first.done();
      }
      second.wait();
      ++exited;
    };
    crew.begin(job);
    first.wait();
    REQUIRE(begun == size);
    for (std::size_t number = 0; number < size; ++number) {
      REQUIRE(exited == 0);  // the second group still has a member
      if (guards) {
        of_second[number].release();
      } else {
        second.done();
      }
    }
    REQUIRE(support::eventually([&] { return exited == size; }));
  }
}

TEST_CASE("one done() too many is an error, and not a crash later") {
  WaitGroup group;
  group.add(1);
  group.done();
  CHECK_THROWS_AS(group.done(), std::logic_error);
  CHECK(group.wait_for(0s));
  group.add(1);
  CHECK_FALSE(group.wait_for(0s));
  group.done();
  CHECK(group.wait_for(0s));
}

TEST_CASE("what two workers did is visible after wait(), a thousand times") {
  const int rounds = support::under_sanitizer ? 200 : 1000;
  Crew crew(2);
  for (int round = 0; round < rounds; ++round) {
    WaitGroup group;
    std::atomic<int> sum{0};
    int plain[2] = {0, 0};
    std::atomic<int> number{0};
    group.add(2);
    const std::function<void()> job = [&] {
      sum.fetch_add(1, std::memory_order_relaxed);
      plain[number++] = 1;
      group.done();
    };
    crew.begin(job);
    group.wait();
    REQUIRE(sum.load(std::memory_order_relaxed) == 2);
    REQUIRE(plain[0] + plain[1] == 2);
  }
}

TEST_CASE("add() from nothing may race with wait(): each zero is a zero, whoever comes next") {
  // Go calls this a misuse, "Add called concurrently with Wait"; here it has a meaning: wait() returns
  // after some moment at which nobody was in.
  WaitGroup group;
  std::atomic<bool> over{false};
  std::atomic<long> waits{0};
  support::Threads threads;
  for (int number = 0; number < 2; ++number) {
    threads.start([&] {
      for (int turn = 0; turn < 2000; ++turn) {
        group.add(2);
        group.done();
        group.done();
      }
    });
  }
  support::Threads waiters;
  for (int number = 0; number < 2; ++number) {
    waiters.start([&] {
      while (!over) {
        group.wait();
        ++waits;
      }
    });
  }
  threads.join();
  over = true;
  waiters.join();
  CHECK(waits > 0);
  CHECK(group.count() == 0);
}

TEST_CASE("a wait never ends before a member that entered before it has left") {
  const bool busy = GENERATE(false, true);
  WaitGroup group;
  std::atomic<bool> over{false};
  support::Threads noise;
  for (int number = 0; number < 2; ++number) {
    noise.start([&] {
      while (!over) {
        { const Guard guard = group.enter(); }
        std::this_thread::yield();
      }
    });
  }
  // Guards that the waiter entered, released by somebody else.
  struct Ticket {
    Guard guard;
    std::atomic<bool>* left;
  };
  std::mutex mutex;
  std::deque<Ticket> tickets;
  noise.start([&] {
    for (;;) {
      std::optional<Ticket> ticket;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!tickets.empty()) {
          ticket = std::move(tickets.front());
          tickets.pop_front();
        }
      }
      if (ticket) {
        *ticket->left = true;
        ticket->guard.release();
      } else if (over) {
        return;
      } else {
        std::this_thread::yield();
      }
    }
  });
  bool early = false;
  int zeros = 0;
  for (int round = 0; round < 2000; ++round) {
    if (busy && round % 10 == 0) make_busy(group);
    std::atomic<bool> left{false};
    Guard guard = group.enter();
    {
      const std::lock_guard<std::mutex> lock(mutex);
      tickets.push_back(Ticket{std::move(guard), &left});
    }
    if (group.wait_for(10s)) {
      ++zeros;
      early = early || !left;
    }
    support::eventually([&] { return left.load(); });
  }
  over = true;
  noise.join();
  CHECK_FALSE(early);
  CHECK(zeros == 2000);
}

// --- tokio-util -----------------------------------------------------------------------------------

TEST_CASE("an empty closed group is over at once, and stays so") {
  WaitGroup group;
  group.close();
  group.wait();
  group.wait();
  CHECK(group.wait_for(0s));
  CHECK(group.is_closed());
  CHECK(group.count() == 0);
}

TEST_CASE("waiting needs no close: an open group is over when it is empty") {
  WaitGroup group;  // TaskTracker would wait for close()
  group.wait();
  Guard guard = group.enter();
  CHECK_FALSE(group.wait_for(1ms));
  guard.release();
  group.wait();
  CHECK_FALSE(group.is_closed());
}

TEST_CASE("closing wakes nobody while somebody is in, and leaving does") {
  WaitGroup group;
  Guard guard = group.enter();
  std::atomic<bool> returned{false};
  support::Threads threads;
  threads.start([&] {
    group.wait();
    returned = true;
  });
  const bool waits =
      support::eventually([&] { return WaitGroupAccess::waiters(group) == 1 || returned; });
  group.close();
  const bool early = returned;
  const bool still = WaitGroupAccess::waiters(group) == 1;
  guard.release();
  threads.join();
  CHECK(waits);
  CHECK(still);
  CHECK_FALSE(early);
}

TEST_CASE("a guard cloned after close keeps the group from being over") {
  WaitGroup group;
  Guard original = group.enter();
  group.close();
  Guard clone = original;
  original.release();
  CHECK_FALSE(group.wait_for(1ms));
  {
    const Guard clone_of_clone = clone;
    clone.release();
    CHECK(group.count() == 1);
    CHECK_FALSE(group.wait_for(1ms));
  }
  CHECK(group.wait_for(0s));
}

TEST_CASE("count() follows every guard, and a closed group is not empty until it is") {
  WaitGroup group;
  std::vector<Guard> guards;
  for (std::size_t number = 1; number <= 300; ++number) {
    guards.push_back(group.enter());
    REQUIRE(group.count() == number);
  }
  group.close();
  while (!guards.empty()) {
    REQUIRE(group.count() == guards.size());
    REQUIRE_FALSE(group.wait_for(0s));
    guards.pop_back();
  }
  CHECK(group.count() == 0);
  CHECK(group.wait_for(0s));
}

TEST_CASE("a hundred waiters are all notified by the last to leave") {
  const int size = support::under_sanitizer ? 40 : 100;
  WaitGroup group;
  Guard first = group.enter();
  Guard second = group.enter();
  std::atomic<int> notified{0};
  support::Threads threads;
  for (int number = 0; number < size; ++number) {
    threads.start([&] {
      group.wait();
      ++notified;
    });
  }
  const bool all = support::eventually(
      [&] { return WaitGroupAccess::waiters(group) == static_cast<std::size_t>(size); });
  first.release();
  const int early = notified;
  second.release();
  threads.join();
  CHECK(all);
  CHECK(early == 0);
  CHECK(notified == size);
}

TEST_CASE("waiters that gave up are forgotten, and the others still notified") {
  WaitGroup group;
  Guard guard = group.enter();
  std::atomic<int> notified{0};
  std::atomic<int> gave_up{0};
  support::Threads threads;
  for (int number = 0; number < 12; ++number) {
    threads.start([&, number] {
      if (number % 3 == 0) {
        group.wait();
        ++notified;
      } else if (group.wait_for(std::chrono::milliseconds(number))) {
        gave_up += 100;
      } else {
        ++gave_up;
      }
    });
  }
  const bool only_patient =
      support::eventually([&] { return gave_up == 8 && WaitGroupAccess::waiters(group) == 4; });
  guard.release();
  threads.join();
  CHECK(only_patient);
  CHECK(notified == 4);
  CHECK(WaitGroupAccess::waiters(group) == 0);
}

TEST_CASE("entering a closed group that others still drain is refused, again and again") {
  WaitGroup group;
  Guard guard = group.enter();
  group.close();
  for (int turn = 0; turn < 100; ++turn) {
    CHECK_FALSE(static_cast<bool>(group.try_enter()));
    CHECK(group.count() == 1);
  }
  guard.release();
  CHECK_FALSE(static_cast<bool>(group.try_enter()));
  CHECK(group.wait_for(0s));
}
