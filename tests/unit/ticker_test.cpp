// ticker.hpp: ticks at whole periods from the making.
#include <lastcall/ticker.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Clock;
using lastcall::Ticker;
using namespace std::chrono_literals;

namespace {

static_assert(std::is_constructible_v<Ticker, Clock::duration>);
static_assert(!std::is_convertible_v<Clock::duration, Ticker>);

template <class Body>
std::string message_of_invalid_argument(Body body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  } catch (...) {
    return "something else was thrown";
  }
  return "nothing was thrown";
}

TEST_CASE("Ticker: a period of zero or less is an invalid argument, and the message names it") {
  CHECK(message_of_invalid_argument([] { Ticker ticker(0ms); }).find("0 ns") != std::string::npos);
  CHECK(message_of_invalid_argument([] { Ticker ticker(-7us); }).find("-7000 ns") !=
        std::string::npos);
  CHECK(message_of_invalid_argument([] {
          Ticker ticker(Clock::duration::min());
        }).find(std::to_string(Clock::duration::min().count())) != std::string::npos);
  CHECK_NOTHROW(Ticker(1ns));
}

TEST_CASE("Ticker: ticks never come early, and one follows the other") {
  const CancellationSource source;
  const Clock::time_point before = Clock::now();
  const Ticker ticker(2ms);
  for (int tick = 1; tick <= 20; ++tick) {
    REQUIRE(ticker.wait(source.token()));
    REQUIRE(Clock::now() >= before + tick * 2ms);
  }
}

TEST_CASE(
    "Ticker: ticks at whole periods from its making, however long the body of the loop takes") {
  // Five eighths into a period the body is done. The tick is due three eighths later; one that was
  // counted from the end of the body would need a whole period more. A slow machine is tried again.
  constexpr auto period = 80ms;
  const CancellationSource source;
  auto took = Clock::duration::max();
  for (int attempt = 0; attempt < 50 && took >= period * 13 / 8; ++attempt) {
    const Clock::time_point before = Clock::now();
    const Ticker ticker(period);
    std::this_thread::sleep_for(period * 5 / 8);
    REQUIRE(ticker.wait(source.token()));
    took = Clock::now() - before;
    REQUIRE(took >= period);
  }
  CHECK(took < period * 13 / 8);
}

TEST_CASE("Ticker: after a miss, the next tick is at the next whole period") {
  constexpr auto period = 40ms;
  const CancellationSource source;
  auto took = Clock::duration::max();
  for (int attempt = 0; attempt < 50 && took >= 4 * period; ++attempt) {
    const Clock::time_point before = Clock::now();
    const Ticker ticker(period);
    std::this_thread::sleep_for(period * 5 / 2);
    REQUIRE(ticker.wait(source.token()));
    took = Clock::now() - before;
    // Nothing at once for the two that were missed, ...
    REQUIRE(took >= 3 * period);
  }
  // ... and the third is not put off.
  CHECK(took < 4 * period);
}

TEST_CASE("Ticker: cancelled already, it says false at once") {
  CancellationSource source;
  source.cancel();
  CHECK_FALSE(Ticker(1000h).wait(source.token()));
  const Ticker due(1ms);
  std::this_thread::sleep_for(5ms);
  CHECK_FALSE(due.wait(source.token()));
}

TEST_CASE("Ticker: a cancel ends a wait, which says false") {
  CancellationSource source;
  std::atomic<pid_t> waiter{0};
  std::atomic<bool> ticked{true};
  {
    support::Threads threads;
    threads.start([&] {
      const Ticker ticker(1000h);
      waiter = support::thread_id();
      ticked = ticker.wait(source.token());
    });
    support::let_it_block(waiter);
    source.cancel();
  }
  CHECK_FALSE(ticked);
}

TEST_CASE("Ticker: a deadline that comes before the tick ends the wait") {
  const CancellationSource source(CancellationToken(), 5ms);
  CHECK_FALSE(Ticker(1000h).wait(source.token()));
}

TEST_CASE("Ticker: a huge period saturates") {
  const CancellationSource source(CancellationToken(), 5ms);
  CHECK_FALSE(Ticker(Clock::duration::max()).wait(source.token()));
  CHECK_FALSE(Ticker(Clock::duration::max() - 1ns).wait(source.token()));
}

TEST_CASE("Ticker: a token that can never be cancelled is fine") {
  CHECK(Ticker(1ms).wait(CancellationToken()));
}

TEST_CASE("Ticker: every thread that waits gets every tick") {
  const CancellationSource source;
  const Ticker ticker(3ms);
  std::atomic<int> ticks{0};
  {
    support::Threads threads;
    for (int i = 0; i < 4; ++i) {
      threads.start([&] {
        for (int tick = 0; tick < 5; ++tick) ticks += ticker.wait(source.token()) ? 1 : 0;
      });
    }
  }
  CHECK(ticks == 20);
}

}  // namespace
