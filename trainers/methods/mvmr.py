"""MV-MR (Kinakh et al., arXiv:2303.12130): an image and a view of it attract, and their embedding is to depend, by
distance correlation, on what is known to matter in images. No negatives, no stop-gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels import distance_correlation
from kernels.ranks import mean_over_ranks
from pipelines.batch import ViewBatch
from pipelines.config import Section
from pipelines.views import View
from trainers.encoders import feature_width
from trainers.heads import ProjectorConfig, build_projector
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.parts.deviations import batch_deviations
from trainers.parts.floored_correlation import floored_distance_correlation
from trainers.parts.representations import least_size, represent
from trainers.parts.representations.augmentation import Augmentation, augment_again
from trainers.parts.representations.weights import RepresentationWeights

_SEED_SCALES = {
    "pixels",
    "scattering",
    "augmented_pixels",
}  # what the published code divides by 32, as it does embeddings


class Projector(ProjectorConfig):
    layers: int = Field(3, ge=1)
    hidden: int | None = Field(8192, ge=1)
    output: int = Field(8192, ge=1)
    batchnorm: Literal["all", "hidden", "none"] = "hidden"
    bias: bool = False


class Weights(Section):
    mse: float = Field(1.0, ge=0)
    std: float = Field(1.0, ge=0)
    views: float = Field(1.0, ge=0)


class Config(MethodConfig):
    name: Literal["mvmr"] = "mvmr"
    std_margin: float = Field(1.0, gt=0)  # below which the standard deviation of an embedding's dimension costs
    # Of the dependence; None: unbiased. unbiased: R*², about 0 for what is independent. biased: R, nearly 1 for
    # whatever has many dimensions.
    estimator: Literal["unbiased", "biased"] | None = None
    weights: Weights = Weights()
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
        if batch_size < 4:
            raise ValueError(f"batch_size={batch_size} is too few images for a distance correlation; at least 4")
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
        self.representations = config.representations.wanted()
        self.encoder = encoder
        self.projector = build_projector(config.projector, feature_width(encoder))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step = 0  # what `steps` holds on the device, known here too

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D]; one forward, so BatchNorm sees both views."""
        features = self.encoder(views.flatten(0, 1))
        z = self.projector(features)
        return {"features": features.unflatten(0, views.shape[:2]), "z": z.unflatten(0, views.shape[:2])}

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
                indices=batch.indices,
            )

        found = represent(self.representations, images, augmented, seed_bins=self.config.faithful)
        return {name: rows[None] for name, rows in found.items()}

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        z = embeddings["z"]
        z = z if z.dtype == torch.float64 else z.float()
        plain, augmented = z.unbind(0)
        config, weights = self.config, self.config.weights
        deviations = batch_deviations(z, group)
        mse = mean_over_ranks(F.mse_loss(plain, augmented), group)
        hinge = F.relu(config.std_margin - deviations).mean(1).sum()
        of_views = self._dependence(plain, augmented, group)
        loss = weights.mse * mse + weights.std * hinge + weights.views * (1 - of_views)
        scalars = {"mse": mse, "std_hinge": hinge, "embedding_std": deviations.mean(), "dependence_views": of_views}
        for name, weight in self.representations.items():
            dependence = self._dependence(embeddings[name].squeeze(0), augmented, group, scaled=name in _SEED_SCALES)
            loss = loss + weight * (dependence if config.faithful else 1 - dependence)
            scalars[f"dependence_{name}"] = dependence
        return {"loss": loss, **{name: value.detach() for name, value in scalars.items()}}

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        self.steps.add_(1)
        self._step += 1

    def _dependence(self, x: Tensor, z: Tensor, group: dist.ProcessGroup | None, scaled: bool = True) -> Tensor:
        """Of embeddings z [N, D] on x [N, p] over all ranks; ``scaled``: whether the published code divides x by 32."""
        if self.config.faithful:
            return floored_distance_correlation(x, z, group, scale_x=scaled)
        return distance_correlation(x, z, unbiased=self.config.estimator != "biased", group=group)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._step = int(self.steps)
