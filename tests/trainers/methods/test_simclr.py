"""SimCLR as a method: its parts together, on ranks, micro-batches and after a resume. Its loss: tests/kernels."""

from tests.trainers.small_runs import check_ranks_and_micro_batches, check_resumes

SETTINGS = {"temperature": 0.5, "projector": {"hidden": 32, "output": 16}}


def test_ranks_and_micro_batches_change_nothing() -> None:
    check_ranks_and_micro_batches("simclr", SETTINGS)


def test_resumes_to_the_bit() -> None:
    check_resumes("simclr", SETTINGS)
