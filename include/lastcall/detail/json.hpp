// JSON (RFC 8259) that is valid whatever bytes go into it.
#pragma once

#include <lastcall/detail/text.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace lastcall::detail {

/// Appends `text` as a JSON string. Invalid UTF-8 becomes U+FFFD, one for each maximal subpart.
inline void append_json_string(std::string& out, std::string_view text) {
  out += '"';
  while (!text.empty()) {
    const CodePoint point = decode_utf8(text);
    if (!point.valid) {
      out += replacement_character;
    } else if (point.value == '"' || point.value == '\\') {
      out += '\\';
      out += static_cast<char>(point.value);
    } else if (point.value == '\n') {
      out += "\\n";
    } else if (point.value < 0x20 || point.value == 0x7F) {
      // DEL may stand as it is, but who looks at a log file with a pager is grateful.
      out += "\\u";
      append_hex(out, point.value, 4);
    } else {
      out += text.substr(0, point.length);
    }
    text.remove_prefix(point.length);
  }
  out += '"';
}

/// Puts the commas. The caller sees to it that keys and values alternate inside an object.
class JsonWriter {
 public:
  JsonWriter& begin_object() { return open('{'); }
  JsonWriter& end_object() { return close('}'); }
  JsonWriter& begin_array() { return open('['); }
  JsonWriter& end_array() { return close(']'); }
  JsonWriter& key(std::string_view name) {
    string(name);
    out_ += ':';
    first_ = true;  // no comma before the value
    return *this;
  }
  JsonWriter& string(std::string_view text) {
    separate();
    append_json_string(out_, text);
    return *this;
  }
  JsonWriter& number(std::int64_t value) {
    separate();
    out_ += std::to_string(value);
    return *this;
  }
  /// Nanoseconds as microseconds with three decimals: the unit of a trace.
  JsonWriter& microseconds(std::int64_t nanoseconds) {
    separate();
    append_decimal(out_, nanoseconds, 1000, 3);
    return *this;
  }
  JsonWriter& null() {
    separate();
    out_ += "null";
    return *this;
  }
  JsonWriter& member(std::string_view name, std::string_view text) {
    return key(name).string(text);
  }
  JsonWriter& member(std::string_view name, std::int64_t value) { return key(name).number(value); }
  /// A line break between elements, for who opens the file in an editor.
  JsonWriter& new_line() {
    if (!first_) {
      out_ += ",\n";
      first_ = true;
    } else {
      out_ += '\n';
    }
    return *this;
  }
  std::string take() { return std::move(out_); }

 private:
  JsonWriter& open(char bracket) {
    separate();
    out_ += bracket;
    first_ = true;
    return *this;
  }
  JsonWriter& close(char bracket) {
    out_ += bracket;
    first_ = false;
    return *this;
  }
  void separate() {
    if (!first_) out_ += ',';
    first_ = false;
  }

  std::string out_;
  bool first_ = true;
};

}  // namespace lastcall::detail
