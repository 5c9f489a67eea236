"""Two processes that add their sums have what one process has, for every accumulator there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from lightning_slim.statistics.streaming import Accumulator, Pivoted
from tests.statistics.test_streaming import ALL, CASES, batches, stream


def halves(rank: int, kind: type[Accumulator]) -> Accumulator:
    """What a rank has seen: one of two parts of a stream."""
    torch.manual_seed(len(kind.__name__))
    parts = batches(CASES[kind])
    return stream(CASES[kind], parts[:2] if rank == 0 else parts[2:])


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for kind in CASES:
        mine = halves(rank, kind)
        if isinstance(mine, Pivoted):
            pivots = {name: pivot.clone() for name, pivot in mine.pivots.items()}
            for pivot in pivots.values():
                dist.broadcast(pivot, src=0)
            mine.move_pivots(pivots)
        for tensor in mine.sums.values():
            dist.all_reduce(tensor)
        results[kind.__name__] = (tuple(mine.result()), mine.state_dict())
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert set(first) == {kind.__name__ for kind in CASES}
    for kind, case in CASES.items():
        (result, state), (other_result, other_state) = first[kind.__name__], second[kind.__name__]
        assert all(bool((torch.as_tensor(a) == b).all()) for a, b in zip(result, other_result, strict=True))
        assert all(torch.equal(state[name], other_state[name]) for name in state)
        torch.manual_seed(len(kind.__name__))
        for ours, one in zip(result, stream(case, batches(case), ALL).result(), strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(one), rtol=1e-9, atol=1e-12)
