// Wait groups, task groups, tickers and blocking calls with too little memory.
#include "starvation/sweep.hpp"
#include "support/catch.hpp"

#include <lastcall/blocking.hpp>
#include <lastcall/task_group.hpp>
#include <lastcall/ticker.hpp>
#include <lastcall/wait_group.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::OnFailure;
using lastcall::TaskGroup;
using lastcall::WaitGroup;
using starvation::Reach;
using starvation::sweep;
using support::expect;
using support::expect_equal;

const char* const long_name = "a name that is too long for a small string";

std::string words_of(const WaitGroup& group) {
  std::string words = std::to_string(group.count()) + (group.is_closed() ? " closed" : " open");
  for (const WaitGroup::Member& member : group.members()) words += " " + member.name;
  return words;
}

// ---- WaitGroup

struct Enter {
  WaitGroup group;
  WaitGroup::Guard guard;
  void call() { guard = group.enter(); }
  std::string state() const { return words_of(group); }
  void check() const { expect_equal(group.count(), std::size_t{1}, "the count"); }
};

struct EnterNamed {
  WaitGroup group;
  WaitGroup::Guard guard;
  void call() { guard = group.enter(long_name); }
  std::string state() const { return words_of(group); }
  void check() const { expect(words_of(group) == std::string("1 open ") + long_name, "one is in"); }
};

struct TryEnterNamed {
  WaitGroup group;
  WaitGroup::Guard guard;
  void call() { guard = group.try_enter(long_name); }
  std::string state() const { return words_of(group); }
  void check() const { expect(static_cast<bool>(guard), "it was let in"); }
};

struct EnterClosed {
  WaitGroup group;
  bool refused = false;
  EnterClosed() { group.close(); }
  void call() {
    try {
      static_cast<void>(group.enter(long_name));
    } catch (const std::logic_error&) {
      refused = true;
    }
  }
  std::string state() const { return words_of(group); }
  void check() const { expect(refused, "a closed group refuses"); }
};

// Enough of them that threads count in slots of their own.
struct EnterOften {
  WaitGroup group;
  void call() {
    for (int turn = 0; turn < 3000; ++turn) static_cast<void>(group.enter());
    std::thread other([this] {
      for (int turn = 0; turn < 3000; ++turn) static_cast<void>(group.enter());
    });
    other.join();
  }
  std::string state() const { return words_of(group); }
  void check() const { expect_equal(group.count(), std::size_t{0}, "the count"); }
};

struct Add {
  WaitGroup group;
  bool added = false;
  ~Add() {
    for (int turn = 0; added && turn < 3; ++turn) group.done();
  }
  void call() {
    group.add(3);
    added = true;
  }
  std::string state() const { return words_of(group); }
  void check() const { expect_equal(group.count(), std::size_t{3}, "the count"); }
};

struct DoneTooOften {
  WaitGroup group;
  bool refused = false;
  void call() {
    try {
      group.done();
    } catch (const std::logic_error&) {
      refused = true;
    }
  }
  std::string state() const { return words_of(group); }
  void check() const { expect(refused, "more than were added"); }
};

struct CopyGuards {
  WaitGroup group;
  WaitGroup::Guard named = group.enter(long_name);
  WaitGroup::Guard unnamed = group.enter();
  std::optional<WaitGroup::Guard> copies[2];
  void call() {
    copies[0].reset();
    copies[1].reset();
    copies[0].emplace(named);
    copies[1].emplace(unnamed);
  }
  // The first copy may be in: it stays, since it succeeded.
  std::string state() const {
    return std::to_string(group.count() - (copies[0] ? 1U : 0U) - (copies[1] ? 1U : 0U));
  }
  void check() const {
    expect_equal(group.count(), std::size_t{4}, "the count");
    expect_equal(group.members().size(), std::size_t{2}, "named members");
  }
};

struct Members {
  WaitGroup group;
  std::vector<WaitGroup::Guard> guards;
  std::vector<WaitGroup::Member> seen;
  Members() {
    for (int at = 0; at < 5; ++at) guards.push_back(group.enter(long_name + std::to_string(at)));
  }
  void call() { seen = group.members(); }
  std::string state() const { return words_of(group); }
  void check() const { expect_equal(seen.size(), std::size_t{5}, "named members"); }
};

struct LeaveAndWait {
  WaitGroup group;
  WaitGroup::Guard named = group.enter(long_name);
  WaitGroup::Guard unnamed = group.enter();
  bool empty = false;
  void call() {
    static_cast<void>(group.wait_for(1ms));
    named.release();
    unnamed.release();
    group.close();
    group.wait();
    empty = group.wait_for(0s);
  }
  void check() const { expect(empty, "everybody has left"); }
};

// ---- TaskGroup

struct MakeGroup {
  CancellationSource parent;
  std::optional<TaskGroup> group;
  void call() { group.emplace(parent.token()); }
  void check() {
    expect(group->spawn("task", [] {}), "it takes tasks");
    group->wait();
  }
};

// The task's own requests are starved, too.
struct Spawn {
  TaskGroup group;
  std::atomic<int> runs{0};
  int accepted = 0;
  void call() {
    if (group.spawn(long_name, [this](const CancellationToken&) { ++runs; })) ++accepted;
    static_cast<void>(group.wait_for(10s));
  }
  std::string state() const { return std::to_string(group.failures().size()); }
  void check() {
    group.wait();
    expect_equal(accepted, 1, "tasks that were accepted");
    expect_equal(runs.load(), 1, "runs of the task");
  }
};

struct SpawnedFailure {
  TaskGroup group{CancellationToken(), OnFailure::cancel_group};
  bool spawned = false;
  void call() {
    spawned = group.spawn(long_name, [] { throw std::runtime_error(long_name); });
    static_cast<void>(group.wait_for(10s));
  }
  std::string state() const { return std::to_string(group.failures().size()); }
  void check() {
    expect(spawned, "it was accepted");
    expect(group.token().is_cancelled(), "the failure has cancelled the group");
    bool thrown = false;
    try {
      group.wait();
    } catch (const std::exception&) {  // with no memory for the task's own words: bad_alloc
      thrown = true;
    }
    expect(thrown, "wait() throws what the task threw");
    expect_equal(group.failures().size(), std::size_t{1}, "failures");
  }
};

struct SpawnClosed {
  TaskGroup group;
  bool accepted = true;
  SpawnClosed() { group.wait(); }
  void call() {
    accepted = group.spawn(long_name, [] {});
  }
  void check() const { expect(!accepted, "a closed group takes nobody"); }
};

struct Wrap {
  TaskGroup group;
  int runs = 0;
  bool accepted = false;
  void call() {
    const auto task = group.wrap(long_name, [this] { ++runs; });
    accepted = static_cast<bool>(task);
    const auto copy = task;
    copy();
    task();
  }
  std::string state() const {
    return std::to_string(group.failures().size()) + (group.token().is_cancelled() ? "x" : "");
  }
  void check() {
    expect(accepted, "it was accepted");
    expect_equal(runs, 1, "runs of the task");
    expect(group.wait_for(0s), "it has left");
  }
};

struct WrappedFailure {
  TaskGroup group{CancellationToken(), OnFailure::keep_going};
  bool accepted = false;
  void call() {
    const auto task = group.wrap(long_name, [] { throw 7; });
    accepted = static_cast<bool>(task);
    task();
  }
  std::string state() const { return std::to_string(group.failures().size()); }
  void check() {
    expect(accepted, "it was accepted");
    expect_equal(group.failures().size(), std::size_t{1}, "failures");
    expect(group.wait_for(0s), "it has left");
  }
};

struct Failures {
  TaskGroup group{CancellationToken(), OnFailure::keep_going};
  std::vector<lastcall::Failure> seen;
  Failures() {
    for (int at = 0; at < 4; ++at) group.wrap(long_name, [] { throw 7; })();
  }
  void call() { seen = group.failures(); }
  std::string state() const { return std::to_string(group.failures().size()); }
  void check() const { expect_equal(seen.size(), std::size_t{4}, "failures"); }
};

struct CancelAndWait {
  std::optional<TaskGroup> group{std::in_place};
  CancelAndWait() {
    group->spawn("waits", [](const CancellationToken& token) { token.wait(); });
  }
  void call() {
    group->cancel();
    group->wait();
    group.reset();
  }
};

// ---- Ticker and blocking calls

struct Ticks {
  CancellationSource source;
  bool ticked = false;
  bool slept = false;
  void call() {
    const lastcall::Ticker ticker(1ms);
    ticked = ticker.wait(source.token());
    slept = lastcall::sleep_for(1ms, source.token());
  }
  void check() const {
    expect(ticked, "there was a tick");
    expect(slept, "it has slept it all");
  }
};

struct BadTicker {
  bool refused = false;
  void call() {
    try {
      const lastcall::Ticker ticker(lastcall::Clock::duration::zero());
    } catch (const std::invalid_argument&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "a period of nothing is refused"); }
};

struct Poll {
  CancellationSource source;
  int ends[2];
  lastcall::Ready ready = lastcall::Ready::cancelled;
  Poll() {
    if (::pipe2(ends, O_CLOEXEC) != 0) std::abort();
    support::write_all(ends[1], "x");
    // Its own descriptor would be a change that stays, and is right.
    static_cast<void>(source.token().fd());
  }
  ~Poll() {
    ::close(ends[0]);
    ::close(ends[1]);
  }
  void call() { ready = lastcall::poll(ends[0], POLLIN, source.token(), 10s); }
  void check() const { expect(ready == lastcall::Ready::ready, "there was something to read"); }
};

struct WaitOnCondition {
  CancellationSource source;
  std::condition_variable condition;
  std::mutex mutex;
  bool held = false;
  bool answer = true;
  void call() {
    source = CancellationSource();
    std::unique_lock<std::mutex> lock(mutex);
    std::atomic<bool> asked{false};
    std::thread canceller([this, &asked] {
      while (!asked) ::usleep(100);
      source.cancel();
    });
    struct Join {
      std::thread& thread;
      std::unique_lock<std::mutex>& lock;
      std::atomic<bool>& asked;
      ~Join() {
        if (lock.owns_lock()) lock.unlock();
        asked = true;
        thread.join();
      }
    } const join{canceller, lock, asked};
    answer = lastcall::wait(condition, lock, source.token(), [&asked] {
      asked = true;
      return false;
    });
    held = lock.owns_lock();
  }
  void check() const {
    expect(held, "it returned with the lock");
    expect(!answer, "the predicate's last value");
  }
};

// A blocking listener with one connection waiting, and then with none.
struct Accept {
  CancellationSource source;
  int listener = -1;
  int client = -1;
  int accepted = -1;
  Accept() {
    listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    // The empty path: an abstract name of the kernel's choosing.
    if (::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(sa_family_t)) != 0 ||
        ::listen(listener, 8) != 0) {
      std::abort();
    }
    connect();
    static_cast<void>(source.token().fd());
  }
  ~Accept() {
    for (const int fd : {listener, client, accepted}) {
      if (fd >= 0) ::close(fd);
    }
  }
  void connect() {
    client = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    socklen_t size = sizeof address;
    ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
    if (::connect(client, reinterpret_cast<sockaddr*>(&address), size) != 0) std::abort();
  }
  void call() {
    if (const std::optional<int> got = lastcall::accept(listener, source.token())) accepted = *got;
  }
  void check() {
    expect(accepted >= 0, "the connection was accepted");
    expect((::fcntl(accepted, F_GETFD) & FD_CLOEXEC) != 0, "it is close-on-exec");
  }
};

}  // namespace

TEST_CASE("nobody enters a wait group half way") {
  CHECK(sweep<Enter>().problems == "");
  CHECK(sweep<EnterNamed>().problems == "");
  CHECK(sweep<TryEnterNamed>().problems == "");
  CHECK(sweep<EnterClosed>().problems == "");
  CHECK(sweep<EnterNamed>().failures >= 4);
}

TEST_CASE("threads that can't be given slots of their own count all the same") {
  CHECK(sweep<EnterOften>().problems == "");
}

TEST_CASE("add, done and copies of guards leave an exact count") {
  CHECK(sweep<Add>().problems == "");
  CHECK(sweep<DoneTooOften>().problems == "");
  CHECK(sweep<CopyGuards>().problems == "");
  CHECK(sweep<Members>().problems == "");
}

TEST_CASE("leaving a group and waiting for it ask for no memory") {
  const starvation::Swept swept = sweep<LeaveAndWait>();
  CHECK(swept.problems == "");
  CHECK(swept.failures == 0);
}

TEST_CASE("a task group is made whole or not at all") {
  CHECK(sweep<MakeGroup>().problems == "");
  CHECK(sweep<MakeGroup>().failures >= 2);
}

TEST_CASE("a task that can't be spawned has never been a member") {
  const starvation::Swept swept = sweep<Spawn>(Reach::process);
  CHECK(swept.problems == "");
  CHECK(swept.failures >= 4);
  CHECK(sweep<SpawnClosed>().problems == "");
}

TEST_CASE("a spawned task's failure is kept, whatever memory there is") {
  CHECK(sweep<SpawnedFailure>(Reach::process).problems == "");
}

TEST_CASE("a wrapped task is a member or is refused") {
  CHECK(sweep<Wrap>().problems == "");
  CHECK(sweep<WrappedFailure>().problems == "");
  CHECK(sweep<Failures>().problems == "");
  CHECK(sweep<CancelAndWait>(Reach::process).refusals == 0);
}

TEST_CASE("tickers and blocking calls") {
  CHECK(sweep<Ticks>().problems == "");
  CHECK(sweep<BadTicker>().problems == "");
  CHECK(sweep<Poll>().problems == "");
  CHECK(sweep<WaitOnCondition>().problems == "");
  CHECK(sweep<Accept>().problems == "");
}
