// dropout(SiLU(GroupNorm(x + emb))) of channels_last tensors on CPUs, and its gradient; norm_silu_cpu.py builds it.
//
// An image is read from memory once, and then from the cache; the output of the norm is not kept for the backward pass.
// Sums are float32 over BLOCK pixels, then float64, in an order that depends neither on the batch nor on the threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int N = 16;      // lanes: AVX-512's; the compiler splits them for narrower units
constexpr long BLOCK = 64;  // pixels

typedef float Floats __attribute__((vector_size(4 * N)));
typedef int32_t Ints __attribute__((vector_size(4 * N)));
typedef uint32_t Words __attribute__((vector_size(4 * N)));
typedef uint16_t Halves __attribute__((vector_size(2 * N)));

struct bf16 { uint16_t bits; };

inline Floats load(const float* from, long n) {  // n values; 0 in the other lanes
    Floats v = {};
    if (n == N) std::memcpy(&v, from, sizeof v);
    else for (long i = 0; i < n; i++) v[i] = from[i];
    return v;
}

inline Floats load(const bf16* from, long n) {
    Halves v = {};
    if (n == N) std::memcpy(&v, from, sizeof v);
    else for (long i = 0; i < n; i++) v[i] = from[i].bits;
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

inline void store(float* to, Floats v, long n) {
    if (n == N) std::memcpy(to, &v, sizeof v);
    else for (long i = 0; i < n; i++) to[i] = v[i];
}

inline void store(bf16* to, Floats v, long n) {  // rounded to nearest, ties to even; NaN stays NaN
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Halves halves = __builtin_convertvector(v == v ? rounded : (Words)(bits >> 16 | 0x40), Halves);
    if (n == N) std::memcpy(to, &halves, sizeof halves);
    else for (long i = 0; i < n; i++) to[i].bits = halves[i];
}

inline Floats sigmoid(Floats z) {  // 1 / (1 + e^-z), to 2e-7 of it; 0 below -80, 1 above 17
    Floats y = z < -80 ? Floats{} + 80 : z > 80 ? Floats{} - 80 : -z;
    const float ROUND = 12582912;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    Floats k = (y * 1.44269504f + ROUND) - ROUND;
    Floats r = y - k * 0.693145752f - k * 1.42860677e-6f;  // y - k ln 2
    Floats e = r * (r * (r * (r * (r * (r * 1.98412698e-4f + 1.38888889e-3f) + 8.33333333e-3f) + 4.16666667e-2f)
                         + 1.66666667e-1f) + 0.5f);
    e = r * e + r + 1;  // the Taylor series of e^r, |r| <= ln 2 / 2
    e = e * (Floats)((__builtin_convertvector(k, Ints) + 127) << 23);
    Floats d = 1 + e, inverse = (Floats)(0x7ef311c7 - (Ints)d);  // a guess within 13 %; each round squares its error
    for (int i = 0; i < 3; i++) inverse = inverse * (2 - d * inverse);
    return z < -80 ? Floats{} : z > 17 ? Floats{} + 1 : z == z ? inverse : z;
}

struct Drop {  // what happens to an entry is a function of the key and of where it is
    uint32_t below, key[2];  // an entry is dropped if its 32 random bits are below that; 0: there is no dropout
    float scale;             // of the others
};

inline Words mixed(Words h) {  // MurmurHash3's last steps
    h = (h ^ h >> 16) * 0x85ebca6b;
    h = (h ^ h >> 13) * 0xc2b2ae35;
    return h ^ h >> 16;
}

inline Floats dropped(Floats v, uint64_t at, const Drop& d) {
    Words where = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    where = mixed((where + (uint32_t)at) ^ d.key[0]);
    return mixed(where + (d.key[1] + (uint32_t)(at >> 32))) < d.below ? Floats{} : v * d.scale;
}

struct Shape {
    long batch, pixels, channels, groups, per_image;  // per_image: whether weight and bias are [batch, channels]
    long width() const { return channels / groups; }
};

// y, and where the gradient is wanted stats [batch, 2, channels]: the group's mean less emb, 1 / standard deviation.
template <class T, bool SILU>
void forward(const T* x, const float* emb, const float* weight, const float* bias, T* y, float* stats, Shape s,
             float eps, Drop drop, long image, long first, long last) {
    const long C = s.channels, width = s.width(), count = last - first, start_of_image = image * s.pixels * C;
    x += start_of_image;
    y += start_of_image;
    weight += s.per_image ? image * C : 0;
    bias += s.per_image ? image * C : 0;
    std::vector<double> mean(count), squares(count);  // of each channel's pixels so far, and the squares around it
    for (long start = 0; start < s.pixels; start += BLOCK)
        for (long c = first; c < last; c += N) {
            const long n = std::min<long>(N, last - c), end = std::min(start + BLOCK, s.pixels);
            Floats sum = {}, power = {};
            for (long p = start; p < end; p++) sum += load(x + p * C + c, n);
            const Floats near = sum * (1.0f / (end - start));  // squares around it do not cancel
            for (long p = start; p < end; p++) {
                const Floats away = load(x + p * C + c, n) - near;
                power += away * away;
            }
            const double share = double(end - start) / end;
            for (long i = 0; i < n; i++) {
                const double away = near[i] - mean[c - first + i];
                mean[c - first + i] += away * share;
                squares[c - first + i] += power[i] + away * away * share * start;
            }
        }
    for (long i = 0; emb && i < count; i++) mean[i] += emb[image * C + first + i];
    std::vector<float> centre(count), rstd(count);
    for (long c = 0; c < count; c += width) {
        double sum = 0, around = 0;
        for (long i = c; i < c + width; i++) sum += mean[i];
        const double middle = sum / width;
        for (long i = c; i < c + width; i++)
            around += squares[i] + s.pixels * (mean[i] - middle) * (mean[i] - middle);
        const double scale = 1 / std::sqrt(std::max(around, 0.0) / (s.pixels * width) + eps);
        for (long i = c; i < c + width; i++) {
            centre[i] = middle - (emb ? emb[image * C + first + i] : 0);
            rstd[i] = scale;
        }
    }
    if (stats) {
        std::memcpy(stats + image * 2 * C + first, centre.data(), 4 * count);
        std::memcpy(stats + image * 2 * C + C + first, rstd.data(), 4 * count);
    }
    for (long start = 0; start < s.pixels; start += BLOCK)
        for (long c = first; c < last; c += N) {
            const long n = std::min<long>(N, last - c), end = std::min(start + BLOCK, s.pixels);
            const Floats m = load(&centre[c - first], n), a = load(&rstd[c - first], n) * load(weight + c, n);
            const Floats b = load(bias + c, n);
            for (long p = start; p < end; p++) {
                Floats z = (load(x + p * C + c, n) - m) * a + b;
                if (SILU) z = z * sigmoid(z);
                if (drop.below) z = dropped(z, start_of_image + p * C + c, drop);
                store(y + p * C + c, z, n);
            }
        }
}

// dx, and sums [3, batch, channels]: an image's part of the gradients of weight and bias, and the gradient of emb.
template <class T, bool SILU>
void backward(const T* dy, const T* x, const float* weight, const float* bias, const float* stats, T* dx, float* sums,
              Shape s, Drop drop, long image, long first, long last) {
    const long C = s.channels, width = s.width(), count = last - first, start_of_image = image * s.pixels * C;
    const long one = s.batch * C;
    x += start_of_image;
    dy += start_of_image;
    dx += start_of_image;
    weight += s.per_image ? image * C : 0;
    bias += s.per_image ? image * C : 0;
    const float* centre = stats + image * 2 * C;
    const float* rstd = centre + C;
    sums += image * C;
    static thread_local std::vector<float> slopes;  // the gradient at the output of the norm; kept: new memory is slow
    if (slopes.size() < size_t(s.pixels * count)) slopes.resize(s.pixels * count);
    std::vector<double> of_weight(count), of_bias(count), of_normal(count);
    for (long start = 0; start < s.pixels; start += BLOCK)
        for (long c = first; c < last; c += N) {
            const long n = std::min<long>(N, last - c), end = std::min(start + BLOCK, s.pixels), i = c - first;
            const Floats m = load(centre + c, n), r = load(rstd + c, n), w = load(weight + c, n), b = load(bias + c, n);
            Floats sum_w = {}, sum_b = {}, sum_n = {};
            for (long p = start; p < end; p++) {
                const Floats normal = (load(x + p * C + c, n) - m) * r;
                Floats slope = load(dy + p * C + c, n);
                if (drop.below) slope = dropped(slope, start_of_image + p * C + c, drop);
                if (SILU) {
                    const Floats z = normal * w + b, g = sigmoid(z);
                    slope = slope * g * (1 + z * (1 - g));
                }
                store(&slopes[p * count + i], slope, n);
                sum_w += slope * normal;
                sum_b += slope;
                sum_n += normal;
            }
            for (long j = 0; j < n; j++)
                of_weight[i + j] += sum_w[j], of_bias[i + j] += sum_b[j], of_normal[i + j] += sum_n[j];
        }
    std::vector<float> level(count), slant(count);
    for (long c = 0; c < count; c += width) {
        double flat = 0, steep = 0;
        for (long i = c; i < c + width; i++) {
            flat += of_bias[i] * weight[first + i];
            steep += of_weight[i] * weight[first + i];
        }
        for (long i = c; i < c + width; i++) {
            level[i] = flat / (s.pixels * width);
            slant[i] = steep / (s.pixels * width);
            sums[first + i] = of_weight[i];
            sums[one + first + i] = of_bias[i];
            const double whole = of_bias[i] * weight[first + i] - s.pixels * (double)level[i] - of_normal[i] * slant[i];
            sums[2 * one + first + i] = whole * rstd[first + i];
        }
    }
    for (long start = 0; start < s.pixels; start += BLOCK)
        for (long c = first; c < last; c += N) {
            const long n = std::min<long>(N, last - c), end = std::min(start + BLOCK, s.pixels), i = c - first;
            const Floats m = load(centre + c, n), r = load(rstd + c, n), w = load(weight + c, n);
            const Floats flat = load(&level[i], n), steep = load(&slant[i], n);
            for (long p = start; p < end; p++) {
                const Floats normal = (load(x + p * C + c, n) - m) * r, slope = load(&slopes[p * count + i], n);
                store(dx + p * C + c, (slope * w - flat - normal * steep) * r, n);
            }
        }
}

// `work(image, first channel, one past the last)`, all of it, divided among threads: images, or groups of few images.
template <class Work>
void divide(Shape s, int threads, Work work) {
    const long parts = std::min<long>(s.groups, (threads + s.batch - 1) / s.batch);
#pragma omp parallel for num_threads(threads) schedule(static) if (s.batch * parts > 1)
    for (long item = 0; item < s.batch * parts; item++) {
        const long part = item % parts;
        work(item / parts, part * s.groups / parts * s.width(), (part + 1) * s.groups / parts * s.width());
    }
}

}  // namespace

#define FORWARD(T, SILU)                                                                                   \
    divide(s, threads, [=](long image, long first, long last) {                                            \
        forward<T, SILU>((const T*)x, emb, weight, bias, (T*)y, stats, s, eps, drop, image, first, last);  \
    })
#define BACKWARD(T, SILU)                                                                                  \
    divide(s, threads, [=](long image, long first, long last) {                                            \
        backward<T, SILU>((const T*)dy, (const T*)x, weight, bias, stats, (T*)dx, sums, s, drop, image, first, last); \
    })

extern "C" void norm_silu(const void* x, const float* emb, const float* weight, const float* bias, void* y,
                          float* stats, long batch, long pixels, long channels, long groups, long per_image,
                          uint32_t below, uint32_t key_0, uint32_t key_1, float kept, float eps, int silu, int half,
                          int threads) {
    const Shape s = {batch, pixels, channels, groups, per_image};
    const Drop drop = {below, {key_0, key_1}, kept};
    if (half)
        silu ? FORWARD(bf16, true) : FORWARD(bf16, false);
    else
        silu ? FORWARD(float, true) : FORWARD(float, false);
}

extern "C" void norm_silu_backward(const void* dy, const void* x, const float* weight, const float* bias,
                                   const float* stats, void* dx, float* sums, long batch, long pixels, long channels,
                                   long groups, long per_image, uint32_t below, uint32_t key_0, uint32_t key_1,
                                   float kept, int silu, int half, int threads) {
    const Shape s = {batch, pixels, channels, groups, per_image};
    const Drop drop = {below, {key_0, key_1}, kept};
    if (half)
        silu ? BACKWARD(bf16, true) : BACKWARD(bf16, false);
    else
        silu ? BACKWARD(float, true) : BACKWARD(float, false);
}
