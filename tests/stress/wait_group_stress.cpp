// Random members, waiters and closers on groups that are destroyed the moment that a wait returns.
//
//   wait_group_stress [--seconds N | --minutes N] [--seed N] [--threads N] [--without-membarrier]
//
// What must hold, by the numbers at the head of wait_group.hpp:
//   - a wait never returns true before a member that entered before it has left (G1, G2, G6, G7);
//   - what a member wrote before it left is there after the wait (G8; ThreadSanitizer looks too);
//   - once closed and waited for, nobody gets in any more (G3);
//   - nobody touches a group that is gone (G6; AddressSanitizer looks), and nobody is stuck (G5, G7).
// It prints its seed first; the same seed makes the same decisions, though not the same interleaving.
#include <lastcall/wait_group.hpp>

#include "support/threads.hpp"
#include "support/wait_group_tools.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using lastcall::WaitGroup;
using Guard = WaitGroup::Guard;
using support::Random;

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

// What one member did, for who waits for it.
struct Work {
  int written = 0;  // plain, on purpose
  std::atomic<bool> left{false};
};

struct Entry {
  Guard guard;
  bool bare = false;
  std::shared_ptr<Work> work;
};

// One group's life. Guards go from thread to thread through the exchange.
//
// In some rounds each thread is a member throughout, and the group is destroyed the moment that the wait
// for them returns. In the others the count comes to zero again and again while they live, and they wait
// for that themselves.
struct Round {
  explicit Round(std::uint64_t its_seed)
      : seed(its_seed), reused(its_seed % 2 == 0), group(std::make_unique<WaitGroup>()) {}

  const std::uint64_t seed;
  const bool reused;
  std::unique_ptr<WaitGroup> group;
  std::mutex mutex;
  std::vector<Entry> exchange;
  std::atomic<bool> over{false};  // waited for after close(): from now on an entry is a bug
  std::atomic<long> zeros{0};     // seen by those who wait in between
};

void leave(Round& round, Entry entry) {
  entry.work->written = 1;
  entry.work->left.store(true, std::memory_order_relaxed);
  if (entry.bare) {
    round.group->done();
  } else {
    entry.guard.release();
  }
}

void hand_over(Round& round, Entry entry) {
  const std::lock_guard<std::mutex> lock(round.mutex);
  round.exchange.push_back(std::move(entry));
}

bool take_over(Round& round, Random& random, Entry& entry) {
  const std::lock_guard<std::mutex> lock(round.mutex);
  if (round.exchange.empty()) return false;
  std::swap(round.exchange[random.below(round.exchange.size())], round.exchange.back());
  entry = std::move(round.exchange.back());
  round.exchange.pop_back();
  return true;
}

bool enter(Round& round, Random& random, Entry& entry) {
  entry.work = std::make_shared<Work>();
  switch (random.below(6)) {
    case 0: try { round.group->add();
      } catch (const std::logic_error&) {
        return false;
      }
      entry.bare = true;
      return true;
    case 1:
      entry.guard = round.group->try_enter("a name that is too long for any small buffer");
      return static_cast<bool>(entry.guard);
    case 2: try { entry.guard = round.group->enter();
      } catch (const std::logic_error&) {
        return false;
      }
      return true;
    default: entry.guard = round.group->try_enter(); return static_cast<bool>(entry.guard);
  }
}

// A waiter that knows somebody who is in: itself, by a guard that another thread releases.
void wait_for_own(Round& round, Random& random) {
  Entry entry;
  if (!enter(round, random, entry)) return;
  const std::shared_ptr<Work> work = entry.work;
  if (random.one_in(4)) {
    leave(round, std::move(entry));
  } else {
    hand_over(round, std::move(entry));
  }
  const bool zero = round.group->wait_for(std::chrono::microseconds(random.below(300)));
  if (zero) ++round.zeros;
  if (zero && !work->left.load(std::memory_order_relaxed)) fail("a wait ended early");
  if (zero && work->written != 1) fail("what a member wrote can't be seen");
}

// Touches the group only as a member, or (waiting, looking) before it votes for the end below.
void live(Round& round, Random& random, int operations) {
  std::vector<Entry> mine;
  bool refused = false;
  for (int operation = 0; operation < operations; ++operation) {
    Entry entry;
    switch (random.below(12)) {
      case 0:
      case 1:
      case 2:
      case 3:
        if (enter(round, random, entry)) {
          if (refused) fail("let in after it was refused");
          if (round.over) fail("let in after close and zero");
          mine.push_back(std::move(entry));
        } else {
          refused = true;
        }
        break;
      case 4:
      case 5:
      case 6:
        if (!mine.empty()) {
          std::swap(mine[random.below(mine.size())], mine.back());
          leave(round, std::move(mine.back()));
          mine.pop_back();
        }
        break;
      case 7:
        if (!mine.empty()) {
          hand_over(round, std::move(mine.back()));
          mine.pop_back();
        }
        break;
      case 8:
        if (take_over(round, random, entry)) leave(round, std::move(entry));
        break;
      case 9:
        if (!mine.empty() && !mine.back().bare) {
          entry.guard = mine.back().guard;
          entry.work = std::make_shared<Work>();
          mine.push_back(std::move(entry));
        }
        break;
      case 10:
        if (!round.reused) break;  // this thread is in itself
        for (Entry& old : mine) leave(round, std::move(old));
        mine.clear();
        wait_for_own(round, random);
        break;
      default:
        if (random.one_in(8)) {
          if (round.group->members().size() > 100'000) fail("too many members");
          if (round.group->count() > 100'000) fail("too many are in");
        } else {
          // A burst, which makes the group fast.
          for (int turn = 0; turn < 80; ++turn) {
            const Guard brief = round.group->try_enter();
          }
        }
    }
    if (mine.size() > (round.reused ? 1U : 50U)) {
      for (Entry& old : mine) leave(round, std::move(old));
      mine.clear();
    }
  }
  for (Entry& last : mine) {
    if (random.one_in(2)) {
      leave(round, std::move(last));
    } else {
      hand_over(round, std::move(last));
    }
  }
}

// The threads live for a while, several rounds, and are then replaced: numbers change hands.
void generation(int thread_count, Random& random, std::chrono::steady_clock::time_point end,
                long& rounds, long& zeros) {
  std::unique_ptr<Round> round;
  std::atomic<bool> finished{false};
  std::atomic<int> working{0};
  support::StartingLine line(thread_count + 1);
  support::Threads threads;
  for (int number = 0; number < thread_count; ++number) {
    threads.start([&, number] {
      for (;;) {
        line.ready_steady_go();
        if (finished) return;
        Round& mine = *round;
        Random own(mine.seed + static_cast<std::uint64_t>(number) * 7919);
        // A guard of its own, entered at the start: when it leaves, the group may go.
        Guard last;
        if (!mine.reused) {
          last = mine.group->try_enter();
          if (!last) fail("refused before it was closed");
        }
        line.ready_steady_go();
        live(mine, own, static_cast<int>(own.below(200)));
        Entry entry;
        while (take_over(mine, own, entry)) leave(mine, std::move(entry));
        // Others may still hand something over: whoever comes last takes what is left.
        if (working.fetch_sub(1) == 1) {
          while (take_over(mine, own, entry)) leave(mine, std::move(entry));
        }
        if (mine.reused) {
          line.ready_steady_go();
        } else {
          last.release();  // and nothing of the group after this
        }
      }
    });
  }
  const std::size_t lives = 1 + random.below(40);
  for (std::size_t life = 0; life < lives && std::chrono::steady_clock::now() < end; ++life) {
    round = std::make_unique<Round>(random.next());
    working = thread_count;
    line.ready_steady_go();
    line.ready_steady_go();  // everybody has its guard
    if (random.one_in(2)) {
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(500)));
    }
    round->group->close();
    if (!round->group->wait_for(std::chrono::seconds(120))) fail("stuck: nobody leaves any more");
    round->over = true;
    if (round->reused) line.ready_steady_go();
    round->group.reset();  // at once
    zeros += round->zeros;
    ++rounds;
  }
  finished = true;
  line.ready_steady_go();
}

}  // namespace

int main(int argc, char** argv) {
  long seconds = 2;
  std::uint64_t seed =
      static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  int wanted = 0;
  for (int at = 1; at < argc; ++at) {
    const std::string option = argv[at];
    if (option == "--without-membarrier") {
      if (!support::forbid_membarrier()) {
        std::puts("no system call filter can be had here: skipped");
        return 0;
      }
    } else if (at + 1 < argc && option == "--seconds") {
      seconds = std::atol(argv[++at]);
    } else if (at + 1 < argc && option == "--minutes") {
      seconds = 60 * std::atol(argv[++at]);
    } else if (at + 1 < argc && option == "--seed") {
      seed = std::strtoull(argv[++at], nullptr, 0);
    } else if (at + 1 < argc && option == "--threads") {
      wanted = std::atoi(argv[++at]);
    } else {
      std::fprintf(
          stderr,
          "usage: %s [--seconds N | --minutes N] [--seed N] [--threads N] [--without-membarrier]\n",
          argv[0]);
      return 2;
    }
  }
  std::printf("wait_group_stress --seconds %ld --seed %llu\n", seconds,
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  Random random(seed);
  long rounds = 0;
  long zeros = 0;
  do {
    generation(wanted > 0 ? wanted : 2 + static_cast<int>(random.below(15)), random, end, rounds,
               zeros);
  } while (std::chrono::steady_clock::now() < end);
  auto* const sections = lastcall::detail::ThreadSections::instance();
  std::printf("%ld groups lived and died, %ld zeros in between, %s membarrier: ok\n", rounds, zeros,
              sections != nullptr && sections->has_fence() ? "with" : "without");
  return 0;
}
