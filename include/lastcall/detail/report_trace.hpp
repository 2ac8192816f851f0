// ShutdownReport::to_trace(): the Trace Event Format of Chrome, which Perfetto reads too.
//
// A viewer draws one lane a "tid". Spans in a lane must nest, or a viewer drops or bends them; hooks
// that were abandoned may overlap the next ones, so whatever doesn't nest moves to another lane of the
// same name. Lanes: 1 for phases and signals; then one or more for each stage, in order; then one for
// each task.
#pragma once

#include <lastcall/detail/bars.hpp>
#include <lastcall/detail/json.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/thread_probe.hpp>
#include <lastcall/shutdown_report.hpp>

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lastcall::detail {

struct TraceSpan {
  std::string_view category;
  std::string_view name;
  std::string_view stage;
  std::string_view result;
  std::string_view detail;
  Clock::time_point begin;
  Clock::time_point end;
};

class TraceBuilder {
 public:
  explicit TraceBuilder(const ShutdownReport& report)
      : report_(report),
        request_(request_time(report.events)),
        end_(moved_by(request_, report.elapsed)),
        process_(::getpid()) {
    // Who overran is seen still in at the end of the picture, even if its event ends later.
    for (const Event& event : report.events) end_ = std::max(end_, event.end);
  }

  std::string build() {
    json_.begin_object().member("displayTimeUnit", "ms").key("traceEvents").begin_array();
    std::string process = thread_name(process_);
    process += process.empty() ? "shutdown" : " shutdown";
    write_name("process_name", process, 0, -1);
    write_phases_and_signals();
    write_stages();
    write_tasks();
    return json_.end_array().end_object().take();
  }

 private:
  struct Lane {
    std::string_view name;
    std::vector<std::pair<Clock::time_point, Clock::time_point>> spans;
  };

  void begin_record(std::string_view phase, std::string_view name, std::int64_t lane) {
    json_.new_line();
    json_.begin_object()
        .member("ph", phase)
        .member("name", name)
        .member("pid", process_)
        .member("tid", lane);
  }

  void write_name(std::string_view what, std::string_view name, std::int64_t lane,
                  std::int64_t order) {
    begin_record("M", what, lane);
    json_.key("args").begin_object().member("name", name).end_object().end_object();
    if (order < 0) return;
    begin_record("M", "thread_sort_index", lane);
    json_.key("args").begin_object().member("sort_index", order).end_object().end_object();
  }

  std::int64_t new_lane(std::string_view name) {
    const std::int64_t lane = ++lanes_;
    write_name("thread_name", name, lane, lane);
    return lane;
  }

  std::int64_t since_request(Clock::time_point at) const noexcept {
    return nanoseconds_of(span_between(request_, at));
  }

  void write_times(Clock::time_point begin, Clock::time_point end) {
    json_.member("begin_ns", since_request(begin)).member("end_ns", since_request(end));
  }

  void write_span(const TraceSpan& span, std::int64_t lane) {
    const std::int64_t begin = std::max<std::int64_t>(since_request(span.begin), 0);
    const std::int64_t end = std::max(since_request(span.end), begin);
    begin_record("X", span.name, lane);
    json_.member("cat", span.category).key("ts").microseconds(begin);
    json_.key("dur").microseconds(end - begin);
    // Chrome's names of colours; Perfetto has its own.
    if (span.result == name_of(EventResult::overran)) json_.member("cname", "bad");
    if (span.result == name_of(EventResult::failed)) json_.member("cname", "terrible");
    json_.key("args").begin_object();
    if (!span.result.empty()) json_.member("result", span.result);
    if (!span.stage.empty()) json_.member("stage", span.stage);
    if (!span.detail.empty()) json_.member("detail", span.detail);
    write_times(span.begin, span.end);
    json_.end_object().end_object();
  }

  static TraceSpan span_of(const Event& event) noexcept {
    return {name_of(event.kind), event.name,  event.stage, name_of(event.result),
            event.detail,        event.begin, event.end};
  }

  bool is_old(const Event& event) const noexcept {
    return event.end < moved_by(request_, -std::chrono::seconds(1));
  }

  void write_phases_and_signals() {
    const std::int64_t lane = new_lane("phases and signals");
    const Event* current = nullptr;
    for (const Event& event : report_.events) {
      if (event.kind == EventKind::phase) {
        if (current != nullptr) write_phase(*current, start_of(event), lane);
        current = &event;
      } else if (event.kind == EventKind::signal && !is_old(event)) {
        begin_record("i", event.name, lane);
        json_.member("cat", "signal").member("s", "p").key("ts");
        json_.microseconds(std::max<std::int64_t>(since_request(event.begin), 0));
        json_.key("args").begin_object().member("detail", event.detail);
        write_times(event.begin, event.end);
        json_.end_object().end_object();
      }
    }
    if (current != nullptr) write_phase(*current, std::max(current->begin, end_), lane);
  }

  // "finished" may be an event that spans the whole shutdown.
  static Clock::time_point start_of(const Event& phase) noexcept {
    return phase.name == "finished" ? std::max(phase.begin, phase.end) : phase.begin;
  }

  // A phase lasts until the next one, whatever its event says of its end.
  void write_phase(const Event& phase, Clock::time_point until, std::int64_t lane) {
    TraceSpan span = span_of(phase);
    span.result = {};
    span.begin = start_of(phase);
    span.end = span.name == "finished" ? span.begin : until;
    write_span(span, lane);
  }

  void write_stages() {
    const std::vector<Bar> bars = bars_of(report_.events, request_, end_);
    std::vector<Lane> lanes;
    std::vector<std::int64_t> numbers;
    for (const Bar& bar : bars) {
      TraceSpan span = span_of(*bar.event);
      span.end = std::max(bar.end, span.begin);
      const std::string_view stage = stage_of(*bar.event);
      std::size_t at = 0;
      while (at < lanes.size() && (lanes[at].name != stage || !nests(lanes[at], span))) ++at;
      if (at == lanes.size()) {
        lanes.push_back({stage, {}});
        numbers.push_back(new_lane(stage.empty() ? "hooks" : "stage " + std::string(stage)));
      }
      lanes[at].spans.emplace_back(span.begin, span.end);
      write_span(span, numbers[at]);
    }
  }

  // Whether the span lies inside, around or beside each of the others.
  static bool nests(const Lane& lane, const TraceSpan& span) {
    return std::all_of(lane.spans.begin(), lane.spans.end(), [&span](const auto& other) {
      const auto& [begin, end] = other;
      const bool apart = span.end <= begin || end <= span.begin;
      const bool inside = begin <= span.begin && span.end <= end;
      const bool around = span.begin <= begin && end <= span.end;
      return apart || inside || around;
    });
  }

  void write_tasks() {
    std::vector<const Event*> tasks;
    for (const Event& event : report_.events) {
      if (event.kind != EventKind::task || is_old(event)) continue;
      // A snapshot tells of a task that hasn't ended; if its end comes later, that says it all.
      if (event.result == EventResult::begun && ends_later(event)) continue;
      write_task(span_of(event));
      tasks.push_back(&event);
    }
    for (const Straggler& straggler : report_.stragglers) {
      const bool told = std::any_of(tasks.begin(), tasks.end(), [&](const Event* event) {
        return event->name == straggler.name && event->stage == straggler.stage;
      });
      if (told) continue;
      const std::string detail = describe_straggler(straggler);
      const auto entered =  // its age before the end, saturating
          Clock::time_point(span_between(Clock::time_point(straggler.age), end_));
      write_task({"task", straggler.name, straggler.stage, name_of(EventResult::overran), detail,
                  entered, end_});
    }
  }

  bool ends_later(const Event& begun) const {
    return std::any_of(report_.events.begin(), report_.events.end(), [&](const Event& event) {
      return event.kind == EventKind::task && event.result != EventResult::begun &&
             event.name == begun.name && event.stage == begun.stage && event.end >= begun.end;
    });
  }

  void write_task(const TraceSpan& span) {
    std::string lane = "task ";
    if (!span.stage.empty()) lane.append(span.stage).append("/");
    lane += span.name;
    write_span(span, new_lane(lane));
  }

  const ShutdownReport& report_;
  Clock::time_point request_;
  Clock::time_point end_;
  pid_t process_;
  std::int64_t lanes_ = 0;
  JsonWriter json_;
};

}  // namespace lastcall::detail

namespace lastcall {

inline std::string ShutdownReport::to_trace() const { return detail::TraceBuilder(*this).build(); }

}  // namespace lastcall
