// wait_group.hpp: guards, bare adds, closing, waiting, members. Most of it once with a group that counts
// in its word (young) and once with one that counts in slots (busy).
#include <lastcall/wait_group.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/wait_group_tools.hpp"

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <ratio>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using lastcall::Clock;
using lastcall::SourceLocation;
using lastcall::WaitGroup;
using lastcall::detail::WaitGroupAccess;
using support::make_busy;
using support::prepare;
using support::WaitingThread;
using namespace std::chrono_literals;
using Guard = WaitGroup::Guard;

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

TEST_CASE("a copy of a live guard without a name is let in once closed, and is waited for") {
  WaitGroup group;
  prepare(group, GENERATE(false, true));
  Guard original = group.enter();
  group.close();
  Guard copy = original;
  CHECK(static_cast<bool>(copy));
  CHECK(group.count() == 2);
  original.release();
  CHECK_FALSE(group.wait_for(0s));
  original = copy;
  copy.release();
  CHECK_FALSE(group.wait_for(0s));
  original.release();
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

TEST_CASE("who had a name and is out is not counted among those who have one") {
  WaitGroup group;
  for (int turn = 0; turn < 3; ++turn) const Guard named = group.enter("named");
  CHECK(WaitGroupAccess::named_count(group) == 0);
  const Guard guard = group.enter();
  CHECK(WaitGroupAccess::unnamed_count(group) == 1);
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
    WaitGroup full;
    prepare(full, busy);
    full.add(most / 4);  // as many as there may be
    if (full.count() != most / 4) return 6;
    ::_exit(0);
  });
  CHECK(ended == 0);
}

TEST_CASE("add() by two at once from nothing is one add() after the other") {
  WaitGroup group;
  support::StartingLine line(2);
  std::atomic<bool> over{false};
  std::thread other([&] {
    for (;;) {
      line.ready_steady_go();
      if (over) return;
      group.add(2);
      line.ready_steady_go();
    }
  });
  int wrong = 0;
  for (int round = 0; round < 2000; ++round) {
    line.ready_steady_go();
    group.add();
    line.ready_steady_go();
    wrong += group.count() == 3 ? 0 : 1;
    for (int turn = 0; turn < 3; ++turn) group.done();
    wrong += group.count() == 0 ? 0 : 1;
  }
  over = true;
  line.ready_steady_go();
  other.join();
  CHECK(wrong == 0);
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
#if LASTCALL_LINUX
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

TEST_CASE("a member that leaves while it is looked at stays in memory until then") {
  WaitGroup group;
  Guard guard = group.enter("a name that is too long for any small buffer");
  {
    const lastcall::detail::NamedMembers::Pins pins(WaitGroupAccess::named_members(group));
    guard.release();
    CHECK(group.members().empty());
    REQUIRE(pins.list().size() == 1);
    CHECK(pins.list()[0]->name == "a name that is too long for any small buffer");
  }
  CHECK(group.wait_for(0s));
}

TEST_CASE("names on a list whose lock is held are passed by; those on the others are seen") {
  using lastcall::detail::MemberView;
  using lastcall::detail::NamedMember;
  lastcall::detail::NamedMembers members;
  CHECK(members.size() == 0);
  members.prepare();
  // One on each list: they go by thread, and are looked at in the order of these numbers.
  std::array<NamedMember, 8> eight{{{"0", SourceLocation::current(), 8},
                                    {"1", SourceLocation::current(), 1},
                                    {"2", SourceLocation::current(), 2},
                                    {"3", SourceLocation::current(), 3},
                                    {"4", SourceLocation::current(), 4},
                                    {"5", SourceLocation::current(), 5},
                                    {"6", SourceLocation::current(), 6},
                                    {"7", SourceLocation::current(), 7}}};
  for (NamedMember& member : eight) members.link(member);
  std::string outer;
  const bool complete = members.visit([&](const MemberView& held) {
    std::string inner;
    CHECK_FALSE(members.visit([&](const MemberView& seen) { inner += seen.name; }));
    std::string others = "01234567";
    others.erase(others.find(held.name), 1);
    CHECK(inner == others);
    CHECK(members.size() == 8);
    outer += held.name;
  });
  CHECK(complete);
  CHECK(outer == "01234567");
  for (NamedMember& member : eight) members.unlink(member);
  CHECK(members.size() == 0);
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
