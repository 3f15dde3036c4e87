"""The blocks of plain DNN, DCN-V2 + DIN, RankMixer and HSTU in PyTorch, written from the papers.

Same shapes, same parameters (rankjax's benchmark compares the counts), same choices as rankjax's
small Configs: DIN's first layer is factored (no [R, S, C, 4W] array), HSTU's last layer computes
the candidates' rows only. Shape letters as in rankjax: R rows, S events, C candidates, D width.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class Inputs:
    """Random embedding rows of R samples, full of history and candidates, and their gradients.

    users: width of each user feature. item, event, context: widths of all features of that side
    together (0 = none). With event = 0 and context = 0 the arrays are [.., 0].
    """

    def __init__(
        self, *, R: int, S: int, C: int, users: list[int], item: int, event: int, context: int
    ):
        self.R, self.S, self.C = R, S, C
        self.widths = {"users": users, "item": item, "event": event, "context": context}
        rows = lambda *shape: (0.05 * torch.randn(*shape)).requires_grad_()
        self.users = [rows(R, width) for width in users]
        self.history_item, self.history_event = rows(R, S, item), rows(R, S, event)
        self.candidate_item, self.context = rows(R, C, item), rows(R, C, context)
        self.history_mask = torch.ones(R, S, dtype=torch.bool)
        self.candidate_mask = torch.ones(R, C, dtype=torch.bool)
        self.history_time = -torch.arange(S, 0, -1).expand(R, S) * 3600
        self.candidate_time = torch.zeros(R, C, dtype=torch.long)

    def zero_grad(self) -> None:
        found = (self.history_item, self.history_event, self.candidate_item, self.context)
        for x in (*self.users, *found):
            x.grad = None

    def history(self) -> torch.Tensor:
        """[R, S, item + event], zeros at padding."""
        x_rsw = torch.cat([self.history_item, self.history_event], dim=-1)
        return torch.where(self.history_mask[..., None], x_rsw, 0.0)

    def width(self, poolings: list[str]) -> int:
        w = self.widths
        pooled = len(poolings) * (w["item"] + w["event"])
        return sum(w["users"]) + w["item"] + w["context"] + pooled

    def concat(self, pooled: list[torch.Tensor]) -> torch.Tensor:
        """[R, C, W]: user, candidate and pooled history side by side."""
        users = [x[:, None].expand(-1, self.C, -1) for x in self.users]
        return torch.cat([*users, self.candidate_item, self.context, *pooled], dim=-1)


class TargetAttention(nn.Module):
    """DIN: sum over events of MLP([h, c, h - c, h * c]) h, not normalised, sigmoid units."""

    def __init__(self, item: int, event: int, hidden: list[int]):
        super().__init__()
        self.item = item
        self.kernel = nn.Parameter(0.1 * torch.randn(event + 4 * item, hidden[0]))
        self.bias = nn.Parameter(torch.zeros(hidden[0]))
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(hidden)])
        self.out = nn.Linear(hidden[-1], 1)

    def forward(self, h_rsw, c_rcw, mask_rs):
        W = self.item
        own_af, h_wf, c_wf, d_wf, p_wf = self.kernel.split([len(self.kernel) - 4 * W, W, W, W, W])
        per_candidate_rwcf = (h_wf + d_wf)[:, None] + c_rcw.mT[..., None] * p_wf[:, None]
        x_rscf = torch.einsum("rsw,rwcf->rscf", h_rsw[..., :W], per_candidate_rwcf)
        x_rscf = x_rscf + (h_rsw[..., W:] @ own_af)[:, :, None]
        x_rscf = torch.sigmoid(x_rscf + (c_rcw @ (c_wf - d_wf) + self.bias)[:, None])
        for layer in self.layers:
            x_rscf = torch.sigmoid(layer(x_rscf))
        a_rcs = self.out(x_rscf)[..., 0].mT * mask_rs[:, None]
        return a_rcs @ h_rsw


class Pooling(nn.Module):
    """The history of each candidate, [R, C, W] per pooling ("mean", "target")."""

    def __init__(self, inputs: Inputs, config: dict):
        super().__init__()
        self.poolings = config["pooling"]
        self.attention = None
        if "target" in self.poolings:
            w = inputs.widths
            self.attention = TargetAttention(w["item"], w["event"], config["attention_hidden"])

    def forward(self, inputs: Inputs) -> list[torch.Tensor]:
        h_rsw, found = inputs.history(), []
        for pooling in self.poolings:
            if pooling == "mean":
                mean_rw = h_rsw.sum(1) / inputs.history_mask.sum(1, keepdim=True).clamp(min=1)
                found.append(mean_rw[:, None].expand(-1, inputs.C, -1))
            else:
                found.append(self.attention(h_rsw, inputs.candidate_item, inputs.history_mask))
        return found


def mlp(width_in: int, width: int, layers: int) -> nn.Sequential:
    sizes = [width_in] + [width] * layers
    steps = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(module for pair in steps for module in pair))


class DNN(nn.Module):
    """Concat -> MLP -> head."""

    def __init__(self, inputs: Inputs, config: dict):
        super().__init__()
        self.pooling = Pooling(inputs, config)
        self.mlp = mlp(inputs.width(config["pooling"]), config["width"], config["layers"])
        self.head = nn.Linear(config["width"], config["tasks"])

    def forward(self, inputs: Inputs) -> torch.Tensor:
        return self.head(self.mlp(inputs.concat(self.pooling(inputs))))


class DCNv2(nn.Module):
    """x_{l+1} = x_0 * (U V^T x_l + b) + x_l beside a deep network, target attention before them."""

    def __init__(self, inputs: Inputs, config: dict):
        super().__init__()
        self.pooling = Pooling(inputs, config)
        W, r = inputs.width(config["pooling"]), config["rank"]
        low_rank = lambda: nn.Sequential(nn.Linear(W, r, bias=False), nn.Linear(r, W))
        crosses = [low_rank() if r else nn.Linear(W, W) for _ in range(config["layers"])]
        self.cross = nn.ModuleList(crosses)
        self.deep = mlp(W, config["width"], config["deep_layers"])
        self.head = nn.Linear(W + config["width"], config["tasks"])

    def forward(self, inputs: Inputs) -> torch.Tensor:
        x0_rcw = x_rcw = inputs.concat(self.pooling(inputs))
        for cross in self.cross:
            x_rcw = x0_rcw * cross(x_rcw) + x_rcw
        return self.head(torch.cat([x_rcw, self.deep(x0_rcw)], dim=-1))


class PerToken(nn.Module):
    """y_t = x_t W_t + b_t, token-major [T, N, D]."""

    def __init__(self, tokens: int, width_in: int, width_out: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(tokens, width_in, width_out) / width_in**0.5)
        self.bias = nn.Parameter(torch.zeros(tokens, 1, width_out))

    def forward(self, x_tnd):
        return torch.baddbmm(self.bias, x_tnd, self.kernel)


class MixerBlock(nn.Module):
    """s = LN(mix(x) + x); y = LN(PFFN(s) + s)."""

    def __init__(self, tokens: int, width: int, expansion: int):
        super().__init__()
        self.mix_norm, self.ffn_norm = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.ffn_in = PerToken(tokens, width, expansion * width)
        self.ffn_out = PerToken(tokens, expansion * width, width)

    def forward(self, x_tnd):
        T, N, D = x_tnd.shape
        mixed_tnd = x_tnd.reshape(T, N, T, D // T).transpose(0, 2).reshape(T, N, D)
        s_tnd = self.mix_norm(mixed_tnd + x_tnd)
        return self.ffn_norm(self.ffn_out(F.gelu(self.ffn_in(s_tnd))) + s_tnd)


class RankMixer(nn.Module):
    """Even split into T tokens -> L blocks -> mean -> head."""

    def __init__(self, inputs: Inputs, config: dict):
        super().__init__()
        T, D = config["tokens"], config["width"]
        self.T, self.D = T, D
        self.pooling = Pooling(inputs, config)
        self.tokenizer = PerToken(T, -(-inputs.width(config["pooling"]) // T), D)
        blocks = [MixerBlock(T, D, config["expansion"]) for _ in range(config["layers"])]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(D, config["tasks"])

    def forward(self, inputs: Inputs) -> torch.Tensor:
        x_rcw = inputs.concat(self.pooling(inputs))
        x_rcw = F.pad(x_rcw, (0, -x_rcw.shape[-1] % self.T))
        x_tnw = x_rcw.reshape(inputs.R * inputs.C, self.T, -1).transpose(0, 1)
        x_nd = self.blocks(self.tokenizer(x_tnw)).mean(0)
        return self.head(x_nd.reshape(inputs.R, inputs.C, self.D))


class HSTULayer(nn.Module):
    """X + W2 (LN(A V) * U), A = SiLU(Q K^T + rab) / n masked; U, V, Q, K = SiLU(LN(X) W1)."""

    def __init__(self, config: dict, positions: int):
        super().__init__()
        D, self.heads, self.n = config["width"], config["heads"], positions
        self.w1, self.w2 = nn.Linear(D, 4 * D, bias=False), nn.Linear(D, D)
        self.position_bias = nn.Parameter(0.02 * torch.randn(2 * positions - 1))
        self.time_bias = nn.Parameter(0.02 * torch.randn(129)) if config["time_bias"] else None

    def forward(self, x_rnd, relation, rows: int):
        """relation: (allow, position index, time bucket), each [R or 1, N, N]; the last `rows`."""
        R, N, D = x_rnd.shape
        allow, position, bucket = (x[:, N - rows :] for x in relation)
        h_rnd = F.layer_norm(x_rnd, (D,), eps=1e-6)
        if rows == N:
            u, v, q, k = F.silu(self.w1(h_rnd)).split(D, dim=-1)
        else:
            w_u, w_v, w_q, w_k = self.w1.weight.split(D)
            u, q = (F.silu(F.linear(h_rnd[:, N - rows :], w)) for w in (w_u, w_q))
            v, k = (F.silu(F.linear(h_rnd, w)) for w in (w_v, w_k))
        heads = lambda x: x.reshape(R, x.shape[1], self.heads, -1).transpose(1, 2)
        bias_rnm = self.position_bias[position]
        if self.time_bias is not None:
            bias_rnm = bias_rnm + self.time_bias[bucket]
        a_rhnm = F.silu(heads(q) @ heads(k).mT + bias_rnm[:, None]) / self.n
        y_rhnv = (a_rhnm * allow[:, None]) @ heads(v)
        y_rnd = F.layer_norm(y_rhnv.transpose(1, 2).reshape(R, rows, D), (D,), eps=1e-6) * u
        return self.w2(y_rnd) + x_rnd[:, N - rows :]


class HSTU(nn.Module):
    """[one token per user feature | events | candidates] -> L layers -> candidates -> head."""

    def __init__(self, inputs: Inputs, config: dict):
        super().__init__()
        D, w = config["width"], inputs.widths
        self.content = nn.Linear(w["item"], D)
        self.event = nn.Linear(w["event"], D, bias=False)
        self.own = nn.Linear(w["context"], D, bias=False)
        self.users = nn.ModuleList([nn.Linear(width, D) for width in w["users"]])
        positions = len(w["users"]) + config["history"] + 1
        layers = [HSTULayer(config, positions) for _ in range(config["layers"])]
        self.layers, self.positions = nn.ModuleList(layers), positions
        self.enter, self.norm = nn.LayerNorm(D, 1e-6), nn.LayerNorm(D, 1e-6)
        hidden = lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1))
        self.heads = nn.ModuleList([hidden() for _ in range(config["tasks"])])

    def forward(self, inputs: Inputs) -> torch.Tensor:
        users = [layer(x)[:, None] for layer, x in zip(self.users, inputs.users, strict=True)]
        history = self.content(inputs.history_item) + self.event(inputs.history_event)
        candidates = self.content(inputs.candidate_item) + self.own(inputs.context)
        x_rnd = self.enter(torch.cat([*users, history, candidates], dim=1))
        relation = self.relation(inputs, len(users))
        for number, layer in enumerate(self.layers, start=1):
            last = number == len(self.layers)
            x_rnd = layer(x_rnd, relation, inputs.C if last else x_rnd.shape[1])
        x_rcd = self.norm(x_rnd)
        return torch.cat([head(x_rcd) for head in self.heads], dim=-1)

    def relation(self, inputs: Inputs, context: int) -> tuple[torch.Tensor, ...]:
        """Who may read whom, which position row, which time bucket: [R, N, N], of every batch."""
        R, S, C = inputs.R, inputs.S, inputs.C
        N, past = context + S + C, context + S
        index = torch.arange(N)
        causal_nn = (index[:, None] >= index) & (index < past) | (index[:, None] == index)
        there = [torch.ones(R, context, dtype=torch.bool), inputs.history_mask]
        valid_rn = torch.cat([*there, inputs.candidate_mask], dim=1)
        allow_rnn = causal_nn & valid_rn[:, None] & valid_rn[:, :, None]
        seen_r1 = context + inputs.history_mask.sum(1, keepdim=True)
        position_rn = torch.where(index < past, index, seen_r1)
        relative_rnn = position_rn[:, None] - position_rn[:, :, None] + self.positions - 1
        relative_rnn = relative_rnn.clamp(0, 2 * self.positions - 2)
        no_time = torch.zeros(R, context, dtype=torch.long)
        time_rn = torch.cat([no_time, inputs.history_time, inputs.candidate_time], dim=1)
        apart_rnn = (time_rn[:, :, None] - time_rn[:, None]).abs().clamp(min=1)
        apart_rnn[:, :context], apart_rnn[:, :, :context] = 1, 1
        bucket_rnn = (apart_rnn.float().log() / 0.301).floor().long().clamp(0, 128)
        return allow_rnn, relative_rnn, bucket_rnn


MODELS = {"dlrm_mlp": DNN, "dcnv2_din": DCNv2, "rankmixer": RankMixer, "hstu": HSTU}
