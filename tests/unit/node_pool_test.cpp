// detail/node_pool.hpp: blocks come and go on any thread, memory goes back, forks and the ends of threads are
// survived, and where there is no memory the answer is null. Each test has a pool of a size of its own.
#include <lastcall/cancellation.hpp>
#include <lastcall/detail/node_pool.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <pthread.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

using lastcall::CancellationSource;
using lastcall::detail::BlockPool;

namespace {

template <std::size_t size>
std::vector<void*> take(std::size_t count) {
  std::vector<void*> blocks(count);
  for (void*& block : blocks) block = BlockPool<size>::take();
  return blocks;
}

template <std::size_t size>
void give(const std::vector<void*>& blocks) {
  for (void* const block : blocks) BlockPool<size>::give(block);
}

template <std::size_t size>
std::size_t slabs_for(std::size_t blocks) {
  return (blocks + BlockPool<size>::blocks_a_slab - 1) / BlockPool<size>::blocks_a_slab;
}

// Of this process, from the kernel; 0 where it doesn't say.
std::size_t mapped_bytes() {
  std::size_t pages = 0;
  if (std::FILE* const file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%zu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

// Whether there is a pool of that size; then it has been made: while it is, other threads have none. By a thread
// of its own, whose store is gone.
template <std::size_t size>
bool is_there() {
  if (!BlockPool<size>::is_used) return false;
  std::thread([] { give<size>(take<size>(1)); }).join();
  return true;
}

}  // namespace

TEST_CASE("blocks do not overlap, and keep what is written into them") {
  if (!is_there<56>()) return;
  constexpr std::size_t size = 56;
  constexpr std::size_t count = 3 * BlockPool<size>::blocks_a_slab;
  auto blocks = take<size>(count);
  for (std::size_t at = 0; at < count; ++at) {
    std::memset(blocks[at], static_cast<int>(at % 251), size);
  }
  std::size_t wrong = 0;
  std::size_t unaligned = 0;
  for (std::size_t at = 0; at < count; ++at) {
    const auto* const bytes = static_cast<unsigned char*>(blocks[at]);
    for (std::size_t byte = 0; byte < size; ++byte) wrong += bytes[byte] != at % 251 ? 1 : 0;
    unaligned += reinterpret_cast<std::uintptr_t>(bytes) % alignof(void*) != 0 ? 1 : 0;
  }
  CHECK(wrong == 0);
  CHECK(unaligned == 0);
  std::sort(blocks.begin(), blocks.end());
  CHECK(std::adjacent_find(blocks.begin(), blocks.end()) == blocks.end());
  give<size>(blocks);
}

TEST_CASE("a pool has as many slabs as its blocks need, and gives all back but a spare one") {
  if (!is_there<64>()) return;
  constexpr std::size_t size = 64;
  using Pool = BlockPool<size>;
  constexpr std::size_t count = 10 * std::size_t{Pool::blocks_a_slab} + 1;
  for (int round = 0; round < 3; ++round) {
    auto blocks = take<size>(count);
    CHECK(Pool::census().slabs == slabs_for<size>(Pool::census().used));
    CHECK(Pool::census().used == count + Pool::census().stored);
    CHECK(Pool::census().stored < Pool::batch + Pool::most);
    // In an order that empties no slab before the end, one from each slab after the other.
    std::vector<void*> dealt;
    for (std::size_t first = 0; first < Pool::blocks_a_slab; ++first) {
      for (std::size_t at = first; at < count; at += Pool::blocks_a_slab)
        dealt.push_back(blocks[at]);
    }
    REQUIRE(dealt.size() == count);
    give<size>(dealt);
    CHECK(Pool::census().used == Pool::census().stored);
    CHECK(Pool::census().stored <= Pool::most);
    // The store's blocks may hold slabs each, since they were the last of all of them; so it has few.
    CHECK(Pool::census().slabs <= 5 + Pool::few);
  }
  std::thread([] { give<size>(take<size>(2 * std::size_t{Pool::blocks_a_slab})); }).join();
  CHECK(Pool::census().used == Pool::census().stored);
}

TEST_CASE("a large number of blocks that went in order leaves one slab") {
  if (!is_there<72>()) return;
  using Pool = BlockPool<72>;
  std::size_t mapped = 0;
  const std::size_t before = mapped_bytes();
  std::thread([&mapped] {
    const auto blocks = take<72>(20 * std::size_t{Pool::blocks_a_slab});
    mapped = mapped_bytes();
    give<72>(blocks);
  }).join();
  if (before != 0) {
    CHECK(mapped >= before + 20 * Pool::slab_bytes);
    CHECK(mapped_bytes() <= mapped - 19 * Pool::slab_bytes);
  }
  CHECK(Pool::census().used == 0);
  CHECK(Pool::census().slabs == 1);
}

TEST_CASE("new blocks stand in the order of their addresses, also in a slab that was used before") {
  if (!is_there<80>()) return;
  for (int round = 0; round < 2; ++round) {
    std::thread([] {
      const auto blocks = take<80>(1000);
      CHECK(std::is_sorted(blocks.begin(), blocks.end()));
      give<80>(blocks);
    }).join();
  }
}

TEST_CASE("a block that was given back is the next to be taken") {
  if (!is_there<88>()) return;
  void* const first = BlockPool<88>::take();
  BlockPool<88>::give(first);
  CHECK(BlockPool<88>::take() == first);
  BlockPool<88>::give(first);
}

TEST_CASE("a thread with a full store gives half of it back, and keeps the rest") {
  if (!is_there<152>()) return;
  using Pool = BlockPool<152>;
  std::thread([] {
    // So many are in use that none of the slabs is to be emptied.
    const auto blocks = take<152>(20 * std::size_t{Pool::most});
    std::size_t most_stored = 0;
    std::size_t most_given = 0;
    for (std::size_t at = 0; at < 4 * std::size_t{Pool::most}; ++at) {
      const std::size_t before = Pool::census().stored;
      Pool::give(blocks[at]);
      const std::size_t after = Pool::census().stored;
      most_stored = std::max(most_stored, after);
      if (after <= before) most_given = std::max(most_given, before + 1 - after);
    }
    CHECK(most_stored == Pool::most);
    CHECK(most_given == Pool::most / 2);
    std::for_each(blocks.begin() + 4 * std::ptrdiff_t{Pool::most}, blocks.end(), Pool::give);
  }).join();
  CHECK(Pool::census().used == 0);
}

TEST_CASE("what a thread has in store goes back when it ends") {
  if (!is_there<96>()) return;
  using Pool = BlockPool<96>;
  std::vector<std::thread> threads;
  for (int at = 0; at < 8; ++at) {
    threads.emplace_back([] { give<96>(take<96>(Pool::most + 10)); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(Pool::census().used == 0);
  CHECK(Pool::census().slabs == 1);
}

TEST_CASE("blocks that one thread takes and another gives come back all the same") {
  if (!is_there<104>()) return;
  using Pool = BlockPool<104>;
  for (int round = 0; round < 20; ++round) {
    std::vector<void*> blocks;
    std::thread([&] { blocks = take<104>(3000); }).join();
    std::thread([&] { give<104>(blocks); }).join();
  }
  CHECK(Pool::census().used == 0);
  CHECK(Pool::census().slabs == 1);
}

namespace {

pthread_key_t late_key;
std::atomic<bool> late_was_called{false};

}  // namespace

TEST_CASE("what runs after a thread's store has gone takes and gives without one") {
  if (!is_there<112>()) return;
  using Pool = BlockPool<112>;
  // The pool's key has been made before this one.
  REQUIRE(pthread_key_create(&late_key, [](void* block) {
            Pool::give(block);
            Pool::give(Pool::take());
            CHECK(Pool::census().stored == 0);
            late_was_called = true;
          }) == 0);
  const std::size_t used = Pool::census().used;
  std::thread([] { pthread_setspecific(late_key, Pool::take()); }).join();
  CHECK(late_was_called);
  CHECK(Pool::census().used == used);
  pthread_key_delete(late_key);
}

TEST_CASE("where all keys of threads are taken there are no stores, and blocks all the same") {
  if (!BlockPool<120>::is_used) return;
  support::Child child = support::Child::run([] {
    using Pool = BlockPool<120>;
    pthread_key_t unused;
    int keys = 0;
    while (keys < 100'000 && pthread_key_create(&unused, nullptr) == 0) ++keys;
    const auto blocks = take<120>(1000);
    support::expect(std::count(blocks.begin(), blocks.end(), nullptr) == 0, "blocks are had");
    support::expect_equal(Pool::census().used, blocks.size(), "the number in use");
    give<120>(blocks);
    support::expect_equal(Pool::census().used, std::size_t{0}, "the number in use");
    return 0;
  });
  const support::Ended ended = child.end();
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a child that is forked while other threads take and give has a pool that works") {
  if (!is_there<128>()) return;
  using Pool = BlockPool<128>;
  std::atomic<bool> done{false};
  std::vector<std::thread> busy;
  for (int at = 0; at < 3; ++at) {
    busy.emplace_back([&] {
      while (!done) give<128>(take<128>(3 * Pool::most));
    });
  }
  int bad = 0;
  std::string words;
  for (int round = 0; round < 100 && bad == 0; ++round) {
    support::Child child = support::Child::run([] {
      for (int turn = 0; turn < 20; ++turn) {
        auto blocks = take<128>(5 * Pool::most);
        std::sort(blocks.begin(), blocks.end());
        support::expect(std::adjacent_find(blocks.begin(), blocks.end()) == blocks.end(),
                        "no block is given out twice");
        give<128>(blocks);
      }
      return 0;
    });
    const support::Ended ended = child.end();
    if (ended.how != "exit 0") ++bad;
    words += ended.err;
  }
  done = true;
  for (std::thread& thread : busy) thread.join();
  INFO(words);
  CHECK(bad == 0);
}

TEST_CASE("without memory for a slab there are nodes from operator new, and in the end bad_alloc") {
  if (!lastcall::detail::NodePool::is_used) return;
  support::Child child = support::Child::run([] {
    using Pool = lastcall::detail::NodePool;
    CancellationSource root;
    const auto token = root.token();
    std::vector<CancellationSource> children;
    children.reserve(2'000'000);
    const std::size_t used = Pool::census().used;
    // What is mapped now, and one slab more at most.
    const auto bytes = static_cast<rlim_t>(mapped_bytes());
    if (!support::expect(bytes > 0, "the size of the process is known")) return 0;
    const rlimit limit{bytes + Pool::slab_bytes, bytes + Pool::slab_bytes};
    ::setrlimit(RLIMIT_AS, &limit);
    bool refused = false;
    while (!refused && children.size() < children.capacity()) {
      try {
        children.emplace_back(token);
      } catch (const std::bad_alloc&) {
        refused = true;
      }
    }
    support::expect(refused, "there is an end of memory");
    support::expect(children.size() > Pool::blocks_a_slab / 2, "a slab was used up");
    support::expect(Pool::census().used - used < children.size(), "some are not from the pool");
    root.cancel();
    for (const CancellationSource& one : children) {
      if (!one.is_cancelled()) support::expect(false, "all of them are cancelled");
    }
    children.clear();
    support::expect(Pool::census().used - Pool::census().stored <= used, "all of them came back");
    children.emplace_back(token);
    support::expect(children.back().is_cancelled(), "and there are new ones");
    return 0;
  });
  const support::Ended ended = child.end();
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a slab that is refused leaves errno as it was") {
  if (!is_there<144>()) return;
  support::Child child = support::Child::run([] {
    const rlimit none{0, 0};
    ::setrlimit(RLIMIT_AS, &none);
    errno = ERANGE;
    // The spare slab is there still.
    std::size_t had = 0;
    while (BlockPool<144>::take() != nullptr && had < 10'000) ++had;
    const int after = errno;
    support::expect(had < 10'000, "a slab is refused");
    support::expect_equal(after, ERANGE, "errno");
    return 0;
  });
  const support::Ended ended = child.end();
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}
