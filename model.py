"""
AdaPonderLM: a language model in which every token decides how many passes through the network it needs.

Notable choices, in reading order:
- The backbone is GPT-NeoX (Pythia): parallel attention and MLP, partial rotary, LayerNorm with bias, untied embeddings.
- It runs n_iter times through the same weights. Between two iterations a token's input moves by its pondering
  embedding, the expected embedding of its next token (PonderLM, arXiv 2505.20674).
- After each iteration a gate MLP of its own judges every token: one whose gate falls under tau halts for good (AdaPonderLM, arXiv 2603.01914).
- A halted token keeps its hidden state and its K/V, so later iterations cannot change anything about it. Hence three
  executions of one function: dense (training), packed (only active tokens run), cached (decoding). They share `Block`;
  only the attention function that is handed to it differs.
- cfg.n_iter=1 is vanilla Pythia, cfg.halting=False is fixed-depth PonderLM: same code, same weights.

This file needs torch and nothing else: copy it into your project.
"""
import json
import math
import os
import sys
import zipfile
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class AdaPonderConfig:
    vocab_size: int = 50304        # tokens in the embedding tables (pad to a multiple of 64)
    block_size: int = 2048         # longest context, tokens
    n_layer: int = 6               # blocks in one iteration
    n_head: int = 8                # attention heads a block
    n_embd: int = 512              # width d of the residual stream; the MLPs are 4 d wide
    n_iter: int = 4                # K, passes through the backbone; 1 is vanilla Pythia
    halting: bool = True           # learned per-token depth; False is fixed-depth PonderLM
    tau: float = 1e-4              # a token halts when its gate, in (0, 1), falls under this (objective 'saving': nats a pass; training sets it)
    rotary_pct: float = 0.25       # share of each head's dimensions that rotate
    rotary_base: float = 10000.0   # longest rotary wavelength is 2 pi times about this, positions
    scale_embeds: bool = True      # multiply embeddings by sqrt(d), in E and in P V alike
    norm_eps: float = 1e-5         # LayerNorm's epsilon
    gate_width: float = 4.0        # hidden width of a gate's MLP, in units of n_embd
    gate_bias: float = 4.0         # logit at which gates start: sigmoid(4) = 0.98, open
    objective: str = 'saving'      # what the gates learn: 'saving' what going on will save; 'paper' to close, under pressure; 'live' the same, halted ones count as paid
    feedback: str = 'embedding'    # what an iteration hands to the next: 'embedding' (PonderLM) or 'hidden' (a loop transformer)
    ponder_norm: bool = False      # a final LayerNorm of its own for what is handed on, so that a token's state need not be prediction and message alike

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise ValueError(f'{f.name} must be of type {f.type.__name__}, not {value!r}')
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'n_iter'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}')
        if not 1 <= self.gate_width * self.n_embd < math.inf:
            raise ValueError(f'gate_width {self.gate_width} times n_embd {self.n_embd} must be at least 1, and finite')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})')
        if not 0 <= self.tau < 1:
            raise ValueError(f'tau must be in [0, 1), not {self.tau}')
        if not 0 <= self.rotary_pct <= 1 or self.rotary_dims % 2:
            raise ValueError(f'rotary_pct ({self.rotary_pct}) of a head of {self.head_size} must be an even number of dimensions')
        if not self.rotary_base > 0 or not self.norm_eps > 0:
            raise ValueError('rotary_base and norm_eps must be positive')
        if self.objective not in ('saving', 'live', 'paper'):
            raise ValueError(f"objective must be 'saving', 'live' or 'paper', not {self.objective!r}")
        if self.feedback not in ('embedding', 'hidden'):
            raise ValueError(f"feedback must be 'embedding' or 'hidden', not {self.feedback!r}")

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def gate_hidden(self):
        return round(self.gate_width * self.n_embd)

    @property
    def rotary_dims(self):
        return int(self.head_size * self.rotary_pct)

    @property
    def embed_scale(self):
        return math.sqrt(self.n_embd) if self.scale_embeds else 1.0

    def flops(self, context):
        """Forward FLOPs of one token that attends to `context` keys (in a causal pass over T tokens: (T + 1) / 2 on average).

        Multiplications and additions of the matrix products, two per multiply-add; norms, softmax and GELU are left out.
        linear and attention are paid once an iteration, gate and ponder once after each iteration but the last, unembed once.
        """
        d = self.n_embd
        return dict(
            linear=self.n_layer * 24 * d * d,          # QKV 6 d^2, output 2 d^2, MLP 16 d^2
            attention=self.n_layer * 4 * context * d,  # q K^T and P V
            gate=self.gate_hidden * 2 * (d + 1) if self.halting and self.n_iter > 1 else 0,
            ponder=4 * d * self.vocab_size if self.feedback == 'embedding' else 0,  # h U^T and P V
            unembed=2 * d * self.vocab_size)

    def inference_flops(self, depth, context, last=None):
        """Forward FLOPs of one token that ran `depth` iterations (int or tensor, 1 .. last; last: max_iter, default n_iter)."""
        f = self.flops(context)
        gates = depth - (depth == (last or self.n_iter)) * 1  # the last iteration has no gate
        return depth * (f['linear'] + f['attention']) + gates * f['gate'] + (depth - 1) * f['ponder'] + f['unembed']


def rope_table(pos, cfg, dtype):
    """cos and sin of the rotary angles at positions pos (...): two tensors (..., 1, rotary_dims / 2). Angles in float64: exact at any length."""
    high = torch.float32 if pos.device.type == 'mps' else torch.float64
    freq = cfg.rotary_base ** (-torch.arange(0, cfg.rotary_dims, 2, device=pos.device, dtype=high) / max(cfg.rotary_dims, 1))
    angle = (pos.to(high)[..., None] * freq).unsqueeze(-2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rope):
    """Rotate the first rotary_dims of each head, GPT-NeoX style: dimension j pairs with j + rotary_dims / 2. x: (..., nh, hs)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def round_up(n):
    """How many rows n tokens of packed training take: for bfloat16 a kernel is made whenever a matrix product has a new size, and odd ones fit badly."""
    return n + -n % 64 if torch.is_grad_enabled() else n


def fill(x, n):
    """x (N, ...) with zeros behind it, up to n rows."""
    return x if len(x) == n else F.pad(x, (0, 0) * (x.dim() - 1) + (0, n - len(x)))


# The three attention functions: attend(q, k, v, kv, at) -> y, kv. q, k, v, y: (..., nh, hs) of the tokens that run.
# kv holds K and V of every token of the layer; the function puts the fresh k, v of the running tokens into it. This is KV reuse:
# K^(i) <- where(m^i, K fresh, K^(i-1)).

def dense_attention(q, k, v, kv, m):
    """All tokens run; m (B, T) bool keeps the K/V of halted ones as they were. q, k, v: (B, T, nh, hs); kv: two (B, nh, T, hs) or None."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
    if kv is not None:
        keep = m[:, None, :, None]
        k, v = torch.where(keep, k, kv[0]), torch.where(keep, v, kv[1])
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2), (k, v)


def packed_attention(q, k, v, kv, at):
    """Only the active tokens run. q, k, v: (N, nh, hs), in order of row, then position; kv: two (B, nh, T, hs) or None.

    at: (row, pos, counts), which tokens these are: row, pos (N,); counts: how many there are in each row, a list of length B.
    q, k, v may have more than N rows: what lies behind the tokens is none, and y is 0 there.
    """
    row, pos, counts = at
    rows = len(q)
    if kv is None or len(row) == kv[0].size(0) * kv[0].size(2):  # everyone is active: the first iteration, at least
        y, kv = dense_attention(*(t.unflatten(0, (len(counts), -1)) for t in (q, k, v)), None, None)
        return y.flatten(0, 1), kv
    q, k, v = (t[:len(row)] for t in (q, k, v))
    K, V = (old.index_put((row[:, None], torch.arange(old.size(1), device=row.device), pos[:, None]), new)
            for old, new in zip(kv, (k, v)))
    if q.is_cuda:  # flash attention over every position beats a masked kernel over the active ones
        full = q.new_zeros(K.size(0), K.size(2), *q.shape[1:]).index_put((row, pos), q)  # (B, T, nh, hs)
        y = F.scaled_dot_product_attention(full.transpose(1, 2), K, V, is_causal=True)
        return fill(y.transpose(1, 2)[row, pos], rows), (K, V)
    out = []
    for qb, pb, Kb, Vb in zip(q.split(counts), pos.split(counts), K, V):  # rows of one unbind: slices of the whole would each have a gradient of its size
        for qc, pc in zip(qb.split(128), pb.split(128)):  # short runs of queries, so that keys after the run are never touched
            if n := len(pc):
                keys = torch.arange(min(K.size(2), round_up(int(pc[-1]) + 1)))
                qc, pc = fill(qc, round_up(n)), fill(pc, round_up(n))
                y = F.scaled_dot_product_attention(qc.transpose(0, 1)[None], Kb[None, :, :len(keys)], Vb[None, :, :len(keys)], attn_mask=keys <= pc[:, None])
                out.append(y[0, :, :n].transpose(0, 1))
    return fill(torch.cat(out), rows), (K, V)


def cached_attention(q, k, v, kv, at):
    """One token of each of N slots runs. q, k, v: (N, nh, hs); kv: two (slots, n_iter, nh, L, hs), written in place.

    at: (slot, it, pos, where, length). slot, pos: (N,) int64. it: (N,) int64, or an int if all are at the same iteration and the slots are 0 .. N - 1.
    where: the same as a list of (slot, it, pos), to look at each slot's own part of the caches; None for shapes that never change: then
    the first `length` positions are looked at, under a mask.
    """
    slot, it, pos, where, length = at
    for cache, new in zip(kv, (k, v)):
        cache[slot, it, :, pos] = new
    if where is None:  # a view where all are at one iteration, else a copy
        K, V = (cache[:, it, :, :length] if isinstance(it, int) else cache[slot, it, :, :length] for cache in kv)
        mask = (torch.arange(length, device=q.device) <= pos[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], K, V, attn_mask=mask)[:, :, 0], kv
    y = [F.scaled_dot_product_attention(q[n:n + 1, :, None], kv[0][b, i, None, :, :p + 1], kv[1][b, i, None, :, :p + 1])
         for n, (b, i, p) in enumerate(where)]  # views: no copy of a cache, and no slot pays for another's length
    return torch.cat(y)[:, :, 0], kv


class Linear(nn.Linear):
    def forward(self, x):
        if few(x, 8):
            # The weights on the left, and never one column: BLAS would take a matrix-vector product, which is one thread's work
            rows = x if len(x) > 1 else x.repeat(2, 1)
            y = self.weight @ rows.t() if self.bias is None else torch.addmm(self.bias[:, None], self.weight, rows.t())
            return y.t()[:len(x)].contiguous()
        return super().forward(x)


def few(x, most):
    """A decoding step of few tokens on a CPU, where the usual order of a matrix product is up to four times slower than the best."""
    return x.device.type == 'cpu' and x.dim() == 2 and len(x) <= most and x.element_size() >= 4 and not torch.is_grad_enabled()


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd)  # rows in GPT-NeoX's order: for each head its q, k, v
        self.proj = Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, rope, attend, kv, at):
        q, k, v = self.qkv(x).unflatten(-1, (self.n_head, -1)).chunk(3, dim=-1)  # (..., nh, hs)
        y, kv = attend(rotate(q, rope), rotate(k, rope), v, kv, at)
        return self.proj(y.flatten(-2)), kv


class MLP(nn.Module):
    def __init__(self, n_in, n_hidden, n_out):
        super().__init__()
        self.fc = Linear(n_in, n_hidden)
        self.proj = Linear(n_hidden, n_out)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """One GPT-NeoX layer, for tokens in any arrangement: x (..., d). How they see each other is `attend`'s business."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.n_embd, 4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x, rope, attend, kv, at):
        y, kv = self.attn(self.ln_1(x), rope, attend, kv, at)
        return x + (y + self.mlp(self.ln_2(x))), kv  # the small ones first: in bfloat16 the sum is rounded to the size of x once


class Gate(MLP):
    """s = sigmoid(MLP(h)): (..., d) -> (...), in (0, 1), at least float32."""

    def forward(self, h):
        g = super().forward(h).squeeze(-1)
        return torch.sigmoid(g.to(torch.promote_types(g.dtype, torch.float32)))


def matrix_dtype(table):
    """What the products with this table are computed in, and what their results are summed in."""
    kind = table.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else table.dtype
    return dtype, torch.promote_types(dtype, torch.float32)


class CrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(h U^T)[target] over tokens, and its terms. h: (N, d), U: (V, d), targets: (N,) -> (), (N,) nats; 0 where target is -1.

    The gradients are made in the same pass: the logits of at most `chunk` tokens live at a time, and are computed once.
    """

    @staticmethod
    def forward(ctx, h, U, targets, chunk):
        dtype, wide = matrix_dtype(U)
        u, nlls, dhs, dU = U.to(dtype), [], [], torch.zeros_like(U) if ctx.needs_input_grad[1] else None
        chunk = math.ceil(len(h) / max(1, math.ceil(len(h) / chunk))) or 1  # equal runs
        for x, t in zip(h.to(dtype).split(chunk), targets.split(chunk)):
            at, counts = t.clamp(min=0)[:, None], (t != -1)[:, None]
            p = (x @ u.t()).to(wide)  # (n, V): logits, then in place exp(logits - top)
            hit, top = p.gather(-1, at), p.amax(-1, keepdim=True)
            z = p.sub_(top).exp_().sum(-1, keepdim=True)
            nlls.append(((z.log() + top - hit) * counts).squeeze(-1))
            if any(ctx.needs_input_grad):
                p = p.scatter_add_(-1, at, -z).to(dtype)  # softmax less 1 at the target, times z
                w = counts / z
                dhs.append((p @ u) * w)
                if dU is not None:
                    dU.addmm_(p.t(), x * w) if dtype == U.dtype else dU.add_(p.t() @ (x * w).to(dtype))
            del p  # else it lives until the next one is there
        ctx.save_for_backward(torch.cat(dhs).to(h.dtype) if dhs else None, dU)
        nll = torch.cat(nlls)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx, g, _):
        return *(None if d is None else d.mul_(g.to(d.dtype)) for d in ctx.saved_tensors), None, None


class ExpectedRow(torch.autograd.Function):
    """softmax(h U^T) V, the rows of V weighted by probability. h: (N, d), U, V: (vocab, d) -> (N, d).

    This is attention of h over the rows of U: a running maximum and sum let it go through the vocabulary in blocks, so that no more than
    N x block logits live at a time, in backward too, where they are computed again.
    """

    @staticmethod
    def forward(ctx, h, U, V, block):
        dtype, wide = ctx.dtypes = matrix_dtype(U)
        ctx.block = block
        x, e = h.to(dtype), torch.zeros_like(h, dtype=wide)
        top, z = x.new_full((len(h), 1), -math.inf, dtype=wide), x.new_zeros(len(h), 1, dtype=wide)
        for u, v in zip(U.to(dtype).split(block), V.to(dtype).split(block)):
            p = (x @ u.t()).to(wide)  # (N, block): logits, then in place exp(logits - top)
            old, top = top, torch.maximum(top, p.amax(-1, keepdim=True))
            p, shrink = p.sub_(top).exp_(), (old - top).exp_()
            z = z.mul_(shrink).add_(p.sum(-1, keepdim=True))
            e.mul_(shrink).add_(p.to(dtype) @ v)
        e /= z
        logsum = top + z.log()
        ctx.save_for_backward(h, U, V, e, logsum)
        return e.to(h.dtype)

    @staticmethod
    def backward(ctx, g):
        h, U, V, e, logsum = ctx.saved_tensors
        dtype, wide = ctx.dtypes
        dh, dU, dV = (torch.zeros_like(t, dtype=wide) if need else None for t, need in zip((h, U, V), ctx.needs_input_grad))
        x, along = h.to(dtype), (g * e).sum(-1, keepdim=True)
        g = g.to(dtype)
        for at, (u, v) in enumerate(zip(U.to(dtype).split(ctx.block), V.to(dtype).split(ctx.block))):
            rows = slice(at * ctx.block, (at + 1) * ctx.block)
            p = (x @ u.t()).to(wide).sub_(logsum).exp_()
            if dV is not None:
                dV[rows] = p.to(dtype).t() @ g
            p = (g @ v.t()).to(wide).sub_(along).mul_(p).to(dtype)
            if dU is not None:
                dU[rows] = p.t() @ x
            if dh is not None:
                dh += p @ u
        return *(None if d is None else d.to(t.dtype) for d, t in zip((dh, dU, dV), (h, U, V))), None


class Affine(nn.Module):
    """What a LayerNorm ends with. Two LayerNorms of one input differ in nothing else, so this makes the second from the first. (..., d) -> (..., d)."""

    def __init__(self, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return x * self.weight + self.bias


@dataclass
class Output:
    hidden: torch.Tensor                         # (B, T, d) each token's last state, the final LayerNorm included
    depth: torch.Tensor                          # (B, T) int64, iterations that ran, 1 .. n_iter
    gates: torch.Tensor                          # (B, T, n_iter - 1) gate values; 0 where the token had halted before
    unembed: Callable                            # hidden -> logits
    nll: Optional[torch.Tensor] = None           # (B, T) nats, detached; 0 where the target is -1
    ce_loss: Optional[torch.Tensor] = None       # () mean of nll, nats a token
    ponder_loss: Optional[torch.Tensor] = None   # () what the gates learn from beside cross entropy, see ponder_loss and saving_loss
    loss: Optional[torch.Tensor] = None          # () ce_loss + ponder_lambda * ponder_loss

    @property
    def logits(self):
        """(B, T, vocab), computed when asked for: training never holds them."""
        return self.unembed(self.hidden)


class Step(NamedTuple):
    """One generated token. depth and gates are those of the position that predicted it: the compute spent on finding this token."""
    seq: int      # index of the prompt that it continues
    token: int
    depth: int    # 1 .. n_iter
    gates: list   # the gate values that were evaluated
    nll: float    # nats, under the model itself (temperature 1, nothing cut off)


class KVCache:
    """K and V of every layer, slot and iteration: two tensors (n_layer, slots, n_iter, nh, length, hs).

    Iteration i of a new token attends to iteration i of all earlier ones, hence n_iter times a plain model's cache:
    2 * n_layer * n_iter * n_embd * length * bytes a slot (Pythia-70M's shape, K = 4, 2048 tokens, float32: 201 MB).
    """

    def __init__(self, cfg, slots, length, device, dtype):
        shape = (cfg.n_layer, slots, cfg.n_iter, cfg.n_head, length, cfg.head_size)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def fill(self, slot, i, kvs):
        """Write a whole prompt's K/V, (1, nh, T, hs) a layer, as the slot's iteration i."""
        for l, (k, v) in enumerate(kvs):
            self.k[l, slot, i, :, :k.size(2)], self.v[l, slot, i, :, :v.size(2)] = k[0], v[0]

    def repeat(self, halted):
        """Tokens (slot, iteration, position) that halted after that iteration: later iterations see them as they were then."""
        slot, it, pos, to = torch.tensor([(b, i, p, j) for b, i, p in halted for j in range(i + 1, self.k.size(2))],
                                         device=self.k.device).view(-1, 4).unbind(1)
        if len(slot):
            for cache in (self.k, self.v):
                cache[:, slot, to, :, pos] = cache[:, slot, it, :, pos]


class Graphs:
    """CUDA graphs: a function of tensors whose shapes never change is recorded once for each key, then replayed in one launch."""

    def __init__(self):
        self.made = {}

    def __call__(self, key, fn, *args):
        if args[0].device.type != 'cuda':
            return fn(*args)
        if key not in self.made:
            fixed = [a.clone() for a in args]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the first run, outside the recording, lets the libraries allocate
                fn(*fixed)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = fn(*fixed)
            self.made[key] = graph, fixed, out
        graph, fixed, out = self.made[key]
        for f, a in zip(fixed, args):
            f.copy_(a)
        graph.replay()
        return out


class AdaPonderLM(nn.Module):
    CHUNK = 2 ** 24  # logits held at a time in training, numbers; at vocabulary 50304 this is 333 tokens

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.fused = None   # decoding: the backbone as torch.compile makes it, see compile_decoding()
        self.remat = False  # training: recompute each iteration's backbone in backward, memory of one instead of n_iter
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, cfg.n_embd), freeze=False)  # filled below
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.ln_ponder = Affine(cfg.n_embd) if cfg.ponder_norm and cfg.n_iter > 1 else nn.Identity()  # from ln_f's output to what is handed on
        self.unembed = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.gates = nn.ModuleList()
        self.init_weights()  # before the gates are there: of one seed, networks with and without them begin as the same
        if cfg.halting:
            self.gates.extend(Gate(cfg.n_embd, cfg.gate_hidden, 1) for _ in range(cfg.n_iter - 1))
            self.init_weights('gates.')

    @torch.no_grad()
    def init_weights(self, prefix=''):
        """PonderLM's initialisation: normal cut at 3 sigma, std sqrt(2 / 5d), a block's two outputs damped by sqrt(2 n_layer K).

        prefix: only the parameters whose names begin so (a string or several), as after loading a backbone that had no gates.
        """
        if self.embed.weight.is_meta:
            return  # nothing to fill, and for random numbers on this device torch imports its compiler: two seconds of every start
        std = math.sqrt(2 / (5 * self.cfg.n_embd))
        damp = math.sqrt(2 * self.cfg.n_layer * self.cfg.n_iter)
        for name, p in self.named_parameters():
            if not name.startswith(prefix):
                continue
            if p.dim() > 1:
                s = std / damp if name.startswith('blocks') and 'proj' in name else std
                nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s)
            else:
                p.fill_(0.0 if name.endswith('bias') else 1.0)
        for gate in self.gates:  # open, and equal for all tokens, until training says otherwise
            gate.proj.weight.zero_()
            gate.proj.bias.fill_(self.cfg.gate_bias)

    # one iteration, and what happens between two

    def backbone(self, x, rope, attend, kvs, at):
        """h = Backbone(E), final LayerNorm included. x: (..., d); kvs: one kv a layer (see the attention functions). Returns h, kvs."""
        new = []
        for block, kv in zip(self.blocks, kvs):
            x, kv = block(x, rope, attend, kv, at)
            new.append(kv)
        return self.ln_f(x), new

    def backbone_again(self, x, rope, kept, m):
        """The dense backbone as checkpoint() runs it: of earlier K/V it takes, and keeps until backward, those of halted tokens. kept: two (M, nh, hs) a layer."""
        kvs = [kv and tuple(t.new_zeros(*m.shape, *t.shape[1:]).masked_scatter(~m[..., None, None], t).transpose(1, 2) for t in kv) for kv in kept]
        return self.backbone(x, rope, dense_attention, kvs, m)

    def gate(self, i, h):
        """Gate i's values. h: (..., d) -> (...). One that predicts what its token will save only watches: h has no gradient from it."""
        return self.gates[i](h.detach() if self.cfg.objective == 'saving' else h)

    def step_size(self, s):
        """What scales the pondering embedding of tokens that go on: the gate, or 1 where the gate is a prediction."""
        return torch.ones_like(s) if self.cfg.objective == 'saving' else s

    def decide(self, i, h, row, pos, policy=None, tau=None, halting=None, s=None):
        """Gate i and the halting decision. h: (..., d) -> s (...) in (0, 1), on (...) bool: True = this token goes on to iteration i + 1.

        policy: fn(i, s, h, row, pos) -> on, default s >= tau; row, pos: int64 shaped like s, which token each is. s: the gate values, if they are known.
        """
        if s is None and self.gates and halting is not False:
            s = self.gate(i, h)
        elif s is None:
            s = torch.ones(h.shape[:-1], device=h.device, dtype=torch.promote_types(h.dtype, torch.float32))
        on = policy(i, s, h, row, pos) if policy else s >= (self.cfg.tau if tau is None else tau)
        return s, on

    def expect(self, logits):
        """The pondering embedding, e = softmax(logits) (sqrt(d) V), from logits of ln_ponder(h). logits: (N, vocab) -> (N, d)."""
        P, V = F.softmax(logits, dim=-1).to(self.embed.weight.dtype), self.embed.weight
        if self.in_parts(P):
            return torch.bmm(P.view(len(P), 64, -1).transpose(0, 1), V.view(64, -1, V.size(1))).sum(0) * self.cfg.embed_scale
        return P @ V * self.cfg.embed_scale

    def decode_logits(self, h):
        """h U^T of a decoding step. h: (N, d) -> (N, vocab)."""
        if len(h) > 8 and self.in_parts(h):
            U = self.unembed.weight.view(64, -1, h.size(1))
            return torch.bmm(h.expand(64, -1, -1), U.mT).transpose(0, 1).reshape(len(h), -1)
        return self.unembed(h)

    def in_parts(self, x):
        """Whether the product of few rows with a large vocabulary is better done as many small ones."""
        return few(x, 64) and self.cfg.vocab_size % 64 == 0 and self.cfg.vocab_size >= 8192

    def ponder(self, h):
        """What tokens with these hidden states hand on, without ever holding all logits. h: (N, d) -> e (N, d)."""
        h = self.ln_ponder(h)
        if self.cfg.feedback == 'hidden':
            return h
        if len(h) * self.cfg.vocab_size <= self.CHUNK // 8:
            return self.expect(self.unembed(h))
        block = 1024 if h.device.type == 'cpu' else max(1024, self.CHUNK // len(h))  # a CPU's cache wants few, a GPU many
        return ExpectedRow.apply(h, self.unembed.weight, self.embed.weight, block) * self.cfg.embed_scale

    @torch.no_grad()
    def early_nll(self, h, targets):
        """The NLL that tokens would have had if they had halted with h. h: (N, d), targets: (N,) or None -> (N,) nats, or None."""
        return None if targets is None else CrossEntropy.apply(h, self.unembed.weight, targets, self.chunk)[1]

    @property
    def chunk(self):
        """Tokens whose logits are held at a time."""
        return max(1, self.CHUNK // self.cfg.vocab_size)

    def embed_tokens(self, idx):
        return self.embed(idx) * self.cfg.embed_scale

    # the executions over whole sequences

    def dense(self, idx, policy, tau, max_iter, halting, explore=None, targets=None):
        """Every token runs every iteration; the mask decides what of it counts.

        Returns hidden (B, T, d), depth (B, T), and lists with an entry for each gate: its values and who met it (B, T), who went on after it
        (B, T), and, given targets, the NLL that those would have had if they had not (M,).
        """
        B, T = idx.shape
        fixed = policy is None and (halting is False or not self.gates)  # nobody can halt
        row, pos = torch.meshgrid(torch.arange(B, device=idx.device), torch.arange(T, device=idx.device), indexing='ij')
        E = self.embed_tokens(idx)  # (B, T, d)
        rope = rope_table(pos[0], self.cfg, E.dtype)
        m = torch.ones_like(idx, dtype=torch.bool)  # m^0 = 1
        depth, kvs, hidden = torch.zeros_like(idx), [None] * self.cfg.n_layer, None
        gates, live, early = [], [], []
        remat = self.remat and torch.is_grad_enabled()
        for i in range(max_iter):
            if remat:
                h, kvs = checkpoint(self.backbone_again, E, rope, kvs, m, use_reentrant=False)
            else:
                h, kvs = self.backbone(E, rope, dense_attention, kvs, m)
            hidden = h if i == 0 or fixed else torch.where(m[..., None], h, hidden)
            depth = depth + m
            if i == max_iter - 1:
                break
            s = checkpoint(self.gate, i, hidden, use_reentrant=False) if remat and self.gates and halting is not False else None
            s, on = self.decide(i, hidden, row, pos, policy, tau, halting, s)
            if explore is not None:
                on = on | explore
            on = m & on  # monotone: m^(i+1) = m^i * 1[s^i >= tau]
            gates.append((s, m))
            live.append(on)
            m = on
            if fixed:
                E = E + self.ponder(hidden.flatten(0, 1)).view_as(E)
                kvs = [None] * self.cfg.n_layer  # no K/V to keep
            else:  # E^(i+1) = E^i + m^(i+1) s^i e^i, computed where m^(i+1) = 1
                h = hidden[m]  # (M, d)
                e = self.ponder(h) * self.step_size(s[m])[:, None]
                E = E + torch.zeros_like(E).index_put((row[m], pos[m]), e.to(E.dtype))
                early.append(self.early_nll(h, targets if targets is None else targets[m]))
                if remat:
                    kvs = [tuple(t.transpose(1, 2)[~m] for t in kv) for kv in kvs]
        return hidden, depth, gates, live, early

    def packed(self, idx, policy, tau, max_iter, halting, explore=None, targets=None, store=None, first_row=0):
        """Only active tokens run. As dense(); store(i, kvs), if given, receives each iteration's K/V of all tokens."""
        B, T = idx.shape
        row, pos = (t.flatten() for t in torch.meshgrid(torch.arange(B, device=idx.device), torch.arange(T, device=idx.device), indexing='ij'))
        E = self.embed_tokens(idx).flatten(0, 1)  # (N, d), N = B * T
        rope = rope_table(pos, self.cfg, E.dtype)
        depth, kvs, hidden = torch.zeros_like(idx), [None] * self.cfg.n_layer, None
        counts, gates, live, early = [T] * B, [], [], []
        for i in range(max_iter):
            h, kvs = self.backbone(E, rope, packed_attention, kvs, (row, pos, counts))
            n = len(row)
            if store:
                store(i, kvs)
            hidden = h.view(B, T, -1) if i == 0 else hidden.index_put((row, pos), h[:n])
            depth = depth.index_put((row, pos), torch.tensor(i + 1, device=idx.device))
            if i == max_iter - 1:
                break
            s, on = self.decide(i, h[:n], row + first_row, pos, policy, tau, halting)
            if explore is not None:
                on = on | explore[row, pos]
            spread = torch.zeros(B, T, device=idx.device, dtype=s.dtype).index_put((row, pos), s)
            ran = torch.zeros_like(idx, dtype=torch.bool).index_put((row, pos), torch.ones_like(on))
            gates.append((spread, ran))
            live.append(torch.zeros_like(ran).index_put((row, pos), on))
            if not on.all():
                row, pos, s = row[on], pos[on], s[on]
                E, h, *rope = (fill(t[:n][on], round_up(len(row))) for t in (E, h, *rope))
                counts = torch.bincount(row, minlength=B).tolist()
                if not len(row):
                    break
            E = E + self.step_size(fill(s, len(E)))[:, None].to(E.dtype) * self.ponder(h).to(E.dtype)
            early.append(targets if targets is None else self.early_nll(h, fill(targets[row, pos], len(h)))[:len(row)])
        return hidden, depth, gates, live, early

    def forward(self, idx, targets=None, execution='dense', policy=None, tau=None, max_iter=None, halting=None, k=0.0, ponder_lambda=0.0, explore=None):
        """The whole model on sequences. Returns an Output.

        idx, targets: (B, T) int64, T <= block_size; a target of -1 is ignored.
        execution: 'dense' or 'packed', the same function computed two ways.
        policy, tau: the halting decision, see decide(). max_iter: stop after this many iterations.
        halting=False: ignore the gates in this call (s = 1, nobody halts), the objective of training's first stage.
        k: fraction of all gates in the ponder pool, where there is one; ponder_lambda: weight of the ponder loss.
        explore: (B, T) bool, tokens that go on whatever their gates say, so that these learn what halting costs (objective 'saving').
        Raises ValueError for a sequence longer than block_size or an unknown execution.
        """
        B, T = idx.shape
        max_iter = self.check_max_iter(max_iter)
        if not 1 <= T <= self.cfg.block_size:
            raise ValueError(f'a sequence of {T} tokens does not fit: this model takes 1 to block_size = {self.cfg.block_size}')
        if execution not in ('dense', 'packed'):
            raise ValueError(f"execution must be 'dense' or 'packed', not {execution!r}")
        savings = targets is not None and self.cfg.objective == 'saving' and self.gates and halting is not False and torch.is_grad_enabled()
        hidden, depth, gates, live, early = getattr(self, execution)(idx, policy, tau, max_iter, halting, explore, targets if savings else None)
        shown = torch.zeros(B, T, self.cfg.n_iter - 1, device=idx.device, dtype=gates[0][0].dtype if gates else hidden.dtype)
        for i, (s, m) in enumerate(gates):
            shown[..., i] = (s * m).detach()
        out = Output(hidden, depth, shown, self.unembed)
        if targets is not None:
            total, nll = CrossEntropy.apply(hidden.flatten(0, 1), self.unembed.weight, targets.flatten(), self.chunk)
            out.nll = nll.view(B, T)
            out.ce_loss = total / (targets != -1).sum()
            out.ponder_loss = self.saving_loss(gates, live, early, out.nll, depth, targets) if savings else self.ponder_loss(gates, live, k, execution)
            out.loss = out.ce_loss + ponder_lambda * out.ponder_loss
        return out

    def ponder_loss(self, gates, live, k, execution='dense'):
        """Mean of the smallest k fraction of the gate values, a scalar (arXiv 2603.01914).

        objective='paper' takes the values of every token and gate. objective='live' puts 0, which has no gradient, in place of those that led to a halt or came
        after one: a halted iteration is paid for, so pressure ends when the share k has halted, and never pushes tokens far under tau.
        """
        if not gates or self.cfg.objective == 'saving':
            return torch.zeros((), device=self.embed.weight.device)
        s = torch.stack([s for s, _ in gates]).flatten()
        if self.cfg.objective == 'live':
            s = torch.where(torch.stack(live).flatten(), s, 0.0)
        elif execution == 'packed' and torch.is_grad_enabled():
            raise ValueError("objective='paper' needs the gates of halted tokens, which only execution='dense' computes")
        n = torch.as_tensor(k, device=s.device, dtype=s.dtype) * len(s)  # a tensor, so that a changing k does not recompile
        weight = (n - torch.arange(len(s), device=s.device)).clamp(0, 1)  # the n smallest, the last one in part
        return (s.sort().values * weight).sum() / n.clamp(min=1)

    def saving_loss(self, gates, live, early, nll, depth, targets):
        """How far gates are from predicting what going on saved, a scalar.

        A token that went on after iteration i saved (NLL it would have had - NLL it has) / passes it made since, in nats a pass. Gate i's s is its
        prediction: cross entropy with this number as a soft target is least at the expectation, also where single savings are negative. These
        are cut at 1 nat a pass, so that a few surprises do not drown the rest.
        """
        loss = torch.zeros((), device=nll.device)
        for i, ((s, _), on, before) in enumerate(zip(gates, live, early)):
            saved = ((before - nll[on]) / (depth[on] - (i + 1))).clamp(-1, 1)
            g, counts = torch.logit(s[on], 1e-7), targets[on] != -1
            loss = loss + ((F.softplus(g) - saved * g) * counts).sum() / counts.sum().clamp(min=1)
        return loss

    def check_max_iter(self, max_iter):
        if max_iter is None:
            return self.cfg.n_iter
        if not 1 <= max_iter <= self.cfg.n_iter:
            raise ValueError(f'max_iter must be 1 to n_iter = {self.cfg.n_iter}, not {max_iter}')
        return max_iter

    # generation

    def prefill(self, tokens, seq, slot, cache, policy, tau, max_iter):
        """Run a prompt packed and fill its cache slot. tokens: list of int. Returns the last token's hidden (d,), depth, gates."""
        done = -1

        def store(i, kvs):
            nonlocal done, last
            cache.fill(slot, i, kvs)
            done, last = i, kvs
        last = None
        idx = torch.tensor([tokens], device=self.embed.weight.device)
        hidden, depth, gates, *_ = self.packed(idx, policy, tau, max_iter, None, store=store, first_row=seq)
        for i in range(done + 1, self.cfg.n_iter):  # everyone had halted: the later iterations see the same
            cache.fill(slot, i, last)
        d = int(depth[0, -1])
        return hidden[0, -1], d, [float(s[0, -1]) for s, m in gates[:d]]

    def compile_decoding(self):
        """Let torch.compile fuse the passes of decoding: faster, once the compiler is done, which takes tens of seconds. Returns the model."""
        self.fused = torch.compile(self.backbone)
        return self

    def static_shapes(self, device):
        """Whether decoding keeps its shapes fixed: for the compiler, and on a GPU, where a pass is one CUDA graph."""
        return device.type == 'cuda' or self.fused is not None

    def decode(self, E, slot, it, pos, where, cache, rope, graphs):
        """One pass for one token of each of N slots. E: (slots, d); slot, it, pos: (N,), and as the list `where`, see cached_attention().

        Returns h (N, d) and, where shapes are static, all gate values (N, n_gate), else None: decide() finds those that count.
        """
        static = self.static_shapes(E.device)
        one = where[0][1] if len({i for _, i, _ in where}) == 1 else None  # the iteration of all
        length = min(cache.k.size(4), -(-(max(p for _, _, p in where) + 1) // 256) * 256) if static else None

        def run(x, slot, it, pos):
            at = (slot, it if one is None else one, pos, None if static else where, length)
            h, _ = (self.fused or self.backbone)(x, tuple(t[pos] for t in rope), cached_attention, [*zip(cache.k, cache.v)], at)
            return h, torch.stack([g(h) for g in self.gates], dim=-1) if static and self.gates else None
        args = E[slot], slot, it, pos
        return graphs((length, one), run, *args) if static else run(*args)

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, tau=None, max_iter=None,
               policy=None, slots=1, stop_token=None):
        """Continue many prompts with a KV cache; yields one Step for each new token, as it is made.

        prompts: list of lists of token ids, of any lengths; max_new_tokens: an int, or one for each prompt.
        slots: sequences in flight. All iterations share their weights, so slots at different iterations of different tokens go through one
        pass: a slot whose token halted starts its next token in the very next pass, and a finished sequence's slot takes the next prompt.
        generator: a torch.Generator, or a list of one for each prompt; from a single one every prompt gets its own, so that the text of a
        prompt does not depend on what runs beside it. stop_token: ends a sequence (and is yielded).
        A sequence that outgrows block_size goes on with its last part, see window(). temperature=0 is greedy.
        """
        max_iter = self.check_max_iter(max_iter)
        self.check_prompts(prompts, temperature, top_k, top_p)
        budget = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        text = [list(p) for p in prompts]          # each sequence so far
        rngs = per_sequence(generator, len(prompts))
        device, dtype = self.embed.weight.device, self.embed.weight.dtype
        slots = min(slots, len(prompts))
        length = min(self.cfg.block_size, max((len(p) + n for p, n in zip(text, budget)), default=1))
        cache, graphs = KVCache(self.cfg, slots, length, device, dtype), Graphs()
        rope = rope_table(torch.arange(length, device=device), self.cfg, dtype)
        queue = deque(i for i, n in enumerate(budget) if n > 0)
        seq = [None] * slots                       # which prompt a slot works on
        start, pos, it = [0] * slots, [0] * slots, [0] * slots  # its window; position in it and iteration of the token in flight
        values = [[] for _ in range(slots)]        # gate values of that token
        E = torch.zeros(slots, self.cfg.n_embd, device=device, dtype=dtype)
        while True:
            ready = []  # (slot, logits, depth): tokens that are done, so their successor can be drawn
            for b in range(slots):
                if seq[b] is None and queue:
                    seq[b] = queue.popleft()
                    start[b] = self.window(len(text[seq[b]]))
                    h, d, values[b] = self.prefill(text[seq[b]][start[b]:], seq[b], b, cache, policy, tau, max_iter)
                    pos[b] = min(len(text[seq[b]]) - start[b], length - 1)
                    ready.append((b, self.unembed(h[None])[0], d))
            fresh = {b for b, _, _ in ready}
            busy = [b for b in range(slots) if seq[b] is not None and b not in fresh]
            if not busy and not ready:
                return
            if busy:  # one pass of the backbone for every slot, whatever its iteration
                where = [(b, it[b], pos[b]) for b in busy]
                if self.static_shapes(device):  # idle slots run along, and write where their next token will
                    where = [(b, it[b] if b in busy else where[0][1], pos[b]) for b in range(slots)]
                slot_t, it_t, pos_t = torch.tensor(where, device=device).unbind(1)
                h, gate = self.decode(E, slot_t, it_t, pos_t, where, cache, rope, graphs)
                on, s = [False] * len(where), [None] * len(where)
                for i in sorted({it[b] for b in busy if it[b] < max_iter - 1}):
                    at = [n for n, (b, _, _) in enumerate(where) if it[b] == i and b in busy]
                    rows = torch.tensor([seq[where[n][0]] for n in at], device=device)
                    si, oni = self.decide(i, h[at], rows, pos_t[at], policy, tau, s=gate[at, i] if gate is not None else None)
                    for n, sn, onn in zip(at, *torch.stack([si, oni]).tolist()):
                        on[n], s[n] = bool(onn), sn
                        values[where[n][0]].append(sn)
                go, halted = [n for n in range(len(where)) if on[n]], []
                if self.cfg.ponder_norm:
                    h[go] = self.ln_ponder(h[go])
                logits = self.decode_logits(h)  # needed by all: to ponder, or to draw the next token
                if go:
                    e = h[go] if self.cfg.feedback == 'hidden' else self.expect(logits[go])
                    E[slot_t[go]] += self.step_size(torch.tensor([s[n] for n in go], device=device, dtype=dtype))[:, None] * e
                for n, (b, i, p) in enumerate(where):
                    if on[n]:
                        it[b] += 1
                    elif b in busy:
                        halted.append((b, i, p))
                        ready.append((b, logits[n], i + 1))
                cache.repeat(halted)
            if not ready:
                continue
            logits = torch.stack([x for _, x, _ in ready])
            u = torch.tensor([torch.rand((), generator=rngs[seq[b]], dtype=torch.float64) for b, _, _ in ready], device=device)
            drawn = sample(logits, u, temperature, top_k, top_p)
            nll = F.cross_entropy(logits.float(), drawn, reduction='none').tolist()
            for (b, _, d), token, x in zip(ready, drawn.tolist(), nll):
                i = seq[b]
                yield Step(i, token, d, values[b], x)
                text[i].append(token)
                budget[i] -= 1
                values[b], it[b] = [], 0
                if budget[i] == 0 or token == stop_token:
                    seq[b] = None
                elif self.window(len(text[i])) != start[b]:  # outgrown: it comes in anew, as a prompt
                    queue.appendleft(i)
                    seq[b] = None
                else:
                    pos[b] = len(text[i]) - 1 - start[b]
                    E[b] = self.embed_tokens(torch.tensor(token, device=device))

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, tau=None, max_iter=None,
                 policy=None, execution='cached'):
        """Continue idx (B, T) by max_new_tokens each: (B, T + max_new_tokens). Arguments as stream().

        execution: 'cached', or 'dense' / 'packed', which run the whole sequence again for each token: the same text, slowly.
        """
        text = idx.tolist()
        if execution == 'cached':
            for step in self.stream(text, max_new_tokens, temperature, top_k, top_p, generator, tau, max_iter, policy, slots=len(text)):
                text[step.seq].append(step.token)
            return torch.tensor(text, device=idx.device)
        self.check_prompts(text, temperature, top_k, top_p)
        rngs = per_sequence(generator, len(text))
        for _ in range(max_new_tokens):
            out = self(idx[:, self.window(idx.size(1)):], execution=execution, policy=policy, tau=tau, max_iter=max_iter)
            u = torch.tensor([torch.rand((), generator=g, dtype=torch.float64) for g in rngs], device=idx.device)
            idx = torch.cat([idx, sample(self.unembed(out.hidden[:, -1]), u, temperature, top_k, top_p)[:, None]], dim=1)
        return idx

    def window(self, n):
        """Where the context of a sequence of n tokens starts: it moves on by half of block_size, so that the cache is rebuilt seldom."""
        step = max(1, self.cfg.block_size // 2)
        return max(0, math.ceil((n - self.cfg.block_size) / step)) * step

    def check_prompts(self, prompts, temperature, top_k, top_p):
        for p in prompts:
            if not len(p):
                raise ValueError('an empty prompt has nothing to continue: give at least one token')
            if not 0 <= min(p) <= max(p) < self.cfg.vocab_size:
                raise ValueError(f'a token id outside the vocabulary: ids go from 0 to {self.cfg.vocab_size - 1}')
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError('temperature must be >= 0, top_k at least 1, top_p in (0, 1]')

    # files

    @classmethod
    def from_checkpoint(cls, path, map_location='cpu'):
        """The model of a checkpoint that train.py wrote. Raises FileNotFoundError or ValueError with a sentence."""
        return cls.from_state(load_checkpoint(path, map_location))

    @classmethod
    def from_state(cls, state):
        """The model in what load_checkpoint() returned."""
        with torch.device('meta'):
            model = cls(config_from_state(state))
        model.load_state_dict(state['model'], assign=True)
        return model

    @classmethod
    def from_pretrained(cls, path, n_iter=None, dtype=torch.float32, **overrides):
        """A Hugging Face GPT-NeoX checkpoint: Pythia, PonderPythia, or what save_pretrained() wrote.

        path: a folder with config.json and weights (model.safetensors, pytorch_model.bin, or either in shards with an index), one weights
        file in such a folder, or a hub name. n_iter: default what the folder says, else 4. overrides: fields of AdaPonderConfig.
        Gates that the folder does not have start open, ln_ponder as ln_f. In memory are the model and, mapped from the disk, one shard.
        Raises FileNotFoundError or ValueError naming the tensor or setting that does not fit.
        """
        path = find_pretrained(path)
        folder = path if path.is_dir() else path.parent
        with torch.device('meta'):
            model = cls(config_from_hf(folder / 'config.json', n_iter, overrides)).to(dtype)
        model.to_empty(device='cpu').init_weights(OWN_TENSORS)
        params, seen = dict(model.named_parameters()), set()
        files = [(f, hf_to_ours) for f in weight_files(path, ('model.safetensors', 'pytorch_model.bin'))]
        if not files:
            raise FileNotFoundError(f'{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of their shards')
        if any(n.startswith(OWN_TENSORS) for n in params):
            parts = {n.split('.')[0] for n in params}
            files += [(f, lambda n: None if n.startswith(OWN_TENSORS) and n.split('.')[0] not in parts else n)  # gates that halting=False leaves out
                      for f in weight_files(folder, ('gates.safetensors', 'gates.bin'))]
        for file, rename in files:
            for name, tensor in read_tensors(file):
                ours = rename(name)
                if ours is None:
                    if name.endswith('adapter.weight'):
                        print(f'{file}: ignored {name}, which PonderLM keeps and does not use', file=sys.stderr)
                    continue
                if ours not in params:
                    raise ValueError(f'{file}: tensor {name} has no place in this model')
                if tensor.shape != params[ours].shape or not tensor.is_floating_point():
                    raise ValueError(f'{file}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, this model needs floats {tuple(params[ours].shape)}')
                params[ours].data.copy_(tensor)
                seen.add(ours)
        halves = {n.rsplit('.', 2)[0] for n in seen}  # of the gates; one that the folder does not have at all may be new
        missing = [n for n in params if n not in seen and (not n.startswith(OWN_TENSORS) or n.rsplit('.', 2)[0] in halves)]
        if missing:
            names = [n if n.startswith(OWN_TENSORS) else ours_to_hf(n) for n in missing]
            raise ValueError(f'{folder} lacks the tensor {", ".join(names[:3])}' + f' and {len(names) - 3} more' * (len(names) > 3))
        return model

    def save_pretrained(self, path):
        """Write a folder that transformers loads as GPTNeoXForCausalLM, with the gates (and ln_ponder) beside the weights in a file of their own.

        transformers runs one iteration and does not scale embeddings: it computes this model's function at n_iter=1, scale_embeds=False.
        Files are .safetensors where safetensors is installed, else .bin.
        """
        cfg, path, written = self.cfg, Path(path), []
        path.mkdir(parents=True, exist_ok=True)
        own = [f.name for f in fields(cfg) if f.name not in HF_CONFIG and f.name not in ('n_iter', 'scale_embeds')]
        config = dict(
            {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}, architectures=['GPTNeoXForCausalLM'], model_type='gpt_neox',
            intermediate_size=4 * cfg.n_embd, hidden_act='gelu', use_parallel_residual=True, tie_word_embeddings=False, attention_bias=True,
            bos_token_id=0, eos_token_id=0, torch_dtype=str(self.embed.weight.dtype).removeprefix('torch.'),
            ponderinglm=cfg.n_iter > 1, pondering_steps=cfg.n_iter - 1, scale_embeds=cfg.scale_embeds, adaponder={n: getattr(cfg, n) for n in own})
        try:
            from safetensors.torch import save_file as save
        except ImportError:
            save = torch.save

        def write(stem, tensors):
            written.append(stem + ('.bin' if save is torch.save else '.safetensors'))
            save({n: t.contiguous() for n, t in tensors}, str(path / written[-1]) + '.tmp', **({} if save is torch.save else {'metadata': {'format': 'pt'}}))
        state = self.state_dict().items()
        write('pytorch_model' if save is torch.save else 'model', [(ours_to_hf(n), t) for n, t in state if not n.startswith(OWN_TENSORS)])
        if beside := [(n, t) for n, t in state if n.startswith(OWN_TENSORS)]:
            write('gates', beside)
        written.append('config.json')
        (path / 'config.json.tmp').write_text(json.dumps(config, indent=2))
        for name in written:
            os.replace(path / (name + '.tmp'), path / name)
        for name in ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json', 'gates.safetensors', 'gates.bin'):
            if name not in written:  # what an earlier save left would be read in place of these
                (path / name).unlink(missing_ok=True)


# Hugging Face's names of our settings and tensors; the layouts are the same, fused QKV included

OWN_TENSORS = ('gates.', 'ln_ponder.')  # tensors that GPT-NeoX does not have
HF_CONFIG = dict(vocab_size='vocab_size', block_size='max_position_embeddings', n_layer='num_hidden_layers', n_head='num_attention_heads',
                 n_embd='hidden_size', rotary_pct='rotary_pct', rotary_base='rotary_emb_base', norm_eps='layer_norm_eps')
HF_NAMES = [('embed.', 'gpt_neox.embed_in.'), ('unembed.', 'embed_out.'), ('ln_f.', 'gpt_neox.final_layer_norm.'), ('blocks.', 'gpt_neox.layers.'),
            ('.ln_1.', '.input_layernorm.'), ('.ln_2.', '.post_attention_layernorm.'), ('.attn.qkv.', '.attention.query_key_value.'),
            ('.attn.proj.', '.attention.dense.'), ('.mlp.fc.', '.mlp.dense_h_to_4h.'), ('.mlp.proj.', '.mlp.dense_4h_to_h.'),
            ('unembed.', 'lm_head.')]  # the last as transformers 5 names embed_out in memory


def ours_to_hf(name):
    for ours, theirs in HF_NAMES:
        if name.startswith(ours) or (ours.startswith('.') and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


def hf_to_ours(name):
    """Our name of a Hugging Face tensor; None for those that hold nothing learned (rotary and mask buffers) or nothing we use."""
    if name.endswith(('.rotary_emb.inv_freq', '.attention.bias', '.attention.masked_bias')) or name.split('.')[-2:] == ['adapter', 'weight']:
        return None
    for ours, theirs in HF_NAMES:
        if name.startswith(theirs) or (theirs.startswith('.') and theirs in name):
            name = name.replace(theirs, ours, 1)
    return name


def read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{path} is not JSON: {e}') from None


def config_from_hf(path, n_iter=None, overrides={}):
    """AdaPonderConfig from a config.json. Refuses by name what this model cannot represent."""
    hf = read_json(path)
    if hf.get('model_type') != 'gpt_neox' and not (hf.get('ponderinglm') and 'neox' in hf.get('model_type', '')):
        raise ValueError(f'{path} has model_type {hf.get("model_type")!r}: only GPT-NeoX models (Pythia, PonderPythia) can be loaded')
    lacking = [k for k in HF_CONFIG.values() if k not in hf and k not in ('rotary_pct', 'rotary_emb_base', 'layer_norm_eps')]
    if lacking:
        raise ValueError(f'{path} lacks {", ".join(lacking)}')
    need = {'use_parallel_residual': True, 'hidden_act': 'gelu', 'tie_word_embeddings': False, 'attention_bias': True,
            'intermediate_size': 4 * hf['hidden_size'], 'quantization_config': None}
    for name, value in need.items():
        if hf.get(name, value) != value:
            raise ValueError(f'{path} has {name} = {hf[name]!r}, and this model can only be {value!r}')
    rope = hf.get('rope_parameters') or {}  # transformers 5; before, rope_scaling, rotary_pct and rotary_emb_base
    for scaling in (rope, hf.get('rope_scaling') or {}):
        if scaling.get('rope_type', scaling.get('type', 'default')) != 'default':
            raise ValueError(f'{path} has rope scaling {scaling}, which this model does not have')
    own = {ours: hf[theirs] for ours, theirs in HF_CONFIG.items() if theirs in hf}
    own.update({ours: rope[theirs] for ours, theirs in (('rotary_pct', 'partial_rotary_factor'), ('rotary_base', 'rope_theta')) if theirs in rope})
    if 'ponderinglm' in hf:
        own['n_iter'] = hf.get('pondering_steps', 0) + 1 if hf['ponderinglm'] else 1
    own['scale_embeds'] = bool(hf.get('scale_embeds', False))
    own.update(hf.get('adaponder', {}), **overrides)
    if n_iter is not None:
        own['n_iter'] = n_iter
    try:
        return AdaPonderConfig(**own)
    except TypeError as e:  # a field of a later version, or a typing error in overrides
        raise ValueError(f'{path}: {e}') from None


def find_pretrained(path):
    """A local folder or file as a Path; a hub name is downloaded when huggingface_hub is installed."""
    name, path = str(path), Path(path)
    if path.exists():
        if not ((path if path.is_dir() else path.parent) / 'config.json').is_file():
            raise FileNotFoundError(f'{path} has no config.json beside its weights: give a Hugging Face model folder')
        return path
    if path.is_absolute() or name.startswith('.') or name.count('/') != 1:
        raise FileNotFoundError(f'no folder {name}')
    by_hand = f'get the folder with "hf download {name} --local-dir DIR" and give DIR'
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f'no folder {name}; if it is a hub name, pip install huggingface_hub, or {by_hand}') from None
    try:
        small = ['config.json', 'tokenizer.json', 'gates.*']
        folder = Path(snapshot_download(name, allow_patterns=small + ['*.safetensors', '*.safetensors.index.json']))
        if not weight_files(folder, ('model.safetensors',)):  # many repositories have both: one is enough
            folder = Path(snapshot_download(name, allow_patterns=small + ['*.bin', '*.bin.index.json']))
    except Exception as e:  # of the network, of the hub, of the cache
        raise FileNotFoundError(f'no folder {name}, and the hub did not give it ({type(e).__name__}): {by_hand}') from None
    return folder


def weight_files(path, names):
    """The files that hold the weights under the first of `names` that is there: one, or the shards that its index lists."""
    if path.is_file() and path.suffix != '.json':
        return [path]
    for file in [path] if path.is_file() else [f for name in names for f in (path / name, path / (name + '.index.json'))]:
        if file.is_file():
            return [file] if file.suffix != '.json' else [file.parent / f for f in sorted(set(read_json(file)['weight_map'].values()))]
    return []


def read_tensors(file):
    """(name, tensor) pairs of a weights file, mapped from the disk one at a time."""
    if not file.is_file():
        raise FileNotFoundError(f'the shard {file} is missing')
    if file.suffix == '.safetensors':
        try:
            from safetensors import safe_open
        except ImportError:
            raise ValueError(f'{file} needs safetensors: pip install safetensors') from None
        try:
            f = safe_open(file, framework='pt')
        except Exception as e:  # the library has its own kind
            raise ValueError(f'{file} is not a readable safetensors file: {e}') from None
        with f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    else:
        try:
            state = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as e:  # torch raises many kinds, from zipfile's to pickle's
            raise ValueError(f'{file} is not a readable weights file ({type(e).__name__})') from None
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise ValueError(f'{file} is not a plain dict of tensors')
        yield from state.items()


def load_checkpoint(path, map_location='cpu'):
    """The dict in a checkpoint: 'config', 'model', 'meta' and train.py's state. Nothing is unpickled but tensors and plain types."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one with python train.py config/tiny.py')
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # torch raises many kinds, from zipfile's to pickle's
        raise ValueError(f'{path} is not a readable checkpoint of this project ({type(e).__name__})') from None
    if not isinstance(state, dict) or state.get('adaponder') != 1:
        raise ValueError(f'{path} is a checkpoint of another project')
    return state


def config_from_state(state, **changes):
    """AdaPonderConfig of what load_checkpoint() returned, with fields changed."""
    try:
        return AdaPonderConfig(**{**state['config'], **changes})
    except TypeError as e:
        raise ValueError(f'the checkpoint is of another version of this project: {e}') from None


def per_sequence(generator, n):
    """One random generator for each of n sequences: `generator` itself if it is a list, else seeded from it (None: from torch's own)."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != n:
            raise ValueError(f'{len(generator)} generators for {n} sequences')
        return list(generator)
    seeds = torch.randint(2 ** 62, (n,), generator=generator, device=generator.device if generator else 'cpu').tolist()
    return [torch.Generator().manual_seed(s) for s in seeds]


def sample(logits, u, temperature=1.0, top_k=None, top_p=None):
    """Draw a token for each row by inverting the distribution function at u. logits: (N, vocab), u: (N,) in [0, 1) -> (N,) int64.

    top_k keeps the k likeliest tokens; top_p (nucleus) the likeliest ones that together reach p. temperature 0: the likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        p, order = F.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        drop = torch.empty_like(p, dtype=torch.bool).scatter_(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    cdf = F.softmax(logits, dim=-1).cumsum(-1)
    return torch.searchsorted(cdf, (u.double() * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.size(-1) - 1)
