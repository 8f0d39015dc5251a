// Which instruction sets this processor and this operating system have. Compiled into the portable library, which runs
// anywhere; the others ask for what they were compiled for.

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0 any machine, 1 AVX2 with FMA (all of which have F16C), 2 AVX512 F/BW/DQ/VL, 3 that and AVX512-BF16
EXPORT int loraplex_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
    if (avx512) return 2;
    if (avx2) return 1;
#endif
    return 0;
}
