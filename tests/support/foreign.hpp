// What no C++ code threw: an exception of another language's runtime.
#pragma once

#include <unwind.h>

#include <cstdlib>
#include <cstring>

namespace support {

/// Throws one. Its class names nobody whom the C++ runtime knows.
[[noreturn]] inline void throw_foreign() {
  auto* const thrown = new _Unwind_Exception();
  std::memcpy(&thrown->exception_class, "TESTlang", sizeof thrown->exception_class);
  thrown->exception_cleanup = [](_Unwind_Reason_Code, _Unwind_Exception* over) { delete over; };
  ::_Unwind_RaiseException(thrown);
  std::abort();  // nobody catches it
}

}  // namespace support
