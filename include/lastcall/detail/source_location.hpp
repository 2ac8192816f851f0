// lastcall::SourceLocation: std::source_location where the library has it, else (clang 14 with
// libstdc++ 12) a type with the same members.
#pragma once

#include <version>

#if defined(__cpp_lib_source_location)

#include <source_location>

namespace lastcall {

using SourceLocation = std::source_location;

}  // namespace lastcall

#else

#include <cstdint>

namespace lastcall {

// Every compiler that lacks the library type still has the builtins behind it.
class SourceLocation {
 public:
  static constexpr SourceLocation current(
      const char* file = __builtin_FILE(), const char* function = __builtin_FUNCTION(),
      std::uint_least32_t line = static_cast<std::uint_least32_t>(__builtin_LINE()),
      std::uint_least32_t column = 0) noexcept {
    SourceLocation where;
    where.file_ = file;
    where.function_ = function;
    where.line_ = line;
    where.column_ = column;
    return where;
  }
  constexpr SourceLocation() noexcept = default;
  constexpr std::uint_least32_t line() const noexcept { return line_; }
  constexpr std::uint_least32_t column() const noexcept { return column_; }
  constexpr const char* file_name() const noexcept { return file_; }
  constexpr const char* function_name() const noexcept { return function_; }

 private:
  const char* file_ = "";
  const char* function_ = "";
  std::uint_least32_t line_ = 0;
  std::uint_least32_t column_ = 0;
};

}  // namespace lastcall

#endif
