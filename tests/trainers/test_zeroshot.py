"""Classes from words: the map, the comparison and the prompts, against scikit-learn and known answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor

from pipelines.sources import DataError
from tests.trainers.parts.tiny_clip import READING, write_teacher
from trainers.parts.clip_text import TEMPLATES, ClipText, class_prompts, read_names, read_templates
from trainers.zeroshot import bregman_divergences, class_embeddings, cosine_scores, search_ridge

CPU = torch.device("cpu")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_map_against_scikit_learn() -> None:
    x, held = noise(0, 80, 12) * torch.arange(1, 13), noise(1, 30, 12) * torch.arange(1, 13)
    x[:, 3] = held[:, 3] = 5.0  # never varies
    truth = noise(2, 12, 6)
    wanted, held_wanted = (F.normalize(rows @ truth + 9 * noise(3, len(rows), 6), dim=1) for rows in (x, held))
    grid = (1e-3, 0.1, 1.0, 30.0)
    found = search_ridge(x, wanted, held, held_wanted, grid)
    centred = (x - x.mean(0)).numpy()
    deviation = centred.std(0)
    deviation[3] = 1
    cosines = {}
    for l2 in grid:
        ridge = Ridge(alpha=l2 * len(x)).fit(centred / deviation, wanted.numpy())
        mapped = torch.tensor(ridge.predict((held.numpy() - x.mean(0).numpy()) / deviation))
        cosines[l2] = F.cosine_similarity(mapped, held_wanted.double()).mean().item()
        if l2 == found.best.l2:
            torch.testing.assert_close(found.best(held).double(), mapped.double(), rtol=1e-4, atol=1e-5)
    assert found.holdout_cosine == pytest.approx(cosines, rel=1e-5)
    assert found.best.l2 == max(cosines, key=lambda l2: cosines[l2])
    assert len(set(cosines.values())) == 4


def test_a_student_that_is_the_teacher_but_for_its_coordinates_is_found_out() -> None:
    """Distances alone tell a student from its teacher up to a motion and a scale, which the map undoes."""
    prompts = F.normalize(noise(4, 7, 3, 16) * 0.3 + 2 * noise(5, 7, 1, 16), dim=2)
    labels = torch.arange(350) % 7
    teacher = F.normalize(class_embeddings(prompts)[labels] + 0.25 * noise(6, 350, 16), dim=1)
    rotation = torch.linalg.qr(noise(7, 16, 16)).Q
    student = 40 * teacher @ rotation + noise(8, 16)
    of_teacher = cosine_scores(teacher, prompts).argmax(1)
    accuracy = (of_teacher == labels).double().mean()
    assert 0.6 < accuracy < 1
    assert (cosine_scores(student, prompts).argmax(1) == labels).double().mean() < 0.4, "without a map: chance"
    search = search_ridge(student[:200], teacher[:200], student[200:250], teacher[200:250])
    assert search.best.l2 < 1e-3, "nothing but rounding speaks for more"
    torch.testing.assert_close(search.best(student[250:]), teacher[250:], rtol=1e-3, atol=1e-4)
    assert (cosine_scores(search.best(student), prompts).argmax(1) == of_teacher).double().mean() > 0.99


def test_a_map_from_noise_finds_no_class() -> None:
    prompts = F.normalize(noise(9, 10, 2, 16), dim=2)
    labels = torch.arange(400) % 10
    teacher = F.normalize(class_embeddings(prompts)[labels] + 0.1 * noise(10, 400, 16), dim=1)
    assert (cosine_scores(teacher, prompts).argmax(1) == labels).all()
    student = noise(11, 400, 8)
    search = search_ridge(student[:200], teacher[:200], student[200:300], teacher[200:300])
    found = cosine_scores(search.best(student[300:]), prompts).argmax(1)
    assert (found == labels[300:]).double().mean() < 0.25


def test_similarities_by_hand() -> None:
    prompts = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 1.0]]])  # class 0 has two sides
    images = torch.tensor([[3.0, 0, 0], [0, 0, 0.5], [0.7, 0.0, 0.6]])
    half = 0.5**0.5
    size = np.hypot(0.7, 0.6)
    expected = [[half, 0], [0, 1], [0.7 * half / size, 0.6 / size]]
    torch.testing.assert_close(cosine_scores(images, prompts), torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(
        bregman_divergences(images, prompts), torch.tensor([[0, 1], [1, 0], [0, 0.1 / size]], dtype=torch.float32)
    )  # the third image: nearer to one prompt of class 0, though not to their mean


def test_the_divergence_is_that_of_its_generator() -> None:
    """φ(x) − φ(t) − <∇φ(t), x − t>, the gradient by autograd, to the nearest prompt of each class."""
    prompts = F.normalize(noise(12, 4, 5, 6), dim=2).double()
    images = F.normalize(noise(13, 9, 6), dim=1).double()
    every = prompts.flatten(0, 1)

    def generator(x: Tensor) -> Tensor:
        return (every @ x).max()

    expected = torch.zeros(9, 4, dtype=torch.float64)
    for i, x in enumerate(images):
        for c in range(4):
            values = []
            for t in prompts[c]:
                t = t.clone().requires_grad_()
                (slope,) = torch.autograd.grad(generator(t), t)
                values.append((generator(x) - generator(t) - slope @ (x - t)).detach())
            expected[i, c] = torch.stack(values).min()
    found = bregman_divergences(images, prompts.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert (found >= 0).all()
    single = prompts[:, :1].float()
    cosines = cosine_scores(images, single)
    assert torch.equal(bregman_divergences(images, single).argmin(1), cosines.argmax(1)), "one prompt: the same order"


def test_prompts_names_and_templates(tmp_path: Path) -> None:
    assert class_prompts(["red_fox", "cat"], ["a {}.", "the {}"]) == ["a red fox.", "the red fox", "a cat.", "the cat"]
    assert read_templates(None) == TEMPLATES
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    path = tmp_path / "lines.txt"
    path.write_text("an {}\n\nno {}\n")
    assert read_templates(path) == ("an {}", "no {}")
    for text, message in (("an {}\nnothing", "expected one {} in every line.*'nothing'"), (" \n", "is empty")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_templates(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_templates(tmp_path / "none.txt")
    wnids = ("n01440764", "n01443537")
    with pytest.raises(DataError, match="says nothing to a text tower"):
        read_names(None, wnids)
    path.write_text("n01443537\tgoldfish\nn00000001 other\nn01440764 tench, fish\n")
    assert read_names(path, wnids) == ("tench, fish", "goldfish")
    path.write_text("sea bream\ngoldfish\n")
    assert read_names(path, wnids) == ("sea bream", "goldfish")
    path.write_text("goldfish\n")
    with pytest.raises(DataError, match="1 lines, the data 2 classes"):
        read_names(path, wnids)
    assert read_names(None, ("cat", "red_fox")) == ("cat", "red_fox")


def test_the_text_tower_is_open_clips(tmp_path: Path) -> None:
    import open_clip

    name = write_teacher(tmp_path / "clip", text=READING)
    prompts = ["a photo of a cat.", "a drawing of seven", "a photo of a cat."]
    state = torch.get_rng_state()
    found = ClipText(name, None).embed(prompts, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    model = open_clip.create_model(name)
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    text = ClipText(write_teacher(tmp_path / "clip"), None)  # of 64 tokens
    with pytest.raises(DataError, match="knows 64 tokens and its tokenizer gave 49407"):
        text.embed(["a"], CPU)
