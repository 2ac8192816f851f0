// A trap beside a program that calls sigaction(2) itself.
#include "company/foreign.hpp"

#include <csignal>

namespace {

// As a program does that knows of nobody else.
struct Plain {
  static constexpr bool puts_back = true;
  static inline volatile std::sig_atomic_t counts[lastcall::detail::signal_limit];
  struct sigaction before[2]{};

  Plain() {
    struct sigaction action {};
    action.sa_handler = [](int number) { counts[number] = counts[number] + 1; };
    ::sigaction(SIGUSR1, &action, &before[0]);
    ::sigaction(SIGTERM, &action, &before[1]);
  }
  ~Plain() {
    ::sigaction(SIGUSR1, &before[0], nullptr);
    ::sigaction(SIGTERM, &before[1], nullptr);
  }
  static bool got(int number) {
    const bool any = counts[number] > 0;
    counts[number] = 0;
    return any;
  }
};

// The same by signal(3), which forgets what was there.
struct Forgetful : Plain {
  static constexpr bool puts_back = false;
  ~Forgetful() {
    before[0].sa_handler = SIG_DFL;
    before[1].sa_handler = SIG_DFL;
  }
};

}  // namespace

TEST_CASE("a trap and a plain handler, in every order") {
  CHECK(company::in_every_order<Plain>() == "");
  CHECK(company::in_every_order<Forgetful>() == "");
}

TEST_CASE("a coordinator beside a plain handler") {
  CHECK(company::beside_a_coordinator<Plain>() == "");
}
