// Text for people: safe to print whatever bytes it came from, and free of locales (a program that
// called setlocale() would otherwise get "0,5 s" here and broken numbers in the JSON).
#pragma once

#include <lastcall/detail/clock.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lastcall::detail {

inline constexpr std::string_view replacement_character = "\xEF\xBF\xBD";  // U+FFFD in UTF-8

/// The code point at the front of a text: how many bytes it has, and whether they are valid UTF-8.
/// Of invalid text the length is that of the longest start of something valid, at least 1, which is
/// how much one U+FFFD stands for (Unicode 15, section 3.9, "maximal subparts").
struct CodePoint {
  std::uint32_t value;
  std::size_t length;
  bool valid;
};

inline CodePoint decode_utf8(std::string_view text) noexcept {
  const auto byte = [text](std::size_t at) {
    return static_cast<std::uint32_t>(static_cast<unsigned char>(text[at]));
  };
  const std::uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  std::size_t length = 0;
  std::uint32_t value = 0;
  // The second byte's range excludes overlong forms, surrogates and what lies past U+10FFFF.
  std::uint32_t low = 0x80;
  std::uint32_t high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    value = lead & 0x1FU;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    value = lead & 0x0FU;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    value = lead & 0x07U;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {0xFFFD, 1, false};
  }
  for (std::size_t at = 1; at < length; ++at) {
    if (at >= text.size() || byte(at) < low || byte(at) > high) return {0xFFFD, at, false};
    value = (value << 6U) | (byte(at) & 0x3FU);
    low = 0x80;
    high = 0xBF;
  }
  return {value, length, true};
}

// What could move a terminal's cursor, change its colours or turn the text around.
inline bool is_unprintable(std::uint32_t point) noexcept {
  return point < 0x20 || (point >= 0x7F && point < 0xA0) || (point >= 0x2028 && point <= 0x202E) ||
         (point >= 0x2066 && point <= 0x2069);
}

inline void append_hex(std::string& out, std::uint32_t value, int digits) {
  for (int shift = (digits - 1) * 4; shift >= 0; shift -= 4) {
    out += "0123456789abcdef"[(value >> static_cast<unsigned>(shift)) & 0xFU];
  }
}

/// Appends `text` on one line: control characters as C++ escapes them, bad UTF-8 replaced.
inline void append_printable(std::string& out, std::string_view text) {
  while (!text.empty()) {
    const CodePoint point = decode_utf8(text);
    if (!point.valid) {
      out += replacement_character;
    } else if (point.value == '\n') {
      out += "\\n";
    } else if (point.value == '\t') {
      out += "\\t";
    } else if (is_unprintable(point.value)) {
      out += point.value < 0x80 ? "\\x" : "\\u";
      append_hex(out, point.value, point.value < 0x80 ? 2 : 4);
    } else {
      out += text.substr(0, point.length);
    }
    text.remove_prefix(point.length);
  }
}

struct CodePointRange {
  std::uint32_t first;
  std::uint32_t last;
};

/// What a terminal draws two columns wide: East Asian Wide and Fullwidth (Unicode's annex 11), which emoji are.
/// Ranges have been joined where nothing but unassigned or rare code points lies between them: too wide a guess
/// costs a column, too narrow a one the line.
inline constexpr CodePointRange double_width[] = {
    {0x1100, 0x115F},   {0x231A, 0x231B},   {0x2329, 0x232A},   {0x23E9, 0x23EC},
    {0x23F0, 0x23F0},   {0x23F3, 0x23F3},   {0x25FD, 0x25FE},   {0x2614, 0x2615},
    {0x2648, 0x2653},   {0x267F, 0x267F},   {0x2693, 0x2693},   {0x26A1, 0x26A1},
    {0x26AA, 0x26AB},   {0x26BD, 0x26BE},   {0x26C4, 0x26C5},   {0x26CE, 0x26CE},
    {0x26D4, 0x26D4},   {0x26EA, 0x26EA},   {0x26F2, 0x26F5},   {0x26FA, 0x26FD},
    {0x2705, 0x2705},   {0x270A, 0x270B},   {0x2728, 0x2728},   {0x274C, 0x274E},
    {0x2753, 0x2757},   {0x2795, 0x2797},   {0x27B0, 0x27BF},   {0x2B1B, 0x2B1C},
    {0x2B50, 0x2B55},   {0x2E80, 0x303E},   {0x3041, 0xA4CF},   {0xA960, 0xA97C},
    {0xAC00, 0xD7A3},   {0xF900, 0xFAFF},   {0xFE10, 0xFE19},   {0xFE30, 0xFE6B},
    {0xFF01, 0xFF60},   {0xFFE0, 0xFFE6},   {0x16FE0, 0x18DFF}, {0x1AFF0, 0x1B2FF},
    {0x1F004, 0x1F004}, {0x1F0CF, 0x1F0CF}, {0x1F18E, 0x1F19A}, {0x1F200, 0x1FAFF},
    {0x20000, 0x3FFFD},
};

constexpr std::size_t columns_of(std::uint32_t point) noexcept {
  for (const CodePointRange& range : double_width) {
    if (point <= range.last) return point >= range.first ? 2 : 1;
  }
  return 1;
}

/// Columns that the text takes, near enough: a mark that stands above the letter before it counts as one, too.
inline std::size_t columns_of(std::string_view text) noexcept {
  std::size_t columns = 0;
  while (!text.empty()) {
    const CodePoint point = decode_utf8(text);
    columns += columns_of(point.value);
    text.remove_prefix(point.length);
  }
  return columns;
}

/// Cuts valid UTF-8 down to `most` columns; the last three of a cut text are dots.
inline void cut_to_columns(std::string& text, std::size_t most) {
  if (columns_of(text) <= most) return;
  const std::size_t kept = most > 3 ? most - 3 : 0;
  std::size_t columns = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    const CodePoint point = decode_utf8(std::string_view(text).substr(at));
    if (columns + columns_of(point.value) > kept) break;
    columns += columns_of(point.value);
    at += point.length;
  }
  text.resize(at);
  text.append(most - kept, '.');
}

/// Appends `amount / unit`, rounded to `decimals` digits.
inline void append_decimal(std::string& out, std::int64_t amount, std::int64_t unit, int decimals) {
  std::int64_t scale = 1;
  for (int digit = 0; digit < decimals; ++digit) scale *= 10;
  // Halves are taken of what is left after the whole units, so nothing overflows.
  std::int64_t whole = amount / unit;
  std::int64_t rest = amount % unit;
  const bool negative = amount < 0;
  if (negative) {
    whole = -whole;
    rest = -rest;
  }
  const std::int64_t step = unit / scale;
  std::int64_t part = step > 0 ? (rest + step / 2) / step : 0;
  if (part == scale) {
    part = 0;
    ++whole;
  }
  if (negative && (whole != 0 || part != 0)) out += '-';
  out += std::to_string(whole);
  if (decimals == 0) return;
  const std::string digits = std::to_string(part);
  out += '.';
  out.append(static_cast<std::size_t>(decimals) - digits.size(), '0');
  out += digits;
}

inline std::int64_t nanoseconds_of(Clock::duration span) noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(span).count();
}

/// A duration as people say it: "0.3 ms", "412 ms", "24.6 s", "12.5 min", "3.2 h".
inline std::string readable(Clock::duration span) {
  const std::int64_t ns = nanoseconds_of(span);
  const std::int64_t size = ns < 0 ? (ns == INT64_MIN ? INT64_MAX : -ns) : ns;
  constexpr std::int64_t second = 1'000'000'000;
  std::string out;
  if (size < 9'950'000) {
    append_decimal(out, ns, 1'000'000, 1);
    return out += " ms";
  }
  if (size < 999'500'000) {
    append_decimal(out, ns, 1'000'000, 0);
    return out += " ms";
  }
  if (size < 120 * second) {
    append_decimal(out, ns, second, size < 9'995'000'000 ? 2 : 1);
    return out += " s";
  }
  if (size < 7200 * second) {
    append_decimal(out, ns, 60 * second, 1);
    return out += " min";
  }
  if (size < 48 * 3600 * second) {
    append_decimal(out, ns, 3600 * second, 1);
    return out += " h";
  }
  append_decimal(out, ns, 24 * 3600 * second, 1);
  return out += " days";
}

/// The last two parts of a path: enough to tell two main.cpp apart, short enough for a line.
inline std::string_view short_path(std::string_view path) noexcept {
  const std::size_t last = path.rfind('/');
  if (last == std::string_view::npos || last == 0) return path;
  const std::size_t before = path.rfind('/', last - 1);
  return before == std::string_view::npos ? path : path.substr(before + 1);
}

inline void append_padded(std::string& out, std::string_view text, std::size_t columns) {
  out += text;
  const std::size_t taken = columns_of(text);
  if (taken < columns) out.append(columns - taken, ' ');
}

inline void append_right(std::string& out, std::string_view text, std::size_t columns) {
  const std::size_t taken = columns_of(text);
  if (taken < columns) out.append(columns - taken, ' ');
  out += text;
}

}  // namespace lastcall::detail
