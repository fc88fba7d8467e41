"""
Measures a model: what it costs by formula, how well it predicts at which cost, and what the clock says.

    python bench.py flops --config config/pythia*.py
    python bench.py ppl --ckpt out/tiny/ckpt.pt --others fixed=out/f/ckpt.pt vanilla=out/v/ckpt.pt --json 1.json
    python bench.py results 1.json 2.json 3.json
    python bench.py speed --config config/pythia70m.py
    python bench.py plan --config config/pythia410m.py --gpu H100 --gpus 8 --price 2.5
    python bench.py downstream --ckpt out/tiny/ckpt.pt --tasks lambada_openai,piqa
    python bench.py curves out/a out/b

Each prints a table, and with --json FILE writes its numbers beside the machine, the versions and the arguments.
"""
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends quietly

import argparse
import copy
import io
import json
import math
import os
import platform
import time
import weakref
from bisect import bisect_left
from collections import defaultdict
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from model import AdaPonderConfig, AdaPonderLM, hash_uniform
from prepare_data import UsageError, check_writable, command_line, write_beside
from sample import stream
from train import GPUS, Windows, get_autocast, get_device, in_steps, load_config, load_meta


# -----------------------------------------------------------------------------
# Tables, files, models

def table(rows, forms):
    """A Markdown table of dicts, as text. forms: key -> format of a column; KEY_error stands beside KEY, after a ±."""
    def cell(row, key):
        value, error = row.get(key), row.get(f'{key}_error')
        text = '' if value is None else forms[key].format(value)
        return text if error is None else text + ' ± ' + forms[key].replace('+', '').format(error)

    cells = [[key.replace('_', ' ') for key in forms]]
    cells += [[cell(row, key) for key in forms] for row in rows]
    width = [max(map(len, column)) for column in zip(*cells)]
    side = ['<' if form == '{}' else '>' for form in forms.values()]  # words to the left, numbers to the right
    cells.insert(1, ['-' * w if s == '<' else '-' * (w - 1) + ':' for w, s in zip(width, side)])
    lines = [' | '.join(f'{c:{s}{w}}' for c, s, w in zip(row, side, width)) for row in cells]
    return ''.join(f'| {line} |\n' for line in lines)


def label(text):
    """text as matplotlib takes it: no formula, and no bytes that are no characters."""
    return text.replace('$', r'\$').encode('utf-8', 'replace').decode()


def save_figure(path, draw, panels, columns, width, height):
    """Write a picture. draw(ax, data) draws each of the panels, title -> data, in width x height inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no pictures: pip install matplotlib')
        return
    rows = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(width * columns, height * rows), layout='tight')
    for ax, (title, data) in zip(fig.subplots(rows, columns, squeeze=False).flat, panels.items()):
        draw(ax, data)
        ax.set_title(label(title), fontsize=9)
    picture = io.BytesIO()
    fig.savefig(picture, format=Path(path).suffix[1:], dpi=150, bbox_inches='tight')
    write_beside(path, picture.getvalue())
    print(f'wrote {path}')


def config_of(path, changes=()):
    """The AdaPonderConfig and the TrainConfig of a config file. changes: strings key=value."""
    train_config = load_config([path, *(f'--{change}' for change in changes)])
    if train_config.init_from != 'scratch':
        raise UsageError(f'{path} starts from {train_config.init_from}: give a config that starts from scratch')
    own = {f.name: getattr(train_config, f.name) for f in fields(AdaPonderConfig) if hasattr(train_config, f.name)}
    if not own['vocab_size']:  # the data's, in multiples of 64 as train.py has it
        meta = load_meta(os.path.expanduser(train_config.data_dir))
        own['vocab_size'] = math.ceil(meta['vocab_size'] / 64) * 64
    return AdaPonderConfig(**own), train_config


def load(path, a):
    """The model at path, and the dict of its checkpoint or {}.

    path: a checkpoint of train.py or the folder of one, or a config for random weights.
    """
    state = {}
    if path.endswith('.py'):
        torch.manual_seed(a.seed)
        model = AdaPonderLM(config_of(path)[0])
    else:
        path = sample.find_ckpt(path)
        state = sample.load_state(path)
        model = AdaPonderLM.from_state(state, path)
    return model.to(a.device, getattr(torch, a.dtype)).eval().requires_grad_(False), state


def count_parameters(cfg):
    with torch.device('meta'):
        return sum(p.numel() for p in AdaPonderLM(cfg).parameters())


def val_text(folder, model, state, n, length):
    """n texts, spread evenly over the val split (all, if it has fewer), (n, length + 1). Refuses another tokenizer."""
    folder = os.path.expanduser(folder)
    meta = load_meta(folder)
    if (state.get('meta') or meta).get('tokenizer_sha256') != meta['tokenizer_sha256']:
        raise UsageError(f'the data in {folder} was made with another tokenizer than the model was trained with')
    val = Windows(folder, meta, 'val', length, model.cfg.vocab_size)
    return val.batch(np.unique(np.linspace(0, val.n - 1, n).round().astype(int)) * length)


# -----------------------------------------------------------------------------
# Halting policies, as AdaPonderLM.decide() takes them: fn(i, s, h, row, pos) -> bool (N,), True: the token goes on

def random_policy(shares, salt=0):
    """A share shares[i] of all tokens, picked at random, goes on after iteration i. shares must not rise."""
    return lambda i, s, h, row, pos: hash_uniform(row, pos, salt) < shares[i]


def scheduled_policy(kind, mean_cost, target, salt=0):
    """Tokens picked at random halt, so many after each iteration that all spend target. mean_cost: of depths 1 .. K.

    uniform: every iteration loses the same number of tokens; geometric: the same fraction of those that are left.
    """
    depths, steps = np.arange(len(mean_cost)), np.diff(mean_cost, prepend=0.0)

    def shares(p):  # of the tokens that run iterations 1 .. K
        return np.maximum(0, 1 - p * depths) if kind == 'uniform' else (1 - p) ** depths
    p = min(np.linspace(0, 1, 10001), key=lambda p: abs(shares(p) @ steps - target))
    return random_policy(shares(p)[1:].tolist(), salt)


def threshold_policy(score, t=-math.inf, record=None):
    """A token goes on while its score is at least t. record: a CPU tensor (n, T, K - 1) to keep scores in."""
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


def convergence_score(model):
    """KL(P^(i-1) || P^i), small where an iteration changed little (arXiv 2502.05171). After the first one: infinite."""
    before = {}

    def score(i, s, h, row, pos):
        key = row * 2 ** 32 + pos  # rises along the tokens, so those that still run are found by bisection
        kl = torch.full_like(s, math.inf)
        if i > 0:
            then = before['h'][torch.searchsorted(before['key'], key)]
            p, q = log_probs(model, h), log_probs(model, then)
            kl = (q.exp() * (q - p)).sum(-1)
        before.update(key=key, h=h)
        return kl
    return score


SCORES = dict(
    learned=lambda model: lambda i, s, h, row, pos: s,  # with t = tau this is what the model does by itself
    confidence=lambda model: lambda i, s, h, row, pos: -log_probs(model, h).amax(-1).exp(),  # the sure ones halt
    convergence=convergence_score)
POLICIES = ['learned', 'random', 'uniform', 'geometric', 'confidence', 'convergence']


# -----------------------------------------------------------------------------
# Measuring windows of text, x: (n, T + 1)

@torch.inference_mode()
def measure(model, x, a, policy=None, **halting):
    """Run windows x packed. Returns depth and NLL, (n, T) on the CPU. The policy's row is a window's number in x."""
    depth, nll = [], []
    for first in range(0, len(x), a.batch_size):
        part = x[first:first + a.batch_size].to(a.device)

        def with_row(i, s, h, row, pos):
            return policy(i, s, h, row + first, pos)
        out = model(part[:, :-1], part[:, 1:], execution='packed', policy=policy and with_row, **halting)
        depth.append(out.depth.cpu())
        nll.append(out.nll.cpu().double())  # float64 on the CPU alone: some devices have none
        if not nll[-1].isfinite().all():
            raise UsageError('the model predicts NaN or infinity: its weights are damaged, or its training diverged')
    return torch.cat(depth), torch.cat(nll)


def cost_table(cfg, T, max_iter=None):
    """FLOPs of a token by position and depth, (T, K) float64, in a causal pass over T tokens."""
    context = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    return cfg.inference_flops(torch.arange(1, cfg.n_iter + 1)[None], context, max_iter)


def flops_spent(cost, depth):
    """FLOPs of a mean token. cost: (T, K), depth: (n, T)."""
    return float(cost.expand(len(depth), -1, -1).gather(-1, depth[..., None] - 1).mean())


def find_threshold(scores, cost, target):
    """The t at which tokens with scores (n, T, K - 1) spend nearest to target FLOPs on average."""
    # only the scores themselves matter as thresholds, and the cost falls from each of them to the next
    values = scores[scores.isfinite()].unique().numpy()
    if not len(values):  # convergence with n_iter = 2: no token can halt
        return -math.inf

    def excess(t):
        depth = 1 + (scores >= t).long().cumprod(-1).sum(-1)  # halted stays halted
        return flops_spent(cost, depth) - target
    j = bisect_left(values, 0, key=lambda t: -excess(t))
    return float(min(values[max(0, j - 1):j + 1], key=lambda t: abs(excess(t))))


def calibrated_policy(model, x, a, kind, cost, target):
    """The policy of a kind of score whose threshold spends target FLOPs a token on windows x.

    Halting changes later scores a little. So scores are taken where no token halts, and once more where they do.
    """
    scores, t = torch.zeros(*x[:, 1:].shape, model.cfg.n_iter - 1, dtype=torch.float64), -math.inf
    for _ in range(2):
        measure(model, x, a, threshold_policy(SCORES[kind](model), t, record=scores))
        t = find_threshold(scores, cost, target)
    return threshold_policy(SCORES[kind](model), t)


def estimate(samples):
    """Their mean and its standard error. To compare two models give the differences on the same windows."""
    return float(np.mean(samples)), float(np.std(samples, ddof=1) / math.sqrt(len(samples)))


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks of two tensors of equal shape, equal values at their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values.flatten().numpy(), return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1]) if min(r.std() for r in ranks) > 0 else math.nan


# -----------------------------------------------------------------------------
# ppl: perplexity of halting policies at equal FLOPs

def compare_policies(model, x, a, kinds, targets, name):
    """One model on windows x under each kind of policy at each setting.

    targets: setting -> FLOPs a token; None where the model's own tau decides, which 'learned', the first kind, sets for
    the others. Returns rows of the two tables of results(): of policies, each with its NLL by window, and of depths.
    """
    T, K, targets, rows, depths = x.size(1) - 1, model.cfg.n_iter, dict(targets), [], []
    cost = cost_table(model.cfg, T)

    def add(policy, setting, depth, nll, cost):
        windows = nll.mean(1).numpy()
        mean, error = estimate(windows)
        rows.append(dict(model=name, policy=policy, setting=setting, flops=flops_spent(cost, depth),
                         depth=float(depth.double().mean()), nll=mean, nll_error=error, ppl=math.exp(mean),
                         windows=windows))
    nll_at = []
    for d in range(1, K + 1):  # without halting, but stopped after d iterations
        depth, nll = measure(model, x, a, tau=0.0, max_iter=d)
        add('fixed depth', f'max_iter {d}', depth, nll, cost_table(model.cfg, T, d))
        nll_at.append(nll)

    for setting, kind in tqdm([(s, k) for s in targets for k in kinds], desc=name, leave=False):
        target = targets[setting]
        if target is None:
            policy = None
        elif kind in SCORES:
            policy = calibrated_policy(model, x, a, kind, cost, target)
        elif kind == 'random':
            policy = random_policy(active, a.seed)
        else:
            policy = scheduled_policy(kind, cost.mean(0), target, a.seed)
        depth, nll = measure(model, x, a, policy)
        add(kind, setting, depth, nll, cost)
        rows[-1]['rank_correlation'] = rank_correlation(depth, nll_at[0] - nll_at[-1])
        if kind == 'learned':
            targets[setting] = rows[-1]['flops']
            active = [float((depth > i).double().mean()) for i in range(1, K)]
        for d in range(1, K + 1) if target is None else []:
            at = depth == d
            if at.any():
                depths.append(dict(model=name, depth=d, share=float(at.double().mean()), nll=float(nll[at].mean())))
    return rows, depths


def load_models(a):
    """The models of ppl by name, that of --ckpt first, and the dict of its checkpoint."""
    model, state = load(a.ckpt, a)
    models = {'vanilla' if model.cfg.n_iter == 1 else 'adaptive' if model.cfg.halting else 'fixed': model}
    for other in a.others:
        name, equals, path = other.partition('=')
        if not path or name in models:
            raise UsageError(f'--others takes NAME=CKPT, with a name of its own for each, not {other!r}')
        models[name], its_state = load(os.path.expanduser(path), a)
        tokenizers = {s['meta'].get('tokenizer_sha256') for s in (state, its_state) if s.get('meta')}
        shapes = {(m.cfg.vocab_size, m.cfg.block_size) for m in (model, models[name])}
        if len(tokenizers) > 1 or len(shapes) > 1:
            raise UsageError(f'{path} has another tokenizer or block_size than {a.ckpt}: they cannot be compared')
    return models, state


def ppl(a):
    """Perplexity on the val split under every halting policy at equal FLOPs.

    A policy has one number, as a threshold, that decides how much halts. It is changed until its FLOPs on these windows
    equal those of the learned gates.
    """
    models, state = load_models(a)
    (main, model), config = next(iter(models.items())), state.get('train_config', {})
    cfg, folder = model.cfg, a.data or config.get('data_dir')
    if not isinstance(folder, str):
        raise UsageError(f'{a.ckpt} does not say what data it was trained on: give --data')
    x = val_text(folder, model, state, max(2, a.eval_tokens // cfg.block_size), cfg.block_size)
    full = float(cost_table(replace(cfg, halting=False), cfg.block_size)[:, -1].mean())
    shares = {f'save {share:.3g}': (1 - share) * full for share in a.save}

    rows, depths = [], []
    for name, m in models.items():
        if m.cfg.n_iter == 1:
            kinds, targets = [], {}
        elif not m.cfg.halting:  # exits that need no gates, at the FLOPs of the main model's gates where it has some
            kinds = [k for k in a.policies if k in ('confidence', 'convergence')]
            learned = [r for r in rows if (r['model'], r['policy']) == (main, 'learned')]
            most = float(cost_table(m.cfg, cfg.block_size)[:, -1].mean())
            targets = {r['setting']: r['flops'] for r in learned} or shares
            targets = {setting: target for setting, target in targets.items() if target < most}
        elif name == main:
            kinds, targets = ['learned', *(k for k in a.policies if k != 'learned')], {'own tau': None, **shares}
        else:
            kinds, targets = ['learned'], {'as trained': None}
        measured = compare_policies(m, x, a, kinds, targets, name)
        rows += measured[0]
        depths += measured[1]
    learned = {r['setting']: r['windows'] for r in rows if (r['model'], r['policy']) == (main, 'learned')}
    run = dict(group=a.group or f'{Path(folder).name}, {cfg.n_layer} layers of width {cfg.n_embd}',
               seed=config.get('seed', 0))
    for row in rows:
        row['saved'] = 1 - row['flops'] / full
        windows = row.pop('windows')
        if row['setting'] in learned and row['policy'] != 'learned':  # the error is paired
            row['over_learned'], row['over_learned_error'] = estimate(windows - learned[row['setting']])
    found = dict(rows=[run | row for row in rows], depths=[run | row for row in depths])
    print(f'{a.ckpt}: K = {cfg.n_iter}, {count_parameters(cfg):,} parameters. {len(x)} windows of {cfg.block_size} '
          f'tokens of {folder}.\n')
    print(tables(mean_over_seeds(found)))
    return dict(config=asdict(cfg), train_config=config, **found)


# -----------------------------------------------------------------------------
# results: means over seeds of several settings, from the JSON files of ppl

KEYS = dict(rows=('group', 'model', 'policy', 'setting'), depths=('group', 'model', 'depth'))  # what names a row
FORMS = dict(
    rows=dict(model='{}', policy='{}', setting='{}', seeds='{}', flops='{:.4g}', saved='{:.1%}', depth='{:.2f}',
              nll='{:.4f}', ppl='{:.3f}', over_learned='{:+.4f}', rank_correlation='{:.2f}'),
    depths=dict(model='{}', depth='{}', seeds='{}', share='{:.1%}', nll='{:.3f}'))


def mean_over_seeds(found):
    """group -> dict(rows, depths), with one row for all that only differ in the seed.

    It has the mean of each number and its standard deviation as KEY_error; a row that is alone keeps its own errors.
    """
    groups = defaultdict(lambda: dict(rows=[], depths=[]))
    for kind, keys in KEYS.items():
        seeds = defaultdict(list)
        for row in found[kind]:
            seeds[tuple(row[key] for key in keys)].append(row)
        for names, same in seeds.items():
            mean = dict(same[0], seeds=len(same))
            for name in [n for n in mean if n not in (*keys, 'seed', 'seeds') and not n.endswith('_error')]:
                numbers = [row.get(name, math.nan) for row in same]  # nan where a run has no such number
                mean[name] = float(np.mean(numbers))
                if len(same) > 1:
                    mean[f'{name}_error'] = float(np.std(numbers, ddof=1))
            groups[mean['group']][kind].append(mean)
    return groups


def tables(groups):
    """Of each group its policies at equal FLOPs, and the tokens of its models by depth, as text."""
    text = ('NLL in nats a token; saved: inference FLOPs, against fixed depth without gates; over learned: NLL minus '
            'that of the learned gates at the same FLOPs; rank correlation: of depth with what iterations 2 .. K save '
            'a token. ±: standard deviation over seeds; of one seed the standard error over windows.\n')
    for group, means in groups.items():
        text += '\n'.join([f'\n## {group}\n', *(table(rows, FORMS[kind]) for kind, rows in means.items())])
    return text


def results(a):
    """Means over the seeds of each setting, from JSON files of ppl or a results.json: tables and two pictures."""
    out, found = Path(a.out), dict(rows=[], depths=[])
    for path in a.files:
        try:
            record = json.loads(Path(path).read_text(encoding='utf-8-sig'))
            for kind in found:
                found[kind] += record[kind]
            groups = mean_over_seeds(found)
            text = tables(groups)
            names = [(row['seed'], *(row[key] for key in KEYS['rows'])) for row in found['rows']]
            n_names = len(set(names))
            for kind, rows in found.items():  # what the tables and the pictures show
                if any(FORMS[kind].keys() - row.keys() - {'seeds', 'over_learned', 'rank_correlation'} for row in rows):
                    raise KeyError(kind)
            if not names:
                raise KeyError('rows')
        except (ValueError, ArithmeticError, KeyError, TypeError, RecursionError):
            raise UsageError(f'{path} is not a JSON file of bench.py ppl, nor a results.json') from None
        if n_names < len(names):
            raise UsageError(f'{path} repeats a seed of its group: tell settings apart by ppl --group')
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    write_beside(out / 'results.json', json.dumps(found, indent=1).encode('utf-8'))  # it can be read in place of these
    rows, depths = ({group: means[kind] for group, means in groups.items()} for kind in KEYS)
    save_figure(out / 'isoflops.png', draw_iso_flops, rows, len(groups), 5.5, 4.2)
    save_figure(out / 'nll_by_depth.png', draw_by_depth, depths, len(groups), 4, 3)
    return found


def draw_iso_flops(ax, rows):
    """NLL against FLOPs saved, a line a policy. Bars: error of the distance to the learned gates."""
    lines = defaultdict(list)
    for r in rows:
        name = f'{r["model"]}, {r["policy"]}'
        if r['policy'] == 'fixed depth':
            lines[name] = []  # of these only the last one, with all iterations
        lines[name].append((100 * r['saved'], r['nll'], r.get('over_learned_error') or 0))
    for name, points in lines.items():
        ax.errorbar(*zip(*sorted(points)), label=label(name), marker='o', ms=4, lw=1, capsize=2)
    ax.set(xlabel='inference FLOPs saved, %', ylabel='validation NLL, nats a token')
    ax.legend(fontsize=6)


def draw_by_depth(ax, rows):
    """Mean NLL of the tokens that halted at each depth of the adaptive model; the width of a bar is their share."""
    for r in rows:
        if r['model'] == 'adaptive':
            name, width = f'{r["depth"]}\n{r["share"]:.1%}', 0.1 + 0.8 * r['share']
            ax.bar(name, r['nll'], width, yerr=r.get('nll_error'), color='C0', capsize=3)
    ax.set(xlabel='depth, iterations; share of the tokens', ylabel='NLL, nats a token')


# -----------------------------------------------------------------------------
# flops, plan: the model on tensors that have shapes and no values, so that any size fits any machine

def fake_model(cfg):
    """The model with such weights, made under FakeTensorMode."""
    with torch.device('meta'):
        model = AdaPonderLM(cfg)
    model.load_state_dict({name: torch.empty(p.shape) for name, p in model.state_dict().items()}, assign=True)
    return model


def all_go_on(i, s, h, row, pos):
    """A halting policy for tensors without values. The model only asks its answer which tokens go on: all."""
    return SimpleNamespace(shape=s.shape, nonzero=lambda: torch.arange(len(s))[:, None])


def count_flops(cfg, T):
    """Forward FLOPs of T tokens that run all iterations as torch counts them, over those of the formula."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        fake_model(cfg)(torch.empty(1, T, dtype=torch.int64), policy=all_go_on).logits
    # torch counts the keys that the causal mask hides, too
    return counter.get_total_flops() / (T * cfg.inference_flops(cfg.n_iter, T))


def flops(a):
    """Parameters and forward FLOPs a token by part and depth, by formula and as torch counts them."""
    found = []
    for path in a.paths:
        cfg = config_of(path)[0] if path.endswith('.py') else load(path, a)[0].cfg
        T, K, P = cfg.block_size, cfg.n_iter, count_parameters(cfg)
        context = (T + 1) / 2  # keys that a token sees, on average
        f, vanilla = cfg.flops(context), replace(cfg, n_iter=1).inference_flops(1, context)
        rows = []
        for d in range(1, K + 1):
            parts = dict(linear=d * f['linear'], attention=d * f['attention'], unembed=f['unembed'],
                         ponder=(d - 1) * f['ponder'], gates=min(d, K - 1) * f['gate'])
            total = cfg.inference_flops(d, context)
            rows.append(dict(depth=d, **parts, total=total, x_vanilla=total / vanilla))
        counted = count_flops(cfg, T)
        print(f'{path}: {P:,} parameters. FLOPs of a token in a causal pass over {T} tokens:\n')
        print(table(rows, {key: '{:.4g}' for key in rows[0]}))
        print(f'Counted by torch at depth {K}, all tokens seeing {T} keys: {counted:.4f} x the formula.\n')
        found.append(dict(path=path, config=asdict(cfg), parameters=P, depths=rows, counted=counted))
    return dict(configs=found)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered: `peak`, the most that lived at a time."""

    def __init__(self, there_before):
        super().__init__()
        self.peak, self.made = 0, weakref.WeakSet()
        self.before = weakref.WeakSet(tensor.untyped_storage() for tensor in there_before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        self.made.update(s for s in storages if s not in self.before)
        self.peak = max(self.peak, sum(s.nbytes() for s in self.made))
        return out


def activation_memory(cfg, batch_size, bfloat16=True, remat=False, like_gpu=True):
    """Bytes at the peak of a forward and backward pass over batch_size sequences, beyond weights, gradients and AdamW.

    like_gpu: the paths that the model takes on a GPU. An upper bound: no token halts, torch.compile keeps less, and
    autograd adds up gradients in place where it can, but never fake ones: at most the size of the gradients.
    """
    with FakeTensorMode():
        model = fake_model(replace(cfg, objective='saving'))  # the gates of 'paper' add 2 percent
        model.remat = remat
        model.on_cpu = lambda h: not like_gpu
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        x = torch.empty(batch_size, cfg.block_size + 1, dtype=torch.int64)
        with PeakMemory([*model.parameters(), x]) as memory:
            with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
                loss = model(x[:, :-1], x[:, 1:], policy=all_go_on if model.gates else None).loss
            loss.backward()
    return memory.peak


def plan(a):
    """What training a config takes: FLOPs, days, dollars, memory of a GPU and the largest micro-batch that fits it."""
    (cfg, t), (peak, gigabytes) = config_of(a.config, a.set), GPUS[a.gpu]
    N, K, P = t.batch_size * t.block_size, cfg.n_iter, count_parameters(cfg)
    steps = in_steps('max_steps', t.max_steps, N * t.gradient_accumulation_steps)
    tokens = steps * t.gradient_accumulation_steps * N
    context = (t.block_size + 1) / 2
    forward, vanilla = cfg.inference_flops(K, context), replace(cfg, n_iter=1).inference_flops(1, context)
    training = 3 * forward * tokens
    hours = training / (peak * a.mfu) / 3600
    price = '' if a.price is None else f', ${hours * a.price:,.0f}'

    # what each GPU holds all the time, and a micro-batch at its peak; two sizes tell how much each sequence adds
    bfloat16 = t.dtype != 'float32'
    memory = dict(weights=4 * P, gradients=4 * P, optimizer=8 * P)
    memory['activations'], twice = (activation_memory(cfg, n * t.batch_size, bfloat16, t.remat) for n in (1, 2))
    each = (twice - memory['activations']) / t.batch_size
    need, room = sum(memory.values()), 0.92e9 * gigabytes  # the rest for CUDA's context and fragments
    largest = max(0, math.floor(t.batch_size + (room - need) / each))

    print(f"""{a.config} on {a.gpus} x {a.gpu}: P = {P:,} parameters, K = {K}, micro-batches of N = {N:,} tokens

    tokens       {tokens / 1e9:.3f} B: {steps:,} steps x {t.gradient_accumulation_steps} N
    forward      {forward / 1e9:.3f} GFLOPs a token that runs all iterations; {forward / vanilla:.2f} x n_iter=1
    training     {training:.3e} FLOPs: 3 x forward x tokens
    time         {hours / a.gpus / 24:.2f} days, {hours:,.0f} GPU hours{price}; {peak:.3g} FLOP/s x MFU {a.mfu:.0%}
    memory       {', '.join(f'{name} {size / 1e9:.2f} GB' for name, size in memory.items())}
    a GPU        {need / 1e9:.2f} GB of {gigabytes}; each sequence takes {each / 1e9:.3f} GB: batch_size {largest} fits
""")
    return dict(config=asdict(cfg), parameters=P, tokens=tokens, forward_flops=forward, training_flops=training,
                gpu_hours=hours, memory=memory, peak_memory=need, largest_batch_size=largest)


# -----------------------------------------------------------------------------
# speed: the clock, of a checkpoint or of random weights in the shape of a config file

def timed(fn, device):
    """Run fn. Returns the seconds that it took, and what it returned."""
    wait = torch.accelerator.synchronize if device.type != 'cpu' else lambda: None  # a GPU works on its own
    wait()
    start = time.perf_counter()
    out = fn()
    wait()
    return time.perf_counter() - start, out


def per_token(cfg, seconds, depth, context, heads):
    """dict(seconds, flops, depth) of a mean token. depth, context: of each token; heads: how many got logits."""
    n, depth = depth.numel(), depth.cpu().double()
    flops = float(cfg.inference_flops(depth, context).sum()) - (n - heads) * cfg.flops(0)['unembed']
    return dict(seconds=seconds / n, flops=flops / n, depth=float(depth.mean()))


@torch.inference_mode()
def time_prefill(model, x, policy=None):
    """Run prompts x (B, T) and make the logits of their last tokens."""
    def run():
        out = model(x, execution='packed', policy=policy)
        model.unembed(out.hidden[:, -1])
        return out.depth
    return per_token(model.cfg, *timed(run, x.device), torch.arange(1, x.size(1) + 1), heads=len(x))


def time_decode(model, prompts, n, policy=None):
    """Decode n tokens a prompt, each in a slot. Timed from when all prompts are in until so many tokens are out."""
    # a budget of more than n, so that no slot runs dry while others are slower
    steps = stream(model, prompts, 2 * n, temperature=0, policy=policy, slots=len(prompts))
    for _ in range(len(prompts)):
        next(steps)  # the first token of each comes with its prefill
    seconds, made = timed(lambda: list(islice(steps, n * len(prompts))), model.embed.weight.device)
    steps.close()
    length, context = [len(p) for p in prompts], []
    for step in made:
        length[step.seq] += 1
        context.append(length[step.seq])
    depth = torch.tensor([step.depth for step in made])
    return per_token(model.cfg, seconds, depth, torch.tensor(context), heads=len(made))


def time_variants(case, variants, rounds):
    """Run the variants in turn, A B C A B C ..: quartiles of the time a token, and of its ratio to A's in that round.

    variants: name -> function -> dict(seconds, flops, depth). Each runs twice before that, so that compiling and
    capturing graphs stays outside the timed part.
    """
    runs, graphs, rows = {name: [] for name in variants}, {}, []
    for name, fn in variants.items():
        before = torch._dynamo.utils.counters['stats']['unique_graphs']
        fn()
        fn()
        graphs[name] = torch._dynamo.utils.counters['stats']['unique_graphs'] - before
    for _ in tqdm(range(rounds), desc=case, leave=False):
        for name, fn in variants.items():
            runs[name].append(fn())
    # ratios within a round: what slows the machine for a while slows all variants alike
    first = next(iter(runs.values()))
    base = np.array([r['seconds'] for r in first])
    for name, mine in runs.items():
        seconds = np.array([r['seconds'] for r in mine])
        time_ratio = np.percentile(seconds / base, (25, 50, 75)).tolist()
        flop_ratio = mine[0]['flops'] / first[0]['flops']
        rows.append(dict(case=case, variant=name, depth=mine[0]['depth'], graphs=graphs[name],
                         ms_per_token=np.percentile(1e3 * seconds, (25, 50, 75)).tolist(),
                         time_ratio=time_ratio, flop_ratio=flop_ratio, time_per_flops=time_ratio[1] / flop_ratio))
    return rows


def speed(a):
    """The clock: fixed depth against adaptive with the same weights, each time ratio beside its FLOP ratio.

    A share of halting is forced; with --data the model's own gates run too.
    """
    model, state = load(a.path, a)
    cfg, T = model.cfg, model.cfg.block_size
    length, prompt = a.length or min(1024, T), a.prompt or max(1, min(64, T // 4))
    new = min(32, (T - prompt) // 2)  # time_decode() needs room for twice as many
    if cfg.n_iter == 1 or not cfg.halting or length > T or new < 1:
        raise UsageError(f'give a model with gates and n_iter > 1, --length up to block_size ({T}), --prompt below it')
    fixed = copy.deepcopy(model)
    fixed.cfg, fixed.gates = replace(cfg, halting=False), torch.nn.ModuleList()
    if a.compile:
        for block in [*model.blocks, *fixed.blocks]:  # as train.py does
            block.compile()
    policies = {'adaptive': None} if a.data else {}
    for share in a.share:  # of all iterations 2 .. K
        policy = scheduled_policy('geometric', np.arange(cfg.n_iter), (1 - share) * (cfg.n_iter - 1))
        policies[f'adaptive, {share:.0%} halted'] = policy

    def text(n, length):
        if a.data:
            texts = val_text(a.data, model, state, n, length)[:, :length].to(a.device)
            if len(texts) < n:
                raise UsageError(f'{a.data} has {len(texts)} texts of {length} tokens: give fewer --slots')
            return texts
        generator = torch.Generator().manual_seed(a.seed)
        return torch.randint(cfg.vocab_size, (n, length), generator=generator).to(a.device)
    cases = {f'prefill {length}': partial(time_prefill, x=text(1, length))}
    for n in a.slots:
        cases[f'decode, {n} slots'] = partial(time_decode, prompts=text(n, prompt).tolist(), n=new)
    rows = []
    for case, run in cases.items():
        variants = {'fixed': partial(run, fixed)}
        variants |= {name: partial(run, model, policy=policy) for name, policy in policies.items()}
        rows += time_variants(case, variants, a.rounds)
    print(f'{a.path}: K = {cfg.n_iter}, {count_parameters(cfg):,} parameters, {a.dtype} on {a.device}; prompts of '
          f'{prompt} tokens, {new} new ones a slot. Medians and [quartiles] of {a.rounds} rounds.\n')
    quartiles = '{0[1]:.3f} [{0[0]:.3f} {0[2]:.3f}]'
    print(table(rows, dict(case='{}', variant='{}', depth='{:.2f}', ms_per_token=quartiles, time_ratio=quartiles,
                           flop_ratio='{:.3f}', time_per_flops='{:.3f}')))
    return dict(config=asdict(cfg), rows=rows)


# -----------------------------------------------------------------------------
# downstream: lm-evaluation-harness

def sampling_of(settings):
    """Settings of a generation as lm-eval's hf model has them: (until, new tokens, temperature, top_k, top_p)."""
    until = settings.get('until') or []
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    names = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
    new_tokens = next((int(settings[name]) for name in names if settings.get(name) is not None), 256)
    # sampling needs a temperature; without one, or with do_sample=False, decoding is greedy
    temperature = float(settings.get('temperature') or 0.0)
    if settings.get('do_sample') is False:
        temperature = 0.0
    top_k = settings.get('top_k', 50)  # transformers' default; there, and here, 0 and None switch it off
    return until, new_tokens, temperature, top_k or None, settings.get('top_p')


def harness_model(model, enc, a):
    """An lm_eval model around this one, at adaptive depth, a text at a time. `depths`: of all tokens that ran."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    T, eot, halting = model.cfg.block_size, enc.eot_token, dict(tau=a.tau, max_iter=a.max_iter)

    class Adaptive(TemplateLM):
        eot_token_id = eot
        depths = []

        def tok_encode(self, string, add_special_tokens=None, **rest):
            return enc.encode_ordinary(string)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests, **rest):
            """requests: (_, context, continuation), lists of tokens. Returns pairs (log-probability, is it greedy)."""
            done = []
            for _, context, continuation in tqdm(requests, desc='loglikelihood', leave=False):
                text = torch.tensor([(context + continuation)[-T - 1:]], device=a.device)
                want = text[0, 1:][-len(continuation):]
                out = model(text[:, :-1], execution='packed', **halting)
                log_p = log_probs(model, out.hidden[0, -len(want):])
                done.append((float(log_p.gather(-1, want[:, None]).sum()), bool((log_p.argmax(-1) == want).all())))
                self.depths += out.depth[0].tolist()
            return done

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Log-probability of each whole text, in windows that see as much of it as fits."""
            done = []
            for request in requests:
                tokens = enc.encode_ordinary(request.args[0])
                windows = utils.get_rolling_token_windows(tokens, prefix_token=eot, max_seq_len=T, context_len=1)
                windows = [(None, *utils.make_disjoint_window(window)) for window in windows]
                done.append(sum(log_p for log_p, greedy in self._loglikelihood_tokens(windows)))
            return done

        def generate_until(self, requests, disable_tqdm=False):
            """Texts up to a stop string, the wished length or their end."""
            done = []
            for n, request in enumerate(tqdm(requests, desc='generate', leave=False)):
                context, settings = request.args
                until, budget, *sampling = sampling_of(settings)
                prompt, made, text = (enc.encode_ordinary(context) or [eot])[-max(1, T - budget):], [], ''
                generator = torch.Generator().manual_seed(a.seed + n)
                for step in stream(model, [prompt], budget, *sampling, generator, **halting, stop_token=eot):
                    self.depths.append(step.depth)
                    made.append(step.token)
                    text = enc.decode([t for t in made if t != eot and t < enc.n_vocab])
                    if any(stop in text for stop in until):
                        break
                done.append(min((text.split(stop)[0] for stop in until), key=len, default=text))
            return done
    return Adaptive()


def downstream(a):
    """Tasks of lm-evaluation-harness at adaptive depth, with the mean depth beside the scores. Needs lm-eval."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UsageError('downstream needs lm-evaluation-harness: pip install lm-eval') from None
    model, enc = sample.load(a.ckpt, getattr(torch, a.dtype))
    model = model.to(a.device).eval().requires_grad_(False)
    if enc.eot_token >= model.cfg.vocab_size:
        raise UsageError(f'{a.ckpt}: the tokenizer beside it has more tokens than the model, it belongs to another one')
    lm, manager, found = harness_model(model, enc, a), TaskManager(), {}
    for task in a.tasks.split(','):
        if task not in manager.all_tasks and not Path(task).is_file():
            raise UsageError(f'lm-eval knows no task {task}')
    for task in a.tasks.split(','):
        lm.depths = []
        scores = lm_eval.simple_evaluate(lm, tasks=[task], num_fewshot=a.num_fewshot, limit=a.limit,
                                         task_manager=manager, log_samples=False, bootstrap_iters=1000)
        found[task] = dict(results=scores['results'], depth=float(np.mean(lm.depths)))
        print(f'{make_table(scores)}\n{task}: mean depth {found[task]["depth"]:.2f} of {model.cfg.n_iter}\n')
    return dict(config=asdict(model.cfg), tasks=found)


# -----------------------------------------------------------------------------
# curves: the logs of runs side by side

COLUMNS = dict(run='{}', tokens='{:,}', loss='{:.4f}', val_loss='{:.4f}', depth='{:.2f}', val_depth='{:.2f}',
               val_flops_saved='{:.1%}', tokens_per_second='{:,.0f}', mfu='{:.1%}')
PANELS = ('loss', 'val_loss', 'depth', 'val_depth', 'grad_norm', 'gate_mean', 'tokens_per_second', 'lr')


def read_log(folder):
    """The log of a run: its records, dicts, its row of the table, and key -> (steps, values) for the picture."""
    path, records, points = Path(folder) / 'log.jsonl', [], {}
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # a killed run was writing it
    try:
        records = [{key: value for key, value in record.items() if value not in (None, [])} for record in records]
        row = {key: value for record in records for key, value in record.items()}  # what each key said last
        row['run'] = folder
        table([row], COLUMNS)
        for key in PANELS:  # gate_mean has a value for each gate: a line each
            pairs = [(float(record['step']), np.atleast_1d(record[key])) for record in records if key in record]
            width = max((len(values) for step, values in pairs), default=1)  # gates that no token reached are left out
            padded = [np.append(values, [math.nan] * (width - len(values))) for step, values in pairs]
            points[key] = [step for step, values in pairs], np.array(padded, float)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(f'{path} was not written by train.py ({type(e).__name__}: {e})') from None
    return records, row, points


def curves(a):
    """The logs of runs side by side: a table of their last values, and a picture. loss is the cross entropy."""
    if Path(a.out).suffix not in ('.png', '.pdf', '.svg'):
        raise UsageError(f'--out must end in .png, .pdf or .svg, not {a.out}')
    logs = {folder: read_log(folder) for folder in a.folders}
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    check_writable(a.out)
    print(table([row for records, row, points in logs.values()], COLUMNS))

    def draw(ax, key):
        for n, (folder, (records, row, points)) in enumerate(logs.items()):
            if points[key][0]:
                ax.plot(*points[key], color=f'C{n}', alpha=0.75, lw=1, label=label(folder))
        ax.set(xlabel='step', yscale='log' if key == 'grad_norm' else 'linear')
        if key == PANELS[0]:
            ax.legend(fontsize=7)
    save_figure(a.out, draw, dict(zip(PANELS, PANELS)), 4, 4.5, 3.5)
    return dict(runs={folder: records for folder, (records, row, points) in logs.items()})


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
        """A subcommand. runs: a model, on a device."""
        c = sub.add_parser(fn.__name__, help=fn.__doc__.split('\n')[0], description=fn.__doc__)
        c.set_defaults(run=fn)
        c.add_argument('--json', type=PATH, help='write the numbers here')
        if runs:
            c.add_argument('--seed', type=number(int, 0, 2 ** 32 - 1), default=1337)
            c.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, mps; auto: a GPU where there is one')
            c.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
        return c.add_argument

    arg = command(flops)
    arg('--config', '--ckpt', dest='paths', nargs='+', type=PATH, action='extend', required=True)

    arg = command(ppl)
    arg('--ckpt', required=True, type=PATH, help='a ckpt.pt of train.py, or its folder')
    arg('--data', type=PATH, help='a folder of prepare_data.py; default: the one that the checkpoint was trained on')
    arg('--others', nargs='+', default=[], metavar='NAME=CKPT', help='models to compare with, of the same data')
    arg('--policies', nargs='+', choices=POLICIES, default=POLICIES)
    arg('--save', nargs='*', type=SHARE, default=[0.05, 0.15, 0.25], help="shares of fixed depth's FLOPs to save")
    arg('--eval_tokens', type=COUNT, default=32768, help='of the val split, evenly spread')
    arg('--batch_size', type=COUNT, default=16)
    arg('--group', help='name of the setting: results takes the mean over the seeds of one')

    arg = command(results, runs=False)
    arg('files', nargs='+', type=PATH, help='JSON files of ppl, or a results.json')
    arg('--out', type=PATH, default='out/results', help='a folder')

    arg = command(speed)
    arg('--ckpt', '--config', dest='path', type=PATH, required=True, help='the latter for random weights')
    arg('--share', nargs='*', type=SHARE, default=[0.0, 0.5], help='of the pairs (token, iteration 2 .. K) not to run')
    arg('--data', type=PATH, help='a folder of prepare_data.py: its val split instead of random tokens')
    arg('--length', type=number(int, 2), help='tokens to prefill; default: block_size, at most 1024')
    arg('--slots', nargs='*', type=COUNT, default=[1, 8, 32, 128], help='texts to decode at a time')
    arg('--prompt', type=COUNT, help='tokens of a prompt to decode from; default: a quarter of block_size, at most 64')
    arg('--rounds', type=COUNT, default=5)
    arg('--compile', action='store_true', help='torch.compile the blocks')

    arg = command(plan, runs=False)
    arg('--config', required=True, type=PATH, help='a config file of train.py')
    arg('--set', nargs='*', default=[], metavar='KEY=VALUE', help='changes to the config')
    arg('--gpu', default='H100', choices=GPUS)
    arg('--gpus', type=COUNT, default=8)
    arg('--mfu', type=number(float, 1e-3, 1), default=0.4, help="share of the GPU's peak FLOP/s that is reached")
    arg('--price', type=number(float, 0), help='dollars a GPU hour')

    arg = command(downstream)
    arg('--ckpt', required=True, type=PATH, help='as sample.py has it: its tokenizer lies beside it')
    arg('--tasks', required=True, help='lambada_openai,piqa,arc_easy,..., or the YAML file of a task of your own')
    arg('--num_fewshot', type=number(int, 0))
    arg('--limit', type=COUNT, help='documents a task')
    arg('--tau', type=SHARE)
    arg('--max_iter', type=COUNT)

    arg = command(curves, runs=False)
    arg('folders', nargs='+', type=PATH, help='the out_dir of each run')
    arg('--out', type=PATH, default='out/curves.png')
    return parser


def main(argv=None):
    """Run a command. Returns the numbers that it prints, a dict."""
    a = make_parser().parse_args(argv)
    run = vars(a).pop('run')
    if a.json:
        check_writable(a.json)  # before the work, not after it
    if 'device' in a:
        a.device = get_device(a.device)
        get_autocast(a.device, a.dtype)  # refuses bfloat16 on a GPU without it
    measured = run(a)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'
    machine = dict(cpu=platform.processor() or platform.machine(), cpus=os.cpu_count(), gpu=gpu,
                   threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__)
    print('\n' + ', '.join(f'{k} {v}' for k, v in machine.items()))
    if a.json:
        text = json.dumps(dict(arguments=vars(a), machine=machine, **measured), indent=1, default=str)
        write_beside(a.json, text.encode('utf-8'))
    return measured


if __name__ == '__main__':
    command_line(main)
