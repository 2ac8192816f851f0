# The benchmarks, lastcall beside its peers in one run: cmake -P cmake/bench.cmake
# Builds them with optimisation in build/bench, runs them in a shuffled order, prints a table of medians and
# writes all batches to build/bench/bench.json; then whole processes, to process.json. Takes a quarter of an
# hour, and wants a machine that does nothing else.
# cmake -DREPETITIONS=3 -DFILTER=guard -P cmake/bench.cmake: fewer batches, fewer cases, no processes.
cmake_minimum_required(VERSION 3.22)
include("${CMAKE_CURRENT_LIST_DIR}/Prerequisites.cmake")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
set(build "${source}/build/bench")
if(NOT DEFINED REPETITIONS)
  set(REPETITIONS 15)
endif()
if(NOT DEFINED FILTER)
  set(FILTER ".*")
endif()

lastcall_prerequisites(compiler make benchmark)
lastcall_run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles" --log-level=WARNING
             -DCMAKE_BUILD_TYPE=Release -DLASTCALL_BUILD_TESTS=OFF -DLASTCALL_BUILD_EXAMPLES=OFF
             -DLASTCALL_BUILD_BENCHMARKS=ON)
lastcall_run("${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS})

# The peers that are other languages' and libraries'. What can't be had is a line that says so.
lastcall_run("${CMAKE_COMMAND}" "-DBUILD_DIR=${build}/peers" -P "${source}/tests/bench/peers/peers.cmake")
file(STRINGS "${build}/peers/peers.txt" lines)
set(peers "")
foreach(line IN LISTS lines)
  if(line MATCHES "^skipped: ")
    message(STATUS "${line}")
  else()
    list(APPEND peers "${line}")
  endif()
endforeach()

lastcall_run("${build}/tests/bench/bench_primitives" "--json=${build}/bench.json"
             "--repetitions=${REPETITIONS}" "--benchmark_filter=${FILTER}" ${peers})
if(FILTER STREQUAL ".*")
  lastcall_run("${build}/tests/bench/process/bench_process" "--rounds=${REPETITIONS}"
               "--peers=${build}/peers/peers.txt" "--json=${build}/process.json")
endif()
