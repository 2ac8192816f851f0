// The pool that nodes of the tree come from (detail/node_pool.hpp), under threads that take blocks, write into
// them, hand them to one another, give them back and end; while one forks.
//
// What is checked:
//  [twice]  nobody else writes into a block while its taker, or who it was handed to, has it
//  [left]   when all threads have ended nothing is in use, and one slab is kept beside that of the main thread's block
//  [child]  a forked child takes and gives
#include <lastcall/detail/node_pool.hpp>

#include "options.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using Pool = lastcall::detail::BlockPool<56>;
using stress::check;
using support::Random;

struct Content {
  std::array<std::uint64_t, 7> words;
};
static_assert(sizeof(Content) == 56);

std::atomic<std::uint64_t> next_stamp{1};
std::atomic<long> taken{0};
std::atomic<long> handed{0};
std::atomic<long> children{0};

// Where blocks lie that are on their way to another thread.
std::array<std::atomic<Content*>, 64> mailboxes;

Content* take() {
  void* const room = Pool::take();
  check(room != nullptr, "no block");
  auto* const block = ::new (room) Content;
  block->words.fill(next_stamp.fetch_add(1, std::memory_order_relaxed));
  ++taken;
  return block;
}

void give(Content* block) {
  for (const std::uint64_t word : block->words) {
    check(word == block->words[0], "[twice] somebody else wrote into a block");
  }
  // So that who has it, too, would see that.
  block->words.fill(0);
  Pool::give(block);
}

void fork_a_child(Random& random) {
  const std::size_t count = random.below(3000);
  const int code = support::in_child_process([count] {
    std::vector<Content*> blocks;
    for (std::size_t at = 0; at < count; ++at) blocks.push_back(take());
    for (Content* const block : blocks) give(block);
    return 0;
  });
  check(code == 0, "[child] " + std::to_string(code));
  ++children;
}

void work(Random& random, bool forks) {
  std::vector<Content*> own;
  for (int turn = 0; turn < 200; ++turn) {
    switch (random.below(4)) {
      case 0:  // many at once, as for a tree
        for (std::size_t count = random.below(400); count > 0; --count) own.push_back(take());
        break;
      case 1:  // in and out
        for (std::size_t count = random.below(400); count > 0; --count) give(take());
        break;
      case 2:
        for (std::size_t count = random.below(400); count > 0 && !own.empty(); --count) {
          std::swap(own[random.below(own.size())], own.back());
          give(own.back());
          own.pop_back();
        }
        break;
      default:
        for (std::size_t count = random.below(40); count > 0 && !own.empty(); --count) {
          auto& mailbox = mailboxes[random.below(mailboxes.size())];
          own.back() = mailbox.exchange(own.back(), std::memory_order_acq_rel);
          if (own.back() == nullptr) own.pop_back();
          ++handed;
        }
    }
    if (forks && random.one_in(50)) fork_a_child(random);
  }
  for (Content* const block : own) give(block);
}

void one_epoch(const stress::Options& options, Random& random) {
  {
    const int count = options.some_threads(random);
    support::StartingLine line(count);
    support::Threads threads;
    for (int number = 0; number < count; ++number) {
      threads.start([&, number, seed = random.next()] {
        Random own(seed);
        line.ready_steady_go();
        work(own, number == 0);
      });
    }
  }
  // By a thread of its own: what is in this one's store would keep slabs.
  support::Threads().start([] {
    for (auto& mailbox : mailboxes) {
      if (Content* const block = mailbox.exchange(nullptr)) give(block);
    }
  });
  const Pool::Census census = Pool::census();
  check(census.used == census.stored, "[left] " + std::to_string(census.used) + " in use, " +
                                          std::to_string(census.stored) + " of them in store");
  // The spare one, and that of the block in this thread's store.
  check(census.slabs <= 2, "[left] " + std::to_string(census.slabs) + " slabs");
}

}  // namespace

int main(int argc, char** argv) {
  const stress::Options options = stress::begin("node_pool_stress", argc, argv);
  if (!Pool::is_used) return 0;
  Pool::give(Pool::take());  // a child that is forked while it is made has none
  stress::run(options, [&](Random& random) { one_epoch(options, random); });
  std::printf("%llu epochs, %ld blocks taken, %ld handed over, %ld children: ok\n",
              static_cast<unsigned long long>(stress::epoch), taken.load(), handed.load(),
              children.load());
  return 0;
}
