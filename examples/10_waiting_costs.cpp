// 10: waiting for a token against asking it again and again. Measures for some seconds, then ends
// by itself.
//
// What to watch for: a loop that polls pays twice. It wakes up for nothing all day long, and when
// the moment comes it is late by half its period on average. Polling faster mends one and worsens
// the other. A wait has neither cost: no wake-up before the moment, and the kernel's time to wake a
// thread after it.
#include <lastcall/cancellation.hpp>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <thread>

using namespace std::chrono_literals;

namespace {

struct Cost {
  long wake_ups = 0;
  std::chrono::nanoseconds processor{};  // of this thread
  std::chrono::nanoseconds late{};       // from cancel() to knowing it
};

std::chrono::nanoseconds processor_time() {
  timespec used{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return std::chrono::seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec);
}

// Lets `wait_until_told` wait for a token that is cancelled `after` a while, and says what it cost.
template <class Wait>
Cost measure(std::chrono::milliseconds after, Wait wait_until_told) {
  lastcall::CancellationSource source;
  lastcall::Clock::time_point cancelled;
  Cost cost;
  std::thread waiter([&, token = source.token()] {
    const auto before = processor_time();
    cost.wake_ups = wait_until_told(token);
    const auto now = lastcall::Clock::now();
    cost.processor = processor_time() - before;
    cost.late = now - cancelled;  // written before cancel(), which published it
  });
  std::this_thread::sleep_for(after);
  cancelled = lastcall::Clock::now();
  source.cancel();
  waiter.join();
  return cost;
}

long poll_every(std::chrono::milliseconds period, const lastcall::CancellationToken& token) {
  long wake_ups = 0;
  for (; !token.is_cancelled(); ++wake_ups) std::this_thread::sleep_for(period);
  return wake_ups;
}

void print(const char* how, const Cost& cost) {
  const auto microseconds = [](std::chrono::nanoseconds span) {
    return static_cast<double>(span.count()) / 1000.0;
  };
  std::printf("%-22s %9ld %15.0f %12.0f\n", how, cost.wake_ups, microseconds(cost.processor),
              microseconds(cost.late));
}

}  // namespace

int main() {
  // Not a multiple of any period below, so that the moment falls somewhere in the middle of one.
  constexpr auto after = 1037ms;
  using Token = const lastcall::CancellationToken&;
  std::printf("%-22s %9s %15s %12s\n", "in one second", "wake-ups", "processor (us)", "late (us)");
  print("polling every 1 ms", measure(after, [](Token token) { return poll_every(1ms, token); }));
  print("polling every 100 ms",
        measure(after, [](Token token) { return poll_every(100ms, token); }));
  print("token.wait()", measure(after, [](Token token) { return token.wait(), 1L; }));
}
