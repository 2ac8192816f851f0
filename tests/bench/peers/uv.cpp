// libuv's side of the benchmarks: uv_signal, uv_timer, uv_async.
#include "peer.hpp"

#include <uv.h>

namespace {

// A thread that runs a loop, with a signal watcher in it, and an async handle that ends it.
class Loop {
 public:
  /// Calls `handler(this)` for each signal.
  explicit Loop(void (*handler)(void*), void* argument) : handler_(handler), argument_(argument) {
    uv_loop_init(&loop_);
    uv_signal_init(&loop_, &signal_);
    signal_.data = this;
    uv_signal_start(
        &signal_,
        [](uv_signal_t* signal, int) {
          const auto* const self = static_cast<Loop*>(signal->data);
          self->handler_(self->argument_);
        },
        SIGTERM);
    uv_async_init(&loop_, &quit_, [](uv_async_t* quit) { uv_stop(quit->loop); });
    thread_ = std::thread([this] { uv_run(&loop_, UV_RUN_DEFAULT); });
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() {
    uv_async_send(&quit_);
    thread_.join();
    uv_close(reinterpret_cast<uv_handle_t*>(&signal_), nullptr);
    uv_close(reinterpret_cast<uv_handle_t*>(&quit_), nullptr);
    uv_run(&loop_, UV_RUN_DEFAULT);
    uv_loop_close(&loop_);
  }

 private:
  uv_loop_t loop_{};
  uv_signal_t signal_{};
  uv_async_t quit_{};
  void (*handler_)(void*);
  void* argument_;
  std::thread thread_;
};

void tell(void* worker) { static_cast<peer::Worker*>(worker)->tell(); }

double signalled(double seconds) {
  peer::Worker worker;
  const Loop loop(&tell, &worker);
  return peer::latency(seconds, [&] {
    peer::settle();
    const std::int64_t begin = peer::now();
    peer::raise_sigterm();
    return worker.woken() - begin;
  });
}

double signalled_in_handler(double seconds) {
  struct Seen {
    peer::Flag done;
    std::int64_t woken_at = 0;
  } seen;
  const Loop loop(
      [](void* argument) {
        auto* const at = static_cast<Seen*>(argument);
        at->woken_at = peer::now();
        at->done.raise();
      },
      &seen);
  return peer::latency(seconds, [&] {
    peer::settle();
    const std::int64_t begin = peer::now();
    peer::raise_sigterm();
    seen.done.wait();
    return seen.woken_at - begin;
  });
}

// There is no tree: the timer alone, on the one thread that may touch it.
double deadline(double seconds) {
  uv_loop_t loop{};
  uv_loop_init(&loop);
  uv_timer_t timer{};
  uv_timer_init(&loop, &timer);
  const double figure = peer::per_operation(1, seconds, [&](std::size_t operations) {
    for (std::size_t i = 0; i < operations; ++i) {
      uv_timer_start(
          &timer, [](uv_timer_t*) {}, 3'600'000, 0);
      uv_timer_stop(&timer);
    }
  });
  uv_close(reinterpret_cast<uv_handle_t*>(&timer), nullptr);
  uv_run(&loop, UV_RUN_DEFAULT);
  uv_loop_close(&loop);
  return figure;
}

std::vector<std::int64_t> lateness;

// Its timers count whole milliseconds.
double fire_deadlines() {
  struct Timer {
    uv_timer_t timer;
    std::int64_t due;
  };
  lateness.clear();
  const double before = peer::cpu_milliseconds();
  uv_loop_t loop{};
  uv_loop_init(&loop);
  std::vector<Timer> timers(peer::deadlines);
  const std::int64_t begin = peer::now();
  for (std::size_t i = 0; i < peer::deadlines; ++i) {
    const std::uint64_t milliseconds = 300 + i * 1000 / peer::deadlines;
    Timer& made = timers[i];
    uv_timer_init(&loop, &made.timer);
    made.timer.data = &made;
    uv_update_time(&loop);
    made.due = begin + static_cast<std::int64_t>(milliseconds) * 1'000'000;
    const std::int64_t left = (made.due - peer::now() + 999'999) / 1'000'000;
    uv_timer_start(
        &made.timer,
        [](uv_timer_t* timer) {
          lateness.push_back(peer::now() - static_cast<Timer*>(timer->data)->due);
          uv_close(reinterpret_cast<uv_handle_t*>(timer), nullptr);
        },
        static_cast<std::uint64_t>(std::max<std::int64_t>(left, 0)), 0);
  }
  uv_run(&loop, UV_RUN_DEFAULT);
  uv_loop_close(&loop);
  return peer::cpu_milliseconds() - before;
}

std::optional<double> run(const peer::Case& which, double seconds) {
  const std::string& kind = which.kind;
  if (kind == "signal") return peer::pinned([&] { return signalled(seconds); });
  if (kind == "signal_two") return signalled(seconds);
  if (kind == "signal_handler") return peer::pinned([&] { return signalled_in_handler(seconds); });
  if (kind == "deadline" && which.threads == 1) return deadline(seconds);
  if (kind == "deadlines_fire") return fire_deadlines();
  if (kind == "deadlines_late") return peer::deadlines_late(lateness, &fire_deadlines);
  return std::nullopt;
}

[[noreturn]] void wait_for_signals() {
  peer::Worker worker;
  const Loop loop(&tell, &worker);
  peer::await([&] { return worker.woken(); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "await") == 0) wait_for_signals();
  return peer::answer("libuv", uv_version_string(), run);
}
