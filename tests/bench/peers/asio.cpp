// Boost.Asio's side of the benchmarks: signal_set, executor_work_guard, steady_timer.
#include "peer.hpp"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/version.hpp>

#include <memory>

namespace {

namespace asio = boost::asio;
using std::chrono::steady_clock;

// A thread that runs an io_context, with a signal_set in it.
class Loop {
 public:
  Loop() : guard_(asio::make_work_guard(context_)), signals_(context_, SIGTERM) {
    thread_ = std::thread([this] { context_.run(); });
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() {
    guard_.reset();
    context_.stop();
    thread_.join();
  }
  /// Calls `handler` for the next signal.
  template <class Handler>
  void listen(Handler handler) {
    signals_.async_wait([handler](const boost::system::error_code& error, int) {
      if (!error) handler();
    });
  }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> guard_;
  asio::signal_set signals_;
  std::thread thread_;
};

double signalled(double seconds) {
  Loop loop;
  peer::Worker worker;
  return peer::latency(seconds, [&] {
    loop.listen([&] { worker.tell(); });
    peer::settle();
    const std::int64_t begin = peer::now();
    peer::raise_sigterm();
    return worker.woken() - begin;
  });
}

double signalled_in_handler(double seconds) {
  Loop loop;
  return peer::latency(seconds, [&] {
    peer::Flag done;
    std::int64_t woken_at = 0;
    loop.listen([&] {
      woken_at = peer::now();
      done.raise();
    });
    peer::settle();
    const std::int64_t begin = peer::now();
    peer::raise_sigterm();
    done.wait();
    return woken_at - begin;
  });
}

double guard(unsigned threads, double seconds) {
  asio::io_context context;
  const auto one_stays = asio::make_work_guard(context);
  return peer::per_operation(threads, seconds, [&](std::size_t operations) {
    for (std::size_t i = 0; i < operations; ++i) {
      const auto work = asio::make_work_guard(context);
    }
  });
}

double last_out(double seconds) {
  return peer::latency(seconds, [&] {
    asio::io_context context;
    auto work = asio::make_work_guard(context);
    std::int64_t woken_at = 0;
    std::thread waiter([&] {
      context.run();
      woken_at = peer::now();
    });
    peer::settle();
    const std::int64_t begin = peer::now();
    work.reset();
    waiter.join();
    return woken_at - begin;
  });
}

// There is no tree: the timer alone. Its handler has to run, cancelled, before it is forgotten.
double deadline(unsigned threads, double seconds) {
  asio::io_context context;
  const auto never_out_of_work = asio::make_work_guard(context);
  const auto far = steady_clock::now() + std::chrono::hours(1);
  return peer::per_operation(threads, seconds, [&](std::size_t operations) {
    for (std::size_t i = 0; i < operations; ++i) {
      asio::steady_timer timer(context, far);
      timer.async_wait([](const boost::system::error_code&) {});
      timer.cancel();
      context.poll();
    }
  });
}

std::vector<std::int64_t> lateness;

double fire_deadlines() {
  lateness.clear();
  const double before = peer::cpu_milliseconds();
  asio::io_context context;
  const auto first = steady_clock::now() + std::chrono::milliseconds(300);
  std::vector<std::unique_ptr<asio::steady_timer>> timers;
  for (std::size_t i = 0; i < peer::deadlines; ++i) {
    const auto due = first + std::chrono::microseconds(i * 1'000'000 / peer::deadlines);
    timers.push_back(std::make_unique<asio::steady_timer>(context, due));
    timers.back()->async_wait([due](const boost::system::error_code&) {
      lateness.push_back((steady_clock::now() - due).count());
    });
  }
  context.run();
  return peer::cpu_milliseconds() - before;
}

std::optional<double> run(const peer::Case& which, double seconds) {
  const std::string& kind = which.kind;
  if (kind == "guard") return guard(which.threads, seconds);
  if (kind == "last_out") return peer::pinned([&] { return last_out(seconds); });
  if (kind == "signal") return peer::pinned([&] { return signalled(seconds); });
  if (kind == "signal_two") return signalled(seconds);
  if (kind == "signal_handler") return peer::pinned([&] { return signalled_in_handler(seconds); });
  if (kind == "deadline") return deadline(which.threads, seconds);
  if (kind == "deadlines_fire") return fire_deadlines();
  if (kind == "deadlines_late") return peer::deadlines_late(lateness, &fire_deadlines);
  return std::nullopt;
}

[[noreturn]] void wait_for_signals() {
  Loop loop;
  peer::Worker worker;
  peer::await([&] {
    loop.listen([&] { worker.tell(); });
    return worker.woken();
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "await") == 0) wait_for_signals();
  const int version = BOOST_VERSION;
  return peer::answer(
      "asio", std::to_string(version / 100000) + "." + std::to_string(version / 100 % 1000), run);
}
