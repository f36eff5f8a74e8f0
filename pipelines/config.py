"""The base of every config section."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Typed settings that cannot be changed; unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoaderConfig(Section):
    """How stored images become batches: which images, boxes and colours a step sees does not depend on the loader.

    Pixels of two loaders differ by rounding, or by more where `scaled` or `resident` reduce an image first.
    """

    # resident: the whole set on the device. native: our own decoder, on files, arrays and shards. ffcv: the same on a
    # .beton. dali: NVIDIA's decoders. plain: torch's DataLoader, torchvision. auto: by the set and what is installed.
    loader: Literal["auto", "resident", "native", "ffcv", "dali", "plain"] = "auto"
    workers: int | None = Field(default=None, ge=1)  # decoding threads (plain: processes) of each rank; None: its cores
    ahead: int = Field(default=3, ge=1)  # batches in flight before the one in use
    order: Literal["random", "quasi_random"] = "random"  # quasi_random: nearly as stored on the disk
    last: Literal["drop", "pad"] = "drop"  # what whole batches leave over; pad: filled up with the epoch's first images
    scaled: bool = True  # JPEGs decode at 1/2, 1/4 or 1/8 where a view still has no fewer pixels than it needs
    os_cache: bool = False  # .beton: map the file into memory, which ends the process should the file be cut off then
    decode: Literal["cpu", "mixed"] | None = None  # dali: where JPEGs decode; None: mixed on a GPU
    hw_decoder_load: float = Field(default=0.65, ge=0, le=1)  # dali, mixed: share of the images for the hardware engine
    reader: Literal["ours", "dali"] = "ours"  # dali: who reads files, shuffles and draws the crops

    @model_validator(mode="after")
    def _dalis_settings_are_for_dali(self) -> LoaderConfig:
        if self.loader not in ("auto", "dali"):
            for name, value in (("reader=dali", self.reader == "dali"), ("decode", self.decode is not None)):
                if value:
                    raise ValueError(f"{name} is for loader=dali, and the loader is {self.loader!r}; leave one out")
        return self
