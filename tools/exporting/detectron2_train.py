"""Trains and evaluates detectron2's R-CNN C4 on VOC or COCO with the extra norm of MoCo's protocol (arXiv:1911.05722).

    python NAME-train.py --config-file NAME-voc.yaml --num-gpus 8
    python NAME-train.py --config-file NAME-voc.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Needs detectron2 and nothing else. `python -m tools.export --to detectron2` copies it beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsWithNorm(Res5ROIHeads):
    """The C4 head with a norm after res5: pretrained features are not scaled as a supervised network's are."""

    def __init__(self, cfg: Any, input_shape: Any) -> None:
        super().__init__(cfg, input_shape)
        self.res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, self.res5[-1].out_channels))


class Trainer(DefaultTrainer):
    """detectron2's, with VOC's or COCO's own evaluation."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=output_folder or str(Path(cfg.OUTPUT_DIR) / "inference"))


def main(arguments: Any) -> Any:
    """In each of the processes that ``launch`` starts."""
    cfg = get_cfg()
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    cfg.freeze()
    default_setup(cfg, arguments)
    if arguments.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    return trainer.train()


if __name__ == "__main__":
    given = default_argument_parser().parse_args()
    ranks = (given.num_gpus, given.num_machines, given.machine_rank, given.dist_url)
    launch(main, *ranks, args=(given,))
