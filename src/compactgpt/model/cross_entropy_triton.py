"""A Triton kernel for `cross_entropy.exponentials` on Nvidia's Hopper GPUs.

One persistent program on each multiprocessor computes one tile after the other.
Shapes: R rows, V columns, C channels. m and n are a tile's row and column.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# A tile is the part of the result for ROWS tokens x COLUMNS vocabulary entries. To compute the logits of a
# tile, each call of tl.dot multiplies and sums over INNER channels.
ROWS, COLUMNS, INNER = 128, 256, 64
# The kernel computes all tiles of GROUP rows of tiles, then those of the next GROUP rows: the part of `x`
# that GROUP rows need fits into the L2 cache.
GROUP = 64


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, shift, out, sums, R, V, C: tl.constexpr, CAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(R, BM), tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUPED * tiles_n) * GROUPED
        together = min(tiles_m - first, GROUPED)
        m = first + tile % (GROUPED * tiles_n) % together
        n = tile % (GROUPED * tiles_n) // together
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, C, BK):
            acc = tl.dot(x.load([m * BM, k]), weight.load([n * BN, k]).T, acc)
        rows, columns = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        exponent = acc - tl.load(shift + rows % R)[:, None]
        e = tl.exp(tl.where(exponent > CAP, CAP, exponent))  # keeps NaN, because NaN > CAP is false
        e = tl.where(columns[None, :] < V, e, 0.0)  # columns beyond V must not count in the sums
        tl.store(sums + n.to(tl.int64) * R + rows, tl.sum(e, 1), rows < R)
        # A tile is stored in two halves, so that the stores overlap with the loads of the next tile.
        left, right = tl.split(tl.permute(tl.reshape(e, (BM, 2, BN // 2)), (0, 2, 1)))
        out.store([m * BM, n * BN], left.to(tl.bfloat16))
        out.store([m * BM, n * BN + BN // 2], right.to(tl.bfloat16))


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Return whether the GPU is a Hopper, which the kernel was tested on, and C and V are multiples of 8."""
    hopper = torch.cuda.get_device_capability(x.device)[0] == 9
    return hopper and x.shape[1] % 8 == 0 and len(weight) % 8 == 0


def run_kernel(x: Tensor, weight: Tensor, shift: Tensor, out: Tensor, cap: float) -> Tensor:
    """Write exp(logits - shift) to `out`, (R, V), and return the row sums, (R,).

    `shift`, (R,), has the logits of the targets. Exponents above `cap` become `cap`.
    """
    (R, C), V = x.shape, len(weight)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    sums = x.new_empty(triton.cdiv(V, COLUMNS), R, dtype=torch.float32)  # row sums for each column of tiles
    blocks = [(x, ROWS, INNER), (weight, COLUMNS, INNER), (out, ROWS, COLUMNS // 2)]
    a, b, c = (TensorDescriptor.from_tensor(tensor, [tall, wide]) for tensor, tall, wide in blocks)
    _kernel[(programs,)](
        a, b, shift, c, sums, R, V, C, cap, ROWS, COLUMNS, INNER, GROUP, programs, num_warps=8, num_stages=4
    )
    return sums.sum(0)
