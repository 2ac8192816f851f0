#include <lastcall/detail/engine_log.hpp>
#include <lastcall/shutdown_report.hpp>

#include "../support/catch.hpp"
#include "../support/json_check.hpp"
#include "../support/threads.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <exception>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using lastcall::Cause;
using lastcall::Clock;
using lastcall::Event;
using lastcall::EventKind;
using lastcall::EventResult;
using lastcall::Outcome;
using lastcall::ShutdownReport;
using lastcall::SourceLocation;
using lastcall::Straggler;
using support::Json;
using namespace std::chrono_literals;

namespace {

const Clock::time_point request = Clock::time_point(1000h);

Event event(EventKind kind, EventResult result, std::string stage, std::string name,
            std::string detail, std::chrono::nanoseconds begin, std::chrono::nanoseconds end) {
  return {
      kind,         result, std::move(stage), std::move(name), std::move(detail), request + begin,
      request + end};
}

Cause sigterm() {
  lastcall::SignalInfo info{};
  info.number = SIGTERM;
  info.code = SI_TIMER;
  info.sender_pid = 0;
  info.sender_uid = 12;
  info.received = request - 30us;
  return Cause::signal(info);
}

// A service whose importer failed, whose flush hook threw and whose reader hung.
ShutdownReport bad_night() {
  ShutdownReport report;
  report.outcome = Outcome::overrun;
  report.cause = sigterm();
  report.exit_code = 124;
  report.elapsed = 10s;
  const auto tell = [&](EventKind kind, EventResult result, std::string stage, std::string name,
                        std::string detail, std::chrono::nanoseconds begin,
                        std::chrono::nanoseconds end) {
    report.events.push_back(
        event(kind, result, std::move(stage), std::move(name), std::move(detail), begin, end));
  };
  tell(EventKind::signal, EventResult::ok, "", "SIGHUP", "from pid 7", -1h, -1h);
  tell(EventKind::signal, EventResult::ok, "", "SIGTERM", "from the kernel", -30us, -30us);
  tell(EventKind::phase, EventResult::begun, "", "announced", "SIGTERM", 0s, 0s);
  tell(EventKind::phase, EventResult::begun, "", "draining", "", 1s, 1s);
  tell(EventKind::stage, EventResult::begun, "service", "service", "", 1s, 1s);
  tell(EventKind::hook, EventResult::ok, "service", "listener", "", 1s, 1012345678ns);
  tell(EventKind::task, EventResult::ok, "service", "worker", "", -1h, 2s);
  tell(EventKind::task, EventResult::failed, "service", "importer", "disk full", 500ms, 3s);
  tell(EventKind::stage, EventResult::overran, "service", "service", "1 still in", 1s, 6s);
  tell(EventKind::stage, EventResult::begun, "storage", "storage", "", 6s, 6s);
  tell(EventKind::hook, EventResult::failed, "storage", "flush", "no space", 6s, 7s);
  tell(EventKind::stage, EventResult::ok, "storage", "storage", "", 6s, 7s);
  tell(EventKind::phase, EventResult::begun, "", "aborting", "", 8s, 8s);
  tell(EventKind::task, EventResult::overran, "service", "reader", "read(7)", -2s, 10s);
  tell(EventKind::phase, EventResult::begun, "", "finished", "overrun, exit code 124", 10s, 10s);
  report.stragglers.push_back({"reader",
                               "service",
                               SourceLocation::current(),
                               12s,
                               813,
                               "reader",
                               "read(7)",
                               {"read+0x4d (libc.so.6+0xf81ad)", "main"}});
  report.stragglers.push_back({"3 unnamed", "storage", SourceLocation(), 0s, 0, "", "", {}});
  report.failures.push_back({"importer", std::make_exception_ptr(std::runtime_error("disk full"))});
  report.failures.push_back({"flush", std::make_exception_ptr(42)});
  return report;
}

Json parsed(const std::string& text) {
  const auto value = support::read_json(text);
  REQUIRE(value);
  return *value;
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Names that a careless writer of JSON or of terminals trips over.
std::string wild(support::Random& random) {
  std::string bytes;
  for (std::size_t left = random.below(40); left > 0; --left) {
    bytes += static_cast<char>(random.below(256));
  }
  return bytes;
}

// What a trace viewer draws, checked for what makes viewers drop it.
struct Trace {
  std::map<long long, std::string> lanes;  // tid: thread_name
  std::vector<Json> spans;
  std::vector<Json> instants;

  explicit Trace(const ShutdownReport& report) {
    const Json all = parsed(report.to_trace());
    REQUIRE(all.is(Json::Type::object));
    REQUIRE(all["traceEvents"].is(Json::Type::array));
    bool process = false;
    for (const Json& record : all["traceEvents"].items) {
      REQUIRE(record["ph"].is(Json::Type::string));
      REQUIRE(record["name"].is(Json::Type::string));
      REQUIRE(record["pid"].is(Json::Type::number));
      REQUIRE(record["tid"].is(Json::Type::number));
      CHECK(record["pid"].integer() == ::getpid());
      const std::string kind = record["ph"].text;
      if (kind == "M") {
        if (record["name"].text == "process_name") process = true;
        if (record["name"].text != "thread_name") continue;
        CHECK(lanes.count(record["tid"].integer()) == 0);
        lanes[record["tid"].integer()] = record["args"]["name"].text;
        continue;
      }
      REQUIRE(record["ts"].is(Json::Type::number));
      CHECK(record["ts"].thousandths() >= 0);
      CHECK(lanes.count(record["tid"].integer()) == 1);
      if (kind == "i") {
        instants.push_back(record);
        continue;
      }
      REQUIRE(kind == "X");
      REQUIRE(record["dur"].is(Json::Type::number));
      CHECK(record["dur"].thousandths() >= 0);
      spans.push_back(record);
    }
    CHECK(process);
    check_nesting();
  }

  void check_nesting() const {
    for (std::size_t one = 0; one < spans.size(); ++one) {
      for (std::size_t two = one + 1; two < spans.size(); ++two) {
        if (spans[one]["tid"].text != spans[two]["tid"].text) continue;
        const auto [a, b] = times(spans[one]);
        const auto [c, d] = times(spans[two]);
        const bool apart = b <= c || d <= a;
        const bool nested = (a <= c && d <= b) || (c <= a && b <= d);
        INFO(spans[one]["name"].text << " and " << spans[two]["name"].text);
        CHECK((apart || nested));
      }
    }
  }

  static std::pair<long long, long long> times(const Json& span) {
    const long long begin = span["ts"].thousandths();
    return {begin, begin + span["dur"].thousandths()};
  }
  const Json& span(std::string_view name) const {
    const auto found = std::find_if(spans.begin(), spans.end(),
                                    [&](const Json& one) { return one["name"].text == name; });
    static const Json nothing;
    return found == spans.end() ? nothing : *found;
  }
  std::string lane_of(std::string_view name) const {
    const auto lane = lanes.find(span(name)["tid"].integer());
    return lane == lanes.end() ? "none" : lane->second;
  }
};

}  // namespace

TEST_CASE("A story has one end, the last that it is given") {
  const auto at = [](EventKind kind, const char* name, const char* detail) {
    return event(kind, EventResult::begun, "", name, detail, 1ms, 1ms);
  };
  std::vector<Event> story = {at(EventKind::phase, "draining", ""),
                              at(EventKind::hook, "finished", "of that name"),
                              at(EventKind::phase, "finished", "clean, exit code 0")};
  for (const char* detail : {"overrun, exit code 124", "forced, exit code 130"}) {
    lastcall::detail::end_story(story, at(EventKind::phase, "finished", detail));
    REQUIRE(story.size() == 3);
    CHECK(story[0].name == "draining");
    CHECK(story[1].kind == EventKind::hook);
    CHECK(story[2].kind == EventKind::phase);
    CHECK(story[2].detail == detail);
  }
}

TEST_CASE("to_text() says how it ended, who was still in and where, and who threw") {
  const std::string text = bad_night().to_text();
  CHECK(text.rfind("finished after 10.0 s: overrun, exit code 124 (SIGTERM from the kernel)\n",
                   0) == 0);
  CHECK(contains(text, "\n  service     |"));
  CHECK(contains(text, "\n    listener  |"));
  CHECK(contains(text, "\n  storage     |"));
  CHECK(contains(text, "\n    flush     |"));
  CHECK(contains(text, "    5.00 s  overran: 1 still in\n"));
  CHECK(contains(text, "     12 ms  ok\n"));
  CHECK(contains(text, "    1.00 s  failed: no space\n"));
  CHECK(contains(text,
                 "\n  still in:\n"
                 "    service/reader: entered at unit/shutdown_report_test.cpp:"));
  CHECK(contains(text,
                 " 12.0 s ago, thread 813 \"reader\", read(7)\n"
                 "      #0 read+0x4d (libc.so.6+0xf81ad)\n"
                 "      #1 main\n"
                 "    storage/3 unnamed\n"));
  CHECK(contains(text, "\n  failed:\n    importer: disk full\n    flush: "));
  CHECK(text.back() == '\n');
}

TEST_CASE("to_text() of a report about nothing is one line") {
  CHECK(ShutdownReport{}.to_text() == "finished after 0.0 ms: clean, exit code 0\n");
}

TEST_CASE("to_text() prints names so that they cannot forge lines or control the terminal") {
  support::Random random(11);
  for (int round = 0; round < 200; ++round) {
    ShutdownReport report;
    const std::string name = wild(random);
    report.elapsed = 1s;
    report.cause = Cause::cancelled("x" + name);
    report.events.push_back(event(EventKind::stage, EventResult::ok, "", name, name, 0s, 1s));
    report.stragglers.push_back({name, name, SourceLocation(), 1s, 1, name, name, {name}});
    report.failures.push_back({name, nullptr});
    const std::string text = report.to_text();
    CHECK(support::is_utf8(text));
    CHECK(std::count(text.begin(), text.end(), '\n') == 7);
    CHECK(std::none_of(text.begin(), text.end(), [](char letter) {
      return letter != '\n' && (static_cast<unsigned char>(letter) < 0x20 || letter == 0x7F);
    }));
  }
}

TEST_CASE("to_text() draws a bar where its stage was in time") {
  ShutdownReport report;
  report.elapsed = 4s;
  const auto stage = [&](const char* name, std::chrono::seconds from, std::chrono::seconds to) {
    report.events.push_back(event(EventKind::stage, EventResult::ok, "", name, "", from, to));
  };
  report.events.push_back(event(EventKind::phase, EventResult::ok, "", "announced", "", 0s, 0s));
  stage("one", 0s, 1s);
  stage("two", 1s, 3s);
  stage("six", 3s, 4s);
  const std::string text = report.to_text();
  const std::size_t first = text.find('|') + 1;
  const std::size_t width = text.find('|', first) - first;
  const std::size_t quarter = width / 4;
  CHECK(contains(text, "one  |" + std::string(quarter, '#') + " "));
  CHECK(contains(text, "two  |" + std::string(quarter, ' ') + "#"));
  CHECK(contains(text, std::string(quarter, '#') + "|    1.00 s  ok\n"));
}

TEST_CASE("A hundred thousand hooks make a summary that can still be read") {
  ShutdownReport report;
  report.elapsed = 1s;
  for (int hook = 0; hook < 100'000; ++hook) {
    const std::string name = "hook " + std::to_string(hook);
    report.events.push_back(event(EventKind::hook, EventResult::begun, "s", name, "", 0s, 0s));
    report.events.push_back(event(EventKind::hook, EventResult::ok, "s", name, "", 0s, 1us));
  }
  const std::string text = report.to_text();
  CHECK(std::count(text.begin(), text.end(), '\n') < 300);
  CHECK(contains(text, "(and 99800 more)"));
}

TEST_CASE("to_json() is one object whose keys are the members' names") {
  const Json report = parsed(bad_night().to_json());
  CHECK(report.keys() == "outcome cause exit_code elapsed_ns events stragglers failures");
  CHECK(report["outcome"].text == "overrun");
  CHECK(report["exit_code"].text == "124");
  CHECK(report["elapsed_ns"].text == "10000000000");

  const Json& cause = report["cause"];
  CHECK(cause.keys() == "kind message signal");
  CHECK(cause["kind"].text == "signal");
  CHECK(cause["message"].text == "SIGTERM from the kernel");
  CHECK(cause["signal"].keys() == "number name code sender_pid sender_uid received_ns");
  CHECK(cause["signal"]["number"].text == std::to_string(SIGTERM));
  CHECK(cause["signal"]["name"].text == "SIGTERM");
  CHECK(cause["signal"]["sender_uid"].text == "12");
  CHECK(cause["signal"]["received_ns"].text == "-30000");

  REQUIRE(report["events"].items.size() == 15);
  const Json& hook = report["events"].items[5];
  CHECK(hook.keys() == "kind result stage name detail begin_ns end_ns");
  CHECK(hook["kind"].text == "hook");
  CHECK(hook["result"].text == "ok");
  CHECK(hook["stage"].text == "service");
  CHECK(hook["begin_ns"].text == "1000000000");
  CHECK(hook["end_ns"].text == "1012345678");
  CHECK(report["events"].items[0]["begin_ns"].text == "-3600000000000");

  REQUIRE(report["stragglers"].items.size() == 2);
  const Json& reader = report["stragglers"].items[0];
  CHECK(reader.keys() == "name stage where age_ns thread_id thread_name waiting_in stack");
  CHECK(reader["where"].keys() == "file line function");
  CHECK(contains(reader["where"]["file"].text, "shutdown_report_test.cpp"));
  CHECK(reader["where"]["line"].is(Json::Type::number));
  CHECK(contains(reader["where"]["function"].text, "bad_night"));
  CHECK(reader["age_ns"].text == "12000000000");
  CHECK(reader["thread_id"].text == "813");
  CHECK(reader["thread_name"].text == "reader");
  CHECK(reader["waiting_in"].text == "read(7)");
  REQUIRE(reader["stack"].items.size() == 2);
  CHECK(reader["stack"].items[1].text == "main");
  CHECK(report["stragglers"].items[1]["stack"].items.empty());

  REQUIRE(report["failures"].items.size() == 2);
  CHECK(report["failures"].items[0].keys() == "task error");
  CHECK(report["failures"].items[0]["task"].text == "importer");
  CHECK(report["failures"].items[0]["error"].text == "disk full");
  CHECK(!report["failures"].items[1]["error"].text.empty());
}

TEST_CASE("to_json() names every outcome and every kind of cause") {
  ShutdownReport report;
  const auto outcome = [&](Outcome value) {
    report.outcome = value;
    return parsed(report.to_json())["outcome"].text;
  };
  CHECK(outcome(Outcome::clean) == "clean");
  CHECK(outcome(Outcome::failed) == "failed");
  CHECK(outcome(Outcome::overrun) == "overrun");
  CHECK(outcome(Outcome::forced) == "forced");
  const auto cause = [&](Cause value) {
    report.cause = std::move(value);
    const Json all = parsed(report.to_json());
    CHECK(all["cause"]["signal"].is(Json::Type::null));
    return all["cause"]["kind"].text + ": " + all["cause"]["message"].text;
  };
  CHECK(cause(Cause()) == "none: ");
  CHECK(cause(Cause::cancelled("idle")) == "cancelled: idle");
  CHECK(cause(Cause::deadline_exceeded()) == "deadline_exceeded: deadline exceeded");
  CHECK(cause(Cause::failure(std::make_exception_ptr(std::runtime_error("oh")))) == "failure: oh");
}

TEST_CASE("to_json() and to_trace() are valid whatever bytes are in names") {
  support::Random random(3);
  for (int round = 0; round < 300; ++round) {
    ShutdownReport report;
    report.elapsed = 1s;
    report.cause = Cause::cancelled(wild(random));
    for (const EventKind kind : {EventKind::phase, EventKind::stage, EventKind::hook,
                                 EventKind::signal, EventKind::task}) {
      report.events.push_back(
          event(kind, EventResult::ok, wild(random), wild(random), wild(random), 0s, 1s));
    }
    report.stragglers.push_back({wild(random),
                                 wild(random),
                                 SourceLocation(),
                                 1s,
                                 1,
                                 wild(random),
                                 wild(random),
                                 {wild(random)}});
    report.failures.push_back(
        {wild(random), std::make_exception_ptr(std::runtime_error(wild(random)))});
    INFO("round " << round);
    CHECK(support::read_json(report.to_json()));
    CHECK(support::read_json(report.to_trace()));
  }
}

TEST_CASE("Times count from the announced phase, else from the first phase, else the first event") {
  const auto first_begin = [](const ShutdownReport& report) {
    return parsed(report.to_json())["events"].items.at(0)["begin_ns"].text;
  };
  ShutdownReport report;
  report.events.push_back(event(EventKind::task, EventResult::ok, "", "t", "", 1ms, 1ms));
  CHECK(first_begin(report) == "0");
  report.events.push_back(event(EventKind::phase, EventResult::ok, "", "draining", "", 3ms, 3ms));
  CHECK(first_begin(report) == "-2000000");
  report.events.push_back(event(EventKind::phase, EventResult::ok, "", "announced", "", 2ms, 2ms));
  CHECK(first_begin(report) == "-1000000");
  CHECK(parsed(ShutdownReport{}.to_json())["events"].items.empty());
}

TEST_CASE("Times of a report at both ends of the clock saturate") {
  constexpr auto first = Clock::time_point::min();
  constexpr auto last = Clock::time_point::max();
  ShutdownReport report;
  report.elapsed = Clock::duration::max();
  report.events = {
      {EventKind::phase, EventResult::ok, "", "announced", "", last, last},
      {EventKind::hook, EventResult::ok, "service", "early", "", first, first},
      {EventKind::hook, EventResult::ok, "service", "long", "", first, last},
      {EventKind::task, EventResult::ok, "service", "old", "", first, first},
  };
  report.stragglers.push_back({"stuck", "", {}, Clock::duration::min(), 0, "", "", {}});
  report.stragglers.push_back({"stuck too", "", {}, Clock::duration::max(), 0, "", "", {}});
  const Json json = parsed(report.to_json());
  CHECK(json["events"].items.at(1)["begin_ns"].text == std::to_string(INT64_MIN));
  CHECK(json["events"].items.at(2)["end_ns"].text == "0");
  const auto trace = support::read_json(report.to_trace());
  REQUIRE(trace);
  for (const Json& record : (*trace)["traceEvents"].items) {
    CHECK(record["ts"].thousandths() >= 0);
    CHECK(record["dur"].thousandths() >= 0);
    CHECK(record["args"]["name"].text != "task service/old");
  }
  INFO(report.to_text());
  CHECK(report.to_text().find("106752.0 days  ok") != std::string::npos);
}

TEST_CASE("to_trace() has a lane for the phases, one a stage with its hooks, and one a task") {
  const Trace trace(bad_night());
  CHECK(trace.lane_of("announced") == "phases and signals");
  CHECK(trace.lane_of("service") == "stage service");
  CHECK(trace.lane_of("listener") == "stage service");
  CHECK(trace.lane_of("storage") == "stage storage");
  CHECK(trace.lane_of("flush") == "stage storage");
  CHECK(trace.lane_of("worker") == "task service/worker");
  CHECK(trace.lane_of("importer") == "task service/importer");
  CHECK(trace.lane_of("reader") == "task service/reader");
  CHECK(trace.lane_of("3 unnamed") == "task storage/3 unnamed");
  std::set<std::string> names;
  for (const auto& lane : trace.lanes) names.insert(lane.second);
  CHECK(names.size() == trace.lanes.size());
}

TEST_CASE("to_trace() colours what overran or failed, in Chrome's words") {
  const Trace trace(bad_night());
  CHECK(trace.span("service")["cname"].text == "bad");
  CHECK(trace.span("flush")["cname"].text == "terrible");
  CHECK(trace.span("importer")["cname"].text == "terrible");
  CHECK(trace.span("storage")["cname"].is(Json::Type::null));
}

TEST_CASE("to_trace() gives microseconds since the request") {
  const Trace trace(bad_night());
  const auto at = [&](std::string_view name) { return Trace::times(trace.span(name)); };
  // In nanoseconds, since they are thousandths of microseconds.
  CHECK(at("listener") == std::pair(1'000'000'000LL, 1'012'345'678LL));
  CHECK(at("announced") == std::pair(0LL, 1'000'000'000LL));  // until the next phase
  CHECK(at("draining") == std::pair(1'000'000'000LL, 8'000'000'000LL));
  CHECK(at("aborting") == std::pair(8'000'000'000LL, 10'000'000'000LL));
  CHECK(at("service") == std::pair(1'000'000'000LL, 6'000'000'000LL));
  CHECK(trace.span("listener")["args"]["result"].text == "ok");
  CHECK(trace.span("flush")["args"]["detail"].text == "no space");
}

TEST_CASE("to_trace() says of what belongs to a stage which one, and of nothing else") {
  const Trace trace(bad_night());
  CHECK(trace.span("listener")["args"]["stage"].text == "service");
  CHECK(trace.span("importer")["args"]["stage"].text == "service");
  CHECK(trace.span("flush")["args"]["stage"].text == "storage");
  CHECK(trace.span("3 unnamed")["args"]["stage"].text == "storage");
  const Json& phase = trace.span("draining")["args"];
  CHECK(phase["begin_ns"].text == "1000000000");
  for (const char* const key : {"stage", "result", "detail"}) {
    INFO(key);
    CHECK(phase[key].is(Json::Type::null));
  }
}

TEST_CASE("to_trace() draws what began before the request from it on, and tells when it began") {
  const Trace trace(bad_night());
  const Json& worker = trace.span("worker");
  CHECK(Trace::times(worker) == std::pair(0LL, 2'000'000'000LL));
  CHECK(worker["args"]["begin_ns"].text == "-3600000000000");
  CHECK(worker["args"]["end_ns"].text == "2000000000");
  // The reload of an hour ago is no part of the picture, the signal that began it all is.
  REQUIRE(trace.instants.size() == 1);
  CHECK(trace.instants[0]["name"].text == "SIGTERM");
  CHECK(trace.instants[0]["s"].text == "p");
  CHECK(trace.instants[0]["args"]["begin_ns"].text == "-30000");
}

TEST_CASE("to_trace() moves a hook that overlaps another one to a lane of its own") {
  ShutdownReport report;
  report.elapsed = 10s;
  const auto tell = [&](EventKind kind, const char* name, std::chrono::seconds from,
                        std::chrono::seconds to) {
    report.events.push_back(event(kind, EventResult::ok, "s", name, "", from, to));
  };
  tell(EventKind::phase, "announced", 0s, 0s);
  tell(EventKind::stage, "s", 0s, 5s);
  tell(EventKind::hook, "inside", 1s, 2s);
  tell(EventKind::hook, "abandoned", 2s, 9s);
  tell(EventKind::hook, "after", 3s, 4s);
  tell(EventKind::hook, "told late", 2s, 3s);  // between two that it touches
  const Trace trace(report);
  CHECK(trace.span("inside")["tid"].text == trace.span("s")["tid"].text);
  CHECK(trace.span("after")["tid"].text == trace.span("s")["tid"].text);
  CHECK(trace.span("told late")["tid"].text == trace.span("s")["tid"].text);
  CHECK(trace.span("abandoned")["tid"].text != trace.span("s")["tid"].text);
  CHECK(trace.lane_of("abandoned") == "stage s");
}

TEST_CASE("to_trace() leaves out that a task had not ended if it says later that it has") {
  ShutdownReport report;
  report.elapsed = 5s;
  const auto tell = [&](EventResult result, const char* stage, const char* name,
                        std::chrono::seconds end) {
    report.events.push_back(event(EventKind::task, result, stage, name, "", 0s, end));
  };
  report.events.push_back(event(EventKind::phase, EventResult::ok, "", "announced", "", 0s, 0s));
  tell(EventResult::begun, "s", "ends", 1s);
  tell(EventResult::begun, "s", "ends at once", 2s);
  tell(EventResult::begun, "s", "hangs", 1s);
  tell(EventResult::begun, "s", "ended before", 4s);
  tell(EventResult::begun, "s", "elsewhere", 1s);
  tell(EventResult::ok, "s", "ends", 3s);
  tell(EventResult::ok, "s", "ends at once", 2s);
  tell(EventResult::ok, "s", "ended before", 3s);
  tell(EventResult::ok, "t", "elsewhere", 3s);
  report.events.push_back(event(EventKind::hook, EventResult::ok, "s", "hangs", "", 0s, 3s));
  const Trace trace(report);
  std::multiset<std::string> results;
  for (const auto& lane : trace.lanes) results.insert(lane.second);
  CHECK(results.count("task s/ends") == 1);
  CHECK(results.count("task s/ends at once") == 1);
  CHECK(results.count("task s/hangs") == 1);
  CHECK(results.count("task s/ended before") == 2);
  CHECK(results.count("task s/elsewhere") == 1);
  CHECK(results.count("task t/elsewhere") == 1);
}

TEST_CASE("A value that no enumerator has is called unknown") {
  CHECK(lastcall::detail::name_of(static_cast<lastcall::Outcome>(99)) == "unknown");
  CHECK(lastcall::detail::name_of(static_cast<lastcall::CauseKind>(99)) == "unknown");
  CHECK(lastcall::detail::name_of(static_cast<EventKind>(99)) == "unknown");
  CHECK(lastcall::detail::name_of(static_cast<EventResult>(99)) == "unknown");
}

TEST_CASE("to_trace() draws what never ended up to the end") {
  ShutdownReport report;
  report.elapsed = 5s;
  report.events.push_back(event(EventKind::phase, EventResult::ok, "", "announced", "", 0s, 0s));
  report.events.push_back(event(EventKind::stage, EventResult::begun, "", "s", "", 1s, 1s));
  report.events.push_back(event(EventKind::hook, EventResult::begun, "s", "hung", "", 2s, 2s));
  const Trace trace(report);
  CHECK(Trace::times(trace.span("announced")) == std::pair(0LL, 5'000'000'000LL));
  CHECK(Trace::times(trace.span("s")) == std::pair(1'000'000'000LL, 5'000'000'000LL));
  CHECK(Trace::times(trace.span("hung")) == std::pair(2'000'000'000LL, 5'000'000'000LL));
}

TEST_CASE("A straggler in words is one line, then a line for each frame") {
  Straggler straggler{"w",     "s",       SourceLocation::current(), 2500ms, 9, "wor\nker",
                      "futex", {"f", "m"}};
  const std::string line = std::to_string(straggler.where.line());
  CHECK(lastcall::detail::describe_straggler(straggler) ==
        "entered at unit/shutdown_report_test.cpp:" + line +
            " 2.50 s ago, thread 9 \"wor\\nker\", futex\n#0 f\n#1 m");
  straggler.where = SourceLocation();
  straggler.stack.clear();
  CHECK(lastcall::detail::describe_straggler(straggler) ==
        "in for 2.50 s, thread 9 \"wor\\nker\", futex");
}

TEST_CASE("Durations are written as people say them") {
  const auto words = [](auto span) { return lastcall::detail::readable(span); };
  CHECK(words(0s) == "0.0 ms");
  CHECK(words(49us) == "0.0 ms");
  CHECK(words(1250us) == "1.3 ms");
  CHECK(words(9949us) == "9.9 ms");
  CHECK(words(9950us) == "10 ms");
  CHECK(words(999'499us) == "999 ms");
  CHECK(words(999'500us) == "1.00 s");
  CHECK(words(9994ms) == "9.99 s");
  CHECK(words(9995ms) == "10.0 s");
  CHECK(words(119'900ms) == "119.9 s");
  CHECK(words(120s) == "2.0 min");
  CHECK(words(2h) == "2.0 h");
  CHECK(words(49h) == "2.0 days");
  CHECK(words(-1500ms) == "-1.50 s");
  CHECK(words(Clock::duration::max()) == "106752.0 days");
  CHECK(!words(Clock::duration::min()).empty());
}
