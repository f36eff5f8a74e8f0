"""The decoder, for the tests of this folder."""

import pytest

from pipelines.jpeg.decoder import JpegDecoder, jpeg_decoder, why_no_jpeg_decoder


@pytest.fixture(scope="module")
def decoder() -> JpegDecoder:
    found = jpeg_decoder()
    if found is None:
        pytest.skip(f"the JPEG decoder cannot be built: {why_no_jpeg_decoder()}")
    return found
