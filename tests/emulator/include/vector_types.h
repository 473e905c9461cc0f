/* CUDA's small vectors, with CUDA's alignments. C and C++. */
#ifndef QS_EMULATOR_VECTOR_TYPES_H
#define QS_EMULATOR_VECTOR_TYPES_H

#define QS_EMU_VECTOR(name, type, bytes, ...)                                                      \
    struct name {                                                                                  \
        type __VA_ARGS__;                                                                          \
    } __attribute__((aligned(bytes)));                                                             \
    typedef struct name name

QS_EMU_VECTOR(char4, signed char, 4, x, y, z, w);
QS_EMU_VECTOR(uchar4, unsigned char, 4, x, y, z, w);
QS_EMU_VECTOR(ushort2, unsigned short, 4, x, y);
QS_EMU_VECTOR(ushort4, unsigned short, 8, x, y, z, w);
QS_EMU_VECTOR(int2, int, 8, x, y);
QS_EMU_VECTOR(int4, int, 16, x, y, z, w);
QS_EMU_VECTOR(uint2, unsigned int, 8, x, y);
QS_EMU_VECTOR(uint3, unsigned int, 4, x, y, z);
QS_EMU_VECTOR(uint4, unsigned int, 16, x, y, z, w);
QS_EMU_VECTOR(float2, float, 8, x, y);
QS_EMU_VECTOR(float3, float, 4, x, y, z);
QS_EMU_VECTOR(float4, float, 16, x, y, z, w);
QS_EMU_VECTOR(double2, double, 16, x, y);
QS_EMU_VECTOR(longlong2, long long, 16, x, y);
QS_EMU_VECTOR(ulonglong2, unsigned long long, 16, x, y);

struct dim3 {
    unsigned int x, y, z;
#ifdef __cplusplus
    constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1)
        : x(x_), y(y_), z(z_)
    {
    }
#endif
};
typedef struct dim3 dim3;

#define QS_EMU_MAKE2(name, type)                                                                   \
    static inline name make_##name(type x, type y)                                                 \
    {                                                                                              \
        name out;                                                                                  \
        out.x = x;                                                                                 \
        out.y = y;                                                                                 \
        return out;                                                                                \
    }
#define QS_EMU_MAKE4(name, type)                                                                   \
    static inline name make_##name(type x, type y, type z, type w)                                 \
    {                                                                                              \
        name out;                                                                                  \
        out.x = x;                                                                                 \
        out.y = y;                                                                                 \
        out.z = z;                                                                                 \
        out.w = w;                                                                                 \
        return out;                                                                                \
    }

QS_EMU_MAKE4(char4, signed char)
QS_EMU_MAKE4(uchar4, unsigned char)
QS_EMU_MAKE2(ushort2, unsigned short)
QS_EMU_MAKE4(ushort4, unsigned short)
QS_EMU_MAKE2(int2, int)
QS_EMU_MAKE4(int4, int)
QS_EMU_MAKE2(uint2, unsigned int)
QS_EMU_MAKE4(uint4, unsigned int)
QS_EMU_MAKE2(float2, float)
QS_EMU_MAKE4(float4, float)
QS_EMU_MAKE2(double2, double)
QS_EMU_MAKE2(longlong2, long long)
QS_EMU_MAKE2(ulonglong2, unsigned long long)

#undef QS_EMU_VECTOR
#undef QS_EMU_MAKE2
#undef QS_EMU_MAKE4

#endif
