// glibc ends a thread (pthread_exit, pthread_cancel) by unwinding its stack, also through C++ frames, and
// ends the process if a handler keeps that to itself. Whoever has to catch everything lets it pass.
//
// libstdc++ calls it abi::__forced_unwind, and `throw;` goes on with it. libc++abi has no name for it:
// only catch (...) sees it, there is no std::exception_ptr of it, and its `throw;` raises an exception
// (_Unwind_RaiseException), which nobody catches: the process ends all the same. What has to be done there
// is what libstdc++'s `throw;` does.
//
// An exception of another language (_Unwind_RaiseException) is seen by catch (...) alone, too, and has no
// std::exception_ptr either. It is one of the library's own from there on: what_is_handled().
#pragma once

#include <lastcall/detail/config.hpp>

#include <cstddef>
#include <exception>
#include <new>

#if LASTCALL_EXCEPTIONS && defined(__GLIBCXX__)
#include <cxxabi.h>
#elif LASTCALL_EXCEPTIONS && defined(__GLIBC__) && !defined(__ARM_EABI_UNWINDER__)
#include <unwind.h>
#define LASTCALL_UNNAMED_THREAD_END 1
#endif

namespace lastcall::detail {

#if defined(LASTCALL_UNNAMED_THREAD_END)

// Itanium C++ ABI, 2.2.2: the first member is the innermost exception that is being handled.
extern "C" char** lastcall_exceptions_of_this_thread() noexcept __asm__("__cxa_get_globals");

/// First in a handler of (...): doesn't return if the thread is ending.
inline void let_thread_end() {
  if (std::current_exception() != nullptr) return;
  char** const handled = lastcall_exceptions_of_this_thread();
  char* const ending = *handled;
  // Where the unwinder's header stands in what is handled is a secret, but always the same, and with an
  // exception of one's own it can be seen: right before the object that is thrown (2.2.1).
  std::ptrdiff_t offset = 0;
  try {
    throw 0;
  } catch (const int& thrown) {
    offset = reinterpret_cast<const char*>(&thrown) - *handled -
             static_cast<std::ptrdiff_t>(sizeof(_Unwind_Exception));
  }
  auto* const unwound = reinterpret_cast<_Unwind_Exception*>(ending + offset);
  // Who ends a thread gives the unwinder a function that says where to stop. Another language's exception has none.
  if (unwound->private_1 == 0) return;
  *handled = nullptr;  // it is no longer handled here: the end of the handler leaves it alone
  ::_Unwind_Resume_or_Rethrow(unwound);
  std::terminate();
}

#else

inline void let_thread_end() noexcept {}

#endif

#if LASTCALL_EXCEPTIONS

/// Stands for an exception of another language, of which nothing can be known.
struct ForeignException final : std::exception {
  const char* what() const noexcept override { return "an exception of another language"; }
};

/// The one that there is. Never destroyed: threads of tasks may throw while the process exits.
inline const std::exception_ptr& foreign_exception() noexcept {
  alignas(std::exception_ptr) static unsigned char place[sizeof(std::exception_ptr)];
  static const std::exception_ptr* const made =
      ::new (place) std::exception_ptr(std::make_exception_ptr(ForeignException()));
  return *made;
}

/// In a handler of (...), after let_thread_end(): what has been caught. Never null.
inline std::exception_ptr what_is_handled() noexcept {
  std::exception_ptr error = std::current_exception();
  if (error == nullptr) error = foreign_exception();
  return error;
}

#endif

// Calls something of the user's and returns what it threw, or null. Only the C library's own unwinding
// of a thread that ends itself (pthread_exit) passes through: who stops that ends the process.
template <class Function>
LASTCALL_NO_NULL_CHECK std::exception_ptr thrown_by(Function&& function) {
#if LASTCALL_EXCEPTIONS
  try {
    function();
  }
#if defined(__GLIBCXX__)
  catch (abi::__forced_unwind&) {
    throw;
  }
#endif
  catch (...) {
    let_thread_end();
    return what_is_handled();
  }
#else
  function();
#endif
  return nullptr;
}

}  // namespace lastcall::detail

#undef LASTCALL_UNNAMED_THREAD_END
