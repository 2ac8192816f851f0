// ShutdownReport::to_json().
#pragma once

#include <lastcall/detail/event_json.hpp>
#include <lastcall/detail/json.hpp>
#include <lastcall/shutdown_report.hpp>
#include <lastcall/signal_info.hpp>

#include <string>

namespace lastcall::detail {

inline void write_cause(JsonWriter& json, const Cause& cause, Clock::time_point origin) {
  json.begin_object().member("kind", name_of(cause.kind())).member("message", cause.message());
  json.key("signal");
  if (const SignalInfo* const signal = cause.signal()) {
    json.begin_object()
        .member("number", signal->number)
        .member("name", signal_name(signal->number))
        .member("code", signal->code)
        .member("sender_pid", signal->sender_pid)
        .member("sender_uid", static_cast<std::int64_t>(signal->sender_uid))
        .member("received_ns", nanoseconds_of(span_between(origin, signal->received)))
        .end_object();
  } else {
    json.null();
  }
  json.end_object();
}

inline void write_straggler(JsonWriter& json, const Straggler& straggler) {
  json.begin_object().member("name", straggler.name).member("stage", straggler.stage);
  json.key("where")
      .begin_object()
      .member("file", straggler.where.file_name())
      .member("line", static_cast<std::int64_t>(straggler.where.line()))
      .member("function", straggler.where.function_name())
      .end_object();
  json.member("age_ns", nanoseconds_of(straggler.age))
      .member("thread_id", straggler.thread_id)
      .member("thread_name", straggler.thread_name)
      .member("waiting_in", straggler.waiting_in);
  json.key("stack").begin_array();
  for (const std::string& frame : straggler.stack) json.string(frame);
  json.end_array().end_object();
}

inline std::string report_json(const ShutdownReport& report) {
  const Clock::time_point origin = request_time(report.events);
  JsonWriter json;
  json.begin_object().member("outcome", name_of(report.outcome)).key("cause");
  write_cause(json, report.cause, origin);
  json.member("exit_code", report.exit_code).member("elapsed_ns", nanoseconds_of(report.elapsed));
  json.key("events").begin_array();
  for (const Event& event : report.events) write_event(json, event, origin);
  json.end_array().key("stragglers").begin_array();
  for (const Straggler& straggler : report.stragglers) write_straggler(json, straggler);
  json.end_array().key("failures").begin_array();
  for (const Failure& failure : report.failures) {
    json.begin_object()
        .member("task", failure.task)
        .member("error", failure.error ? describe_exception(failure.error) : "a failure")
        .end_object();
  }
  return json.end_array().end_object().take();
}

}  // namespace lastcall::detail

namespace lastcall {

inline std::string ShutdownReport::to_json() const { return detail::report_json(*this); }

}  // namespace lastcall
