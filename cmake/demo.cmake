# The main job: cmake -P cmake/demo.cmake
# Builds order_service (HTTP in, SQLite out), puts clients on it, sends it a SIGTERM in the middle, and
# checks that every order it acknowledged is in the database. The build tree is build/demo.
cmake_minimum_required(VERSION 3.22)
include("${CMAKE_CURRENT_LIST_DIR}/Prerequisites.cmake")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
set(build "${source}/build/demo")

lastcall_prerequisites(compiler make pkg-config httplib sqlite3)
message(STATUS "Building order_service and its clients")
lastcall_run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles" --log-level=WARNING
             -DCMAKE_BUILD_TYPE=Release -DLASTCALL_BUILD_TESTS=OFF)
lastcall_run("${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS}
             --target order_service order_load)
lastcall_run("${build}/examples/order_service/order_load"
             "${build}/examples/order_service/order_service")
