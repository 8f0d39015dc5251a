// Which instruction sets this processor and this operating system have. Compiled into the portable library, which runs
// anywhere; the others ask for what they were compiled for.

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// AMX with bfloat16 and bytes, float16 arithmetic as all such processors have it, and the system's permission for this
// process to keep tiles, which it has to be asked for.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    constexpr unsigned AMX_BF16 = 1u << 22, AVX512_FP16 = 1u << 23, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
    constexpr unsigned NEEDED = AMX_BF16 | AVX512_FP16 | AMX_TILE | AMX_INT8;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace

// 0 any machine, 1 AVX2 with FMA (all of which have F16C), 2 AVX512 F/BW/DQ/VL, 3 that and AVX512-BF16 and -VNNI, 4
// that and AMX-BF16 and -INT8
EXPORT int loraplex_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        return has_tiles() ? 4 : 3;
    if (avx512) return 2;
    if (avx2) return 1;
#endif
    return 0;
}
