// The one clock of the library, and arithmetic on it that saturates instead of overflowing.
#pragma once

#include <lastcall/detail/config.hpp>

// Durations, time points and clocks. With libstdc++ all of <chrono> is these and the calendar, whose
// streams, strings and vectors take most of its time to compile.
#if defined(__GLIBCXX__) && __has_include(<bits/chrono.h>)
#include <bits/chrono.h>
#else
#include <chrono>
#endif
#include <ctime>
#include <limits>
#include <ratio>
#include <type_traits>

namespace lastcall {

/// Every time point of the library is of this clock: CLOCK_MONOTONIC on POSIX systems, so a
/// stepped wall clock moves no deadline.
using Clock = std::chrono::steady_clock;
static_assert(1'000'000'000 % (Clock::period::den / Clock::period::num) == 0 &&
                  Clock::period::den / Clock::period::num >= 1000,
              "a tick is a whole number of nanoseconds, and at most a millisecond");

namespace detail {

/// In ticks of the clock, rounded up: a wait never ends early. Of what is known to be in the clock's range.
/// std::chrono::ceil() multiplies first, and overflows after years of a period such as a sixtieth of a second.
template <class Rep, class Period>
constexpr Clock::duration in_ticks(std::chrono::duration<Rep, Period> span) {
  using Ratio = std::ratio_divide<Period, Clock::period>;
  if constexpr (std::is_same_v<Rep, float>) {
    return in_ticks(
        std::chrono::duration<double, Period>(span));  // its own rounding may be minutes
  } else if constexpr (std::chrono::treat_as_floating_point_v<Rep> || Ratio::num == 1 ||
                       Ratio::den == 1) {
    return std::chrono::ceil<Clock::duration>(span);
  } else {
    using Wide = std::common_type_t<Rep, Clock::rep>;
    constexpr auto num = static_cast<Wide>(Ratio::num);
    constexpr auto den = static_cast<Wide>(Ratio::den);
    const auto count = static_cast<Wide>(span.count());
    const auto whole = static_cast<Clock::rep>(count / den * num);
    static_assert(Ratio::num <= std::numeric_limits<Clock::rep>::max() / Ratio::den,
                  "a period whose fraction of a nanosecond has too large numbers");
    const Wide rest = count % den * num;
    // Truncation is upwards below zero.
    const bool up = rest > 0 && rest % den != 0;
    return Clock::duration(whole + static_cast<Clock::rep>(rest / den) + (up ? 1 : 0));
  }
}

/// `now + span`, saturating: a huge span gives Clock::time_point::max() ("never"), a negative one
/// or a NaN gives `now` ("already").
template <class Rep, class Period>
Clock::time_point time_after(Clock::time_point now, std::chrono::duration<Rep, Period> span) {
  using Wide = std::chrono::duration<long double, Clock::period>;
  if (!(span > std::chrono::duration<Rep, Period>::zero())) return now;
  // A second is left unused at the far end, so that no rounding of the wide type can overflow.
  const Wide room = Wide(Clock::time_point::max() - now) - Wide(std::chrono::seconds(1));
  if (!(Wide(span) < room)) return Clock::time_point::max();
  return now + in_ticks(span);
}

template <class Rep, class Period>
Clock::time_point deadline_after(std::chrono::duration<Rep, Period> span) {
  return time_after(Clock::now(), span);
}

/// A Clock::time_point from one of another precision, saturating at both ends.
template <class Duration>
Clock::time_point saturated(std::chrono::time_point<Clock, Duration> point) {
  using Wide = std::chrono::duration<long double, Clock::period>;
  const Wide since = Wide(point.time_since_epoch());
  const Wide edge = Wide(Clock::duration::max()) - Wide(std::chrono::seconds(1));
  if (!(since < edge)) return Clock::time_point::max();
  if (!(since > -edge)) return Clock::time_point::min();
  return Clock::time_point(in_ticks(point.time_since_epoch()));
}

inline Clock::time_point saturated(Clock::time_point point) noexcept { return point; }

/// `to - from`, saturating: for time points that somebody else has put together.
inline Clock::duration span_between(Clock::time_point from, Clock::time_point to) noexcept {
  Clock::rep span = 0;
  if (!__builtin_sub_overflow(to.time_since_epoch().count(), from.time_since_epoch().count(),
                              &span)) {
    return Clock::duration(span);
  }
  return from < to ? Clock::duration::max() : Clock::duration::min();
}

/// `point + span`, saturating at both ends.
inline Clock::time_point moved_by(Clock::time_point point, Clock::duration span) noexcept {
  Clock::rep moved = 0;
  if (!__builtin_add_overflow(point.time_since_epoch().count(), span.count(), &moved)) {
    return Clock::time_point(Clock::duration(moved));
  }
  return span > Clock::duration::zero() ? Clock::time_point::max() : Clock::time_point::min();
}

/// The time as the kernel wants it; points before the epoch become the epoch, and what a 32-bit time_t
/// can't hold its last second.
inline timespec to_timespec(Clock::time_point point) noexcept {
  constexpr Clock::rep a_second = Clock::period::den / Clock::period::num;
  constexpr Clock::rep nanoseconds_a_tick = 1'000'000'000 / a_second;
  const Clock::rep since = point.time_since_epoch().count();
  timespec out{};
  if (since < 0) return out;
  constexpr Clock::rep last = std::numeric_limits<time_t>::max();
  const Clock::rep seconds = since / a_second;
  out.tv_sec = static_cast<time_t>(seconds < last ? seconds : last);
  out.tv_nsec = static_cast<long>(since % a_second * nanoseconds_a_tick);
  return out;
}

/// Milliseconds for poll(2), rounded up so that it never wakes early; -1 for "never".
inline int poll_timeout(Clock::time_point now, Clock::time_point deadline) noexcept {
  if (deadline == Clock::time_point::max()) return -1;
  if (deadline <= now) return 0;
  constexpr Clock::rep a_millisecond = Clock::period::den / Clock::period::num / 1000;
  const Clock::rep ticks = (deadline - now).count();
  const Clock::rep left = ticks / a_millisecond + (ticks % a_millisecond != 0 ? 1 : 0);
  constexpr Clock::rep longest = 1'000'000'000;  // some 11 days: the caller polls again
  return static_cast<int>(left < longest ? left : longest);
}

}  // namespace detail
}  // namespace lastcall
