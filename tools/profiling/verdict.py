"""What bounds a run, and what would help: said in words, from what was measured."""

from __future__ import annotations

from configs.recipe import Recipe
from tools.profiling.measure import Profile

NOTED = 0.1  # share of the whole step from which on a part is worth a remark
SHARES = {  # of the parts that are not the encoder: what they are called in a sentence
    "data": "waiting for data",
    "heads": "the heads",
    "targets": "what the loss needs of the images (targets)",
    "loss": "the loss",
    "update": "the method's update after the step",
    "optimizer": "the optimizer",
    "monitors": "the online probe and the log",
    "communication": "communication between ranks",
    "rest": "the engine and Python between the parts",
}


def verdict(profile: Profile, recipe: Recipe) -> list[str]:
    """What bounds the whole, then a line for each part that takes a tenth or more, with what to change."""
    found, bound = profile.shares, profile.bottleneck
    if bound == "encoder":
        first = f"bound by the encoder ({found['encoder']:.0%} of the step), as it should be"
    else:
        first = f"bound by {SHARES[bound]} ({found[bound]:.0%} of the step)"
    worth = sorted((name for name in SHARES if found.get(name, 0) >= NOTED), key=lambda name: -found[name])
    lines = [first]
    for name in worth:
        lines += [f"{SHARES[name]}, {found[name]:.0%}: {advice}" for advice in _ADVICE[name](profile, recipe)]
    return lines + _encoder(profile)


def _data(profile: Profile, recipe: Recipe) -> list[str]:
    config, advice = recipe.data, []
    gpu = profile.facts["device"] != "CPU"
    alone = {stage.name: stage for stage in profile.data}
    loader, render = alone["loader"], alone["photometry"]
    decode, read = alone.get("decode"), alone.get("read")
    cores, workers = profile.facts["cores_of_a_rank"], profile.facts["workers"]
    if workers is not None and workers < cores:
        advice.append(f"data.workers={cores}: there are {cores} cores for this rank, and {workers} decode")
    if read is not None and read.seconds > 0.5 * loader.seconds:
        advice.append(
            "reading the stored images takes most of the loader's time: move them to a faster disk, or pack them into"
            " a few large files (python -m tools.convert … --to ffcv), data.order=quasi_random reads nearly in order"
        )
    elif profile.loader == "dali":
        if gpu and config.decode == "cpu":
            advice.append("data.decode=mixed decodes JPEGs on the GPU")
        elif gpu:
            advice.append(
                f"data.hw_decoder_load={config.hw_decoder_load}: the share of the hardware decoder; try 0.5 to 0.9"
            )
    elif decode is not None and decode.seconds > 0.5 * loader.seconds:
        advice.append(
            "decoding is most of it: store smaller images (python -m tools.convert … --to ffcv --max-side"
            f" {_stored_side(recipe, profile)})"
        )
        if gpu:
            advice.append("data.loader=dali decodes JPEGs on the GPU (data.decode=mixed)")
    elif decode is not None:
        advice.append(
            f"data.ahead={config.ahead}: the loader alone is slower than decoding allows; try {2 * config.ahead}"
        )
    if render.seconds > 0.5 * loader.seconds:
        threads = profile.facts["threads"]
        more = f", on {threads} of {cores} cores (OMP_NUM_THREADS)" if not gpu and threads < cores else ""
        advice.append(f"colours, blur and statistics are most of it{more}: smaller views (views.size) or no blur")
    if profile.loader == "plain":
        advice.append("data.loader=native or ffcv decodes each image once, for all of its views")
    if not gpu:
        advice.append("on a CPU the loader and the model share the same cores: each slows the other down")
    return advice


def _stored_side(recipe: Recipe, profile: Profile) -> int:
    """Twice the view: a random crop of 8 % of the image is then enlarged no more than 1.8-fold."""
    return 2 * (recipe.views.size or profile.facts["views"][-1])


def _heads(profile: Profile, recipe: Recipe) -> list[str]:
    return ["method.projector.hidden and .output decide their width; every layer more is one more product"]


def _targets(profile: Profile, recipe: Recipe) -> list[str]:
    return [f"method.name={recipe.method.name} computes them anew in every step; docs/methods.md says what can be kept"]


def _loss(profile: Profile, recipe: Recipe) -> list[str]:
    loss = next(stage for stage in profile.step if stage.name == "loss")
    lines = [f"its cost grows with the square of batch_size={recipe.batch_size}; smaller embeddings are cheaper"]
    if loss.reached is not None and loss.reached < 0.1:
        lines.append(f"only {loss.reached:.0%} of what its products would need: it is not the products that take long")
    if getattr(recipe.method, "similarity", "cosine") != "cosine":
        lines.append("method.similarity=cosine costs about a third")
    return lines


def _update(profile: Profile, recipe: Recipe) -> list[str]:
    return ["fewer centres, or a longer interval, where the method has them (docs/methods.md)"]


def _optimizer(profile: Profile, recipe: Recipe) -> list[str]:
    larger = recipe.batch_size * 2
    lines = [f"it costs the same for any batch: batch_size={larger} halves its share"]
    if recipe.engine.zero_stage:
        lines.append(f"engine.zero_stage={recipe.engine.zero_stage} adds work; 0 is faster while memory allows")
    return lines


def _monitors(profile: Profile, recipe: Recipe) -> list[str]:
    mine = "monitor.mine=false; " if recipe.monitor.mine else ""
    return [f"{mine}a larger batch makes its share smaller"]


def _communication(profile: Profile, recipe: Recipe) -> list[str]:
    return [
        "a larger batch on each rank; engine.batchnorm=local spares two sums a layer; python -m tools.plan computes"
        " the bytes"
    ]


def _rest(profile: Profile, recipe: Recipe) -> list[str]:
    gpu = profile.facts["device"] != "CPU"
    graph = "; engine.compile=true launches less" if gpu and not recipe.engine.compile else ""
    return [f"a larger batch spreads it over more images (now {recipe.batch_size}){graph}"]


_ADVICE = {
    "data": _data,
    "heads": _heads,
    "targets": _targets,
    "loss": _loss,
    "update": _update,
    "optimizer": _optimizer,
    "monitors": _monitors,
    "communication": _communication,
    "rest": _rest,
}


def _encoder(profile: Profile) -> list[str]:
    """What would make the encoder faster by a twentieth or more, as measured."""
    return [
        f"{variant.setting}: the encoder makes {variant.speed:.2f} times as many images/s, measured here"
        for variant in sorted(profile.variants, key=lambda variant: -variant.speed)
        if variant.speed >= 1.05
    ]
