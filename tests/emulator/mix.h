/* Numbers that look random and are the same in every run: splitmix64's last steps (Steele, Lea &
 * Flood 2014, doi:10.1145/2660193.2660195). */
#ifndef QS_EMULATOR_MIX_H
#define QS_EMULATOR_MIX_H

#include <stdint.h>

namespace emu
{

static inline uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t x = a + 0x9e3779b97f4a7c15u * (b + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

} // namespace emu

#endif
