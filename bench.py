"""
Measures a model: what it costs by formula, how well it predicts at which cost, and what the clock says.

    python bench.py flops --config config/pythia*.py
    python bench.py ppl --ckpt out/tiny/ckpt.pt --others fixed=out/f/ckpt.pt vanilla=out/v/ckpt.pt --json 1.json
    python bench.py results 1.json 2.json 3.json
    python bench.py speed --config config/pythia70m.py
    python bench.py plan --config config/pythia410m.py --gpu H100 --gpus 8 --price 2.5
    python bench.py downstream --ckpt out/tiny/ckpt.pt --tasks lambada_openai,piqa
    python bench.py curves out/a out/b

Each prints a table, and with --json FILE writes its numbers beside the machine, the versions and the seed.
"""
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends quietly

import argparse
import io
import json
import math
import os
import platform
import time
import weakref
from collections import defaultdict
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from model import AdaPonderConfig, AdaPonderLM, hash_uniform, load_checkpoint
from prepare_data import UsageError, check_writable, command_line, load_tokenizer, write_beside
from sample import stream
from train import GPUS, Windows, get_autocast, get_device, in_steps, load_config, load_meta


# -----------------------------------------------------------------------------
# Tables, files, models

def show(form, value):
    """A value as text, 'mean ± error' where it has one, and nothing for None."""
    if not isinstance(value, dict):
        return '' if value is None else form.format(value)
    error = '' if value['error'] is None else ' ± ' + form.replace('+', '').format(value['error'])
    return form.format(value['mean']) + error


def table(rows, forms, left=1):
    """A Markdown table of dicts, as text. forms: key -> format of a column; the first `left` go to the left."""
    cells = [[key.replace('_', ' ') for key in forms]]
    cells += [[show(form, row.get(key)) for key, form in forms.items()] for row in rows]
    width = [max(len(row[j]) for row in cells) for j in range(len(forms))]
    cells.insert(1, ['-' * w if j < left else '-' * (w - 1) + ':' for j, w in enumerate(width)])
    lines = []
    for row in cells:
        padded = [c.ljust(w) if j < left else c.rjust(w) for j, (c, w) in enumerate(zip(row, width))]
        lines.append('| ' + ' | '.join(padded) + ' |\n')
    return ''.join(lines)


def write(path, data):
    """A text or bytes, whole or not at all."""
    write_beside(path, data.encode('utf-8') if isinstance(data, str) else data)
    print(f'wrote {path}')


def report(a, **result):
    """Print where the numbers were measured; --json FILE keeps them all."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'
    machine = dict(cpu=platform.processor() or platform.machine(), cpus=os.cpu_count(), gpu=gpu, seed=a.seed,
                   threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__)
    print('\n' + ', '.join(f'{k} {v}' for k, v in machine.items()))
    if a.json:
        record = dict(command=a.command, arguments=vars(a), machine=machine, **result)
        write(a.json, json.dumps(record, indent=1, default=str))


def pyplot():
    """matplotlib.pyplot; None, and a word, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print('no pictures: pip install matplotlib')
        return None
    matplotlib.use('agg')  # draws into files, needs no screen
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(plt, fig, path):
    picture = io.BytesIO()
    fig.savefig(picture, format=Path(path).suffix[1:], dpi=150, bbox_inches='tight')
    plt.close(fig)
    write(path, picture.getvalue())


def config_of(path, changes=()):
    """The AdaPonderConfig and the TrainConfig of a config file. changes: strings key=value."""
    train_config = load_config([path, *(f'--{change}' for change in changes)])
    if train_config.init_from != 'scratch':
        raise UsageError(f'{path} starts from {train_config.init_from}: give a config that starts from scratch')
    own = {f.name: getattr(train_config, f.name) for f in fields(AdaPonderConfig) if hasattr(train_config, f.name)}
    if not own['vocab_size']:  # the data's, in multiples of 64 as train.py has it
        folder = Path(os.path.expanduser(train_config.data_dir))
        if not (folder / 'meta.json').is_file():
            raise UsageError(f'{path} takes vocab_size from {folder}, where no data is: prepare it, or set vocab_size')
        own['vocab_size'] = -(-load_meta(folder)['vocab_size'] // 64) * 64
    return AdaPonderConfig(**own), train_config


def load(path, a):
    """The model at path on a.device, and what its checkpoint says beside the weights.

    path: a checkpoint of train.py, GPT-NeoX weights (a folder or a hub name), or a config file for random weights.
    """
    state = {}
    if path.endswith('.py'):
        torch.manual_seed(a.seed)
        model = AdaPonderLM(config_of(path)[0])
    elif os.path.isfile(path) or path.endswith('.pt'):
        state = load_checkpoint(path)
        model = AdaPonderLM.from_state(state, path)
    else:
        model = AdaPonderLM.from_pretrained(path)
    model = model.to(a.device).eval().requires_grad_(False)
    return model, {k: state[k] for k in ('meta', 'train_config') if k in state}


def with_config(model, **change):
    """The same weights under another config, as fixed depth or one iteration."""
    with torch.device('meta'):
        other = AdaPonderLM(replace(model.cfg, **change))
    weights = model.state_dict()
    other.load_state_dict({name: weights[name] for name in other.state_dict()}, assign=True)
    return other.eval().requires_grad_(False)


def count_parameters(cfg, prefix=''):
    with torch.device('meta'):
        return sum(p.numel() for name, p in AdaPonderLM(cfg).named_parameters() if name.startswith(prefix))


def autocast(a):
    return get_autocast(torch.device(a.device), a.dtype)[0]()


def val_windows(folder, model, state, length):
    """The val split of a prepared folder in windows of length + 1 tokens. Refuses data of another tokenizer."""
    folder = Path(os.path.expanduser(folder))
    if not (folder / 'meta.json').is_file():
        raise UsageError(f'no data in {folder}: give --data, a folder that prepare_data.py made')
    meta = load_meta(folder)
    trained_with = (state.get('meta') or {}).get('tokenizer_sha256', meta['tokenizer_sha256'])
    if trained_with != meta['tokenizer_sha256'] or meta['vocab_size'] > model.cfg.vocab_size:
        raise UsageError(f'the data in {folder} was made with another tokenizer than the model was trained with')
    return Windows(folder, meta, 'val', length, model.cfg.vocab_size)


# -----------------------------------------------------------------------------
# Halting policies, as AdaPonderLM.decide() takes them: fn(i, s, h, row, pos) -> bool (N,), True: the token goes on

def scheduled_policy(kind, mean_cost, target, salt=0):
    """Tokens picked at random halt, so many after each iteration that all spend target. mean_cost: of depths 1 .. K.

    uniform: every iteration loses the same number of tokens; geometric: the same fraction of those that are left.
    """
    def shares(p):  # of the tokens that go on after iterations 1 .. K - 1
        if kind == 'uniform':
            return [max(0.0, 1 - p * i) for i in range(1, len(mean_cost))]
        return [(1 - p) ** i for i in range(1, len(mean_cost))]

    def cost(p):
        return mean_cost[0] + sum(r * (b - a) for r, a, b in zip(shares(p), mean_cost, mean_cost[1:]))
    return random_policy(shares(bisect(cost, target, 0.0, 1.0)), salt)


def random_policy(shares, salt=0):
    """A share shares[i] of all tokens, picked at random, goes on after iteration i. shares must not rise."""
    return lambda i, s, h, row, pos: hash_uniform(row, pos, salt) < shares[i]


def forced_policy(share, K):
    """`share` of the (token, iteration 2 .. K) pairs does not run, whatever the weights are: for measuring time."""
    return scheduled_policy('geometric', list(range(K)), (1 - share) * (K - 1))


def threshold_policy(score, t=-math.inf, record=None):
    """A token goes on while its score is at least t. record: a CPU tensor (n, T, K - 1) to keep the scores in."""
    def policy(i, s, h, row, pos):
        x = score(i, s, h, row, pos)
        if record is not None:
            record[row.cpu(), pos.cpu(), i] = x.cpu().to(record.dtype)
        return x >= t
    return policy


def log_probs(model, h):
    """log softmax of the logits, at least float32. h: (N, d) -> (N, vocab)."""
    logits = model.unembed(h)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def in_chunks(model, fn, *tensors):
    """fn on a chunk of tokens at a time, so that the logits of all are never held at once. tensors: (N, ...) each."""
    n = model.chunks(tensors[0])
    return torch.cat([fn(*parts) for parts in zip(*(t.chunk(n) for t in tensors))])


def gate_score(model):
    """The learned gates. With t = tau this is what the model does by itself."""
    return lambda i, s, h, row, pos: s


def confidence_score(model):
    """Minus the probability of the likeliest next token: a token that is sure of it halts."""
    return lambda i, s, h, row, pos: -in_chunks(model, lambda x: log_probs(model, x).amax(-1), h).exp()


def convergence_score(model):
    """KL(P^(i-1) || P^i), small where an iteration changed little (arXiv 2502.05171). After the first one: infinite."""
    before = {}

    def kl(now, then):
        p, q = log_probs(model, now), log_probs(model, then)
        return (q.exp() * (q - p)).sum(-1)

    def score(i, s, h, row, pos):
        key = row * 2 ** 32 + pos  # rises along the tokens, so those that still run are found by bisection
        if i == 0:
            out = torch.full_like(s, math.inf)
        else:
            out = in_chunks(model, kl, h, before['h'][torch.searchsorted(before['key'], key)])
        before.update(key=key, h=h)
        return out
    return score


SCORES = dict(learned=gate_score, confidence=confidence_score, convergence=convergence_score)
POLICIES = ['learned', 'random', 'uniform', 'geometric', 'confidence', 'convergence', 'oracle']


# -----------------------------------------------------------------------------
# Measuring windows of text, x: (n, T + 1)

@torch.inference_mode()
def measure(model, x, a, policy=None):
    """Run windows x packed. Returns depth and NLL, (n, T) on the CPU. The policy's row is a window's number in x."""
    depth, nll = [], []
    for first in range(0, len(x), a.batch_size):
        part = x[first:first + a.batch_size].to(a.device)

        def with_row(i, s, h, row, pos):
            return policy(i, s, h, row + first, pos)
        with autocast(a):
            out = model(part[:, :-1], part[:, 1:], execution='packed', policy=policy and with_row)
        depth.append(out.depth.cpu())
        nll.append(out.nll.cpu().double())  # float64 on the CPU alone: some devices have none
    return torch.cat(depth), torch.cat(nll)


@torch.inference_mode()
def nll_by_iteration(model, x, a):
    """The NLL of each token after each iteration when no token halts, (n, T, K): what max_iter = 1 .. K give."""
    parts = []
    for part in x.split(a.batch_size):
        part = part.to(a.device)
        with autocast(a):
            out = model(part[:, :-1], tau=0.0)
            states = [h for index, s, on, h in out.records] + [out.hidden.flatten(0, 1)]
            nll = torch.stack([model.cross_entropy(h, part[:, 1:].flatten())[1] for h in states], dim=-1)
        parts.append(nll.view(*out.depth.shape, -1).cpu().double())
    return torch.cat(parts)


def cost_table(cfg, T, max_iter=None):
    """FLOPs of a token by position and depth, (T, K) float64, in a causal pass over T tokens."""
    context = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    return cfg.inference_flops(torch.arange(1, cfg.n_iter + 1)[None], context, max_iter)


def flops_spent(cost, depth):
    """FLOPs of each token. cost: (T, K), depth: (n, T) -> (n, T)."""
    return cost.expand(len(depth), -1, -1).gather(-1, depth[..., None] - 1)[..., 0]


def depth_at(scores, t):
    """Depths (n, T) of tokens with scores (n, T, K - 1) under the threshold t: halted stays halted."""
    return 1 + (scores >= t).long().cumprod(-1).sum(-1)


def bisect(fn, target, low, high):
    """Where fn, which falls, comes down to target."""
    for _ in range(60):
        middle = (low + high) / 2
        if fn(middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def find_threshold(scores, cost, target):
    """The t at which the mean cost of tokens with scores (n, T, K - 1) comes nearest to target FLOPs."""
    # only the scores themselves matter as thresholds, and the cost falls from each of them to the next
    values = scores[scores.isfinite()].unique()

    def mean_cost(j):
        return float(flops_spent(cost, depth_at(scores, values[int(j)])).mean())
    j = round(bisect(mean_cost, target, 0, len(values) - 1))
    near = range(max(0, j - 1), min(j + 2, len(values)))
    return float(values[min(near, key=lambda j: abs(mean_cost(j) - target))])


def calibrated_policy(model, x, a, kind, cost, target):
    """The policy of a kind of score whose threshold spends target FLOPs a token on windows x.

    Halting changes later scores a little. So scores are taken where no token halts, and once more where they do.
    """
    scores, t = torch.zeros(*x[:, 1:].shape, model.cfg.n_iter - 1, dtype=torch.float64), -math.inf
    for _ in range(2):
        measure(model, x, a, threshold_policy(SCORES[kind](model), t, record=scores))
        t = find_threshold(scores, cost, target)
    return threshold_policy(SCORES[kind](model), t)


def oracle_depth(nll, cost, target):
    """The depths (n, T) with the least NLL that cost target, knowing the NLL (n, T, K) of every token at every depth.

    By a Lagrange multiplier: each token minimises NLL + lambda * cost, with the lambda at which all spend target.
    """
    def choose(log_lambda):
        return (nll + 10 ** log_lambda * cost / cost.mean()).argmin(-1) + 1
    return choose(bisect(lambda x: float(flops_spent(cost, choose(x)).mean()), target, -9, 4))


def spearman(x, y):
    """Rank correlation of two 1-d arrays; equal values share their mean rank. None where one of them does not vary."""
    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        r = (np.cumsum(counts) - counts / 2)[inverse]
        return r - r.mean()
    a, b = ranks(np.asarray(x)), ranks(np.asarray(y))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else None


def estimate(samples):
    """Their mean and its standard error. To compare two models give the differences on the same windows."""
    return dict(mean=float(np.mean(samples)), error=float(np.std(samples, ddof=1) / math.sqrt(len(samples))))


# -----------------------------------------------------------------------------
# ppl: perplexity of halting policies at equal FLOPs

def pick_windows(a, folder, model, state):
    """Windows spread evenly over the val split: (n, T + 1) to measure on, (m, T + 1) others to set thresholds on."""
    T = model.cfg.block_size
    val = val_windows(folder, model, state, T)
    n, m = max(2, a.eval_tokens // T), max(2, a.calib_tokens // T)
    if n + m > val.n:  # all there are, in the same proportion
        m = max(1, round(val.n * m / (n + m)))
        n = val.n - m
    if n < 2:
        raise UsageError(f'the val split of {folder} has {val.n} windows of {T} tokens, too few to measure on')
    x = val.batch(np.linspace(0, val.n - 1, n + m).round().astype(int) * T)
    # every few windows one is for thresholds, so that both parts come from all of the text
    calib = np.linspace(0, n + m - 1, m + 2)[1:-1].round().astype(int)
    return x[np.setdiff1d(np.arange(n + m), calib)], x[calib]


def make_row(policy, setting, depth, nll, flops, full, K):
    """One line of ppl's table. depth, nll: (n, T); flops: of a mean token; full: those of fixed depth without gates."""
    windows = nll.mean(1).numpy()
    return dict(policy=policy, setting=setting, nll=estimate(windows),
                ppl=math.exp(windows.mean()), flops=flops, saved=1 - flops / full, depth=float(depth.double().mean()),
                active=[float((depth > i).double().mean()) for i in range(K)], windows=windows)


def compare_policies(model, x, calib, a, kinds, targets, full, bar):
    """One model on windows x under each kind of policy at each setting. calib: other windows, to set thresholds on.

    targets: FLOPs a token of each setting; None where the model's own tau decides. full: FLOPs a token of fixed depth.
    Returns the rows of ppl's table, and what the model does at its own tau, see by_depth().
    """
    T, K, rows, own = x.size(1) - 1, model.cfg.n_iter, [], {}
    cost, levels = cost_table(model.cfg, T), nll_by_iteration(model, x, a)  # (T, K), (n, T, K)
    for d in range(1, K + 1):  # without halting, but stopped after d iterations
        depth, flops = torch.full(levels.shape[:2], d), float(cost_table(model.cfg, T, d)[:, d - 1].mean())
        rows.append(make_row('fixed depth', f'max_iter {d}', depth, levels[..., d - 1], flops, full, K))
    # the learned gates come first, because the others aim at the FLOPs that these spend
    for setting, target in targets.items():
        for kind in kinds:
            if kind == 'learned' and target is None:
                policy = None
            elif kind in SCORES:
                policy = calibrated_policy(model, calib, a, kind, cost, target)
            elif kind == 'oracle':
                best = oracle_depth(levels, cost, target).to(a.device)
                policy = lambda i, s, h, row, pos: best[row, pos] > i + 1  # noqa: E731
            elif kind == 'random':
                policy = random_policy(learned['active'][1:], a.seed)
            else:
                policy = scheduled_policy(kind, cost.mean(0).tolist(), target, a.seed)
            depth, nll = measure(model, x, a, policy)
            rows.append(make_row(kind, setting, depth, nll, float(flops_spent(cost, depth).mean()), full, K))
            bar.update()
            if kind == 'learned':
                learned = rows[-1]
                if target is None:
                    own = by_depth(depth, nll, levels)
                target = learned['flops']
    return rows, own


def by_depth(depth, nll, levels):
    """Which tokens halt when. depth, nll: (n, T), as the model runs; levels: (n, T, K), NLL where no token halts.

    spearman: the rank correlations of depth with what the iterations after d save, for d = 1 .. K - 1.
    """
    rows = []
    for d in range(1, levels.size(-1) + 1):
        at = depth == d
        row = dict(depth=d, share=float(at.double().mean()))
        if at.any():
            for name, x in dict(nll=nll, nll_full=levels[..., -1], nll_first=levels[..., 0]).items():
                row[name] = float(x[at].mean())
        rows.append(row)
    saving = levels[..., :-1] - levels[..., -1:]
    ranks = [spearman(depth.flatten().numpy(), s.flatten().numpy()) for s in saving.unbind(-1)]
    return dict(by_depth=rows, spearman=ranks)


def add_comparisons(rows, main):
    """Give rows their NLL over the main model's learned gates at the same FLOPs, and the share of the gain they retain.

    The gates' NLL is interpolated between the settings, and ends at tau = 1 and 0. The error is paired, over windows.
    """
    ends = [r for r in rows if (r['model'], r['policy']) == (main, 'fixed depth')]
    learned = [r for r in rows if (r['model'], r['policy']) == (main, 'learned')]
    # the gates' curve: all stop after one iteration, the settings, none stops
    curve = sorted([ends[0], *learned, ends[-1]], key=lambda r: r['flops'])
    flops = np.array([r['flops'] for r in curve])
    for r in rows if learned else []:
        # not the curve itself, nor what lies beyond its ends
        itself = r['model'] == main and r['policy'] in ('learned', 'fixed depth')
        if itself or not flops[0] <= r['flops'] <= flops[-1]:
            continue
        j = max(1, int(np.searchsorted(flops, r['flops'])))
        weight = (r['flops'] - flops[j - 1]) / (flops[j] - flops[j - 1])
        difference = r['windows'] - (1 - weight) * curve[j - 1]['windows'] - weight * curve[j]['windows']
        r['over_learned'] = estimate(difference)
    whole = {r['model']: r['nll']['mean'] for r in rows if r['policy'] == 'fixed depth'}  # the last one: all iterations
    gain = whole.get('vanilla', 0) - whole.get('fixed', math.inf)
    for r in rows:
        if gain > 0 and r['model'] != 'vanilla':
            r['retained'] = (whole['vanilla'] - r['nll']['mean']) / gain


def load_models(a):
    """The models of ppl, that of --ckpt first: name -> model, name -> path, and what --ckpt says beside its weights."""
    model, state = load(a.ckpt, a)
    main = 'vanilla' if model.cfg.n_iter == 1 else 'adaptive' if model.cfg.halting else 'fixed'
    models, paths = {main: model}, {main: a.ckpt}
    for other in a.others:
        name, equals, path = other.partition('=')
        if not (name and path) or name in models:
            raise UsageError(f'--others takes NAME=CKPT, with a name of its own for each, not {other!r}')
        paths[name] = os.path.expanduser(path)
        models[name] = load(paths[name], a)[0]
        if any(getattr(models[name].cfg, f) != getattr(model.cfg, f) for f in ('vocab_size', 'block_size')):
            raise UsageError(f'{path} has another vocabulary or block_size than {a.ckpt}: they cannot be compared')
    return models, paths, state


def ppl(a):
    """Perplexity on the val split under every halting policy at equal FLOPs, with thresholds set on other text."""
    models, paths, state = load_models(a)
    (main, model), config = next(iter(models.items())), state.get('train_config', {})
    cfg, folder = model.cfg, a.data or config.get('data_dir')
    if not folder:
        raise UsageError('give --data, a folder that prepare_data.py made')
    x, calib = pick_windows(a, folder, model, state)
    full = float(cost_table(replace(cfg, halting=False), cfg.block_size)[:, -1].mean())
    shares = {f'save {share:.3g}': (1 - share) * full for share in a.save}

    rows, runs = [], {}
    for name, m in models.items():
        if m.cfg.n_iter == 1:
            kinds, targets = [], {}
        elif not m.cfg.halting:  # exits that need no gates, at the FLOPs of the main model's gates where it has some
            kinds = [k for k in a.policies if k not in ('learned', 'random') and (name == main or k in SCORES)]
            learned = [r for r in rows if (r['model'], r['policy']) == (main, 'learned')]
            targets = shares | {r['setting']: r['flops'] for r in learned}
        elif name == main:
            kinds, targets = [k for k in POLICIES if k in a.policies or k == 'learned'], {'own tau': None, **shares}
        else:  # another adaptive model, as it was trained
            kinds, targets = ['learned'], {'own tau': None}
        # a row of the table takes seconds: the bar says how long all of them will take
        with tqdm(total=len(kinds) * len(targets), desc=name, leave=False) as bar:
            measured, own = compare_policies(m, x, calib, a, kinds, targets, full, bar)
        rows += [dict(model=name, **r) for r in measured]
        runs[name] = dict(ckpt=paths[name], parameters=count_parameters(m.cfg), n_iter=m.cfg.n_iter, **own)
    add_comparisons(rows, main)
    for r in rows:
        del r['windows']
    group = a.group or f'{Path(folder).name}, {cfg.n_layer} layers of width {cfg.n_embd}'
    record = dict(group=group, config=asdict(cfg), train_config=config, data=folder, tokens=x[:, 1:].numel(),
                  full_flops=full, runs=runs, rows=rows)
    print(f'{a.ckpt}: K = {cfg.n_iter}, {runs[main]["parameters"]:,} parameters. {len(x)} windows of {cfg.block_size} '
          f'tokens of {folder} measured, {len(calib)} others to set thresholds. ±: standard error over windows.\n')
    print(group_tables(group, summary([record])))
    report(a, **record)


# -----------------------------------------------------------------------------
# results: means over seeds of several settings, from the JSON files of ppl

def mean_over_seeds(values):
    """The same nested dict of each run -> one with dict(mean, error) for each number that all have.

    error: the standard deviation over the runs; of a single run its own standard error, or None.
    """
    first = values[0]
    if isinstance(first, dict) and 'error' not in first:
        return {k: mean_over_seeds([v[k] for v in values]) for k in first if all(k in v for v in values)}
    if isinstance(first, list):
        return [mean_over_seeds(same) for same in zip(*values)]
    if None in values:
        return None
    if not isinstance(first, (dict, float)):
        return first
    if len(values) == 1:
        return first if isinstance(first, dict) else dict(mean=first, error=None)
    means = [v['mean'] if isinstance(v, dict) else v for v in values]
    return dict(mean=float(np.mean(means)), error=float(np.std(means, ddof=1)))


def summary(runs):
    """One setting over its seeds. rows: 'model, policy, setting' -> means, of those that all runs have."""
    keyed = [{', '.join((r['model'], r['policy'], r['setting'])): r for r in run['rows']} for run in runs]
    seeds = [run['train_config'].get('seed') for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f'two files of {runs[0]["group"]} have one seed: tell settings apart by ppl --group')
    return dict(seeds=seeds, data=runs[0]['data'], tokens=runs[0]['tokens'], rows=mean_over_seeds(keyed),
                models=mean_over_seeds([run['runs'] for run in runs]))


def group_tables(name, group):
    """Tables of one setting: the policies at equal FLOPs, and the tokens of each model by depth."""
    seeds = ', '.join(map(str, group['seeds']))
    text = f'## {name}\n\nSeeds: {seeds}. NLL in nats a token; saved: inference FLOPs, against fixed depth without '
    text += 'gates; over learned: NLL minus that of the learned gates at the same FLOPs.\n\n'
    text += table(group['rows'].values(), dict(
        model='{}', policy='{}', setting='{}', flops='{:.4g}', saved='{:.1%}', depth='{:.2f}', nll='{:.4f}',
        ppl='{:.3f}', over_learned='{:+.4f}', retained='{:.1%}'), left=3)
    for model, found in group['models'].items():
        if 'by_depth' in found:
            rank = ', '.join(show('{:.3f}', r) or 'none' for r in found['spearman'])
            text += f'\nTokens of {model} by depth. NLL as it runs, where no token halts, and after iteration 1. Rank '
            text += f'correlation of depth with what the iterations after 1, 2, .. save: {rank}\n\n'
            forms = dict(depth='{}', share='{:.1%}', nll='{:.3f}', nll_full='{:.3f}', nll_first='{:.3f}')
            text += table(found['by_depth'], forms)
    return text + '\n'


def results(a):
    """Means over the seeds of each setting, from JSON files of ppl or a results.json: tables and two pictures."""
    found, groups = defaultdict(list), {}
    for path in a.files:
        try:
            record = json.loads(Path(path).read_text(encoding='utf-8-sig'))
            if 'groups' in record:  # an earlier results.json
                groups.update(record['groups'])
            else:
                found[record['group']].append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f'{path} is not a JSON file of bench.py ppl, nor a results.json') from None
    try:
        groups.update({name: summary(runs) for name, runs in found.items()})
        text = 'Mean ± standard deviation over seeds.\n\n'
        text += ''.join(group_tables(name, group) for name, group in groups.items())
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UsageError(f'{", ".join(a.files)}: not all are JSON files of this version of bench.py ppl') from None
    print(text)
    write(Path(a.out) / 'results.md', text)
    write(Path(a.out) / 'results.json', json.dumps(dict(groups=groups), indent=1))
    plt = pyplot()
    if plt:
        save_figure(plt, draw_groups(plt, groups, draw_iso_flops, 5.5, 4.2), Path(a.out) / 'isoflops.png')
        save_figure(plt, draw_groups(plt, groups, draw_by_depth, 4, 3), Path(a.out) / 'nll_by_depth.png')
    report(a, groups=groups)


def draw_groups(plt, groups, draw, width, height):
    """A figure with a panel of width x height inches for each setting, side by side."""
    fig, axes = plt.subplots(1, len(groups), figsize=(width * len(groups), height), squeeze=False)
    for ax, (name, group) in zip(axes.flat, groups.items()):
        draw(ax, group)
        ax.set_title(name, fontsize=9)
    fig.tight_layout()
    return fig


def draw_iso_flops(ax, group):
    """NLL against FLOPs saved, a line a policy. Bars: deviation over seeds of the distance to the learned gates."""
    for name, model in group['models'].items():
        row = group['rows'].get(f'{name}, fixed depth, max_iter {model["n_iter"]}')
        if row and name != 'adaptive':
            ax.plot(100 * row['saved']['mean'], row['nll']['mean'], 's', ms=6, label=f'{name}, all iterations')
    rows = [r for r in group['rows'].values() if r['policy'] in POLICIES]
    for model, policy in dict.fromkeys((r['model'], r['policy']) for r in rows):
        points = sorted((100 * r['saved']['mean'], r['nll']['mean'], r.get('over_learned', {}).get('error') or 0)
                        for r in rows if (r['model'], r['policy']) == (model, policy))
        label, style = (policy, '-') if model == 'adaptive' else (f'{model}, {policy}', ':')
        colour, width = ('black', 2) if policy == 'learned' else (f'C{POLICIES.index(policy)}', 1)
        ax.errorbar(*zip(*points), label=label, marker='o', ms=4, capsize=2, color=colour, lw=width, ls=style)
    ax.set(xlabel='inference FLOPs saved, %', ylabel='validation NLL, nats a token')
    ax.legend(fontsize=7)


def draw_by_depth(ax, group):
    """Mean NLL of the tokens that halted at each depth; the width of a bar is their share."""
    rows = group['models'].get('adaptive', {}).get('by_depth', [])
    for r in rows:
        if 'nll' in r:
            width, error = 0.1 + 0.8 * r['share']['mean'], r['nll']['error'] or 0
            ax.bar(r['depth'], r['nll']['mean'], width, yerr=error, color='C0', capsize=3)
    ax.set_xticks([r['depth'] for r in rows], [f'{r["depth"]}\n{r["share"]["mean"]:.1%}' for r in rows])
    ax.set(xlabel='depth, iterations; share of the tokens', ylabel='NLL, nats a token')


# -----------------------------------------------------------------------------
# flops: the formula beside what FlopCounterMode counts

@torch.inference_mode()
def count_flops(model, tokens, share):
    """Run one sequence packed under forced_policy(share). Returns FLOPs as counted and by formula, and depth (1, T).

    FLOPs: dict(products, attention). products is everything with a weight, and equals the formula. attention is
    computed for all queries and all keys; the formula counts the tokens that run and the keys that they see.
    """
    cfg, device = model.cfg, model.embed.weight.device
    vocabulary = []

    def sdpa(q, k, v, *rest, out_shape=None, **kw):  # shapes. The counter does not know the CPU's kernel
        flops = sdpa_flop_count(q, k, v)
        if tuple(k) == (1, 1, cfg.vocab_size, cfg.n_embd):  # AdaPonderLM.ponder() on a CPU: products with U and V
            vocabulary.append(flops)
        return flops
    # half of the tokens halt, so a formula that forgot a gate or an iteration would show
    x = torch.randint(cfg.vocab_size, (1, tokens), device=device)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: sdpa}) as counter:
        out = model(x, execution='packed', policy=forced_policy(share, cfg.n_iter))
        out.logits
    seen = counter.get_flop_counts()['Global']
    attention = sum(n for op, n in seen.items() if 'scaled_dot_product' in str(op)) - sum(vocabulary)
    depth, context = out.depth.cpu(), torch.arange(1, tokens + 1, dtype=torch.float64)
    formula = float((depth * cfg.flops(context)['attention']).sum())
    counted = dict(products=sum(seen.values()) - attention, attention=attention)
    return counted, dict(products=float(cfg.inference_flops(depth, context).sum()) - formula, attention=formula), depth


def flops(a):
    """Parameters and forward FLOPs a token by part and depth, by formula and as torch counts them in a run."""
    if not a.config + a.ckpt:
        raise UsageError('give --config or --ckpt')
    found = []
    for path in a.config + a.ckpt:
        cfg = config_of(path)[0] if path.endswith('.py') else load(path, a)[0].cfg
        T, K = a.context or cfg.block_size, cfg.n_iter
        context = (T + 1) / 2  # keys that a token sees, on average
        f, vanilla = cfg.flops(context), replace(cfg, n_iter=1).inference_flops(1, context)
        parameters = count_parameters(cfg)
        rows = []
        for d in range(1, K + 1):
            parts = dict(linear=d * f['linear'], attention=d * f['attention'], unembed=f['unembed'],
                         ponder=(d - 1) * f['ponder'], gates=min(d, K - 1) * f['gate'])
            total = cfg.inference_flops(d, context)
            rows.append(dict(depth=d, **parts, total=total, x_vanilla=total / vanilla))
        print(f'{path}: {parameters:,} parameters. FLOPs of a token in a causal pass over {T} tokens:\n')
        print(table(rows, {key: '{:.4g}' for key in rows[0]}))
        counted = None
        if parameters <= 300_000_000:
            seen, formula, depth = count_flops(load(path, a)[0], min(128, cfg.block_size), share=0.5)
            counted = dict(depth=float(depth.double().mean()), seen=seen, formula=formula)
            print(f'Counted in a packed run of {depth.numel()} tokens, mean depth {counted["depth"]:.2f}: products '
                  f'{seen["products"] / formula["products"]:.4f} x formula, attention '
                  f'{seen["attention"] / formula["attention"]:.2f} x (all queries, masked keys).\n')
        found.append(dict(path=path, config=asdict(cfg), parameters=parameters, depths=rows, counted=counted))
    report(a, configs=found)


# -----------------------------------------------------------------------------
# speed: the clock, of a checkpoint or of random weights in the shape of a config file

def seconds(fn, device):
    """Run fn. Returns the seconds that it took, and what it returned."""
    def wait():  # until the device has done what it was given
        if torch.device(device).type != 'cpu':
            torch.accelerator.synchronize()
    wait()
    start = time.perf_counter()
    out = fn()
    wait()
    return time.perf_counter() - start, out


@torch.inference_mode()
def time_prefill(model, x, **kw):
    """Run prompts x (B, T) and make the logits of their last tokens: dict(seconds, tokens, flops, depth)."""
    def run():
        out = model(x, **kw)
        model.unembed(out.hidden[:, -1])
        return out
    t, out = seconds(run, x.device)
    depth, context = out.depth.cpu(), torch.arange(1, x.size(1) + 1, dtype=torch.float64)
    unembed = model.cfg.flops(0)['unembed']  # of the last token alone
    flops = float((model.cfg.inference_flops(depth, context) - unembed).sum()) + len(x) * unembed
    return dict(seconds=t, tokens=x.numel(), flops=flops, depth=float(depth.double().mean()))


def time_decode(model, prompts, n, policy=None):
    """The same for decoding n tokens a prompt, each in a slot: from when all prompts are in until so many are out."""
    context, flops = [len(p) + 1 for p in prompts], 0.0
    # a budget of more than n, so that no slot runs dry while others are slower
    steps = stream(model, prompts, 2 * n, temperature=0, policy=policy, slots=len(prompts))
    for _ in range(len(prompts)):
        next(steps)  # the first token of each comes with its prefill
    t, made = seconds(lambda: list(islice(steps, n * len(prompts))), model.embed.weight.device)
    steps.close()
    for step in made:
        flops += model.cfg.inference_flops(step.depth, context[step.seq])
        context[step.seq] += 1
    return dict(seconds=t, tokens=len(made), flops=float(flops), depth=sum(s.depth for s in made) / len(made))


def training_step(model, x, a, execution='dense', policy=None):
    """A step of a plain training loop on x (B, T + 1): a function that returns dict(seconds, tokens, flops, depth)."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=x.device.type in ('cpu', 'cuda'))

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=a.dtype == 'bfloat16'):
            out = model(x[:, :-1], x[:, 1:], execution=execution, policy=policy, k=0.1)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out

    def timed():
        t, out = seconds(step, x.device)
        depth = out.depth.cpu()
        if execution == 'dense':  # which runs halted tokens too
            depth = torch.full_like(depth, model.cfg.n_iter)
        flops = 3 * float(model.cfg.inference_flops(depth, x.size(1) / 2).sum())  # backward: twice the forward's
        return dict(seconds=t, tokens=depth.numel(), flops=flops, depth=float(depth.double().mean()))
    return timed


def compiled_graphs():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def time_variants(case, variants, rounds):
    """Run the variants in turn, A B C A B C ..: quartiles of the time a token, and of its ratio to A's in that round.

    Before that each runs until it compiles no more graphs, so that compiling and capturing stay outside the timed part.
    """
    runs, graphs = {name: [] for name in variants}, {}
    for name, fn in variants.items():
        start, before = compiled_graphs(), None
        while before != compiled_graphs():
            before = compiled_graphs()
            fn()
        graphs[name] = before - start
    for _ in tqdm(range(rounds), desc=case, leave=False):
        for name, fn in variants.items():
            runs[name].append(fn())
    # ratios within a round: what slows the machine for a while slows all variants alike
    first, rows = next(iter(variants)), []
    per_token = {name: np.array([r['seconds'] / r['tokens'] for r in mine]) for name, mine in runs.items()}
    flops = {name: mine[0]['flops'] / mine[0]['tokens'] for name, mine in runs.items()}
    for name in variants:
        time_ratio = np.percentile(per_token[name] / per_token[first], (25, 50, 75)).tolist()
        flop_ratio = flops[name] / flops[first]
        rows.append(dict(case=case, variant=name, depth=runs[name][0]['depth'], graphs=graphs[name],
                         ms_per_token=np.percentile(1e3 * per_token[name], (25, 50, 75)).tolist(),
                         time_ratio=time_ratio, flop_ratio=flop_ratio, time_per_flops=time_ratio[1] / flop_ratio))
    return rows


def speed_text(a, model, state, n, length):
    """n texts of so many tokens, (n, length) on a.device: random tokens, or with --data from the val split."""
    if not a.data:
        generator = torch.Generator().manual_seed(a.seed)
        return torch.randint(model.cfg.vocab_size, (n, length), generator=generator).to(a.device)
    val = val_windows(a.data, model, state, length)
    starts = np.linspace(0, val.n - 1, n + 2)[1:-1].round().astype(int) * length  # neither the first nor the last
    return val.batch(starts)[:, :length].to(a.device)


def speed_cases(a, model, state, length, prompt, new):
    """What speed() times: pairs (case, variants). variants: name -> function -> dict(seconds, tokens, flops, depth)."""
    fixed, vanilla = with_config(model, halting=False), with_config(model, halting=False, n_iter=1)
    if a.compile:
        for m in (model, fixed, vanilla):
            for block in m.blocks:  # as train.py does
                block.compile()
    policies = {'adaptive': None} if a.data else {}
    policies |= {f'adaptive, {share:.0%} halted': forced_policy(share, model.cfg.n_iter) for share in a.share}
    if 'prefill' in a.cases:
        x = speed_text(a, model, state, a.batch_size, length)
        yield f'prefill {length}', {
            'fixed, dense': lambda: time_prefill(fixed, x),
            'fixed, packed': lambda: time_prefill(fixed, x, execution='packed'),
            **{name: lambda p=p: time_prefill(model, x, execution='packed', policy=p) for name, p in policies.items()}}
    for slots in a.slots if 'decode' in a.cases else []:
        prompts = speed_text(a, model, state, slots, prompt).tolist()
        yield f'decode, {slots} slots', {
            'fixed': lambda: time_decode(fixed, prompts, new),
            **{name: lambda p=p: time_decode(model, prompts, new, p) for name, p in policies.items()}}
    if 'train' in a.cases:  # last, because it changes the weights
        text = speed_text(a, model, state, a.batch_size, length)
        for m in (model, fixed, vanilla):
            m.float()
        steps = {'fixed': training_step(fixed, text, a), 'n_iter=1': training_step(vanilla, text, a),
                 'adaptive, dense': training_step(model, text, a)}
        if model.cfg.objective == 'saving':  # the paper's loss needs what only dense computes
            steps |= {f'{name}, packed': training_step(model, text, a, 'packed', p) for name, p in policies.items()}
        yield f'training step {length - 1}', steps


def speed(a):
    """The clock: fixed depth against adaptive with the same weights, each time ratio beside its FLOP ratio.

    A share of halting is forced; with --data the model's own gates run too. Texts: --batch_size of --length tokens to
    prefill and to train on; a prompt of --prompt tokens a slot to decode --new tokens from.
    """
    if bool(a.ckpt) == bool(a.config):
        raise UsageError('give --config or --ckpt')
    model, state = load(a.ckpt or a.config, a)
    cfg, T = model.cfg, model.cfg.block_size
    quarter = max(1, T // 4)
    length, prompt, new = a.length or min(1024, T), a.prompt or min(64, quarter), a.new or min(32, quarter)
    if cfg.n_iter == 1 or not cfg.halting:
        raise UsageError('speed compares adaptive with fixed depth: give a model with gates and n_iter > 1')
    if max(length, prompt + 2 * new) > T:
        raise UsageError(f'--length, and --prompt + 2 x --new, must be at most block_size, which is {T}')
    model = model.to(getattr(torch, a.dtype))
    rows = []
    for case, variants in speed_cases(a, model, state, length, prompt, new):
        rows += time_variants(case, variants, a.rounds)
    print(f'{a.ckpt or a.config}: K = {cfg.n_iter}, {count_parameters(cfg):,} parameters, {a.dtype} on {a.device}; '
          f'prompts of {prompt} tokens, {new} new ones a slot. Medians and [quartiles] of {a.rounds} rounds.\n')
    quartiles = '{0[1]:.3f} [{0[0]:.3f} {0[2]:.3f}]'
    print(table(rows, dict(case='{}', variant='{}', depth='{:.2f}', ms_per_token=quartiles, time_ratio=quartiles,
                           flop_ratio='{:.3f}', time_per_flops='{:.3f}'), left=2))
    report(a, config=asdict(cfg), rows=rows)


# -----------------------------------------------------------------------------
# plan: what training a config takes

class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered: `peak`, the most that lived at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:  # no view of what was there before
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def free(self, n):
        self.live -= n


class AllTokensRun(TorchFunctionMode):
    """Answers for tensors without values, as if no token ever halted: then memory is at its largest."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.nonzero:  # who goes on: all
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        if func is torch.Tensor.__getitem__ and getattr(args[1], 'dtype', None) is torch.bool:  # who halted: none
            return args[0][:0]
        return func(*args, **(kwargs or {}))


def activation_memory(cfg, batch_size, bfloat16=True, remat=False, like_gpu=True):
    """Bytes at the peak of a forward and backward pass over batch_size sequences, beyond weights, gradients and AdamW.

    Runs the model itself on fake tensors, which have shapes and no values, so any size fits any machine. like_gpu: the
    paths that the model takes on a GPU. An upper bound: torch.compile keeps less, and autograd adds up gradients in
    place where it can, but never fake ones: at most the size of the gradients.
    """
    with FakeTensorMode():
        with torch.device('meta'):
            model = AdaPonderLM(cfg)
        weights = {name: torch.empty(p.shape) for name, p in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        model.remat = remat
        if like_gpu:
            model.on_cpu = lambda h: False
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        x = torch.empty(batch_size, cfg.block_size + 1, dtype=torch.int64)
        with AllTokensRun(), PeakMemory() as memory:
            with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
                loss = model(x[:, :-1], x[:, 1:], k=0.1).loss
            loss.backward()
    return memory.peak


def plan(a):
    """What training a config takes: FLOPs, days, dollars, memory of a GPU and the largest micro-batch that fits it."""
    cfg, t = config_of(a.config, a.set)
    peak, gigabytes = GPUS[a.gpu]
    N, K, P = t.batch_size * t.block_size, cfg.n_iter, count_parameters(cfg)
    steps = in_steps('max_steps', t.max_steps, N * t.gradient_accumulation_steps)
    tokens = steps * t.gradient_accumulation_steps * N
    forward = cfg.inference_flops(K, (t.block_size + 1) / 2)
    vanilla = replace(cfg, n_iter=1).inference_flops(1, (t.block_size + 1) / 2)
    training = 3 * forward * tokens
    hours = training / (peak * a.mfu) / 3600
    bfloat16 = t.dtype != 'float32'

    # memory: what each GPU holds all the time, and a micro-batch at its peak
    shards = a.gpus if t.shard_optimizer else 1
    memory = dict(weights=4 * P, gradients=4 * P, optimizer=8 * P / shards)
    memory['activations'] = activation_memory(cfg, t.batch_size, bfloat16, t.remat)
    need, room = sum(memory.values()), 0.92e9 * gigabytes  # the rest for CUDA's context and fragments
    # two sizes tell how much each sequence adds
    each = (activation_memory(cfg, 2 * t.batch_size, bfloat16, t.remat) - memory['activations']) / t.batch_size
    largest = max(0, math.floor(t.batch_size + (room - need) / each))
    cache = 2 * cfg.n_layer * K * cfg.n_embd * cfg.block_size * (2 if bfloat16 else 4)

    print(f"""{a.config} on {a.gpus} x {a.gpu}: P = {P:,} parameters, K = {K}, micro-batches of N = {N:,} tokens

    tokens       {tokens / 1e9:.3f} B: {steps:,} steps x {t.gradient_accumulation_steps} N
    forward      {forward / 1e9:.3f} GFLOPs a token that runs all iterations; {forward / vanilla:.2f} x n_iter=1
    training     {training:.3e} FLOPs: 3 x forward x tokens
    time         {hours / a.gpus / 24:.2f} days, {hours:,.0f} GPU hours, at {peak / 1e12:.0f} TFLOP/s x MFU {a.mfu:.0%}
    price        {show('${:,.0f}', a.price and hours * a.price) or 'GPU hours x --price'}
    weights      {memory['weights'] / 1e9:.2f} GB: 4 P
    gradients    {memory['gradients'] / 1e9:.2f} GB: 4 P
    optimizer    {memory['optimizer'] / 1e9:.2f} GB: 8 P / {shards}
    activations  {memory['activations'] / 1e9:.2f} GB: of a micro-batch at its peak, counted on tensors without values
    a GPU        {need / 1e9:.2f} GB of {gigabytes}; each sequence takes {each / 1e9:.3f} GB: batch_size {largest} fits
    decoding     {cache / 1e9:.2f} GB: K and V of one sequence of {cfg.block_size} tokens
""")
    if need > room:
        print('TOO MUCH for the GPU: lower batch_size, or set remat or shard_optimizer')
    if t.gradient_accumulation_steps % a.gpus:
        print(f'train.py will refuse: gradient_accumulation_steps must be a multiple of {a.gpus}')
    report(a, config=asdict(cfg), parameters=P, tokens=tokens, forward_flops=forward, training_flops=training,
           gpu_hours=hours, memory=memory, peak_memory=need, largest_batch_size=largest)


# -----------------------------------------------------------------------------
# downstream: lm-evaluation-harness

def sampling_of(settings):
    """Settings of a generation as lm-eval's hf model has them: (until, new tokens, temperature, top_k, top_p)."""
    until = settings.get('until') or []
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    names = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
    given = [settings[name] for name in names if settings.get(name) is not None]
    new_tokens = int(given[0]) if given else 256
    # sampling needs a temperature; without one, or with do_sample=False, decoding is greedy
    temperature = float(settings.get('temperature') or 0.0)
    if settings.get('do_sample') is False:
        temperature = 0.0
    top_k = settings.get('top_k', 50)  # transformers' default; there, and here, 0 and None switch it off
    return until, new_tokens, temperature, top_k or None, settings.get('top_p')


def harness_model(model, enc, a):
    """An lm_eval model around this one, at adaptive depth. Its list `spent` sums tokens, iterations and FLOPs."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    T, eot = model.cfg.block_size, enc.eot_token
    tau = model.cfg.tau if a.tau is None else a.tau

    class Adaptive(TemplateLM):
        eot_token_id = eot
        spent = [0, 0, 0.0]

        def spend(self, depth, context):
            """Count tokens that ran: depth, and the number of keys that each attended to, (N,) both."""
            depth, context = torch.as_tensor(depth).cpu(), torch.as_tensor(context, dtype=torch.float64)
            flops = model.cfg.inference_flops(depth, context, a.max_iter).sum()
            self.spent = [x + y for x, y in zip(self.spent, (depth.numel(), int(depth.sum()), float(flops)))]

        def tok_encode(self, string, add_special_tokens=None, **rest):
            return enc.encode_ordinary(string)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests, **rest):
            """requests: (_, context, continuation), lists of tokens. Returns pairs (log-probability, is it greedy)."""
            done = [None] * len(requests)
            # sorted by length, so that there is little padding
            order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
            for first in tqdm(range(0, len(order), a.batch_size), desc='loglikelihood', leave=False):
                numbers = order[first:first + a.batch_size]
                texts = [(requests[n][1] + requests[n][2])[-T - 1:-1] for n in numbers]
                length = torch.tensor([len(t) for t in texts], device=a.device)
                x = torch.tensor([t + [0] * (int(length.max()) - len(t)) for t in texts], device=a.device)

                def policy(i, s, h, row, pos):  # padding comes after the text, so nothing sees it, and halts at once
                    return (s >= tau) & (pos < length[row])
                # only the continuation's states become logits
                with autocast(a):
                    out = model(x, execution='packed', policy=policy, max_iter=a.max_iter)
                    for r, n in enumerate(numbers):
                        want = torch.tensor(requests[n][2][-T:], device=a.device)
                        log_p = log_probs(model, out.hidden[r, length[r] - len(want):length[r]])
                        done[n] = float(log_p.gather(-1, want[:, None]).sum()), bool((log_p.argmax(-1) == want).all())
                        self.spend(out.depth[r, :length[r]], range(1, int(length[r]) + 1))
            return done

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Log-probability of each whole text, in windows that see as much of it as fits."""
            windows = []
            for r in requests:
                tokens = enc.encode_ordinary(r.args[0])
                rolling = utils.get_rolling_token_windows(tokens, prefix_token=eot, max_seq_len=T, context_len=1)
                windows.append([(None, *utils.make_disjoint_window(w)) for w in rolling])
            values = iter(self._loglikelihood_tokens([w for ws in windows for w in ws]))
            return [sum(next(values)[0] for _ in ws) for ws in windows]

        def generate_until(self, requests, disable_tqdm=False):
            """Texts up to a stop string, the wished length or their end, one at a time."""
            done = []
            for n, request in enumerate(tqdm(requests, desc='generate', leave=False)):
                context, settings = request.args
                until, budget, temperature, top_k, top_p = sampling_of(settings)
                if budget >= T:
                    raise UsageError(f'a task wants {budget} new tokens, and this model sees {T} at a time')
                prompt, made, text = (enc.encode_ordinary(context) or [eot])[-(T - budget):], [], ''
                sampling = temperature, top_k, top_p, torch.Generator().manual_seed(a.seed + n)
                for step in stream(model, [prompt], budget, *sampling, tau, a.max_iter, stop_token=eot):
                    self.spend([step.depth], [len(prompt) + len(made)])
                    made.append(step.token)
                    text = enc.decode([t for t in made if t != eot and t < enc.n_vocab])
                    if any(stop in text for stop in until):
                        break
                done.append(min((text.split(stop)[0] for stop in until), key=len, default=text))
            return done
    return Adaptive()


def downstream(a):
    """Tasks of lm-evaluation-harness at adaptive depth, with mean depth and FLOPs beside the scores. Needs lm-eval."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError('downstream needs lm-evaluation-harness: pip install lm-eval') from None
    model, state = load(a.ckpt, a)
    model.check_max_iter(a.max_iter)
    if a.tokenizer:
        enc = load_tokenizer(a.tokenizer)
    elif 'meta' in state:
        enc = load_tokenizer(state['meta'], Path(a.ckpt).parent)
    else:  # the one that lies beside Hugging Face's weights
        files = [f for f in model.tokenizer_files if Path(f).name.startswith('tokenizer.')]
        if not files:
            raise UsageError(f'{a.ckpt} has no tokenizer.json: give --tokenizer')
        enc = load_tokenizer(str(files[0]))
    if enc.eot_token >= model.cfg.vocab_size:
        raise UsageError('the tokenizer has more tokens than the model: give the one that it was trained with')
    lm, manager, rows = harness_model(model, enc, a), TaskManager(include_path=a.include_path), []
    tasks = a.tasks.split(',')
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise UsageError(f'lm-eval knows no task {", ".join(unknown)}; --include_path names a folder with task files')
    seeds = {f'{what}_seed': a.seed for what in ('random', 'numpy_random', 'torch_random', 'fewshot_random')}
    for task in tasks:
        lm.spent = [0, 0, 0.0]
        found = lm_eval.simple_evaluate(lm, tasks=[task], num_fewshot=a.num_fewshot, limit=a.limit,
                                        task_manager=manager, log_samples=False, bootstrap_iters=1000, **seeds)
        n, depth, flops = lm.spent
        for name, result in found['results'].items():
            for metric, value in result.items():
                if isinstance(value, float) and '_stderr' not in metric:
                    error = result.get(metric.replace(',', '_stderr,'))
                    value = dict(mean=value, error=error if isinstance(error, float) else None)
                    rows.append(dict(task=name, metric=metric.split(',')[0], value=value, tokens=n, depth=depth / n,
                                     flops=flops / n))
    print(f'\n{a.ckpt}: K = {model.cfg.n_iter}, tau {model.cfg.tau if a.tau is None else a.tau:g}, '
          f'at most {a.max_iter or model.cfg.n_iter} iterations, {a.num_fewshot or 0} shots\n')
    forms = dict(task='{}', metric='{}', value='{:.4f}', depth='{:.2f}', flops='{:.4g}')  # means over tokens
    print(table(rows, forms, left=2))
    report(a, config=asdict(model.cfg), rows=rows)


# -----------------------------------------------------------------------------
# curves: the logs of runs side by side

COLUMNS = dict(tokens='{:,}', loss='{:.4f}', val_loss='{:.4f}', depth='{:.2f}', val_depth='{:.2f}',
               val_flops_saved='{:.1%}', tokens_per_second='{:,.0f}', mfu='{:.1%}')
PANELS = ('loss', 'val_loss', 'depth', 'val_depth', 'grad_norm', 'gate_mean', 'tokens_per_second', 'lr')


def read_log(folder):
    """log.jsonl of a run: key -> [(step, value), ...]. A line that a killed run was writing is left out."""
    path, log = Path(folder) / 'log.jsonl', {key: [] for key in (*PANELS, *COLUMNS)}
    if not path.is_file():
        raise UsageError(f'no log at {path}: give the out_dir of a run of train.py')
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
            step = record['step']
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        for key in log:
            if record.get(key) not in (None, []):
                log[key].append((step, record[key]))
    return log


def curves(a):
    """The logs of runs side by side: a table of how far they are, and a picture. loss is the cross entropy."""
    logs = {folder: read_log(folder) for folder in a.folders}
    last = [{key: points[-1][1] for key, points in log.items() if points} for log in logs.values()]
    print(table([dict(run=folder, **values) for folder, values in zip(logs, last)], dict(run='{}', **COLUMNS)))
    plt = pyplot()
    if plt:
        fig, axes = plt.subplots(2, 4, figsize=(18, 7))
        for ax, key in zip(axes.flat, PANELS):
            for n, (name, log) in enumerate(logs.items()):
                lists = [(step, v if isinstance(v, list) else [v]) for step, v in log[key]]  # gate_mean: a line a gate
                for i in range(max((len(v) for _, v in lists), default=0)):
                    points = [(step, v[i]) for step, v in lists if len(v) > i and v[i] is not None]
                    ax.plot(*zip(*points), color=f'C{n}', alpha=0.75 ** i, lw=1, label=name if i == 0 else None)
            ax.set(title=key, xlabel='step', yscale='log' if key == 'grad_norm' else 'linear')
        axes[0, 0].legend(fontsize=7)
        fig.tight_layout()
        save_figure(plt, fig, a.out)
    report(a, runs=logs)


# -----------------------------------------------------------------------------
# The command line

def number(kind, low, high=10 ** 12):
    """An argparse type: a number from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is refused as well
            raise argparse.ArgumentTypeError(f'must be {low} to {high}, not {text}')
        return value
    parse.__name__ = kind.__name__
    return parse


COUNT, SHARE, PATH = number(int, 1), number(float, 0, 1), os.path.expanduser  # argparse types


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest='command', required=True)

    def command(fn, runs=True):
        """A subcommand. runs: it computes with a model, so it has a device and a dtype."""
        c = sub.add_parser(fn.__name__, help=fn.__doc__.split('\n')[0], description=fn.__doc__)
        c.set_defaults(run=fn)
        c.add_argument('--json', type=PATH, help='write the numbers here')
        c.add_argument('--seed', type=number(int, 0, 2 ** 32 - 1), default=1337)
        if runs:
            c.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, mps; auto: a GPU where there is one')
            c.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
        return c.add_argument

    arg = command(flops)
    arg('--config', nargs='*', type=PATH, default=[], help='config files')
    arg('--ckpt', nargs='*', type=PATH, default=[], help='checkpoints or GPT-NeoX folders')
    arg('--context', type=COUNT, help='tokens of the causal pass; default block_size')

    arg = command(ppl)
    arg('--ckpt', required=True, type=PATH, help='a ckpt.pt of train.py')
    arg('--data', type=PATH, help='a folder of prepare_data.py; default: the one that the checkpoint was trained on')
    arg('--others', nargs='+', default=[], metavar='NAME=CKPT',
        help='other models: with gates as they were trained, without gates under exits by confidence and convergence; '
        'the gain that is retained is that of the one named fixed over the one named vanilla')
    arg('--policies', nargs='+', choices=POLICIES, default=POLICIES)
    arg('--save', nargs='*', type=SHARE, default=[0.05, 0.15, 0.25], help="shares of fixed depth's FLOPs to save")
    arg('--eval_tokens', type=COUNT, default=32768, help='of the val split, to measure on')
    arg('--calib_tokens', type=COUNT, default=8192, help='others of it, to set thresholds on')
    arg('--batch_size', type=COUNT, default=16)
    arg('--group', help='name of the setting: results takes the mean over the seeds of one')

    arg = command(results, runs=False)
    arg('files', nargs='+', type=PATH, help='JSON files of ppl, or a results.json')
    arg('--out', type=PATH, default='out/results', help='a folder')

    arg = command(speed)
    arg('--ckpt', type=PATH, help='a checkpoint or a GPT-NeoX folder')
    arg('--config', type=PATH, help='a config file: random weights in its shape')
    arg('--cases', nargs='+', choices=('prefill', 'decode', 'train'), default=['prefill', 'decode', 'train'])
    arg('--share', nargs='*', type=SHARE, default=[0.0, 0.5], help='of the pairs (token, iteration 2 .. K) not to run')
    arg('--data', type=PATH, help='a folder of prepare_data.py: its val split instead of random tokens')
    arg('--length', type=number(int, 2), help='tokens to prefill and to train on; default: block_size, at most 1024')
    arg('--batch_size', type=COUNT, default=1, help='such texts at a time')
    arg('--slots', nargs='*', type=COUNT, default=[1, 8, 32, 128], help='texts to decode at a time')
    arg('--prompt', type=COUNT, help='tokens of a prompt to decode from; default: a quarter of block_size, at most 64')
    arg('--new', type=COUNT, help='tokens to decode in each slot; default: a quarter of block_size, at most 32')
    arg('--rounds', type=COUNT, default=5)
    arg('--compile', action='store_true', help='torch.compile the blocks')

    arg = command(plan, runs=False)
    arg('--config', required=True, type=PATH, help='a config file of train.py')
    arg('--set', nargs='*', default=[], metavar='KEY=VALUE', help='changes to the config')
    arg('--gpu', default='H100', choices=GPUS)
    arg('--gpus', type=COUNT, default=8)
    arg('--mfu', type=number(float, 1e-3, 1), default=0.4, help='share of the peak that is reached, see train.py')
    arg('--price', type=number(float, 0), help='dollars a GPU hour')

    arg = command(downstream)
    arg('--ckpt', required=True, type=PATH, help='a ckpt.pt of train.py or a GPT-NeoX folder')
    arg('--tasks', required=True, help='lambada_openai,piqa,arc_easy,...')
    arg('--include_path', type=PATH, help='a folder with task files of your own')
    arg('--tokenizer', type=PATH, help="a tokenizer.json; default: the checkpoint's")
    arg('--num_fewshot', type=number(int, 0))
    arg('--limit', type=COUNT, help='documents a task')
    arg('--batch_size', type=COUNT, default=16)
    arg('--tau', type=SHARE)
    arg('--max_iter', type=COUNT)

    arg = command(curves, runs=False)
    arg('folders', nargs='+', type=PATH, help='the out_dir of each run')
    arg('--out', type=PATH, default='out/curves.png')
    return parser


def check_outputs(a):
    """Refuse what cannot be written before the work, not after it."""
    files = [a.json] if a.json else []
    if a.command == 'results':
        Path(a.out).mkdir(parents=True, exist_ok=True)
        files += [Path(a.out) / name for name in ('results.md', 'results.json', 'isoflops.png', 'nll_by_depth.png')]
    if a.command == 'curves':
        if Path(a.out).suffix not in ('.png', '.pdf', '.svg'):
            raise UsageError(f'--out must end in .png, .pdf or .svg, unlike {a.out}')
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        files.append(a.out)
    for file in files:
        check_writable(file)


def main(argv=None):
    a = make_parser().parse_args(argv)
    run = vars(a).pop('run')
    check_outputs(a)
    if 'device' in a:
        a.device = get_device(a.device)
    run(a)


if __name__ == '__main__':
    command_line(main)
