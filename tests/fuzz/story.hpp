// Events and reports out of nothing but bytes, and what their views must make of them.
#pragma once

#include "input.hpp"

#include "support/json_check.hpp"

#include <lastcall/shutdown_report.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace fuzz {

using lastcall::Clock;
using lastcall::Event;
using lastcall::EventKind;
using lastcall::EventResult;

/// Names as users have them, as attackers have them, and any bytes at all.
inline std::string some_name(Input& input) {
  // Words of the library's own; then what moves a cursor, turns text around, or is no UTF-8.
  static constexpr std::array<std::string_view, 20> known = {
      "announced",    "draining",     "aborting",         "finished",     "service",
      "storage",      "\x1b[2J",      "\xE2\x80\xAE",     "\r\n",         "\xC2\x9B",
      "\xE2\x81\xA9", "\xE2\x80\xA8", "\xF0\x9F\x98\x80", "\xED\xA0\x80", "\"\\/",
      "\x7F\t\b",     "\xC3",         "\xE2\x81\xA6",     "a\nb\n\nc",    ""};
  const std::size_t kind = input.below(known.size() + 8);
  if (kind < known.size()) return std::string(known[kind]);
  std::string text = input.text(48);
  if (input.below(16) != 1) return text;
  // Long enough to be cut somewhere.
  std::string many;
  for (std::size_t count = input.byte(); count > 0; --count) many += text;
  return many;
}

/// Near a common moment, or anywhere at all.
inline Clock::time_point some_time(Input& input) {
  const auto moment = Clock::time_point(std::chrono::hours(1000));
  switch (input.below(4)) {
    case 0: return moment + std::chrono::milliseconds(input.below(64));
    case 1: return moment - std::chrono::milliseconds(input.below(64) * 100);
    case 2: return moment + Clock::duration(static_cast<std::int64_t>(input.word(5)));
    default: return Clock::time_point(Clock::duration(static_cast<std::int64_t>(input.any_size())));
  }
}

inline Event some_event(Input& input) {
  Event event{};
  event.kind = static_cast<EventKind>(input.below(5));
  event.result = static_cast<EventResult>(input.below(5));
  event.stage = some_name(input);
  event.name = some_name(input);
  event.detail = some_name(input);
  event.begin = some_time(input);
  event.end = input.flag() ? event.begin : some_time(input);
  return event;
}

// ---- What is promised, worked out in another way than the library's.

/// What no UTF-8 is becomes U+FFFD, one for each longest start of a character (Unicode 15, 3.9): a start
/// is what some continuation would make valid, and all of those are tried.
inline bool starts_a_character(std::string_view part) {
  // The continuation bytes at the borders of every range of RFC 3629.
  static constexpr char fillers[] = {'\x80', '\x8F', '\x90', '\x9F', '\xA0', '\xBF'};
  if (support::JsonReader::utf8_length(part) == part.size()) return true;
  if (part.size() >= 4) return false;
  char longer[4] = {};
  part.copy(longer, part.size());
  for (const char filler : fillers) {
    longer[part.size()] = filler;
    if (starts_a_character({longer, part.size() + 1})) return true;
  }
  return false;
}
inline std::string repaired(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    std::size_t length = support::JsonReader::utf8_length(text);
    if (length > 0) {
      out += text.substr(0, length);
    } else {
      out += "\xEF\xBF\xBD";
      length = 1;
      while (length < 4 && length < text.size() && starts_a_character(text.substr(0, length + 1)))
        ++length;
    }
    text.remove_prefix(length);
  }
  return out;
}

/// The difference, as far as 64 bits hold it.
inline std::int64_t span_between(Clock::time_point from, Clock::time_point to) {
  const std::int64_t a = from.time_since_epoch().count();
  const std::int64_t b = to.time_since_epoch().count();
  if (a < 0 && b > INT64_MAX + a) return INT64_MAX;
  if (a > 0 && b < INT64_MIN + a) return INT64_MIN;
  return b - a;
}

/// Nothing that moves a cursor, changes a colour or turns the text around.
inline void require_harmless(std::string_view line) {
  require(support::is_utf8(line), "no UTF-8");
  while (!line.empty()) {
    const std::size_t length = support::JsonReader::utf8_length(line);
    const auto byte = [line](std::size_t at) { return static_cast<unsigned char>(line[at]); };
    require(length > 1 || (byte(0) >= 0x20 && byte(0) != 0x7F), "a control character");
    require(length != 2 || byte(0) != 0xC2 || byte(1) >= 0xA0, "a control character of Latin 1");
    if (length == 3 && byte(0) == 0xE2 && byte(1) == 0x80) {
      require(byte(2) < 0xA8 || byte(2) > 0xAE, "a line separator, or what turns text around");
    }
    if (length == 3 && byte(0) == 0xE2 && byte(1) == 0x81) {
      require(byte(2) < 0xA6 || byte(2) > 0xA9, "an isolate, which turns text around");
    }
    line.remove_prefix(length);
  }
}

inline void require_event(const support::Json& json, const Event& event, Clock::time_point origin) {
  require(json.keys() == "kind result stage name detail begin_ns end_ns", "other keys");
  require(json["kind"].text == lastcall::detail::name_of(event.kind), "another kind");
  require(json["result"].text == lastcall::detail::name_of(event.result), "another result");
  require(json["stage"].text == repaired(event.stage), "another stage");
  require(json["name"].text == repaired(event.name), "another name");
  require(json["detail"].text == repaired(event.detail), "another detail");
  require(json["begin_ns"].integer() == span_between(origin, event.begin), "another beginning");
  require(json["end_ns"].integer() == span_between(origin, event.end), "another end");
}

}  // namespace fuzz
