// Replicas in virtual time: the compiled twin of simulator_reference.py, which says in plain Python what is done here.
//
// Between two moments at which anything but "every request in the batch gets its next token" happens, a replica's steps
// are added up in closed form: k decode steps of B requests that hold S cached tokens take
//     k (alpha + beta B) + gamma (k S + B k (k + 1) / 2)  seconds.
// Such a run of steps ends when a request does, when blocks run out, or with the step in which a new request arrives.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <queue>
#include <unordered_map>
#include <vector>

namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

enum Router : i64 { kRoundRobin = 0, kLeastLoaded = 1, kPrefixAffine = 2 };
enum Outcome : i32 { kDone = 0, kLost = 1, kRefused = 2 };
enum Status : i64 { kReached = 0, kNeedsInput = 1, kHasOutput = 2 };

}  // namespace

extern "C" {

struct fs_law {
    double alpha, beta, gamma;  // seconds, a token, a cached token read
    i64 max_batch, step_tokens, blocks, block_tokens, prefix_caching, request_level;
};

struct fs_record {  // one request that ended
    i64 id;
    double arrival, first, last;
    i32 server, replica, input, output, cached, preemptions, outcome, pad;
};

constexpr i64 kBuckets = 160;  // of latencies: 1 ms times 1.1 to the power of the bucket, the last one open

struct fs_counters {  // of one replica, since it began
    i64 running, waiting, blocks_used, blocks;
    i64 arrivals, completed, lost, generated, prompt, hits, preemptions, firsts, gaps, steps;
    double ttft_sum, gap_sum, busy, emptied;
    i64 ttft_hist[kBuckets], gap_hist[kBuckets];
};

struct fs_server {
    i64 arrivals, completed, lost, queued, input, output;
};

}  // extern "C"

namespace {

const double kLogBucket = std::log(1.1);

i64 bucket_of(double seconds) {
    if (seconds <= 1e-3) return 0;
    return std::min<i64>(kBuckets - 1, static_cast<i64>(std::ceil(std::log(seconds / 1e-3) / kLogBucket)));
}

struct Seq {
    i64 id = 0;
    double arrival = 0, first = kNone, last = kNone;
    i32 server = 0, input = 0, output = 0, cached = 0, preemptions = 0;
    i64 emitted = 0;
    i64 context = 0;  // tokens whose keys and values are cached
    i64 count = 0;    // tokens that the step in progress computes
    i64 blocks = 0;   // private ones
    i64 shared = 0;   // tokens in cache entries that it holds
    i64 unit = 0;     // prompt tokens that one id stands for
    std::size_t next_id = 0;
    std::vector<i64> ids, held;
    std::vector<double> times;  // of its tokens, where they are recorded
    double share = 0;           // request-level mode: own work a step

    i64 known() const { return input + emitted; }
    i64 left() const { return known() - context; }
};

struct Entry {  // a part of a prompt in the prefix cache
    i64 refs, blocks, freed;
};

struct Later {  // the order in which requests end, where that is known beforehand
    bool operator()(const Seq* a, const Seq* b) const {
        return a->last != b->last ? a->last > b->last : a->id > b->id;
    }
};

struct Replica {
    fs_law law{};
    i64 server = -1;
    bool alive = false, accepting = false;
    std::vector<Seq*> running;  // in order of admission
    std::deque<Seq*> waiting;
    double start = 0;  // of the steps in progress
    i64 steps = 0;     // how many of them; 0: idle
    bool decode = false;
    i64 cached_tokens = 0;  // S: context of all that run, before the steps
    i64 free_blocks = 0, evictable = 0, stamp = 0;
    std::unordered_map<i64, Entry> cache;
    std::map<i64, i64> unreferenced;  // when freed -> id
    double work = 0;                  // request-level mode: own work a step of all in service
    std::priority_queue<Seq*, std::vector<Seq*>, Later> ends;
    fs_counters seen{};

    i64 load() const {
        return static_cast<i64>(running.size() + waiting.size() + ends.size());
    }
    double lasting(i64 k) const {  // k decode steps, in seconds
        const double b = static_cast<double>(running.size()), n = static_cast<double>(k);
        return n * (law.alpha + law.beta * b) +
               law.gamma * (n * static_cast<double>(cached_tokens) + b * (n * (n + 1) / 2));
    }
    i64 available() const { return free_blocks + evictable; }
    i64 blocks_for(i64 tokens) const { return (tokens + law.block_tokens - 1) / law.block_tokens; }
};

struct Waiting {  // requests of one server that no replica has taken
    std::deque<Seq*> queue;
    std::vector<i64> accepting;  // replicas, in order
    i64 cursor = 0;
    fs_server seen{};
};

class Simulator {
  public:
    Simulator(i64 servers, i64 router, bool record) : servers_(servers), router_(router), record_(record) {}

    i64 add(i64 server, const fs_law& law) {
        i64 slot = 0;
        while (slot < static_cast<i64>(replicas_.size()) && replicas_[slot]->alive) ++slot;
        if (slot == static_cast<i64>(replicas_.size())) {
            replicas_.emplace_back();
            next_.push_back(kNever);
        }
        replicas_[slot] = std::make_unique<Replica>();
        Replica& r = *replicas_[slot];
        r.law = law;
        r.server = server;
        r.alive = r.accepting = true;
        r.free_blocks = law.blocks;
        r.seen.emptied = now_;
        next_[slot] = kNever;
        Waiting& w = servers_[server];
        w.accepting.insert(std::lower_bound(w.accepting.begin(), w.accepting.end(), slot), slot);
        dispatch(server);
        return slot;
    }

    void drain(i64 slot) {
        Replica& r = *replicas_[slot];
        auto& list = servers_[r.server].accepting;
        list.erase(std::remove(list.begin(), list.end(), slot), list.end());
        r.accepting = false;
    }

    void remove(i64 slot) {
        drain(slot);
        replicas_[slot]->alive = false;
        next_[slot] = kNever;
    }

    void fail(i64 slot) {  // who has no token yet goes back to the gateway, the others are lost
        Replica& r = *replicas_[slot];
        sync(slot, now_);
        drain(slot);
        std::vector<Seq*> back;
        auto leave = [&](Seq* s) { s->first <= now_ ? end(s, r, slot, kLost) : back.push_back(s); };
        std::for_each(r.running.begin(), r.running.end(), leave);
        std::for_each(r.waiting.begin(), r.waiting.end(), leave);
        for (; !r.ends.empty(); r.ends.pop()) leave(r.ends.top());
        std::sort(back.begin(), back.end(), [](Seq* a, Seq* b) { return a->id < b->id; });
        Waiting& w = servers_[r.server];
        for (auto s = back.rbegin(); s != back.rend(); ++s) {
            forget(**s);
            w.queue.push_front(*s);
        }
        w.seen.queued = static_cast<i64>(w.queue.size());
        const i64 server = r.server;
        r.running.clear();
        r.waiting.clear();
        remove(slot);
        dispatch(server);
    }

    void offer(i64 count, const double* arrival, const i32* server, const i32* input, const i32* output,
               const i64* offsets, const i64* ids, const i32* unit) {
        for (i64 i = 0; i < count; ++i) {
            Seq* s = fresh();
            s->id = offered_++;
            s->arrival = arrival[i];
            s->server = server[i];
            s->input = input[i];
            s->output = output[i];
            s->unit = unit[i];
            if (offsets) s->ids.assign(ids + offsets[i], ids + offsets[i + 1]);
            coming_.push_back(s);
        }
    }

    void close() { closed_ = true; }

    i64 run(double until, i64 most_records) {
        for (;;) {
            if (static_cast<i64>(out_.size()) >= most_records) return kHasOutput;
            if (coming_.empty() && !closed_) return kNeedsInput;
            const double arrival = coming_.empty() ? kNever : coming_.front()->arrival;
            const auto soonest = std::min_element(next_.begin(), next_.end());
            const double event = next_.empty() ? kNever : *soonest;
            const double t = std::min(arrival, event);
            if (t > until || t == kNever) {
                if (until != kNever) advance(until);
                return kReached;
            }
            advance(t);
            if (arrival <= event) {
                Seq* s = coming_.front();
                coming_.pop_front();
                arrive(s);
            } else {
                boundary(soonest - next_.begin());
            }
        }
    }

    void sync_all() {
        for (std::size_t i = 0; i < replicas_.size(); ++i)
            if (replicas_[i]->alive) sync(static_cast<i64>(i), now_);
    }

    fs_counters counters(i64 slot) {
        Replica& r = *replicas_[slot];
        r.seen.running = static_cast<i64>(r.running.size() + r.ends.size());
        r.seen.waiting = static_cast<i64>(r.waiting.size());
        r.seen.blocks = r.law.blocks;
        r.seen.blocks_used = r.law.blocks - r.available();
        return r.seen;
    }

    const fs_server& server(i64 index) const { return servers_[index].seen; }
    std::vector<fs_record>& out() { return out_; }
    std::vector<double>& times() { return times_; }
    double now() const { return now_; }
    double area() const { return area_; }
    double residence() const {  // of all that ended or are here, until now
        double sum = residence_;
        auto here = [&](const Seq* s) { sum += now_ - s->arrival; };
        for (const auto& w : servers_) std::for_each(w.queue.begin(), w.queue.end(), here);
        for (const auto& r : replicas_) {
            if (!r->alive) continue;
            std::for_each(r->running.begin(), r->running.end(), here);
            std::for_each(r->waiting.begin(), r->waiting.end(), here);
            auto ends = r->ends;
            for (; !ends.empty(); ends.pop()) here(ends.top());
        }
        return sum;
    }

    bool blocks_conserved() const {
        for (const auto& r : replicas_) {
            if (!r->alive || r->law.request_level) continue;
            i64 used = 0, idle = 0;
            for (const Seq* s : r->running) used += s->blocks;
            for (const auto& [id, e] : r->cache) (e.refs ? used : idle) += e.blocks;
            if (idle != r->evictable || used + idle + r->free_blocks != r->law.blocks) return false;
        }
        return true;
    }

  private:
    std::vector<Waiting> servers_;
    i64 router_;
    bool record_;
    std::vector<std::unique_ptr<Replica>> replicas_;
    std::vector<double> next_;  // when each replica's steps in progress end
    std::deque<Seq*> coming_;
    std::vector<std::unique_ptr<Seq>> pool_;
    std::vector<Seq*> spare_;
    std::vector<fs_record> out_;
    std::vector<double> times_;
    double now_ = 0, area_ = 0, residence_ = 0;
    i64 here_ = 0, offered_ = 0;
    bool closed_ = false;

    Seq* fresh() {
        if (spare_.empty()) {
            pool_.push_back(std::make_unique<Seq>());
            return pool_.back().get();
        }
        Seq* s = spare_.back();
        spare_.pop_back();
        *s = Seq{};
        return s;
    }

    void advance(double t) {
        area_ += static_cast<double>(here_) * (t - now_);
        now_ = t;
    }

    void arrive(Seq* s) {
        ++here_;
        Waiting& w = servers_[s->server];
        ++w.seen.arrivals;
        w.seen.input += s->input;
        w.queue.push_back(s);
        w.seen.queued = static_cast<i64>(w.queue.size());
        if (!w.accepting.empty()) dispatch(s->server);
    }

    void dispatch(i64 server) {
        Waiting& w = servers_[server];
        while (!w.queue.empty() && !w.accepting.empty()) {
            Seq* s = w.queue.front();
            w.queue.pop_front();
            w.seen.queued = static_cast<i64>(w.queue.size());
            take(choose(w, *s), s);
        }
    }

    i64 choose(Waiting& w, const Seq& s) {
        const auto& list = w.accepting;
        if (router_ == kRoundRobin) {
            w.cursor = w.cursor % static_cast<i64>(list.size());
            return list[w.cursor++];
        }
        i64 best = list[0];
        for (i64 slot : list)
            if (replicas_[slot]->load() < replicas_[best]->load()) best = slot;
        if (router_ == kLeastLoaded || s.ids.empty()) return best;
        const i64 limit = 2 * replicas_[best]->load() + 8;
        i64 most = matched(*replicas_[best], s);
        for (i64 slot : list) {
            const Replica& r = *replicas_[slot];
            if (r.load() > limit) continue;
            const i64 found = matched(r, s);
            if (found > most || (found == most && r.load() < replicas_[best]->load())) {
                most = found;
                best = slot;
            }
        }
        return best;
    }

    static i64 matched(const Replica& r, const Seq& s) {  // leading parts of the prompt that are cached; never all of it
        if (!r.law.prefix_caching || s.ids.empty()) return 0;
        const i64 most = std::min<i64>(static_cast<i64>(s.ids.size()), (s.known() - 1) / s.unit);
        i64 found = 0;
        while (found < most && r.cache.count(s.ids[found])) ++found;
        return found;
    }

    void take(i64 slot, Seq* s) {
        Replica& r = *replicas_[slot];
        ++r.seen.arrivals;
        if (r.blocks_for(i64{s->input} + s->output) + static_cast<i64>(s->ids.size()) > r.law.blocks) {
            end(s, r, slot, kRefused);
            return;
        }
        r.waiting.push_back(s);
        if (r.law.request_level) {
            admit_requests(slot);
        } else if (r.steps == 0) {
            r.start = now_;
            next_[slot] = now_;  // begins once all that arrive at this moment are here
        } else if (r.decode && r.steps > 1) {
            r.steps = steps_until(r, now_);
            next_[slot] = r.start + r.lasting(r.steps);
        }
    }

    static i64 steps_until(const Replica& r, double t) {  // the fewest steps, at least 1, that end at t or later
        const double b = static_cast<double>(r.running.size()), gap = t - r.start;
        const double a = r.law.gamma * b / 2;
        const double c = r.law.alpha + r.law.beta * b + r.law.gamma * static_cast<double>(r.cached_tokens) + a;
        const double guess = 2 * gap / (c + std::sqrt(c * c + 4 * a * gap));
        i64 k = std::clamp<i64>(static_cast<i64>(guess), 1, r.steps);
        while (k < r.steps && r.start + r.lasting(k) < t) ++k;
        while (k > 1 && r.start + r.lasting(k - 1) >= t) --k;
        return k;
    }

    void sync(i64 slot, double t) {  // account for the whole steps that have ended
        Replica& r = *replicas_[slot];
        if (!r.decode || r.steps < 2 || r.start + r.lasting(1) > t) return;
        i64 k = steps_until(r, t);
        if (r.start + r.lasting(k) > t) --k;
        if (k < 1 || k >= r.steps) return;
        const i64 rest = r.steps - k;
        r.steps = k;
        finish_steps(slot);
        r.decode = true;
        r.steps = rest;
        next_[slot] = r.start + r.lasting(rest);
    }

    void boundary(i64 slot) {
        Replica& r = *replicas_[slot];
        if (r.law.request_level) {
            end_requests(slot);
            return;
        }
        if (r.steps) finish_steps(slot);
        plan(slot);
    }

    // ---- steps ----

    void finish_steps(i64 slot) {
        Replica& r = *replicas_[slot];
        const i64 k = r.steps;
        const double ended = r.decode ? r.start + r.lasting(k) : next_[slot];
        std::vector<double> between;
        if (record_)
            for (i64 j = 1; j < k; ++j) between.push_back(r.start + r.lasting(j));
        i64 computed = 0;
        bool any_ends = false;
        for (Seq* s : r.running) {
            const i64 tokens = r.decode ? k : s->count;
            if (tokens == 0) continue;
            s->context += tokens;
            computed += tokens;
            if (s->next_id < s->ids.size()) keep_prefix(r, *s);
            if (s->context < s->known() + (r.decode ? k - 1 : 0)) continue;
            const i64 blocks = r.blocks_for(s->context - s->shared);
            allocate(r, *s, blocks - s->blocks);
            if (record_) {
                s->times.insert(s->times.end(), between.begin(), between.end());
                s->times.push_back(ended);
            }
            emit(r, *s, k, ended);
            any_ends = any_ends || s->emitted == s->output;
        }
        r.cached_tokens += computed;
        r.seen.busy += ended - r.start;
        r.seen.steps += k;
        r.start = ended;
        r.steps = 0;
        r.decode = false;
        if (any_ends) end_finished(slot);
    }

    void end_finished(i64 slot) {
        Replica& r = *replicas_[slot];
        auto keep = r.running.begin();
        for (Seq* s : r.running) {
            if (s->emitted < s->output) {
                *keep++ = s;
                continue;
            }
            release(r, *s);
            end(s, r, slot, kDone);
        }
        r.running.erase(keep, r.running.end());
    }

    static void emit(Replica& r, Seq& s, i64 count, double when) {
        r.seen.generated += count;
        if (s.emitted == 0) {
            s.first = when;
            ++r.seen.firsts;
            r.seen.prompt += s.input;
            r.seen.ttft_sum += when - s.arrival;
            ++r.seen.ttft_hist[bucket_of(when - s.arrival)];
        } else {
            r.seen.gaps += count;
            r.seen.gap_sum += when - s.last;
            r.seen.gap_hist[bucket_of((when - s.last) / static_cast<double>(count))] += count;
        }
        s.emitted += count;
        s.last = when;
    }

    void plan(i64 slot) {
        Replica& r = *replicas_[slot];
        r.start = now_;
        for (Seq* s : r.running) s->count = 0;
        i64 budget = r.law.step_tokens;
        const bool preempted = schedule_running(r, budget);
        const bool admitted = !preempted && admit(r, budget);
        if (r.running.empty()) {
            next_[slot] = kNever;
            r.seen.emptied = now_;
            return;
        }
        i64 read = 0;
        bool decode = !preempted && !admitted;
        for (const Seq* s : r.running) {
            if (s->count) read += s->context + s->count;
            decode = decode && s->count == 1 && s->left() == 1 && s->emitted > 0;
        }
        r.decode = decode;
        r.steps = decode ? alike_steps(r) : 1;
        const double tokens = static_cast<double>(r.law.step_tokens - budget);
        next_[slot] = r.start + (decode ? r.lasting(r.steps)
                                        : r.law.alpha + r.law.beta * tokens + r.law.gamma * static_cast<double>(read));
    }

    bool schedule_running(Replica& r, i64& budget) {  // whether any request was preempted
        bool preempted = false;
        for (std::size_t i = 0; i < r.running.size() && budget > 0; ++i) {
            Seq* s = r.running[i];
            const i64 count = std::min(s->left(), budget);
            const i64 need = r.blocks_for(s->context + count - s->shared) - s->blocks;
            while (need > r.available()) {  // the one admitted last gives way
                Seq* victim = r.running.back();
                r.running.pop_back();
                release(r, *victim);
                forget(*victim);
                ++victim->preemptions;
                ++r.seen.preemptions;
                r.waiting.push_front(victim);
                preempted = true;
                if (victim == s) return true;
            }
            allocate(r, *s, need);
            s->count = count;
            budget -= count;
        }
        return preempted;
    }

    bool admit(Replica& r, i64& budget) {
        bool admitted = false;
        while (!r.waiting.empty() && static_cast<i64>(r.running.size()) < r.law.max_batch && budget > 0) {
            Seq* s = r.waiting.front();
            const i64 hits = matched(r, *s);
            const i64 context = hits * s->unit;
            const i64 count = std::min(s->known() - context, budget);
            i64 revived = 0;
            for (i64 i = 0; i < hits; ++i) {
                const Entry& e = r.cache.at(s->ids[i]);
                if (e.refs == 0) revived += e.blocks;
            }
            if (r.blocks_for(count) > r.available() - revived) break;
            r.waiting.pop_front();
            for (i64 i = 0; i < hits; ++i) hold(r, *s, s->ids[i]);
            s->context = s->shared = context;
            s->next_id = static_cast<std::size_t>(hits);
            s->count = count;
            if (s->emitted == 0) s->cached = static_cast<i32>(context);
            r.seen.hits += context;
            r.cached_tokens += context;
            allocate(r, *s, r.blocks_for(count));
            r.running.push_back(s);
            budget -= count;
            admitted = true;
        }
        return admitted;
    }

    static i64 alike_steps(const Replica& r) {  // decode steps until a request ends or blocks run out
        const i64 b = static_cast<i64>(r.running.size()), size = r.law.block_tokens;
        i64 k = std::numeric_limits<i64>::max();
        for (const Seq* s : r.running) k = std::min(k, s->output - s->emitted);
        if (b * ((k - 1 + size - 1) / size) <= r.available()) return k;
        std::vector<i64> due(static_cast<std::size_t>(size));  // requests by the step, modulo size, that fills a block
        for (const Seq* s : r.running) ++due[static_cast<std::size_t>((s->context - s->shared) % size)];
        i64 need = 0;
        for (i64 j = 2; j <= k; ++j) {
            need += due[static_cast<std::size_t>((size - (j - 1) % size) % size)];
            if (need > r.available()) return j - 1;
        }
        return k;
    }

    // ---- blocks and the prefix cache ----

    static void allocate(Replica& r, Seq& s, i64 blocks) {
        while (r.free_blocks < blocks) {
            const auto oldest = r.unreferenced.begin();
            const auto entry = r.cache.find(oldest->second);
            r.free_blocks += entry->second.blocks;
            r.evictable -= entry->second.blocks;
            r.cache.erase(entry);
            r.unreferenced.erase(oldest);
        }
        r.free_blocks -= blocks;
        s.blocks += blocks;
    }

    static void hold(Replica& r, Seq& s, i64 id) {
        Entry& e = r.cache.at(id);
        if (e.refs++ == 0) {
            r.unreferenced.erase(e.freed);
            r.evictable -= e.blocks;
        }
        s.held.push_back(id);
    }

    static void keep_prefix(Replica& r, Seq& s) {  // parts of the prompt that are computed become the cache's
        if (!r.law.prefix_caching) return;
        const i64 computed = std::min<i64>(s.context, s.input);
        while (s.next_id < s.ids.size() && static_cast<i64>(s.next_id + 1) * s.unit <= computed) {
            const i64 id = s.ids[s.next_id++];
            if (r.cache.count(id)) continue;  // another request was first: this one keeps its copy to itself
            s.shared += s.unit;
            const i64 kept = r.blocks_for(s.context - s.shared);
            r.cache.emplace(id, Entry{1, s.blocks - kept, 0});
            s.blocks = kept;
            s.held.push_back(id);
        }
    }

    static void release(Replica& r, Seq& s) {
        r.cached_tokens -= s.context;
        r.free_blocks += s.blocks;
        for (auto id = s.held.rbegin(); id != s.held.rend(); ++id) {  // the end of a prompt is evicted first
            Entry& e = r.cache.at(*id);
            if (--e.refs) continue;
            e.freed = ++r.stamp;
            r.unreferenced.emplace(e.freed, *id);
            r.evictable += e.blocks;
        }
    }

    static void forget(Seq& s) {  // all that was computed
        s.context = s.count = s.blocks = s.shared = 0;
        s.next_id = 0;
        s.held.clear();
    }

    void end(Seq* s, Replica& r, i64 slot, Outcome outcome) {
        out_.push_back({s->id, s->arrival, s->first, s->last, s->server, static_cast<i32>(slot), s->input, s->output,
                        s->cached, s->preemptions, outcome, 0});
        if (record_) times_.insert(times_.end(), s->times.begin(), s->times.end());
        fs_server& seen = servers_[s->server].seen;
        if (outcome == kDone) {
            ++r.seen.completed;
            ++seen.completed;
            seen.output += s->output;
        } else {
            ++r.seen.lost;
            ++seen.lost;
        }
        --here_;
        residence_ += now_ - s->arrival;
        spare_.push_back(s);
    }

    // ---- request-level mode: a request's latencies follow from whom it finds, and never change after ----

    void admit_requests(i64 slot) {
        Replica& r = *replicas_[slot];
        const fs_law& law = r.law;
        while (!r.waiting.empty() && static_cast<i64>(r.ends.size()) < law.max_batch) {
            Seq* s = r.waiting.front();
            const i64 blocks = r.blocks_for(i64{s->input} + s->output);
            if (blocks > r.free_blocks) break;
            r.waiting.pop_front();
            allocate(r, *s, blocks);
            const double n = s->input, d = s->output - 1.0;
            const double chunks = std::ceil(n / static_cast<double>(law.step_tokens));
            const double prefill = (law.beta + law.gamma * (chunks + 1) / 2) * n;
            const double token = law.beta + law.gamma * (n + (d + 1) / 2);
            const double step = law.alpha + r.work, rest = r.ends.empty() ? 0 : step / 2;
            s->first = now_ + rest + chunks * step + prefill;
            s->last = s->first + d * (step + token);
            s->share = (prefill + d * token) / (chunks + d);
            r.work += s->share;
            r.ends.push(s);
        }
        next_[slot] = r.ends.empty() ? kNever : r.ends.top()->last;
    }

    void end_requests(i64 slot) {
        Replica& r = *replicas_[slot];
        while (!r.ends.empty() && r.ends.top()->last <= now_) {
            Seq* s = r.ends.top();
            r.ends.pop();
            r.work = r.ends.empty() ? 0 : r.work - s->share;
            const double first = s->first, last = s->last;
            emit(r, *s, 1, first);
            if (s->output > 1) emit(r, *s, s->output - 1, last);
            release(r, *s);
            end(s, r, slot, kDone);
        }
        if (r.ends.empty()) r.seen.emptied = now_;
        admit_requests(slot);
    }
};

}  // namespace

extern "C" {

void* fs_new(i64 servers, i64 router, i64 record) { return new Simulator(servers, router, record != 0); }
void fs_free(void* sim) { delete static_cast<Simulator*>(sim); }
i64 fs_add(void* sim, i64 server, const fs_law* law) { return static_cast<Simulator*>(sim)->add(server, *law); }
void fs_drain(void* sim, i64 slot) { static_cast<Simulator*>(sim)->drain(slot); }
void fs_remove(void* sim, i64 slot) { static_cast<Simulator*>(sim)->remove(slot); }
void fs_fail(void* sim, i64 slot) { static_cast<Simulator*>(sim)->fail(slot); }
void fs_offer(void* sim, i64 count, const double* arrival, const i32* server, const i32* input, const i32* output,
              const i64* offsets, const i64* ids, const i32* unit) {
    static_cast<Simulator*>(sim)->offer(count, arrival, server, input, output, offsets, ids, unit);
}
void fs_close(void* sim) { static_cast<Simulator*>(sim)->close(); }
i64 fs_run(void* sim, double until, i64 most) { return static_cast<Simulator*>(sim)->run(until, most); }
void fs_sync(void* sim) { static_cast<Simulator*>(sim)->sync_all(); }
void fs_counters(void* sim, i64 slot, fs_counters* to) { *to = static_cast<Simulator*>(sim)->counters(slot); }
void fs_server_seen(void* sim, i64 server, fs_server* to) { *to = static_cast<Simulator*>(sim)->server(server); }
i64 fs_records(void* sim, const fs_record** records, i64* times_count, const double** times) {
    auto& s = *static_cast<Simulator*>(sim);
    *records = s.out().data();
    *times_count = static_cast<i64>(s.times().size());
    *times = s.times().data();
    return static_cast<i64>(s.out().size());
}
void fs_forget_records(void* sim) {
    static_cast<Simulator*>(sim)->out().clear();
    static_cast<Simulator*>(sim)->times().clear();
}
// Now, the integral of requests present, and the same as the sum of their residences; whether blocks are conserved.
i64 fs_books(void* sim, double* now, double* area, double* residence) {
    const auto& s = *static_cast<Simulator*>(sim);
    *now = s.now();
    *area = s.area();
    *residence = s.residence();
    return s.blocks_conserved();
}

}  // extern "C"
