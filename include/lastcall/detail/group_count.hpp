// The count of a WaitGroup and those who wait for its zero. The invariants G1 to G9 that the comments
// here refer to stand at the head of wait_group.hpp.
#pragma once

#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/spin_bit.hpp>
#include <lastcall/detail/thread_sections.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace lastcall::detail {

class alignas(cache_line) GroupCount {
 public:
  // The word: three flags, and below them the central count. A count of `exact_end` and more means that
  // it is kept in the slots too, and then the central part has `bias` on it.
  static constexpr std::uint64_t fast = std::uint64_t{1} << 63;  // threads count in their own slots
  static constexpr std::uint64_t closed = std::uint64_t{1} << 62;  // nobody enters any more
  static constexpr std::uint64_t waiting = std::uint64_t{1}
                                           << 61;  // the list of waiters isn't empty
  static constexpr std::uint64_t count_mask = waiting - 1;
  static constexpr std::uint64_t bias = std::uint64_t{1} << 60;
  static constexpr std::uint64_t exact_end = std::uint64_t{1} << 59;

  GroupCount() noexcept = default;
  GroupCount(const GroupCount&) = delete;
  GroupCount& operator=(const GroupCount&) = delete;
  ~GroupCount() {
    // Taken once, so that a leaver who has said zero and is about to unlock (G6) has done so.
    lock_.lock();
    lock_.unlock();
    for (auto& chunk : chunks_) free_chunk(chunk.load(std::memory_order_relaxed));
  }

  /// Counts one in, unless a flag of `refuse` is up (0 or `closed`).
  bool enter(std::uint64_t refuse) noexcept {
    return count_in_section<true>(&Slot::entered, refuse) || enter_centrally(refuse);
  }
  /// Counts one out. Nothing of this object is touched after that (G6).
  void leave() noexcept {
    if (!count_in_section<true>(&Slot::left, 0)) leave_centrally();
  }

  /// G3: lock-free, and no system call.
  void close() noexcept { word_.fetch_or(closed, std::memory_order_seq_cst); }
  // acquire: what came before close() is seen by who finds it closed.
  bool is_closed() const noexcept { return (word_.load(std::memory_order_acquire) & closed) != 0; }

  /// Exact when nobody is entering or leaving.
  std::size_t value() noexcept {
    // acquire: a zero may be taken as wait() takes it; as in wait_until().
    std::uint64_t seen = word_.load(std::memory_order_acquire);
    if (is_exact(seen)) return static_cast<std::size_t>(seen & count_mask);
    // Under the lock nobody moves the count from the slots to the word.
    lock_.lock();
    const std::size_t sum = sum_up();
    lock_.unlock();
    return sum;
  }
  /// The same for who must not wait: a lock that isn't free soon is passed by, and the figure is then a
  /// guess while another thread is just beginning to wait.
  std::size_t glance() noexcept {
    const bool locked = try_lock_for(1000);
    const std::size_t sum = sum_up();
    if (locked) lock_.unlock();
    return sum;
  }

  /// Until the count is zero (true) or the deadline passes.
  bool wait_until(Clock::time_point deadline) noexcept;

  /// The members, when the word's count is `central` and the slots have got `since` since it was fast. Each may
  /// have run away from the other, when some enter by one and leave by the other, so only the members are
  /// known to fit: all is modulo what section words wrap at, of which the bias is a multiple.
  static constexpr std::uint64_t members_of(std::uint64_t central, std::uintptr_t since) noexcept {
    constexpr std::uint64_t most = std::numeric_limits<std::uintptr_t>::max() / SectionWord::one;
    static_assert(bias % (most + 1) == 0);
    return (central + since / SectionWord::one) & most;
  }

  /// For tests: a word of the calling thread's, whether threads count in them now, how many threads wait.
  SectionWord* own_word() noexcept {
    if (!prepare_thread(true)) return nullptr;
    return &slot_of(thread_state)->left;
  }
  bool is_fast() const noexcept { return (word_.load(std::memory_order_acquire) & fast) != 0; }
  std::size_t waiters() noexcept {
    std::size_t sum = 0;
    lock_.lock();
    for (const Waiter* waiter = first_; waiter != nullptr; waiter = waiter->next) ++sum;
    lock_.unlock();
    return sum;
  }

 private:
  // G2: of one thread. Two words, so that neither waits for the other's last store.
  struct alignas(cache_line) Slot {
    SectionWord entered;
    SectionWord left;
  };

  // On the waiter's stack, linked in the group. G7: `released` is the last that anybody else does to it.
  struct Waiter {
    Word released{0};
    bool linked = true;
    Waiter* previous = nullptr;
    Waiter* next = nullptr;
  };

  // So many entries since the last wait() show that the group is worth slots: a short-lived one, or one
  // that is waited for over and over, neither allocates nor fences.
  static constexpr std::uint32_t entries_to_fast = 64;

  static bool is_exact(std::uint64_t word) noexcept { return (word & count_mask) < exact_end; }
  static bool is_last(std::uint64_t word) noexcept {
    return (word & (count_mask | waiting)) == (waiting | 1);
  }

  static bool is_open(std::uint64_t word, std::uint64_t refuse) noexcept;
  Slot* slot_of(const ThreadState& thread) noexcept;
  template <bool fenced>
  bool count_in_section(SectionWord Slot::*which, std::uint64_t refuse) noexcept;
  bool count_here(SectionWord Slot::*which, std::uint64_t refuse) noexcept;
  bool enter_centrally(std::uint64_t refuse) noexcept;
  void leave_centrally() noexcept;
  bool leave_as_last() noexcept;
  bool prepare_thread(bool may_allocate) noexcept;
  bool make_slots(std::size_t chunk) noexcept;
  void become_fast() noexcept;
  bool become_exact(Clock::time_point deadline) noexcept;
  bool wait_out(Clock::time_point deadline) const noexcept;
  std::uintptr_t slots_sum() const noexcept;
  std::size_t sum_up() const noexcept;
  bool try_lock_for(unsigned turns) noexcept;
  bool lock_until(Clock::time_point deadline) noexcept;
  bool give_up(Waiter& waiter) noexcept;
  void link(Waiter& waiter) noexcept;
  void unlink(Waiter& waiter) noexcept;

  // The first cache line is read by everybody, and in fast mode written by nobody.
  std::atomic<std::uint64_t> word_{0};
  // Whose threads have slots: set once, before the word is first fast.
  std::atomic<ThreadSections*> home_{nullptr};
  std::atomic<Slot*> chunks_[ChunkPlace::chunks]{};
  // The second is for slower times.
  SpinLock lock_;                         // G5: guards home_, moved_, the list of waiters
  std::atomic<std::uintptr_t> moved_{0};  // the part of the slots' sum that the word has; G1
  std::atomic<std::uint32_t> entries_{0};
  Waiter* first_ = nullptr;
  Waiter* last_ = nullptr;
};

// Fast, and not refused. `fast` is the sign, and `closed` the bit below: a comparison without a mask.
inline bool GroupCount::is_open(std::uint64_t word, std::uint64_t refuse) noexcept {
  static_assert(fast == std::uint64_t{1} << 63 && closed == fast >> 1);
  const auto end = static_cast<std::int64_t>(refuse == 0 ? 0 : fast | closed);
  return static_cast<std::int64_t>(word) < end;
}

// Null: its chunk isn't there.
inline GroupCount::Slot* GroupCount::slot_of(const ThreadState& thread) noexcept {
  static_assert(sizeof(Slot) == cache_line);
  // seq_cst: the chunk may have been made by another thread just now, before this one's S1 in the one order.
  Slot* const slots = chunks_[thread.chunk].load(std::memory_order_seq_cst);
  if (slots == nullptr) return nullptr;
  return reinterpret_cast<Slot*>(reinterpret_cast<char*>(slots) + thread.offset);
}

// The section of thread_sections.hpp, S1 to S3, around one more in a word of the thread's own slot. False: not
// counted. `fenced`: where S1 is a plain store.
// Inlined by order: a guard takes 8.5 ns if it is not, and 4.7 if it is (g++ 12, Zen 3).
template <bool fenced>
[[gnu::always_inline]] inline bool GroupCount::count_in_section(SectionWord Slot::*which,
                                                                std::uint64_t refuse) noexcept {
  // Looked at before S1 too, so that a thread makes no more sections once it saw that they are over:
  // whoever waits for it (W3) waits for one at most. acquire: home_, which was set before.
  if (!is_open(word_.load(std::memory_order_acquire), refuse)) return false;
  const ThreadState& mine = thread_state;
  // relaxed: set once, before the word was first fast; so a thread without a place (null) isn't at home.
  if (home_.load(std::memory_order_relaxed) != (fenced ? mine.fenced : mine.sections)) return false;
  Slot* const slot = slot_of(mine);
  if (slot == nullptr) return false;
  SectionWord& own = slot->*which;
  const std::uintptr_t value = own.value();
  if constexpr (fenced) {
    own.open_fenced(value, mine.stamp);
  } else {
    own.open(value, mine.stamp);
  }
  // seq_cst: S2.
  const bool counts = is_open(word_.load(std::memory_order_seq_cst), refuse);
  own.close(counts ? value + SectionWord::one : value);
  return counts;
}

// The same with whatever S1 is here, for a thread that may have got its slot just now.
[[gnu::noinline]] inline bool GroupCount::count_here(SectionWord Slot::*which,
                                                     std::uint64_t refuse) noexcept {
  return thread_state.fenced != nullptr ? count_in_section<true>(which, refuse)
                                        : count_in_section<false>(which, refuse);
}

[[gnu::noinline]] inline bool GroupCount::enter_centrally(std::uint64_t refuse) noexcept {
  std::uint64_t seen = word_.load(std::memory_order_relaxed);
  if ((seen & (fast | refuse)) == fast && prepare_thread(true) &&
      count_here(&Slot::entered, refuse)) {
    return true;
  }
  do {
    // Tried in the same operation that counts, so that nobody enters after a close() and a zero.
    if ((seen & refuse) != 0) return false;
    // relaxed: an entry publishes nothing, and as a read-modify-write it continues the release
    // sequences of the leavers before it.
  } while (!word_.compare_exchange_weak(seen, seen + 1, std::memory_order_relaxed,
                                        std::memory_order_relaxed));
  if ((seen & (fast | closed | waiting)) == 0) {
    // A lost increment delays the change and nothing else.
    const std::uint32_t entries = entries_.load(std::memory_order_relaxed) + 1;
    entries_.store(entries, std::memory_order_relaxed);
    if (entries >= entries_to_fast) become_fast();
  }
  return true;
}

[[gnu::noinline]] inline void GroupCount::leave_centrally() noexcept {
  std::uint64_t seen = word_.load(std::memory_order_relaxed);
  if ((seen & fast) != 0 && prepare_thread(false) && count_here(&Slot::left, 0)) return;
  for (;;) {
    if (is_last(seen)) {
      if (leave_as_last()) return;
      seen = word_.load(std::memory_order_relaxed);
      continue;
    }
    // release: all that the member did, for the waiter (and for the next leaver to pass on).
    if (word_.compare_exchange_weak(seen, seen - 1, std::memory_order_release,
                                    std::memory_order_relaxed)) {
      return;
    }
  }
}

// G6: a last member with waiters takes the lock while it is still counted. The zero, and the taking of
// the list that goes with it, are one step for everybody who takes the lock.
[[gnu::noinline]] inline bool GroupCount::leave_as_last() noexcept {
  lock_.lock();
  std::uint64_t seen = word_.load(std::memory_order_relaxed);
  do {
    if (!is_last(seen)) {  // somebody entered, or the waiters gave up
      lock_.unlock();
      return false;
    }
    // acquire and release: this thread hands on what all the leavers before it did.
  } while (!word_.compare_exchange_weak(seen, seen & ~(waiting | count_mask),
                                        std::memory_order_acq_rel, std::memory_order_relaxed));
  Waiter* waiter = first_;
  for (Waiter* each = first_; each != nullptr; each = each->next) each->linked = false;
  first_ = last_ = nullptr;
  lock_.unlock();  // the last touch of the group: the waiters still sleep, so it is still there
  while (waiter != nullptr) {
    Word* const released = &waiter->released;
    waiter = waiter->next;
    released->store(1, std::memory_order_release);  // the last touch of that waiter
    futex_wake_one(released);
  }
  return true;
}

// The calling thread gets what count_in_section() found missing: a place, a slot.
[[gnu::noinline]] inline bool GroupCount::prepare_thread(bool may_allocate) noexcept {
  ThreadSections* const all =
      may_allocate ? ThreadSections::instance() : ThreadSections::existing();
  // relaxed, as the chunk below: guesses, which count_here() makes good.
  if (all == nullptr || all != home_.load(std::memory_order_relaxed)) return false;
  if (!all->attach(may_allocate)) return false;
  const std::size_t chunk = thread_state.chunk;
  if (chunks_[chunk].load(std::memory_order_relaxed) != nullptr) return true;
  return may_allocate && make_slots(chunk);
}

inline bool GroupCount::make_slots(std::size_t chunk) noexcept {
  std::atomic<Slot*>& place = chunks_[chunk];
  if (place.load(std::memory_order_relaxed) != nullptr) return true;
  Slot* const fresh = make_chunk<Slot>(static_cast<std::uint32_t>(chunk));
  if (fresh == nullptr) return false;
  Slot* nobodys = nullptr;
  // seq_cst: stands before its threads' S1 in the order that W3 relies on, and releases the zeros.
  if (!place.compare_exchange_strong(nobodys, fresh, std::memory_order_seq_cst,
                                     std::memory_order_relaxed)) {
    free_chunk(fresh);
  }
  return true;
}

// By a member, in exact mode. Whatever is missing for it, the next members go on as before.
[[gnu::cold, gnu::noinline]] inline void GroupCount::become_fast() noexcept {
  entries_.store(0, std::memory_order_relaxed);
  ThreadSections* const all = ThreadSections::instance();
  if (all == nullptr || !all->attach(true) || !make_slots(thread_state.chunk)) return;
  if (!lock_.try_lock()) return;
  ThreadSections* const home = home_.load(std::memory_order_relaxed);
  // G4. Whose threads have slots is settled once: a slot has one writer (G2).
  std::uint64_t seen =
      home == nullptr || home == all ? word_.load(std::memory_order_relaxed) : closed;
  while ((seen & (fast | closed | waiting)) == 0) {
    home_.store(all, std::memory_order_relaxed);
    // release: home_.
    if (word_.compare_exchange_weak(seen, (seen + bias) | fast, std::memory_order_release,
                                    std::memory_order_relaxed)) {
      break;
    }
  }
  lock_.unlock();
}

// Under the lock. W1 to W3, and then what came to the slots since the last time is moved to the word. False:
// the deadline passed while a thread was still inside; then all is as before.
[[gnu::noinline]] inline bool GroupCount::become_exact(Clock::time_point deadline) noexcept {
  word_.fetch_and(~fast,
                  std::memory_order_seq_cst);  // W1; seq_cst: stands before W3's loads for all
  if (!wait_out(deadline)) {
    word_.fetch_or(fast, std::memory_order_seq_cst);
    return false;
  }
  const std::uintptr_t sum = slots_sum();
  const std::uintptr_t since = sum - moved_.load(std::memory_order_relaxed);
  moved_.store(sum, std::memory_order_relaxed);
  std::uint64_t seen = word_.load(std::memory_order_relaxed);
  // release: what wait_out() acquired from the leavers in sections, for a waiter that another thread will
  // wake. A failed exchange has seen nothing that matters.
  while (!word_.compare_exchange_weak(seen,
                                      (seen & ~count_mask) | members_of(seen & count_mask, since),
                                      std::memory_order_acq_rel, std::memory_order_relaxed)) {
  }
  entries_.store(0, std::memory_order_relaxed);
  return true;
}

// W2 and W3.
inline bool GroupCount::wait_out(Clock::time_point deadline) const noexcept {
  const ThreadSections* const home = home_.load(std::memory_order_relaxed);
  home->fence();
  for (std::uint32_t chunk = 0; chunk < ChunkPlace::chunks; ++chunk) {
    // seq_cst: a chunk that isn't seen here was published after W2, by a thread whose S2 is later still.
    const Slot* const slots = chunks_[chunk].load(std::memory_order_seq_cst);
    if (slots == nullptr) continue;
    for (std::uint32_t at = 0; at < ChunkPlace::size_of(chunk); ++at) {
      if (!home->wait_out(slots[at].entered, deadline) ||
          !home->wait_out(slots[at].left, deadline)) {
        return false;
      }
    }
  }
  return true;
}

// acquire: a chunk that is seen is zeroed. relaxed: after W3 the values are stable and seen (S3 releases);
// without it the sum is a snapshot that nobody promised.
inline std::uintptr_t GroupCount::slots_sum() const noexcept {
  std::uintptr_t sum = 0;
  for (std::uint32_t chunk = 0; chunk < ChunkPlace::chunks; ++chunk) {
    const Slot* const slots = chunks_[chunk].load(std::memory_order_acquire);
    if (slots == nullptr) continue;
    for (std::uint32_t at = 0; at < ChunkPlace::size_of(chunk); ++at) {
      sum += slots[at].entered.value() - slots[at].left.value();
    }
  }
  return sum;
}

inline std::size_t GroupCount::sum_up() const noexcept {
  const std::uint64_t seen = word_.load(std::memory_order_acquire);
  const std::uint64_t central = seen & count_mask;
  if (is_exact(seen)) return static_cast<std::size_t>(central);
  const std::uint64_t sum =
      members_of(central, slots_sum() - moved_.load(std::memory_order_relaxed));
  // A snapshot in the middle of things may be below zero.
  constexpr std::uint64_t below_zero =
      std::numeric_limits<std::uintptr_t>::max() / SectionWord::one / 2;
  return sum > below_zero ? 0 : static_cast<std::size_t>(sum);
}

inline bool GroupCount::try_lock_for(unsigned turns) noexcept {
  while (!lock_.try_lock()) {
    if (turns-- == 0) return false;
    pause_cpu();
  }
  return true;
}

// The lock may be held by a thread in become_exact(), so this one honours the deadline as well.
inline bool GroupCount::lock_until(Clock::time_point deadline) noexcept {
  Backoff backoff;
  for (unsigned turn = 0; !lock_.try_lock(); ++turn) {
    if (turn >= 100 && deadline != Clock::time_point::max() && Clock::now() >= deadline)
      return false;
    backoff.pause();
  }
  return true;
}

inline bool GroupCount::wait_until(Clock::time_point deadline) noexcept {
  if (!lock_until(deadline)) return false;
  // acquire, here and below: pairs with the leavers' release.
  std::uint64_t seen = word_.load(std::memory_order_acquire);
  if ((seen & fast) != 0) {
    if (!become_exact(deadline)) {
      lock_.unlock();
      return false;
    }
    seen = word_.load(std::memory_order_acquire);
  }
  // G5: only who has the lock could make it fast again, so the word stays exact.
  do {
    if ((seen & count_mask) == 0) {
      lock_.unlock();
      return true;
    }
    // acq_rel: hands on what become_exact() acquired, in this call or another waiter's.
  } while ((seen & waiting) == 0 &&
           !word_.compare_exchange_weak(seen, seen | waiting, std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  Waiter self;
  link(self);
  lock_.unlock();
  while (self.released.load(std::memory_order_acquire) == 0) {
    if (!futex_wait_until(self.released, 0, deadline)) return give_up(self);
  }
  return true;
}

// Time is up, but a last leaver may have been quicker: then it is zero, and the leaver is about to write
// to the waiter, which must not go before.
inline bool GroupCount::give_up(Waiter& waiter) noexcept {
  // acquire: pairs with the release in leave_as_last(), as in wait_until().
  if (waiter.released.load(std::memory_order_acquire) != 0) return true;
  lock_.lock();
  const bool still_waiting = waiter.linked;
  if (still_waiting) {
    unlink(waiter);
    // relaxed: it tells nobody anything; as a read-modify-write it carries the leavers' releases on.
    if (first_ == nullptr) word_.fetch_and(~waiting, std::memory_order_relaxed);
  }
  lock_.unlock();
  if (still_waiting) return false;
  while (waiter.released.load(std::memory_order_acquire) == 0) futex_wait(waiter.released, 0);
  return true;
}

inline void GroupCount::link(Waiter& waiter) noexcept {
  waiter.previous = last_;
  (last_ == nullptr ? first_ : last_->next) = &waiter;
  last_ = &waiter;
}

inline void GroupCount::unlink(Waiter& waiter) noexcept {
  (waiter.previous == nullptr ? first_ : waiter.previous->next) = waiter.next;
  (waiter.next == nullptr ? last_ : waiter.next->previous) = waiter.previous;
}

}  // namespace lastcall::detail
