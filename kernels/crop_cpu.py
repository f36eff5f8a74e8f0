"""The loop of `crop_resize` on a CPU, for numba to compile."""

import numpy as np


def crop_loop(images, boxes, rows, sizes, out, begin, end):  # type: ignore[no-untyped-def]
    """In numba's dialect. One function, because numba caches no closures on disk."""
    size = out.shape[1]
    first, count = np.empty((2, size), np.int64), np.empty((2, size), np.int64)
    for b in range(begin, end):
        top, left, height, width = boxes[b]
        image = images[rows[b]].reshape(images.shape[1], images.shape[2] * 3)
        image_height, image_width = sizes[b, 0], sizes[b, 1]

        # The pixels under the triangle of each output, rows (0) and columns (1), and their weights.
        taps = np.empty((2, size, int(2 * max(height / size, width / size, 1.0)) + 2), np.float32)
        for axis in range(2):
            length = boxes[b, 2 + axis]
            scale = length / size
            support = max(scale, 1.0)
            for i in range(size):
                centre = (i + 0.5) * scale
                low = max(int(np.ceil(centre - support - 0.5)), 0)
                high = min(int(np.floor(centre + support - 0.5)), length - 1)
                total = 0.0
                for j in range(low, high + 1):
                    total += max(1.0 - abs(j + 0.5 - centre) / support, 0.0)
                for j in range(low, high + 1):
                    taps[axis, i, j - low] = max(1.0 - abs(j + 0.5 - centre) / support, 0.0) / total
                first[axis, i], count[axis, i] = low, high + 1 - low

        # Rows first: whole rows add up in vector registers, and only one row is ever held.
        line = np.zeros(width * 3, np.float32)
        low, high = min(max(-left, 0), width), max(min(image_width - left, width), 0)
        inside = line[3 * low : 3 * high]  # empty where the box misses the image
        for y in range(size):
            inside[:] = 0.0
            for j in range(count[0, y]):
                row = top + first[0, y] + j
                weight = taps[0, y, j]
                if weight > 0.0 and 0 <= row < image_height:
                    source = image[row, 3 * (left + low) : 3 * (left + high)]
                    for k in range(inside.size):
                        inside[k] += weight * np.float32(source[k])
            for x in range(size):
                red = green = blue = np.float32(0.5)
                for j in range(count[1, x]):
                    weight = taps[1, x, j]
                    k = 3 * (first[1, x] + j)
                    red += weight * line[k]
                    green += weight * line[k + 1]
                    blue += weight * line[k + 2]
                out[b, y, x, 0] = np.uint8(min(red, np.float32(255.0)))
                out[b, y, x, 1] = np.uint8(min(green, np.float32(255.0)))
                out[b, y, x, 2] = np.uint8(min(blue, np.float32(255.0)))
