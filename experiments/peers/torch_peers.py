"""PyTorch peers of what `rankjax bench` measures: the same work, in a process of its own.

python experiments/peers/torch_peers.py WORK.json OUT.json

`rankjax bench ... --peers` writes WORK.json, calls this file between its own measurements and reads
OUT.json, so that both libraries are timed on the same machine in the same minutes and their thread
pools never meet. Needs torch, numpy and pyarrow; knows nothing of rankjax or jax.

WORK.json: {"threads": 2, "items": [{"name", "kind", "warmup", "repeats", ...}, ...]}; the fields of
each kind stand at its function. OUT.json: {"torch": version, "threads": 2, "results": {name:
{"seconds": [one per repeat], ...}}}.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import torch
import torch_blocks
import torch_layers
from torch.utils import data


def timed(run: Callable[[], object], warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` calls that are not counted."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        run()
    wait()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - began)
    return seconds


# --- loader ----------------------------------------------------------------------------------


def columns(log: pathlib.Path, file: str) -> dict[str, np.ndarray]:
    """{name: [n] or [n, M]}, memory-mapped and zero-copy."""
    with pa.memory_map(str(log / f"{file}.arrow")) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    found = {}
    for name, x in zip(batch.schema.names, batch.columns):
        if pa.types.is_fixed_size_list(x.type):
            found[name] = x.flatten().to_numpy().reshape(len(x), x.type.list_size)
        else:
            found[name] = x.to_numpy()
    return found


class Samples(data.Dataset):
    """Samples gathered one by one (an int index) or side by side (a list of them).

    work: "log" folder, "samples" .npz of pointers, "columns" {"user", "item", "event", "context",
    "label": names}, "history" S, "candidates" C.
    """

    def __init__(self, work: dict):
        self.work, self.names = work, work["columns"]
        files = ("users", "items", "events", "impressions")
        log = pathlib.Path(work["log"])
        self.users, self.items, self.events, self.impressions = (columns(log, f) for f in files)
        with np.load(work["samples"]) as saved:
            self.pointers = {name: saved[name] for name in saved.files}

    def __len__(self) -> int:
        return len(self.pointers["user"])

    def __getitem__(self, index: int | list[int]) -> dict[str, np.ndarray]:
        """[S] and [C] arrays of one sample, or [B, S] and [B, C] of a list; padding is 0."""
        p, S, C = self.pointers, self.work["history"], self.work["candidates"]
        index = np.asarray(index)
        start, end = p["event_start"][index, None], p["event_end"][index, None]
        rows = start + np.arange(S)
        seen = rows < end
        out = self._gather(self.events, "event", "history", np.where(seen, rows, 0), seen)
        first, last = p["candidate_offsets"][index, None], p["candidate_offsets"][index + 1, None]
        at = first + np.arange(C)
        shown = at < last
        rows = p["impressions"][np.where(shown, at, 0)]
        out |= self._gather(self.impressions, "context", "candidate", rows, shown)
        labels = [self.impressions[name][rows] * shown for name in self.names["label"]]
        out["labels"] = np.stack(labels, axis=-1).astype(np.float32)
        for name in self.names["user"]:
            out[f"user.{name}"] = self.users[name][p["user"][index]]
        return out

    def _gather(
        self, file: dict, side: str, prefix: str, rows: np.ndarray, mask: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The columns of rows and of the items they name; zeros where masked."""
        item = file["item"][rows] * mask
        out = {f"{prefix}.mask": mask, f"{prefix}.time": file["time"][rows] * mask}
        for name in self.names[side]:
            values = file[name][rows]
            out[f"{prefix}.{name}"] = values * mask.reshape(
                *mask.shape, *(1,) * (values.ndim - mask.ndim)
            )
        for name in self.names["item"]:
            out[f"{prefix}.{name}"] = self.items[name][item]  # row 0 is zeros
        return out


def loader(item: dict) -> dict:
    """One pass of a DataLoader over the samples, `repeats` times; also: samples, impressions.

    item: as `Samples`, and "variant" ("example": __getitem__ per sample and the default collate;
    "batch": a batch sampler and one vectorised gather per batch), "workers", "batch", "limit".
    The clock starts when the first batch is there, so that starting workers is not counted, and
    the first batch's samples are not counted either.
    """
    samples = Samples(item)
    chosen = range(min(item["limit"], len(samples)))
    if item["variant"] == "example":
        batches = data.DataLoader(
            data.Subset(samples, chosen), batch_size=item["batch"], num_workers=item["workers"]
        )
    else:
        sampler = data.BatchSampler(chosen, item["batch"], drop_last=False)
        batches = data.DataLoader(
            samples, sampler=sampler, batch_size=None, num_workers=item["workers"]
        )
    seconds, counts = [], (0, 0)
    for run in range(item["warmup"] + item["repeats"]):
        counts, spent = one_pass(iter(batches))
        if run >= item["warmup"]:
            seconds.append(spent)
    return {"seconds": seconds, "samples": counts[0], "impressions": counts[1]}


def one_pass(batches: Iterator[dict]) -> tuple[tuple[int, int], float]:
    """((samples, impressions), seconds) of all batches after the first."""
    next(batches)
    began = time.perf_counter()
    samples = impressions = 0
    for batch in batches:
        samples += len(batch["candidate.mask"])
        impressions += int(np.count_nonzero(batch["candidate.mask"]))
    return (samples, impressions), time.perf_counter() - began


# --- embedding -------------------------------------------------------------------------------


def embedding(item: dict) -> dict:
    """Look-up, backward and sparse update of nn.Embedding(sparse=True), one step a call.

    item: "rows", "width", "ids" (an .npy of int32 [n, S]), "optimizer" ("adagrad", per element,
    or "adam": torch has no row-wise one). The gradient of each looked-up row is a given constant.
    """
    torch.manual_seed(0)
    ids = torch.from_numpy(np.load(item["ids"]).astype(np.int64))
    table = torch.nn.Embedding(item["rows"], item["width"], sparse=True)
    g_nse = torch.randn(*ids.shape, item["width"]) / ids.numel()
    make = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.SparseAdam}[item["optimizer"]]
    optimizer = make(table.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (table(ids) * g_nse).sum().backward()
        optimizer.step()

    return {"seconds": timed(step, item["warmup"], item["repeats"])}


# --- blocks ----------------------------------------------------------------------------------


def blocks(item: dict) -> dict:
    """Forward, backward, clipping and Adam of one model on given embedding rows, one step a call.

    item: "shapes" as `torch_blocks.Inputs` and "model": {"name", the fields of its Config}.
    Gradients with respect to the embedding rows are computed too, as a table update needs them.
    Returns also "parameters", the number of trained values, to compare with the peer's.
    """
    torch.manual_seed(0)
    inputs = torch_blocks.Inputs(**item["shapes"])
    model = torch_blocks.MODELS[item["model"]["name"]](inputs, item["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    labels_rck = (torch.rand(inputs.R, inputs.C, item["model"]["tasks"]) < 0.3).float()
    weights_rc1 = inputs.candidate_mask[..., None].float()

    def step() -> None:
        optimizer.zero_grad()
        inputs.zero_grad()
        logits_rck = model(inputs)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_rck, labels_rck, weights_rc1, reduction="sum"
        )
        (loss / weights_rc1.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seconds = timed(step, item["warmup"], item["repeats"])
    return {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


def layer(item: dict) -> dict:
    """One block on rankjax's own parameters and inputs, one pass a call; compared before timed.

    item: "file", "function", "options", "compiled" and, if any, "dtype" as `torch_layers.Saved`;
    "part":
    "forward" (without a graph for gradients) or "forward_backward". Also: "max_deviation".
    """
    fields = ("file", "function", "options", "compiled", "dtype")
    saved = torch_layers.Saved(**{name: item[name] for name in fields if name in item})
    deviation = torch_layers.check(item["name"], saved)
    run = {"forward": saved.forward, "forward_backward": saved.forward_backward}[item["part"]]
    seconds = timed(run, item["warmup"], item["repeats"])
    return {"seconds": seconds, "max_deviation": deviation}


KINDS = {"loader": loader, "embedding": embedding, "blocks": blocks, "layer": layer}


def main(work_path: str, out_path: str) -> None:
    work = json.loads(pathlib.Path(work_path).read_text())
    torch.set_num_threads(work["threads"])
    results = {item["name"]: KINDS[item["kind"]](item) for item in work["items"]}
    out = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
    pathlib.Path(out_path).write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
