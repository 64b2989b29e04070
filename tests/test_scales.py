"""The table of scales that compiled and captured steps read: after a failure it is written again."""

import pytest
import torch

from ipa_kernels.integration import scale_table

CPU = torch.device("cpu")


@pytest.mark.parametrize("fails", ["zeros", "tensor"])
@pytest.mark.parametrize("after", [[0.9, 0.2], [0.5], [0.5, 0.5]])
def test_a_table_that_could_not_be_written_is_not_taken_for_current(
    fails: str, after: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory where a second adapter needs a larger table; then the same step again, or another."""
    table = scale_table.Table()
    table.follow([0.5], None, CPU)

    def fail(*arguments: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, fails, fail)
        with pytest.raises(torch.OutOfMemoryError):
            table.follow([0.9, 0.2], None, CPU)
    table.follow(after, None, CPU)
    assert table.is_data
    assert table.tensor[:, 0].tolist() == pytest.approx(after)
