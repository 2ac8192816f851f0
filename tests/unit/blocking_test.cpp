// blocking.hpp: sleep_for, wait, poll, accept.
#include <lastcall/blocking.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Clock;
using lastcall::Ready;
using lastcall::detail::UniqueFd;
using namespace std::chrono_literals;

namespace {

// The moments that a race hits once in a million are made to order: the two functions below stand in
// front of the libraries' own, and can be told to wait, to fail or to be late.

// Where the next call stops before it has begun: a std::condition_variable::wait() with the mutex held,
// an accept(2) outside the kernel.
struct Brink {
  support::Gate reached;
  support::Gate leap;
  void stop_here() {
    reached.open();
    leap.wait();
  }
};
std::atomic<Brink*> brink_of_wait{nullptr};
std::atomic<Brink*> brink_of_accept{nullptr};

// accept(2) lets a stranger have the connection first.
std::atomic<bool> stranger_is_quicker{false};
std::atomic<int> taken_by_stranger{0};

// What the next calls of accept(2) are to fail with.
std::mutex planned_errors_mutex;
std::deque<int> planned_errors;

int next_planned_error() {
  const std::lock_guard<std::mutex> lock(planned_errors_mutex);
  if (planned_errors.empty()) return 0;
  const int error = planned_errors.front();
  planned_errors.pop_front();
  return error;
}

}  // namespace

#if defined(__GLIBCXX__)
void std::condition_variable::wait(std::unique_lock<std::mutex>& lock) {
  if (Brink* const here = brink_of_wait.exchange(nullptr)) here->stop_here();
  using Function = void (*)(std::condition_variable*, std::unique_lock<std::mutex>*);
  static const auto real = reinterpret_cast<Function>(
      ::dlsym(RTLD_NEXT, "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE"));
  real(this, &lock);
}
#endif

extern "C" int accept(int listener, sockaddr* address, socklen_t* size) {
  using Function = int (*)(int, sockaddr*, socklen_t*);
  static const auto real = reinterpret_cast<Function>(::dlsym(RTLD_NEXT, "accept"));
  if (const int error = next_planned_error()) {
    errno = error;
    return -1;
  }
  if (stranger_is_quicker) {
    ::close(real(listener, nullptr, nullptr));
    ++taken_by_stranger;
  }
  if (Brink* const here = brink_of_accept.exchange(nullptr)) here->stop_here();
  return real(listener, address, size);
}

#if defined(__linux__)
extern "C" int accept4(int listener, sockaddr* address, socklen_t* size, int flags) {
  using Function = int (*)(int, sockaddr*, socklen_t*, int);
  static const auto real = reinterpret_cast<Function>(::dlsym(RTLD_NEXT, "accept4"));
  if (const int error = next_planned_error()) {
    errno = error;
    return -1;
  }
  if (stranger_is_quicker) {
    ::close(real(listener, nullptr, nullptr, 0));
    ++taken_by_stranger;
  }
  if (Brink* const here = brink_of_accept.exchange(nullptr)) here->stop_here();
  return real(listener, address, size, flags);
}
#endif

namespace {

// The errno of the std::system_error that body throws; -1: nothing, or something else. The message must
// contain `names`.
template <class Body>
int error_of(Body body, const std::string& names) {
  try {
    body();
  } catch (const std::system_error& error) {
    const bool named = std::string(error.what()).find(names) != std::string::npos;
    return named && error.code().category() == std::generic_category() ? error.code().value() : -2;
  } catch (...) {
  }
  return -1;
}

// ---- sleep_for ----

TEST_CASE("sleep_for: true when it has slept it all, and never less") {
  const CancellationSource source;
  for (const auto span : {0us, 1us, 700us, 15'000us}) {
    const Clock::time_point before = Clock::now();
    CHECK(lastcall::sleep_for(span, source.token()));
    CHECK(Clock::now() - before >= span);
  }
  CHECK(lastcall::sleep_for(1ms, CancellationToken()));
}

TEST_CASE("sleep_for: a negative duration means already, also the most negative one") {
  const CancellationSource source;
  CHECK(lastcall::sleep_for(-1s, source.token()));
  CHECK(lastcall::sleep_for(std::chrono::hours::min(), source.token()));
}

TEST_CASE("sleep_for: cancelled already, it says so at once, also of no time at all") {
  CancellationSource source;
  source.cancel();
  CHECK_FALSE(lastcall::sleep_for(1000h, source.token()));
  CHECK_FALSE(lastcall::sleep_for(0s, source.token()));
  CHECK_FALSE(lastcall::sleep_for(-1s, source.token()));
}

TEST_CASE("sleep_for: a cancel ends it, a huge duration saturates") {
  CancellationSource source;
  std::atomic<pid_t> sleeper{0};
  std::atomic<bool> slept{true};
  {
    support::Threads threads;
    threads.start([&] {
      sleeper = support::thread_id();
      slept = lastcall::sleep_for(std::chrono::hours::max(), source.token());
    });
    support::let_it_block(sleeper);
    source.cancel();
  }
  CHECK_FALSE(slept);
}

// ---- wait ----

// A waiter on a thread of its own: what it waits for, with what, and what came of it.
struct Waiting {
  std::mutex mutex;
  std::condition_variable changed;
  bool fact = false;
  std::atomic<pid_t> thread{0};
  std::atomic<int> asked{0};
  std::atomic<int> result{-1};

  void run(const CancellationToken& token) {
    std::unique_lock<std::mutex> lock(mutex);
    thread = support::thread_id();
    const bool value = lastcall::wait(changed, lock, token, [&] {
      ++asked;
      return fact;
    });
    result = value ? 1 : 0;
  }
  bool is_over() const { return result != -1; }
  void settle() {
    support::let_it_block(thread, [this] { return is_over(); });
  }
};

TEST_CASE("wait: cancelled already, it returns the predicate's value at once") {
  CancellationSource source;
  source.cancel();
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_lock<std::mutex> lock(mutex);
  int asked = 0;
  for (const bool value : {false, true}) {
    CHECK(lastcall::wait(changed, lock, source.token(), [&] {
            ++asked;
            return value;
          }) == value);
    CHECK(lock.owns_lock());
  }
  CHECK(asked == 2);
}

TEST_CASE("wait: a predicate that holds already doesn't block") {
  const CancellationSource source;
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_lock<std::mutex> lock(mutex);
  CHECK(lastcall::wait(changed, lock, source.token(), [] { return true; }));
  CHECK(lastcall::wait(changed, lock, CancellationToken(), [] { return true; }));
  CHECK(lock.owns_lock());
}

TEST_CASE("wait: a notification is heard, and the predicate decides") {
  for (const bool can_be_cancelled : {true, false}) {
    const CancellationSource source;
    Waiting waiting;
    {
      support::Threads threads;
      threads.start([&] { waiting.run(can_be_cancelled ? source.token() : CancellationToken()); });
      waiting.settle();
      waiting.changed.notify_all();  // for nothing
      support::let_it_block(waiting.thread, [&] { return waiting.is_over(); });
      CHECK_FALSE(waiting.is_over());
      const std::lock_guard<std::mutex> lock(waiting.mutex);
      waiting.fact = true;
      waiting.changed.notify_one();
    }
    CHECK(waiting.result == 1);
  }
}

TEST_CASE("wait: a cancel ends it with the predicate's last value") {
  for (const bool value : {false, true}) {
    CancellationSource source;
    Waiting waiting;
    {
      support::Threads threads;
      threads.start([&] { waiting.run(source.token()); });
      waiting.settle();
      {
        const std::lock_guard<std::mutex> lock(waiting.mutex);
        waiting.fact = value;  // and nobody is notified
      }
      source.cancel();
    }
    CHECK(waiting.result == (value ? 1 : 0));
    CHECK(waiting.asked >= 2);
  }
}

TEST_CASE("wait: the canceller may hold the mutex") {
  CancellationSource source;
  Waiting waiting;
  {
    support::Threads threads;
    threads.start([&] { waiting.run(source.token()); });
    waiting.settle();
    const std::lock_guard<std::mutex> lock(waiting.mutex);
    CHECK(source.cancel());
    CHECK_FALSE(waiting.is_over());  // it can't be: the mutex is held
  }
  CHECK(waiting.result == 0);
}

TEST_CASE("wait: somebody who waits for the canceller may hold the mutex") {
  CancellationSource source;
  Waiting waiting;
  {
    support::Threads threads;
    threads.start([&] { waiting.run(source.token()); });
    waiting.settle();
    const std::lock_guard<std::mutex> lock(waiting.mutex);
    std::thread([&] { source.cancel(); }).join();
  }
  CHECK(waiting.result == 0);
}

TEST_CASE("wait: every waiter of the token wakes, also many on one mutex that is held") {
  CancellationSource source;
  constexpr int count = 8;
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<int> over{0};
  std::atomic<int> blocked{0};
  {
    support::Threads threads;
    for (int i = 0; i < count; ++i) {
      threads.start([&] {
        std::unique_lock<std::mutex> lock(mutex);
        ++blocked;
        over += lastcall::wait(changed, lock, source.token(), [] { return false; }) ? 100 : 1;
      });
    }
    REQUIRE(support::eventually([&] { return blocked == count; }));
    const std::lock_guard<std::mutex> lock(mutex);
    source.cancel();
  }
  CHECK(over == count);
}

TEST_CASE("wait: a deadline's cancel comes from the timer thread, and is heard") {
  const CancellationSource source(CancellationToken(), 20ms);
  Waiting waiting;
  {
    support::Threads threads;
    threads.start([&] { waiting.run(source.token()); });
  }
  CHECK(waiting.result == 0);
}

TEST_CASE("wait: what the predicate throws comes out, with the lock held") {
  CancellationSource source;
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_lock<std::mutex> lock(mutex);
  int asked = 0;
  std::atomic<bool> over{false};
  support::Threads threads;
  threads.start([&] {
    while (!over) {
      { const std::lock_guard<std::mutex> quick(mutex); }
      changed.notify_all();
      std::this_thread::yield();
    }
  });
  CHECK_THROWS_AS(lastcall::wait(changed, lock, source.token(),
                                 [&]() -> bool {
                                   if (++asked == 3) throw std::runtime_error("enough");
                                   return false;
                                 }),
                  std::runtime_error);
  CHECK(lock.owns_lock());
  over = true;
  lock.unlock();
  threads.join();
  CHECK(source.cancel());  // finds nobody
}

TEST_CASE("wait: a lock that is not locked is a logic error") {
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_lock<std::mutex> lock(mutex, std::defer_lock);
  CHECK_THROWS_AS(lastcall::wait(changed, lock, CancellationToken(), [] { return true; }),
                  std::logic_error);
}

#if defined(__GLIBCXX__)
TEST_CASE(
    "wait: no wake-up is lost when the cancel comes between the decision to block and the block") {
  // The waiter holds the mutex, so the canceller can't have it, and nobody hears its notification.
  CancellationSource source;
  Waiting waiting;
  Brink here;
  support::Threads threads;
  brink_of_wait = &here;
  threads.start([&] { waiting.run(source.token()); });
  REQUIRE(here.reached.wait());
  CHECK(source.cancel());
  CHECK_FALSE(waiting.is_over());
  here.leap.open();
  CHECK(support::eventually([&] { return waiting.is_over(); }));
  if (!waiting.is_over()) waiting.changed.notify_all();
  threads.join();
  CHECK(waiting.result == 0);
}
#endif

TEST_CASE("wait: a waiter wakes without waiting for any callback, also for one made after it") {
  CancellationSource source;
  Waiting waiting;
  bool woke_first = false;
  support::Threads threads;
  threads.start([&] { waiting.run(source.token()); });
  waiting.settle();
  const auto wait_for_it = [&] {
    woke_first = support::eventually([&] { return waiting.is_over(); }, 20s);
  };
  const lastcall::CancellationCallback callback(source.token(), wait_for_it);
  CHECK(source.cancel());
  CHECK(woke_first);
  threads.join();
  CHECK(waiting.result == 0);
}

TEST_CASE("wait: beside waiters of every kind each callback of the token runs once") {
  // In whatever order they came, and whatever hangs below.
  constexpr int count = 6;
  CancellationSource source;
  std::vector<std::unique_ptr<Waiting>> waits;
  std::vector<std::unique_ptr<CancellationSource>> children;
  std::atomic<int> runs{0};
  std::atomic<int> token_waits{0};
  const auto run = [&] { ++runs; };
  std::deque<lastcall::CancellationCallback<std::function<void()>>> callbacks;
  support::Threads threads;
  for (int i = 0; i < count; ++i) {
    for (int kind = 0; kind < 4; ++kind) {
      switch ((i + kind * (i % 2 == 0 ? 1 : 3)) % 4) {
        case 0: callbacks.emplace_back(source.token(), run); break;
        case 1: children.push_back(std::make_unique<CancellationSource>(source.token())); break;
        case 2: {
          Waiting& waiting = *waits.emplace_back(std::make_unique<Waiting>());
          threads.start([&] { waiting.run(source.token()); });
          waiting.settle();
          break;
        }
        default: {
          std::atomic<pid_t> sleeper{0};
          threads.start([&] {
            const CancellationToken token = source.token();
            sleeper = support::thread_id();
            token.wait();
            ++token_waits;
          });
          support::let_it_block(sleeper);
          break;
        }
      }
    }
  }
  CHECK(source.cancel());
  threads.join();
  CHECK(runs == count);
  CHECK(token_waits == count);
  for (const auto& waiting : waits) CHECK(waiting->result == 0);
  for (const auto& child : children) CHECK(child->is_cancelled());
}

#if defined(__GLIBCXX__)
TEST_CASE("wait: no wake-up is lost while a deadline's callback waits for the waiter") {
  // The deadline comes between the decision to block and the block, and the callback keeps the timer
  // thread until the waiter is out.
  Waiting waiting;
  Brink here;
  std::atomic<bool> called{false};
  std::atomic<bool> is_out{false};
  bool came_first = false;
  const std::function<void()> join = [&, main = std::this_thread::get_id()] {
    if (std::this_thread::get_id() == main) {
      came_first = true;
      return;
    }
    called = true;
    here.reached.wait();
    std::this_thread::sleep_for(20ms);
    here.leap.open();
    is_out = support::eventually([&] { return waiting.is_over(); }, 20s);
    if (!is_out) waiting.changed.notify_all();
  };
  std::optional<CancellationSource> source;
  std::optional<lastcall::CancellationCallback<std::function<void()>>> callback;
  for (auto timeout = 20ms; !callback || came_first; timeout *= 10) {
    callback.reset();
    came_first = false;
    source.emplace(CancellationToken(), timeout);
    callback.emplace(source->token(), join);
  }
  support::Threads threads;
  brink_of_wait = &here;
  threads.start([&] { waiting.run(source->token()); });
  CHECK(support::eventually([&] { return called.load(); }));
  // On a slow machine it was cancelled before it came to block.
  CHECK(support::eventually([&] { return here.reached.is_open() || waiting.is_over(); }));
  here.reached.open();
  threads.join();
  brink_of_wait = nullptr;
  CHECK(support::eventually([&] { return is_out.load(); }));
}
#endif

TEST_CASE("wait: no wake-up is lost, however a cancel meets the start of the wait") {
  // The dangerous moment lasts some nanoseconds: the waiter has decided to block, and does not block yet.
  // So the canceller aims: it comes a little later if the waiter had not even asked for the first time,
  // a little earlier if it had, and scatters its shots behind that. In some rounds it holds the mutex. A
  // lost wake-up would be one for ever.
  constexpr int rounds = support::under_sanitizer ? 2'000 : 4'000;
  support::StartingLine line(2);
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_ptr<CancellationSource> source;
  std::atomic<int> asked{0};
  std::atomic<int> woken{0};
  int lost = 0;
  support::Threads threads;
  threads.start([&] {
    for (int round = 0; round < rounds; ++round) {
      line.ready_steady_go();
      {
        std::unique_lock<std::mutex> lock(mutex);
        lastcall::wait(changed, lock, source->token(), [&] {
          asked.fetch_add(1, std::memory_order_relaxed);
          return false;
        });
      }
      ++woken;
    }
  });
  support::Random random(7);
  int aim = 100;
  for (int round = 0; round < rounds; ++round) {
    source = std::make_unique<CancellationSource>();
    asked = 0;
    const int delay = aim + static_cast<int>(random.below(300));
    const bool hold = random.one_in(8);
    line.ready_steady_go();
    for (int spin = 0; spin < delay; ++spin)
      static_cast<void>(asked.load(std::memory_order_acquire));
    if (hold) {
      const std::lock_guard<std::mutex> lock(mutex);
      source->cancel();
    } else {
      source->cancel();
    }
    for (int spin = 0; spin < 1000 && woken <= round; ++spin) std::this_thread::yield();
    if (!support::eventually([&] { return woken > round; }, 5s)) {
      ++lost;
      while (woken <= round) changed.notify_all();
    }
    // Asked once only: it was cancelled when it came.
    aim = asked == 1 ? aim + 5 : aim > 5 ? aim - 5 : 0;
  }
  CHECK(lost == 0);
  CHECK(woken == rounds);
}

// Makes every pthread_create fail in this (child) process with EAGAIN from now on.
bool no_more_threads() {
  const rlimit none{1, 1};
  if (::setrlimit(RLIMIT_NPROC, &none) != 0) return false;
  // The limit doesn't bind root.
  return ::getuid() != 0 || ::setuid(65534) == 0;
}

TEST_CASE(
    "wait: with no thread to be had it throws, with the lock held, and nobody is left behind") {
  // TSan starts a thread of its own after a fork.
  if (support::under_tsan) return;
  CHECK(support::in_child_process([] {
          CancellationSource source;
          std::mutex mutex;
          std::condition_variable changed;
          std::unique_lock<std::mutex> lock(mutex);
          if (!no_more_threads()) return 2;
          for (int i = 0; i < 2; ++i) {
            const int error = error_of(
                [&] { lastcall::wait(changed, lock, source.token(), [] { return false; }); },
                "starting the thread that wakes blocked calls");
            if (error != EAGAIN) return 3;
          }
          if (!lock.owns_lock()) return 4;
          // What doesn't have to block needs none.
          if (!lastcall::wait(changed, lock, source.token(), [] { return true; })) return 5;
          return source.cancel() ? 0 : 6;
        }) == 0);
}

TEST_CASE("wait: where one has waited before, there is a thread for it") {
  if (support::under_tsan) return;
  CHECK(support::in_child_process([] {
          CancellationSource source;
          Waiting waiting;
          std::thread thread([&] { waiting.run(source.token()); });
          waiting.settle();
          if (!no_more_threads()) return 2;
          {
            const std::lock_guard<std::mutex> lock(waiting.mutex);
            source.cancel();
          }
          thread.join();
          return waiting.result == 0 ? 0 : 1;
        }) == 0);
}

TEST_CASE("wait: in a forked child cancels are heard, whatever the parent's threads were at") {
  CancellationSource source;
  Waiting waiting;
  support::Threads threads;
  threads.start([&] { waiting.run(source.token()); });
  waiting.settle();
  for (const bool cancelled_before : {false, true}) {
    std::unique_lock<std::mutex> lock(waiting.mutex, std::defer_lock);
    if (cancelled_before) {
      // Somebody is being nudged while it is forked.
      lock.lock();
      source.cancel();
    }
    CHECK(support::in_child_process([] {
            CancellationSource own;
            Waiting mine;
            std::thread thread([&] { mine.run(own.token()); });
            mine.settle();
            own.cancel();
            thread.join();
            return mine.result == 0 ? 0 : 1;
          }) == 0);
  }
  threads.join();
  CHECK(waiting.result == 0);
}

TEST_CASE("wait: a predicate may fork, and both processes wait on") {
  CancellationSource source;
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_lock<std::mutex> lock(mutex);
  pid_t child = -1;
  int asked = 0;
  std::thread canceller;
  const bool value = lastcall::wait(changed, lock, source.token(), [&] {
    if (++asked == 1) {
      // Blocks, and is woken for nothing.
      std::thread([&] {
        const std::lock_guard<std::mutex> quick(mutex);
        changed.notify_all();
      }).detach();
    } else if (asked == 2) {
      child = ::fork();
      canceller = std::thread([&] {
        std::this_thread::sleep_for(20ms);
        source.cancel();
      });
    }
    return false;
  });
  canceller.join();
  if (child == 0) ::_exit(value ? 1 : 0);
  CHECK_FALSE(value);
  CHECK(support::outcome_of(child) == 0);
}

#if defined(__linux__)
// The thread of this process that has this name; 0: there is none.
pid_t thread_named(const std::string& name) {
  pid_t found = 0;
  DIR* const tasks = ::opendir("/proc/self/task");
  if (tasks == nullptr) return 0;
  while (const dirent* const entry = ::readdir(tasks)) {
    const std::string path = std::string("/proc/self/task/") + entry->d_name + "/comm";
    char line[32] = {};
    if (std::FILE* file = std::fopen(path.c_str(), "re")) {
      if (std::fgets(line, sizeof line, file) != nullptr && line == name + "\n") {
        found = static_cast<pid_t>(std::atoi(entry->d_name));
      }
      std::fclose(file);
    }
  }
  ::closedir(tasks);
  return found;
}

TEST_CASE(
    "wait: neither who waits nor the thread that would wake him is woken before there is a "
    "reason") {
  const auto switches = [](pid_t thread) {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/task/%d/status", static_cast<int>(thread));
    long found = -1;
    if (std::FILE* file = std::fopen(path, "re")) {
      char line[256];
      while (std::fgets(line, sizeof line, file) != nullptr) {
        static_cast<void>(std::sscanf(line, "voluntary_ctxt_switches: %ld", &found));
      }
      std::fclose(file);
    }
    return found;
  };
  CancellationSource source;
  Waiting waiting;
  support::Threads threads;
  threads.start([&] { waiting.run(source.token()); });
  waiting.settle();
  const std::atomic<pid_t> nudger{thread_named("lastcall-nudge")};
  CHECK(nudger != 0);
  support::let_it_block(nudger);
  const long before = switches(waiting.thread);
  const long nudger_before = switches(nudger);
  CHECK(before > 0);
  std::this_thread::sleep_for(200ms);
  CHECK(switches(waiting.thread) == before);
  if (!support::under_tsan) CHECK(switches(nudger) == nudger_before);
  source.cancel();
  threads.join();
  CHECK(waiting.result == 0);
}
#endif

// ---- poll ----

struct Pair {
  Pair() {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) std::abort();
    here = UniqueFd(ends[0]);
    there = UniqueFd(ends[1]);
  }
  void send() const {
    if (::write(there.get(), "x", 1) != 1) std::abort();
  }
  UniqueFd here;
  UniqueFd there;
};

int closed_descriptor() {
  const int fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  ::close(fd);
  return fd;
}

TEST_CASE("poll: ready when the descriptor is") {
  const CancellationSource source;
  const Pair pair;
  for (const CancellationToken& token : {source.token(), CancellationToken()}) {
    CHECK(lastcall::poll(pair.here.get(), POLLOUT, token) == Ready::ready);
    CHECK(lastcall::poll(pair.here.get(), POLLOUT, token, 0s) == Ready::ready);
    CHECK(lastcall::poll(pair.here.get(), POLLIN, token, 0s) == Ready::timed_out);
  }
  pair.send();
  CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token()) == Ready::ready);
  CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token(), -5s) == Ready::ready);
}

TEST_CASE("poll: a hang-up and an error count as ready") {
  const CancellationSource source;
  Pair pair;
  pair.there.reset();
  CHECK(lastcall::poll(pair.here.get(), POLLPRI, source.token()) == Ready::ready);  // POLLHUP
  lastcall::detail::Pipe pipe = lastcall::detail::make_pipe("testing");
  pipe.read_end.reset();
  CHECK(lastcall::poll(pipe.write_end.get(), POLLIN, source.token()) == Ready::ready);  // POLLERR
}

TEST_CASE("poll: timed out when the time is up, and never sooner") {
  const CancellationSource source;
  const Pair pair;
  for (const Clock::duration span :
       {Clock::duration(0), Clock::duration(1), Clock::duration(12ms)}) {
    const Clock::time_point before = Clock::now();
    CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token(), span) == Ready::timed_out);
    CHECK(Clock::now() - before >= span);
  }
  CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token(), Clock::duration::min()) ==
        Ready::timed_out);
}

TEST_CASE("poll: cancelled already, it says so at once, whatever else is ready") {
  CancellationSource source;
  const Pair pair;
  pair.send();
  source.cancel();
  CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token()) == Ready::cancelled);
  CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token(), 0s) == Ready::cancelled);
  CHECK(lastcall::poll(closed_descriptor(), POLLIN, source.token()) == Ready::cancelled);
  CHECK(lastcall::poll(-1, POLLIN, source.token()) == Ready::cancelled);
}

TEST_CASE("poll: a cancel ends it") {
  const Pair pair;
  for (const short events : {short{POLLIN}, short{0}}) {
    CancellationSource source;
    std::atomic<pid_t> poller{0};
    std::atomic<Ready> got{Ready::ready};
    support::Threads threads;
    threads.start([&] {
      poller = support::thread_id();
      got = lastcall::poll(pair.here.get(), events, source.token());
    });
    support::let_it_block(poller);
    source.cancel();
    threads.join();
    CHECK(got == Ready::cancelled);
  }
}

TEST_CASE("poll: the descriptor becoming ready ends it") {
  const Pair pair;
  const CancellationSource source;
  std::atomic<pid_t> poller{0};
  std::atomic<Ready> got{Ready::cancelled};
  support::Threads threads;
  threads.start([&] {
    poller = support::thread_id();
    got = lastcall::poll(pair.here.get(), POLLIN, source.token(), Clock::duration::max());
  });
  support::let_it_block(poller);
  pair.send();
  threads.join();
  CHECK(got == Ready::ready);
}

TEST_CASE(
    "poll: with no events it waits for the token or the timeout, whatever the descriptor does") {
  const CancellationSource source;
  Pair pair;
  pair.send();
  const Clock::time_point before = Clock::now();
  CHECK(lastcall::poll(pair.here.get(), 0, source.token(), 5ms) == Ready::timed_out);
  pair.there.reset();  // poll(2) itself would report the hang-up
  CHECK(lastcall::poll(pair.here.get(), 0, source.token(), 5ms) == Ready::timed_out);
  CHECK(Clock::now() - before >= 10ms);
  const CancellationSource timed(source.token(), 10ms);
  CHECK(lastcall::poll(pair.here.get(), 0, timed.token()) == Ready::cancelled);
}

TEST_CASE("poll: a bad descriptor is EBADF, and the message names it") {
  const CancellationSource source;
  source.token().fd();  // made first, or it would get the number of the closed one
  for (const short events : {short{POLLIN}, short{0}}) {
    const int closed = closed_descriptor();
    CHECK(error_of([&] { lastcall::poll(closed, events, source.token(), 1h); },
                   "descriptor " + std::to_string(closed)) == EBADF);
    CHECK(error_of([&] { lastcall::poll(-1, events, source.token(), 1h); }, "descriptor -1") ==
          EBADF);
    CHECK(error_of([&] { lastcall::poll(-7, events, CancellationToken(), 0s); }, "descriptor -7") ==
          EBADF);
  }
}

TEST_CASE(
    "poll: it sleeps and keeps its time also if a stranger has made the token's descriptor "
    "readable") {
  CancellationSource source;
  const Pair pair;
  const std::uint64_t one = 1;
  // As a child does that was forked when all descriptors were taken. (Where it is a pipe this fails.)
  if (::write(source.token().fd(), &one, sizeof one) < 0) return;
  for (const short events : {short{POLLIN}, short{0}}) {
    const Clock::time_point before = Clock::now();
    const auto spent = support::cpu_time_of_process();
    CHECK(lastcall::poll(pair.here.get(), events, source.token(), 400ms) == Ready::timed_out);
    CHECK(Clock::now() - before >= 400ms);
    CHECK(support::cpu_time_of_process() - spent < 200ms);
    CHECK(lastcall::poll(pair.here.get(), events, source.token(), 0s) == Ready::timed_out);
  }
  std::thread canceller([&] {
    std::this_thread::sleep_for(20ms);
    source.cancel();
  });
  CHECK(lastcall::poll(pair.here.get(), POLLIN, source.token(), 60s) == Ready::cancelled);
  canceller.join();
  pair.send();
  CancellationSource other;
  CHECK(::write(other.token().fd(), &one, sizeof one) == sizeof one);
  CHECK(lastcall::poll(pair.here.get(), POLLIN, other.token(), 60s) == Ready::ready);
}

TEST_CASE("poll: signals don't end it, nor do they prolong it") {
  struct sigaction plain {};
  plain.sa_handler = [](int) {};
  struct sigaction before {};
  ::sigaction(SIGUSR1, &plain, &before);
  const CancellationSource source;
  const Pair pair;
  std::atomic<bool> over{false};
  std::atomic<pid_t> poller{0};
  std::atomic<Ready> got{Ready::ready};
  std::atomic<bool> in_time{false};
  std::thread thread([&] {
    poller = support::thread_id();
    const Clock::time_point start = Clock::now();
    got = lastcall::poll(pair.here.get(), POLLIN, source.token(), 100ms);
    in_time = Clock::now() - start >= 100ms;
    over = true;
  });
  // One every few milliseconds: a wait that began anew each time would never end.
  const Clock::time_point limit = Clock::now() + support::patience;
  while (!over && Clock::now() < limit) {
    ::pthread_kill(thread.native_handle(), SIGUSR1);
    std::this_thread::sleep_for(3ms);
  }
  CHECK(over);
  thread.join();
  ::sigaction(SIGUSR1, &before, nullptr);
  CHECK(got == Ready::timed_out);
  CHECK(in_time);
}

TEST_CASE("poll: no descriptor left for the token is a system error") {
  const Pair pair;
  CHECK(support::in_child_process([&] {
          const CancellationSource source;
          const rlimit none{static_cast<rlim_t>(::dup(0)), 4096};
          if (::setrlimit(RLIMIT_NOFILE, &none) != 0) return 2;
          const int error =
              error_of([&] { lastcall::poll(pair.here.get(), POLLIN, source.token(), 1h); }, "");
          return error == EMFILE ? 0 : 1;
        }) == 0);
}

// ---- accept ----

// A listener on the loopback interface, and connections to it.
class Listener {
 public:
  explicit Listener(bool blocking = true) : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address_;
    if (::bind(fd_.get(), generic(), size) != 0 || ::listen(fd_.get(), 128) != 0 ||
        ::getsockname(fd_.get(), generic(), &size) != 0) {
      std::abort();
    }
    if (!blocking) ::fcntl(fd_.get(), F_SETFL, ::fcntl(fd_.get(), F_GETFL) | O_NONBLOCK);
  }
  int fd() const { return fd_.get(); }
  int flags() const { return ::fcntl(fd_.get(), F_GETFL); }
  UniqueFd connect() {
    UniqueFd client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(client.get(), generic(), sizeof address_) != 0) std::abort();
    return client;
  }

 private:
  sockaddr* generic() { return reinterpret_cast<sockaddr*>(&address_); }
  UniqueFd fd_;
  sockaddr_in address_{};
};

// A loop of accept() on a thread: how many it got, and whether it has ended.
struct AcceptLoop {
  std::atomic<pid_t> thread{0};
  std::atomic<int> accepted{0};
  std::atomic<bool> over{false};
  std::atomic<bool> failed{false};

  void run(int listener, const CancellationToken& token) {
    thread = support::thread_id();
    try {
      while (const std::optional<int> got = lastcall::accept(listener, token)) {
        ::close(*got);
        ++accepted;
      }
    } catch (...) {
      failed = true;
    }
    over = true;
  }
};

// The loop is told of a connection that a stranger takes, and so blocks in accept(2).
void be_robbed(Listener& listener, const AcceptLoop& loop) {
  listener.connect();
  REQUIRE(support::eventually([&] { return taken_by_stranger == 1; }));
  support::let_it_block(loop.thread);
  stranger_is_quicker = false;
}

TEST_CASE("accept: returns a connection, close-on-exec, and leaves the listener's flags alone") {
  for (const bool blocking : {true, false}) {
    const CancellationSource source;
    Listener listener(blocking);
    const int flags = listener.flags();
    for (const CancellationToken& token : {source.token(), CancellationToken()}) {
      const UniqueFd client = listener.connect();
      const std::optional<int> got = lastcall::accept(listener.fd(), token);
      REQUIRE(got);
      const UniqueFd server(*got);
      CHECK((::fcntl(server.get(), F_GETFD) & FD_CLOEXEC) != 0);
      REQUIRE(::write(server.get(), "x", 1) == 1);
      char byte = 0;
      CHECK(::read(client.get(), &byte, 1) == 1);
      CHECK(listener.flags() == flags);
    }
  }
}

TEST_CASE("accept: cancelled already, it is empty at once and takes no connection") {
  CancellationSource source;
  source.cancel();
  Listener listener;
  const UniqueFd client = listener.connect();
  CHECK_FALSE(lastcall::accept(listener.fd(), source.token()));
  CHECK(support::is_readable(listener.fd()));
  CHECK_FALSE(lastcall::accept(closed_descriptor(), source.token()));
}

TEST_CASE("accept: a cancel ends it") {
  for (const bool blocking : {true, false}) {
    CancellationSource source;
    const Listener listener(blocking);
    AcceptLoop loop;
    support::Threads threads;
    threads.start([&] { loop.run(listener.fd(), source.token()); });
    support::let_it_block(loop.thread);
    source.cancel();
    threads.join();
    CHECK(loop.accepted == 0);
    CHECK_FALSE(loop.failed);
  }
}

TEST_CASE("accept: none of several loops on one blocking listener blocks past the token") {
  // Every connection tells all loops that one is there; one gets it, the others find themselves in an
  // accept(2) that blocks.
  constexpr int count = 6;
  constexpr int rounds = support::under_sanitizer ? 5 : 20;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    Listener listener;
    const int flags = listener.flags();
    AcceptLoop loops[count];
    support::Threads threads;
    for (AcceptLoop& loop : loops) {
      threads.start([&] { loop.run(listener.fd(), source.token()); });
    }
    const auto sum = [&] {
      int accepted = 0;
      for (const AcceptLoop& loop : loops) accepted += loop.accepted;
      return accepted;
    };
    constexpr int connections = 30;
    for (int i = 0; i < connections; ++i) listener.connect();
    REQUIRE(support::eventually([&] { return sum() == connections; }));
    for (AcceptLoop& loop : loops) support::let_it_block(loop.thread);
    CHECK(listener.flags() == flags);
    source.cancel();
    for (const AcceptLoop& loop : loops) {
      REQUIRE(support::eventually([&] { return loop.over.load(); }));
      CHECK_FALSE(loop.failed);
    }
    threads.join();
    CHECK(sum() == connections);
    CHECK(listener.flags() == flags);
  }
}

// The signals that are blocked in the calling thread.
std::vector<bool> blocked_signals() {
  sigset_t mask;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  std::vector<bool> blocked;
  for (int number = 1; number < NSIG; ++number)
    blocked.push_back(::sigismember(&mask, number) == 1);
  return blocked;
}

bool any_signal_pending() {
  sigset_t pending;
  ::sigpending(&pending);
  for (int number = 1; number < NSIG; ++number) {
    if (::sigismember(&pending, number) == 1) return true;
  }
  return false;
}

TEST_CASE("accept: nor does one whose connection a stranger takes, whatever signals are blocked") {
  // poll(2) has said that one is there, and then accept(2) finds none. What was blocked stays blocked, and
  // nothing is left pending.
  for (const bool block_all : {false, true}) {
    CancellationSource source;
    Listener listener;
    const int flags = listener.flags();
    AcceptLoop loop;
    std::atomic<bool> clean{false};
    taken_by_stranger = 0;
    stranger_is_quicker = true;
    support::Threads threads;
    threads.start([&] {
      std::optional<lastcall::detail::BlockAllSignals> quiet;
      if (block_all) quiet.emplace();
      const std::vector<bool> before = blocked_signals();
      loop.run(listener.fd(), source.token());
      clean = blocked_signals() == before && !any_signal_pending();
    });
    be_robbed(listener, loop);
    CHECK_FALSE(loop.over);
    CHECK(listener.flags() == flags);
    source.cancel();
    CHECK(support::eventually([&] { return loop.over.load(); }));
    if (!loop.over) listener.connect();
    threads.join();
    CHECK(clean);
    CHECK(loop.accepted == 0);
    CHECK_FALSE(loop.failed);
  }
}

TEST_CASE("accept: a cancel that comes just before it would block is not lost") {
  // The signal interrupts what the thread is in, which is not accept(2) yet.
  CancellationSource source;
  Listener listener;
  const UniqueFd client = listener.connect();
  AcceptLoop loop;
  Brink here;
  stranger_is_quicker = true;
  brink_of_accept = &here;
  support::Threads threads;
  threads.start([&] { loop.run(listener.fd(), source.token()); });
  REQUIRE(here.reached.wait());
  stranger_is_quicker = false;
  source.cancel();
  std::this_thread::sleep_for(20ms);
  here.leap.open();
  CHECK(support::eventually([&] { return loop.over.load(); }));
  if (!loop.over) listener.connect();
  threads.join();
  CHECK(loop.accepted == 0);
}

TEST_CASE("accept: a cancel ends it without waiting for any callback") {
  // The loop is in accept(2), and the callback was made after it went there.
  CancellationSource source;
  Listener listener;
  AcceptLoop loop;
  taken_by_stranger = 0;
  stranger_is_quicker = true;
  support::Threads threads;
  threads.start([&] { loop.run(listener.fd(), source.token()); });
  be_robbed(listener, loop);
  bool ended_first = false;
  const auto wait_for_it = [&] {
    ended_first = support::eventually([&] { return loop.over.load(); }, 20s);
  };
  const lastcall::CancellationCallback callback(source.token(), wait_for_it);
  CHECK(source.cancel());
  CHECK(ended_first);
  threads.join();
  CHECK(loop.accepted == 0);
}

TEST_CASE("accept: nor is a cancel lost while a deadline's callback waits for the loop") {
  const CancellationSource source(CancellationToken(), 200ms);
  Listener listener;
  AcceptLoop loop;
  Brink here;
  std::atomic<bool> is_out{false};
  const auto join = [&] {
    here.reached.wait();
    stranger_is_quicker = false;
    std::this_thread::sleep_for(20ms);
    here.leap.open();
    is_out = support::eventually([&] { return loop.over.load(); }, 20s);
    if (!is_out) listener.connect();
  };
  const lastcall::CancellationCallback callback(source.token(), join);
  stranger_is_quicker = true;
  brink_of_accept = &here;
  support::Threads threads;
  const UniqueFd client = listener.connect();
  threads.start([&] { loop.run(listener.fd(), source.token()); });
  CHECK(support::eventually([&] { return here.reached.is_open() || loop.over; }));
  here.reached.open();  // on a slow machine it was cancelled before it came there
  threads.join();
  brink_of_accept = nullptr;
  stranger_is_quicker = false;
  CHECK(support::eventually([&] { return is_out.load(); }));
}

TEST_CASE(
    "accept: with no thread to be had it throws on a blocking listener, and no connection is "
    "lost") {
  if (support::under_tsan) return;
  for (const bool blocking : {true, false}) {
    Listener listener(blocking);
    const UniqueFd client = listener.connect();
    CHECK(support::in_child_process([&] {
            CancellationSource source;
            if (!no_more_threads()) return 2;
            if (blocking) {
              const int error = error_of([&] { lastcall::accept(listener.fd(), source.token()); },
                                         "starting the thread that wakes blocked calls");
              if (error != EAGAIN || any_signal_pending()) return 3;
            } else {
              const UniqueFd server(lastcall::accept(listener.fd(), source.token()).value_or(-1));
              return server ? 0 : 4;
            }
            return source.cancel() && support::is_readable(listener.fd()) ? 0 : 5;
          }) == 0);
  }
}

TEST_CASE("accept: a connection that comes to one who was robbed before is taken") {
  CancellationSource source;
  Listener listener;
  AcceptLoop loop;
  taken_by_stranger = 0;
  stranger_is_quicker = true;
  support::Threads threads;
  threads.start([&] { loop.run(listener.fd(), source.token()); });
  be_robbed(listener, loop);
  listener.connect();
  CHECK(support::eventually([&] { return loop.accepted == 1; }));
  source.cancel();
  threads.join();
  CHECK(loop.accepted == 1);
}

TEST_CASE("accept: a signal that comes too late is taken away again") {
  CancellationSource source;
  const int number = lastcall::detail::interrupt_signal();
  REQUIRE(number > 0);
  const lastcall::detail::BlockAllSignals quiet;
  // As if it had come between the end of the call and the blocking of the signal.
  const int result = lastcall::detail::Interruptible{}.run(source.token(), [number]() noexcept {
    sigset_t only;
    ::sigemptyset(&only);
    ::sigaddset(&only, number);
    ::pthread_sigmask(SIG_BLOCK, &only, nullptr);
    ::pthread_kill(::pthread_self(), number);
    errno = EINVAL;
    return -1;
  });
  CHECK(errno == EINVAL);
  CHECK(result == -1);
  CHECK_FALSE(any_signal_pending());
}

TEST_CASE("accept: nor do loops in several processes on one blocking listener") {
  constexpr int count = 4;
  Listener listener;
  const int flags = listener.flags();
  lastcall::detail::Pipe wishes = lastcall::detail::make_pipe("testing");
  lastcall::detail::Pipe news = lastcall::detail::make_pipe("testing");
  std::vector<pid_t> children;
  stranger_is_quicker = true;
  for (int i = 0; i < count; ++i) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      wishes.write_end.reset();
      CancellationSource source;
      AcceptLoop loop;
      std::thread canceller([&] {
        support::eventually([] { return taken_by_stranger > 0; });
        support::let_it_block(loop.thread);
        if (::write(news.write_end.get(), "x", 1) != 1) ::_exit(2);
        support::is_readable(wishes.read_end.get(), -1);  // ends when the parent closes its end
        source.cancel();
      });
      loop.run(listener.fd(), source.token());
      canceller.join();
      ::_exit(loop.failed ? 1 : 0);
    }
    children.push_back(child);
  }
  stranger_is_quicker = false;
  // Each is robbed of a connection, and then sits in an accept(2) that blocks, unless it gets another's.
  int robbed = 0;
  REQUIRE(support::eventually([&] {
    listener.connect();
    char byte = 0;
    while (::read(news.read_end.get(), &byte, 1) == 1) ++robbed;
    return robbed == count;
  }));
  CHECK(listener.flags() == flags);
  wishes.write_end.reset();
  for (const pid_t child : children) CHECK(support::outcome_of(child) == 0);
}

TEST_CASE("accept: cancels and connections at the same time lose no connection") {
  constexpr int rounds = support::under_sanitizer ? 100 : 500;
  support::Random random(11);
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    Listener listener;
    AcceptLoop loops[2];
    support::Threads threads;
    for (AcceptLoop& loop : loops) {
      threads.start([&] { loop.run(listener.fd(), source.token()); });
    }
    threads.start([&, delay = random.below(8'000)] {
      // Sometimes before all connections, sometimes after. No yield: on a busy machine each would cost milliseconds.
      for (std::size_t spin = 0; spin < delay; ++spin) static_cast<void>(Clock::now());
      source.cancel();
    });
    std::vector<UniqueFd> clients;
    for (int i = 0; i < 4; ++i) clients.push_back(listener.connect());
    threads.join();
    // Taken, or still there for the next one to take.
    int left = 0;
    while (support::is_readable(listener.fd())) {
      const UniqueFd got(::accept(listener.fd(), nullptr, nullptr));
      ++left;
    }
    REQUIRE(loops[0].accepted + loops[1].accepted + left == 4);
  }
}

TEST_CASE("accept: interruptions and connections that are gone again are retried") {
  const CancellationSource source;
  Listener listener;
  for (const int error : {EINTR, ECONNABORTED, EAGAIN, EPROTO, ENETDOWN, EHOSTUNREACH}) {
    const UniqueFd client = listener.connect();
    {
      const std::lock_guard<std::mutex> lock(planned_errors_mutex);
      planned_errors = {error, error, error};
    }
    const std::optional<int> got = lastcall::accept(listener.fd(), source.token());
    REQUIRE(got);
    ::close(*got);
    CHECK(planned_errors.empty());
  }
}

TEST_CASE("accept: with no descriptors or no memory left it waits 10 ms and tries again") {
  const CancellationSource source;
  Listener listener;
  for (const int error : {EMFILE, ENFILE, ENOBUFS, ENOMEM}) {
    const UniqueFd client = listener.connect();
    {
      const std::lock_guard<std::mutex> lock(planned_errors_mutex);
      planned_errors = {error, error};
    }
    const Clock::time_point before = Clock::now();
    const std::optional<int> got = lastcall::accept(listener.fd(), source.token());
    REQUIRE(got);
    ::close(*got);
    CHECK(planned_errors.empty());
    CHECK(Clock::now() - before >= 20ms);
  }
}

TEST_CASE("accept: a cancel ends that wait too") {
  CancellationSource source;
  Listener listener;
  const UniqueFd client = listener.connect();
  {
    const std::lock_guard<std::mutex> lock(planned_errors_mutex);
    planned_errors.assign(1'000'000, EMFILE);
  }
  AcceptLoop loop;
  support::Threads threads;
  threads.start([&] { loop.run(listener.fd(), source.token()); });
  std::this_thread::sleep_for(30ms);
  CHECK_FALSE(loop.over);
  source.cancel();
  threads.join();
  CHECK(loop.accepted == 0);
  CHECK_FALSE(loop.failed);
  const std::lock_guard<std::mutex> lock(planned_errors_mutex);
  CHECK(planned_errors.size() > 900'000);  // it doesn't spin
  planned_errors.clear();
}

TEST_CASE("accept: with really no descriptor left, not even the token's, it waits for one") {
  Listener listener;
  CHECK(support::in_child_process([&] {
          const CancellationSource source;
          const UniqueFd client = listener.connect();
          const int spare = ::dup(0);
          const rlimit none{static_cast<rlim_t>(spare) + 1, 4096};
          if (::setrlimit(RLIMIT_NOFILE, &none) != 0) return 2;
          std::thread rescue([&] {
            std::this_thread::sleep_for(50ms);
            const rlimit more{static_cast<rlim_t>(spare) + 8, 4096};
            ::setrlimit(RLIMIT_NOFILE, &more);
          });
          const std::optional<int> got = lastcall::accept(listener.fd(), source.token());
          rescue.join();
          return got ? 0 : 1;
        }) == 0);
}

TEST_CASE("accept: other errors throw, and the message names the descriptor") {
  const CancellationSource source;
  Listener listener;
  const UniqueFd client = listener.connect();
  {
    const std::lock_guard<std::mutex> lock(planned_errors_mutex);
    planned_errors = {EPERM};
  }
  CHECK(error_of([&] { lastcall::accept(listener.fd(), source.token()); },
                 "descriptor " + std::to_string(listener.fd())) == EPERM);
  const int closed = closed_descriptor();
  CHECK(error_of([&] { lastcall::accept(closed, source.token()); },
                 "descriptor " + std::to_string(closed)) == EBADF);
  CHECK(error_of([&] { lastcall::accept(-1, source.token()); }, "descriptor -1") == EBADF);
  const lastcall::detail::Pipe pipe = lastcall::detail::make_pipe("testing");
  CHECK(error_of([&] { lastcall::accept(pipe.read_end.get(), source.token()); }, "descriptor ") ==
        ENOTSOCK);
  const Pair pair;
  CHECK(error_of([&] { lastcall::accept(pair.here.get(), source.token()); }, "not listening") ==
        EINVAL);
}

TEST_CASE("accept: a signal that is somebody's is left to them") {
  // Whatever number accept() chose is taken over by a handler of the program's: another is chosen.
  const int first = lastcall::detail::interrupt_signal();
  REQUIRE(first > 0);
  CHECK(lastcall::detail::interrupt_signal() == first);
  static std::atomic<int> received{0};
  struct sigaction mine {};
  mine.sa_handler = [](int) { ++received; };
  struct sigaction before {};
  REQUIRE(::sigaction(first, &mine, &before) == 0);
  const int second = lastcall::detail::interrupt_signal();
  CHECK(second > 0);
  CHECK(second != first);

  CancellationSource source;
  Listener listener;
  AcceptLoop loops[3];
  support::Threads threads;
  for (AcceptLoop& loop : loops) {
    threads.start([&] { loop.run(listener.fd(), source.token()); });
  }
  for (AcceptLoop& loop : loops) support::let_it_block(loop.thread);
  listener.connect();
  for (AcceptLoop& loop : loops) support::let_it_block(loop.thread);
  source.cancel();
  threads.join();
  CHECK(received == 0);
  struct sigaction now {};
  ::sigaction(first, &before, &now);
  CHECK(now.sa_handler == mine.sa_handler);
}

}  // namespace
