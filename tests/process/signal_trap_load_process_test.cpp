// The trap under load: full pipes, storms, traps that come and go in the middle of them.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/signals.hpp"
#include "support/threads.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <optional>
#include <string>
#include <thread>
#include <vector>

using namespace std::chrono_literals;
using namespace support;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;

#if defined(SIGRTMIN)
TEST_CASE("with a full pipe repeats may merge, different numbers never do") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGRTMIN, SIGTERM, SIGUSR1, SIGINT};
    for (int round = 0; round < 3; ++round) {
      for (int turn = 0; turn < 10'000; ++turn) ::raise(SIGRTMIN);
      ::kill(::getpid(), SIGUSR1);
      ::kill(::getpid(), SIGTERM);
      ::kill(::getpid(), SIGINT);
      for (const int number : {SIGINT, SIGTERM, SIGUSR1}) {
        expect(is_readable(trap.fd()), "there is something to read");
        const std::optional<SignalInfo> info = trap.try_wait();
        if (!expect(info.has_value(), "one is pending")) return;
        expect_equal(info->number, number, "the signal");
        expect_equal(info->sender_pid, ::getpid(), "its sender");
        expect_equal(info->code, SI_USER, "its code");
      }
      int repeats = 0;
      while (const std::optional<SignalInfo> info = trap.try_wait()) {
        expect_equal(info->number, SIGRTMIN, "the repeat");
        ++repeats;
      }
      expect(repeats >= 1000, "a pipe's worth came, but: " + std::to_string(repeats));
      expect(repeats <= 10'000, "each came once, but: " + std::to_string(repeats));
      expect(!is_readable(trap.fd()), "there is nothing left to read");
    }
  }));
}

TEST_CASE("a buffer that was filled by one reading still takes every kind of signal") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGRTMIN, SIGRTMIN + 1, SIGTERM, SIGUSR1, SIGUSR2};
    // Each reading empties a full pipe into the buffer and hands out one: soon the buffer is full,
    // too.
    for (int turn = 0; turn < 4; ++turn) {
      for (int sent = 0; sent < 5000; ++sent) ::raise(SIGRTMIN);
      expect_equal(trap.wait().number, SIGRTMIN, "the flood");
    }
    for (const int number : {SIGUSR1, SIGUSR2, SIGTERM, SIGRTMIN + 1}) ::raise(number);
    expect_equal(trap.wait().number, SIGTERM, "first");
    expect_equal(trap.wait().number, SIGUSR1, "second");
    expect_equal(trap.wait().number, SIGUSR2, "third");
    int flood = 0;
    int last = 0;
    while (const std::optional<SignalInfo> info = trap.try_wait()) {
      flood += info->number == SIGRTMIN ? 1 : 0;
      last = info->number;
    }
    expect(flood > 1000, "the flood was kept, but: " + std::to_string(flood));
    expect_equal(last, SIGRTMIN + 1, "the last one");
  }));
}
#endif

TEST_CASE("a trap doesn't go while a handler may still be writing to it") {
  check_clean(in_a_process([] {
    // Nobody can hold a real handler there; so it is only counted in flight, as one would count
    // itself.
    for (const unsigned side : {1U, 0U}) {
      std::optional<SignalTrap> trap;
      trap.emplace(std::initializer_list<int>{SIGUSR1});
      std::atomic<unsigned>& in_flight = lastcall::detail::signal_registry.in_flight[side];
      ++in_flight;
      std::atomic<pid_t> id{0};
      std::atomic<bool> gone{false};
      std::thread other([&] {
        id = thread_id();
        trap.reset();
        gone = true;
      });
      let_it_block(id, [&] { return gone.load(); });
      expect(!gone, "it waits for the handler in flight");
      --in_flight;
      other.join();
      expect(gone, "it has gone");
    }
  }));
}

TEST_CASE("a waiter wakes for a signal that finds the pipe full") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);  // so that what is left is not raised again
    SignalTrap trap{SIGUSR1, SIGTERM};
    const pthread_t main_thread = ::pthread_self();
    std::atomic<bool> over{false};
    std::thread other([&] {
      // Signals land on the main thread, which reads meanwhile: the pipe is full, empty, full
      // again.
      while (!over) ::pthread_kill(main_thread, SIGUSR1);
    });
    for (int round = 0; round < 20; ++round) {
      for (int turn = 0; turn < 3000; ++turn) ::raise(SIGUSR1);
      ::raise(SIGTERM);
      expect_equal(trap.wait().number, SIGTERM, "the urgent one");
    }
    over = true;
    other.join();
  }));
}

TEST_CASE(
    "a storm of 100,000 signals from other processes does no harm, and the last one is seen") {
  Child child = Child::run([] {
    // What those meet that come after the trap, and those that it holds still when it goes.
    for (const int number : {SIGUSR1, SIGUSR2, SIGTERM}) set_handler(number, plain_handler);
    SignalTrap trap{SIGUSR1, SIGUSR2, SIGTERM};
    std::vector<pid_t> senders;
    for (int at = 0; at < 4; ++at)
      senders.push_back(storm(at % 2 == 0 ? SIGUSR1 : SIGUSR2, 25'000));
    std::atomic<long> seen{0};
    Threads threads;
    for (int at = 0; at < 2; ++at) {
      threads.start([&] {
        while (trap.wait().number != SIGTERM) ++seen;
      });
    }
    for (const pid_t sender : senders) ::waitpid(sender, nullptr, 0);
    say("over\n");  // the last signals come from the test itself
    threads.join();
    expect(seen >= 2 && seen <= 100'000, "a believable number: " + std::to_string(seen));
  });
  REQUIRE(child.prints("over\n"));
  child.send(SIGTERM);
  std::this_thread::sleep_for(10ms);
  for (int more = 0; more < 100 && child.id() > 0; ++more) {
    child.send(SIGTERM);  // one for each thread; repeats merge while one is pending in the kernel
    std::this_thread::sleep_for(1ms);
  }
  check_clean(child.end());
}

TEST_CASE("a trap that goes in the middle of a storm never writes to somebody else's descriptor") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);  // what the signals meet between two traps
    // With so few descriptors to be had a trap's are the lowest that are free, as the neighbour's will be.
    rlimit few{};
    ::getrlimit(RLIMIT_NOFILE, &few);
    few.rlim_cur = 100;
    expect(::setrlimit(RLIMIT_NOFILE, &few) == 0, "a limit of 100 descriptors");
    const pid_t sender = storm(SIGUSR1, -1);
    std::atomic<bool> over{false};
    Threads threads;
    std::vector<pthread_t> targets(3);
    std::atomic<int> running{0};
    for (pthread_t& target : targets) {
      threads.start([&] {
        target = ::pthread_self();
        ++running;
        while (!over) ::sched_yield();
      });
    }
    eventually([&] { return running == 3; });
    threads.start([&] {
      while (!over) {
        for (const pthread_t target : targets) ::pthread_kill(target, SIGUSR1);
      }
    });
    const auto end = std::chrono::steady_clock::now() + 1s;
    long rounds = 0;
    long caught = 0;
    for (; std::chrono::steady_clock::now() < end; ++rounds) {
      int numbers[2] = {-1, -1};
      {
        SignalTrap trap{SIGUSR1};
        if (rounds % 4 == 0) caught += trap.wait_for(patience).has_value() ? 1 : 0;
        numbers[0] = trap.fd();
      }
      // Now a neighbour gets the numbers that the trap had.
      int ends[2];
      if (!expect(::pipe(ends) == 0, "a pipe")) break;
      if (rounds == 0) expect_equal(ends[0], numbers[0], "the descriptor, used again");
      ::sched_yield();
      const bool stray = is_readable(ends[0]);
      ::close(ends[0]);
      ::close(ends[1]);
      if (!expect(!stray, "nothing strays into a neighbour's pipe")) break;
    }
    over = true;
    threads.join();
    stop(sender);
    expect(rounds > 20, "rounds: " + std::to_string(rounds));
    expect(caught > 0, "signals: " + std::to_string(caught));
  }));
}

TEST_CASE("a trap made while the handler acts for nobody is not undone by it") {
  check_clean(in_a_process([] {
    // SIGURG's default is to be ignored, so a handler without a trap puts SIG_DFL back and goes on.
    const pid_t sender = storm(SIGURG, -1);
    std::atomic<bool> over{false};
    Threads threads;
    const pthread_t maker = ::pthread_self();
    std::vector<pthread_t> targets(2);
    std::atomic<int> running{0};
    for (pthread_t& target : targets) {
      threads.start([&] {
        target = ::pthread_self();
        ++running;
        while (!over) ::sched_yield();
      });
    }
    eventually([&] { return running == 2; });
    threads.start([&] {
      while (!over) {
        for (const pthread_t target : targets) ::pthread_kill(target, SIGURG);
        ::pthread_kill(maker, SIGURG);
      }
    });
    const auto end = std::chrono::steady_clock::now() + 1s;
    while (std::chrono::steady_clock::now() < end) {
      const SignalTrap trap{SIGURG};
      for (int look = 0; look < 3; ++look) {
        ::sched_yield();
        if (eventually([] { return !is_default(SIGURG); }, 10s)) continue;
        expect(false, "the trap is in place");
        over = true;
      }
      if (over) break;
    }
    over = true;
    threads.join();
    stop(sender);
  }));
}
