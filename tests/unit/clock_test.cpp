// detail/clock.hpp: arithmetic that saturates, and times as the kernel wants them.
#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>

#include "support/catch.hpp"

#include <chrono>
#include <cstdint>
#include <limits>
#include <ratio>

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

TEST_CASE("A period that divides no nanosecond: rounded up, and as far as the clock goes") {
  using Sixtieths = std::chrono::duration<std::int64_t, std::ratio<1, 60>>;
  using Samples = std::chrono::duration<std::int64_t, std::ratio<1, 44100>>;
  using Frames = std::chrono::duration<int, std::ratio<1001, 30000>>;
  using Cycles = std::chrono::duration<std::uint64_t, std::ratio<1, 2'893'202'123>>;
  CHECK(detail::time_after(start, Sixtieths(1)) == start + 16'666'667ns);
  CHECK(detail::time_after(start, Sixtieths(3)) == start + 50ms);
  CHECK(detail::time_after(start, Frames(30000)) == start + 1001s);
  CHECK(detail::time_after(start, Sixtieths(-1)) == start);
  constexpr auto a_century = std::chrono::hours(24 * 365 * 100);
  CHECK(detail::time_after(start, Sixtieths(std::chrono::seconds(a_century).count() * 60)) ==
        start + a_century);
  CHECK(detail::time_after(start, Samples(std::chrono::seconds(a_century).count() * 44100)) ==
        start + a_century);
  // More than a signed number has room for, and still below two centuries.
  const std::uint64_t many = 2'893'202'123ULL * 6'000'000'000ULL;
  CHECK(detail::time_after(start, Cycles(many)) == start + 6'000'000'000s);
  CHECK(detail::time_after(start, Cycles(many + 1)) == start + 6'000'000'000s + 1ns);
  CHECK(detail::time_after(start, Samples::max()) == never);
  CHECK(detail::time_after(start, Sixtieths::min()) == start);

  using Points = std::chrono::time_point<Clock, Samples>;
  CHECK(detail::saturated(Points(Samples(-1))) == Clock::time_point(-22'675ns));
  CHECK(detail::saturated(Points(Samples(44101))) == Clock::time_point(1s + 22'676ns));
  CHECK(detail::saturated(Points(Samples(std::chrono::seconds(a_century).count() * -44100))) ==
        Clock::time_point(-a_century));
  CHECK(detail::saturated(Points::max()) == never);
}

TEST_CASE("A float near the end of time is what it is: its own rounding is minutes there") {
  using Floats = std::chrono::duration<float>;
  // The last one: its neighbours are 17 minutes away.
  CHECK(detail::time_after(Clock::time_point(1s), Floats(9'223'371'776.0F)) ==
        Clock::time_point(1s) + 9'223'371'776s);
  CHECK(detail::time_after(start, Floats(9'223'371'776.0F)) == never);
  CHECK(detail::time_after(start, Floats(0.5F)) == start + 500ms);
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
