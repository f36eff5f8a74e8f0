/* Mutated JPEGs through the decoder, built with AddressSanitizer and UndefinedBehaviorSanitizer.
 *
 *   cc -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all tests/fuzz/decoder_fuzz.c -ljpeg -lm -o fuzz
 *   ./fuzz FIRST COUNT FILE.jpg …
 *
 * Trial t is decided by t alone, so a failure is repeated by `./fuzz t 1 FILES`. What libjpeg itself reads and writes
 * is not instrumented: the input and the pixels end at a page that may not be touched. A trial of more than
 * SECONDS ends the process as a hang. Prints how many images were decoded and how many refused.
 */
#include "../../pipelines/jpeg/decoder.c"

#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define SECONDS 20
#define LONGEST (1 << 18)     /* bytes of a mutated file */
#define MOST_PIXELS (1 << 20) /* larger ones are refused, as by the loaders: thousands of trials must end */

static uint64_t trial, state;

static uint64_t draw(uint64_t below) { /* splitmix64 */
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return below ? z % below : z;
}

static void report(int number) {
    char line[96];
    const char *what = number == SIGALRM ? "hang" : "crash";
    const int length = snprintf(line, sizeof line, "%s in trial %llu (signal %d)\n", what, (unsigned long long)trial, number);
    if (write(2, line, (size_t)length) < 0) _exit(4);
    _exit(3);
}

typedef struct {
    uint8_t *end; /* the byte behind it is on a page that may not be touched */
} Guarded;

static Guarded guarded(size_t bytes) {
    const size_t page = 4096, size = (bytes + page - 1) / page * page;
    uint8_t *memory = mmap(NULL, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + size, page, PROT_NONE)) exit(5);
    return (Guarded){memory + size};
}

static size_t mutate(const uint8_t *from, size_t length, const uint8_t *other, size_t others, uint8_t *to) {
    static const uint8_t odd[] = {0x00, 0x01, 0x7F, 0x80, 0xFF, 0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1};
    memcpy(to, from, length);
    for (uint64_t left = 1 + draw(6); left && length > 4; left--) {
        const size_t at = draw(4) ? draw(length) : draw(least(length, 700)); /* headers are where it is decided */
        const size_t many = 1 + draw(least(64, length - at));
        switch (draw(8)) {
        case 0: to[at] ^= 1u << draw(8); break;
        case 1: to[at] = (uint8_t)draw(256); break;
        case 2: to[at] = odd[draw(sizeof odd)]; break;
        case 3: length = draw(3) ? length : at + 1; break;
        case 4: memmove(to + at, to + at + many, length - at - many); length -= many; break;
        case 5:
            if (length + many > LONGEST) break;
            memmove(to + at + many, to + at, length - at);
            length += many;
            break;
        case 6: /* a marker */
            if (at + 1 < length) to[at] = 0xFF, to[at + 1] = odd[draw(sizeof odd)];
            break;
        default: { /* a part of another file */
            const size_t start = draw(others), take = least(least(1 + draw(512), others - start), LONGEST - at);
            memcpy(to + at, other + start, take);
            length = greatest(length, at + take);
        }
        }
    }
    return length;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    const uint64_t first = strtoull(arguments[1], NULL, 10), trials = strtoull(arguments[2], NULL, 10);
    const int files = count - 3;
    uint8_t **seeds = calloc((size_t)files, sizeof *seeds);
    size_t *lengths = calloc((size_t)files, sizeof *lengths);
    for (int k = 0; k < files; k++) {
        FILE *file = fopen(arguments[k + 3], "rb");
        seeds[k] = malloc(LONGEST);
        if (!file || !seeds[k]) return 2;
        lengths[k] = fread(seeds[k], 1, LONGEST, file);
        fclose(file);
    }
    signal(SIGALRM, report);
    signal(SIGSEGV, report);
    signal(SIGBUS, report);
    const Guarded input = guarded(LONGEST), pixels = guarded(3 * MOST_PIXELS), crops = guarded(2 * 3 * 64 * 64);
    uint8_t *draft = malloc(LONGEST);
    uint64_t decoded = 0, refused = 0, cropped = 0;
    for (trial = first; trial < first + trials; trial++) {
        state = trial * 0x2545F4914F6CDD1Du;
        alarm(SECONDS);
        const uint64_t k = draw(files), other = draw(files);
        const size_t length = mutate(seeds[k], lengths[k], seeds[other], lengths[other], draft);
        uint8_t *data = input.end - length;
        memcpy(data, draft, length);
        char message[MESSAGE] = "";
        int32_t info[6] = {0};
        if (!twinstream_jpeg_header(data, length, info, message)) {
            refused++;
            info[0] = 1 + (int32_t)draw(80), info[1] = 1 + (int32_t)draw(80); /* the decoder must refuse it, too */
        }
        const int64_t height = info[0], width = info[1];
        if (height * width <= MOST_PIXELS) {
            uint8_t *out = pixels.end - 3 * height * width;
            if (twinstream_jpeg_decode(data, length, height, width, MOST_PIXELS, out, message)) decoded++;
            else refused += !message[0] ? (report(0), 0) : 1;
        }
        const int64_t size = 1 + (int64_t)draw(64);
        int64_t boxes[8];
        for (int v = 0; v < 2; v++) {
            boxes[4 * v] = (int64_t)draw(2 * height) - height / 2;
            boxes[4 * v + 1] = (int64_t)draw(2 * width) - width / 2;
            boxes[4 * v + 2] = 1 + (int64_t)draw(2 * height);
            boxes[4 * v + 3] = 1 + (int64_t)draw(2 * width);
        }
        if (!draw(50)) boxes[draw(8)] = (int64_t)draw(0) >> 1; /* nonsense */
        const uint64_t address = (uintptr_t)data, bytes = length;
        const uint8_t raw = 0;
        const int32_t heights = (int32_t)height, widths = (int32_t)width;
        cropped += twinstream_jpeg_crops(&address, &bytes, &raw, &heights, &widths, boxes, 2, 1, size, (int32_t)draw(2),
                                         MOST_PIXELS, crops.end - 2 * 3 * size * size, 0, 1, message) == 1;
    }
    for (int k = 0; k < files; k++) free(seeds[k]);
    free(seeds);
    free(lengths);
    free(draft);
    printf("%llu trials: %llu decoded whole, %llu cropped, %llu refusals\n", (unsigned long long)trials,
           (unsigned long long)decoded, (unsigned long long)cropped, (unsigned long long)refused);
    return 0;
}
