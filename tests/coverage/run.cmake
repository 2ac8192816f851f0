# Line and branch coverage of include/ by the unit, process, conformance and starvation tests:
#
#     cmake -P tests/coverage/run.cmake
#
# prints it for each header and in total, and every line that no test runs. It fails below 97 % of the
# lines, and for a line that is neither run nor explained in tests/coverage/explained.txt. A header is part
# of many programs: a line counts as run if any of them ran it. The build tree is build/coverage.
#
#     cmake -DLASTCALL_COVERAGE_REPORT_ONLY=ON -P tests/coverage/run.cmake
#
# reads what the last run left there.
cmake_minimum_required(VERSION 3.22)
include("${CMAKE_CURRENT_LIST_DIR}/../../cmake/Prerequisites.cmake")
cmake_path(SET source NORMALIZE "${CMAKE_CURRENT_LIST_DIR}/../..")
cmake_path(GET source PARENT_PATH source)
set(build "${source}/build/coverage")

set(lastcall_python3 "Python 3" python3 program python3)
lastcall_prerequisites(compiler make catch2 python3)
find_program(python3 python3 REQUIRED)

# The compiler and its gcov are a pair.
if(DEFINED ENV{CXX})
  set(compiler "$ENV{CXX}")
else()
  find_program(compiler NAMES g++-12 g++ REQUIRED)
endif()
execute_process(COMMAND "${compiler}" -dumpversion OUTPUT_VARIABLE version
                OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE "\\..*" "" version "${version}")
find_program(gcov NAMES gcov-${version} gcov REQUIRED)

# Atomic: a counter that two threads share may otherwise lose its only step.
set(flags --coverage -fprofile-update=atomic -fprofile-abs-path)
list(JOIN flags " " flags_text)
set(tests_failed FALSE)
if(NOT LASTCALL_COVERAGE_REPORT_ONLY)
  file(MAKE_DIRECTORY "${build}/alone")
  lastcall_run("${compiler}" -c -O0 "${source}/tests/coverage/exits.cpp" -o "${build}/alone/exits.o")
  lastcall_run("${CMAKE_COMMAND}" -E chdir "${build}/alone" "${compiler}" -std=c++20 -pthread -O0 ${flags}
               -fkeep-inline-functions -I "${source}/include" -c "${source}/tests/coverage/all_headers.cpp"
               -o all_headers.o)
  lastcall_run(
    "${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles" -DCMAKE_BUILD_TYPE=Debug
    "-DCMAKE_CXX_COMPILER=${compiler}" -DLASTCALL_BUILD_EXAMPLES=OFF "-DCMAKE_CXX_FLAGS_DEBUG=-O0"
    "-DCMAKE_CXX_FLAGS=${flags_text}"
    "-DCMAKE_EXE_LINKER_FLAGS=${build}/alone/exits.o -ldl")
  # Of each folder what tests/CMakeLists.txt makes of its *_test.cpp. The programs beside them measure
  # times, or fail one system call after the other, and run nothing that these don't.
  set(targets "")
  foreach(folder unit process conformance starvation)
    file(GLOB tests "${source}/tests/${folder}/*_test.cpp")
    foreach(test IN LISTS tests)
      cmake_path(GET test STEM name)
      string(REGEX REPLACE "(_${folder})?_test$" "" name "${name}")
      list(APPEND targets ${folder}_${name})
    endforeach()
  endforeach()
  lastcall_run("${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS} --target ${targets})

  file(GLOB_RECURSE old "${build}/*.gcda")
  if(old)
    file(REMOVE ${old})
  endif()
  # A process that is killed while it writes leaves a file that the next can't add to, and which says so on
  # standard error, where some tests look.
  set(ENV{GCOV_ERROR_FILE} "${build}/gcov_errors.log")
  # Where the allocator is held for ever nothing can be written, and that is waited for (exits.cpp).
  # Instrumented programs are slow, and many tests bound how long something may take. What a counter for
  # every line takes is not what an idle coordinator takes.
  execute_process(
    COMMAND "${CMAKE_CTEST_COMMAND}" --test-dir "${build}" -L "^(unit|process|conformance|starvation)$"
            -E "promise_table|starvation/syscalls|less than 100 KiB|late_report/a run.. that comes" --parallel ${LASTCALL_JOBS}
            --timeout 300 --repeat until-pass:3 --no-tests=error --output-on-failure
            --output-log "${build}/ctest.log"
    RESULT_VARIABLE tests_failed OUTPUT_QUIET)
endif()

file(STRINGS "${build}/ctest.log" summary REGEX "tests passed|\\((Failed|Timeout|SEGFAULT|ILLEGAL|.*Exception.*)\\)$")
list(JOIN summary "\n" summary)
message("${summary}")
execute_process(COMMAND "${python3}" "${source}/tests/coverage/report.py" --gcov "${gcov}" --tree "${build}"
                        --include "${source}/include" --explained "${source}/tests/coverage/explained.txt"
                RESULT_VARIABLE report_failed)
if(tests_failed OR report_failed)
  message(FATAL_ERROR "coverage: not as it should be, see above")
endif()
