"""Crop and antialiased bilinear resize of a batch, each sample by its own box: uint8 in, uint8 out.

The filter is the triangle of Pillow and of torchvision's `resized_crop(..., antialias=True)`: as wide as an
output pixel when shrinking, plain bilinear when enlarging, normalised over the pixels inside the box. The
result is rounded once, at the end. What a box holds outside the image is black, as if the image had been
padded first.

On a GPU a batch is two batched matrix products with one weight matrix a sample and axis. On a CPU those
matrices are nearly all zeros, so a compiled loop visits only the few pixels under each triangle.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from kernels.transfer import to_device

_CHUNK_BYTES = 256 * 2**20  # temporaries of the matrix form


def crop_resize(
    images: Tensor, boxes: Tensor, size: int, *, rows: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Cuts B boxes out of N images and resizes each to size x size.

    Args:
        images: [N, H, W, 3] uint8; smaller images lie in the top left corner of their canvas.
        boxes: [B, 4] int64 (top, left, height, width) in pixels; may reach outside the image: black there.
            May lie on the CPU while the images are elsewhere: nothing waits for the device then.
        size: side of the result in pixels.
        rows: [B] int64, the image that each box is cut from; None: one box an image, in order.
        sizes: [B, 2] int64, for each box the true (height, width) of its image; None: the canvas is full.

    Returns:
        [B, size, size, 3] uint8 on the device of `images`; `images` itself where there is nothing to do.

    Raises:
        ValueError: for wrong shapes or dtypes and, where they lie on the CPU, for empty boxes, rows that
            name no image and sizes beyond the canvas.
    """
    _check(images, boxes, size, rows, sizes)
    if _is_identity(images, boxes, size, sizes):
        return images if rows is None else images.index_select(0, to_device(rows, images.device))
    if len(boxes) == 0:
        return images.new_empty((0, size, size, 3))
    if rows is None:
        rows = torch.arange(len(boxes))
    if sizes is None:
        sizes = torch.tensor(images.shape[1:3]).expand(len(boxes), 2)
    boxes, rows, sizes = (to_device(t, images.device) for t in (boxes, rows, sizes))
    crop = _crop_compiled if images.device.type == "cpu" else _crop_matmul
    return crop(images, boxes, size, rows, sizes)


def _check(images: Tensor, boxes: Tensor, size: int, rows: Tensor | None, sizes: Tensor | None) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images: expected [N, H, W, 3] uint8, got {list(images.shape)} {images.dtype}")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.int64:
        raise ValueError(f"boxes: expected [B, 4] int64, got {list(boxes.shape)} {boxes.dtype}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if rows is None and len(boxes) != len(images):
        raise ValueError(f"{len(boxes)} boxes for {len(images)} images: pass rows to say which image each is cut from")
    if rows is not None and (rows.shape != boxes.shape[:1] or rows.dtype != torch.int64):
        raise ValueError(f"rows: expected [{len(boxes)}] int64, got {list(rows.shape)} {rows.dtype}")
    if sizes is not None and sizes.shape != (len(boxes), 2):
        raise ValueError(f"sizes: expected [{len(boxes)}, 2], one a box, got {list(sizes.shape)}")
    # Values are looked at only where that costs no wait for a device.
    if boxes.device.type == "cpu" and len(boxes) and int(boxes[:, 2:].min()) < 1:
        raise ValueError(f"boxes: expected heights and widths from 1, got {int(boxes[:, 2:].min())}")
    if rows is not None and rows.device.type == "cpu" and len(rows):
        low, high = (int(v) for v in rows.aminmax())
        if low < 0 or high >= len(images):
            raise ValueError(f"rows: expected 0 to {len(images) - 1}, got {low} to {high}")
    if sizes is not None and sizes.device.type == "cpu" and len(sizes):
        canvas = torch.tensor(images.shape[1:3])
        if bool(((sizes < 1) | (sizes > canvas)).any()):
            raise ValueError(f"sizes: expected 1 to the canvas, {canvas.tolist()}, got {sizes.amax(0).tolist()}")


def _is_identity(images: Tensor, boxes: Tensor, size: int, sizes: Tensor | None) -> bool:
    if images.shape[1:3] != (size, size) or boxes.device.type != "cpu":
        return False
    if sizes is not None and (sizes.device.type != "cpu" or bool((sizes != size).any())):
        return False
    return bool((boxes == torch.tensor([0, 0, size, size])).all())


# ---- the matrix form -----------------------------------------------------------------------------------


@torch.no_grad()
def _crop_matmul(images: Tensor, boxes: Tensor, size: int, rows: Tensor, sizes: Tensor) -> Tensor:
    height, width = images.shape[1:3]
    out = images.new_empty((len(boxes), size, size, 3))
    per_crop = 4 * (3 * height * width + 6 * size * width + 2 * size * (height + width) + 6 * size * size)
    step = max(1, _CHUNK_BYTES // per_crop)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 has fewer bits than the pixels
        for first in range(0, len(boxes), step):
            part = slice(first, first + step)
            top, left, box_height, box_width = boxes[part].unbind(1)
            vertical = _weights(top, box_height, sizes[part, 0], height, size)
            horizontal = _weights(left, box_width, sizes[part, 1], width, size)
            pixels = images[rows[part]].to(torch.float32)
            lines = vertical @ pixels.flatten(2)  # [b, size, W * 3]
            columns = lines.view(-1, size, width, 3).transpose(1, 2).flatten(2)  # [b, W, size * 3]
            resized = (horizontal @ columns).view(-1, size, size, 3).transpose(1, 2)
            out[part] = resized.add_(0.5).clamp_(0, 255)  # the cast to uint8 truncates
    return out


def _weights(start: Tensor, length: Tensor, limit: Tensor, extent: int, size: int) -> Tensor:
    """[b, size, extent] float32: what each pixel of the canvas gives to each output along one axis, for boxes
    from `start` on, `length` long, in images that fill the first `limit` pixels."""
    start, length, limit = (t.to(torch.float64)[:, None] for t in (start, length, limit))
    scale = length / size
    support = scale.clamp(min=1.0)
    output = torch.arange(size, device=start.device, dtype=torch.float64)
    pixel = torch.arange(extent, device=start.device, dtype=torch.float64)
    centre = (output + 0.5) * scale  # [b, size], in pixels of the box
    position = pixel - start + 0.5  # [b, extent], too
    seen = (position > 0) & (position < length) & (pixel < limit)
    distance = (position.float()[:, None, :] - centre.float()[:, :, None]).abs_()
    weights = distance.div_(support.float()[:, :, None]).neg_().add_(1.0).clamp_(min=0.0)
    weights.mul_(seen[:, None, :])
    return weights.div_(_triangle_sum(centre, support, length).float()[:, :, None])


def _triangle_sum(centre: Tensor, support: Tensor, length: Tensor) -> Tensor:
    """The sum of 1 - |j + 0.5 - centre| / support over the box pixels j under the triangle, in closed form:
    pixels outside the image weigh too, and no shape may depend on how far a box reaches."""
    peak = centre - 0.5
    first = (peak - support).ceil().clamp(min=0)
    middle = peak.floor()
    last = torch.minimum((peak + support).floor(), length - 1)
    rising, falling = (middle - first + 1).clamp(min=0), last - middle
    left = rising * (1 - peak / support) + rising * (first + middle) / 2 / support
    right = falling * (1 + peak / support) - falling * (middle + 1 + last) / 2 / support
    return left + right


# ---- the compiled form ---------------------------------------------------------------------------------


def _crop_compiled(images: Tensor, boxes: Tensor, size: int, rows: Tensor, sizes: Tensor) -> Tensor:
    out = torch.empty((len(boxes), size, size, 3), dtype=torch.uint8)
    tensors = (images, boxes, rows, sizes.to(torch.int64))
    arrays = [t.contiguous().numpy() for t in tensors]
    crop = numba_crop_resize()
    threads = min(torch.get_num_threads(), len(boxes))
    if threads == 1:
        crop(*arrays, out.numpy(), 0, len(boxes))
        return out
    bounds = [len(boxes) * t // threads for t in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(crop, *arrays, out.numpy(), bounds[t], bounds[t + 1]) for t in range(threads)]
        for job in jobs:
            job.result()
    return out


@cache
def numba_crop_resize() -> Callable[..., None]:
    """The compiled loop, callable from other numba code (nogil). Built at the first call, in seconds.

    f(images[N, H, W, 3] uint8, boxes[B, 4], rows[B], sizes[B, 2] int64, out[B, size, size, 3] uint8, first,
    last) fills out[first:last]. Arguments are not checked.
    """
    import numba

    from kernels.crop_cpu import crop_loop

    try:
        return numba.njit(nogil=True, cache=True)(crop_loop)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return numba.njit(nogil=True)(crop_loop)
