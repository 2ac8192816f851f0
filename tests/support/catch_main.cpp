// main() of every test executable, and no signal handler of Catch2's.
//
// Around each test case Catch2 installs handlers for SIGINT, SIGTERM and others that report the
// case as failed. A trap calls the handler that was there before it, so that a test which sends
// itself a SIGTERM would fail by it.
#if __has_include(<catch2/catch_test_macros.hpp>)

// The library is compiled already. These are all the functions of one member of its archive: the
// linker finds them here and leaves that member out. (Should a version of Catch2 have others, it
// says so.)
#include <catch2/internal/catch_fatal_condition_handler.hpp>

namespace Catch {

FatalConditionHandler::FatalConditionHandler() = default;
FatalConditionHandler::~FatalConditionHandler() = default;
void FatalConditionHandler::engage_platform() {}
void FatalConditionHandler::disengage_platform() noexcept {}

}  // namespace Catch

#else

#define CATCH_CONFIG_MAIN
#define CATCH_CONFIG_NO_POSIX_SIGNALS
#include <catch2/catch.hpp>

#endif
