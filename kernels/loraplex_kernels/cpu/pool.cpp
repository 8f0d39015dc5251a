#include "pool.h"

#include <algorithm>
#include <chrono>

namespace loraplex {

namespace {

// Longer than the time between two operations of a step, shorter than anybody else's time slice.
constexpr auto SPIN = std::chrono::microseconds(150);
constexpr int SPINS_PER_CLOCK_READ = 64;
constexpr int SPINS_BEFORE_YIELD = 1 << 14;
constexpr int MAX_RANGES = 16;  // setting them up costs a cache miss each

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : ranges_(size_t(std::clamp(threads, 1, MAX_RANGES))) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(size_t(i) % ranges_.size()); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(sleep_);
        stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::dispatch(int64_t chunks, Function function, void* context) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller.owns_lock()) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) function(context, chunk);
        return;
    }
    function_ = function;
    context_ = context;
    const auto count = int64_t(ranges_.size());
    for (int64_t i = 0; i < count; ++i) {
        ranges_[size_t(i)].next.store(chunks * i / count, std::memory_order_relaxed);
        ranges_[size_t(i)].end = chunks * (i + 1) / count;
    }
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t generation = state_.load(std::memory_order_relaxed) >> 32;
    state_.store((generation + 1) << 32 | OPEN, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
    }
    work(0);
    const uint64_t joined = state_.fetch_and(~OPEN, std::memory_order_acq_rel) & JOINED;
    for (int spins = 0; finished_.load(std::memory_order_acquire) != joined; ++spins) {
        if (spins < SPINS_BEFORE_YIELD)
            pause();
        else
            std::this_thread::yield();
    }
}

void Pool::work(size_t first_range) {
    for (size_t i = 0; i < ranges_.size(); ++i) {
        Range& range = ranges_[(first_range + i) % ranges_.size()];
        for (;;) {
            const int64_t chunk = range.next.fetch_add(1, std::memory_order_relaxed);
            if (chunk >= range.end) break;
            function_(context_, chunk);
        }
    }
}

void Pool::serve(size_t first_range) {
    uint64_t seen = 0;
    while (wait_for_job(seen)) {
        uint64_t state = state_.load(std::memory_order_acquire);
        seen = state >> 32;
        bool joined = false;
        while (!joined && (state & OPEN) && state >> 32 == seen)
            joined = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel);
        if (!joined) continue;
        work(first_range);
        finished_.fetch_add(1, std::memory_order_release);
    }
}

// True when there is a job newer than `seen`, false when the pool ends.
bool Pool::wait_for_job(uint64_t seen) {
    const auto newer = [&] {
        return state_.load(std::memory_order_seq_cst) >> 32 != seen;
    };
    const auto deadline = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK_READ; ++i) {
            if (state_.load(std::memory_order_relaxed) >> 32 != seen) return !stop_.load();
            pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return newer() || stop_.load(); });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    return !stop_.load();
}

}  // namespace loraplex
