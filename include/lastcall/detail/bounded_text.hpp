// Text put together in memory that the caller already has: for signal handlers and for the thread
// that must neither allocate nor wait. Everything here is async-signal-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lastcall::detail {

/// Appends to a buffer and drops what doesn't fit. Writes no terminating NUL.
class BoundedText {
 public:
  BoundedText(char* out, std::size_t size) noexcept : out_(out), size_(size) {}
  BoundedText& add(std::string_view text) noexcept {
    for (const char letter : text) {
      if (length_ < size_) out_[length_++] = letter;
    }
    return *this;
  }
  BoundedText& add(char letter) noexcept { return add(std::string_view(&letter, 1)); }
  BoundedText& add_number(std::int64_t value) noexcept {
    auto rest = static_cast<std::uint64_t>(value);
    if (value < 0) {
      add('-');
      rest = 0 - rest;
    }
    return add_digits(rest);
  }
  /// At least `width` digits, zeros in front; one at least.
  BoundedText& add_digits(std::uint64_t value, unsigned base = 10, std::size_t width = 0) noexcept {
    char digits[24];
    std::size_t at = sizeof digits;
    do {
      digits[--at] = "0123456789abcdef"[value % base];
      value /= base;
    } while (at > 0 && (value != 0 || sizeof digits - at < width));
    return add(std::string_view(digits + at, sizeof digits - at));
  }
  BoundedText& add_hex(std::uint64_t value) noexcept { return add("0x").add_digits(value, 16); }
  std::size_t length() const noexcept { return length_; }
  std::string_view view() const noexcept { return {out_, length_}; }

 private:
  char* out_;
  std::size_t size_;
  std::size_t length_ = 0;
};

}  // namespace lastcall::detail
