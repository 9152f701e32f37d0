"""patterns/embedding.py: one table: every rank looks all ids up in its rows, parts are summed."""

import torch
from marks import quick
from minimal import check_graphs
from torch import nn

pytestmark = quick


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(16, 8), nn.RMSNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.table(ids))


BEFORE = """\
input table.weight: float32[16, 8]
input L_ids_: int64[1, 3]
input norm.weight: float32[8]
%3: float32[1, 3, 8] = embedding(L_ids_, table.weight, None, None, 2.0, False, False)
%4: float32[1, 3, 8] = rms_norm(%3, [8], norm.weight, None)
return [%4]
"""

AFTER = """\
input table.weight: float32[8, 8]
input L_ids_: int64[1, 3]
input norm.weight: float32[8]
%3: int64[3] = reshape(L_ids_, [-1])
%4: int64[6] = _c10d_functional::all_gather_into_tensor(%3, 2, ranks_0_to_1)
%5: int64[6] = _c10d_functional::wait_tensor(%4)
%6: int64[6] = sub(%5, 0)
%7: bool[6] = ge(%6, 0)
%8: bool[6] = lt(%6, 8)
%9: bool[6] = logical_and(%7, %8)
%10: int64[6] = where(%9, %6, 0)
%11: float32[6, 8] = embedding(%10, table.weight)
%12: bool[6, 1] = unsqueeze(%9, -1)
%13: float32[6, 8] = where(%12, %11, 0.0)
%14: float32[3, 8] = _c10d_functional::reduce_scatter_tensor(%13, sum, 2, ranks_0_to_1)
%15: float32[3, 8] = _c10d_functional::wait_tensor(%14)
%16: float32[1, 3, 8] = reshape(%15, [1, 3, 8])
%17: float32[1, 3, 8] = rms_norm(%16, [8], norm.weight, None)
return [%17]
"""


def test_embedding(update: bool) -> None:
    check_graphs(__file__, Table(), torch.zeros(1, 3, dtype=torch.long), update)
