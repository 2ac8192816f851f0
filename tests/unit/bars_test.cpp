// detail/bars.hpp: which events are a bar, in which order they stand, and how each is drawn.
#include <lastcall/detail/bars.hpp>

#include "support/catch.hpp"

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

namespace detail = lastcall::detail;
using lastcall::Clock;
using lastcall::Event;
using lastcall::EventKind;
using lastcall::EventResult;
using namespace std::chrono_literals;

namespace {

constexpr Clock::time_point request{100s};

Event event(EventKind kind, EventResult result, const char* stage, const char* name,
            Clock::duration begin, Clock::duration end) {
  return {kind, result, stage, name, "", request + begin, request + end};
}

std::vector<std::string> names_of(const std::vector<detail::Bar>& bars) {
  std::vector<std::string> names;
  for (const detail::Bar& bar : bars) names.push_back(bar.event->name);
  return names;
}

std::string chart(const std::vector<Event>& events, std::size_t columns = 60,
                  Clock::duration end = 10s) {
  std::string out;
  detail::BarChart{request, request + end, columns, "", {}}.append_to(out, events);
  return out;
}

}  // namespace

TEST_CASE(
    "Only stages and hooks are bars, and only those that were there at the request or later") {
  const std::vector<Event> events = {
      event(EventKind::signal, EventResult::ok, "", "SIGTERM", 0s, 0s),
      event(EventKind::hook, EventResult::ok, "", "long ago", -20s, -10s),
      event(EventKind::phase, EventResult::ok, "", "announced", 0s, 1s),
      event(EventKind::task, EventResult::ok, "a", "task", 0s, 1s),
      event(EventKind::hook, EventResult::ok, "a", "just in time", -1s, 0s),
      event(EventKind::stage, EventResult::ok, "", "a", 0s, 1s),
  };
  CHECK(names_of(detail::bars_of(events, request, request + 10s)) ==
        std::vector<std::string>{"a", "just in time"});
}

TEST_CASE(
    "A stage stands before its hooks, and stages in the order in which they are first heard of") {
  const std::vector<Event> events = {
      event(EventKind::hook, EventResult::ok, "b", "b1", 0s, 1s),
      event(EventKind::hook, EventResult::ok, "a", "a1", 0s, 1s),
      event(EventKind::hook, EventResult::ok, "b", "b2", 1s, 2s),
      event(EventKind::stage, EventResult::ok, "", "a", 0s, 2s),
      event(EventKind::stage, EventResult::ok, "", "b", 0s, 3s),
  };
  CHECK(names_of(detail::bars_of(events, request, request + 10s)) ==
        std::vector<std::string>{"b", "b1", "b2", "a", "a1"});
}

TEST_CASE(
    "What ends takes the place of the newest of its name that has begun; the others stay open") {
  const std::vector<Event> events = {
      event(EventKind::stage, EventResult::begun, "", "a", 0s, 0s),
      event(EventKind::hook, EventResult::begun, "a", "same", 1s, 1s),
      event(EventKind::hook, EventResult::begun, "b", "same", 1s, 1s),
      event(EventKind::hook, EventResult::begun, "a", "same", 2s, 2s),
      event(EventKind::hook, EventResult::begun, "a", "other", 2s, 2s),
      event(EventKind::hook, EventResult::ok, "a", "same", 2s, 3s),
      event(EventKind::stage, EventResult::overran, "", "a", 0s, 4s),
  };
  const std::vector<detail::Bar> bars = detail::bars_of(events, request, request + 10s);
  REQUIRE(names_of(bars) == std::vector<std::string>{"a", "same", "same", "other", "same"});
  CHECK(bars[0].event->result == EventResult::overran);
  CHECK(bars[0].end == request + 4s);
  CHECK(bars[1].event->result == EventResult::begun);
  CHECK(bars[1].end == request + 10s);
  CHECK(bars[2].event->result == EventResult::ok);
  CHECK(bars[2].end == request + 3s);
  CHECK(bars[3].event->result == EventResult::begun);
  CHECK(bars[4].event->stage == "b");
  CHECK(bars[4].event->result == EventResult::begun);
}

TEST_CASE("A bar goes from where it began to where it ended, and is one column at least") {
  CHECK(chart({event(EventKind::stage, EventResult::ok, "", "all", 0s, 10s),
               event(EventKind::stage, EventResult::ok, "", "half", 5s, 10s),
               event(EventKind::stage, EventResult::ok, "", "first", 0s, 1ns),
               event(EventKind::stage, EventResult::ok, "", "last", 10s, 10s),
               event(EventKind::stage, EventResult::ok, "", "late", 20s, 30s),
               event(EventKind::stage, EventResult::ok, "", "early", -20s, 1s)},
              49) ==
        "all    |####################|    10.0 s  ok\n"
        "half   |          ##########|    5.00 s  ok\n"
        "first  |#                   |    0.0 ms  ok\n"
        "last   |                   #|    0.0 ms  ok\n"
        "late   |                   #|    10.0 s  ok\n"
        "early  |##                  |    21.0 s  ok\n");
}

TEST_CASE(
    "A bar says how it went: failed, overran, still in, and skipped without a bar or a time") {
  Event failed = event(EventKind::hook, EventResult::failed, "s", "f", 0s, 5s);
  failed.detail = "no space\nnot this line";
  CHECK(chart({event(EventKind::stage, EventResult::overran, "", "s", 0s, 10s), failed,
               event(EventKind::hook, EventResult::begun, "s", "b", 5s, 5s),
               event(EventKind::hook, EventResult::skipped, "s", "k", 5s, 5s),
               event(EventKind::hook, EventResult::ok, "", "reload", 0s, 5s)},
              40) ==
        "s       |!!!!!!!!!!|    10.0 s  overran\n"
        "  f     |xxxxx     |    5.00 s  failed: no space\n"
        "  b     |     !!!!!|    5.00 s  still in\n"
        "  k     |          |            skipped\n"
        "reload  |#####     |    5.00 s  ok\n");
}

TEST_CASE(
    "However narrow the terminal is, a bar has ten columns, and a name is cut to thirty-two") {
  const std::string name(40, 'n');
  const std::string narrow =
      chart({event(EventKind::stage, EventResult::ok, "", name.c_str(), 0s, 10s)}, 10);
  CHECK(narrow.find("  |##########|") == 32);
  CHECK(chart({}).empty());
}

TEST_CASE("A chart of an empty time has its bars at its beginning") {
  CHECK(chart({event(EventKind::stage, EventResult::ok, "", "s", 0s, 0s)}, 30, 0s) ==
        "s  |#         |    0.0 ms  ok\n");
}

TEST_CASE("After two hundred bars it says how many more there were") {
  const std::vector<Event> two_hundred(200,
                                       event(EventKind::hook, EventResult::ok, "s", "h", 0s, 1s));
  CHECK(chart(two_hundred).find("more)") == std::string::npos);
  std::vector<Event> events = two_hundred;
  events.push_back(events.front());
  events.push_back(events.front());
  CHECK(chart(events).find("(and 2 more)\n") != std::string::npos);
}
