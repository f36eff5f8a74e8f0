"""``python counted_waits.py CASES``: what the training loop waits for between two rows of the log, as JSON.

``CASES`` is JSON: by name, the overrides of the recipe below. Each is trained by ``pretrain`` as ``train.py`` builds
it, on a simulated device (`tests.trainers.simulated_device`). Printed by case: one list a step, of [place, what] waited
for, and how many operations the last step launched.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401, I001
import torch
import torch.distributed as dist
import torch.utils._foreach_utils
from deepspeed.accelerator import get_accelerator

from configs.recipe import load_recipe
from tests.trainers import simulated_device
from train import build_run
from trainers.engine import Ranks
from trainers.pretrain import pretrain

EVERY, STEPS = 2, 4
RECIPE = """
epochs: 2
batch_size: 16
data: {source: digits, limit: 32, holdout: 0.02}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
optim: {name: sgd, lr: 0.1}
schedule: {warmup_epochs: 1}
monitor: {images: 4, every_epochs: 100}
checkpoint: {every_epochs: null}
"""


def count(device: torch.device, overrides: list[str], folder: Path) -> dict[str, Any]:
    (folder / "recipe.yaml").write_text(RECIPE + f"log: {{every_steps: {EVERY}}}\n")
    (folder / "run").mkdir()
    ranks = Ranks(rank=0, world_size=1, device=device, group=None, control=None)
    steps: list[list[tuple[str, str]]] = []
    launched = [0]
    with simulated_device.waits_noted() as waits:
        get_accelerator().synchronize = lambda *_: waits.note("synchronize")
        run = build_run(load_recipe(folder / "recipe.yaml", overrides), folder / "run", ranks)
        waits.found.clear()
        write, add = run.log.write_step, run.log.add

        def added(*given: Any) -> None:
            add(*given)
            steps.append(list(waits.found))
            launched.append(waits.operations)
            waits.found.clear()

        def written(*given: Any) -> dict[str, float]:
            row = write(*given)
            steps[-1] += waits.found
            waits.found.clear()
            return row

        run.log.add, run.log.write_step = added, written  # type: ignore[method-assign]
        run.monitor.holdout = None  # an evaluation may wait
        code = pretrain(run)
    assert code == 0
    return {"steps": steps, "launched": launched[-1] - launched[-2]}


def main() -> None:
    device = simulated_device.simulated_device()
    torch.utils._foreach_utils._foreach_supported_types.append(simulated_device.OnDevice)
    accelerator = get_accelerator()
    accelerator.device_name = lambda index=None: str(device)
    accelerator.current_device_name = lambda: str(device)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for name, overrides in json.loads(sys.argv[1]).items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = count(device, overrides, Path(folder))
    print("\n" + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
