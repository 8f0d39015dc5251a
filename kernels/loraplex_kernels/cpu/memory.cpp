#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

// AddressSanitizer, where it is compiled in, is told which parts of larger areas may be used.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#endif

namespace loraplex {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GAP = 64;  // between two arrays, so that an overrun does not end in the next one
#else
constexpr size_t GAP = 0;
#endif
constexpr size_t ALIGNMENT = 64;
constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t REGION = size_t(64) << 20;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

void advise_huge_pages(void* begin, size_t size) {
#ifdef MADV_HUGEPAGE
    const size_t first = round_up(reinterpret_cast<uintptr_t>(begin), HUGE_PAGE);
    const size_t last = (reinterpret_cast<uintptr_t>(begin) + size) / HUGE_PAGE * HUGE_PAGE;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)size;
#endif
}

// One mapping and what is free in it. Pages never written take no memory.
struct Arena::Region {
    explicit Region(size_t size) : size(size) {
        mapped_size = size + HUGE_PAGE;
        mapped = mmap(nullptr, mapped_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        begin = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(mapped), HUGE_PAGE));
        advise_huge_pages(begin, size);
        free.emplace(0, size);
        ASAN_POISON_MEMORY_REGION(begin, size);
    }
    ~Region() {
        ASAN_UNPOISON_MEMORY_REGION(begin, size);
        munmap(mapped, mapped_size);
    }
    Region(const Region&) = delete;

    bool holds(const char* p) const { return p >= begin && p < begin + size; }

    // First fit, so that what is loaded in order lies in order.
    char* take(size_t bytes) {
        for (auto it = free.begin(); it != free.end(); ++it) {
            const auto [offset, length] = *it;
            if (length < bytes) continue;
            free.erase(it);
            if (length > bytes) free.emplace(offset + bytes, length - bytes);
            used.emplace(offset, bytes);
            return begin + offset;
        }
        return nullptr;
    }

    void give(char* p) {
        const auto taken = used.find(size_t(p - begin));
        auto [offset, length] = *taken;
        used.erase(taken);
        ASAN_POISON_MEMORY_REGION(p, length);
        auto after = free.lower_bound(offset);
        if (after != free.end() && after->first == offset + length) {
            length += after->second;
            after = free.erase(after);
        }
        if (after != free.begin()) {
            const auto before = std::prev(after);
            if (before->first + before->second == offset) {
                before->second += length;
                return;
            }
        }
        free.emplace(offset, length);
    }

    size_t size;
    size_t mapped_size;
    void* mapped;
    char* begin;
    std::map<size_t, size_t> free;  // offset → length
    std::map<size_t, size_t> used;
};

Arena::Arena() = default;
Arena::~Arena() = default;

void* Arena::allocate(size_t bytes) {
    std::lock_guard<std::mutex> lock(lock_);
    char* p = take(round_up(std::max(bytes, size_t(1)) + GAP, ALIGNMENT));
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
    return p;
}

char* Arena::take(size_t bytes) {
    for (const auto& region : regions_)
        if (char* p = region->take(bytes)) return p;
    regions_.push_back(std::make_unique<Region>(std::max(REGION, round_up(bytes, HUGE_PAGE))));
    return regions_.back()->take(bytes);
}

void Arena::release(void* pointer) {
    std::lock_guard<std::mutex> lock(lock_);
    char* p = static_cast<char*>(pointer);
    const auto region = std::find_if(regions_.begin(), regions_.end(), [&](const auto& r) { return r->holds(p); });
    (*region)->give(p);
    if ((*region)->used.empty()) regions_.erase(region);
}

Scratch::~Scratch() { std::free(data_); }

void* Scratch::bytes(size_t size) {
    if (size > size_) {
        std::free(data_);
        size_ = round_up(size, HUGE_PAGE / 32);
        data_ = std::aligned_alloc(ALIGNMENT, size_);
        if (!data_) {
            size_ = 0;
            throw std::bad_alloc();
        }
    }
    ASAN_UNPOISON_MEMORY_REGION(data_, size);
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(data_) + size, size_ - size);
    return data_;
}

}  // namespace loraplex
