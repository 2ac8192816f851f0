// Random operations by many threads on a forest of cancellation nodes, checked against what the
// contract promises about any interleaving.
//
//   cancellation_stress [--seconds N | --minutes N] [--seed S] [--threads T]     T = 0: from 2 to 16, at random
//
// The run is cut into epochs. In each, threads make, merge, share, cancel, wait on, poll and drop nodes
// and callbacks, also from inside callbacks. At its end the threads are joined, every promise is checked
// once more in peace, everything is let go, and no allocation may be left.
//
// What is checked (the words in brackets are printed when it fails):
//  [descendant]  an ancestor is seen cancelled, or its cancel() that was true has returned: so is the node
//  [own]         after any cancel() of a node, true or false, the node is cancelled
//  [cause]       a cause never changes, is there once cancelled, and is its own winner's or an ancestor's
//  [once]        a callback runs at most once, and exactly once if it still hung there when cancelled
//  [in ctor]     one made on a cancelled token has run when its constructor returns
//  [dead]        none runs, or still runs, when its destructor has returned
//  [spurious]    none runs, and no wait or descriptor says so, before the token is cancelled
//  [silent]      a descriptor of a cancelled token polls readable
//  [early]       no deadline fires, and no wait times out, before its time
//  [leak]        allocations and callables are as many after as before
#include <lastcall/cancellation.hpp>

#include "support/allocations.hpp"
#include "support/threads.hpp"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::Clock;
using support::live_allocations;
using support::Random;
using namespace std::chrono_literals;

std::uint64_t run_seed = 0;
std::uint64_t epoch_now = 0;

[[noreturn]] void fail(const char* promise, const char* detail) {
  std::fprintf(stderr, "cancellation_stress: [%s] %s (seed %llu, epoch %llu)\n", promise, detail,
               static_cast<unsigned long long>(run_seed),
               static_cast<unsigned long long>(epoch_now));
  std::fflush(stderr);
  std::abort();
}
void check(bool holds, const char* promise, const char* detail) {
  if (!holds) fail(promise, detail);
}

/// What the test knows of a node. It outlives the node, and keeps it alive only if `watched`.
struct Record {
  std::vector<std::shared_ptr<Record>> parents;
  std::size_t height = 0;
  std::optional<CancellationToken> watched;
  std::optional<Clock::time_point> deadline;  // its own
  std::atomic<bool> cancel_done{
      false};  // a cancel() that was true has returned, or its source is gone
  std::atomic<bool> cancel_begun_unnamed{
      false};  // its source's destructor cancels, with no cause of its own
  std::atomic<std::uint64_t> winner{0};  // the number in the cause of the cancel() that was true
};

/// A source with its record. Shared: whoever lets go last destroys the source.
struct Owner {
  Owner(CancellationSource given, std::shared_ptr<Record> about, bool arms)
      : source(std::move(given)), record(std::move(about)), armed(arms) {}
  ~Owner() {
    if (!armed) return;
    record->cancel_begun_unnamed = true;
    { const CancellationSource goes = std::move(source); }
    record->cancel_done = true;
  }
  CancellationSource source;
  std::shared_ptr<Record> record;
  bool armed;
};

constexpr std::size_t slot_count = 48;
constexpr std::size_t cell_count = 64;

struct Slot {
  std::mutex mutex;
  std::shared_ptr<Owner> owner;
};

struct Tracked;

struct World {
  std::array<Slot, slot_count> slots;
  std::array<std::atomic<Tracked*>, cell_count> cells{};
  std::mutex mutex;
  std::vector<std::shared_ptr<Record>> records;
  std::vector<Tracked*> spilled;  // callbacks that found no cell: they hang until the epoch's end
};
World* world = nullptr;

std::atomic<std::uint64_t> next_number{1};
std::atomic<long> live_callables{0};
std::atomic<std::uint64_t> operations{0};
std::atomic<std::uint64_t> callback_runs{0};

// Callbacks that run on this thread now, by number. A callback may destroy only callbacks with greater
// numbers than all of these: threads that wait for each other's callbacks can't form a circle then.
struct OnThisThread {
  std::uint64_t greatest = 0;
  int depth = 0;
};
thread_local OnThisThread on_this_thread;
thread_local std::optional<Random> own_random;

Random& random_here() {
  if (!own_random) own_random.emplace(run_seed ^ next_number.fetch_add(1));  // the timer thread
  return *own_random;
}

/// What outlives a callback: its history.
struct History {
  std::atomic<int> runs{0};
  std::atomic<bool> running{false};
  std::atomic<bool> dead{false};
  std::uint64_t number = 0;
  CancellationToken token;
};

struct Callable {
  explicit Callable(std::shared_ptr<History> of) : history(std::move(of)) { ++live_callables; }
  Callable(const Callable&) = delete;
  Callable& operator=(const Callable&) = delete;
  ~Callable() { --live_callables; }
  void operator()() noexcept;
  std::shared_ptr<History> history;
};

struct Tracked {
  explicit Tracked(std::shared_ptr<History> of) : history(of), callback(of->token, std::move(of)) {}
  std::shared_ptr<History> history;
  CancellationCallback<Callable> callback;
};

Tracked* make_callback(const CancellationToken& token) {
  auto history = std::make_shared<History>();
  history->number = next_number.fetch_add(1);
  history->token = token;
  const bool cancelled_before = token.is_cancelled();
  auto* const made = new Tracked(history);
  if (cancelled_before) check(history->runs == 1, "in ctor", "a callback on a cancelled token");
  return made;
}

void destroy_callback(Tracked* callback) {
  const std::shared_ptr<History> history = callback->history;
  delete callback;
  history->dead = true;
  check(!history->running, "dead", "a destructor returned while its callback ran");
  // Not cancelled even now: then it can't have been while it hung there.
  if (!history->token.is_cancelled()) check(history->runs == 0, "spurious", "a callback ran");
}

/// Destroys a callback that was taken out of its cell, if this thread may wait for it; else puts it
/// where others can.
void destroy_or_keep(Tracked* callback) {
  if (callback->history->number > on_this_thread.greatest) {
    destroy_callback(callback);
    return;
  }
  for (std::atomic<Tracked*>& cell : world->cells) {
    Tracked* nobody = nullptr;
    if (cell.compare_exchange_strong(nobody, callback)) return;
  }
  const std::lock_guard<std::mutex> lock(world->mutex);
  world->spilled.push_back(callback);
}

std::shared_ptr<Owner> borrow(Random& random) {
  Slot& slot = world->slots[random.below(slot_count)];
  const std::lock_guard<std::mutex> lock(slot.mutex);
  return slot.owner;
}
void put(Random& random, std::shared_ptr<Owner> owner) {
  Slot& slot = world->slots[random.below(slot_count)];
  {
    const std::lock_guard<std::mutex> lock(slot.mutex);
    slot.owner.swap(owner);
  }
  // What was there goes here, outside the lock: callbacks may run.
}

std::uint64_t number_in(const Cause& cause) {
  const std::string_view words = cause.message();
  if (words.substr(0, 1) != "#") return 0;
  return std::strtoull(std::string(words.substr(1)).c_str(), nullptr, 10);
}

bool among_ancestors(const Record& record, const auto& holds) {
  for (const auto& parent : record.parents) {
    if (holds(*parent) || among_ancestors(*parent, holds)) return true;
  }
  return false;
}

void check_record(const Record& record) {
  // What is above is looked at before what is below.
  const bool above = among_ancestors(record, [](const Record& ancestor) {
    return ancestor.cancel_done.load() || (ancestor.watched && ancestor.watched->is_cancelled());
  });
  const bool own = record.cancel_done;
  if (!record.watched) return;
  const CancellationToken& token = *record.watched;
  if (above) check(token.is_cancelled(), "descendant", "an ancestor is cancelled, the node is not");
  if (own) check(token.is_cancelled(), "own", "cancel() has returned, the node is not cancelled");
  if (!token.is_cancelled()) {
    return;
  }
  const Cause cause = token.cause();
  check(static_cast<bool>(cause), "cause", "a cancelled token without a cause");
  check(token.cause().message() == cause.message(), "cause", "a cause that changes");
  if (cause.kind() == CauseKind::deadline_exceeded) {
    const auto now = Clock::now();
    const auto passed = [&](const Record& one) { return one.deadline && *one.deadline <= now; };
    check(passed(record) || among_ancestors(record, passed), "early", "a deadline before its time");
  }
}

/// The rest of the promises about causes hold once every cancel() has returned.
void check_record_in_peace(const Record& record) {
  check_record(record);
  if (!record.watched) return;
  const CancellationToken& token = *record.watched;
  const std::uint64_t winner = record.winner;
  if (!token.is_cancelled()) {
    check(winner == 0, "own", "a cancel() was true, the node is not cancelled");
    return;
  }
  const Cause cause = token.cause();
  if (winner != 0) {
    check(number_in(cause) == winner, "cause", "not that of the cancel() that was true");
    return;
  }
  if (cause.kind() == CauseKind::deadline_exceeded) return;  // see above
  if (const std::uint64_t number = number_in(cause)) {
    check(among_ancestors(record, [&](const Record& one) { return one.winner == number; }), "cause",
          "of no ancestor that was cancelled so");
    return;
  }
  const auto unnamed = [](const Record& one) { return one.cancel_begun_unnamed.load(); };
  check(unnamed(record) || among_ancestors(record, unnamed), "cause", "out of nowhere");
}

void make_node(Random& random) {
  std::vector<std::shared_ptr<Owner>> parents;
  const std::size_t wanted = random.one_in(8) ? 0 : random.one_in(5) ? 2 + random.below(3) : 1;
  for (std::size_t i = 0; i < wanted; ++i) {
    if (auto parent = borrow(random)) parents.push_back(std::move(parent));
  }
  auto record = std::make_shared<Record>();
  std::vector<CancellationToken> tokens;
  for (const auto& parent : parents) {
    record->parents.push_back(parent->record);
    tokens.push_back(parent->source.token());
  }
  // Records must not get high: the check walks every way up.
  for (const auto& parent : record->parents) {
    record->height = std::max(record->height, parent->height + 1);
  }
  if (record->height > 6) return;

  bool parent_cancelled = false;
  for (const CancellationToken& token : tokens) parent_cancelled |= token.is_cancelled();
  std::optional<CancellationSource> source;
  if (tokens.size() > 1 || (tokens.size() == 1 && random.one_in(8))) {
    if (random.one_in(4)) tokens.push_back(tokens.front());
    if (random.one_in(4)) tokens.emplace_back();
    source.emplace(CancellationSource::any_of(tokens));
  } else {
    const CancellationToken parent = tokens.empty() ? CancellationToken() : tokens.front();
    switch (random.below(8)) {
      case 0: {
        const auto at = Clock::now() + std::chrono::microseconds(random.below(4000));
        record->deadline = at;
        source.emplace(parent, at);
        break;
      }
      case 1:
        record->deadline = Clock::now();
        source.emplace(parent, random.one_in(2) ? -1ms : 0ms);
        check(source->is_cancelled(), "own", "a deadline in the past");
        break;
      case 2:
        record->deadline = Clock::now() + 1h;
        source.emplace(parent, 1h);
        break;
      default: source.emplace(parent);
    }
  }
  if (parent_cancelled) check(source->is_cancelled(), "descendant", "not born cancelled");
  if (random.one_in(2)) record->watched = source->token();
  const bool armed = random.one_in(2);
  if (!armed) source->disarm();
  if (random.one_in(4)) {
    CancellationSource other = std::move(*source);
    check(!source->cancel(), "own", "a moved-from source's cancel() was true");
    *source = std::move(other);
  }
  {
    const std::lock_guard<std::mutex> lock(world->mutex);
    world->records.push_back(record);
  }
  put(random, std::make_shared<Owner>(std::move(*source), record, armed));
}

void cancel_some(Random& random) {
  const auto owner = borrow(random);
  if (!owner) return;
  if (random.one_in(6)) {
    if (owner->source.cancel(random.one_in(2) ? Cause() : Cause::cancelled())) {
      owner->record->cancel_begun_unnamed = true;
      owner->record->cancel_done = true;
    }
  } else {
    const std::uint64_t number = next_number.fetch_add(1);
    if (owner->source.cancel(Cause::cancelled("#" + std::to_string(number)))) {
      owner->record->winner = number;
      owner->record->cancel_done = true;
      check(number_in(owner->source.token().cause()) == number, "cause", "not the winner's");
    }
  }
  check(owner->source.is_cancelled(), "own", "cancel() has returned");
}

void wait_some(Random& random) {
  const auto owner = borrow(random);
  if (!owner) return;
  const CancellationToken token = owner->source.token();
  const auto span = std::chrono::microseconds(random.below(random.one_in(10) ? 3000 : 200));
  const auto begin = Clock::now();
  if (token.wait_for(span)) {
    check(token.is_cancelled(), "spurious", "a wait said cancelled");
    check(static_cast<bool>(token.cause()), "cause", "a waiter woke without a cause");
  } else {
    check(Clock::now() - begin >= span, "early", "a wait timed out before its time");
  }
}

void poll_some(Random& random) {
  const auto owner = borrow(random);
  if (!owner) return;
  const CancellationToken token = owner->source.token();
  try {
    const int fd = token.fd();
    check(fd >= 0, "silent", "no descriptor");
    check(token.fd() == fd, "silent", "another descriptor");
    if (token.is_cancelled() && random.one_in(2)) {
      // The canceller may be between the mark and the descriptor: it may take a moment, not more.
      check(support::is_readable(fd, 30'000), "silent",
            "cancelled, and the descriptor says nothing");
    } else if (support::is_readable(fd, random.one_in(4) ? 1 : 0)) {
      check(token.is_cancelled(), "spurious", "a descriptor said cancelled");
    }
  } catch (const std::system_error&) {
    // No descriptor left: the other threads hold them all.
  }
}

void hang_callback(Random& random) {
  const auto owner = borrow(random);
  if (!owner) return;
  Tracked* callback = make_callback(owner->source.token());
  if (random.one_in(3)) {
    if (random.one_in(2)) std::this_thread::yield();
    destroy_callback(callback);
    return;
  }
  // Into a cell for all; who was in it goes, if this thread may wait for it.
  std::atomic<Tracked*>& cell = world->cells[random.below(cell_count)];
  callback = cell.exchange(callback);
  if (callback != nullptr) destroy_or_keep(callback);
}

void drop_callback(Random& random) {
  Tracked* const callback = world->cells[random.below(cell_count)].exchange(nullptr);
  if (callback != nullptr) destroy_or_keep(callback);
}

void check_some(Random& random) {
  std::shared_ptr<Record> record;
  {
    const std::lock_guard<std::mutex> lock(world->mutex);
    if (world->records.empty()) return;
    const std::size_t recent = std::min<std::size_t>(world->records.size(), 64);
    record = world->records[world->records.size() - 1 - random.below(recent)];
  }
  check_record(*record);
}

void one_operation(Random& random) {
  operations.fetch_add(1, std::memory_order_relaxed);
  switch (random.below(20)) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4: make_node(random); break;
    case 5:
    case 6: cancel_some(random); break;
    case 7:
    case 8: put(random, nullptr); break;
    case 9:
    case 10:
    case 11: hang_callback(random); break;
    case 12: drop_callback(random); break;
    case 13:
    case 14: wait_some(random); break;
    case 15:
      if (random.one_in(8)) poll_some(random);
      break;
    default: check_some(random); break;
  }
}

void Callable::operator()() noexcept {
  // Kept here: the callback, and with it this callable, may be gone before the end.
  const std::shared_ptr<History> mine = history;
  callback_runs.fetch_add(1, std::memory_order_relaxed);
  check(!mine->dead, "dead", "a callback ran after its destructor had returned");
  check(mine->runs.fetch_add(1) == 0, "once", "a callback ran twice");
  check(mine->token.is_cancelled(), "spurious", "a callback ran on an uncancelled token");
  check(static_cast<bool>(mine->token.cause()), "cause", "a callback ran without a cause");
  mine->running = true;
  const OnThisThread before = on_this_thread;
  on_this_thread.greatest = std::max(before.greatest, mine->number);
  ++on_this_thread.depth;
  Random& random = random_here();
  if (on_this_thread.depth <= 4) {
    try {
      const std::size_t deeds = random.below(3);
      for (std::size_t i = 0; i < deeds; ++i) one_operation(random);
      if (random.one_in(4)) {
        // Destroys itself, if it hangs in a cell and nobody else is about to.
        for (std::atomic<Tracked*>& cell : world->cells) {
          // Only what was taken out may be looked into: others could destroy it meanwhile.
          Tracked* const taken = cell.exchange(nullptr);
          if (taken == nullptr) continue;
          if (taken->history == mine) {
            mine->running = false;  // its destructor returns before it does
            delete taken;
            break;
          }
          Tracked* nobody = nullptr;
          if (!cell.compare_exchange_strong(nobody, taken)) destroy_or_keep(taken);
        }
      }
    } catch (const std::system_error&) {
      // No thread for timers or no descriptor: nothing was promised.
    }
  }
  mine->running = false;
  on_this_thread = before;
}

void one_epoch(std::uint64_t epoch, int thread_count, int operations_each) {
  epoch_now = epoch;
  world = new World;
  {
    support::StartingLine line(thread_count);
    support::Threads threads;
    for (int i = 0; i < thread_count; ++i) {
      threads.start([&line, epoch, i, operations_each] {
        Random random(run_seed * 1'000'003 + epoch * 1009 + static_cast<std::uint64_t>(i));
        own_random.emplace(random);
        line.ready_steady_go();
        for (int turn = 0; turn < operations_each; ++turn) one_operation(random);
      });
    }
  }
  // In peace, but for the timer thread. First the callbacks, while they hang. One that is taken out of
  // its cell here is nobody else's.
  const auto next_callback = []() -> Tracked* {
    for (std::atomic<Tracked*>& cell : world->cells) {
      if (Tracked* const callback = cell.exchange(nullptr)) return callback;
    }
    const std::lock_guard<std::mutex> lock(world->mutex);
    if (world->spilled.empty()) return nullptr;
    Tracked* const callback = world->spilled.back();
    world->spilled.pop_back();
    return callback;
  };
  while (Tracked* const callback = next_callback()) {
    const std::shared_ptr<History> history = callback->history;
    if (history->token.is_cancelled()) {
      // Nobody destroys it, so it will run: on the timer thread, or it has.
      check(support::eventually([&] { return history->runs == 1; }), "once",
            "a callback that still hung when its token was cancelled never ran");
    }
    destroy_callback(callback);
  }
  for (Slot& slot : world->slots) {
    std::shared_ptr<Owner> owner;
    {
      const std::lock_guard<std::mutex> lock(slot.mutex);
      slot.owner.swap(owner);
    }
  }
  // The timer thread may be inside a callback that makes nodes and callbacks of its own: it needs the
  // world until it is done. It is, when no node or callable is left that it could hold.
  const auto settled = [&] {
    while (Tracked* const callback = next_callback()) destroy_callback(callback);
    for (Slot& slot : world->slots) {
      std::shared_ptr<Owner> owner;
      const std::lock_guard<std::mutex> lock(slot.mutex);
      slot.owner.swap(owner);
      if (owner) return false;
    }
    return live_callables == 0;
  };
  check(support::eventually(settled), "leak", "callables are left");
  for (const auto& record : world->records) check_record_in_peace(*record);
  // Records hold each other upwards, and tokens; let go one by one, not in one deep recursion.
  while (!world->records.empty()) world->records.pop_back();
  delete world;
  world = nullptr;
}

/// Or in the stores of other threads.
std::size_t nodes_in_use() {
  const auto census = lastcall::detail::NodePool::census();
  return census.used - census.stored;
}

void out_of_patience(int) {
  constexpr char words[] = "cancellation_stress: stuck\n";
  const auto written = ::write(STDERR_FILENO, words, sizeof words - 1);
  static_cast<void>(written);
  std::abort();
}

}  // namespace

int main(int argc, char** argv) {
  long seconds = 5;
  int threads = 0;
  run_seed = static_cast<std::uint64_t>(Clock::now().time_since_epoch().count());
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--seconds") == 0) seconds = std::strtol(argv[i + 1], nullptr, 10);
    if (std::strcmp(argv[i], "--minutes") == 0)
      seconds = 60 * std::strtol(argv[i + 1], nullptr, 10);
    if (std::strcmp(argv[i], "--seed") == 0) run_seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::strcmp(argv[i], "--threads") == 0) threads = std::atoi(argv[i + 1]);
  }
  std::printf("cancellation_stress: seed %llu\n", static_cast<unsigned long long>(run_seed));
  std::fflush(stdout);
  std::signal(SIGALRM, out_of_patience);
  ::alarm(static_cast<unsigned>(seconds + 240));

  const auto end = Clock::now() + std::chrono::seconds(seconds);
  Random random(run_seed);
  long baseline = 0;
  std::size_t node_baseline = 0;
  std::uint64_t epoch = 0;
  do {
    // As many as there can be at first: the C library keeps some of what each thread that ended had.
    const int most = epoch == 0 ? 16 : 2 + static_cast<int>(random.below(15));
    const int count = threads > 0 ? threads : most;
    one_epoch(epoch, count, support::under_sanitizer ? 300 : 1000);
    // What is made once stays: the first epoch tells how much that is.
    if (epoch == 0) {
      support::eventually([] { return false; }, 50ms);
      baseline = live_allocations;
      node_baseline = nodes_in_use();
    } else {
      const bool level = support::eventually([&] { return live_allocations <= baseline; }, 20s);
      if (!level) {
        std::fprintf(stderr, "%ld allocations, %ld at first\n", live_allocations.load(), baseline);
        fail("leak", "allocations are left");
      }
      // The timer thread has a store of free ones.
      if (nodes_in_use() > node_baseline + lastcall::detail::NodePool::most) {
        fail("leak", "nodes are left");
      }
    }
    ++epoch;
  } while (Clock::now() < end);
  std::printf(
      "cancellation_stress: %llu epochs, %llu operations, %llu callback runs, no complaint\n",
      static_cast<unsigned long long>(epoch), static_cast<unsigned long long>(operations.load()),
      static_cast<unsigned long long>(callback_runs.load()));
  return 0;
}
