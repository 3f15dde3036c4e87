import hashlib

import jax
import numpy as np
import pytest

from rankjax import packing
from rankjax.data import event_log, loader, samples
from tests import tiny
from tests.references import samples as reference

OPTIONS = {
    "impression": dict(history=6),
    "request": dict(history=6, max_candidates=3),
    "window": dict(history=4, max_candidates=5, max_realtime=6, window=2 * tiny.DAY),
}


def opened(folder, organisation="window", **options):
    log = event_log.EventLog.open(tiny.log(folder / "log", **options))
    config = samples.SampleConfig(organisation=organisation, **OPTIONS[organisation])
    return log, samples.build(log, config, "train")


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def row_of_reference(files, sample, S, C):
    """One row of the batch from the plain reference's sample: {field: {name: array} or array}."""
    users, items = files["users"], files["items"]
    shown, happened = files["impressions"], files["events"]
    events, rows = sample["old"] + sample["new"], sample["candidates"]
    pad = lambda values, n, shape=(): np.array(
        [*values, *np.zeros((n - len(values), *shape), np.asarray(values[:1]).dtype)]
        if values
        else np.zeros((n, *shape))
    )
    history, candidate = {}, {}
    for name, shape in (("item", ()), ("category", ()), ("tags", (3,)), ("quality", ())):
        history[name] = pad([items[name][happened["item"][e]] for e in events], S, shape)
        candidate[name] = pad([items[name][shown["item"][i]] for i in rows], C, shape)
    for name in ("action", "dwell"):
        history[name] = pad([happened[name][e] for e in events], S)
    history["log_age"] = pad(
        [reference.log_age(sample["time"] - happened["time"][e]) for e in events], S
    )
    candidate["surface"] = pad([shown["surface"][i] for i in rows], C)
    candidate["hour"] = pad([1 + shown["time"][i] // 3600 % 24 for i in rows], C)
    candidate["item_age"] = pad(
        [reference.item_age(shown["time"][i] - items["birth"][shown["item"][i]]) for i in rows], C
    )
    # What a candidate of the whole log may read, in events before the sample's first candidate.
    order = [len(reads) - len(sample["reads"][0]) for reads in sample["reads"]]
    return {
        "user": {name: x[[sample["user"]]] for name, x in users.items()},
        "history": history,
        "candidate": candidate,
        "history_sample": np.where(np.arange(S) < len(events), 0, -1),
        "candidate_sample": np.where(np.arange(C) < len(rows), 0, -1),
        "history_time": pad([happened["time"][e] - sample["time"] for e in events], S),
        "candidate_time": pad([shown["time"][i] - sample["time"] for i in rows], C),
        "history_order": pad([n - len(sample["old"]) for n in range(len(events))], S),
        "candidate_order": pad(order, C),
        "labels": pad([(shown["click"][i], shown["like"][i]) for i in rows], C, (2,)),
        "weights": pad([(1, shown["click"][i]) for i in rows], C, (2,)),
        "impression": np.array([*rows, *[-1] * (C - len(rows))]),
    }


@pytest.mark.parametrize("organisation", list(OPTIONS))
def test_batches_are_the_plain_reference(tmp_path, organisation):
    log, found = opened(tmp_path, organisation)
    _, files = tiny.columns()
    c = found.config
    want = reference.build(
        files,
        organisation,
        history=c.history,
        max_candidates=c.max_candidates,
        max_realtime=c.max_realtime,
        window=c.window,
        span="train",
    )
    batches = loader.Batches(log, found, batch_samples=7)
    checked = 0
    for step in range(len(batches)):
        got = batches[step]
        assert got.one_time == (organisation != "window") and got.schema == log.schema
        S, C = got.history_sample.shape[1], got.candidate_sample.shape[1]
        for r, sample in enumerate(want[7 * step : 7 * step + 7]):
            for field, expected in row_of_reference(files, sample, S, C).items():
                value = getattr(got, field)
                if isinstance(expected, dict):
                    assert set(expected) == set(value), field
                    for name, x in expected.items():
                        np.testing.assert_allclose(value[name][r], x, rtol=1e-6, err_msg=name)
                else:
                    np.testing.assert_array_equal(value[r], expected, err_msg=field)
            checked += 1
    assert checked == len(want) == len(found)


def test_dtypes_are_the_contracts(tmp_path):
    log, found = opened(tmp_path)
    got = loader.Batches(log, found, batch_samples=8)[0]
    for side in ("user", "history", "candidate"):
        for f in getattr(log.schema, side):
            dtype = np.float32 if f.kind == "dense" else np.int32
            assert getattr(got, side)[f.name].dtype == dtype, f.name
    for field in ("history_sample", "history_time", "candidate_time", "candidate_order"):
        assert getattr(got, field).dtype == np.int32, field
    assert got.history_order.dtype == got.candidate_sample.dtype == np.int32
    assert got.labels.dtype == got.weights.dtype == np.float32
    assert got.impression.dtype == np.int64


def test_the_last_batch_is_filled_with_empty_rows(tmp_path):
    log, found = opened(tmp_path, "request")
    batches = loader.Batches(log, found, batch_samples=len(found) - 3)
    assert len(batches) == 2
    last = batches[1]
    assert (last.candidate_sample[:3, 0] == 0).all()
    empty = jax.tree.map(lambda x: x[3:], last)
    for x in jax.tree.leaves(empty):
        assert np.isin(x, [0, -1]).all()
    assert (empty.candidate_sample == -1).all() and (empty.history_sample == -1).all()
    assert (empty.impression == -1).all() and (empty.weights == 0).all()
    assert (empty.user["user"] == 0).all() and (empty.candidate["hour"] == 0).all()
    for step in (-1, 2):
        with pytest.raises(IndexError, match=f"found step {step}, expected 0 .. 1"):
            batches[step]


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    log, found = opened(tmp_path)
    make = lambda seed: loader.Batches(log, found, batch_samples=8, order="shuffled", seed=seed)
    first, again, other = make(1), make(1), make(2)
    for step in reversed(range(len(first))):
        equal(again[step], first[step])
    assert not np.array_equal(first.sample_ids(0), other.sample_ids(0))
    in_time = loader.Batches(log, found, batch_samples=8)
    np.testing.assert_array_equal(in_time.sample_ids(1), np.arange(8, 16))


@pytest.mark.parametrize("order", ["time", "shuffled"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(tmp_path, order, hosts):
    log, found = opened(tmp_path)
    options = dict(batch_samples=8, order=order, seed=3)
    whole = loader.Batches(log, found, **options)
    parts = [
        loader.Batches(log, found, **options, process_index=p, process_count=hosts)
        for p in range(hosts)
    ]
    for step in range(len(whole)):
        together = [part[step] for part in parts]
        equal(jax.tree.map(lambda *x: np.concatenate(x), *together), whole[step])


@pytest.mark.parametrize("order", ["time", "shuffled"])
@pytest.mark.parametrize("shares", [2, 8])
def test_shares_hold_the_samples_of_the_step_and_about_as_much(tmp_path, order, shares):
    log, found = opened(tmp_path, events=2000, users=15)
    options = dict(batch_samples=15, order=order, seed=3)
    whole = loader.Batches(log, found, **options)
    dealt = loader.Batches(log, found, **options, shares=shares)
    parts = [
        loader.Batches(log, found, **options, shares=shares, process_index=p, process_count=2)
        for p in range(2)
    ]
    assert dealt.rows == 16 and dealt.shapes == whole.shapes and len(dealt) == len(whole)
    for step in range(len(whole)):
        batch = dealt[step]
        assert digest(batch) == digest(whole[step])
        equal(jax.tree.map(lambda *x: np.concatenate(x), *(part[step] for part in parts)), batch)
        entries = batch.history_mask.sum(axis=1) + batch.candidate_mask.sum(axis=1)
        load = entries.reshape(shares, -1).sum(axis=1)
        assert load.max() - load.min() <= entries.max()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_stream_gives_the_batches_from_start(tmp_path, threads, start):
    log, found = opened(tmp_path)
    batches = loader.Batches(log, found, batch_samples=6, order="shuffled")
    got = list(loader.stream(batches, start, threads=threads, prefetch=2))
    assert [step for step, _ in got] == list(range(start, len(batches)))
    for step, batch in got:
        equal(batch, batches[step])


def digest(batch):
    """A hash for each impression of the batch: {row of the log: all that its sample holds}."""
    found = {}
    for r, c in zip(*np.nonzero(batch.impression >= 0), strict=True):
        sample = [x[r][x[r] != 0].tobytes() for x in jax.tree.leaves(batch)]
        content = b"".join(sample) + bytes([c])
        row = int(batch.impression[r, c])
        assert row not in found
        found[row] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("order", ["time", "shuffled"])
@pytest.mark.parametrize("organisation", list(OPTIONS))
def test_an_epoch_with_a_stop_gives_every_impression_once(tmp_path, organisation, order):
    log, found = opened(tmp_path, organisation)
    train = np.flatnonzero(log.column("impressions", "span") == 0)
    batches = loader.Batches(log, found, batch_samples=6, order=order, seed=5)
    whole = [digest(batch) for _, batch in loader.stream(batches)]
    np.testing.assert_array_equal(np.sort([row for part in whole for row in part]), train)
    first = []
    for step, batch in loader.stream(batches, threads=3):
        first.append(digest(batch))
        if step == 2:
            break
    # A new process with another number of hosts goes on where the first one stopped.
    hosts = [
        loader.Batches(
            log, found, batch_samples=6, order=order, seed=5, process_index=p, process_count=3
        )
        for p in range(3)
    ]
    streams = [loader.stream(host, start=3, threads=1) for host in hosts]
    rest = [
        {row: content for _, batch in parts for row, content in digest(batch).items()}
        for parts in zip(*streams, strict=True)
    ]
    assert first + rest == whole


def test_shapes_hold_their_batches_and_are_few(tmp_path):
    log, found = opened(tmp_path, "window", events=2000, requests=300, users=40, items=30)
    batches = loader.Batches(log, found, batch_samples=2)
    assert 1 < len(batches.shapes) <= 4
    assert batches.shapes[-1] == (found.event_counts.max(), found.candidate_counts.max())
    used = set()
    for step in range(len(batches)):
        got = batches[step]
        S, C = got.history_sample.shape[1], got.candidate_sample.shape[1]
        ids = batches.sample_ids(step)
        ids = ids[ids >= 0]
        needed = found.event_counts[ids].max(), found.candidate_counts[ids].max()
        holding = [x for x in batches.shapes if x[0] >= needed[0] and x[1] >= needed[1]]
        assert holding[0] == (S, C)
        assert (got.history_sample >= 0).sum() == found.event_counts[ids].sum()
        used.add((S, C))
    assert used == set(batches.shapes)


def test_history_keeps_a_slot(tmp_path):
    log = event_log.EventLog.open(tiny.log(tmp_path / "log", events=0))
    found = samples.build(log, samples.SampleConfig(organisation="request", history=5), "train")
    got = loader.Batches(log, found, batch_samples=4)[0]
    assert got.history_sample.shape == (4, 1) and (got.history_sample == -1).all()
    assert all((x == 0).all() for x in got.history.values())


def test_order_without_exact_times(tmp_path):
    log, found = opened(tmp_path, "window", time_exact=False)
    event, shown = log.column("events", "order"), log.column("impressions", "order")
    read = 0
    for _, batch in loader.stream(loader.Batches(log, found, batch_samples=5)):
        for r in range(5):
            for c in np.flatnonzero(batch.impression[r] >= 0):
                row = batch.impression[r, c]
                low, high = log.event_start[log.column("impressions", "user")[row] + np.arange(2)]
                past = low + (event[low:high] < shown[row]).sum()
                allowed = batch.history_mask[r] & (
                    batch.history_order[r] < batch.candidate_order[r, c]
                )
                items = batch.history["item"][r, allowed]
                np.testing.assert_array_equal(
                    items, log.column("events", "item")[past - len(items) : past]
                )
                read += len(items)
    assert read > 100


def test_batches_pack(tmp_path):
    log, found = opened(tmp_path)
    batch = loader.Batches(log, found, batch_samples=8)[0]
    packed = packing.pack(batch, 4)
    S, C = batch.history_sample.shape[1], batch.candidate_sample.shape[1]
    assert packed.user["user"].shape == (2, 4)
    assert packed.history["tags"].shape == (2, 4 * S, 3)
    assert packed.labels.shape == (2, 4 * C, 2)
    np.testing.assert_array_equal(packed.impression[1, C : 2 * C], batch.impression[5])
    np.testing.assert_array_equal(packed.candidate_sample[1, C] + 1, 2)


def test_batch_samples_for(tmp_path):
    _, found = opened(tmp_path, "request")
    mean = found.stats["candidates"]
    assert loader.batch_samples_for(found, 100) == round(100 / mean)
    assert loader.batch_samples_for(found, 1) == 1


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(batch_samples=6, process_count=4), "a multiple of process_count=4"),
        (dict(batch_samples=0), "batch_samples=0, shares=1, expected at least 1"),
        (dict(batch_samples=6, process_index=2, process_count=2), "process_index=2, expected 0 .."),
        (dict(batch_samples=6, order="random"), "order='random', expected 'time' or 'shuffled'"),
    ],
)
def test_refused_batches(tmp_path, options, match):
    log, found = opened(tmp_path)
    with pytest.raises(ValueError, match=match):
        loader.Batches(log, found, **options)


def test_refused_streams(tmp_path):
    log, found = opened(tmp_path)
    batches = loader.Batches(log, found, batch_samples=6)
    assert list(loader.stream(batches, len(batches))) == []
    with pytest.raises(ValueError, match=f"start=99, expected 0 .. {len(batches)}"):
        loader.stream(batches, 99)
    with pytest.raises(ValueError, match="prefetch=0, expected threads >= 0 and prefetch >= 1"):
        loader.stream(batches, prefetch=0)
