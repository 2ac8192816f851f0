// A task or hook that threw: what a TaskGroup keeps and a ShutdownReport lists.
#pragma once

#include <exception>
#include <string>

namespace lastcall {

/// Who threw, and what. Copying it copies a reference to the exception, not the exception.
struct Failure {
  std::string task{};          ///< the name given to spawn(), wrap() or the hook
  std::exception_ptr error{};  ///< never null in what the library hands out
};

}  // namespace lastcall
