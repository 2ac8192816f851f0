// wait_group.hpp and memory: what allocates, what doesn't, and what happens when there is none.
#include <lastcall/wait_group.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/wait_group_tools.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <utility>

using lastcall::Clock;
using lastcall::WaitGroup;
using lastcall::detail::MemberView;
using lastcall::detail::WaitGroupAccess;
using support::make_busy;
using support::prepare;
using namespace std::chrono_literals;
using Guard = WaitGroup::Guard;

namespace {

// Allocations of the calling thread: counted, and the n-th from now on refused. (clang's
// ThreadSanitizer has operators of its own that can't be replaced.)
#if defined(LASTCALL_TSAN) && defined(__clang__)
#define COUNTS_ALLOCATIONS 0
#else
#define COUNTS_ALLOCATIONS 1
#endif

thread_local long allocations = 0;
thread_local long refused_from = -1;

#if COUNTS_ALLOCATIONS
bool may_allocate() noexcept {
  ++allocations;
  if (refused_from < 0) return true;
  if (refused_from == 0) return false;
  --refused_from;
  return true;
}

void* allocate(std::size_t size, std::size_t alignment) noexcept {
  if (!may_allocate()) return nullptr;
  void* room = nullptr;
  return ::posix_memalign(&room, alignment, size == 0 ? 1 : size) == 0 ? room : nullptr;
}

// Out of line: g++ takes inlined halves of a pair for a mismatch.
[[gnu::noinline]] void give_back(void* room) noexcept { std::free(room); }

#endif

class RefuseAllocations {
 public:
  explicit RefuseAllocations(long from) { refused_from = from; }
  ~RefuseAllocations() { refused_from = -1; }
};

}  // namespace

#if COUNTS_ALLOCATIONS
void* operator new(std::size_t size) {
  void* const room = allocate(size, alignof(std::max_align_t));
  if (room == nullptr) throw std::bad_alloc();
  return room;
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return allocate(size, alignof(std::max_align_t));
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  void* const room = allocate(size, static_cast<std::size_t>(alignment));
  if (room == nullptr) throw std::bad_alloc();
  return room;
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* room) noexcept { give_back(room); }
void operator delete(void* room, std::size_t) noexcept { give_back(room); }
void operator delete(void* room, std::align_val_t) noexcept { give_back(room); }
void operator delete(void* room, std::size_t, std::align_val_t) noexcept { give_back(room); }
#endif

TEST_CASE("entering without a name never fails for want of memory") {
  WaitGroup group;
  for (long refused = 0; refused < 6; ++refused) {
    std::thread([&] {  // a new thread, which has no record yet
      const RefuseAllocations none(refused);
      for (int turn = 0; turn < 200; ++turn) {
        const Guard first = group.try_enter();
        const Guard second = group.enter();
        if (!first || !second) std::abort();
        group.add();
        group.done();
      }
    })
        .join();
    CHECK(group.count() == 0);
    CHECK(group.wait_for(0s));
  }
}

#if COUNTS_ALLOCATIONS

TEST_CASE("entering with a name enters nobody if there is no memory") {
  const bool busy = GENERATE(false, true);
  const std::string name = "a name that is too long for any small buffer";
  bool finished = false;
  for (long refused = 0; refused < 20 && !finished; ++refused) {
    WaitGroup group;
    prepare(group, busy);
    std::size_t inside = 0;
    try {
      const RefuseAllocations from(refused);
      const Guard first = group.enter(name);
      ++inside;
      const Guard second = group.try_enter(name);
      ++inside;
      const Guard copy = first;
      ++inside;
      Guard assigned;
      assigned = copy;
      ++inside;
      const auto members = group.members();
      finished = members.size() == 4;
    } catch (const std::bad_alloc&) {
      CHECK(inside < 5);
    }
    CHECK(group.count() == 0);
    CHECK(group.members().empty());
    CHECK(group.wait_for(0s));
  }
  CHECK(finished);
}

TEST_CASE("a failed copy leaves its original a member") {
  WaitGroup group;
  const Guard original = group.enter("a name that is too long for any small buffer");
  Guard other = group.enter();
  {
    const RefuseAllocations all(0);
    bool refused = false;
    try {
      other = original;
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    refused_from = -1;
    CHECK(refused);
  }
  CHECK(static_cast<bool>(other));
  CHECK(group.count() == 2);
  CHECK(group.members().size() == 1);
}

#endif

TEST_CASE("a group that is young, leaving, closing and waiting allocate nothing") {
  WaitGroup group;
  const long before = allocations;
  for (int turn = 0; turn < 20; ++turn) {
    const Guard guard = group.enter();
    group.add();
    group.done();
  }
  CHECK(group.wait_for(0s));
  CHECK(allocations == before);

  make_busy(group);
  Guard named = group.enter("named");
  Guard unnamed = group.enter();
  group.add();
  const long after = allocations;
  named.release();
  unnamed.release();
  CHECK_FALSE(group.wait_for(1ms));
  group.close();
  group.done();
  group.wait();
  CHECK(group.count() == 0);
  CHECK(allocations == after);
}

TEST_CASE(
    "the floors above can name a member's thread, tell members apart, and look without waiting") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard first = group.enter("first");
  Guard second = group.enter("second");
  Guard unnamed = group.enter();
  group.add(3);
  WaitGroupAccess::set_thread(first, 4711);
  WaitGroupAccess::set_thread(unnamed, 4711);
  CHECK(group.members()[0].thread_id == 4711);
  CHECK(WaitGroupAccess::member_id(first) != nullptr);
  CHECK(WaitGroupAccess::member_id(first) != WaitGroupAccess::member_id(second));
  CHECK(WaitGroupAccess::member_id(unnamed) == nullptr);
  CHECK(WaitGroupAccess::group_of(unnamed) == &group);
  CHECK(WaitGroupAccess::named_count(group) == 2);
  CHECK(WaitGroupAccess::unnamed_count(group) == 4);

  const void* const id = WaitGroupAccess::member_id(first);
  const Guard moved = std::move(first);
  CHECK(WaitGroupAccess::member_id(moved) == id);
  const long before = allocations;
  int seen = 0;
  bool right = true;
  const bool complete = WaitGroupAccess::visit_members(group, [&](const MemberView& member) {
    ++seen;
    right = right && (member.name == "first" || member.name == "second");
    right = right && (member.name == "first") == (member.id == id);
    right = right && (member.id != id || member.thread_id == 4711);
    right = right && member.entered <= Clock::now() && member.where.line() != 0;
  });
  CHECK(complete);
  CHECK(seen == 2);
  CHECK(right);
  CHECK(allocations == before);

  // One who has seen enough isn't shown the rest.
  int looked_at = 0;
  CHECK(WaitGroupAccess::visit_members(group, [&](const MemberView&) {
    ++looked_at;
    return false;
  }));
  CHECK(looked_at == 1);

  // Somebody holds the lock and doesn't let go: the look says that it missed something.
  bool nested_complete = true;
  std::thread looker;
  WaitGroupAccess::visit_members(group, [&](const MemberView&) {
    if (looker.joinable()) return;
    looker = std::thread(
        [&] { nested_complete = WaitGroupAccess::visit_members(group, [](const MemberView&) {}); });
    looker.join();
    looker = std::thread([] {});
  });
  looker.join();
  CHECK_FALSE(nested_complete);
  for (int turn = 0; turn < 3; ++turn) group.done();
}
