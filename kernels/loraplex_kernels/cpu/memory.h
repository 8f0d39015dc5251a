// Memory for weights: aligned, and on transparent huge pages, because a decode step walks over all of it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace loraplex {

class Arena {
  public:
    Arena();
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // At least `bytes`, 64-byte aligned, contents undefined. Throws std::bad_alloc.
    void* allocate(size_t bytes);
    void release(void* pointer);

  private:
    struct Region;

    char* take(size_t bytes);

    std::mutex lock_;  // adapters are released by whichever thread drops the last reference
    std::vector<std::unique_ptr<Region>> regions_;
};

// Ask for huge pages in what lies whole within [begin, begin + size). Advice: small pages do as well, only slower.
void advise_huge_pages(void* begin, size_t size);

// An array in an arena, given back when it goes out of scope.
template <class T>
class Array {
  public:
    Array() = default;
    Array(Arena& arena, size_t size)
        : arena_(&arena), data_(static_cast<T*>(arena.allocate(size * sizeof(T)))), size_(size) {}
    Array(Array&& other) noexcept { swap(other); }
    Array& operator=(Array&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Array() {
        if (data_) arena_->release(data_);
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }

  private:
    void swap(Array& other) noexcept {
        std::swap(arena_, other.arena_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }

    Arena* arena_ = nullptr;
    T* data_ = nullptr;
    size_t size_ = 0;
};

// Room for one thread's intermediate results. Grows to the largest request and stays.
class Scratch {
  public:
    template <class T>
    T* get(size_t size) {
        return static_cast<T*>(bytes(size * sizeof(T)));
    }
    ~Scratch();

  private:
    void* bytes(size_t size);

    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace loraplex
