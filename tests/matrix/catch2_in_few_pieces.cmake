# For Catch2's own project (CMAKE_PROJECT_INCLUDE): it is compiled in as few pieces as it can be. Its project
# stays the top one, since as a part of another it installs no package that could be found.
function(lastcall_few_pieces)
  set_target_properties(Catch2 PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
  # tests/support/catch_main.cpp stands in for this one, so it has to be a member of its own.
  set_property(
    SOURCE "${CMAKE_SOURCE_DIR}/src/catch2/internal/catch_fatal_condition_handler.cpp"
    TARGET_DIRECTORY Catch2
    PROPERTY SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()
cmake_language(DEFER CALL lastcall_few_pieces)
