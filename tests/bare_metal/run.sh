#!/usr/bin/env bash
# Compares the loops for AVX-512, AVX512-BF16, AVX512-FP16 and AMX with portable C (tests/cases/isa.c, pairs.c, half.c and tile.c, as they are) on a
# processor that has the instructions but need not exist: Bochs, an emulator, starts it from a disk of our own, without an
# operating system.
#
#   tests/bare_metal/run.sh BOCHS        BOCHS: a built source tree of Bochs with AVX512-FP16 and AMX (3.0 or later;
#                                        ./configure --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx --with-nogui)
#
# Not part of the tests that CI runs: no distribution packages such a Bochs. Takes some seconds. Exit 0 if all bits are equal.
set -euo pipefail
[ $# -eq 1 ] || {
    sed -n '6p' "$0" >&2
    exit 2
}
bochs=$(realpath "$1")
top=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The flags of the kernels (kernels/cpu/isa.cmake), on a machine without a loader or a safe stack below the stack pointer.
kernel=(-std=gnu11 -O3 -DNDEBUG -ffp-contract=off -fno-math-errno -I"$top" -I"$top/src")
bare=(-fno-pic -fno-pie -mcmodel=small -mno-red-zone -fno-stack-protector -fno-asynchronous-unwind-tables -ffunction-sections
    -fdata-sections)
avx512=(-mavx512f -mavx512bw -mavx512vl -mfma -mf16c -DQS_HALF_ASSEMBLER -DQS_TILE_ASSEMBLER)
compile() {
    gcc "${kernel[@]}" "${bare[@]}" -c "$@"
}
compile "$top"/kernels/cpu/{choice,half,tile,pairs,isa,isa_portable}.c "$top"/src/base/{dtype,rng}.c "$top"/src/quant/{nf4,dynamic_map}.c
compile -mavx2 -mfma -mf16c "$top"/kernels/cpu/{half_avx2,pairs_avx2,tile_avx2,isa_avx2}.c
compile "${avx512[@]}" -mprefer-vector-width=512 "$top/kernels/cpu/isa_avx512.c"
compile "${avx512[@]}" "$top/kernels/cpu/half_avx512.c" "$top/kernels/cpu/tile_amx.c"
compile "${avx512[@]}" -mavx512bf16 "$top/kernels/cpu/pairs_avx512.c"
compile -ffreestanding "$top/tests/bare_metal/runtime.c"
compile -mfma "$top/tests/bare_metal/fma.c"
compile "$top/tests/bare_metal/entry.S"

cat >bochsrc <<RC
cpu: model=sapphire_rapids, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=$bochs/bios/BIOS-bochs-latest
vgaromimage: file=$bochs/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=disk, path=disk.img, mode=flat, cylinders=20, heads=16, spt=63, biosdetect=auto
boot: disk
com1: enabled=1, mode=file, dev=serial.txt
log: bochs.log
display_library: nogui
clock: sync=none
RC

# Bochs (3.1 in the making) turns differences of equal exponents into 0 that are normal numbers below 2^-125 (s_subMagsF32.cc): rounds with such
# numbers are left out, unless that is mended (BOCHS_MENDED=1).
rounds=(-DQS_TILE_NO_UNDERFLOW)
[ -z "${BOCHS_MENDED:-}" ] || rounds=(-UQS_TILE_NO_UNDERFLOW)

# CASE OBJECT..: the case as the machine's only program.
run_case() {
    compile -fno-builtin-printf "${rounds[@]}" -Dmain=case_main "$top/tests/cases/$1.c" -o case.o
    gcc -static -nostdlib -no-pie -Wl,--gc-sections,--build-id=none,-T,"$top/tests/bare_metal/link.ld" -o program.elf \
        entry.o case.o "${@:2}" runtime.o fma.o -lgcc
    objcopy -O binary -j .all program.elf program.bin

    pieces=$((($(stat -c %s program.bin) + 32767) / 32768))
    gcc -Wa,--defsym,CHUNKS=$pieces -c "$top/tests/bare_metal/boot.S"
    ld -Ttext 0x7c00 --oformat binary -e _start -o boot.bin boot.o
    cat boot.bin program.bin >disk.img
    truncate -s $((20 * 16 * 63 * 512)) disk.img

    rm -f serial.txt
    timeout 120 "$bochs/bochs" -q -f bochsrc </dev/null >bochs.out 2>&1 || true
    touch serial.txt
    cat serial.txt
    grep -qx 'exit 0' serial.txt || {
        echo "bare_metal: $1: no 'exit 0' from the emulated machine" >&2
        exit 1
    }
}
run_case isa isa.o isa_portable.o isa_avx2.o isa_avx512.o rng.o dtype.o nf4.o dynamic_map.o
run_case pairs choice.o pairs.o pairs_avx2.o pairs_avx512.o isa.o isa_portable.o isa_avx2.o isa_avx512.o rng.o dtype.o nf4.o dynamic_map.o
run_case half choice.o isa.o isa_portable.o half.o half_avx2.o half_avx512.o dtype.o nf4.o dynamic_map.o
run_case tile choice.o isa.o isa_portable.o tile.o tile_avx2.o tile_amx.o
