# Builds everything and passes the tests: cmake -P cmake/test.cmake
# The build tree is build/test. CXX and CXXFLAGS of the environment are heeded when it is first made.
cmake_minimum_required(VERSION 3.22)
include("${CMAKE_CURRENT_LIST_DIR}/Prerequisites.cmake")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
set(build "${source}/build/test")

# Without what a debugger wants: it is a third of the compile time.
set(flags -g0)
lastcall_prerequisites(compiler make pkg-config catch2 httplib sqlite3 OPTIONAL spdlog prometheus)
lastcall_run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles"
             -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=${flags}")
lastcall_run("${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS})
# Many tests bound how long a real process may take: on a machine that is busy with something else one may
# need a second try.
lastcall_run("${CMAKE_CTEST_COMMAND}" --test-dir "${build}" --output-on-failure --no-tests=error
             --parallel ${LASTCALL_JOBS} --timeout 120 --repeat until-pass:2)
