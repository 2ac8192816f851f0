// The timer wheel against a list that is looked through: nothing is due early, nothing is late, whatever
// is left is known by number, and next_tick() is a lower bound that leads to what is next.
#include <lastcall/detail/timer_wheel.hpp>

#include "input.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace {

using fuzz::require;
using lastcall::detail::TimerLink;
using lastcall::detail::TimerWheel;

constexpr std::size_t most_links = 24;
// A clock of milliseconds has come here after 140 years; the wheel's last tick is a little later.
constexpr std::uint64_t last_now = (std::uint64_t{1} << 42U) - (std::uint64_t{1} << 36U);
constexpr std::uint64_t horizon = (std::uint64_t{1} << 42U) - 1;

struct Entry {
  TimerLink link;
  std::uint64_t wanted = 0;  // not due before
  bool in = false;
  int held = 0;
};

class Game {
 public:
  explicit Game(fuzz::Input& input) : input_(input) {
    for (Entry& entry : entries_) {
      entry.link.hold = [](TimerLink* link) noexcept {
        ++reinterpret_cast<Entry*>(link)->held;  // the link is the first member
      };
    }
  }

  void play() {
    while (!input_.empty()) {
      switch (input_.below(8)) {
        case 0:
        case 1:
        case 2: insert(); break;
        case 3: remove(); break;
        case 4: advance_to(after(input_.any_size())); break;
        case 5: advance_to(after(input_.below(130))); break;
        case 6: step(); break;
        default: run_until_something_is_due(); break;
      }
      look();
    }
    advance_to(last_now);
    look();
  }

 private:
  std::uint64_t after(std::uint64_t span) const {
    return span < last_now - now_ ? now_ + span : last_now;
  }

  void insert() {
    Entry& entry = entries_[input_.below(most_links)];
    if (entry.in) return;
    // The past, the near and the far future, around the borders of digits, and past the horizon.
    std::uint64_t tick = 0;
    switch (input_.below(5)) {
      case 0: tick = now_ - std::min<std::uint64_t>(now_, input_.below(200)); break;
      case 1: tick = now_ + input_.below(200); break;
      case 2: tick = now_ + input_.any_size() % (horizon * 2); break;
      case 3: tick = (now_ | ((std::uint64_t{1} << input_.below(43)) - 1)) + input_.below(3); break;
      default: tick = input_.any_size(); break;
    }
    entry.link.tick = tick;
    entry.link.armed = true;
    entry.wanted = std::min(tick, horizon);
    entry.held = 0;
    entry.in = true;
    ++count_;
    // The service's clock may have gone on since the wheel last looked, but never back.
    const std::uint64_t seen = after(input_.flag() ? 0 : input_.below(100));
    wheel_.insert(&entry.link, seen);
    require(entry.link.tick >= entry.wanted, "an insertion made it earlier");
  }

  void remove() {
    Entry& entry = entries_[input_.below(most_links)];
    if (!entry.in) return;
    wheel_.remove(&entry.link);
    entry.link.armed = false;
    entry.in = false;
    --count_;
  }

  /// The earliest of all that are in.
  std::uint64_t earliest() const {
    std::uint64_t least = TimerWheel::never;
    for (const Entry& entry : entries_) {
      if (entry.in) least = std::min(least, entry.link.tick);
    }
    return least;
  }

  std::size_t advance_to(std::uint64_t now) {
    if (now < now_) return 0;
    now_ = now;
    TimerLink* due = wheel_.advance(now);
    std::size_t fired = 0;
    std::uint64_t before = 0;
    while (due != nullptr) {
      auto* const entry = reinterpret_cast<Entry*>(due);
      due = due->next;
      require(entry->in, "due, and was not in");
      require(entry->wanted <= now, "due early");
      require(entry->link.tick >= before, "not in the order of time");
      require(!entry->link.armed && entry->held == 1, "due, and still armed or not held once");
      before = entry->link.tick;
      entry->in = false;
      --count_;
      ++fired;
    }
    for (const Entry& entry : entries_) {
      require(!entry.in || entry.link.tick > now, "late: it should have been due");
    }
    return fired;
  }

  // What the timer thread does: sleeps until next_tick(), looks.
  std::size_t step() {
    const std::uint64_t next = wheel_.next_tick();
    if (next == TimerWheel::never) return 0;
    return next > last_now ? 0 : advance_to(std::max(next, now_));
  }

  void run_until_something_is_due() {
    if (count_ == 0 || earliest() > last_now) return;
    const std::uint64_t first = earliest();
    // A link moves down at most once a level.
    std::size_t looks = 0;
    while (step() == 0) require(++looks <= count_ * 7, "woken too often for nothing");
    require(now_ == first, "what was due came at another time");
  }

  void look() const {
    require(wheel_.size() == count_ && wheel_.empty() == (count_ == 0), "a wrong size");
    const std::uint64_t next = wheel_.next_tick();
    require(next <= earliest(), "next_tick() is past what is due");
    require((next == TimerWheel::never) == (count_ == 0), "next_tick() of an empty wheel only");
  }

  fuzz::Input& input_;
  TimerWheel wheel_;
  std::array<Entry, most_links> entries_{};
  std::uint64_t now_ = 0;
  std::size_t count_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  std::make_unique<Game>(input)->play();
  return 0;
}
