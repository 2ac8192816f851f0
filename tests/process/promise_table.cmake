# The promise, in its long form: cmake -P tests/process/promise_table.cmake
# Each adversary runs 20 times, and has the grace period and 100 ms, not one more: for a machine that has
# nothing else to do. A quarter of an hour. The table: the bound, the worst time of the 20, how much that
# was over what was granted before those 100 ms, how the process ended, whether who hung was named.
#   cmake -DRUNS=3 -DONLY=worker -P ...    three runs each of those whose names begin with "worker"
# The build tree is build/promise.
cmake_minimum_required(VERSION 3.22)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
cmake_path(GET source PARENT_PATH source)
include("${source}/cmake/Prerequisites.cmake")
set(build "${source}/build/promise")
if(NOT DEFINED RUNS)
  set(RUNS 20)
endif()
set(only "")
if(DEFINED ONLY)
  set(only --only "${ONLY}")
endif()

lastcall_prerequisites(compiler make catch2)
lastcall_run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles" --log-level=WARNING
             -DCMAKE_BUILD_TYPE=Debug -DLASTCALL_BUILD_EXAMPLES=OFF)
lastcall_run("${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS}
             --target process_promise_table)
lastcall_run("${build}/tests/process/process_promise_table" --runs ${RUNS} --strict
             --jobs ${LASTCALL_JOBS} ${only})
