"""
Measures a model: what it costs by formula, how well it predicts at which cost, and what the clock says.

    python bench.py ppl --ckpt out/tiny/ckpt.pt --vanilla out/vanilla/ckpt.pt --fixed out/fixed/ckpt.pt --json seed1.json
    python bench.py results seed1.json seed2.json --out assets

Every command prints a table, and with --json FILE writes its numbers beside the machine, the versions and the seed.
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
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import AdaPonderConfig, AdaPonderLM, load_checkpoint
from prepare_data import load_tokenizer
from train import Windows, in_steps, load_config


def fail(message):
    """One sentence on stderr, exit code 2."""
    print(f'bench.py: {message}', file=sys.stderr)
    raise SystemExit(2)


def table(header, rows):
    """Aligned columns; None is an empty cell, an empty row a blank line."""
    cells = [[('' if c is None else str(c)) for c in r] for r in [header] + list(rows)]
    width = [max(len(r[j]) for r in cells if r) for j in range(len(header))]
    for r in cells:
        print('  '.join(c.ljust(w) if j == 0 else c.rjust(w) for j, (c, w) in enumerate(zip(r, width))).rstrip())


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f'{path}.tmp').write_text(text, encoding='utf-8')
    os.replace(f'{path}.tmp', path)


def report(a, **result):
    """Say where it was measured; --json FILE keeps it all."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    where = dict(machine=platform.machine(), cpu=cpu_name(), cpus=os.cpu_count(), gpu=gpu, device=getattr(a, 'device', None), threads=torch.get_num_threads(),
                 python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, seed=getattr(a, 'seed', None))
    print(f'\n{gpu or where["cpu"]}, {where["cpus"]} CPUs, {where["threads"]} threads, Python {where["python"]}, torch {where["torch"]}, seed {where["seed"]}')
    if a.json:
        write(a.json, json.dumps(dict(adaponder_bench=1, command=a.command, arguments={k: v for k, v in vars(a).items() if k != 'fn'}, where=where, **result), indent=1))
        print(f'wrote {a.json}')


def cpu_name():
    try:
        return next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def pyplot():
    """matplotlib.pyplot, or None and a sentence."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install matplotlib')
        return None
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    return plt


def save_figure(fig, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    suffix = Path(path).suffix or '.png'
    fig.savefig(f'{path}.tmp', format=suffix[1:], dpi=150, bbox_inches='tight')
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


def autocast(a):
    return torch.autocast(torch.device(a.device).type, torch.bfloat16) if a.dtype == 'bfloat16' else nullcontext()


# Halting policies, as model.py calls them: fn(i, s, h, row, pos) -> True where the token goes on past iteration i

def coin(row, pos, salt=0):
    """A number in [0, 1) for each token that looks random and depends on (salt, row, pos) alone: the same on every execution."""
    x = (row * 0x9E3779B1 + pos * 0x85EBCA77 + (salt + 1) * 0xC2B2AE3D) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a well mixing 32-bit hash
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)).double() / 2 ** 32


def blind(run, salt=0):
    """A share run[i] of all tokens goes on past iteration i, whichever they are. run must not rise: halted stays halted."""
    return lambda i, s, h, row, pos: coin(row, pos, salt) < run[i]


def above(score, t):
    """A token goes on while its score is at least t."""
    return lambda i, s, h, row, pos: score(i, s, h, row, pos) >= t


def log_probs(model, h):
    logits = model.unembed(h)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def by_chunks(model, fn, *xs):
    """fn on runs of tokens, so that the logits of all are never held at once. xs: (..., d) or (...), fn: (N, d) or (N,) each -> (N,)."""
    shape = xs[0].shape[:-1]
    parts = zip(*(x.flatten(0, len(shape) - 1).split(max(1, 2 ** 24 // model.cfg.vocab_size)) for x in xs))
    return torch.cat([fn(*part) for part in parts]).view(shape)


def gate(model):
    """The learned gates; at t = tau this is what the model does by itself."""
    return lambda i, s, h, row, pos: s


def confidence(model):
    """Early exit: a token whose likeliest successor has probability p scores -p."""
    return lambda i, s, h, row, pos: -by_chunks(model, lambda x: log_probs(model, x).amax(-1), h).exp()


def convergence(model):
    """Huginn's exit (arXiv 2502.05171): KL(P^(i-1) || P^i), small where an iteration changed little. The first iteration has nothing to compare."""
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


# ppl: passes over (n, T + 1) windows of text

@torch.inference_mode()
def measure(model, x, a, policy=None, **kw):
    """Packed passes over windows x (n, T + 1). policy sees a window's number in x as row. Returns depth and nll, both (n, T)."""
    depth, nll = [], []
    for first in range(0, len(x), a.batch_size):
        part = x[first:first + a.batch_size].to(a.device)
        fn = policy and (lambda i, s, h, row, pos: policy(i, s, h, row + first, pos))
        with autocast(a):
            out = model(part[:, :-1], part[:, 1:], execution='packed', policy=fn, **kw)
        depth.append(out.depth.cpu())
        nll.append(out.nll.cpu().double())
    return torch.cat(depth), torch.cat(nll)


def watched(score, into, t=-math.inf):
    """As above(), and writes the scores into `into` (n, T, K - 1). into is on the CPU."""
    def policy(i, s, h, row, pos):
        x = score(i, s, h, row, pos)
        into[row.cpu(), pos.cpu(), i] = x.cpu().to(into.dtype)
        return x >= t
    return policy


def profile(model, x, a):
    """The NLL (n, T, K) that a token has after each iteration when nobody halts: what max_iter = 1 .. K gives, from one pass."""
    nll = torch.zeros(len(x), x.size(1) - 1, model.cfg.n_iter, dtype=torch.float64)

    def score(i, s, h, row, pos):
        targets = x[row.cpu(), pos.cpu() + 1].to(h.device)
        return by_chunks(model, lambda h, t: -log_probs(model, h).gather(-1, t[:, None])[:, 0], h, targets)
    nll[..., -1] = measure(model, x, a, watched(score, nll))[1]
    return nll


def bisect(fn, target, low, high, steps=60):
    """Where fn, which falls, comes down to target."""
    for _ in range(steps):
        mid = (low + high) / 2
        low, high = (mid, high) if fn(mid) > target else (low, mid)
    return (low + high) / 2


def depth_at(scores, t):
    """Depths (n, T) of tokens with these scores (n, T, K - 1): halted stays halted."""
    return 1 + (scores >= t).long().cumprod(-1).sum(-1)


def threshold(scores, cost, target):
    """The t at which the tokens' mean cost comes nearest to target. scores: (n, T, K - 1); cost: (T, K), FLOPs of a token by position and depth."""
    def mean_cost(t):
        return float(spent(cost, depth_at(scores, t)).mean())
    values = scores[scores.isfinite()].unique()  # the cost falls as t rises from one to the next
    low, high = 0, len(values) - 1
    while low < high:
        mid = (low + high) // 2
        low, high = (mid + 1, high) if mean_cost(values[mid]) > target else (low, mid)
    return min(values[max(0, low - 1):low + 1].tolist(), key=lambda t: abs(mean_cost(t) - target))


def spent(cost, depth):
    """FLOPs of each token. cost: (T, K), depth: (n, T) -> (n, T)."""
    return cost.expand(len(depth), -1, -1).gather(-1, depth[..., None] - 1)[..., 0]


def calibrate(model, x, a, kind, cost, target, full):
    """The threshold at which scores of this kind spend `target` FLOPs a token on windows x. full: their scores where nobody halts.

    Halting changes the scores of later tokens a little, so the threshold is corrected once on a pass that really halts.
    """
    t = threshold(full, cost, target)
    scores = full.clone()
    measure(model, x, a, watched(SCORES[kind](model), scores, t))
    return threshold(scores, cost, target)


def costs(cfg, T, last=None):
    """FLOPs of a token by position and depth, (T, K), of a causal pass over T tokens."""
    context = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    return cfg.inference_flops(torch.arange(1, cfg.n_iter + 1)[None], context, last)


def oracle_depth(nll, cost, target):
    """Who knows the NLL (n, T, K) of every token at every depth chooses argmin NLL + lambda * cost, with the lambda that spends target."""
    def choose(lam):
        return (nll + lam * cost / cost.mean()).argmin(-1) + 1
    return choose(10 ** bisect(lambda x: float(spent(cost, choose(10 ** x)).mean()), target, -9, 4))


def ranks(x):
    """Ranks of a 1-d array from 0, equal values share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation of two 1-d arrays; None where one of them does not vary."""
    a, b = (r - r.mean() for r in (ranks(np.asarray(x)), ranks(np.asarray(y))))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else None


def spread(fn, *samples, seed=0, n=1000):
    """Bootstrap standard error of fn(mean, mean, ...): the windows are drawn anew, the same for all samples. samples: arrays (windows,)."""
    size = len(samples[0])
    weight = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n) / size
    return float(np.std(fn(*(weight @ s for s in samples))))


def retained(vanilla, nll, fixed):
    """The share of fixed depth's gain over one iteration that is kept."""
    return (vanilla - nll) / (vanilla - fixed)


def windows(a, folder, model, state):
    """Windows of the val split, evenly spread over it and then dealt out: (n, T + 1) to measure on, (m, T + 1) to calibrate on."""
    if not (Path(folder) / 'meta.json').is_file():
        fail(f'no data in {folder}: give --data, a folder that prepare_data.py made')
    meta = json.loads((Path(folder) / 'meta.json').read_text())
    if state.get('meta', meta)['tokenizer_sha256'] != meta['tokenizer_sha256'] or meta['vocab_size'] > model.cfg.vocab_size:
        fail(f'the data in {folder} was made with another tokenizer than {a.ckpt} was trained on')
    T = model.cfg.block_size
    val = Windows(folder, meta, 'val', T, model.cfg.vocab_size)
    n, m = max(2, a.eval_tokens // T), max(2, a.calib_tokens // T)
    if n + m > val.n:
        n = max(1, round(val.n * n / (n + m)))
        m = val.n - n
    if m < 1:
        fail(f'the val split of {folder} has one window of {T} tokens: too few to calibrate on one part and measure on another')
    x = val.batch(np.linspace(0, val.n - 1, n + m).round().astype(int) * T)
    rest = np.linspace(0, n + m - 1, m + 2)[1:-1].round().astype(int)  # dealt out evenly too
    return x[np.setdiff1d(np.arange(n + m), rest)], x[rest]


def pass_shares(kind, mean_cost, target):
    """The shares of all tokens that go on past each iteration in a fixed schedule that costs target. mean_cost: K numbers, by depth.

    uniform: every iteration loses the same number of tokens; geometric: the same fraction of those that are left.
    """
    def shares(p):
        return [max(0.0, 1 - p * i) if kind == 'uniform' else (1 - p) ** i for i in range(1, len(mean_cost))]

    def cost(p):
        return mean_cost[0] + sum(r * (b - a) for r, a, b in zip(shares(p), mean_cost, mean_cost[1:]))
    return shares(bisect(cost, target, 0.0, 1.0))


def curves_of(model, x, calib, a, kinds, full):
    """One checkpoint on windows x under every policy, at equal FLOPs: see ppl(). Returns a dict; its rows hold the NLL of each window too. full: FLOPs of fixed depth."""
    cfg, K, T = model.cfg, model.cfg.n_iter, x.size(1) - 1
    cost = costs(cfg, T)
    rows = []

    def add(policy, dial, depth, nll, spend, **how):
        w, ran = nll.mean(1).numpy(), [float((depth > i).double().mean()) for i in range(K)]
        rows.append(dict(policy=policy, dial=dial, nll=float(w.mean()), se=spread(lambda m: m, w), ppl=math.exp(w.mean()), flops=float(spend.mean()),
                         saved=1 - float(spend.mean()) / full, depth=float(depth.double().mean()), halted=1 - sum(ran[1:]) / max(1, K - 1), ran=ran, **how, windows=w))
        return rows[-1]

    levels = profile(model, x, a)  # (n, T, K)
    for d in range(1, K + 1):
        add('fixed depth', f'max_iter {d}', torch.full(levels.shape[:2], d), levels[..., d - 1], costs(cfg, T, d)[:, d - 1].expand(levels.shape[:2]))
    result = dict(params=sum(p.numel() for p in model.parameters()), n_iter=K, rows=rows)
    if K == 1:
        return result
    scores = {kind: torch.zeros(len(calib), T, K - 1, dtype=torch.float64) for kind in kinds if kind in SCORES}
    for kind in scores:  # where nobody halts
        measure(model, calib, a, watched(SCORES[kind](model), scores[kind]))
    for dial in tqdm((['own'] if cfg.halting else []) + a.save, desc='dial', leave=False):
        # 'own': what the checkpoint does by itself, and the others at its FLOPs
        target = float(spent(cost, measure(model, calib, a)[0]).mean()) if dial == 'own' else (1 - dial) * full
        learned = None
        for kind in kinds:
            how, policy = {}, None
            if kind in SCORES:
                if dial == 'own' and kind == 'learned':
                    how = dict(threshold=cfg.tau)
                elif float(spent(cost, depth_at(scores[kind], math.inf)).mean()) <= target <= cost[:, -1].mean():
                    how = dict(threshold=calibrate(model, calib, a, kind, cost, target, scores[kind]))
                    policy = above(SCORES[kind](model), how['threshold'])
                else:
                    continue  # out of this policy's reach
            elif kind == 'oracle':
                best = oracle_depth(levels, cost, target)
                policy = lambda i, s, h, row, pos: best.to(s.device)[row, pos] > i + 1  # noqa: E731
            elif kind == 'random' and not learned:
                continue
            else:
                how = dict(shares=learned['ran'][1:] if kind == 'random' else pass_shares(kind, cost.mean(0).tolist(), target))
                policy = blind(how['shares'], a.seed)
            depth, nll = measure(model, x, a, policy)
            row = add(kind, dial, depth, nll, spent(cost, depth), **how)
            if kind == 'learned':
                learned, target = row, row['flops']  # what the others then aim at
                if dial == 'own':
                    result.update(by_depth(depth, nll, levels))
    return result


def by_depth(depth, nll, levels):
    """Which tokens halt when. depth, nll (n, T) of the checkpoint's own run; levels (n, T, K), where nobody halts.

    spearman: rank correlation of depth with NLL(d iterations) - NLL(K iterations), for d = 1 .. K - 1.
    """
    rows = []
    for d in range(1, levels.size(-1) + 1):
        at = depth == d
        rows.append(dict(depth=d, share=float(at.double().mean())))
        if at.any():
            rows[-1].update(nll=float(nll[at].mean()), nobody_halts=float(levels[at][:, -1].mean()), first_iteration=float(levels[at][:, 0].mean()))
    saving = levels[..., :-1] - levels[..., -1:]
    return dict(by_depth=rows, spearman=[spearman(depth.flatten().numpy(), s.flatten().numpy()) for s in saving.unbind(-1)])


def ppl(a):
    """Validation perplexity at equal FLOPs under every halting policy, over the whole compute dial, on windows that no threshold was chosen on."""
    model, state = load(a.ckpt, a)
    config = state.get('train_config', {})
    folder = a.data or config.get('data_dir') or fail('give --data, a folder that prepare_data.py made')
    x, calib = windows(a, folder, model, state)
    blind_too = ['random', 'uniform', 'geometric']
    wanted = [k for k in ('learned', *blind_too, 'confidence', 'convergence', 'oracle') if k in a.policies]
    name = 'adaptive' if model.cfg.halting and model.cfg.n_iter > 1 else 'fixed' if model.cfg.n_iter > 1 else 'vanilla'
    jobs = [(name, a.ckpt)] + [(n, p) for n, p in (('vanilla', a.vanilla), ('vanilla longer', a.vanilla_longer), ('fixed', a.fixed)) if p]
    full = float(costs(replace(model.cfg, halting=False), x.size(1) - 1)[:, -1].mean())  # fixed depth has no gates to pay for
    runs = {}
    for n, (name, path) in enumerate(jobs):
        m, st = (model, state) if path == a.ckpt else load(path, a)
        if (m.cfg.vocab_size, m.cfg.block_size) != (model.cfg.vocab_size, model.cfg.block_size):
            fail(f'{path} has another vocabulary or block_size than {a.ckpt}: they cannot be compared')
        kinds = wanted if m.cfg.halting else [k for k in wanted if k not in ('learned', 'random')]  # these need gates
        runs[name] = curves_of(m, x, calib, a, [k for k in kinds if n == 0 or k in ('confidence', 'convergence')], full)
        t = st.get('train_config')
        if t:
            tokens = st['step'] * t['batch_size'] * t['gradient_accumulation_steps'] * t['block_size']
            runs[name].update(ckpt=path, seed=t['seed'], train_tokens=tokens, train_flops=3 * tokens * m.cfg.inference_flops(m.cfg.n_iter, (t['block_size'] + 1) / 2))
    rows = [dict(model=name, **r) for name, run in runs.items() for r in run['rows']]
    whole = {n: next((r['windows'] for r in rows if r['model'] == n and r['dial'] == f'max_iter {run["n_iter"]}'), None) for n, run in runs.items()}
    gain = 'vanilla' in runs and 'fixed' in runs and float((whole['vanilla'] - whole['fixed']).mean())
    for r in rows:
        if gain > 0 and r['model'] != 'vanilla':
            sample = (whole['vanilla'], r['windows'], whole['fixed'])
            r.update(retained=float(retained(*(w.mean() for w in sample))), retained_se=spread(retained, *sample))
    curve = sorted((r['flops'], r['windows']) for r in rows if r['policy'] == 'learned' or (r['model'] == 'adaptive' and r['dial'] in ('max_iter 1', f'max_iter {model.cfg.n_iter}')))  # tau 1 .. 0
    for r in rows:  # against the learned gates at exactly the same FLOPs
        if curve and r['policy'] not in ('learned', 'fixed depth') and curve[0][0] <= r['flops'] <= curve[-1][0]:
            j = max(1, next(j for j, (f, _) in enumerate(curve) if f >= r['flops']))
            (f0, w0), (f1, w1) = curve[j - 1:j + 1]
            ours = w0 + (w1 - w0) * (r['flops'] - f0) / (f1 - f0)
            r.update(over_learned=float(r['nll'] - ours.mean()), over_learned_se=spread(lambda x, y: x - y, r['windows'], ours))
    for r in rows:
        del r['windows']
    for run in runs.values():
        del run['rows']

    cfg, T = model.cfg, x.size(1) - 1
    print(f'{a.ckpt}: {cfg.n_layer} layers, width {cfg.n_embd}, K = {cfg.n_iter}, {runs[jobs[0][0]]["params"]:,} parameters. {folder}: '
          f'{len(x)} windows of {T} tokens measured, {len(calib)} others to set thresholds. Inference FLOPs against fixed depth {cfg.n_iter} without gates.\n')
    shown, last = [], None
    for r in sorted(rows, key=lambda r: (str(r['dial']).startswith('max'), 0 if r['dial'] == 'own' else r['dial'] if isinstance(r['dial'], float) else 1)):
        if r['dial'] != last and last is not None and not str(last).startswith('max'):
            shown.append([])
        last = r['dial']
        shown.append([f'{r["model"]}, {r["policy"]}', r['dial'] if isinstance(r['dial'], str) else f'save {r["dial"]:.0%}', f'{r["flops"] / 1e6:.3f}', f'{r["saved"]:.1%}', f'{r["depth"]:.2f}',
                      f'{r["nll"]:.4f}', f'{r["se"]:.4f}', f'{r["ppl"]:.3f}', *(f.format(r[k]) if k in r else None for k, f in (('over_learned', '{:+.4f}'), ('over_learned_se', '{:.4f}'), ('retained', '{:.1%}'), ('retained_se', '{:.1%}')))])
    table(['policy', 'dial', 'MFLOPs/token', 'saved', 'depth', 'NLL', '+-', 'ppl', 'over learned', '+-', 'gain kept', '+-'], shown)
    mine = runs[jobs[0][0]]
    if gain is not False and gain <= 0:
        print(f'\nFixed depth does not beat n_iter=1 here ({gain:+.4f} nats): there is no gain to keep.')
    if 'by_depth' in mine:
        print('\nThe checkpoint at its own tau, tokens by depth:')
        table(['depth', 'share', 'NLL', 'NLL if nobody halts', 'NLL after iteration 1'],
              [[r['depth'], f'{r["share"]:.1%}', *(f'{r[k]:.4f}' if k in r else None for k in ('nll', 'nobody_halts', 'first_iteration'))] for r in mine['by_depth']])
        print('rank correlation of depth with the NLL that iterations d + 1 .. K save: '
              + ', '.join(f'd = {d}: ' + ('none' if r is None else f'{r:.3f}') for d, r in enumerate(mine['spearman'], 1)))
    group = a.group or ', '.join([Path(folder).name, f'{cfg.n_layer} x {cfg.n_embd}'] + ([f'pool {cfg.pool}, k {config["k_max"]:g}, lambda {config["ponder_lambda"]:g}'] if 'k_max' in config and cfg.halting else []))
    result = dict(group=group, ckpt=a.ckpt, config=asdict(cfg), train_config=config, data=str(folder), full_flops=full, tokens=x[:, 1:].numel(), calibration_tokens=calib[:, 1:].numel(), runs=runs, rows=rows)
    report(a, **result)


# results: the JSON files of ppl, several seeds of several settings

def read_json(path, command):
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        fail(f'{path} cannot be read as JSON ({e})')
    if not isinstance(result, dict) or result.get('command') != command:
        fail(f'{path} was not written by bench.py {command} --json')
    return result


def mean_of(values):
    """Mean, standard deviation over runs (None of a single one) and number of runs; None where a run lacks the value."""
    values = [v for v in values if v is not None]
    return dict(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)) if len(values) > 1 else None, n=len(values)) if values else None


def summary(results):
    """One setting over its seeds: mean and spread of every row that all seeds have."""
    keys = [tuple((r['model'], r['policy'], r['dial']) for r in res['rows']) for res in results]
    rows = []
    for key in keys[0]:
        if all(key in k for k in keys):
            same = [res['rows'][k.index(key)] for res, k in zip(results, keys)]
            fields = ('flops', 'saved', 'depth', 'nll', 'ppl', 'over_learned', 'retained')
            rows.append(dict(zip(('model', 'policy', 'dial'), key), **{f: mean_of([r.get(f) for r in same]) for f in fields}))
    mine = [res['runs']['adaptive'] for res in results if 'by_depth' in res['runs'].get('adaptive', {})]
    depths = [[run['by_depth'][d] for run in mine] for d in range(len(mine[0]['by_depth']))] if mine else []
    return dict(seeds=[res['train_config'].get('seed') for res in results], data=results[0]['data'], n_iter=results[0]['config']['n_iter'], tokens=results[0]['tokens'], rows=rows,
                train_flops={m: run.get('train_flops') for m, run in results[0]['runs'].items()}, spearman=mean_of([run['spearman'][0] for run in mine]),
                by_depth=[dict(depth=d + 1, **{f: mean_of([r.get(f) for r in same]) for f in ('share', 'nll', 'nobody_halts', 'first_iteration')}) for d, same in enumerate(depths)])


def shown(m, form='{:.3f}'):
    """mean ± sd"""
    return '' if m is None else form.format(m['mean']) + ('' if m['sd'] is None else ' ± ' + form.replace('+', '').format(m['sd']))


def markdown(header, rows):
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [header, ['---'] * len(header)] + rows) + '\n'


def results(a):
    """Mean and spread over the seeds of each setting, from JSON files of ppl: results.json, results.md and two pictures."""
    groups = {}
    for path in a.files:
        result = read_json(path, 'ppl')
        groups.setdefault(result['group'], []).append(result)
    groups = {name: summary(runs) for name, runs in groups.items()}

    def find(g, model, policy, dial):
        return next((r for r in g['rows'] if (r['model'], r['policy'], r['dial']) == (model, policy, dial)), {})
    head, lines, dials, by = [], [], [], []
    for name, g in groups.items():
        full = f'max_iter {g["n_iter"]}'
        own, best = (find(g, 'adaptive', p, 'own') for p in ('learned', 'oracle'))
        head.append([name, str(len(g['seeds'])), *(shown(find(g, m, 'fixed depth', d).get('ppl')) for m, d in (('vanilla', 'max_iter 1'), ('vanilla longer', 'max_iter 1'), ('fixed', full))),
                     shown(own.get('ppl')), shown(own.get('saved'), '{:.1%}'), shown(own.get('retained'), '{:.1%}'), shown(g['spearman']), shown(best.get('over_learned'), '{:+.4f}')])
        for dial in dict.fromkeys(r['dial'] for r in g['rows'] if r['policy'] != 'fixed depth'):
            r = find(g, 'adaptive', 'learned', dial)
            others = [find(g, 'adaptive', p, dial) for p in ('random', 'uniform', 'geometric', 'confidence', 'convergence')] + [find(g, 'fixed', p, dial) for p in ('confidence', 'convergence')]
            if r:
                dials.append([name, 'own tau' if dial == 'own' else f'save {dial:.0%}', shown(r['saved'], '{:.1%}'), shown(r['nll'], '{:.4f}'), shown(r['retained'], '{:.1%}'),
                              *(shown(o.get('over_learned'), '{:+.4f}') for o in others)])
        by += [[name, str(r['depth']), shown(r['share'], '{:.1%}'), *(shown(r[f]) for f in ('nll', 'nobody_halts', 'first_iteration'))] for r in g['by_depth']]
    text = (f'Mean ± standard deviation over seeds; perplexity a token, NLL in nats; "saved" is against fixed depth without gates.\n\n'
            + markdown(['setting', 'seeds', 'n_iter=1', 'n_iter=1, longer', 'fixed depth', 'adaptive', 'FLOPs saved', 'gain kept', 'rank correlation', 'oracle'], head)
            + '\nNLL over that of the learned gates at the same FLOPs, by policy:\n\n'
            + markdown(['setting', 'dial', 'saved', 'learned', 'gain kept', 'random', 'uniform', 'geometric', 'confidence', 'convergence', 'confidence on fixed depth', 'convergence on fixed depth'], dials)
            + '\nTokens by the depth at which they halt:\n\n' + markdown(['setting', 'depth', 'share', 'NLL', 'NLL if nobody halts', 'NLL after iteration 1'], by))
    print(text)
    write(Path(a.out) / 'results.md', text)
    write(Path(a.out) / 'results.json', json.dumps(groups, indent=1))
    print(f'wrote {Path(a.out) / "results.md"} and results.json')
    plt = pyplot()
    if plt:
        save_figure(iso_flops(plt, groups), Path(a.out) / 'isoflops.png')
        save_figure(nll_by_depth(plt, groups), Path(a.out) / 'nll_by_depth.png')
        plt.close('all')
    report(a, groups=groups)


def iso_flops(plt, groups):
    """NLL against the share of fixed depth's FLOPs saved, a panel a setting. Bars: standard deviation over seeds, of the difference to the learned gates."""
    fig, axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 4.2), squeeze=False)
    for ax, (name, g) in zip(axes[0], groups.items()):
        series = {}
        for r in g['rows']:
            if r['policy'] != 'fixed depth' and r['dial'] != 'own':
                series.setdefault((r['model'], r['policy']), []).append((r['saved']['mean'], r['nll']['mean'], ((r['over_learned'] or {}).get('sd') or 0)))
            elif r['model'] in ('fixed', 'vanilla') and r['dial'] == f'max_iter {g["n_iter"] if r["model"] == "fixed" else 1}':
                ax.axhline(r['nll']['mean'], color='grey', lw=1, ls=':' if r['model'] == 'vanilla' else '--')
                ax.annotate('n_iter=1' if r['model'] == 'vanilla' else f'fixed depth {g["n_iter"]}', (0.01, r['nll']['mean']), xycoords=('axes fraction', 'data'), fontsize=7, va='bottom', color='grey')
        colours = {p: f'C{n}' for n, p in enumerate(('random', 'uniform', 'geometric', 'confidence', 'convergence', 'oracle'))}
        for (model, policy), points in series.items():
            x, y, e = zip(*sorted(points))
            ax.errorbar([100 * v for v in x], y, e, label=policy + (' on fixed depth' if model == 'fixed' else ''), color=colours.get(policy, 'black'), lw=2.2 if policy == 'learned' else 1.1,
                        marker='o' if model == 'adaptive' else 'x', ms=4, ls='-' if model == 'adaptive' else ':', capsize=2)
        for r in g['rows']:
            if (r['model'], r['policy'], r['dial']) == ('adaptive', 'learned', 'own'):
                ax.plot(100 * r['saved']['mean'], r['nll']['mean'], '*', color='black', ms=13, label='trained tau')
        ax.set(title=name, xlabel=f'inference FLOPs saved against fixed depth {g["n_iter"]}, %', ylabel='validation NLL, nats a token')
        ax.title.set_fontsize(9)
    axes[0, -1].legend(fontsize=7, loc='upper left', bbox_to_anchor=(1.01, 1))
    return fig


def nll_by_depth(plt, groups):
    """Mean NLL of the tokens that halted at each depth; the width of a bar is their share."""
    fig, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.4), squeeze=False)
    for ax, (name, g) in zip(axes[0], groups.items()):
        for r in g['by_depth']:
            if r['nll']:
                ax.bar(r['depth'], r['nll']['mean'], 0.1 + 0.8 * r['share']['mean'], yerr=r['nll']['sd'] or 0, color='C0', capsize=3)
                ax.annotate(f'{r["share"]["mean"]:.0%}', (r['depth'], 0), ha='center', va='bottom', fontsize=8, color='white')
        ax.set(title=name, xlabel='depth, iterations', ylabel='NLL, nats a token', xticks=range(1, g['n_iter'] + 1))
        ax.title.set_fontsize(9)
    return fig


# flops and speed, of a checkpoint or of the shape in a config file with random weights

def shape_of(path):
    """The AdaPonderConfig and the TrainConfig of a config file."""
    t = load_config([path])
    if t.init_from != 'scratch':
        fail(f'{path} takes its shape from {t.init_from}: give the config of that size from scratch')
    meta = Path(t.data_dir) / 'meta.json'
    if not t.vocab_size and not meta.is_file():
        fail(f"{path} takes vocab_size from its data, and {t.data_dir} has none: prepare the data, or set vocab_size in the config")
    own = {f.name: getattr(t, f.name) for f in fields(AdaPonderConfig) if hasattr(t, f.name)}
    return AdaPonderConfig(**{**own, 'vocab_size': t.vocab_size or -(-json.loads(meta.read_text())['vocab_size'] // 64) * 64}), t


def model_of(a, path):
    """The model of a checkpoint, or one with random weights in the shape of a config file."""
    if not path.endswith('.py'):
        return load(path, a)[0]
    torch.manual_seed(a.seed)
    return AdaPonderLM(shape_of(path)[0]).to(a.device).eval().requires_grad_(False)


def twin(model, **change):
    """The same weights under another config: fixed depth, one iteration."""
    with torch.device('meta'):
        other = AdaPonderLM(replace(model.cfg, **change))
    own = model.state_dict()
    other.load_state_dict({k: own[k] for k in other.state_dict()}, assign=True)
    return other.eval().requires_grad_(False)


def forced(share, K):
    """A policy under which this share of the (token, iteration 2 .. K) pairs does not run, whatever the weights: every gate halts the same fraction.

    Depths are spread by the golden ratio, so that any run of positions comes near the share; rows start at unrelated places.
    """
    q = bisect(lambda q: sum((1 - q) ** i for i in range(1, K)), (1 - share) * (K - 1), 0.0, 1.0) if share else 0.0
    return lambda i, s, h, row, pos: (coin(row, 0 * pos) + pos * ((math.sqrt(5) - 1) / 2)) % 1 < (1 - q) ** (i + 1)


@torch.inference_mode()
def count(model, tokens, share):
    """FLOPs that FlopCounterMode sees in a packed pass over one sequence, and those of the formula: (matrix products, attention) twice, and the depths."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
    fused = [0]  # on the CPU softmax(h U^T) V is an attention over the vocabulary: matrix products all the same

    def sdpa(q, k, v, *rest, out_shape=None, **kw):
        fused[0] += sdpa_flop_count(q, k, v) if k[-2] == model.cfg.vocab_size else 0
        return sdpa_flop_count(q, k, v)
    x = torch.randint(model.cfg.vocab_size, (1, tokens), device=model.embed.weight.device)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}) as counter:
        out = model(x, execution='packed', policy=forced(share, model.cfg.n_iter))
        out.logits
    seen = counter.get_flop_counts()['Global']
    attention = sum(n for op, n in seen.items() if 'scaled_dot_product' in str(op) or 'bmm' in str(op)) - fused[0]
    context = torch.arange(1, tokens + 1, device=x.device)
    total = float(model.cfg.inference_flops(out.depth, context).sum())
    by_formula = float((out.depth * model.cfg.flops(context)['attention']).sum())
    return (sum(seen.values()) - attention, attention), (total - by_formula, by_formula), out.depth


def flops(a):
    """Parameters and forward FLOPs a token by part and depth, by formula and as FlopCounterMode counts them on a pass that runs."""
    result = []
    for path in a.config + a.ckpt:
        cfg = shape_of(path)[0] if path.endswith('.py') else load(path, a)[0].cfg
        with torch.device('meta'):
            params = {n: p.numel() for n, p in AdaPonderLM(cfg).named_parameters()}
        T = a.context or cfg.block_size
        f, context = cfg.flops((T + 1) / 2), (T + 1) / 2
        vanilla = replace(cfg, n_iter=1).inference_flops(1, context)
        gates, tables = (sum(n for k, n in params.items() if k.startswith(p)) for p in ('gates', ('embed', 'unembed')))
        print(f'{path}: {sum(params.values()):,} parameters ({tables:,} in the two embedding tables, {gates:,} in gates), {cfg.n_layer} layers, width {cfg.n_embd}, '
              f'vocabulary {cfg.vocab_size}, K = {cfg.n_iter}; a token of a causal pass over {T} tokens, MFLOPs')
        rows = []
        for d in range(1, cfg.n_iter + 1):
            parts = dict(linear=d * f['linear'], attention=d * f['attention'], unembed=f['unembed'], ponder=(d - 1) * f['ponder'], gates=(d - (d == cfg.n_iter)) * f['gate'])
            rows.append(dict(depth=d, **parts, total=float(cfg.inference_flops(d, context)), x_vanilla=float(cfg.inference_flops(d, context) / vanilla)))
            assert abs(sum(parts.values()) / rows[-1]['total'] - 1) < 1e-9
        table(list(rows[0])[:-1] + ['x vanilla'], [[r['depth'], *(f'{r[k] / 1e6:.2f}' for k in list(r)[1:-1]), f'{r["x_vanilla"]:.3f}'] for r in rows])
        counted = None
        if sum(params.values()) <= a.count_below:
            n = min(a.count_tokens, cfg.block_size)
            (mm, at), (mm_f, at_f), depth = count(model_of(a, path), n, 0.5)
            counted = dict(tokens=n, mean_depth=float(depth.double().mean()), products=mm, products_formula=mm_f, attention=at, attention_formula=at_f)
            print(f'counted on a packed pass over {n} tokens, mean depth {counted["mean_depth"]:.2f}: matrix products {mm / 1e6:.2f} M, {mm / mm_f:.4f} x formula; '
                  f'attention {at / 1e6:.2f} M, {at / at_f:.2f} x (kernels also count the keys that they mask)\n')
        else:
            print(f'not counted: more than --count_below {a.count_below:,} parameters\n')
        result.append(dict(path=path, config=asdict(cfg), parameters=sum(params.values()), context=context, depths=rows, counted=counted))
    report(a, configs=result)


def sync(device):
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()


@torch.inference_mode()
def time_prefill(model, x, **kw):
    """Seconds, tokens, FLOPs and halted share of a pass over prompts x (B, T), with the logits of their last tokens."""
    sync(x.device)
    t = time.perf_counter()
    out = model(x, **kw)
    model.unembed(out.hidden[:, -1])
    sync(x.device)
    t = time.perf_counter() - t
    cfg, context = model.cfg, torch.arange(1, x.size(1) + 1, device=x.device)
    spend = float((cfg.inference_flops(out.depth, context) - cfg.flops(0)['unembed']).sum()) + len(x) * cfg.flops(0)['unembed']
    return t, x.numel(), spend, halted_share(float(out.depth.double().mean()), cfg.n_iter)


def halted_share(depth, K):
    return (K - depth) / max(1, K - 1)


def time_decode(model, prompts, n, policy=None):
    """The same of n tokens a prompt, all slots busy: from when every prompt is in until so many tokens are out, whichever slot made them."""
    seen, spend, depths = [len(p) for p in prompts], 0.0, 0
    steps = model.stream(prompts, n + n // 2 + 8, temperature=0, policy=policy, slots=len(prompts))
    for step in islice(steps, len(prompts)):
        seen[step.seq] += 1
    sync(model.embed.weight.device)
    t = time.perf_counter()
    steps_made = list(islice(steps, n * len(prompts)))
    sync(model.embed.weight.device)
    t = time.perf_counter() - t
    steps.close()
    for step in steps_made:
        spend += model.cfg.inference_flops(step.depth, seen[step.seq])
        depths += step.depth
        seen[step.seq] += 1
    return t, len(steps_made), spend, halted_share(depths / len(steps_made), model.cfg.n_iter)


def race(case, variants, rounds):
    """Run the variants in turn, A B C A B C ..., after a warm-up each. Rows with median and quartiles of the time a token and of the ratio to the first in each round."""
    runs = {name: [] for name in variants}
    for r in range(rounds + 1):
        for name, fn in variants.items():
            out = fn()
            if r:
                runs[name].append(out)
    rows, first = [], next(iter(runs.values()))
    for name, mine in runs.items():
        per = [1e3 * t / n for t, n, *_ in mine]
        ratio = [(t / n) / (t0 / n0) for (t, n, *_), (t0, n0, *_) in zip(mine, first)]
        spend = [f / n if f else None for _, n, f, _ in (mine[0], first[0])]
        quart = lambda v: [float(q) for q in np.percentile(v, (25, 50, 75))]  # noqa: E731
        rows.append(dict(case=case, variant=name, halted=mine[0][3], ms_per_token=quart(per), time_ratio=quart(ratio), flop_ratio=spend[0] / spend[1] if all(spend) else None))
    return rows


def speed(a):
    """What the clock says: fixed depth against adaptive on the same weights, beside the ratio of their FLOPs, with a forced share of halting."""
    torch.set_num_threads(a.threads or torch.get_num_threads())
    model = model_of(a, a.ckpt or a.config).to(getattr(torch, a.dtype))
    K, cfg = model.cfg.n_iter, model.cfg
    longest = a.prompt + a.new + a.new // 2 + 8
    if K == 1 or max(longest, a.prefill) > cfg.block_size:
        fail(f'speed needs n_iter > 1 and a block_size of at least {max(longest, a.prefill)} for these --prefill, --prompt and --new')
    fixed, one = twin(model, halting=False), twin(model, halting=False, n_iter=1, scale_embeds=False)
    rng = np.random.default_rng(a.seed)

    def text(*shape):
        return torch.from_numpy(rng.integers(0, cfg.vocab_size, shape)).to(a.device)
    rows = []

    def run(case, variants):
        new = race(case, variants, a.rounds)
        rows.extend(new)
        for r in new:
            print(f'  {case}, {r["variant"]}: {r["ms_per_token"][1]:.3f} ms a token', file=sys.stderr)
    policies = [(f'adaptive, {share:.0%} halted', forced(share, K)) for share in a.share]
    if 'prefill' in a.cases:
        x = text(1, a.prefill)
        run(f'prefill {a.prefill}', {'fixed, dense': lambda: time_prefill(fixed, x), 'fixed, packed': lambda: time_prefill(fixed, x, execution='packed'),
                                     **{name: lambda policy=policy: time_prefill(model, x, execution='packed', policy=policy) for name, policy in policies}})
    for B in a.batch if 'decode' in a.cases else []:
        prompts = text(B, a.prompt).tolist()
        run('one stream' if B == 1 else f'batch {B}', {'fixed': lambda: time_decode(fixed, prompts, a.new),
                                                       **{name: lambda policy=policy: time_decode(model, prompts, a.new, policy) for name, policy in policies}})
    x = text(1, a.prompt)

    def whole(fn):
        sync(a.device)
        t = time.perf_counter()
        fn()
        sync(a.device)
        return time.perf_counter() - t, a.new, None, None
    if 'nocache' in a.cases:
        run('one stream and its prompt', {'fixed, cached': lambda: whole(lambda: fixed.generate(x, a.new, temperature=0)),
                                          'fixed, no KV cache': lambda: whole(lambda: fixed.generate(x, a.new, temperature=0, execution='dense'))})
    if 'transformers' in a.cases:
        try:
            from transformers import GPTNeoXForCausalLM
            with tempfile.TemporaryDirectory() as folder:
                one.save_pretrained(folder)
                hf = GPTNeoXForCausalLM.from_pretrained(folder).to(a.device, getattr(torch, a.dtype)).eval()
            hf.generation_config.eos_token_id = None

            def theirs():
                return hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=a.new, do_sample=False, use_cache=True, pad_token_id=0)
            same = bool((theirs() == one.generate(x, a.new, temperature=0)).all())
            run('one stream and its prompt', {'transformers, n_iter=1': lambda: whole(theirs), 'ours, n_iter=1': lambda: whole(lambda: one.generate(x, a.new, temperature=0)),
                                              f'ours, fixed {K}': lambda: whole(lambda: fixed.generate(x, a.new, temperature=0))})
            print(f'transformers and n_iter=1 made {"the same" if same else "NOT the same"} {a.new} tokens', file=sys.stderr)
        except ImportError:
            print('no comparison with transformers: pip install transformers')
    print(f'{a.ckpt or a.config}: {cfg.n_layer} layers, width {cfg.n_embd}, vocabulary {cfg.vocab_size}, K = {K}, {a.dtype} on {a.device}. {a.rounds} rounds, taken in turn; '
          f'[quartiles]. Decoding: prompts of {a.prompt} tokens, {a.new} new ones a slot.\n')
    table(['case', 'variant', 'halted', 'ms a token', '[quartiles]', 'tokens/s', 'time ratio', '[quartiles]', 'FLOP ratio', 'time / FLOPs'],
          [[r['case'], r['variant'], None if r['halted'] is None else f'{r["halted"]:.1%}', f'{r["ms_per_token"][1]:.3f}', '[{:.3f} {:.3f}]'.format(*r['ms_per_token'][::2]),
            f'{1e3 / r["ms_per_token"][1]:.1f}', f'{r["time_ratio"][1]:.3f}', '[{:.3f} {:.3f}]'.format(*r['time_ratio'][::2]),
            *([f'{r["flop_ratio"]:.3f}', f'{r["time_ratio"][1] / r["flop_ratio"]:.3f}'] if r['flop_ratio'] else [None, None])] for r in rows])
    report(a, config=asdict(cfg), rows=rows)


# plan

GPUS = {'H100': (989e12, 80), 'H100-PCIe': (756e12, 80), 'H200': (989e12, 141), 'B200': (2250e12, 180), 'A100': (312e12, 80), 'A100-40': (312e12, 40), 'L40S': (362e12, 48),
        'A6000': (155e12, 48), '4090': (165e12, 24), '3090': (71e12, 24), 'V100': (125e12, 32)}  # dense bf16 (V100: fp16) FLOP/s, GB


def activation_bytes(cfg, tokens, bf16=True, remat=False):
    """What a training step's forward pass keeps for backward, by part, for `tokens` tokens on one GPU. Without torch.compile, which keeps a little less."""
    b, d, L, K = 2 if bf16 else 4, cfg.n_embd, cfg.n_layer, cfg.n_iter
    first, later = L * d * (4 + 16 * b), L * d * (4 + 14 * b)
    gates = (K - 1) * d * (8 * b + 8) if cfg.halting else 0
    logits = cfg.vocab_size * min(tokens, max(1, AdaPonderLM.CHUNK // cfg.vocab_size))
    kept = 0 if tokens * cfg.vocab_size > AdaPonderLM.CHUNK else 4 * K * logits  # too few to be cut in chunks: kept, not computed again
    return dict(backbone=tokens * (K * d * (4 + 2 * L * b) + max(first, later) if remat else first + (K - 1) * later),
                between=tokens * K * 8 * d, gates=tokens * gates, logits=max(kept, 16 * logits))


ACTIVATIONS = dict(
    backbone='N L d (4 + 16 b) + (K - 1) N L d (4 + 14 b): a layer keeps x in float32, and two norms, q, k, v, y, 4 d and 4 d of the MLP',
    remat='K N d (4 + 2 L b) + one iteration of N L d (4 + 16 b): inputs and K/V of every iteration, the rest computed again',
    between='8 K N d: input of the last norm and h', gates='(K - 1) N d (8 b + 8): 4 d twice, and h twice', logits='16 x the numbers of a chunk of logits: float32, its softmax and gradients')


def plan(a):
    """What training a config takes: FLOPs, days, memory a GPU, dollars. Every line states its formula."""
    if a.gpu not in GPUS:
        fail(f'unknown GPU {a.gpu!r}: one of {", ".join(GPUS)}')
    if a.gpus < 1 or not 0 < a.mfu <= 1:
        fail('--gpus must be at least 1, --mfu in (0, 1]')
    cfg, t = shape_of(a.config)
    peak, memory = GPUS[a.gpu]
    step_tokens = t.batch_size * t.gradient_accumulation_steps * t.block_size
    steps = in_steps('max_steps', t.max_steps, step_tokens, None)
    tokens, N = steps * step_tokens, t.batch_size * t.block_size
    with torch.device('meta'):
        params = sum(p.numel() for p in AdaPonderLM(cfg).parameters())
    context, K = (t.block_size + 1) / 2, cfg.n_iter
    f, forward = cfg.flops(context), float(cfg.inference_flops(K, context))
    vanilla = float(replace(cfg, n_iter=1).inference_flops(1, context))
    chunked = N * cfg.vocab_size > AdaPonderLM.CHUNK
    again = (K * (f['linear'] + f['attention']) if t.remat else 0) + (f['unembed'] + (K - 1) * f['ponder'] if chunked else 0)
    total, seconds = 3 * forward * tokens, 3 * forward * tokens / (a.gpus * peak * a.mfu)
    b = 4 if t.dtype == 'float32' else 2
    act = activation_bytes(cfg, N, b == 2, t.remat)
    split = a.gpus if t.shard_optimizer else 1
    memories = dict(weights=4 * params, gradients=4 * params, adamw=8 * params / split, bf16_weights=2 * params if b == 2 else 0, **{'activations, ' + k: v for k, v in act.items()})
    need = sum(memories.values())
    gb = lambda x: f'{x / 1e9:.2f} GB'  # noqa: E731
    print(f'{a.config} on {a.gpus} x {a.gpu}: P = {params:,} parameters, L = {cfg.n_layer}, d = {cfg.n_embd}, V = {cfg.vocab_size}, K = {K}; micro-batch N = {t.batch_size} x {t.block_size} = {N:,} tokens, '
          f'b = {b} bytes, remat {"on" if t.remat else "off"}, optimizer {"sharded" if t.shard_optimizer else "whole on every GPU"}.\n')
    formulas = dict(weights='4 P: float32', gradients='4 P: float32, shared with DDP\'s buckets', adamw='8 P' + ' / GPUs' * t.shard_optimizer + ': two moments in float32', bf16_weights='2 P: autocast\'s copies')
    table(['', 'value', 'formula'], [
        ['tokens', f'{tokens / 1e9:.3f} B', f'{steps:,} steps x {t.gradient_accumulation_steps} micro-batches x N'],
        ['forward a token', f'{forward / 1e9:.3f} GFLOPs', f'K (24 L d^2 + 4 L d (T + 1) / 2) + (K - 1) (4 d V + gate) + 2 d V; {forward / vanilla:.2f} x vanilla: training runs every iteration'],
        ['training', f'{total:.3e} FLOPs', '3 x forward x tokens: backward costs two forwards'],
        ['computed again', f'{again / (3 * forward):.1%}', 'logits of the chunks' * chunked + ', the backbone (remat)' * t.remat + ': not in the MFU'],
        ['time', f'{seconds / 86400:.2f} days', f'FLOPs / ({a.gpus} GPUs x {peak / 1e12:.0f} TFLOP/s x MFU {a.mfu:.0%}); {a.gpus * seconds / 3600:,.0f} GPU hours, {tokens / seconds:,.0f} tokens/s'],
        *([['price', f'${a.gpus * seconds / 3600 * a.price:,.0f}', f'GPU hours x ${a.price:g}']] if a.price else []), [],
        *([k.replace('_', ' '), gb(v), formulas.get(k) or ACTIVATIONS['remat' if t.remat and k.endswith('backbone') else k.split(', ')[1]]] for k, v in memories.items()),
        ['peak a GPU', gb(need), f'the sum; {a.gpu} has {memory} GB' + ('' if need < 0.95e9 * memory else ': TOO MUCH, lower batch_size' + ', set remat' * (not t.remat) + ', shard_optimizer' * (not t.shard_optimizer))],
        [], ['decoding', gb(2 * cfg.n_layer * K * cfg.n_embd * cfg.block_size * b), f'2 L K d T b: K/V of one sequence of T = {cfg.block_size} tokens']])
    if t.gradient_accumulation_steps % a.gpus:
        print(f'\ngradient_accumulation_steps ({t.gradient_accumulation_steps}) is not a multiple of {a.gpus}: torchrun would refuse it')
    report(a, config=asdict(cfg), parameters=params, tokens=tokens, forward_flops=forward, training_flops=total, computed_again=again / (3 * forward), seconds=seconds, memory=memories, peak_memory=need,
           dollars=a.gpus * seconds / 3600 * a.price if a.price else None)


# downstream: lm-evaluation-harness

def harness_model(model, enc, eot, a):
    """An lm_eval model around this one. Every request runs at adaptive depth, packed or cached; .spent holds tokens, their depths and FLOPs."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    K, T, kw = model.cfg.n_iter, model.cfg.block_size, dict(tau=a.tau, max_iter=a.max_iter)
    tau, last = model.cfg.tau if a.tau is None else a.tau, a.max_iter or K

    class Adaptive(TemplateLM):
        eot_token_id = eot
        spent = [0, 0, 0.0]

        def spend(self, depth, context):
            self.spent[0] += depth.numel()
            self.spent[1] += int(depth.sum())
            self.spent[2] += float(model.cfg.inference_flops(depth, context, last).sum())

        def tok_encode(self, string, add_special_tokens=None, **rest):
            return enc.encode_ordinary(string)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests, **rest):
            """requests: (_, context, continuation), lists of tokens. Returns (sum of log-probabilities, whether greedy decoding would say the same)."""
            done = [None] * len(requests)
            order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))  # alike in length, so little padding
            for first in tqdm(range(0, len(order), a.batch_size), desc='loglikelihood', leave=False):
                part = order[first:first + a.batch_size]
                texts = [(requests[n][1] + requests[n][2])[-T - 1:] for n in part]
                length = torch.tensor([len(t) - 1 for t in texts], device=a.device)
                x = torch.tensor([t[:-1] + [0] * (int(length.max()) + 1 - len(t)) for t in texts], device=a.device)
                with autocast(a):  # padding comes after the text, so nothing sees it, and halts at once
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
            """Batches through the KV-cached engine; a batch ends when each text in it has met a stop sequence or its length."""
            done = []
            for first in tqdm(range(0, len(requests), a.batch_size), desc='generate', leave=False):
                part = [r.args for r in requests[first:first + a.batch_size]]
                stop = [[g['until']] if isinstance(g.get('until'), str) else list(g.get('until') or []) for _, g in part]
                budget = [next((g[k] for k in ('max_gen_toks', 'max_new_tokens', 'max_tokens') if g.get(k)), 256) for _, g in part]
                if max(budget) >= T:
                    raise ValueError(f'a task wants {max(budget)} new tokens, this model sees {T} at a time')
                prompts = [(enc.encode_ordinary(c) or [eot])[-(T - n):] for (c, _), n in zip(part, budget)]
                g = part[0][1]
                draw = dict(temperature=g.get('temperature') or 1.0, top_k=g.get('top_k'), top_p=g.get('top_p')) if g.get('do_sample') else dict(temperature=0)
                made, text, open_ = [[] for _ in part], [''] * len(part), set(range(len(part)))
                steps = model.stream(prompts, budget, generator=torch.Generator().manual_seed(a.seed + first), slots=len(part), stop_token=eot, **draw, **kw)
                for s in steps:
                    if s.seq in open_:
                        self.spend(torch.tensor([s.depth]), len(prompts[s.seq]) + len(made[s.seq]))
                        made[s.seq].append(s.token)
                        text[s.seq] = enc.decode([t for t in made[s.seq] if t != eot and t < enc.n_vocab])
                        if s.token == eot or len(made[s.seq]) == budget[s.seq] or any(w and w in text[s.seq] for w in stop[s.seq]):
                            open_.discard(s.seq)
                    if not open_:
                        break
                steps.close()
                for t, words in zip(text, stop):
                    for w in words:
                        t = t.split(w)[0] if w else t
                    done.append(t)
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
    own = Path(a.ckpt) / 'tokenizer.json'
    if a.tokenizer is None and 'meta' not in state and not own.is_file():
        fail(f'{a.ckpt} has no tokenizer.json: give --tokenizer')
    enc = load_tokenizer(a.tokenizer) if a.tokenizer else load_tokenizer(state['meta'], Path(a.ckpt).parent) if 'meta' in state else load_tokenizer(str(own))
    if enc.eot_token >= model.cfg.vocab_size:
        fail('the tokenizer has more tokens than the model: give the one that it was trained with')
    lm, rows = harness_model(model, enc, enc.eot_token, a), []
    manager = TaskManager(include_path=a.include_path)
    unknown = [t for t in a.tasks.split(',') if t not in manager.all_tasks]
    if unknown:
        fail(f'lm-eval knows no task {", ".join(unknown)}; --include_path names a folder with task files')
    full = replace(model.cfg, halting=False)
    for task in a.tasks.split(','):
        lm.spent = [0, 0, 0.0]
        scores = lm_eval.simple_evaluate(lm, tasks=[task], num_fewshot=a.num_fewshot, limit=a.limit, task_manager=manager, log_samples=False, bootstrap_iters=1000,
                                         random_seed=a.seed, numpy_random_seed=a.seed, torch_random_seed=a.seed, fewshot_random_seed=a.seed)['results']
        n, depth, spend = lm.spent
        for name, result in scores.items():
            for metric, value in result.items():
                if isinstance(value, float) and '_stderr' not in metric:
                    se = result.get(metric.replace(',', '_stderr,'))
                    rows.append(dict(task=name, metric=metric.split(',')[0], value=value, stderr=se if isinstance(se, float) else None, tokens=n, depth=depth / n, flops=spend / n))
    print(f'{a.ckpt}: K = {model.cfg.n_iter}, tau {model.cfg.tau if a.tau is None else a.tau:g}, at most {a.max_iter or model.cfg.n_iter} iterations; '
          f'fixed depth {model.cfg.n_iter} costs {float(full.inference_flops(full.n_iter, 1)) / 1e6:.2f} MFLOPs a token and attention\n')
    table(['task', 'metric', 'value', '+-', 'mean depth', 'MFLOPs/token'],
          [[r['task'], r['metric'], f'{r["value"]:.4f}', f'{r["stderr"]:.4f}' if r['stderr'] is not None else None, f'{r["depth"]:.2f}', f'{r["flops"] / 1e6:.2f}'] for r in rows])
    report(a, config=asdict(model.cfg), rows=rows)


def curves(a):
    """The logs of runs side by side: a table of where they are, and a picture."""
    panels = ('loss', 'val_loss', 'depth', 'val_depth', 'grad_norm', 'gate_mean', 'tokens_per_second', 'lr')
    logs = {}
    for folder in a.folders:
        path = Path(folder) / 'log.jsonl' if os.path.isdir(folder) else Path(folder)
        if not path.is_file():
            fail(f'no log at {path}: give the out_dir of a run of train.py')
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                pass  # the line that a killed run was writing
        logs[folder] = {k: [(r['step'], r[k]) for r in records if r.get(k) not in (None, [])] for k in panels + ('tokens', 'val_flops_saved', 'mfu')}
    end = lambda log, k, form: form.format(log[k][-1][1]) if log[k] else None  # noqa: E731
    table(['run', 'step', 'tokens', 'loss', 'val loss', 'depth', 'val depth', 'FLOPs saved', 'tokens/s', 'MFU'],
          [[f, log['tokens'][-1][0] if log['tokens'] else 0, *(end(log, k, form) for k, form in (('tokens', '{:,}'), ('loss', '{:.4f}'), ('val_loss', '{:.4f}'), ('depth', '{:.2f}'), ('val_depth', '{:.2f}'),
            ('val_flops_saved', '{:.1%}'), ('tokens_per_second', '{:,.0f}'), ('mfu', '{:.1%}')))] for f, log in logs.items()])
    plt = pyplot()
    if plt:
        fig, axes = plt.subplots(2, 4, figsize=(18, 7))
        for ax, key in zip(axes.flat, panels):
            for n, (name, log) in enumerate(logs.items()):
                if log[key]:
                    x, y = zip(*log[key])
                    if key == 'gate_mean':  # a line a gate
                        for i in range(max(map(len, y))):
                            ax.plot(*zip(*((s, v[i]) for s, v in log[key] if i < len(v) and v[i] is not None)), color=f'C{n}', alpha=1 - 0.25 * i, lw=1)
                    else:
                        ax.plot(x, y, color=f'C{n}', lw=1, marker='o' if key.startswith('val') else None, ms=3, label=name)
            ax.set(title=key, xlabel='step', yscale='log' if key == 'grad_norm' else 'linear')
        axes[0, 0].legend(fontsize=7)
        fig.tight_layout()
        save_figure(fig, a.out)
        plt.close(fig)
    report(a, runs=logs)


def number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='command', required=True)

    def command(fn, *, device=True):
        c = sub.add_parser(fn.__name__, help=fn.__doc__.split('\n')[0], description=fn.__doc__)
        c.set_defaults(fn=fn)
        c.add_argument('--json', help='write the numbers here')
        c.add_argument('--seed', type=int, default=1337)
        if device:
            c.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
            c.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
        return c

    c = command(ppl)
    c.add_argument('--ckpt', required=True, help='a ckpt.pt of train.py')
    c.add_argument('--data', help='a folder of prepare_data.py; default: the one the checkpoint was trained on')
    c.add_argument('--vanilla', help='a checkpoint with n_iter=1, for the retained gain')
    c.add_argument('--vanilla_longer', help='one that was given the training FLOPs of the fixed depth')
    c.add_argument('--fixed', help='a checkpoint of fixed depth, for the retained gain; early exits are measured on it too')
    c.add_argument('--policies', nargs='+', default=['learned', 'random', 'uniform', 'geometric', 'confidence', 'convergence', 'oracle'])
    c.add_argument('--save', nargs='*', type=number, default=[0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6], help='the dial: shares of fixed depth\'s FLOPs to save')
    c.add_argument('--eval_tokens', type=int, default=65536, help='of the val split, to measure on')
    c.add_argument('--calib_tokens', type=int, default=16384, help='others of it, to set thresholds on')
    c.add_argument('--batch_size', type=int, default=16)
    c.add_argument('--group', help='what runs with other seeds share; results takes their mean')

    c = command(results, device=False)
    c.add_argument('files', nargs='+', help='JSON files of bench.py ppl')
    c.add_argument('--out', default='assets')

    c = command(flops)
    c.add_argument('--config', nargs='*', default=[], help='config files')
    c.add_argument('--ckpt', nargs='*', default=[], help='checkpoints or GPT-NeoX folders')
    c.add_argument('--context', type=int, help='tokens of the causal pass; default block_size')
    c.add_argument('--count_tokens', type=int, default=128, help='tokens of the pass that is run and counted')
    c.add_argument('--count_below', type=int, default=300_000_000, help='run it only for models of at most so many parameters')

    c = command(speed)
    shape = c.add_mutually_exclusive_group(required=True)
    shape.add_argument('--ckpt', help='a checkpoint or a GPT-NeoX folder')
    shape.add_argument('--config', help='a config file: random weights in its shape')
    c.add_argument('--cases', nargs='+', choices=('prefill', 'decode', 'nocache', 'transformers'), default=['prefill', 'decode', 'nocache', 'transformers'])
    c.add_argument('--share', nargs='*', type=number, default=[0.0, 0.25, 0.5, 0.75], help='of the (token, iteration 2 .. K) pairs that do not run')
    c.add_argument('--prefill', type=int, default=1024, help='tokens')
    c.add_argument('--batch', nargs='*', type=int, default=[1, 8, 32, 128], help='slots')
    c.add_argument('--prompt', type=int, default=64, help='tokens of a prompt to decode from')
    c.add_argument('--new', type=int, default=32, help='tokens to decode for each slot')
    c.add_argument('--rounds', type=int, default=5)
    c.add_argument('--threads', type=int, help='CPU threads')

    c = command(plan, device=False)
    c.add_argument('--config', required=True, help='a config file of train.py')
    c.add_argument('--gpu', default='H100', help=', '.join(GPUS))
    c.add_argument('--gpus', type=int, default=8)
    c.add_argument('--mfu', type=float, default=0.4, help='the share of the peak that is reached; train.py prints it')
    c.add_argument('--price', type=float, help='dollars a GPU hour')

    c = command(downstream)
    c.add_argument('--ckpt', required=True, help='a ckpt.pt of train.py or a GPT-NeoX folder')
    c.add_argument('--tasks', required=True, help='lambada_openai,piqa,arc_easy,...')
    c.add_argument('--include_path', help='a folder with task files of your own')
    c.add_argument('--tokenizer', help="a tokenizer.json; default: the checkpoint's")
    c.add_argument('--num_fewshot', type=int)
    c.add_argument('--limit', type=int, help='documents a task')
    c.add_argument('--batch_size', type=int, default=16)
    c.add_argument('--tau', type=float)
    c.add_argument('--max_iter', type=int)

    c = command(curves, device=False)
    c.add_argument('folders', nargs='+', help='the out_dir of each run')
    c.add_argument('--out', default='curves.png')

    a = p.parse_args()
    try:
        a.fn(a)
    except ValueError as e:  # what model.py and the data reader refuse
        fail(e)


if __name__ == '__main__':
    main()
