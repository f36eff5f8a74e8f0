"""CLIP distillation (Kinakh et al., arXiv:2303.12130): the embedding of a view is to depend, by distance correlation,
on what a frozen CLIP model makes of the image; their widths need not agree. With labels, also classic distillation."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.config import Section
from pipelines.sources import DataError
from pipelines.views import View
from trainers.encoders import feature_width
from trainers.heads import build_projector
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.methods.mvmr import Projector
from trainers.parts.classification import divergence, labelled_accuracy, labelled_cross_entropy
from trainers.parts.clip_teacher import ClipTeacher
from trainers.parts.remembered import RememberedRows
from trainers.parts.teacher_head import TeacherHead
from trainers.parts.view_terms import Estimator, ViewWeights, as_computed, dependence, view_terms


class Weights(ViewWeights):
    teacher: float = Field(1.0, ge=0)


class Supervised(Section):
    """Weights of the three terms, and the teacher's head, which is trained beside the student by SGD of its own."""

    labels: float = Field(1.0, ge=0)
    divergence: float = Field(1.0, ge=0)
    teacher: float = Field(10.0, ge=0)
    temperature: float = Field(4.0, gt=0)
    head_hidden: int = Field(512, ge=1)
    head_lr: float = Field(0.1, gt=0)


class Config(MethodConfig):
    name: Literal["clipdistill"] = "clipdistill"
    least_batch: ClassVar[int] = 4  # for an unbiased distance correlation
    # self: no labels, the terms of MV-MR between two views. supervised: a classifier on the encoder, by the labels.
    mode: Literal["self", "supervised"] = "self"
    teacher: str = "ViT-B-16"  # of open_clip; or local-dir:FOLDER, hf-hub:OWNER/NAME, which bring their weights
    pretrained: str | None = "laion400m_e32"  # the tag of the weights, or their file; null: the teacher brings them
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of views, to the size that the teacher takes
    # The teacher's outputs are kept, on the device and not in checkpoints, where it always sees the same image (the
    # first view is neither augmented nor, data.scaled=false, decoded at changing sizes) and all of them, 2 bytes a
    # number, fit into so many GB; 0: never.
    cache_gb: float = Field(2.0, ge=0)
    # Of the dependence; None: unbiased. unbiased: R*², about 0 for what is independent. biased: R, nearly 1 for
    # whatever has many dimensions.
    estimator: Literal["unbiased", "biased"] | None = None
    std_margin: float = Field(1.0, gt=0)  # self: below which the standard deviation of a dimension costs
    weights: Weights = Weights()
    projector: Projector = Projector()
    supervised: Supervised = Supervised()
    # As the published code computes: biased R, distances floored, of embeddings / 32; the teacher sees views with the
    # data set's statistics, not its own.
    faithful: bool = False

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Config:
        if self.faithful and self.estimator is not None:
            raise ValueError(f"faithful=true brings its own estimator; remove estimator={self.estimator}")
        if (":" in self.teacher) != (self.pretrained is None):
            raise ValueError(
                f"teacher={self.teacher} with pretrained={self.pretrained}: a model of open_clip needs a tag or a file"
                " of weights, local-dir: and hf-hub: bring theirs (pretrained: null)"
            )
        for key in ("supervised",) if self.mode == "self" else ("weights", "projector", "std_margin"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not used with mode={self.mode}; remove it, or choose the other mode")
        used: Section = self.weights if self.mode == "self" else self.supervised
        if not any(
            getattr(used, name) for name in (*Weights.model_fields, "labels", "divergence") if hasattr(used, name)
        ):
            raise ValueError("all weights are 0: the loss has no term; set one above 0")
        return self

    @property
    def embeds_pairs(self) -> bool:
        return self.mode == "self"

    def check_views(self, plan: tuple[View, ...]) -> None:
        if self.mode == "self":
            super().check_views(plan)
        elif len(plan) not in (1, 2):
            raise ValueError(
                f"the views section makes {len(plan)} views of an image, method.mode=supervised takes 1, or 2 of which"
                " the teacher sees the first"
            )


class Method(BaseMethod):
    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        """Loads the teacher; raises DataError if it is not at hand, or if labels are needed and there are none."""
        super().__init__()
        self.config, self.supervised = config, config.mode == "supervised"
        self.estimator: Estimator = "floored" if config.faithful else config.estimator or "unbiased"
        if self.supervised and (facts.classes == 0 or facts.multi_label):
            has = "several" if facts.multi_label else "no labels"
            raise DataError(f"method.mode=supervised takes one class an image, the data has {has}; choose mode=self")
        self.teacher = ClipTeacher(
            config.teacher,
            config.pretrained,
            mean=facts.mean,
            std=facts.std,
            interpolation=config.interpolation,
            own_statistics=not config.faithful,
        )
        same = facts.steady and not facts.plan[0].augmented  # the teacher sees, whenever it sees an image
        self.remembered = RememberedRows(facts.images, self.teacher.width, config.cache_gb * 1e9 if same else -1)
        self.encoder = encoder
        if self.supervised:
            self.classifier = nn.Linear(feature_width(encoder), facts.classes)
            own = config.supervised
            self.head = TeacherHead(
                self.teacher.width, own.head_hidden, facts.classes, lr=own.head_lr, total_steps=facts.total_steps
            )
        else:
            self.projector = build_projector(config.projector, feature_width(encoder))

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D]; supervised: of the last view, with logits."""
        views = views[-1:] if self.supervised else views
        features = self.encoder(views.flatten(0, 1))
        found = {"logits": self.classifier(features)} if self.supervised else {"z": self.projector(features)}
        return {name: rows.unflatten(0, views.shape[:2]) for name, rows in ({"features": features} | found).items()}

    def targets(self, batch: ViewBatch) -> dict[str, Tensor]:
        """[1, N, width] float16: what the teacher makes of the first view."""
        rows = self.remembered.look_up(
            batch.indices, lambda places: self.teacher.embed(batch.views[0][places]), batch.indices_on_host()
        )
        return {"teacher": rows[None]}

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        return self._supervised(embeddings, batch, group) if self.supervised else self._of_views(embeddings, group)

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        rows = embeddings["teacher"].squeeze(0)
        self.remembered.put(batch.indices, rows, group, batch.indices_on_host())
        if self.supervised:
            self.head.fit(rows, batch.labels, group)

    def _of_views(self, embeddings: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        config, z = self.config, as_computed(embeddings["z"])
        loss, scalars = view_terms(
            z, config.weights, std_margin=config.std_margin, estimator=self.estimator, group=group
        )
        of_teacher = dependence(embeddings["teacher"].squeeze(0).to(z.dtype), z[1], self.estimator, group)
        loss = loss + config.weights.teacher * (1 - of_teacher)
        return {"loss": loss, **scalars, "dependence_teacher": of_teacher.detach()}

    def _supervised(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        labels, own = batch.labels, self.config.supervised
        features, logits = (as_computed(embeddings[name].squeeze(0)) for name in ("features", "logits"))
        teacher = embeddings["teacher"].squeeze(0).to(features.dtype)
        taught = self.head(teacher).detach()
        of_labels = labelled_cross_entropy(logits, labels, group)
        of_head = divergence(logits, taught, own.temperature, group)
        of_teacher = dependence(teacher, features, self.estimator, group, scaled=False)
        loss = own.labels * of_labels + own.divergence * of_head + own.teacher * (1 - of_teacher)
        scalars = {"label_loss": of_labels, "divergence": of_head, "dependence_teacher": of_teacher}
        scalars |= {
            "accuracy": labelled_accuracy(logits, labels),
            "teacher_accuracy": labelled_accuracy(taught, labels),
        }
        return {"loss": loss, **{name: value.detach() for name, value in scalars.items()}}
