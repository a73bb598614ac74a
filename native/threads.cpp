// Threads of a team: those of torch's OpenMP runtime where it was found, because its workers spin for milliseconds after
// every operator of torch, and threads of our own would wait for the cores that they hold. Otherwise, and in a forked
// child, where that runtime would wait for ever, a pool of our own: it follows the number asked for at every call, spins
// briefly between calls, and starts anew in a child, where no other thread exists.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <system_error>
#include <thread>

#include "qbert.h"

namespace qbert {
namespace {

constexpr int kSpins = 3000;  // some tens of microseconds: longer than the gap between two calls of a busy server
constexpr int kMostThreads = 256;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

struct Pool {
    std::mutex in_use;  // held by the caller that the workers serve
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<unsigned> job{0};
    std::atomic<int> running{0};
    int workers = 0;
    int wanted = 0;  // workers that take part in the job
    void (*body)(void*, int, Team&) = nullptr;
    void* context = nullptr;
    Team* team = nullptr;

    void work(int index, unsigned seen) {
        for (;;) {
            for (int spins = 0; job.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) pause();
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return job.load(std::memory_order_relaxed) != seen; });
            seen = job.load(std::memory_order_relaxed);
            if (index > wanted) continue;
            auto* const run = body;
            void* const with = context;
            Team& of = *team;
            lock.unlock();
            run(with, index, of);
            running.fetch_sub(1, std::memory_order_release);
        }
    }

    // Workers that exist afterwards; fewer than asked for where the system gives no more.
    int start(int count) {
        while (workers < count) {
            try {
                std::thread([this, index = workers + 1, last = job.load()] { work(index, last); }).detach();
            } catch (const std::system_error&) {
                break;
            }
            ++workers;
        }
        return workers < count ? workers : count;
    }
};

alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* pool = nullptr;

struct OpenMp {
    void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
} openmp;

void new_pool() { pool = new (storage) Pool(); }

void after_fork() {
    new_pool();
    openmp.parallel = nullptr;
}

Pool& the_pool() {
    static const bool once = [] {
        new_pool();
        pthread_atfork(nullptr, nullptr, after_fork);  // the child has no workers, and locks in an unknown state
        return true;
    }();
    (void)once;
    return *pool;
}

struct Region {
    void (*body)(void*, int, Team&);
    void* context;
    Team team;
};

void work_in_region(void* of) {
    Region& region = *static_cast<Region*>(of);
    region.team.resize(openmp.threads());  // the same number on all threads, possibly fewer than asked for
    region.body(region.context, openmp.thread(), region.team);
}

}  // namespace

void use_openmp(void* parallel, void* thread, void* threads) {
    the_pool();
    openmp.thread = reinterpret_cast<int (*)()>(thread);
    openmp.threads = reinterpret_cast<int (*)()>(threads);
    openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
}

void Team::barrier() {
    const int size = this->size();
    if (size == 1) return;
    const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
        if (spins < kSpins) pause();
        else sched_yield();
    }
}

void run_team(int threads, void (*body)(void*, int, Team&), void* context) {
    if (threads > kMostThreads) threads = kMostThreads;
    Pool& p = the_pool();
    std::unique_lock<std::mutex> use(p.in_use, std::defer_lock);
    if (threads <= 1 || !use.try_lock()) {
        Team alone(1);
        body(context, 0, alone);
        return;
    }
    if (openmp.parallel) {
        Region region{body, context, Team(threads)};
        openmp.parallel(work_in_region, &region, static_cast<unsigned>(threads), 0);
        return;
    }
    const int workers = p.start(threads - 1);
    Team team(workers + 1);
    if (workers == 0) {
        body(context, 0, team);
        return;
    }
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.body = body, p.context = context, p.team = &team, p.wanted = workers;
        p.running.store(workers, std::memory_order_relaxed);
        p.job.fetch_add(1, std::memory_order_release);
    }
    p.wake.notify_all();
    body(context, 0, team);
    for (int spins = 0; p.running.load(std::memory_order_acquire) != 0; ++spins) {
        if (spins < kSpins) pause();
        else sched_yield();
    }
}

}  // namespace qbert
