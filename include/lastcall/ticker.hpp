// A heartbeat for long-lived loops, which ends when its token is cancelled.
//
//   lastcall::Ticker every_second(1s);
//   while (every_second.wait(stop)) flush();
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/throw.hpp>

#include <string>

namespace lastcall {

/// Ticks at whole periods from its making, and doesn't drift: how long the loop's body takes moves no
/// later tick. What was missed is not made up for: the next tick is at the next whole period.
///
/// It keeps no state but its making and its period: copies tick together, and wait() may be called
/// from several threads, each of which gets every tick.
class Ticker {
 public:
  /// The first tick is a `period` from now. Throws std::invalid_argument if it is zero or less.
  explicit Ticker(Clock::duration period) : made_(Clock::now()), period_(period) {
    if (period <= Clock::duration::zero()) {
      using Nanoseconds = std::chrono::duration<long long, std::nano>;
      detail::throw_invalid_argument(
          "Ticker: the period must be positive, not " +
          std::to_string(std::chrono::duration_cast<Nanoseconds>(period).count()) + " ns");
    }
  }

  /// Sleeps until the next tick: true, and never early; or until `token` is cancelled: false. Cancelled
  /// already: false at once. Costs no CPU meanwhile.
  bool wait(const CancellationToken& token) const { return !token.wait_until(next()); }

 private:
  Clock::time_point next() const {
    const Clock::time_point now = Clock::now();
    const Clock::time_point last = made_ + (now - made_) / period_ * period_;  // not after now
    return period_ < Clock::time_point::max() - last ? last + period_ : Clock::time_point::max();
  }

  Clock::time_point made_;
  Clock::duration period_;
};

}  // namespace lastcall
