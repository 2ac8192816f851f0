// A hierarchical timing wheel (Varghese and Lauck, 1987): O(1) in and out, nothing allocated.
//
// Seven levels of 64 slots; a slot of level n spans 64^n ticks. A link stands in the level of the
// highest six-bit digit in which its tick differs from the present, so it moves down at most once a
// level before it is due. Not thread-safe: TimerService locks it.
#pragma once

#include <lastcall/detail/clock.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>

namespace lastcall::detail {

class TimerService;

struct TimerLink {
  TimerLink* prev = nullptr;
  TimerLink* next = nullptr;
  std::uint64_t tick = 0;  // due at this tick or later, never before
  std::uint8_t level = 0;  // where it stands, for taking it out in O(1)
  std::uint8_t slot = 0;
  std::uint8_t shard = 0;        // of the TimerService
  bool armed = false;            // guarded by the shard's lock
  std::uint32_t generation = 0;  // of the TimerService, when it was armed: its invariant 5
  // Who has armed it; null: nobody. Not always the caller's own: shared objects with hidden symbols have one each.
  TimerService* service = nullptr;
  // Under the shard's lock, as the link is taken out because it is due: keeps its owner alive.
  void (*hold)(TimerLink*) noexcept = nullptr;
  // Afterwards, on the timer thread, with no lock held; ends with letting the owner go.
  void (*due)(TimerLink*) noexcept = nullptr;
};

class TimerWheel {
 public:
  static constexpr std::uint64_t never = ~std::uint64_t{0};

  bool empty() const noexcept { return count_ == 0; }
  std::size_t size() const noexcept { return count_; }

  /// `now` is the present tick, or an earlier one. A link that is due already stands in the next tick.
  void insert(TimerLink* link, std::uint64_t now) noexcept {
    // An empty wheel may jump: there is nothing to move down on the way.
    if (count_ == 0 && now > elapsed_) elapsed_ = now;
    if (link->tick <= elapsed_) link->tick = elapsed_ + 1;
    if (link->tick > horizon) link->tick = horizon;
    place(link);
    ++count_;
  }

  void remove(TimerLink* link) noexcept {
    unlink(link);
    --count_;
  }

  /// The earliest tick at which something may be due or has to move down; `never` if empty.
  std::uint64_t next_tick() const noexcept {
    for (unsigned level = 0; level < levels; ++level) {
      const unsigned here = digit(elapsed_, level);
      // Everything in a level stands ahead of the present digit: see place().
      const std::uint64_t ahead =
          here == 63 ? 0 : occupied_[level] & (~std::uint64_t{0} << (here + 1));
      if (ahead == 0) continue;
      const auto slot = static_cast<std::uint64_t>(std::countr_zero(ahead));
      const std::uint64_t span = std::uint64_t{1} << (digit_bits * level);
      const std::uint64_t base = elapsed_ & ~(span * 64 - 1);
      return base + slot * span;
    }
    return never;
  }

  /// Moves the present to `now` and takes out all that is due by then: a list linked by `next`.
  /// `hold` of each is called.
  TimerLink* advance(std::uint64_t now) noexcept {
    TimerLink* due = nullptr;
    TimerLink** tail = &due;
    for (;;) {
      const std::uint64_t at = next_tick();
      if (at > now) break;
      elapsed_ = at;
      for (unsigned level = 0; level < levels; ++level) drain(level, &tail);
    }
    if (now > elapsed_) elapsed_ = now;
    return due;
  }

 private:
  static constexpr unsigned levels = 7;
  static constexpr unsigned digit_bits = 6;
  // The last tick that seven digits hold: some 139 years of milliseconds.
  static constexpr std::uint64_t horizon = (std::uint64_t{1} << (digit_bits * levels)) - 1;

  static unsigned digit(std::uint64_t tick, unsigned level) noexcept {
    return static_cast<unsigned>(tick >> (digit_bits * level)) & 63U;
  }

  // Empties the slot of `level` that the present has just reached, if it stands at its start.
  void drain(unsigned level, TimerLink*** tail) noexcept {
    const std::uint64_t span = std::uint64_t{1} << (digit_bits * level);
    if ((elapsed_ & (span - 1)) != 0) return;
    const unsigned here = digit(elapsed_, level);
    while (TimerLink* const link = slots_[level][here]) {
      unlink(link);
      if (link->tick <= elapsed_) {
        --count_;
        link->armed = false;
        link->hold(link);
        link->next = nullptr;
        **tail = link;
        *tail = &link->next;
      } else {
        place(link);
      }
    }
  }

  void place(TimerLink* link) noexcept {
    const std::uint64_t differs = elapsed_ ^ link->tick;
    unsigned level = static_cast<unsigned>(63 - std::countl_zero(differs | 1)) / digit_bits;
    if (level >= levels) level = levels - 1;
    const unsigned slot = digit(link->tick, level);
    link->level = static_cast<std::uint8_t>(level);
    link->slot = static_cast<std::uint8_t>(slot);
    TimerLink*& head = slots_[level][slot];
    link->prev = nullptr;
    link->next = head;
    if (head != nullptr) head->prev = link;
    head = link;
    occupied_[level] |= std::uint64_t{1} << slot;
  }

  void unlink(TimerLink* link) noexcept {
    TimerLink*& head = slots_[link->level][link->slot];
    if (link->next != nullptr) link->next->prev = link->prev;
    if (link->prev != nullptr) {
      link->prev->next = link->next;
    } else {
      head = link->next;
    }
    if (head == nullptr) occupied_[link->level] &= ~(std::uint64_t{1} << link->slot);
  }

  std::uint64_t elapsed_ = 0;
  std::size_t count_ = 0;
  std::uint64_t occupied_[levels] = {};
  TimerLink* slots_[levels][64] = {};
};

}  // namespace lastcall::detail
