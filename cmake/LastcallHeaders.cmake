# Each header of lastcall is compiled alone, twice in a row, and each public one once more without
# exceptions and RTTI: a header that leans on what another happened to include does not compile here.
file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}/include"
     "${PROJECT_SOURCE_DIR}/include/lastcall/*.hpp")

set(alone_sources "")
foreach(header IN LISTS headers)
  string(MAKE_C_IDENTIFIER "${header}" name)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/headers/${name}.cpp")
  set(content "#include <${header}>\n#include <${header}>  // NOLINT(readability-duplicate-include)\n")
  file(CONFIGURE OUTPUT "${source}" CONTENT "${content}" @ONLY)
  list(APPEND alone_sources "${source}")
endforeach()

add_library(lastcall_headers_alone OBJECT ${alone_sources})
target_link_libraries(lastcall_headers_alone PRIVATE lastcall_developer)

set(public_sources ${alone_sources})
list(FILTER public_sources EXCLUDE REGEX "lastcall_detail_")
add_library(lastcall_headers_bare OBJECT ${public_sources})
target_link_libraries(lastcall_headers_bare PRIVATE lastcall_developer)
target_compile_options(lastcall_headers_bare PRIVATE -fno-exceptions -fno-rtti)
