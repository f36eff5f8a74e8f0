"""MV-MR (Kinakh et al., arXiv:2303.12130): an image and a view of it attract, and their embedding is to depend, by
distance correlation, on what is known to matter in images. No negatives, no stop-gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.views import View
from trainers.encoders import feature_width
from trainers.heads import ProjectorConfig, build_projector, embed_views
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.parts.representations import least_size, represent
from trainers.parts.representations.augmentation import Augmentation, augment_again
from trainers.parts.representations.weights import RepresentationWeights
from trainers.parts.view_terms import Estimator, ViewWeights, as_computed, dependence, view_terms

_SEED_SCALES = ("pixels", "scattering", "augmented_pixels")  # what the published code divides by 32, as embeddings


class Projector(ProjectorConfig):
    layers: int = Field(3, ge=1)
    hidden: int | None = Field(8192, ge=1)
    output: int = Field(8192, ge=1)
    batchnorm: Literal["all", "hidden", "none"] = "hidden"
    bias: bool = False


class Config(MethodConfig):
    name: Literal["mvmr"] = "mvmr"
    least_batch: ClassVar[int] = 4  # for an unbiased distance correlation
    std_margin: float = Field(1.0, gt=0)  # below which the standard deviation of an embedding's dimension costs
    # Of the dependence; None: unbiased. unbiased: R*², about 0 for what is independent. biased: R, nearly 1 for
    # whatever has many dimensions.
    estimator: Literal["unbiased", "biased"] | None = None
    weights: ViewWeights = ViewWeights()
    representations: RepresentationWeights = RepresentationWeights()
    augmentation: Augmentation = Augmentation()
    projector: Projector = Projector()
    # As the published code computes, against its paper: dependence on representations is made small, not large; biased
    # R, distances floored, of features / 32; HOG's upper bins get 1 - magnitude.
    faithful: bool = False

    @model_validator(mode="after")
    def _something_to_do(self) -> Config:
        if self.faithful and self.estimator is not None:
            raise ValueError(f"faithful=true brings its own estimator; remove estimator={self.estimator}")
        if not any((*self.weights.model_dump().values(), *self.representations.model_dump().values())):
            raise ValueError("all weights and representations are 0: the loss has no term; set one above 0")
        return self

    def check_views(self, plan: tuple[View, ...]) -> None:
        super().check_views(plan)
        if plan[0].augmented or not plan[1].augmented:
            raise ValueError(
                f"method.name={self.name} takes the image itself and an augmented view, in this order; choose"
                " views.plan=mvmr, or views.custom with a first view of crop: center or whole and nothing else"
            )

    def check(self, *, images: int, batch_size: int, image_size: int) -> None:
        super().check(images=images, batch_size=batch_size, image_size=image_size)
        for name in self.representations.wanted():
            if image_size < least_size(name):
                raise ValueError(
                    f"method.representations.{name} needs images of {least_size(name)} pixels, views have"
                    f" {image_size}; set it to 0"
                )
        again = any(name.startswith("augmented_") for name in self.representations.wanted())
        kernel = self.augmentation.kernel(image_size) if again and self.augmentation.blur else 1
        if kernel // 2 >= image_size:
            raise ValueError(
                f"method.augmentation.blur_kernel={kernel} is too large for views of {image_size} pixels; at most"
                f" {2 * image_size - 1}"
            )


class Method(BaseMethod):
    steps: Tensor  # int64: how many there have been, for the draws of `augmentation`

    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.config, self.facts = config, facts
        self.estimator: Estimator = "floored" if config.faithful else config.estimator or "unbiased"
        self.representations = config.representations.wanted()
        self.encoder = encoder
        self.projector = build_projector(config.projector, feature_width(encoder))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step = 0  # what `steps` holds on the device, known here too

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D]; one forward, so BatchNorm sees both views."""
        return embed_views(self.encoder, self.projector, views)

    def targets(self, batch: ViewBatch) -> dict[str, Tensor]:
        """[1, N, p] of each representation of the image without augmentation."""
        images, facts = batch.views[0], self.facts

        def augmented() -> Tensor:
            return augment_again(
                images,
                self.config.augmentation,
                mean=facts.mean,
                std=facts.std,
                seed=facts.seed,
                step=self._step,
                indices=batch.indices_on_host(),
            )

        found = represent(self.representations, images, augmented, seed_bins=self.config.faithful)
        return {name: rows[None] for name, rows in found.items()}

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        config, z = self.config, as_computed(embeddings["z"])
        loss, scalars = view_terms(
            z, config.weights, std_margin=config.std_margin, estimator=self.estimator, group=group
        )
        for name, weight in self.representations.items():
            scaled = name in _SEED_SCALES
            found = dependence(embeddings[name].squeeze(0), z[1], self.estimator, group, scaled=scaled)
            loss = loss + weight * (found if config.faithful else 1 - found)
            scalars[f"dependence_{name}"] = found.detach()
        return {"loss": loss} | scalars

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        self.steps.add_(1)
        self._step += 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._step = int(self.steps)
