// One call for each kind of error that the library reports. What they do with it depends on how they
// are compiled: no_exceptions_test.cpp catches the exception, program.cpp can't.
#pragma once

#include <lastcall/lastcall.hpp>

#include <sys/resource.h>

#include <array>
#include <csignal>
#include <string_view>

namespace no_exceptions {

struct ErrorCase {
  std::string_view name;
  void (*provoke)();
};

inline void take_all_descriptors() {
  rlimit none{};
  ::getrlimit(RLIMIT_NOFILE, &none);
  none.rlim_cur = 0;
  ::setrlimit(RLIMIT_NOFILE, &none);
}

inline const std::array<ErrorCase, 5> error_cases = {{
    {"bad signal", [] { const lastcall::SignalTrap trap{SIGKILL}; }},
    {"no descriptors",
     [] {
       take_all_descriptors();
       const lastcall::SignalTrap trap{SIGUSR1};
     }},
    {"closed group",
     [] {
       lastcall::WaitGroup group;
       group.close();
       group.add();
     }},
    {"too many done",
     [] {
       lastcall::WaitGroup group;
       group.done();
     }},
    {"no period", [] { const lastcall::Ticker ticker{lastcall::Clock::duration::zero()}; }},
}};

}  // namespace no_exceptions
