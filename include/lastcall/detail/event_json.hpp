// An event as a JSON object: the same in json_observer's lines and in the report.
#pragma once

#include <lastcall/detail/event.hpp>
#include <lastcall/detail/json.hpp>

namespace lastcall::detail {

/// Writes an object with the members' names as keys; times in nanoseconds since `origin`.
inline void write_event(JsonWriter& json, const Event& event, Clock::time_point origin) {
  json.begin_object()
      .member("kind", name_of(event.kind))
      .member("result", name_of(event.result))
      .member("stage", event.stage)
      .member("name", event.name)
      .member("detail", event.detail)
      .member("begin_ns", nanoseconds_of(span_between(origin, event.begin)))
      .member("end_ns", nanoseconds_of(span_between(origin, event.end)))
      .end_object();
}

}  // namespace lastcall::detail
