// Requests one by one through the law of a queue model; see requests.py.
//
// At most N are in service and Q wait, first come first served. With b in service a prefill of relative length x
// advances by 1 / (shared[b] + own[b] x) a second and every answer by 1 / gap[b] steps a second; answers end by a
// common clock of decode steps, kept in a heap. Work: one event a loop, a scan of the prefills and a heap each.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

struct Prefill {
  int64_t request;
  double left;  // share that is to come
};

}  // namespace

// arrival_s ascends; prompt and answer are relative lengths; shared, own and gap [N + 1] are by the number in service.
// Of requests from `first` on: ttft_s and e2e_s (a lost one's stay as they are), and tokens [N + 1] while they come.
extern "C" void law_requests(int64_t count, int64_t first, int64_t places, int64_t queue_places, const double* shared,
                             const double* own, const double* gap, double decodes, int64_t first_decoded,
                             const double* arrival_s, const double* prompt, const double* answer, double* ttft_s,
                             double* e2e_s, double* tokens) {
  std::vector<Prefill> prefills;
  std::vector<std::pair<double, int64_t>> answers;  // a heap by the clock at which each ends
  std::vector<int64_t> queue(static_cast<size_t>(queue_places + 1));
  int64_t head = 0, waiting = 0, next = 0;
  double now = 0.0, clock = 0.0;
  const auto later = std::greater<std::pair<double, int64_t>>();
  while (true) {
    const int64_t b = static_cast<int64_t>(prefills.size() + answers.size());
    if (b == 0 && next == count) return;
    double to_prefill = kNever;
    size_t ending = 0;
    for (size_t i = 0; i < prefills.size(); ++i) {
      const double takes = prefills[i].left * (shared[b] + own[b] * prompt[prefills[i].request]);
      if (takes < to_prefill) to_prefill = takes, ending = i;
    }
    const double to_answer = answers.empty() ? kNever : std::max(answers.front().first - clock, 0.0) * gap[b];
    const double to_arrival = next < count ? arrival_s[next] - now : kNever;
    const double passed = std::min({to_prefill, to_answer, to_arrival});
    for (auto& p : prefills) p.left -= passed / (shared[b] + own[b] * prompt[p.request]);
    if (next >= first && next < count && b > 0) tokens[b] += passed / gap[b] * static_cast<double>(answers.size());
    if (b > 0) clock += passed / gap[b];
    now += passed;

    if (passed == to_arrival) {
      now = arrival_s[next];  // no rounding adds up
      if (b < places) {
        prefills.push_back({next, 1.0});
      } else if (waiting < queue_places) {
        queue[static_cast<size_t>((head + waiting++) % queue_places)] = next;
      }
      ++next;
    } else if (passed == to_prefill) {
      const int64_t request = prefills[ending].request;
      prefills[ending] = prefills.back();
      prefills.pop_back();
      answers.emplace_back(clock + decodes * answer[request], request);
      std::push_heap(answers.begin(), answers.end(), later);
      ttft_s[request] = now - arrival_s[request] + (first_decoded ? gap[b] : 0.0);
    } else {
      std::pop_heap(answers.begin(), answers.end(), later);
      const int64_t request = answers.back().second;
      answers.pop_back();
      e2e_s[request] = now - arrival_s[request];
      if (waiting > 0) {
        prefills.push_back({queue[static_cast<size_t>(head)], 1.0});
        head = (head + 1) % queue_places;
        --waiting;
      }
    }
  }
}
