# How lastcall's own tests, examples and benchmarks are compiled. Users of the library get none of it:
# everything hangs on the target lastcall_developer, which nobody outside this project links.
add_library(lastcall_developer INTERFACE)
target_link_libraries(lastcall_developer INTERFACE lastcall::lastcall)
target_compile_options(lastcall_developer INTERFACE -Wall -Wextra -Wpedantic -Wconversion
                                                    -Wsign-conversion -Wshadow)
if(LASTCALL_WARNINGS_AS_ERRORS)
  target_compile_options(lastcall_developer INTERFACE -Werror)
endif()

if(LASTCALL_PORTABLE)
  target_compile_definitions(lastcall_developer INTERFACE LASTCALL_PORTABLE)
endif()

# -O0: what the sanitizers add takes the optimiser far longer than it saves the tests (-O1: 35 s instead of 13
# for one of the larger ones, clang 14). -g1: line numbers for stacks, and no more than that.
if(LASTCALL_SANITIZE STREQUAL "address")
  # vptr: g++'s check of an object's type opens descriptors, and tests take them all away.
  set(sanitize -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined)
elseif(LASTCALL_SANITIZE STREQUAL "thread")
  set(sanitize -fsanitize=thread)
elseif(LASTCALL_SANITIZE)
  message(FATAL_ERROR "LASTCALL_SANITIZE is \"${LASTCALL_SANITIZE}\": neither address nor thread")
endif()
if(LASTCALL_SANITIZE)
  target_compile_options(lastcall_developer INTERFACE ${sanitize} -O0 -g1 -fno-omit-frame-pointer)
  target_link_options(lastcall_developer INTERFACE ${sanitize})
endif()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES AND PROJECT_IS_TOP_LEVEL)
  set(CMAKE_BUILD_TYPE RelWithDebInfo)
endif()
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
