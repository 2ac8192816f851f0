# lastcall_catch: Catch2 with a main(), 3.x or 2.13, whichever the system has; fetched if it has none.
# Point FETCHCONTENT_SOURCE_DIR_CATCH2 at a checkout to compile Catch2 along (another standard library,
# another processor).
if(NOT FETCHCONTENT_SOURCE_DIR_CATCH2)
  find_package(Catch2 3 QUIET)
  if(NOT Catch2_FOUND)
    find_package(Catch2 2.13 QUIET)
  endif()
endif()
if(NOT Catch2_FOUND)
  message(STATUS "Catch2 was not found here: fetching it")
  include(FetchContent)
  FetchContent_Declare(Catch2 GIT_REPOSITORY https://github.com/catchorg/Catch2.git GIT_TAG v3.7.1)
  FetchContent_MakeAvailable(Catch2)
  list(APPEND CMAKE_MODULE_PATH "${catch2_SOURCE_DIR}/extras")
  set(Catch2_VERSION 3.7.1)
endif()
include(Catch)

# Objects, not an archive: they have to be in every executable, asked for or not.
add_library(lastcall_catch OBJECT "${PROJECT_SOURCE_DIR}/tests/support/catch_main.cpp")
if(TARGET Catch2::Catch2WithMain)
  target_link_libraries(lastcall_catch PUBLIC lastcall_developer Catch2::Catch2WithMain)
else()
  target_link_libraries(lastcall_catch PUBLIC lastcall_developer Catch2::Catch2)
endif()

# g++-12 warns of libstdc++'s own std::function in Catch2's main() when both are optimised.
set_source_files_properties("${PROJECT_SOURCE_DIR}/tests/support/catch_main.cpp"
                            PROPERTIES COMPILE_OPTIONS -w)

# A third of a test's compile time is Catch2's header and lastcall's: they are compiled once for all of them.
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/precompiled.cpp" CONTENT "// Holds a precompiled header.\n")
add_library(lastcall_catch_precompiled OBJECT "${CMAKE_CURRENT_BINARY_DIR}/precompiled.cpp")
target_link_libraries(lastcall_catch_precompiled PRIVATE lastcall_catch)
target_precompile_headers(lastcall_catch_precompiled PRIVATE
                          "${PROJECT_SOURCE_DIR}/tests/support/catch.hpp" <lastcall/lastcall.hpp>)

# With clang so is the code of what is inline there: another half of a test's compile time. The precompiled
# header becomes an object as well, and whoever compiles with the one has to be linked with the other.
set(lastcall_precompiled_code "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang"
   AND CMAKE_GENERATOR MATCHES "Makefiles"
   AND NOT CMAKE_DISABLE_PRECOMPILE_HEADERS)
  target_compile_options(lastcall_catch_precompiled PRIVATE -fpch-codegen -fpch-instantiate-templates)
  set(precompiled "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/lastcall_catch_precompiled.dir/cmake_pch.hxx.pch")
  set(lastcall_precompiled_code "${CMAKE_CURRENT_BINARY_DIR}/precompiled_code.o")
  string(TOUPPER "CMAKE_CXX_FLAGS_${CMAKE_BUILD_TYPE}" flags)
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CXX_FLAGS} ${${flags}}")
  add_custom_command(
    OUTPUT "${lastcall_precompiled_code}"
    COMMAND "${CMAKE_CXX_COMPILER}" ${flags} "$<TARGET_PROPERTY:lastcall_catch_precompiled,COMPILE_OPTIONS>"
            -Wno-unused-command-line-argument -c "${precompiled}" -o "${lastcall_precompiled_code}"
    DEPENDS lastcall_catch_precompiled "${precompiled}"
    COMMAND_EXPAND_LISTS VERBATIM)
  add_custom_target(lastcall_precompiled_code DEPENDS "${lastcall_precompiled_code}")
endif()

message(STATUS "Tests use Catch2 ${Catch2_VERSION}")
