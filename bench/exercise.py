"""python -m bench.exercise: the native kernels on small awkward shapes, for compute-sanitizer to watch."""

from __future__ import annotations

import argparse

import torch

import dcdit_kernels as K

SHAPES = [((32, 32), 4), ((7, 9), 3), ((1, 13), 2), ((64, 64), 2), ((5, 1), 1)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exercise", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    generator = torch.Generator().manual_seed(0)
    ran = 0
    for grid, batch in SHAPES:
        cells = grid[0] * grid[1]
        prob = torch.rand(batch, cells, generator=generator)
        prob[0] = 0.0  # an empty sample
        for capacity in (None, batch * cells, cells // 2):
            for drop in (0.0, 0.4):
                try:
                    plan = K.plan_chunks(prob.to(device), grid, drop, capacity=capacity, backend="native")
                except K.BackendError as error:
                    print(error)
                    return 3
                ran += 1
                print(grid, batch, capacity, drop, plan.cu_seqlens.tolist())
    for shape, step in (((37, 5), 1), ((64, 128), 2), ((1, 3), 1)):
        rows = torch.randn(*shape, generator=generator)[:, ::step].to(device)
        index = torch.arange(shape[0] - 1, -1, -1, device=device)
        index[::3] = -1
        packed = K.pack_rows(rows, index, backend="native")
        print(shape, tuple(K.unpack_rows(packed, index, shape[0], backend="native").shape))
    print(f"{ran} plans")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
