// Deadlines: made and cancelled again, as nearly all of them are; and 100,000 that come due in one second.
#include "batch.hpp"
#include "cases.hpp"

#include <lastcall/cancellation.hpp>

#include <sys/resource.h>

#include <memory>
#include <optional>

namespace bench {
namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;

struct Fired {
  double cpu_seconds;
  double p99_seconds;
  double earliest_seconds;  // of all latenesses: below zero means that one was early
};

double cpu_seconds() {
  timespec spent{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
  return static_cast<double>(spent.tv_sec) + 1e-9 * static_cast<double>(spent.tv_nsec);
}

constexpr std::size_t deadlines = 100'000;

Clock::time_point due(Clock::time_point start, std::size_t at) {
  return start + std::chrono::nanoseconds(10'000) * at;
}

Fired judge(std::vector<Clock::duration> late, double spent) {
  std::sort(late.begin(), late.end());
  const auto seconds = [](Clock::duration span) {
    return std::chrono::duration<double>(span).count();
  };
  return {spent, seconds(late[late.size() * 99 / 100]), seconds(late.front())};
}

// Each is made with its child; a callback notes how late it is. All of it counts, but for letting go.
Fired fire_ours() {
  struct Note {
    Clock::duration* late;
    Clock::time_point when;
    std::atomic<std::size_t>* fired;
    void operator()() const {
      *late = Clock::now() - when;
      fired->fetch_add(1, std::memory_order_relaxed);
    }
  };
  std::vector<Clock::duration> late(deadlines);
  std::atomic<std::size_t> fired{0};
  const CancellationSource root;
  const CancellationToken parent = root.token();
  std::vector<CancellationSource> sources;
  sources.reserve(deadlines);
  const auto callbacks = std::make_unique<std::optional<CancellationCallback<Note>>[]>(deadlines);
  const double before = cpu_seconds();
  const auto start = Clock::now() + std::chrono::milliseconds(300);
  for (std::size_t i = 0; i < deadlines; ++i) {
    sources.emplace_back(parent, due(start, i));
    callbacks[i].emplace(sources[i].token(), Note{&late[i], due(start, i), &fired});
  }
  while (fired.load() < deadlines) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  return judge(std::move(late), cpu_seconds() - before);
}

// The bare limit: a sorted array that is looked at each millisecond, with the same notes.
Fired fire_sorted_array() {
  std::vector<Clock::duration> late(deadlines);
  std::vector<Clock::time_point> array(deadlines);
  const double before = cpu_seconds();
  const auto start = Clock::now() + std::chrono::milliseconds(300);
  for (std::size_t i = 0; i < deadlines; ++i) array[i] = due(start, i);
  std::size_t fired = 0;
  for (auto tick = start; fired < deadlines; tick += std::chrono::milliseconds(1)) {
    std::this_thread::sleep_until(tick);
    for (const auto now = Clock::now(); fired < deadlines && array[fired] <= now; ++fired) {
      late[fired] = Clock::now() - array[fired];
    }
  }
  return judge(std::move(late), cpu_seconds() - before);
}

}  // namespace

void add_deadline_cases() {
  add_pair("deadline", "lastcall", [] {
    auto parent = std::make_shared<CancellationSource>();
    return [parent, token = parent->token()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        CancellationSource child(token, std::chrono::hours(1));
        child.cancel();
      }
    };
  });
  // One run, three figures; each is asked for on its own.
  static std::optional<Fired> last;
  add_timed_case("deadlines_fire@lastcall", [] {
    last = fire_ours();
    return last->cpu_seconds;
  });
  add_timed_case("deadlines_late@lastcall", [] {
    if (!last) last = fire_ours();
    return last->p99_seconds;
  });
  add_timed_case("deadlines_early@lastcall", [] {
    if (!last) last = fire_ours();
    return std::max(0.0, -last->earliest_seconds);
  });
  static std::optional<Fired> last_bare;
  add_timed_case("deadlines_fire@bare", [] {
    last_bare = fire_sorted_array();
    return last_bare->cpu_seconds;
  });
  add_timed_case("deadlines_late@bare", [] {
    if (!last_bare) last_bare = fire_sorted_array();
    return last_bare->p99_seconds;
  });
}

Idle idle_waiters(double seconds) {
  constexpr std::size_t waiters = 1000;
  CancellationSource source;
  std::atomic<std::size_t> waiting{0};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < waiters; ++i) {
    threads.emplace_back([token = source.token(), &waiting] {
      ++waiting;
      token.wait();
    });
  }
  while (waiting.load() < waiters) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  rusage before{};
  rusage after{};
  getrusage(RUSAGE_SELF, &before);
  const double cpu_before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  const double cpu = cpu_seconds() - cpu_before;
  getrusage(RUSAGE_SELF, &after);
  source.cancel();
  for (std::thread& thread : threads) thread.join();
  // Less this thread's own one sleep.
  return {cpu, after.ru_nvcsw - before.ru_nvcsw - 1};
}

}  // namespace bench
