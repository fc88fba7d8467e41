"""
Every claim of this project, held against an independent computation. Run: python -m pytest -q test_model.py

Tests that compare with transformers or tokenizers, or want the files in ../shared, skip with a reason where these are absent.
"""
import ast
import base64
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import types
import urllib.error
import zipfile
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as model_py
import prepare_data
import sample as sample_py
import train
from model import AdaPonderConfig, AdaPonderLM, load_checkpoint, sample
from prepare_data import EOT
from sample import CONTROL

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared'
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


# model.py against a naive reference: one token at a time, in float64, without torch's attention, masks or caches

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()


def tiny(dtype=torch.float64, open_gates=False, seed=0, device='cpu', **kw):
    """A small model whose gates really halt: about a third of the tokens at each gate."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, block_size=32, n_layer=2, n_head=4, n_embd=32, rotary_pct=0.5)
    cfg = AdaPonderConfig(**{**shape, **kw})
    model = AdaPonderLM(cfg).double()
    for name, p in model.named_parameters():  # away from the zeros and ones of the initialisation
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0 if 'ln' in name and 'weight' in name else 0.0, std=0.1)
    for gate in model.gates:
        torch.nn.init.normal_(gate.proj.weight, std=2.0)

    def shift(i, s, h, row, pos):  # puts the lower third of this gate's values under tau
        if model.gates and not open_gates:
            g = model_py.MLP.forward(model.gates[i], h)
            model.gates[i].proj.bias.data += math.log(cfg.tau / (1 - cfg.tau)) - g.quantile(0.33)
        return torch.ones_like(s, dtype=torch.bool)
    with torch.no_grad():
        model(torch.randint(cfg.vocab_size, (8, cfg.block_size)), policy=shift)
    return model.to(device, dtype)


def random_tokens(*shape, seed=0, device='cpu', vocab=61):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_policy(rate, seed=0):
    """A halting policy that depends on (iteration, row, position) alone, so that every execution meets the same one."""
    def policy(i, s, h, row, pos):
        x = (row * 7919 + pos * 104729 + i * 1299709 + seed * 15485863) % 1009
        return x >= rate * 1009
    return policy


def naive(model, tokens, policy=None):
    """One sequence. policy: fn(i, t) -> goes on. Returns logits (T, vocab), depth (T,), gates (T, K - 1) with 0 once a
    token has halted, and the pool of the paper's loss: gates with a halted token's later ones on its last state."""
    cfg, w = model.cfg, {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    T, d, nh, K = len(tokens), cfg.n_embd, cfg.n_head, cfg.n_iter
    hs = d // nh
    rot = int(hs * cfg.rotary_pct)
    scale = math.sqrt(d) if cfg.scale_embeds else 1.0

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + cfg.norm_eps) * w[name + '.weight'] + w[name + '.bias']

    def gelu(x):
        return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])

    def mlp(x, name):
        hidden = gelu(w[name + '.fc.weight'] @ x + w[name + '.fc.bias'])
        return w[name + '.proj.weight'] @ hidden + w[name + '.proj.bias']

    def rope(x, t):
        y = x.copy()
        for j in range(rot // 2):
            a = t * cfg.rotary_base ** (-2 * j / rot)
            y[j] = x[j] * math.cos(a) - x[j + rot // 2] * math.sin(a)
            y[j + rot // 2] = x[j + rot // 2] * math.cos(a) + x[j] * math.sin(a)
        return y

    def gate(i, h):
        return 1 / (1 + math.exp(-mlp(h, f'gates.{i}')[0])) if model.gates else 1.0

    def ponder(h):
        if cfg.ponder_norm:
            h = h * w['ln_ponder.weight'] + w['ln_ponder.bias']
        if cfg.feedback == 'hidden':
            return h
        logits = w['unembed.weight'] @ h
        p = np.exp(logits - logits.max())
        return (p / p.sum()) @ w['embed.weight'] * scale

    E = [w['embed.weight'][t] * scale * (K - 1 if cfg.multiply_pondering_steps and K > 1 else 1) for t in tokens]
    alive, depth, h = [True] * T, np.zeros(T, int), np.zeros((T, d))
    gates = np.zeros((T, K - 1))
    keys, values = {}, {}  # (layer, token, head): overwritten by each iteration that the token runs
    for i in range(K):
        x = {t: E[t] for t in range(T) if alive[t]}
        for l in range(cfg.n_layer):
            block, q = f'blocks.{l}', {}
            for t in x:
                qkv = w[block + '.attn.qkv.weight'] @ norm(x[t], block + '.ln_1') + w[block + '.attn.qkv.bias']
                for j in range(nh):
                    a, b, c = np.split(qkv[j * 3 * hs:(j + 1) * 3 * hs], 3)
                    q[t, j], keys[l, t, j], values[l, t, j] = rope(a, t), rope(b, t), c
            for t in x:
                y = []
                for j in range(nh):
                    scores = np.array([q[t, j] @ keys[l, u, j] / math.sqrt(hs) for u in range(t + 1)])
                    p = np.exp(scores - scores.max())
                    y.append(sum(p[u] / p.sum() * values[l, u, j] for u in range(t + 1)))
                attention = w[block + '.attn.proj.weight'] @ np.concatenate(y) + w[block + '.attn.proj.bias']
                x[t] = x[t] + attention + mlp(norm(x[t], block + '.ln_2'), block + '.mlp')
        for t in x:
            h[t], depth[t] = norm(x[t], 'ln_f'), i + 1
            if i < K - 1:
                s = gates[t, i] = gate(i, h[t])
                alive[t] = policy(i, t) if policy else s >= cfg.tau
                if alive[t]:
                    E[t] = E[t] + (s if cfg.objective == 'paper' else 1.0) * ponder(h[t])
    pool = [[gates[t, i] if i < depth[t] else gate(i, h[t]) for i in range(K - 1)] for t in range(T)]
    return h @ w['unembed.weight'].T, depth, gates, np.array(pool)


@torch.no_grad()
def cached(model, tokens, n, **kw):
    """tokens (B, T) by cached decoding: the first n prefilled, the others one by one. Like an Output."""
    cache = model.new_cache(*tokens.shape)
    outs = [model.prefill(tokens[:, :n], cache, **kw)]
    outs += [model.decode(tokens[:, t:t + 1], cache, t, **kw) for t in range(n, tokens.size(1))]
    return SimpleNamespace(**{name: torch.cat([getattr(out, name) for out in outs], dim=1)
                              for name in ('logits', 'depth', 'gates')})


PAPER, SAVING = dict(objective='paper'), dict(objective='saving', tau=0.3)


@pytest.mark.parametrize('kw', [
    SAVING, PAPER, dict(n_iter=1), dict(halting=False), dict(scale_embeds=False, rotary_pct=0.25, n_iter=3),
    dict(feedback='hidden'), dict(ponder_norm=True, **PAPER), dict(ponder_norm=True, feedback='hidden', **SAVING),
    dict(ponder_norm=True, halting=False), dict(multiply_pondering_steps=True), dict(rotary_pct=0.0, gate_width=0.3),
    dict(multiply_pondering_steps=True, halting=False, n_iter=3), dict(multiply_pondering_steps=True, n_iter=1)])
def test_three_executions_equal_the_naive_reference(kw):
    m = tiny(**kw)
    tokens = random_tokens(2, 14, seed=5)
    outs = [m(tokens), m(tokens, execution='packed'), cached(m, tokens, 5)]
    for b in range(2):
        logits, depth, gates, _ = naive(m, tokens[b].tolist())
        assert len(set(depth)) > 1 or not m.gates  # the test means something only where some halt and some do not
        for out in outs:
            assert out.depth[b].tolist() == depth.tolist()
            assert np.abs(out.logits[b].detach().numpy() - logits).max() < 1e-10
            assert np.abs(out.gates[b].numpy() - gates).max(initial=0) < 1e-12


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('precision', ['float64', 'float32', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('kw', [PAPER, dict(ponder_norm=True, **SAVING), dict(halting=False)])
@torch.no_grad()
def test_dense_packed_cached_agree_under_random_policies(kw, precision, device):
    torch.set_float32_matmul_precision('highest')  # no TF32
    autocast = precision == 'autocast'
    bound = dict(float64=1e-10, float32=1e-4 if device == 'cpu' else 1e-3).get(precision, 0.1)
    m = tiny(torch.float32 if autocast else getattr(torch, precision), device=device, **kw)
    tokens = random_tokens(3, 24, seed=1, device=device)
    everything = torch.arange(3)[:, None, None], None, None, torch.arange(3)[:, None], torch.arange(24)
    for rate in (None, 0.0, 0.3, 0.7, 1.0):
        policy = None if rate is None else random_policy(rate)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            dense, packed = (m(tokens, execution=execution, policy=policy) for execution in ('dense', 'packed'))
            decoded = cached(m, tokens, 7, policy=policy)
        if policy:  # independent of the model: a token's depth is 1 + the times it went on before it first did not
            assert torch.equal(dense.depth.cpu(), 1 + policy(*everything).int().cumprod(0).sum(0))
        elif bound == 0.1 and m.gates:
            continue  # rounding decides which side of the threshold a gate is on
        for out in (packed, decoded):
            assert torch.equal(dense.depth, out.depth)
            assert (dense.logits - out.logits).abs().max() < bound


@torch.no_grad()
def test_arguments_of_the_halting_decision():
    """tau, max_iter and halting=False do what the policies do that say the same."""
    m = tiny(**SAVING)
    x = random_tokens(2, 20, seed=2)
    for kw, policy in [(dict(tau=0.5), lambda i, s, h, row, pos: s >= 0.5),
                       (dict(max_iter=2), lambda i, s, h, row, pos: (s >= 0.3) & (i < 1)),
                       (dict(max_iter=1), lambda i, s, h, row, pos: s < 0)]:
        want = m(x, policy=policy)
        for out in (m(x, **kw), m(x, execution='packed', **kw), cached(m, x, 4, **kw)):
            assert torch.equal(out.depth, want.depth) and (out.logits - want.logits).abs().max() < 1e-12
    assert len(want.depth.unique()) == 1 and len(m(x, tau=0.5).depth.unique()) > 1
    fixed = AdaPonderLM(replace(m.cfg, halting=False)).double()
    fixed.load_state_dict(m.state_dict(), strict=False)
    assert torch.equal(m(x, halting=False).logits, fixed(x).logits)
    seen = []

    def second_row(i, s, h, row, pos):
        seen.append((i, len(s), h.shape, row.tolist(), pos.tolist()))
        return row == 1
    m(x[:, :7], policy=second_row)
    assert seen[0] == (0, 14, (14, 32), [0] * 7 + [1] * 7, [*range(7)] * 2)
    assert seen[2] == (2, 7, (7, 32), [1] * 7, [*range(7)])  # a policy sees the tokens that run, and no others


@pytest.mark.parametrize('kw', [PAPER, SAVING])
def test_all_tokens_may_halt_at_once(kw):
    m = AdaPonderLM(AdaPonderConfig(vocab_size=50304, block_size=16, n_layer=1, n_head=2, n_embd=16, **kw))
    x = random_tokens(2, 5, vocab=50304)
    for execution, grad, y in itertools.product(('dense', 'packed'), (True, False), (x, torch.full_like(x, -100))):
        with torch.set_grad_enabled(grad):
            out = m(x, y, execution=execution, tau=0.999, k=0.5)
        assert (out.depth == 1).all() and torch.isfinite(out.loss)
        if grad:
            out.loss.backward()
    assert (cached(m, x, 2, tau=0.999).depth == 1).all() and m.generate(x, 3, tau=0.999).shape == (2, 8)


@torch.no_grad()
def test_masks_are_monotone_and_a_halted_token_is_frozen():
    m = tiny()
    x = random_tokens(2, 24, seed=6)
    before = m(x)
    assert {1, 4} <= set(before.depth.flatten().tolist())
    for i in range(3):  # gates are evaluated exactly up to the halt
        assert torch.equal(before.gates[..., i] > 0, before.depth > i)
    for p in m.gates[2].parameters():  # whatever the last gate says cannot reach a token that had halted before
        p.normal_(std=3)
    after, gone = m(x), before.depth <= 2
    assert not torch.equal(before.depth, after.depth) and torch.equal(gone, after.depth <= 2)
    assert torch.equal(before.logits[gone], after.logits[gone])
    last = before.depth[1].tolist().index(2)  # and no token sees a later one, halted or not
    assert (m(x[1:, :last + 1]).logits[0, last] - after.logits[1, last]).abs().max() < 1e-12


def test_initialisation():
    """PonderLM's. Gates start open and equal for all tokens; the backbone is the same with and without them."""
    cfg = AdaPonderConfig(vocab_size=3000, block_size=8, n_layer=3, n_head=4, n_embd=128, gate_bias=2.5)
    torch.manual_seed(3)
    m = AdaPonderLM(cfg)
    torch.manual_seed(3)
    plain = AdaPonderLM(replace(cfg, halting=False))
    assert all(torch.equal(p, m.state_dict()[name]) for name, p in plain.state_dict().items())
    std = math.sqrt(2 / (5 * 128))
    for name, p in plain.named_parameters():
        if p.dim() == 1:
            assert (p == (1.0 if 'ln' in name and 'weight' in name else 0.0)).all(), name
        else:  # a normal distribution cut at 3 sigma has 0.987 of sigma
            want = std / math.sqrt(2 * 3 * 4) if name.endswith('proj.weight') else std
            assert abs(p.std().item() / (0.9866 * want) - 1) < 0.03 and 2.9 < p.abs().max() / want <= 3.0001, name
    out = m(random_tokens(2, 8))
    assert (out.gates - 1 / (1 + math.exp(-2.5))).abs().max() < 1e-6 and (out.depth == 4).all()


@torch.no_grad()
def test_ponder_norm_begins_as_the_paper_and_is_a_second_layernorm():
    cfg = AdaPonderConfig(61, 32, 2, 2, 16, n_iter=3, halting=False)
    plain, m = (AdaPonderLM(c).double() for c in (cfg, replace(cfg, ponder_norm=True)))
    m.load_state_dict(plain.state_dict(), strict=False)
    x = random_tokens(2, 20)
    assert torch.equal(m(x).logits, plain(x).logits)
    for p in (*m.ln_f.parameters(), *m.ln_ponder.parameters()):
        p.normal_(1, 0.3)
    z = torch.randn(7, 16, dtype=torch.float64)
    weight, bias = m.ln_f.weight * m.ln_ponder.weight, m.ln_f.bias * m.ln_ponder.weight + m.ln_ponder.bias
    assert (m.ln_ponder(m.ln_f(z)) - F.layer_norm(z, (16,), weight, bias)).abs().max() < 1e-12
    one = AdaPonderLM(replace(cfg, n_iter=1, ponder_norm=True))
    assert not list(one.ln_ponder.parameters())  # one iteration hands on nothing


# losses and gradients

def gradients(m, loss):
    m.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.parameters()]


def distance_of(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kw', [PAPER, dict(ponder_norm=True, early_ce=0.2, **PAPER), dict(feedback='hidden', **SAVING),
                                dict(ponder_norm=True, early_ce=0.2, **SAVING)])
def test_execution_remat_and_chunks_change_no_gradient(kw, device):
    m = tiny(device=device, **kw)
    x, y = random_tokens(2, 2, 24, seed=7, device=device)
    y[1, :5] = -100

    def grads(execution='dense'):
        out = m(x, y, execution=execution, k=0.9, ponder_lambda=0.5)
        assert {1, 4} <= set(out.depth.flatten().tolist())
        return gradients(m, out.loss)
    want, chunks = grads(), m.chunks
    for m.remat, m.chunks in ((False, chunks), (True, chunks), (False, lambda h: 5)):  # 5: a few tokens at a time
        assert distance_of(want, grads()) < 1e-10 and distance_of(want, grads('packed')) < 1e-10


@pytest.mark.parametrize('objective, ponder_lambda', [('paper', 0.5), ('saving', 0.0)])
@pytest.mark.parametrize('early_ce', [0.0, 0.3])
def test_gradients_are_finite_differences(objective, ponder_lambda, early_ce):
    m = tiny(open_gates=True, objective=objective, early_ce=early_ce)
    x, y = random_tokens(2, 2, 12, seed=3)

    def loss():
        return m(x, y, k=0.37, ponder_lambda=ponder_lambda).loss
    grads = gradients(m, loss())
    if objective == 'paper':
        assert all(p.grad.abs().max() > 0 for p in m.gates.parameters())
    g = torch.Generator().manual_seed(0)  # in a random direction
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in m.parameters()]
    slope = sum((grad * d).sum() for grad, d in zip(grads, direction))
    ends = []
    with torch.no_grad():
        for eps in (1e-7, -2e-7):  # small: the k smallest values may not change between the ends
            for p, d in zip(m.parameters(), direction):
                p += eps * d
            ends.append(loss())
    assert abs((ends[0] - ends[1]) / 2e-7 - slope) < 1e-5 * abs(slope)


@torch.no_grad()
@pytest.mark.parametrize('k', [0.9, 0.605, 0.1])
def test_paper_loss_is_the_mean_of_the_smallest(k):
    """Of all gate values: a halted token's later gates count with the state it halted with."""
    m = tiny(**PAPER)
    x = random_tokens(2, 16, seed=4)
    for rate in (0.0, 0.3, 1.0):
        policy = random_policy(rate)
        pools = [naive(m, x[b].tolist(), lambda i, t: policy(i, None, None, b, t))[3] for b in range(2)]
        smallest = np.sort(np.concatenate(pools).flatten())
        n = k * len(smallest)
        want = (smallest[:int(n)].sum() + smallest[int(n)] * (n - int(n))) / n
        for execution in ('dense', 'packed'):
            out = m(x, x, k=k, policy=policy, execution=execution, ponder_lambda=0.7)
            assert abs(float(out.ponder_loss) - want) < 1e-12
            assert abs(float(out.loss - out.ce_loss) - 0.7 * want) < 1e-12
    assert float(m(x, x, k=0.0).ponder_loss) == 0 and float(m(x, x, k=k, halting=False).ponder_loss) == 0


@pytest.mark.parametrize('execution', ['dense', 'packed'])
@pytest.mark.parametrize('feedback, ponder_norm', [('embedding', False), ('hidden', False), ('embedding', True)])
def test_saving_loss_is_what_going_on_saved(feedback, ponder_norm, execution):
    """Token by token: (what it would have lost after an iteration - what it lost) / iterations that it made since."""
    m = tiny(feedback=feedback, ponder_norm=ponder_norm, **SAVING)
    if execution == 'packed':
        m.chunks = lambda h: 3
    x, y = random_tokens(2, 2, 20, seed=5)
    y[0, 3], y[1, 7] = -1, -100
    forced = torch.rand(2, 20, generator=torch.Generator().manual_seed(5)) < 0.2

    def policy(i, s, h, row, pos):
        return (s >= 0.3) | forced[row, pos]
    out = m(x, y, execution=execution, policy=policy, ponder_lambda=0.7)
    depth = out.depth
    assert (depth[forced] == 4).all() and {1, 2, 4} <= set(depth[~forced].tolist())

    def nll_if_halted(b, t, i):
        """Of token (b, t), had it halted after iteration i, and all else as it was."""
        def policy(j, s, h, row, pos):
            return (depth[row, pos] > j + 1) & ~((row == b) & (pos == t) & (j == i))
        with torch.no_grad():
            return m(x, y, policy=policy).nll[b, t]
    want = 0
    for i in range(3):
        terms = []
        for b, t in ((depth > i + 1) & (y >= 0)).nonzero().tolist():
            saved = ((nll_if_halted(b, t, i) - out.nll[b, t]) / (depth[b, t] - i - 1)).clamp(-1, 1)
            s = out.gates[b, t, i].clamp(1e-7, 1 - 1e-7)
            terms.append(-(saved * s.log() + (1 - saved) * (1 - s).log()))
        want += torch.stack(terms).mean()
    assert abs(out.ponder_loss - want) < 1e-9 and abs(out.loss - out.ce_loss - 0.7 * want) < 1e-9
    out.ponder_loss.backward()
    for name, p in m.named_parameters():  # the gates learn from it, and nothing else
        assert (p.grad is not None and p.grad.abs().max() > 0) == name.startswith('gates.'), name


@pytest.mark.parametrize('execution', ['dense', 'packed'])
def test_early_ce_is_the_cross_entropy_after_each_iteration(execution):
    m = tiny(early_ce=0.3, **SAVING)
    x, y = random_tokens(2, 2, 20, seed=9)
    y[0, 3], y[1, 7:9] = -1, -100

    def nll(**kw):
        logits = m(x, **kw).logits
        return F.cross_entropy(logits.transpose(1, 2), y.clamp(min=0), reduction='none') * (y >= 0)
    out = m(x, y, execution=execution, ponder_lambda=0.0)
    assert (out.nll - nll()).abs().max() < 1e-12 and len(out.depth.unique()) > 2
    want = nll().sum() / 37
    for i in range(3):  # stopped after this iteration: of the tokens that ran it
        want = want + 0.3 * (nll(max_iter=i + 1) * (out.depth > i)).sum() / 37
    assert abs(out.loss - want) < 1e-12
    assert distance_of(gradients(m, out.loss), gradients(m, want)) < 1e-10


# products with the vocabulary

def spread(N, U, seed):
    """States (N, d): one that is sure of its token, one that is sure of the last one, and others that are not sure."""
    h = torch.randn(N, U.size(1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(U)
    h[0] *= 200
    h[1] = 300 * U[-1]
    return h


def counted(function, name, calls):
    def call(*args, **kw):
        calls.add(name)
        return function(*args, **kw)
    return call


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('ponder_norm', [False, True])
@pytest.mark.parametrize('vocab, N, chunks, way', [
    (61, 30, 1, set()), (61, 30, 4, {'scaled_dot_product_attention'}), (40000, 70, None, {'checkpoint'})])
def test_pondering_embedding_and_its_gradients(vocab, N, chunks, way, ponder_norm, device, monkeypatch):
    m = tiny(n_layer=1, n_embd=16, vocab_size=vocab, ponder_norm=ponder_norm, halting=False, device=device)
    if chunks:
        m.chunks = lambda h: chunks
    ways = set()
    for module, name in ((model_py.F, 'scaled_dot_product_attention'), (model_py, 'checkpoint')):
        monkeypatch.setattr(module, name, counted(getattr(module, name), name, ways))
    h = spread(N, m.unembed.weight.detach(), 12).requires_grad_()
    g = torch.randn(N, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    message = h * m.ln_ponder.weight + m.ln_ponder.bias if ponder_norm else h
    plain = (message @ m.unembed.weight.t()).softmax(-1) @ m.embed.weight * 4
    inputs = [h, m.unembed.weight, m.embed.weight, *m.ln_ponder.parameters()]
    want = torch.autograd.grad((plain * g).sum(), inputs)
    ours = m.ponder(h)
    assert ways == way or device != 'cpu'
    assert (ours - plain).abs().max() < 1e-10
    assert distance_of(want, torch.autograd.grad((ours * g).sum(), inputs)) < 1e-9
    with torch.no_grad():
        for n in (1, 2, 64, N):  # those of a decoding step on a CPU go in parts
            assert (m.ponder(h[:n]) - plain[:n]).abs().max() < 1e-10
            assert (m.head(h[:n]) - h[:n] @ m.unembed.weight.t()).abs().max() < 1e-10


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('chunks', [1, 3, 30])
@pytest.mark.parametrize('frozen', [False, True])
def test_cross_entropy_and_its_gradients(chunks, frozen, device):
    U = torch.randn(61, 16, generator=torch.Generator().manual_seed(13), dtype=torch.float64).to(device)
    h = spread(30, U, 12).requires_grad_()
    U.requires_grad_(not frozen)
    targets = random_tokens(30, device=device)
    targets[3], targets[4] = -1, -100
    logits = h @ U.t()
    plain = F.cross_entropy(logits, targets.clamp(min=0), reduction='none') * (targets >= 0)
    total, nll = model_py.CrossEntropy.apply(h, U, targets, chunks)
    assert (nll - plain).abs().max() < 1e-10 and abs(total - plain.sum()) < 1e-9 and not nll.requires_grad
    inputs = [h] if frozen else [h, U]
    want = torch.autograd.grad(3 * plain.sum(), inputs)
    assert distance_of(want, torch.autograd.grad(3 * total, inputs)) < 1e-9
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):  # bfloat16: in autocast, as in training
        low = [x.detach().to(torch.float32).requires_grad_() for x in (h[2:], U)]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, nll = model_py.CrossEntropy.apply(*low, targets[2:], chunks)
        assert nll.dtype == torch.float32 and (nll - plain[2:]).abs().max() < bound * 3
        grad = torch.autograd.grad(total, low)
        assert (grad[0].double() - want[0][2:] / 3).abs().max() < bound * 10


# generation

def test_batch_engine_equals_one_at_a_time():
    m = tiny(torch.float64, block_size=300)
    g = torch.Generator().manual_seed(9)
    lengths = [1, 3, 200, 7, 2, 30, 5, 1, 12]
    prompts = [torch.randint(61, (n,), generator=g).tolist() for n in lengths]
    new = [5, 0, 20, 1, 40, 3, 120, 9, 2]
    for kw in (dict(temperature=0), dict(), dict(policy=lambda i, s, h, row, pos: coin(0.5)(i, s, h, 0, pos)), dict(max_iter=3, top_p=0.8)):
        want, m.static_shapes = [], lambda device: False
        for i, p in enumerate(prompts):
            want.append([(s.token, s.depth) for s in m.stream([p], new[i], generator=[torch.Generator().manual_seed(i)], stop_token=7, **kw)])
        for slots, static in ((2, False), (4, False), (32, False), (1, True), (4, True), (9, True)):
            m.static_shapes = lambda device: static  # as on a GPU, without the graphs
            got = [[] for _ in prompts]
            for s in m.stream(prompts, new, slots=slots, generator=[torch.Generator().manual_seed(i) for i in range(9)], stop_token=7, **kw):
                got[s.seq].append((s.token, s.depth))
            assert got == want
    assert prompts[0] == torch.randint(61, (1,), generator=torch.Generator().manual_seed(9)).tolist()  # and the caller's lists are left alone


@pytest.mark.filterwarnings('ignore')
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
def test_compiled_decoding_writes_the_same():
    m = tiny(torch.float64, n_layer=1, n_iter=3)
    prompts = [[5, 6, 7], [8] * 10]
    want = [(s.seq, s.token, s.depth) for s in m.stream(prompts, 12, slots=2, temperature=0)]
    assert len({d for _, _, d in want}) > 1
    assert [(s.seq, s.token, s.depth) for s in m.compile_decoding().stream(prompts, 12, slots=2, temperature=0)] == want
    assert m.fused is not None


@torch.no_grad()
def generate_uncached(m, idx, n, generator, temperature=1.0, top_k=None, top_p=None, execution='dense', **kw):
    """generate() without a cache: the whole context runs for each token."""
    for _ in range(n):
        context = idx[:, m.window(idx.size(1)):]
        logits = m(context, execution=execution, **kw).logits[:, -1]
        u = torch.rand(len(idx), generator=generator)
        idx = torch.cat([idx, sample(logits, u, temperature, top_k, top_p)[:, None]], dim=1)
    return idx


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('config', [PAPER, dict(vocab_size=64, ponder_norm=True, **SAVING), dict(halting=False)])
@pytest.mark.parametrize('kw', [dict(temperature=0), dict(top_k=20, top_p=0.9), dict(temperature=0.7, max_iter=2),
                                dict(tau=0.5), dict(policy=random_policy(0.5))])
def test_generate_is_the_same_with_a_cache_and_without(kw, config, device):
    m = tiny(device=device, **config)
    x = random_tokens(2, 15, seed=8, device=device)
    got = m.generate(x, 36, generator=torch.Generator().manual_seed(1), **kw)  # 51 tokens outgrow the context of 32
    assert got.shape == (2, 51) and torch.equal(got[:, :15], x)
    for execution in ('dense', 'packed'):
        generator = torch.Generator().manual_seed(1)
        assert torch.equal(got, generate_uncached(m, x, 36, generator, execution=execution, **kw))


@torch.no_grad()
def test_generate_of_many_is_of_one_and_goes_past_the_context():
    m = tiny(vocab_size=8192, n_embd=16, n_layer=1, rotary_pct=1.0)
    x = random_tokens(12, 9, seed=13, vocab=8192)
    text = m.generate(x, 6, temperature=0)
    assert torch.equal(text, torch.cat([m.generate(row[None], 6, temperature=0) for row in x]))
    assert torch.equal(m.generate(x, 0), x)
    for block_size in (1, 2, 7, 32):
        m.cfg.block_size = block_size
        starts = [m.window(n) for n in range(1, 200)]
        for n, start in enumerate(starts, 1):  # the context is what fits, and at least half of it
            assert start <= max(0, n - block_size // 2) and n - start <= block_size and (start == 0 or n > block_size)
        assert starts == sorted(starts) and len(set(starts)) <= 1 + 200 / max(1, block_size // 2)  # it moves on seldom


def test_sample_draws_from_the_right_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    u = (torch.arange(10000) + 0.5) / 10000
    for kw, allowed in [(dict(), range(5)), (dict(top_k=2), (2, 3)), (dict(top_p=0.7), (2, 3)), (dict(top_p=0.5), (3,)),
                        (dict(temperature=2.0), range(5)), (dict(top_k=9, top_p=1.0), range(5)), (dict(top_k=1), (3,)),
                        (dict(temperature=1e-3), (3,)), (dict(temperature=1e-300), (3,)), (dict(temperature=0), (3,))]:
        got = torch.bincount(sample(logits.expand(10000, -1), u, **kw), minlength=5) / 10000
        p = torch.zeros(5)
        for j in allowed:
            p[j] = math.exp(min(0.0, (logits[0, j] - 3) / kw.get('temperature', 1.0))) if len(allowed) > 1 else 1.0
        assert (got - p / p.sum()).abs().max() < 2e-4, kw
    assert sample(torch.tensor([[-50.0, 900.0]]), torch.tensor([0.9999999])) == 1  # u near 1 is in the vocabulary
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match='not finite'):
            sample(torch.tensor([[0.0, bad]]), u[:1], temperature=0.5)


# FLOPs

def count_flops(fn):
    from torch.utils.flop_counter import sdpa_flop_count
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter does not know the CPU's kernel
    mapping = {fused: lambda q, k, v, *a, out_shape=None, **kw: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize('rate', [0.0, 0.5])
@pytest.mark.parametrize('kw', [dict(vocab_size=500, n_embd=64), dict(vocab_size=20000, gate_width=0.25),
                                dict(halting=False), dict(feedback='hidden', n_iter=3), dict(n_iter=1)])
def test_flop_formula_equals_the_counter(kw, rate):
    m = tiny(torch.float32, block_size=128, **kw)
    x = random_tokens(1, 128, seed=10)
    outs, kw = [], dict(policy=random_policy(rate)) if rate else dict(tau=0.0)
    got = count_flops(lambda: outs.append(m(x, x, execution='packed', **kw)))
    depth = outs[0].depth[0]
    # packed attention computes the queries of the whole sequence, so it is counted apart: 4 T^2 d a layer and iteration
    want = int(depth.max()) * m.cfg.n_layer * 4 * 128 * 128 * m.cfg.n_embd
    want += sum(m.cfg.inference_flops(n, 0) for n in depth.tolist())
    assert got == want and (len(depth.unique()) > 1) == (rate > 0 and m.cfg.n_iter > 1)


@pytest.mark.parametrize('vocab_size', [61, 1024])  # the second one in parts
@torch.no_grad()
def test_flop_formula_equals_the_counter_in_decoding(vocab_size):
    m = tiny(torch.float32, block_size=128, vocab_size=vocab_size)
    x = random_tokens(1, 110, seed=11)
    cache, depths = m.new_cache(1, 110), []
    m.prefill(x[:, :90], cache)

    def decode(t, **kw):
        out = m.decode(x[:, t:t + 1], cache, t, **kw)
        m.head(out.hidden[:, -1])
        depths.append(int(out.depth))
    for t in range(90, 110):
        got = count_flops(lambda: decode(t, policy=random_policy(0.4)))
        assert got == m.cfg.inference_flops(depths[-1], t + 1)
    assert len(set(depths)) > 2
    got = count_flops(lambda: decode(109, max_iter=2, tau=0.0))
    assert got == m.cfg.inference_flops(2, 110, max_iter=2) < m.cfg.inference_flops(2, 110)


# the schedule of training with gates

def test_hash_uniform_is_uniform_and_uncorrelated():
    row, pos = torch.meshgrid(torch.arange(256), torch.arange(256), indexing='ij')
    u = model_py.hash_uniform(row, pos)
    n = u.numel()
    assert 0 <= u.min() and u.max() < 1
    assert (u.flatten().sort().values - torch.arange(n) / n).abs().max() < 2.5 / math.sqrt(n)  # Kolmogorov and Smirnov
    assert u[3, 5] == model_py.hash_uniform(torch.tensor(3), torch.tensor(5))
    others = [u[:, 1:], u[1:], model_py.hash_uniform(row, pos, 1), model_py.hash_uniform(row, pos, -7), u.t()]
    for other in others:
        a = u[:other.size(0), :other.size(1)]
        off = a != other  # the transposed one has the same diagonal
        assert abs(torch.corrcoef(torch.stack([a[off], other[off]]))[0, 1]) < 5 / math.sqrt(n)
    for a in (row, pos):  # nor does it drift
        assert abs(torch.corrcoef(torch.stack([u.flatten(), a.flatten().float()]))[0, 1]) < 5 / math.sqrt(n)


def schedule_of(objective='saving', max_steps=1000, start=100, full=300, k_max=0.2, **kw):
    cfg = AdaPonderConfig(61, 64, 1, 2, 16, objective=objective, **kw.pop('cfg', {}))
    return model_py.HaltingSchedule(cfg, max_steps, start, full, k_max, **kw)


@pytest.mark.parametrize('gates_alone, step, k, share', [
    (0, 0, 0.0, 1.0), (0, 100, 0.0, 1.0), (0, 200, 0.15, 0.55), (0, 250, 0.1875, 0.325), (0, 300, 0.2, 0.1),
    (0, 650, 0.2, 0.05), (0, 1000, 0.2, 0.0), (100, 200, 0.0, 1.0), (100, 250, 0.15, 0.55), (100, 300, 0.2, 0.1)])
def test_schedule_of_savings(gates_alone, step, k, share):
    """k rises as r (2 - r); the share of tokens forced to run all iterations falls from 1 to `explore`, then to 0."""
    schedule = schedule_of(gates_alone=gates_alone, explore=0.1)
    assert abs(schedule.k(step) - k) < 1e-12
    row, pos = (x.flatten() for x in torch.meshgrid(torch.arange(200), torch.arange(500), indexing='ij'))
    forced = schedule.forced(step, row, pos)
    assert abs(forced.float().mean() - share) < 0.008
    policy = schedule.at(step)['policy']
    s = torch.rand(len(row), generator=torch.Generator().manual_seed(0))
    schedule.cfg.tau = 0.4
    assert torch.equal(policy(1, s, None, row, pos), (s >= 0.4) | forced)
    if 0.2 < share < 0.8:  # others in another step, micro-batch and run
        for other in (schedule.forced(step + 1, row, pos), schedule.forced(step, row, pos, 1),
                      schedule_of(gates_alone=gates_alone, seed=1).forced(step, row, pos)):
            assert abs((other & forced).float().mean() - share ** 2) < 0.01


def test_schedule_moves_tau_to_the_share_that_shall_halt():
    schedule = schedule_of(explore=0.5)
    depth = torch.randint(1, 5, (4, 50), generator=torch.Generator().manual_seed(1))
    row, pos = torch.meshgrid(torch.arange(4), torch.arange(50), indexing='ij')
    for step, micro in ((300, 0), (500, 2)):
        free = [(b, t) for b in range(4) for t in range(50) if not schedule.forced(step, row, pos, micro)[b, t]]
        want = sum(4 - int(depth[b, t]) for b, t in free) / (3 * len(free))
        assert 50 < len(free) < 180 and abs(float(schedule.halted(step, depth, micro)) - want) < 1e-6
    schedule.cfg.tau = 0.01
    schedule.update(99, depth)
    assert schedule.cfg.tau == 0.01  # gates do not act yet
    schedule.update(300, depth)
    want = 0.01 * math.exp(0.2 - float(schedule.halted(300, depth)))
    assert abs(schedule.cfg.tau - want) < 1e-9 and want < 0.01
    schedule.update(300, halted=0.05)
    assert abs(schedule.cfg.tau - want * math.exp(0.15)) < 1e-9
    for halted, limit in ((-99.0, 0.999), (99.0, 1e-6)):
        schedule.update(300, halted=halted)
        assert schedule.cfg.tau == limit
    assert schedule.halted(0, depth) == 0  # all are forced, none is free


def test_schedule_of_the_paper_and_of_networks_without_gates():
    schedule = schedule_of('paper', gates_alone=50, ponder_lambda=0.3)
    for step, halting, k in ((0, False, 0.0), (99, False, 0.0), (100, True, 0.0), (150, True, 0.05), (300, True, 0.2)):
        assert schedule.at(step) == dict(halting=halting, k=pytest.approx(k), ponder_lambda=0.3)
        assert not schedule.forced(step, *torch.ones(2, 9, dtype=torch.long)).any()
    schedule.update(500, halted=0.9)
    assert schedule.cfg.tau == 1e-4  # only savings move it
    default = model_py.HaltingSchedule(schedule.cfg, 400)
    assert (default.start, default.full) == (40, 100)
    for kw in (dict(halting=False), dict(n_iter=1)):
        assert schedule_of(cfg=kw).at(500) == {}


# sample.py

def run_sample(capsys, *args):
    capsys.readouterr()
    sample_py.main([str(a) for a in args])
    return capsys.readouterr()


def save_ckpt(model, path, tokenizer='bytes'):
    path.parent.mkdir(parents=True, exist_ok=True)
    enc = prepare_data.load_tokenizer(tokenizer, path.parent)
    meta = dict(tokenizer=tokenizer, tokenizer_sha256=enc.sha256, vocab_size=enc.n_vocab, eot=enc._special_tokens[EOT])
    torch.save(dict(adaponder=1, config=asdict(model.cfg), model=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def ckpt(tmp_path_factory):
    """A random byte model that halts, with a context of 64."""
    model = tiny(torch.float32, vocab_size=320, block_size=64)
    model.unembed.weight.data *= 3
    return save_ckpt(model, tmp_path_factory.mktemp('ckpt') / 'run' / 'ckpt.pt')


PROMPT = 'tab\there <b>é漢😀</b> &amp;\r\n\x1b[31m'  # 38 bytes


class Page(html.parser.HTMLParser):
    """The tokens of a page that sample.py wrote: (text, attributes), and all tags."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.tags = [], ['']
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == 'span':
            self.tokens.append(['', dict(attrs)])

    def handle_data(self, data):
        if self.tags[-1] == 'span' and data:
            self.tokens[-1][0] += data

    def handle_endtag(self, tag):
        if tag == 'span':
            self.tags.append('/')


def test_sample_makes_the_same_text_and_page_on_every_execution(ckpt, tmp_path, capsys):
    m, tokens = AdaPonderLM.from_checkpoint(ckpt), list(PROMPT.encode())
    steps = list(m.stream([tokens], 30, temperature=0.8, generator=[torch.Generator().manual_seed(5)]))  # 38 + 30 tokens outgrow the 64
    want = b''.join(bytes([s.token]) if s.token < 256 else EOT.encode() for s in steps if s.token <= 256).decode(errors='replace')
    pages = []
    for execution in ('cached', 'packed', 'dense'):
        page = tmp_path / f'{execution}.html'
        got = run_sample(capsys, '--ckpt', ckpt, '--prompt', PROMPT, '--max_new_tokens', 30, '--seed', 5, '--ignore_eot', '--execution', execution, '--html', page)
        assert got.out == PROMPT + want + '\n'
        assert re.match(rf'30 tokens, \d+ tokens/s, mean depth {sum(s.depth for s in steps) / 30:.2f} of 4, ', got.err)
        pages.append(Page(page.read_text()).tokens)
    assert pages[0] == pages[1] == pages[2] and '�' in want
    other = run_sample(capsys, '--ckpt', ckpt.parent, '--prompt', PROMPT, '--max_new_tokens', 30, '--seed', 4, '--ignore_eot', '--num_samples', 2).out
    assert other.endswith('-' * 20 + '\n' + PROMPT + want + '\n') and other.count(want) == 1  # sample n has seed + n, and a run's folder will do


def test_sample_reports_the_flops_of_each_token_at_its_own_context(ckpt, capsys):
    m = AdaPonderLM.from_checkpoint(ckpt)
    for max_iter in (4, 2):
        err = run_sample(capsys, '--ckpt', ckpt, '--prompt', 'a' * 60, '--max_new_tokens', 30, '--temperature', 0, '--ignore_eot', '--max_iter', max_iter).err
        steps = list(m.stream([[97] * 60], 30, temperature=0, max_iter=max_iter))
        spent = full = 0
        for n, s in enumerate(steps):
            f = m.cfg.flops(60 + n if n < 5 else 60 + n - 32 if n < 37 else None)  # the window moves by half of 64 when it is full
            spent += s.depth * (f['linear'] + f['attention']) + (s.depth - (s.depth == max_iter)) * f['gate'] + (s.depth - 1) * f['ponder'] + f['unembed']
            full += 4 * (f['linear'] + f['attention']) + 3 * f['ponder'] + f['unembed']  # fixed depth has no gates
        assert f'{1 - spent / full:.1%} of the FLOPs of fixed depth 4 saved' in err


def test_pieces_show_split_characters_as_one():
    ranks = {**{bytes([b]): b for b in range(256)}, b' \xe2': 256, b'\x80\x9c"': 257}
    enc = tiktoken.Encoding('t', pat_str=r'[\s\S]+', mergeable_ranks=ranks, special_tokens={EOT: 258})

    def pieces(tokens):
        return [(text, [s.token for s in group]) for text, group in sample_py.pieces(enc, [model_py.Step(0, t, 1, [], 0.0) for t in tokens])]
    assert pieces([97, 256, 257, 258, 300]) == [('a', [97]), (' “"', [256, 257]), (EOT, [258]), ('', [300])]
    assert pieces(list('é😀'.encode()) + [0xF0, 0x9F]) == [('é', [0xC3, 0xA9]), ('😀', [0xF0, 0x9F, 0x98, 0x80]), ('�', [0xF0, 0x9F])]
    rng = np.random.default_rng(0)
    for _ in range(300):  # any bytes come out as decode() would have them, no token is lost, and no piece is longer than a character or a broken one
        tokens = np.concatenate([list(rng.choice(['a', 'é', '漢', '😀']).encode())[:rng.integers(1, 5)] for _ in range(8)]).tolist()
        got = pieces(tokens)
        assert ''.join(t for t, _ in got) == bytes(tokens).decode(errors='replace') and sum((g for _, g in got), []) == tokens
        assert all(len(t.encode()) <= 4 or '�' in t for t, _ in got)


def test_sample_streams_as_it_goes(ckpt, capsys, monkeypatch):
    """Standard output that has had enough after 20 writes ends a run that would never end."""
    want = run_sample(capsys, '--ckpt', ckpt, '--prompt', 'x', '--max_new_tokens', 40, '--ignore_eot').out
    got = []

    class Enough(Exception):
        pass

    class Out(io.StringIO):
        def write(self, text):
            got.append(text)
            if len(got) == 20:
                raise Enough
    monkeypatch.setattr(sys, 'stdout', Out())
    with pytest.raises(Enough):
        sample_py.main(['--ckpt', str(ckpt), '--prompt', 'x', '--max_new_tokens', str(10 ** 9), '--ignore_eot'])
    assert want.startswith(''.join(got))


@pytest.mark.parametrize('colorterm', ['truecolor', ''])
def test_depth_view(ckpt, capsys, monkeypatch, colorterm):
    monkeypatch.setenv('COLORTERM', colorterm)
    m = AdaPonderLM.from_checkpoint(ckpt)
    out = m(torch.tensor([list(PROMPT.encode())]))
    depth = [None] + out.depth[0].tolist()  # the depth at a position is spent on the next one
    text = run_sample(capsys, '--ckpt', ckpt, '--prompt', PROMPT, '--max_new_tokens', 0, '--depth').out
    legend, _, body = text.partition('\n\n')
    paint = [code for code, d in re.findall(r'\x1b\[([\d;]+)m (\d) \x1b', legend)]
    assert len(set(paint)) == 4 and all(p.startswith('0;38;2;0;0;0;48;2;' if colorterm else '0;38;5;16;48;5;') for p in paint)  # black on it
    cells = re.findall(r'\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m(\n?)', body)
    want = PROMPT.replace('\t', '    ').replace('\r\n', r'\x0d↵' + '\n').replace('\x1b', r'\x1b') + '\n'
    assert want == ''.join(shown + end for _, shown, end in cells) == re.sub(r'\x1b\[[\d;]*m', '', body)
    at = 0
    for c, (code, _, _) in zip(PROMPT, cells):
        d = max((d for d in depth[at:at + len(c.encode())] if d), default=None)
        assert code == ('1' if d is None else '1' + paint[d - 1][1:])  # bold
        at += len(c.encode())


def test_page_is_self_contained_and_escaped(ckpt, tmp_path, capsys):
    got = run_sample(capsys, '--ckpt', ckpt, '--prompt', PROMPT, '--max_new_tokens', 30, '--num_samples', 2, '--html', tmp_path / 'p.html', '--ignore_eot')
    text = (tmp_path / 'p.html').read_text()
    page = Page(text)
    assert not re.search(r'https?:|//|url\(|\bsrc=|@import|<link', text.replace('// ', '')) and not CONTROL.search(text)
    assert not {'b', 'img', 'iframe', 'a'} & set(page.tags) and page.tags.count('script') == 1 and page.tags.count('pre') == 2
    assert 'prefers-color-scheme:dark' in text and 'width=device-width' in text
    shown = got.out.replace('\r', r'\x0d').replace('\x1b', r'\x1b').rstrip('\n').split('\n' + '-' * 20 + '\n')
    assert ''.join(t for t, _ in page.tokens) == CONTROL.sub(lambda c: f'\\x{ord(c[0]):02x}', ''.join(shown))
    raw = re.findall(r'<span class="[^"]*" tabindex="0" data-tip="[^"<>]*">([^<>]*)</span>', text)  # no bare < even where a browser would forgive it
    assert [html.unescape(r) for r in raw] == [t for t, _ in page.tokens] and all('&' not in html.unescape(r) or '&amp;' in r for r in raw)
    prompt = [text for text, a in page.tokens if 'prompt' in a['class']]
    assert len(prompt) == 2 * len(PROMPT) and prompt[:len(PROMPT)] == prompt[len(PROMPT):] == [t for t, _ in page.tokens[:len(PROMPT)]]
    m = AdaPonderLM.from_checkpoint(ckpt)
    tokens = list(PROMPT.encode())
    out = m(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    last = page.tokens[len(PROMPT) - 1]
    d, gates = int(out.depth[0, -1]), out.gates[0, -1].tolist()
    assert last[1]['class'] == f't d{d} prompt' and last[0] == 'm'
    assert last[1]['data-tip'] == (f'"m", in the prompt\ntoken 109: depth {d} of 4, NLL {out.nll[0, -1]:.2f} nats (probability {math.exp(-out.nll[0, -1]):.2g}), '
                                   f'gates {", ".join(f"{g:.2g}" for g in gates[:d])}')
    assert page.tokens[0][1]['data-tip'].endswith('the first, nothing predicted it')


def test_prompts_file_keeps_order_keys_and_text(ckpt, tmp_path, capsys):
    prompts = ['longer first', 'b', '', 'c\u2028漢\n', 'e']
    jobs = [dict(prompt=p, id=i, max_new_tokens=n, note='\ud800' if i else 'é') for i, (p, n) in enumerate(zip(prompts, (70, 3, 1, 9, 0))) if p]
    lines = [json.dumps(j).replace(r'\u2028', '\u2028') for j in jobs]  # U+2028 is no line end in JSON, half a surrogate pair can be escaped only
    (tmp_path / 'in.jsonl').write_text('\n\n'.join(lines) + '\r\n')
    outs = []
    for batch in (1, 3):
        got = run_sample(capsys, '--ckpt', ckpt, '--prompts', tmp_path / 'in.jsonl', '--batch', batch, '--ignore_eot')
        outs.append([json.loads(line) for line in got.out.split('\n') if line])
        assert '4/4' in got.err and '82 tokens' in got.err
    assert outs[0] == outs[1] and [{k: r[k] for k in ('prompt', 'id', 'max_new_tokens', 'note')} for r in outs[0]] == jobs
    assert [r['tokens'] for r in outs[0]] == [70, 3, 9, 0] and outs[0][3]['mean_depth'] is None and 1 <= outs[0][0]['mean_depth'] <= 4
    for n, r in enumerate(outs[0]):  # each as if it were alone
        alone = run_sample(capsys, '--ckpt', ckpt, '--prompt', r['prompt'], '--max_new_tokens', r['tokens'], '--ignore_eot', '--seed', 1337 + n)
        assert alone.out == r['prompt'] + r['completion'] + '\n'
    run_sample(capsys, '--ckpt', ckpt, '--prompts', tmp_path / 'in.jsonl', '--ignore_eot', '--out', tmp_path / 'out.jsonl')
    assert [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().split('\n') if line] == outs[0]
    assert not list(tmp_path.glob('*.tmp'))


def test_end_of_text_ends_a_sample(tmp_path, capsys):
    m = tiny(torch.float32, vocab_size=320)
    m.unembed.weight.data[256] = 10 * m.ln_f.bias.data / m.ln_f.bias.norm() ** 2  # <|endoftext|> after everything
    m.ln_f.weight.data *= 0.01
    path = save_ckpt(m, tmp_path / 'ckpt.pt')
    assert run_sample(capsys, '--ckpt', path, '--prompt', 'a').out == 'a\n'
    assert run_sample(capsys, '--ckpt', path, '--prompt', 'a', '--max_new_tokens', 2, '--ignore_eot').out == 'a' + EOT * 2 + '\n'
    (tmp_path / 'in').write_text('{"prompt": "a"}')
    line = json.loads(run_sample(capsys, '--ckpt', path, '--prompts', tmp_path / 'in').out)
    assert (line['completion'], line['tokens']) == ('', 1)


def test_prompt_from_a_file_and_from_standard_input_is_exact(ckpt, tmp_path, capsys, monkeypatch):
    (tmp_path / 'p').write_bytes(PROMPT.encode())
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(PROMPT.encode()), encoding='ascii'))
    for args in ((), ('--prompt_file', tmp_path / 'p')):
        assert run_sample(capsys, '--ckpt', ckpt, '--max_new_tokens', 0, *args).out == PROMPT + '\n'


def test_sample_with_a_bpe(tmp_path, capsys):
    rank_file = SHARED / 'tokenizers' / 'gpt2.tiktoken'
    if not rank_file.exists():
        pytest.skip(f'no {rank_file}')
    shutil.copy(rank_file, tmp_path / 'tokenizer.tiktoken')
    m = tiny(torch.float32, vocab_size=50304, n_embd=16, n_layer=1, rotary_pct=1.0)
    path = save_ckpt(m, tmp_path / 'ckpt.pt', 'tokenizer.tiktoken')
    text = 'def naïve(漢字, "😀"):\n\treturn “x”'
    run_sample(capsys, '--ckpt', path, '--prompt', text, '--max_new_tokens', 20, '--html', tmp_path / 'p.html')
    tokens = Page((tmp_path / 'p.html').read_text()).tokens
    prompt = [(t, a['data-tip'].count('\n')) for t, a in tokens if 'prompt' in a['class']]
    n = len(prepare_data.load_tokenizer(rank_file).encode_ordinary(text))
    assert ''.join(t for t, _ in prompt) == text and sum(c for _, c in prompt) == n > len(prompt)


@pytest.mark.parametrize('args, words', [
    (['--prompt', ''], 'the prompt is empty: give at least one character'),
    (['--prompt', 'x' * 65], 'the prompt has 65 tokens, more than block_size = 64: shorten it'),
    (['--prompt', '\udcff'], 'the prompt is not UTF-8 text'),
    (['--prompt_file', 'none'], 'none cannot be read: No such file or directory'),
    (['--prompt_file', 'latin'], 'latin is not UTF-8 text'),
    (['--ckpt', 'none.pt', '--prompt', 'x'], 'no checkpoint at none.pt'),
    (['--ckpt', 'latin', '--prompt', 'x'], 'latin has no config.json'),
    (['--ckpt', '.', '--prompt', 'x'], "holds neither train.py's ckpt.pt nor Hugging Face's config.json"),
    (['--ckpt', 'other.pt', '--prompt', 'x'], 'other.pt is a checkpoint of another project'),
    (['--ckpt', 'junk.pt', '--prompt', 'x'], 'junk.pt is not a readable checkpoint'),
    (['--ckpt', 'narrow.pt', '--prompt', 'z'], 'the prompt holds token 122, outside the vocabulary of 100: the tokenizer is not the one'),
    (['--prompt', 'x', '--temperature', '-1'], 'temperature must be >= 0'), (['--prompt', 'x', '--temperature', 'nan'], 'temperature must be >= 0'),
    (['--prompt', 'x', '--top_k', '0'], 'top_k at least 1'), (['--prompt', 'x', '--top_p', '1.5'], r'top_p in \(0, 1\]'),
    (['--prompt', 'x', '--tau', '1'], r'tau must be in \[0, 1\), not 1.0'), (['--prompt', 'x', '--max_iter', '5'], 'max_iter must be 1 to n_iter = 4, not 5'),
    (['--prompt', 'x', '--max_new_tokens', '-1'], 'max_new_tokens must be at least 0'),
    (['--prompt', 'x', '--num_samples', '0'], 'num_samples and batch at least 1'),
    (['--prompt', 'x', '--device', 'nonsense'], 'nonsense'),
    (['--prompt', 'x', '--html', 'no/where.html'], 'no/where.html cannot be written: no folder no that allows it'),
    (['--prompt', 'x', '--out', 'x'], '--out is for --prompts'), (['--prompts', 'bad', '--depth'], '--prompts writes JSON lines'),
    (['--prompts', 'none'], 'none cannot be read'), (['--prompts', 'bad'], 'bad, line 2: not a JSON object with a string "prompt"'),
    (['--prompts', 'empty'], 'empty, line 1: the prompt is empty'), (['--prompts', 'negative'], 'negative, line 1: not a JSON object'),
    (['--prompts', 'surrogate'], 'surrogate, line 1: the prompt is not UTF-8'),
    (['--prompt', 'x', '--tokenizer', 'none.json'], 'no tokenizer file none.json')])
def test_sample_refuses_with_a_sentence(ckpt, tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    Path('latin').write_bytes(b'caf\xe9')
    Path('junk.pt').write_bytes(b'junk')
    torch.save({'model': {}}, 'other.pt')
    save_ckpt(AdaPonderLM(AdaPonderConfig(100, 32, 1, 2, 16)), Path('narrow.pt'))
    Path('bad').write_text('{"prompt": "x"}\n["prompt"]')
    Path('empty').write_text('{"prompt": ""}')
    Path('negative').write_text('{"prompt": "x", "max_new_tokens": -1}')
    Path('surrogate').write_text(r'{"prompt": "\ud800"}')
    with pytest.raises(SystemExit) as e:
        sample_py.main((['--ckpt', str(ckpt)] if '--ckpt' not in args else []) + args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and re.search(words, err) and err.count('\n') == 1


def test_compile_without_a_compiler_is_refused(ckpt, capsys, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(SystemExit) as e:
        sample_py.main(['--ckpt', str(ckpt), '--prompt', 'a', '--device', 'cpu', '--compile'])
    assert e.value.code == 2 and 'needs a C++ compiler' in capsys.readouterr().err


def test_sample_ends_quietly_on_a_closed_pipe_and_on_ctrl_c(ckpt):
    runs = [subprocess.Popen([sys.executable, HERE / 'sample.py', '--ckpt', ckpt, '--prompt', 'x', '--max_new_tokens', '1000000000', '--ignore_eot'],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) for _ in range(2)]  # a suite in the background ignores Ctrl-C
    for run in runs:
        assert len(run.stdout.read(30)) == 30
    runs[0].stdout.close()
    runs[1].send_signal(signal.SIGINT)
    assert runs[0].wait(300) == -signal.SIGPIPE and runs[0].stderr.read() == b''
    assert runs[1].wait(300) == 130 and runs[1].stderr.read() == b'\nstopped\n'
    runs[1].stdout.close()


# public implementations

def neox(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, block_size=64, seed=0, **kw):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(seed)
    hf = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
        intermediate_size=4 * hidden_size, max_position_embeddings=block_size, **kw)).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.08)
    return hf


def test_one_iteration_is_gpt_neox(tmp_path):
    hf = neox()
    hf.save_pretrained(tmp_path)
    m = AdaPonderLM.from_pretrained(tmp_path, n_iter=1)
    x = torch.randint(96, (2, 60))
    with torch.no_grad():
        assert (m(x).logits - hf(x).logits).abs().max() < 1e-4
        want = hf.generate(x[:1, :8], max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(m.generate(x[:1, :8], 50, temperature=0), want)


def test_fixed_depth_is_ponderlm_around_gpt_neox(tmp_path):
    """Section 1 of the method, with transformers' GPTNeoX as the backbone."""
    hf = neox().double()
    hf.save_pretrained(tmp_path)
    x = torch.randint(96, (2, 40))
    for scale_embeds in (False, True):
        m = AdaPonderLM.from_pretrained(tmp_path, n_iter=4, halting=False, scale_embeds=scale_embeds, dtype=torch.float64)
        V = hf.gpt_neox.embed_in.weight * (8.0 if scale_embeds else 1.0)
        with torch.no_grad():
            E = V[x]
            for i in range(4):
                h = hf.gpt_neox(inputs_embeds=E).last_hidden_state
                E = E + hf.get_output_embeddings()(h).softmax(-1) @ V
            assert (m(x).logits - hf.get_output_embeddings()(h)).abs().max() < 1e-6  # transformers' rotary tables are float32


def test_round_trip_through_hugging_face(tmp_path):
    transformers = pytest.importorskip('transformers')
    hf = neox()
    hf.save_pretrained(tmp_path / 'a')
    m = AdaPonderLM.from_pretrained(tmp_path / 'a')
    for gate in m.gates:
        torch.nn.init.normal_(gate.proj.weight)
    m.save_pretrained(tmp_path / 'b')
    back = AdaPonderLM.from_pretrained(tmp_path / 'b')
    assert back.cfg == m.cfg and all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), back.state_dict().values()))
    again = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / 'b')
    assert all(torch.equal(p, q) for p, q in zip(hf.state_dict().values(), again.state_dict().values()))


def hf_tensors(hf):
    """The state of a GPTNeoXForCausalLM under the names that are on disk, whatever transformers calls it in memory."""
    return {n.replace('lm_head.', 'embed_out.'): t.clone() for n, t in hf.state_dict().items()}


def write_hf(folder, tensors, form, **config):
    """A Hugging Face folder made by hand, in one of its forms."""
    folder.mkdir(exist_ok=True)
    config = {**dict(model_type='gpt_neox', vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                     max_position_embeddings=64, rotary_pct=0.25, hidden_act='gelu', use_parallel_residual=True), **config}
    (folder / 'config.json').write_text(json.dumps(config))
    names = sorted(tensors)
    if 'safetensors' in form:
        save, stem, end = pytest.importorskip('safetensors.torch').save_file, 'model', 'safetensors'
    else:
        save, stem, end = (lambda t, f: torch.save(t, f, _use_new_zipfile_serialization='legacy' not in form)), 'pytorch_model', 'bin'
    if 'sharded' in form:
        shards = {f'{stem}-0000{i + 1}-of-00003.{end}': names[i::3] for i in range(3)}
        (folder / f'{stem}.{end}.index.json').write_text(json.dumps(dict(metadata={}, weight_map={n: f for f, ns in shards.items() for n in ns})))
    else:
        shards = {f'{stem}.{end}': names}
    for file, part in shards.items():
        save({n: tensors[n].contiguous() for n in part}, folder / file)
    return folder


@pytest.mark.parametrize('form', ['safetensors', 'sharded safetensors', 'bin', 'legacy bin', 'sharded bin'])
def test_every_form_of_a_folder_loads(tmp_path, form):
    tensors = hf_tensors(neox())
    for l in range(2):  # what old checkpoints carry besides
        tensors[f'gpt_neox.layers.{l}.attention.bias'] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors[f'gpt_neox.layers.{l}.attention.masked_bias'] = torch.tensor(-1e9)
        tensors[f'gpt_neox.layers.{l}.attention.rotary_emb.inv_freq'] = torch.ones(2)
    m = AdaPonderLM.from_pretrained(write_hf(tmp_path / 'hf', tensors, form))
    assert m.cfg.n_iter == 4 and m.cfg.halting and not m.cfg.scale_embeds and m.cfg.block_size == 64
    assert all((torch.sigmoid(m.gates[i](torch.randn(5, 64))) > 0.5).all() and m.gates[i].fc.weight.std() > 0.01 for i in range(3))
    own = {'embed.weight': 'gpt_neox.embed_in.weight', 'unembed.weight': 'embed_out.weight',
           'blocks.1.attn.qkv.bias': 'gpt_neox.layers.1.attention.query_key_value.bias',
           'blocks.0.mlp.proj.weight': 'gpt_neox.layers.0.mlp.dense_4h_to_h.weight',
           'blocks.1.ln_2.weight': 'gpt_neox.layers.1.post_attention_layernorm.weight'}
    assert all(torch.equal(m.state_dict()[a], tensors[b]) for a, b in own.items())
    assert torch.equal(m(torch.arange(9)[None], max_iter=1).logits, AdaPonderLM.from_pretrained(tmp_path / 'hf', n_iter=1)(torch.arange(9)[None]).logits)


# the head sizes of Pythia 14M and 31M; 70M, 160M and 410M; 2.8B; 1.4B, 6.9B and 12B; 1B
@pytest.mark.parametrize('head_size, rotary_pct', [(32, 0.25), (64, 0.25), (80, 0.25), (128, 0.25), (256, 0.25), (24, 1.0)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_heads_of_every_pythia_equal_transformers(tmp_path, head_size, rotary_pct, dtype):
    hf = neox(hidden_size=2 * head_size, num_attention_heads=2, rotary_pct=rotary_pct).to(dtype)
    hf.gpt_neox.embed_in.weight.data *= 30  # the residual stream much larger than what a block adds, as in a trained model
    hf.save_pretrained(tmp_path)
    x = torch.randint(96, (2, 60), generator=torch.Generator().manual_seed(1))
    m = AdaPonderLM.from_pretrained(tmp_path, n_iter=1, dtype=dtype)
    with torch.no_grad():
        got, want = m(x).logits.float(), hf(x).logits.float()
        assert m.cfg.rotary_pct == rotary_pct
        if dtype == torch.float32:
            assert (got - want).abs().max() < 1e-4
            greedy = hf.generate(x[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert torch.equal(m.generate(x[:1, :8], 40, temperature=0), greedy)
        else:  # as near to the same weights in float64 as transformers is
            exact = AdaPonderLM.from_pretrained(tmp_path, n_iter=1, dtype=torch.float64)(x).logits
            assert (got - exact).pow(2).mean() < 1.1 * (want - exact).pow(2).mean() < 0.01 * exact.var()


def test_settings_are_read_in_the_dialects_of_transformers_4_and_5(tmp_path):
    rope = dict(rope_type='default', partial_rotary_factor=0.5, rope_theta=5000.0)
    for n, config in enumerate([dict(rotary_pct=0.5, rotary_emb_base=5000, rope_scaling=None), dict(rotary_pct=None, rope_parameters=rope)]):
        write_hf(tmp_path / str(n), {}, 'bin', layer_norm_eps=1e-6, **config)
        cfg = model_py.config_from_hf(tmp_path / str(n) / 'config.json')
        assert (cfg.rotary_pct, cfg.rotary_base, cfg.norm_eps, cfg.n_iter) == (0.5, 5000.0, 1e-6, 4)


@pytest.mark.parametrize('name', ['adapter.weight', 'gpt_neox.adapter.weight'])
def test_ponderpythia_folder_is_ponderlm(tmp_path, capsys, name):
    """Its config.json decides everything; held against a PonderLM loop around transformers' GPTNeoX."""
    hf = neox()
    write_hf(tmp_path, {**hf_tensors(hf), name: torch.ones(64, 64)}, 'bin', ponderinglm=True, pondering_steps=2, scale_embeds=True)
    m = AdaPonderLM.from_pretrained(tmp_path, halting=False)
    assert m.cfg.n_iter == 3 and m.cfg.scale_embeds and f'ignored {name}' in capsys.readouterr().err
    x = torch.randint(96, (2, 40))
    V, U = hf.gpt_neox.embed_in.weight * 8.0, hf.get_output_embeddings().weight
    with torch.no_grad():
        E = V[x]
        for i in range(3):
            h = hf.gpt_neox(inputs_embeds=E).last_hidden_state
            E = E + (h @ U.T).softmax(-1) @ V
        assert (m(x).logits - h @ U.T).abs().max() < 1e-4
    adaptive = AdaPonderLM.from_pretrained(tmp_path, n_iter=4)
    assert adaptive.cfg.n_iter == 4 and len(adaptive.gates) == 3
    own = AdaPonderLM.from_pretrained(tmp_path, n_iter=4, ponder_norm=True).ln_ponder  # what the folder lacks begins as nothing
    assert (own.weight == 1).all() and (own.bias == 0).all()
    write_hf(tmp_path, hf_tensors(hf), 'bin', ponderinglm=False, pondering_steps=3)
    assert AdaPonderLM.from_pretrained(tmp_path).cfg.n_iter == 1


def test_save_pretrained_keeps_every_bit(tmp_path, monkeypatch):
    """In every dtype and with every setting, with and without safetensors, over what an earlier save left."""
    transformers = pytest.importorskip('transformers')
    for dtype, kw in ((torch.float32, {}), (torch.bfloat16, dict(n_iter=3, tau=0.01, rotary_pct=0.25, norm_eps=1e-6)),
                      (torch.float64, dict(halting=False, rotary_base=5000.0)), (torch.float32, dict(ponder_norm=True)), (torch.bfloat16, dict(ponder_norm=True, halting=False)),
                      (torch.float32, dict(n_iter=1, scale_embeds=False, feedback='hidden', objective='paper', gate_bias=2.0))):
        m = tiny(torch.float64, **kw).to(dtype)
        for absent in (False, True, False):
            with monkeypatch.context() as patch:
                if absent:
                    for name in ('safetensors', 'safetensors.torch'):
                        patch.setitem(sys.modules, name, None)
                m.embed.weight.data += 1  # the newest must win
                m.save_pretrained(tmp_path)
                back = AdaPonderLM.from_pretrained(tmp_path, dtype=dtype)
                assert (tmp_path / 'pytorch_model.bin').exists() == absent == (not (tmp_path / 'model.safetensors').exists())
                assert any((tmp_path / n).exists() for n in ('gates.bin', 'gates.safetensors')) == (m.cfg.halting and m.cfg.n_iter > 1 or m.cfg.ponder_norm) and not list(tmp_path.glob('*.tmp'))
            assert back.cfg == m.cfg and list(back.state_dict()) == list(m.state_dict())
            if m.gates:  # the same network at fixed depth
                fixed = AdaPonderLM.from_pretrained(tmp_path, dtype=dtype, halting=False).state_dict()
                assert set(m.state_dict()) - set(fixed) == {n for n in m.state_dict() if n.startswith('gates.')} and all(torch.equal(t, m.state_dict()[n]) for n, t in fixed.items())
            assert all(torch.equal(a, b) and a.dtype == b.dtype == dtype for a, b in zip(m.state_dict().values(), back.state_dict().values()))
            hf = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype='auto')
            assert hf.dtype == dtype and hf.config.layer_norm_eps == m.cfg.norm_eps
            assert all(torch.equal(m.state_dict()[model_py.hf_to_ours(n)], t) for n, t in hf.state_dict().items())
        if dtype == torch.float32 and not m.cfg.scale_embeds:
            with torch.no_grad():
                x = torch.randint(61, (1, 30))
                assert (m(x).logits - hf(x).logits).abs().max() < 1e-4


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    torch_save = pytest.importorskip('safetensors.torch')
    m = tiny(torch.float32)
    m.save_pretrained(tmp_path)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    save_file = torch_save.save_file
    monkeypatch.setattr(torch_save, 'save_file', lambda tensors, file, **kw: save_file(tensors, file, **kw) if 'gates' not in file else 1 / 0)
    m.embed.weight.data += 1
    with pytest.raises(ZeroDivisionError):
        m.save_pretrained(tmp_path)
    back = AdaPonderLM.from_pretrained(tmp_path)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize('change, words', [
    (dict(model_type='llama'), "model_type 'llama': only GPT-NeoX"), (dict(model_type='llama', ponderinglm=True), "model_type 'llama'"),
    (dict(use_parallel_residual=False), 'use_parallel_residual = False, and this model can only be True'),
    (dict(hidden_act='gelu_new'), "hidden_act = 'gelu_new'"),
    (dict(rope_scaling=dict(type='linear', factor=2.0)), 'rope scaling .*linear'),
    (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4)), 'rope scaling .*yarn'),
    (dict(intermediate_size=128), 'intermediate_size = 128'), (dict(tie_word_embeddings=True), 'tie_word_embeddings = True'),
    (dict(attention_bias=False), 'attention_bias = False'),
    (dict(quantization_config=dict(bits=4)), 'quantization_config'), (dict(num_attention_heads=5), 'must be divisible by n_head'),
    (dict(hidden_size='64'), 'intermediate_size|n_embd'),
    (dict(adaponder=dict(later=1)), "unexpected keyword argument 'later'")])
def test_settings_that_the_model_cannot_represent_are_refused_by_name(tmp_path, change, words):
    write_hf(tmp_path, {}, 'bin', **change)
    with pytest.raises(ValueError, match=words) as e:
        AdaPonderLM.from_pretrained(tmp_path)
    assert 'config.json' in str(e.value) or 'n_head' in words


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = hf_tensors(neox())
    bias = 'gpt_neox.layers.1.attention.query_key_value.bias'
    for n, (change, words) in enumerate([
            ({bias: None}, 'lacks the tensor ' + bias), ({'gpt_neox.layers.2.mlp.dense_h_to_4h.bias': torch.zeros(3)}, r'layers\.2.* has no place in this model'),
            ({'lora.weight': torch.zeros(3)}, 'tensor lora.weight has no place'), ({bias: torch.zeros(5)}, bias + r' is torch.float32 \(5,\), this model needs floats \(192,\)'),
            ({'embed_out.weight': torch.zeros(128, 64)}, r'embed_out.weight is torch.float32 \(128, 64\)'), ({bias: torch.zeros(192, dtype=torch.int8)}, bias + ' is torch.int8')]):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=words):
            AdaPonderLM.from_pretrained(write_hf(tmp_path / str(n), changed, 'bin'))
    with pytest.raises(ValueError, match='layers.0.input_layernorm.weight, .* and 21 more'):
        AdaPonderLM.from_pretrained(write_hf(tmp_path / 'few', {k: v for k, v in tensors.items() if '.layers.' not in k}, 'bin'))

    def refused(kind, words, folder=tmp_path / 'x', **kw):
        with pytest.raises(kind, match=words):
            AdaPonderLM.from_pretrained(folder, **kw)
    write_hf(tmp_path / 'x', tensors, 'bin')
    refused(ValueError, "unexpected keyword argument 'n_iters'", n_iters=3)
    torch.save(dict(model=tensors), tmp_path / 'x' / 'pytorch_model.bin')
    refused(ValueError, 'pytorch_model.bin is not a plain dict of tensors')
    torch.save(tiny, tmp_path / 'x' / 'pytorch_model.bin')  # a pickled function: not loaded, let alone called
    refused(ValueError, 'pytorch_model.bin is not a readable weights file')
    (tmp_path / 'x' / 'pytorch_model.bin').unlink()
    refused(FileNotFoundError, 'has neither model.safetensors nor pytorch_model.bin')
    (tmp_path / 'x' / 'model.safetensors').write_bytes(b'junk')
    refused(ValueError, 'model.safetensors is not a readable safetensors file')
    (tmp_path / 'x' / 'config.json').write_text('{')
    refused(ValueError, 'config.json is not JSON')
    (tmp_path / 'x' / 'config.json').unlink()
    refused(FileNotFoundError, 'has no config.json')
    refused(FileNotFoundError, 'no folder', tmp_path / 'nowhere')
    write_hf(tmp_path / 'x', tensors, 'sharded bin')
    (tmp_path / 'x' / 'model.safetensors').unlink()
    (tmp_path / 'x' / 'pytorch_model-00002-of-00003.bin').unlink()
    refused(FileNotFoundError, 'the shard .*00002-of-00003.bin is missing')


def test_gates_that_do_not_fit_are_named(tmp_path):
    m = tiny(torch.float32)
    m.save_pretrained(tmp_path)
    more = AdaPonderLM.from_pretrained(tmp_path, n_iter=6)  # gates of the folder are kept, new ones start open
    assert torch.equal(more.gates[2].proj.weight, m.gates[2].proj.weight) and not more.gates[3].proj.weight.any() and (more.gates[4].proj.bias == 4).all()
    assert not AdaPonderLM.from_pretrained(tmp_path, halting=False).gates
    with pytest.raises(ValueError, match='tensor gates.1.fc.bias has no place'):
        AdaPonderLM.from_pretrained(tmp_path, n_iter=2)
    safetensors = pytest.importorskip('safetensors.torch')
    gates = safetensors.load_file(tmp_path / 'gates.safetensors')
    del gates['gates.1.proj.weight']
    safetensors.save_file(gates, tmp_path / 'gates.safetensors')
    with pytest.raises(ValueError, match='lacks the tensor gates.1.proj.weight'):
        AdaPonderLM.from_pretrained(tmp_path)


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(FileNotFoundError, match='no folder some/pythia; if it is a hub name, pip install huggingface_hub, or get the folder with "hf download'):
        AdaPonderLM.from_pretrained('some/pythia')
    hub, asked = types.ModuleType('huggingface_hub'), []
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    folder = write_hf(tmp_path / 'snapshot', {}, 'bin')

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if '*.bin' in allow_patterns:
            write_hf(folder, hf_tensors(neox()), 'bin')
        elif len(asked) == 1:
            (folder / 'pytorch_model.bin').unlink()
        return str(folder)
    hub.snapshot_download = snapshot_download
    assert AdaPonderLM.from_pretrained('some/pythia').cfg.n_embd == 64
    assert [n for n, _ in asked] == ['some/pythia'] * 2 and '*.bin' not in asked[0][1]  # .bin only where there is no safetensors

    def offline(name, allow_patterns):
        raise ConnectionError('a long story')
    hub.snapshot_download = offline
    with pytest.raises(FileNotFoundError, match=r'the hub did not give it \(ConnectionError\): get the folder with "hf download some/pythia --local-dir DIR"'):
        AdaPonderLM.from_pretrained('some/pythia')


def test_sampling_a_pythia_folder_with_its_tokenizer(tmp_path, capsys):
    """`sample.py --ckpt FOLDER` of a vanilla model is transformers' greedy continuation."""
    spec = SHARED / 'tokenizers' / 'neox20b_tokenizer.json'
    tokenizers = pytest.importorskip('tokenizers')
    if not spec.exists():
        pytest.skip(f'no {spec}')
    hf = neox(vocab_size=50304, hidden_size=32)
    hf.save_pretrained(tmp_path)
    shutil.copy(spec, tmp_path / 'tokenizer.json')
    theirs = tokenizers.Tokenizer.from_file(str(spec))
    text = 'The   naïve “pile” 漢'
    ids = torch.tensor([theirs.encode(text).ids])
    want = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    got = run_sample(capsys, '--ckpt', tmp_path, '--prompt', text, '--max_new_tokens', 20, '--temperature', 0, '--ignore_eot')
    assert got.out == theirs.decode(want.tolist(), skip_special_tokens=False) + '\n' and 'mean depth 1.00 of 1' in got.err


# prepare_data.py

def nasty(rng, n):
    """n characters or a few more of text that tokenizers get wrong."""
    blocks = [(0x300, 0x36F), (0x5B0, 0x5C5), (0x653, 0x655), (0x93C, 0x94D), (0x1AB0, 0x1ACE), (0x20D0, 0x20F0),
              (0x1D165, 0x1D172), (0x1E130, 0x1E136)]
    marks = [chr(c) for block in blocks for c in range(*block)] + ['\u09be', '\u0dcf', '\u102e', '\u3099', '\u0f71']
    letters = [*'aeiouyAENnÅqক가각Αωшдالאبཀﬁ\u212b豈\U0002f80f', *map(chr, range(0x1100, 0x1120))]
    blanks = [*' \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u180e\u200b\ufeff', '  ', '\n\n', ' ' * 30]
    words = ('<|endoftext|> <|padding|> <|unk|> <|endof text|> <| |> <|endoftext| 0x1F 3.14159 ２０２４ ½Ⅷ² !!! ... #$% '
             '_a_b ĠĊ \x01 \x7f the Fox función 日本語 русский العربية if x: aaaa ab cd 👍🏽 🇩🇪 ❤️ 1️⃣ 𝔘𝔫𝔦').split(' ')
    words += ["I'll", "don't", "'S", "'tis"]

    def any_character():
        plane = rng.randrange(17)
        character = chr(rng.randrange(max(1, plane << 16), (plane + 1) << 16))
        return character.encode(errors='ignore').decode()  # no surrogates

    def several(choices, most):
        return ''.join(rng.choice(choices) for _ in range(rng.randint(1, most)))

    kinds = [any_character, lambda: several(blanks, 12), lambda: several(letters, 3) + several(marks, 5),
             lambda: several(words, 3), lambda: rng.choice(['', ' ', '\n']) + rng.choice(words)]
    text = []
    while n > 0:
        text.append(rng.choice(kinds)())
        n -= len(text[-1])
    return ''.join(text)


def small_ranks():
    """256 bytes and some merges."""
    words = [b'th', b'the', b' the', b'er', b'in', b'  ', b'    ', b'\n\n', b' a', b'oo', b'\xe2\x80', b'\xcc\x81',
             b'e\xcc\x81', b'\xc3\xa9', b"'l", b"'ll"]
    return {t: i for i, t in enumerate([bytes([b]) for b in range(256)] + words)}


def write_ranks(path, ranks):
    path.write_bytes(b''.join(base64.b64encode(t) + b' %d\n' % i for t, i in ranks.items()))
    return path


def write_tokenizer_json(path, ranks, added=(), **changes):
    """A tokenizer.json of GPT-2's form with the tokens of `ranks`; the merge of each is what BPE makes of it before."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    char = {b: chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = found.index(min(found))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([''.join(char[b] for b in part) for part in parts])
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    added = [dict(id=len(ranks) + i, content=content, special=special, normalized=normalized, **flags)
             for i, (content, special, normalized) in enumerate([(EOT, True, False), *added])]
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    vocab = {''.join(char[b] for b in token): i for token, i in ranks.items()}
    spec = dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None, decoder=byte_level,
                pre_tokenizer=byte_level, post_processor=byte_level,
                model=dict(type='BPE', dropout=None, byte_fallback=False, vocab=vocab, merges=merges))
    path.write_text(json.dumps({**spec, **changes}), encoding='utf-8')
    return path


def shared(name):
    path = SHARED / 'tokenizers' / name
    return path if path.is_file() else pytest.skip(f'{path} is not there')


def split_tokens(folder, split):
    """The tokens of a split, its files checked against meta.json."""
    meta = json.loads((folder / 'meta.json').read_text())
    parts = []
    for file in meta[split]['files']:
        data = (folder / file['name']).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file['sha256']
        parts.append(np.frombuffer(data, meta['dtype']))
        assert len(parts[-1]) == file['tokens']
    assert sum(map(len, parts)) == meta[split]['tokens']
    return np.concatenate(parts).tolist() if parts else []


def split_texts(folder, split):
    """The documents of a split, decoded, in order."""
    meta = json.loads((folder / 'meta.json').read_text())
    enc, texts, tokens = prepare_data.load_tokenizer(meta, folder), [], []
    for t in split_tokens(folder, split):
        if t == meta['eot']:
            texts.append(enc.decode(tokens))
            tokens = []
        else:
            tokens.append(t)
    assert not tokens and len(texts) == meta[split]['documents']
    assert sum(len(t.encode()) for t in texts) == meta[split]['bytes']
    return texts


def some_texts(n, seed=0):
    rng = random.Random(seed)
    return [f'{i} ' + nasty(rng, rng.choice([1, 30, 300])) for i in range(n)]


def write_jsonl(path, texts):
    """Every other line in ASCII, and an empty line now and then."""
    lines = [json.dumps({'text': t, 'meta': {'n': i}}, ensure_ascii=bool(i % 2)) for i, t in enumerate(texts)]
    path.write_text(''.join(line + '\n' * (1 + i % 3 // 2) for i, line in enumerate(lines)), encoding='utf-8')
    return path


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def refuses(call, words):
    """One sentence, as a UsageError, that holds these words."""
    with pytest.raises(prepare_data.UsageError) as e:
        call()
    assert words in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('body, code, err', [
    ('raise p.UsageError("bad \\udcff é, do this")', 2, 'x.py: bad \\udcff é, do this\n'),
    ('open("none")', 2, "x.py: [Errno 2] No such file or directory: 'none'\n"),
    ('raise KeyboardInterrupt', 130, 'interrupted\n'), ('print("é \\udcff")', 0, ''), ('{}[1]', 1, 'KeyError: 1\n')])
def test_command_line(tmp_path, body, code, err):
    write_files(tmp_path, {'x.py': f'import prepare_data as p\ndef main():\n    {body}\np.command_line(main)'})
    env = {**os.environ, 'PYTHONPATH': str(HERE), 'PYTHONIOENCODING': 'ascii:strict'}
    done = subprocess.run([sys.executable, 'x.py'], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == code and done.stderr.decode().endswith(err)
    assert ('Traceback' in done.stderr.decode()) == (code == 1)


def test_files_appear_whole_and_only_where_they_can(tmp_path, monkeypatch):
    prepare_data.check_writable(tmp_path / 'x')
    assert not any(tmp_path.iterdir())
    prepare_data.write_beside(tmp_path / 'x', b'old')
    for path, words in ((tmp_path, 'folder'), (tmp_path / 'no' / 'x', 'cannot be written'), ('/dev/null', 'regular'),
                        (tmp_path / ('x' * 300), 'cannot be written'), (tmp_path / 'x' / 'y', 'cannot be written')):
        refuses(lambda: prepare_data.check_writable(path), words)
    monkeypatch.setattr(os, 'replace', fails(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        prepare_data.write_beside(tmp_path / 'x', b'new')
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b'old']


def fails(error):
    def call(*args, **kw):
        raise error
    return call


def test_one_process_a_folder(tmp_path, monkeypatch, capsys):
    """A second preparation of the same folder is refused while the first runs, and leaves its files alone."""
    fcntl = pytest.importorskip('fcntl')
    write_files(tmp_path / 'in', {'a.txt': 'some words ' * 50})
    command = [sys.executable, 'prepare_data.py', str(tmp_path / 'in'), '--out', str(tmp_path / 'out')]
    (tmp_path / 'out' / 'unfinished').mkdir(parents=True)
    with prepare_data.lock(tmp_path / 'out' / 'unfinished'):
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and 'another process' in done.stderr and 'Traceback' not in done.stderr
    assert subprocess.run(command, cwd=HERE, capture_output=True).returncode == 0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['meta.json', 'train.bin', 'val.bin']
    monkeypatch.setattr(fcntl, 'flock', fails(OSError(38, 'Function not implemented')))
    with prepare_data.lock(tmp_path):
        assert 'no locks' in capsys.readouterr().err


def test_bytes_tokenizer():
    enc, text = prepare_data.load_tokenizer('bytes'), nasty(random.Random(0), 5000)
    assert enc.encode_ordinary(text) == list(text.encode()) and enc.decode(list(text.encode())) == text
    assert (enc.n_vocab, enc.eot_token) == (257, 256) and isinstance(enc, tiktoken.Encoding)


def test_gpt2_ranks_are_gpt2(tmp_path, monkeypatch):
    """A rank file, by tiktoken, and a tokenizer.json made of it, by `tokenizers`: two programs, the same tokens."""
    pytest.importorskip('tokenizers')
    enc = prepare_data.load_tokenizer(shared('gpt2.tiktoken'))
    published = [15496, 11, 995, 0, 1279, 91, 437, 1659, 5239, 91, 29]
    assert enc.encode_ordinary('Hello, world! <|endoftext|>') == published and enc.n_vocab == 50257
    other = prepare_data.load_tokenizer(write_tokenizer_json(tmp_path / 'tokenizer.json', enc._mergeable_ranks))
    assert other.n_vocab == enc.n_vocab and other.eot_token == enc.eot_token == 50256
    blanks = ['x' + ' ' * 1_000_000 + 'y', '\n' * 1_000_000 + ' \u3000y', '\t ' * 500_000, '\x1c' * 200_000 + ' a']
    for text in [nasty(random.Random(i), 2000) for i in range(20)] + blanks:
        ids = enc.encode_ordinary(text)
        assert ids == other.encode_ordinary(text)
        assert enc.decode(ids) == other.decode(ids) == text
    monkeypatch.setattr(prepare_data, 'LONG_BLANKS', re.compile(r'[^\S\x1c-\x1f]{3,}'))  # every run taken out
    text = nasty(random.Random(1), 150_000)
    assert enc.encode_ordinary(text) == other.encode_ordinary(text)


def test_blanks_that_overflow_another_pattern_are_refused(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiktoken.Encoding(
        name, pat_str=r'\s+(?!\S)|\s+|\S+', mergeable_ranks=ranks, special_tokens={EOT: 256}))
    write_files(tmp_path, {'x.txt': 'x' + ' ' * 1_000_000 + 'y'})
    refuses(lambda: prepare_data.prepare([tmp_path / 'x.txt'], tmp_path / 'out', 'cl100k_base'), 'x.txt has 100,000 blanks')
    prepare_data.prepare([tmp_path / 'x.txt'], tmp_path / 'out', 'gpt2')  # whose pattern is known
    assert split_texts(tmp_path / 'out', 'val')[0].endswith(' y')


def test_neox_tokenizer():
    """Pythia's own file: published numbers, text of special tokens, NFC, and the bytes of every token."""
    tokenizers = pytest.importorskip('tokenizers')
    path = shared('neox20b_tokenizer.json')
    enc, hf = prepare_data.load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert enc.encode_ordinary('Hello, I am') == [12092, 13, 309, 717] and enc.eot_token == 0 and enc.n_vocab == 50277
    assert 0 not in enc.encode_ordinary('a<|endoftext|>b')
    for i in range(20):
        text = nasty(random.Random(i), 2000)
        assert enc.decode(enc.encode_ordinary(text)) == hf.normalizer.normalize_str(text)
    tokens = [hf.encode(w).ids for w in ('naïve', ' 日本', '      x', '<|padding|>')]
    for ids in tokens:
        assert b''.join(map(enc.decode_single_token_bytes, ids)).decode() == hf.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize('changes, words', [
    (dict(decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': False}), 'not of bytes'),
    (dict(model='BPE'), 'cannot be used'), (dict(decoder=None), 'cannot be used'), ('no JSON', 'cannot be used'),
    ('{"a": ' * 10**5, 'cannot be used'), (b'\xff', 'cannot be used'), (dict(added_tokens=[]), 'has no <|endoftext|>')])
def test_tokenizer_json_that_cannot_be_used_is_refused(tmp_path, changes, words):
    pytest.importorskip('tokenizers')
    if isinstance(changes, dict):
        write_tokenizer_json(tmp_path / 'x.json', small_ranks(), **changes)
    else:
        write_files(tmp_path, {'x.json': changes})
    refuses(lambda: prepare_data.load_tokenizer(tmp_path / 'x.json'), words)


@pytest.mark.parametrize('data, words', [
    (b'YQ== 0 1\n', 'not a .tiktoken file'), (b'\n', 'not a .tiktoken file'), (b'*** 0\n', 'not a .tiktoken file'),
    (b'YQ== 0\n', 'not a whole .tiktoken file')])
def test_broken_rank_file_is_refused(tmp_path, data, words):
    (tmp_path / 'x.tiktoken').write_bytes(data)
    refuses(lambda: prepare_data.load_tokenizer(tmp_path / 'x.tiktoken'), words)


@pytest.mark.parametrize('vocab, dtype', [(2**16, 'uint16'), (2**16 + 1, 'uint32')])
def test_dtype_holds_the_vocabulary(tmp_path, vocab, dtype):
    ranks = {bytes([b]): b for b in range(256)}
    for i in range(vocab - 257):  # pairs, then pairs and a byte
        ranks[bytes([33 + i // 94 % 94, 33 + i % 94, 33 + i // 94**2])[:2 if i < 94**2 else 3]] = 256 + i
    path = write_ranks(tmp_path / 'big.tiktoken', ranks)
    text = nasty(random.Random(7), 500) + ''.join(chr(33 + i % 94) for i in range(3000))
    write_files(tmp_path, {'x.txt': text})
    meta = prepare_data.prepare([tmp_path / 'x.txt'], tmp_path / 'out', path)
    assert (meta['dtype'], meta['vocab_size'], meta['eot']) == (dtype, vocab, vocab - 1)
    assert split_tokens(tmp_path / 'out', 'train')[-1] == vocab - 1
    assert ''.join(split_texts(tmp_path / 'out', s)[0] for s in ('train', 'val')) == text


def packed(data, packing):
    if packing == '.zst':  # two frames, one behind the other
        half = len(data) // 2
        compress = pytest.importorskip('zstandard').compress
        return compress(data[:half]) + compress(data[half:])
    return gzip.compress(data) if packing == '.gz' else data


@pytest.mark.parametrize('form', ['txt', 'txt.gz', 'txt.zst', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'hf'])
def test_every_form_of_input_gives_the_same_documents(tmp_path, monkeypatch, capsys, form):
    """Order kept, empty documents and byte order marks left out, half surrogates replaced, foreign files skipped."""
    texts = [*some_texts(40), '', 'ends with <|endoftext|>', 'no newline\r\n\r\n', 'half \ud800 a pair']
    whole = [t.replace('\ud800', '\ufffd') for t in texts if t]
    folder, sources = tmp_path / 'in', [tmp_path / 'in']
    form, packing = form.split('.')[0], form[form.find('.'):] if '.' in form else ''
    if form == 'txt':
        for i, text in enumerate(whole):
            data = (b'\xef\xbb\xbf' if i % 3 else b'') + text.encode()
            write_files(folder, {f'{i:03d}.{"txt" if i % 2 else "py"}{packing}': packed(data, packing)})
        write_files(folder, {'.hidden': 'hidden', 'no.txt': '', 'picture.png': b'\x89PNG\r\n', 'tokens.bin': b'a\0b\0'})
        write_files(folder / '__pycache__', {'x.txt': 'cache'})
    elif form == 'jsonl':
        for name, part in (('a.jsonl', texts[:22]), ('b.ndjson', texts[22:])):
            data = b'\xef\xbb\xbf' + write_jsonl(tmp_path / 'x', part).read_bytes()
            write_files(folder, {name + packing: packed(data, packing)})
    elif form == 'parquet':
        pa = pytest.importorskip('pyarrow')
        parquet = pytest.importorskip('pyarrow.parquet')
        folder.mkdir()
        table = pa.table({'n': list(range(len(whole) + 1)), 'text': [*whole, '']})
        parquet.write_table(table, folder / 'x.parquet', row_group_size=7)
    else:
        rows = {('a/b', 'c', 'train', True): [{'text': t} for t in texts]}
        module = types.ModuleType('datasets')
        module.load_dataset = lambda name, config, split, streaming: rows[name, config, split, streaming]
        monkeypatch.setitem(sys.modules, 'datasets', module)
        sources = ['hf:a/b:c']
    prepare_data.prepare(sources, tmp_path / 'out', val_fraction=0.3)
    train, val = [split_texts(tmp_path / 'out', s) for s in ('train', 'val')]

    def for_validation(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') < 0.3 * 2**64
    assert val == [t for t in whole if for_validation(t)] and 3 < len(val) < 25
    assert train == [t for t in whole if not for_validation(t)]
    assert ('skipped 2 files' in capsys.readouterr().out) == (form == 'txt')


def test_files_and_globs_in_their_order(tmp_path, monkeypatch):
    texts = some_texts(30)
    write_files(tmp_path / 'in', {f'{i:02d}.txt': t for i, t in enumerate(texts)})
    monkeypatch.setenv('HOME', str(tmp_path))
    prepare_data.prepare(['~/in/[12]*.txt', '~/in/02.txt'], '~/out', val_fraction=0.3)
    train, val = [split_texts(tmp_path / 'out', s) for s in ('train', 'val')]
    order = [*texts[10:], texts[2]]
    assert sorted(train + val) == sorted(order) and train == [t for t in order if t in train]


def test_split_depends_on_the_document_alone(tmp_path):
    texts = [f'document {i}' for i in range(3000)]
    write_jsonl(tmp_path / 'a.jsonl', texts)
    write_jsonl(tmp_path / '0.jsonl', [f'another {i}' for i in range(500)])
    prepare_data.prepare([tmp_path / 'a.jsonl'], tmp_path / 'one', val_fraction=0.1)
    prepare_data.prepare([tmp_path / 'a.jsonl', tmp_path / '0.jsonl'], tmp_path / 'two', val_fraction=0.1)
    one, two = (set(split_texts(tmp_path / n, 'val')) for n in ('one', 'two'))
    assert one == two & set(texts) and 300 - 4 * 17 < len(one) < 300 + 4 * 17 and two - one


def test_a_very_long_text_is_several_documents(tmp_path, monkeypatch):
    """It is cut at the ends of lines; a text without lines at twice the length at most."""
    monkeypatch.setattr(prepare_data, 'LONGEST', 100)
    monkeypatch.setattr(prepare_data, 'BATCH', 300)
    texts = ['\ufeff' + 'é\r\n' * 40, 'x' * 500, ''.join(f'line {i}\n' for i in range(300)), 'short']
    write_files(tmp_path / 'in', {f'{i}.txt': text for i, text in enumerate(texts)})
    prepare_data.prepare([tmp_path / 'in'], tmp_path / 'out', val_fraction=0.3)
    train, val = [split_texts(tmp_path / 'out', split) for split in ('train', 'val')]
    assert len(train) > 10 and len(val) > 1 and all(len(text) <= 200 for text in train + val)
    assert sorted(''.join(train + val)) == sorted(''.join(texts)[1:])  # less the byte order mark
    assert all(text.startswith('line') and text.endswith('\n') for text in train + val if 'line' in text)


@pytest.mark.parametrize('files, expect', [
    ({'x.txt.gz': gzip.compress(nasty(random.Random(5), 3000).encode())}, None),
    ({'a.txt': 'one', 'b.txt': 'three', 'c.txt': 'the last'}, (['one', 'three', 'the las'], ['t'])),
    ({'a.jsonl': '{"text": "a single row"}'}, (['a single ro'], ['w'])), ({'a.txt': 'aé'}, (['a'], ['é']))])
def test_of_few_documents_the_end_is_for_validation(tmp_path, capsys, files, expect):
    write_files(tmp_path / 'in', files)
    meta = prepare_data.prepare([tmp_path / 'in'], tmp_path / 'out', val_fraction=0.1)
    train, val = (split_texts(tmp_path / 'out', s) for s in ('train', 'val'))
    assert 'for validation' in capsys.readouterr().out and meta['train']['documents'] == len(train)
    if expect:
        assert (train, val) == expect
    else:
        text = gzip.decompress(files['x.txt.gz']).decode()
        assert train[0] + val[0] == text and abs(len(val[0].encode()) - len(text.encode()) / 10) < 5


def test_shards_join_to_the_same_tokens(tmp_path, capsys):
    for i in range(7):
        write_jsonl(tmp_path / f'{i}.jsonl', some_texts(20, seed=i))
    tokenizer = write_ranks(tmp_path / 't.tiktoken', small_ranks())
    sources, kw = [tmp_path / '*.jsonl'], dict(tokenizer=tokenizer, val_fraction=0.2)
    prepare_data.prepare(sources, tmp_path / 'whole', **kw, workers=1)
    prepare_data.prepare(sources, tmp_path / 'small', **kw, shard_tokens=1000, workers=2)
    for i in (2, 0, 1):
        assert not (tmp_path / 'jobs' / 'meta.json').exists()
        prepare_data.prepare(sources, tmp_path / 'jobs', **kw, shard=f'{i}/3', shard_tokens=1000)
        assert ('all 3 shards are there' if i == 1 else 'still to come') in capsys.readouterr().out
    metas = [json.loads((tmp_path / n / 'meta.json').read_text()) for n in ('whole', 'small', 'jobs')]
    assert len(metas[1]['train']['files']) > 5 and all(f['tokens'] == 1000 for f in metas[1]['train']['files'][:-1])
    for split in ('train', 'val'):
        want = split_tokens(tmp_path / 'whole', split)
        assert want == split_tokens(tmp_path / 'small', split) == split_tokens(tmp_path / 'jobs', split)
        assert split_texts(tmp_path / 'jobs', split) == split_texts(tmp_path / 'whole', split)
    assert all({**m, 'train': 0, 'val': 0} == {**metas[0], 'train': 0, 'val': 0} for m in metas)
    # fewer files another time: those of before go, others stay
    write_files(tmp_path / 'small', {'training.bin': 'not ours'})
    prepare_data.prepare(sources, tmp_path / 'small', **kw)
    names = sorted(p.name for p in (tmp_path / 'small').iterdir())
    assert names == ['meta.json', 'tokenizer.tiktoken', 'train.bin', 'training.bin', 'val.bin']
    again = lambda: prepare_data.prepare(sources, tmp_path / 'jobs', 'bytes', shard='1/3')  # noqa: E731
    refuses(again, 'shard_00000_of_00003, shard_00002_of_00003')
    (tmp_path / 'jobs' / 'shard_00000_of_00003' / 'meta.json').write_text('{}')
    refuses(again, 'shard_00000_of_00003')


KILLED = '''
import os, signal, sys, prepare_data as p
p.LONGEST, p.BATCH, p.SAVE_EVERY, left = 3000, 3000, 0, int(sys.argv[1])
def dies(f):
    def call(*a):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return f(*a)
    return call
os.replace, p.TokenFiles.write = dies(os.replace), dies(p.TokenFiles.write)
p.prepare(sys.argv[4:], sys.argv[2], sys.argv[3], val_fraction=0.3, shard_tokens=1000)
'''


@pytest.mark.parametrize('few', [False, True])
def test_killed_preparation_continues(tmp_path, monkeypatch, few):
    """kill -9 between any two steps of writing: a meta.json is always true, and the same command continues."""
    tokenizer = write_ranks(tmp_path / 't.tiktoken', small_ranks())
    texts = [nasty(random.Random(6), 9000), nasty(random.Random(7), 30_000)]
    for i in range(0 if few else 4):
        write_jsonl(tmp_path / f'{i}.jsonl', some_texts(25, seed=i))
    write_files(tmp_path, {'8.txt': texts[0], '9.txt': texts[1]})
    sources = [str(tmp_path / '9.txt')] if few else [str(tmp_path / '*.jsonl'), str(tmp_path / '[89].txt')]
    monkeypatch.setattr(prepare_data, 'LONGEST', 3000)
    monkeypatch.setattr(prepare_data, 'BATCH', 3000)
    batches, encode_all = [], prepare_data.encode_all
    monkeypatch.setattr(prepare_data, 'encode_all', lambda *a: (batches.append(1) or x for x in encode_all(*a)))
    kw = dict(tokenizer=str(tokenizer), val_fraction=0.3, shard_tokens=1000)
    prepare_data.prepare(sources, tmp_path / 'whole', **kw)
    want, all_batches = {p.name: p.read_bytes() for p in (tmp_path / 'whole').iterdir()}, len(batches)
    assert all_batches > 5 and len(want) > 5
    steps = 3 * all_batches  # two writes and one progress file a batch, then the renames
    write_files(tmp_path, {'other.text': 'of another time'})
    prepare_data.prepare([tmp_path / 'other.text'], tmp_path / 'other')
    for left in (0, 10, steps // 2 + 1, steps - 1, steps, steps + 3, steps + len(want) - 1):
        out = shutil.copytree(tmp_path / 'other', tmp_path / f'killed{left}')
        command = [sys.executable, '-c', KILLED, str(left), str(out), str(tokenizer), *sources]
        done = subprocess.run(command, cwd=HERE, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        if left < steps:  # what was there before is whole
            assert split_texts(out, 'train') + split_texts(out, 'val') == ['of another tim', 'e']
        else:
            assert not (out / 'meta.json').exists()
        if left == steps - 1:  # another preparation, killed too, writes over what was there
            write_files(tmp_path, {'0.text': nasty(random.Random(8), 9000)})
            subprocess.run([*command[:3], '2', *command[4:6], str(tmp_path / '0.text')], cwd=HERE, capture_output=True)
        batches.clear()
        prepare_data.prepare(sources, out, **kw)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == want
        if 10 <= left < steps - 1 and not few:
            assert len(batches) <= all_batches - left // 3 + 1


def archive(form):
    """The bytes of an archive of text files."""
    file, text = io.BytesIO(), b'a text file\n' * 300
    if form == 'zip':
        with zipfile.ZipFile(file, 'w') as z:
            z.writestr('a.txt', text)
    else:
        with tarfile.open(fileobj=file, mode=form) as tar:
            info = tarfile.TarInfo('a.txt')
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return file.getvalue()


BAD = [
    ('x', b'good \xff bad', {}, 'x is not text in UTF-8'), ('x', 'ends é'.encode()[:-1], {}, 'UTF-8'),
    ('x', b'', {}, 'no text in'), ('x', b'\xef\xbb\xbf', {}, 'no text in'), ('x', 'text'.encode('utf-16'), {}, 'UTF-8'),
    ('x.tar', archive('w:'), {}, 'unpack an archive'), ('x.tar.gz', archive('w:gz'), {}, 'unpack an archive'),
    ('x.tbz', archive('w:bz2'), {}, 'unpack an archive'), ('x.zip', archive('zip'), {}, 'unpack an archive'),
    ('x.gz', b'not packed', {}, 'x.gz cannot be read'), ('x.gz', gzip.compress(b'text')[:-9], {}, 'cannot be read'),
    ('x.jsonl', b'{"text": "a"}\n{"text": "b"\n', {}, 'x.jsonl, line 2 is not an object with a string "text"'),
    ('x.jsonl', b'{"txt": "a"}\n', {}, 'line 1 is not'), ('x.jsonl', b'\xff\n', {}, 'line 1 is not'),
    ('x.jsonl', b'["text"]\n', {}, 'line 1 is not'), ('x.jsonl', b'{"text": 5}', {}, 'line 1 is not'),
    ('x.jsonl', b'[' * 100_000, {}, 'line 1 is not'), ('x.jsonl', b'\n\n', {}, 'no text in'),
    ('x.jsonl', b'{"text": ""}\n', {}, 'no text in'), ('x', b'a', {}, 'too few for training and validation'),
    *[('x', b'text', dict(val_fraction=v), '--val_fraction must lie') for v in (0, 1.0, -1, float('nan'))],
    *[('x', b'text', dict(shard=s), '--shard must be i/n') for s in ('1', '0/2', '1/1', '-1/1', '0/0', '9' * 5000)],
    *[('x', b'text', dict(shard_tokens=s), '--shard_tokens must be') for s in (-1, 0.5, float('inf'), float('nan'))],
    *[('x', b'text', dict(workers=w), '--workers must be') for w in (0, -1, 10**9)], ('', b'', {}, 'no files found'),
    ('x', b'text', dict(tokenizer='gpt-2'), "unknown tokenizer 'gpt-2': give bytes, one of gpt2"),
    ('x', b'text', dict(tokenizer='none.json'), 'no tokenizer file none.json')]


@pytest.mark.parametrize('name, data, kw, words', BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, name, data, kw, words):
    write_files(tmp_path / 'in', {name: data} if name else {})
    sources, out = [tmp_path / 'in' / name], tmp_path / 'out'
    refuses(lambda: prepare_data.prepare(sources, out, **kw), words)
    assert not out.exists()
    # data that was there stays as it was
    write_files(tmp_path, {'good.txt': 'some good text'})
    prepare_data.prepare([tmp_path / 'good.txt'], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refuses(lambda: prepare_data.prepare(sources, out, **kw), words)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize('packing', ['.gz', '.zst'])
def test_compressed_input_that_was_cut_off_is_refused(tmp_path, packing):
    """Cut anywhere but at the border of two frames, or with a byte changed."""
    if packing == '.zst':
        pytest.importorskip('pyarrow')
    rows = ''.join(json.dumps({'text': f'text {i * 7919 % 10007}'}) + '\n' for i in range(2000)).encode()
    data = packed(rows, packing)
    frames = [data]
    if packing == '.zst':
        compressor = pytest.importorskip('zstandard').ZstdCompressor(write_checksum=True)
        frames = [compressor.compress(rows[:len(rows) // 2]), compressor.compress(rows[len(rows) // 2:])]
        data = b''.join(frames)
    damaged = [data[:n] for n in (5, len(data) // 3, len(frames[0]) + 3, len(data) - 1) if n < len(data)]
    damaged += [data + b'garbage', data[:500] + bytes([data[500] ^ 255]) + data[501:]]
    for i, part in enumerate(damaged):
        write_files(tmp_path, {f'{i}.jsonl{packing}': part})
        refuses(lambda: prepare_data.prepare([tmp_path / f'{i}.jsonl{packing}'], tmp_path / 'out'), f'{i}.jsonl')
    write_files(tmp_path, {'whole.txt' + packing: frames[0]})
    prepare_data.prepare([tmp_path / f'whole.txt{packing}'], tmp_path / 'out')
    texts = [split_texts(tmp_path / 'out', split)[0] for split in ('train', 'val')]
    assert ''.join(texts).encode() == rows[:len(rows) // len(frames)]


def test_folder_with_names_and_files_that_are_no_text(tmp_path):
    """Archives and a picture whose name is not UTF-8 are skipped and counted, whatever the output's encoding is."""
    write_files(tmp_path / 'in', {f'{i}.txt': f'text {i} ' * 200 for i in range(40)})
    write_files(tmp_path / 'in', {'x.tar': archive('w:'), 'x.tar.gz': archive('w:gz'), 'x.zip': archive('zip')})
    try:
        with open(os.fsencode(tmp_path / 'in') + b'/caf\xe9.png', 'wb') as f:
            f.write(b'\x89PNG\0\xff')
    except OSError:
        pytest.skip('this file system has names in UTF-8 only')
    command = [sys.executable, 'prepare_data.py', str(tmp_path / 'in'), '--out', str(tmp_path / 'out')]
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii:strict'}
    done = subprocess.run([*command, '--val_fraction', '0.2'], cwd=HERE, capture_output=True, env=env)
    assert done.returncode == 0 and b'skipped 4 files' in done.stdout, done.stderr.decode()
    assert len(split_texts(tmp_path / 'out', 'train')) + len(split_texts(tmp_path / 'out', 'val')) == 40


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    prepare, out = prepare_data.prepare, tmp_path / 'out'
    refuses(lambda: prepare([tmp_path / 'no*'], out), 'give files, folders, globs')
    for name, module in (('x.zst', 'pyarrow'), ('x.parquet', 'pyarrow'), ('hf:x', 'datasets')):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f'{module}.parquet', None)
        (tmp_path / name).write_bytes(b'')
        refuses(lambda: prepare([name if module == 'datasets' else tmp_path / name], out), f'pip install {module}')
    write_files(tmp_path, {'x.txt': 'some text', 'file': ''})
    refuses(lambda: prepare([tmp_path / 'x.txt'], tmp_path / 'file'), 'cannot be made a folder')
    with monkeypatch.context() as m:
        m.setattr(prepare_data.urllib.request, 'urlopen', fails(urllib.error.URLError('no network')))
        refuses(lambda: prepare(['shakespeare'], out), 'could not be downloaded')
        assert not out.exists()
        m.setattr(prepare_data.urllib.request, 'urlopen', lambda url, timeout: io.BytesIO(b'To be, or not to be'))
        prepare(['shakespeare'], out)
        assert split_texts(out, 'train') == ['To be, or not to b'] and (out / 'input.txt').is_file()
    with monkeypatch.context() as m:
        m.setattr(tiktoken, 'get_encoding', fails(ConnectionError()))
        refuses(lambda: prepare([tmp_path / 'x.txt'], out, 'gpt2'), 'could not download gpt2 (ConnectionError)')
    with monkeypatch.context() as m:
        m.setattr(prepare_data.TokenFiles, 'write', fails(OSError(28, 'No space left on device')))
        with pytest.raises(OSError):
            prepare([tmp_path / 'x.txt'], tmp_path / 'out2')
        assert not (tmp_path / 'out2').exists()


def test_data_and_its_tokenizer_belong_together(tmp_path):
    path = write_ranks(tmp_path / 't.tiktoken', small_ranks())
    write_files(tmp_path, {'x.txt': 'the theory in the inner ether'})
    out = tmp_path / 'out'
    meta = prepare_data.prepare([tmp_path / 'x.txt'], out, path)
    assert meta == json.loads((out / 'meta.json').read_text()) and meta['source'] == [str(tmp_path / 'x.txt')]
    assert meta['tokenizer_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (meta['vocab_size'], meta['eot'], meta['dtype']) == (273, 272, 'uint16')
    path.unlink()
    assert prepare_data.load_tokenizer(meta, out).encode_ordinary(' the') == [258]
    prepare_data.prepare([tmp_path / 'x.txt'], out, out / 'tokenizer.tiktoken')  # its own copy
    write_ranks(out / 'tokenizer.tiktoken', {t: i for t, i in small_ranks().items() if i < 260})
    refuses(lambda: prepare_data.load_tokenizer(meta, out), 'is not the one')
    (out / 'tokenizer.tiktoken').unlink()
    refuses(lambda: prepare_data.load_tokenizer(meta, out), 'no tokenizer file')
    meta = prepare_data.prepare([tmp_path / 'x.txt'], tmp_path / 'bytes')
    refuses(lambda: prepare_data.load_tokenizer({**meta, 'tokenizer_sha256': '0'}), 'is not the one')
    for part in ({}, {'tokenizer': 'bytes'}, {'tokenizer_sha256': '0'}):
        refuses(lambda: prepare_data.load_tokenizer(part, out), 'meta.json')


@pytest.mark.parametrize('args, out', [
    ((), 'stdlib'), (('shakespeare',), 'shakespeare'), (('a/my.corpus.jsonl.gz', 'b'), 'my'),
    (('corpus/*.txt',), 'corpus'), (('hf:org/set:en',), 'set'), (('~/.notes/',), 'notes')])
def test_prepare_command_line(monkeypatch, args, out):
    called = []
    monkeypatch.setattr(prepare_data, 'prepare', lambda *a: called.append(a))
    prepare_data.main([*args])
    flags = '--out o --tokenizer t --val_fraction 0.1 --shard_tokens 1e9 --shard 1/2 --workers 3'
    prepare_data.main([*args, *flags.split()])
    sources = list(args) or ['stdlib']
    assert called == [(sources, f'data/{out}', 'bytes', 0.02, 0, None, None), (sources, 'o', 't', 0.1, 1e9, '1/2', 3)]


def test_standard_library_is_the_default(tmp_path):
    meta = prepare_data.prepare(out=tmp_path / 'out')
    assert meta['source'] == ['stdlib'] and meta['train']['documents'] > 300
    assert meta['train']['bytes'] > 5e6 and meta['val']['documents'] > 3
    assert any('import ' in t for t in split_texts(tmp_path / 'out', 'val'))


# train.py

TINY = dict(objective='live', block_size=16, n_layer=1, n_head=2, n_embd=16, n_iter=3, tau=0.978, batch_size=2, gradient_accumulation_steps=4, max_steps=20,
            learning_rate=6e-3, warmup=3, ponder_start=6, ponder_full=12, freeze_backbone=5, k_max=0.3, eval_interval=8, eval_tokens=200, ckpt_interval=5, log_interval=1, sample_tokens=0,
            device='cpu')  # steps 0 .. 5 without gates, 6 .. 10 gates alone, then everything


def write_data(folder, vocab_size=257, train=(2000, 1500), val=(900,)):
    """A data folder as prepare_data.py writes it: a noisy sequence over 61 bytes."""
    folder.mkdir()
    rng, meta = np.random.default_rng(0), dict(
        adaponder_data=1, tokenizer='bytes', tokenizer_sha256='668761b340232a7197aeecd0008527936c5ef98045c844360174691f4216e5ec', vocab_size=vocab_size,
        eot=256, dtype='uint16', source=[])
    for split, lengths in dict(train=train, val=val).items():
        files = []
        for i, n in enumerate(lengths):
            data = (np.arange(n) * 7 % 61 + rng.integers(0, 3, n)).astype('uint16').tobytes()
            (folder / f'{split}_{i}.bin').write_bytes(data)
            files.append(dict(name=f'{split}_{i}.bin', tokens=n, sha256=hashlib.sha256(data).hexdigest()))
        meta[split] = dict(tokens=sum(lengths), files=files)
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def arguments(data_dir, out_dir, **kw):
    return [f'--{k}={v}' for k, v in {**TINY, 'data_dir': data_dir, 'out_dir': out_dir, **kw}.items()]


def run_train(data_dir, out_dir, at=None, **kw):
    """train.main in this process. at: fn(n, loss) -> loss, called at every training micro-batch n. Returns the exit code."""
    forward, n, handlers = AdaPonderLM.forward, count(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def counted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if torch.is_grad_enabled():
            loss = at(next(n), out.loss)
            out.loss = out.loss if loss is None else loss
        return out
    torch.set_default_dtype(torch.float64)  # Adam makes full steps of float32's noise where a gradient is zero, as that of the keys' biases is
    try:
        AdaPonderLM.forward = counted if at else forward
        train.main(arguments(data_dir, out_dir, **kw))
        return 0
    except SystemExit as e:
        return e.code
    finally:
        AdaPonderLM.forward = forward
        torch.set_default_dtype(torch.float32)
        for s, h in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(s, h)


def read_log(out_dir):
    """log.jsonl without what the clock and the machine decide."""
    records = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ('tokens_per_second', 'mfu', 'waited', 'memory')} for r in records]


def tensors(state):
    """Everything trained in a checkpoint: weights, and optimizer state by parameter."""
    optimizer = {f'{i}.{k}': v for i, s in state['optimizer']['state'].items() for k, v in s.items()}
    return {**state['model'], **optimizer, 'rng': state['rng'], 'step': torch.tensor(state['step'])}


def distance(out_a, out_b):
    """Largest difference between the checkpoints of two runs."""
    a, b = (tensors(load_checkpoint(out / 'ckpt.pt')) for out in (out_a, out_b))
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A data folder and an uninterrupted run on it: the one that interrupted and distributed runs must equal."""
    root = tmp_path_factory.mktemp('train')
    assert run_train(write_data(root / 'data'), root / 'out') == 0
    return root


def test_the_loop_is_what_it_says(trained):
    """The same run written out again: schedule, two stages, accumulation, clipping, decay groups, the windows of the order."""
    state, log = load_checkpoint(trained / 'out/ckpt.pt'), read_log(trained / 'out')
    steps = [r for r in log if 'loss' in r]
    assert [r['step'] for r in steps] == list(range(1, 21)) and steps[-1]['tokens'] == 20 * 8 * 16
    tokens = np.concatenate([np.fromfile(trained / f'data/train_{i}.bin', 'uint16') for i in range(2)]).astype('int64')
    rng = np.random.default_rng([1337, 0])
    offset, order = rng.integers(16), rng.permutation((3500 - 16) // 16)
    torch.manual_seed(1337)
    torch.set_default_dtype(torch.float64)
    m = AdaPonderLM(AdaPonderConfig(**state['config']))
    torch.set_default_dtype(torch.float32)
    assert m.cfg.vocab_size == 320
    opt = torch.optim.AdamW([dict(params=[p for p in m.parameters() if p.dim() > 1], weight_decay=0.01),
                             dict(params=[p for p in m.parameters() if p.dim() == 1], weight_decay=0)], betas=(0.9, 0.95))
    for step in range(20):
        lr = 6e-3 * min(1, (step + 1) / 3) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2)
        k = 0 if step < 6 else 0.3 * min(1, (step - 6) / 6)
        for g in opt.param_groups:
            g['lr'] = lr
        losses, depths = [], []
        for j in range(4):
            at = [offset + 16 * order[((step * 4 + j) * 2 + b) % len(order)] for b in range(2)]
            assert (step * 4 + j) * 2 + 1 < len(order)
            x = torch.tensor(np.stack([tokens[a:a + 17] for a in at]))
            out = m(x[:, :-1], x[:, 1:], halting=False if step < 6 else None, k=k, ponder_lambda=0.1)
            assert step >= 6 or float(out.ponder_loss.detach()) == 0
            (out.loss / 4).backward()
            losses.append(out.loss.item())
            depths.append(out.depth.double().mean().item())
        for name, p in m.named_parameters():
            if (step < 6 and name.startswith('gates')) or (6 <= step < 11 and not name.startswith('gates')):
                p.grad = None
        norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        r = steps[step]
        assert np.allclose([r['loss'], r['depth'], r['lr'], r['k'], r['grad_norm']], [np.mean(losses), np.mean(depths), lr, k, norm], rtol=1e-9)
    assert max(float((p.detach() - state['model'][n]).abs().max()) for n, p in m.named_parameters()) < 1e-10
    stats = steps[-1]  # and what the log says of the gates
    assert all(len(stats[k]) == 2 for k in ('gate_mean', 'gate_under_tau', 'gate_bottom_k'))
    for i in range(2):
        g = out.gates[..., i][out.depth > i]
        assert np.isclose(stats['gate_mean'][i], g.mean().item(), rtol=1e-9) and np.isclose(stats['gate_under_tau'][i], (g < 0.978).double().mean())
        assert np.isclose(stats['gate_bottom_k'][i], g.sort().values[:round(0.3 * len(g))].mean(), rtol=1e-9)
    # the evaluation: 12 windows of 16, evenly spread over the 55 of val
    val = np.fromfile(trained / 'data/val_0.bin', 'uint16').astype('int64')
    x = torch.tensor(np.stack([val[w * 55 // 12 * 16:][:17] for w in range(12)]))
    out = m(x[:, :-1], x[:, 1:])
    evals = [r for r in log if 'val_loss' in r]
    assert [r['step'] for r in evals] == [8, 16, 20] and abs(evals[-1]['val_loss'] - out.ce_loss.item()) < 1e-10
    assert np.allclose(evals[-1]['val_active'], [(out.depth > i).double().mean() for i in range(3)]) and 1 < evals[-1]['val_depth'] < 3
    fixed = 3 * 24 * 16 * 16 + 3 * 4 * 8.5 * 16 + 2 * 4 * 16 * 320 + 2 * 16 * 320
    spent = sum(d * (24 * 16 * 16 + 4 * 8.5 * 16) + (d - 1) * 4 * 16 * 320 + 2 * 16 * 320 + min(d, 2) * (8 * 16 * 16 + 8 * 16)
                for d in out.depth.flatten().tolist()) / out.depth.numel()
    assert abs(evals[-1]['val_flops_saved'] - (1 - spent / fixed)) < 1e-9


def test_order_is_a_pure_function_without_repeats(trained):
    meta = json.loads((trained / 'data/meta.json').read_text())
    tokens = np.concatenate([np.fromfile(trained / f'data/train_{i}.bin', 'uint16') for i in range(2)])

    def windows(seed=1337):
        return train.Windows(trained / 'data', meta, 'train', 16, 257, seed)
    w = windows()
    starts = []
    w.batch = lambda at: starts.extend(at)  # instead of reading
    for i in range(200):
        w.train_batch(i, 5)
    for epoch in range(4):
        at = starts[epoch * w.n:(epoch + 1) * w.n]
        targets = np.concatenate([np.arange(a + 1, a + 17) for a in at])
        assert len(np.unique(targets)) == len(targets) == w.n * 16 and targets.max() < 3500 and w.n == 217  # nothing is predicted twice
    assert starts[:w.n] != starts[w.n:2 * w.n]
    one = [windows().train_batch(i, 4) for i in range(60)]  # each from a fresh start, in the middle, over the borders of files and epochs
    x = windows()
    assert all(torch.equal(a, x.train_batch(i, 4)) for i, a in enumerate(one))
    assert all(x.tolist() == tokens[a:a + 17].tolist() for x, a in zip(torch.cat(one), starts))
    assert not torch.equal(one[0], windows(seed=1).train_batch(0, 4))
    for world in (2, 4):  # the processes share out what one process reads
        ranks = [train.read_ahead(lambda n: windows().train_batch(n, 4), count(8 + r, world)) for r in range(world)]
        for i in range(8, 24):
            assert torch.equal(next(ranks[i % world]), one[i])
        for r in ranks:
            r.close()


def test_resume_is_exact_in_every_phase(trained, capsys):
    out = trained / 'resumed'
    for stop, number in ((3, signal.SIGTERM), (8, signal.SIGINT), (15, signal.SIGTERM), (None, None)):
        done = load_checkpoint(out / 'ckpt.pt')['step'] if out.exists() else 0

        def at(n, loss):
            if stop and n == (stop - done) * 4 + 1:  # in the middle of a step
                os.kill(os.getpid(), number)
        assert run_train(trained / 'data', out, at) == (128 + number if stop else 0)
        text = capsys.readouterr().out
        if stop:
            assert f'stopped at step {stop}; the same command goes on from {out}' in text and load_checkpoint(out / 'ckpt.pt')['step'] == stop
            with open(out / 'log.jsonl', 'a') as f:  # what a kill may leave behind: steps after the checkpoint, a torn line
                f.write(f'{{"step": {stop + 1}, "loss": 1.0}}\n{{"step": {stop}, "val_loss": 1.0}}\n{{"step": 9')
    assert f'going on from {out / "ckpt.pt"} at step 15' in text and 'mean depth' in text
    assert distance(out, trained / 'out') == 0 and read_log(out) == read_log(trained / 'out')
    assert run_train(trained / 'data', out) == 0  # a finished run shows its result again
    assert read_log(out) == read_log(trained / 'out')


def test_savings_are_learned_alike_however_the_run_goes(trained, tmp_path, monkeypatch):
    """Objective 'saving': price and explorers follow their rules; an interrupted run and one of two processes equal the plain one."""
    kw = dict(objective='saving', tau=0.49, gate_bias=0.0, explore=0.2, k_max=0.5, freeze_backbone=3, execution='packed')
    explorers, forward = [], AdaPonderLM.forward

    def recording(self, *args, explore=None, **kwargs):
        explorers.extend([] if explore is None else [explore])
        return forward(self, *args, explore=explore, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(AdaPonderLM, 'forward', recording)
        assert run_train(trained / 'data', tmp_path / 'a', **kw) == 0
    assert len(explorers) == 20 * 4
    for step in range(20):
        drawn, share = torch.stack(explorers[4 * step:4 * step + 4]).double(), np.interp(step, (9, 12, 20), (1, 0.2, 0))
        assert abs(drawn.mean() - share) <= 4 * (share * (1 - share) / drawn.numel()) ** 0.5
    log = [r for r in read_log(tmp_path / 'a') if 'loss' in r]
    tau = 0.49
    for r in log:
        acting = r['step'] > 6 + 3  # gates alone first
        tau *= math.exp(r['k'] - r['halted']) if acting else 1
        x = min(1, max(0, r['step'] - 1 - 9) / 3)  # from 9, when they act, to 12: fast at first, then level
        assert abs(r['tau'] / tau - 1) < 1e-9 and (acting or r['depth'] == 3) and abs(r['k'] - 0.5 * (1 - (1 - x) ** 2)) < 1e-12
    state = load_checkpoint(tmp_path / 'a/ckpt.pt')
    assert state['config']['tau'] == log[-1]['tau'] and 0 < log[-1]['halted'] < 1

    def at(n, loss):
        if n == 9 * 4 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert run_train(trained / 'data', tmp_path / 'b', at, **kw) == 143 and run_train(trained / 'data', tmp_path / 'b', **kw) == 0
    assert distance(tmp_path / 'a', tmp_path / 'b') == 0 and load_checkpoint(tmp_path / 'b/ckpt.pt')['config'] == state['config']
    (tmp_path / 'run.py').write_text('import sys, torch, train\ntorch.set_default_dtype(torch.float64)\ntrain.main(sys.argv[1:])\n')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path / 'run.py',
                           *arguments(trained / 'data', tmp_path / 'c', **kw)], env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert distance(tmp_path / 'a', tmp_path / 'c') < 1e-9
    assert [r['halted'] for r in read_log(tmp_path / 'c') if 'loss' in r] == pytest.approx([r['halted'] for r in log], abs=1e-9)


def test_until_gates_act_a_network_with_them_is_the_one_without(trained, tmp_path):
    """Of one seed both begin with the same backbone, and gates that predict do not touch it: not even through the gradient's norm."""
    def at(n, loss):
        if n == 6 * 4:  # ponder_start
            os.kill(os.getpid(), signal.SIGTERM)
    for name, halting in (('with', True), ('without', False)):
        assert run_train(trained / 'data', tmp_path / name, at, halting=halting, objective='saving', execution='dense', grad_clip=0.05) == 143
    a, b = (load_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('with', 'without'))
    assert a['step'] == b['step'] == 6 and any(n.startswith('gates.') for n in a['model'])
    assert all(torch.equal(a['model'][n], p) for n, p in b['model'].items())


def subprocess_env(**kw):
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE), **{k: str(v) for k, v in kw.items()}}


def test_kill_9_at_any_moment(trained, tmp_path):
    """Killed again and again while it writes a checkpoint every step, the run ends with the weights of the undisturbed one."""
    code = '''
import json, os, random, signal, sys, time
import torch._dynamo, train  # the optimizer imports it, slowly: once here, not after every fork
out, argv = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
random.seed(0)
seen = []
while not seen or seen[-1] < 20:
    pid = os.fork()
    if not pid:
        sys.stdout = sys.stderr
        train.main(argv)
        os._exit(0)
    old = os.stat(out).st_mtime_ns if seen else None
    while len(seen) < 5 and (os.stat(out).st_mtime_ns if os.path.exists(out) else None) == old:
        time.sleep(0.005)
    if len(seen) < 5:  # it has come past the last checkpoint: strike
        time.sleep(random.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    seen.append(train.load_checkpoint(out)['step'])
print(json.dumps(seen))
'''
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'ckpt.pt', *arguments(trained / 'data', tmp_path, ckpt_interval=1)],
                          env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) > 2 and seen == sorted(seen) and seen[-1] == 20
    assert distance(tmp_path, trained / 'out') == 0 and read_log(tmp_path) == read_log(trained / 'out')


def test_torchrun_survives_a_killed_process(trained, tmp_path):
    """Two processes, one of them killed in stage 2: torchrun starts them again, and they end where one process does."""
    (tmp_path / 'run.py').write_text('''
import os, signal, sys
import torch, train
forward, n = train.AdaPonderLM.forward, 0
def counted(self, *args, **kw):
    global n
    n += torch.is_grad_enabled()
    if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and n == 17:  # step 8, gates alone
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kw)
train.AdaPonderLM.forward = counted
torch.set_default_dtype(torch.float64)
train.main(sys.argv[1:])
''')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1', tmp_path / 'run.py',
                           *arguments(trained / 'data', tmp_path / 'out')], env=subprocess_env(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'at step 5' in done.stdout and done.stdout.count('parameters, 128 tokens a step') == 2 and '2 processes' in done.stdout
    assert distance(tmp_path / 'out', trained / 'out') < 1e-9
    for a, b in zip(read_log(tmp_path / 'out'), read_log(trained / 'out'), strict=True):
        assert all(np.allclose(a[k] or 0, b[k] or 0, rtol=1e-8) for k in ('step', 'tokens', 'loss', 'ce', 'depth', 'grad_norm', 'val_loss', 'val_depth') if k in b)


def test_two_processes_agree(trained, tmp_path):
    """Other data or config on one process is refused; a NaN or a SIGTERM on one is everyone's; a sharded optimizer's checkpoint goes on in one process."""
    code = '''
import os, signal, sys
import torch, torch.distributed as dist, train
data, out, *rest = sys.argv[1:]
ports, argv = [a for a in rest if a[:2] != '--'], [a for a in rest if a[:2] == '--']
torch.set_default_dtype(torch.float64)
rank, forward = int(os.environ['RANK']), train.AdaPonderLM.forward
def run(hit, argv):
    n = 0
    def counted(self, *args, **kw):
        nonlocal n
        o = forward(self, *args, **kw)
        n += torch.is_grad_enabled()
        return hit(n, o) or o
    train.AdaPonderLM.forward = counted
    os.environ['MASTER_PORT'] = ports.pop()
    try:
        train.main(argv)
        return 0
    except SystemExit as e:
        return e.code if not dist.is_initialized() else 'the group is alive'
def nan(n, o):
    if rank == 1 and n == 8:
        o.loss = o.loss * float('nan')
def term(n, o):
    if rank == 1 and n == 16:
        os.kill(os.getpid(), signal.SIGTERM)
codes = [run(lambda n, o: None, argv + [f'--out_dir={out}/a', f'--learning_rate={rank}.5']),
         run(lambda n, o: None, argv + [f'--out_dir={out}/a', f'--data_dir=data', '--resume=False'] + (os.chdir(f'{out}/{rank}') or [])),
         run(nan, argv + [f'--out_dir={out}/nan', f'--data_dir={data}']),
         run(term, argv + [f'--out_dir={out}/sharded', f'--data_dir={data}', '--shard_optimizer=True', '--remat=True'])]
print('codes', codes)
'''
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_data(tmp_path / f'{rank}/data', val=(900 + rank,))
    ports = [free_port() for _ in range(4)]
    ranks = [subprocess.Popen([sys.executable, '-X', 'faulthandler', '-c', code, trained / 'data', tmp_path, *map(str, ports), *arguments(trained / 'data', tmp_path)],
                              env=subprocess_env(RANK=r, WORLD_SIZE=2, LOCAL_RANK=r, LOCAL_WORLD_SIZE=2, MASTER_ADDR='127.0.0.1'),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        (out, err), (out1, err1) = (p.communicate(timeout=120) for p in ranks)
    finally:
        for p in ranks:  # where one fails the other may wait for it
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0] and all('codes [2, 2, 0, 143]' in text for text in (out, out1)), out + err + out1 + err1
    assert 'process 1 has another config than process 0' in err and 'process 1 has another meta.json than process 0' in err
    assert out.count('the gradient is not finite, step skipped (1 in a row)') == 1 and 'step 3: the gradient is not finite' in out
    assert run_train(trained / 'data', tmp_path / 'one', lambda n, loss: loss * math.nan if n == 15 else None) == 0
    assert distance(tmp_path / 'nan', tmp_path / 'one') < 1e-9
    assert 'stopped at step 8' in out and load_checkpoint(tmp_path / 'sharded/ckpt.pt')['step'] == 8
    assert run_train(trained / 'data', tmp_path / 'sharded') == 0
    assert distance(tmp_path / 'sharded', trained / 'out') < 1e-9


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_ten_bad_steps_give_up_with_the_last_good_checkpoint(trained, tmp_path, capsys):
    def at(n, loss):
        return loss * (math.inf if n % 8 else math.nan) if n == 30 or n >= 32 else None  # step 7, then all from 8 on
    assert run_train(trained / 'data', tmp_path, at, max_steps=40) == 1
    text = capsys.readouterr().out
    assert 'step 16: the gradient is not finite, step skipped (10 in a row)' in text and 'holds the last good state' in text
    state = load_checkpoint(tmp_path / 'ckpt.pt')
    assert state['step'] == 5 and all(t.isfinite().all() for t in tensors(state).values())
    assert run_train(trained / 'data', tmp_path, max_steps=40) == 0  # and goes on from there


def test_disk_full_costs_one_checkpoint(trained, tmp_path, capsys):
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def at(n, loss):
        if n == 24:  # from step 6 on no file may grow beyond a quarter of the checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / 'ckpt.pt').stat().st_size // 4, hard))
        if n == 48:
            assert not list(tmp_path.glob('*.tmp')) and load_checkpoint(tmp_path / 'ckpt.pt')['step'] == 5
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft if stays is None else stays, hard))
    try:
        stays = None
        assert run_train(trained / 'data', tmp_path, at) == 0
        assert capsys.readouterr().out.count('checkpoint not written') == 1 and distance(tmp_path, trained / 'out') == 0
        stays = (tmp_path / 'ckpt.pt').stat().st_size // 4
        assert run_train(trained / 'data', tmp_path, at, resume=False) == 1  # the last one failed: not a success
        assert load_checkpoint(tmp_path / 'ckpt.pt')['step'] == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('kw, words', [
    (dict(learning_rat=1), "unknown key 'learning_rat', did you mean 'learning_rate'?"), (dict(zzz=1), "unknown key 'zzz'; the keys are in TrainConfig"),
    (dict(n_layer=1.5), 'n_layer must be int, not 1.5'), (dict(halting=1), 'halting must be bool, not 1'), (dict(n_layer=True), 'n_layer must be int, not True'),
    (dict(learning_rate='fast'), "learning_rate must be float, not 'fast'"),
    (dict(max_steps='40%'), "max_steps must be a number of steps, or like '1000 steps' or '1.2B tokens', not '40%'"),
    (dict(ponder_start='soon'), "or '40%' of max_steps, not 'soon'"), (dict(ponder_start=0.4), "or '40%' of max_steps, not '0.4'"),
    (dict(warmup='1.2.3 steps'), 'warmup must be'),
    (dict(dtype='float16'), "dtype must be 'auto', 'float32' or 'bfloat16', not 'float16'"), (dict(batch_size=0), 'must be at least 1'),
    (dict(execution='packed', objective='paper'), "or 'packed' with another objective"), (dict(k_max=1.5), 'k_max and explore must lie in 0 .. 1'), (dict(explore=-0.1), 'k_max and explore must lie in 0 .. 1'),
    (dict(ponder_start=12, ponder_full=6), 'ponder_full (step 6) lies before ponder_start (step 12)'),
    (dict(objective='saving', freeze_backbone=9), 'ponder_full (step 12) lies before ponder_start + freeze_backbone (step 15)'),
    (dict(n_embd=17), 'n_embd (17) must be divisible by n_head (2)'), (dict(objective='some'), 'objective must be'), (dict(vocab_size=200), 'the data has 257 token ids'),
    (dict(init_from='nowhere.pt'), 'no checkpoint at nowhere.pt'), (dict(init_from='./nowhere'), 'no folder ./nowhere'), (dict(block_size=600), 'val split of'),
    (dict(data_dir='data/pile'), 'no data in data/pile: make it with "python prepare_data.py PATH ... --tokenizer TOKENIZER --out data/pile"')])
def test_train_refuses_nonsense(trained, tmp_path, capsys, monkeypatch, kw, words):
    monkeypatch.chdir(tmp_path)
    assert run_train(**{'data_dir': trained / 'data', 'out_dir': tmp_path / 'out', **kw}) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('train.py: ') and err.count('\n') == 1


@pytest.mark.parametrize('dtype, rate, said', [('bfloat16', 1e9, '20 times more slowly in bfloat16 than in float32: give --dtype=float32'), ('bfloat16', 3e10, ''), ('float32', 1e9, '')])
def test_a_cpu_that_is_slow_in_bfloat16_is_told(trained, tmp_path, capsys, monkeypatch, dtype, rate, said):
    monkeypatch.setattr(train, 'peak_flops', lambda device, dtype=torch.float32: rate if dtype is torch.bfloat16 else 2e10)
    assert run_train(trained / 'data', tmp_path, dtype=dtype, max_steps=1) == 0
    out = capsys.readouterr().out
    assert said in out and ('more slowly' in out) == bool(said)


def test_train_refuses_bad_config_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    (tmp_path / 'bad.py').write_text('max_steps = oops')
    (tmp_path / 'typo.py').write_text('max_step = 5')
    for argv, words in ([['config/huge.py'], 'no config file config/huge.py; there are config/continue_1.4b.py'], [[tmp_path / 'bad.py'], "NameError: name 'oops'"],
                        [[tmp_path / 'typo.py'], f"{tmp_path / 'typo.py'}: unknown key 'max_step', did you mean 'max_steps'?"],
                        [['config/tiny.py', '--tau'], '--tau has no value: write --tau=VALUE']):
        with pytest.raises(SystemExit) as e:
            train.load_config([str(a) for a in argv])
        assert e.value.code == 2 and words in capsys.readouterr().err
    cfg = train.load_config(['config/tiny.py', '--learning_rate=1', '--max_steps=1e3', '--out_dir=7'])
    assert (cfg.block_size, cfg.learning_rate, cfg.out_dir) == (192, 1.0, '7') and train.in_steps('x', cfg.max_steps, 5, None) == 1000
    assert [train.in_steps('x', d, 1000, 200) for d in (7, '7', '40%', '1.5M tokens', '2K steps', '0.5%')] == [7, 7, 80, 1500, 2000, 1]


def test_train_refuses_bad_data(trained, tmp_path, capsys):
    def cut(folder):
        os.truncate(folder / 'train_1.bin', 1000)

    def change(folder):
        with open(folder / 'train_1.bin', 'r+b') as f:
            f.seek(100)
            f.write(b'\1')

    def beyond(folder):
        np.full(2000, 400, 'uint16').tofile(folder / 'train_0.bin')

    def no_json(folder):
        (folder / 'meta.json').write_text('{}')
    for i, (harm, words, kw) in enumerate([(cut, 'train_1.bin is missing or not the 1500 tokens', {}), (change, 'train_1.bin was changed: its sha256', {}),
                                           (no_json, 'meta.json was not written by prepare_data.py', {}),
                                           (beyond, 'holds token 400, beyond vocab_size 320', dict(verify_data=False))]):
        harm(write_data(tmp_path / f'data{i}'))
        code = None
        try:
            code = run_train(tmp_path / f'data{i}', tmp_path / f'out{i}', **kw)
            err = capsys.readouterr().err
        except ValueError as e:  # what the command line turns into a sentence
            err = str(e)
        assert words in err and code in (2, None)
    held = train.lock(trained / 'out')
    assert run_train(trained / 'data', trained / 'out') == 2 and 'another run is writing to' in capsys.readouterr().err
    held.close()


def test_a_config_changed_on_resume_is_said_or_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / 'out', tmp_path / 'out')
    write_data(tmp_path / 'data', val=(901,))
    for kw, words in [(dict(n_embd=32), 'trained with other values of n_embd'), (dict(seed=1), 'of seed'), (dict(batch_size=4), 'of batch_size'),
                      (dict(tau=0.5), 'of tau'),
                      (dict(max_steps=40, ponder_start='90%', ponder_full='95%'), 'the gates would act at another time'),
                      (dict(data_dir=tmp_path / 'data'), 'was trained on other data than')]:
        assert run_train(**{'data_dir': trained / 'data', 'out_dir': tmp_path / 'out', **kw}) == 2
        assert words in capsys.readouterr().err
    assert run_train(trained / 'data', tmp_path / 'out', max_steps=22, learning_rate=1e-3, ckpt_interval=50) == 0
    text = capsys.readouterr().out
    assert all(f'changed since the checkpoint: {w}' in text for w in ('max_steps = 20 -> 22', 'learning_rate = 0.006 -> 0.001', 'ckpt_interval = 5 -> 50'))
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['step'] == 22
    state = load_checkpoint(tmp_path / 'out/ckpt.pt')
    torch.save({**state, 'config': {**state['config'], 'pool': 'all'}}, tmp_path / 'out/ckpt.pt')  # of a version with other settings
    assert run_train(trained / 'data', tmp_path / 'out') == 2 and 'another version of this project' in capsys.readouterr().err
    assert run_train(trained / 'data', tmp_path / 'other', init_from=tmp_path / 'out/ckpt.pt') == 2 and 'another version of this project' in capsys.readouterr().err
    (tmp_path / 'out/ckpt.pt').write_bytes(b'junk')
    assert run_train(trained / 'data', tmp_path / 'out') == 2 and 'not a readable checkpoint' in capsys.readouterr().err
    assert run_train(trained / 'data', tmp_path / 'out', resume=False, max_steps=1) == 0 and len(read_log(tmp_path / 'out')) == 2


def test_baselines_and_starting_points(trained, tmp_path, capsys):
    short = dict(max_steps=2, ponder_start=1, freeze_backbone=0, sample_tokens=5)
    for kw, depth in [(dict(n_iter=1), 1.0), (dict(halting=False), 3.0), (dict(feedback='hidden'), None), (dict(objective='paper', remat=True), None), (dict(ponder_norm=True, objective='saving', execution='packed'), None),
        (dict(init_from=trained / 'out/ckpt.pt', n_iter=2, k_max=0.0), None)]:
        assert run_train(trained / 'data', tmp_path / 'out', resume=False, **short, **kw) == 0
        text = capsys.readouterr().out
        evals = read_log(tmp_path / 'out')[-1]
        assert (depth is None or evals['val_depth'] == depth) and f'python sample.py --ckpt {tmp_path}/out/ckpt.pt --depth' in text
        assert ('0.0% of the gated iterations halted, inference FLOPs saved against fixed depth: 0.0%' in text) == (depth is not None)
    state = load_checkpoint(tmp_path / 'out/ckpt.pt')
    assert state['config']['n_iter'] == 2 and 'gates.1.fc.weight' not in state['model']
    before = load_checkpoint(trained / 'out/ckpt.pt')['model']
    assert 0 < (state['model']['embed.weight'] - before['embed.weight']).abs().max() < 0.1  # began where that run ended
    neox(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=32).save_pretrained(tmp_path / 'hf')
    assert run_train(trained / 'data', tmp_path / 'out', resume=False, init_from=tmp_path / 'hf', **{**short, 'ponder_start': 0, 'freeze_backbone': 2}) == 0
    m, hf = AdaPonderLM.from_checkpoint(tmp_path / 'out/ckpt.pt'), AdaPonderLM.from_pretrained(tmp_path / 'hf')
    same = {n.split('.')[0] for n, p in hf.state_dict().items() if n in m.state_dict() and torch.equal(p, m.state_dict()[n])}
    assert same == {'embed', 'blocks', 'ln_f', 'unembed'}  # the gates alone moved
    assert m.cfg.block_size == 32 and not m.cfg.scale_embeds


def test_configs_have_the_published_sizes():
    published = {'pythia70m': 70426624, 'pythia160m': 162322944, 'pythia410m': 405334016, 'pythia1b': 1011781632, 'pythia1.4b': 1414647808, 'pythia2.8b': 2775208960}
    seen = set()
    for file in sorted((HERE / 'config').glob('*.py')):
        cfg = train.load_config([str(file)])
        tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
        assert cfg.out_dir == f'out/{file.stem}' and train.in_steps('max_steps', cfg.max_steps, tokens, None) > 0
        if cfg.init_from == 'scratch':
            shape = {f.name: getattr(cfg, f.name) for f in fields(AdaPonderConfig) if hasattr(cfg, f.name)}
            with torch.device('meta'):
                m = AdaPonderLM(AdaPonderConfig(**{**shape, 'vocab_size': cfg.vocab_size or 320}))
            n = sum(p.numel() for name, p in m.named_parameters() if not name.startswith('gates.'))
            assert n == published.get(file.stem, n)
            seen.add(file.stem)
        if file.stem not in ('tiny', 'evidence'):
            assert tokens == 2 ** 21 and cfg.block_size == 2048 and cfg.n_iter == 4 and cfg.gradient_accumulation_steps % 64 == 0
    assert seen >= set(published)


def test_model_and_training_have_the_same_defaults():
    """But for the shape, which train.py has smaller: a setting that means the same in both."""
    for f in fields(AdaPonderConfig):
        if f.name not in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd') and hasattr(train.TrainConfig, f.name):
            assert getattr(train.TrainConfig, f.name) == f.default, f.name


# nonsense is refused with a sentence

@pytest.mark.parametrize('kw, words', [
    (dict(n_embd=30), 'divisible by n_head'), (dict(n_iter=0), 'n_iter must be at least 1'), (dict(tau=1.0), 'tau'),
    (dict(tau=-0.1), 'tau'), (dict(tau=math.nan), 'tau'), (dict(vocab_size=0), 'vocab_size must be at least 1'),
    (dict(vocab_size=2 ** 31), 'vocab_size'), (dict(n_embd='32'), 'of type int'), (dict(n_layer=True), 'of type int'),
    (dict(rotary_pct=0.4), 'rotary_pct'), (dict(rotary_pct=-0.5), 'rotary_pct'), (dict(rotary_base=0.0), 'rotary_base'),
    (dict(norm_eps=math.nan), 'norm_eps'), (dict(gate_bias=math.inf), 'gate_bias'), (dict(early_ce=-0.1), 'early_ce'),
    (dict(early_ce=math.inf), 'early_ce'), (dict(objective='live'), 'objective'), (dict(feedback='x'), 'feedback'),
    (dict(gate_width=0.01), 'gate_width'), (dict(gate_width=math.inf), 'finite'),
    (dict(gate_width=math.nan), 'finite')])
def test_config_refuses_nonsense(kw, words):
    with pytest.raises(ValueError, match=words):
        AdaPonderConfig(**{**dict(n_embd=32, n_head=4, rotary_pct=0.5), **kw})


@pytest.mark.parametrize('call, words', [
    (lambda m, x: m(x), 'block_size = 32'), (lambda m, x: m(x[:, :0]), 'a sequence of 0 tokens'),
    (lambda m, x: m(x[:, :4], execution='fast'), 'execution'), (lambda m, x: m(x[:, :4], max_iter=5), 'max_iter'),
    (lambda m, x: m.generate(x, 3, max_iter=0), 'max_iter'), (lambda m, x: m.generate(x[:, :0], 3), 'one token'),
    (lambda m, x: m.generate(x + 61, 3), 'from 0 to 60'), (lambda m, x: m.generate(x - 1, 3), 'from 0 to 60'),
    (lambda m, x: m.generate(x, 3, top_p=0.0), 'top_p'), (lambda m, x: m.generate(x, 3, top_p=math.nan), 'top_p'),
    (lambda m, x: m.generate(x, 3, top_k=0), 'top_k'), (lambda m, x: m.generate(x, 3, temperature=-1.0), 'temperature'),
    (lambda m, x: m.generate(x, 3, temperature=math.nan), 'temperature')])
def test_model_refuses_nonsense(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny(torch.float32), torch.zeros(1, 33, dtype=torch.long))


def test_logits_that_are_not_finite_are_refused():
    m = tiny()
    m.unembed.weight.data[3] = math.nan
    with pytest.raises(ValueError, match='not finite'):
        m.generate(random_tokens(1, 5), 3)


def test_checkpoints_that_cannot_be_read_are_refused(tmp_path):
    m, path = tiny(torch.float32), tmp_path / 'ckpt.pt'
    with pytest.raises(FileNotFoundError, match='no checkpoint'):
        AdaPonderLM.from_checkpoint(path)
    path.write_bytes(b'junk')
    with pytest.raises(ValueError, match='not a readable checkpoint'):
        load_checkpoint(path)
    torch.save(dict(model={}), path)
    with pytest.raises(ValueError, match='another project'):
        load_checkpoint(path)
    for change, words in [(dict(later=1), 'another version'), (dict(n_layer=3), 'another version'),
                          (dict(objective='live'), 'objective'), ({}, '')]:
        torch.save(dict(adaponder=1, config={**asdict(m.cfg), **change}, model=m.state_dict()), path)
        if words:
            with pytest.raises(ValueError, match=words):
                AdaPonderLM.from_checkpoint(path)
    again, x = AdaPonderLM.from_checkpoint(path), random_tokens(1, 9)
    assert again.cfg == m.cfg and torch.equal(again(x).logits, m(x).logits)


# bench.py

OPTIONS = SimpleNamespace(device='cpu', dtype='float32', batch_size=3, seed=5, ckpt='ckpt.pt', eval_tokens=192, calib_tokens=96, tau=None, max_iter=None)


def val_windows(n=6, T=32, seed=20):
    return torch.randint(61, (n, T + 1), generator=torch.Generator().manual_seed(seed))


def run_bench(capsys, *argv):
    """bench.py in this process: (its JSON, what it printed)."""
    bench.main([str(x) for x in argv])
    path = argv[argv.index('--json') + 1]
    return json.loads(Path(path).read_text()), capsys.readouterr().out


def bench_run(folder, name, model, data, **config):
    """A checkpoint as train.py writes it, and the data folder that it names."""
    meta = dict(tokenizer_sha256='of no file', vocab_size=61, dtype='uint16', val=dict(tokens=1600, files=[dict(name='val.bin', tokens=1600)]))
    data.mkdir(exist_ok=True)
    torch.randint(61, (1600,), generator=torch.Generator().manual_seed(21)).numpy().astype(np.uint16).tofile(data / 'val.bin')
    (data / 'meta.json').write_text(json.dumps(meta))
    settings = dict(data_dir=str(data), seed=1, batch_size=4, gradient_accumulation_steps=2, block_size=32, k_max=0.4, ponder_lambda=0.1, **config)
    torch.save(dict(adaponder=1, config=asdict(model.cfg), model=model.state_dict(), meta=meta, step=10, train_config=settings), folder / name)
    return folder / name


def test_blind_policies_hit_their_shares_on_every_execution():
    m = tiny(block_size=64)
    x = val_windows(40, 64)[:, :-1]
    row, pos = torch.meshgrid(torch.arange(300), torch.arange(300), indexing='ij')
    u = bench.coin(row, pos)
    assert all(abs(float((u < q).double().mean()) - q) < 0.01 for q in (0.1, 0.5, 0.9))
    assert abs(float(torch.corrcoef(torch.stack([u[:, 1:].flatten(), u[:, :-1].flatten(), bench.coin(row, pos, 1)[:, 1:].flatten()]))[0, 1:].abs().max())) < 0.02
    for policy, ran, bound in [(bench.blind([0.8, 0.5, 0.5]), (0.8, 0.5, 0.5), 0.03), (bench.forced(0.5, 4), None, 0.03), (bench.forced(0.0, 4), (1, 1, 1), 0), (bench.forced(0.75, 4), None, 0.03)]:
        dense, packed = (m(x, execution=e, policy=policy).depth for e in ('dense', 'packed'))
        assert torch.equal(dense, packed)
        if ran:
            assert all(abs(float((dense > i + 1).double().mean()) - r) <= bound for i, r in enumerate(ran))
    for share in (0.25, 0.5, 0.75):  # near the share in every row, and with tokens at all depths
        depth = m(x, policy=bench.forced(share, 4)).depth
        assert (((4 - depth.double()).mean(1) / 3 - share).abs() < 0.03).all() and set(depth.flatten().tolist()) == {1, 2, 3, 4}
    steps = list(m.stream([x[r, :5].tolist() for r in range(4)], 20, temperature=0, policy=bench.forced(0.5, 4), slots=4))
    depth = m(x, policy=bench.forced(0.5, 4)).depth  # a token's depth is the same when it is decoded
    assert all(sorted(s.depth for s in steps if s.seq == r) == sorted(depth[r, 4:24].tolist()) for r in range(4))


def test_profile_and_scores_against_passes_that_stop_early():
    m, x = tiny(), val_windows()
    outs = [m(x[:, :-1], x[:, 1:], tau=0.0, max_iter=d) for d in (1, 2, 3, 4)]
    levels, expected = bench.profile(m, x, OPTIONS)
    P = [out.logits.softmax(-1) for out in outs]
    for d, out in enumerate(outs):
        assert torch.allclose(levels[..., d], out.nll.double(), atol=1e-6)
        assert torch.allclose(expected[..., d], -sum(P[3][..., v] * P[d][..., v].log() for v in range(m.cfg.vocab_size)).double(), atol=1e-6)
    one = tiny(n_iter=1)
    assert all(torch.allclose(t[..., 0], want.double(), atol=1e-6) for t, want in zip(bench.profile(one, x, OPTIONS), (
        one(x[:, :-1], x[:, 1:]).nll, torch.distributions.Categorical(logits=one(x[:, :-1]).logits).entropy())))
    for kind, wanted in [('learned', [outs[3].gates[..., i] for i in range(3)]), ('confidence', [-p.max(-1).values for p in P[:3]]),
                         ('convergence', [(P[i - 1] * (P[i - 1] / P[i]).log()).sum(-1) if i else torch.full(x[:, 1:].shape, math.inf) for i in range(3)])]:
        got = torch.zeros(6, 32, 3, dtype=torch.float64)
        depth, _ = bench.measure(m, x, OPTIONS, bench.above(bench.SCORES[kind](m), into=got))
        assert (depth == 4).all() and torch.allclose(got, torch.stack(wanted, -1).double(), atol=1e-6), kind
    a, b = bench.measure(m, x, OPTIONS), bench.measure(m, x, OPTIONS, bench.above(bench.gate(m), m.cfg.tau))
    direct = m(x[:, :-1], x[:, 1:])
    assert torch.equal(a[0], b[0]) and torch.equal(a[0], direct.depth) and torch.allclose(a[1], direct.nll.double()) and len(set(direct.depth.flatten().tolist())) > 1


def test_thresholds_and_schedules_spend_what_they_should():
    m, x = tiny(), val_windows(30)
    cost = bench.costs(m.cfg, 32)
    assert float(cost[9, 2]) == float(m.cfg.inference_flops(3, 10)) and cost.shape == (32, 4)
    scores = torch.rand(3, 32, 3, generator=torch.Generator().manual_seed(22), dtype=torch.float64)

    def brute(t):  # token by token
        total = 0.0
        for w in scores.tolist():
            for p, gates in enumerate(w):
                depth = 1 + next((i for i, s in enumerate(gates) if s < t), 3)
                total += float(m.cfg.inference_flops(depth, p + 1))
        return total / 96
    for share in (0.3, 0.5, 0.8):
        target = share * float(cost[:, -1].mean())
        best = min((abs(brute(t) - target) for t in scores.flatten().tolist()))
        assert abs(brute(bench.threshold(scores, cost, target)) - target) <= best * (1 + 1e-9)
    for kind in ('learned', 'confidence', 'convergence'):  # in a pass that really halts
        full = torch.zeros(30, 32, 3, dtype=torch.float64)
        bench.measure(m, x, OPTIONS, bench.above(bench.SCORES[kind](m), into=full))
        target = 0.7 * float(cost[:, -1].mean())
        t = bench.calibrate(m, x, OPTIONS, kind, cost, target, full)
        depth, _ = bench.measure(m, x, OPTIONS, bench.above(bench.SCORES[kind](m), t))
        assert abs(float(bench.spent(cost, depth).mean()) / target - 1) < 0.02, kind
    mean = cost.mean(0).tolist()
    for kind in ('uniform', 'geometric'):
        shares = bench.schedule(kind, mean, 0.6 * mean[-1])
        steps = [a - b for a, b in zip([1] + shares, shares)] if kind == 'uniform' else [b / a for a, b in zip([1] + shares, shares)]
        assert max(steps) - min(steps) < 1e-9
        depth_share = [a - b for a, b in zip([1] + shares, shares + [0])]
        assert abs(sum(s * c for s, c in zip(depth_share, mean)) / (0.6 * mean[-1]) - 1) < 1e-9


def test_oracle_is_the_best_assignment():
    g = torch.Generator().manual_seed(23)
    for trial in range(5):
        nll, cost = torch.rand(1, 4, 3, generator=g, dtype=torch.float64), torch.tensor([[1.0, 2.2, 3.1]] * 4) + torch.rand(4, 1, generator=g)
        depth = bench.oracle_depth(nll, cost, float(cost.mean(0)[1]) * (0.7 + 0.1 * trial))
        mine, spend = float(nll.gather(-1, depth[..., None] - 1).sum()), float(bench.spent(cost, depth).sum())
        for choice in itertools.product((0, 1, 2), repeat=4):
            if sum(float(cost[p, c]) for p, c in enumerate(choice)) <= spend:
                assert sum(float(nll[0, p, c]) for p, c in enumerate(choice)) >= mine - 1e-9
    nll, cost = torch.rand(40, 32, 4, generator=g, dtype=torch.float64), bench.costs(tiny().cfg, 32)
    for share in (0.3, 0.5):
        assert abs(float(bench.spent(cost, bench.oracle_depth(nll, cost, share * float(cost.mean(0)[3]))).mean()) / float(cost.mean(0)[3]) - share) < 0.005


def test_statistics():
    rng = np.random.default_rng(24)
    x, y = rng.integers(0, 5, 200), rng.normal(size=200).round(1)

    def rank(v):  # by counting
        return [sum(w < u for w in v) + (sum(w == u for w in v) - 1) / 2 for u in v]
    assert abs(bench.spearman(x, y) - np.corrcoef(rank(x), rank(y))[0, 1]) < 1e-12
    assert abs(bench.spearman(y, 3 * y + 1) - 1) < 1e-12 and bench.spearman(x, 0 * y) is None
    w = rng.normal(size=400)
    assert abs(bench.spread(lambda m: m, w) / (w.std() / 20) - 1) < 0.1
    assert bench.spread(lambda a, b: a - b, w, w + 1) < 1e-12  # paired
    assert abs(bench.retained(2.0, 1.75, 1.5) - 0.5) < 1e-12
    assert bench.mean_of([1.0, None, 3.0]) == dict(mean=2.0, sd=math.sqrt(2)) and bench.mean_of([None]) is None and bench.mean_of([4.0])['sd'] is None
    rows = [dict(model='adaptive', policy=p, dial=d, flops=f, nll=float(np.mean(n)), windows=np.array(n)) for p, d, f, n in (
        ('learned', 'own', 10.0, [1.0, 3.0]), ('fixed depth', 'max_iter 1', 4.0, [8.0, 8.0]), ('fixed depth', 'max_iter 2', 12.0, [9.0, 9.0]), ('fixed depth', 'max_iter 4', 20.0, [0.0, 2.0]),
        ('random', 'own', 15.0, [2.0, 4.0]), ('random', 0.9, 3.0, [2.0, 4.0]))]
    rows += [{**r, 'model': 'another', 'nll': r['nll'] + (shift := 0.5 * (r['policy'] == 'learned')), 'windows': r['windows'] + shift} for r in rows]
    bench.over_learned(rows)
    for at, want in ((4, 1.5), (10, 1.25)):  # each against its own learned gates
        assert abs(rows[at]['over_learned'] - want) < 1e-12 and rows[at]['over_learned_se'] < 1e-12
    assert not any('over_learned' in r for i, r in enumerate(rows) if i not in (4, 10))


def test_ppl_and_results(tmp_path, capsys):
    adaptive, fixed, vanilla, three, cheap = tiny(torch.float32), tiny(torch.float32, seed=1, halting=False), tiny(torch.float32, seed=2, n_iter=1), tiny(torch.float32, seed=3, halting=False, n_iter=3), tiny(torch.float32, seed=4)
    ckpt, fix, van, thr, che = (bench_run(tmp_path, n, m, tmp_path / 'data') for n, m in (('a.pt', adaptive), ('f.pt', fixed), ('v.pt', vanilla), ('t.pt', three), ('c.pt', cheap)))
    argv = ['ppl', '--ckpt', ckpt, '--fixed', fix, '--vanilla', van, '--others', f'trained with 3={thr}', f'cheap={che}', '--save', 0.2, 0.5, '--eval_tokens', 1000, '--calib_tokens', 400, '--json', tmp_path / 'one.json']
    got, text = run_bench(capsys, *argv)
    adaptive, fixed, vanilla = (m.requires_grad_(False) for m in (adaptive, fixed, vanilla))
    meta = json.loads((tmp_path / 'data' / 'meta.json').read_text())
    x, calib = bench.windows(SimpleNamespace(**{**vars(OPTIONS), 'eval_tokens': 1000, 'calib_tokens': 400}), tmp_path / 'data', adaptive, dict(meta=meta))
    windows = [tuple(w) for w in torch.cat([x, calib]).tolist()]
    assert len(x) == 31 and len(calib) == 12 and len(set(windows)) == 43  # measured on other text than calibrated on
    full = sum(float(fixed.cfg.inference_flops(4, t + 1)) for t in range(32)) / 32
    rows = {(r['model'], r['policy'], r['dial']): r for r in got['rows']}
    own, out = rows['adaptive', 'learned', 'own'], adaptive(x[:, :-1], x[:, 1:])
    spend = sum(float(adaptive.cfg.inference_flops(out.depth[:, t], t + 1).sum()) for t in range(32)) / out.depth.numel()
    assert abs(own['nll'] - float(out.ce_loss)) < 1e-5 and abs(own['saved'] - (1 - spend / full)) < 1e-6 and abs(own['depth'] - float(out.depth.double().mean())) < 1e-9
    for r in got['rows']:
        if r['policy'] != 'fixed depth':
            near = rows.get((r['model'], 'learned', r['dial']), dict(saved=r['dial']))['saved']
            assert abs(r['saved'] - near) < (0.1 if r['policy'] != 'oracle' else 0.3), (r['model'], r['policy'], r['dial'])  # 12 windows set it
    random = rows['adaptive', 'random', 'own']
    assert np.allclose(random['shares'], own['ran'][1:]) and np.allclose(random['ran'], own['ran'], atol=0.05)
    assert rows['fixed', 'confidence', 0.2]['nll'] > 0 and ('fixed', 'random', 0.2) not in rows and ('vanilla', 'fixed depth', 'max_iter 1') in rows
    with_3 = rows['trained with 3', 'fixed depth', 'max_iter 3']
    spend = sum(float(three.cfg.inference_flops(3, t + 1)) for t in range(32)) / 32
    assert abs(with_3['nll'] - three(x[:, :-1], x[:, 1:]).ce_loss.item()) < 1e-5 and abs(with_3['saved'] - (1 - spend / full)) < 1e-9 and ('trained with 3', 'confidence', 0.2) not in rows
    out = cheap(x[:, :-1], x[:, 1:])  # an adaptive one too is measured as it was trained, beside others at its own FLOPs
    assert abs(rows['cheap', 'learned', 'own']['nll'] - out.ce_loss.item()) < 1e-5 and ('cheap', 'random', 'own') in rows and ('cheap', 'learned', 0.2) not in rows
    assert [d['share'] for d in got['runs']['cheap']['by_depth']] == [float((out.depth == d).double().mean()) for d in (1, 2, 3, 4)]
    losses = [float(m(x[:, :-1], x[:, 1:], tau=0.0).ce_loss) for m in (vanilla, fixed)]
    if losses[0] > losses[1]:
        assert abs(own['retained'] - (losses[0] - own['nll']) / (losses[0] - losses[1])) < 1e-3
    else:
        assert 'no gain to keep' in text and 'retained' not in own
    depths = got['runs']['adaptive']['by_depth']
    assert abs(sum(d['share'] for d in depths) - 1) < 1e-9 and abs(sum(d['share'] * d.get('nll', 0) for d in depths) - own['nll']) < 1e-6
    assert got['runs']['adaptive']['train_tokens'] == 10 * 4 * 2 * 32
    other = json.loads(json.dumps(got))
    for r in other['rows']:
        r['nll'] += 0.2
    (tmp_path / 'two.json').write_text(json.dumps(other))
    bench.main(['results', str(tmp_path / 'one.json'), str(tmp_path / 'two.json'), '--out', str(tmp_path / 'assets')])
    group, = json.loads((tmp_path / 'assets' / 'results.json').read_text()).values()
    mean = next(r for r in group['rows'] if (r['model'], r['policy'], r['dial']) == ('adaptive', 'learned', 'own'))['nll']
    assert abs(mean['mean'] - own['nll'] - 0.1) < 1e-9 and abs(mean['sd'] - 0.2 / math.sqrt(2)) < 1e-9 and len(group['seeds']) == 2
    assert [(r['model'], round(r['nll']['mean'] - with_3['nll'], 9)) for r in group['others'] if r['policy'] == 'fixed depth'] == [('trained with 3', 0.1)]
    assert [r['dial'] for r in group['others'] if r['model'] == 'cheap'] == ['own'] and {r['model'] for r in group['by_depth']} == {'adaptive', 'cheap'} == set(group['spearman'])
    assert f'{mean["mean"]:.4f} ± 0.1414' in (tmp_path / 'assets' / 'results.md').read_text()
    assert (tmp_path / 'assets' / 'isoflops.png').exists() == ('no pictures' not in capsys.readouterr().out)


def shape_file(path, **kw):
    """A config file of train.py."""
    path.write_text(''.join(f'{k} = {v!r}\n' for k, v in {**dict(vocab_size=500, block_size=128, n_layer=2, n_head=4, n_embd=64, batch_size=2), **kw}.items()))
    return path


def test_flops_table_equals_the_counter(tmp_path, capsys):
    files = [shape_file(tmp_path / 'a.py'), shape_file(tmp_path / 'b.py', vocab_size=50304, n_embd=32), shape_file(tmp_path / 'c.py', halting=False, n_iter=1)]
    got, text = run_bench(capsys, 'flops', '--config', *files, '--json', tmp_path / 'f.json')
    for c in got['configs']:
        cfg = AdaPonderConfig(**c['config'])
        assert c['parameters'] == sum(p.numel() for p in AdaPonderLM(cfg).parameters())
        assert abs(c['counted']['seen']['products'] / c['counted']['formula']['products'] - 1) < 1e-9
        assert 1 <= c['counted']['seen']['attention'] / c['counted']['formula']['attention'] < 2.1  # whole rectangles of keys
        for r in c['depths']:
            parts = sum(r[k] for k in ('linear', 'attention', 'unembed', 'ponder', 'gates'))
            assert abs(parts / r['total'] - 1) < 1e-12 and r['total'] == cfg.inference_flops(r['depth'], 64.5)
    a, b, c = got['configs']
    assert c['depths'][0]['x_vanilla'] == 1 and a['depths'][0]['total'] > c['depths'][0]['total'] and f'{a["parameters"]:,} parameters' in text
    dense = AdaPonderLM(AdaPonderConfig(**{**c['config'], 'n_iter': 4})).requires_grad_(False)  # from outside: a dense pass, counted
    x = torch.zeros(1, 128, dtype=torch.long)
    assert abs(count_flops(lambda: dense(x, x)) / (128 * float(dense.cfg.inference_flops(4, 128))) - 1) < 1e-9


def test_attention_ways_agree():
    want, *others = [way() for way in bench.attention_ways(AdaPonderConfig(n_embd=64, n_head=4), 300, 0.4, 'cpu', torch.float64).values()]
    assert want.shape == (120, 4, 16) and len(others) == 3 and max((y - want).abs().max() for y in others) < 1e-12


def test_speed_counts_what_it_times(tmp_path, capsys):
    got, text = run_bench(capsys, 'speed', '--config', shape_file(tmp_path / 'a.py'), '--prefill', 100, '--prompt', 7, '--new', 9, '--batch', 1, 3, '--rounds', 1, '--share', 0, 0.5,
                          '--cases', 'prefill', 'attention', 'decode', 'nocache', 'transformers', 'train', '--json', tmp_path / 's.json')
    cfg = AdaPonderConfig(**got['config'])
    fixed = AdaPonderConfig(**{**got['config'], 'halting': False})
    rows = {(r['case'], r['variant']): r for r in got['rows']}
    assert {c for c, _ in rows} == {'prefill 100', 'attention, 0% halted', 'attention, 50% halted', 'one stream', 'batch 3', 'prompt and stream', 'training step 100'} and got['same_as_transformers'] in (None, True)
    head = cfg.flops(0)['unembed']
    depth = AdaPonderLM(cfg)(torch.zeros(1, 100, dtype=torch.long), policy=bench.forced(0.5, 4)).depth[0]
    ours, theirs = (sum(float(c.inference_flops(int(d), t + 1)) - head for t, d in enumerate(ds)) + head for c, ds in ((cfg, depth), (fixed, [4] * 100)))
    assert abs(rows['prefill 100', 'adaptive, 50% halted']['flop_ratio'] / (ours / theirs) - 1) < 1e-9
    tokens = range(8, 17)  # contexts of the tokens that are timed: after the prompt and the first new one
    ds = [int(bench.AdaPonderLM(cfg)(torch.zeros(1, 20, dtype=torch.long), policy=bench.forced(0.5, 4)).depth[0, t - 1]) for t in tokens]
    ratio = sum(float(cfg.inference_flops(d, t)) for d, t in zip(ds, tokens)) / sum(float(fixed.inference_flops(4, t)) for t in tokens)
    assert abs(rows['one stream', 'adaptive, 50% halted']['flop_ratio'] / ratio - 1) < 1e-9
    train_ratio = fixed.inference_flops(4, 50.5) / AdaPonderConfig(**{**got['config'], 'halting': False, 'n_iter': 1}).inference_flops(1, 50.5)
    assert abs(rows['training step 100', 'ours, fixed 4']['flop_ratio'] / train_ratio - 1) < 1e-9
    saved = sum(float(cfg.inference_flops(int(d), 50.5)) for d in depth) / 100 / float(fixed.inference_flops(4, 50.5))
    assert abs(rows['training step 100', 'packed, adaptive, 50% halted']['flop_ratio'] / train_ratio / saved - 1) < 1e-9
    assert all(r['ms_per_token'][0] <= r['ms_per_token'][1] <= r['ms_per_token'][2] for r in got['rows'])
    order = []
    rows = bench.race('case', {n: (lambda n=n: order.append(n) or dict(seconds=dict(A=2.0, B=3.0)[n], tokens=4, flops=dict(A=8.0, B=4.0)[n])) for n in 'AB'}, 2)
    assert order == list('ABABAB') and rows[1]['time_ratio'] == [1.5] * 3 and rows[1]['flop_ratio'] == 0.5 and rows[1]['ms_per_token'] == [750.0] * 3


def test_speed_of_a_checkpoint_on_its_own_text(tmp_path, capsys):
    m = tiny(torch.float32)
    ckpt = bench_run(tmp_path, 'a.pt', m, tmp_path / 'data')
    got, _ = run_bench(capsys, 'speed', '--ckpt', ckpt, '--data', tmp_path / 'data', '--prefill', 24, '--rows', 5, '--prompt', 6, '--new', 4, '--batch', 2, '--rounds', 1, '--share',
                       '--cases', 'prefill', 'decode', '--json', tmp_path / 's.json')
    rows = {(r['case'], r['variant']): r for r in got['rows']}
    assert {v for _, v in rows} == {'fixed', 'fixed, dense', 'fixed, packed', 'adaptive'}
    val = np.fromfile(tmp_path / 'data/val.bin', np.uint16).astype(np.int64)

    def windows(n, length):  # n of them, evenly spread, none of them the first or the last
        starts = np.linspace(0, (len(val) - length) // length - 1, n + 2)[1:-1].round().astype(int) * length
        return torch.tensor(np.stack([val[s:s + length] for s in starts]))
    depth = m(windows(5, 24)).depth
    assert len(set(depth.flatten().tolist())) > 1 and rows['prefill 24', 'adaptive']['depth'] == pytest.approx(float(depth.double().mean()))
    steps = list(m.stream(windows(2, 6).tolist(), 14, temperature=0, slots=2))[2:10]
    assert rows['batch 2', 'adaptive']['depth'] == pytest.approx(sum(s.depth for s in steps) / 8)


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('n_iter, halting', [(1, False), (4, False), (4, True)])
def test_plan_knows_the_peak_of_a_step(n_iter, halting, bf16, remat, monkeypatch):
    """Against the bytes of all live tensors, as torch's profiler saw them come and go."""
    monkeypatch.setattr(AdaPonderLM, 'CHUNK', 2 ** 20)
    cfg = AdaPonderConfig(vocab_size=2000, block_size=256, n_layer=3, n_head=4, n_embd=64, n_iter=n_iter, halting=halting)
    want = sum(bench.at_peak(bench.activation_bytes(cfg, 8 * 256, bf16, remat, cpu=True)).values())
    assert abs(want / bench.measured_peak(cfg, 8, 256, bf16, remat, 'cpu') - 1) < 0.1


def test_plan_arithmetic(tmp_path, capsys):
    file = shape_file(tmp_path / 'a.py', gradient_accumulation_steps=16, max_steps='1M tokens', shard_optimizer=True)
    got, text = run_bench(capsys, 'plan', '--config', file, '--gpu', 'A100', '--gpus', 8, '--mfu', 0.5, '--price', 2, '--json', tmp_path / 'p.json')
    P = sum(p.numel() for p in AdaPonderLM(AdaPonderConfig(**got['config'])).parameters())
    d, L, V, T, K = 64, 2, 500, 128, 4
    steps = round(1e6 / (2 * 128 * 16))
    forward = K * (24 * L * d * d + 4 * L * d * (T + 1) / 2) + (K - 1) * (4 * d * V + 8 * d * d + 8 * d) + 2 * d * V
    assert got['tokens'] == steps * 4096 and got['parameters'] == P and abs(got['forward_flops'] / forward - 1) < 1e-12
    hours = 3 * forward * steps * 4096 / (312e12 * 0.5) / 3600
    assert abs(got['gpu_hours'] / hours - 1) < 1e-9 and abs(got['dollars'] / (2 * hours) - 1) < 1e-9
    assert got['memory']['weights'] == got['memory']['gradients'] == 4 * P and got['memory']['AdamW'] == P and got['memory']['bfloat16 weights'] == 2 * (P - 2 * d * V)
    assert got['peak_memory'] == sum(got['memory'].values()) and 'TOO MUCH' not in text
    big = shape_file(tmp_path / 'b.py', vocab_size=50304, block_size=2048, n_layer=32, n_head=32, n_embd=2560, batch_size=8, gradient_accumulation_steps=7)
    text = run_bench(capsys, 'plan', '--config', big, '--json', tmp_path / 'p.json')[1]
    assert 'TOO MUCH' in text and 'not a multiple of 8' in text


def test_harness_adapter(tmp_path, capsys):
    """Log-likelihoods, rolling windows and generation against direct computations, and against lm-eval's own model where it runs."""
    pytest.importorskip('lm_eval', reason='pip install lm-eval')
    if not (SHARED / 'tokenizers' / 'neox20b_tokenizer.json').exists():
        pytest.skip('needs the GPT-NeoX tokenizer in ../shared')
    from lm_eval.api.instance import Instance
    hf = neox(vocab_size=50304, hidden_size=32, block_size=48, bos_token_id=0, eos_token_id=0)
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    hf.save_pretrained(tmp_path / 'hf')
    shutil.copy(SHARED / 'tokenizers' / 'neox20b_tokenizer.json', tmp_path / 'hf' / 'tokenizer.json')
    (tmp_path / 'hf' / 'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<|endoftext|>', eos_token='<|endoftext|>')))
    model = AdaPonderLM.from_pretrained(tmp_path / 'hf', n_iter=4).requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.proj.weight, std=2.0)
    enc = bench.load_tokenizer(str(tmp_path / 'hf' / 'tokenizer.json'))
    pairs = [('The cat sat on the', ' mat'), ('', 'Once upon a time'), ('one two three four five', ' six  seven eight'), ('word ' * 60, 'end of it'), ('a ', 'b')]
    ask = lambda kind, args: [Instance(kind, {}, x, n) for n, x in enumerate(args)]  # noqa: E731
    rolling, until = [('cat and dog ' * 40,), ('short text',)], [('The cat', dict(until=['.', '\n'], max_gen_toks=9)), ('a dog that', dict(until=[], max_gen_toks=9))]
    for tau, max_iter in ((0.98, None), (None, 1)):
        lm = bench.harness_model(model, enc, SimpleNamespace(**{**vars(OPTIONS), 'tau': tau, 'max_iter': max_iter}))
        got = lm.loglikelihood(ask('loglikelihood', pairs), disable_tqdm=True)
        depths = []
        for (context, continuation), (value, greedy) in zip(pairs, got):
            spaces = len(context) - len(context.rstrip())
            whole = enc.encode_ordinary(context + continuation) if context else [0] + enc.encode_ordinary(continuation)
            n = len(whole) - (len(enc.encode_ordinary(context[:len(context) - spaces])) if context else 1)
            out = model(torch.tensor([whole[-49:-1]]), tau=tau, max_iter=max_iter)
            p, want = out.logits[0, -n:].log_softmax(-1), torch.tensor(whole[-n:])
            assert abs(value - float(p.gather(-1, want[:, None]).sum())) < 1e-3 and greedy == bool((p.argmax(-1) == want).all())
            depths += out.depth[0].tolist()
        assert lm.spent[:2] == [len(depths), sum(depths)] and (max_iter == 1 or len(set(depths)) > 1)
        assert [r[0] for r in lm.loglikelihood(ask('loglikelihood', pairs[:1]), disable_tqdm=True)] == pytest.approx([got[0][0]], abs=1e-3)  # batched or alone
        texts = lm.generate_until(ask('generate_until', until))
        for (context, g), text in zip(until, texts):
            x = torch.tensor([enc.encode_ordinary(context)])
            plain = enc.decode([t for t in model.generate(x, 9, temperature=0, tau=tau, max_iter=max_iter)[0, x.size(1):].tolist() if t < enc.n_vocab])
            assert text == min((plain.split(w)[0] for w in g['until']), key=len, default=plain)
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return  # lm-eval's own model needs accelerate
    theirs = HFLM(pretrained=str(tmp_path / 'hf'), dtype='float32', device='cpu', batch_size=2)
    for a, b in zip(got, theirs.loglikelihood(ask('loglikelihood', pairs), disable_tqdm=True)):
        assert abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]
    assert lm.loglikelihood_rolling(ask('loglikelihood_rolling', rolling)) == pytest.approx(theirs.loglikelihood_rolling(ask('loglikelihood_rolling', rolling), disable_tqdm=True), rel=1e-5)
    assert texts == theirs.generate_until(ask('generate_until', until), disable_tqdm=True)


def test_curves(tmp_path, capsys):
    for name, loss in (('a', 2.5), ('b', 3.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(''.join(json.dumps(dict(step=s, tokens=100 * s, loss=loss / s, depth=4.0, gate_mean=[0.9, 0.8] if s > 1 else [])) + '\n'
                                                   for s in (1, 2)) + json.dumps(dict(step=2, val_loss=loss, val_depth=3.0)) + '\n{"step": 3, "lo')
    got, text = run_bench(capsys, 'curves', tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'c.png', '--json', tmp_path / 'c.json')
    assert got['runs'][str(tmp_path / 'b')]['loss'] == [[1, 3.5], [2, 1.75]] and got['runs'][str(tmp_path / 'a')]['gate_mean'] == [[2, [0.9, 0.8]]]
    line = next(t for t in text.splitlines() if t.startswith(str(tmp_path / 'a')))
    assert line.split()[1:] == ['200', '1.2500', '2.5000', '4.00', '3.00']


def test_bench_refuses_nonsense(tmp_path, capsys):
    ckpt = bench_run(tmp_path, 'a.pt', tiny(torch.float32), tmp_path / 'data')
    other = bench_run(tmp_path, 'o.pt', tiny(torch.float32, block_size=16), tmp_path / 'data')
    vanilla = bench_run(tmp_path, 'v.pt', tiny(torch.float32, n_iter=1), tmp_path / 'data')
    (tmp_path / 'junk.json').write_text('{"a": 1}')
    file = shape_file(tmp_path / 'c.py')
    elsewhere = shape_file(tmp_path / 'd.py', init_from='some/folder')
    for argv, words in [(['ppl', '--ckpt', tmp_path / 'none.pt'], 'no checkpoint at'), (['ppl', '--ckpt', ckpt, '--data', tmp_path], 'no data in'), (['ppl', '--ckpt', ckpt, '--others', 'a.pt'], 'takes NAME=CKPT'), (['ppl', '--ckpt', ckpt, '--fixed', other], 'cannot be compared'),
                        (['results', tmp_path / 'junk.json'], 'was not written by bench.py ppl'), (['flops'], 'give --config or --ckpt'), (['flops', '--config', elsewhere], 'takes its shape from'),
                        (['speed', '--ckpt', vanilla], 'n_iter > 1'), (['speed', '--config', file], 'block_size of at least 1024'), (['plan', '--config', file, '--gpu', 'abacus'], 'unknown GPU'),
                        (['plan', '--config', file, '--mfu', 2], '--mfu in'), (['curves', tmp_path], 'no log at')]:
        with pytest.raises(SystemExit) as e:
            bench.main([str(x) for x in argv])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count('\n') == 1 and 'Traceback' not in err, (argv, err)


def test_readme_quotes_code_that_stands_in_model_py():
    text = (HERE / 'README.md').read_text(encoding='utf-8').split('## The model in ten minutes')[1].split('\n## ')[0]
    code = (HERE / 'model.py').read_text(encoding='utf-8')
    quoted = [line for block in re.findall(r'```python\n(.*?)```', text, re.S) for line in block.splitlines()]
    assert len(quoted) > 4 and [line for line in quoted if line + '\n' not in code] == []
    for name in re.findall(r'`(\w+)\(\)`', text):
        assert f'def {name}(' in code


def test_model_py_works_when_copied_alone(tmp_path):
    """It needs torch and the standard library, and the README's training loop makes tokens halt."""
    top = ast.parse((HERE / 'model.py').read_text(encoding='utf-8')).body
    names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in top if isinstance(n, ast.ImportFrom)]
    assert {name.split('.')[0] for name in names} <= {'torch', *sys.stdlib_module_names}
    shutil.copy(HERE / 'model.py', tmp_path)
    section = (HERE / 'README.md').read_text(encoding='utf-8').split('Copy model.py')[1]
    loop = re.search(r'```python\n(.*?)```', section, re.S)[1]
    begin = 'import torch\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\n'
    end = """
import json
with torch.no_grad():
    depth = model(text[:6400].view(100, 64)).depth
result = dict(loss=out.ce_loss.item(), depth=torch.bincount(depth.flatten(), minlength=5).tolist())
print(json.dumps({**result, 'generated': list(model.generate(text[None, :5], 5).shape)}))
"""
    command = [sys.executable, '-c', begin + loop + end]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    share = sum(n * (4 - d) for d, n in enumerate(result['depth']) if d) / (3 * 6400)
    assert result['loss'] < 3.0 and result['generated'] == [1, 10]
    assert 0.05 < share < 0.4 and sum(n > 60 for n in result['depth']) > 1, result['depth']
