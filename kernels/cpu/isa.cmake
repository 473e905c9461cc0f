# The inner loops are compiled once per instruction set and chosen at run time (kernels/cpu/isa.c). They are optimized in
# debug and sanitizer builds too: at -O0 the tests would take minutes.
set(QSHARD_KERNEL_OPTIONS -O3 -Wno-psabi)
set_source_files_properties(kernels/cpu/isa_portable.c PROPERTIES COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set_source_files_properties(kernels/cpu/isa_avx2.c kernels/cpu/half_avx2.c kernels/cpu/pairs_avx2.c kernels/cpu/tile_avx2.c PROPERTIES
        COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};-mavx2;-mfma;-mf16c")
    set_source_files_properties(kernels/cpu/isa_avx512.c PROPERTIES
        COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl;-mfma;-mf16c;-mprefer-vector-width=512")
    include(CheckCCompilerFlag)
    check_c_compiler_flag(-mavx512bf16 QSHARD_COMPILER_HAS_AVX512_BF16)
    if(QSHARD_COMPILER_HAS_AVX512_BF16)
        set_source_files_properties(kernels/cpu/pairs_avx512.c PROPERTIES
            COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl;-mavx512bf16;-mfma;-mf16c;-mprefer-vector-width=512")
    endif()
endif()
set_source_files_properties(kernels/cpu/pairs.c PROPERTIES COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS}")

# The fp16 product (kernels/cpu/half_avx512.c) is assembly; binutils before 2.38 do not know its instructions.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    include(CheckCSourceCompiles)
    check_c_source_compiles("int main(void) { __asm__ volatile(\"vfmadd231ph (%%rax)%{1to32%}, %%zmm1, %%zmm2\" : :); return 0; }"
        QSHARD_ASSEMBLER_HAS_FP16)
    set(QSHARD_FP16_OPTIONS -mavx512f -mavx512bw -mavx512vl -mfma -mf16c)
    if(QSHARD_ASSEMBLER_HAS_FP16)
        list(APPEND QSHARD_FP16_OPTIONS -DQS_HALF_ASSEMBLER)
    endif()
    set_source_files_properties(kernels/cpu/half_avx512.c PROPERTIES
        COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};${QSHARD_FP16_OPTIONS}")
endif()
set_source_files_properties(kernels/cpu/half.c PROPERTIES COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS}")

# So is the bf16 product on AMX; binutils before 2.34 do not know its instructions.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    check_c_source_compiles("int main(void) { __asm__ volatile(\"tdpbf16ps %%tmm1, %%tmm2, %%tmm3\" : :); return 0; }"
        QSHARD_ASSEMBLER_HAS_AMX)
    set(QSHARD_AMX_OPTIONS -mavx512f -mavx512bw -mavx512vl)
    if(QSHARD_ASSEMBLER_HAS_AMX)
        list(APPEND QSHARD_AMX_OPTIONS -DQS_TILE_ASSEMBLER)
    endif()
    set_source_files_properties(kernels/cpu/tile_amx.c PROPERTIES
        COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};${QSHARD_AMX_OPTIONS}")
endif()
set_source_files_properties(kernels/cpu/tile.c PROPERTIES COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS}")
