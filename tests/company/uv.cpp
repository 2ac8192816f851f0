// A trap beside libuv's uv_signal.
#include "company/foreign.hpp"

#include <uv.h>

#include <chrono>
#include <csignal>
#include <cstdlib>

namespace {

class Uv {
 public:
  static constexpr bool puts_back = false;
  Uv() {
    if (::uv_loop_init(&loop_) != 0) std::abort();
    for (int at = 0; at < 2; ++at) {
      ::uv_signal_init(&loop_, &handles_[at]);
      handles_[at].data = this;
      ::uv_signal_start(
          &handles_[at],
          [](uv_signal_t* handle, int number) {
            ++static_cast<Uv*>(handle->data)->counts_[number];
          },
          at == 0 ? SIGUSR1 : SIGTERM);
    }
  }
  ~Uv() {
    for (uv_signal_t& handle : handles_) {
      ::uv_close(reinterpret_cast<uv_handle_t*>(&handle), nullptr);
    }
    ::uv_run(&loop_, UV_RUN_DEFAULT);
    ::uv_loop_close(&loop_);
  }
  bool got(int number) {
    const auto end = lastcall::Clock::now() + std::chrono::seconds(5);
    while (counts_[number] == 0 && lastcall::Clock::now() < end) {
      ::uv_run(&loop_, UV_RUN_NOWAIT);
      ::usleep(500);
    }
    return counts_[number]-- > 0;
  }

 private:
  int counts_[lastcall::detail::signal_limit] = {};
  uv_loop_t loop_{};
  uv_signal_t handles_[2]{};
};

}  // namespace

TEST_CASE("a trap and libuv's uv_signal, in every order") {
  CHECK(company::in_every_order<Uv>() == "");
}

TEST_CASE("a coordinator beside libuv's uv_signal") {
  CHECK(company::beside_a_coordinator<Uv>() == "");
}
