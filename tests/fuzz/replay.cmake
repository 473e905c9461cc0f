# Every fuzz target over its committed seeds, with any compiler, as a test.
include(${CMAKE_CURRENT_LIST_DIR}/targets.cmake)
foreach(name ${QSHARD_FUZZ_TARGETS})
    add_executable(replay_${name} fuzz/fuzz_${name}.c fuzz/replay.c)
    target_link_libraries(replay_${name} PRIVATE qshard_core m)
    add_test(NAME replay_${name} COMMAND replay_${name} ${CMAKE_CURRENT_LIST_DIR}/corpus/${name})
    qs_test_properties(replay_${name} 120)
endforeach()
