// What the groups of other languages promise and test, asked of TaskGroup: Go's errgroup (and the
// pipelines of its examples), tokio's TaskTracker and JoinSet, and the nurseries of structured concurrency. Each test
// says whose property it is. Where the contract decides otherwise, the test says what it decides.
#include <lastcall/task_group.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::OnFailure;
using lastcall::OperationCancelled;
using lastcall::TaskGroup;
using namespace std::chrono_literals;

namespace {

// What wait() rethrows, in words; "" if nothing.
std::string outcome_of_wait(TaskGroup& group) {
  try {
    group.wait();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// ---- errgroup ----

TEST_CASE("errgroup: wait() returns the first error that is one, whatever comes before and after") {
  const std::vector<std::vector<std::string>> histories = {{},
                                                           {""},
                                                           {"one"},
                                                           {"one", ""},
                                                           {"one", "", "two"},
                                                           {"", "one"},
                                                           {"", "", ""},
                                                           {"", "two", "one"},
                                                           {"one", "two", "three"}};
  for (const auto& history : histories) {
    TaskGroup group({}, OnFailure::keep_going);
    std::string first;
    for (const std::string& error : history) {
      if (first.empty()) first = error;
      group.spawn("task", [&error] {
        if (!error.empty()) throw std::runtime_error(error);
      });
      // One after the other, so that it is known which was first.
      REQUIRE(group.wait_for(support::patience));
    }
    CHECK(outcome_of_wait(group) == first);
    CHECK(outcome_of_wait(group) == first);
  }
}

TEST_CASE(
    "errgroup: the group's token is cancelled with the first error, as context.Cause has it") {
  for (const bool fails : {true, false}) {
    CancellationSource parent;
    TaskGroup group(parent.token());
    group.spawn("fine", [] {});
    if (fails) group.spawn("broken", [] { throw std::runtime_error("first"); });
    CHECK(outcome_of_wait(group) == (fails ? "first" : ""));
    // Go cancels the context when Wait returns. Here a group without failures leaves its token alone:
    // wait() is no cancel, the destructor is.
    CHECK(group.token().is_cancelled() == fails);
    CHECK((group.token().cause().kind() == CauseKind::failure) == fails);
    CHECK_FALSE(parent.is_cancelled());
  }
}

TEST_CASE("errgroup: when the group is gone its token is cancelled") {
  CancellationToken token;
  {
    TaskGroup group;
    token = group.token();
    group.spawn("fine", [] {});
    group.wait();
    CHECK_FALSE(token.is_cancelled());
  }
  CHECK(token.is_cancelled());
  CHECK(token.cause().kind() == CauseKind::cancelled);
}

TEST_CASE("errgroup: wait() waits for all, also for those that go on after the first error") {
  TaskGroup group;
  std::atomic<int> finished{0};
  support::Gate gate;
  for (int i = 0; i < 4; ++i) {
    group.spawn("deaf", [&] {
      gate.wait();
      ++finished;
    });
  }
  group.spawn("broken", [] { throw std::runtime_error("early"); });
  group.token().wait();
  CHECK(finished == 0);
  gate.open();
  CHECK(outcome_of_wait(group) == "early");
  CHECK(finished == 4);
}

TEST_CASE("errgroup: results of parallel queries are all there when wait() returns") {
  TaskGroup group;
  std::vector<std::string> results(8);
  for (std::size_t i = 0; i < results.size(); ++i) {
    group.spawn("query", [&results, i] { results[i] = "result " + std::to_string(i); });
  }
  group.wait();
  for (std::size_t i = 0; i < results.size(); ++i)
    CHECK(results[i] == "result " + std::to_string(i));
}

// A channel of the kind that pipelines are made of: its operations end when the token is cancelled.
class Channel {
 public:
  bool send(int value, const CancellationToken& token) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!wait_until(lock, token, [this] { return values_.size() < 2; })) return false;
    values_.push_back(value);
    changed_.notify_all();
    return true;
  }
  std::optional<int> receive(const CancellationToken& token) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!wait_until(lock, token, [this] { return !values_.empty() || closed_; })) return {};
    if (values_.empty()) return {};
    const int value = values_.front();
    values_.pop_front();
    changed_.notify_all();
    return value;
  }
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

 private:
  template <class Condition>
  bool wait_until(std::unique_lock<std::mutex>& lock, const CancellationToken& token,
                  Condition condition) {
    while (!condition()) {
      if (token.is_cancelled()) return false;
      changed_.wait_for(lock, 1ms);
    }
    return !token.is_cancelled();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<int> values_;
  bool closed_ = false;
};

TEST_CASE("errgroup: a pipeline runs dry, or stops at its first error, and nobody is left behind") {
  for (const int bad_value : {-1, 40}) {
    TaskGroup group;
    Channel numbers;
    Channel squares;
    std::atomic<int> workers{3};
    std::atomic<int> sum{0};
    group.spawn("source", [&](const CancellationToken& token) {
      for (int i = 0; i < 100 && numbers.send(i, token); ++i) {
      }
      numbers.close();
    });
    for (int i = 0; i < 3; ++i) {
      group.spawn("worker", [&](const CancellationToken& token) {
        while (const std::optional<int> number = numbers.receive(token)) {
          if (*number == bad_value) throw std::runtime_error("unlucky number");
          if (!squares.send(*number * *number, token)) break;
        }
        if (--workers == 0) squares.close();
      });
    }
    group.spawn("sink", [&](const CancellationToken& token) {
      while (const std::optional<int> square = squares.receive(token)) sum += *square;
    });
    CHECK(outcome_of_wait(group) == (bad_value < 0 ? "" : "unlucky number"));
    if (bad_value < 0) CHECK(sum == 328350);
  }
}

TEST_CASE(
    "errgroup: a task that ends its thread, as runtime.Goexit does, is waited for and no error") {
  TaskGroup group;
  std::atomic<bool> unwound{false};
  group.spawn("gone", [&] {
    struct Deferred {
      std::atomic<bool>* flag;
      ~Deferred() { *flag = true; }
    };
    const Deferred deferred{&unwound};
    ::pthread_exit(nullptr);
  });
  CHECK(outcome_of_wait(group).empty());
  CHECK(unwound);
}

TEST_CASE("errgroup: the zero group is ready for use, and for nothing at all") {
  { const TaskGroup never_used; }
  TaskGroup group;
  CHECK(outcome_of_wait(group).empty());
}

// ---- TaskTracker ----

TEST_CASE("TaskTracker: it is at zero only when every token is dropped, in whatever order") {
  support::Random random(3);
  for (int round = 0; round < 20; ++round) {
    TaskGroup group;
    std::vector<std::function<void()>> tokens;
    for (int i = 0; i < 10; ++i) tokens.emplace_back(group.wrap("token", [] {}));
    while (!tokens.empty()) {
      REQUIRE_FALSE(group.wait_for(0s));
      const std::size_t at = random.below(tokens.size());
      if (random.one_in(2)) tokens[at]();
      std::swap(tokens[at], tokens.back());
      tokens.pop_back();
    }
    REQUIRE(group.wait_for(0s));
  }
}

TEST_CASE("TaskTracker: waiting for an empty one returns at once, as often as one likes") {
  TaskGroup group;
  for (int i = 0; i < 3; ++i) {
    CHECK(group.wait_for(0s));
    group.wrap("short", [] {})();
  }
  group.wait();
  group.wait();
}

TEST_CASE("TaskTracker: every waiter is woken by the last one to leave") {
  TaskGroup group;
  auto last = std::make_unique<std::function<void()>>(group.wrap("last", [] {}));
  constexpr int count = 6;
  std::atomic<int> woken{0};
  std::atomic<pid_t> waiters[count] = {};
  support::Threads threads;
  for (int i = 0; i < count; ++i) {
    threads.start([&, i] {
      waiters[i] = support::thread_id();
      if (i % 2 == 0) {
        group.wait();
        ++woken;
      } else {
        woken += group.wait_for(support::patience) ? 1 : 100;
      }
    });
  }
  for (const std::atomic<pid_t>& waiter : waiters) support::let_it_block(waiter);
  CHECK(woken == 0);
  last.reset();
  threads.join();
  CHECK(woken == count);
}

TEST_CASE("TaskTracker: closed it tracks nothing new, but waits for what it has") {
  TaskGroup group;
  support::Gate gate;
  group.spawn("inside", [&] { gate.wait(); });
  std::atomic<bool> closed{false};
  std::atomic<pid_t> waiter{0};
  support::Threads threads;
  threads.start([&] {
    waiter = support::thread_id();
    group.wait();
    closed = true;
  });
  support::let_it_block(waiter);
  CHECK_FALSE(closed);
  // Not closed yet: who comes while others are in is let in.
  CHECK(group.spawn("late", [&] { gate.wait(); }));
  gate.open();
  threads.join();
  CHECK_FALSE(group.spawn("too late", [] {}));
  CHECK_FALSE(group.wrap("too late", [] {}));
}

TEST_CASE(
    "TaskTracker: a tracked callable that is dropped by a pool that shuts down counts no more") {
  TaskGroup group;
  std::atomic<int> ran{0};
  {
    // A pool whose queue is longer than its life.
    std::deque<std::function<void()>> queue;
    for (int i = 0; i < 10; ++i) queue.emplace_back(group.wrap("job", [&] { ++ran; }));
    for (int i = 0; i < 4; ++i) {
      queue.front()();
      queue.pop_front();
    }
    CHECK_FALSE(group.wait_for(0s));
  }
  group.wait();
  CHECK(ran == 4);
}

// ---- JoinSet ----

TEST_CASE("JoinSet: dropping it stops every task that listens") {
  std::atomic<int> stopped{0};
  {
    TaskGroup group;
    for (int i = 0; i < 5; ++i) {
      group.spawn("listener", [&](const CancellationToken& token) {
        token.wait();
        ++stopped;
      });
    }
  }
  CHECK(stopped == 5);
}

TEST_CASE("JoinSet: dropped by an exception on its way, it joins all the same") {
  std::atomic<int> stopped{0};
  try {
    TaskGroup group;
    for (int i = 0; i < 3; ++i) {
      group.spawn("listener", [&](const CancellationToken& token) {
        token.wait();
        ++stopped;
        throw std::runtime_error("this must not meet the other one");
      });
    }
    throw std::logic_error("on its way");
  } catch (const std::logic_error&) {
  }
  CHECK(stopped == 3);
}

TEST_CASE("JoinSet: an abort of all is no failure of those who obey") {
  TaskGroup group;
  for (int i = 0; i < 5; ++i) {
    group.spawn("listener", [](const CancellationToken& token) {
      while (true) {
        token.throw_if_cancelled();
        token.wait_for(1h);
      }
    });
  }
  group.cancel(Cause::cancelled("abort_all"));
  CHECK(outcome_of_wait(group).empty());
  CHECK(group.failures().empty());
}

TEST_CASE("JoinSet: some panic, some don't, and each is accounted for") {
  TaskGroup group({}, OnFailure::keep_going);
  std::atomic<int> fine{0};
  for (int i = 0; i < 20; ++i) {
    group.spawn("task " + std::to_string(i), [&fine, i] {
      if (i % 3 == 0) throw std::runtime_error(std::to_string(i));
      ++fine;
    });
  }
  CHECK_THROWS_AS(group.wait(), std::runtime_error);
  CHECK(fine == 13);
  const auto failures = group.failures();
  REQUIRE(failures.size() == 7);
  for (const auto& failure : failures) {
    std::string what;
    try {
      std::rethrow_exception(failure.error);
    } catch (const std::runtime_error& error) {
      what = error.what();
    }
    CHECK(failure.task == "task " + what);
  }
}

TEST_CASE("JoinSet: thousands of tasks, one after the other and at once") {
  TaskGroup group;
  constexpr int waves = support::under_sanitizer ? 10 : 50;
  constexpr int width = 32;
  std::atomic<int> ran{0};
  for (int wave = 0; wave < waves; ++wave) {
    for (int i = 0; i < width; ++i) REQUIRE(group.spawn("task", [&] { ++ran; }));
    REQUIRE(group.wait_for(support::patience));
  }
  group.wait();
  CHECK(ran == waves * width);
}

// ---- nurseries ----

TEST_CASE("nursery: a failure deep inside stops every task of every group on its way out") {
  std::atomic<int> stopped{0};
  const auto patient = [&](const CancellationToken& token) {
    token.wait();
    ++stopped;
  };
  TaskGroup outer;
  outer.spawn("outer patient", patient);
  outer.spawn("outer owner", [&](const CancellationToken& token) {
    TaskGroup inner(token);
    inner.spawn("inner patient", patient);
    inner.spawn("inner broken", [] { throw std::runtime_error("deep inside"); });
    inner.wait();
  });
  CHECK(outcome_of_wait(outer) == "deep inside");
  CHECK(stopped == 2);
  REQUIRE(outer.failures().size() == 1);
  CHECK(outer.failures()[0].task == "outer owner");
}

TEST_CASE("nursery: a failure in one group is no concern of its siblings") {
  CancellationSource parent;
  TaskGroup broken(parent.token());
  TaskGroup whole(parent.token());
  support::Gate gate;
  std::atomic<bool> cancelled{true};
  whole.spawn("fine", [&](const CancellationToken& token) {
    gate.wait();
    cancelled = token.is_cancelled();
  });
  broken.spawn("broken", [] { throw std::runtime_error("oh"); });
  CHECK(outcome_of_wait(broken) == "oh");
  gate.open();
  CHECK(outcome_of_wait(whole).empty());
  CHECK_FALSE(cancelled);
}

TEST_CASE("nursery: what a task wrote is seen by who waited, without any other synchronisation") {
  // TSan has the last word here.
  for (int round = 0; round < 50; ++round) {
    TaskGroup group;
    int plain = 0;
    std::vector<int> cells(4);
    for (std::size_t i = 0; i < cells.size(); ++i) {
      group.spawn("writer", [&cells, i] { cells[i] = static_cast<int>(i) + 1; });
    }
    group.wrap("here", [&] { plain = 5; })();
    if (round % 2 == 0) {
      group.wait();
    } else {
      REQUIRE(group.wait_for(support::patience));
    }
    REQUIRE(plain == 5);
    REQUIRE(cells == std::vector<int>{1, 2, 3, 4});
  }
}

}  // namespace
