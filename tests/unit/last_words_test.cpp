// detail/last_words.hpp: what a forced end says, line by line. (That it is said: process/coordinator_hangs.)
#include <lastcall/detail/last_words.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/json_check.hpp"

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace detail = lastcall::detail;
using detail::EngineState;
using detail::LastWords;
using detail::Section;
using detail::write_last_words;
using lastcall::Clock;
using lastcall::Stage;
using lastcall::WaitGroup;
using support::contains;
using support::starts_with;
using namespace std::chrono_literals;

namespace {

// A file takes all, and at once.
class File {
 public:
  File() : stream_(std::tmpfile()) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { std::fclose(stream_); }
  int fd() const { return ::fileno(stream_); }

  std::vector<std::string> lines() const {
    std::vector<std::string> all;
    std::rewind(stream_);
    std::string line;
    for (int letter = 0; (letter = std::getc(stream_)) != EOF;) {
      line += static_cast<char>(letter);
      if (letter == '\n') all.push_back(std::exchange(line, {}));
    }
    if (!line.empty()) all.push_back(line + " (and no newline)");
    return all;
  }

 private:
  std::FILE* const stream_;
};

// What the signal thread looks at when it ends the process. Nobody runs.
struct State {
  File file;
  EngineState engine{[this] {
    lastcall::ShutdownOptions options = support::quiet();
    options.last_words = file.fd();
    return options;
  }()};
  Stage& service = *engine.append_stage("service", 1s);
  Stage& storage = *engine.append_stage("storage", 1s);

  State() {
    engine.requested_at.store(Clock::now() - 1h);
    engine.ending = detail::Ending::run;
  }

  void call(std::size_t at, std::uint32_t state, const char* name, const Stage* stage) {
    engine.sections[at].name = name;
    engine.sections[at].stage = stage;
    engine.sections[at].begin.store(Clock::now() - 1h);
    engine.sections[at].state = state;
  }
};

}  // namespace

TEST_CASE("Last words: a line for each call that hangs, each named member, and the unnamed") {
  State state;
  state.call(0, Section::returned, "back", &state.service);
  state.call(1, Section::abandoned, "hook", &state.service);
  state.call(2, Section::inside, "observer", nullptr);
  const WaitGroup::Guard guards[] = {state.service.enter("worker"), state.service.enter(),
                                     state.service.enter(), state.storage.enter("a\nb\x7f"),
                                     state.storage.enter()};
  write_last_words(state.engine, "why");
  const std::vector<std::string> lines = state.file.lines();
  REQUIRE(lines.size() == 7);
  const std::string here = "' (" + std::string(__FILE__) + ":";
  CHECK(starts_with(lines[0], "lastcall: why after 360"));
  CHECK(contains(lines[0], " ms; still in:\n"));
  CHECK(starts_with(lines[1], "lastcall:   'hook' of stage 'service', 360"));
  CHECK(contains(lines[1], " ms, thread 0\n"));
  CHECK(starts_with(lines[2], "lastcall:   'observer', 360"));
  CHECK(starts_with(lines[3], "lastcall:   'worker' of stage 'service" + here));
  CHECK(contains(lines[3], " ms, thread " + std::to_string(detail::current_thread_id())));
#if LASTCALL_LINUX
  CHECK(contains(lines[3], ", in running ("));
#endif
  CHECK(lines[4] == "lastcall:   2 unnamed of stage 'service'\n");
  CHECK(starts_with(lines[5], "lastcall:   'a?b?' of stage 'storage" + here));
  CHECK(lines[6] == "lastcall:   1 unnamed of stage 'storage'\n");
}

TEST_CASE("Last words hold no control character and no half of a letter, whatever names hold") {
  State state;
  const WaitGroup::Guard guards[] = {
      state.service.enter("c1 \xc2\x9b"
                          "2J, \xe2\x80\xae, bare \x9b, letters \xc3\xa9\xe6\xb3\xa8"),
      state.service.enter("odd" + std::string(600, '\xe9')), state.service.enter([] {
        std::string name;
        for (int letter = 0; letter < 400; ++letter) name += "\xc3\xa9";
        return name;
      }())};
  write_last_words(state.engine, "why");
  const std::vector<std::string> lines = state.file.lines();
  REQUIRE(lines.size() == 4);
  CHECK(starts_with(lines[1], "lastcall:   'c1 ?2J, ?, bare ?, letters \xc3\xa9\xe6\xb3\xa8' of"));
  CHECK(starts_with(lines[2], "lastcall:   'odd???"));
  for (const std::string& line : lines) {
    CHECK(line.size() <= 512);
    CHECK(support::is_utf8(line));
  }
}

TEST_CASE("Last words once all has been told: only what is called now") {
  State state;
  state.call(0, Section::abandoned, "hook", &state.service);
  state.call(1, Section::inside, "flush", nullptr);
  const WaitGroup::Guard guards[] = {state.service.enter("worker"), state.service.enter()};
  write_last_words(state.engine, "why", LastWords::calls);
  const std::vector<std::string> lines = state.file.lines();
  REQUIRE(lines.size() == 2);
  CHECK(starts_with(lines[1], "lastcall:   'flush', "));
}

TEST_CASE("Last words of nobody are one line, and of an engine that wants none, none") {
  State state;
  write_last_words(state.engine, "why");
  CHECK(state.file.lines().size() == 1);
  EngineState silent{support::quiet()};
  const WaitGroup::Guard guard = silent.append_stage("service", 1s)->enter("worker");
  write_last_words(silent, "why");
}

TEST_CASE(
    "Last words name main that has not come, or not in time, and not where only calls are named") {
  const auto expect_main = [](State& state) {
    write_last_words(state.engine, "why", LastWords::calls);
    write_last_words(state.engine, "why");
    const std::vector<std::string> lines = state.file.lines();
    REQUIRE(lines.size() == 3);
    CHECK(starts_with(lines[2], "lastcall:   'main', 360"));
    CHECK(contains(lines[2], " ms, thread " + std::to_string(detail::current_thread_id())));
#if LASTCALL_LINUX
    CHECK(contains(lines[2], ", in running ("));
#endif
  };
  State absent;
  absent.engine.ending = detail::Ending::nobody;
  expect_main(absent);
  State late;
  late.engine.main_was_late = true;
  expect_main(late);
}

TEST_CASE("Last words of the signal thread that find nobody else name the drain thread") {
  State state;
  state.engine.current_driver = 3;
  state.engine.sections[3].thread_id = detail::current_thread_id();
  state.engine.signal_thread = detail::this_thread_mark();
  write_last_words(state.engine, "why", LastWords::calls);
  write_last_words(state.engine, "why");
  const WaitGroup::Guard guard = state.service.enter();
  write_last_words(state.engine, "why");
  const std::vector<std::string> lines = state.file.lines();
  REQUIRE(lines.size() == 5);
  CHECK(starts_with(lines[2], "lastcall:   'the drain thread', thread " +
                                  std::to_string(detail::current_thread_id())));
  CHECK(lines[4] == "lastcall:   1 unnamed of stage 'service'\n");
}

TEST_CASE("Names on a list whose lock is held are counted, and nobody is waited for") {
  State state;
  const WaitGroup::Guard guards[] = {state.service.enter("one"), state.service.enter("two"),
                                     state.service.enter(), state.storage.enter("other")};
  // Under the lock of this thread's list.
  bool first = true;
  detail::WaitGroupAccess::visit_members(EngineState::group_of(state.service),
                                         [&](const detail::MemberView&) noexcept {
                                           if (first) write_last_words(state.engine, "why");
                                           first = false;
                                         });
  const std::vector<std::string> lines = state.file.lines();
  REQUIRE(lines.size() == 4);
  CHECK(lines[1] == "lastcall:   2 whose names can't be read, of stage 'service'\n");
  CHECK(lines[2] == "lastcall:   1 unnamed of stage 'service'\n");
  CHECK(starts_with(lines[3], "lastcall:   'other' of stage 'storage'"));
}

TEST_CASE("More names than can be written in time: those that are left are counted") {
  constexpr std::size_t most = 100'000;
  State state;
  std::vector<WaitGroup::Guard> guards;
  for (std::size_t i = 0; i < most; ++i) guards.push_back(state.service.enter("worker"));
  guards.push_back(state.storage.enter("other"));
  write_last_words(state.engine, "why");
  const std::vector<std::string> lines = state.file.lines();
  REQUIRE(lines.size() >= 3);
  const std::size_t named = lines.size() - 3;
  CHECK(named < most);
  bool all = true;
  for (std::size_t i = 1; i <= named; ++i) {
    all = all && starts_with(lines[i], "lastcall:   'worker' of stage 'service'");
  }
  CHECK(all);
  CHECK(lines[named + 1] ==
        "lastcall:   " + std::to_string(most - named) + " more of stage 'service'\n");
  // The first ones of a stage are named in any case.
  CHECK(starts_with(lines[named + 2], "lastcall:   'other' of stage 'storage'"));
}
