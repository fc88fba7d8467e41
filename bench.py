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
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import AdaPonderLM, load_checkpoint
from train import Windows


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

    a = p.parse_args()
    try:
        a.fn(a)
    except ValueError as e:  # what model.py and the data reader refuse
        fail(e)


if __name__ == '__main__':
    main()
