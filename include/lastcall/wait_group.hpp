// A counter of work in flight that can be waited for: Go's sync.WaitGroup, with guards instead of
// paired calls, a door that can be shut, and names for those who are still in.
//
// Guards count as the kernel's percpu_ref does. A group starts in exact mode: one atomic word. When it
// turns out to be busy it becomes fast: each thread counts in a slot of its own, by plain loads and
// stores, in a section (detail/thread_sections.hpp: S1 to S3, W1 to W3). The first waiter turns it
// back: shuts the sections, waits them out, and moves their sum to the word, where zero is exact.
//
// Invariants. The code in detail/group_count.hpp, the stress test and tests/model/wait_group.pml refer
// to them by number.
//
//  G1  The number of members is the word's count, and in fast mode that less its bias, plus the sum of all
//      slots, less the part of that sum that the word has already. A member is added once and taken away
//      once, each by one read-modify-write of the word or by one store to a slot. Which thread takes it away
//      doesn't matter: a slot (entries less leavings), and the biased count, may be negative.
//  G2  A slot is written by the thread of that number alone, and gets a new value only in a section's S3
//      whose S2 saw the word fast. So no update is lost, and none comes after W3. Nobody empties a slot:
//      S1, with the value from before, may come at any time. A number changes hands, with whatever is in
//      its slots, by release and acquire; and whose threads have slots is settled once.
//  G3  `closed` and the count are bits of one word, and both ways in look at it: an entry in exact mode
//      in the very operation that counts, a section in its S2. An entry that saw the door open is
//      counted, or is in a section that a waiter will wait out: given and waited for, or refused.
//  G4  The word becomes fast, or stops being so, under the lock only. Under the lock and not fast means:
//      exact, all that the slots hold was moved, and no S2 that counts.
//  G5  The list of waiters and `waiting` change under the lock. `waiting` is up while the list isn't
//      empty; it goes up in an operation that sees a count above zero. While it is up the word is not
//      made fast.
//  G6  In exact mode zero is reached by one operation. Without `waiting` it is the leaver's last touch
//      of the group. With it, the last member takes the lock while it is still counted, and the zero,
//      `waiting` going down and the taking of the whole list are one critical section, whose unlock is
//      its last touch. Nobody's wait() returns before: who finds the count zero does so under the lock,
//      and who sleeps is released after. So the group may be destroyed when wait() has returned. A
//      leaver in a section does not touch the group after S3, and W3 has waited for that.
//  G7  A waiter's word is written once, last, by who took the list; only then, or after it unlinked
//      itself under the lock, does the waiter leave. Woken by address. One zero releases exactly those
//      who waited then, whatever enters afterwards: no round is missed, none is early.
//  G8  All that a member did before it left happens before wait() returns. In exact mode: leavers
//      release, read-modify-writes carry that on, and the last leaver or the waiter acquires. In a
//      section: S3 releases, W3 acquires, and the move to the word releases it to other waiters.
//  G9  Bare add()s are one member together: who raises their count from nothing enters, and who takes
//      the last back leaves. So done() can take only what add() gave, and never a guard's place.
//
// What was tried, and what it gave (a guard entered and released, nanoseconds of processor time; one
// thread | two on two cores; g++ 12 -O2, AMD Zen 5 as a virtual machine; tests/bench measures it on yours):
//   two read-modify-writes of one word        10.0 | 32    the bare limit, and exact mode
//   slots in sections, S1 an exchange         11.1 | 11.1  what there is without membarrier
//   slots in sections, a record beside them    2.1 | 2.2   (clang 14: 4.1 | 4.3)
// On an AMD Zen 3, whose uncontended read-modify-writes take half of that, the pair takes 4.3, slots with a
// record of who is inside 5.6, and the stamp in the slot's own words, which is what there is now, 4.7 (48
// instructions instead of 71). With one word for entries and leavings, each waiting for the store of the one
// before, it took 6.1.
// Plain slots without sections, each leaver looking at the word after it counted itself out, save a store
// more; but by then the group may be gone. A slot that counts entries and leavings apart needs no move of
// the sum, but then each leaver would have to wake a waiter, who would add up all slots every time.
//
// fork(): the child has none of the parent's other threads, so a group in which they were in never
// empties there, and one at which they waited must not be used there; groups made in the child work.
// Signal handlers: close() and is_closed() may be used there, nothing else.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/group_count.hpp>
#include <lastcall/detail/named_members.hpp>
#include <lastcall/detail/source_location.hpp>

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace lastcall {

namespace detail {
struct WaitGroupAccess;
}

/// Counts members and waits until none is left. Every member function is thread-safe. As with any
/// object, its last call must have returned before it is destroyed, but for the leaving of members that
/// a wait() has seen go: the group may be destroyed the moment that wait() has returned.
class alignas(detail::cache_line) WaitGroup {
 public:
  /// Membership for as long as it lives. Movable; a copy of a live one is a member of its own, under the
  /// same name, also when the group is closed (somebody is in, so nobody has been told that all are
  /// out). Any thread may release or destroy it, but not two at once. The group must outlive it.
  class Guard {
   public:
    /// Holds nothing.
    Guard() noexcept = default;
    Guard(Guard&& other) noexcept
        : group_(std::exchange(other.group_, nullptr)),
          member_(std::exchange(other.member_, nullptr)) {}
    /// Enters again: the copy is listed with the original's name and `where`, this thread and now.
    /// Throws std::bad_alloc if it has a name, and then nobody entered.
    Guard(const Guard& other);
    Guard& operator=(Guard&& other) noexcept {
      Guard(std::move(other)).swap(*this);
      return *this;
    }
    Guard& operator=(const Guard& other) {
      if (this != &other) Guard(other).swap(*this);
      return *this;
    }
    ~Guard() { release(); }
    void swap(Guard& other) noexcept {
      std::swap(group_, other.group_);
      std::swap(member_, other.member_);
    }
    /// Whether it is a member.
    explicit operator bool() const noexcept { return group_ != nullptr; }
    /// Leaves early; does nothing if it holds nothing. All that this thread did before happens before
    /// the return of the wait() that sees it. A few nanoseconds if no one waits; never a lock but for a
    /// name's and for the last member's, never an allocation.
    void release() noexcept {
      WaitGroup* const group = std::exchange(group_, nullptr);
      if (group == nullptr) return;
      detail::NamedMember* const member = std::exchange(member_, nullptr);
      if (member != nullptr) group->members_.unlink(*member);
      group->count_.leave();
      // Last, and no business of the group's: somebody may hold the allocator's lock for ever.
      if (member != nullptr) member->let_go();
    }

   private:
    friend class WaitGroup;
    friend struct detail::WaitGroupAccess;
    explicit Guard(WaitGroup* group, detail::NamedMember* member = nullptr) noexcept
        : group_(group), member_(member) {}

    WaitGroup* group_ = nullptr;
    detail::NamedMember* member_ = nullptr;
  };

  /// A named guard that is out.
  struct Member {
    std::string name{};
    SourceLocation where{};       ///< where it entered
    pid_t thread_id = 0;          ///< the thread that entered
    Clock::time_point entered{};  ///< when
  };

  WaitGroup() noexcept = default;
  WaitGroup(const WaitGroup&) = delete;
  WaitGroup& operator=(const WaitGroup&) = delete;
  /// Terminates, after a message on stderr that says who it is, if somebody is still in: a guard would
  /// leave a group that is no more.
  ~WaitGroup() {
    if (count() != 0) terminate_with_members();
  }

  /// Becomes a member. Throws std::logic_error once closed. Two threads do twice what one does: a busy
  /// group (some dozens of entries without a wait between them) gets a cache line for each thread, 1 KiB
  /// for the first 16. Without memory for that it is slower.
  Guard enter() {
    if (!count_.enter(detail::GroupCount::closed)) refuse("enter()");
    return Guard(this);
  }
  /// The same, and listed by members() until it leaves. Throws std::bad_alloc too; then nobody entered.
  /// Cost: an allocation, a clock reading and two system-free locks that threads rarely share.
  Guard enter(std::string name, SourceLocation where = SourceLocation::current());
  /// Becomes a member, or gives an empty guard once closed.
  Guard try_enter() noexcept {
    return count_.enter(detail::GroupCount::closed) ? Guard(this) : Guard();
  }
  /// The same, named. Throws std::bad_alloc; then nobody entered.
  Guard try_enter(std::string name, SourceLocation where = SourceLocation::current());

  /// Counts `n` in, by hand: prefer guards, which can't be forgotten. Throws std::logic_error once
  /// closed, std::invalid_argument if the sum doesn't fit; then nothing was added.
  void add(std::size_t n = 1);
  /// Takes one of them back. Throws std::logic_error if all that were added are back already, and then
  /// the count is as before: guards can't be taken away by mistake.
  void done();

  /// Nobody enters any more, but for copies of live guards. Idempotent, lock-free, no system call.
  void close() noexcept { count_.close(); }
  bool is_closed() const noexcept { return count_.is_closed(); }

  /// How many are in. Exact when nobody is entering or leaving.
  std::size_t count() const noexcept;

  /// Blocks until the count is zero: at some moment between the call and its return nobody was in; who
  /// entered before the call and hasn't left is always waited for. Members may come and go meanwhile.
  void wait() const { count_.wait_until(Clock::time_point::max()); }
  /// The same for a bounded time; true: zero. A huge duration means for ever, a negative one a look.
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> duration) const {
    return count_.wait_until(detail::deadline_after(duration));
  }
  /// The same until a time point of Clock.
  template <class Duration>
  bool wait_until(std::chrono::time_point<Clock, Duration> time) const {
    return count_.wait_until(detail::saturated(time));
  }

  /// The named guards that are out now, oldest first. Throws std::bad_alloc. Those who enter or leave
  /// meanwhile are not held up while the names are copied.
  std::vector<Member> members() const;

 private:
  friend struct detail::WaitGroupAccess;

  static constexpr std::size_t most_added = static_cast<std::size_t>(-1) / 4;

  detail::NamedMember* list(std::string& name, SourceLocation where, std::uint64_t refuse);
  [[noreturn]] void refuse(const std::string& call) const;
  [[noreturn]] void refuse_number(std::size_t n) const;
  [[noreturn]] void terminate_with_members() const noexcept;

  mutable detail::GroupCount count_;
  // A line of their own: add() and done() share no cache line with the guards.
  std::atomic<std::size_t> added_{0};  // and not yet done; G9
  detail::NamedMembers members_;
};

}  // namespace lastcall

#include <lastcall/detail/wait_group_impl.hpp>
