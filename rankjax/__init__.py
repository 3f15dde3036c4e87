"""rankjax: on my data and my budget, which ranking architecture should I scale, along which axis?

Rooms, in the order of reading and of imports: a room imports only rooms that stand above it.

schema      what a row means: features, vocabularies, semantic groups, actions, tasks
batch       Batch, Tokens and Features: the pytrees every model and metric takes
sharding    the mesh of devices, and which array is split along which axis
hosts       many processes that train as one: joining, agreeing, saying which of them failed
host_watcher  the process beside each host that outlives it
screen      where wide tables are printed: whole lines in a file or a pipe
versions    what decides results on a machine: Python, our sources, packages
ray_cluster  a Ray cluster that runs: connecting, asking each of its nodes
memory      how much of it this machine has and lets this process take
packing     several samples in one row: side by side, or jagged, without padding between
papers      what a model file says of its paper: sizes, printed figures, open points
data        logs on disk, samples, the loader, and the sources that write logs
masks       who may read whom: rules over (segment, role, time, position, group)
kernels     attention: one public function a folder, several implementations
distinct    the distinct ids of a batch, on the device
lines       rows of a table side by side in memory, as a TPU looks them up
exchange    rows of tables that are split over devices: fetched from their owners, and sent back
embedding   tables, lookup, row-sparse updates with row-wise Adagrad
sharded_embedding  embedding, over a mesh: rows split over all devices, exchanged
layers      norms, feed-forward, per-token layers, tokenizers, history pooling, task heads
models      one file per paper
flops       exact count over the jaxpr
loss        multi-task losses, auxiliary terms
metrics     NE, log loss, AUC, GAUC, calibration, per-request AUC, MRR, nDCG, the oracle alarm
optim       the optax chain and its schedules
evaluate    the scoring function, and the metrics of a scored stream
checkpoint  Orbax: model, optimizer, tables and (seed, step), in one atomic save
step        state and one step of training: what is jitted, on one device or on a mesh
train       the loop; held-out and progressive ("predict, then train")
baseline    gradient-boosted trees on the same features, split and metrics
scaling     trial, ladder, study, fit, report: what to scale
catalogue   the named sizes: parameters, FLOPs, masks; docs/fidelity.md
plan        the bill of a step on devices that are not here: memory, time, what they exchange
bench       throughput and peers, JSON out
doctor      what this machine has and lacks
cli         rankjax data | models | train | study | baseline | report | bench | plan | doctor
"""

__version__ = "0.1.0"
