// What std::_Exit leaves out and run() does not: buffers, coverage and profile data, the leak check. The
// programs are tests/process/last_rites/program.cpp, built in as many ways as the compiler has.
#include "support/catch.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace {

using support::Child;
using support::Ended;
namespace fs = std::filesystem;

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// A directory that goes with its scope.
class Scratch {
 public:
  Scratch() {
    std::string name = (fs::temp_directory_path() / "lastcall-rites-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }
  /// The bytes in files of that kind, wherever they are below.
  std::uintmax_t bytes_of(std::string_view extension) const {
    std::uintmax_t sum = 0;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path_)) {
      if (entry.is_regular_file() && entry.path().extension() == extension)
        sum += entry.file_size();
    }
    return sum;
  }

 private:
  fs::path path_;
};

struct Outcome {
  Ended ended;
  std::uintmax_t coverage = 0;  // bytes of gcov's data
  std::uintmax_t profile = 0;   // bytes of llvm's
};

Outcome run(const char* program, const char* mode) {
  const Scratch scratch;
  // gcov's data goes where the object file was made; below this directory instead.
  ::setenv("GCOV_PREFIX", scratch.path().c_str(), 1);
  ::setenv("LLVM_PROFILE_FILE", (scratch.path() / "all.profraw").c_str(), 1);
  ::setenv("ASAN_OPTIONS", "detect_leaks=1:exitcode=23", 1);
  Child child = Child::exec(support::built(program, {mode}));
  for (const char* name : {"GCOV_PREFIX", "LLVM_PROFILE_FILE", "ASAN_OPTIONS"}) ::unsetenv(name);
  Ended ended = child.end();
  return {std::move(ended), scratch.bytes_of(".gcda"), scratch.bytes_of(".profraw")};
}

[[maybe_unused]] void check_buffers(const Outcome& outcome) {
  CHECK(contains(outcome.ended.out, "to stdio"));
  CHECK(contains(outcome.ended.out, "to std::cout"));
  CHECK(contains(outcome.ended.err, "to std::clog"));
}

}  // namespace

#if defined(LASTCALL_RITES_COVERAGE)

TEST_CASE("coverage data is written after run(), and so are the buffers") {
  const Outcome outcome = run(LASTCALL_RITES_COVERAGE, "clean");
  INFO(outcome.ended.err);
  CHECK(outcome.ended.how == "exit 0");
  CHECK(outcome.coverage > 100);
  check_buffers(outcome);
}

TEST_CASE("coverage data is written though a worker hangs") {
  const Outcome outcome = run(LASTCALL_RITES_COVERAGE, "held");
  INFO(outcome.ended.err);
  CHECK(outcome.ended.how == "exit 124");
  CHECK(outcome.coverage > 100);
  check_buffers(outcome);
}

TEST_CASE("a flush that hangs holds nobody up beyond the grace period") {
  const auto begin = std::chrono::steady_clock::now();
  const Outcome outcome = run(LASTCALL_RITES_COVERAGE, "locked");
  INFO(outcome.ended.err);
  CHECK(outcome.ended.how == "exit 124");
  CHECK(contains(outcome.ended.err, "'flushing the streams'"));
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(30));
}

TEST_CASE("a forced end writes nothing but last words") {
  const Outcome outcome = run(LASTCALL_RITES_COVERAGE, "forced");
  INFO(outcome.ended.err);
  CHECK(outcome.ended.how == "exit 130");
  CHECK(outcome.coverage == 0);
  CHECK_FALSE(contains(outcome.ended.out, "to stdio"));
  CHECK(contains(outcome.ended.err, "forced by a third wish"));
}

#endif

#if defined(LASTCALL_RITES_PROFILE)

TEST_CASE("llvm's profile data is written after run()") {
  for (const char* const mode : {"clean", "held"}) {
    const Outcome outcome = run(LASTCALL_RITES_PROFILE, mode);
    INFO(mode << ": " << outcome.ended.err);
    CHECK(outcome.ended.how == (std::string_view(mode) == "clean" ? "exit 0" : "exit 124"));
    CHECK(outcome.profile > 100);
    check_buffers(outcome);
  }
}

#endif

#if defined(LASTCALL_RITES_LEAKS)

TEST_CASE("a planted leak is reported after run(), and a clean program is left alone") {
  const Outcome clean = run(LASTCALL_RITES_LEAKS, "clean");
  if (contains(clean.ended.err, "LeakSanitizer has encountered a fatal error")) {
    WARN("LeakSanitizer can't work here");
    return;
  }
  INFO(clean.ended.err);
  CHECK(clean.ended.how == "exit 0");
  CHECK_FALSE(contains(clean.ended.err, "LeakSanitizer"));
  check_buffers(clean);

  const Outcome leak = run(LASTCALL_RITES_LEAKS, "leak");
  INFO(leak.ended.err);
  CHECK(leak.ended.how == "exit 23");
  CHECK(contains(leak.ended.err, "detected memory leaks"));
  CHECK(contains(leak.ended.err, "12345 byte"));
  check_buffers(leak);
}

TEST_CASE("an overrun under a sanitizer is gone in time") {
  const Outcome held = run(LASTCALL_RITES_LEAKS, "held");
  INFO(held.ended.err);
  CHECK((held.ended.how == "exit 124" || held.ended.how == "exit 23"));
  CHECK(contains(held.ended.err, "worker"));
}

#endif

TEST_CASE("last rites were tested in every way that this compiler has") {
#if !defined(LASTCALL_RITES_COVERAGE) && !defined(LASTCALL_RITES_LEAKS)
  WARN("neither --coverage nor -fsanitize=address works here");
#endif
  SUCCEED();
}
