// The three views of a report, whatever its names, times and numbers are: the JSON is valid and says what
// is in the report, the trace is valid and its spans nest, the text is safe to print.
#include <lastcall/shutdown_report.hpp>

#include "story.hpp"

#include <cstdint>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using fuzz::require;
using lastcall::Cause;
using lastcall::Failure;
using lastcall::Outcome;
using lastcall::ShutdownReport;
using lastcall::SignalInfo;
using lastcall::Straggler;
using support::Json;

std::exception_ptr some_exception(fuzz::Input& input) {
  switch (input.below(4)) {
    case 0: return nullptr;
    case 1: return std::make_exception_ptr(7);
    default: {
      // what() ends at the first NUL.
      return std::make_exception_ptr(std::runtime_error(fuzz::some_name(input)));
    }
  }
}

Cause some_cause(fuzz::Input& input) {
  switch (input.below(5)) {
    case 0: return {};
    case 1: return Cause::cancelled(fuzz::some_name(input));
    case 2: return Cause::deadline_exceeded();
    case 3: {
      SignalInfo info{};
      info.number = static_cast<int>(input.word(input.below(5)));
      info.code = static_cast<int>(input.word(4));
      info.sender_pid = static_cast<pid_t>(input.word(4));
      info.sender_uid = static_cast<uid_t>(input.word(4));
      info.received = fuzz::some_time(input);
      return Cause::signal(info);
    }
    default: {
      std::exception_ptr error = some_exception(input);
      if (!error) error = std::make_exception_ptr(std::runtime_error("it"));
      return Cause::failure(error, fuzz::some_name(input));
    }
  }
}

Straggler some_straggler(fuzz::Input& input) {
  Straggler straggler{};
  straggler.name = fuzz::some_name(input);
  straggler.stage = fuzz::some_name(input);
  if (input.flag()) straggler.where = lastcall::SourceLocation::current();
  straggler.age = fuzz::some_time(input).time_since_epoch();
  straggler.thread_id = static_cast<pid_t>(input.word(2));
  straggler.thread_name = fuzz::some_name(input);
  straggler.waiting_in = fuzz::some_name(input);
  for (std::size_t frames = input.below(4); frames > 0; --frames) {
    straggler.stack.push_back(fuzz::some_name(input));
  }
  return straggler;
}

ShutdownReport some_report(fuzz::Input& input) {
  ShutdownReport report;
  report.outcome = static_cast<Outcome>(input.below(4));
  report.cause = some_cause(input);
  report.exit_code = static_cast<int>(input.word(input.below(5)));
  report.elapsed = fuzz::some_time(input).time_since_epoch();
  while (!input.empty() && report.events.size() < 40) {
    switch (input.below(6)) {
      case 0: report.stragglers.push_back(some_straggler(input)); break;
      case 1: report.failures.push_back({fuzz::some_name(input), some_exception(input)}); break;
      default: report.events.push_back(fuzz::some_event(input)); break;
    }
  }
  return report;
}

// ---- to_json()

void check_json(const ShutdownReport& report) {
  const std::string text = report.to_json();
  require(text.find('\n') == std::string::npos, "the JSON is not on one line");
  const auto json = support::read_json(text);
  require(json.has_value(), "to_json() is no JSON");
  const auto origin = lastcall::detail::request_time(report.events);
  const Json& all = *json;
  require(all.keys() == "outcome cause exit_code elapsed_ns events stragglers failures",
          "other keys");
  require(all["outcome"].text == lastcall::detail::name_of(report.outcome), "another outcome");
  require(all["exit_code"].integer() == report.exit_code, "another exit code");
  require(all["elapsed_ns"].integer() == report.elapsed.count(), "another time");

  const Json& cause = all["cause"];
  require(cause["kind"].text == lastcall::detail::name_of(report.cause.kind()), "another cause");
  require(cause["message"].text == fuzz::repaired(report.cause.message()), "another message");
  const SignalInfo* const signal = report.cause.signal();
  require(cause["signal"].is(signal == nullptr ? Json::Type::null : Json::Type::object),
          "a signal?");
  if (signal != nullptr) {
    require(cause["signal"]["number"].integer() == signal->number &&
                cause["signal"]["code"].integer() == signal->code &&
                cause["signal"]["sender_pid"].integer() == signal->sender_pid &&
                cause["signal"]["sender_uid"].integer() == signal->sender_uid &&
                cause["signal"]["received_ns"].integer() ==
                    fuzz::span_between(origin, signal->received),
            "another signal");
  }

  require(all["events"].items.size() == report.events.size(), "events are missing");
  for (std::size_t at = 0; at < report.events.size(); ++at) {
    fuzz::require_event(all["events"].items[at], report.events[at], origin);
  }
  require(all["stragglers"].items.size() == report.stragglers.size(), "stragglers are missing");
  for (std::size_t at = 0; at < report.stragglers.size(); ++at) {
    const Json& got = all["stragglers"].items[at];
    const Straggler& put = report.stragglers[at];
    require(got["name"].text == fuzz::repaired(put.name) &&
                got["stage"].text == fuzz::repaired(put.stage) &&
                got["age_ns"].integer() == put.age.count() &&
                got["thread_id"].integer() == put.thread_id &&
                got["thread_name"].text == fuzz::repaired(put.thread_name) &&
                got["waiting_in"].text == fuzz::repaired(put.waiting_in) &&
                got["where"]["line"].integer() == static_cast<long long>(put.where.line()),
            "another straggler");
    require(got["stack"].items.size() == put.stack.size(), "frames are missing");
    for (std::size_t frame = 0; frame < put.stack.size(); ++frame) {
      require(got["stack"].items[frame].text == fuzz::repaired(put.stack[frame]), "another frame");
    }
  }
  require(all["failures"].items.size() == report.failures.size(), "failures are missing");
  for (std::size_t at = 0; at < report.failures.size(); ++at) {
    require(all["failures"].items[at]["task"].text == fuzz::repaired(report.failures[at].task),
            "another failure");
  }
}

// ---- to_trace()

struct Span {
  long long begin;
  long long end;
};

void check_trace(const ShutdownReport& report) {
  const auto json = support::read_json(report.to_trace());
  require(json.has_value(), "to_trace() is no JSON");
  std::map<long long, std::vector<Span>> lanes;
  std::map<long long, bool> named;
  for (const Json& record : (*json)["traceEvents"].items) {
    const std::string& kind = record["ph"].text;
    const long long lane = record["tid"].integer();
    require(record["name"].is(Json::Type::string) && record["pid"].is(Json::Type::number) &&
                record["tid"].is(Json::Type::number),
            "a record without a name or a lane");
    if (kind == "M") {
      named[lane] = true;
      continue;
    }
    require(kind == "X" || kind == "i", "a record of another kind");
    require(named[lane], "a lane without a name");
    require(record["ts"].thousandths() >= 0, "before the request");
    require(record["args"]["begin_ns"].is(Json::Type::number), "without its true times");
    if (kind == "i") continue;
    require(record["dur"].thousandths() >= 0, "a span that ends before it begins");
    lanes[lane].push_back(
        {record["ts"].thousandths(), record["ts"].thousandths() + record["dur"].thousandths()});
  }
  // Of the phases only the order is promised by the coordinator; any other lane must nest.
  for (const auto& [lane, spans] : lanes) {
    if (lane == 1) continue;
    for (std::size_t one = 0; one < spans.size(); ++one) {
      for (std::size_t other = 0; other < one; ++other) {
        const Span& a = spans[one];
        const Span& b = spans[other];
        const bool apart = a.end <= b.begin || b.end <= a.begin;
        const bool nested =
            (a.begin <= b.begin && b.end <= a.end) || (b.begin <= a.begin && a.end <= b.end);
        require(apart || nested, "spans of one lane cross");
      }
    }
  }
}

// ---- to_text()

void check_text(const ShutdownReport& report) {
  const std::string text = report.to_text();
  require(!text.empty() && text.back() == '\n', "the text doesn't end with a line's end");
  std::size_t lines = 0;
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::size_t end = rest.find('\n');
    fuzz::require_harmless(rest.substr(0, end));
    rest.remove_prefix(end + 1);
    ++lines;
  }
  std::size_t least = 1;
  for (const Straggler& straggler : report.stragglers) least += 1 + straggler.stack.size();
  if (!report.stragglers.empty()) ++least;
  if (!report.failures.empty()) least += 1 + report.failures.size();
  std::size_t bars = 0;
  for (const auto& event : report.events) {
    if (event.kind == lastcall::EventKind::stage || event.kind == lastcall::EventKind::hook) ++bars;
  }
  require(lines >= least && lines <= least + bars, "lines that nobody asked for, or too few");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const ShutdownReport report = some_report(input);
  check_json(report);
  check_trace(report);
  check_text(report);
  return 0;
}
