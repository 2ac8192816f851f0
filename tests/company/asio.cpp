// A trap beside Asio's signal_set.
#include "company/foreign.hpp"

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>

#include <chrono>
#include <csignal>

namespace {

class Asio {
 public:
  static constexpr bool puts_back = false;
  Asio() { listen(); }
  bool got(int number) {
    const auto end = lastcall::Clock::now() + std::chrono::seconds(5);
    while (counts_[number] == 0 && lastcall::Clock::now() < end) {
      context_.run_for(std::chrono::milliseconds(5));
    }
    return counts_[number]-- > 0;
  }

 private:
  void listen() {
    signals_.async_wait([this](const boost::system::error_code& error, int number) {
      if (error) return;
      ++counts_[number];
      listen();
    });
  }

  int counts_[lastcall::detail::signal_limit] = {};
  boost::asio::io_context context_;
  boost::asio::signal_set signals_{context_, SIGUSR1, SIGTERM};
};

}  // namespace

TEST_CASE("a trap and Asio's signal_set, in every order") {
  CHECK(company::in_every_order<Asio>() == "");
}

TEST_CASE("a coordinator beside Asio's signal_set") {
  CHECK(company::beside_a_coordinator<Asio>() == "");
}
