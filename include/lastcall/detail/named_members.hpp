// The named members of a WaitGroup: who is in, since when, from which line, on which thread.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/source_location.hpp>
#include <lastcall/detail/spin_bit.hpp>
#include <lastcall/detail/thread_sections.hpp>

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace lastcall::detail {

/// One named member, on the heap. Linked in its stripe from its entry until it leaves; freed when the
/// last of its guard and those who are just looking at it lets go.
struct NamedMember {
  NamedMember(std::string as, SourceLocation from, pid_t on) noexcept
      : name(std::move(as)), where(from), entered(Clock::now()), thread(on) {}

  void let_go() noexcept {
    // acq_rel: the last one frees what the others have read.
    if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  std::string name;  // constant once linked
  const SourceLocation where;
  const Clock::time_point entered;
  std::atomic<pid_t> thread;
  std::atomic<std::uint32_t> references{1};
  std::uint32_t stripe = 0;
  std::uint64_t turn = 0;  // the order within a stripe
  NamedMember* previous = nullptr;
  NamedMember* next = nullptr;
};

/// What a visitor sees of a member; valid during the visit only.
struct MemberView {
  std::string_view name;
  const SourceLocation& where;
  pid_t thread_id;
  Clock::time_point entered;
  const void* id;  ///< the same for the member's whole life, and nobody else's meanwhile
};

/// Lists of members, striped by thread so that threads don't meet. A stripe's lock guards a few loads
/// and stores; never user code, an allocation or a system call (but see visit()).
class NamedMembers {
  static constexpr std::uint32_t stripes = 8;

  struct alignas(cache_line) Stripe {
    SpinLock lock;
    NamedMember* first = nullptr;
    NamedMember* last = nullptr;
    std::atomic<std::size_t> size{0};  // written under the lock, read by anybody
    std::uint64_t turns = 0;
  };
  struct Table {
    Stripe list[stripes];
  };

 public:
  NamedMembers() noexcept = default;
  NamedMembers(const NamedMembers&) = delete;
  NamedMembers& operator=(const NamedMembers&) = delete;
  ~NamedMembers() { delete table_.load(std::memory_order_relaxed); }

  /// Makes what link() needs. Throws std::bad_alloc.
  void prepare() {
    // relaxed: only whether there is one. release: the table is whole for who acquires it below.
    if (table_.load(std::memory_order_relaxed) != nullptr) return;
    auto* const fresh = new Table();
    Table* nobodys = nullptr;
    if (!table_.compare_exchange_strong(nobodys, fresh, std::memory_order_release,
                                        std::memory_order_relaxed)) {
      delete fresh;
    }
  }

  void link(NamedMember& member) noexcept {
    member.stripe =
        static_cast<std::uint32_t>(member.thread.load(std::memory_order_relaxed)) % stripes;
    Stripe& stripe = stripe_of(member);
    stripe.lock.lock();
    member.turn = stripe.turns++;
    member.previous = stripe.last;
    (stripe.last == nullptr ? stripe.first : stripe.last->next) = &member;
    stripe.last = &member;
    count(stripe, 1);
    stripe.lock.unlock();
  }

  void unlink(NamedMember& member) noexcept {
    Stripe& stripe = stripe_of(member);
    stripe.lock.lock();
    (member.previous == nullptr ? stripe.first : member.previous->next) = member.next;
    (member.next == nullptr ? stripe.last : member.next->previous) = member.previous;
    count(stripe, -1);
    stripe.lock.unlock();
  }

  /// Calls `see(const MemberView&)` for each, stripe by stripe, allocating nothing. A stripe whose lock
  /// can't be had soon is passed by, and then the answer is false. `see` runs under the stripe's lock:
  /// nobody of that stripe enters or leaves meanwhile, and it must not throw, nor use the group. One that returns
  /// something ends the visit of a stripe with false.
  template <class See>
  bool visit(See&& see) const noexcept {
    Table* const table = table_.load(std::memory_order_acquire);
    if (table == nullptr) return true;
    bool complete = true;
    for (Stripe& stripe : table->list) {
      if (!try_lock_for(stripe.lock, 1000)) {
        complete = false;
        continue;
      }
      for (const NamedMember* member = stripe.first; member != nullptr; member = member->next) {
        const MemberView view{member->name, member->where,
                              member->thread.load(std::memory_order_relaxed), member->entered,
                              member};
        if constexpr (std::is_void_v<decltype(see(view))>) {
          see(view);
        } else if (!see(view)) {
          break;
        }
      }
      stripe.lock.unlock();
    }
    return complete;
  }

  /// How many there are; exact when nobody is entering or leaving. Takes no lock: those that visit() passes
  /// by count as well.
  std::size_t size() const noexcept {
    Table* const table = table_.load(std::memory_order_acquire);
    std::size_t sum = 0;
    if (table == nullptr) return sum;
    // relaxed: a figure, with nothing behind it.
    for (const Stripe& stripe : table->list) sum += stripe.size.load(std::memory_order_relaxed);
    return sum;
  }

  /// Holds members in memory, linked or not, so that they can be copied without a lock. Oldest first.
  class Pins {
   public:
    explicit Pins(const NamedMembers& members) {
      Table* const table = members.table_.load(std::memory_order_acquire);
      if (table == nullptr) return;
      for (std::size_t room = members.size(); !take(*table, room); room = members.size() * 2 + 8) {
        let_all_go();
      }
      if (!is_in_order()) {
        std::qsort(pinned_.data(), pinned_.size(), sizeof(void*), &compare);
      }
    }
    Pins(const Pins&) = delete;
    Pins& operator=(const Pins&) = delete;
    ~Pins() { let_all_go(); }
    const std::vector<NamedMember*>& list() const noexcept { return pinned_; }

   private:
    bool take(Table& table, std::size_t room) {
      pinned_.reserve(room);
      for (Stripe& stripe : table.list) {
        stripe.lock.lock();
        // relaxed, as all under the lock.
        const std::size_t there = stripe.size.load(std::memory_order_relaxed);
        const bool fits = there <= pinned_.capacity() - pinned_.size();
        for (NamedMember* member = fits ? stripe.first : nullptr; member != nullptr;
             member = member->next) {
          // The stripe's lock keeps the one reference that there is from going.
          member->references.fetch_add(1, std::memory_order_relaxed);
          pinned_.push_back(member);
        }
        stripe.lock.unlock();
        if (!fits) return false;
      }
      return true;
    }
    void let_all_go() noexcept {
      for (NamedMember* const member : pinned_) member->let_go();
      pinned_.clear();
    }
    // As they are if one thread has entered all, which is where there are most.
    bool is_in_order() const noexcept {
      for (std::size_t at = 1; at < pinned_.size(); ++at) {
        if (compare(&pinned_[at - 1], &pinned_[at]) > 0) return false;
      }
      return true;
    }
    static int compare(const void* left, const void* right) noexcept {
      const NamedMember& a = **static_cast<NamedMember* const*>(left);
      const NamedMember& b = **static_cast<NamedMember* const*>(right);
      if (a.entered != b.entered) return a.entered < b.entered ? -1 : 1;
      return a.turn < b.turn ? -1 : (a.turn > b.turn ? 1 : 0);
    }

    std::vector<NamedMember*> pinned_;
  };

 private:
  // Under the stripe's lock, which orders the writers: relaxed, and no fetch_add().
  static void count(Stripe& stripe, int change) noexcept {
    const std::size_t before = stripe.size.load(std::memory_order_relaxed);
    stripe.size.store(before + static_cast<std::size_t>(change), std::memory_order_relaxed);
  }
  static bool try_lock_for(SpinLock& lock, unsigned turns) noexcept {
    while (!lock.try_lock()) {
      if (turns-- == 0) return false;
      pause_cpu();
    }
    return true;
  }

  Stripe& stripe_of(const NamedMember& member) const noexcept {
    return table_.load(std::memory_order_acquire)->list[member.stripe];
  }

  std::atomic<Table*> table_{nullptr};  // made with the first name
};

}  // namespace lastcall::detail
