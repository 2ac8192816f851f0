// The trap in processes of its own: dispositions that are restored, handlers that are chained,
// masks, and what the system refuses. The neighbours have signals that are raised again, forks, and
// storms.
//
// Each case forks a child that does the work and says by support::expect() what didn't hold.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/signals.hpp"
#include "support/threads.hpp"

#include <pthread.h>
#include <setjmp.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

using namespace std::chrono_literals;
using namespace support;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;

// ---- Restoring and chaining

TEST_CASE("what was there before a trap is back after it, in whatever order traps go") {
  check_clean(in_a_process([] {
    std::array<int, 3> order = {0, 1, 2};
    do {
      set_handler(SIGHUP, SIG_IGN);
      set_handler(SIGUSR1, plain_handler, SA_RESTART);
      set_info_handler(SIGUSR2);
      std::array<std::optional<SignalTrap>, 3> traps;
      for (auto& trap : traps) {
        trap.emplace(std::initializer_list<int>{SIGTERM, SIGHUP, SIGUSR1, SIGUSR2});
      }
      for (const int at : order) {
        for (const int number : {SIGTERM, SIGHUP, SIGUSR1, SIGUSR2}) {
          expect((disposition_of(number).sa_flags & SA_ONSTACK) != 0, "a trap is in place");
        }
        traps[static_cast<std::size_t>(at)].reset();
      }
      expect(is_default(SIGTERM), "SIGTERM is the default again");
      expect(handler_of(SIGHUP) == SIG_IGN, "SIGHUP is ignored again");
      expect(handler_of(SIGUSR1) == plain_handler, "the plain handler is back");
      expect((disposition_of(SIGUSR1).sa_flags & SA_RESTART) != 0, "with its flags");
      expect((disposition_of(SIGUSR1).sa_flags & SA_SIGINFO) == 0, "and no others");
      expect(disposition_of(SIGUSR2).sa_sigaction == info_handler,
             "the SA_SIGINFO handler is back");
      const struct sigaction now = disposition_of(SIGUSR2);
      expect(::sigismember(&now.sa_mask, SIGALRM) == 1, "with its mask");
    } while (std::next_permutation(order.begin(), order.end()));
  }));
}

TEST_CASE("a previous handler is called on, plain or with siginfo, once for each signal") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    set_info_handler(SIGUSR2);
    SignalTrap one{SIGUSR1, SIGUSR2};
    SignalTrap two{SIGUSR1, SIGUSR2};
    ::raise(SIGUSR1);
    expect_equal(plain_calls.load(), 1, "calls of the plain handler");
    ::kill(::getpid(), SIGUSR2);
    expect_equal(info_calls.load(), 1, "calls of the SA_SIGINFO handler");
    expect_equal(info_sender.load(), ::getpid(), "the sender that it saw");
    expect_equal(pending(one), 2, "signals of the first trap");
    expect_equal(pending(two), 2, "signals of the second trap");
  }));
}

TEST_CASE("a previous one-shot handler is called once, and is spent afterwards") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler, static_cast<int>(SA_RESETHAND));
    {
      SignalTrap trap{SIGUSR1};
      ::raise(SIGUSR1);
      ::raise(SIGUSR1);
      expect_equal(plain_calls.load(), 1, "calls of the one-shot handler");
      expect_equal(pending(trap), 2, "signals of the trap");
    }
    expect(is_default(SIGUSR1), "it was spent, as without a trap");
    set_handler(SIGUSR1, plain_handler, static_cast<int>(SA_RESETHAND));
    { const SignalTrap trap{SIGUSR1}; }
    expect(handler_of(SIGUSR1) == plain_handler, "one that wasn't called is back");
  }));
}

TEST_CASE("a disposition that somebody else has changed since is not touched on the way out") {
  check_clean(in_a_process([] {
    for (const Handler theirs : {Handler{SIG_IGN}, Handler{plain_handler}, Handler{SIG_DFL}}) {
      set_info_handler(SIGUSR1);
      {
        const SignalTrap trap{SIGUSR1, SIGUSR2};
        set_handler(SIGUSR1, theirs);
      }
      expect(handler_of(SIGUSR1) == theirs, "it is still theirs");
      expect(is_default(SIGUSR2), "the other number was restored");
      // And a trap over it puts it back, too.
      {
        SignalTrap trap{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(trap), 1, "signals of the new trap");
      }
      expect(handler_of(SIGUSR1) == theirs, "it is theirs again");
    }
  }));
}

TEST_CASE(
    "a handler on top that calls ours on shares the signal with the trap, before and after it") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    install_on_top(SIGUSR1);
    ::raise(SIGUSR1);
    expect_equal(top_calls.load(), 1, "calls of the handler on top");
    expect_equal(plain_calls.load(), 1, "calls of the handler beneath");
    expect_equal(pending(*trap), 1, "signals of the trap between them");
    trap.reset();
    ::raise(SIGUSR1);
    expect_equal(top_calls.load(), 2, "calls of the handler on top");
    expect_equal(plain_calls.load(), 2, "calls of the handler beneath");
    // A new trap goes on top of them all; the chain has no loop, and nobody is called twice.
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    ::raise(SIGUSR1);
    expect_equal(top_calls.load(), 3, "calls of the handler on top");
    expect_equal(plain_calls.load(), 3, "calls of the handler beneath");
    expect_equal(pending(*trap), 1, "signals of the trap on top");
    trap.reset();
    expect(disposition_of(SIGUSR1).sa_sigaction == top_handler, "theirs is back");
  }));
}

TEST_CASE(
    "a handler on top that is the one beneath, installed again, is called once for each signal") {
  // It looks whether it is in place, finds that it isn't, and calls on from now on what it finds: ours.
  check_clean(in_a_process([] {
    const auto once = [](const char* when, std::initializer_list<SignalTrap*> traps,
                         int line = __builtin_LINE()) {
      top_calls = 0;
      ::raise(SIGUSR1);
      expect_equal(top_calls.load(), 1, std::string("calls ") + when, line);
      for (SignalTrap* trap : traps) {
        expect_equal(pending(*trap), 1, std::string("signals ") + when, line);
      }
    };
    install_on_top(SIGUSR1);
    const struct sigaction theirs = disposition_of(SIGUSR1);
    std::optional<SignalTrap> trap(std::in_place, std::initializer_list<int>{SIGUSR1});
    once("of it beneath", {&*trap});
    install_on_top(SIGUSR1);
    once("of it on top", {&*trap});
    // Another trap is put over the two, and goes.
    {
      SignalTrap above{SIGUSR1};
      once("under another trap", {&*trap, &above});
    }
    once("on top again", {&*trap});
    trap.reset();
    expect(lastcall::detail::same_disposition(disposition_of(SIGUSR1), theirs), "it is in place");
    once("after the trap", {});
    // And so on, as often as traps come and go, which it covers again or not.
    for (int turn = 0; turn < 30; ++turn) {
      SignalTrap next{SIGUSR1};
      once("under a later trap", {&next});
      if (turn % 3 != 0) install_on_top(SIGUSR1);
      once("over or under a later trap", {&next});
    }
    once("at the end", {});
  }));
}

TEST_CASE("a handler that is put back by hand while traps live costs them no place") {
  check_clean(in_a_process([] {
    for (int turn = 0; turn < 30; ++turn) {
      set_handler(SIGUSR1, plain_handler);
      SignalTrap trap{SIGUSR1};
      plain_calls = 0;
      ::raise(SIGUSR1);
      expect_equal(plain_calls.load(), 1, "calls of the handler");
      expect_equal(pending(trap), 1, "signals of the trap");
      // Ours comes back, too: it is who was called, so the one beneath is called on.
      const struct sigaction ours = disposition_of(SIGUSR1);
      set_handler(SIGUSR1, plain_handler);
      if (turn % 2 == 0) ::sigaction(SIGUSR1, &ours, nullptr);
      ::raise(SIGUSR1);
      expect_equal(plain_calls.load(), 2, "calls of the handler");
      expect_equal(pending(trap), turn % 2 == 0 ? 1 : 0, "signals of the trap");
    }
  }));
}

TEST_CASE("traps below and above somebody else's handler each get their copy") {
  check_clean(in_a_process([] {
    SignalTrap below{SIGUSR1};
    install_on_top(SIGUSR1);
    {
      SignalTrap above{SIGUSR1};
      ::raise(SIGUSR1);
      expect_equal(pending(below), 1, "signals of the trap below");
      expect_equal(pending(above), 1, "signals of the trap above");
    }
    ::raise(SIGUSR1);
    expect_equal(pending(below), 1, "signals of the trap below");
    expect_equal(top_calls.load(), 2, "calls of the handler between them");
  }));
}

TEST_CASE(
    "a trap over a handler that calls nobody gets its signals, and so does one that joins it") {
  check_clean(in_a_process([] {
    SignalTrap covered{SIGUSR1};
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> first;
    first.emplace(std::initializer_list<int>{SIGUSR1});
    SignalTrap second{SIGUSR1};
    ::raise(SIGUSR1);
    expect_equal(pending(*first), 1, "signals of the first");
    expect_equal(pending(second), 1, "signals of the second");
    first.reset();
    ::raise(SIGUSR1);
    expect_equal(pending(second), 1, "signals of the second, left alone");
    expect_equal(plain_calls.load(), 2, "calls of their handler");
    expect_equal(pending(covered), 0, "signals of the one that they cover");
  }));
}

TEST_CASE("ours put back by somebody else, when no trap is left, acts as what was there before") {
  const auto after = [](int number, Handler before) {
    return in_a_process([=] {
      set_handler(number, before);
      {
        const SignalTrap trap{number};
        install_on_top(number);
      }
      ::sigaction(number, &beneath, nullptr);
      expect(!is_default(number) && handler_of(number) != SIG_IGN, "ours is in place");
      expect(lastcall::detail::is_ignored(number) == (before == SIG_IGN), "ignored, or not");
      ::raise(number);
      expect_equal(plain_calls.load(), before == plain_handler ? 1 : 0, "calls of the handler");
      // A trap that comes now joins it, and what it restores is what was there at first.
      {
        SignalTrap trap{number};
        ::raise(number);
        expect_equal(pending(trap), 1, "signals of the new trap");
      }
      expect(handler_of(number) == before, "what was there at first is back");
    });
  };
  CHECK(after(SIGTERM, SIG_DFL).how == "SIGTERM");
  CHECK(after(SIGQUIT, SIG_DFL).how == "SIGQUIT");
  check_clean(after(SIGTERM, SIG_IGN));
  check_clean(after(SIGTERM, plain_handler));
  check_clean(after(SIGURG, SIG_DFL));  // the default is to ignore it
}

TEST_CASE("a handler that ours gives way to finds itself in place, as without us") {
  // What a second copy of the library in another shared object goes by.
  check_clean(in_a_process([] {
    static std::atomic<int> in_place{0};
    const Handler theirs = [](int number) {
      struct sigaction now {};
      ::sigaction(number, nullptr, &now);
      in_place += (now.sa_flags & SA_ONSTACK) == 0 ? 1 : 0;
    };
    set_handler(SIGUSR1, theirs);
    {
      const SignalTrap trap{SIGUSR1};
      install_on_top(SIGUSR1);
    }
    ::sigaction(SIGUSR1, &beneath, nullptr);
    ::raise(SIGUSR1);
    expect_equal(in_place.load(), 1, "calls with itself in place");
    expect(handler_of(SIGUSR1) == theirs, "it is back");
    ::raise(SIGUSR1);
    expect_equal(in_place.load(), 2, "calls with itself in place");
    // One that is good for one call is spent by it.
    set_handler(SIGUSR2, plain_handler, static_cast<int>(SA_RESETHAND));
    {
      const SignalTrap trap{SIGUSR2};
      install_on_top(SIGUSR2);
    }
    ::sigaction(SIGUSR2, &beneath, nullptr);
    ::raise(SIGUSR2);
    expect_equal(plain_calls.load(), 1, "calls of the one-shot handler");
    expect(is_default(SIGUSR2), "it is spent");
  }));
}

TEST_CASE("ours called by somebody else's handler, when no trap is left, doesn't end the process") {
  check_clean(in_a_process([] {
    {
      const SignalTrap trap{SIGTERM};
      install_on_top(SIGTERM);
    }
    ::raise(SIGTERM);
    expect_equal(top_calls.load(), 1, "calls of the handler on top");
    // Nor is a signal raised again, however many threads come that way at once.
    Threads threads;
    for (int at = 0; at < 2; ++at) {
      threads.start([] {
        for (int turn = 0; turn < 10'000; ++turn) ::raise(SIGTERM);
      });
    }
    threads.join();
    expect_equal(top_calls.load(), 20'001, "calls of the handler on top");
    expect(disposition_of(SIGTERM).sa_sigaction == top_handler, "it is in place");
  }));
}

TEST_CASE("a handler that gives way leaves a trap in place that has come meanwhile") {
  // Called by hand, at the point where it has found nobody.
  check_clean(in_a_process([] {
    const SignalTrap trap{SIGURG};
    const lastcall::detail::SignalPassage signal{0, SIGURG, nullptr, nullptr, true, false};
    expect(!lastcall::detail::act_as_previous(signal), "it looks for the trap again");
    expect(!is_default(SIGURG), "the trap is in place");
    expect(!lastcall::detail::signal_registry.changing, "and the flag is free");
  }));
}

TEST_CASE("who waits for a handler that is giving way sleeps, and takes its turn") {
  check_clean(in_a_process([] {
    lastcall::detail::signal_registry.changing = true;  // such a handler
    std::atomic<bool> made{false};
    rusage before{};
    ::getrusage(RUSAGE_SELF, &before);
    std::thread waiter([&] {
      const SignalTrap trap{SIGUSR1};
      made = true;
    });
    std::this_thread::sleep_for(400ms);
    rusage after{};
    ::getrusage(RUSAGE_SELF, &after);
    expect(!made, "it waits");
    lastcall::detail::signal_registry.changing = false;
    waiter.join();
    expect(made, "it has taken its turn");
    expect(after.ru_nvcsw - before.ru_nvcsw > 50, "it has slept");
  }));
}

TEST_CASE("a handler that must give way while traps come and go does it when they have") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    {
      const SignalTrap trap{SIGUSR1};
      install_on_top(SIGUSR1);
    }
    ::sigaction(SIGUSR1, &beneath, nullptr);  // ours, with nobody to give the signal to
    std::atomic<bool>& changing = lastcall::detail::signal_registry.changing;
    changing = true;
    std::atomic<pid_t> id{0};
    std::thread other([&] {
      id = thread_id();
      ::raise(SIGUSR1);
    });
    eventually([&] { return id != 0; });
    std::this_thread::sleep_for(10ms);
    expect_equal(plain_calls.load(), 0, "calls of the handler before");
    changing = false;
    other.join();
    expect(eventually([] { return plain_calls == 1; }), "it was called");
    expect(handler_of(SIGUSR1) == plain_handler, "it is in place");
  }));
}

TEST_CASE("a signal that was on its way to the handler when the last trap went is not swallowed") {
  // The handler is called by hand: nobody can hold a real one at that point.
  const Ended ended = in_a_process([] {
    { const SignalTrap trap{SIGTERM}; }
    lastcall::detail::signal_entries[0](SIGTERM, nullptr, nullptr);
    ::pause();
  });
  CHECK(ended.how == "SIGTERM");
}

template <int>
void one_of_many(int) {}

TEST_CASE(
    "being covered again and again costs nothing, being covered by ever new handlers is refused") {
  check_clean(in_a_process([] {
    for (int turn = 0; turn < 100; ++turn) {
      const SignalTrap trap{SIGUSR1};
      set_handler(SIGUSR1, turn % 3 == 0 ? SIG_DFL : turn % 3 == 1 ? SIG_IGN : plain_handler);
    }
    const Handler others[] = {one_of_many<0>, one_of_many<1>, one_of_many<2>, one_of_many<3>,
                              one_of_many<4>, one_of_many<5>, one_of_many<6>, one_of_many<7>,
                              one_of_many<8>, one_of_many<9>};
    std::string refused;
    try {
      for (const Handler other : others) {
        const SignalTrap trap{SIGUSR2};
        set_handler(SIGUSR2, other);
      }
    } catch (const std::logic_error& error) {
      refused = error.what();
    }
    expect(refused.find("SIGUSR2") != std::string::npos, "refused by name, but: " + refused);
    for (const Handler none : {SIG_IGN, SIG_DFL}) {
      set_handler(SIGUSR2, none);
      SignalTrap trap{SIGUSR2};
      ::raise(SIGUSR2);
      expect_equal(pending(trap), 1, "signals of a trap over what is no function");
    }
  }));
}

TEST_CASE("errno of the code that is interrupted is kept") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, [](int) { errno = EDOM; });
    SignalTrap trap{SIGUSR1};
    // Also while the pipe is full, and every write in the handler fails.
    for (int turn = 0; turn < 5000; ++turn) {
      errno = 4711;
      ::raise(SIGUSR1);
      if (errno != 4711) expect_equal(errno, 4711, "errno");
    }
    errno = 4711;
    expect(trap.try_wait().has_value(), "there was a signal");
    expect_equal(errno, 4711, "errno after try_wait()");
  }));
}

TEST_CASE("interrupted system calls are restarted") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    SignalTrap trap{SIGUSR1};
    int ends[2];
    expect(::pipe(ends) == 0, "a pipe");
    const pthread_t reader = ::pthread_self();
    std::atomic<pid_t> id{thread_id()};
    std::thread other([&] {
      let_it_block(id);
      for (int turn = 0; turn < 10; ++turn) {
        ::pthread_kill(reader, SIGUSR1);
        std::this_thread::sleep_for(1ms);
      }
      write_all(ends[1], "x");
    });
    char byte = 0;
    expect_equal(::read(ends[0], &byte, 1), 1, "what read(2) returned");
    other.join();
    expect(pending(trap) > 0, "it was interrupted");
  }));
}

TEST_CASE("the handler runs on the alternate stack of a thread that has one") {
  check_clean(in_a_process([] {
    static std::atomic<char*> where{nullptr};
    set_handler(
        SIGUSR1,
        [](int) {
          char here = 0;
          where = &here;
        },
        SA_ONSTACK);
    SignalTrap trap{SIGUSR1};
    const std::size_t size = 256 * 1024;
    const auto stack = std::make_unique<char[]>(size);
    std::thread other([&] {
      stack_t alternate{};
      alternate.ss_sp = stack.get();
      alternate.ss_size = size;
      expect(::sigaltstack(&alternate, nullptr) == 0, "an alternate stack");
      ::raise(SIGUSR1);
      alternate.ss_flags = SS_DISABLE;
      ::sigaltstack(&alternate, nullptr);
    });
    other.join();
    expect(std::less_equal<>()(stack.get(), where.load()) &&
               std::less<>()(where.load(), stack.get() + size),
           "the handler was on it");
    expect_equal(pending(trap), 1, "signals");
  }));
}

TEST_CASE("the handler is content with the smallest stack that a thread can have") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGUSR1};
    long smallest = ::sysconf(_SC_THREAD_STACK_MIN);
    if (smallest < 16384) smallest = 16384;
    if (under_sanitizer) smallest += 256 * 1024;
    const bool made = on_stack_of(static_cast<std::size_t>(smallest), [] {
      for (int turn = 0; turn < 5000; ++turn) ::raise(SIGUSR1);
    });
    expect(made, "a thread with a small stack");
    expect(pending(trap) > 1000, "signals came");
  }));
}

// ---- Masks

TEST_CASE("a trap works when whoever started the process has its signals blocked") {
  Child child = Child::run([] {
    set_blocked(SIGTERM, true);
    SignalTrap trap{SIGTERM};
    say("ready\n");
    expect_equal(trap.wait().number, SIGTERM, "what came");
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  check_clean(child.end());
}

TEST_CASE("a trap works when every other thread has its signals blocked") {
  Child child = Child::run([] {
    set_blocked(SIGTERM, true);
    Gate gate;
    Threads threads;
    for (int at = 0; at < 4; ++at) threads.start([&] { gate.wait(); });
    SignalTrap trap{SIGTERM};
    say("ready\n");
    expect_equal(trap.wait().number, SIGTERM, "what came");
    gate.open();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  check_clean(child.end());
}

TEST_CASE("a previous handler that hangs keeps no trap from going") {
  check_clean(in_a_process([] {
    static std::atomic<bool> inside{false};
    static std::atomic<bool> let_go{false};
    set_handler(SIGUSR1, [](int) {
      inside = true;
      while (!let_go) ::usleep(1000);
    });
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1, SIGUSR2});
    std::thread other([] { ::raise(SIGUSR1); });
    expect(eventually([] { return inside.load(); }), "it hangs");
    SignalTrap second{SIGUSR2};
    ::raise(SIGUSR2);
    expect_equal(pending(second), 1, "signals of another trap");
    trap.reset();
    let_go = true;
    other.join();
  }));
}

TEST_CASE("a previous handler that jumps away keeps no trap from going") {
  check_clean(in_a_process([] {
    if (under_tsan) return;  // it delivers signals later, when there is nowhere to jump to
    static sigjmp_buf back;
    set_handler(SIGUSR1, [](int) { ::siglongjmp(back, 1); });
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    static std::atomic<int> turn{0};  // a local variable's value would be uncertain after the jump
    for (; turn < 10; ++turn) {
      if (sigsetjmp(back, 1) == 0) ::raise(SIGUSR1);
    }
    expect_equal(pending(*trap), 10, "signals");
    trap.reset();
  }));
}

TEST_CASE("a thread that is being cancelled is not torn out of the handler") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    static std::atomic<bool> running{false};
    static std::atomic<bool> over{false};
    running = over = false;
    pthread_t thread{};
    // No cancellation point but in the handler, if there were one.
    const int made = ::pthread_create(
        &thread, nullptr,
        [](void*) -> void* {
          running = true;
          while (!over) {
          }
          return &over;
        },
        nullptr);
    expect_equal(made, 0, "pthread_create");
    expect(eventually([] { return running.load(); }), "it runs");
    ::pthread_cancel(thread);
    for (int turn = 0; turn < 10; ++turn) ::pthread_kill(thread, SIGUSR1);
    expect(trap->wait_for(patience).has_value(), "the signal came");
    over = true;
    void* result = nullptr;
    ::pthread_join(thread, &result);
    expect(result == &over, "it returned by itself");
    trap.reset();
  }));
}

// ---- What the system refuses

TEST_CASE(
    "a trap for which there are no descriptors left throws, and leaves everything as it was") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    // UBSan looks at an exception through a pipe, for which there is no room: so the first of its
    // type is thrown before, and it is looked at after.
    message_of([] { lastcall::detail::throw_system_error(EIO, "a trial"); });
    const int next = ::dup(0);
    ::close(next);
    for (const int room : {0, 1}) {
      rlimit limit{};
      ::getrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = static_cast<rlim_t>(next + room);
      ::setrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = 1024;
      try {
        const SignalTrap trap{SIGTERM, SIGUSR1};
        expect(false, "it throws");
      } catch (const std::system_error& error) {
        ::setrlimit(RLIMIT_NOFILE, &limit);
        expect_equal(error.code().value(), EMFILE, "the error");
        expect(std::string(error.what()).find("self-pipe") != std::string::npos, error.what());
      }
      ::setrlimit(RLIMIT_NOFILE, &limit);
      expect(is_default(SIGTERM), "SIGTERM is the default");
      expect(handler_of(SIGUSR1) == plain_handler, "SIGUSR1 has its handler");
      const int again = ::dup(0);
      ::close(again);
      expect_equal(again, next, "the next free descriptor");
    }
    SignalTrap trap{SIGTERM};
    ::raise(SIGTERM);
    trap.wait();
  }));
}

#if defined(__linux__) && defined(SECCOMP_RET_ERRNO)

namespace {

// From here on the kernel refuses this process any handler for `number`.
bool refuse_handlers_of(int number) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigaction, 0, 5),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
               offsetof(seccomp_data, args) + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4U : 0U)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0, 3),
      // A call that only asks (no new action) is let through.
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args) + 8U +
                                             (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4U : 0U)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  code[1].jf = 6 - 1;
  sock_fprog program{};
  program.len = sizeof code / sizeof code[0];
  program.filter = code;
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace

TEST_CASE("a trap that fails half way leaves every disposition as it was") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    set_handler(SIGHUP, SIG_IGN);
    if (!refuse_handlers_of(SIGUSR2)) return;
    const int before = open_descriptors();
    const std::string why = message_of([] {
      const SignalTrap trap{SIGHUP, SIGTERM, SIGUSR1, SIGUSR2};
    });
    expect(why.find("installing the handler of SIGUSR2 (") != std::string::npos, why);
    expect(is_default(SIGTERM), "SIGTERM is the default");
    expect(handler_of(SIGUSR1) == plain_handler, "SIGUSR1 has its handler");
    expect(handler_of(SIGHUP) == SIG_IGN, "SIGHUP is ignored");
    expect_equal(open_descriptors(), before, "descriptors");
    const std::string ignore = message_of([] { const SignalIgnore refused(SIGUSR2); });
    expect(ignore.find("ignoring SIGUSR2 (") != std::string::npos, ignore);
    SignalTrap trap{SIGTERM};  // the next one works, and SIGUSR2 is nobody's
    ::raise(SIGTERM);
    expect_equal(pending(trap), 1, "signals");
  }));
}

TEST_CASE("a signal that came while a trap failed half way does what it would have done") {
  // SIGTERM is trapped, SIGWINCH refused, SIGTERM given up again, over and over; and a SIGTERM comes
  // at any moment of that. Wherever it meets the other thread, it is the end.
  if (support::in_child_process([] { return refuse_handlers_of(SIGWINCH) ? 0 : 1; }) != 0) return;
  for (int turn = 0; turn < 60; ++turn) {
    Child child = Child::run([] {
      if (!refuse_handlers_of(SIGWINCH)) ::_exit(1);
      std::thread other([] {
        for (;;) ::pause();
      });
      set_blocked(SIGTERM, true);
      say("ready");
      for (;;) message_of([] { const SignalTrap trap{SIGTERM, SIGWINCH}; });
    });
    REQUIRE(child.prints("ready"));
    child.send(SIGTERM);
    REQUIRE(child.end().how == "SIGTERM");
  }
}

#endif

// ---- The core, as the coordinator uses it

TEST_CASE("a core drops what was not read, if told so, and whoever reads it meanwhile is safe") {
  check_clean(in_a_process([] {
    using lastcall::detail::TrapCore;
    using lastcall::detail::Unread;
    for (int turn = 0; turn < 50; ++turn) {
      TrapCore core;
      core.subscribe(SIGTERM);
      std::atomic<bool> over{false};
      std::thread reader([&] {
        SignalInfo batch[4];
        while (!over) core.read_batch(batch, 4);
      });
      std::thread subscriber([&] { core.subscribe(SIGUSR1); });
      for (int sent = 0; sent < 10; ++sent) ::raise(SIGTERM);
      subscriber.join();
      ::raise(SIGUSR1);
      core.unsubscribe_all(Unread::drop);
      expect(is_default(SIGTERM), "the default is back");
      over = true;
      reader.join();
    }
  }));
}
