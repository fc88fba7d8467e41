"""
Every claim of this project, held against an independent computation. Run: python -m pytest -q test_model.py

Tests that compare with transformers or tokenizers, or want the files in ../shared, skip with a reason where these are absent.
"""
import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as model_py
from model import AdaPonderConfig, AdaPonderLM, load_checkpoint, sample

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared'
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


# model.py against a naive reference: method.md's formulas, one token at a time, in float64, without torch's attention, masks or caches

def tiny(dtype=torch.float64, open_gates=False, seed=0, **kw):
    """A small model whose gates really halt: about a third of the tokens at each gate."""
    torch.manual_seed(seed)
    cfg = AdaPonderConfig(**{**dict(vocab_size=61, block_size=32, n_layer=2, n_head=4, n_embd=32, rotary_pct=0.5), **kw})
    model = AdaPonderLM(cfg).to(dtype)
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
    return model


def naive(model, tokens, policy=None, halting=True):
    """One sequence, float64. Returns logits (T, vocab), depths, gate values: lists over tokens."""
    cfg, w = model.cfg, {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    T, d, nh = len(tokens), cfg.n_embd, cfg.n_head
    hs = d // nh
    rot = int(hs * cfg.rotary_pct)
    scale = math.sqrt(d) if cfg.scale_embeds else 1.0

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + cfg.norm_eps) * w[name + '.weight'] + w[name + '.bias']

    def gelu(x):
        return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])

    def mlp(x, name):
        return w[name + '.proj.weight'] @ gelu(w[name + '.fc.weight'] @ x + w[name + '.fc.bias']) + w[name + '.proj.bias']

    def rope(x, t):
        y = x.copy()
        for j in range(rot // 2):
            a = t * cfg.rotary_base ** (-2 * j / rot)
            y[j] = x[j] * math.cos(a) - x[j + rot // 2] * math.sin(a)
            y[j + rot // 2] = x[j + rot // 2] * math.cos(a) + x[j] * math.sin(a)
        return y

    E = [w['embed.weight'][t] * scale for t in tokens]
    alive, depth, gates, out = [True] * T, [0] * T, [[] for _ in range(T)], [None] * T
    K, V = {}, {}  # (layer, token, head): overwritten by each iteration that the token runs
    for i in range(cfg.n_iter):
        x = {t: E[t] for t in range(T) if alive[t]}
        for l in range(cfg.n_layer):
            q = {}
            for t in x:
                qkv = w[f'blocks.{l}.attn.qkv.weight'] @ norm(x[t], f'blocks.{l}.ln_1') + w[f'blocks.{l}.attn.qkv.bias']
                for h in range(nh):
                    a, b, c = np.split(qkv[h * 3 * hs:(h + 1) * 3 * hs], 3)
                    q[t, h], K[l, t, h], V[l, t, h] = rope(a, t), rope(b, t), c
            for t in x:
                y = []
                for h in range(nh):
                    scores = np.array([q[t, h] @ K[l, u, h] / math.sqrt(hs) for u in range(t + 1)])
                    p = np.exp(scores - scores.max())
                    y.append(sum(pu * V[l, u, h] for u, pu in enumerate(p / p.sum())))
                x[t] = (x[t] + w[f'blocks.{l}.attn.proj.weight'] @ np.concatenate(y) + w[f'blocks.{l}.attn.proj.bias']
                        + mlp(norm(x[t], f'blocks.{l}.ln_2'), f'blocks.{l}.mlp'))
        for t in x:
            h = norm(x[t], 'ln_f')
            depth[t], out[t] = i + 1, w['unembed.weight'] @ h
            if i < cfg.n_iter - 1:
                s = 1 / (1 + math.exp(-mlp(h, f'gates.{i}')[0])) if halting else 1.0
                gates[t].append(s)
                alive[t] = policy(i, t) if policy else s >= cfg.tau
                if alive[t]:
                    p = np.exp(out[t] - out[t].max())
                    e = (p / p.sum()) @ w['embed.weight'] * scale
                    E[t] = E[t] + s * (h if cfg.feedback == 'hidden' else e)
    return np.stack(out), depth, gates


def cached(model, tokens, n, **kw):
    """Logits and depths of the cached execution: the prompt's first n tokens prefilled, the others forced through the decoder one by one."""
    logits, forced = [], iter(tokens[n:])
    drawn = model_py.sample

    def force(x, *a):
        logits.append(x[0])
        return torch.tensor([next(forced, 0)])
    model_py.sample = force
    try:
        steps = list(model.stream([tokens[:n]], len(tokens) - n + 1, **kw))
    finally:
        model_py.sample = drawn
    return torch.stack(logits), [s.depth for s in steps], [s.gates for s in steps]


@pytest.mark.parametrize('kw', [{}, dict(n_iter=1), dict(halting=False), dict(scale_embeds=False, rotary_pct=0.25, n_iter=3), dict(feedback='hidden')])
def test_three_executions_equal_the_naive_reference(kw):
    m = tiny(**kw)
    tokens = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(5))
    dense, packed = m(tokens), m(tokens, execution='packed')
    for b in range(2):
        logits, depth, gates = naive(m, tokens[b].tolist(), halting=m.cfg.halting)
        if m.gates:
            assert len(set(depth)) > 1  # the test means something only where some halt and some do not
        for out in (dense, packed):
            assert out.depth[b].tolist() == depth
            assert np.abs(out.logits[b].detach().numpy() - logits).max() < 1e-10
            for t in range(14):
                want = (gates[t] + [0.0] * m.cfg.n_iter)[:m.cfg.n_iter - 1]
                assert np.allclose(out.gates[b, t].numpy(), want, atol=1e-12)
        got, d, g = cached(m, tokens[b].tolist(), 5)
        assert d == depth[4:]
        assert np.abs(got.numpy() - logits[4:]).max() < 1e-10
        assert all(np.allclose(x, y, atol=1e-12) for x, y in zip(g, gates[4:]))


def coin(rate, seed=0):
    """A random halting policy that depends on (iteration, row, position) alone, so that every execution meets the same one."""
    def policy(i, s, h, row, pos):
        x = (row * 7919 + pos * 104729 + i * 1299709 + seed * 15485863) % 1009
        return x >= rate * 1009
    return policy


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_dense_packed_cached_agree_under_random_policies(dtype, bound):
    m = tiny(dtype)
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    for rate in (0.0, 0.3, 0.7, 1.0):
        a, b = m(tokens, policy=coin(rate)), m(tokens, execution='packed', policy=coin(rate))
        assert torch.equal(a.depth, b.depth)
        assert (a.logits - b.logits).abs().max() < bound
        got, depth, _ = cached(m, tokens[0].tolist(), 7, policy=coin(rate))
        assert depth == a.depth[0, 6:].tolist()
        assert (got - a.logits[0, 6:]).abs().max() < bound
        # independent of the model: a token's depth is 1 + the number of coins before the first tail
        i = torch.arange(3)[:, None, None]
        on = coin(rate)(i, None, None, torch.arange(3)[:, None], torch.arange(24))
        assert torch.equal(a.depth, 1 + on.int().cumprod(0).sum(0))


def test_packed_has_the_gradients_of_dense():
    m = tiny()
    x, y = torch.randint(61, (2, 2, 20), generator=torch.Generator().manual_seed(2))
    grads = []
    for execution in ('dense', 'packed'):
        m.zero_grad()
        m(x, y, execution=execution, k=0.9, ponder_lambda=0.5).loss.backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    assert max((a - b).abs().max() for a, b in zip(*grads)) < 1e-10


@pytest.mark.parametrize('pool', ['live', 'all'])
def test_gradients_reach_every_gate_and_are_right(pool):
    m = tiny(open_gates=True, pool=pool)
    x, y = torch.randint(61, (2, 2, 12), generator=torch.Generator().manual_seed(3))

    def loss():
        return m(x, y, k=0.37, ponder_lambda=0.5).loss
    loss().backward()
    for gate in m.gates:
        for p in gate.parameters():
            assert p.grad.abs().max() > 0
    g = torch.Generator().manual_seed(0)  # and against finite differences, in a random direction
    v = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in m.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(m.parameters(), v))
    with torch.no_grad():
        ends = []
        for eps in (1e-6, -2e-6):
            for p, d in zip(m.parameters(), v):
                p += eps * d
            ends.append(loss())
    assert abs((ends[0] - ends[1]) / 2e-6 - slope) < 1e-5 * abs(slope)


@torch.no_grad()
def test_ponder_loss_is_the_mean_of_the_smallest():
    m = tiny()
    x = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(4))
    policy = coin(0.3)
    for k in (0.9, 0.605):
        values = []
        for b in range(2):
            _, depth, gates = naive(m, x[b].tolist(), policy=lambda i, t: policy(i, None, None, b, t))
            values += [gates[t][i] if depth[t] > i + 1 else 0.0 for t in range(16) for i in range(3)]  # halted: paid
        n = k * len(values)
        want = sum(sorted(values)[:int(n)]) + sorted(values)[int(n)] * (n - int(n))
        assert want > 0 and 0.0 in values
        assert abs(float(m(x, x, k=k, policy=policy).ponder_loss) - want / n) < 1e-12
        assert abs(float(m(x, x, k=k, policy=policy, execution='packed').ponder_loss) - want / n) < 1e-12
    m.cfg.pool = 'all'  # where nobody halts the paper's pool is every value; where some do, halted tokens' gates go on counting
    values = sorted(m(x, policy=coin(0)).gates.flatten().tolist())
    assert abs(float(m(x, x, k=0.5, policy=coin(0)).ponder_loss) - sum(values[:48]) / 48) < 1e-12
    assert float(m(x, x, k=0.5, policy=policy).ponder_loss) > 0
    with torch.enable_grad(), pytest.raises(ValueError, match='needs the gates of halted tokens'):
        m(x, x, k=0.5, execution='packed')


def test_masks_are_monotone_and_a_halted_token_is_frozen():
    m = tiny()
    x = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(6))
    before = m(x)
    assert {1, 4} <= set(before.depth.flatten().tolist())
    for i in range(3):  # gates are evaluated exactly up to the halt
        assert torch.equal(before.gates[..., i] > 0, before.depth > i)
    first = before.depth[0].tolist().index(1)
    for p in m.gates[1].parameters():  # whatever later gates say cannot reach a token that halted, or earlier ones
        p.data.normal_(std=3)
    after = m(x)
    assert torch.equal(before.depth == 1, after.depth == 1)
    alone = m(x[:, :first + 1])
    assert (alone.logits[0, first] - m(x).logits[0, first]).abs().max() < 1e-12


def test_remat_and_chunks_change_no_gradient():
    m = tiny(open_gates=True)
    x = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(7))

    def grads():
        m.zero_grad()
        m(x, x, k=0.5, ponder_lambda=0.3).loss.backward()
        return [p.grad.clone() for p in m.parameters()]
    plain = grads()
    m.remat, m.CHUNK = True, 61 * 10  # ten tokens at a time; on the CPU the pondering embedding goes through fused attention too
    assert max((a - b).abs().max() for a, b in zip(plain, grads())) < 1e-12


# generation

def test_generate_is_the_same_on_every_execution():
    m = tiny(torch.float64)
    x = torch.randint(61, (2, 15), generator=torch.Generator().manual_seed(8))
    for kw in (dict(temperature=0), dict(temperature=1.0, top_k=20, top_p=0.9), dict(temperature=0.7, max_iter=2), dict(tau=0.5), dict(policy=coin(0.5))):
        outs = [m.generate(x, 36, execution=e, generator=torch.Generator().manual_seed(1), **kw) for e in ('cached', 'dense', 'packed')]
        assert outs[0].shape == (2, 51) and torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])  # 51 tokens outgrow the 32 of the context


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


def test_sample_draws_from_the_right_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    u = (torch.arange(10000) + 0.5) / 10000
    for kw, keep in ((dict(), range(5)), (dict(top_k=2), (2, 3)), (dict(top_p=0.7), (2, 3)), (dict(top_p=0.5), (3,)), (dict(temperature=2.0), range(5))):
        got = torch.bincount(sample(logits.expand(10000, -1), u, **kw), minlength=5) / 10000
        p = (logits[0] / kw.get('temperature', 1.0)).exp() * torch.tensor([float(j in keep) for j in range(5)])
        assert (got - p / p.sum()).abs().max() < 2e-4


# FLOPs

def count_flops(fn):
    from torch.utils.flop_counter import sdpa_flop_count
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter does not know the CPU's kernel
    with FlopCounterMode(display=False, custom_mapping={fused: lambda q, k, v, *a, out_shape=None, **kw: sdpa_flop_count(q, k, v)}) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize('shape', [dict(vocab_size=500, n_embd=64), dict(vocab_size=50304, n_embd=32)])  # the second one fuses softmax(h U^T) V
def test_flop_formula_equals_the_counter(shape):
    m = tiny(torch.float32, block_size=128, **shape).requires_grad_(False)
    x = torch.randint(61, (1, 128), generator=torch.Generator().manual_seed(10))
    for rate in (0.0, 0.5):
        out = []
        got = count_flops(lambda: out.append(m(x, x, execution='packed', policy=coin(rate))))
        # packed attention takes the queries in runs of up to 128: here one run a layer, and the counter counts its masked keys too
        want = sum(float(m.cfg.inference_flops(out[0].depth[0, t], 128)) for t in range(128))
        assert abs(got / want - 1) < 0.01
    plain = AdaPonderLM(AdaPonderConfig(**{**asdict(m.cfg), 'n_iter': 1})).requires_grad_(False)
    assert abs(count_flops(lambda: plain(x, x)) / float(128 * plain.cfg.inference_flops(1, 128)) - 1) < 0.01


def test_flop_formula_equals_the_counter_in_decoding():
    m = tiny(torch.float32, block_size=128).requires_grad_(False)
    x = torch.randint(61, (90,), generator=torch.Generator().manual_seed(11)).tolist()
    steps = []

    def decode(n):
        return count_flops(lambda: steps.append(list(m.stream([x], n, temperature=0, policy=coin(0.4)))))
    got = decode(21) - decode(1)  # without the prefill
    want = sum(float(m.cfg.inference_flops(s.depth, 91 + t)) for t, s in enumerate(steps[0][1:]))
    assert len({s.depth for s in steps[0]}) > 1 and abs(got / want - 1) < 0.01


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


# nonsense is refused with a sentence

@pytest.mark.parametrize('kw, words', [
    (dict(n_embd=30), 'divisible by n_head'), (dict(n_iter=0), 'n_iter must be at least 1'), (dict(tau=1.0), r'tau must be in \[0, 1\)'), (dict(tau=-0.1), 'tau'),
    (dict(vocab_size=0), 'vocab_size must be at least 1'), (dict(n_embd='32'), 'must be of type int'), (dict(rotary_pct=0.4), 'rotary_pct'), (dict(pool='x'), 'pool'),
    (dict(feedback='x'), 'feedback')])
def test_config_refuses_nonsense(kw, words):
    with pytest.raises(ValueError, match=words):
        AdaPonderConfig(**{**dict(n_embd=32, n_head=4, rotary_pct=0.5), **kw})


def test_model_refuses_nonsense(tmp_path):
    m = tiny(torch.float32)
    x = torch.zeros(1, 33, dtype=torch.long)
    for fn, words in [(lambda: m(x), 'block_size = 32'), (lambda: m(x[:, :4], execution='fast'), 'execution must be'), (lambda: m(x[:, :4], max_iter=5), 'max_iter must be'),
                      (lambda: m.generate(x[:, :0], 3), 'empty prompt'), (lambda: m.generate(x + 61, 3), 'outside the vocabulary'),
                      (lambda: m.generate(x, 3, top_p=0.0), 'top_p'), (lambda: list(m.stream([[1], [2]], 3, generator=[torch.Generator()])), '1 generators for 2')]:
        with pytest.raises(ValueError, match=words):
            fn()
    (tmp_path / 'junk.pt').write_bytes(b'junk')
    torch.save({'model': {}}, tmp_path / 'other.pt')
    for name, kind, words in [('none.pt', FileNotFoundError, 'no checkpoint'), ('junk.pt', ValueError, 'not a readable checkpoint'), ('other.pt', ValueError, 'another project')]:
        with pytest.raises(kind, match=words):
            load_checkpoint(tmp_path / name)


def test_model_py_works_when_copied_alone(tmp_path):
    shutil.copy(HERE / 'model.py', tmp_path)
    code = ('import model, torch; m = model.AdaPonderLM(model.AdaPonderConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=16));'
            'print(m.generate(torch.zeros(1, 3, dtype=torch.long), 5).shape)')
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.strip() == 'torch.Size([1, 8])'
    top = [n for n in ast.parse((HERE / 'model.py').read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names} | {n.module for n in top if isinstance(n, ast.ImportFrom)}
    assert {n.split('.')[0] for n in names} <= {'torch'} | set(sys.stdlib_module_names)
