// A team of threads that walks through a step's phases together, and in which nobody waits for a thread that has no
// core: whoever is there takes the next chunk of the phase, and only chunks that somebody has taken are waited for.
//
// A phase is a number of independent chunks; phases follow each other. One word holds which job, which phase and which
// chunk is next; a chunk is taken by a compare-and-swap of that word, so that a thread which comes late, or wakes up in
// a later job, finds out before it touches anything.

#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace flyball {

class Team {
  public:
    static constexpr int CHUNK_BITS = 24, PHASE_BITS = 16;
    static constexpr int PAUSES = 400;  // some 20 us; then the core is offered to others at every look

    // One thread's walk through a job.
    class Walk {
      public:
        int slot() const { return slot_; }  // 0 for the caller, then the helpers

        // Do `work(i)` for every i of [0, count) once, among all; returns when all are done, at once in a job that ended.
        template <class Work>
        void phase(int64_t count, Work&& work) {
            const uint64_t mine = (job_ << PHASE_BITS) | phase_;
            uint64_t word = team_.next_.load(std::memory_order_acquire);
            int pauses = 0;
            while (count > 0 && (word >> CHUNK_BITS) == mine) {
                const int64_t chunk = (int64_t)(word & ((1u << CHUNK_BITS) - 1));
                if (chunk >= count) {
                    if (++pauses < PAUSES) _mm_pause(); else sched_yield();
                    word = team_.next_.load(std::memory_order_acquire);
                    continue;
                }
                if (!team_.next_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
                work(chunk);
                pauses = 0;
                if (team_.done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
                    team_.done_.store(0, std::memory_order_relaxed);
                    team_.next_.store((mine + 1) << CHUNK_BITS, std::memory_order_release);
                }
                word = team_.next_.load(std::memory_order_acquire);
            }
            if (count > 0) ++phase_;
        }

      private:
        friend class Team;
        Walk(Team& team, uint64_t job, int slot) : team_(team), job_(job), slot_(slot) {}
        Team& team_;
        uint64_t job_, phase_ = 0;
        int slot_;
    };

    using Program = std::function<void(Walk&)>;

    // The process's one team; jobs of several callers follow each other.
    static Team& instance() {
        static Team* team = new Team;  // never destroyed: its threads may outlive static destructors
        return *team;
    }

    // Run `program` on the caller and up to `threads` - 1 helpers; returns when every phase is done. A helper that was
    // late may still hold the program: it is shared, and what it points to stays until `drain`.
    void run(int threads, Program program) {
        const std::lock_guard<std::mutex> alone(callers_);
        while ((int)helpers_.size() + 1 < threads) {
            const int slot = (int)helpers_.size() + 1;
            helpers_.emplace_back([this, slot] { serve(slot); });
            helpers_.back().detach();
        }
        auto shared = std::make_shared<const Program>(std::move(program));
        const uint64_t job = (job_.load(std::memory_order_relaxed) + 1) & JOB_MASK;
        {
            const std::lock_guard<std::mutex> writing(program_lock_);
            program_ = shared;
            threads_ = threads;
        }
        next_.store(job << (PHASE_BITS + CHUNK_BITS), std::memory_order_release);
        job_.store((uint32_t)job, std::memory_order_seq_cst);
        if (threads > 1 && asleep_.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
        Walk walk(*this, job, 0);
        (*shared)(walk);
    }

    // Take the last program away, from helpers too that woke up for it but have not looked yet, and wait until none is
    // inside; needed before what programs point to is freed.
    void drain() {
        const std::lock_guard<std::mutex> alone(callers_);
        {
            const std::lock_guard<std::mutex> writing(program_lock_);
            program_ = nullptr;
        }
        while (inside_.load(std::memory_order_acquire) > 0) sched_yield();
    }

  private:
    static constexpr uint64_t JOB_MASK = (1u << 24) - 1;

    void serve(int slot) {
        uint32_t seen = 0;
        while (true) {
            for (int i = 0; i < PAUSES && job_.load(std::memory_order_acquire) == seen; ++i) _mm_pause();
            asleep_.fetch_add(1, std::memory_order_seq_cst);
            while (job_.load(std::memory_order_seq_cst) == seen) futex(FUTEX_WAIT_PRIVATE, (int)seen);
            asleep_.fetch_sub(1, std::memory_order_seq_cst);
            inside_.fetch_add(1, std::memory_order_acq_rel);
            std::shared_ptr<const Program> program;
            int threads;
            {
                const std::lock_guard<std::mutex> reading(program_lock_);
                program = program_;
                threads = threads_;
                seen = job_.load(std::memory_order_acquire);
            }
            // `next_` tells whether the program that was read belongs to a job still going on; every chunk asks again.
            if (program && slot < threads) {
                Walk walk(*this, seen, slot);
                (*program)(walk);
            }
            inside_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    void futex(int operation, int value) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&job_), operation, value, nullptr, nullptr, 0);
    }

    alignas(64) std::atomic<uint64_t> next_{0};  // job, phase, chunk
    alignas(64) std::atomic<int64_t> done_{0};   // chunks of the phase that are finished
    alignas(64) std::atomic<uint32_t> job_{0};
    std::atomic<int> asleep_{0}, inside_{0};
    std::mutex callers_, program_lock_;
    std::shared_ptr<const Program> program_;
    int threads_ = 1;
    std::vector<std::thread> helpers_;
};

}  // namespace flyball
