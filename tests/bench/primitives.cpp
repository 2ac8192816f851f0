// The primitives beside their peers in one process: the table of ratios that cmake/bench.cmake prints.
#include "batch.hpp"
#include "table.hpp"

#include <lastcall/cancellation.hpp>
#include <lastcall/wait_group.hpp>

#include <linux/futex.h>
#include <malloc.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <stop_token>
#include <vector>

namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::WaitGroup;

// What a child of a std::stop_source is: a source, and a callback on the parent that stops it.
struct StdChild {
  struct Stop {
    std::stop_source* child;
    void operator()() const { child->request_stop(); }
  };
  explicit StdChild(const std::stop_token& parent) : link(parent, Stop{&source}) {}
  std::stop_source source;
  std::stop_callback<Stop> link;
};

struct Nothing {
  void operator()() const noexcept {}
};

// ---- checking ----

void add_checks() {
  for (const unsigned threads : {1U, 2U}) {
    const std::string suffix = "/" + std::to_string(threads);
    static std::atomic<int> word{0};
    bench::add_case("check/bare" + suffix, threads, [](unsigned, std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        benchmark::DoNotOptimize(word.load(std::memory_order_acquire) & 2);
      }
    });
    for (const int depth : {1, 8}) {
      static std::vector<CancellationSource> chain;
      while (chain.size() < 8) {
        chain.emplace_back(chain.empty() ? CancellationToken() : chain.back().token());
      }
      const CancellationToken token = chain[static_cast<std::size_t>(depth) - 1].token();
      bench::add_case("check/lastcall_depth_" + std::to_string(depth) + suffix, threads,
                      [token](unsigned, std::size_t operations) {
                        for (std::size_t i = 0; i < operations; ++i) {
                          benchmark::DoNotOptimize(token.is_cancelled());
                        }
                      });
    }
    static std::stop_source source;
    bench::add_case("check/std" + suffix, threads, [](unsigned, std::size_t operations) {
      const std::stop_token token = source.get_token();
      for (std::size_t i = 0; i < operations; ++i) {
        benchmark::DoNotOptimize(token.stop_requested());
      }
    });
  }
}

// ---- children and callbacks ----

void add_children() {
  static CancellationSource ours;
  static std::stop_source theirs;
  for (const unsigned threads : {1U, 2U}) {
    const std::string suffix = "/" + std::to_string(threads);
    // Made anew for each thread count: shards grown under two threads are not there for one.
    auto parent = std::make_shared<CancellationSource>();
    bench::add_case("child/lastcall" + suffix, threads,
                    [parent, token = parent->token()](unsigned, std::size_t operations) {
                      for (std::size_t i = 0; i < operations; ++i) {
                        CancellationSource child(token);
                        benchmark::DoNotOptimize(child);
                      }
                    });
    bench::add_case("child/std" + suffix, threads, [](unsigned, std::size_t operations) {
      const std::stop_token token = theirs.get_token();
      for (std::size_t i = 0; i < operations; ++i) {
        StdChild child(token);
        benchmark::DoNotOptimize(child);
      }
    });
    auto called = std::make_shared<CancellationSource>();
    bench::add_case("callback/lastcall" + suffix, threads,
                    [called, token = called->token()](unsigned, std::size_t operations) {
                      for (std::size_t i = 0; i < operations; ++i) {
                        CancellationCallback callback(token, Nothing{});
                        benchmark::DoNotOptimize(callback);
                      }
                    });
    bench::add_case("callback/std" + suffix, threads, [](unsigned, std::size_t operations) {
      const std::stop_token token = theirs.get_token();
      for (std::size_t i = 0; i < operations; ++i) {
        std::stop_callback callback(token, Nothing{});
        benchmark::DoNotOptimize(callback);
      }
    });
    auto timed = std::make_shared<CancellationSource>();
    bench::add_case("deadline/lastcall" + suffix, threads,
                    [timed, token = timed->token()](unsigned, std::size_t operations) {
                      for (std::size_t i = 0; i < operations; ++i) {
                        CancellationSource child(token, std::chrono::hours(1));
                        child.cancel();
                      }
                    });
  }
}

// ---- big trees ----

constexpr std::size_t many = 1'000'000;

// Time a node to cancel, and to destroy, a tree that `grow` makes.
template <class Grow>
void add_tree(const std::string& name, Grow grow) {
  for (const bool destroying : {false, true}) {
    bench::add_timed_case(name + (destroying ? "_destroy" : "_cancel") + "/lastcall",
                          [grow, destroying] {
                            std::vector<CancellationSource> nodes;
                            nodes.reserve(many + 1);
                            grow(nodes);
                            auto start = bench::Clock::now();
                            nodes.front().cancel();
                            if (!destroying) return bench::seconds_since(start) / many;
                            start = bench::Clock::now();
                            nodes.clear();
                            return bench::seconds_since(start) / many;
                          });
  }
}

void add_trees() {
  add_tree("wide", [](std::vector<CancellationSource>& nodes) {
    nodes.emplace_back();
    const CancellationToken root = nodes.front().token();
    for (std::size_t i = 0; i < many; ++i) nodes.emplace_back(root);
  });
  add_tree("chain", [](std::vector<CancellationSource>& nodes) {
    nodes.emplace_back();
    for (std::size_t i = 0; i < many; ++i) nodes.emplace_back(nodes.back().token());
  });
  for (const bool destroying : {false, true}) {
    bench::add_timed_case(std::string("wide") + (destroying ? "_destroy" : "_cancel") + "/std",
                          [destroying] {
                            std::stop_source root;
                            std::vector<std::unique_ptr<StdChild>> nodes;
                            nodes.reserve(many);
                            for (std::size_t i = 0; i < many; ++i) {
                              nodes.push_back(std::make_unique<StdChild>(root.get_token()));
                            }
                            auto start = bench::Clock::now();
                            root.request_stop();
                            if (!destroying) return bench::seconds_since(start) / many;
                            start = bench::Clock::now();
                            nodes.clear();
                            return bench::seconds_since(start) / many;
                          });
  }
}

// ---- memory ----

std::size_t resident_bytes() {
  std::size_t pages = 0;
  std::size_t resident = 0;
  if (std::FILE* const file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%zu %zu", &pages, &resident) != 2) resident = 0;
    std::fclose(file);
  }
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

template <class Make>
double bytes_each(Make make) {
  malloc_trim(0);
  const std::size_t before = resident_bytes();
  const auto kept = make();
  benchmark::DoNotOptimize(kept);
  return static_cast<double>(resident_bytes() - before) / many;
}

// ---- the group ----

void add_groups() {
  static WaitGroup group;
  struct alignas(128) Counter {
    std::atomic<std::size_t> value{0};
  };
  static Counter shared;
  for (const unsigned threads : {1U, 2U}) {
    const std::string suffix = "/" + std::to_string(threads);
    bench::add_case("guard/lastcall" + suffix, threads, [](unsigned, std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        WaitGroup::Guard guard = group.enter();
        benchmark::DoNotOptimize(guard);
      }
    });
    bench::add_case("guard/bare_pair" + suffix, threads, [](unsigned, std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        shared.value.fetch_add(1, std::memory_order_acq_rel);
        shared.value.fetch_sub(1, std::memory_order_acq_rel);
      }
    });
  }
}

// ---- the last one out wakes the waiter, all on one processor ----

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// A sleeper and a waker on processor 0. sleep(round) blocks until wake(round); the time from just before
// wake() until the sleeper runs.
template <class Sleep, class Prepare, class Wake>
double wake_latency(Prepare prepare, Sleep sleep, Wake wake) {
  constexpr int rounds = 2000;
  std::atomic<int> asleep{-1};
  std::atomic<bool> next{false};
  double total = 0;
  bench::Clock::time_point woken_at;
  bench::pin_to(0);
  std::thread sleeper([&] {
    bench::pin_to(0);
    for (int round = 0; round < rounds; ++round) {
      prepare(round);
      asleep.store(round, std::memory_order_release);
      sleep(round);
      woken_at = bench::Clock::now();
      next.store(true, std::memory_order_release);
    }
  });
  for (int round = 0; round < rounds; ++round) {
    while (asleep.load(std::memory_order_acquire) != round) sched_yield();
    // On one processor: the sleeper announced itself, and yielding once lets it block.
    for (int turn = 0; turn < 3; ++turn) sched_yield();
    const auto start = bench::Clock::now();
    wake(round);
    while (!next.exchange(false, std::memory_order_acq_rel)) sched_yield();
    total += std::chrono::duration<double>(woken_at - start).count();
  }
  sleeper.join();
  bench::unpin();
  return total / rounds;
}

void add_wakes() {
  bench::add_timed_case("last_out/lastcall", [] {
    std::optional<WaitGroup> group;
    std::optional<WaitGroup::Guard> guard;
    return wake_latency(
        [&](int) {
          guard.reset();
          group.emplace();
          guard.emplace(group->enter());
        },
        [&](int) { group->wait(); }, [&](int) { guard->release(); });
  });
  bench::add_timed_case("last_out/bare_futex", [] {
    std::atomic<std::uint32_t> word{0};
    return wake_latency([&](int) { word.store(1); },
                        [&](int) {
                          while (word.load(std::memory_order_acquire) != 0) futex_wait(word, 1);
                        },
                        [&](int) {
                          word.store(0, std::memory_order_release);
                          futex_wake(word);
                        });
  });
  bench::add_timed_case("wake/lastcall", [] {
    std::optional<CancellationSource> source;
    CancellationToken token;
    return wake_latency(
        [&](int) {
          source.emplace();
          token = source->token();
        },
        [&](int) { token.wait(); }, [&](int) { source->cancel(); });
  });
}

// ---- deadlines that fire ----

struct Lateness {
  double cpu_seconds;
  double p99_seconds;
};

double cpu_seconds() {
  timespec spent{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
  return static_cast<double>(spent.tv_sec) + 1e-9 * static_cast<double>(spent.tv_nsec);
}

// 100,000 deadlines spread over a second; each callback notes how late it is.
Lateness fire_lastcall() {
  constexpr std::size_t count = 100'000;
  std::vector<bench::Clock::duration> late(count);
  std::atomic<std::size_t> fired{0};
  const CancellationSource root;
  const CancellationToken parent = root.token();
  std::vector<CancellationSource> sources;
  sources.reserve(count);
  const auto start = bench::Clock::now() + std::chrono::milliseconds(200);
  for (std::size_t i = 0; i < count; ++i) {
    sources.emplace_back(parent, start + std::chrono::microseconds(10) * i);
  }
  struct Note {
    bench::Clock::duration* late;
    bench::Clock::time_point due;
    std::atomic<std::size_t>* fired;
    void operator()() const {
      *late = bench::Clock::now() - due;
      fired->fetch_add(1, std::memory_order_relaxed);
    }
  };
  const auto callbacks = std::make_unique<std::optional<CancellationCallback<Note>>[]>(count);
  for (std::size_t i = 0; i < count; ++i) {
    callbacks[i].emplace(sources[i].token(),
                         Note{&late[i], start + std::chrono::microseconds(10) * i, &fired});
  }
  const double before = cpu_seconds();
  while (fired.load() < count) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double spent = cpu_seconds() - before;
  std::sort(late.begin(), late.end());
  return {spent, std::chrono::duration<double>(late[count * 99 / 100]).count()};
}

// The bare limit: a sorted array that is looked at every millisecond, with the same note.
Lateness fire_sorted_array() {
  constexpr std::size_t count = 100'000;
  std::vector<bench::Clock::duration> late(count);
  const auto start = bench::Clock::now() + std::chrono::milliseconds(200);
  const double before = cpu_seconds();
  std::size_t fired = 0;
  for (auto tick = start; fired < count; tick += std::chrono::milliseconds(1)) {
    std::this_thread::sleep_until(tick);
    while (fired < count && start + std::chrono::microseconds(10) * fired <= bench::Clock::now()) {
      late[fired] = bench::Clock::now() - (start + std::chrono::microseconds(10) * fired);
      ++fired;
    }
  }
  const double spent = cpu_seconds() - before;
  std::sort(late.begin(), late.end());
  return {spent, std::chrono::duration<double>(late[count * 99 / 100]).count()};
}

void add_firing() {
  bench::add_timed_case("fire_cpu/lastcall", [] { return fire_lastcall().cpu_seconds; });
  bench::add_timed_case("fire_p99/lastcall", [] { return fire_lastcall().p99_seconds; });
  bench::add_timed_case("fire_cpu/sorted_array", [] { return fire_sorted_array().cpu_seconds; });
}

void add_memory() {
  bench::add_timed_case("bytes/lastcall", [] {
    const CancellationSource root;
    return 1e-9 * bytes_each([token = root.token()] {
             std::vector<CancellationSource> children;
             children.reserve(many);
             for (std::size_t i = 0; i < many; ++i) children.emplace_back(token);
             return children;
           });
  });
  bench::add_timed_case("bytes/std", [] {
    const std::stop_source root;
    return 1e-9 * bytes_each([&root] {
             auto children = std::make_unique<std::optional<StdChild>[]>(many);
             for (std::size_t i = 0; i < many; ++i) children[i].emplace(root.get_token());
             return children;
           });
  });
}

const bench::Row rows[] = {
    {"is_cancelled(), depth 1, 1 thread", "check/lastcall_depth_1/1", "check/bare/1", 1.15},
    {"is_cancelled(), depth 8, 1 thread", "check/lastcall_depth_8/1", "check/bare/1", 1.15},
    {"is_cancelled(), depth 1, 2 threads", "check/lastcall_depth_1/2", "check/bare/2", 1.15},
    {"is_cancelled(), depth 8, 2 threads", "check/lastcall_depth_8/2", "check/bare/2", 1.15},
    {"the same beside std, 1 thread", "check/lastcall_depth_1/1", "check/std/1", 0},
    {"child made and destroyed, 1 thread", "child/lastcall/1", "child/std/1", 0.5},
    {"child, 2 threads beside its own 1", "child/lastcall/2", "child/lastcall/1", 1.3},
    {"child, 2 threads beside std", "child/lastcall/2", "child/std/2", 0},
    {"callback in and out, 1 thread", "callback/lastcall/1", "callback/std/1", 0.5},
    {"callback, 2 threads beside its own 1", "callback/lastcall/2", "callback/lastcall/1", 1.3},
    {"callback, 2 threads beside std", "callback/lastcall/2", "callback/std/2", 0},
    {"cancel a root with 10^6 children", "wide_cancel/lastcall", "wide_cancel/std", 0.5},
    {"cancel a chain of 10^6", "chain_cancel/lastcall", "wide_cancel/std", 0},
    {"destroy the root's tree", "wide_destroy/lastcall", "wide_destroy/std", 0.6},
    {"destroy the chain", "chain_destroy/lastcall", "wide_destroy/std", 0.6},
    {"resident bytes a child", "bytes/lastcall", "bytes/std", 0},
    {"guard in and out, 1 thread", "guard/lastcall/1", "guard/bare_pair/1", 0.7},
    {"guard, 2 threads beside its own 1", "guard/lastcall/2", "guard/lastcall/1", 1.15},
    {"guard, 2 threads beside a bare pair", "guard/lastcall/2", "guard/bare_pair/2", 0},
    {"last guard out -> waiter runs (1 CPU)", "last_out/lastcall", "last_out/bare_futex", 1.15},
    {"cancel() -> waiter runs (1 CPU)", "wake/lastcall", "last_out/bare_futex", 0},
    {"deadline made and cancelled, 1 thread", "deadline/lastcall/1", nullptr, 0},
    {"deadline, 2 threads beside its own 1", "deadline/lastcall/2", "deadline/lastcall/1", 2},
    {"10^5 deadlines fire: CPU", "fire_cpu/lastcall", "fire_cpu/sorted_array", 2},
    {"10^5 deadlines fire: p99 lateness", "fire_p99/lastcall", nullptr, 0},
};

}  // namespace

int main(int argc, char** argv) {
  add_checks();
  add_children();
  add_trees();
  add_groups();
  add_wakes();
  add_firing();
  add_memory();
  return bench::run_and_print(argc, argv, rows);
}
