"""
Measures a model: what it costs by formula, how well it predicts at which cost, and what the clock says.

    python bench.py flops --config config/pythia*.py
    python bench.py ppl --ckpt out/tiny/ckpt.pt --vanilla out/vanilla/ckpt.pt --fixed out/fixed/ckpt.pt --json seed1.json
    python bench.py results seed1.json seed2.json seed3.json --out assets
    python bench.py speed --config config/pythia70m.py
    python bench.py plan --config config/pythia410m.py --gpu H100 --gpus 8 --price 2.5
    python bench.py downstream --ckpt out/tiny/ckpt.pt --tasks lambada_openai,piqa
    python bench.py curves out/a out/b

Each prints a table, and with --json FILE writes its numbers beside the machine, the versions and the seed.
"""
import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from model import AdaPonderConfig, AdaPonderLM, load_checkpoint, packed_attention
from prepare_data import load_tokenizer
from train import Windows, in_steps, load_config


def fail(message):
    """One sentence on stderr, exit code 2."""
    print(f'bench.py: {message}', file=sys.stderr)
    raise SystemExit(2)


def cell(form, value):
    return '' if value is None else form.format(value)


def table(header, rows, left=(0,)):
    """Aligned columns, those in `left` to the left. An empty row is a blank line."""
    cells = [[str(c) for c in r] for r in [header, *rows]]
    width = [max(len(r[j]) for r in cells if r) for j in range(len(header))]
    for r in cells:
        print('  '.join(c.ljust(w) if j in left else c.rjust(w) for j, (c, w) in enumerate(zip(r, width))).rstrip())


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f'{path}.tmp').write_text(text, encoding='utf-8')
    os.replace(f'{path}.tmp', path)
    print(f'wrote {path}')


def report(a, **result):
    """Says where it was measured; --json FILE keeps it all."""
    try:
        cpu = next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    where = dict(cpu=cpu, cpus=os.cpu_count(), gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, threads=torch.get_num_threads(),
                 python=platform.python_version(), torch=torch.__version__, seed=a.seed)
    print('\n' + ', '.join(f'{k} {v}' for k, v in where.items() if v is not None))
    if a.json:
        arguments = {k: v for k, v in vars(a).items() if k != 'fn'}
        write(a.json, json.dumps(dict(command=a.command, arguments=arguments, where=where, **result), indent=1))


def pyplot():
    """matplotlib.pyplot, or None and a sentence."""
    try:
        import matplotlib
    except ImportError:
        print('no pictures: pip install matplotlib')
        return None
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    return plt


def save_figure(plt, fig, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(f'{path}.tmp', format=Path(path).suffix[1:] or 'png', dpi=150, bbox_inches='tight')
    plt.close(fig)
    os.replace(f'{path}.tmp', path)
    print(f'wrote {path}')


def load(path, a):
    """A checkpoint of train.py, or a folder of GPT-NeoX weights: the model on a.device, and what else the file holds."""
    try:
        state = {} if os.path.isdir(path) else load_checkpoint(path)
        model = AdaPonderLM.from_state(state) if state else AdaPonderLM.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    return model.to(a.device).eval().requires_grad_(False), {k: state[k] for k in ('meta', 'train_config', 'step') if k in state}


def shape_of(path, changes=()):
    """The AdaPonderConfig and the TrainConfig of a config file, under changes of the form key=value."""
    t = load_config([path, *('--' + c for c in changes)])
    meta = Path(t.data_dir) / 'meta.json'
    if t.init_from != 'scratch':
        fail(f'{path} takes its shape from {t.init_from}: give the config of that size from scratch')
    if not t.vocab_size and not meta.is_file():
        fail(f'{path} takes vocab_size from its data, and {t.data_dir} has none: prepare the data, or set vocab_size in the config')
    own = {f.name: getattr(t, f.name) for f in fields(AdaPonderConfig) if hasattr(t, f.name)}
    own['vocab_size'] = t.vocab_size or -(-json.loads(meta.read_text())['vocab_size'] // 64) * 64
    return AdaPonderConfig(**own), t


def count_parameters(cfg, start=''):
    with torch.device('meta'):
        return sum(p.numel() for n, p in AdaPonderLM(cfg).named_parameters() if n.startswith(start))


def autocast(a):
    return torch.autocast(torch.device(a.device).type, torch.bfloat16) if a.dtype == 'bfloat16' else nullcontext()


# Halting policies, as model.py calls them: fn(i, s, h, row, pos) -> True where the token goes on past iteration i

def coin(row, pos, salt=0):
    """A number in [0, 1) for each token that looks random and depends on (salt, row, pos) alone: the same on every execution."""
    x = (row * 0x9E3779B1 + pos * 0x85EBCA77 + (salt + 1) * 0xC2B2AE3D) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a 32-bit hash that mixes well
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)).double() / 2 ** 32


def blind(shares, salt=0):
    """A share shares[i] of all tokens goes on past iteration i, whichever they are. shares must not rise: halted stays halted."""
    return lambda i, s, h, row, pos: coin(row, pos, salt) < shares[i]


def forced(share, K):
    """`share` of the (token, iteration 2 .. K) pairs does not run, whatever the weights: every gate halts the same fraction.

    The golden ratio spreads depths, so that any run of positions comes near the share. Rows start at unrelated places.
    """
    shares = schedule('geometric', range(K), (1 - share) * (K - 1))
    return lambda i, s, h, row, pos: (coin(row, torch.zeros_like(pos)) + pos * ((math.sqrt(5) - 1) / 2)) % 1 < shares[i]


def above(score, t=-math.inf, into=None):
    """A token goes on while its score is at least t. into: a CPU tensor (n, T, K - 1) that keeps the scores."""
    def policy(i, s, h, row, pos):
        x = score(i, s, h, row, pos)
        if into is not None:
            into[row.cpu(), pos.cpu(), i] = x.cpu().to(into.dtype)
        return x >= t
    return policy


def log_probs(model, h):
    logits = model.unembed(h)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def by_chunks(model, fn, *xs):
    """fn on runs of tokens, so that the logits of all are never held at once. xs: (..., d) or (...); fn: (N, d) or (N,) each -> (N, ...)."""
    shape = xs[0].shape[:-1]
    parts = zip(*(x.flatten(0, len(shape) - 1).split(max(1, 2 ** 24 // model.cfg.vocab_size)) for x in xs))
    return torch.cat([fn(*part) for part in parts]).unflatten(0, shape)


def gate(model):
    """The learned gates; at t = tau this is what the model does by itself."""
    return lambda i, s, h, row, pos: s


def confidence(model):
    """Early exit: a token whose likeliest successor has probability p scores -p."""
    return lambda i, s, h, row, pos: -by_chunks(model, lambda x: log_probs(model, x).amax(-1), h).exp()


def convergence(model):
    """Huginn's exit (arXiv 2502.05171): KL(P^(i-1) || P^i), small where an iteration changed little. The first has nothing to compare."""
    before = {}

    def kl(now, then):
        p, q = log_probs(model, now), log_probs(model, then)
        return (q.exp() * (q - p)).sum(-1)

    def score(i, s, h, row, pos):
        if i == 0:
            first = int(row.min())
            before.update(first=first, h=h.new_zeros(int(row.max()) - first + 1, int(pos.max()) + 1, h.size(-1)))
        at = (row - before['first'], pos)
        out = by_chunks(model, kl, h, before['h'][at]) if i else torch.full_like(s, math.inf)
        before['h'][at] = h
        return out
    return score


SCORES = dict(learned=gate, confidence=confidence, convergence=convergence)
POLICIES = ['learned', 'random', 'uniform', 'geometric', 'confidence', 'convergence', 'foresight', 'oracle']


# ppl: passes over windows of text, x (n, T + 1)

@torch.inference_mode()
def measure(model, x, a, policy=None):
    """Packed passes over windows x. The policy sees a window's number in x as row. Returns depth and nll, both (n, T)."""
    depth, nll = [], []
    for first in range(0, len(x), a.batch_size):
        part = x[first:first + a.batch_size].to(a.device)
        with autocast(a):
            out = model(part[:, :-1], part[:, 1:], execution='packed',
                        policy=policy and (lambda i, s, h, row, pos: policy(i, s, h, row + first, pos)))
        depth.append(out.depth.cpu())
        nll.append(out.nll.cpu().double())
    return torch.cat(depth), torch.cat(nll)


@torch.inference_mode()
def profile(model, x, a):
    """What a token has to gain when nobody halts, from one pass over windows x.

    Returns the NLL after each iteration, which is what max_iter = 1 .. K give, and what whoever reads all K predictions, but not the token itself,
    expects it to be: the cross entropy of each with the last. Both (n, T, K).
    """
    def surprise(*xs):  # K times (N, d), then (N,) -> (N, 2, K)
        p = torch.stack([log_probs(model, h) for h in xs[:-1]], -1)  # (N, vocab, K)
        seen = p.gather(1, xs[-1][:, None, None].expand(-1, 1, p.size(-1)))[:, 0]
        return -torch.stack([seen, (p[..., -1:].exp() * p).sum(1)], 1)

    def on(i, s, h, row, pos):
        states.append(h)
        return torch.ones_like(row, dtype=torch.bool)
    levels = []
    for part in x.split(a.batch_size):
        part, states = part.to(a.device), []
        with autocast(a):
            last = model(part[:, :-1], policy=on).hidden
            levels.append(by_chunks(model, surprise, *states, last, part[:, 1:]).cpu().double())
    return torch.cat(levels).unbind(2)


def costs(cfg, T, last=None):
    """FLOPs of a token by position and depth, (T, K), in a causal pass over T tokens."""
    context = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    return cfg.inference_flops(torch.arange(1, cfg.n_iter + 1)[None], context, last)


def spent(cost, depth):
    """FLOPs of each token. cost: (T, K), depth: (n, T) -> (n, T)."""
    return cost.expand(len(depth), -1, -1).gather(-1, depth[..., None] - 1)[..., 0]


def depth_at(scores, t):
    """Depths (n, T) of tokens with scores (n, T, K - 1): halted stays halted."""
    return 1 + (scores >= t).long().cumprod(-1).sum(-1)


def threshold(scores, cost, target):
    """The t at which the mean cost of tokens with scores (n, T, K - 1) comes nearest to target FLOPs."""
    def mean_cost(t):
        return float(spent(cost, depth_at(scores, t)).mean())
    values = scores[scores.isfinite()].unique()  # the cost falls as t rises from one to the next
    low, high = 0, len(values) - 1
    while low < high:
        mid = (low + high) // 2
        low, high = (mid + 1, high) if mean_cost(values[mid]) > target else (low, mid)
    return min(values[max(0, low - 1):low + 1].tolist(), key=lambda t: abs(mean_cost(t) - target))


def calibrate(model, x, a, kind, cost, target, scores):
    """The threshold at which a kind of score spends target FLOPs a token on windows x. scores: those where nobody halts.

    Halting changes later scores a little, so the threshold is set once more from a pass in which tokens do halt.
    """
    scores = scores.clone()
    measure(model, x, a, above(SCORES[kind](model), threshold(scores, cost, target), scores))
    return threshold(scores, cost, target)


def bisect(fn, target, low, high):
    """Where fn, which falls, comes down to target."""
    for _ in range(60):
        mid = (low + high) / 2
        low, high = (mid, high) if fn(mid) > target else (low, mid)
    return (low + high) / 2


def schedule(kind, mean_cost, target):
    """Shares for blind() that cost target. mean_cost: by depth, K numbers.

    uniform: every iteration loses the same number of tokens; geometric: the same fraction of those that are left.
    """
    def shares(p):
        return [max(0.0, 1 - p * i) if kind == 'uniform' else (1 - p) ** i for i in range(1, len(mean_cost))]

    def cost(p):
        return mean_cost[0] + sum(r * (b - a) for r, a, b in zip(shares(p), mean_cost, mean_cost[1:]))
    return shares(bisect(cost, target, 0.0, 1.0))


def oracle_depth(nll, cost, target):
    """Who knows the NLL (n, T, K) of every token at every depth takes argmin NLL + lambda * cost, with the lambda that spends target."""
    def choose(log_lambda):
        return (nll + 10 ** log_lambda * cost / cost.mean()).argmin(-1) + 1
    return choose(bisect(lambda x: float(spent(cost, choose(x)).mean()), target, -9, 4))


def spearman(x, y):
    """Rank correlation of two 1-d arrays, equal values sharing their mean rank; None where one of them does not vary."""
    def ranks(v):
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        r = (np.cumsum(counts) - counts / 2)[inverse]
        return r - r.mean()
    a, b = ranks(np.asarray(x)), ranks(np.asarray(y))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else None


@lru_cache(maxsize=1)
def resamples(n, seed=0):
    """Bootstrap: 1000 times n windows drawn from n, as weights (1000, n) of a mean."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=1000) / n


def spread(fn, *samples):
    """Bootstrap standard error of fn(mean, mean, ...), the same windows drawn for all. samples: (windows,) each."""
    return float(np.std(fn(*(resamples(len(samples[0])) @ s for s in samples))))


def retained(vanilla, nll, fixed):
    """The share of fixed depth's gain over one iteration that is kept."""
    return (vanilla - nll) / (vanilla - fixed)


def val_split(a, folder, model, state, length):
    """The val split of a prepared folder in windows of length + 1 tokens, if it is of the model's tokenizer."""
    if not (Path(folder) / 'meta.json').is_file():
        fail(f'no data in {folder}: give --data, a folder that prepare_data.py made')
    meta = json.loads((Path(folder) / 'meta.json').read_text())
    if state.get('meta', meta)['tokenizer_sha256'] != meta['tokenizer_sha256'] or meta['vocab_size'] > model.cfg.vocab_size:
        fail(f'the data in {folder} was made with another tokenizer than the model was trained with')
    return Windows(folder, meta, 'val', length, model.cfg.vocab_size)


def windows(a, folder, model, state):
    """Windows of the val split, spread evenly over it and dealt out: (n, T + 1) to measure on, (m, T + 1) to set thresholds on."""
    T = model.cfg.block_size
    val = val_split(a, folder, model, state, T)
    n, m = max(2, a.eval_tokens // T), max(2, a.calib_tokens // T)
    if n + m > val.n:
        n = max(1, round(val.n * n / (n + m)))
        m = val.n - n
    if m < 1:
        fail(f'the val split of {folder} has one window of {T} tokens: too few to set thresholds on one part and measure on another')
    x = val.batch(np.linspace(0, val.n - 1, n + m).round().astype(int) * T)
    other = np.linspace(0, n + m - 1, m + 2)[1:-1].round().astype(int)
    return x[np.setdiff1d(np.arange(n + m), other)], x[other]


def at_equal_flops(model, x, calib, a, kinds, dials, full):
    """One checkpoint on windows x under every kind of policy, at every dial: 'own' or the share of `full`, FLOPs a token of fixed depth, to save.

    Returns the rows of ppl()'s table, each with the mean NLL of every window, and what the checkpoint did at its own tau.
    """
    cfg, K, T = model.cfg, model.cfg.n_iter, x.size(1) - 1
    cost, rows, own = costs(cfg, T), [], {}
    dials = dials if K > 1 else []
    kinds = kinds if dials else []

    def add(policy, dial, depth, nll, flops, **how):
        w, ran = nll.mean(1).numpy(), [float((depth > i).double().mean()) for i in range(K)]
        rows.append(dict(policy=policy, dial=dial, nll=float(w.mean()), se=spread(lambda m: m, w), ppl=math.exp(w.mean()), flops=flops,
                         saved=1 - flops / full, depth=float(depth.double().mean()), halted=1 - sum(ran[1:]) / max(1, K - 1), ran=ran, **how, windows=w))
        return rows[-1]

    levels, expected = profile(model, x, a)  # (n, T, K)
    for d in range(1, K + 1):
        add('fixed depth', f'max_iter {d}', torch.full(levels.shape[:2], d), levels[..., d - 1], float(costs(cfg, T, d)[:, d - 1].mean()))
    scores = {k: torch.zeros(len(calib), T, K - 1, dtype=torch.float64) for k in kinds if k in SCORES}
    for kind in scores:  # where nobody halts
        measure(model, calib, a, above(SCORES[kind](model), into=scores[kind]))
    for dial in tqdm(dials, desc='dial', leave=False):
        # 'own' is what the checkpoint does by itself, then the other policies at its FLOPs
        target = float(spent(cost, measure(model, calib, a)[0]).mean()) if dial == 'own' else (1 - dial) * full
        learned = None
        for kind in kinds:
            how, policy = {}, None
            if kind == 'learned' and dial == 'own':
                how = dict(threshold=cfg.tau)
            elif kind in SCORES:
                if not float(spent(cost, depth_at(scores[kind], math.inf)).mean()) <= target <= cost[:, -1].mean():
                    continue  # out of this policy's reach
                how = dict(threshold=calibrate(model, calib, a, kind, cost, target, scores[kind]))
                policy = above(SCORES[kind](model), how['threshold'])
            elif kind in ('foresight', 'oracle'):
                best = oracle_depth(expected if kind == 'foresight' else levels, cost, target)
                policy = lambda i, s, h, row, pos: best.to(s.device)[row, pos] > i + 1  # noqa: E731
            elif kind != 'random' or learned:
                how = dict(shares=learned['ran'][1:] if kind == 'random' else schedule(kind, cost.mean(0).tolist(), target))
                policy = blind(how['shares'], a.seed)
            else:
                continue
            depth, nll = measure(model, x, a, policy)
            row = add(kind, dial, depth, nll, float(spent(cost, depth).mean()), **how)
            if kind == 'learned':
                learned, target = row, row['flops']  # the others aim at what it spent here
                if dial == 'own':
                    own = by_depth(depth, nll, levels)
    return rows, own


def by_depth(depth, nll, levels):
    """Which tokens halt when. depth, nll (n, T): as the checkpoint runs; levels (n, T, K): where nobody halts.

    spearman: rank correlations of depth with NLL after d iterations - NLL after K, for d = 1 .. K - 1.
    """
    groups = [depth == d for d in range(1, levels.size(-1) + 1)]
    rows = [dict(depth=d, share=float(at.double().mean()), **(dict(nll=float(nll[at].mean()), nobody_halts=float(levels[at][:, -1].mean()),
                 first_iteration=float(levels[at][:, 0].mean())) if at.any() else {})) for d, at in enumerate(groups, 1)]
    saving = levels[..., :-1] - levels[..., -1:]
    return dict(by_depth=rows, spearman=[spearman(depth.flatten().numpy(), s.flatten().numpy()) for s in saving.unbind(-1)])


def over_learned(rows):
    """Gives each row its NLL over that of the same checkpoint's learned gates (of 'fixed': of the adaptive one's) at exactly its FLOPs, on their
    curve from tau = 1 to 0, with a paired standard error."""
    for name in {r['model'] for r in rows if r['policy'] == 'learned'}:
        judged = (name, 'fixed') if name == 'adaptive' else (name,)
        first, *_, last = (r for r in rows if (r['model'], r['policy']) == (name, 'fixed depth'))
        learned = [r for r in rows if (r['model'], r['policy']) == (name, 'learned')]
        curve = sorted(((r['flops'], r['windows']) for r in [first, last] + learned), key=lambda point: point[0])
        for r in rows:
            if r['model'] in judged and r['policy'] not in ('learned', 'fixed depth') and curve[0][0] <= r['flops'] <= curve[-1][0]:
                j = max(1, next(j for j, (f, _) in enumerate(curve) if f >= r['flops']))
                (f0, w0), (f1, w1) = curve[j - 1:j + 1]
                ours = w0 + (w1 - w0) * (r['flops'] - f0) / (f1 - f0)
                r.update(over_learned=float(r['nll'] - ours.mean()), over_learned_se=spread(lambda x, y: x - y, r['windows'], ours))


def ppl(a):
    """Validation perplexity at equal FLOPs under every halting policy, over the whole compute dial, with thresholds set on other text."""
    model, state = load(a.ckpt, a)
    cfg, config = model.cfg, state.get('train_config', {})
    folder = a.data or config.get('data_dir') or fail('give --data, a folder that prepare_data.py made')
    x, calib = windows(a, folder, model, state)
    full = float(costs(replace(cfg, halting=False), x.size(1) - 1)[:, -1].mean())  # fixed depth has no gates to pay for
    main = 'vanilla' if cfg.n_iter == 1 else 'adaptive' if cfg.halting else 'fixed'
    others = [('vanilla', a.vanilla), ('vanilla longer', a.vanilla_longer), ('fixed', a.fixed)]
    for other in a.others:
        name, equals, path = other.partition('=')
        if not (name and equals and path) or name in ('adaptive', *dict(others)):
            fail(f'--others takes NAME=CKPT, with a name of its own for each, not {other!r}')
        others.append((name, path))
    rows, runs = [], {}
    for name, path in [(main, a.ckpt)] + [(name, path) for name, path in others if path]:
        m, st = (model, state) if path == a.ckpt else load(path, a)
        if (m.cfg.vocab_size, m.cfg.block_size) != (cfg.vocab_size, cfg.block_size):
            fail(f'{path} has another vocabulary or block_size than {a.ckpt}: they cannot be compared')
        kinds = [k for k in POLICIES if k in a.policies and (m.cfg.halting or k not in ('learned', 'random'))]  # these two need gates
        dials = ['own'] * m.cfg.halting + a.save
        if path != a.ckpt and name == 'fixed':
            kinds, dials = [k for k in kinds if k in ('confidence', 'convergence')], a.save
        elif path != a.ckpt:  # as it was trained
            dials = ['own'] * m.cfg.halting
        mine, own = at_equal_flops(m, x, calib, a, kinds, dials, full)
        rows += [dict(model=name, **r) for r in mine]
        runs[name] = dict(ckpt=str(path), params=sum(p.numel() for p in m.parameters()), n_iter=m.cfg.n_iter, **own)
        if 'step' in st:
            t = st['train_config']
            tokens = st['step'] * t['batch_size'] * t['gradient_accumulation_steps'] * t['block_size']
            forward = m.cfg.inference_flops(m.cfg.n_iter, (t['block_size'] + 1) / 2)
            runs[name].update(seed=t['seed'], train_tokens=tokens, train_flops=3 * tokens * forward)
    over_learned(rows)
    whole = {r['model']: r['windows'] for r in rows if r['dial'] == f'max_iter {runs[r["model"]]["n_iter"]}'}
    gain = float((whole['vanilla'] - whole['fixed']).mean()) if {'vanilla', 'fixed'} <= set(whole) else None
    for r in rows:
        w = r.pop('windows')
        if gain and gain > 0 and r['model'] != 'vanilla':
            sample = whole['vanilla'], w, whole['fixed']
            r.update(retained=float(retained(*(s.mean() for s in sample))), retained_se=spread(retained, *sample))

    print(f'{a.ckpt}: {cfg.n_layer} layers, width {cfg.n_embd}, K = {cfg.n_iter}, {runs[main]["params"]:,} parameters. {folder}: {len(x)} windows of '
          f'{x.size(1) - 1} tokens measured, {len(calib)} others to set thresholds.\nSaved: inference FLOPs, against fixed depth {cfg.n_iter} without gates. '
          '+-: standard error over windows.\n')
    shown = []
    for dial in dict.fromkeys(r['dial'] for r in sorted(rows, key=lambda r: r['policy'] == 'fixed depth')):
        for r in (r for r in rows if r['dial'] == dial):
            shown.append([f'{r["model"]}, {r["policy"]}', f'save {dial:.0%}' if isinstance(dial, float) else dial,
                          f'{r["flops"] / 1e6:.3f}', f'{r["saved"]:.1%}', f'{r["depth"]:.2f}', f'{r["nll"]:.4f}', f'{r["se"]:.4f}',
                          f'{r["ppl"]:.3f}', *(cell(form, r.get(k)) for k, form in (
                              ('over_learned', '{:+.4f}'), ('over_learned_se', '{:.4f}'), ('retained', '{:.1%}'), ('retained_se', '{:.1%}')))])
        shown += [[]] if not str(dial).startswith('max') else []
    table(['policy', 'dial', 'MFLOPs/token', 'saved', 'depth', 'NLL', '+-', 'ppl', 'over learned', '+-', 'gain kept', '+-'], shown)
    if gain is not None and gain <= 0:
        print(f'\nFixed depth does not beat n_iter=1 here ({gain:+.4f} nats): there is no gain to keep.')
    if 'by_depth' in runs[main]:
        print('\nAt its own tau, tokens by depth:')
        table(['depth', 'share', 'NLL', 'NLL if nobody halts', 'NLL after iteration 1'],
              [[r['depth'], f'{r["share"]:.1%}', *(cell('{:.4f}', r.get(k)) for k in ('nll', 'nobody_halts', 'first_iteration'))] for r in runs[main]['by_depth']])
        print('rank correlation of depth with what the iterations after d save: '
              + ', '.join(f'd = {d}: {cell("{:.3f}", r) or "none"}' for d, r in enumerate(runs[main]['spearman'], 1)))
    group = a.group or f'{Path(folder).name}, {cfg.n_layer} x {cfg.n_embd}' + (
        f', objective {cfg.objective}, k {config["k_max"]:g}, lambda {config["ponder_lambda"]:g}' if config and cfg.halting else '')
    report(a, group=group, config=asdict(cfg), train_config=config, data=str(folder), tokens=x[:, 1:].numel(), full_flops=full, runs=runs, rows=rows)


# results: the JSON files of ppl, several seeds of several settings

def mean_of(values):
    """Mean and standard deviation over runs; sd None of a single one, None if no run has the value."""
    values = [v for v in values if v is not None]
    return dict(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)) if len(values) > 1 else None) if values else None


def summary(runs):
    """One setting over its seeds: mean and spread of every row that all of them have."""
    keyed = [{(r['model'], r['policy'], r['dial']): r for r in run['rows']} for run in runs]
    rows = [dict(zip(('model', 'policy', 'dial'), key), **{f: mean_of([rows[key].get(f) for rows in keyed])
                 for f in ('flops', 'saved', 'depth', 'nll', 'ppl', 'over_learned', 'retained')})
            for key in keyed[0] if all(key in rows for rows in keyed)]

    def depths(name):
        return [dict(model=name, depth=d, **{f: mean_of([r.get(f) for r in same]) for f in ('share', 'nll', 'nobody_halts', 'first_iteration')})
                for d, same in enumerate(zip(*(run['runs'][name]['by_depth'] for run in runs)), 1)]
    gated = [name for name in runs[0]['runs'] if all('by_depth' in run['runs'].get(name, {}) for run in runs)]
    as_trained = [(name, 'learned', 'own') if name in gated else (name, 'fixed depth', f'max_iter {run["n_iter"]}')
                  for name, run in runs[0]['runs'].items() if name not in ('adaptive', 'vanilla', 'vanilla longer', 'fixed')]
    return dict(seeds=[run['train_config'].get('seed') for run in runs], data=runs[0]['data'], n_iter=runs[0]['config']['n_iter'], tokens=runs[0]['tokens'],
                train_flops={name: run.get('train_flops') for name, run in runs[0]['runs'].items()}, rows=rows,
                others=[r for r in rows if (r['model'], r['policy'], r['dial']) in as_trained], by_depth=[row for name in gated for row in depths(name)],
                spearman={name: mean_of([run['runs'][name]['spearman'][0] for run in runs]) for name in gated})


def results(a):
    """Mean and spread over the seeds of each setting, from JSON files of ppl: results.json, results.md and two pictures."""
    found = {}
    for path in a.files:
        try:
            run = json.loads(Path(path).read_text())
            found.setdefault(run['group'], []).append(run)
        except (OSError, ValueError, KeyError, TypeError):
            fail(f'{path} was not written by bench.py ppl --json')
    groups = {name: summary(runs) for name, runs in found.items()}

    def get(g, model, policy, dial, field, form):
        """mean ± sd"""
        m = next((r[field] for r in g['rows'] if (r['model'], r['policy'], r['dial']) == (model, policy, dial)), None)
        return show(m, form)

    def show(m, form):
        return cell(form, m and m['mean']) + (f' ± {form.replace("+", "").format(m["sd"])}' if m and m['sd'] is not None else '')

    def markdown(header, rows):
        return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [header, ['---'] * len(header)] + rows) + '\n'
    head, dials, depths, others = [], [], [], []
    rivals = [('adaptive', p) for p in POLICIES[1:]] + [('fixed', p) for p in ('confidence', 'convergence')]
    for name, g in groups.items():
        def learned(dial, model='adaptive', **forms):
            return [get(g, model, 'learned', dial, f, form) for f, form in forms.items()]
        head.append([name, str(len(g['seeds'])), *(get(g, m, 'fixed depth', f'max_iter {d}', 'ppl', '{:.3f}')
                     for m, d in (('vanilla', 1), ('vanilla longer', 1), ('fixed', g['n_iter']))),
                     *learned('own', ppl='{:.3f}', depth='{:.2f}', saved='{:.1%}', retained='{:.1%}'), show(g['spearman'].get('adaptive'), '{:.3f}')])
        dials += [[name, r['model'], 'own tau' if r['dial'] == 'own' else f'save {r["dial"]:.0%}', *learned(r['dial'], r['model'], saved='{:.1%}', nll='{:.4f}', retained='{:.1%}'),
                   *(get(g, r['model'] if m == 'adaptive' else m, p, r['dial'], 'over_learned', '{:+.4f}') for m, p in rivals)] for r in g['rows'] if r['policy'] == 'learned']
        depths += [[name, r['model'], str(r['depth']), show(r['share'], '{:.1%}'), *(show(r[f], '{:.3f}') for f in ('nll', 'nobody_halts', 'first_iteration'))]
                   for r in g['by_depth']]
        others += [[name, r['model'], *(show(r[f], form) for f, form in (('saved', '{:.1%}'), ('nll', '{:.4f}'), ('ppl', '{:.3f}'), ('retained', '{:.1%}'))),
                    show(g['spearman'].get(r['model']), '{:.3f}')] for r in g['others']]
    text = ('Mean ± standard deviation over seeds; NLL in nats a token; saved: inference FLOPs against fixed depth without gates.\n\n'
            + markdown(['setting', 'seeds', 'ppl n_iter=1', 'n_iter=1, longer', 'fixed depth', 'adaptive', 'mean depth', 'saved', 'gain kept',
                        'rank correlation'], head)
            + '\nThe learned gates over the dial, and by how much the NLL of each other policy is above theirs at the same FLOPs:\n\n'
            + markdown(['setting', 'model', 'dial', 'saved', 'NLL', 'gain kept'] + [p + ', fixed depth' * (m == 'fixed') for m, p in rivals], dials)
            + '\nTokens by the depth at which they halt:\n\n'
            + markdown(['setting', 'model', 'depth', 'share', 'NLL', 'NLL if nobody halts', 'NLL after iteration 1'], depths)
            + ('\nOther models, as they were trained:\n\n' + markdown(['setting', 'model', 'saved', 'NLL', 'ppl', 'gain kept', 'rank correlation'], others) if others else ''))
    print(text)
    write(Path(a.out) / 'results.md', text)
    write(Path(a.out) / 'results.json', json.dumps(groups, indent=1))
    plt = pyplot()
    if plt:
        save_figure(plt, draw_iso_flops(plt, groups), Path(a.out) / 'isoflops.png')
        save_figure(plt, draw_by_depth(plt, groups), Path(a.out) / 'nll_by_depth.png')
    report(a, groups=groups)


def panels(plt, groups, width, height):
    """A figure with a panel of width x height inches for each setting, in about as many rows as columns: (figure, axes (rows, columns))."""
    columns = math.ceil(len(groups) ** 0.5)
    rows = -(-len(groups) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                             gridspec_kw=dict(hspace=1.4 / height))  # labels of one row and titles of the next take inches, not shares
    for ax in axes.flat[len(groups):]:
        ax.remove()
    return fig, axes


def draw_iso_flops(plt, groups):
    """NLL against FLOPs saved, a panel a setting. Bars: standard deviation over seeds of the distance to the learned gates."""
    fig, axes = panels(plt, groups, 5.5, 4.2)
    marks = dict(zip(dict.fromkeys(r['model'] for g in groups.values() for r in g['others'] if r['policy'] != 'learned'), cycle('s^vD')))
    for ax, (name, g) in zip(axes.flat, groups.items()):
        levels = []
        for model, dial, text, style, va in (('vanilla', 'max_iter 1', 'n_iter=1', ':', 'bottom'),
                                             ('fixed', f'max_iter {g["n_iter"]}', f'fixed depth {g["n_iter"]}', '--', 'top')):
            for y in [r['nll']['mean'] for r in g['rows'] if (r['model'], r['dial']) == (model, dial)]:
                levels.append(y)
                ax.axhline(y, color='grey', lw=1, ls=style)
                ax.annotate(text, (0.99, y), xycoords=('axes fraction', 'data'), fontsize=7, ha='right', va=va, color='grey')
        for model, policy in dict.fromkeys((r['model'], r['policy']) for r in g['rows'] if r['policy'] != 'fixed depth'):
            points = sorted((100 * r['saved']['mean'], r['nll']['mean'], (r['over_learned'] or {}).get('sd') or 0)
                            for r in g['rows'] if (r['model'], r['policy']) == (model, policy) and r['dial'] != 'own')
            if points and model in ('adaptive', 'fixed'):
                ours, colour = model == 'adaptive', 'black' if policy == 'learned' else f'C{POLICIES.index(policy)}'
                ax.errorbar(*zip(*points), label=policy + ' on fixed depth' * (model == 'fixed'), color=colour,
                            lw=2.2 if policy == 'learned' else 1.1, marker='o' if ours else 'x', ms=4, ls='-' if ours else ':', capsize=2)
        trained = sorted((100 * r['saved']['mean'], r['nll']['mean']) for r in g['rows'] if (r['policy'], r['dial']) == ('learned', 'own'))
        if trained:
            ax.plot(*zip(*trained), '*--', color='black', lw=1, ms=13, label='learned, trained for this budget')
        for r in (r for r in g['others'] if r['policy'] != 'learned'):
            ax.plot(100 * r['saved']['mean'], r['nll']['mean'], marks[r['model']], color='grey', ms=6, label=r['model'])
        ax.set(xlabel=f'inference FLOPs saved against fixed depth {g["n_iter"]}, %', ylabel='validation NLL, nats a token')
        ax.set_title(name, fontsize=9)
        if len(levels) == 2:  # what is far worse than one pass may leave the picture
            ax.set_ylim(top=levels[0] + 1.5 * (levels[0] - levels[1]))
    names = {name: mark for ax in axes.flat for mark, name in zip(*ax.get_legend_handles_labels())}
    axes[0, -1].legend(names.values(), names, fontsize=7, loc='upper left', bbox_to_anchor=(1.01, 1))
    return fig


def draw_by_depth(plt, groups):
    """Mean NLL of the tokens that halted at each depth; the width of a bar is their share."""
    fig, axes = panels(plt, groups, 4, 3)
    for ax, (name, g) in zip(axes.flat, groups.items()):
        rows = [r for r in g['by_depth'] if r['model'] == 'adaptive']
        for r in (r for r in rows if r['nll'] and r['share']['mean'] >= 5e-4):  # whose share does not read 0.0%
            ax.bar(r['depth'], r['nll']['mean'], 0.1 + 0.8 * r['share']['mean'], yerr=r['nll']['sd'] or 0, color='C0', capsize=3)
        ax.set_xticks([r['depth'] for r in rows], [f'{r["depth"]}\n{r["share"]["mean"]:.1%}' for r in rows])
        ax.set(xlabel='depth, iterations; share of the tokens', xlim=(0.4, g['n_iter'] + 0.6))
        ax.set_ylim(bottom=0)
        ax.set_title(name, fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel('NLL, nats a token')
    return fig


# flops and speed, of a checkpoint or of random weights in the shape of a config file

def model_of(a, path):
    if not path.endswith('.py'):
        return load(path, a)
    torch.manual_seed(a.seed)
    return AdaPonderLM(shape_of(path)[0]).to(a.device).eval().requires_grad_(False), {}


@torch.inference_mode()
def count(model, tokens, share):
    """A packed pass over one sequence under forced(share). Returns FLOPs as FlopCounterMode sees them, FLOPs by formula, both
    dict(products, attention), and depth (1, tokens)."""
    def sdpa(q, k, v, *rest, out_shape=None, **kw):  # the counter does not know the CPU's kernel
        return sdpa_flop_count(q, k, v)
    device = model.embed.weight.device
    x = torch.randint(model.cfg.vocab_size, (1, tokens), device=device)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}) as counter:
        out = model(x, execution='packed', policy=forced(share, model.cfg.n_iter))
        out.logits
    seen = counter.get_flop_counts()['Global']
    attention = sum(n for op, n in seen.items() if 'scaled_dot_product' in str(op) or 'bmm' in str(op))
    context = torch.arange(1, tokens + 1, device=device)
    formula = float((out.depth * model.cfg.flops(context)['attention']).sum())
    return (dict(products=sum(seen.values()) - attention, attention=attention),
            dict(products=float(model.cfg.inference_flops(out.depth, context).sum()) - formula, attention=formula), out.depth)


def flops(a):
    """Parameters and forward FLOPs a token by part and depth, by formula and as FlopCounterMode counts them in a pass that runs."""
    result = []
    for path in a.config + a.ckpt or fail('give --config or --ckpt'):
        cfg = shape_of(path)[0] if path.endswith('.py') else load(path, a)[0].cfg
        T, K = a.context or cfg.block_size, cfg.n_iter
        context = (T + 1) / 2
        f, vanilla = cfg.flops(context), replace(cfg, n_iter=1).inference_flops(1, context)
        params, gates = count_parameters(cfg), count_parameters(cfg, 'gates')
        print(f'{path}: {params:,} parameters, {2 * cfg.vocab_size * cfg.n_embd:,} of them in the two embedding tables and {gates:,} in gates; '
              f'{cfg.n_layer} layers, width {cfg.n_embd}, vocabulary {cfg.vocab_size}, K = {K}. MFLOPs of a token in a causal pass over {T} tokens:')
        rows = [dict(depth=d, linear=d * f['linear'], attention=d * f['attention'], unembed=f['unembed'], ponder=(d - 1) * f['ponder'],
                     gates=min(d, K - 1) * f['gate'], total=cfg.inference_flops(d, context), x_vanilla=cfg.inference_flops(d, context) / vanilla)
                for d in range(1, K + 1)]
        table([k.replace('_', ' ') for k in rows[0]], [[r['depth'], *(f'{v / 1e6:.3f}' for v in list(r.values())[1:-1]), f'{r["x_vanilla"]:.3f}'] for r in rows])
        counted = None
        if params <= a.count_below:
            n = min(a.count_tokens, cfg.block_size)
            seen, formula, depth = count(model_of(a, path)[0], n, 0.5)
            counted = dict(tokens=n, depth=float(depth.double().mean()), seen=seen, formula=formula)
            ratio = {k: seen[k] / formula[k] for k in seen}
            print(f'Counted in a packed pass over {n} tokens, mean depth {counted["depth"]:.2f}: matrix products {seen["products"] / 1e6:.2f} M, '
                  f'{ratio["products"]:.4f} x formula; attention {seen["attention"] / 1e6:.2f} M, {ratio["attention"]:.2f} x (with masked keys).\n')
        else:
            print(f'Not counted: more than --count_below {a.count_below:,} parameters.\n')
        result.append(dict(path=path, config=asdict(cfg), parameters=params, context=context, depths=rows, counted=counted))
    report(a, configs=result)


def twin(model, **change):
    """The same weights under another config: fixed depth, one iteration."""
    with torch.device('meta'):
        other = AdaPonderLM(replace(model.cfg, **change))
    own = model.state_dict()
    other.load_state_dict({k: own[k] for k in other.state_dict()}, assign=True)
    return other.eval().requires_grad_(False)


def seconds(fn, device):
    """Runs fn. Returns the seconds that it took, and what it returned."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
    t = time.perf_counter()
    out = fn()
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - t, out


@torch.inference_mode()
def time_prefill(model, x, **kw):
    """A pass over prompts x (B, T) that ends in the logits of their last tokens: dict(seconds, tokens, flops, depth)."""
    def run():
        out = model(x, **kw)
        model.unembed(out.hidden[:, -1])
        return out
    t, out = seconds(run, x.device)
    unembed = model.cfg.flops(0)['unembed']
    each = model.cfg.inference_flops(out.depth, torch.arange(1, x.size(1) + 1, device=x.device)) - unembed
    return dict(seconds=t, tokens=x.numel(), flops=float(each.sum()) + len(x) * unembed, depth=float(out.depth.double().mean()))


def attention_ways(cfg, T, share, device, dtype):
    """How a share of T tokens may attend to all of them: name -> function of no arguments, the first one with all tokens as queries; all agree."""
    K, V, q = torch.randn(3, 1, cfg.n_head, T, cfg.head_size, device=device, dtype=dtype).unbind()
    pos = torch.randperm(T, device=device)[:max(1, round(T * share))].sort().values
    row, mask = torch.zeros_like(pos), torch.arange(T, device=device) <= pos[:, None]
    x, k, v = (t[0, :, pos].transpose(0, 1) for t in (q, K, V))  # (n, nh, hs)
    ways = {'every token': lambda: F.scaled_dot_product_attention(q, K, V, is_causal=True)[0, :, pos].transpose(0, 1),
            'packed_attention': lambda: packed_attention(x, k, v, (K, V), (row, pos, [len(pos)]))[0],
            'queries at their places': lambda: F.scaled_dot_product_attention(
                torch.zeros_like(q).index_copy(2, pos, x.transpose(0, 1)[None]), K, V, is_causal=True)[0, :, pos].transpose(0, 1),
            'boolean mask': lambda: F.scaled_dot_product_attention(x.transpose(0, 1)[None], K, V, attn_mask=mask)[0].transpose(0, 1)}
    if torch.device(device).type == 'cuda':
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        flex = torch.compile(flex_attention)
        blocks = create_block_mask(lambda b, h, i, j: j <= pos[i], None, None, len(pos), T, device=device)
        ways['flex_attention'] = lambda: flex(x.transpose(0, 1)[None], K, V, block_mask=blocks)[0].transpose(0, 1)
    return ways


def training_step(model, x, bf16, execution='dense', policy=None):
    """A step of a plain loop on x (B, T + 1): a function that returns dict(seconds, tokens, and for a model of ours flops and depth)."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=x.device.type in ('cpu', 'cuda'))
    T, ours = x.size(1) - 1, isinstance(model, AdaPonderLM)

    def step():
        nonlocal x
        x = x.roll(1, 1)  # gates see other text in every step, and sizes change as they do in training
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out = model(x[:, :-1], x[:, 1:], k=0.1, ponder_lambda=0.1, execution=execution, policy=policy) if ours else model(x[:, :-1])
            loss = out.loss if ours else F.cross_entropy(out.logits.flatten(0, 1).float(), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out

    def timed():
        t, out = seconds(step, x.device)
        if not ours:
            return dict(seconds=t, tokens=len(x) * T)
        ran = out.depth if execution == 'packed' else torch.full_like(out.depth, model.cfg.n_iter)  # dense computes all passes
        return dict(seconds=t, tokens=len(x) * T, depth=float(ran.double().mean()), flops=3 * float(model.cfg.inference_flops(ran, (T + 1) / 2).sum()))
    return timed


def in_transformers(model):
    """transformers' GPTNeoX with the weights of a model of one iteration; None where it is not installed."""
    try:
        from transformers import GPTNeoXForCausalLM
    except ImportError:
        print('no comparison with transformers: pip install transformers')
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation='sdpa').to(model.embed.weight.device, model.embed.weight.dtype).eval()


def time_decode(model, prompts, n, policy=None):
    """The same of n tokens a prompt with all slots busy: from when every prompt is in until so many are out, whichever slot made them."""
    seen, flops = [len(p) + 1 for p in prompts], 0.0
    steps = model.stream(prompts, n + n // 2 + 8, temperature=0, policy=policy, slots=len(prompts))
    for _ in islice(steps, len(prompts)):
        pass
    t, made = seconds(lambda: list(islice(steps, n * len(prompts))), model.embed.weight.device)
    steps.close()
    for step in made:
        flops += model.cfg.inference_flops(step.depth, seen[step.seq])
        seen[step.seq] += 1
    return dict(seconds=t, tokens=len(made), flops=float(flops), depth=sum(s.depth for s in made) / len(made))


def race(case, variants, rounds):
    """Runs the variants in turn, A B C A B C ..., after a warm-up of each. Rows with quartiles of the time a token, and of its ratio to A's, round by round."""
    runs = {name: [] for name in variants}
    for r in tqdm(range(rounds + 1), desc=case, leave=False):
        for name, fn in variants.items():
            runs[name].append(fn())
    per = {name: np.array([r['seconds'] / r['tokens'] for r in mine[1:]]) for name, mine in runs.items()}
    first = next(iter(per))

    def flops(name):
        return runs[name][0]['flops'] / runs[name][0]['tokens']
    return [dict(case=case, variant=name, depth=runs[name][0].get('depth'), ms_per_token=np.percentile(1e3 * per[name], (25, 50, 75)).tolist(),
                 time_ratio=np.percentile(per[name] / per[first], (25, 50, 75)).tolist(),
                 flop_ratio=flops(name) / flops(first) if 'flops' in runs[name][0] else None) for name in per]


def speed(a):
    """The clock: fixed depth against adaptive on the same weights, each time ratio beside its FLOP ratio. A share of halting is forced; with --data the model's own gates run too."""
    if bool(a.ckpt) == bool(a.config):
        fail('give --config or --ckpt')
    torch.set_num_threads(a.threads or torch.get_num_threads())
    model, state = model_of(a, a.ckpt or a.config)
    model = model.to(getattr(torch, a.dtype))
    cfg, K, rows = model.cfg, model.cfg.n_iter, []
    longest = max(a.prefill * bool({'prefill', 'attention', 'train'} & set(a.cases)), a.prompt + a.new + a.new // 2 + 8)
    if K == 1 or not cfg.halting or longest > cfg.block_size:
        fail(f'speed needs gates, n_iter > 1 and a block_size of at least {longest} for these --prefill, --prompt and --new')
    fixed, one = twin(model, halting=False), twin(model, halting=False, n_iter=1, scale_embeds=False)
    for m in (model, fixed, one) if a.compile else ():
        m.compile_decoding()
    rng = np.random.default_rng(a.seed)

    def text(n, length):  # (n, length)
        if a.data:
            val = val_split(a, a.data, model, state, length)
            return val.batch(np.linspace(0, val.n - 1, n + 2)[1:-1].round().astype(int) * length)[:, :length].to(a.device)
        return torch.from_numpy(rng.integers(0, cfg.vocab_size, (n, length))).to(a.device)

    def whole(fn, tokens=a.new):
        return lambda: dict(seconds=seconds(fn, a.device)[0], tokens=tokens)
    policies = {'adaptive': None} if a.data else {}
    policies |= {f'adaptive, {share:.0%} halted': forced(share, K) for share in a.share}
    if 'prefill' in a.cases:
        x = text(a.rows, a.prefill)
        rows += race(f'prefill {a.prefill}', {
            'fixed, dense': lambda: time_prefill(fixed, x), 'fixed, packed': lambda: time_prefill(fixed, x, execution='packed'),
            **{name: lambda p=p: time_prefill(model, x, execution='packed', policy=p) for name, p in policies.items()}}, a.rounds)
    for share in a.share if 'attention' in a.cases else []:
        ways = attention_ways(cfg, a.prefill, 1 - share, a.device, getattr(torch, a.dtype))
        with torch.inference_mode():
            rows += race(f'attention, {share:.0%} halted', {name: whole(lambda way=way: [way() for _ in range(20)], 20 * a.prefill) for name, way in ways.items()}, a.rounds)
    for B in a.batch if 'decode' in a.cases else []:
        prompts = text(B, a.prompt).tolist()
        rows += race('one stream' if B == 1 else f'batch {B}', {
            'fixed': lambda: time_decode(fixed, prompts, a.new),
            **{name: lambda p=p: time_decode(model, prompts, a.new, p) for name, p in policies.items()}}, a.rounds)
    x = text(1, a.prompt)
    if 'nocache' in a.cases:
        rows += race('prompt and stream', {'fixed': whole(lambda: fixed.generate(x, a.new, temperature=0)),
                                           'fixed, no KV cache': whole(lambda: fixed.generate(x, a.new, temperature=0, execution='dense'))}, a.rounds)
    same = None
    hf = in_transformers(one) if 'transformers' in a.cases or 'train' in a.cases else None
    if hf and 'transformers' in a.cases:
        hf.generation_config.eos_token_id = None

        def theirs():
            return hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=a.new, do_sample=False, use_cache=True, pad_token_id=0)
        same = bool((theirs() == one.generate(x, a.new, temperature=0)).all())
        rows += race('prompt and stream', {
            'transformers, n_iter=1': whole(theirs), 'ours, n_iter=1': whole(lambda: one.generate(x, a.new, temperature=0)),
            f'ours, fixed {K}': whole(lambda: fixed.generate(x, a.new, temperature=0))}, a.rounds)
    if 'train' in a.cases:
        x, bf16 = text(a.rows, a.prefill + 1), a.dtype == 'bfloat16'
        again = twin(fixed)
        again.remat = True
        made = {'ours, n_iter=1': one, 'transformers, n_iter=1': hf, f'ours, fixed {K}': fixed, f'ours, fixed {K}, remat': again, f'ours, {K} with gates': model}
        steps = {name: training_step(m.float(), x, bf16) for name, m in made.items() if m}
        if cfg.objective != 'paper':  # whose loss needs what only dense computes
            steps |= {f'packed, {name}': training_step(model, x, bf16, 'packed', p) for name, p in policies.items()}
        rows += race(f'training step {a.prefill}', steps, a.rounds)
    print(f'{a.ckpt or a.config}: {cfg.n_layer} layers, width {cfg.n_embd}, vocabulary {cfg.vocab_size}, K = {K}, {a.dtype} on {a.device}; '
          f'prompts of {a.prompt} tokens, {a.new} new ones a slot; {a.rounds} rounds taken in turn.'
          + f' transformers and n_iter=1 made {"the same" if same else "OTHER"} tokens.' * (same is not None) + '\n')
    table(['case', 'variant', 'depth', 'ms a token', '[quartiles]', 'tokens/s', 'time ratio', '[quartiles]', 'FLOP ratio', 'time / FLOPs'],
          [[r['case'], r['variant'], cell('{:.2f}', r['depth']), f'{r["ms_per_token"][1]:.3f}', '[{:.3f} {:.3f}]'.format(*r['ms_per_token'][::2]),
            f'{1e3 / r["ms_per_token"][1]:.1f}', f'{r["time_ratio"][1]:.3f}', '[{:.3f} {:.3f}]'.format(*r['time_ratio'][::2]), cell('{:.3f}', r['flop_ratio']),
            cell('{:.3f}', r['flop_ratio'] and r['time_ratio'][1] / r['flop_ratio'])] for r in rows], left=(0, 1))
    report(a, config=asdict(cfg), rows=rows, same_as_transformers=same)


# plan

GPUS = {'H100': (989e12, 80), 'H100-PCIe': (756e12, 80), 'H200': (989e12, 141), 'B200': (2250e12, 180), 'A100': (312e12, 80), 'A100-40': (312e12, 40),
        'L40S': (362e12, 48), 'A6000': (155e12, 48), '4090': (165e12, 24), '3090': (71e12, 24), 'V100': (125e12, 32)}  # dense 16-bit FLOP/s, GB


def activation_bytes(cfg, tokens, bf16=True, remat=False, cpu=False):
    """What a training step on `tokens` tokens holds at its peak beside weights, gradients and optimizer, by part. torch.compile keeps a little less.

    The first four are kept for backward. To these comes `loss`, as the loss is computed, and later `backward`; at_peak() takes the larger one.
    """
    b, d, L, K, V, N = 2 if bf16 else 4, cfg.n_embd, cfg.n_layer, cfg.n_iter, cfg.vocab_size, tokens
    one = N * L * d * (4 + 16 * b)     # an iteration: x in float32, two norms, q, k, v, y, 4 d and 4 d of the MLP
    kv = N * L * d * 2 * b * (cfg.halting and K > 1)  # K and V: masked, or made full again from those of halted tokens
    gates = (K - 1) * N * (2 * cfg.gate_hidden * b + 8 * d) * cfg.halting * (not remat)
    table, chunks = 4 * d * V, math.ceil(N / max(1, AdaPonderLM.CHUNK // V))  # a gradient of U or V
    logits = (4 if b == 4 else 6) * V * math.ceil(N / chunks) + table // 2 * (b == 2)
    sums = (4 * (count_parameters(cfg) - 2 * d * V) + 2 * table) * (K > 1)  # gradients over iterations, until the last has come
    if N * V <= AdaPonderLM.CHUNK // 8:  # few enough for every iteration to keep its probabilities
        logits, vocab = logits + (K - 1) * N * V * (4 + b * (b == 2)), 0
    else:
        vocab = (K > 1) * (4 * table + table * (b == 2) + (12 - b) * max(1024 * N, AdaPonderLM.CHUNK * (not cpu)))  # of the pondering embedding
    return dict(copies=2 * (count_parameters(cfg) - 2 * d * V) * (b == 2), backbone=K * N * d * 4 if remat else one + (K - 1) * (one - kv * (b == 2)),
                between=(16 if kv else 8) * K * N * d, gates=gates,
                loss=table + logits, backward=max(vocab, sums + one + kv) if remat else vocab - one)


def at_peak(parts):
    """Those of activation_bytes()'s parts that are there at the peak: all that is kept, and the loss or backward."""
    return {k: v for k, v in parts.items() if k != min(('loss', 'backward'), key=parts.get)}


def measured_peak(cfg, rows, T, bf16, remat, device):
    """Bytes beyond weights and gradients at the peak of one forward and backward pass on `rows` sequences of T tokens: what activation_bytes() says by formula."""
    device = torch.device(device)
    model = AdaPonderLM(cfg).to(device)
    model.remat = remat
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randint(cfg.vocab_size, (rows, T + 1), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(x[:, :-1], x[:, 1:], k=torch.tensor(0.1, device=device), ponder_lambda=0.1).loss
        loss.backward()
    if device.type == 'cuda':
        step()  # libraries take their workspaces
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as prof:
        step()
    with tempfile.TemporaryDirectory() as folder:
        prof.export_chrome_trace(f'{folder}/trace.json')
        trace = json.loads(Path(f'{folder}/trace.json').read_text())['traceEvents']
    events = [(e['ts'], e['args']['Total Allocated'], e['args']['Bytes']) for e in trace if e['name'] == '[memory]']
    _, first, size = min(events)
    return max(total for _, total, _ in events) - (first - size)


def plan(a):
    """What training a config takes: FLOPs, days, memory a GPU, dollars. Every line states its formula."""
    if a.gpu not in GPUS:
        fail(f'unknown GPU {a.gpu!r}: one of {", ".join(GPUS)}')
    if a.gpus < 1 or not 0 < a.mfu <= 1:
        fail('--gpus must be at least 1, --mfu in (0, 1]')
    cfg, t = shape_of(a.config, a.set)
    peak, gigabytes = GPUS[a.gpu]
    N, K, context, P = t.batch_size * t.block_size, cfg.n_iter, (t.block_size + 1) / 2, count_parameters(cfg)
    steps = in_steps('max_steps', t.max_steps, N * t.gradient_accumulation_steps, None)
    tokens = steps * t.gradient_accumulation_steps * N
    f, forward = cfg.flops(context), cfg.inference_flops(K, context)
    again = K * (f['linear'] + f['attention']) * t.remat + (K - 1) * f['ponder'] * (N * cfg.vocab_size > AdaPonderLM.CHUNK // 8)
    training = 3 * forward * tokens
    hours = training / (peak * a.mfu) / 3600
    b = 4 if t.dtype == 'float32' else 2
    act = at_peak(activation_bytes(cfg, N, b == 2, t.remat))
    memory = [('weights', 4 * P, '4 P: float32'), ('gradients', 4 * P, "4 P: float32, shared with DDP's buckets"),
              ('AdamW', 8 * P / (a.gpus if t.shard_optimizer else 1), '8 P' + ' / GPUs' * t.shard_optimizer + ': two moments in float32'),
              ('bfloat16 weights', act['copies'], "2 (P - 2 d V): autocast's copies"),
              ('activations: backbone', act['backbone'], '4 K N d: the input of every iteration' if t.remat else
               f'N L d (4 + 16 b) + (K - 1) N L d (4 + {16 if not cfg.halting or b == 4 else 14} b): x in float32, two norms, q, k, v, y, 4 d and 4 d of the MLP'),
              ('activations: between', act['between'], '8 K N d: h, before and after the last norm' + ('; twice: under the mask, and of those that go on' if cfg.halting and K > 1 else '')),
              ('activations: gates', act['gates'], '0: computed again' if t.remat else '(K - 1) N d (2 W b + 8): W d twice, h twice'),
              ('in the loss', act['loss'], "logits of a chunk, and U's gradient, which is made in the forward pass") if 'loss' in act else
              ('in backward', act['backward'], 'an iteration computed again and sums of gradients, or the pondering embedding: see activation_bytes()')]
    need = sum(m for _, m, _ in memory)
    print(f'{a.config}: P = {P:,} parameters, L = {cfg.n_layer}, d = {cfg.n_embd}, V = {cfg.vocab_size}, K = {K}, W = gate_width = {cfg.gate_width:g}; '
          f'T = {t.block_size}; N = {t.batch_size} T = {N:,} tokens a micro-batch; b = {b} bytes; remat {"on" if t.remat else "off"}; {a.gpus} x {a.gpu}\n')
    table(['', 'value', 'formula'], [
        ['tokens', f'{tokens / 1e9:.3f} B', f'{steps:,} steps x {t.gradient_accumulation_steps} N'],
        ['forward, a token', f'{forward / 1e9:.3f} GFLOPs', 'K (24 L d^2 + 2 L d (T + 1)) + (K - 1) (4 d V + 2 W d (d + 1)) + 2 d V: all tokens run all iterations'],
        ['training', f'{training:.3e} FLOPs', '3 x forward x tokens: backward is two forwards; vanilla: '
         f'{cfg.inference_flops(K, context) / replace(cfg, n_iter=1).inference_flops(1, context):.2f} times less'],
        ['computed twice', f'{again / forward / 3:.1%}', 'the pondering embeddings' + ', and the backbone' * t.remat + ': on top, not in the MFU'],
        ['time', f'{hours / a.gpus / 24:.2f} days', f'FLOPs / (GPUs x {peak / 1e12:.0f} TFLOP/s x MFU {a.mfu:.0%}): '
         f'{tokens / hours * a.gpus / 3600:,.0f} tokens/s, {hours:,.0f} GPU hours'],
        *([['price', f'${hours * a.price:,.0f}', f'GPU hours x ${a.price:g}']] if a.price is not None else []), [],
        *([name, f'{m / 1e9:.2f} GB', formula] for name, m, formula in memory),
        ['peak a GPU', f'{need / 1e9:.2f} GB', f'the sum; {a.gpu} has {gigabytes} GB'
         + ': TOO MUCH, lower batch_size or set remat or shard_optimizer' * (need > 0.95e9 * gigabytes)], [],
        ['decoding', f'{2 * cfg.n_layer * K * cfg.n_embd * cfg.block_size * b / 1e9:.2f} GB', f'2 L K d {cfg.block_size} b: K/V of one sequence']], left=(0, 2))
    if t.gradient_accumulation_steps % a.gpus:
        print(f'\ngradient_accumulation_steps ({t.gradient_accumulation_steps}) is not a multiple of {a.gpus}: train.py would refuse it')
    measured = None
    if a.measure:
        where = 'cuda' if torch.cuda.is_available() else 'cpu'
        measured = measured_peak(cfg, t.batch_size, t.block_size, b == 2, t.remat, where)
        mine = sum(at_peak(activation_bytes(cfg, N, b == 2, t.remat, where == 'cpu')).values())
        print(f'\none micro-batch on {where}, without compile: {measured / 1e6:.0f} MB beyond weights, gradients and AdamW, {measured / N / 1e3:.0f} kB a token; '
              f'by the formulas {mine / 1e6:.0f} MB, {mine / measured - 1:+.1%}')
    report(a, measured=measured, config=asdict(cfg), parameters=P, tokens=tokens, forward_flops=forward, training_flops=training, computed_twice=again / forward / 3, gpu_hours=hours,
           dollars=hours * a.price if a.price is not None else None, memory={name: m for name, m, _ in memory}, peak_memory=need)


# downstream: lm-evaluation-harness

def harness_model(model, enc, a):
    """An lm_eval model around this one. Every request runs at adaptive depth, packed or cached; spent holds tokens, iterations, FLOPs."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    T, eot, kw = model.cfg.block_size, enc.eot_token, dict(tau=a.tau, max_iter=a.max_iter)
    tau = model.cfg.tau if a.tau is None else a.tau

    class Adaptive(TemplateLM):
        eot_token_id = eot
        spent = [0, 0, 0.0]

        def spend(self, depth, context):
            new = depth.numel(), int(depth.sum()), float(model.cfg.inference_flops(depth, context, a.max_iter).sum())
            self.spent = [x + y for x, y in zip(self.spent, new)]

        def tok_encode(self, string, add_special_tokens=None, **rest):
            return enc.encode_ordinary(string)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests, **rest):
            """requests: (_, context, continuation), lists of tokens. Returns (log-probability, would greedy decoding say the same) of each."""
            done = [None] * len(requests)
            order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))  # alike in length: little padding
            for first in tqdm(range(0, len(order), a.batch_size), desc='loglikelihood', leave=False):
                part = order[first:first + a.batch_size]
                texts = [(requests[n][1] + requests[n][2])[-T - 1:-1] for n in part]
                length = torch.tensor([len(t) for t in texts], device=a.device)
                x = torch.tensor([t + [0] * (int(length.max()) - len(t)) for t in texts], device=a.device)
                with autocast(a):  # padding comes after the text, so that nothing sees it, and halts at once
                    out = model(x, execution='packed', policy=lambda i, s, h, row, pos: (s >= tau) & (pos < length[row]), **kw)
                    for r, n in enumerate(part):
                        want = torch.tensor(requests[n][2][-T:], device=a.device)
                        log_p = log_probs(model, out.hidden[r, length[r] - len(want):length[r]])
                        done[n] = float(log_p.gather(-1, want[:, None]).sum()), bool((log_p.argmax(-1) == want).all())
                        self.spend(out.depth[r, :length[r]], torch.arange(1, int(length[r]) + 1, device=a.device))
            return done

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            pieces = [[utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(
                enc.encode_ordinary(r.args[0]), prefix_token=eot, max_seq_len=T, context_len=1)] for r in requests]
            flat = iter(self._loglikelihood_tokens([(None, *w) for windows in pieces for w in windows]))
            return [sum(next(flat)[0] for _ in windows) for windows in pieces]

        def generate_until(self, requests, disable_tqdm=False):
            """Batches through the KV-cached engine; a batch ends when each text in it has met a stop string, its length or the end."""
            done = []
            for first in tqdm(range(0, len(requests), a.batch_size), desc='generate', leave=False):
                contexts, wishes = zip(*(r.args for r in requests[first:first + a.batch_size]))
                until = [[w] if isinstance(w := g.get('until') or [], str) else list(w) for g in wishes]
                budget = [next((g[k] for k in ('max_gen_toks', 'max_new_tokens', 'max_tokens') if g.get(k)), 256) for g in wishes]
                if max(budget) >= T:
                    raise ValueError(f'a task wants {max(budget)} new tokens, and this model sees {T} at a time')
                prompts = [(enc.encode_ordinary(c) or [eot])[-(T - n):] for c, n in zip(contexts, budget)]
                g = wishes[0]  # lm-eval hands over one task at a time
                temperature = (g.get('temperature') or 1.0) if g.get('do_sample') else 0
                steps = model.stream(prompts, budget, temperature, g.get('top_k'), g.get('top_p'), torch.Generator().manual_seed(a.seed + first),
                                     slots=len(prompts), stop_token=eot, **kw)
                made, text, busy = [[] for _ in prompts], [''] * len(prompts), set(range(len(prompts)))
                for step in steps:
                    n = step.seq
                    if n in busy:
                        self.spend(torch.tensor([step.depth]), len(prompts[n]) + len(made[n]))
                        made[n].append(step.token)
                        text[n] = enc.decode([t for t in made[n] if t != eot and t < enc.n_vocab])
                        if step.token == eot or len(made[n]) == budget[n] or any(w in text[n] for w in until[n]):
                            busy.discard(n)
                    if not busy:
                        break
                steps.close()
                done += [min((t.split(w)[0] for w in words if w), key=len, default=t) for t, words in zip(text, until)]
            return done
    return Adaptive()


def downstream(a):
    """Tasks of lm-evaluation-harness at adaptive depth, with mean depth and FLOPs beside the scores. Needs lm-eval."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        fail('downstream needs lm-evaluation-harness: pip install lm-eval')
    model, state = load(a.ckpt, a)
    model.check_max_iter(a.max_iter)
    beside = Path(a.ckpt) / 'tokenizer.json'
    if a.tokenizer or 'meta' in state:
        enc = load_tokenizer(a.tokenizer) if a.tokenizer else load_tokenizer(state['meta'], Path(a.ckpt).parent)
    else:
        enc = load_tokenizer(str(beside)) if beside.is_file() else fail(f'{a.ckpt} has no tokenizer.json: give --tokenizer')
    if enc.eot_token >= model.cfg.vocab_size:
        fail('the tokenizer has more tokens than the model: give the one that it was trained with')
    lm, manager, tasks, rows = harness_model(model, enc, a), TaskManager(include_path=a.include_path), a.tasks.split(','), []
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        fail(f'lm-eval knows no task {", ".join(unknown)}; --include_path names a folder with task files')
    for task in tasks:
        lm.spent = [0, 0, 0.0]
        seeds = {f'{what}_seed': a.seed for what in ('random', 'numpy_random', 'torch_random', 'fewshot_random')}
        scores = lm_eval.simple_evaluate(lm, tasks=[task], num_fewshot=a.num_fewshot, limit=a.limit, task_manager=manager, log_samples=False,
                                         bootstrap_iters=1000, **seeds)['results']
        n, depth, flops = lm.spent
        for name, result in scores.items():
            for metric, value in result.items():
                if isinstance(value, float) and '_stderr' not in metric:
                    se = result.get(metric.replace(',', '_stderr,'))
                    rows.append(dict(task=name, metric=metric.split(',')[0], value=value, stderr=se if isinstance(se, float) else None,
                                     tokens=n, depth=depth / n, flops=flops / n))
    K, tau = model.cfg.n_iter, model.cfg.tau if a.tau is None else a.tau
    print(f'\n{a.ckpt}: K = {K}, tau {tau:g}, at most {a.max_iter or K} iterations, {a.num_fewshot or 0} shots\n')
    table(['task', 'metric', 'value', '+-', 'mean depth', 'MFLOPs/token'],
          [[r['task'], r['metric'], f'{r["value"]:.4f}', cell('{:.4f}', r['stderr']), f'{r["depth"]:.2f}', f'{r["flops"] / 1e6:.2f}'] for r in rows])
    report(a, config=asdict(model.cfg), rows=rows)


# curves

def curves(a):
    """The logs of runs side by side: a table of how far they are, and a picture."""
    panels = ('loss', 'val_loss', 'depth', 'val_depth', 'grad_norm', 'gate_mean', 'tokens_per_second', 'lr')
    forms = dict(tokens='{:,}', loss='{:.4f}', val_loss='{:.4f}', depth='{:.2f}', val_depth='{:.2f}', val_flops_saved='{:.1%}',
                 tokens_per_second='{:,.0f}', mfu='{:.1%}')
    logs = {}
    for folder in a.folders:
        path = Path(folder) / 'log.jsonl'
        if not path.is_file():
            fail(f'no log at {path}: give the out_dir of a run of train.py')
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                pass  # a line that a killed run was writing
        logs[folder] = {k: [(r['step'], r[k]) for r in records if r.get(k) not in (None, [])] for k in dict.fromkeys((*panels, *forms))}
    table(['run', *forms], [[f, *(cell(form, log[k][-1][1] if log[k] else None) for k, form in forms.items())] for f, log in logs.items()])
    plt = pyplot()
    if plt:
        fig, axes = plt.subplots(2, 4, figsize=(18, 7))
        for ax, key in zip(axes.flat, panels):
            for n, (name, log) in enumerate(logs.items()):
                many = [(step, v if isinstance(v, list) else [v]) for step, v in log[key]]  # gate_mean: a line a gate
                for i in range(max((len(v) for _, v in many), default=0)):
                    points = [(step, v[i]) for step, v in many if len(v) > i and v[i] is not None]
                    ax.plot(*zip(*points), color=f'C{n}', alpha=0.75 ** i, lw=1, label=name if i == 0 else None)
            ax.set(title=key, xlabel='step', yscale='log' if key == 'grad_norm' else 'linear')
        axes[0, 0].legend(fontsize=7)
        fig.tight_layout()
        save_figure(plt, fig, a.out)
    report(a, runs=logs)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='command', required=True)

    def command(fn, runs=True):
        c = sub.add_parser(fn.__name__, help=fn.__doc__, description=fn.__doc__)
        c.set_defaults(fn=fn)
        c.add_argument('--json', help='write the numbers here')
        c.add_argument('--seed', type=int, default=1337)
        if runs:
            c.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
            c.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
        return c.add_argument

    arg = command(flops)
    arg('--config', nargs='*', default=[], help='config files')
    arg('--ckpt', nargs='*', default=[], help='checkpoints or GPT-NeoX folders')
    arg('--context', type=int, help='tokens of the causal pass; default block_size')
    arg('--count_tokens', type=int, default=128, help='tokens of the pass that runs and is counted')
    arg('--count_below', type=int, default=300_000_000, help='run it only for models of at most so many parameters')

    arg = command(ppl)
    arg('--ckpt', required=True, help='a ckpt.pt of train.py')
    arg('--data', help='a folder of prepare_data.py; default: the one that the checkpoint was trained on')
    arg('--vanilla', help='a checkpoint with n_iter=1, for the gain that is kept')
    arg('--vanilla_longer', help='one that was given the training FLOPs of fixed depth')
    arg('--others', nargs='+', default=[], metavar='NAME=CKPT', help='other models to set beside these, as they are; for example fixed depth trained with n_iter=3')
    arg('--fixed', help='a checkpoint of fixed depth, for the gain that is kept; early exits are measured on it too')
    arg('--policies', nargs='+', choices=POLICIES, default=POLICIES)
    arg('--save', nargs='*', type=float, default=[0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6], help="the dial: shares of fixed depth's FLOPs to save")
    arg('--eval_tokens', type=int, default=65536, help='of the val split, to measure on')
    arg('--calib_tokens', type=int, default=16384, help='others of it, to set thresholds on')
    arg('--batch_size', type=int, default=16)
    arg('--group', help='name of the setting: results takes the mean over the seeds of one')

    arg = command(results, runs=False)
    arg('files', nargs='+', help='JSON files of ppl')
    arg('--out', default='assets')

    arg = command(speed)
    arg('--ckpt', help='a checkpoint or a GPT-NeoX folder')
    arg('--config', help='a config file: random weights in its shape')
    arg('--cases', nargs='+', choices=(every := ('prefill', 'attention', 'decode', 'nocache', 'transformers', 'train')), default=every[:-1])
    arg('--share', nargs='*', type=float, default=[0.0, 0.25, 0.5, 0.75], help='of the (token, iteration 2 .. K) pairs that do not run')
    arg('--data', help='a folder of prepare_data.py: its val split instead of random tokens')
    arg('--prefill', type=int, default=1024, help='tokens')
    arg('--rows', type=int, default=1, help='prompts to prefill, sequences to train on, at a time')
    arg('--compile', action='store_true', help='torch.compile the decoding')
    arg('--batch', nargs='*', type=int, default=[1, 8, 32, 128], help='slots')
    arg('--prompt', type=int, default=64, help='tokens of a prompt to decode from')
    arg('--new', type=int, default=32, help='tokens to decode for each slot')
    arg('--rounds', type=int, default=5)
    arg('--threads', type=int, help='CPU threads')

    arg = command(plan, runs=False)
    arg('--config', required=True, help='a config file of train.py')
    arg('--set', nargs='*', default=[], metavar='KEY=VALUE', help='changes to the config')
    arg('--measure', action='store_true', help='run a micro-batch here and compare its peak of memory')
    arg('--gpu', default='H100', help=', '.join(GPUS))
    arg('--gpus', type=int, default=8)
    arg('--mfu', type=float, default=0.4, help='the share of the peak that is reached; train.py prints it')
    arg('--price', type=float, help='dollars a GPU hour')

    arg = command(downstream)
    arg('--ckpt', required=True, help='a ckpt.pt of train.py or a GPT-NeoX folder')
    arg('--tasks', required=True, help='lambada_openai,piqa,arc_easy,...')
    arg('--include_path', help='a folder with task files of your own')
    arg('--tokenizer', help="a tokenizer.json; default: the checkpoint's")
    arg('--num_fewshot', type=int)
    arg('--limit', type=int, help='documents a task')
    arg('--batch_size', type=int, default=16)
    arg('--tau', type=float)
    arg('--max_iter', type=int)

    arg = command(curves, runs=False)
    arg('folders', nargs='+', help='the out_dir of each run')
    arg('--out', default='curves.png')

    a = p.parse_args(argv)
    try:
        a.fn(a)
    except ValueError as e:  # what model.py and the data reader refuse
        fail(e)


if __name__ == '__main__':
    main()
