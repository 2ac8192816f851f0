// detail/clock.hpp: arithmetic that saturates, and times as the kernel wants them.
#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>

#include "support/catch.hpp"

#include <chrono>
#include <limits>

namespace detail = lastcall::detail;
using lastcall::CancellationSource;
using lastcall::Clock;
using namespace std::chrono_literals;

namespace {

constexpr Clock::time_point never = Clock::time_point::max();
constexpr Clock::time_point start{1000s};

}  // namespace

TEST_CASE("A time after now: none is now, a huge one is never, a fraction is rounded up") {
  CHECK(detail::time_after(start, 0s) == start);
  CHECK(detail::time_after(start, -1h) == start);
  CHECK(detail::time_after(start, std::chrono::hours::min()) == start);
  CHECK(detail::time_after(start, 1ns) == start + 1ns);
  CHECK(detail::time_after(start, 24h) == start + 24h);
  CHECK(detail::time_after(start, std::chrono::hours::max()) == never);
  CHECK(detail::time_after(start, Clock::duration::max()) == never);
  using Double = std::chrono::duration<double>;
  CHECK(detail::time_after(start, Double(std::numeric_limits<double>::quiet_NaN())) == start);
  CHECK(detail::time_after(start, Double(std::numeric_limits<double>::infinity())) == never);
  CHECK(detail::time_after(start, std::chrono::duration<double, std::nano>(1.25)) == start + 2ns);
  // As far as it goes but for the second at the end.
  const Clock::duration room = never - start;
  CHECK(detail::time_after(start, room - 10s) == never - 10s);
  CHECK(detail::time_after(start, room) == never);
}

TEST_CASE("A time point of another precision is rounded up, and saturates at both ends") {
  using Microseconds = std::chrono::time_point<Clock, std::chrono::microseconds>;
  using Hours = std::chrono::time_point<Clock, std::chrono::hours>;
  using Doubles = std::chrono::time_point<Clock, std::chrono::duration<double, std::nano>>;
  CHECK(detail::saturated(Microseconds(7us)) == Clock::time_point(7us));
  CHECK(detail::saturated(Microseconds(-7us)) == Clock::time_point(-7us));
  CHECK(detail::saturated(Hours(5h)) == Clock::time_point(5h));
  CHECK(detail::saturated(Hours::max()) == never);
  CHECK(detail::saturated(Hours::min()) == Clock::time_point::min());
  CHECK(detail::saturated(Doubles(std::chrono::duration<double, std::nano>(1.25))) ==
        Clock::time_point(2ns));
  CHECK(detail::saturated(start) == start);
}

TEST_CASE("wait_until() takes a time point of any precision of the clock") {
  const CancellationSource source;
  const auto begin = Clock::now();
  const auto later = std::chrono::time_point_cast<std::chrono::microseconds>(begin + 20ms);
  CHECK_FALSE(source.token().wait_until(later));
  CHECK(Clock::now() >= later);
  CHECK_FALSE(source.token().wait_until(
      std::chrono::time_point<Clock, std::chrono::hours>(std::chrono::hours::min())));
}

TEST_CASE("A span between two times, and a time moved by one, saturate") {
  CHECK(detail::span_between(start, start + 5s) == 5s);
  CHECK(detail::span_between(start + 5s, start) == -5s);
  CHECK(detail::span_between(Clock::time_point::min(), never) == Clock::duration::max());
  CHECK(detail::span_between(never, Clock::time_point::min()) == Clock::duration::min());
  CHECK(detail::moved_by(start, 5s) == start + 5s);
  CHECK(detail::moved_by(start, -5s) == start - 5s);
  CHECK(detail::moved_by(never, 1ns) == never);
  CHECK(detail::moved_by(Clock::time_point::min(), -1ns) == Clock::time_point::min());
}

TEST_CASE(
    "A time as the kernel wants it has whole seconds and what is left, never less than none") {
  const timespec some = detail::to_timespec(Clock::time_point(12s + 345678901ns));
  CHECK(some.tv_sec == 12);
  CHECK(some.tv_nsec == 345678901);
  const timespec epoch = detail::to_timespec(Clock::time_point(0s));
  CHECK(epoch.tv_sec == 0);
  CHECK(epoch.tv_nsec == 0);
  const timespec first = detail::to_timespec(Clock::time_point(1ns));
  CHECK(first.tv_nsec == 1);
  const timespec before = detail::to_timespec(Clock::time_point(-1500ms));
  CHECK(before.tv_sec == 0);
  CHECK(before.tv_nsec == 0);
}

TEST_CASE("A timeout of poll() is rounded up to milliseconds, and at most what an int can hold") {
  CHECK(detail::poll_timeout(start, never) == -1);
  CHECK(detail::poll_timeout(start, start) == 0);
  CHECK(detail::poll_timeout(start, start - 1h) == 0);
  CHECK(detail::poll_timeout(start, start + 1ns) == 1);
  CHECK(detail::poll_timeout(start, start + 1ms) == 1);
  CHECK(detail::poll_timeout(start, start + 1ms + 1ns) == 2);
  CHECK(detail::poll_timeout(start, start + 1h) == 3'600'000);
  CHECK(detail::poll_timeout(start, start + 999'999'999ms) == 999'999'999);
  CHECK(detail::poll_timeout(start, start + 24h * 365) == 1'000'000'000);
}
