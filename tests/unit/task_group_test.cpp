// task_group.hpp: spawning, wrapping, failing, waiting.
#include <lastcall/task_group.hpp>

#include "support/catch.hpp"
#include "support/foreign.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/prctl.h>
#endif

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::Clock;
using lastcall::Failure;
using lastcall::OnFailure;
using lastcall::OperationCancelled;
using lastcall::TaskGroup;
using namespace std::chrono_literals;

namespace {

// How often operator new will succeed in this thread before it fails for good; negative: always.
thread_local int allocations_left = -1;

[[maybe_unused]] bool may_allocate() {
  if (allocations_left < 0) return true;
  if (allocations_left == 0) return false;
  --allocations_left;
  return true;
}

}  // namespace

#if defined(LASTCALL_TSAN) && defined(__clang__)
#define REFUSES_MEMORY 0  // its runtime's own operators can't be replaced
#else
#define REFUSES_MEMORY 1
[[gnu::noinline]] void* operator new(std::size_t size) {
  void* const memory = may_allocate() ? std::malloc(size == 0 ? 1 : size) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return may_allocate() ? std::malloc(size == 0 ? 1 : size) : nullptr;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace {

// What the contract says in types.
static_assert(std::is_same_v<decltype(Failure::task), std::string>);
static_assert(std::is_same_v<decltype(Failure::error), std::exception_ptr>);
static_assert(std::is_default_constructible_v<TaskGroup>);
static_assert(std::is_constructible_v<TaskGroup, CancellationToken, OnFailure>);
static_assert(!std::is_convertible_v<CancellationToken, TaskGroup>);
static_assert(!std::is_copy_constructible_v<TaskGroup> && !std::is_move_constructible_v<TaskGroup>);
static_assert(std::is_nothrow_destructible_v<TaskGroup>);
static_assert(noexcept(std::declval<const TaskGroup&>().token()));
static_assert(noexcept(std::declval<TaskGroup&>().cancel(Cause())));
static_assert(std::is_same_v<decltype(std::declval<TaskGroup&>().cancel()), bool>);
static_assert(
    std::is_same_v<decltype(std::declval<const TaskGroup&>().failures()), std::vector<Failure>>);
static_assert(std::is_same_v<decltype(std::declval<TaskGroup&>().spawn("", [] {})), bool>);

// The what() of the E that body throws.
template <class E, class Body>
std::string what_of(Body body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  } catch (...) {
    return "something else was thrown";
  }
  return "nothing was thrown";
}

std::string what_of(const std::exception_ptr& error) {
  return what_of<std::exception>([&] { std::rethrow_exception(error); });
}

// Counts how many of it are alive, and tells when the last is gone.
struct Cargo {
  explicit Cargo(std::atomic<int>& alive) : count(&alive) { ++*count; }
  Cargo(const Cargo& other) : count(other.count) { ++*count; }
  Cargo& operator=(const Cargo&) = delete;
  ~Cargo() { --*count; }
  std::atomic<int>* count;
};

// Something to capture that can be moved only, and whose end takes as long as a gate stays shut.
struct SlowEnd {
  explicit SlowEnd(support::Gate& gate) : open(&gate) {}
  SlowEnd(SlowEnd&& other) noexcept : open(std::exchange(other.open, nullptr)) {}
  ~SlowEnd() {
    if (open != nullptr) open->wait();
  }
  support::Gate* open;
};

// ---- spawn ----

TEST_CASE(
    "TaskGroup: a task is called as f(CancellationToken) or f(), each on a thread of its own") {
  TaskGroup group;
  std::atomic<int> ran{0};
  std::atomic<bool> token_was_right{false};
  const pthread_t here = ::pthread_self();
  std::atomic<bool> was_here{false};
  REQUIRE(group.spawn("with", [&](CancellationToken token) {
    token_was_right = token == group.token();
    was_here = was_here || ::pthread_equal(here, ::pthread_self()) != 0;
    ++ran;
  }));
  REQUIRE(group.spawn("without", [&] {
    was_here = was_here || ::pthread_equal(here, ::pthread_self()) != 0;
    ++ran;
  }));
  REQUIRE(group.spawn("function", std::function<void(const CancellationToken&)>(
                                      [&](const CancellationToken&) { ++ran; })));
  REQUIRE(group.spawn("moved", [&, only = std::make_unique<int>(1)] { ran += *only; }));
  REQUIRE(group.spawn("changes itself", [&, n = 0]() mutable { ran += ++n; }));
  group.wait();
  CHECK(ran == 5);
  CHECK(token_was_right);
  CHECK_FALSE(was_here);
  CHECK(group.failures().empty());
}

TEST_CASE("TaskGroup: a task that can be called either way is given the token") {
  struct Either {
    std::atomic<int>* with;
    void operator()(const CancellationToken&) const { *with = 1; }
    void operator()() const { *with = 2; }
  };
  TaskGroup group;
  std::atomic<int> with{0};
  group.spawn("either", Either{&with});
  group.wait();
  CHECK(with == 1);
}

#if defined(__linux__)
TEST_CASE("TaskGroup: a callable that hands on whatever it is given is a task") {
  const auto with_token = [](const CancellationToken& token) { return token.is_cancelled(); };
  // Called without a token it wouldn't compile.
  const auto forwards = [with_token](auto&&... given) {
    return with_token(std::forward<decltype(given)>(given)...);
  };
  TaskGroup group;
  CHECK(group.spawn("spawned", forwards));
  auto wrapped = group.wrap("wrapped", forwards);
  wrapped();
  group.wait();
  CHECK(group.failures().empty());
}

TEST_CASE("TaskGroup: the thread is named by the first 15 bytes of the task's name") {
  TaskGroup group;
  char names[2][16] = {};
  group.spawn("a-name-of-more-than-15-bytes",
              [&] { ::prctl(PR_GET_NAME, static_cast<char*>(names[0])); });
  group.spawn("", [&] { ::prctl(PR_GET_NAME, static_cast<char*>(names[1])); });
  group.wait();
  CHECK(std::string(names[0]) == "a-name-of-more-");
  CHECK(std::string(names[1]).empty());
}
#endif

TEST_CASE("TaskGroup: a task's thread keeps the signal mask of its spawner") {
  sigset_t some;
  ::sigemptyset(&some);
  ::sigaddset(&some, SIGUSR1);
  sigset_t before;
  ::pthread_sigmask(SIG_BLOCK, &some, &before);
  std::atomic<int> blocked{0};
  {
    TaskGroup group;
    group.spawn("masked", [&] {
      sigset_t mask;
      ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
      for (const int number : {SIGUSR1, SIGUSR2, SIGTERM}) {
        blocked = blocked * 10 + ::sigismember(&mask, number);
      }
    });
    group.wait();
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  CHECK(blocked == 100);
}

TEST_CASE("TaskGroup: once closed spawn says false, and the task never runs and is destroyed") {
  TaskGroup group;
  group.wait();  // nobody is in: closes at once
  std::atomic<int> alive{0};
  std::atomic<bool> ran{false};
  CHECK_FALSE(group.spawn("late", [&ran, cargo = Cargo(alive)] { ran = true; }));
  CHECK_FALSE(ran);
  CHECK(alive == 0);
}

TEST_CASE("TaskGroup: a task may be spawned after cancel(), and is born cancelled") {
  TaskGroup group;
  CHECK(group.cancel());
  std::atomic<bool> born_cancelled{false};
  CHECK(
      group.spawn("late", [&](CancellationToken token) { born_cancelled = token.is_cancelled(); }));
  group.wait();
  CHECK(born_cancelled);
}

TEST_CASE("TaskGroup: a task may spawn into its own group while wait() is waiting") {
  TaskGroup group;
  std::atomic<int> ran{0};
  std::atomic<bool> refused{false};
  support::Gate waiting;
  std::function<void(int)> link = [&](int left) {
    ++ran;
    if (left == 0) return;
    if (!group.spawn("link", [&, left] { link(left - 1); })) refused = true;
  };
  group.spawn("first", [&] {
    waiting.wait();
    link(100);
  });
  std::atomic<pid_t> waiter{0};
  support::Threads threads;
  threads.start([&] {
    support::let_it_block(waiter);
    waiting.open();
  });
  waiter = support::thread_id();
  group.wait();
  CHECK(ran == 101);
  CHECK_FALSE(refused);
  CHECK_FALSE(group.spawn("late", [] {}));
}

TEST_CASE("TaskGroup: a spawn that races with wait() is waited for or refused") {
  for (int round = 0; round < (support::under_sanitizer ? 100 : 500); ++round) {
    auto group = std::make_unique<TaskGroup>();
    std::atomic<int> spawned{0};
    std::atomic<int> ran{0};
    std::atomic<bool> inner_refused{false};
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      for (int i = 0; i < 3; ++i) {
        // Who was let in can let others in.
        const bool in = group->spawn("outer", [&] {
          if (!group->spawn("inner", [&] { ++ran; })) inner_refused = true;
          ++ran;
        });
        spawned += in ? 2 : 0;
      }
    });
    line.ready_steady_go();
    group->wait();
    const int seen = ran;
    threads.join();
    REQUIRE(seen == spawned);
    REQUIRE_FALSE(inner_refused);
    REQUIRE_FALSE(group->spawn("late", [] {}));
  }
}

TEST_CASE("TaskGroup: what a task captured is destroyed before it leaves") {
  TaskGroup group;
  support::Gate gate;
  std::atomic<bool> ran{false};
  group.spawn("heavy", [&ran, slow = SlowEnd(gate)] { ran = true; });
  REQUIRE(support::eventually([&] { return ran.load(); }));
  CHECK_FALSE(group.wait_for(20ms));
  gate.open();
  CHECK(group.wait_for(support::patience));
}

// Makes every pthread_create fail in this (child) process with EAGAIN from now on.
bool no_more_threads() {
  const rlimit none{1, 1};
  if (::setrlimit(RLIMIT_NPROC, &none) != 0) return false;
  // The limit doesn't bind root.
  return ::getuid() != 0 || ::setuid(65534) == 0;
}

TEST_CASE("TaskGroup: no thread to be had is a system error, EAGAIN, and nobody entered") {
  // TSan starts a thread of its own after a fork.
  if (support::under_tsan) return;
  CHECK(support::in_child_process([] {
          if (!no_more_threads()) return 2;
          std::atomic<int> alive{0};
          TaskGroup group;
          try {
            group.spawn("poor task", [cargo = Cargo(alive)] {});
            return 3;
          } catch (const std::system_error& error) {
            if (error.code() != std::errc::resource_unavailable_try_again) return 4;
            if (std::string(error.what()).find("'poor task'") == std::string::npos) return 5;
          }
          if (alive != 0) return 6;
          if (!group.wait_for(0s)) return 7;
          if (!group.failures().empty() || group.token().is_cancelled()) return 8;
          // Whatever was there before is as it was: it takes wrapped tasks still.
          bool ran = false;
          group.wrap("rich task", [&] { ran = true; })();
          group.wait();
          return ran ? 0 : 9;
        }) == 0);
}

#if REFUSES_MEMORY
TEST_CASE("TaskGroup: no memory to be had is bad_alloc, and nobody entered") {
  // The first allocation fails, then the second, and so on, until there are enough.
  TaskGroup group;
  for (const bool spawned : {true, false}) {
    int ran = 0;
    int refusals = 0;
    for (; ran == 0 && refusals < 100; ++refusals) {
      std::atomic<int> alive{0};
      const std::string name = "a name that is too long for a string without memory";
      std::string mine = name;
      bool threw = false;
      allocations_left = refusals;
      try {
        if (spawned) {
          group.spawn(std::move(mine), [&ran, cargo = Cargo(alive)] { ++ran; });
        } else {
          group.wrap(std::move(mine), [&ran, cargo = Cargo(alive)] { ++ran; })();
        }
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      allocations_left = -1;
      REQUIRE(group.wait_for(threw ? 0s : support::patience));
      REQUIRE(ran == (threw ? 0 : 1));
      REQUIRE(alive == 0);
    }
    CHECK(refusals > 2);
    CHECK(ran == 1);
  }
  CHECK(group.failures().empty());
}
#endif

#if defined(__linux__)
TEST_CASE("TaskGroup: a group that lives for ever doesn't gather finished threads") {
  // A finished thread that nobody has joined keeps its stack, 8 MiB of addresses.
  const auto addresses = [] {
    std::size_t pages = 0;
    if (std::FILE* file = std::fopen("/proc/self/statm", "re")) {
      if (std::fscanf(file, "%zu", &pages) != 1) pages = 0;
      std::fclose(file);
    }
    return pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  };
  TaskGroup group;
  const auto run = [&](int count) {
    for (int i = 0; i < count; ++i) {
      std::atomic<bool> ran{false};
      group.spawn("short", [&] { ran = true; });
      if (!support::eventually([&] { return ran.load(); })) return false;
    }
    return true;
  };
  REQUIRE(run(50));
  const std::size_t before = addresses();
  REQUIRE(run(300));
  CHECK(addresses() < before + 100 * (std::size_t{8} << 20U));
}
#endif

// ---- failing ----

TEST_CASE(
    "TaskGroup: a task that throws cancels the group with Cause::failure, and wait() rethrows") {
  TaskGroup group;
  group.spawn("patient", [](const CancellationToken& token) { token.wait(); });
  group.spawn("broken", [] { throw std::runtime_error("no such table"); });
  CHECK(what_of<std::runtime_error>([&] { group.wait(); }) == "no such table");
  CHECK(group.token().is_cancelled());
  const Cause cause = group.token().cause();
  CHECK(cause.kind() == CauseKind::failure);
  CHECK(cause.message() == "task 'broken': no such table");
  CHECK(what_of(cause.exception()) == "no such table");
  const std::vector<Failure> failures = group.failures();
  REQUIRE(failures.size() == 1);
  CHECK(failures[0].task == "broken");
  CHECK(what_of(failures[0].error) == "no such table");
}

TEST_CASE("TaskGroup: wait() rethrows the first failure, each time it is called") {
  TaskGroup group({}, OnFailure::keep_going);
  group.spawn("first", [] { throw std::runtime_error("one"); });
  REQUIRE(support::eventually([&] { return group.failures().size() == 1; }));
  group.spawn("second", [] { throw std::logic_error("two"); });
  REQUIRE(support::eventually([&] { return group.failures().size() == 2; }));
  for (int time = 0; time < 3; ++time) {
    CHECK(what_of<std::runtime_error>([&] { group.wait(); }) == "one");
  }
  std::atomic<int> rethrown{0};
  support::Threads threads;
  for (int i = 0; i < 3; ++i) {
    threads.start([&] {
      try {
        group.wait();
      } catch (const std::runtime_error&) {
        ++rethrown;
      }
    });
  }
  threads.join();
  CHECK(rethrown == 3);
}

TEST_CASE("TaskGroup: with keep_going a failure is kept and nobody is cancelled") {
  TaskGroup group({}, OnFailure::keep_going);
  group.spawn("broken", [] { throw std::runtime_error("oh"); });
  CHECK_THROWS_AS(group.wait(), std::runtime_error);
  CHECK_FALSE(group.token().is_cancelled());
  CHECK(group.failures().size() == 1);
}

TEST_CASE("TaskGroup: failures are listed in the order they happened") {
  TaskGroup group({}, OnFailure::keep_going);
  for (int i = 0; i < 20; ++i) {
    const auto name = "task " + std::to_string(i);
    if (i % 2 == 0) {
      group.spawn(name, [i] { throw i; });
    } else {
      group.wrap(name, [i] { throw i; })();
    }
    REQUIRE(support::eventually([&] { return group.failures().size() == std::size_t(i) + 1; }));
  }
  const std::vector<Failure> failures = group.failures();
  for (std::size_t i = 0; i < failures.size(); ++i) {
    CHECK(failures[i].task == "task " + std::to_string(i));
    int thrown = -1;
    try {
      std::rethrow_exception(failures[i].error);
    } catch (int value) {
      thrown = value;
    }
    CHECK(thrown == static_cast<int>(i));
  }
}

TEST_CASE("TaskGroup: an exception that is no std::exception is a failure like any other") {
  TaskGroup group;
  group.spawn("odd", [] { throw 42; });
  CHECK_THROWS_AS(group.wait(), int);
  CHECK(group.token().cause().kind() == CauseKind::failure);
}

TEST_CASE("TaskGroup: an exception of another language is a failure like any other") {
  const std::string words = "an exception of another language";
  TaskGroup group;
  std::atomic<int> alive{0};
  group.spawn("spawned", [cargo = Cargo(alive)] { support::throw_foreign(); });
  CHECK(what_of<std::exception>([&] { group.wait(); }) == words);
  CHECK(group.token().cause().message() == "task 'spawned': " + words);
  TaskGroup other;
  auto wrapped = other.wrap("wrapped", [cargo = Cargo(alive)] { support::throw_foreign(); });
  CHECK_NOTHROW(wrapped());
  wrapped = {};
  const std::vector<Failure> failures = other.failures();
  REQUIRE(failures.size() == 1);
  CHECK(what_of(failures[0].error) == words);
  CHECK(other.token().cause().message() == "task 'wrapped': " + words);
  CHECK(alive == 0);
}

TEST_CASE("TaskGroup: when many fail at once the cause is the first failure") {
  for (int round = 0; round < (support::under_sanitizer ? 20 : 100); ++round) {
    TaskGroup group;
    support::StartingLine line(3);
    for (int i = 0; i < 3; ++i) {
      group.spawn(std::to_string(i), [&line] {
        line.ready_steady_go();
        throw std::runtime_error("at once");
      });
    }
    CHECK_THROWS_AS(group.wait(), std::runtime_error);
    const std::vector<Failure> failures = group.failures();
    REQUIRE(failures.size() == 3);
    REQUIRE(group.token().cause().message() == "task '" + failures[0].task + "': at once");
    REQUIRE(group.token().cause().exception() == failures[0].error);
  }
}

TEST_CASE("TaskGroup: OperationCancelled after the group was cancelled is no failure") {
  TaskGroup group;
  for (int i = 0; i < 3; ++i) {
    group.spawn("obedient", [](const CancellationToken& token) {
      token.wait();
      token.throw_if_cancelled();
    });
  }
  group.wrap("wrapped", [&] {
    group.cancel();
    group.token().throw_if_cancelled();
  })();
  CHECK_NOTHROW(group.wait());
  CHECK(group.failures().empty());
}

TEST_CASE("TaskGroup: OperationCancelled before the group was cancelled is a failure") {
  TaskGroup group;
  CancellationSource other;
  other.cancel(Cause::cancelled("another matter"));
  group.spawn("strange", [&] { other.token().throw_if_cancelled(); });
  CHECK_THROWS_AS(group.wait(), OperationCancelled);
  CHECK(group.failures().size() == 1);
  CHECK(group.token().cause().message() == "task 'strange': another matter");
}

TEST_CASE("TaskGroup: a failure is kept and cancels the group also when memory is gone") {
  TaskGroup group;
  group.spawn("patient", [](const CancellationToken& token) { token.wait(); });
  group.spawn("hungry", [] {
    allocations_left = 0;
    throw 7;
  });
  CHECK_THROWS_AS(group.wait(), int);
  CHECK(group.token().is_cancelled());
  CHECK(group.token().cause().kind() == lastcall::CauseKind::failure);
  CHECK_FALSE(group.token().cause().message().empty());
  CHECK(group.failures().size() == 1);
}

struct ThrowsAtItsEnd {
  explicit ThrowsAtItsEnd(bool is_armed) : armed(is_armed) {}
  ThrowsAtItsEnd(ThrowsAtItsEnd&& other) noexcept : armed(std::exchange(other.armed, false)) {}
  ~ThrowsAtItsEnd() noexcept(false) {
    if (armed) throw std::runtime_error("at the end");
  }
  bool armed;
};

TEST_CASE(
    "TaskGroup: what a captured object's destructor throws is a failure, and the task leaves") {
  TaskGroup group({}, OnFailure::keep_going);
  group.spawn("one", [bad = ThrowsAtItsEnd(true)] {});
  REQUIRE(support::eventually([&] { return group.failures().size() == 1; }));
  group.spawn("two", [bad = ThrowsAtItsEnd(true)] { throw std::logic_error("first"); });
  CHECK(what_of<std::runtime_error>([&] { group.wait(); }) == "at the end");
  const std::vector<Failure> failures = group.failures();
  REQUIRE(failures.size() == 3);
  CHECK(failures[1].task == "two");
  CHECK(what_of(failures[1].error) == "first");
  CHECK(failures[2].task == "two");
  CHECK(what_of(failures[2].error) == "at the end");
}

// ---- threads that end in other ways ----

TEST_CASE(
    "TaskGroup: a task that ends its thread by pthread_exit leaves, and what it captured goes") {
  TaskGroup group;
  std::atomic<int> alive{0};
  std::atomic<bool> went_on{false};
  group.spawn("quits", [&went_on, cargo = Cargo(alive)] {
    const Cargo local(cargo);
    ::pthread_exit(nullptr);
    went_on = true;
  });
  CHECK_NOTHROW(group.wait());
  CHECK(alive == 0);
  CHECK_FALSE(went_on);
  CHECK(group.failures().empty());
}

TEST_CASE("TaskGroup: a static group waits for a task that ends its thread by pthread_exit") {
  const support::Ended ended = support::in_a_process([] {
    static TaskGroup group;  // before whatever the first spawn() makes
    group.spawn("quits", [](const CancellationToken& token) {
      token.wait();
      ::pthread_exit(nullptr);
    });
    std::exit(0);
  });
  CHECK(ended.how == "exit 0");
}

TEST_CASE("TaskGroup: a task whose thread is ended by pthread_cancel leaves") {
  TaskGroup group;
  std::atomic<int> alive{0};
  std::atomic<bool> there{false};
  pthread_t thread{};
  group.spawn("slept", [&, cargo = Cargo(alive)] {
    thread = ::pthread_self();
    there = true;
    for (;;) {
      ::pthread_testcancel();  // a function that TSan stands in for would leave it confused
      std::this_thread::yield();
    }
  });
  REQUIRE(support::eventually([&] { return there.load(); }));
  ::pthread_cancel(thread);
  group.wait();
  CHECK(alive == 0);
  CHECK(group.failures().empty());
}

// ---- wait, wait_for, the destructor ----

TEST_CASE("TaskGroup: wait() of an empty group returns at once") {
  TaskGroup group;
  group.wait();
  group.wait();
  CHECK(group.wait_for(0s));
  CHECK_FALSE(group.token().is_cancelled());
}

TEST_CASE("TaskGroup: wait_for neither closes nor rethrows") {
  TaskGroup group;
  support::Gate gate;
  group.spawn("held", [&] {
    gate.wait();
    throw std::runtime_error("later");
  });
  CHECK_FALSE(group.wait_for(0s));
  CHECK_FALSE(group.wait_for(-1h));
  CHECK_FALSE(group.wait_for(5ms));
  CHECK(group.spawn("still open", [] {}));
  gate.open();
  CHECK_NOTHROW(group.wait_for(std::chrono::hours::max()));
  CHECK(group.failures().size() == 1);
  CHECK(group.spawn("and still", [] {}));
  CHECK_THROWS_AS(group.wait(), std::runtime_error);
}

TEST_CASE("TaskGroup: after wait() the threads are gone, thread_local objects and all") {
  struct Local {
    ~Local() {
      if (late != nullptr) {
        std::this_thread::sleep_for(10ms);
        ++*late;
      }
    }
    std::atomic<int>* late = nullptr;
  };
  std::atomic<int> late{0};
  const int before = support::live_threads();
  TaskGroup group;
  for (int i = 0; i < 4; ++i)
    group.spawn("local", [&] {
      static thread_local Local local;
      local.late = &late;
    });
  group.wait();
  CHECK(late == 4);
  CHECK(support::eventually([&] { return support::live_threads() == before; }));
}

TEST_CASE("TaskGroup: its destructor cancels, waits and joins, and throws nothing") {
  std::atomic<int> left{0};
  const int before = support::live_threads();
  {
    TaskGroup group;
    for (int i = 0; i < 3; ++i) {
      group.spawn("patient", [&](const CancellationToken& token) {
        token.wait();
        ++left;
        throw std::runtime_error("nobody will hear of it");
      });
    }
  }
  CHECK(left == 3);
  CHECK(support::eventually([&] { return support::live_threads() == before; }));
}

TEST_CASE("TaskGroup: a parent's cancel reaches the tasks, with its cause") {
  CancellationSource parent;
  TaskGroup group(parent.token());
  std::atomic<bool> cancelled{false};
  group.spawn("patient", [&](const CancellationToken& token) {
    token.wait();
    cancelled = token.cause().message() == "going home";
  });
  parent.cancel(Cause::cancelled("going home"));
  group.wait();
  CHECK(cancelled);
}

TEST_CASE("TaskGroup: a failure doesn't cancel the parent") {
  CancellationSource parent;
  TaskGroup group(parent.token());
  group.spawn("broken", [] { throw 1; });
  CHECK_THROWS_AS(group.wait(), int);
  CHECK_FALSE(parent.is_cancelled());
}

TEST_CASE("TaskGroup: cancel() is true for the one call that did it") {
  TaskGroup group;
  CHECK(group.cancel(Cause::cancelled("enough")));
  CHECK_FALSE(group.cancel());
  CHECK(group.token().cause().message() == "enough");
}

TEST_CASE("TaskGroup: wait() from one of its own tasks is a logic error that names the task") {
  TaskGroup group({}, OnFailure::keep_going);
  TaskGroup other;
  group.spawn("navel", [&] {
    other.wait();  // somebody else's is fine
    group.wait();
  });
  group.wrap("wrapped navel", [&] { group.wait(); })();
  CHECK_THROWS_AS(group.wait(), std::logic_error);
  const std::vector<Failure> failures = group.failures();
  REQUIRE(failures.size() == 2);
  for (const Failure& failure : failures) {
    CHECK(what_of(failure.error).find("'" + failure.task + "'") != std::string::npos);
  }
}

TEST_CASE("TaskGroup: a task inside a task is known for what it is") {
  TaskGroup outer;
  TaskGroup inner;
  std::string said;
  outer.wrap("outer", [&] {
    inner.wrap("inner", [&] { said = what_of<std::logic_error>([&] { outer.wait(); }); })();
    inner.wait();  // that one is over
  })();
  outer.wait();
  CHECK(said.find("'outer'") != std::string::npos);
}

TEST_CASE("TaskGroup: destroyed by its own task it terminates and says so, instead of hanging") {
  lastcall::detail::Pipe words = lastcall::detail::make_pipe("testing");
  CHECK(support::in_child_process([&] {
          ::dup2(words.write_end.get(), STDERR_FILENO);
          std::set_terminate([] { ::_exit(42); });
          auto* const group = new TaskGroup;
          group->wrap("suicide", [&] { delete group; })();
          return 1;
        }) == 42);
  words.write_end.reset();
  char line[256] = {};
  REQUIRE(::read(words.read_end.get(), line, sizeof line - 1) > 0);
  std::string said(line);
  while (::read(words.read_end.get(), line, sizeof line - 1) > 0) said += line;
  CHECK(said.find("'suicide'") != std::string::npos);
}

// ---- wrap ----

TEST_CASE("wrap: a callable that runs the task where it is called, once") {
  TaskGroup group;
  int ran = 0;
  bool token_was_right = false;
  auto call = group.wrap("work", [&](const CancellationToken& token) {
    token_was_right = token == group.token();
    ++ran;
  });
  REQUIRE(call);
  CHECK_FALSE(group.wait_for(0s));
  call();
  CHECK(ran == 1);
  CHECK(token_was_right);
  CHECK(group.wait_for(0s));  // a member until it has run, not until it is gone
  call();
  CHECK(ran == 1);
  CHECK(group.wait_for(0s));
}

TEST_CASE("wrap: copies share one membership, and only the first call runs the task") {
  TaskGroup group;
  std::atomic<int> ran{0};
  auto call = group.wrap("work", [&] { ++ran; });
  {
    std::vector<std::function<void()>> queue(10, call);
    support::Threads threads;
    for (std::function<void()>& entry : queue) threads.start(entry);
    threads.join();
  }
  CHECK(ran == 1);
  CHECK(group.wait_for(0s));
}

TEST_CASE("wrap: a member until its last copy is destroyed, if it is never called") {
  TaskGroup group;
  std::atomic<int> alive{0};
  auto call =
      std::make_unique<std::function<void()>>(group.wrap("work", [cargo = Cargo(alive)] {}));
  auto copy = std::make_unique<std::function<void()>>(*call);
  call.reset();
  CHECK_FALSE(group.wait_for(0s));
  CHECK(alive == 1);
  copy.reset();
  CHECK(group.wait_for(0s));
  CHECK(alive == 0);
  CHECK_NOTHROW(group.wait());
}

TEST_CASE("wrap: what the task captured is destroyed before it leaves, called or not") {
  for (const bool called : {true, false}) {
    TaskGroup group;
    support::Gate gate;
    std::atomic<bool> ending{false};
    support::Threads threads;
    auto call = group.wrap("heavy", [slow = SlowEnd(gate)] {});
    threads.start([&, mine = std::move(call)]() mutable {
      if (called) mine();
      ending = true;
      const auto gone = std::move(mine);
    });
    if (!called) REQUIRE(support::eventually([&] { return ending.load(); }));
    CHECK_FALSE(group.wait_for(20ms));
    gate.open();
    CHECK(group.wait_for(support::patience));
  }
}

TEST_CASE("wrap: copyable if the task is, and always movable") {
  TaskGroup group;
  auto copyable = group.wrap("copyable", [] {});
  auto movable =
      group.wrap("movable", [only = std::make_unique<int>(3)] { static_cast<void>(only); });
  static_assert(std::is_copy_constructible_v<decltype(copyable)>);
  static_assert(std::is_copy_assignable_v<decltype(copyable)>);
  static_assert(std::is_nothrow_move_constructible_v<decltype(copyable)>);
  static_assert(!std::is_copy_constructible_v<decltype(movable)>);
  static_assert(!std::is_copy_assignable_v<decltype(movable)>);
  static_assert(std::is_nothrow_move_constructible_v<decltype(movable)>);
  static_assert(std::is_nothrow_move_assignable_v<decltype(movable)>);
  static_assert(!std::is_convertible_v<decltype(copyable), bool>);
  auto moved = std::move(movable);
  CHECK_FALSE(movable);  // NOLINT: that it is empty now is what is tested
  movable();             // does nothing
  CHECK(moved);
  moved();
  copyable();
  CHECK(group.wait_for(0s));
}

TEST_CASE("wrap: refused once closed: false in a condition, and calling it does nothing") {
  TaskGroup group;
  group.wait();
  std::atomic<int> alive{0};
  bool ran = false;
  const auto call = group.wrap("late", [&ran, cargo = Cargo(alive)] { ran = true; });
  CHECK_FALSE(call);
  CHECK(alive == 0);
  call();
  const auto copy = call;
  CHECK_FALSE(copy);
  copy();
  CHECK_FALSE(ran);
}

TEST_CASE(
    "wrap: what the task throws is a failure of the group, and doesn't come out of the call") {
  TaskGroup group;
  const auto call = group.wrap("broken", [] { throw std::runtime_error("inside"); });
  CHECK_NOTHROW(call());
  CHECK(group.token().cause().message() == "task 'broken': inside");
  CHECK(what_of<std::runtime_error>([&] { group.wait(); }) == "inside");
}

TEST_CASE("wrap: the last copy may be destroyed by the task itself") {
  TaskGroup group;
  std::atomic<int> alive{0};
  bool ran = false;
  auto* call = new std::function<void()>;
  *call = group.wrap("self", [&, cargo = Cargo(alive)] {
    delete std::exchange(call, nullptr);
    ran = cargo.count->load() == 1;  // the task is still whole
  });
  (*call)();
  CHECK(ran);
  CHECK(alive == 0);
  CHECK(group.wait_for(0s));
}

TEST_CASE("wrap: it runs once, and its group empties once, also when calls and drops race") {
  for (int round = 0; round < (support::under_sanitizer ? 100 : 500); ++round) {
    TaskGroup group;
    std::atomic<int> alive{0};
    std::atomic<int> ran{0};
    support::StartingLine line(3);
    {
      support::Threads threads;
      auto call = group.wrap("work", [&ran, cargo = Cargo(alive)] { ++ran; });
      for (int i = 0; i < 3; ++i) {
        threads.start([&line, i, mine = call]() mutable {
          line.ready_steady_go();
          if (i != 2) mine();
          const auto gone = std::move(mine);
        });
      }
    }
    group.wait();
    REQUIRE(ran == 1);
    REQUIRE(alive == 0);
  }
}

TEST_CASE(
    "wrap: a task that ends its thread by pthread_exit leaves, and the thread has its value") {
  TaskGroup group;
  std::atomic<int> alive{0};
  pthread_t thread{};
  auto call = group.wrap("quits", [&, cargo = Cargo(alive)] { ::pthread_exit(&alive); });
  using Call = decltype(call);
  REQUIRE(::pthread_create(
              &thread, nullptr,
              [](void* argument) -> void* {
                (*static_cast<Call*>(argument))();
                return nullptr;
              },
              &call) == 0);
  void* value = nullptr;
  ::pthread_join(thread, &value);
  CHECK(value == &alive);
  CHECK(group.wait_for(support::patience));
  CHECK(alive == 0);
  CHECK(group.failures().empty());
}

// ---- what a coordinator's stage uses ----

TEST_CASE("TaskCore: hooks are told of every task, in order, before it has left") {
  struct Log {
    std::atomic<int> admitted{0};
    std::atomic<int> begun{0};
    std::atomic<int> failed{0};
    std::atomic<int> ended{0};
    std::atomic<bool> right{true};
  } log;
  lastcall::detail::TaskHooks hooks;
  hooks.context = &log;
  hooks.admitted = [](void* context) noexcept { ++static_cast<Log*>(context)->admitted; };
  hooks.begun = [](void* context, const lastcall::detail::TaskReport& task) noexcept {
    auto& my = *static_cast<Log*>(context);
    ++my.begun;
    if (task.begin != task.end || task.failure != nullptr) my.right = false;
    if (task.thread_id != lastcall::detail::current_thread_id()) my.right = false;
  };
  hooks.failed = [](void* context, const Failure& failure) noexcept {
    ++static_cast<Log*>(context)->failed;
    if (failure.task != "bad") static_cast<Log*>(context)->right = false;
  };
  hooks.ended = [](void* context, const lastcall::detail::TaskReport& task) noexcept {
    auto& my = *static_cast<Log*>(context);
    ++my.ended;
    if ((task.failure != nullptr) != (task.name == "bad")) my.right = false;
    if (task.spawned != (task.name != "wrapped")) my.right = false;
    if (task.end < task.begin) my.right = false;
    // A task is known by its owner on its own thread.
    if (lastcall::detail::TaskScope::of(context) == nullptr) my.right = false;
  };
  const CancellationSource source;
  const auto core = lastcall::detail::Ref<lastcall::detail::TaskCore>::adopt(
      new lastcall::detail::TaskCore(source.token(), hooks));
  const auto where = lastcall::SourceLocation::current();
  CHECK(core->spawn(
      "good", [] {}, where));
  CHECK(core->spawn(
      "bad", [] { throw 1; }, where));
  core->wrap(
      "wrapped", [] {}, where)();
  {
    const auto never_run = core->wrap(
        "never run", [] {}, where);
  }
  core->group().wait();
  CHECK(log.admitted == 2);
  CHECK(log.begun == 3);
  CHECK(log.failed == 1);
  CHECK(log.ended == 3);
  CHECK(log.right);
  CHECK(lastcall::detail::TaskScope::current() == nullptr);
  CHECK(core->join_finished_until(Clock::now() + support::patience));
}

TEST_CASE("TaskCore: a task that is spawned is listed by its group with its own thread") {
  const CancellationSource source;
  const auto core = lastcall::detail::Ref<lastcall::detail::TaskCore>::adopt(
      new lastcall::detail::TaskCore(source.token(), {}));
  support::Gate gate;
  std::atomic<pid_t> thread{0};
  core->spawn(
      "listed",
      [&] {
        thread = lastcall::detail::current_thread_id();
        gate.wait();
      },
      lastcall::SourceLocation::current());
  REQUIRE(support::eventually([&] { return thread != 0; }));
  const auto members = core->group().members();
  REQUIRE(members.size() == 1);
  CHECK(members[0].name == "listed");
  CHECK(members[0].thread_id == thread);
  gate.open();
  core->group().wait();
  core->join_finished();
}

TEST_CASE("TaskCore: once closed by its owner it takes no more tasks") {
  const CancellationSource source;
  const auto core = lastcall::detail::Ref<lastcall::detail::TaskCore>::adopt(
      new lastcall::detail::TaskCore(source.token(), {}));
  core->group().close();
  CHECK_FALSE(core->spawn(
      "late", [] {}, lastcall::SourceLocation::current()));
  CHECK_FALSE(core->wrap(
      "late", [] {}, lastcall::SourceLocation::current()));
}

TEST_CASE("TaskCore: joining is bounded, and abandoned threads look after themselves") {
  static std::atomic<support::Gate*> hanging{nullptr};
  struct Local {
    ~Local() {
      if (armed) hanging.load()->wait();
    }
    bool armed = false;
  };
  support::Gate gate;
  support::Gate task_gate;
  hanging = &gate;
  std::atomic<int> alive{0};
  const int before = support::live_threads();
  {
    const CancellationSource source;
    auto core = lastcall::detail::Ref<lastcall::detail::TaskCore>::adopt(
        new lastcall::detail::TaskCore(source.token(), {}));
    const auto where = lastcall::SourceLocation::current();
    core->spawn(
        "hangs after its end",
        [cargo = Cargo(alive)] {
          static thread_local Local local;
          local.armed = true;
        },
        where);
    core->group().wait();
    CHECK(alive == 0);
    core->spawn(
        "ends well", [] {}, where);
    core->group().wait();
    if (LASTCALL_LINUX) CHECK_FALSE(core->join_finished_until(Clock::now() + 20ms));
    core->spawn(
        "straggles", [&, cargo = Cargo(alive)] { task_gate.wait(); }, where);
    core->abandon();
    // Two threads are left, and the core has gone from here: the straggler keeps it.
  }
  CHECK(alive == 1);
  task_gate.open();
  gate.open();
  CHECK(support::eventually([&] { return alive == 0 && support::live_threads() == before; }));
}

}  // namespace
