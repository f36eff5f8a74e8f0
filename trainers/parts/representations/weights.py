"""Which representations a recipe asks for."""

from __future__ import annotations

from pydantic import Field

from pipelines.config import Section


class RepresentationWeights(Section):
    """Of the terms of a loss, one a representation; 0: it is not computed."""

    pixels: float = Field(1.0, ge=0)
    scattering: float = Field(1.0, ge=0)
    augmented_pixels: float = Field(1.0, ge=0)
    hog: float = Field(1.0, ge=0)
    local_std: float = Field(1.0, ge=0)
    dct: float = Field(0.0, ge=0)
    patch_scattering: float = Field(0.0, ge=0)
    augmented_scattering: float = Field(0.0, ge=0)
    augmented_hog: float = Field(0.0, ge=0)
    augmented_local_std: float = Field(0.0, ge=0)

    def wanted(self) -> dict[str, float]:
        """name -> weight of those that are computed."""
        return {name: weight for name, weight in self.model_dump().items() if weight}
