// Deadlines by many threads: set, beaten, cancelled, let go, forked away.
//
// What is checked:
//  [early]   no callback and no wait says "deadline" before its time
//  [lost]    every deadline that nobody took back comes, although an hour's deadline is all that the timer
//            thread would wake up for by itself
//  [late]    it comes within a time that only a lost wake-up can take
//  [dead]    none comes after its source and tokens have gone
//  [left]    at the end no timer is armed but the one of an hour
#include <lastcall/cancellation.hpp>
#include <lastcall/detail/timer_service.hpp>
#include <lastcall/ticker.hpp>

#include "options.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::CauseKind;
using lastcall::Clock;
using stress::check;
using support::Random;
using namespace std::chrono_literals;

std::atomic<long> set_deadlines{0};
std::atomic<long> came{0};
std::atomic<long> worst_us{0};

void note_delay(Clock::duration late) {
  const long us =
      static_cast<long>(std::chrono::duration_cast<std::chrono::microseconds>(late).count());
  long worst = worst_us;
  while (us > worst && !worst_us.compare_exchange_weak(worst, us)) {
  }
}

/// Its callback writes down when it came.
struct Alarm {
  explicit Alarm(const CancellationToken& parent, Clock::time_point at)
      : when(at), source(parent, at), callback(source.token(), [this] { ring(); }) {
    ++set_deadlines;
  }
  void ring() {
    const auto now = Clock::now();
    if (source.token().cause().kind() != CauseKind::deadline_exceeded) return;
    check(now >= when, "[early] a callback before its time");
    check(!rung.exchange(true), "[dead] a callback twice");
    note_delay(now - when);
    ++came;
  }
  const Clock::time_point when;
  std::atomic<bool> rung{false};
  CancellationSource source;
  CancellationCallback<std::function<void()>> callback;
};

Clock::time_point some_time(Random& random) {
  // Within a tick, within a slot of the wheel's first level, and beyond.
  const std::size_t range = random.one_in(3) ? 1000 : random.one_in(3) ? 70'000 : 8000;
  return Clock::now() + std::chrono::microseconds(random.below(range));
}

void let_one_come(Random& random) {
  const Alarm alarm({}, some_time(random));
  const CancellationToken token = alarm.source.token();
  check(token.wait_for(support::patience), "[lost] a deadline never came");
  check(Clock::now() >= alarm.when, "[early] a wait ended before its time");
  check(support::eventually([&] { return alarm.rung.load(); }), "[lost] its callback never came");
}

void take_some_back(Random& random) {
  std::vector<std::unique_ptr<Alarm>> alarms;
  const CancellationSource parent;
  for (std::size_t count = random.below(40); count > 0; --count) {
    alarms.push_back(std::make_unique<Alarm>(
        random.one_in(2) ? parent.token() : CancellationToken(), some_time(random)));
    if (random.one_in(3)) {
      std::swap(alarms[random.below(alarms.size())], alarms.back());
      alarms.pop_back();
    }
    if (random.one_in(5) && !alarms.empty()) alarms[random.below(alarms.size())]->source.cancel();
    if (random.one_in(20)) std::this_thread::sleep_for(300us);
  }
  // The rest comes or is let go.
  if (random.one_in(2)) return;
  for (const auto& alarm : alarms) {
    check(alarm->source.token().wait_for(support::patience),
          "[lost] a deadline of many never came");
  }
}

void beat_a_parent(Random& random) {
  const auto at = some_time(random);
  const CancellationSource parent(CancellationToken(), at);
  const CancellationSource later(parent.token(), at + 1h);
  const CancellationSource sooner(parent.token(),
                                  at - std::chrono::microseconds(random.below(2000)));
  check(later.token().deadline() == at, "a parent's earlier deadline doesn't beat its child's");
  check(later.token().wait_for(support::patience),
        "[lost] a parent's deadline didn't reach its child");
  check(Clock::now() >= at, "[early] a child before its parent's time");
  check(sooner.is_cancelled(), "[lost] an earlier deadline came later");
}

void tick(Random& random) {
  const auto begin = Clock::now();
  const auto period = std::chrono::microseconds(500 + random.below(1000));
  const lastcall::Ticker ticker(period);
  const CancellationSource source(CancellationToken(), 5ms);
  int ticks = 0;
  while (ticker.wait(source.token())) ++ticks;
  check(Clock::now() - begin >= 5ms, "[early] a ticker ended before its deadline");
  check(ticks * period <= Clock::now() - begin, "[early] more ticks than periods");
}

void fork_a_child() {
  const int code = support::in_child_process([] {
    const auto begin = Clock::now();
    const CancellationSource source(CancellationToken(), 3ms);
    const bool done = source.token().wait_for(support::patience);
    return done && Clock::now() - begin >= 3ms ? 0 : 1;
  });
  check(code == 0, "[lost] in a child a deadline didn't come: " + std::to_string(code));
}

void one_epoch(const stress::Options& options, Random& random) {
  auto& service = lastcall::detail::TimerService::instance();
  {
    const int count = options.some_threads(random);
    support::StartingLine line(count);
    support::Threads threads;
    for (int number = 0; number < count; ++number) {
      threads.start([&, number, seed = random.next()] {
        Random own(seed);
        for (int turn = 0; turn < 6; ++turn) {
          // Now and then everybody at once, after a moment in which the timer thread has gone to sleep.
          line.ready_steady_go();
          std::this_thread::sleep_for(std::chrono::microseconds(own.below(1500)));
          switch (own.below(4)) {
            case 0: take_some_back(own); break;
            case 1: beat_a_parent(own); break;
            case 2: tick(own); break;
            default: let_one_come(own); break;
          }
          if (number == 0 && own.one_in(20)) fork_a_child();
        }
      });
    }
  }
  check(support::eventually([&] { return service.armed_for_test() == 1; }),
        "[left] timers are armed");
}

}  // namespace

int main(int argc, char** argv) {
  const stress::Options options = stress::begin("timer_stress", argc, argv);
  const CancellationSource hour(CancellationToken(), 1h + options.length);
  stress::run(options, [&](Random& random) { one_epoch(options, random); });
  // A busy machine is late by a second or two; a wake-up that was lost, by an hour.
  check(worst_us < 30'000'000, "[late] by seconds");
  std::printf("%llu epochs, %ld deadlines, %ld came, the latest %.1f ms late: ok\n",
              static_cast<unsigned long long>(stress::epoch), set_deadlines.load(), came.load(),
              static_cast<double>(worst_us) / 1000);
  return 0;
}
