#include "sampling.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "simd.h"

namespace loraplex {

namespace {

constexpr int64_t GROUP = 64;   // neighbours that are looked at together
constexpr int64_t CHUNK = 256;  // logits whose weights are at hand at once
constexpr int BINS = 1024;
constexpr float LEAST_BINS_PER_NAT = 32;  // what is 32 nats below the best, or more, is in the last bin
constexpr float MOST_BINS_PER_NAT = 1 << 20;
constexpr int FINER_BINS = 256;
constexpr size_t FEW = 64;  // are sorted
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

inline double fused(double a, double b, double c) {
#if defined(__FP_FAST_FMA) || defined(__FMA__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x for x ≤ 0, to 2 units in the last place; 0 below −708. Compilers can do it to several at once.
inline double weight_of(double x) {
    constexpr double ROUND = 0x1.8p52;  // added to a number, it leaves the nearest whole one in the lowest bits
    const double clamped = x < -708.0 ? -708.0 : x;
    const double shifted = fused(clamped, 1.4426950408889634, ROUND);
    const double n = shifted - ROUND;
    double r = fused(n, -0x1.62e42fefa38p-1, clamped);  // ln 2 in two parts, so that the first product is exact
    r = fused(n, -0x1.ef35793c7673p-45, r);
    double p = 1.0 / 6227020800.0;  // Taylor's series: |r| ≤ ln 2 / 2
    p = fused(p, r, 1.0 / 479001600.0);
    p = fused(p, r, 1.0 / 39916800.0);
    p = fused(p, r, 1.0 / 3628800.0);
    p = fused(p, r, 1.0 / 362880.0);
    p = fused(p, r, 1.0 / 40320.0);
    p = fused(p, r, 1.0 / 5040.0);
    p = fused(p, r, 1.0 / 720.0);
    p = fused(p, r, 1.0 / 120.0);
    p = fused(p, r, 1.0 / 24.0);
    p = fused(p, r, 1.0 / 6.0);
    p = fused(p, r, 0.5);
    p = fused(p * r, r, r) + 1.0;
    uint64_t bits;
    std::memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return x < -708.0 ? 0.0 : p * power;
}

// weights[i] = e^(x[i] − best)
void weigh(const float* x, int64_t n, double best, double* weights) {
    for (int64_t i = 0; i < n; ++i) weights[i] = weight_of(double(x[i]) - best);
}

double total(const double* weights, int64_t n) {
    double lanes[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += weights[i + lane];
    for (; i < n; ++i) lanes[i & 7] += weights[i];
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// f(i) for every i with test(i) = 1, in ascending order. Those are few: the neighbours of a group are tested at once.
template <class Test, class F>
void for_each_of_few(int64_t n, Test test, F f) {
    int64_t start = 0;
    for (; start + GROUP <= n; start += GROUP) {
        decltype(test(start)) any = 0;  // of the width that is tested, so that compilers test several at once
        for (int64_t i = 0; i < GROUP; ++i) any |= test(start + i);
        if (any)
            for (int64_t i = start; i < start + GROUP; ++i)
                if (test(i)) f(i);
    }
    for (; start < n; ++start)
        if (test(start)) f(start);
}

// The largest logit of each group of neighbours. All are NaN if any logit is.
void find_maxima(const float* x, int64_t n, std::vector<float>& maxima) {
    maxima.clear();
    uint32_t not_a_number = 0;
    for (int64_t start = 0; start < n; start += GROUP) {
        const int64_t size = std::min(GROUP, n - start);
        const float* group = x + start;
        Vec most = fill(MINUS_INFINITY);
        int64_t i = 0;
        for (; i + W <= size; i += W) most = maximum(load(group + i), most);
        float maximum = largest(most);
        for (; i < size; ++i) maximum = group[i] > maximum ? group[i] : maximum;
        for (i = 0; i < size; ++i) not_a_number |= group[i] != group[i];
        maxima.push_back(maximum);
    }
    if (not_a_number) std::fill(maxima.begin(), maxima.end(), std::numeric_limits<float>::quiet_NaN());
}

// A token among those of a row in an order: by key, then by id.
struct Item {
    double key;
    double weight;
    int64_t id;

    bool operator<(const Item& other) const { return key != other.key ? key < other.key : id < other.id; }
};

// By its logit at the row's temperature, the best first. A masked one has a key, too, so that keys have differences.
Item item_at(float logit, double best, int64_t id) {
    const double distance = double(logit) - best;
    return {logit == MINUS_INFINITY ? 2.0 * std::numeric_limits<float>::max() : -double(logit), weight_of(distance),
            id};
}

struct Found {
    Item item;
    double sum;  // of the amounts up to it, its own included
};

// The first item, in their order, at which the sum of the amounts, begun at `sum`, is enough; the last, if none is.
// items: not empty, ascending ids where keys are equal; changed
template <class Amount, class Enough>
Found first_enough(std::vector<Item>& items, double sum, Amount amount, Enough enough) {
    for (;;) {
        const auto by_key = [](const Item& a, const Item& b) {
            return a.key < b.key;
        };
        const auto [lowest, highest] = std::minmax_element(items.begin(), items.end(), by_key);
        const double low = lowest->key, width = highest->key - low;
        if (items.size() <= FEW || width == 0) {
            if (width != 0) std::sort(items.begin(), items.end());
            for (const Item& item : items)
                if (sum += amount(item); enough(sum)) return {item, sum};
            return {items.back(), sum};
        }
        const double scale = (FINER_BINS - 1) / width;
        const auto bin_of = [&](const Item& item) {
            return int((item.key - low) * scale);
        };
        double amounts[FINER_BINS] = {};
        bool filled[FINER_BINS] = {};
        for (const Item& item : items) amounts[bin_of(item)] += amount(item), filled[bin_of(item)] = true;
        int bin = 0;  // it has the lowest
        for (int next = 1; next < FINER_BINS && !enough(sum + amounts[bin]); ++next)
            if (filled[next]) sum += amounts[bin], bin = next;
        items.erase(std::remove_if(items.begin(), items.end(), [&](const Item& item) { return bin_of(item) != bin; }),
                    items.end());
    }
}

double one(const Item&) { return 1.0; }
double its_weight(const Item& item) { return item.weight; }

// The logits of a row at its temperature, and the sums of their weights over bins: the best logits are in the first.
class Binned {
  public:
    // x: [n], divided by the temperature here. maxima: of its groups, before that; how they differ says how wide the
    // bins should be.
    void fill_with(float* x, int64_t n, float temperature, const std::vector<float>& maxima) {
        const auto [least, most] = std::minmax_element(maxima.begin(), maxima.end());
        x_ = x, n_ = n, best_ = *most / temperature;
        const float wanted = BINS / 4 / (*most / temperature - *least / temperature);
        bins_per_nat_ = std::min(std::max(wanted, LEAST_BINS_PER_NAT), MOST_BINS_PER_NAT);
        bins_.resize(n);
        double sums[4][BINS] = {};  // neighbours are often in one bin: they need not wait for each other
        const float top = float(best_), bins_per_nat = bins_per_nat_;
        double weights[CHUNK];
        for (int64_t start = 0; start < n; start += CHUNK) {
            const int64_t size = std::min(CHUNK, n - start);
            float* part = x + start;
            uint16_t* bins = bins_.data() + start;
            map(part, part, size, [&](Vec a, int64_t) { return a / fill(temperature); });
            for (int64_t i = 0; i < size; ++i) {
                const float place = (top - part[i]) * bins_per_nat;
                bins[i] = uint16_t(int32_t(place < float(BINS - 1) ? place : float(BINS - 1)));
            }
            weigh(part, size, best_, weights);
            for (int64_t i = 0; i < size; ++i) sums[i & 3][bins[i]] += weights[i];
        }
        for (int bin = 0; bin < BINS; ++bin)
            weights_[bin] = (sums[0][bin] + sums[1][bin]) + (sums[2][bin] + sums[3][bin]);
    }

    double total_weight() const {
        double sum = 0;
        for (double weight : weights_) sum += weight;
        return sum;
    }

    // The k-th best, and the weight of the k best. Those without a weight come last.  k: at most n
    Found best(int64_t k) const {
        int64_t counts[BINS] = {};
        for (uint16_t bin : bins_) ++counts[bin];
        int bin = 0;
        int64_t count = 0;
        double weight = 0;
        for (; count + counts[bin] < k; ++bin) count += counts[bin], weight += weights_[bin];
        std::vector<Item> items = items_of(bin);
        const Item last = first_enough(items, double(count), one, [&](double sum) { return sum >= double(k); }).item;
        for (const Item& item : items_of(bin))
            if (!(last < item)) weight += item.weight;
        return {last, weight};
    }

    // The first, from the best on, at which the sum of the weights is enough; the last, if by rounding none is.
    template <class Enough>
    Found first(Enough enough) const {
        int bin = 0;  // it has the best
        double sum = 0;
        for (int next = 1; next < BINS && !enough(sum + weights_[bin]); ++next)
            if (weights_[next] > 0) sum += weights_[bin], bin = next;
        std::vector<Item> items = items_of(bin);
        items.erase(std::remove_if(items.begin(), items.end(), [](const Item& item) { return item.weight == 0; }),
                    items.end());
        return first_enough(items, sum, its_weight, enough);
    }

    // The last of at least this weight, and the weight of all of them.
    Found at_least(double weight) const {
        int bin = int(std::min(2 - std::log(weight) * double(bins_per_nat_), double(BINS - 1)));  // not before its own
        const int sure = bin - 4;  // up to there, all are
        Found found{{-std::numeric_limits<double>::infinity(), 0, 0}, 0};
        for (; bin >= 0 && (bin > sure || found.sum == 0); --bin) {
            if (weights_[bin] == 0) continue;
            for (const Item& item : items_of(bin))
                if (item.weight >= weight) {
                    found.sum += item.weight;
                    if (found.item < item) found.item = item;
                }
        }
        for (; bin >= 0; --bin) found.sum += weights_[bin];
        return found;
    }

    // All up to this one, by ascending ids.
    std::vector<Item> until(const Item& last) const {
        std::vector<Item> items;
        for (int64_t id = 0; id < n_; ++id)
            if (const Item item = item_of(id); !(last < item)) items.push_back(item);
        return items;
    }

  private:
    Item item_of(int64_t id) const { return item_at(x_[id], best_, id); }

    // By ascending ids.
    std::vector<Item> items_of(int bin) const {
        std::vector<Item> items;
        const uint16_t* bins = bins_.data();
        const uint16_t wanted = uint16_t(bin);
        for_each_of_few(
            n_, [=](int64_t id) { return uint16_t(bins[id] == wanted); },
            [&](int64_t id) { items.push_back(item_of(id)); });
        return items;
    }

    const float* x_ = nullptr;
    int64_t n_ = 0;
    double best_ = 0;
    float bins_per_nat_ = 0;
    std::vector<uint16_t> bins_;
    double weights_[BINS];
};

// Of all tokens of a row, in the order of their ids: the first at which the sum of the weights passes number · total.
int64_t draw_of_all(float* x, int64_t n, float temperature, float best, double number) {
    static thread_local std::vector<double> sums;
    sums.clear();
    double weights[CHUNK], sum = 0;
    const double top = best / temperature;
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t size = std::min(CHUNK, n - start);
        map(x + start, x + start, size, [&](Vec a, int64_t) { return a / fill(temperature); });
        weigh(x + start, size, top, weights);
        sums.push_back(total(weights, size));
    }
    for (double each : sums) sum += each;
    const double target = number * sum;
    int64_t start = 0, last = 0;
    sum = 0;
    for (double each : sums) {
        if (sum + each > target) {
            const int64_t size = std::min(CHUNK, n - start);
            weigh(x + start, size, top, weights);
            for (int64_t i = 0; i < size; ++i) {
                if (weights[i] > 0) last = start + i;
                if (sum += weights[i]; sum > target) return last;
            }
        } else {
            sum += each;
        }
        start += CHUNK;
    }
    return last;  // rounding: the whole sum does not pass it
}

// Of these tokens, the locally typical ones that hold this share of their weight.
void keep_typical(std::vector<Item>& items, double share) {
    double sum = 0, entropy = 0;
    for (const Item& item : items) sum += item.weight;
    const double best = std::min_element(items.begin(), items.end())->key;
    const auto surprise = [&](const Item& item) {
        return std::log(sum) + (item.key - best);
    };
    for (const Item& item : items) entropy += item.weight / sum * surprise(item);
    std::vector<Item> by_distance = items;
    for (Item& item : by_distance) item.key = std::abs(surprise(item) - entropy);
    const double farthest =
        first_enough(by_distance, 0, its_weight, [&](double held) { return held >= share * sum; }).item.key;
    items.erase(std::remove_if(items.begin(), items.end(),
                               [&](const Item& item) { return std::abs(surprise(item) - entropy) > farthest; }),
                items.end());
}

struct Draw {
    double temperature;
    int64_t top_k;
    double top_p, min_p, typical_p, number;

    bool cuts() const { return top_k > 0 || top_p < 1 || min_p > 0 || typical_p < 1; }
};

// Of these tokens, in ascending order of their ids, in what order of likelihood they come being found here.
int64_t draw_of_typical(std::vector<Item> items, const Draw& draw) {
    if (draw.typical_p < 1) keep_typical(items, draw.typical_p);
    double sum = 0;
    for (const Item& item : items) sum += item.weight;
    return first_enough(items, 0, its_weight, [&](double held) { return held > draw.number * sum; }).item.id;
}

// Of the top_k best tokens, which are no more than there are groups: the k-th best of all is no worse than the k-th
// best of the groups' maxima, and little better.
int64_t draw_of_few(const float* x, int64_t n, float best, std::vector<float>& maxima, const Draw& draw) {
    static thread_local std::vector<float> ordered;
    const float temperature = float(draw.temperature);
    ordered = maxima;
    std::nth_element(ordered.begin(), ordered.begin() + (draw.top_k - 1), ordered.end(), std::greater<float>());
    const float bound = ordered[draw.top_k - 1] / temperature;
    std::vector<Item> items;
    for (size_t group = 0; group < maxima.size(); ++group) {
        if (maxima[group] / temperature < bound) continue;
        const int64_t end = std::min<int64_t>(n, (group + 1) * GROUP);
        for (int64_t id = group * GROUP; id < end; ++id)
            if (x[id] / temperature >= bound) items.push_back(item_at(x[id] / temperature, best / temperature, id));
    }
    std::sort(items.begin(), items.end());
    items.resize(draw.top_k);
    double sum = 0;
    for (const Item& item : items) sum += item.weight;
    const double enough = draw.top_p < 1 ? draw.top_p * sum : sum;
    size_t kept = 0;
    for (double held = 0; kept < items.size() && (kept == 0 || held < enough); ++kept) {
        if (items[kept].weight < draw.min_p) break;
        held += items[kept].weight;
    }
    items.resize(kept);
    return draw_of_typical(std::move(items), draw);
}

int64_t draw_of_best(float* x, int64_t n, const std::vector<float>& maxima, const Draw& draw) {
    static thread_local Binned binned;
    binned.fill_with(x, n, float(draw.temperature), maxima);
    Found kept{{std::numeric_limits<double>::infinity(), 0, n}, binned.total_weight()};
    const auto keep = [&](const Found& fewer) {
        if (fewer.item < kept.item) kept = fewer;
    };
    if (draw.top_k > 0 && draw.top_k < n) keep(binned.best(draw.top_k));
    if (draw.top_p < 1) keep(binned.first([&](double sum) { return sum >= draw.top_p * kept.sum; }));
    if (draw.min_p > 0) keep(binned.at_least(draw.min_p));
    if (draw.typical_p < 1) return draw_of_typical(binned.until(kept.item), draw);
    return std::min(kept.item, binned.first([&](double sum) { return sum > draw.number * kept.sum; }).item).id;
}

int64_t draw_token(float* x, int64_t n, const Draw& draw) {
    static thread_local std::vector<float> maxima;
    find_maxima(x, n, maxima);
    const float best = *std::max_element(maxima.begin(), maxima.end());
    const bool greedy = draw.temperature <= 0;
    const double divisor = greedy ? 1.0 : std::min(draw.temperature, 1.0);
    if (!(std::abs(double(best)) <= double(std::numeric_limits<float>::max()) * divisor)) return -1;
    if (greedy) {
        int64_t id = (std::find(maxima.begin(), maxima.end(), best) - maxima.begin()) * GROUP;
        while (x[id] != best) ++id;
        return id;
    }
    if (!draw.cuts()) return draw_of_all(x, n, float(draw.temperature), best, draw.number);
    if (draw.top_k > 0 && draw.top_k <= int64_t(maxima.size())) return draw_of_few(x, n, best, maxima, draw);
    return draw_of_best(x, n, maxima, draw);
}

// The `count` largest of a row, the largest first, and of equal ones the first.
void largest_of(const float* x, int64_t n, int64_t count, int64_t* ids, float* values) {
    int64_t found = 0;
    const auto take = [&](int64_t id) {
        int64_t place = found < count ? found++ : count - 1;
        for (; place > 0 && x[id] > values[place - 1]; --place)
            ids[place] = ids[place - 1], values[place] = values[place - 1];
        ids[place] = id, values[place] = x[id];
    };
    int64_t id = 0;
    for (; id < count; ++id) take(id);
    for (; count > 0 && id < n; id += GROUP) {
        const int64_t size = std::min(GROUP, n - id);
        const float least = values[count - 1];
        uint32_t any = 0;
        for (int64_t i = 0; i < size; ++i) any |= x[id + i] > least;
        if (any)
            for (int64_t i = id; i < id + size; ++i)
                if (x[i] > values[count - 1]) take(i);
    }
}

void likelihoods_of_row(const float* x, int64_t n, const Likelihoods& out, int64_t row) {
    static thread_local std::vector<float> maxima;
    find_maxima(x, n, maxima);
    const double best = *std::max_element(maxima.begin(), maxima.end());
    const int64_t* token_ids = out.token_ids + row * out.asked;
    const float first = x[token_ids[0]];
    double weights[CHUNK], sum = 0;
    int64_t better = 0;
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t size = std::min(CHUNK, n - start);
        weigh(x + start, size, best, weights);
        sum += total(weights, size);
        for (int64_t i = start; i < start + size; ++i) better += x[i] > first;
    }
    const double normaliser = std::log(sum);
    const auto logprob_of = [&](float value) {
        return float(double(value) - best - normaliser);
    };
    for (int64_t i = 0; i < out.asked; ++i) out.logprobs[row * out.asked + i] = logprob_of(x[token_ids[i]]);
    out.ranks[row] = better + 1;
    float* top_logprobs = out.top_logprobs + row * out.count;
    largest_of(x, n, out.count, out.top_ids + row * out.count, top_logprobs);
    for (int64_t i = 0; i < out.count; ++i) top_logprobs[i] = logprob_of(top_logprobs[i]);
}

void penalise_row(float* x, const Penalties& penalties, int64_t i) {
    const float factor = float(penalties.repetition[i]);
    for (int64_t place = penalties.starts[i]; place < penalties.starts[i + 1]; ++place) {
        const int64_t token = penalties.token_ids[place], count = penalties.counts[place];
        const double lower = count > 0 ? penalties.presence[i] + penalties.frequency[i] * double(count) : 0.0;
        x[token] = (x[token] > 0 ? x[token] / factor : x[token] * factor) - float(lower);
    }
}

void mark_row(float* x, int64_t n, uint64_t seed, uint64_t limit, float delta) {
    for (int64_t id = 0; id < n; ++id) {
        uint64_t mixed = seed + uint64_t(id + 1) * 0x9E3779B97F4A7C15;
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9;
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB;
        x[id] += (mixed ^ mixed >> 31) >> 11 < limit ? delta : 0.0f;
    }
}

}  // namespace

void mask_logits(Context& context, float* logits, int64_t vocabulary, int64_t count, const int64_t* row_ids,
                 const uint32_t* bits, int64_t words) {
    context.pool.run(count, [&](int64_t i) {
        float* x = logits + row_ids[i] * vocabulary;
        for (int64_t word = 0; word * 32 < vocabulary; ++word) {
            const uint32_t allowed = bits[i * words + word];
            const int64_t size = std::min<int64_t>(32, vocabulary - word * 32);
            for (int64_t bit = 0; bit < size; ++bit)
                x[word * 32 + bit] = allowed >> bit & 1 ? x[word * 32 + bit] : MINUS_INFINITY;
        }
    });
}

void penalise(Context& context, float* logits, int64_t vocabulary, const Penalties& penalties) {
    context.pool.run(penalties.count,
                     [&](int64_t i) { penalise_row(logits + penalties.row_ids[i] * vocabulary, penalties, i); });
}

void mark(Context& context, float* logits, int64_t vocabulary, const Watermarks& marks) {
    context.pool.run(marks.count, [&](int64_t i) {
        mark_row(logits + marks.row_ids[i] * vocabulary, vocabulary, marks.seeds[i], marks.limits[i], marks.deltas[i]);
    });
}

void draw_tokens(Context& context, float* logits, int64_t rows, int64_t vocabulary, const Draws& draws,
                 int64_t* tokens) {
    context.pool.run(rows, [&](int64_t row) {
        const Draw draw{draws.temperatures[row], draws.top_k[row],     draws.top_p[row],
                        draws.min_p[row],        draws.typical_p[row], draws.numbers[row]};
        tokens[row] = draw_token(logits + row * vocabulary, vocabulary, draw);
    });
}

void likelihoods(Context& context, const float* logits, int64_t rows, int64_t vocabulary, const Likelihoods& out) {
    context.pool.run(rows, [&](int64_t row) { likelihoods_of_row(logits + row * vocabulary, vocabulary, out, row); });
}

}  // namespace loraplex
