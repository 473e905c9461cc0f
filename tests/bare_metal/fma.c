/* The processor's own fused multiply-add, for the portable loops: runtime.c must run before AVX is
 * known to be there. */
float fmaf(float a, float b, float c);
float fmaf(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}
