"""One block of every architecture in plain PyTorch, written from the equations, on given arrays.

Every function is called with `p`, {path: tensor} of rankjax's own parameters (kernels are
[in, out]), the block's float inputs, and what a model makes once for all of its layers: masks
(True = may read) and look-up indices. Letters as in rankjax: R rows, S events, C candidates,
N candidates or tokens of a sequence, T feature tokens, D width, H heads. `check` says whether a
function computes what rankjax saved. Needs torch and numpy; knows nothing of rankjax or jax.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

Params = dict[str, torch.Tensor]
# Of the largest output, and of the largest gradient's norm. The tanh GELU for the exact one: 9e-5.
TOLERANCE = 2e-5
ROUNDED = 3e-2  # of bfloat16


def below(p: Params, name: str) -> Params:
    """The parameters of one part, by the rest of their paths."""
    return {k.removeprefix(f"{name}/"): x for k, x in p.items() if k.startswith(f"{name}/")}


def linear(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p[f"{name}/kernel"].mT, p.get(f"{name}/bias"))


def per_token(p: Params, name: str, x_tnd: torch.Tensor) -> torch.Tensor:
    """Token t has its own matrix."""
    if f"{name}/bias" not in p:
        return torch.bmm(x_tnd, p[f"{name}/kernel"])
    return torch.baddbmm(p[f"{name}/bias"][:, None], x_tnd, p[f"{name}/kernel"])


def norm(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm with or without an affine pair, or RMSNorm where there is a scale alone."""
    scale, bias = p.get(f"{name}/scale"), p.get(f"{name}/bias")
    if scale is not None and bias is None:
        return F.rms_norm(x, x.shape[-1:], scale, 1e-6)
    return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-6)


def token_norm(p: Params, name: str, x_tnd: torch.Tensor) -> torch.Tensor:
    """LayerNorm with an affine pair of every token's own."""
    y_tnd = F.layer_norm(x_tnd, x_tnd.shape[-1:], eps=1e-6)
    return torch.addcmul(p[f"{name}/norm/bias"][:, None], y_tnd, p[f"{name}/norm/scale"][:, None])


def heads_first(x_rnd: torch.Tensor, heads: int) -> torch.Tensor:
    """[R, N, H Q] -> [R, H, N, Q]."""
    return x_rnd.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_last(x_rhnq: torch.Tensor) -> torch.Tensor:
    """[R, H, N, Q] -> [R, N, H Q]."""
    return x_rhnq.transpose(1, 2).flatten(2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention over axis 1, [R, N, H Q]; a row that may read nothing is 0."""
    q, k, v = (heads_first(x, heads) for x in (q, k, v))
    return heads_last(F.scaled_dot_product_attention(q, k, v, mask, scale=scale))


# --- parts ------------------------------------------------------------------------------------


def matmul(p: Params, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


def weight_gradient(p: Params, x_tnd: torch.Tensor, g_tnf: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x_tnd.mT, g_tnf)


def gelu(p: Params, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def layer_norm(p: Params, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# --- feature interaction ----------------------------------------------------------------------


def mlp(p: Params, x: torch.Tensor, *, layers: int) -> torch.Tensor:
    for layer in range(layers):
        x = F.relu(linear(p, f"dense_{layer}", x))
    return x


def dots(p: Params, x_vnd: torch.Tensor, *, layers: int) -> torch.Tensor:
    x_nvd = x_vnd.transpose(0, 1)
    first, second = torch.triu_indices(len(x_vnd), len(x_vnd), offset=1)
    z_nw = torch.bmm(x_nvd, x_nvd.mT)[:, first, second]
    return mlp(p, torch.cat([x_vnd[0], z_nw], dim=-1), layers=layers)


def cross(p: Params, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, x0, linear(p, "u", linear(p, "v", x)))


def dice(p: Params, x: torch.Tensor, prefix: str = "", suffix: str = "") -> torch.Tensor:
    alpha, center, scale = (p[f"{prefix}{n}{suffix}"] for n in ("alpha", "center", "scale"))
    return x * torch.lerp(alpha, torch.ones_like(alpha), torch.sigmoid(scale * (x - center)))


def dice_layer(p: Params, x: torch.Tensor) -> torch.Tensor:
    return dice(p, linear(p, "dense", x))


def target_attention(
    p: Params, h_rsw: torch.Tensor, c_rcw: torch.Tensor, *, reads: torch.Tensor
) -> torch.Tensor:
    """DIN with its first layer factored: no [R, S, C, 4 W] array."""
    W = c_rcw.shape[-1]
    own_af, h_wf, c_wf, d_wf, p_wf = p["kernel"].split([len(p["kernel"]) - 4 * W, W, W, W, W])
    per_candidate_rwcf = (h_wf + d_wf)[:, None] + c_rcw.mT[..., None] * p_wf[:, None]
    x_rscf = (h_rsw[..., :W] @ per_candidate_rwcf.flatten(2)).unflatten(-1, (c_rcw.shape[1], -1))
    x_rscf = x_rscf + (h_rsw[..., W:] @ own_af)[:, :, None]
    x_rscf = x_rscf + (c_rcw @ (c_wf - d_wf) + p["bias"])[:, None]
    dices = "dice_alpha_0" in p
    x_rscf = dice(p, x_rscf, "dice_", "_0") if dices else torch.sigmoid(x_rscf)
    return (linear(p, "weight", x_rscf)[..., 0].mT * reads) @ h_rsw


def autoint(p: Params, x_tnd: torch.Tensor, *, heads: int) -> torch.Tensor:
    x_ntd = x_tnd.transpose(0, 1)
    q, k, v = (linear(p, f"attention/{n}", x_ntd) for n in ("query", "key", "value"))
    y_ntd = F.relu(attend(q, k, v, heads, scale=1.0) + linear(p, "residual", x_ntd))
    return y_ntd.transpose(0, 1)


def wukong(p: Params, x_tnd: torch.Tensor) -> torch.Tensor:
    """X' = norm(concat(reshape(MLP(norm(X X^T Y))), W_L X) + X)."""
    N, D = x_tnd.shape[1:]
    x_ntd = x_tnd.transpose(0, 1)
    z_ndk = x_ntd.mT @ p["fm/projection"]
    h_nf = norm(p, "fm/norm", torch.bmm(x_ntd, z_ndk).flatten(1))
    made_nw = linear(p, "fm/out", mlp(below(p, "fm/mlp"), h_nf, layers=1))
    made_tnd = made_nw.unflatten(-1, (-1, D)).transpose(0, 1)
    compressed_tnd = (p["linear/kernel"].T @ x_tnd.flatten(1)).unflatten(-1, (N, D))
    return norm(p, "norm", torch.cat([made_tnd, compressed_tnd]) + x_tnd)


def transformer(p: Params, x_tnd: torch.Tensor, *, heads: int) -> torch.Tensor:
    x_ntd = x_tnd.transpose(0, 1).contiguous()
    z_ntd = norm(p, "attention_norm", x_ntd)
    q, k, v = (linear(p, f"attention/{n}", z_ntd) for n in ("query", "key", "value"))
    h_ntd = x_ntd + linear(p, "attention_out", attend(q, k, v, heads))
    f_ntf = F.gelu(linear(p, "ffn_in", norm(p, "ffn_norm", h_ntd)))
    return (h_ntd + linear(p, "ffn_out", f_ntf)).transpose(0, 1)


def ffn(p: Params, x_tnd: torch.Tensor) -> torch.Tensor:
    return per_token(p, "ffn_out", F.gelu(per_token(p, "ffn_in", x_tnd)))


def heteroatt(p: Params, x_tnd: torch.Tensor, *, heads: int) -> torch.Tensor:
    z_tnd = token_norm(p, "attention_norm", x_tnd)
    q, k, v = (
        per_token(p, f"attention/{n}", z_tnd).transpose(0, 1) for n in ("query", "key", "value")
    )
    s_tnd = x_tnd + per_token(p, "attention/out", attend(q, k, v, heads).transpose(0, 1))
    return s_tnd + ffn(below(p, "ffn"), token_norm(p, "ffn_norm", s_tnd))


def hiformer(p: Params, x_tnd: torch.Tensor, *, heads: int) -> torch.Tensor:
    T = len(x_tnd)
    x_nw = token_norm(p, "attention_norm", x_tnd).transpose(0, 1).flatten(1)
    q, k, v = (
        linear(p, f"attention/{n}", x_nw).unflatten(-1, (T, -1)) for n in ("query", "key", "value")
    )
    s_tnd = x_tnd + per_token(p, "attention/out", attend(q, k, v, heads).transpose(0, 1))
    return s_tnd + ffn(below(p, "ffn"), token_norm(p, "ffn_norm", s_tnd))


def hhft(p: Params, t_nw: torch.Tensor, *, heads: int, tokens: int) -> torch.Tensor:
    """A Hiformer layer: virtual tokens of one vector, attention, and back to one vector."""
    z_nw = norm(p, "norm", t_nw)
    q, k, v = (linear(p, n, z_nw).unflatten(-1, (tokens, -1)) for n in ("query", "key", "value"))
    h_nf = F.gelu(linear(p, "ffn_in", attend(q, k, v, heads).flatten(1)))
    return t_nw + linear(p, "ffn_out", h_nf)


def mix(x_tnd: torch.Tensor) -> torch.Tensor:
    T, N, D = x_tnd.shape
    return x_tnd.reshape(T, N, T, D // T).transpose(0, 2).reshape(T, N, D)


def rankmixer(p: Params, x_tnd: torch.Tensor) -> torch.Tensor:
    s_tnd = norm(p, "mix_norm", mix(x_tnd) + x_tnd)
    return norm(p, "ffn_norm", ffn(below(p, "ffn"), s_tnd) + s_tnd)


def swiglu(p: Params, x_tnd: torch.Tensor) -> torch.Tensor:
    return per_token(p, "down", F.silu(per_token(p, "gate", x_tnd)) * per_token(p, "up", x_tnd))


def tokenmixer_large(p: Params, x_tnd: torch.Tensor) -> torch.Tensor:
    s_tnd = x_tnd + mix(swiglu(below(p, "mixed"), mix(norm(p, "mix_norm", x_tnd))))
    return s_tnd + swiglu(below(p, "own"), norm(p, "norm", s_tnd))


# --- sequences --------------------------------------------------------------------------------


def pointwise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    allow: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """SiLU(q k^T + bias) where allowed, times v, [R, N, H V]; not yet divided."""
    scores_rhnm = heads_first(q, heads) @ heads_first(k, heads).mT
    if bias is not None:
        scores_rhnm = scores_rhnm + bias[:, None]
    return heads_last((F.silu(scores_rhnm) * allow[:, None]) @ heads_first(v, heads))


def rows_of(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index], with the faster of the two backward passes."""
    return table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])


def hstu_attention(p: Params, q, k, v, *, allow, n: int, apart=None, bucket=None):
    """Pointwise attention alone, q, k, v [R, N, H, width], with whole arrays of masks and bias."""
    q_rhnd, k_rhnd, v_rhnd = (x.transpose(1, 2) for x in (q, k, v))
    scores_rhnm = q_rhnd @ k_rhnd.mT
    if apart is not None:
        bias_rnm = rows_of(p["position"], apart) + rows_of(p["time"], bucket)
        scores_rhnm = scores_rhnm + bias_rnm[:, None].to(scores_rhnm.dtype)
    weights_rhnm = F.silu(scores_rhnm) * allow[:, None].to(scores_rhnm.dtype)
    return (weights_rhnm @ v_rhnd).transpose(1, 2) / n


def hstu(p: Params, x_rnd: torch.Tensor, *, allow, apart, bucket, heads: int, n: int):
    u, v, q, k = F.silu(norm({}, "", x_rnd) @ p["w1"]).chunk(4, dim=-1)
    bias_rnm = rows_of(p["position_bias"], apart) + rows_of(p["time_bias"], bucket)
    a_rnd = pointwise(q, k, v, heads, allow, bias_rnm) / n
    return x_rnd + linear(p, "w2", norm({}, "", a_rnd) * u)


def dlrm_v3(p: Params, x_rnd: torch.Tensor, *, allow, heads: int, n: int):
    h_rnd = norm(p, "input_norm", x_rnd)
    u, v, q, k = F.linear(h_rnd, p["uvqk_kernel"].mT, p["uvqk_bias"]).chunk(4, dim=-1)
    u, scale = F.silu(u), (x_rnd.shape[-1] // heads) ** -0.5
    a_rnd = pointwise(q * scale, k, v, heads, allow) / n
    y_rnf = torch.cat([u, a_rnd, u * norm(p, "attention_norm", a_rnd)], dim=-1)
    return x_rnd + linear(p, "output", y_rnf)


def group_norm(p: Params, name: str, x_rnd: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    scale, bias = (rows_of(p[f"{name}/{n}"], group) for n in ("scale", "bias"))
    return torch.addcmul(bias, F.layer_norm(x_rnd, x_rnd.shape[-1:], eps=1e-6), scale)


def mtgr(p: Params, x_rnd: torch.Tensor, *, allow, group, heads: int, n: int):
    h_rnd = group_norm(p, "input_norm", x_rnd, group)
    q, k, v, u = (linear(p, name, h_rnd) for name in ("query", "key", "value", "gate"))
    a_rnd = pointwise(q, k, v, heads, allow) / n
    return x_rnd + linear(p, "out", group_norm(p, "attention_norm", a_rnd * u, group))


def encoder(p: Params, x_rnd: torch.Tensor, *, allow, heads: int):
    """A pre-norm Transformer block, LONGER's."""
    h_rnd = norm(p, "attention_norm", x_rnd)
    q, k, v = (linear(p, n, h_rnd) for n in ("query", "key", "value"))
    s_rnd = x_rnd + linear(p, "out", attend(q, k, v, heads, allow[:, None]))
    f_rnf = F.gelu(linear(p, "ffn_in", norm(p, "ffn_norm", s_rnd)))
    return s_rnd + linear(p, "ffn_out", f_rnf)


def grab(p: Params, x_arnd: torch.Tensor, *, channel, event_allow, allow, event_rows, rows, heads):
    """Copies are mixed; per channel attention with query-aware vectors; Add & Norm twice."""
    A, R, N, D = x_arnd.shape
    S = channel.shape[1]
    cat_rcw = x_arnd[:, :, S:].permute(1, 2, 0, 3).flatten(2)
    mixed_rcw = torch.sigmoid(linear(p, "mix/gate", cat_rcw)) * linear(p, "mix/value", cat_rcw)
    copies = x_arnd[:, :, S:] + mixed_rcw.unflatten(-1, (A, D)).permute(2, 0, 1, 3)
    x_and = torch.cat([x_arnd[:, :, :S], copies], dim=2).reshape(A, R * N, D)
    c_anl = torch.bmm(x_and, p["read/down/kernel"])
    q, k, v = (
        torch.bmm(c_anl, p[f"read/{n}/kernel"]).view(A, R, N, heads, -1)
        for n in ("query", "key", "value")
    )
    tables = [p[f"read/relative/{n}"] for n in ("position", "action", "time")]
    t_arnhb = (q.reshape(A, R * N * heads, -1) @ torch.cat(tables, dim=1).mT).view(
        A, R, N, heads, -1
    )

    def read(q, k, v, t_xnhb, rows_kxnm, allow_xnm):
        """X leading rows (channels and requests together)."""
        Q = q.shape[-1]
        t_xhnb = t_xnhb.transpose(1, 2)
        bias = sum(
            torch.gather(t_xhnb, -1, i[:, None].expand(-1, heads, -1, -1)) for i in rows_kxnm
        )
        mask = (bias * Q**-0.5).masked_fill(~allow_xnm[:, None], -torch.inf)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    merge = lambda x: x.flatten(0, 1)
    every = lambda i: i[:, None].expand(-1, A, *i.shape[1:]).flatten(1, 2)
    full = read(
        *(merge(q[:, :, S:]), merge(k), merge(v), merge(t_arnhb[:, :, S:])),
        *(every(rows), merge(allow)),
    ).unflatten(0, (A, R))
    own = lambda y: torch.gather(
        y[:, :, :S], 0, channel[None, :, :, None, None].expand(1, -1, -1, *y.shape[3:])
    )[0]
    partial = read(own(q), own(k), own(v), own(t_arnhb), event_rows, event_allow)
    a_anf = torch.cat([partial.expand(A, *partial.shape), full], dim=2).reshape(A, R * N, -1)
    affine = lambda n, x: torch.addcmul(
        p[f"update/{n}/bias"][:, None],
        F.layer_norm(x, (D,), eps=1e-6),
        p[f"update/{n}/scale"][:, None],
    )
    s_and = affine("attention_norm", torch.baddbmm(x_and, a_anf, p["update/out/kernel"]))
    y_and = affine("ffn_norm", s_and + ffn(below(p, "update"), s_and))
    return y_and.view(A, R, N, D)


def onetrans(p: Params, x_rnd: torch.Tensor, x_tmd: torch.Tensor, *, allow, own_allow, heads: int):
    """Shared weights for S tokens, own ones for NS tokens; shared output matrix."""
    (T, M, D), R = x_tmd.shape, len(x_rnd)
    C = M // R

    def both(q: Params, name: str, s_rnd: torch.Tensor, own_tmd: torch.Tensor):
        return linear(q, f"{name}/shared", s_rnd), per_token(q, f"{name}/own", own_tmd)

    def rowwise(y_tmd: torch.Tensor) -> torch.Tensor:
        return y_tmd.view(T, R, C, D).permute(1, 2, 0, 3).reshape(R, C * T, D)

    z = norm(p, "mha_norm", x_rnd), norm(p, "mha_norm", x_tmd)
    mha = below(p, "mha")
    (q_s, q_o), (k_s, k_o), (v_s, v_o) = (both(mha, n, *z) for n in ("query", "key", "value"))
    k, v = (torch.cat([s, rowwise(o)], dim=1) for s, o in ((k_s, k_o), (v_s, v_o)))
    a_rnd = linear(mha, "out/shared", attend(q_s, k_s, v_s, heads, allow[:, None]))
    own_rnd = linear(mha, "out/shared", attend(rowwise(q_o), k, v, heads, own_allow[:, None]))
    s_rnd = x_rnd + a_rnd
    s_tmd = x_tmd + own_rnd.view(R, C, T, D).permute(2, 0, 1, 3).reshape(T, M, D)
    f = below(p, "ffn")
    hidden = both(f, "ffn_in", norm(p, "ffn_norm", s_rnd), norm(p, "ffn_norm", s_tmd))
    y_rnd, y_tmd = both(f, "ffn_out", *map(F.gelu, hidden))
    return torch.cat([(s_rnd + y_rnd).reshape(-1, D), (s_tmd + y_tmd).reshape(-1, D)])


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    f.__name__: f
    for f in (
        *(matmul, weight_gradient, gelu, layer_norm),
        *(mlp, dots, cross, dice_layer, target_attention, autoint, wukong, transformer),
        *(heteroatt, hiformer, hhft, rankmixer, tokenmixer_large),
        *(hstu, dlrm_v3, mtgr, grab, encoder, onetrans, hstu_attention),
    )
}


# --- parity, and what is timed ----------------------------------------------------------------


class Saved:
    """What rankjax saved of a block: parameters, inputs, output, and the gradients' norms.

    file: an .npz of "p:<path>", "x:<number>", "a:<name>" (bool or int), "out", "cotangent" and
    "norm:<key>" for every "p:" and "x:". dtype: of the inputs, "float32" or "bfloat16".
    Runs on the GPU that torch finds, else on the CPU.
    """

    def __init__(
        self,
        file: str,
        function: str,
        options: dict,
        compiled: bool = False,
        dtype: str = "float32",
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with np.load(file) as saved:
            self.saved = {name: torch.from_numpy(saved[name]).to(device) for name in saved.files}
        for name in [k for k in self.saved if k[:2] == "x:" or k == "cotangent"]:
            self.saved[name] = self.saved[name].to(getattr(torch, dtype))
        self.tolerance = TOLERANCE if dtype == "float32" else ROUNDED
        wanted = [k for k in self.saved if k[:2] in ("p:", "x:")]
        self.leaves = {k: self.saved[k].requires_grad_() for k in wanted}
        self.params = {k[2:]: x for k, x in self.leaves.items() if k[0] == "p"}
        self.inputs = [x for k, x in self.leaves.items() if k[0] == "x"]
        arrays = {k[2:]: x for k, x in self.saved.items() if k[:2] == "a:"}
        self.call = functools.partial(FUNCTIONS[function], **arrays, **options)
        if compiled:
            self.call = torch.compile(self.call)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.call(self.params, *self.inputs)

    def forward_backward(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The output, and the gradients of sum(output * cotangent), leaf by leaf."""
        out = self.call(self.params, *self.inputs)
        leaves = list(self.leaves.values())
        return out, torch.autograd.grad(out, leaves, self.saved["cotangent"])

    def deviation(self) -> float:
        """The largest one, of the output and of the gradients' norms, relative to the largest."""
        out, gradients = self.forward_backward()
        want = self.saved["out"]
        found = [float((out.detach() - want).abs().max() / want.abs().max())]
        norms = [float(self.saved[f"norm:{k}"]) for k in self.leaves]
        for wanted, gradient in zip(norms, gradients, strict=True):
            found.append(abs(float(gradient.double().norm()) - wanted) / max(norms))
        return float(np.max(found))  # NaN where one is


def check(name: str, saved: Saved) -> float:
    """The deviation; ends the run, naming the block, where it is above TOLERANCE."""
    deviation = saved.deviation()
    if not deviation <= saved.tolerance:
        raise SystemExit(
            f"block {name}: differs from rankjax's by {deviation:.2g} of the largest value, "
            f"expected at most {saved.tolerance:g}; not timed"
        )
    return deviation
