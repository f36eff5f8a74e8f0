"""Time to accuracy on CIFAR-10: seconds of SimCLR training until linear 83 %, kNN 90 % and linear 90 %.

    python3 benchmarks/cifar_speedrun.py --data DIR --json FILE                  # on a GPU: a short and a long run
    python3 benchmarks/cifar_speedrun.py --data DIR --ablate --set epochs=20     # what each trick is worth
    python3 benchmarks/cifar_speedrun.py --data DIR --cpu                        # against a plain loop

DIR holds train/CLASS/ and test/CLASS/ of JPEG or PNG files, or torchvision's cifar-10-batches-py; "digits" stands for
scikit-learn's. The clock runs in training only: loading, compiling, capturing and evaluating are timed apart. A tenth
of the training images is held out: nothing trains on it, and what is chosen (k, temperature, L2 strength) is chosen
by it. The GPU mode needs torch >= 2.11, torchvision, triton and numpy. See docs/throughput/speedrun.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import machine
from benchmarks.speedrun.data import Data, DataError, load
from benchmarks.speedrun.recipe import ABLATIONS, CPU, DIGITS, GPU, Recipe
from benchmarks.speedrun.timed import Budget, ablate, timed_runs

MINUTES = {"cuda": 6.0, "cpu": 12.0}


def main() -> int:
    try:
        return run(parsed())
    except (DataError, ValueError) as problem:
        print(f"cifar_speedrun: {problem}", file=sys.stderr)
        return 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help='a folder, or "digits"')
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--cpu", action="store_true", help="ours against the plain loop; so without a GPU anyway")
    parser.add_argument("--minutes", type=_positive(float), help="for all, loading included (default: GPU 6, CPU 12)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--run", choices=[*GPU, "both"], default="both", help="short: for linear 83; long: for the others")
    gpu.add_argument("--seeds", type=_positive(int), default=1, help="runs with different seeds (default 1)")
    gpu.add_argument("--checks", type=_positive(int), default=10, help="evaluations of a run (default 10)")
    gpu.add_argument("--no-graph", action="store_true", help="launch each kernel by itself")
    gpu.add_argument("--no-compile", action="store_true", help="without torch.compile")
    gpu.add_argument("--ablate", nargs="*", metavar="NAME", help=f"one trick off at a time: {', '.join(ABLATIONS)}")
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--images", type=_positive(int), default=3000, help="to train on (default 3000)")
    cpu.add_argument("--held", type=_positive(int), default=1000, help="to compare the two by (default 1000)")
    cpu.add_argument("--plain-epochs", type=_positive(int), default=3, help="of the plain loop (default 3)")
    cpu.add_argument("--workers", type=int, default=2, help="processes of the plain loop's DataLoader (default 2)")
    cpu.add_argument("--threads", type=_positive(int), default=os.cpu_count(), help="of PyTorch (default: all cores)")
    parser.add_argument("--smoke", action="store_true", help="the GPU mode on any device, tiny: does it run?")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available() and not options.cpu
    device = torch.device("cuda" if on_gpu else "cpu")
    began = time.monotonic()
    budget = Budget(began + 60 * (options.minutes or MINUTES[device.type]))
    gpu_mode = on_gpu or options.smoke
    recipes = _recipes(options, gpu_mode)
    _refuse(options, gpu_mode)
    limits = {} if on_gpu else {"images": options.images, "held": options.held}
    data = load(options.data, **limits)
    result: dict[str, Any] = {
        "machine": machine() | ({"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if on_gpu else {}),
        "data": {"source": Path(options.data).name}
        | {name: len(getattr(data, name)) for name in ("train", "holdout", "test")},
        "load_seconds": time.monotonic() - began,
    }
    print(", ".join(f"{name} {value}" for name, value in (result["machine"] | result["data"]).items()))
    print(f"loaded in {result['load_seconds']:.1f} s", flush=True)
    if not gpu_mode:
        result |= against_plain(data, recipes["cpu"], options, budget)
    else:
        save = lambda found: _write(options.json, result | found)  # noqa: E731
        result |= on_device(data.to(device), recipes, device, options, budget, save)
    result["seconds_in_all"] = time.monotonic() - began
    print(f"{result['seconds_in_all']:.0f} s in all")
    _write(options.json, result)
    return 0


def _write(path: Path | None, result: dict[str, Any]) -> None:
    """Replaced whole: what is killed leaves what it had found before."""
    if path is not None:
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.replace(path)


def on_device(
    data: Data,
    recipes: dict[str, Recipe],
    device: torch.device,
    options: argparse.Namespace,
    budget: Budget,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if options.ablate is not None:
        recipe = next(iter(recipes.values()))
        rows = ablate(data, recipe, device, options.ablate or list(ABLATIONS), options.seed, budget, _say)
        return {"mode": "ablation", "recipe": asdict(recipe), "ablation": rows}
    seeds = range(options.seed, options.seed + options.seeds)
    found: dict[str, Any] = {}
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        print(f"\n{name} run")
        later = list(recipes.values())[number:]
        keep = lambda run, name=name: save({"mode": "timed", "found": found | {name: run}})  # noqa: E731
        found[name] = timed_runs(data, recipe, device, seeds, options.checks, budget, _say, keep, later)
        for target, row in found[name]["summary"].items():
            print(f"  {target:10s} {_time(row)}")
    return {"mode": "timed", "found": found}


def against_plain(data: Data, recipe: Recipe, options: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    from benchmarks.speedrun.against import compare

    torch.set_num_threads(options.threads)
    return compare(data, recipe, options, budget, _say)


def _recipes(options: argparse.Namespace, gpu_mode: bool) -> dict[str, Recipe]:
    pairs = dict(_pair(text) for text in options.set)
    if not gpu_mode:
        pairs |= dict.fromkeys(("graph", "compile", "half"), "false")  # a GPU's; the results say what was run
        return {"cpu": (DIGITS if options.data == "digits" else CPU).changed(pairs)}
    pairs |= {name: "false" for name in ("graph", "compile") if getattr(options, f"no_{name}")}
    chosen = (
        GPU if options.run == "both" and options.ablate is None else {options.run: GPU.get(options.run, GPU["short"])}
    )
    if options.smoke:
        chosen = dict.fromkeys(chosen, DIGITS)
    return {name: recipe.changed(pairs) for name, recipe in chosen.items()}


def _refuse(options: argparse.Namespace, gpu_mode: bool) -> None:
    if not gpu_mode and options.ablate is not None:
        raise ValueError("--ablate is for a GPU; on a CPU change the recipe by --set")
    if unknown := [name for name in options.ablate or [] if name not in ABLATIONS]:
        raise ValueError(f"no trick {unknown[0]!r}; there are {', '.join(ABLATIONS)}")
    if options.workers < 0:
        raise ValueError(f"--workers is {options.workers}, expected 0 or more")
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {options.json.parent} to write {options.json.name} to")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected FIELD=VALUE")
    return name, value


def _positive(kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
        return value

    read.__name__ = kind.__name__
    return read


def _time(row: dict[str, Any]) -> str:
    if not row["reached"]:
        return "not reached"
    spread = "" if row["sd_seconds"] is None else f" ± {row['sd_seconds']:.1f} (standard deviation)"
    return f"{row['mean_seconds']:.1f} s{spread}, {row['reached']} of {row['seeds']} seeds"


def _say(line: str) -> None:
    print("  " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
