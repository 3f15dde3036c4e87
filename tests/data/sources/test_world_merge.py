import concurrent.futures

import numpy as np
import pytest

from rankjax.data.sources import world_merge, world_process
from rankjax.data.sources.world_tables import World

CONFIG = World(users=50, block=20, requests=3.0, days=30)


def test_partitions_are_the_stable_sort_of_all_blocks(tmp_path, monkeypatch):
    spooled = list(world_merge.blocks(CONFIG, tmp_path, parts=True, workers=1))
    assert [s.number for s in spooled] == [0, 1, 2]
    dtype = world_merge.impression_dtype(True)
    blocks = [world_process.simulate(CONFIG, b, parts=True).impressions for b in range(3)]
    time = np.concatenate([x["time"] for x in blocks])
    order = np.argsort(time, kind="stable")
    number = np.repeat(np.arange(3), [len(x["time"]) for x in blocks])[order]
    for most in (1, 300, 10**9):
        monkeypatch.setattr(world_merge, "PARTITION", most)
        pieces = list(world_merge.partitions(spooled, tmp_path, dtype))
        np.testing.assert_array_equal(np.concatenate([block for _, block in pieces]), number)
        rows = np.concatenate([rows for rows, _ in pieces])
        for name in dtype.names:
            want = np.concatenate([x[name] for x in blocks])[order]
            np.testing.assert_array_equal(rows[name], want.astype(dtype[name]), err_msg=name)
        hours = [set((rows["time"] // 3600).tolist()) for rows, _ in pieces]
        assert sum(map(len, hours)) == len(set().union(*hours)), "an hour in two partitions"
        if most == 300:
            # Bounded: a partition is one hour, or holds no more than it should.
            assert len(pieces) > 3
            assert all(len(rows) <= 300 or len(h) == 1 for (rows, _), h in zip(pieces, hours))


def test_probabilities_are_spooled_in_full(tmp_path):
    world_merge.spool(CONFIG, 1, tmp_path, False)
    dtype = world_merge.impression_dtype(False)
    rows = np.fromfile(tmp_path / "1.impressions", dtype)
    x = world_process.simulate(CONFIG, 1, parts=False).impressions
    assert dtype["p_click"] == np.float64
    np.testing.assert_array_equal(rows["p_click"], x["p_click"])
    assert len(np.fromfile(tmp_path / "1.users", world_merge.USERS)) == 20


def test_a_dead_worker_is_named(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, workers, *, mp_context):
            assert workers == 2 and mp_context.get_start_method() == "spawn"

        def submit(self, *_):
            future = concurrent.futures.Future()
            future.set_exception(concurrent.futures.process.BrokenProcessPool("gone"))
            return future

        def shutdown(self, *, cancel_futures):
            assert cancel_futures

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Broken)
    with pytest.raises(RuntimeError, match=r'worker process died.*"__main__"'):
        list(world_merge.blocks(CONFIG, tmp_path, parts=False, workers=2))
