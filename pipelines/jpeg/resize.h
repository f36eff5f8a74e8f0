/* Crop and antialiased resize of one image; the part of decoder.c that knows nothing of JPEG.
 *
 * The filter is that of kernels/crop.py: a triangle as wide as an output pixel, at least as two input pixels;
 * normalised over the pixels with their centre in the box; black outside the image; rounded once.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 4 /* output rows made side by side, one 16-byte pixel of each in a register */

typedef struct {
    int64_t top, left, bottom, right; /* bottom and right excluded */
} Region;

typedef struct { /* what there is of an image: RGB pixels of a region */
    const uint8_t *pixels;
    int64_t stride; /* bytes from row to row */
    Region held;
} Patch;

typedef struct {
    void *memory;
    size_t bytes;
} Buffer;

typedef struct { /* memory of one call, kept from image to image */
    Buffer pixels, taps[2], rows;
} Scratch;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

/* At least so many bytes, from a cache line's border on; what they held is lost. NULL: there is no memory. */
static void *reserve(Buffer *buffer, size_t bytes) {
    if (bytes > buffer->bytes) {
        free(buffer->memory);
        buffer->bytes = (bytes + bytes / 4 + 63) / 64 * 64;
        buffer->memory = aligned_alloc(64, buffer->bytes);
        if (!buffer->memory) buffer->bytes = 0;
    }
    return buffer->memory;
}

typedef float Pixels __attribute__((vector_size(ROWS * 16))); /* a pixel, RGB and a spare, of each output row */
typedef int32_t Integers __attribute__((vector_size(ROWS * 16)));
typedef uint16_t Shorts __attribute__((vector_size(ROWS * 8)));
typedef uint8_t Bytes __attribute__((vector_size(ROWS * 4)));

typedef struct { /* the pixels under the triangle of each output along one axis, and their weights */
    int32_t *first, *count;
    float *weights;    /* [size, most], 0 behind `count` */
    int64_t most;      /* largest count */
    int64_t low, high; /* the pixels that any output looks at; none where low >= high */
} Taps;

static bool make_taps(Taps *, Buffer *, double start, double length, int64_t low, int64_t high, int64_t size);
static void add_rows(const Patch *, const Taps *vertical, int64_t y, int64_t left, int64_t bytes, float *line);
static void mix_columns(const Pixels *, const Taps *horizontal, int64_t size, uint8_t *const rows[ROWS]);

/* Box (top, left, height, width) of the image that `patch` is a part of, all of it that the box touches, as RGB
 * [size, size, 3]. False: there is no memory. */
static bool resize(const Patch *patch, const double box[4], int64_t size, uint8_t *out, Scratch *scratch) {
    const Region held = patch->held;
    Taps vertical, horizontal;
    if (!make_taps(&vertical, &scratch->taps[0], box[0], box[2], held.top, held.bottom, size) ||
        !make_taps(&horizontal, &scratch->taps[1], box[1], box[3], held.left, held.right, size))
        return false;
    if (vertical.low >= vertical.high || horizontal.low >= horizontal.high) {
        memset(out, 0, size * size * 3);
        return true;
    }
    const int64_t width = horizontal.high - horizontal.low, padded = width + horizontal.most;
    const size_t line_bytes = (size_t)(3 * width + 32) * sizeof(float);
    const size_t mixed = (line_bytes + 63) / 64 * 64, spare = mixed + padded * sizeof(Pixels);
    uint8_t *memory = reserve(&scratch->rows, spare + 3 * size);
    if (!memory) return false;
    float *line = (float *)memory;
    float *side_by_side = (float *)(memory + mixed); /* [padded, ROWS, 4] */
    memset(memory, 0, spare);
    for (int64_t i = 0; i < size; i++) horizontal.first[i] -= horizontal.low;

    for (int64_t y = 0; y < size; y += ROWS) {
        uint8_t *rows[ROWS];
        for (int64_t r = 0; r < ROWS; r++) {
            rows[r] = y + r < size ? out + (y + r) * size * 3 : memory + spare;
            if (y + r >= size) continue;
            add_rows(patch, &vertical, y + r, horizontal.low, 3 * width, line);
            for (int64_t x = 0; x < width; x++) memcpy(side_by_side + 4 * (ROWS * x + r), line + 3 * x, 16);
        }
        mix_columns((const Pixels *)side_by_side, &horizontal, size, rows);
    }
    return true;
}

/* `line` = (or, `more`, +=) the weighted sum of `count` rows. Inlined with a count that the compiler knows. */
static inline __attribute__((always_inline)) void add(const uint8_t *restrict source, int64_t stride,
                                                      const float *restrict weights, int count, bool more,
                                                      int64_t bytes, float *restrict line) {
    for (int64_t k = 0; k < bytes; k++) {
        float sum = more ? line[k] : 0;
        for (int t = 0; t < count; t++) sum += weights[t] * source[t * stride + k];
        line[k] = sum;
    }
}

/* The weighted sum of the rows under output row y, from column `left` on. */
static void add_rows(const Patch *patch, const Taps *vertical, int64_t y, int64_t left, int64_t bytes, float *line) {
    const float *weights = vertical->weights + y * vertical->most;
    const int64_t stride = patch->stride;
    const uint8_t *source =
        patch->pixels + (vertical->first[y] - patch->held.top) * stride + 3 * (left - patch->held.left);
    const int64_t count = vertical->count[y];
    switch (count) {
    case 0: memset(line, 0, bytes * sizeof(float)); return;
    case 1: add(source, stride, weights, 1, false, bytes, line); return;
    case 2: add(source, stride, weights, 2, false, bytes, line); return;
    case 3: add(source, stride, weights, 3, false, bytes, line); return;
    default: add(source, stride, weights, 4, false, bytes, line);
    }
    int64_t t = 4;
    for (; t + 2 <= count; t += 2) add(source + t * stride, stride, weights + t, 2, true, bytes, line);
    if (t < count) add(source + t * stride, stride, weights + t, 1, true, bytes, line);
}

static inline __attribute__((always_inline)) void mix(const Pixels *line, const Taps *taps, int64_t count,
                                                      int64_t size, uint8_t *const rows[ROWS]) {
    for (int64_t x = 0; x < size; x++) {
        const Pixels *pixels = line + taps->first[x];
        const float *weights = taps->weights + x * taps->most;
        Pixels sum = pixels[0] * weights[0] + 0.5f;
        for (int64_t t = 1; t < count; t++) sum += pixels[t] * weights[t];
        Integers whole = __builtin_convertvector(sum, Integers);
        whole -= whole >> 8; /* 256, to which thousands of roundings may add up, is 255 */
        /* By way of 16 bits: GCC makes scalar code of the direct conversion for AVX2. */
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(whole, Shorts), Bytes);
        if (x + 1 < size)
            for (int r = 0; r < ROWS; r++) memcpy(rows[r] + 3 * x, (const uint8_t *)&bytes + 4 * r, 4);
        else /* the fourth byte would be another row's */
            for (int r = 0; r < ROWS; r++) memcpy(rows[r] + 3 * x, (const uint8_t *)&bytes + 4 * r, 3);
    }
}

/* Counts that the compiler knows are twice as fast. */
static void mix_columns(const Pixels *line, const Taps *taps, int64_t size, uint8_t *const rows[ROWS]) {
    switch (taps->most) {
    case 1: mix(line, taps, 1, size, rows); break;
    case 2: mix(line, taps, 2, size, rows); break;
    case 3: mix(line, taps, 3, size, rows); break;
    case 4: mix(line, taps, 4, size, rows); break;
    case 5: mix(line, taps, 5, size, rows); break;
    default: mix(line, taps, taps->most, size, rows);
    }
}

/* Taps of a box from `start` on, `length` long, in an image of which the pixels low .. high - 1 are there. Those that
 * are not weigh nothing, but count in the normalisation as the black pixels that they stand for. */
static bool make_taps(Taps *taps, Buffer *buffer, double start, double length, int64_t low, int64_t high,
                      int64_t size) {
    const double scale = length / size, support = scale > 1 ? scale : 1;
    taps->most = greatest(1, (int64_t)fmin(2 * support + 2, high - low));
    taps->first = reserve(buffer, size * (2 * sizeof(int32_t) + taps->most * sizeof(float)));
    if (!taps->first) return false;
    taps->count = taps->first + size;
    taps->weights = (float *)(taps->count + size);
    const int64_t room = taps->most;
    taps->most = 1;
    taps->low = high;
    taps->high = low;
    for (int64_t i = 0; i < size; i++) {
        const double peak = start + (i + 0.5) * scale - 0.5; /* positions are those of pixel centres */
        const double begin = fmax(floor(peak - support) + 1, ceil(start - 0.5));
        const double end = fmin(ceil(peak + support) - 1, floor(start + length - 0.5));
        const double middle = floor(peak), rising = fmax(middle - begin + 1, 0), falling = end - middle;
        const double distances = rising * (peak - (begin + middle) / 2) + falling * ((middle + 1 + end) / 2 - peak);
        const double total = rising + falling - distances / support;
        const int64_t first = (int64_t)fmax(begin, low), last = (int64_t)fmin(end, high - 1);
        float *weights = taps->weights + i * room;
        for (int64_t j = first; j <= last; j++) weights[j - first] = (1 - fabs(j - peak) / support) / total;
        taps->count[i] = greatest(last - first + 1, 0);
        taps->first[i] = taps->count[i] ? first : -1;
        if (!taps->count[i]) continue;
        taps->low = least(taps->low, first);
        taps->high = greatest(taps->high, last + 1);
        taps->most = greatest(taps->most, taps->count[i]);
    }
    for (int64_t i = 0; i < size; i++) { /* one count for all, filled up with zeros */
        if (taps->first[i] < 0) taps->first[i] = taps->low;
        memmove(taps->weights + i * taps->most, taps->weights + i * room, taps->count[i] * sizeof(float));
        memset(taps->weights + i * taps->most + taps->count[i], 0, (taps->most - taps->count[i]) * sizeof(float));
    }
    return true;
}
