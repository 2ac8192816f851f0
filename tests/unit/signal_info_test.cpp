#include <lastcall/cause.hpp>
#include <lastcall/signal_info.hpp>

#include "support/catch.hpp"

#include <climits>
#include <csignal>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>

using lastcall::signal_name;
using lastcall::SignalInfo;

TEST_CASE("a signal's name is the one that the manual has") {
  struct Named {
    int number;
    std::string_view name;
  };
  const Named all[] = {
    {SIGHUP, "SIGHUP"},
    {SIGINT, "SIGINT"},
    {SIGQUIT, "SIGQUIT"},
    {SIGILL, "SIGILL"},
    {SIGTRAP, "SIGTRAP"},
    {SIGABRT, "SIGABRT"},
    {SIGBUS, "SIGBUS"},
    {SIGFPE, "SIGFPE"},
    {SIGKILL, "SIGKILL"},
    {SIGUSR1, "SIGUSR1"},
    {SIGSEGV, "SIGSEGV"},
    {SIGUSR2, "SIGUSR2"},
    {SIGPIPE, "SIGPIPE"},
    {SIGALRM, "SIGALRM"},
    {SIGTERM, "SIGTERM"},
    {SIGCHLD, "SIGCHLD"},
    {SIGCONT, "SIGCONT"},
    {SIGSTOP, "SIGSTOP"},
    {SIGTSTP, "SIGTSTP"},
    {SIGTTIN, "SIGTTIN"},
    {SIGTTOU, "SIGTTOU"},
    {SIGURG, "SIGURG"},
    {SIGXCPU, "SIGXCPU"},
    {SIGXFSZ, "SIGXFSZ"},
    {SIGVTALRM, "SIGVTALRM"},
    {SIGPROF, "SIGPROF"},
    {SIGSYS, "SIGSYS"},
#if defined(SIGWINCH)
    {SIGWINCH, "SIGWINCH"},
#endif
#if defined(SIGIO)
    {SIGIO, "SIGIO"},
#endif
#if defined(SIGPWR)
    {SIGPWR, "SIGPWR"},
#endif
#if defined(SIGSTKFLT)
    {SIGSTKFLT, "SIGSTKFLT"},
#endif
  };
  for (const Named& one : all) CHECK(signal_name(one.number) == one.name);
}

#if defined(SIGRTMIN)
TEST_CASE("a real-time signal is named by its distance from SIGRTMIN") {
  CHECK(signal_name(SIGRTMIN) == "SIGRTMIN");
  CHECK(signal_name(SIGRTMIN + 3) == "SIGRTMIN+3");
  CHECK(signal_name(SIGRTMIN + 10) == "SIGRTMIN+10");
  CHECK(signal_name(SIGRTMAX) == "SIGRTMIN+" + std::to_string(SIGRTMAX - SIGRTMIN));
  CHECK(signal_name(SIGRTMAX + 1) == "signal " + std::to_string(SIGRTMAX + 1));
  CHECK(signal_name(SIGRTMIN - 1) == "signal " + std::to_string(SIGRTMIN - 1));
}

TEST_CASE("the names of real-time signals count on from one to three digits") {
  const auto names = std::make_unique<lastcall::detail::RealTimeNames>();
  const auto name = [&](int index) {
    return std::string_view(names->text[index], names->length[index]);
  };
  CHECK(name(0) == "SIGRTMIN");
  const int count = static_cast<int>(lastcall::detail::RealTimeNames::count);
  for (int index = 1; index < count; ++index) {
    CHECK(name(index) == "SIGRTMIN+" + std::to_string(index));
  }
}

TEST_CASE("a name that there is lives for ever") {
  const std::string_view term = signal_name(SIGTERM);
  const std::string_view real_time = signal_name(SIGRTMIN + 1);
  static_cast<void>(signal_name(SIGRTMIN + 2));
  static_cast<void>(signal_name(9999));
  CHECK(term == "SIGTERM");
  CHECK(real_time == "SIGRTMIN+1");
}
#endif

TEST_CASE("a number without a name is called by its number, until this thread's next call") {
  CHECK(signal_name(0) == "signal 0");
  CHECK(signal_name(999) == "signal 999");
  CHECK(signal_name(-1) == "signal -1");
  CHECK(signal_name(INT_MAX) == "signal " + std::to_string(INT_MAX));
  CHECK(signal_name(INT_MIN) == "signal " + std::to_string(INT_MIN));

  const std::string_view mine = signal_name(999);
  std::thread other([] { static_cast<void>(signal_name(888)); });
  other.join();
  CHECK(mine == "signal 999");
}

TEST_CASE("nothing else in the library takes the place of such a name") {
  const std::string_view mine = signal_name(99);
  static_cast<void>(lastcall::Cause::signal(lastcall::SignalInfo{98, 0, 0, 0, {}}));
  CHECK(mine == "signal 99");
  CHECK(lastcall::detail::describe_signal(97) == "signal 97");
  CHECK(lastcall::detail::describe_signal(-1) == "signal -1");
  CHECK(mine == "signal 99");
}

TEST_CASE("a SignalInfo is a plain value, empty until it is filled") {
  static_assert(std::is_trivially_copyable_v<SignalInfo> && std::is_aggregate_v<SignalInfo>);
  static_assert(noexcept(signal_name(0)));
  const SignalInfo info{};
  CHECK(info.number == 0);
  CHECK(info.code == 0);
  CHECK(info.sender_pid == 0);
  CHECK(info.sender_uid == 0);
  CHECK(info.received == lastcall::Clock::time_point{});
}

TEST_CASE("a set of signals hands out SIGINT first, then SIGTERM, then the others by number") {
  using lastcall::detail::SignalSet;
  SignalSet set;
  CHECK(set.empty());
  CHECK(set.most_urgent() == 0);
  for (const int number :
       {SIGUSR1, SIGTERM, SIGHUP, SIGINT, SIGCHLD, lastcall::detail::signal_limit - 1}) {
    set.add(number);
    CHECK(set.has(number));
  }
  CHECK_FALSE(set.has(SIGQUIT));
  std::string order;
  while (const int number = set.most_urgent()) {
    order += std::to_string(number) + " ";
    set.remove(number);
    CHECK_FALSE(set.has(number));
  }
  std::string wanted;
  for (const int number :
       {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGCHLD, lastcall::detail::signal_limit - 1}) {
    wanted += std::to_string(number) + " ";
  }
  CHECK(order == wanted);
  CHECK(set.empty());
}

TEST_CASE("a set of signals knows the next number, and what it has in common with another set") {
  using lastcall::detail::SignalSet;
  SignalSet some;
  some.add(2);
  some.add(15);
  some.add(lastcall::detail::signal_limit - 1);
  CHECK(some.next(0) == 2);
  CHECK(some.next(1) == 2);
  CHECK(some.next(2) == 15);
  CHECK(some.next(15) == lastcall::detail::signal_limit - 1);
  CHECK(some.next(lastcall::detail::signal_limit - 1) == 0);
  SignalSet others;
  others.add(15);
  others.add(17);
  const SignalSet both = some & others;
  CHECK(both.has(15));
  CHECK_FALSE(both.has(2));
  CHECK_FALSE(both.has(17));
  CHECK((some & SignalSet{}).empty());
}
