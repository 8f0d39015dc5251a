// Threads that share the chunks of one operation.
//
// Workers spin briefly after an operation, because the next one of a step follows within microseconds, and then sleep.
//
// The chunks are divided into neighbouring ranges, one a thread, so that each reads memory that no other core has
// fetched ahead of itself; whoever has finished its own helps with the others'. A worker that is late (asleep, or its
// core taken by another process) is not waited for: its range is taken over, and the caller waits only for workers that
// have begun.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace loraplex {

class Pool {
  public:
    explicit Pool(int threads);  // the caller's included
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return int(workers_.size()) + 1; }

    // f(chunk) once for each chunk in [0, chunks), in any order, on any thread; returns when all are done.
    template <class F>
    void run(int64_t chunks, F&& f) {
        if (chunks <= 1 || workers_.empty()) {
            for (int64_t chunk = 0; chunk < chunks; ++chunk) f(chunk);
            return;
        }
        dispatch(chunks, [](void* context, int64_t chunk) { (*static_cast<F*>(context))(chunk); }, &f);
    }

  private:
    using Function = void (*)(void* context, int64_t chunk);

    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    void dispatch(int64_t chunks, Function function, void* context);
    void work(size_t first_range);
    void serve(size_t first_range);
    bool wait_for_job(uint64_t seen);

    static constexpr uint64_t OPEN = 1ull << 31;
    static constexpr uint64_t JOINED = OPEN - 1;

    // What a job is. Written while no worker is inside one.
    Function function_ = nullptr;
    void* context_ = nullptr;
    std::vector<Range> ranges_;

    alignas(64) std::atomic<uint64_t> state_{0};  // generation << 32 | open | workers that joined
    alignas(64) std::atomic<uint64_t> finished_{0};
    alignas(64) std::atomic<int> sleeping_{0};

    std::atomic<bool> stop_{false};
    std::mutex caller_;  // one operation at a time; a second caller computes alone
    std::mutex sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace loraplex
