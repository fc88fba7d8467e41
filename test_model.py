"""
Every claim of this project, held against an independent computation. Run: python -m pytest -q test_model.py

Tests that compare with transformers or tokenizers, or want the files in ../shared, are skipped without them.
"""
import base64
import contextlib
import gzip
import hashlib
import html
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
import tempfile
import time
import urllib.error
import warnings
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as model_py
import prepare_data
import sample as sample_py
import train
from model import AdaPonderConfig, AdaPonderLM, load_checkpoint, sample
from prepare_data import EOT
from sample import CONTROL, stream

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared'
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


def refuses(words, call, *args, **kw):
    """call(*args, **kw) raises one sentence for the user, with these words (a regular expression) in it."""
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as e:
        call(*args, **kw)
    assert re.search(words, str(e.value)) and '\n' not in str(e.value), str(e.value)


def fails(error):
    """A function that raises this error, whatever it is called with."""
    def call(*args, **kw):
        raise error
    return call


def write_files(folder, files):
    """name -> bytes, text, or what is to be written as JSON. Returns the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = data if isinstance(data, (str, bytes)) else json.dumps(data)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def subprocess_env(**kw):
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE), **{k: str(v) for k, v in kw.items()}}


def contents(folder):
    """Name -> bytes of all files of a folder and those below it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# model.py against a naive reference: one token at a time, in float64, without torch's attention, masks or caches

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()
PAPER, SAVES = dict(objective='paper'), dict(objective='saving', tau=0.3)


@torch.no_grad()
def tiny(dtype=torch.float64, seed=0, device='cpu', **kw):
    """A small model whose gates really halt: about a third of the tokens at each gate."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, block_size=32, n_layer=2, n_head=4, n_embd=32, rotary_pct=0.5)
    model = AdaPonderLM(AdaPonderConfig(**{**shape, **kw})).double()
    for name, p in model.named_parameters():  # away from the zeros and ones of the initialisation
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0 if 'ln' in name and 'weight' in name else 0.0, std=0.1)
    for gate in model.gates:
        torch.nn.init.normal_(gate.proj.weight, std=2.0)
    tokens = torch.randint(model.cfg.vocab_size, (8, model.cfg.block_size))
    for i, gate in enumerate(model.gates):  # the lower third of its values comes under tau
        s = model(tokens, tau=0.0).gates[..., i]
        gate.proj.bias += math.log(model.cfg.tau / (1 - model.cfg.tau)) - s.logit().quantile(0.33)
    return model.to(device, dtype)


def random_tokens(*shape, seed=0, device='cpu', vocab=61):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_policy(rate):
    """A halting policy that depends on (iteration, row, position) alone, so that every execution meets the same one."""
    return lambda i, s, h, row, pos: (row * 7919 + pos * 104729 + i * 1299709) % 1009 >= rate * 1009


def naive(model, tokens, row=0, policy=None, tau=None, max_iter=None, halting=True):
    """The method written out for one sequence, with the keywords of the model.

    Returns logits (T, vocab), depth (T,), gates (T, n_iter - 1) with 0 once a token has halted, and the pool of the
    paper's loss: gates with a halted token's later ones on its last state.
    """
    cfg, w = model.cfg, {name: p.detach().double().cpu().numpy() for name, p in model.named_parameters()}
    T, n_head, head_size, K = len(tokens), cfg.n_head, cfg.n_embd // cfg.n_head, cfg.n_iter
    scale, rot = math.sqrt(cfg.n_embd) if cfg.scale_embeds else 1.0, int(head_size * cfg.rotary_pct)

    def linear(x, name):
        return w[name + '.weight'] @ x + w[name + '.bias']

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + cfg.norm_eps) * w[name + '.weight'] + w[name + '.bias']

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    def mlp(x, name):
        x = linear(x, name + '.fc')
        return linear(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), name + '.proj')

    def rotate(x, t):  # dimensions j and j + rot / 2 are the two parts of a complex number
        angle = t * cfg.rotary_base ** (-2 * np.arange(rot // 2) / rot)
        z = (x[:rot // 2] + 1j * x[rot // 2:rot]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag, x[rot:]])

    def gate(i, h):
        return 1 / (1 + math.exp(-mlp(h, f'gates.{i}')[0])) if model.gates and halting else 1.0

    def ponder(h):
        h = h * w.get('ln_ponder.weight', 1.0) + w.get('ln_ponder.bias', 0.0)
        return h if cfg.feedback == 'hidden' else softmax(w['unembed.weight'] @ h) @ w['embed.weight'] * scale

    E = w['embed.weight'][tokens] * scale * (K - 1 if cfg.multiply_pondering_steps and K > 1 else 1)
    active, depth, h, gates = np.ones(T, bool), np.zeros(T, int), np.zeros_like(E), np.zeros((T, K - 1))
    keys, values = np.zeros((2, cfg.n_layer, n_head, T, head_size))  # overwritten by each iteration that a token runs
    for i in range(max_iter or K):
        for t in np.flatnonzero(active):
            x = E[t]
            for l in range(cfg.n_layer):
                qkv, y = linear(norm(x, f'blocks.{l}.ln_1'), f'blocks.{l}.attn.qkv').reshape(n_head, 3, head_size), []
                for j, (q, k, v) in enumerate(qkv):
                    keys[l, j, t], values[l, j, t] = rotate(k, t), v
                    scores = keys[l, j, :t + 1] @ rotate(q, t) / math.sqrt(head_size)
                    y.append(softmax(scores) @ values[l, j, :t + 1])
                attention = linear(np.concatenate(y), f'blocks.{l}.attn.proj')
                x = x + attention + mlp(norm(x, f'blocks.{l}.ln_2'), f'blocks.{l}.mlp')
            h[t], depth[t] = norm(x, 'ln_f'), i + 1
            if i + 1 < (max_iter or K):
                s = gates[t, i] = gate(i, h[t])
                active[t] = policy(i, s, h[t], row, t) if policy else s >= (tau or cfg.tau)
                if active[t]:
                    E[t] += (s if cfg.objective == 'paper' else 1.0) * ponder(h[t])
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


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('precision', ['float64', 'float32', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('kw', [
    SAVES, PAPER, dict(halting=False), dict(scale_embeds=False, rotary_pct=0.25, n_iter=3), dict(feedback='hidden'),
    dict(ponder_norm=True, **PAPER), dict(ponder_norm=True, feedback='hidden', **SAVES),
    dict(multiply_pondering_steps=True, rotary_pct=0.0, gate_width=0.3), dict(multiply_pondering_steps=True, n_iter=1),
    dict(multiply_pondering_steps=True, ponder_norm=True, halting=False, n_iter=3)])
@torch.no_grad()
def test_three_executions_equal_the_naive_reference(kw, precision, device):
    """With learned gates, random policies, and each argument of the halting decision."""
    torch.set_float32_matmul_precision('highest')  # no TF32
    bound = dict(float64=1e-10, float32=1e-4 if device == 'cpu' else 1e-3).get(precision, 0.1)
    m = tiny(getattr(torch, precision.replace('autocast', 'float32')), device=device, **kw)
    x = random_tokens(2, 12, seed=5, device=device)
    ways = [dict(policy=random_policy(0.3)), dict(halting=False)]
    if bound < 0.1:  # else rounding decides which side of the threshold a gate is on
        ways += [{}, dict(tau=0.5), dict(max_iter=min(2, m.cfg.n_iter)),
                 dict(policy=lambda i, s, h, row, pos: h[..., 0] > 0),
                 dict(policy=lambda i, s, h, row, pos: s == 1, halting=False)]
    for way in ways:
        with torch.autocast(device, torch.bfloat16, enabled=precision == 'autocast'):
            outs = [m(x, **way), m(x, execution='packed', **way), cached(m, x, 5, **way)]
        for b in range(2):
            logits, depth, gates, _ = naive(m, x[b].tolist(), b, **way)
            assert len(set(depth)) > 1 or not m.gates or way not in ({}, ways[0])  # some tokens halt, some do not
            for out in outs:
                assert out.depth[b].tolist() == depth.tolist()
                assert np.abs(out.logits[b].cpu().double().numpy() - logits).max() < bound
                assert np.abs(out.gates[b].cpu().double().numpy() - gates).max(initial=0) < bound


@pytest.mark.parametrize('kw', [PAPER, SAVES])
def test_all_tokens_may_halt_at_once(kw):
    m, x = tiny(vocab_size=50304, n_layer=1, n_embd=16, **kw), random_tokens(2, 5)

    def halt(i, s, h, row, pos):
        return torch.zeros_like(s, dtype=torch.bool)
    for execution, grad, y in itertools.product(('dense', 'packed'), (True, False), (x, torch.full_like(x, -100))):
        with torch.set_grad_enabled(grad):
            out = m(x, y, execution=execution, policy=halt, k=0.5)
        assert (out.depth == 1).all() and len(out.records) == 1 and torch.isfinite(out.loss)
        if grad:
            out.loss.backward()
    assert (cached(m, x, 2, policy=halt).depth == 1).all()


def test_initialisation():
    """PonderLM's. Gates start open and equal for all tokens; the backbone is the same with and without them."""
    cfg = AdaPonderConfig(vocab_size=3000, n_layer=3, n_head=4, n_embd=128, gate_bias=2.5, ponder_norm=True)
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
    assert (m(random_tokens(2, 8)).gates - 1 / (1 + math.exp(-2.5))).abs().max() < 1e-6
    assert not list(AdaPonderLM(replace(cfg, n_iter=1)).ln_ponder.parameters())  # one iteration hands on nothing


# losses and gradients

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kw', [PAPER, dict(ponder_norm=True, early_ce=0.2, **PAPER), dict(feedback='hidden', **SAVES),
                                dict(ponder_norm=True, early_ce=0.2, **SAVES)])
def test_gradients_are_finite_differences_on_every_execution(kw, device):
    m = tiny(device=device, **kw)
    x, y = random_tokens(2, 2, 24, seed=7, device=device)
    y[1, :5] = -100
    parameters = list(m.parameters())

    def loss(ponder_lambda=0.5, execution='dense'):
        out = m(x, y, execution=execution, k=0.37, ponder_lambda=ponder_lambda)
        assert {1, 4} <= set(out.depth.flatten().tolist())
        return out.loss

    def gradients(**kw):
        return torch.autograd.grad(loss(**kw), parameters, materialize_grads=True)
    want, chunks = gradients(), m.chunks
    for m.remat, m.chunks in ((False, chunks), (True, chunks), (False, lambda h: 5)):  # 5: a few tokens at a time
        for execution in ('dense', 'packed'):
            torch.testing.assert_close(gradients(execution=execution), want, rtol=0, atol=1e-10)

    # a predicted saving is a number to learn, whose slope is not followed
    ponder_lambda = 0.5 if m.cfg.objective == 'paper' else 0.0
    direction, ends = [torch.randn_like(p) for p in parameters], []
    slope = sum((g * d).sum() for g, d in zip(gradients(ponder_lambda=ponder_lambda), direction))
    for eps in (1e-7, -2e-7):  # small: the k smallest values may not change between the ends
        for p, d in zip(parameters, direction):
            p.data += eps * d
        ends.append(loss(ponder_lambda))
    assert abs((ends[0] - ends[1]) / 2e-7 - slope) < 1e-5 * abs(slope)


@pytest.mark.parametrize('k', [0.9, 0.605, 0.1])
@torch.no_grad()
def test_paper_loss_is_the_mean_of_the_smallest(k):
    """Of all gate values: a halted token's later gates count with the state it halted with."""
    m, x = tiny(**PAPER), random_tokens(2, 16, seed=4)
    for rate, execution in itertools.product((0.0, 0.3, 1.0), ('dense', 'packed')):
        policy = random_policy(rate)
        smallest = np.sort([naive(m, x[b].tolist(), b, policy)[3] for b in range(2)], axis=None)
        n = k * len(smallest)
        want = (smallest[:int(n)].sum() + smallest[int(n)] * (n - int(n))) / n
        out = m(x, x, k=k, policy=policy, execution=execution, ponder_lambda=0.7)
        assert abs(out.ponder_loss - want) < 1e-12 and abs(out.loss - out.ce_loss - 0.7 * want) < 1e-12
    assert m(x, x, k=0.0).ponder_loss == 0 and m(x, x, k=k, halting=False).ponder_loss == 0


@pytest.mark.parametrize('execution', ['dense', 'packed'])
@pytest.mark.parametrize('kw', [{}, dict(feedback='hidden'), dict(ponder_norm=True)])
def test_savings_and_early_ce_are_those_of_runs_that_stop_early(kw, execution):
    """Saved: (what a token would have lost after an iteration - what it lost) / iterations that it made since."""
    m = tiny(early_ce=0.3, **kw, **SAVES)
    m.unembed.weight.data *= 20  # so that some savings are over 1 nat, where they are cut
    x, y = random_tokens(2, 2, 20, seed=5)
    y[0, 3], y[1, 7] = -1, -100

    def policy(i, s, h, row, pos):
        return (s >= 0.3) | (pos % 5 == 0)  # some go on whatever their gates say

    @torch.no_grad()
    def nll(max_iter=None):
        logits = m(x, policy=policy, max_iter=max_iter).logits
        return F.cross_entropy(logits.transpose(1, 2), y.clamp(min=0), reduction='none') * (y >= 0)
    out = m(x, y, execution=execution, policy=policy, ponder_lambda=0.7)
    assert {1, 2, 3, 4} == set(out.depth.flatten().tolist())
    loss, ponder_loss, savings = nll().sum() / 38, 0, []
    for i in range(3):
        early, went_on = nll(max_iter=i + 1), (out.depth > i + 1) & (y >= 0)
        loss = loss + 0.3 * early[out.depth > i].sum() / 38
        savings.append(((early - nll()) / (out.depth - i - 1))[went_on])
        saved, s = savings[-1].clamp(-1, 1), out.gates[..., i][went_on].clamp(1e-7, 1 - 1e-7)
        ponder_loss = ponder_loss - (saved * s.log() + (1 - saved) * (1 - s).log()).mean()
    assert torch.cat(savings).max() > 1 and torch.cat(savings).min() < -1
    assert (out.nll - nll()).abs().max() < 1e-10 and abs(out.ce_loss - nll().sum() / 38) < 1e-10
    assert abs(out.ponder_loss - ponder_loss) < 1e-9 and abs(out.loss - loss - 0.7 * ponder_loss) < 1e-9
    out.ponder_loss.backward()
    for name, p in m.named_parameters():  # the gates learn from it, and nothing else
        assert (p.grad is not None and p.grad.abs().max() > 0) == name.startswith('gates.'), name


# products with the vocabulary

def states(N, U):
    """(N, d): one that is sure of its token, one that is sure of the last one, and others that are not sure."""
    h = torch.randn(N, U.size(1), generator=torch.Generator().manual_seed(12), dtype=torch.float64).to(U)
    h[0] *= 2000
    h[1] = 300 * U[-1]
    return h.requires_grad_()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('ponder_norm', [False, True])
@pytest.mark.parametrize('vocab, N, chunks', [
    (61, 30, 1), (61, 30, 4), (40000, 70, 1)])  # at once; by torch's attention; logits recomputed in backward
def test_pondering_embedding_and_its_gradients(vocab, N, chunks, ponder_norm, device):
    m = tiny(n_layer=1, n_embd=16, vocab_size=vocab, ponder_norm=ponder_norm, halting=False, device=device)
    m.chunks = lambda h: chunks
    U, E = m.unembed.weight, m.embed.weight
    h = states(N, U.detach())
    message = h * m.ln_ponder.weight + m.ln_ponder.bias if ponder_norm else h
    plain = (message @ U.t()).softmax(-1) @ E * 4
    ours, inputs = m.ponder(h), [h, U, E, *m.ln_ponder.parameters()]
    assert (ours - plain).abs().max() < 1e-10
    g = torch.randn_like(ours)
    want, got = (torch.autograd.grad((out * g).sum(), inputs) for out in (plain, ours))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    with torch.no_grad():
        for n in (1, 2, 64, N):  # those of a decoding step on a CPU go in parts
            assert (m.ponder(h[:n]) - plain[:n]).abs().max() < 1e-10
            assert (m.unembed(h[:n]) - h[:n] @ U.t()).abs().max() < 1e-10


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('chunks, frozen', [(1, False), (3, False), (3, True), (30, False)])
def test_cross_entropy_and_its_gradients(chunks, frozen, device):
    U = torch.randn(61, 16, generator=torch.Generator().manual_seed(13), dtype=torch.float64).to(device)
    h, targets = states(30, U), random_tokens(30, device=device)
    targets[3], targets[4] = -1, -100
    inputs = [h] if frozen else [h, U.requires_grad_()]
    plain = F.cross_entropy(h @ U.t(), targets.clamp(min=0), reduction='none') * (targets >= 0)
    total, nll = model_py.CrossEntropy.apply(h, U, targets, chunks)
    assert (nll - plain).abs().max() < 1e-10 and abs(total - plain.sum()) < 1e-9 and not nll.requires_grad
    want = torch.autograd.grad(3 * plain.sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(3 * total, inputs), want, rtol=0, atol=1e-9)
    for autocast, bound in ((False, 1e-4), (True, 0.05)):
        low = [x.detach().float().requires_grad_() for x in (h[2:], U)]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            total, nll = model_py.CrossEntropy.apply(*low, targets[2:], chunks)
        assert nll.dtype == torch.float32 and (nll - plain[2:]).abs().max() < bound * 3
        assert (torch.autograd.grad(total, low)[0] - want[0][2:] / 3).abs().max() < bound * 10


# generation

def engine_runs(m, prompts, new, **kw):
    """The Steps that the batch engine makes for each prompt."""
    made = [[] for _ in prompts]
    for step in stream(m, prompts, new, **kw):
        made[step.seq].append(step)
    return made


def of_prompt(policy, n):
    """For the model, whose rows start at 0: the policy as the engine asks it, where a prompt's row is its number n."""
    return policy and (lambda i, s, h, row, pos: policy(i, s, h, row + n, pos))


@pytest.mark.parametrize('kw', [dict(temperature=0), dict(top_k=20, top_p=0.8), dict(policy=random_policy(0.5)),
                                dict(max_iter=3), dict(tau=0.5, temperature=0.7)])
@pytest.mark.parametrize('config', [{}, dict(ponder_norm=True, **SAVES), dict(feedback='hidden'), dict(halting=False)])
def test_batch_engine_equals_one_at_a_time(config, kw):
    m = tiny(torch.float64, block_size=40, **config)
    lengths, new = (1, 3, 60, 7, 2, 30, 12), [5, 0, 20, 1, 45, 3, 9]  # one prompt is longer than the context
    prompts, policy = [random_tokens(n, seed=n).tolist() for n in lengths], kw.get('policy')

    def run(slots, **more):
        generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
        runs = engine_runs(m, prompts, new, slots=slots, generator=generators, **kw, **more)
        return [[(s.token, s.depth, [round(gate, 9) for gate in s.gates]) for s in steps] for steps in runs]
    runs = run(1)
    assert runs == run(3) == run(32)  # depths and gates too
    assert tuple(map(len, prompts)) == lengths  # the caller's lists are left alone
    assert len({depth for steps in runs for _, depth, _ in steps}) > 1 or not (policy or m.cfg.halting)
    made = [[token for token, _, _ in steps] for steps in runs]
    for n, p in enumerate(prompts):
        alone = {**kw, 'policy': of_prompt(policy, n)}
        want = m.generate(torch.tensor([p]), new[n], generator=torch.Generator().manual_seed(n), **alone)
        assert made[n] == want[0, len(p):].tolist()
    stop = made[4][10]  # it ends a sequence, and is yielded
    ends = [(tokens + [stop]).index(stop) + 1 for tokens in made]
    assert run(3, stop_token=stop) == [steps[:end] for steps, end in zip(runs, ends)]


@pytest.mark.parametrize('config', [PAPER, SAVES, dict(feedback='hidden'), dict(halting=False)])
@pytest.mark.parametrize('autocast, bound', [(False, 1e-5), (True, 0.05)])
def test_engine_says_what_the_network_says(config, autocast, bound):
    """Each Step's depth, gates and NLL are those of the whole sequence; under autocast to bfloat16's three digits."""
    m = tiny(torch.float32 if autocast else torch.float64, block_size=64, **config)
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, 9, 5)]
    policy = random_policy(0.5) if autocast and m.gates else None  # a rounding error may flip a gate
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        made = engine_runs(m, prompts, 12, temperature=0.5, slots=2, policy=policy)
    for n, (prompt, steps) in enumerate(zip(prompts, made)):
        text = torch.tensor([prompt + [step.token for step in steps]])
        out = m(text[:, :-1], text[:, 1:], policy=of_prompt(policy, n))
        depth, nll, gates = (x[0, len(prompt) - 1:].tolist() for x in (out.depth, out.nll, out.gates))
        assert [step.depth for step in steps] == depth
        assert [step.nll for step in steps] == pytest.approx(nll, abs=bound)
        for step, row in zip(steps, gates):
            assert step.gates == pytest.approx(row[:min(step.depth, 3)], abs=bound)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('config', [PAPER, dict(vocab_size=64, ponder_norm=True, **SAVES), dict(halting=False)])
@pytest.mark.parametrize('draw, halt', [
    (dict(temperature=0), {}), (dict(top_k=20, top_p=0.9), {}), (dict(temperature=0.7), dict(max_iter=2)),
    ({}, dict(tau=0.5)), ({}, dict(policy=random_policy(0.5)))])
@torch.no_grad()
def test_generate_is_the_same_with_a_cache_and_without(draw, halt, config, device):
    """Also where the 51 tokens outgrow the context of 32: its start moves on by 16."""
    m, x = tiny(device=device, **config), random_tokens(2, 15, seed=8, device=device)
    got = m.generate(x, 36, generator=torch.Generator().manual_seed(1), **draw, **halt)
    for execution in ('dense', 'packed'):
        text, generator = x, torch.Generator().manual_seed(1)
        for n in range(15, 51):
            start = 0 if n <= 32 else 16 if n <= 48 else 32
            logits = m(text[:, start:], execution=execution, **halt).logits[:, -1]
            token = sample(logits, torch.rand(2, generator=generator), **draw)
            text = torch.cat([text, token[:, None]], dim=1)
        assert torch.equal(got, text)
    assert tiny(block_size=1).window(5) == 4  # the shortest context moves on by one


def test_sample_draws_from_the_right_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    u = (torch.arange(10000) + 0.5) / 10000
    for kw, allowed in [(dict(), range(5)), (dict(top_k=2), (2, 3)), (dict(top_p=0.7), (2, 3)), (dict(top_p=0.5), (3,)),
                        (dict(temperature=2.0, top_k=9, top_p=1.0), range(5)), (dict(top_k=1), (3,)),
                        (dict(temperature=1e-300), (3,)), (dict(temperature=0), (3,))]:
        got = torch.bincount(sample(logits.expand(10000, -1), u, **kw), minlength=5) / 10000
        p = ((logits[0].double() - 3) / (kw.get('temperature') or 1.0)).exp()
        p *= torch.tensor([j in allowed for j in range(5)])
        assert (got - p / p.sum()).abs().max() < 2e-4, kw
    assert sample(torch.zeros(1, 2), torch.tensor([1 - 1e-12], dtype=torch.float64)) == 1  # in float32 this u is 1
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match='not finite'):
            sample(torch.tensor([[0.0, bad]]), u[:1], temperature=0.5)


# FLOPs

def count_flops(fn):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        fn()  # attention as matrix products, since the counter does not know the CPU's kernel
    return counter.get_total_flops()


@pytest.mark.parametrize('kw', [dict(vocab_size=500, n_embd=64), dict(vocab_size=20000, gate_width=0.25),
                                dict(halting=False), dict(feedback='hidden', n_iter=3), dict(n_iter=1)])
@torch.no_grad()
def test_flop_formula_equals_the_counter(kw):
    m = tiny(torch.float32, block_size=200, **kw)
    cfg, x = m.cfg, random_tokens(1, 200, seed=10)
    for halt in (dict(tau=0.0), dict(policy=random_policy(0.5))):
        depth = m(x, **halt).depth[0]
        # attention is counted apart: the first iteration computes all pairs of a query and a key, and so do the others
        # where no token can halt; else they go by runs of 128 queries, with the keys up to the last of these
        pairs = 200 * 200
        for i in range(1, int(depth.max())):
            active = (depth > i).nonzero()[:, 0].tolist()
            if not cfg.halting and 'policy' not in halt:
                pairs += 200 * 200
            else:
                pairs += sum(len(run) * (max(run, default=0) + 1) for run in (active[:128], active[128:]))
        want = cfg.n_layer * 4 * pairs * cfg.n_embd + sum(cfg.inference_flops(n, 0) for n in depth.tolist())
        assert count_flops(lambda: m(x, x, execution='packed', **halt)) == want

    cache = m.new_cache(1, 101)
    m.prefill(x[:, :100], cache)
    for n in range(1, cfg.n_iter + 1):
        for halt in (dict(tau=0.0, max_iter=n), dict(policy=lambda i, s, h, row, pos: row + n > i + 1)):
            got = count_flops(lambda: m.unembed(m.decode(x[:, 100:101], cache, 100, **halt).hidden[:, -1]))
            assert got == cfg.inference_flops(n, 101, halt.get('max_iter'))


# the schedule of training with gates

def grid(rows, columns):
    """The row and the position of each of rows x columns tokens."""
    return torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')


def test_hash_uniform_is_uniform_and_uncorrelated():
    row, pos = grid(256, 256)
    u = model_py.hash_uniform(row, pos)
    bound = 1 / math.sqrt(u.numel())
    assert 0 <= u.min() and u.max() < 1 and u[3, 5] == model_py.hash_uniform(torch.tensor(3), torch.tensor(5))
    assert (u.flatten().sort().values - torch.linspace(0, 1, u.numel())).abs().max() < 2.5 * bound  # Kolmogorov-Smirnov
    others = [u[:, 1:], u[1:], model_py.hash_uniform(row, pos, 1), model_py.hash_uniform(row, pos, -7), u.t(), row, pos]
    for other in others:
        a = u[:other.size(0), :other.size(1)]
        off = a != other  # the transposed one has the same diagonal
        assert abs(torch.corrcoef(torch.stack([a[off], other[off]]))[0, 1]) < 5 * bound


def schedule_of(objective='saving', cfg={}, **kw):
    cfg = AdaPonderConfig(61, 64, 1, 2, 16, objective=objective, **cfg)
    return model_py.HaltingSchedule(cfg, max_steps=1000, start=100, full=300, k_max=0.2, **kw)


def test_schedule_forces_fewer_and_fewer_tokens():
    """The share falls from 1 to `explore`, then to 0, while k rises as r (2 - r). For 'paper' none is forced."""
    row, pos = grid(200, 500)
    for alone, expected in [
            (0, {0: (0, 1), 100: (0, 1), 200: (0.15, 0.55), 300: (0.2, 0.1), 650: (0.2, 0.05), 1000: (0.2, 0)}),
            (100, {200: (0, 1), 250: (0.15, 0.55), 300: (0.2, 0.1)})]:
        schedule = schedule_of(gates_alone=alone, explore=0.1)
        for step, (k, share) in expected.items():
            assert abs(schedule.k(step) - k) < 1e-12
            assert abs(schedule.forced(step, row, pos).float().mean() - share) < 0.008
    forced = schedule.forced(250, row, pos)
    for other in (schedule.forced(251, row, pos), schedule.forced(250, row, pos, 1),
                  schedule_of(gates_alone=100, explore=0.1, seed=1).forced(250, row, pos)):
        assert abs((other & forced).float().mean() - 0.55 ** 2) < 0.01  # others in each step, micro-batch and run
    paper = schedule_of('paper', gates_alone=50, ponder_lambda=0.3)
    for step, halting, k in ((99, False, 0.0), (100, True, 0.0), (150, True, 0.05), (300, True, 0.2)):
        assert paper.at(step) == dict(halting=halting, k=pytest.approx(k), ponder_lambda=0.3)
        assert not paper.forced(step, row, pos).any()
    paper.update(500, halted=0.9)
    assert paper.cfg.tau == 1e-4  # only savings move it
    default = model_py.HaltingSchedule(paper.cfg, 400)
    assert (default.start, default.full) == (40, 100)
    assert schedule_of(cfg=dict(halting=False)).at(500) == schedule_of(cfg=dict(n_iter=1)).at(500) == {}


def test_schedule_moves_tau_to_the_share_that_shall_halt():
    schedule = schedule_of(explore=0.5, cfg=dict(tau=0.01))
    depth = torch.randint(1, 5, (4, 50), generator=torch.Generator().manual_seed(1))
    for step, micro in ((300, 0), (500, 2)):
        free = depth[~schedule.forced(step, *grid(4, 50), micro)]
        want = (4 - free).sum() / (3 * len(free))
        assert 50 < len(free) < 180 and abs(schedule.halted(step, depth, micro) - want) < 1e-6
    assert schedule.halted(0, depth) == 0  # all are forced, none is free
    tau = 0.01 * math.exp(0.2 - float(schedule.halted(300, depth)))
    for step, kw, want in [  # at step 99 gates do not act yet
            (99, dict(halted=0.5), 0.01), (300, dict(depth=depth), tau), (300, dict(halted=0.05), tau * math.exp(0.15)),
            (300, dict(halted=-99.0), 0.999), (300, dict(halted=99.0), 1e-6)]:
        schedule.update(step, **kw)
        assert schedule.cfg.tau == pytest.approx(want, rel=1e-9)


# sample.py

def run_sample(capsys, *args):
    capsys.readouterr()
    sample_py.main([str(a) for a in args])
    return capsys.readouterr()


def save_ckpt(model, path, tokenizer='bytes', /, **more):
    """A checkpoint as train.py writes it. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    enc = prepare_data.load_tokenizer(tokenizer, path.parent)
    meta = dict(tokenizer=tokenizer, tokenizer_sha256=enc.sha256, vocab_size=enc.n_vocab, eot=enc._special_tokens[EOT])
    state = dict(adaponder=1, config=asdict(model.cfg), model=model.state_dict(), meta=meta)
    torch.save({**state, **more}, path)
    return path


@pytest.fixture(scope='module')
def ckpt(tmp_path_factory):
    """A random byte model that halts, with a context of 64."""
    model = tiny(torch.float32, vocab_size=320, block_size=64)
    model.unembed.weight.data *= 3
    return save_ckpt(model, tmp_path_factory.mktemp('ckpt') / 'run' / 'ckpt.pt')


PROMPT = 'tab\there <b>é漢😀</b> &amp;\r\n\x1b[31m'  # 38 bytes


def page_tokens(path):
    """(text, classes, tip) of each token of a page that sample.py wrote."""
    page = path.read_text(encoding='utf-8')
    spans = re.findall(r'<span class="(t [^"<>]*)" tabindex="0" data-tip="([^"<>]*)">([^<>]*)</span>', page)
    return [(html.unescape(text), names.split(), html.unescape(tip)) for names, tip, text in spans]


@pytest.mark.parametrize('max_iter', [4, 2])
def test_sample_prints_what_the_engine_makes(ckpt, capsys, max_iter):
    """And the FLOPs of each token at its own context, which moves on by 32 when its 64 tokens are full."""
    m, generator = AdaPonderLM.from_checkpoint(ckpt), torch.Generator().manual_seed(5)
    steps = list(stream(m, [list(PROMPT.encode())], 30, 0.8, generator=generator, max_iter=max_iter))
    shown = [bytes([s.token]) if s.token < 256 else EOT.encode() for s in steps if s.token <= 256]
    want, flops, fixed = b''.join(shown).decode(errors='replace'), 0, 0
    for n, s in enumerate(steps, 38):
        f = m.cfg.flops(n if n <= 64 else n - 32)
        gates = s.depth - (s.depth == max_iter)
        flops += s.depth * (f['linear'] + f['attention']) + (s.depth - 1) * f['ponder'] + f['unembed']
        flops += gates * f['gate']
        fixed += 4 * (f['linear'] + f['attention']) + 3 * f['ponder'] + f['unembed']  # fixed depth has no gates
    args = ('--prompt', PROMPT, '--max_new_tokens', 30, '--ignore_eot', '--max_iter', max_iter)
    got = run_sample(capsys, '--ckpt', ckpt, *args, '--seed', 5)
    assert got.out == PROMPT + want + '\n' and '�' in want
    assert re.match(rf'30 tokens, \d+ tokens/s, mean depth {sum(s.depth for s in steps) / 30:.2f} of 4, ', got.err)
    assert f'{1 - flops / fixed:.1%} of the FLOPs of fixed depth 4 saved' in got.err
    # a run's folder will do, and sample n has seed + n
    other = run_sample(capsys, '--ckpt', ckpt.parent, *args, '--seed', 4, '--num_samples', 2).out
    assert other.endswith('-' * 20 + '\n' + PROMPT + want + '\n') and other.count(want) == 1


def test_pieces_show_split_characters_as_one():
    ranks = {**{bytes([b]): b for b in range(256)}, b' \xe2': 256, b'\x80\x9c"': 257}
    enc = tiktoken.Encoding('t', pat_str=r'[\s\S]+', mergeable_ranks=ranks, special_tokens={EOT: 258})

    def pieces(tokens):
        steps = [sample_py.Step(0, t, 1, [], 0.0) for t in tokens]
        return [(text, [s.token for s in group]) for text, group in sample_py.pieces(enc, steps)]
    assert pieces([97, 256, 257, 258, 300]) == [('a', [97]), (' “"', [256, 257]), (EOT, [258]), ('', [300])]
    rng = random.Random(0)
    for _ in range(300):  # any bytes come out as decode() has them, and a piece is a character or a broken one
        tokens = [b for _ in range(8) for b in rng.choice('aé漢😀').encode()[:rng.randint(1, 4)]]
        got = pieces(tokens)
        assert ''.join(t for t, _ in got) == bytes(tokens).decode(errors='replace')
        assert sum((g for _, g in got), []) == tokens
        assert all(len(t.encode()) <= 4 or '�' in t for t, _ in got)


def test_depth_view(ckpt, capsys):
    m = AdaPonderLM.from_checkpoint(ckpt)
    depth = [None] + m(torch.tensor([list(PROMPT.encode())])).depth[0].tolist()  # a position's is spent on the next
    text = run_sample(capsys, '--ckpt', ckpt, '--prompt', PROMPT, '--max_new_tokens', 0, '--depth').out
    legend, _, body = text.partition('\n\n')
    styles = [style for style, d in re.findall(r'\x1b\[([\d;]+)m (\d) \x1b', legend)]
    assert len(set(styles)) == 4 and all(style.startswith('0;38;5;16;48;5;') for style in styles)  # black on a colour
    painted = re.findall(r'\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m(\n?)', body)
    want = PROMPT.replace('\t', '    ').replace('\r\n', r'\x0d↵' + '\n').replace('\x1b', r'\x1b') + '\n'
    assert want == ''.join(shown + end for _, shown, end in painted) == re.sub(r'\x1b\[[\d;]*m', '', body)
    for c, (style, _, _) in zip(PROMPT, painted):
        of_bytes, depth = depth[:len(c.encode())], depth[len(c.encode()):]
        d = max((d for d in of_bytes if d), default=None)
        assert style == ('1' if d is None else '1' + styles[d - 1][1:])  # bold


def test_page_is_self_contained_and_escaped(ckpt, tmp_path, capsys):
    path = tmp_path / 'p.html'
    got = run_sample(capsys, '--ckpt', ckpt, '--prompt', PROMPT, '--max_new_tokens', 30, '--num_samples', 2,
                     '--html', path, '--ignore_eot')
    text, tokens = path.read_text(encoding='utf-8'), page_tokens(path)
    assert not re.search(r'https?:|//|url\(|\bsrc=|@import|<link|<script', text) and not CONTROL.search(text)
    body = re.sub(r'<span [^<>]*>[^<>]*</span>', '', text[text.index('<pre>'):])  # no tags but those of tokens
    assert re.fullmatch(r'(<pre></pre>\s*){2}</body></html>\s*', body)
    shown = ''.join(got.out[:-1].split('\n' + '-' * 20 + '\n'))
    assert ''.join(t for t, _, _ in tokens) == CONTROL.sub(lambda c: f'\\x{ord(c[0]):02x}', shown)
    assert [t for t, names, _ in tokens if 'prompt' in names] == 2 * [t for t, _, _ in tokens[:len(PROMPT)]]

    ids = torch.tensor([list(PROMPT.encode())])
    out = AdaPonderLM.from_checkpoint(ckpt)(ids[:, :-1], ids[:, 1:])
    d, nll = int(out.depth[0, -1]), float(out.nll[0, -1])
    gates = ', '.join(f'{s:.2g}' for s in out.gates[0, -1, :d].tolist())
    tip = f'depth {d} of 4, NLL {nll:.2f} nats (probability {math.exp(-nll):.2g}), gates {gates}'
    assert tokens[len(PROMPT) - 1] == ('m', ['t', f'd{d}', 'prompt'], f'"m", in the prompt\ntoken 109: {tip}')
    assert tokens[0][2].endswith('nothing predicted it')


def test_prompts_file_keeps_order_keys_and_text(ckpt, tmp_path, capsys):
    prompts = {'longer first': 70, 'b': 3, 'c\u2028漢\n': 9, 'e': 0}
    jobs = [dict(prompt=p, max_new_tokens=n, note='\ud800' if n > 3 else 'é') for p, n in prompts.items()]
    lines = [json.dumps(j).replace(r'\u2028', '\u2028') for j in jobs]  # U+2028 is no line end in JSON
    write_files(tmp_path, {'in.jsonl': '\ufeff' + '\n\n'.join(lines) + '\r\n'})
    args, outs = ('--ckpt', ckpt, '--ignore_eot'), []
    for batch in (1, 3):
        got = run_sample(capsys, *args, '--prompts', tmp_path / 'in.jsonl', '--batch', batch)
        outs.append([json.loads(line) for line in got.out.split('\n') if line])
        assert '82/82' in got.err and '82 tokens' in got.err
    assert outs[0] == outs[1] and [{k: r[k] for k in jobs[0]} for r in outs[0]] == jobs
    assert [r['tokens'] for r in outs[0]] == [70, 3, 9, 0]
    assert outs[0][3]['mean_depth'] is None and 1 <= outs[0][0]['mean_depth'] <= 4
    for n, r in enumerate(outs[0]):  # each as if it were alone
        alone = run_sample(capsys, *args, '--prompt', r['prompt'], '--max_new_tokens', r['tokens'], '--seed', 1337 + n)
        assert alone.out == r['prompt'] + r['completion'] + '\n'
    run_sample(capsys, *args, '--prompts', tmp_path / 'in.jsonl', '--out', tmp_path / 'out.jsonl')
    text = (tmp_path / 'out.jsonl').read_text(encoding='utf-8')
    assert [json.loads(line) for line in text.split('\n') if line] == outs[0]


def test_end_of_text_ends_a_sample(tmp_path, capsys):
    m = tiny(torch.float32, vocab_size=320)
    m.unembed.weight.data[256] = 10 * m.ln_f.bias.data / m.ln_f.bias.norm() ** 2  # <|endoftext|> after everything
    m.ln_f.weight.data *= 0.01
    args = ('--ckpt', save_ckpt(m, tmp_path / 'ckpt.pt'), '--max_new_tokens', 2)
    assert run_sample(capsys, *args, '--prompt', 'a').out == 'a\n'
    assert run_sample(capsys, *args, '--prompt', 'a', '--ignore_eot').out == 'a' + EOT * 2 + '\n'
    write_files(tmp_path, {'in': {'prompt': 'a'}})
    line = json.loads(run_sample(capsys, *args, '--prompts', tmp_path / 'in').out)
    assert (line['completion'], line['tokens']) == ('', 1)


@pytest.mark.parametrize('args', [['--prompt', PROMPT], ['--prompt_file', '~/p'], []])
def test_prompt_is_exact_whatever_the_locale(ckpt, tmp_path, args):
    (tmp_path / 'p').write_bytes(b'\xef\xbb\xbf' + PROMPT.encode())  # with a byte order mark
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'HOME': str(tmp_path)}
    command = [sys.executable, HERE / 'sample.py', '--ckpt', ckpt, '--max_new_tokens', '0', *args]
    out = subprocess.run(command, cwd=tmp_path, env=env, input=PROMPT.encode(), capture_output=True)
    assert out.stdout == (PROMPT + '\n').encode().replace(b'\n', os.linesep.encode()) and out.returncode == 0


def test_a_prompt_longer_than_the_context_is_cropped_with_a_word(ckpt, capsys):
    text, args = 'abcdefghij' * 10, ('--ckpt', ckpt, '--ignore_eot', '--max_new_tokens', 9)
    got = run_sample(capsys, *args, '--prompt', text)
    assert '100 tokens' in got.err and 'last 64' in got.err
    assert got.out == run_sample(capsys, *args, '--prompt', text[36:]).out


def test_a_saved_folder_is_sampled_with_its_own_tokenizer(tmp_path, capsys):
    """What save_pretrained() wrote of a run with a tokenizer file, with meta.json beside it."""
    pytest.importorskip('transformers')
    write_ranks(tmp_path / 'tokenizer.tiktoken', small_ranks())
    path = save_ckpt(tiny(torch.float32, vocab_size=320), tmp_path / 'ckpt.pt', 'tokenizer.tiktoken')
    write_files(tmp_path, {'meta.json': load_checkpoint(path)['meta']})
    AdaPonderLM.from_checkpoint(path).save_pretrained(tmp_path / 'folder')
    a, b = (run_sample(capsys, '--ckpt', p, '--prompt', PROMPT).out for p in (path, tmp_path / 'folder'))
    assert a == b


@pytest.mark.parametrize('args, words', [
    ('--prompt ', 'the prompt is empty'), ('--prompt \udcff', 'the prompt is not UTF-8 text'),
    ('--prompt_file none', 'No such file'), ('--prompt_file latin', 'latin is not UTF-8 text'),
    ('--ckpt none.pt', 'no checkpoint at none.pt'), ('--ckpt latin', 'not a readable checkpoint'),
    ('--ckpt .', 'holds neither'), ('--ckpt other.pt', 'other.pt is a checkpoint of another project'),
    ('--ckpt no_meta.pt', 'names no tokenizer'), ('--ckpt list_meta.pt', 'damaged'), ('--ckpt run/no', 'there is no'),
    ('--ckpt ./no/run', 'there is no'), ('--ckpt /no/run', 'there is no'), ('--ckpt no_embed.pt', 'of another version'),
    ('--ckpt narrow.pt', 'token 120, outside the vocabulary of 100'), ('--temperature nan', 'temperature must be'),
    ('--tau 1', 'tau must be in'), ('--max_iter 5', 'max_iter must be 1 to n_iter = 4'), ('--seed -1', 'seed in'),
    ('--max_new_tokens -1', 'at least 0'), ('--num_samples 0', 'at least 1'), (f'--seed {2 ** 70}', 'seed in'),
    ('--device nonsense', 'nonsense'), ('--html no/p.html', 'no/p.html cannot be written'),
    ('--out x', '--out is for --prompts'), ('--prompts bad --out no/where', 'cannot be written'),
    ('--prompts bad --depth', 'for a single prompt'), ('--prompts none', 'No such file'),
    ('--prompts bad', 'bad, line 2: not a JSON object'), ('--prompts deep', 'deep, line 1: not a JSON'),
    ('--prompts negative', 'negative, line 1: not a JSON'), ('--prompts empty', 'prompt 1 is empty'),
    ('--prompts surrogate', 'surrogate, line 1: not a JSON')])
def test_sample_refuses_nonsense(ckpt, tmp_path, monkeypatch, args, words):
    """And leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    m = tiny(torch.float32, vocab_size=320)
    weights = {name: p for name, p in m.state_dict().items() if 'embed' not in name}
    for name, more in (('no_meta', dict(meta=None)), ('list_meta', dict(meta=[1])), ('no_embed', dict(model=weights))):
        save_ckpt(m, tmp_path / f'{name}.pt', **more)
    save_ckpt(tiny(torch.float32, vocab_size=100), tmp_path / 'narrow.pt')
    torch.save({'model': {}}, 'other.pt')
    write_files(tmp_path, {
        'latin': b'caf\xe9', 'bad': '{"prompt": "x"}\n["prompt"]', 'empty': {'prompt': ''}, 'run/x': '',
        'deep': '{"prompt": "x", "list": ' + '[' * 10 ** 5 + ']' * 10 ** 5 + '}',
        'negative': {'prompt': 'x', 'max_new_tokens': -1}, 'surrogate': {'prompt': '\ud800'}})
    before, args = contents(tmp_path), args.split(' ')
    if '--ckpt' not in args:
        args += ['--ckpt', str(ckpt)]
    if not args[0].startswith('--prompt'):
        args += ['--prompt', 'x']
    refuses(words, sample_py.main, args)
    assert contents(tmp_path) == before


@pytest.mark.parametrize('end, results', [('closed pipe', [(1, 0)]), ('Ctrl-C', [(130, 1)]),
                                          ('Ctrl-C at once', [(-signal.SIGINT, 0), (130, 1)])])
def test_sample_ends_quietly(ckpt, end, results):
    """(exit code, lines on stderr) of a run that would never end, and shows text before it ends."""
    command = [sys.executable, HERE / 'sample.py', '--ckpt', ckpt, '--prompt', 'x', '--ignore_eot']
    command += ['--max_new_tokens', '1' * 9]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a child in the background ignores it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        if end == 'Ctrl-C at once':
            time.sleep(0.5)  # during the imports
        else:
            assert len(run.stdout.read(30)) == 30
        run.stdout.close() if end == 'closed pipe' else run.send_signal(signal.SIGINT)
        code, err = run.wait(300), run.stderr.read().decode()
    assert (code, err.count('\n')) in results and 'Traceback' not in err


# public implementations

def neox(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, block_size=64, seed=0, **kw):
    """A GPTNeoXForCausalLM of transformers with random weights."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(seed)
    hf = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads, intermediate_size=4 * hidden_size, max_position_embeddings=block_size,
        **kw)).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.08)
    return hf


def edit_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    write_files(folder, {'config.json': {**config, **changes}})


@torch.no_grad()
def ponderlm(hf, x, n_iter, scale, first=1.0):
    """Section 1 of PonderLM, with transformers' GPT-NeoX as the backbone: logits (B, T, vocab)."""
    V = hf.get_input_embeddings().weight * scale
    E = first * V[x]
    for _ in range(n_iter):
        logits = hf.get_output_embeddings()(hf.gpt_neox(inputs_embeds=E).last_hidden_state)
        E = E + logits.softmax(-1) @ V
    return logits


@pytest.mark.parametrize('scale_embeds', [False, True])
@pytest.mark.parametrize('multiply', [False, True])
def test_fixed_depth_is_ponderlm_around_gpt_neox(tmp_path, scale_embeds, multiply):
    """PonderLM's keys in config.json decide everything, the multiplier of E^0 included."""
    hf = neox().double()
    hf.save_pretrained(tmp_path)
    keys = dict(pondering_steps=3, scale_embeds=scale_embeds, mutiply_pondering_steps=multiply)
    edit_config(tmp_path, ponderinglm=True, **keys)
    x = torch.randint(96, (2, 40))
    m = AdaPonderLM.from_pretrained(tmp_path, halting=False, dtype=torch.float64)
    want = ponderlm(hf, x, 4, 8.0 if scale_embeds else 1.0, 3.0 if multiply else 1.0)
    assert m.cfg.n_iter == 4 and (m(x).logits - want).abs().max() < 1e-6  # transformers' rotary tables are float32
    m.save_pretrained(tmp_path / 'again')  # the keys are written too
    again = AdaPonderLM.from_pretrained(tmp_path / 'again', dtype=torch.float64)
    assert again.cfg == m.cfg and torch.equal(again(x).logits, m(x).logits)
    edit_config(tmp_path, ponderinglm=False)
    assert AdaPonderLM.from_pretrained(tmp_path).cfg.n_iter == 1


# the head sizes of Pythia 14M and 31M; 70M, 160M and 410M; 2.8B; 1.4B, 6.9B and 12B; 1B
@pytest.mark.parametrize('head_size, rotary_pct', [
    (32, 0.25), (64, 0.25), (80, 0.25), (128, 0.25), (256, 0.25), (24, 1.0)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_iteration_is_gpt_neox(tmp_path, head_size, rotary_pct, dtype):
    hf = neox(hidden_size=2 * head_size, num_attention_heads=2, rotary_pct=rotary_pct).to(dtype)
    hf.gpt_neox.embed_in.weight.data *= 30  # a residual stream much larger than a block's output, as after training
    hf.save_pretrained(tmp_path)
    x = torch.randint(96, (2, 60), generator=torch.Generator().manual_seed(1))
    m = AdaPonderLM.from_pretrained(tmp_path, n_iter=1, dtype=dtype)
    assert m.cfg.rotary_pct == rotary_pct
    with torch.no_grad():
        got, want = m(x).logits.float(), hf(x).logits.float()
        if dtype == torch.float32:
            assert (got - want).abs().max() < 1e-4
            greedy = hf.generate(x[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=40, do_sample=False,
                                 eos_token_id=None, pad_token_id=0)
            assert torch.equal(m.generate(x[:1, :8], 40, temperature=0), greedy)
        else:  # as near to the same weights in float64 as transformers is
            exact = AdaPonderLM.from_pretrained(tmp_path, n_iter=1, dtype=torch.float64)(x).logits
            assert (got - exact).pow(2).mean() < 1.1 * (want - exact).pow(2).mean() < 0.01 * exact.var()


@pytest.mark.parametrize('form', ['safetensors', 'shards', 'bin'])
@torch.no_grad()
def test_every_form_of_a_folder_loads(tmp_path, form):
    """bin: as transformers 4 wrote it, and PonderLM: other names, rotary settings and tensors."""
    hf, x = neox(rotary_pct=0.5, layer_norm_eps=1e-4), torch.randint(96, (2, 40))
    if form == 'bin':
        hf.config.save_pretrained(tmp_path)
        edit_config(tmp_path, rope_parameters=None, rope_scaling=None, rotary_pct=0.5, rotary_emb_base=10000)
        state = {n.replace('lm_head.', 'embed_out.'): t for n, t in hf.state_dict().items()}
        state['gpt_neox.layers.0.attention.rotary_emb.inv_freq'] = torch.ones(2)
        torch.save({**state, 'adapter.weight': torch.ones(64, 64)}, tmp_path / 'pytorch_model.bin')
    else:
        hf.save_pretrained(tmp_path, max_shard_size='100KB' if form == 'shards' else '5GB')
        assert (len(list(tmp_path.glob('*.safetensors'))) > 1) == (form == 'shards')
    m = AdaPonderLM.from_pretrained(tmp_path)
    assert (m.cfg.n_iter, m.cfg.halting, m.cfg.scale_embeds, m.cfg.block_size) == (4, True, False, 64)
    assert (m(x, max_iter=1).logits - hf(x).logits).abs().max() < 1e-4
    assert all((gate(torch.randn(5, 64)) > 0.9).all() and gate.fc.weight.std() > 0.01 for gate in m.gates)  # open
    rope = dict(rope_type='default', rope_theta=6000.0, partial_rotary_factor=0.5)
    for keys, base in ((dict(rope_parameters=rope), 6000), (dict(rope_parameters=None, rotary_emb_base=5000), 5000)):
        edit_config(tmp_path, **keys)
        assert AdaPonderLM.from_pretrained(tmp_path).cfg.rotary_base == base


@pytest.mark.parametrize('dtype, kw', [
    (torch.float32, dict(gate_width=0.5)), (torch.bfloat16, dict(n_iter=3, tau=0.01, rotary_pct=0.25, norm_eps=1e-6)),
    (torch.float64, dict(halting=False, rotary_base=5000.0)), (torch.bfloat16, dict(ponder_norm=True, halting=False)),
    (torch.float32, dict(n_iter=1, scale_embeds=False, feedback='hidden', objective='paper', gate_bias=2.0)),
    (torch.float32, dict(multiply_pondering_steps=True, early_ce=0.5, ponder_norm=True))])
def test_save_pretrained_keeps_every_bit(tmp_path, monkeypatch, dtype, kw):
    """Weights, gates, settings and tokenizer; transformers reads the backbone; a failure leaves what was there."""
    transformers = pytest.importorskip('transformers')
    m, out = tiny(torch.float64, **kw).to(dtype), tmp_path / 'out'
    m.tokenizer_files = [write_files(tmp_path, {'meta.json': {}}) / 'meta.json']
    tiny(torch.float32, n_layer=3, ponder_norm=True).save_pretrained(out)  # what an earlier save left
    before = contents(out)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(model_py.shutil, 'copyfile', fails(OSError(28, 'No space left on device')))
        m.save_pretrained(out)
    assert contents(out) == before
    m.save_pretrained(out)
    back, state = AdaPonderLM.from_pretrained(out, dtype=dtype), m.state_dict()
    assert back.cfg == m.cfg and list(back.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) and t.dtype == dtype for n, t in back.state_dict().items())
    assert back.tokenizer_files == [out / 'meta.json']
    assert (out / 'gates.safetensors').exists() == bool(m.gates or kw.get('ponder_norm'))
    hf = transformers.GPTNeoXForCausalLM.from_pretrained(out, dtype='auto')
    assert hf.dtype == dtype and hf.config.layer_norm_eps == m.cfg.norm_eps
    assert all(torch.equal(state[model_py.hf_to_ours(n)], t) for n, t in hf.state_dict().items())
    if m.gates:  # the same network at fixed depth, with more iterations, and with fewer
        fixed = AdaPonderLM.from_pretrained(out, dtype=dtype, halting=False).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in fixed.items()) and not any('gates' in n for n in fixed)
        more = AdaPonderLM.from_pretrained(out, n_iter=6, dtype=dtype)
        assert torch.equal(more.gates[1].proj.weight, m.gates[1].proj.weight) and not more.gates[4].proj.weight.any()
        fewer = AdaPonderLM.from_pretrained(out, n_iter=2)
        assert len(fewer.gates) == 1 and torch.equal(fewer.gates[0].proj.weight, m.gates[0].proj.weight)


@pytest.mark.parametrize('change, word', [
    (dict(model_type='llama'), 'model_type'), (dict(use_parallel_residual=False), 'use_parallel_residual'),
    (dict(hidden_act='gelu_new'), 'hidden_act'), (dict(rope_parameters=dict(type='linear', factor=2.0)), 'linear'),
    (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4)), 'yarn'), (dict(intermediate_size=1), 'intermediate'),
    (dict(tie_word_embeddings=True), 'tie_word_embeddings'), (dict(attention_bias=False), 'attention_bias'),
    (dict(quantization_config=dict(bits=4)), 'quantization_config'), (dict(num_attention_heads=5), 'n_head'),
    (dict(hidden_size='64'), 'hidden_size|intermediate_size|n_embd'), (dict(adaponder=dict(later=1)), 'later'),
    (dict(num_hidden_layers=3), 'layers.2'), (dict(vocab_size=128), 'embed')])
def test_what_the_model_cannot_represent_is_refused_by_name(tmp_path, change, word):
    neox().save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    refuses(word, AdaPonderLM.from_pretrained, tmp_path)


def test_damaged_folders_are_refused(tmp_path, monkeypatch):
    safetensors, load = pytest.importorskip('safetensors.torch'), AdaPonderLM.from_pretrained
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    refuses('config.json|not', load, tmp_path / 'nowhere')
    tiny(torch.float32).save_pretrained(tmp_path)
    refuses('n_iters', load, tmp_path, n_iters=3)
    refuses('gates', load, tmp_path, gate_width=0.5)  # the gates in the folder are wider
    gates = safetensors.load_file(tmp_path / 'gates.safetensors')
    del gates['gates.1.proj.weight']
    safetensors.save_file(gates, tmp_path / 'gates.safetensors')
    refuses('gates.1.proj.weight', load, tmp_path)
    write_files(tmp_path, {'model.safetensors': b'junk'})
    refuses('cannot be loaded', load, tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    refuses('cannot be loaded', load, tmp_path)
    torch.save(tiny, tmp_path / 'pytorch_model.bin')  # a pickled function: not loaded, let alone called
    refuses('cannot be loaded', load, tmp_path)
    write_files(tmp_path, {'config.json': '{'})
    refuses('cannot be loaded', load, tmp_path)


def test_sampling_a_pythia_folder_with_its_tokenizer(tmp_path, capsys):
    """`sample.py --ckpt FOLDER` of a vanilla model is transformers' greedy continuation."""
    tokenizers, spec = pytest.importorskip('tokenizers'), shared('neox20b_tokenizer.json')
    hf = neox(vocab_size=50304, hidden_size=32)
    hf.save_pretrained(tmp_path)
    shutil.copy(spec, tmp_path / 'tokenizer.json')
    theirs, text = tokenizers.Tokenizer.from_file(str(spec)), 'The   naïve “pile” 漢'
    ids = torch.tensor([theirs.encode(text).ids])
    want = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None,
                       pad_token_id=0)[0].tolist()
    got = run_sample(capsys, '--ckpt', tmp_path, '--prompt', text, '--max_new_tokens', 20, '--temperature', 0,
                     '--ignore_eot')
    assert got.out == theirs.decode(want, skip_special_tokens=False) + '\n' and 'mean depth 1.00 of 1' in got.err


# prepare_data.py

def nasty(rng, n):
    """n characters or a few more of text that tokenizers get wrong."""
    blocks = [(0x300, 0x36F), (0x5B0, 0x5C5), (0x653, 0x655), (0x93C, 0x94D), (0x1AB0, 0x1ACE), (0x20D0, 0x20F0),
              (0x1D165, 0x1D172), (0x1E130, 0x1E136)]
    marks = [chr(c) for block in blocks for c in range(*block)] + [*'\u09be\u0dcf\u102e\u3099\u0f71']
    letters = [*'aeiouyAENnÅqක가각Αωшдالאבཀﬁ\u212b豈\U0002f80f', *map(chr, range(0x1100, 0x1120))]
    blanks = [*' \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u180e\u200b\ufeff', '  ', '\n\n', ' ' * 30]
    words = ('<|endoftext|> <|padding|> <|unk|> <|endof text|> <| |> <|endoftext| 0x1F 3.14159 ２０２４ ½Ⅷ² !!! ... '
             "#$% _a_b ĠĊ \x01 \x7f the Fox función 日本語 русский العربية if x: aaaa ab 👍🏽 🇩🇪 ❤️ 1️⃣ I'll 'S "
             "'tis").split(' ')
    text, size = [], 0
    while size < n:
        any_character = chr(max(1, rng.randrange(0x110000) >> rng.randrange(14)))
        any_character = any_character.encode(errors='ignore').decode()  # no surrogates
        letter = rng.choice(letters) + ''.join(rng.choices(marks, k=rng.randint(0, 4)))
        text.append(rng.choice([any_character, letter, ''.join(rng.choices(blanks, k=rng.randint(1, 12))),
                                rng.choice(['', ' ', '\n']) + rng.choice(words)]))
        size += len(text[-1])
    return ''.join(text)


def small_ranks():
    """256 bytes and some merges."""
    words = [b'th', b'the', b' the', b'er', b'in', b'  ', b'    ', b'\n\n', b' a', b'oo', b'\xe2\x80', b'\xcc\x81',
             b'e\xcc\x81', b'\xc3\xa9', b"'l", b"'ll"]
    return {t: i for i, t in enumerate([bytes([b]) for b in range(256)] + words)}


def write_ranks(path, ranks):
    path.write_bytes(b''.join(base64.b64encode(t) + b' %d\n' % i for t, i in ranks.items()))
    return path


def write_tokenizer_json(path, rank_file, **changes):
    """A tokenizer.json of GPT-2's form with the tokens of a rank file."""
    tokenizers = pytest.importorskip('tokenizers')
    converter = pytest.importorskip('transformers.convert_slow_tokenizer').TikTokenConverter
    tokenizer = converter(vocab_file=str(rank_file)).converted()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([EOT])
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}), encoding='utf-8')
    return path


def shared(name):
    path = SHARED / 'tokenizers' / name
    return path if path.is_file() else pytest.skip(f'{path} is not there')


def split_texts(folder):
    """The documents of train and of val, decoded, in order; the files are checked against meta.json."""
    meta, splits = train.load_meta(folder), []
    enc = prepare_data.load_tokenizer(meta, folder)
    for split in ('train', 'val'):
        file, = meta[split]['files']
        data = (folder / file['name']).read_bytes()
        tokens = np.frombuffer(data, meta['dtype'])
        assert hashlib.sha256(data).hexdigest() == file['sha256']
        assert len(tokens) == file['tokens'] == meta[split]['tokens'] and tokens[-1] == meta['eot']
        documents = np.split(tokens, np.flatnonzero(tokens == meta['eot']) + 1)[:-1]
        assert len(documents) == meta[split]['documents']
        splits.append([enc.decode(document[:-1].tolist()) for document in documents])
    return splits


def some_texts(n, seed=0):
    rng = random.Random(seed)
    return [f'{i} ' + nasty(rng, rng.choice([1, 30, 300])) for i in range(n)]


def write_jsonl(path, texts):
    """Every other line in ASCII, and an empty line now and then."""
    lines = [json.dumps({'text': t, 'meta': {'n': i}}, ensure_ascii=bool(i % 2)) for i, t in enumerate(texts)]
    path.write_text(''.join(line + '\n' * (1 + i % 3 // 2) for i, line in enumerate(lines)), encoding='utf-8')
    return path


@pytest.mark.parametrize('body, code, err', [
    ('raise p.UsageError("bad \\udcff é, do this")', 2, 'x.py: bad \\udcff é, do this\n'),
    ('open("none")', 2, "x.py: [Errno 2] No such file or directory: 'none'\n"),
    ('raise KeyboardInterrupt', 130, 'interrupted\n'), ('print("é \\udcff")', 0, ''), ('{}[1]', 1, 'KeyError: 1\n'),
    ('raise RuntimeError("can\'t allocate memory: 9 bytes")', 2, 'x.py: there is too little memory, ask for less at a '
     "time (can't allocate memory: 9 bytes)\n"), ('raise RuntimeError("bug")', 1, 'RuntimeError: bug\n'),
    ('raise RuntimeError("an illegal memory access")', 1, 'RuntimeError: an illegal memory access\n')])
def test_command_line(tmp_path, body, code, err):
    write_files(tmp_path, {'x.py': f'import prepare_data as p\ndef main():\n    {body}\np.command_line(main)'})
    for closed in ('', '<&-', '>&-', '2>&-'):
        done = subprocess.run(f'"{sys.executable}" x.py {closed}', shell=True, cwd=tmp_path, capture_output=True,
                              env=subprocess_env(PYTHONIOENCODING='ascii:strict'))
        text = '' if closed == '2>&-' else err
        assert done.returncode == code and done.stderr.decode().endswith(text)
        assert closed == '2>&-' or ('Traceback' in done.stderr.decode()) == (code == 1)


def test_files_appear_whole_and_only_where_they_can(tmp_path, monkeypatch):
    check, write = prepare_data.check_writable, prepare_data.write_beside
    write_files(tmp_path, {'x.test': 'of the user'})
    check(tmp_path / 'x')
    assert contents(tmp_path) == {'x.test': b'of the user'}
    write(tmp_path / 'x', b'old')
    for path, words in ((tmp_path, 'folder'), (tmp_path / 'no' / 'x', 'cannot be written'), ('/dev/null', 'device'),
                        (tmp_path / ('x' * 300), 'cannot be written'), (tmp_path / 'x' / 'y', 'cannot be written')):
        refuses(words, check, path)
    monkeypatch.setattr(os, 'replace', fails(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        write(tmp_path / 'x', b'new')
    assert contents(tmp_path) == {'x.test': b'of the user', 'x': b'old'}


def test_one_process_a_folder(tmp_path, monkeypatch, capsys):
    """A second preparation of the same folder is refused while the first runs, and leaves its files alone."""
    fcntl, out = pytest.importorskip('fcntl'), tmp_path / 'out'
    sources = [write_files(tmp_path / 'in', {'a.txt': 'some words ' * 50})]
    work = write_files(out / prepare_data.UNFINISHED, {'lock': ''})
    with prepare_data.lock(work):
        refuses('another process', prepare_data.prepare, sources, out)
    prepare_data.prepare(sources, out)
    assert sorted(contents(out)) == ['meta.json', 'train.bin', 'val.bin']
    monkeypatch.setattr(fcntl, 'flock', fails(OSError(38, 'Function not implemented')))
    with prepare_data.lock(tmp_path):
        assert 'no locks' in capsys.readouterr().err


def test_gpt2_ranks_are_gpt2(tmp_path, monkeypatch):
    """A rank file, by tiktoken, and a tokenizer.json made of it, by `tokenizers`: two programs, the same tokens."""
    enc = prepare_data.load_tokenizer(shared('gpt2.tiktoken'))
    published = [15496, 11, 995, 0, 1279, 91, 437, 1659, 5239, 91, 29]
    assert enc.encode_ordinary('Hello, world! <|endoftext|>') == published and enc.n_vocab == 50257
    other = prepare_data.load_tokenizer(write_tokenizer_json(tmp_path / 'x.json', shared('gpt2.tiktoken')))
    assert other.n_vocab == enc.n_vocab and other.eot_token == enc.eot_token == 50256
    blanks = ['x' + ' ' * 1_000_000 + 'y', '\n' * 1_000_000 + ' \u3000y', '\t ' * 500_000, '\x1c' * 200_000 + ' a']
    for text in [nasty(random.Random(i), 2000) for i in range(20)] + blanks:
        ids = enc.encode_ordinary(text)
        assert ids == other.encode_ordinary(text)
        assert enc.decode(ids) == other.decode(ids) == text
    monkeypatch.setattr(prepare_data, 'LONG_BLANKS', re.compile(r'[^\S\x1c-\x1f]{3,}'))  # every run taken out
    text = nasty(random.Random(1), 150_000)
    assert enc.encode_ordinary(text) == other.encode_ordinary(text)
    # another pattern, on which tiktoken would overflow
    bare = tiktoken.Encoding('other', pat_str=r'\s+|\S+', mergeable_ranks=enc._mergeable_ranks, special_tokens={})
    path = write_files(tmp_path, {'x.txt': blanks[0]}) / 'x.txt'
    refuses('x.txt has 100,000 blanks', list, prepare_data.read_batches([(path, True, 0, 0)], bare, 0.1, []))


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
    for ids in [hf.encode(w).ids for w in ('naïve', ' 日本', '      x', '<|padding|>')]:
        assert b''.join(map(enc.decode_single_token_bytes, ids)).decode() == hf.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize('vocab, dtype', [(2**16, 'uint16'), (2**16 + 1, 'uint32')])
def test_dtype_holds_the_vocabulary(tmp_path, vocab, dtype):
    words = (bytes(w) for w in itertools.product(range(97, 123), repeat=4))
    ranks = {bytes([b]): b for b in range(256)} | dict(zip(words, range(256, vocab - 1)))
    text = nasty(random.Random(7), 500) + ('\n' + list(ranks)[-1].decode()) * 1000
    path = write_ranks(write_files(tmp_path, {'x.txt': text}) / 'big.tiktoken', ranks)
    meta = prepare_data.prepare([tmp_path / 'x.txt'], tmp_path / 'out', path)
    assert (meta['dtype'], meta['vocab_size'], meta['eot']) == (dtype, vocab, vocab - 1)
    assert vocab - 2 in np.fromfile(tmp_path / 'out' / 'train.bin', dtype)
    (train_text,), (val_text,) = split_texts(tmp_path / 'out')
    assert train_text + val_text == text


def packed(data, packing):
    if packing == '.zst':  # two frames, one behind the other, with checksums
        compressor = pytest.importorskip('zstandard').ZstdCompressor(write_checksum=True)
        half = len(data) // 2
        return compressor.compress(data[:half]) + compressor.compress(data[half:])
    return gzip.compress(data) if packing == '.gz' else data


def archive(form):
    """The bytes of an archive of a text file."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_files(Path(folder) / 'in', {'a.txt': 'a text file\n' * 300})
        return Path(shutil.make_archive(f'{folder}/x', form, source)).read_bytes()


@pytest.mark.parametrize('form', ['txt', 'txt.gz', 'txt.zst', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'hf'])
def test_every_form_of_input_gives_the_same_documents(tmp_path, monkeypatch, capsys, form):
    """Order kept, empty documents and byte order marks left out, half surrogates replaced, foreign files skipped."""
    texts = [*some_texts(40), '', 'ends with <|endoftext|>', 'no newline\r\n\r\n', 'half \ud800 a pair']
    whole = [t.replace('\ud800', '\ufffd') for t in texts if t]
    folder, sources, packing, skipped = tmp_path / 'in', [tmp_path / 'in'], Path(form).suffix, 0
    if form.startswith('txt'):
        for i, text in enumerate(whole):
            data = (b'\xef\xbb\xbf' if i % 3 else b'') + text.encode()
            write_files(folder, {f'{i:03d}.{"txt" if i % 2 else "py"}{packing}': packed(data, packing)})
        write_files(folder, {'.hidden': 'hidden', 'no.txt': '', 'x.png': b'\x89PNG\r\n', 'tokens.bin': b'a\0b\0',
                             'x.tar.gz': archive('gztar'), '__pycache__/x.txt': 'cache'})
        skipped = 3
        if sys.platform == 'linux':
            write_files(folder, {os.fsdecode(b'z\xe9.png'): b'\xff'})  # a name that is not UTF-8
            skipped = 4
    elif form.startswith('jsonl'):
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

        def load_dataset(name, config, split, streaming):
            return rows[name, config, split, streaming]
        monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=load_dataset))
        sources = ['hf:a/b:c']
    prepare_data.prepare(sources, tmp_path / 'out', val_fraction=0.3)

    def for_validation(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') < 0.3 * 2**64
    val = [t for t in whole if for_validation(t)]
    assert split_texts(tmp_path / 'out') == [[t for t in whole if t not in val], val] and 3 < len(val) < 25
    assert (f'skipped {skipped} files' in capsys.readouterr().out) == (skipped > 0)


def test_a_very_long_text_is_several_documents(tmp_path, monkeypatch):
    """It is cut at the ends of lines; a text without lines at twice the length at most."""
    monkeypatch.setattr(prepare_data, 'LONGEST', 100)
    monkeypatch.setattr(prepare_data, 'BATCH', 300)
    texts = ['\ufeff' + 'é\r\n' * 40, 'x' * 500, ''.join(f'line {i}\n' for i in range(300)), 'short']
    write_files(tmp_path / 'in', {f'{i}.txt': text for i, text in enumerate(texts)})
    prepare_data.prepare([tmp_path / 'in'], tmp_path / 'out', val_fraction=0.3)
    made = sum(split_texts(tmp_path / 'out'), [])
    assert len(made) > 12 and all(len(text) <= 200 for text in made)
    assert sorted(''.join(made)) == sorted(''.join(texts)[1:])  # less the byte order mark
    assert all(text.startswith('line') and text.endswith('\n') for text in made if 'line' in text)


@pytest.mark.parametrize('files, expect', [
    (['one', 'three', 'the last'], [['one', 'three', 'the las'], ['t']]), (['aé'], [['a'], ['é']]),
    (['text ' * 20] * 4, [['text ' * 20] * 3 + ['text ' * 12], ['text ' * 8]]),
    (list('0123456789'), [list('012345678'), ['9']])])
def test_of_few_documents_the_end_is_for_validation(tmp_path, monkeypatch, capsys, files, expect):
    monkeypatch.setattr(prepare_data, 'BATCH', 300)
    monkeypatch.setattr(prepare_data, 'split_of', lambda text, val_fraction: 0)
    write_files(tmp_path / 'in', {f'{i}.txt': text for i, text in enumerate(files)})
    prepare_data.prepare([tmp_path / 'in'], tmp_path / 'out', val_fraction=0.1)
    assert split_texts(tmp_path / 'out') == expect and 'for validation' in capsys.readouterr().out


@pytest.mark.parametrize('val_fraction', [0.3, 0.001])  # with the second the hashes put all documents into one split
def test_killed_preparation_continues(tmp_path, monkeypatch, val_fraction):
    """kill -9 between any two steps of writing: a meta.json is always true, and the same command continues."""
    code = '''
import os, signal, sys, prepare_data as p
p.LONGEST, p.BATCH, p.SAVE_EVERY, left = 3000, 3000, 0, int(sys.argv[1])
def dies(f):
    def call(*a):
        global left
        if a[-1] != 'rb':  # not reading
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return f(*a)
    return call
os.replace, p.open = dies(os.replace), dies(open)
p.prepare(sys.argv[5:], sys.argv[2], sys.argv[3], float(sys.argv[4]))
'''
    args = [str(write_ranks(tmp_path / 't.tiktoken', small_ranks())), val_fraction]
    write_files(tmp_path, {'8.txt': nasty(random.Random(6), 9000), 'a': 'of another time', 'b': 'and of another'})
    sources = [str(write_jsonl(tmp_path / f'{i}.jsonl', some_texts(25, seed=i))) for i in range(4)]
    sources.append(str(tmp_path / '8.txt'))
    batches, encode_all, other = [], prepare_data.encode_all, tmp_path / 'other'
    monkeypatch.setattr(prepare_data, 'LONGEST', 3000)
    monkeypatch.setattr(prepare_data, 'BATCH', 3000)
    monkeypatch.setattr(prepare_data, 'encode_all', lambda *a: (batches.append(1) or x for x in encode_all(*a)))
    prepare_data.prepare(sources, tmp_path / 'whole', *args)
    want, n = contents(tmp_path / 'whole'), len(batches)
    steps = 3 + 3 * n  # the lock and two files; two writes and one progress file a batch; then the four renames
    prepare_data.prepare([tmp_path / 'a'], other)

    def killed(left, out, *sources):
        command = [sys.executable, '-c', code, left, out, *args, *sources]
        done = subprocess.run([str(a) for a in command], cwd=HERE, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    for left in (0, 10, steps // 2 + 1, steps - 1, steps, steps + len(want) - 1):
        out = shutil.copytree(other, tmp_path / f'killed{left}')
        killed(left, out, *sources)
        if left <= steps:  # what was there before is whole, but that its meta.json is the first to go
            there, old = ({name: data for name, data in contents(folder).items() if '/' not in name}
                          for folder in (out, other))
            if left == steps:
                del old['meta.json']
            assert there == old
        else:
            assert not (out / 'meta.json').exists()  # it comes last
        if left == steps - 1:  # another preparation, killed too, writes over the unfinished files
            killed(5, out, tmp_path / 'b')
        batches.clear()
        prepare_data.prepare(sources, out, *args)
        assert contents(out) == want
        assert left < 10 or left >= steps - 1 or len(batches) <= n - (left - 3) // 3 + 1 < n


@pytest.mark.parametrize('text', ['', '{"job', '[]'])
def test_a_damaged_progress_file_means_to_begin_anew(tmp_path, text):
    write_files(tmp_path, {'some.txt': 'some text of a user', f'out/{prepare_data.UNFINISHED}/progress.json': text,
                           f'out/{prepare_data.UNFINISHED}/train.bin': 'torn'})
    for out in ('out', 'clean'):
        prepare_data.prepare([tmp_path / 'some.txt'], tmp_path / out)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'clean')


@pytest.mark.parametrize('name, data, kw, words', [
    ('x', b'good \xff bad', {}, 'x is not text in UTF-8'), ('x', 'ends é'.encode()[:-1], {}, 'UTF-8'),
    ('x', b'\xef\xbb\xbf', {}, 'too little text'), ('x', 'text'.encode('utf-16'), {}, 'UTF-8'),
    ('x', b'a', {}, 'too little text'), ('x.tar', archive('tar'), {}, 'unpack an archive'),
    ('x.tar.gz', archive('gztar'), {}, 'unpack an archive'), ('x.zip', archive('zip'), {}, 'unpack an archive'),
    ('x.gz', b'not packed', {}, 'x.gz cannot be read'), ('x.gz', b'', {}, 'x.gz is empty'),
    ('x.jsonl', b'\n{"text": ""}\n', {}, 'too little text'),
    ('x.jsonl', b'{"text": "a"}\n{"text": "b"\n', {}, 'x.jsonl, line 2 is not an object with a string "text"'),
    *[('x.jsonl', line, {}, 'line 1 is not')
      for line in (b'{"txt": "a"}\n', b'\xff\n', b'["text"]\n', b'{"text": 5}', b'[' * 100_000)],
    *[('x', b'text', dict(val_fraction=v), '--val_fraction must lie') for v in (0, 1.0, float('nan'))],
    ('x', b'text', dict(workers=0), '--workers must be at least 1'), ('none*', None, {}, 'give files, folders, globs'),
    ('x', b'text', dict(tokenizer='gpt-2'), "unknown tokenizer 'gpt-2': give bytes, one of gpt2"),
    ('x', b'text', dict(tokenizer='none.json'), 'no tokenizer file none.json'),
    *[(name, data, dict(tokenizer=name), words) for name, data, words in [
        ('x.json', dict(decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': False}), 'not of bytes'),
        ('x.json', dict(model='BPE'), 'cannot be used'), ('x.json', dict(decoder=None), 'cannot be used'),
        ('x.json', dict(added_tokens=[]), r'has no <\|endoftext'), ('x.json', b'{"a": ' * 10**5, 'cannot be used'),
        ('x.json', dict(normalizer={'type': 'Lowercase'}), 'loses some'),
        ('x.json', b'\xff', 'cannot be used'), ('x.tiktoken', b'YQ== 0 1\n', 'not a .tiktoken file'),
        ('x.tiktoken', b'\n', 'not a .tiktoken file'), ('x.tiktoken', b'*** 0\n', 'not a .tiktoken file'),
        ('x.tiktoken', b'YQ== 0\n', 'not a whole .tiktoken file')]]])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name, data, kw, words):
    monkeypatch.chdir(write_files(tmp_path, {'good.txt': 'some good text'}))
    if isinstance(data, dict):
        write_tokenizer_json(tmp_path / name, write_ranks(tmp_path / 't.tiktoken', small_ranks()), **data)
    elif data is not None:
        write_files(tmp_path, {name: data})
    refuses(words, prepare_data.prepare, [name], 'out', **kw)
    assert not os.path.exists('out')
    # data that was there stays as it was
    prepare_data.prepare(['good.txt'], 'out')
    before = contents(write_files(tmp_path, {'out/unfinished/novel.txt': 'a work of the user'}))
    refuses(words, prepare_data.prepare, [name], 'out', **kw)
    assert contents(tmp_path) == before
    if not kw:  # nor is data written into a folder of something else
        for file in ('meta.json', 'train.bin'):
            write_files(tmp_path, {f'other_{file}/{file}': b'of another program'})
            refuses('a folder of its own', prepare_data.prepare, ['good.txt'], f'other_{file}')


@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.jsonl.zst'])
def test_compressed_input_that_was_cut_off_is_refused(tmp_path, name):
    """Cut anywhere but at the border of two frames, or with a byte changed, or with something behind it."""
    rows = ''.join(json.dumps({'text': f'text {i * 7919 % 10007}'}) + '\n' for i in range(2000)).encode()
    data = packed(rows, Path(name).suffix)
    changed = data[:500] + bytes([data[500] ^ 255]) + data[501:]
    for part in (data[:5], data[:len(data) // 3], data[:len(data) * 2 // 3], data[:-1], data + b'garbage', changed):
        write_files(tmp_path, {name: part})
        refuses('x.jsonl', prepare_data.prepare, [tmp_path / name], tmp_path / 'out')


@pytest.mark.parametrize('source, module', [('x.zst', 'pyarrow'), ('x.parquet', 'pyarrow'), ('hf:x', 'datasets')])
def test_a_missing_package_is_named(tmp_path, monkeypatch, source, module):
    monkeypatch.chdir(write_files(tmp_path, {source: ''}))
    for name in (module, f'{module}.parquet'):
        monkeypatch.setitem(sys.modules, name, None)
    refuses(f'pip install {module}', prepare_data.prepare, [source], 'out')


def test_without_a_network_or_a_disk(tmp_path, monkeypatch):
    prepare, out, text = prepare_data.prepare, tmp_path / 'out', write_files(tmp_path / 'in', {'x.txt': 'some text'})
    request = prepare_data.urllib.request
    monkeypatch.setattr(request, 'urlopen', lambda url, timeout: io.BytesIO(b'To be, or not to be'))
    prepare(['shakespeare'], tmp_path / 'data')
    assert split_texts(tmp_path / 'data') == [['To be, or not to b'], ['e']]
    monkeypatch.setattr(request, 'urlopen', fails(urllib.error.URLError('no network')))
    refuses('could not be downloaded', prepare, ['shakespeare'], out)
    monkeypatch.setattr(tiktoken, 'get_encoding', fails(ConnectionError()))
    refuses(r'could not download gpt2 \(ConnectionError\)', prepare, [text], out, 'gpt2')
    monkeypatch.setattr(prepare_data, 'encode_all', fails(OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='No space'):
        prepare([text], out)
    assert not out.exists()


def test_data_and_its_tokenizer_belong_together(tmp_path):
    path, out, load = write_ranks(tmp_path / 't.tiktoken', small_ranks()), tmp_path / 'out', prepare_data.load_tokenizer
    source = str(write_files(tmp_path, {'x.txt': 'the theory in the inner ether'}) / 'x.txt')
    meta = prepare_data.prepare([source], out, path)
    assert meta == train.load_meta(out) and meta['source'] == [source]
    assert meta['tokenizer_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (meta['vocab_size'], meta['eot'], meta['dtype']) == (273, 272, 'uint16')
    path.unlink()
    assert load(meta, out).encode_ordinary(' the') == [258]
    prepare_data.prepare([source], out, out / 'tokenizer.tiktoken')  # its own copy
    write_ranks(out / 'tokenizer.tiktoken', {t: i for t, i in small_ranks().items() if i < 260})
    other = {'tokenizer': 'bytes', 'tokenizer_sha256': '0'}
    for data, words in ((meta, 'not the one'), (other, 'not the one'), ({}, 'meta'), ({'tokenizer': 'bytes'}, 'meta')):
        refuses(words, load, data, out)
    (out / 'tokenizer.tiktoken').unlink()
    refuses('no tokenizer file', load, meta, out)


def test_standard_library_is_the_default(tmp_path):
    meta = prepare_data.prepare(out=tmp_path / 'out')
    assert meta['source'] == ['stdlib'] and meta['train']['documents'] > 300 and meta['train']['tokens'] > 5e6
    assert any('import ' in text for text in split_texts(tmp_path / 'out')[1])


# train.py

# a run of 20 steps: 0 .. 5 without gates, 6 .. 10 gates alone, then everything
TINY = dict(objective='paper', block_size=16, n_layer=1, n_head=2, n_embd=16, n_iter=3, tau=0.978, batch_size=2,
            gradient_accumulation_steps=4, max_steps=20, learning_rate=6e-3, warmup=3, ponder_start=6, ponder_full=12,
            freeze_backbone=5, k_max=0.3, eval_interval=8, eval_tokens=210, ckpt_interval=5, log_interval=1,
            sample_tokens=0, device='cpu')
SAVING = dict(objective='saving', tau=0.49, gate_bias=0.0, explore=0.2, k_max=0.5, freeze_backbone=3)


def write_data(folder, n_val=900, **changes):
    """A data folder as prepare_data.py writes it: a noisy sequence over 61 bytes. changes: of meta.json."""
    rng, bytes_sha256 = np.random.default_rng(0), prepare_data.load_tokenizer('bytes').sha256
    meta = dict(tokenizer='bytes', tokenizer_sha256=bytes_sha256, vocab_size=257, eot=256, dtype='uint16')
    for split, lengths in dict(train=(900, 600), val=(n_val,)).items():
        meta[split] = dict(tokens=sum(lengths), files=[])
        for i, n in enumerate(lengths):
            data = (np.arange(n) * 7 % 59 + rng.integers(0, 3, n)).astype('uint16').tobytes()
            write_files(folder, {f'{split}_{i}.bin': data})
            file = dict(name=f'{split}_{i}.bin', tokens=n, sha256=hashlib.sha256(data).hexdigest())
            meta[split]['files'].append(file)
    return write_files(folder, {'meta.json': {**meta, **changes}})


def arguments(data_dir, out_dir, **kw):
    return [f'--{k}={v}' for k, v in {**TINY, 'data_dir': data_dir, 'out_dir': out_dir, **kw}.items()]


def run_train(data_dir, out_dir, at=None, **kw):
    """train.main in this process. at: fn(n, out), called after forward of micro-batch n. Returns the exit code."""
    forward, n = AdaPonderLM.forward, count()

    def counted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if at and torch.is_grad_enabled():
            at(next(n), out)
        return out
    torch.set_default_dtype(torch.float64)  # Adam makes full steps of float32's rounding where a gradient is zero
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AdaPonderLM, 'forward', counted)
            return train.main(arguments(data_dir, out_dir, **kw)) or 0
    except SystemExit as e:
        return e.code
    finally:
        torch.set_default_dtype(torch.float32)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_at(micro_batch, number=signal.SIGTERM):
    """For run_train: this process receives a signal at a micro-batch."""
    return lambda n, out: os.kill(os.getpid(), number) if n == micro_batch else None


def read_log(out_dir):
    """log.jsonl without what the clock decides."""
    records = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != 'tokens_per_second'} for r in records]


def tensors(out_dir):
    """Everything trained in a run's checkpoint: weights, and optimizer state by parameter."""
    state = load_checkpoint(out_dir / 'ckpt.pt')
    optimizer = {f'{i}.{k}': v for i, s in state['optimizer']['state'].items() for k, v in s.items()}
    return {**state['model'], **optimizer, 'step': torch.tensor(state['step'])}


def distance(out_a, out_b):
    """Largest difference between the checkpoints of two runs."""
    a, b = tensors(out_a), tensors(out_b)
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A data folder and an uninterrupted run on it: the one that interrupted and distributed runs must equal."""
    root = tmp_path_factory.mktemp('train')
    assert run_train(write_data(root / 'data'), root / 'out') == 0
    return root


def test_the_loop_is_what_it_says(trained):
    """The same run written out again: schedule, stages, accumulation, clipping, decay groups, order of the windows."""
    state, log = load_checkpoint(trained / 'out/ckpt.pt'), read_log(trained / 'out')
    steps = [r for r in log if 'loss' in r]
    assert [r['step'] for r in steps] == list(range(1, 21)) and steps[-1]['tokens'] == 20 * 8 * 16
    tokens = np.concatenate([np.fromfile(trained / f'data/train_{i}.bin', 'uint16') for i in range(2)]).astype('int64')
    starts = []  # of the windows of two epochs, in each of which no token is predicted twice
    for epoch in range(2):
        rng = np.random.default_rng([1337, epoch])
        offset, order = rng.integers(16), rng.permutation((1500 - 16) // 16)
        starts += (offset + 16 * order).tolist()
    torch.manual_seed(1337)
    torch.set_default_dtype(torch.float64)
    m = AdaPonderLM(AdaPonderConfig(**state['config']))
    torch.set_default_dtype(torch.float32)
    assert m.cfg.vocab_size == 320
    groups = [dict(params=[p for p in m.parameters() if p.dim() > 1], weight_decay=0.01),
              dict(params=[p for p in m.parameters() if p.dim() == 1], weight_decay=0)]
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(20):
        lr = 6e-3 * min(1, (step + 1) / 3) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2)
        k = 0 if step < 6 else 0.3 * min(1, (step - 6) / 6)
        for g in opt.param_groups:
            g['lr'] = lr
        outs = []
        for j in range(4):
            at = starts[(step * 4 + j) * 2:][:2]
            x = torch.tensor(np.stack([tokens[a:a + 17] for a in at]))
            outs.append(out := m(x[:, :-1], x[:, 1:], halting=step >= 6, k=k, ponder_lambda=0.1))
            (out.loss / 4).backward()
        for name, p in m.named_parameters():
            if (step < 6 and name.startswith('gates')) or (6 <= step < 11 and not name.startswith('gates')):
                p.grad = None
        norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        ce, gate_loss = (np.mean([getattr(o, name).item() for o in outs]) for name in ('ce_loss', 'ponder_loss'))
        depth = np.mean([o.depth.double().mean() for o in outs])
        want = dict(loss=ce, gate_loss=gate_loss, depth=depth, halted=(3 - depth) / 2, lr=lr, k=k, grad_norm=norm)
        assert all(np.isclose(steps[step][key], value, rtol=1e-6, atol=1e-12) for key, value in want.items())
        assert (gate_loss > 0) == (step > 6)
    assert max(float((p.detach() - state['model'][n]).abs().max()) for n, p in m.named_parameters()) < 1e-10
    for i in range(2):  # and what the log says of the gates
        g = out.gates[..., i][out.depth > i]
        assert np.isclose(steps[-1]['gate_mean'][i], g.mean().item(), rtol=1e-6)
        assert np.isclose(steps[-1]['gate_under_tau'][i], (g < 0.978).double().mean())
    # the evaluation: 13 windows of 16, evenly spread over the 55 of val
    val = np.fromfile(trained / 'data/val_0.bin', 'uint16').astype('int64')
    x = torch.tensor(np.stack([val[w * 55 // 13 * 16:][:17] for w in range(13)]))
    out, last = m(x[:, :-1], x[:, 1:]), log[-1]
    assert [r['step'] for r in log if 'val_loss' in r] == [8, 16, 20]
    assert abs(last['val_loss'] - out.ce_loss.item()) < 1e-10 and 1 < last['val_depth'] < 3
    assert np.allclose(last['val_active'], [(out.depth > i).double().mean() for i in range(3)])
    fixed = 3 * 24 * 16 * 16 + 3 * 4 * 8.5 * 16 + 2 * 4 * 16 * 320 + 2 * 16 * 320
    d = out.depth.double()
    flops = d * (24 * 16 * 16 + 4 * 8.5 * 16) + (d - 1) * 4 * 16 * 320 + 2 * 16 * 320 + d.clamp(max=2) * 8 * 16 * 17
    assert abs(last['val_flops_saved'] - (1 - flops.mean().item() / fixed)) < 1e-9


def test_resume_is_exact_in_every_phase(trained, capsys):
    out, done = trained / 'resumed', 0
    for stop, number in ((3, signal.SIGTERM), (8, signal.SIGINT), (15, signal.SIGTERM)):
        at = stop_at((stop - done) * 4 + 1, number)  # in the middle of a step
        assert run_train(trained / 'data', out, at) == 128 + number
        done = tensors(out)['step'].item()
        assert done == stop and f'stopped at step {stop}' in capsys.readouterr().out
        with open(out / 'log.jsonl', 'a') as f:  # what a kill may leave behind: steps after the checkpoint, a torn line
            f.write(f'{{"step": {stop + 1}, "loss": 1.0}}\n{{"step": 9')
    for i in range(2):  # a finished run stays as it is
        assert run_train(trained / 'data', out) == 0
        assert distance(out, trained / 'out') == 0 and read_log(out) == read_log(trained / 'out')


def test_savings_are_learned_alike_however_the_run_goes(trained, tmp_path, monkeypatch):
    """tau and the forced tokens follow their rules; dense, packed, remat and interrupted are one run."""
    forced, halted, forward, data = [], [], AdaPonderLM.forward, trained / 'data'

    def recording(self, idx, *args, policy=None, **kw):
        out = forward(self, idx, *args, policy=policy, **kw)
        if torch.is_grad_enabled():  # the tokens that go on although their gates are shut
            forced.append(policy(0, torch.zeros(2, 16), None, *grid(2, 16)))
            halted.append((3 - out.depth)[~forced[-1]].double().mean().nan_to_num() / 2)
        return out
    with monkeypatch.context() as patch:
        patch.setattr(AdaPonderLM, 'forward', recording)
        assert run_train(data, tmp_path / 'a', **SAVING) == 0
    assert len({tuple(f.flatten().tolist()) for f in forced[60:64]}) == 4  # other tokens in each micro-batch
    log, tau = [r for r in read_log(tmp_path / 'a') if 'loss' in r], 0.49
    for step, r in enumerate(log):
        ramp = min(1, max(0, step - 9) / 3)  # from 9, when gates act, to 12
        tau *= math.exp(r['k'] - r['halted']) if step >= 9 else 1
        assert abs(r['tau'] / tau - 1) < 1e-6 and abs(r['k'] - 0.5 * (1 - (1 - ramp) ** 2)) < 1e-12
        micro = slice(4 * step, 4 * step + 4)
        assert abs(r['halted'] - np.mean(halted[micro])) < 1e-6 and (step >= 9 or r['depth'] == 3)
        drawn, share = torch.stack(forced[micro]).double(), np.interp(step, (9, 12, 20), (1, 0.2, 0))
        assert abs(drawn.mean() - share) <= 4 * (share * (1 - share) / drawn.numel()) ** 0.5
    state = load_checkpoint(tmp_path / 'a/ckpt.pt')
    assert state['config']['tau'] == log[-1]['tau'] and 0 < log[-1]['halted'] < 1

    assert run_train(data, tmp_path / 'b', stop_at(9 * 4 + 1), **SAVING) == 143
    assert run_train(data, tmp_path / 'b', **SAVING) == 0
    assert distance(tmp_path / 'a', tmp_path / 'b') == 0
    assert load_checkpoint(tmp_path / 'b/ckpt.pt')['config'] == state['config']
    assert run_train(data, tmp_path / 'c', **SAVING, execution='packed', remat=True) == 0
    assert distance(tmp_path / 'a', tmp_path / 'c') < 1e-9


def test_until_gates_act_a_network_with_them_is_the_one_without(trained, tmp_path):
    """Both begin with the same backbone, and gates that predict do not touch it, not even by the gradient's norm."""
    for name, halting in (('with', True), ('without', False)):
        kw = dict(halting=halting, objective='saving', grad_clip=0.05)
        assert run_train(trained / 'data', tmp_path / name, stop_at(6 * 4), **kw) == 143
    a, b = (load_checkpoint(tmp_path / name / 'ckpt.pt')['model'] for name in ('with', 'without'))
    assert any(n.startswith('gates.') for n in a) and all(torch.equal(a[n], p) for n, p in b.items())


def test_kill_9_at_any_moment(trained, tmp_path):
    """Killed again and again while it saves every step, the run ends with the weights of the undisturbed one."""
    code = '''
import os, random, signal, sys, time
import torch._dynamo, train  # the optimizer imports it, slowly: once here, not after every fork
out, argv = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
random.seed(0)
when = lambda: os.stat(out).st_mtime_ns if os.path.exists(out) else 0
for kills in range(6):
    old, pid = when(), os.fork()
    if not pid:
        train.main(argv)
        os._exit(0)
    while kills < 5 and when() == old:
        time.sleep(0.005)
    if kills < 5:  # it has come past the last checkpoint: strike
        time.sleep(random.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print('seen', train.load_checkpoint(out)['step'], flush=True)
'''
    argv = arguments(trained / 'data', tmp_path, ckpt_interval=1)
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'ckpt.pt', *argv], env=subprocess_env(),
                          capture_output=True, text=True)
    seen = [int(step) for step in re.findall(r'seen (\d+)', done.stdout)]
    assert len(seen) == 6 and seen == sorted(seen) and seen[1] < seen[-1] == 20, done.stderr
    assert distance(tmp_path, trained / 'out') == 0 and read_log(tmp_path) == read_log(trained / 'out')


def test_blocks_compile_at_the_first_steps_of_a_phase_alone(monkeypatch):
    """Graphs that dynamo makes for compiled blocks, counted over all phases of a training and its evaluations."""
    monkeypatch.setattr(torch._dynamo.config, 'recompile_limit', 64)  # as train.py has it
    torch._dynamo.reset()
    m, n_graphs = tiny(torch.float32, **SAVES), []
    for block in m.blocks:
        block.compile(backend='aot_eager')
    schedule = model_py.HaltingSchedule(m.cfg, 12, start=3, full=9, k_max=0.5, gates_alone=3)
    for step in range(12):
        for name, p in m.named_parameters():
            p.requires_grad_(name.startswith('gates.') or not 3 <= step < 6)
        x = random_tokens(4, 33, seed=step)
        out = m(x[:, :-1], x[:, 1:], **schedule.at(step))
        out.loss.backward()
        schedule.update(step, out.depth)
        if step % 3 == 2:
            with torch.no_grad():
                m(x[:, :-1], x[:, 1:], halting=step >= 6)
        n_graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    grows = [step for step in range(1, 12) if n_graphs[step] > n_graphs[step - 1]]
    assert set(grows) <= {2, 3, 5, 6, 8, 9} and n_graphs[-1] - n_graphs[0] < 16, n_graphs


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def test_two_processes_are_one(trained, tmp_path):
    """Under torchrun, which starts them again when one is killed, two processes train what one process does.

    Other data or config on one is refused, a NaN or SIGTERM on one is everyone's.
    Where all tokens halt, one process may reach a gate that the other does not: AdamW sees every gate, with gradient 0.
    """
    (tmp_path / 'run.py').write_text('''
import json, os, signal, sys
import torch, torch.distributed as dist, train
torch.set_default_dtype(torch.float64)
rank, forward, codes = os.environ['RANK'], train.AdaPonderLM.forward, []
first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
for port, what, argv in json.loads(sys.argv[1]):
    n = 0
    def counted(self, *args, **kw):
        global n
        n += torch.is_grad_enabled()
        if rank == '1' and what == 'killed' and n == 17 and first:  # step 8, gates alone
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == '1' and what == 'remat' and n == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        out = forward(self, *args, **kw)
        if rank == '1' and what == 'nan' and n == 8:
            out.loss = out.loss * float('nan')
        return out
    train.AdaPonderLM.forward = counted
    if codes:  # torchrun's meeting point is good for one group
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE='False')
    try:
        codes.append(train.main([a.replace('RANK', rank) for a in argv]))
    except train.UsageError as e:
        print(e)
        codes.append(2)
    except SystemExit as e:
        codes.append(e.code)
    assert not dist.is_initialized()
os.write(1, f'codes {codes}\\n'.encode())  # at once, so that the lines of two processes do not mix
''')
    for rank in range(2):
        write_data(tmp_path / f'data{rank}', n_val=900 + rank)
    idle = dict(objective='saving', gate_bias=-3.0, tau=0.9, explore=0.0, k_max=1.0, ponder_start=0, ponder_full=1,
                freeze_backbone=0, ponder_norm=True, execution='packed')
    runs = dict(killed={}, config=dict(learning_rate='RANK.5'), data=dict(data_dir=tmp_path / 'dataRANK'), nan={},
                remat=dict(remat=True), saving=dict(SAVING, execution='packed'), idle=idle)
    runs = [(free_port(), name, arguments(**{'data_dir': trained / 'data', 'out_dir': tmp_path / name, **kw}))
            for name, kw in runs.items()]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1']
    done = subprocess.run([*torchrun, tmp_path / 'run.py', json.dumps(runs)], text=True, capture_output=True,
                          env=subprocess_env(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), timeout=240)
    text = done.stdout
    assert done.returncode == 0 and text.count('codes [None, 2, 2, None, 143, None, None]') == 2, text + done.stderr
    assert all(f'not all processes have the same {what}' in text for what in ('config', 'meta.json'))
    assert 'going on from' in text and text.count('step 3: the gradient is not finite') == 1

    def nan_at_15(n, out):
        out.loss = out.loss * (math.nan if n == 15 else 1)
    depths = []
    for name, at, kw in [('nan', nan_at_15, {}), ('saving', None, SAVING),
                         ('idle', lambda n, out: depths.append(int(out.depth.max())), idle)]:
        assert run_train(trained / 'data', tmp_path / f'one_{name}', at, **kw) == 0
        assert distance(tmp_path / name, tmp_path / f'one_{name}') < 1e-9
    state = load_checkpoint(tmp_path / 'idle/ckpt.pt')
    assert depths[0] == 3 and depths[10] == 1 and len(state['optimizer']['state']) == len(state['model'])
    assert {int(s['step']) for s in state['optimizer']['state'].values()} == {20}
    assert load_checkpoint(tmp_path / 'remat/ckpt.pt')['step'] == 8
    assert run_train(trained / 'data', tmp_path / 'remat') == 0  # goes on with AdamW, in one process
    assert all(distance(tmp_path / name, trained / 'out') < 1e-9 for name in ('killed', 'remat'))
    for two, one in (('killed', trained / 'out'), ('saving', tmp_path / 'one_saving')):
        for a, b in zip(read_log(tmp_path / two), read_log(one), strict=True):
            keys = {'step', 'tokens', 'loss', 'gate_loss', 'depth', 'halted', 'grad_norm', 'val_loss', 'val_depth'}
            assert a.keys() == b.keys() and all(np.allclose(a[k], b[k], rtol=1e-5) for k in keys & b.keys())


def test_a_reader_that_leaves_does_not_end_the_run(trained, tmp_path):
    command = [sys.executable, HERE / 'train.py', *arguments(trained / 'data', tmp_path, max_steps=3, ponder_start=0)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=subprocess_env()) as run:
        run.stdout.close()
        assert (run.stderr.read(), run.wait()) == (b'', 0) and tensors(tmp_path)['step'] == 3


def test_ten_bad_steps_give_up_with_the_last_good_checkpoint(trained, tmp_path, capsys):
    def at(n, out):
        if n == 26 or n >= 32:  # in step 6, then in all from 8 on
            out.loss = out.loss * (math.inf if n % 8 else math.nan)
    assert run_train(trained / 'data', tmp_path, at) == 1
    text = capsys.readouterr().out
    assert 'step 17: the gradient is not finite, step skipped (10 in a row)' in text and '(11' not in text
    assert tensors(tmp_path)['step'] == 5 and all(t.isfinite().all() for t in tensors(tmp_path).values())
    assert run_train(trained / 'data', tmp_path) == 0 and distance(tmp_path, trained / 'out') == 0  # it goes on


def test_disk_full_costs_one_checkpoint(trained, tmp_path, capsys):
    resource, ckpt = pytest.importorskip('resource'), tmp_path / 'ckpt.pt'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def at(n, out):
        if n in (24, 76):  # in steps 6 and 19: no file may grow beyond a quarter of the checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (ckpt.stat().st_size // 4, hard))
        if n == 48:
            assert not list(tmp_path.glob('*.tmp')) and tensors(tmp_path)['step'] == 5
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        assert run_train(trained / 'data', tmp_path, at) == 1  # the last one failed: not a success
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().out.count('checkpoint not written') == 2 and tensors(tmp_path)['step'] == 15
    assert run_train(trained / 'data', tmp_path) == 0 and distance(tmp_path, trained / 'out') == 0


FILE = dict(name='val_0.bin', tokens=900, sha256='0' * 64)


@pytest.mark.parametrize('kw, words', [
    (dict(learning_rat=1), "did you mean 'learning_rate'"), (dict(zzz=1), "unknown key 'zzz'"),
    (dict(lr=1), "'learning_rate'"), (dict(n_heads=1), "'n_head'"), (dict(n_layer=1.5), 'n_layer must be int'),
    (dict(halting=1), 'halting must'), (dict(out_dir=''), 'out_dir'), (dict(learning_rate='fast'), 'must be float'),
    (dict(max_steps='40%'), 'max_steps must'), (dict(ponder_start='soon'), "not 'soon'"), (dict(warmup=-4), "not '-4'"),
    (dict(dtype='float16'), 'dtype must be'), (dict(execution='auto'), 'execution'), (dict(batch_size=0), 'from 1'),
    (dict(k_max=1.5), 'from 0 to 1'), (dict(explore=math.nan), 'explore'), (dict(seed=2 ** 40), 'seed'),
    (dict(beta1=1), 'beta1'), (dict(eval_tokens=-5), 'eval_tokens'), (dict(max_steps='1.5'), 'max_steps must'),
    (dict(max_steps='1e400 tokens'), 'max_steps must'),
    (dict(wandb_log=True), 'pip install wandb'), (dict(meta=dict(tokenizer='foo'), sample_tokens=9), 'tokenizer'),
    (dict(n_embd=10 ** 12), 'n_embd'), (dict(gate_bias=math.inf), 'gate_bias'), (dict(n_embd=17), 'divisible'),
    (dict(ponder_full=5), r'ponder_full \(step 5\) lies before step 6'), (dict(vocab_size=200), '257 token ids'),
    (dict(objective='saving', freeze_backbone=9), 'before step 15'), (dict(block_size=600), 'val split of'),
    (dict(init_from='nowhere.pt'), 'no checkpoint at nowhere.pt'), (dict(data_dir='no/pile'), 'no data in no/pile'),
    (dict(data_dir='data/stdlib', init_from='EleutherAI/pythia-70m'), 'no data in data/stdlib'),
    (dict(data_dir='out'), 'is for data'), (dict(out_dir='a_file'), 'a_file'), (dict(out_dir='a_file/run'), 'a_file'),
    # other files, or another meta.json, in the data folder
    (dict(files={'data/train_1.bin': bytes(1000)}), 'has not the 600 tokens'),
    (dict(files={'data/train_1.bin': bytes(1200)}), 'train_1.bin was changed: its sha256'),
    (dict(files={'data/train_0.bin': b'\2' * 1800}, verify_data=False), 'holds token 514, beyond vocab_size 320'),
    *[(dict(files={'data/meta.json': text}), 'is damaged') for text in ('{}', '[1]', '{"', '[' * 100_000)],
    *[(dict(meta=meta), 'is damaged') for meta in (
        dict(vocab_size='257'), dict(dtype='float32'), dict(train=[]), dict(val=dict(files={})),
        *(dict(val=dict(files=[FILE | change])) for change in (dict(name=7), dict(tokens=900.0), dict(sha256=None))))],
    (dict(meta=dict(val=dict(files=[FILE | dict(name='none.bin')]))), 'none.bin is not there')])
def test_train_refuses_nonsense(tmp_path, monkeypatch, kw, words):
    """And leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / 'data', **kw.get('meta', {}))
    write_files(tmp_path, {'a_file': '', **kw.get('files', {})})
    before, kw = contents(tmp_path), {key: value for key, value in kw.items() if key not in ('meta', 'files')}
    refuses(words, run_train, **{'data_dir': 'data', 'out_dir': 'out', **kw})
    if 'holds token' not in words:  # which is seen when it is read
        assert contents(tmp_path) == before and not os.path.exists('out')


def test_config_files(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arg, text, words in [('bad.py', 'max_steps = oops', "name 'oops'"), ('bad.py', 'tau = 2', 'tau must be from 0'),
                             ('bad.py', 'max_step = 5', "did you mean 'max_steps'"), ('huge.py', '', 'no config file'),
                             ('--tau', '', '--tau has no value')]:
        write_files(tmp_path, {'bad.py': text})
        refuses(words, train.load_config, [arg])
    write_files(tmp_path, {'good.py': 'import math\n_n = 3\ndef two(x):\n    return 2 * x\nn_iter = two(_n)\ntau = 0'})
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = train.load_config(['~/good.py', '--learning_rate=1', '--max_steps=1e3', '--out_dir=7', '--halting=False'])
    assert cfg == train.TrainConfig(n_iter=6, tau=0.0, learning_rate=1.0, max_steps='1e3', out_dir='7', halting=False)
    assert cfg.given == {'n_iter', 'tau', 'learning_rate', 'max_steps', 'out_dir', 'halting'}
    durations = {7: 7, '7': 7, '40%': 80, '1.5M tokens': 1500, '2K steps': 2000, '0.5%': 1, '0.1%': 1,
                 '9 tokens': 1, '0%': 0, '1e3': 1000}
    assert [train.in_steps('x', d, 1000, 200) for d in durations] == list(durations.values())
    with pytest.raises(SystemExit):
        train.load_config(['--help'])
    assert len(re.findall(r'^    \w+: .*# ', capsys.readouterr().out, re.M)) == len(fields(train.TrainConfig))
    # the command, in a locale that is not UTF-8
    write_files(tmp_path, {'c.py': '\ufeff# the \u201cbest\u201d run\nbatch_size = 10\nout_dir = "out"'})
    command = [sys.executable, HERE / 'train.py', 'c.py', f'--data_dir={trained / "data"}', '--block_size=4000']
    env = subprocess_env(LC_ALL='POSIX', PYTHONUTF8=0, PYTHONCOERCECLOCALE=0)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and re.fullmatch('train.py: the train split of .*\n', done.stderr)


def test_a_config_changed_on_resume_acts_or_is_refused(trained, tmp_path, capsys):
    data, out = trained / 'data', shutil.copytree(trained / 'out', tmp_path / 'out')
    write_data(tmp_path / 'data', n_val=901)
    for kw, words in [(dict(n_embd=32), 'other values of n_embd'), (dict(seed=1), 'of seed'), (dict(tau=0.5), 'of tau'),
                      (dict(batch_size=4), 'of batch_size'), (dict(data_dir=tmp_path / 'data'), 'the data in'),
                      (dict(max_steps=40, ponder_start='90%', ponder_full='95%'), r'of ponder_start \(6 ')]:
        refuses(words, run_train, **{'data_dir': data, 'out_dir': out, **kw})
    with contextlib.closing(train.lock(out)):
        refuses('is writing to', run_train, data, out)
    kw = dict(max_steps=22, learning_rate=1e-3, weight_decay=0.5, beta2=0.5)
    assert run_train(data, out, **kw) == 0
    text = capsys.readouterr().out
    assert 'max_steps = 20 -> 22' in text and 'weight_decay = 0.01 -> 0.5' in text and 'ponder_full' not in text
    state = load_checkpoint(out / 'ckpt.pt')
    groups = state['optimizer']['param_groups']
    assert [(g['weight_decay'], g['betas']) for g in groups] == [(0.5, (0.9, 0.5)), (0, (0.9, 0.5))]
    assert {int(s['step']) for s in state['optimizer']['state'].values()} == {22 - 5, 22 - 6} and state['step'] == 22
    write_files(out, {'ckpt.pt': 'junk'})
    refuses('not a readable checkpoint', run_train, data, out)
    assert run_train(data, out, resume=False, max_steps=1) == 0 and len(read_log(out)) == 1


@pytest.mark.parametrize('change', [
    dict(optimizer=[1]), dict(optimizer=dict(state={}, param_groups=[])), dict(optimizer=dict(state=[])),
    dict(train_config=[1]), dict(step='3'), dict(ponder_start=None), dict(meta=None), dict(meta=[1]),
    dict(config=dict(pool='all')), *[dict(moment=m) for m in (
        None, [1], {}, dict(exp_avg=torch.zeros(2)), dict(step=torch.zeros(7)), 'float16', 'sparse', 'expand',
        'renamed')],
    *[dict(weight=w) for w in ('float16', 'sparse', 'expand')]])
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, change):
    state, change = load_checkpoint(trained / 'out/ckpt.pt'), dict(change)
    odd = dict(float16=lambda x: x.half(), sparse=lambda x: x.to_sparse(), expand=lambda x: x[:1].expand(x.shape))
    if 'weight' in change:
        state['model']['embed.weight'] = odd[change.pop('weight')](state['model']['embed.weight'])
    if 'moment' in change:
        moments, moment = state['optimizer']['state'], change.pop('moment')
        if moment is None:
            del moments[0]
        elif moment == 'renamed':
            state['optimizer']['state'] = {str(i): values for i, values in moments.items()}
        elif isinstance(moment, str):
            moments[0]['exp_avg'] = odd[moment](moments[0]['exp_avg'])
        else:
            moments[0] = {**moments[0], **moment} if moment and isinstance(moment, dict) else moment
    torch.save({**state, **change}, tmp_path / 'ckpt.pt')
    refuses('another version', run_train, trained / 'data', tmp_path, max_steps=21)
    if change == dict(meta=[1]):
        refuses('is damaged', run_train, trained / 'data', tmp_path / 'new', init_from=tmp_path)


def test_grad_clip_0_is_no_clipping(trained, tmp_path):
    for name, grad_clip in (('off', 0), ('far', 1e6), ('on', 0.01)):
        assert run_train(trained / 'data', tmp_path / name, max_steps=3, grad_clip=grad_clip) == 0
    assert distance(tmp_path / 'off', tmp_path / 'far') == 0 < distance(tmp_path / 'off', tmp_path / 'on')


def test_wandb_goes_on_in_the_same_run(trained, tmp_path, monkeypatch):
    calls, logged = [], []
    stub = SimpleNamespace(log=lambda record, step: logged.append(step),
                           init=lambda **kw: calls.append((kw['id'], kw['resume'])) or SimpleNamespace(id='abc'))
    monkeypatch.setitem(sys.modules, 'wandb', stub)
    for max_steps in (2, 4):
        assert run_train(trained / 'data', tmp_path, max_steps=max_steps, wandb_log=True) == 0
    assert calls == [(None, None), ('abc', 'allow')] and logged == [1, 2, 3, 4]


def test_baselines_and_closing_sample(trained, tmp_path, capsys, monkeypatch):
    short = dict(max_steps=2, ponder_start=1, freeze_backbone=0, sample_tokens=5)
    for kw, depth in [(dict(n_iter=1), 1), (dict(halting=False), 3), (dict(feedback='hidden', dtype='bfloat16'), None)]:
        assert run_train(trained / 'data', tmp_path / 'out', resume=False, **short, **kw) == 0
        last = read_log(tmp_path / 'out')[-1]
        assert depth is None or (last['val_depth'], last['val_flops_saved']) == (depth, 0)
        sample = capsys.readouterr().out.split('ckpt.pt --depth')[1].strip()
        assert '|' in sample and all(c.isprintable() or c in '\n\t' for c in sample)
    model = AdaPonderLM.from_checkpoint(tmp_path / 'out/ckpt.pt')
    new = torch.tensor([[65, 300, 7, 256, 66]])  # A, a padding token, a control byte, the end of the document, B
    model.generate = lambda idx, *args, **kw: torch.cat([idx, new], dim=1)
    monkeypatch.setattr(AdaPonderLM, 'from_state', lambda state: model)
    data, meta = trained / 'data', train.load_meta(trained / 'data')
    val = train.Windows(data, meta, 'val', 16, 257)
    enc = prepare_data.load_tokenizer(meta, data)
    assert train.closing_sample(model, train.TrainConfig(block_size=4), val, meta, enc).endswith('|A\\x07')


def test_starting_from_trained_weights(trained, tmp_path):
    """Weights bring their settings, flags win; what does not fit, another tokenizer included, is refused."""
    def run(data=trained / 'data', **more):
        argv = arguments(data, tmp_path / 'new', init_from=trained / 'out/ckpt.pt', resume=False, max_steps=1)
        argv = [a for a in argv if not a.startswith(('--objective', '--n_', '--tau'))]  # else these would win
        train.main(argv + [f'--{k}={v}' for k, v in more.items()])
        return load_checkpoint(tmp_path / 'new/ckpt.pt')
    before, after = load_checkpoint(trained / 'out/ckpt.pt'), run(learning_rate=0)
    assert after['config'] == before['config'] and after['config']['objective'] == 'paper'
    assert all(torch.equal(p.float(), before['model'][n].float()) for n, p in after['model'].items())
    more = dict(n_iter=2, objective='saving', ponder_norm=True)
    after = run(**more)
    assert after['config'] == {**before['config'], **more}
    assert {n for n in after['model'] if n.endswith('fc.weight') or 'ponder' in n} == {
        'blocks.0.mlp.fc.weight', 'gates.0.fc.weight', 'ln_ponder.weight', 'ln_ponder.bias'}
    refuses('gate_width is 1.0, but 4.0', run, gate_width=1)
    refuses('n_embd is 32, but 16', run, n_embd=32)
    other = write_data(tmp_path / 'other', tokenizer_sha256='0' * 64)
    refuses('another tokenizer .* --tokenizer bytes', run, other)


def test_starting_from_a_hugging_face_folder(trained, tmp_path):
    shape = dict(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=32)
    neox(**shape).save_pretrained(tmp_path / 'hf')
    kw = dict(init_from=tmp_path / 'hf', max_steps=2, ponder_start=0, freeze_backbone=2)
    assert run_train(trained / 'data', tmp_path / 'out', **kw) == 0
    m, hf = AdaPonderLM.from_checkpoint(tmp_path / 'out/ckpt.pt'), AdaPonderLM.from_pretrained(tmp_path / 'hf')
    before = hf.state_dict()
    same = {n.split('.')[0] for n, p in m.state_dict().items() if torch.equal(p, before[n])}
    assert same == {'embed', 'blocks', 'ln_f', 'unembed'}  # the gates alone moved
    assert m.cfg.block_size == 32 and not m.cfg.scale_embeds
    m.save_pretrained(tmp_path / 'own')  # with its gates and settings, and the tokenizer that it was trained with
    cfg, meta = train.load_config([f'--init_from={tmp_path / "own"}', '--tau=0.25']), train.load_meta(trained / 'data')
    assert train.initial_model(cfg, meta).cfg == replace(m.cfg, tau=0.25)
    refuses('another tokenizer', train.initial_model, cfg, {**meta, 'tokenizer_sha256': '0' * 64})
    write_files(tmp_path, {'hf/tokenizer.json': {}})
    cfg = train.load_config([f'--init_from={tmp_path / "hf"}'])
    refuses('hf/tokenizer.json', train.initial_model, cfg, meta)


def test_devices_are_what_is_named_or_refused(monkeypatch):
    def too_old():
        warnings.warn('CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Update')
        return False

    def cuda(**functions):
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
    get, device, used = train.get_device, torch.device, []
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    cuda(is_available=lambda: False)
    assert get() == get('cpu') == device('cpu')
    for name, words in (('cuda', 'can use no'), ('cuda:1', 'can use no'), ('mps', 'can use no'), ('gpu', 'must be')):
        refuses(words, get, name)
    cuda(is_available=too_old)
    refuses('driver on your system is too old', get)
    cuda(is_available=lambda: True, device_count=lambda: 2, set_device=used.append)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', used.append)
    assert get('cuda:1') == device('cuda:1') and used == [device('cuda:1'), 'high'] and get() == device('cuda:0')
    refuses('there is no cuda:2', get, 'cuda:2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert get() == get('cuda') == device('cuda:1')
    refuses('under torchrun', get, 'cuda:0')
    cuda(is_bf16_supported=lambda including_emulation: False, get_device_name=lambda device: 'Tesla V100')
    assert train.get_autocast(device('cuda'))[1] is torch.float32
    refuses('V100 has no bfloat16', train.get_autocast, device('cuda'), 'bfloat16')
    for name, peak in (('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA A100-PCIE-40GB', 312e12), ('NVIDIA L400', None),
                       ('NVIDIA A100 80GB PCIe', 312e12), ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
                       ('NVIDIA RTX 6000 Ada Generation', 364e12), ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None)):
        assert train.gpu_peak(name, torch.bfloat16) == peak
        assert train.gpu_peak(name, torch.float32) == (peak and peak / 2)


def test_configs_have_the_published_sizes():
    published = {'pythia70m': 70426624, 'pythia160m': 162322944, 'pythia410m': 405334016, 'pythia1b': 1011781632,
                 'pythia1.4b': 1414647808, 'pythia2.8b': 2775208960}
    for file in sorted((HERE / 'config').glob('*.py')):
        cfg = train.load_config([str(file)])
        tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
        assert cfg.out_dir == f'out/{file.stem}' and train.in_steps('max_steps', cfg.max_steps, tokens) > 0
        if file.stem not in ('tiny', 'shakespeare', 'evidence'):
            assert tokens == 2 ** 21 and cfg.gradient_accumulation_steps % 64 == 0
        if file.stem in published:
            shape = {f.name: getattr(cfg, f.name) for f in fields(AdaPonderConfig) if hasattr(cfg, f.name)}
            assert bench.count_parameters(AdaPonderConfig(**{**shape, 'halting': False})) == published.pop(file.stem)
    assert not published
    # but for the shape the model and the training have the same defaults
    other = {'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'rotary_pct', 'rotary_base', 'norm_eps'}
    for f in fields(AdaPonderConfig):
        assert f.name in other or getattr(train.TrainConfig, f.name) == f.default, f.name


# nonsense is refused with a sentence

@pytest.mark.parametrize('kw, words', [
    (dict(n_embd=30), 'divisible by n_head'), (dict(n_iter=0), 'n_iter must be from 1'), (dict(tau=1.0), 'tau'),
    (dict(tau=-0.1), 'tau'), (dict(tau=math.nan), 'tau'), (dict(vocab_size=0), 'vocab_size must be from 1'),
    (dict(vocab_size=2 ** 31), 'vocab_size'), (dict(n_embd='32'), 'of type int'), (dict(n_layer=True), 'of type int'),
    (dict(rotary_pct=0.4), 'rotary_pct'), (dict(rotary_pct=-0.5), 'rotary_pct'), (dict(rotary_base=0.0), 'rotary_base'),
    (dict(norm_eps=math.nan), 'norm_eps'), (dict(gate_bias=math.inf), 'gate_bias'), (dict(early_ce=-0.1), 'early_ce'),
    (dict(objective='live'), 'objective'), (dict(feedback='x'), 'feedback'), (dict(gate_width=0.01), 'gate_width'),
    (dict(gate_width=math.inf), 'finite')])
def test_config_refuses_nonsense(kw, words):
    refuses(words, AdaPonderConfig, **{**dict(n_embd=32, n_head=4, rotary_pct=0.5), **kw})


@pytest.mark.parametrize('call, words', [
    (lambda m, x: m(x), '32'), (lambda m, x: m(x[:, :0]), '0'), (lambda m, x: m(x[:, :4], x[:, :3]), 'targets'),
    (lambda m, x: m(x[:, :4], execution='fast'), 'execution'), (lambda m, x: m(x[:, :4], max_iter=5), 'max_iter'),
    (lambda m, x: m.generate(x, 3, max_iter=0), 'max_iter'), (lambda m, x: m.generate(x, -1), 'max_new_tokens'),
    (lambda m, x: m(x[:, :4], tau=5.0), 'tau'),
    (lambda m, x: m(x[:, :4], policy=lambda i, s, h, row, pos: s[:1] > 0), 'the policy'),
    (lambda m, x: m.generate(x[:, :0], 3), 'one token'),
    (lambda m, x: m.generate(x + 61, 3), 'from 0 to 60'), (lambda m, x: m.generate(x - 1, 3), 'from 0 to 60'),
    (lambda m, x: m.generate(x, 3, top_p=math.nan), 'top_p'), (lambda m, x: m.generate(x, 3, top_k=0), 'top_k'),
    (lambda m, x: m.generate(x, 3, temperature=math.nan), 'temperature'),
    (lambda m, x: list(stream(m, [[1], [2]], [3])), '1 numbers'),
    (lambda m, x: m.requires_grad_(False).unembed.weight.fill_(math.nan) is m.generate(x, 3), 'not finite'),
    (lambda m, x: list(stream(m, [[1], []], 3)), 'one token'), (lambda m, x: list(stream(m, [[61]], 3)), '0 to 60'),
    (lambda m, x: list(stream(m, [[1], [2]], 3, generator=[torch.Generator()])), '1 generators'),
    (lambda m, x: list(stream(m, [[1], [2]], [1, -1])), 'at least 0'),
    (lambda m, x: list(stream(m, [[1]], 3, top_p=0.0)), 'top_p'),
    (lambda m, x: list(stream(m, [[1]], 3, max_iter=5)), 'max_iter')])
def test_model_and_engine_refuse_nonsense(call, words):
    refuses(words, call, tiny(torch.float32), torch.zeros(1, 33, dtype=torch.long))


def test_checkpoints_that_cannot_be_read_are_refused(tmp_path):
    m, path, x = tiny(torch.float32), tmp_path / 'ckpt.pt', random_tokens(1, 9)

    def with_config(**changes):
        return dict(adaponder=1, config={**asdict(m.cfg), **changes}, model=m.state_dict())
    refuses('no checkpoint', AdaPonderLM.from_checkpoint, path)
    write_files(tmp_path, {'ckpt.pt': 'junk'})
    refuses('not a readable', AdaPonderLM.from_checkpoint, path)
    for state, words in ((dict(model={}), 'another project'), (with_config(later=1), 'another version'),
                         (with_config(n_layer=3), 'another version'), (with_config(objective='live'), 'objective')):
        torch.save(state, path)
        refuses(words, AdaPonderLM.from_checkpoint, path)
    torch.save(with_config(), path)
    data = bytearray(path.read_bytes())
    data[data.index(m.embed.weight.numpy(force=True).tobytes()) + 9] ^= 1
    path.write_bytes(data)
    refuses('checksum', AdaPonderLM.from_checkpoint, path)
    torch.save(with_config(), path)
    again = AdaPonderLM.from_checkpoint(path)
    assert again.cfg == m.cfg and torch.equal(again(x).logits, m(x).logits)


# bench.py

OPTIONS = SimpleNamespace(device='cpu', dtype='float32', batch_size=3, seed=5, tau=None, max_iter=None)


def run_bench(*argv):
    return bench.main([str(x) for x in argv])


def bench_run(folder, name, model, /, **more):
    """A checkpoint as train.py writes it, and the data folder that it names."""
    if not (folder / 'data').exists():
        write_data(folder / 'data', n_val=1600)
    return save_ckpt(model, folder / name, **{'train_config': dict(data_dir=str(folder / 'data'), seed=1), **more})


def shape_file(path, **kw):
    """A config file of train.py."""
    shape = dict(vocab_size=500, block_size=128, n_layer=2, n_head=4, n_embd=64, batch_size=2) | kw
    write_files(path.parent, {path.name: ''.join(f'{k} = {v!r}\n' for k, v in shape.items())})
    return path


@pytest.mark.parametrize('kind, halting', [('learned', True), ('confidence', False), ('convergence', False)])
def test_scores_and_exits_against_their_definitions(kind, halting):
    """Token by token: a score may compare with the same token's last prediction, also where others have halted."""
    m, x = tiny(halting=halting), random_tokens(6, 33, seed=20)
    got, P = torch.zeros(6, 32, 3, dtype=torch.float64), {}

    def measure(t):
        return bench.measure(m, x, OPTIONS, bench.threshold_policy(bench.SCORES[kind](m), t, record=got))[0]
    assert (measure(-math.inf) == 4).all() and got.isfinite().all() == (kind != 'convergence')
    t = 1.001 * float(got[..., 1].median())  # no token's own score
    depth = measure(t)
    assert {2, 3, 4} <= set(depth.flatten().tolist())

    def by_hand(i, s, h, row, pos):
        go_on = []
        for n, key in enumerate(zip(row.tolist(), pos.tolist())):
            P[i, key] = m.unembed(h[n]).softmax(-1)
            if kind == 'convergence':
                score = float((P[i - 1, key] * (P[i - 1, key] / P[i, key]).log()).sum()) if i else math.inf
            else:
                score = float(s[n]) if kind == 'learned' else -float(P[i, key].max())
            assert score == math.inf or abs(score - float(got[key][i])) < 1e-6
            go_on.append(score >= t)
        return torch.tensor(go_on)
    with torch.no_grad():
        assert torch.equal(m(x[:, :-1], policy=by_hand).depth, depth)


def test_threshold_is_the_nearest():
    m = tiny()
    cost = bench.cost_table(m.cfg, 32)
    assert float(cost[9, 2]) == float(m.cfg.inference_flops(3, 10)) and cost.shape == (32, 4)
    scores = torch.rand(3, 32, 3, generator=torch.Generator().manual_seed(22), dtype=torch.float64)

    def brute(t):  # token by token
        total = 0.0
        for window in scores.tolist():
            for p, gates in enumerate(window):
                depth = 1 + next((i for i, s in enumerate(gates) if s < t), 3)
                total += float(m.cfg.inference_flops(depth, p + 1))
        return total / 96
    for share in (0.3, 0.5, 0.8):
        target = share * float(cost[:, -1].mean())
        best = min(abs(brute(t) - target) for t in scores.flatten().tolist())
        assert abs(brute(bench.find_threshold(scores, cost, target)) - target) <= best * (1 + 1e-9)


@pytest.mark.parametrize('kind', ['learned', 'confidence', 'convergence', 'uniform', 'geometric'])
def test_policies_spend_what_they_should(kind):
    m, x = tiny(), random_tokens(60, 33, seed=20)
    cost = bench.cost_table(m.cfg, 32)
    target = 0.7 * float(cost[:, -1].mean())
    near = 0.001  # a threshold that is set on the same text is exact
    if kind in bench.SCORES:
        policy = bench.calibrated_policy(m, x, OPTIONS, kind, cost, target)
    else:
        policy, near = bench.scheduled_policy(kind, cost.mean(0).tolist(), target), 0.02
    depth, _ = bench.measure(m, x, OPTIONS, policy)
    assert abs(bench.flops_spent(cost, depth) / target - 1) < near
    active = [1.0] + [float((depth > i).double().mean()) for i in (1, 2, 3)]
    steps = [b / a if kind == 'geometric' else a - b for a, b in zip(active, active[1:])]
    assert kind in bench.SCORES or max(steps) - min(steps) < 0.05


def test_ppl_and_results(tmp_path, capsys):
    kinds = dict(adaptive={}, fixed=dict(halting=False), vanilla=dict(n_iter=1), cheap={})
    kinds['three'] = dict(halting=False, n_iter=3)
    made = {name: tiny(torch.float32, seed=n, **kw) for n, (name, kw) in enumerate(kinds.items())}
    paths = {name: bench_run(tmp_path, f'{name}.pt', m) for name, m in made.items()}
    argv = ['ppl', '--ckpt', paths.pop('adaptive'), '--others', *(f'{name}={p}' for name, p in paths.items())]
    argv += ['--save', 0.2, 0.4, '--eval_tokens', 1000, '--seed', 7, '--json', tmp_path / 'one.json']
    got, text = run_bench(*argv), capsys.readouterr().out
    x = bench.val_text(tmp_path / 'data', made['adaptive'], {}, 31, 32)
    assert len({tuple(w) for w in x.tolist()}) == 31

    # every model's rows against the model itself
    rows = {(r['model'], r['policy'], r['setting']): r for r in got['rows']}
    full = sum(float(made['fixed'].cfg.inference_flops(4, t + 1)) for t in range(32)) / 32
    expected = [('adaptive', 'learned', 'own tau', {}), ('cheap', 'learned', 'as trained', {})]
    expected += [(name, 'fixed depth', f'max_iter {d}', dict(max_iter=d, tau=0.0))
                 for name, d in (('three', 3), ('vanilla', 1), ('adaptive', 2), ('adaptive', 4))]
    for name, policy, setting, kw in expected:
        m, r = made[name], rows[name, policy, setting]
        out = m(x[:, :-1], x[:, 1:], **kw)
        flops = [m.cfg.inference_flops(out.depth[:, t], t + 1, kw.get('max_iter')).double().mean() for t in range(32)]
        assert abs(r['nll'] - out.ce_loss.item()) < 1e-5 and abs(r['saved'] - (1 - sum(flops) / 32 / full)) < 1e-6
        assert abs(r['depth'] - float(out.depth.double().mean())) < 1e-9
        assert abs(r['nll_error'] - float(out.nll.double().mean(1).std() / math.sqrt(31))) < 1e-6
    # equal FLOPs at each setting, and the difference to the gates is paired
    for (model, policy, setting), r in rows.items():
        if policy != 'fixed depth' and setting != 'as trained':
            assert abs(r['saved'] - rows['adaptive', 'learned', setting]['saved']) < 0.03, (model, policy, setting)
    out = made['adaptive'](x[:, :-1], x[:, 1:])
    active = [float((out.depth > i).double().mean()) for i in (1, 2, 3)]
    other = made['adaptive'](x[:, :-1], x[:, 1:], policy=bench.random_policy(active, 7))
    over, r = (other.nll - out.nll).double().mean(1), rows['adaptive', 'random', 'own tau']
    assert abs(r['over_learned'] - float(over.mean())) < 1e-6
    first, last = (made['adaptive'](x[:, :-1], x[:, 1:], tau=0.0, max_iter=n).nll for n in (1, 4))
    ranks = []
    for values in (out.depth.flatten().float(), (first - last).flatten()):  # those below, and half of its equals
        ranks.append(((values < values[:, None]).float() + 0.5 * (values == values[:, None]).float()).sum(1))
    correlation = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    assert abs(rows['adaptive', 'learned', 'own tau']['rank_correlation'] - correlation) < 1e-4
    assert abs(r['over_learned_error'] - float(over.std()) / math.sqrt(31)) < 1e-6

    policies = {model: {p for m, p, _ in rows if m == model} - {'fixed depth'} for model in made}
    exits = {'confidence', 'convergence'}
    assert policies == dict(adaptive=set(bench.POLICIES), fixed=exits, three=exits, vanilla=set(), cheap={'learned'})
    out = made['cheap'](x[:, :-1], x[:, 1:])
    for r in [r for r in got['depths'] if r['model'] == 'cheap']:
        at = out.depth == r['depth']
        assert r['share'] == float(at.double().mean()) and abs(r['nll'] - float(out.nll[at].mean())) < 1e-5
    own = rows['adaptive', 'learned', 'own tau']
    assert f'{own["nll"]:.4f} ± {own["nll_error"]:.4f}' in text

    # the same setting with another seed, 0.2 nats worse
    for r in got['rows'] + got['depths']:
        r['seed'], r['nll'] = 2, r['nll'] + 0.2
    write_files(tmp_path, {'two.json': json.dumps(got, default=str)})
    run_bench('results', tmp_path / 'one.json', tmp_path / 'two.json', '--out', tmp_path / 'r')
    first = capsys.readouterr().out
    assert f'{own["nll"] - 0.1:.4f} ± 0.1414' in first  # own is of the second file now; 0.2 / sqrt(2)
    assert (tmp_path / 'r' / 'isoflops.png').exists() == ('no pictures' not in first)
    run_bench('results', tmp_path / 'r' / 'results.json', '--out', tmp_path / 'again')  # made anew
    assert capsys.readouterr().out.split('wrote')[0] == first.split('wrote')[0]
    refuses('repeats a seed', run_bench, 'results', tmp_path / 'one.json', tmp_path / 'one.json', '--out', tmp_path)
    two = bench_run(tmp_path, 'two.pt', tiny(torch.float32, n_iter=2))  # nothing converges yet
    run_bench('ppl', '--ckpt', two, '--save', 0.2, '--eval_tokens', 100, '--group', '$a$ x^')


@pytest.mark.parametrize('shape', [
    {}, dict(vocab_size=50304, n_embd=32), dict(halting=False, n_iter=1), dict(feedback='hidden')])
def test_flops_table_equals_the_counter(shape, tmp_path):
    c, = run_bench('flops', '--config', shape_file(tmp_path / 'a.py', **shape))['configs']
    cfg = AdaPonderConfig(**c['config'])
    assert c['parameters'] == sum(p.numel() for p in AdaPonderLM(cfg).parameters()) and c['counted'] == 1
    for r in c['depths']:
        parts = sum(r[k] for k in ('linear', 'attention', 'unembed', 'ponder', 'gates'))
        assert abs(parts / r['total'] - 1) < 1e-12 and r['total'] == cfg.inference_flops(r['depth'], 64.5)
    assert (c['depths'][0]['x_vanilla'] == 1) == (not cfg.halting or cfg.n_iter == 1)


def test_speed_counts_what_it_times(tmp_path):
    m = tiny(torch.float32)
    argv = ['--data', tmp_path / 'data', '--length', 24, '--prompt', 6, '--slots', 1, 3, '--rounds', 1, '--share', 0.5]
    got = run_bench('speed', '--ckpt', bench_run(tmp_path, 'a.pt', m), *argv)
    rows, half = {(r['case'], r['variant']): r for r in got['rows']}, 'adaptive, 50% halted'
    cases = ('prefill 24', 'decode, 1 slots', 'decode, 3 slots')
    assert set(rows) == set(itertools.product(cases, ('fixed', 'adaptive', half)))
    val, fixed = np.fromfile(tmp_path / 'data/val_0.bin', np.uint16).astype(np.int64), replace(m.cfg, halting=False)

    def windows(n, length):  # n of them, evenly spread
        starts = np.linspace(0, (len(val) - length) // length - 1, n).round().astype(int) * length
        return torch.tensor(np.stack([val[s:s + length] for s in starts]))

    def prefill(cfg, depth):  # token by token; logits of the last one alone
        head = cfg.flops(0)['unembed']
        return sum(float(cfg.inference_flops(d, t + 1)) - head for t, d in enumerate(depth)) + head
    policy = bench.scheduled_policy('geometric', range(4), 1.5)  # half of iterations 2 .. 4
    for variant, p in (('adaptive', None), (half, policy)):
        depth, r = m(windows(1, 24), policy=p).depth[0].tolist(), rows['prefill 24', variant]
        assert len(set(depth)) > 1 and r['depth'] == pytest.approx(sum(depth) / 24)
        assert r['flop_ratio'] == pytest.approx(prefill(m.cfg, depth) / prefill(fixed, [4] * 24), rel=1e-9)
        # 13 tokens a slot are timed, after the prompt and the first new one
        steps = list(bench.stream(m, windows(3, 6).tolist(), 26, temperature=0, policy=p, slots=3))[3:3 + 39]
        assert rows['decode, 3 slots', variant]['depth'] == pytest.approx(sum(s.depth for s in steps) / 39)
        steps = list(bench.stream(m, windows(1, 6).tolist(), 26, temperature=0, policy=p))[1:14]
        mine = sum(float(m.cfg.inference_flops(s.depth, t)) for t, s in enumerate(steps, start=7))
        ratio = mine / sum(float(fixed.inference_flops(4, t)) for t in range(7, 20))
        assert rows['decode, 1 slots', variant]['flop_ratio'] == pytest.approx(ratio, rel=1e-9)


def test_variants_run_in_turn():
    order, known = [], dict(A=dict(seconds=0.5, flops=2.0), B=dict(seconds=0.75, flops=1.0))
    variants = {n: lambda n=n: order.append(n) or dict(depth=1.0, **known[n]) for n in 'AB'}
    rows = bench.time_variants('case', variants, rounds=2)
    assert order == list('AABB' 'ABAB')  # a warm-up of each, then in turn
    assert rows[1]['time_ratio'] == [1.5] * 3 and rows[1]['ms_per_token'] == [750.0] * 3
    assert rows[1]['flop_ratio'] == 0.5 and rows[1]['time_per_flops'] == 3.0


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('kw', [dict(n_iter=1), dict(halting=False), dict(), dict(objective='paper')])
def test_plan_knows_the_peak_of_a_step(kw, bf16, remat, tmp_path):
    """Tensors without values against the bytes that torch's profiler sees come and go in a step that runs."""
    cfg = AdaPonderConfig(**{**dict(vocab_size=2048, block_size=256, n_layer=3, n_head=4, n_embd=64), **kw})
    model, x = AdaPonderLM(cfg), torch.randint(cfg.vocab_size, (8, 257))
    model.remat = remat
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as prof:
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = model(x[:, :-1], x[:, 1:], tau=0.0, k=0.1).loss
        loss.backward()
    prof.export_chrome_trace(str(tmp_path / 'trace.json'))
    trace = json.loads((tmp_path / 'trace.json').read_text(encoding='utf-8'))['traceEvents']
    events = [(e['ts'], e['args']['Total Allocated'], e['args']['Bytes']) for e in trace if e['name'] == '[memory]']
    _, first, size = min(events)
    measured = max(total for _, total, _ in events) - (first - size)
    in_place = 4 * sum(p.numel() for p in model.parameters())  # gradients that autograd adds up in place
    got, low = bench.activation_memory(cfg, 8, bf16, remat, like_gpu=False), 0.98 if cfg.objective == 'paper' else 0.99
    assert measured * low < got < measured * 1.01 + in_place


def test_plan_arithmetic(tmp_path, capsys):
    file = shape_file(tmp_path / 'a.py', gradient_accumulation_steps=16, max_steps='1M tokens')
    got = run_bench('plan', '--config', file, '--gpu', 'A100', '--gpus', 8, '--mfu', 0.5, '--price', 2)
    cfg = AdaPonderConfig(**got['config'])
    P, tokens = sum(p.numel() for p in AdaPonderLM(cfg).parameters()), round(1e6 / (2 * 128 * 16)) * 2 * 128 * 16
    hours = 3 * cfg.inference_flops(4, 64.5) * tokens / (312e12 * 0.5) / 3600
    assert got['tokens'] == tokens and got['parameters'] == P and abs(got['gpu_hours'] / hours - 1) < 1e-9
    assert f'${2 * hours:,.0f}' in capsys.readouterr().out
    memory = got['memory']
    assert memory['weights'] == memory['gradients'] == 4 * P == memory['optimizer'] / 2
    big = shape_file(tmp_path / 'b.py', vocab_size=2048, block_size=2048, n_layer=4, n_head=8, n_embd=512,
                     batch_size=64, gradient_accumulation_steps=8)
    got = run_bench('plan', '--config', big, '--gpu', 'RTX 4090')
    cfg, n = AdaPonderConfig(**got['config']), got['largest_batch_size']
    static = got['peak_memory'] - got['memory']['activations']
    assert 0 < n < 64 and static + bench.activation_memory(cfg, n) < 24e9 < static + bench.activation_memory(cfg, n + 6)


@pytest.mark.parametrize('settings, want', [
    (dict(), ([], 256, 0.0)), (dict(until='\n', max_gen_toks=9), (['\n'], 9, 0.0)),
    (dict(do_sample=False, temperature=0.7), ([], 256, 0.0)), (dict(do_sample=True), ([], 256, 0.0)),
    (dict(temperature=0.7, max_new_tokens=5, max_tokens=7), ([], 5, 0.7))])
def test_harness_sampling_is_as_lm_eval_has_it(settings, want):
    assert bench.sampling_of(settings)[:3] == want
    assert bench.sampling_of(dict(settings, top_k=0, top_p=0.9))[3:] == (None, 0.9)
    theirs = pytest.importorskip('lm_eval.models.utils').normalize_gen_kwargs(dict(settings))
    temperature = theirs.get('temperature', 0.0) if theirs['do_sample'] else 0.0
    assert (theirs['until'], theirs['max_gen_toks'], temperature) == want


def test_harness_adapter(tmp_path):
    """Log-likelihoods, rolling windows and generation against direct computations, and against lm-eval's own model."""
    Instance = pytest.importorskip('lm_eval.api.instance').Instance
    hf = neox(vocab_size=50304, hidden_size=32, block_size=48, bos_token_id=0, eos_token_id=0)
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    hf.save_pretrained(tmp_path)
    shutil.copy(shared('neox20b_tokenizer.json'), tmp_path / 'tokenizer.json')
    special = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=EOT, eos_token=EOT)
    write_files(tmp_path, {'tokenizer_config.json': special})
    model = AdaPonderLM.from_pretrained(tmp_path, n_iter=4).requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.proj.weight, std=2.0)
    enc = prepare_data.load_tokenizer(tmp_path / 'tokenizer.json')
    pairs = [('The cat sat on the', ' mat'), ('', 'Once upon a time'), ('word ' * 60, 'end of it'), ('a ', 'b')]
    until = [('The cat', dict(until=['.', '\n'], max_gen_toks=9)), ('a dog that', dict(until=[], max_gen_toks=9))]

    def ask(kind, arguments):
        return [Instance(kind, {}, x, n) for n, x in enumerate(arguments)]
    text = torch.tensor([enc.encode_ordinary(' '.join(c for c, _ in pairs))[:48]])
    tau = float(model(text, tau=0.0).gates[..., 1].median())  # at which depths differ
    for halting in (dict(tau=tau, max_iter=None), dict(tau=None, max_iter=1)):
        lm = bench.harness_model(model, enc, SimpleNamespace(**{**vars(OPTIONS), **halting}))
        got, depths = lm.loglikelihood(ask('loglikelihood', pairs), disable_tqdm=True), []
        for (context, continuation), (value, greedy) in zip(pairs, got):
            if context:  # blanks at its end belong to the continuation
                whole, n = enc.encode_ordinary(context + continuation), len(enc.encode_ordinary(context.rstrip()))
            else:
                whole, n = [0] + enc.encode_ordinary(continuation), 1
            out = model(torch.tensor([whole[-49:-1]]), **halting)
            want = torch.tensor(whole[n:])
            p = out.logits[0, -len(want):].log_softmax(-1)
            assert abs(value - float(p.gather(-1, want[:, None]).sum())) < 1e-3
            assert greedy == bool((p.argmax(-1) == want).all())
            depths += out.depth[0].tolist()
        assert lm.depths == depths and (halting['max_iter'] == 1 or len(set(depths)) > 1)
        texts = lm.generate_until(ask('generate_until', until))
        for (context, g), text in zip(until, texts):
            x = torch.tensor([enc.encode_ordinary(context)])
            tokens = model.generate(x, 9, temperature=0, **halting)[0, x.size(1):].tolist()
            plain = enc.decode([t for t in tokens if t < enc.n_vocab])
            assert text == min((plain.split(w)[0] for w in g['until']), key=len, default=plain)
    pytest.importorskip('accelerate', reason="lm-eval's own model needs it")
    from lm_eval.models.huggingface import HFLM
    theirs = HFLM(pretrained=str(tmp_path), dtype='float32', device='cpu', batch_size=2)
    for a, b in zip(got, theirs.loglikelihood(ask('loglikelihood', pairs), disable_tqdm=True)):
        assert abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]
    asked = ask('loglikelihood_rolling', [('cat and dog ' * 40,), ('short text',)])
    same = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert lm.loglikelihood_rolling(asked) == pytest.approx(same, rel=1e-5)
    assert texts == theirs.generate_until(ask('generate_until', until), disable_tqdm=True)


def test_downstream_runs_tasks_at_adaptive_depth(ckpt, monkeypatch):
    """The command with lm-eval replaced: its evaluation asks for one text."""
    def evaluate(lm, tasks, **settings):
        request = SimpleNamespace(args=('To be', dict(max_gen_toks=9)))
        return dict(results={tasks[0]: lm.generate_until([request])[0]})
    utils, tasks = SimpleNamespace(make_table=str), SimpleNamespace(all_tasks=['echo'])
    modules = {'': dict(simple_evaluate=evaluate, utils=utils), '.tasks': dict(TaskManager=lambda: tasks),
               '.utils': vars(utils), '.api': {}, '.api.model': dict(TemplateLM=type('TemplateLM', (), {}))}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f'lm_eval{name}', SimpleNamespace(**module))
    m = AdaPonderLM.from_checkpoint(ckpt)
    steps = list(stream(m, [list(b'To be')], 9, temperature=0, tau=0.3, stop_token=256))
    got = run_bench('downstream', '--ckpt', ckpt.parent, '--tasks', 'echo', '--tau', 0.3)['tasks']['echo']
    text = bytes(step.token for step in steps if step.token < 256).decode(errors='replace')
    assert got == dict(results=dict(echo=text), depth=pytest.approx(sum(step.depth for step in steps) / len(steps)))
    refuses('no task other', run_bench, 'downstream', '--ckpt', ckpt, '--tasks', 'echo,other')


def test_curves(tmp_path, capsys):
    for name, loss in (('a', 2.5), ('b', 3.5)):
        records = [dict(step=1, tokens=100, loss=loss, depth=4.0, gate_mean=[]),
                   dict(step=2, tokens=200, loss=loss / 2, depth=4.0, gate_mean=[0.9, 0.8]),
                   dict(step=2, val_loss=loss, val_depth=3.0), dict(step=2, gate_mean=[0.7])]  # no token came to gate 1
        text = ''.join(json.dumps(r) + '\n' for r in records) + '{"step": 3, "lo'  # killed while it wrote
        write_files(tmp_path / name, {'log.jsonl': text})
    run_bench('curves', tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'c.png')
    text = capsys.readouterr().out
    line = next(t for t in text.splitlines() if str(tmp_path / 'a') in t)
    assert [c.strip() for c in line.split('|')[2:7]] == ['200', '1.2500', '2.5000', '4.00', '3.00']
    assert (tmp_path / 'c.png').exists() == ('no pictures' not in text)


LOGS = ['3', '[1]', '{"loss": 1.0}', '{"step": 1, "loss": "low"}', '{"step": 1, "lr": "low"}', '{"step": {}, "lr": 1}',
        '{"step": 1, "gate_mean": [[1], 2]}']


@pytest.mark.parametrize('command, words', [
    ('ppl --ckpt none.pt', 'no checkpoint at'), ('ppl --ckpt a.pt --data .', 'meta.json'),
    ('ppl --ckpt a.pt --others a.pt', 'NAME=CKPT'), ('ppl --ckpt a.pt --others fixed=o.pt', 'cannot be compared'),
    ('ppl --ckpt a.pt --data other', 'another tokenizer'), ('ppl --ckpt a.pt --eval_tokens -5', 'must be'),
    ('ppl --ckpt a.pt --save nan', 'must be'), ('ppl --ckpt a.pt --json .', 'folder'),
    ('ppl --ckpt a.pt --json no/x.json', 'cannot'), ('ppl --ckpt nan.pt', 'NaN'), ('ppl --ckpt no_data.pt', '--data'),
    ('ppl --ckpt list.pt', 'list.pt is damaged'), ('results junk.json', 'junk.json'),
    ('results half.json', 'half.json'), ('results empty.json', 'empty.json'), ('results lacks.json', 'lacks.json'),
    ('flops', 'required'),
    ('flops --config e.py', 'starts from'), ('speed --ckpt v.pt', 'n_iter > 1'), ('speed --ckpt run', 'n_iter > 1'),
    ('speed --config c.py --length 999', 'block_size'), ('speed --config c.py --prompt 128', '--prompt'),
    ('plan --config c.py --set n_embd=65', 'n_embd'), ('plan --config c.py --mfu 2', 'must be'),
    ('curves .', 'log.jsonl'), ('curves run --out x.foo', 'must end in'), ('curves run --out d.png', 'is a folder'),
    ('curves run --out junk.json/x.png', 'junk.json'),
    *[(f'curves log{n}', 'not written by train.py') for n in range(len(LOGS))]])
def test_bench_refuses_nonsense(command, words, tmp_path, monkeypatch, capsys):
    """And leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    m, lacks = tiny(torch.float32), dict(group='g', model='m', policy='p', setting='s', seed=1, nll=2.0)
    nan = {name: t * math.nan for name, t in m.state_dict().items()}
    for name, more in (('a', {}), ('no_data', dict(train_config=None)), ('list', dict(train_config=[1])),
                       ('nan', dict(model=nan))):
        bench_run(tmp_path, f'{name}.pt', m, **more)
    for name, kw in (('o.pt', dict(block_size=16)), ('v.pt', dict(n_iter=1)), ('run/ckpt.pt', dict(n_iter=1))):
        bench_run(tmp_path, name, tiny(torch.float32, **kw))
    write_data(tmp_path / 'other', tokenizer_sha256='0' * 64)
    write_files(tmp_path, {
        'junk.json': {'a': 1}, 'half.json': dict(rows=[{}], depths=[]), 'empty.json': dict(rows=[], depths=[]),
        'lacks.json': dict(rows=[lacks], depths=[]), 'run/log.jsonl': '', 'd.png/x': '',
        **{f'log{n}/log.jsonl': '{"step": 1, "loss": 2.0}\n' + line for n, line in enumerate(LOGS)}})
    shape_file(tmp_path / 'c.py')
    shape_file(tmp_path / 'e.py', init_from='some/folder')
    before = contents(tmp_path)
    if 'must be' in words or words == 'required':  # argparse says it
        with pytest.raises(SystemExit):
            run_bench(*command.split())
        assert words in capsys.readouterr().err
    else:
        refuses(words, run_bench, *command.split())
    assert contents(tmp_path) == before


def test_readme_quotes_code_that_stands_in_model_py():
    text = (HERE / 'README.md').read_text(encoding='utf-8').split('## The model in ten minutes')[1].split('\n## ')[0]
    code = (HERE / 'model.py').read_text(encoding='utf-8')
    quoted = [line for block in re.findall(r'```python\n(.*?)```', text, re.S) for line in block.splitlines()]
    assert len(quoted) > 4 and [line for line in quoted if line + '\n' not in code] == []
    assert all(f'def {name}(' in code for name in re.findall(r'`(\w+)\(\)`', text))


def test_model_py_works_when_copied_alone(tmp_path):
    """It needs torch and the standard library, and the README's training loop makes tokens halt."""
    code = (HERE / 'model.py').read_text(encoding='utf-8')
    assert {*re.findall(r'^(?:import|from) (\w+)', code, re.M)} <= {'torch', *sys.stdlib_module_names}
    shutil.copy(HERE / 'model.py', tmp_path)
    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    loop = re.search(r'Copy model.py.*?```python\n(.*?)```', readme, re.S)[1]
    program = f"""
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
{loop}
with torch.no_grad():
    depth = model(text[:6400].view(100, 64)).depth
print(out.ce_loss.item(), *torch.bincount(depth.flatten(), minlength=5).tolist())
"""
    run = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    loss, *depth = map(float, run.stdout.split()[-6:])
    assert loss < 3.0 and sum(n > 60 for n in depth) > 1
    assert 0.05 < sum(n * (4 - d) for d, n in enumerate(depth)) / (3 * 6400) < 0.4, depth
