# What every folder of tests shares: where Criterion is, the environment, time limits, what counts as a finding.
if(QSHARD_KERNELS_ONLY)
    pkg_check_modules(CRITERION IMPORTED_TARGET criterion)
    if(NOT CRITERION_FOUND)
        message(STATUS "no Criterion: the kernels' tests are left out")
    endif()
else()
    pkg_check_modules(CRITERION REQUIRED IMPORTED_TARGET criterion)
endif()

# Under sanitizers everything takes several times longer, and a finding fails the test even where Criterion or an expected
# failure would pass over what is printed.
set(QSHARD_TEST_SLOWDOWN 1)
set(QSHARD_TEST_FINDINGS)
if(QSHARD_SANITIZE)
    set(QSHARD_TEST_SLOWDOWN 4)
    set(QSHARD_TEST_FINDINGS FAIL_REGULAR_EXPRESSION "ERROR: [A-Za-z]*Sanitizer|runtime error: ")
endif()

# What Open MPI needs in a container or on a small machine, and what keeps the sanitizers to our own leaks.
set(QSHARD_TEST_ENV
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
    OMPI_MCA_btl_base_warn_component_unused=0
    OMPI_MCA_pml=ob1 # what a machine without a fast network chooses, but a quarter of a second sooner
    ASAN_OPTIONS=fast_unwind_on_malloc=0:detect_stack_use_after_return=1
    LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/lsan.supp:print_suppressions=0
    QSHARD_SOURCE_DIR=${PROJECT_SOURCE_DIR} QSHARD_BINARY_DIR=${PROJECT_BINARY_DIR}
    QSHARD_TEST_SLOWDOWN=${QSHARD_TEST_SLOWDOWN} PYTHONDONTWRITEBYTECODE=1)

# qs_test_properties(name seconds [property value...]): environment, time limit, what counts as a finding
function(qs_test_properties name seconds)
    math(EXPR limit "${seconds} * ${QSHARD_TEST_SLOWDOWN}")
    set_tests_properties(${name} PROPERTIES ENVIRONMENT "${QSHARD_TEST_ENV}" TIMEOUT ${limit} ${QSHARD_TEST_FINDINGS}
                         ${ARGN})
endfunction()
