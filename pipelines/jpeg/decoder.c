/* Crops of JPEGs: one decode of the region that all crops of an image need, then an antialiased resize of each.
 *
 * Built and called by decoder.py. No function has memory of its own: any number of threads may call at once.
 * Those that can fail leave one line in `message` (MESSAGE bytes).
 *
 * Pixels are those of a whole decode with the accurate integer DCT and smooth chroma upsampling, as Pillow's and
 * torchvision's are. What libjpeg only warns of is a failure here, as gray or noise follows it; see is_harmless.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <jpeglib.h>

#include <jerror.h>

#include "resize.h"

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000090
#error "libjpeg-turbo 2.1 or newer is needed"
#endif

#define MESSAGE 256
#define MOST_SCANS 500              /* progressive files have about ten, and each costs a pass over the image */
#define MOST_WORK 2000000000LL      /* scans times pixels: a few seconds */
#define FARTHEST ((int64_t)1 << 30) /* bound of a box's coordinates: their sums are exact in every type used */

typedef struct { /* an encoded image and the size that its header must state */
    const uint8_t *data;
    uint64_t length;
    int64_t height, width, most_pixels;
} Jpeg;

static bool crop_one(const Jpeg *, bool raw, const int64_t *boxes, int64_t views, int64_t step, int64_t size,
                     bool scaled, uint8_t *out, Scratch *, char *message);
static bool read_region(const Jpeg *, Region wanted, int denominator, Buffer *, uint8_t *whole, Patch *, char *);
static bool fail(char *message, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- entry points; the header's is at the end ------------------------------------------------------------- */

/* Decodes the samples begin .. end - 1 of N, once each, and cuts V crops out of each. Returns `end`, or the first
 * sample that could not be done; those before it are.
 *   images [N]          address of a JPEG, or of RGB pixels [height, width, 3] where raw [N] is not 0
 *   lengths [N]         bytes at that address
 *   heights, widths [N] size of the image as it is stored
 *   boxes [V, N, 4]     (top, left, height, width) in pixels of the stored image; may reach outside: black there
 *   out [V, N, size, size, 3]
 *   scaled              decode at 1/2, 1/4 or 1/8 where every crop is shrunk at least as much */
int64_t twinstream_jpeg_crops(const uint64_t *images, const uint64_t *lengths, const uint8_t *raw,
                              const int32_t *heights, const int32_t *widths, const int64_t *boxes, int64_t views,
                              int64_t samples, int64_t size, int32_t scaled, int64_t most_pixels, uint8_t *out,
                              int64_t begin, int64_t end, char *message) {
    Scratch scratch = {0};
    int64_t i = begin;
    for (; i < end; i++) {
        const Jpeg jpeg = {(const uint8_t *)(uintptr_t)images[i], lengths[i], heights[i], widths[i], most_pixels};
        if (!crop_one(&jpeg, raw[i], boxes + 4 * i, views, samples, size, scaled, out + i * size * size * 3, &scratch,
                      message))
            break;
    }
    free(scratch.pixels.memory);
    free(scratch.taps[0].memory);
    free(scratch.taps[1].memory);
    free(scratch.rows.memory);
    return i;
}

/* The whole image into out [height, width, 3]. False: see `message`. */
int32_t twinstream_jpeg_decode(const uint8_t *data, uint64_t length, int64_t height, int64_t width,
                               int64_t most_pixels, uint8_t *out, char *message) {
    const Jpeg jpeg = {data, length, height, width, most_pixels};
    Patch patch;
    return read_region(&jpeg, (Region){0, 0, height, width}, 1, NULL, out, &patch, message);
}

/* All crops of one image. `boxes` and `out` are the first view's; the next one's lie `step` samples on. */
static bool crop_one(const Jpeg *jpeg, bool raw, const int64_t *boxes, int64_t views, int64_t step, int64_t size,
                     bool scaled, uint8_t *out, Scratch *scratch, char *message) {
    int denominator = scaled && !raw ? 8 : 1;
    for (int64_t v = 0; v < views; v++) {
        const int64_t *box = boxes + v * step * 4;
        for (int k = 0; k < 4; k++)
            if (box[k] > FARTHEST || box[k] < (k < 2 ? -FARTHEST : 1))
                return fail(message, "a box (%lld, %lld, %lld, %lld) is empty or out of range", (long long)box[0],
                            (long long)box[1], (long long)box[2], (long long)box[3]);
        while (denominator > 1 && least(box[2], box[3]) < size * denominator) denominator /= 2;
    }

    /* In pixels of the decoded image, of which one covers denominator x denominator of the stored one. */
    const double pixel = 1.0 / denominator;
    Region wanted = {FARTHEST, FARTHEST, -FARTHEST, -FARTHEST};
    for (int64_t v = 0; v < views; v++) {
        const int64_t *box = boxes + v * step * 4;
        wanted.top = least(wanted.top, (int64_t)floor(box[0] * pixel));
        wanted.left = least(wanted.left, (int64_t)floor(box[1] * pixel));
        wanted.bottom = greatest(wanted.bottom, (int64_t)ceil((box[0] + box[2]) * pixel));
        wanted.right = greatest(wanted.right, (int64_t)ceil((box[1] + box[3]) * pixel));
    }

    Patch patch = {jpeg->data, 3 * jpeg->width, {0, 0, jpeg->height, jpeg->width}};
    if (raw) {
        if (jpeg->height < 1 || jpeg->width < 1 || jpeg->length != 3 * (uint64_t)jpeg->height * (uint64_t)jpeg->width)
            return fail(message, "%llu bytes of pixels, expected %lld x %lld x 3", (unsigned long long)jpeg->length,
                        (long long)jpeg->height, (long long)jpeg->width);
    } else if (!read_region(jpeg, wanted, denominator, &scratch->pixels, NULL, &patch, message))
        return false;

    for (int64_t v = 0; v < views; v++) {
        const int64_t *box = boxes + v * step * 4;
        const double scaled_box[4] = {box[0] * pixel, box[1] * pixel, box[2] * pixel, box[3] * pixel};
        if (!resize(&patch, scaled_box, size, out + v * step * size * size * 3, scratch))
            return fail(message, "out of memory");
    }
    return true;
}

/* ---- decoding --------------------------------------------------------------------------------------------- */

typedef struct {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf jump;
    char *message;
} Decoder;

static void stop(j_common_ptr info) {
    Decoder *decoder = info->client_data;
    char text[JMSG_LENGTH_MAX];
    info->err->format_message(info, text);
    fail(decoder->message, "%s", text);
    longjmp(decoder->jump, 1);
}

static void refuse(Decoder *decoder, const char *text) {
    fail(decoder->message, "%s", text);
    longjmp(decoder->jump, 1);
}

/* Bytes between two segments and odd values in a header leave every pixel as it was written, and both occur in
 * ImageNet. Bytes left over before a restart marker are damage: the decoder lost its place. */
static bool is_harmless(const struct jpeg_error_mgr *errors) {
    switch (errors->msg_code) {
    case JWRN_EXTRANEOUS_DATA: return errors->msg_parm.i[1] < JPEG_RST0 || errors->msg_parm.i[1] > JPEG_RST0 + 7;
    case JWRN_JFIF_MAJOR:
    case JWRN_ADOBE_XFORM:
    case JWRN_NOT_SEQUENTIAL: return true;
    default: return false;
    }
}

static void warn(j_common_ptr info, int level) {
    if (level < 0 && !is_harmless(info->err)) stop(info);
}

static void count_scans(j_common_ptr info) {
    const j_decompress_ptr image = (j_decompress_ptr)info;
    const int64_t scans = image->input_scan_number;
    if (scans > MOST_SCANS || scans * image->image_height * image->image_width > MOST_WORK)
        refuse(info->client_data, "too many scans");
}

static void open_decoder(Decoder *decoder) { /* may jump */
    decoder->info.err = jpeg_std_error(&decoder->errors);
    decoder->info.client_data = decoder;
    decoder->errors.error_exit = stop;
    decoder->errors.emit_message = warn;
    jpeg_create_decompress(&decoder->info);
    decoder->progress.progress_monitor = count_scans;
    decoder->info.progress = &decoder->progress;
}

/* False, with the reason, where the libjpeg found at run time is not the one of jpeglib.h. */
int32_t twinstream_jpeg_probe(char *message) {
    Decoder decoder = {.message = message};
    if (setjmp(decoder.jump)) return false;
    open_decoder(&decoder);
    jpeg_destroy_decompress(&decoder.info);
    return true;
}

/* Decodes at least the part of `wanted` that lies in the image, in pixels of the image at 1 / denominator, into the
 * buffer, or the image as it is into `whole`. No more rows are read than that takes. */
static bool read_region(const Jpeg *jpeg, Region wanted, int denominator, Buffer *buffer, uint8_t *whole,
                        Patch *patch, char *message) {
    /* A new one each time: the tables of one file must not serve the next, which may lack its own. */
    Decoder decoder = {.message = message};
    j_decompress_ptr info = &decoder.info;
    if (setjmp(decoder.jump)) {
        jpeg_destroy_decompress(info);
        return false;
    }
    open_decoder(&decoder);
    jpeg_mem_src(info, jpeg->data, jpeg->length);
    jpeg_read_header(info, TRUE);
    if (info->image_height != jpeg->height || info->image_width != jpeg->width) {
        char text[MESSAGE];
        snprintf(text, MESSAGE, "its header says %u x %u pixels (height x width), expected %lld x %lld",
                 info->image_height, info->image_width, (long long)jpeg->height, (long long)jpeg->width);
        refuse(&decoder, text);
    }
    if (jpeg->height * jpeg->width > jpeg->most_pixels) refuse(&decoder, "more pixels than the limit");
    if (info->jpeg_color_space != JCS_YCbCr && info->jpeg_color_space != JCS_RGB &&
        info->jpeg_color_space != JCS_GRAYSCALE)
        refuse(&decoder, "its colours are not gray, RGB or YCbCr");
    if (info->arith_code) refuse(&decoder, "its pixels are arithmetic-coded");
    info->out_color_space = JCS_RGB;
    info->scale_denom = denominator;
    jpeg_start_decompress(info);

    const int64_t height = info->output_height, width = info->output_width;
    Region held; /* never empty: an image that no box touches is still looked at */
    held.top = least(greatest(wanted.top, 0), height - 1);
    held.bottom = greatest(least(wanted.bottom, height), held.top + 1);
    /* Smooth upsampling takes its border from the next chroma pixel, which two more columns bring along. */
    const int64_t left = least(greatest(wanted.left - 2, 0), width - 1);
    const int64_t right = greatest(least(wanted.right + 2, width), left + 1);
    JDIMENSION first = left, columns = right - left;
    if (columns < width) jpeg_crop_scanline(info, &first, &columns);
    held.left = first;
    held.right = first + columns;

    const int64_t stride = 3 * (int64_t)columns;
    uint8_t *pixels = whole ? whole : reserve(buffer, stride * (held.bottom - held.top));
    if (!pixels) refuse(&decoder, "out of memory");
    if (held.top > 0 && jpeg_skip_scanlines(info, held.top) != held.top) refuse(&decoder, "it ends too early");
    for (int64_t y = held.top; y < held.bottom;) {
        JSAMPROW rows[16];
        const int64_t many = least(16, held.bottom - y);
        for (int64_t k = 0; k < many; k++) rows[k] = pixels + (y - held.top + k) * stride;
        const JDIMENSION done = jpeg_read_scanlines(info, rows, many);
        if (done == 0) refuse(&decoder, "it ends too early");
        y += done;
    }
    jpeg_destroy_decompress(info);
    *patch = (Patch){pixels, stride, held};
    return true;
}

/* ---- the header ------------------------------------------------------------------------------------------- */

static int orientation_of_exif(const uint8_t *tiff, uint64_t length);
static int orientation_of_xmp(const uint8_t *text, uint64_t length);

/* info: height, width, channels, 1 if it can be decoded here, 1 if progressive, orientation (1 to 8).
 * False where there is no JPEG header up to the pixels: see `message`. */
int32_t twinstream_jpeg_header(const uint8_t *data, uint64_t length, int32_t info[6], char *message) {
    if (length < 3 || data[0] != 0xFF || data[1] != 0xD8 || data[2] != 0xFF) return fail(message, "not a JPEG");
    bool framed = false;
    int exif = 0, xmp = 0;
    for (uint64_t at = 2;;) {
        while (at < length && data[at] != 0xFF) at++;
        while (at < length && data[at] == 0xFF) at++;
        if (at >= length) break;
        const int marker = data[at++];
        if (marker == 0 || marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) continue; /* no segment */
        if (marker == 0xD9 || length - at < 2) break;
        const uint64_t bytes = data[at] << 8 | data[at + 1];
        const uint8_t *body = data + at + 2;
        if (bytes < 2 || bytes > length - at) break;
        if (marker == 0xDA) {
            if (!framed) break;
            info[5] = exif ? exif : xmp ? xmp : 1;
            info[5] = info[5] >= 1 && info[5] <= 8 ? info[5] : 1;
            return true;
        }
        if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC && !framed) {
            if (bytes < 8) break;
            info[0] = body[1] << 8 | body[2];
            info[1] = body[3] << 8 | body[4];
            info[2] = body[5];
            /* Baseline, extended or progressive with Huffman codes; 8 bits; gray or three colours. */
            info[3] = marker <= 0xC2 && body[0] == 8 && (info[2] == 1 || info[2] == 3);
            info[4] = marker == 0xC2 || marker == 0xC6 || marker == 0xCA || marker == 0xCE;
            if (!info[0] || !info[1]) return fail(message, "its header says %d x %d pixels", info[0], info[1]);
            framed = true;
        }
        if (marker == 0xE1 && !exif && bytes > 8 && !memcmp(body, "Exif\0", 6))
            exif = orientation_of_exif(body + 6, bytes - 8);
        if (marker == 0xE1 && bytes > 31 && !memcmp(body, "http://ns.adobe.com/xap/1.0/", 29))
            xmp = orientation_of_xmp(body + 29, bytes - 31);
        at += bytes;
    }
    return fail(message, "it ends before its pixels");
}

static uint32_t number(const uint8_t *bytes, int count, bool little) {
    uint32_t value = 0;
    for (int k = 0; k < count; k++) value = value << 8 | bytes[little ? count - 1 - k : k];
    return value;
}

/* Tag 0x0112 of the first directory; 0 where there is none. */
static int orientation_of_exif(const uint8_t *tiff, uint64_t length) {
    if (length < 8 || (memcmp(tiff, "II*", 4) && memcmp(tiff, "MM\0*", 4))) return 0;
    const bool little = tiff[0] == 'I';
    uint64_t at = number(tiff + 4, 4, little);
    if (at + 2 > length) return 0;
    const uint64_t entries = number(tiff + at, 2, little);
    at += 2;
    for (uint64_t k = 0; k < entries && at + 12 <= length; k++, at += 12) {
        const uint32_t kind = number(tiff + at + 2, 2, little);
        if (number(tiff + at, 2, little) != 0x0112 || number(tiff + at + 4, 4, little) != 1) continue;
        if (kind == 3 || kind == 4) return (int)least(number(tiff + at + 8, kind == 3 ? 2 : 4, little), 9);
    }
    return 0;
}

/* tiff:Orientation="6" or tiff:Orientation>6; 0 where there is none. Pillow looks here, too, if EXIF says nothing. */
static int orientation_of_xmp(const uint8_t *text, uint64_t length) {
    static const char name[] = "tiff:Orientation";
    const uint64_t letters = sizeof name - 1;
    for (uint64_t at = 0; at + letters + 2 < length; at++) {
        if (text[at] != 't' || memcmp(text + at, name, letters)) continue;
        const uint8_t *next = text + at + letters;
        next += *next == '>' ? 1 : next[0] == '=' && next[1] == '"' ? 2 : 0;
        if ((next[-1] == '>' || next[-1] == '"') && next < text + length && *next >= '0' && *next <= '9')
            return *next - '0';
    }
    return 0;
}

/* ---- helpers ---------------------------------------------------------------------------------------------- */

static bool fail(char *message, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, MESSAGE, format, values);
    va_end(values);
    return false;
}
