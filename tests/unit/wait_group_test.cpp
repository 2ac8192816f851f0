// wait_group.hpp: guards, bare adds, closing, waiting, members. Where it matters, once with a group in
// exact mode (young) and once in fast mode (busy); see the invariants at the head of wait_group.hpp.
#include <lastcall/wait_group.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if LASTCALL_LINUX && !defined(LASTCALL_TSAN) && (defined(__x86_64__) || defined(__aarch64__))
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#define HAS_SYSTEM_CALL_FILTER 1
#else
#define HAS_SYSTEM_CALL_FILTER 0
#endif

using lastcall::Clock;
using lastcall::SourceLocation;
using lastcall::WaitGroup;
using lastcall::detail::MemberView;
using lastcall::detail::WaitGroupAccess;
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

namespace {

// What the contract says in types.
static_assert(std::is_nothrow_default_constructible_v<WaitGroup>);
static_assert(!std::is_copy_constructible_v<WaitGroup> && !std::is_move_constructible_v<WaitGroup>);
static_assert(!std::is_copy_assignable_v<WaitGroup> && !std::is_move_assignable_v<WaitGroup>);
static_assert(std::is_nothrow_default_constructible_v<Guard>);
static_assert(std::is_nothrow_move_constructible_v<Guard>);
static_assert(std::is_nothrow_move_assignable_v<Guard>);
static_assert(std::is_copy_constructible_v<Guard> && std::is_copy_assignable_v<Guard>);
static_assert(std::is_nothrow_destructible_v<Guard>);
static_assert(std::is_constructible_v<bool, Guard> && !std::is_convertible_v<Guard, bool>);
static_assert(!std::is_constructible_v<Guard, WaitGroup*>);
static_assert(noexcept(std::declval<WaitGroup&>().try_enter()));
static_assert(!noexcept(std::declval<WaitGroup&>().try_enter("name")));
static_assert(noexcept(std::declval<WaitGroup&>().close()));
static_assert(noexcept(std::declval<const WaitGroup&>().is_closed()));
static_assert(noexcept(std::declval<const WaitGroup&>().count()));
static_assert(noexcept(std::declval<Guard&>().release()));
static_assert(std::is_same_v<decltype(std::declval<const WaitGroup&>().wait()), void>);
static_assert(std::is_same_v<decltype(std::declval<const WaitGroup&>().wait_for(1s)), bool>);
static_assert(
    std::is_same_v<decltype(std::declval<const WaitGroup&>().wait_until(Clock::now())), bool>);
static_assert(std::is_same_v<decltype(std::declval<const WaitGroup&>().members()),
                             std::vector<WaitGroup::Member>>);
static_assert(std::is_aggregate_v<WaitGroup::Member>);

// Enters and leaves until the group counts in slots. It always does where there is memory.
void make_busy(WaitGroup& group) {
  for (int turn = 0; turn < 1000 && !WaitGroupAccess::is_fast(group); ++turn) {
    const Guard guard = group.enter();
  }
}

// A group as young as it is made, or a busy one.
void prepare(WaitGroup& group, bool busy) {
  if (busy) make_busy(group);
}

std::string message_of(void (*act)(WaitGroup&), WaitGroup& group) {
  try {
    act(group);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A thread in wait(): when it is made, the group has one waiter more (or the wait is over).
class WaitingThread {
 public:
  explicit WaitingThread(const WaitGroup& group) : WaitingThread(group, Clock::time_point::max()) {}
  WaitingThread(const WaitGroup& group, Clock::time_point deadline)
      : thread_([this, &group, deadline, before = WaitGroupAccess::waiters(group)] {
          waiters_before_ = before;
          if (deadline == Clock::time_point::max()) {
            group.wait();
            result_ = true;
          } else {
            result_ = group.wait_until(deadline);
          }
          returned_ = true;
        }) {
    support::eventually(
        [&] { return returned_.load() || WaitGroupAccess::waiters(group) > waiters_before_; });
  }
  ~WaitingThread() { thread_.join(); }
  bool has_returned() const { return returned_; }
  bool returns() const {
    return support::eventually([this] { return returned_.load(); });
  }
  bool result() const { return result_; }

 private:
  std::atomic<std::size_t> waiters_before_{static_cast<std::size_t>(-1)};
  std::atomic<bool> returned_{false};
  std::atomic<bool> result_{false};
  std::thread thread_;
};

}  // namespace

TEST_CASE("a guard is a member until it is released or destroyed") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  CHECK(group.count() == 0);
  {
    Guard first = group.enter();
    CHECK(static_cast<bool>(first));
    CHECK(group.count() == 1);
    const Guard second = group.try_enter();
    CHECK(static_cast<bool>(second));
    CHECK(group.count() == 2);
    first.release();
    CHECK_FALSE(static_cast<bool>(first));
    CHECK(group.count() == 1);
    first.release();
    CHECK(group.count() == 1);
  }
  CHECK(group.count() == 0);
}

TEST_CASE("a default guard holds nothing, and releasing it does nothing") {
  Guard guard;
  CHECK_FALSE(static_cast<bool>(guard));
  guard.release();
  Guard copy = guard;
  CHECK_FALSE(static_cast<bool>(copy));
  Guard moved = std::move(guard);
  CHECK_FALSE(static_cast<bool>(moved));
  copy = moved;
  CHECK_FALSE(static_cast<bool>(copy));
}

TEST_CASE("moving a guard moves the membership") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard first = group.enter("named");
  Guard second = std::move(first);
  CHECK_FALSE(static_cast<bool>(first));
  CHECK(static_cast<bool>(second));
  CHECK(group.count() == 1);
  CHECK(group.members().size() == 1);

  Guard third = group.enter();
  CHECK(group.count() == 2);
  third = std::move(second);  // lets go of what it held
  CHECK(group.count() == 1);
  CHECK(group.members().size() == 1);
  CHECK_FALSE(static_cast<bool>(second));

  Guard& itself = third;
  third = std::move(itself);
  CHECK(static_cast<bool>(third));
  CHECK(group.count() == 1);
  CHECK(group.members().size() == 1);

  std::swap(first, third);
  CHECK(static_cast<bool>(first));
  CHECK_FALSE(static_cast<bool>(third));
  CHECK(group.count() == 1);
}

TEST_CASE("copying a live guard enters again, under its name") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  const Guard named = group.enter("flush");
  const Guard unnamed = group.enter();
  Guard copy = named;
  CHECK(group.count() == 3);
  Guard other = unnamed;
  CHECK(group.count() == 4);
  const auto members = group.members();
  REQUIRE(members.size() == 2);
  CHECK(members[0].name == "flush");
  CHECK(members[1].name == "flush");
  CHECK(members[1].where.line() == members[0].where.line());
  CHECK(members[1].entered >= members[0].entered);

  other = copy;
  CHECK(group.count() == 4);
  CHECK(group.members().size() == 3);
  Guard& itself = other;
  other = itself;
  CHECK(group.count() == 4);
  CHECK(group.members().size() == 3);
}

TEST_CASE("a copy of a live guard is let in once closed, and is waited for") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard original = group.enter("flush");
  group.close();
  Guard copy = original;
  CHECK(static_cast<bool>(copy));
  Guard third;
  third = copy;
  CHECK(group.count() == 3);
  original.release();
  third.release();
  CHECK_FALSE(group.wait_for(0s));
  copy.release();
  CHECK(group.wait_for(0s));
}

TEST_CASE("a closed group refuses to let anybody in, and says so") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  const Guard inside = group.enter();
  CHECK_FALSE(group.is_closed());
  group.close();
  CHECK(group.is_closed());
  CHECK_THROWS_AS(group.enter(), std::logic_error);
  CHECK_THROWS_AS(group.enter("name"), std::logic_error);
  CHECK_THROWS_AS(group.add(), std::logic_error);
  CHECK_THROWS_AS(group.add(0), std::logic_error);
  CHECK_FALSE(static_cast<bool>(group.try_enter()));
  CHECK_FALSE(static_cast<bool>(group.try_enter("name")));
  CHECK(group.count() == 1);
  CHECK(group.members().empty());

  CHECK(contains(message_of([](WaitGroup& at) { at.enter(); }, group), "closed, with 1 still in"));
  CHECK(contains(message_of([](WaitGroup& at) { at.enter("flush"); }, group), "flush"));
  CHECK(
      contains(message_of([](WaitGroup& at) { at.enter("flush"); }, group), "wait_group_test.cpp"));
  CHECK(contains(message_of([](WaitGroup& at) { at.add(7); }, group), "add(7)"));

  group.close();  // idempotent
  CHECK(group.is_closed());
  CHECK(group.count() == 1);
}

TEST_CASE("add() refuses a closed group also while added ones are out") {
  WaitGroup group;
  group.add(2);
  group.close();
  CHECK_THROWS_AS(group.add(), std::logic_error);
  CHECK(group.count() == 2);
  group.done();
  group.done();
  CHECK(group.wait_for(0s));
  CHECK_THROWS_AS(group.add(), std::logic_error);
  CHECK_THROWS_AS(group.done(), std::logic_error);
}

TEST_CASE("add() and done() count as sync.WaitGroup's do") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  group.add();
  CHECK(group.count() == 1);
  group.add(3);
  CHECK(group.count() == 4);
  group.add(0);
  CHECK(group.count() == 4);
  const Guard guard = group.enter();
  CHECK(group.count() == 5);
  CHECK_FALSE(group.wait_for(0s));
  for (int turn = 0; turn < 4; ++turn) group.done();
  CHECK(group.count() == 1);
}

TEST_CASE("add(0) of an empty group lets nobody in") {
  WaitGroup group;
  group.add(0);
  CHECK(group.count() == 0);
  CHECK(group.wait_for(0s));
}

TEST_CASE("done() takes back only what add() gave, never a guard's place") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  CHECK_THROWS_AS(group.done(), std::logic_error);
  CHECK(group.count() == 0);
  const Guard first = group.enter();
  const Guard second = group.enter();
  CHECK_THROWS_AS(group.done(), std::logic_error);
  CHECK(group.count() == 2);
  const std::string message = message_of([](WaitGroup& at) { at.done(); }, group);
  CHECK(contains(message, "done(): 0 are left"));
  CHECK(contains(message, "2 guards are in"));
  group.add();
  group.done();
  CHECK_THROWS_AS(group.done(), std::logic_error);
  CHECK(group.count() == 2);
}

TEST_CASE("add() refuses more than can be counted, and adds nothing then") {
  constexpr std::size_t most = static_cast<std::size_t>(-1);
  const bool busy = GENERATE(false, true);
  {
    WaitGroup group;
    prepare(group, busy);
    CHECK_THROWS_AS(group.add(most), std::invalid_argument);
    CHECK(group.count() == 0);
    CHECK(group.wait_for(0s));
    CHECK(contains(message_of([](WaitGroup& at) { at.add(most); }, group),
                   "add(" + std::to_string(most) + ")"));
  }
  // In a process of its own: nobody has the time to call done() so many times, and the group may not
  // be destroyed before.
  const int ended = support::in_child_process([&] {
    WaitGroup group;
    prepare(group, busy);
    constexpr std::size_t big = most / 8;
    group.add(big);
    if (group.count() != big) return 1;
    group.add(big);
    if (group.count() != 2 * big) return 2;
    try {
      group.add(big);
      ::_exit(3);
    } catch (const std::invalid_argument&) {
    }
    if (group.count() != 2 * big) return 4;
    group.done();
    if (group.count() != 2 * big - 1) return 5;
    ::_exit(0);
  });
  CHECK(ended == 0);
}

TEST_CASE("members() lists the named guards that are out, oldest first") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  CHECK(group.members().empty());
  const auto before = Clock::now();
  const Guard unnamed = group.enter();
  Guard first = group.enter("first");
  const auto line = SourceLocation::current().line() - 1;
  const Guard second = group.try_enter("second");
  std::optional<Guard> third;
  std::atomic<pid_t> other{0};
  std::thread([&] {
    other = support::thread_id();
    third = group.enter("a name that is too long for any small buffer");
  }).join();
  const Guard last = group.enter("");

  auto members = group.members();
  REQUIRE(members.size() == 4);
  CHECK(members[0].name == "first");
  CHECK(members[0].where.line() == line);
  CHECK(contains(members[0].where.file_name(), "wait_group_test.cpp"));
  CHECK(members[1].name == "second");
  CHECK(members[2].name == "a name that is too long for any small buffer");
  CHECK(members[3].name.empty());
#if defined(__linux__)
  CHECK(members[0].thread_id == support::thread_id());
  CHECK(members[2].thread_id == other);
#endif
  for (std::size_t at = 0; at < members.size(); ++at) {
    CHECK(members[at].entered >= (at == 0 ? before : members[at - 1].entered));
    CHECK(members[at].entered <= Clock::now());
  }

  first.release();
  third.reset();
  members = group.members();
  REQUIRE(members.size() == 2);
  CHECK(members[0].name == "second");
  CHECK(group.count() == 3);
}

TEST_CASE("members() keeps the order of entry with many members of many threads") {
  WaitGroup group;
  std::vector<std::vector<Guard>> guards(8);
  for (std::size_t round = 0; round < 50; ++round) {
    for (auto& of_thread : guards) {
      std::thread([&] { of_thread.push_back(group.enter(std::to_string(round))); }).join();
    }
  }
  const auto members = group.members();
  REQUIRE(members.size() == 400);
  for (std::size_t at = 0; at < members.size(); ++at) {
    REQUIRE(members[at].name == std::to_string(at / 8));
  }
}

TEST_CASE("members() may be called while others enter and leave") {
  WaitGroup group;
  std::atomic<bool> over{false};
  support::Threads threads;
  for (int number = 0; number < 3; ++number) {
    threads.start([&] {
      while (!over) {
        Guard guard = group.enter("a name that is too long for any small buffer");
        const Guard copy = guard;
        guard.release();
      }
    });
  }
  bool intact = true;
  for (int turn = 0; turn < 500; ++turn) {
    const auto members = group.members();
    for (const auto& member : members) {
      intact = intact && member.name == "a name that is too long for any small buffer";
    }
    intact = intact && members.size() <= 6;
  }
  over = true;
  threads.join();
  CHECK(intact);
  CHECK(group.members().empty());
  CHECK(group.count() == 0);
}

TEST_CASE("waiting for an empty group returns at once, closed or not") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  group.wait();
  CHECK(group.wait_for(0s));
  CHECK(group.wait_for(-1s));
  CHECK(group.wait_for(std::chrono::hours::max()));
  CHECK(group.wait_until(Clock::time_point::min()));
  CHECK(group.wait_until(Clock::time_point::max()));
  group.close();
  group.wait();
  CHECK(group.wait_for(0s));
}

TEST_CASE("wait() returns when the last member has left, and not before") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard first = group.enter("first");
  Guard second = group.enter();
  group.add(2);
  const WaitingThread waiter(group);
  CHECK_FALSE(waiter.has_returned());
  first.release();
  group.done();
  CHECK_FALSE(waiter.has_returned());
  group.done();
  CHECK_FALSE(waiter.has_returned());
  second.release();
  CHECK(waiter.returns());
  CHECK(group.count() == 0);
}

TEST_CASE("many waiters, with and without a deadline, are all let go by one zero") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard guard = group.enter();
  std::vector<std::unique_ptr<WaitingThread>> waiters;
  for (int number = 0; number < 8; ++number) {
    waiters.push_back(number % 2 == 0 ? std::make_unique<WaitingThread>(group)
                                      : std::make_unique<WaitingThread>(group, Clock::now() + 1h));
  }
  for (const auto& waiter : waiters) CHECK_FALSE(waiter->has_returned());
  guard.release();
  for (const auto& waiter : waiters) CHECK(waiter->returns());
  for (const auto& waiter : waiters) CHECK(waiter->result());
}

TEST_CASE("a waiter whose time is up says false and leaves the others waiting") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard guard = group.enter();
  const auto start = Clock::now();
  CHECK_FALSE(group.wait_for(20ms));
  CHECK(Clock::now() - start >= 20ms);
  CHECK_FALSE(group.wait_for(-1s));
  CHECK_FALSE(group.wait_for(std::chrono::nanoseconds::min()));
  CHECK_FALSE(group.wait_until(Clock::now() - 1h));
  CHECK_FALSE(group.wait_until(Clock::time_point::min()));

  const WaitingThread patient(group);
  const WaitingThread hasty(group, Clock::now() + 20ms);
  CHECK(hasty.returns());
  CHECK_FALSE(hasty.result());
  CHECK_FALSE(group.wait_for(1ms));
  CHECK_FALSE(patient.has_returned());
  guard.release();
  CHECK(patient.returns());
}

TEST_CASE("a huge duration means for ever") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard guard = group.enter();
  std::atomic<int> released{0};
  support::Threads threads;
  threads.start([&] { released += group.wait_for(std::chrono::hours::max()) ? 1 : 100; });
  threads.start([&] { released += group.wait_for(Clock::duration::max()) ? 1 : 100; });
  threads.start([&] {
    using Wide = std::chrono::duration<double, std::ratio<86400 * 365>>;
    released += group.wait_for(Wide(1e300)) ? 1 : 100;
  });
  support::eventually([&] { return released != 0 || WaitGroupAccess::waiters(group) == 3; });
  CHECK(released == 0);
  guard.release();
  threads.join();
  CHECK(released == 3);
}

TEST_CASE("a waiter is let go by a zero also if others enter right after it") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard first = group.enter();
  const WaitingThread waiter(group);
  CHECK_FALSE(waiter.has_returned());
  first.release();
  Guard second = group.enter();
  CHECK(waiter.returns());
  CHECK(group.count() == 1);
  CHECK_FALSE(group.wait_for(0s));
}

TEST_CASE("a new waiter does not steal the zero of one that is not awake yet") {
  WaitGroup group;
  for (int round = 0; round < 200; ++round) {
    Guard first = group.enter();
    const WaitingThread early(group);
    first.release();
    Guard second = group.enter();
    const bool late = group.wait_for(10us);  // sets the flag again, and takes it back
    const bool early_is_out = early.returns();
    second.release();
    REQUIRE_FALSE(late);
    REQUIRE(early_is_out);
  }
  CHECK(group.count() == 0);
}

TEST_CASE("what a member did happens before wait() returns") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::array<int, 4> written{};
  support::Threads threads;
  for (std::size_t number = 0; number < written.size(); ++number) {
    if (number == 0) group.add();
    threads.start(
        [&written, &group, number, guard = number == 0 ? Guard() : group.enter()]() mutable {
          written[number] = static_cast<int>(number) + 1;
          if (number == 0) {
            group.done();
          } else {
            guard.release();
          }
        });
  }
  group.wait();
  CHECK(written == std::array<int, 4>{1, 2, 3, 4});
}

TEST_CASE("any thread may release a guard") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::vector<Guard> guards;
  for (int number = 0; number < 100; ++number) {
    guards.push_back(number % 3 == 0 ? group.enter("named") : group.enter());
  }
  std::thread([&] { guards.erase(guards.begin() + 50, guards.end()); }).join();
  CHECK(group.count() == 50);
  CHECK_FALSE(group.wait_for(0s));
  std::thread([&] { guards.clear(); }).join();
  CHECK(group.count() == 0);
  CHECK(group.wait_for(0s));
  CHECK(group.members().empty());
}

TEST_CASE("a thread may end with its guards out") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::vector<Guard> guards;
  for (int number = 0; number < 100; ++number) {
    std::thread([&] {
      guards.push_back(group.enter());
      guards.push_back(group.enter());
      guards.erase(guards.begin());
    }).join();
  }
  CHECK(group.count() == 100);
  CHECK_FALSE(group.wait_for(0s));
  CHECK(group.count() == 100);
  guards.clear();
  CHECK(group.wait_for(0s));
}

TEST_CASE("the place of a thread that has ended goes to another") {
  WaitGroup group;
  make_busy(group);
  int without_place = 0;
  for (int number = 0; number < 2100; ++number) {  // twice as many as there are places
    std::thread([&] {
      const Guard guard = group.enter();
      if (lastcall::detail::thread_state.record == nullptr) ++without_place;
    }).join();
  }
  CHECK(without_place == 0);
  CHECK(group.count() == 0);
}

TEST_CASE("a guard that a thread_local holds leaves when the thread ends") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  std::thread([&] {
    static thread_local Guard late;
    late = group.enter();
  }).join();
  CHECK(group.count() == 0);
  CHECK(group.wait_for(0s));
}

TEST_CASE("more threads than a group has slots are counted as well") {
  // The table has 1008 places, one for each live thread.
  constexpr int threads_wanted = support::under_sanitizer ? 1100 : 1500;
  WaitGroup group;
  make_busy(group);
  struct Shared {
    WaitGroup& group;
    support::Gate& all_in;
    support::Gate& all_out;
    std::atomic<int> inside{0};
  };
  support::Gate all_in;
  support::Gate all_out;
  Shared shared{group, all_in, all_out};
  std::vector<pthread_t> threads;
  pthread_attr_t small;
  ::pthread_attr_init(&small);
  ::pthread_attr_setstacksize(&small, std::size_t{128} << 10U);
  for (int number = 0; number < threads_wanted; ++number) {
    pthread_t thread{};
    const int failed = ::pthread_create(
        &thread, &small,
        [](void* argument) -> void* {
          Shared& with = *static_cast<Shared*>(argument);
          for (int turn = 0; turn < 10; ++turn) const Guard brief = with.group.enter();
          Guard guard = with.group.enter();
          ++with.inside;
          with.all_in.wait();
          guard.release();
          for (int turn = 0; turn < 10; ++turn) const Guard brief = with.group.enter();
          return nullptr;
        },
        &shared);
    if (failed != 0) break;
    threads.push_back(thread);
  }
  ::pthread_attr_destroy(&small);
  const int started = static_cast<int>(threads.size());
  CHECK(support::eventually([&] { return shared.inside == started; }));
  CHECK(group.count() == threads.size());
  CHECK(WaitGroupAccess::is_fast(group));
  CHECK_FALSE(group.wait_for(0s));
  CHECK(group.count() == threads.size());
  all_in.open();
  group.wait();
  for (const pthread_t thread : threads) ::pthread_join(thread, nullptr);
  CHECK(group.count() == 0);
  if (started < 1009) WARN("only " << started << " threads could be had");
}

TEST_CASE("close() races with try_enter(): a guard was given and is waited for, or refused") {
  const bool busy = GENERATE(false, true);
  for (int round = 0; round < 300; ++round) {
    WaitGroup group;
    prepare(group, busy);
    std::atomic<int> inside{0};
    std::atomic<int> given{0};
    std::atomic<bool> refused_then_given{false};
    support::Threads threads;
    support::StartingLine line(3);
    for (int number = 0; number < 2; ++number) {
      threads.start([&] {
        line.ready_steady_go();
        bool refused = false;
        for (int turn = 0; turn < 200; ++turn) {
          if (Guard guard = group.try_enter()) {
            ++given;
            ++inside;
            if (refused) refused_then_given = true;
            --inside;
          } else {
            refused = true;
          }
        }
      });
    }
    line.ready_steady_go();
    if (round % 2 == 0) std::this_thread::yield();
    group.close();
    group.wait();
    // From here on nobody can be in between: entered() and waited for, or refused for ever.
    const int inside_after = inside;
    const int given_after = given;
    threads.join();
    REQUIRE(inside_after == 0);
    REQUIRE(given == given_after);
    REQUIRE_FALSE(refused_then_given);
    REQUIRE(group.count() == 0);
  }
}

TEST_CASE("the group may be destroyed the moment that wait() has returned") {
  const bool busy = GENERATE(false, true);
  constexpr int members = 3;
  const int rounds = support::under_sanitizer ? 1000 : 4000;
  std::atomic<std::uintptr_t> handed{0};
  std::atomic<int> entered{0};
  std::atomic<bool> over{false};
  support::Threads threads;
  support::StartingLine line(members + 1);
  for (int number = 0; number < members; ++number) {
    threads.start([&, number] {
      for (;;) {
        line.ready_steady_go();
        if (over) return;
        auto* const group = reinterpret_cast<WaitGroup*>(handed.load());
        Guard guard = number == 0 ? group->enter("named") : group->enter();
        ++entered;
        guard.release();  // the last that this thread has to do with the group
      }
    });
  }
  for (int round = 0; round < rounds; ++round) {
    auto group = std::make_unique<WaitGroup>();
    if (busy) make_busy(*group);
    entered = 0;
    handed = reinterpret_cast<std::uintptr_t>(group.get());
    line.ready_steady_go();
    while (entered != members) std::this_thread::yield();
    group->wait();
    group.reset();
  }
  over = true;
  line.ready_steady_go();
  threads.join();
  SUCCEED("no leaver touched a group that was gone, or the sanitizer would have said so");
}

TEST_CASE("the group may be destroyed by whoever of several waiters returns first") {
  for (int round = 0; round < 300; ++round) {
    auto* const group = new WaitGroup;
    Guard guard = group->enter();
    std::atomic<bool> taken{false};
    support::Threads threads;
    for (int number = 0; number < 3; ++number) {
      threads.start([&] {
        group->wait();
        if (!taken.exchange(true)) delete group;
      });
    }
    const bool all_wait =
        support::eventually([&] { return WaitGroupAccess::waiters(*group) == 3; });
    guard.release();
    threads.join();
    REQUIRE(all_wait);
  }
  SUCCEED("nobody used it afterwards");
}

TEST_CASE("a group becomes fast when it is busy, exact when it is waited for, and fast again") {
  WaitGroup group;
  {
    const Guard guard = group.enter();
    CHECK_FALSE(WaitGroupAccess::is_fast(group));
  }
  make_busy(group);
  CHECK(WaitGroupAccess::is_fast(group));
  Guard guard = group.enter();
  CHECK(WaitGroupAccess::is_fast(group));
  CHECK(group.count() == 1);
  CHECK_FALSE(group.wait_for(0s));
  CHECK_FALSE(WaitGroupAccess::is_fast(group));
  CHECK(group.count() == 1);
  {
    const WaitingThread waiter(group);
    make_busy(group);
    CHECK_FALSE(WaitGroupAccess::is_fast(group));  // not while somebody waits
    guard.release();
    CHECK(waiter.returns());
  }
  make_busy(group);
  CHECK(WaitGroupAccess::is_fast(group));
  guard = group.enter();
  group.close();
  CHECK(WaitGroupAccess::is_fast(group));
  CHECK_FALSE(static_cast<bool>(group.try_enter()));
  guard.release();
  group.wait();
  CHECK_FALSE(WaitGroupAccess::is_fast(group));
}

TEST_CASE("a deadline holds also while a thread is stuck inside a section") {
  WaitGroup group;
  make_busy(group);
  support::Gate inside;
  support::Gate leave;
  std::thread stuck([&] {
    auto* const record = lastcall::detail::ThreadSections::instance()->attach();
    record->open(WaitGroupAccess::section_of(group));
    inside.open();
    leave.wait();
    record->close();
  });
  const bool came = inside.wait();
  const bool zero = group.wait_for(20ms);
  const bool still_fast = WaitGroupAccess::is_fast(group);
  Guard guard = group.enter();
  const std::size_t count = group.count();
  std::atomic<pid_t> id{0};
  std::atomic<bool> returned{false};
  std::thread patient([&] {
    id = support::thread_id();
    group.wait();
    returned = true;
  });
  support::let_it_block(id);
  const bool early = returned;
  const bool second = group.wait_for(20ms);  // the other one has the lock, and that doesn't matter
  leave.open();
  guard.release();
  patient.join();
  stuck.join();
  CHECK(came);
  CHECK_FALSE(zero);
  CHECK(still_fast);
  CHECK(count == 1);
  CHECK_FALSE(early);
  CHECK_FALSE(second);
  CHECK(returned);
}

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

TEST_CASE("a group destroyed with somebody in says who, and terminates") {
  const int kind = GENERATE(0, 1, 2, 3);
  int ends[2] = {-1, -1};
  REQUIRE(::pipe(ends) == 0);
  const int ended = support::in_child_process([&] {
    ::dup2(ends[1], STDERR_FILENO);
    alignas(WaitGroup) unsigned char room[sizeof(WaitGroup)];
    auto* const group = ::new (static_cast<void*>(room)) WaitGroup;
    prepare(*group, kind % 2 == 1);
    auto* const guards = new std::vector<Guard>;
    if (kind < 2) {
      guards->push_back(group->enter("flush\n"));
      guards->push_back(group->enter());
    } else if (kind == 2) {
      group->add();
    } else {
      for (int number = 0; number < 200; ++number) {
        guards->push_back(
            group->enter("a name that is rather long, number " + std::to_string(number)));
      }
    }
    group->~WaitGroup();
    return 0;
  });
  ::close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t got = 0; (got = ::read(ends[0], buffer, sizeof buffer)) > 0;) {
    text.append(buffer, static_cast<std::size_t>(got));
  }
  ::close(ends[0]);
  INFO(text);
  CHECK(ended == 128 + SIGABRT);
  if (kind < 2) {
    CHECK(contains(text, "lastcall: WaitGroup destroyed with 2 members still in: 'flush?' ("));
    CHECK(contains(text, "wait_group_test.cpp:"));
    CHECK(contains(text, "), 1 unnamed\n"));
  } else if (kind == 2) {
    CHECK(contains(text, "lastcall: WaitGroup destroyed with 1 member still in: 1 unnamed\n"));
  } else {
    CHECK(contains(text, "with 200 members still in: 'a name that is rather long, number 0' ("));
    CHECK(contains(text, " more with names\n"));
  }
}

TEST_CASE("in a forked child a new group works, whatever the parent's threads were doing") {
  alignas(WaitGroup) unsigned char room[sizeof(WaitGroup)];
  auto* const group = ::new (static_cast<void*>(room)) WaitGroup;
  make_busy(*group);
  std::atomic<bool> over{false};
  support::Threads threads;
  for (int number = 0; number < 2; ++number) {
    threads.start([&] {
      while (!over) const Guard guard = group->enter();
    });
  }
  int failures = 0;
  for (int round = 0; round < 20; ++round) {
    failures += support::in_child_process([&] {
      // At the same address, where the parent's threads may have been in the middle of a section.
      auto* const mine = ::new (static_cast<void*>(room)) WaitGroup;
      make_busy(*mine);
      Guard guard = mine->enter();
      if (mine->wait_for(0s)) return 1;
      guard.release();
      return mine->wait_for(10s) ? 0 : 1;
    });
  }
  over = true;
  threads.join();
  CHECK(failures == 0);
  group->wait();
  group->~WaitGroup();
}

#if HAS_SYSTEM_CALL_FILTER

namespace {

// From here on this process's membarrier(2) fails with ENOSYS, as in an old kernel or a sandbox.
bool forbid_membarrier() {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{4, program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0 &&
         ::syscall(SYS_membarrier, 0, 0) == -1 && errno == ENOSYS;
}

}  // namespace

TEST_CASE("waiting still works when a filter takes membarrier away after it was granted") {
  WaitGroup group;
  make_busy(group);
  const int ended = support::in_child_process([&] {
    if (!forbid_membarrier()) return 77;
    Guard guard = group.enter();
    if (!WaitGroupAccess::is_fast(group) || group.wait_for(0s)) return 1;
    make_busy(group);
    guard.release();
    return group.wait_for(10s) ? 0 : 2;
  });
  if (ended == 77) WARN("no filter can be had here");
  CHECK((ended == 0 || ended == 77));
}

#endif
