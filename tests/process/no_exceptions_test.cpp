// A program without exceptions and RTTI: it works, and an error ends it with the message that it would
// have thrown. The program is no_exceptions/program.cpp.
#include "no_exceptions/errors.hpp"
#include "support/catch.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"

#include <exception>
#include <string>

using no_exceptions::error_cases;
using no_exceptions::ErrorCase;
using support::Child;
using support::Ended;

namespace {

constexpr const char* program = LASTCALL_NO_EXCEPTIONS_PROGRAM;

// What the call throws where there are exceptions.
std::string message_of(const ErrorCase& error) {
  const Ended ended = support::in_a_process([&] {
    try {
      error.provoke();
    } catch (const std::exception& thrown) {
      support::say(thrown.what());
      return;
    }
    support::expect(false, "an exception");
  });
  INFO(ended.err);
  REQUIRE(ended.how == "exit 0");
  REQUIRE(!ended.out.empty());
  return ended.out;
}

}  // namespace

TEST_CASE(
    "without exceptions an error ends the process with the message that it would have thrown") {
  for (const ErrorCase& error : error_cases) {
    const std::string name(error.name);
    INFO(name);
    const std::string message = message_of(error);
    const Ended ended = Child::exec(support::built(program, {name})).end();
    CHECK(ended.how == "SIGABRT");
    CHECK(support::without_emulator(ended.err) == message + "\n");
  }
}

TEST_CASE("without exceptions and RTTI a process goes from the signal to the exit as any other") {
  const Ended ended = Child::exec(support::built(program)).end();
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(ended.out.find("worker: SIGTERM\n") != std::string::npos);
  CHECK(ended.out.find("callback\n") != std::string::npos);
  CHECK(ended.out.find("hook\n") != std::string::npos);
}
