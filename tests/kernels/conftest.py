"""What several of the kernels' tests need."""

import pytest

from kernels.jpeg import JpegDecoder, jpeg_decoder, why_no_jpeg_decoder


@pytest.fixture(scope="module")
def decoder() -> JpegDecoder:
    found = jpeg_decoder()
    if found is None:
        pytest.skip(f"the JPEG decoder cannot be built: {why_no_jpeg_decoder()}")
    return found
