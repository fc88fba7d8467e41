"""
AdaPonderLM: a language model in which every token decides how many iterations through the network it needs.

Notable choices, in reading order:
- The backbone is GPT-NeoX (Pythia): attention and MLP in parallel, partial rotary, LayerNorm with bias.
- It runs n_iter times through the same weights. Between two iterations each token's input moves by its pondering
  embedding, the expected embedding of its next token (PonderLM, arXiv 2505.20674).
- After each iteration but the last a gate, a small MLP of that iteration, judges every token that is still active:
  where it falls under tau, the token halts for good (AdaPonderLM, arXiv 2603.01914).
- A halted token keeps its hidden state and its keys and values, so later iterations cannot change anything about it.
  Hence three executions compute one function: dense (training), packed (only active tokens run) and cached (decoding).
  All three are the one loop in iterate(); only the attention function that is handed to the blocks differs.
- n_iter=1 is vanilla Pythia, halting=False is fixed-depth PonderLM: the same code and weights.

This file needs torch alone (Hugging Face folders need transformers and safetensors too): copy it into your project.
"""
import json
import math
import os
import shutil
import tempfile
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class AdaPonderConfig:
    vocab_size: int = 50304        # rows of the embedding tables (pad to a multiple of 64)
    block_size: int = 2048         # longest context, tokens
    n_layer: int = 6               # blocks in one iteration
    n_head: int = 8                # attention heads a block
    n_embd: int = 512              # width d of the residual stream; the blocks' MLPs are 4 d wide
    n_iter: int = 4                # K, iterations through the backbone; 1 is vanilla Pythia
    halting: bool = True           # gates decide each token's depth; False is fixed-depth PonderLM
    tau: float = 1e-4              # a token halts when its gate falls under this; with 'saving' training moves it
    rotary_pct: float = 0.25       # share of each head's dimensions that rotate
    rotary_base: float = 10000.0   # sets the longest rotary wavelength, 2 pi times about this, in positions
    scale_embeds: bool = True      # multiply embeddings by sqrt(d), in E^0 and in P V alike
    multiply_pondering_steps: bool = False  # multiply E^0 by n_iter - 1 too, as PonderLM's 410M, 1B and 1.4B do
    norm_eps: float = 1e-5         # LayerNorm's epsilon
    gate_width: float = 4.0        # hidden width of a gate's MLP, in units of n_embd
    gate_bias: float = 4.0         # logit at which gates start: sigmoid(4) = 0.98, open
    objective: str = 'saving'      # gates learn to predict what going on saves ('saving'), or to close ('paper')
    feedback: str = 'embedding'    # what an iteration hands on: 'embedding' (PonderLM), 'hidden' (looped transformer)
    ponder_norm: bool = False      # give what is handed on a final LayerNorm of its own
    early_ce: float = 0.0          # weight of the cross entropy after each iteration but the last (arXiv 2607.20519)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise ValueError(f'{f.name} must be of type {f.type.__name__}, not {value!r}')
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'n_iter'):
            limit = 1024 if name in ('n_layer', 'n_iter') else 2 ** 31 - 1
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f'{name} must be from 1 to {limit}, not {getattr(self, name)}')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})')
        if not 1 <= self.gate_width * self.n_embd < 2 ** 31:
            raise ValueError(f'gate_width ({self.gate_width}) times n_embd must be at least 1, and finite')
        if not 0 <= self.tau < 1:
            raise ValueError(f'tau must be in [0, 1), not {self.tau}')
        if not 0 <= self.rotary_pct <= 1 or self.rotary_dims % 2:
            raise ValueError(f'rotary_pct ({self.rotary_pct}) of a head of {self.head_size} must be an even number')
        if not 0 < self.rotary_base < math.inf or not 0 < self.norm_eps < 1 or not math.isfinite(self.gate_bias):
            raise ValueError('rotary_base must be positive, norm_eps in (0, 1), gate_bias a number')
        if not 0 <= self.early_ce < math.inf:
            raise ValueError(f'early_ce must not be negative, and is {self.early_ce}')
        if self.objective not in ('saving', 'paper'):
            raise ValueError(f"objective must be 'saving' or 'paper', not {self.objective!r}")
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
        """Forward FLOPs of one token that attends to `context` keys, on average (T + 1) / 2 in a text of T tokens.

        Two for each multiply-add of a matrix product; norms, softmax and GELU are left out. 'linear' and 'attention'
        are paid once an iteration, 'gate' and 'ponder' after each iteration but the last, 'unembed' once a token.
        """
        d = self.n_embd
        return dict(
            linear=self.n_layer * 24 * d * d,          # QKV 6 d^2, output 2 d^2, MLP 16 d^2
            attention=self.n_layer * 4 * context * d,  # q K^T and P V
            gate=self.gate_hidden * 2 * (d + 1) if self.halting and self.n_iter > 1 else 0,
            ponder=4 * d * self.vocab_size if self.feedback == 'embedding' else 0,  # h U^T and P V
            unembed=2 * d * self.vocab_size)

    def inference_flops(self, depth, context, max_iter=None):
        """Forward FLOPs of a token that ran `depth` iterations (a number or tensor, 1 .. max_iter; default n_iter)."""
        f = self.flops(context)
        gates = depth - (depth == (max_iter or self.n_iter)) * 1  # the last iteration has no gate
        return depth * (f['linear'] + f['attention']) + gates * f['gate'] + (depth - 1) * f['ponder'] + f['unembed']


# -----------------------------------------------------------------------------
# One iteration: rotary positions, attention, blocks

def rope_table(pos, cfg, dtype):
    """cos and sin of the rotary angles at positions pos (T,): two tensors (T, 1, rotary_dims / 2).

    The angles are computed in float64, so that they are exact at any length, and on the CPU, since MPS has no float64.
    """
    freq = cfg.rotary_base ** (-torch.arange(0, cfg.rotary_dims, 2, dtype=torch.float64) / max(cfg.rotary_dims, 1))
    angle = (pos.cpu().double()[:, None] * freq)[:, None]
    return angle.cos().to(pos.device, dtype), angle.sin().to(pos.device, dtype)


def rotate(x, rope):
    """Rotate the first rotary_dims of each head as GPT-NeoX does: dimension j pairs with j + rotary_dims / 2."""
    cos, sin = (t.to(x.dtype) for t in rope)
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)  # x: (..., nh, hs)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


# The three attention functions: attend(q, k, v, kv, at) -> y, kv. q, k, v, y belong to the tokens that run. kv holds
# the keys and values of all tokens of this layer; the function puts those of the running tokens in their place. This is
# KV reuse: K^(i) <- where(m^i, K fresh, K^(i-1)). `at` says which tokens run: for dense a mask, for the others the
# iteration and the tokens' indices; None instead of a mask or indices: all of them.

def dense_attention(q, k, v, kv, at):
    """All tokens run; the mask at (B, T) keeps the K/V of halted ones. q, k, v: (B, T, nh, hs), kv: two of these."""
    if at is not None:
        k, v = (torch.where(at[..., None, None], new, old) for new, old in zip((k, v), kv))
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)  # (B, nh, T, hs)
    return y.transpose(1, 2), (k, v)


def packed_attention(q, k, v, kv, at):
    """The tokens with flat indices at[1] (N,) run, in rising order. q, k, v: (N, nh, hs), kv: two (B, T, nh, hs).

    On a GPU their queries are put at their places, for one causal kernel over whole sequences. On a CPU a masked kernel
    takes 128 of them at a time, against the keys up to the last of these, and so leaves halted ones out.
    """
    index = at[1]
    if index is None:  # the first iteration: q, k, v are (B, T, nh, hs)
        return dense_attention(q, k, v, None, None)
    shape = kv[0].shape
    k, v = (old.flatten(0, 1).index_copy(0, index, new.to(old.dtype)).view(shape) for old, new in zip(kv, (k, v)))
    q = q.to(k.dtype)
    if q.device.type != 'cpu':
        q = torch.zeros_like(k).flatten(0, 1).index_copy(0, index, q).view(shape)
        y, kv = dense_attention(q, k, v, None, None)
        return y.flatten(0, 1).index_select(0, index), kv

    y, counts = [], torch.bincount(index // shape[1], minlength=shape[0]).tolist()  # counts: of each sequence
    for K, V, its_q, its_pos in zip(k, v, q.split(counts), (index % shape[1]).split(counts)):
        for some_q, pos in zip(its_q.split(128), its_pos.split(128)):
            n = int(pos[-1]) + 1 if len(pos) else 0
            mask = pos[:, None] >= torch.arange(n)
            args = (t.transpose(0, 1)[None] for t in (some_q, K[:n], V[:n]))  # (1, nh, 128 or n, hs)
            y.append(F.scaled_dot_product_attention(*args, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(y), (k, v)


def cached_attention(q, k, v, kv, at):
    """One new token of each sequence, in iteration at[0]; the sequences at[1] (N,) run, or where it is None all.

    q, k, v: (N, nh, hs) or (B, 1, nh, hs). kv: the layer's cache (2, B, n_iter, nh, L, hs), written in place; the new
    token's place is the last of L.
    """
    i, row = at
    row = slice(None) if row is None else row
    for cache, new in zip(kv, (k, v)):  # into the later iterations too: that is what they see if the token halts here
        cache[..., -1, :][row, i:] = new.view(-1, 1, *new.shape[-2:]).to(cache.dtype)  # autocast: bfloat16 of float32
    y = F.scaled_dot_product_attention(q.view(-1, *q.shape[-2:])[:, :, None], kv[0][row, i], kv[1][row, i])
    return y.view_as(q), kv


def few_tokens(x, weight, parts):
    """Whether x (..., d) are the few tokens of a decoding step on a CPU, and a large weight that can be cut into parts.

    There a product is made in parts, because BLAS would give a matrix-vector product to one thread: it would take 2.5
    times as long, and one with the vocabulary up to 4 times.
    """
    few = x.device.type == 'cpu' and weight.numel() >= 2 ** 17 and 1 <= x.numel() // x.size(-1) <= parts
    return few and len(weight) % parts == 0 and not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')


class Linear(nn.Linear):
    parts = 8  # see few_tokens()

    def forward(self, x):
        if not few_tokens(x, self.weight, self.parts):
            return super().forward(x)
        x_t = x.flatten(0, -2).t()  # (d, tokens)
        y = torch.bmm(self.weight.unflatten(0, (self.parts, -1)), x_t.expand(self.parts, -1, -1))
        y = y.flatten(0, 1).t().unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd)  # rows in GPT-NeoX's order: for each head its q, k, v
        self.proj = Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, rope, attend, kv, at):
        q, k, v = self.qkv(x).unflatten(-1, (self.n_head, -1)).chunk(3, dim=-1)  # (..., nh, hs) each
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
    """One GPT-NeoX layer, for tokens in any arrangement: x (..., d). How they see each other is up to `attend`."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.n_embd, 4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x, rope, attend, kv, at):
        y, kv = self.attn(self.ln_1(x), rope, attend, kv, at)
        return x + (y + self.mlp(self.ln_2(x))), kv  # the small terms first: in bfloat16 the sum is rounded to x's size


class Gate(MLP):
    """s = sigmoid(MLP(h)): (..., d) -> (...), in (0, 1), at least float32."""

    def forward(self, h):
        g = super().forward(h).squeeze(-1)
        return torch.sigmoid(g.to(torch.promote_types(g.dtype, torch.float32)))


class Affine(nn.Module):
    """The scale and shift that a LayerNorm ends with; applied to another LayerNorm's output it makes a second one."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return x * self.weight + self.bias


class CrossEntropy(torch.autograd.Function):
    """-log softmax(h U^T)[target]: the sum over tokens, and each token's own. h: (N, d), U: (V, d), targets: (N,).

    Negative targets are ignored. The gradients are made in the forward pass, a chunk of tokens at a time, so that the
    logits of all tokens never exist and are computed once (recomputing them in backward takes 1.8 times as long).
    """

    @staticmethod
    def forward(ctx, h, U, targets, chunks):
        device = U.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else U.dtype
        u, nlls, dhs = U.to(dtype), [], []
        dU = torch.zeros_like(U) if ctx.needs_input_grad[1] else None
        for x, target in zip(h.to(dtype).chunk(chunks), targets.chunk(chunks)):
            counts = (target >= 0)[:, None]
            target = target.clamp(min=0)[:, None]
            p = (x @ u.t()).to(torch.promote_types(dtype, torch.float32))  # (n, V) logits, then changed in place
            logit, top = p.gather(-1, target), p.amax(-1, keepdim=True)
            z = p.sub_(top).exp_().sum(-1, keepdim=True)
            nlls.append(((z.log() + top - logit) * counts).squeeze(-1))
            if any(ctx.needs_input_grad):  # d nll / d logits = softmax - 1 at the target = p / z
                p = p.scatter_add_(-1, target, -z).to(dtype)
                dhs.append((p @ u) * (counts / z))
                if dU is not None:
                    x = (x * (counts / z)).to(dtype)
                    dU.addmm_(p.t(), x) if dtype == U.dtype else dU.add_(p.t() @ x)
            del p  # else it lives beside the next chunk's
        ctx.save_for_backward(torch.cat(dhs).to(h.dtype) if dhs else None, dU)
        nll = torch.cat(nlls)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx, g, _):
        return *(None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors), None, None


class Record(NamedTuple):
    """What happened after one iteration, for the N tokens that ran it."""
    index: torch.Tensor             # (N,) int64, which tokens these are: flat indices into (B, T)
    s: torch.Tensor                 # (N,) gate values, 1 without gates
    go_on: Optional[torch.Tensor]   # (M,) int64, which of the N go on to the next iteration; None: all
    h: torch.Tensor                 # (N, d) their states


@dataclass
class Output:
    hidden: torch.Tensor                        # (B, T, d) each token's last state, final LayerNorm included
    depth: torch.Tensor                         # (B, T) int64, iterations that ran, 1 .. n_iter
    records: list                               # a Record for each iteration but the last
    model: nn.Module
    nll: Optional[torch.Tensor] = None          # (B, T) nats, detached; 0 where the target is negative
    ce_loss: Optional[torch.Tensor] = None      # () mean of nll over the targets that count
    ponder_loss: Optional[torch.Tensor] = None  # () what the gates learn from, see saving_loss() and paper_loss()
    loss: Optional[torch.Tensor] = None         # () what to train on

    @property
    def logits(self):
        """(B, T, vocab), computed when asked for: training never holds them."""
        return self.model.unembed(self.hidden)

    @property
    def gates(self):
        """(B, T, n_iter - 1) gate values; 0 where a token had halted before, 1 in a network without gates."""
        values = self.hidden.new_zeros(self.model.cfg.n_iter - 1, self.depth.numel())
        for row, record in zip(values, self.records):
            row[record.index] = record.s.detach().to(row.dtype)
        return values.t().unflatten(0, self.depth.shape)


# -----------------------------------------------------------------------------
# The model

class AdaPonderLM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.remat = False         # True: recompute each iteration in backward, which holds one instead of n_iter
        self.tokenizer_files = []  # what save_pretrained() puts beside the weights
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd, _weight=torch.empty(cfg.vocab_size, cfg.n_embd))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.ln_ponder = Affine(cfg.n_embd) if cfg.ponder_norm and cfg.n_iter > 1 else nn.Identity()
        self.unembed = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.unembed.parts = 64
        self.gates = nn.ModuleList()
        self.init_weights()  # before the gates are there: networks of one seed begin alike, with and without them
        if cfg.halting:
            self.gates.extend(Gate(cfg.n_embd, cfg.gate_hidden, 1) for _ in range(cfg.n_iter - 1))
            self.init_weights('gates.')

    @torch.no_grad()
    def init_weights(self, prefix=''):
        """PonderLM's initialisation: normal cut at 3 sigma, std sqrt(2 / 5d), a block's outputs / sqrt(2 n_layer K).

        prefix: only the parameters whose names begin so, as after loading a backbone that had no gates.
        """
        if self.embed.weight.is_meta:
            return  # nothing to fill
        std = math.sqrt(2 / (5 * self.cfg.n_embd))
        for name, p in self.named_parameters():
            if not name.startswith(prefix):
                continue
            if p.dim() > 1:
                is_output = name.startswith('blocks') and 'proj' in name
                s = std / math.sqrt(2 * self.cfg.n_layer * self.cfg.n_iter) if is_output else std
                nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s)
            else:
                p.fill_(0.0 if name.endswith('bias') else 1.0)
        for gate in self.gates:  # open, and equal for all tokens, until training says otherwise
            gate.proj.weight.zero_()
            gate.proj.bias.fill_(self.cfg.gate_bias)

    def backbone(self, x, rope, attend, kvs, at):
        """h = Backbone(E), final LayerNorm included. x: (..., d), kvs: one a layer. Returns h (..., d), new kvs."""
        new = []
        for block, kv in zip(self.blocks, kvs):
            x, kv = block(x, rope, attend, kv, at)
            new.append(kv)
        return self.ln_f(x), new

    def embed_tokens(self, idx):
        """E^0. idx: (...) int64 -> (..., d)."""
        steps = max(1, self.cfg.n_iter - 1) if self.cfg.multiply_pondering_steps else 1
        return self.embed(idx) * (self.cfg.embed_scale * steps)

    def decide(self, i, h, row, pos, policy=None, tau=None, halting=True):
        """Gate i and the halting decision for N tokens. h: (N, d) -> s (N,) in (0, 1), on (N,) bool, True: goes on.

        policy: fn(i, s, h, row, pos) -> on (N,), instead of s >= tau; row, pos: (N,) int64, which tokens these are.
        With objective 'saving' a gate sends no gradient into the backbone.
        """
        if self.gates and halting:
            s = self.gates[i](h.detach() if self.cfg.objective == 'saving' else h)
        else:
            s = torch.ones(len(h), device=h.device)
        on = policy(i, s, h, row, pos) if policy else s >= (self.cfg.tau if tau is None else tau)
        if on.shape != s.shape:
            raise ValueError(f'the policy decided for {tuple(on.shape)} tokens, and was asked for {tuple(s.shape)}')
        return s, on

    def on_cpu(self, h):
        """Where h is. A method, so that bench.py plan can count what a GPU would hold on tensors without values."""
        return h.device.type == 'cpu'

    def expect(self, logits):
        """softmax(logits) V, the expected embedding of the next token; overwrites logits. (N, vocab) -> (N, d)."""
        p, V = logits.to(torch.promote_types(logits.dtype, torch.float32)), self.embed.weight
        p = p.sub_(p.detach().amax(-1, keepdim=True)).exp_()
        z, p = p.sum(-1, keepdim=True), p.to(V.dtype)
        if few_tokens(p, V, 64):
            return torch.bmm(p.unflatten(1, (64, -1)).transpose(0, 1), V.unflatten(0, (64, -1))).sum(0) / z
        return p @ V / z

    def chunks(self, h):
        """In how many parts h (N, d) meets the vocabulary: of 64 MB of float32 logits on a CPU, 1 GB on a GPU."""
        numbers = 2 ** 24 if self.on_cpu(h) else 2 ** 28
        return max(1, math.ceil(len(h) * self.cfg.vocab_size / numbers))

    def ponder(self, h):
        """What tokens with these states hand on: the pondering embedding. h: (N, d) -> e (N, d) (arXiv 2505.20674)."""
        h, chunks, learns = self.ln_ponder(h), self.chunks(h), torch.is_grad_enabled()
        if self.cfg.feedback == 'hidden':
            return h
        if chunks > 1 and self.on_cpu(h):
            # softmax(h U^T) V is attention of h over the vocabulary: torch's kernel takes 3/4 of the time in training
            U, V = (table.weight.to(h.dtype)[None, None] for table in (self.unembed, self.embed))
            return F.scaled_dot_product_attention(h[None, None], U, V, scale=1.0)[0, 0] * self.cfg.embed_scale

        def expected(x):
            return self.expect(self.unembed(x))
        if learns and len(h) * self.cfg.vocab_size > 2 ** 21:  # recompute the logits in backward, do not keep them
            parts = [checkpoint(expected, x, use_reentrant=False) for x in h.chunk(chunks)]
        else:
            parts = [expected(x) for x in h.chunk(chunks)]
        return torch.cat(parts) * self.cfg.embed_scale

    def iterate(self, idx, attend, kvs=None, policy=None, tau=None, max_iter=None, halting=True, start=0, cache=None):
        """The method. Runs tokens idx (B, T) at positions start .. through the iterations and returns an Output.

        attend, kvs: the attention function, and for cached_attention a cache a layer. cache: see new_cache(), is
        filled.
        """
        (B, T), K = idx.shape, max_iter or self.cfg.n_iter
        dense, remat = attend is dense_attention, self.remat and torch.is_grad_enabled()
        fixed = policy is None and not (self.gates and halting)  # no token can halt
        everyone = torch.arange(B * T, device=idx.device)
        E = self.embed_tokens(idx)  # (B, T, d)
        rope = rope_table(torch.arange(start, start + T, device=idx.device), self.cfg, E.dtype)
        kvs = kvs or [None] * self.cfg.n_layer
        active, m, records = None, None, []  # flat indices of the tokens that have not halted; None: all. m: as a mask
        depth = torch.zeros_like(everyone)

        for i in range(K):
            # dense runs halted tokens too and drops what comes of it; packed and cached run the active ones alone
            x, positions = E, rope
            if active is not None and not dense:
                x = E.flatten(0, 1).index_select(0, active)  # (N, d)
                positions = [t.index_select(0, active % T) for t in rope]
            at = m if dense else (i, active)
            args = x, positions, attend, kvs, at
            h, new_kvs = checkpoint(self.backbone, *args, use_reentrant=False) if remat else self.backbone(*args)
            if not fixed:  # where no token halts, nothing reads older keys and values: let them go
                kvs = new_kvs
            if cache is not None:
                self.fill_cache(cache, i, new_kvs)
            h = h.view(-1, h.size(-1))
            if active is None:
                hidden, depth = h, depth + 1
            else:  # a halted token's state stays as it was
                h = h.index_select(0, active) if dense else h
                hidden = hidden.index_copy(0, active, h)
                depth = depth.index_add(0, active, torch.ones_like(active))
            if i == K - 1:
                break

            # gates: m^(i+1) = m^i * 1[s^i >= tau], so a token that halted stays halted
            index = everyone if active is None else active
            if fixed:
                records.append(Record(index, torch.ones_like(h[:, 0]), None, h))
                E = E + self.ponder(h).view_as(E).to(E.dtype)
                continue
            s, on = self.decide(i, h, index // T, index % T + start, policy, tau, halting)
            go_on = on.nonzero()[:, 0]
            records.append(Record(index, s, go_on, h))
            if len(go_on) == 0:
                break
            active = index.index_select(0, go_on)
            m = torch.zeros_like(everyone, dtype=torch.bool).index_fill(0, active, True).view(B, T) if dense else None

            # E^(i+1) = E^i + m^(i+1) s^i e^i, computed for the tokens that go on
            e = self.ponder(h.index_select(0, go_on))
            if self.cfg.objective == 'paper':  # a gate that predicts what going on saves scales nothing
                e = e * s.index_select(0, go_on)[:, None]
            E = E.flatten(0, 1).index_add(0, active, e.to(E.dtype)).view_as(E)
        return Output(hidden.view(B, T, -1), depth.view(B, T), records, self)

    def forward(self, idx, targets=None, execution='dense', policy=None, tau=None, max_iter=None, halting=True, k=0.0,
                ponder_lambda=0.1):
        """The whole model on sequences. Returns an Output.

        idx, targets: (B, T) int64, T <= block_size; negative targets (-1, -100) are ignored.
        execution: 'dense' or 'packed', the same function computed in two ways.
        policy, tau: the halting decision, see decide(). max_iter: at most this many iterations.
        halting=False: ignore the gates in this call, as in the first stage of training with objective 'paper'.
        k, ponder_lambda: see paper_loss(), and the weight of the gates' loss. HaltingSchedule gives both, and a policy.
        Raises ValueError for a sequence that is too long and for an unknown execution.
        """
        if not idx.size(0) or not 1 <= idx.size(1) <= self.cfg.block_size:
            raise ValueError(f'tokens of shape {tuple(idx.shape)}: this model takes (B, 1 .. {self.cfg.block_size})')
        if execution not in ('dense', 'packed'):
            raise ValueError(f"execution must be 'dense' or 'packed', not {execution!r}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f'targets of shape {tuple(targets.shape)} for tokens of shape {tuple(idx.shape)}')
        self.check_halting(tau, max_iter)
        attend = dense_attention if execution == 'dense' else packed_attention
        out = self.iterate(idx, attend, policy=policy, tau=tau, max_iter=max_iter, halting=halting)
        if targets is not None:
            targets = targets.flatten()
            count = (targets >= 0).sum().clamp(min=1)
            total, nll = self.cross_entropy(out.hidden.flatten(0, 1), targets)
            out.nll, out.ce_loss, out.ponder_loss = nll.view_as(idx), total / count, torch.zeros_like(total)
            if self.gates and halting and self.cfg.objective == 'paper':
                out.ponder_loss = self.paper_loss(out, k)
            elif self.gates and halting and torch.is_grad_enabled():
                out.ponder_loss = self.saving_loss(out, nll, targets)
            out.loss = out.ce_loss + ponder_lambda * out.ponder_loss
            if self.cfg.early_ce:
                for record in out.records:
                    early = self.cross_entropy(record.h, targets[record.index])[0] / count
                    out.loss = out.loss + self.cfg.early_ce * early
        return out

    def cross_entropy(self, h, targets):
        """NLL in nats: its sum (), and that of each token (N,), detached. h: (N, d), targets: (N,)."""
        U = self.unembed.weight
        if not torch.is_grad_enabled():  # else CrossEntropy would make gradients in vain
            h, U = h.detach(), U.detach()
        return CrossEntropy.apply(h, U, targets, self.chunks(h))

    def paper_loss(self, out, k):
        """Mean of the smallest k fraction of all gate values, halted tokens' too, a scalar (arXiv 2603.01914).

        The lowest gates are pushed down; those of tokens that need the iteration push back through the cross entropy.
        """
        hidden, depth, values = out.hidden.flatten(0, 1), out.depth.flatten(), []
        for i, gate in enumerate(self.gates):
            values.append(gate(hidden[depth <= i]))  # a halted token's state is the one it halted with
            if i < len(out.records):  # else all tokens halted before this gate
                values.append(out.records[i].s)
        values = torch.cat(values)
        n = torch.as_tensor(k, device=values.device, dtype=values.dtype) * len(values)
        weight = (n - torch.arange(len(values), device=n.device)).clamp(0, 1)  # the n smallest, the last one in part
        return (values.sort().values * weight).sum() / n.clamp(min=1)

    def saving_loss(self, out, nll, targets):
        """How far the gates are from predicting what going on saved, a scalar.

        A token that went on after iteration i saved (NLL it would have had - NLL it has) / iterations it made since, in
        nats an iteration. Gate i's s is its prediction: cross entropy with this number as a soft target is least at the
        expectation, also where single savings are negative. They are cut at 1 nat, lest a few surprises drown the rest.
        """
        depth, loss = out.depth.flatten(), torch.zeros_like(out.ce_loss)
        for i, record in enumerate(out.records):
            index, s, h = (x.index_select(0, record.go_on) for x in (record.index, record.s, record.h))
            with torch.no_grad():
                early = self.cross_entropy(h, targets[index])[1] if len(index) else nll[:0]
            saved = ((early - nll[index]) / (depth[index] - (i + 1))).clamp(-1, 1)
            g, counts = torch.logit(s, 1e-7), targets[index] >= 0
            loss = loss + ((F.softplus(g) - saved * g) * counts).sum() / counts.sum().clamp(min=1)
        return loss

    def check_halting(self, tau, max_iter):
        """Raises ValueError for numbers outside their range."""
        if tau is not None and not 0 <= tau < 1:
            raise ValueError(f'tau must be in [0, 1), not {tau}')
        if max_iter is not None and not 1 <= max_iter <= self.cfg.n_iter:
            raise ValueError(f'max_iter must be 1 to n_iter = {self.cfg.n_iter}, not {max_iter}')

    # -------------------------------------------------------------------------
    # Generation with a KV cache

    def new_cache(self, slots, length):
        """Room for K and V of `slots` sequences: (2, n_layer, slots, n_iter, nh, length, hs).

        Iteration i of a new token attends to iteration i of all earlier ones, hence n_iter times a plain model's cache:
        2 n_layer n_iter d length numbers a slot (Pythia-70M's shape, K = 4, 2048 tokens, float32: 201 MB).
        """
        cfg, w = self.cfg, self.embed.weight
        return w.new_zeros(2, cfg.n_layer, slots, cfg.n_iter, cfg.n_head, length, cfg.head_size)

    def fill_cache(self, cache, i, kvs):
        """Put K and V of prompts, two (B, T, nh, hs) a layer, into iteration i and, lest they halt, the later ones."""
        for layer, kv in zip(cache.unbind(1), kvs):
            for part, x in zip(layer, kv):
                part[:, i:, :, :x.size(1)] = x.transpose(1, 2)[:, None]

    def prefill(self, idx, cache, **kw):
        """Run prompts idx (B, T) packed, and fill the cache of B slots. Keywords: policy, tau, max_iter. -> Output."""
        return self.iterate(idx, packed_attention, cache=cache, **kw)

    def decode(self, token, cache, pos, **kw):
        """Run one token of each sequence, token (B, 1), at position pos. -> Output with T = 1."""
        return self.iterate(token, cached_attention, kvs=cache[..., :pos + 1, :].unbind(1), start=pos, **kw)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, tau=None,
                 max_iter=None, policy=None):
        """Continue idx (B, T) by max_new_tokens each: (B, T + max_new_tokens). temperature=0 is greedy; see sample().

        tau, max_iter, policy: the halting decision, see decide(). A text that outgrows block_size goes on with its last
        part, see window(). Raises ValueError for an empty prompt, unknown tokens and numbers outside their range.
        """
        self.check_halting(tau, max_iter)
        check_sampling(temperature, top_k, top_p)
        if not idx.numel() or not 0 <= int(idx.min()) <= int(idx.max()) < self.cfg.vocab_size:
            raise ValueError(f'prompts must have at least one token, and tokens from 0 to {self.cfg.vocab_size - 1}')
        if max_new_tokens < 0:
            raise ValueError(f'max_new_tokens must be at least 0, not {max_new_tokens}')
        kw = dict(tau=tau, max_iter=max_iter, policy=policy)
        start = None  # where the context starts in idx
        for _ in range(max_new_tokens):
            if start != self.window(idx.size(1)):
                start = self.window(idx.size(1))
                cache = self.new_cache(len(idx), min(self.cfg.block_size, idx.size(1) - start + max_new_tokens))
                out = self.prefill(idx[:, start:], cache, **kw)
            else:
                out = self.decode(idx[:, -1:], cache, idx.size(1) - 1 - start, **kw)
            u = torch.rand(len(idx), generator=generator)
            token = sample(self.unembed(out.hidden[:, -1]), u, temperature, top_k, top_p)
            idx = torch.cat([idx, token[:, None]], dim=1)
        return idx

    def window(self, n):
        """Where the context of a text of n tokens starts: it moves on by half of block_size, so prefill is seldom."""
        step = max(1, self.cfg.block_size // 2)
        return max(0, math.ceil((n - self.cfg.block_size) / step)) * step

    # -------------------------------------------------------------------------
    # Files

    @classmethod
    def from_checkpoint(cls, path, map_location='cpu'):
        """The model in a ckpt.pt of train.py. Raises FileNotFoundError or ValueError with a sentence."""
        model = cls.from_state(load_checkpoint(path, map_location), path)
        model.tokenizer_files = [f for f in (Path(path).parent / name for name in TOKENIZER_FILES) if f.is_file()]
        return model

    @classmethod
    def from_state(cls, state, path='the checkpoint'):
        """The model in what load_checkpoint() returned."""
        try:
            with torch.device('meta'):
                model = cls(AdaPonderConfig(**state['config']))
            model.load_state_dict(state['model'], assign=True)
        except (TypeError, AttributeError, RuntimeError) as e:  # a field or tensor that this version does not have
            raise ValueError(f'{path} is of another version of this project ({first_line(e)})') from None
        dtype = model.embed.weight.dtype
        if not all(is_plain(t, dtype) for t in model.state_dict().values()):  # others would crash torch
            raise ValueError(f'{path} is damaged or of another version: not all its tensors are dense and of one type')
        return model

    @classmethod
    def from_pretrained(cls, path, n_iter=None, dtype=torch.float32, **overrides):
        """A GPT-NeoX model as Hugging Face keeps it: Pythia, PonderPythia, or what save_pretrained() wrote.

        path: a folder or a hub name, for transformers to read. n_iter: default what config.json says, else 4.
        overrides: fields of AdaPonderConfig. Gates that are not there start open. Raises ValueError naming what does
        not fit.
        """
        from safetensors.torch import load_file
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        from transformers.utils import cached_file
        if Path(path).expanduser().is_dir():
            path = Path(path).expanduser()
        try:
            file = cached_file(str(path), 'config.json')
            if file is None:
                raise ValueError('it has no config.json')
            hf = json.loads(Path(file).read_text(encoding='utf-8'))
            cfg = config_from_hf(hf, n_iter, overrides)
            pretrained, info = GPTNeoXForCausalLM.from_pretrained(
                path, config=GPTNeoXConfig(**hf), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
            optional = {name: cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
                        for name in ('gates.safetensors', *TOKENIZER_FILES)}
            gates = optional.pop('gates.safetensors')
            own = load_file(gates) if gates else {}
        except Exception as e:  # of the network, of the hub, of torch, of safetensors: each has its own
            raise ValueError(f'{path} cannot be loaded as a GPT-NeoX model ({first_line(e)})') from None
        state = {hf_to_ours(n): t for n, t in pretrained.state_dict().items()}
        with torch.device('meta'):
            model = cls(cfg).to(dtype)
        model.to_empty(device='cpu').init_weights(OWN_TENSORS)
        expected = model.state_dict()
        state |= {n: t.to(dtype) for n, t in own.items()}
        needless = OWN_TENSORS if cfg.n_iter == 1 else 'gates.'  # gates beyond n_iter, or with halting=False all
        state = {n: t for n, t in state.items() if n in expected or not n.startswith(needless)}
        modules = {n.rsplit('.', 2)[0] for n in state}
        wrong = [n for n in info['unexpected_keys'] if 'adapter.weight' not in n]  # PonderLM has one, unused
        wrong += [*info['missing_keys'], *info['mismatched_keys']]
        wrong += [n for n, t in state.items() if n not in expected or t.shape != expected[n].shape]
        wrong += [n for n in expected if n not in state and n.rsplit('.', 2)[0] in modules]  # a gate is whole or absent
        if wrong:
            raise ValueError(f'{path} does not fit this model: see its tensors {", ".join(map(str, wrong[:3]))}')
        model.load_state_dict(state, strict=False, assign=True)
        model.tokenizer_files = [Path(file) for file in optional.values() if file]
        return model

    def save_pretrained(self, path):
        """Write a folder that from_pretrained() reads back whole, and that transformers loads as GPTNeoXForCausalLM.

        Gates and ln_ponder lie in gates.safetensors beside the weights, with the tokenizer that the model came with.
        transformers runs one iteration and does not scale embeddings: this model at n_iter=1, scale_embeds=False.
        """
        from safetensors.torch import save_file
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        cfg, path, state = self.cfg, Path(path).expanduser(), self.state_dict()
        rope = dict(rope_type='default', rope_theta=cfg.rotary_base, partial_rotary_factor=cfg.rotary_pct)
        with torch.device('meta'):
            hf = GPTNeoXForCausalLM(GPTNeoXConfig(
                **{theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}, intermediate_size=4 * cfg.n_embd,
                rope_parameters=rope, rotary_pct=cfg.rotary_pct, rotary_emb_base=cfg.rotary_base, hidden_act='gelu',
                use_parallel_residual=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
                dtype=self.embed.weight.dtype, ponderinglm=cfg.n_iter > 1, pondering_steps=cfg.n_iter - 1,
                scale_embeds=cfg.scale_embeds, mutiply_pondering_steps=cfg.multiply_pondering_steps,
                adaponder=asdict(cfg)))
        hf.load_state_dict({n: state[hf_to_ours(n)] for n in hf.state_dict()}, assign=True)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path) as beside:  # written beside, then moved: a failure changes nothing
            hf.save_pretrained(beside)
            own = {n: t.contiguous() for n, t in state.items() if n.startswith(OWN_TENSORS)}
            if own:
                save_file(own, f'{beside}/gates.safetensors')
            for file in self.tokenizer_files:
                shutil.copyfile(file, f'{beside}/{file.name}')
            for pattern in WEIGHT_FILES:
                for old in path.glob(pattern):  # an earlier save's would be read in place of these
                    old.unlink()
            for file in Path(beside).iterdir():
                os.replace(file, path / file.name)


# Hugging Face's names of our settings and tensors; the layouts are the same, fused QKV included
OWN_TENSORS = ('gates.', 'ln_ponder.')  # tensors that GPT-NeoX does not have
WEIGHT_FILES = ('gates.safetensors', 'model.safetensors*', 'model-?????-of-?????.safetensors', 'pytorch_model.bin*',
                'pytorch_model-?????-of-?????.bin')
TOKENIZER_FILES = ('meta.json', 'tokenizer.json', 'tokenizer.tiktoken')
HF_CONFIG = dict(vocab_size='vocab_size', block_size='max_position_embeddings', n_layer='num_hidden_layers',
                 n_head='num_attention_heads', n_embd='hidden_size', norm_eps='layer_norm_eps')
HF_NAMES = {
    'gpt_neox.embed_in.': 'embed.', 'gpt_neox.layers.': 'blocks.', 'gpt_neox.final_layer_norm.': 'ln_f.',
    'embed_out.': 'unembed.', 'lm_head.': 'unembed.',
    '.input_layernorm.': '.ln_1.', '.post_attention_layernorm.': '.ln_2.',
    '.attention.query_key_value.': '.attn.qkv.', '.attention.dense.': '.attn.proj.',
    '.mlp.dense_h_to_4h.': '.mlp.fc.', '.mlp.dense_4h_to_h.': '.mlp.proj.'}


def hf_to_ours(name):
    """Our name of a Hugging Face tensor."""
    for theirs, ours in HF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def config_from_hf(hf, n_iter=None, overrides={}):
    """AdaPonderConfig from the dict in a config.json. Raises ValueError naming what this model cannot represent."""
    lacking = [name for name in ('model_type', *HF_CONFIG.values()) if name not in hf and name != 'layer_norm_eps']
    if lacking:
        raise ValueError(f'config.json lacks {", ".join(lacking)}')
    need = dict(use_parallel_residual=True, hidden_act='gelu', tie_word_embeddings=False, attention_bias=True,
                intermediate_size=4 * hf['hidden_size'], quantization_config=None)
    if 'neox' not in hf['model_type']:
        need['model_type'] = 'gpt_neox'
    for name, value in need.items():
        if hf.get(name, value) != value:
            raise ValueError(f'config.json has {name} = {hf[name]!r}, and this model can only be {value!r}')
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}  # as transformers 5 has it, and as 4 has it
    if rope.get('rope_type', rope.get('type', 'default')) != 'default':
        raise ValueError(f'config.json has rope scaling {rope}, which this model does not have')
    own = {ours: hf[theirs] for ours, theirs in HF_CONFIG.items() if theirs in hf}
    own['rotary_pct'] = rope.get('partial_rotary_factor', hf.get('rotary_pct', 0.25))
    own['rotary_base'] = rope.get('rope_theta', hf.get('rotary_emb_base', 10000))
    if 'ponderinglm' in hf:  # PonderLM's keys
        own['n_iter'] = hf.get('pondering_steps', 0) + 1 if hf['ponderinglm'] else 1
    own['scale_embeds'] = bool(hf.get('scale_embeds', False))
    own['multiply_pondering_steps'] = bool(hf.get('mutiply_pondering_steps', False))  # their spelling
    own.update(hf.get('adaponder', {}), **overrides)
    if n_iter is not None:
        own['n_iter'] = n_iter
    return AdaPonderConfig(**own)


def first_line(error):
    """An exception in one line: libraries like to add advice of many."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_plain(tensor, dtype):
    """Whether a tensor is dense, with its numbers in order, and of this floating-point dtype."""
    is_dense = tensor.layout is torch.strided and tensor.is_contiguous()
    return is_dense and tensor.dtype == dtype and dtype.is_floating_point


def load_checkpoint(path, map_location='cpu'):
    """The dict in a checkpoint of train.py. Nothing is unpickled but tensors and plain types."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one with python train.py config/tiny.py')
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch writes checksums and does not read them
                raise ValueError(f'the checksum of {damaged} is wrong')
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # torch raises many kinds, from zipfile's to pickle's
        raise ValueError(f'{path} is not a readable checkpoint ({first_line(e)})') from None
    if not isinstance(state, dict) or not {'adaponder', 'config', 'model'} <= state.keys():
        raise ValueError(f'{path} is a checkpoint of another project')
    return state


# -----------------------------------------------------------------------------
# Sampling

def check_sampling(temperature, top_k=None, top_p=None):
    """Raises ValueError for numbers that sample() does not take."""
    wrong_k, wrong_p = top_k is not None and top_k < 1, top_p is not None and not 0 < top_p <= 1
    if not 0 <= temperature < math.inf or wrong_k or wrong_p:
        raise ValueError('temperature must be >= 0, top_k at least 1, top_p in (0, 1]')


def sample(logits, u, temperature=1.0, top_k=None, top_p=None):
    """Draw a token a row by inverting the distribution function at u in [0, 1). logits: (N, vocab), u: (N,) -> (N,).

    top_k keeps the k likeliest tokens, top_p (nucleus) the likeliest that together reach p; temperature 0 takes the
    likeliest. Raises ValueError where logits are not finite.
    """
    if not torch.isfinite(logits.float().sum()):  # one NaN or infinity makes the sum one
        raise ValueError('the logits are not finite: the model diverged in training, or its weights are damaged')
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # the largest logit becomes 0, so no temperature overflows; a float32 holds none below 1e-38
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        p, order = F.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        drop = torch.empty_like(p, dtype=torch.bool).scatter_(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    cdf = F.softmax(logits, dim=-1).cumsum(-1)
    u = u.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.size(-1) - 1)


# -----------------------------------------------------------------------------
# Training with gates

def hash_uniform(row, pos, salt=0):
    """A number in [0, 1) for each token that looks random and depends on (row, pos, salt) alone. row, pos: int64."""
    x = (row * 0x9E3779B1 + pos * 0x85EBCA77 + (salt + 1) * 0xC2B2AE3D % 2 ** 32) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the integer hash lowbias32
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) >> 8).float() / 2 ** 24


class HaltingSchedule:
    """When the gates of a model begin to act in training, and how much they halt. Called twice in a training step:

        out = model(x, y, **schedule.at(step))
        ...
        schedule.update(step, out.depth)

    Until step `start` no token halts; from there to step `full` the halting rises to its final amount.
    objective 'saving': k_max is the share of the iterations 2 .. n_iter that shall not run. update() moves tau, the
    least saving in nats for which a token goes on, until this share is met. Gates learn from tokens that go on, so some
    are forced to run all iterations: all tokens until start, a share `explore` at full, none at the end, because
    inference will not see the keys and values that they leave in later iterations.
    objective 'paper': k_max is the fraction of the gate values in paper_loss(), and no token is forced.
    gates_alone: the loop trains the gates alone, with the backbone frozen, for that many steps from start on.
    """

    def __init__(self, cfg, max_steps, start=None, full=None, k_max=0.15, ponder_lambda=0.1, explore=0.1,
                 gates_alone=0, seed=0):
        self.cfg, self.max_steps, self.k_max, self.explore, self.seed = cfg, max_steps, k_max, explore, seed
        self.ponder_lambda = ponder_lambda
        self.start = max_steps // 10 if start is None else start
        self.full = max_steps // 4 if full is None else full
        # gates that predict savings learn to do so before they act
        self.acting = self.start + (gates_alone if cfg.objective == 'saving' else 0)

    def ramp(self, step):
        """From 0, when gates begin to act, to 1."""
        return min(1.0, max(0.0, (step - self.acting) / max(1, self.full - self.acting)))

    def k(self, step):
        """The share that shall halt. With 'saving' it rises ever more slowly: a tau that is still rising overshoots."""
        ramp = self.ramp(step)
        return self.k_max * (ramp if self.cfg.objective == 'paper' else ramp * (2 - ramp))

    def forced(self, step, row, pos, micro=0):
        """Which tokens run all iterations whatever their gates say, bool like row. micro: number of the micro-batch."""
        if self.cfg.objective == 'paper':
            return torch.zeros_like(row, dtype=torch.bool)
        fade = min(1.0, (self.max_steps - step) / max(1, self.max_steps - self.full))
        share = 1 - (1 - self.explore * fade) * self.ramp(step)
        salt = hash((self.seed, step, micro))  # of integers: the same in all processes
        return hash_uniform(row, pos, salt) < share

    def at(self, step, micro=0):
        """Keyword arguments for the model's forward at this step."""
        if not self.cfg.halting or self.cfg.n_iter == 1:
            return {}
        if self.cfg.objective == 'paper':
            return dict(halting=step >= self.start, k=self.k(step), ponder_lambda=self.ponder_lambda)

        def policy(i, s, h, row, pos):
            return (s >= self.cfg.tau) | self.forced(step, row, pos, micro)
        return dict(policy=policy, ponder_lambda=self.ponder_lambda)

    def halted(self, step, depth, micro=0):
        """The share of the iterations 2 .. n_iter that tokens which could halt did not run. depth: (B, T) -> ()."""
        row, pos = torch.meshgrid(*(torch.arange(n, device=depth.device) for n in depth.shape), indexing='ij')
        free = ~self.forced(step, row, pos, micro)
        return ((self.cfg.n_iter - depth) * free).sum() / free.sum().clamp(min=1) / max(1, self.cfg.n_iter - 1)

    def update(self, step, depth=None, halted=None):
        """After a step, move tau. depth: (B, T); or `halted`, what halted() gave, averaged over micro-batches."""
        if self.cfg.objective == 'saving' and step >= self.acting:
            halted = float(self.halted(step, depth) if halted is None else halted)
            self.cfg.tau = min(0.999, max(1e-6, self.cfg.tau * math.exp(self.k(step) - halted)))
