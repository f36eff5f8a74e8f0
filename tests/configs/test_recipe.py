"""Recipes: what is merged, what is refused, and whether the refusal helps."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.recipe import RecipeError, check_combinations, claim_run_dir, load_recipe
from pipelines.stored.trees import read_class_list
from tests.pipelines.stored_sets import write_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 20\nbatch_size: 64\nviews: {plan: digits}\n")
    return path


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the shipped recipes look for on the disk: ImageNet's tree with empty files, a few skin lesions, photos."""
    root = tmp_path_factory.mktemp("data")
    for wnid in read_class_list(ROOT / "pipelines" / "lists" / "imagenet100.txt"):
        folder = root / "train" / wnid
        folder.mkdir(parents=True)
        for number in range(46):
            (folder / f"{number}.JPEG").touch()
    np.savez(root / "skin_rgb.npz", x_train=np.zeros((1400, 2, 2, 3), np.uint8), y_train=np.arange(1400) % 7)
    write_tree(root / "photos", {"a": 30, "b": 30})
    return root


RECIPES = {str(p.relative_to(ROOT / "configs")): p for p in sorted((ROOT / "configs").rglob("*.yaml"))}


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_is_valid(name: str, stand_ins: Path) -> None:
    root = stand_ins / "photos" if name == "imagenet/smoke.yaml" else stand_ins
    overrides = [f"data.root={root}"]
    if name in ("imagenet/nnclr.yaml", "imagenet100/nnclr.yaml"):
        overrides.append("method.queue_size=4096")  # the stand-in has fewer images than the queue is long
    recipe = load_recipe(RECIPES[name], overrides)
    assert recipe.epochs > 0
    if name.startswith(("seeds/", "compare/")):
        assert recipe.method.name == RECIPES[name].stem.partition("_")[0] or RECIPES[name].stem == "base"


def test_extends_and_overrides_merge_deeply(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: mine.yaml\noptim: {name: sgd, lr: 1e-2}\nmethod: {name: simclr, temperature: 0.5}\n")
    result = load_recipe(child, ["optim.weight_decay=1e-3", "views.size=16", "method.projector.output=32"])
    assert (result.epochs, result.batch_size, result.views.plan) == (20, 64, "digits")
    assert (result.optim.name, result.optim.lr, result.optim.weight_decay) == ("sgd", 0.01, 0.001)
    assert result.views.size == 16
    assert (result.method.temperature, result.method.projector.output) == (0.5, 32)


def test_of_several_recipes_extended_the_later_goes_on_top(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("epochs: 17\nseed: 3\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: [mine.yaml, other.yaml]\nseed: 4\n")
    result = load_recipe(child)
    assert (result.epochs, result.batch_size, result.seed) == (17, 64, 4)


def test_resolved_recipe_loads_to_the_same_recipe(recipe: Path, tmp_path: Path) -> None:
    first = load_recipe(recipe, ["optim.name=sgd", "optim.nesterov=true"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(first.resolved()))
    assert load_recipe(path).resolved() == first.resolved()


def test_a_null_that_was_chosen_is_kept(tmp_path: Path) -> None:
    """A teacher that brings its own weights has ``pretrained: null``, against a default that names some."""
    path = tmp_path / "recipe.yaml"
    method = {"name": "clipdistill", "teacher": "local-dir:somewhere", "pretrained": None}
    path.write_text(yaml.safe_dump({"method": method, "views": {"plan": "mvmr"}, "data": {"source": "digits"}}))
    first = load_recipe(path)
    assert first.resolved()["method"]["pretrained"] is None
    assert "estimator" not in first.resolved()["method"], "None is the default there"
    path.write_text(yaml.safe_dump(first.resolved()))
    assert load_recipe(path).resolved() == first.resolved()
    assert load_recipe(path).hash() == first.hash()


def test_hash_follows_what_is_trained_not_where_or_how_loudly(recipe: Path) -> None:
    base = load_recipe(recipe).hash()
    for aside in (
        "run.dir=elsewhere",
        "log.every_steps=1",
        "data.root=/moved",
        "data.download=true",
        "engine.timeout=9",
    ):
        assert load_recipe(recipe, [aside]).hash() == base
    assert load_recipe(recipe, ["seed=1"]).hash() != base
    assert load_recipe(recipe).run_dir("mine") == Path("runs") / f"mine-{base}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epoch=3"], ["epoch=3", "did you mean epochs?"]),
        (["optim.wieght_decay=0"], ["optim.wieght_decay=0", "did you mean weight_decay?"]),
        (["method.projector.ouput=3"], ["method.projector.ouput", "did you mean output?"]),
        (["method.name=simcrl"], ["method.name='simcrl'", "did you mean simclr?"]),
        (["optim.name=lasr"], ["optim.name='lasr'", "did you mean lars?"]),
        (["encoder.arch=resnet5"], ["encoder.arch='resnet5'", "did you mean resnet50?"]),
        (["data.source=cifar"], ["data.source", "cifar10"]),
        (["views.plan=digit"], ["views.plan", "digits"]),
        (["views.override={crop_scael: [0.1, 1]}"], ["views", "crop_scale"]),
        (["epochs=many"], ["epochs='many'", "integer"]),
        (["epochs=0"], ["epochs=0", "greater than or equal to 1"]),
        (["optim.lr=-1"], ["optim.lr=-1", "greater than 0"]),
        (["engine.compile=perhaps"], ["engine.compile='perhaps'", "boolean"]),
        (["optim=sgd"], ["optim='sgd'"]),
        (["optim.name=adam", "optim.momentum=0.9"], ["momentum is not used by adam", "lars or sgd"]),
        (["engine.zero_stage=1"], ["engine.zero_stage=1", "optim.name=lars", "zero_stage=0"]),
        (["engine.accumulation=3"], ["batch_size=64", "engine.accumulation=3", "63 or 66"]),
        (["batch_size=2000"], ["batch_size=2000", "1197"]),
        (["batch_size=1"], ["batch_size=1", "at least 2"]),
        (["schedule.warmup_epochs=20"], ["schedule.warmup_epochs=20", "360 steps"]),
        (["views.strength=0.5", "views.custom=[{}, {}]"], ["custom", "strength"]),
        (["views.custom=[{crp: whole}, {}]"], ["views.custom.0.crp", "did you mean crop?"]),
        (["views.override={blur: 0.5, blur_kernel: 31}"], ["blur_kernel=31", "8 pixels", "at most 15"]),
        (["views.size=100000"], ["views.size=100000", "4096"]),
        (["method.temperature=.inf"], ["method.temperature=inf", "finite"]),
        (["optim.name=sgd", "optim.momentum=0", "optim.nesterov=true"], ["nesterov needs a momentum"]),
        (["optim.name=adam", "optim.betas=[2, 3]"], ["optim.betas.0=2", "less than 1"]),
        (["schedule.name=step", "schedule.milestones=[60, 80]"], ["schedule.milestones.0=60", "less than 1"]),
        (["checkpoint.every_epochs=.inf"], ["checkpoint.every_epochs=inf", "finite"]),
        (["epochs=1", "batch_size=600", "schedule.warmup_epochs=0.9"], ["warmup_epochs=0.9 is 1 steps"]),
        (["views.custom=[{}, {}, {}]", "views.plan=simclr"], ["3 views", "simclr"]),
        (["data.source=folder", "data.root=/nonexistent"], ["/nonexistent"]),
        (["epochs"], ["'epochs' is not an override", "key.sub=value"]),
        (
            ["method.name=clipdistill", "method.mode=supervised", "monitor.mine=true"],
            ["monitor.mine=true", "method.name=clipdistill"],
        ),
        (["a..b=1"], ["not an override"]),
        (["epochs=[1"], ["not YAML"]),
    ],
)
def test_refusals_name_the_key_the_value_and_a_way_out(recipe: Path, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    for part in expected:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: [1", "cannot be read as YAML"),
        ("- a\n- b", "must hold a mapping"),
        ("extends: 3", "extends=3"),
        ("extends: mine.yaml", "extends itself"),
        ("extends: min.yaml", "does not exist"),
        ("extend: other.yaml", "did you mean"),
        ("epochs: 3\noptim: {lr: fast}", "optim.lr='fast'"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected.replace("[", r"\[")):
        load_recipe(path)


def test_missing_file_suggests_the_nearest(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*mine\.yaml"):
        load_recipe(recipe.with_name("mien.yaml"))


def test_ranks_must_divide_the_batch(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    check_combinations(loaded, world_size=4)
    with pytest.raises(RecipeError, match="3 ranks"):
        check_combinations(loaded, world_size=3)


def test_wandb_must_be_there_if_asked_for(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.recipe.importlib.util.find_spec", lambda name: None)
    load_recipe(recipe, ["log.wandb=false"])
    with pytest.raises(RecipeError, match="pip install wandb"):
        load_recipe(recipe, ["log.wandb=true"])


def test_an_existing_run_refuses_another_recipe_with_a_diff(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert claim_run_dir(run, load_recipe(recipe, ["optim.lr=0.5"])) is None
    claim_run_dir(run, load_recipe(recipe))  # nothing has been trained yet: corrections are welcome
    (run / "checkpoints/step-00000003").mkdir(parents=True)
    remark = claim_run_dir(run, load_recipe(recipe, ["epochs=30", "log.every_steps=1", "data.root=/moved"]))
    assert remark is not None
    assert "epochs 20 -> 30" in remark
    assert yaml.safe_load((run / "recipe.yaml").read_text())["epochs"] == 30
    with pytest.raises(RecipeError, match=r"optim\.lr: 0\.3 -> 0\.1"):
        claim_run_dir(run, load_recipe(recipe, ["epochs=30", "optim.lr=0.1"]))
    with pytest.raises(RecipeError, match="epochs=20 is fewer than the 30"):
        claim_run_dir(run, load_recipe(recipe))
    assert yaml.safe_load((run / "recipe.yaml").read_text())["epochs"] == 30


def test_run_folders_that_cannot_be_used(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"run\.dir=.*file"):
        claim_run_dir(tmp_path / "file", load_recipe(recipe))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/recipe.yaml").write_text("[")
    with pytest.raises(RecipeError, match="is damaged"):
        claim_run_dir(tmp_path / "damaged", load_recipe(recipe))


def test_a_folder_of_something_else_is_not_taken_over(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"holds no recipe\.yaml"):
        claim_run_dir(tmp_path / "photos", load_recipe(recipe))
