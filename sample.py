"""
Continues a text with a trained model, and shows how long it thought about each token.

    python sample.py --ckpt out/tiny/ckpt.pt --prompt 'def main(' --depth
    python sample.py --ckpt out/tiny/ckpt.pt --prompt_file story.txt --html depth.html --tau 0.01
    echo 'import os' | python sample.py --ckpt out/tiny/ckpt.pt
    python sample.py --ckpt out/tiny/ckpt.pt --prompts in.jsonl --batch 16 --out out.jsonl

The colour of a token is its depth: the iterations that were spent on predicting it. The first part of this file is the
engine behind it, which decodes many sequences at once: see stream().
"""
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends quietly

import argparse
import codecs
import html
import json
import math
import os
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import AdaPonderLM, check_sampling, load_checkpoint, rope_table, sample
from prepare_data import (EOT, UsageError, check_writable, command_line, load_tokenizer, optional, read_json,
                          write_beside)


# -----------------------------------------------------------------------------
# The batch engine

class Step(NamedTuple):
    """One generated token. depth and gates are what was spent on predicting it."""
    seq: int      # index of the prompt that it continues
    token: int
    depth: int    # iterations, 1 .. n_iter
    gates: list   # the gate values that were computed
    nll: float    # nats, under the model itself (temperature 1, nothing cut off)


@dataclass
class Slot:
    """A sequence in flight, and where the token that it runs stands."""
    index: int           # its row of the cache and of the inputs
    seq: int             # index of its prompt
    pos: int = 0         # position of the token in the context
    iteration: int = 0   # of the token, 0 .. n_iter - 1
    gates: list = None   # gate values of the token so far


def slot_attention(q, k, v, kv, at):
    """One token of each of N slots, each at its own iteration and position. q, k, v: (N, nh, hs).

    kv: the layer's cache (2, slots, n_iter, nh, L, hs), written in place. at: the N Slots, and where keys and values
    go: four int64 tensors (M,), of tokens 0 .. N - 1, slots, iterations and positions.
    """
    active, (token, index, iteration, pos) = at
    new = torch.stack([k, v], dim=1)[token]  # (M, 2, nh, hs)
    kv[:, index, iteration, :, pos] = new.to(kv.dtype)  # under autocast they differ
    y = []
    for n, slot in enumerate(active):  # each attends to a view of its slot's part, so no cache is copied
        K, V = kv[:, slot.index, slot.iteration, None, :, :slot.pos + 1]  # (1, nh, pos + 1, hs) each
        y.append(F.scaled_dot_product_attention(q[n:n + 1, :, None], K, V))
    return torch.cat(y)[:, :, 0], kv


class Engine:
    """The model with a KV cache for several sequences. Each slot runs one token, and each token its own iteration."""

    def __init__(self, model, slots, length, policy=None, tau=None, max_iter=None):
        weight = model.embed.weight
        self.model, self.policy, self.tau, self.max_iter = model, policy, tau, max_iter
        self.last = (max_iter or model.cfg.n_iter) - 1
        self.device = weight.device
        self.cache = model.new_cache(slots, length)
        self.rope = rope_table(torch.arange(length, device=self.device), model.cfg, weight.dtype)
        self.E = weight.new_zeros(slots, model.cfg.n_embd)  # the input of each slot's token to its present iteration

    def prefill(self, slot, tokens):
        """Run a list of tokens and fill the slot's part of the cache. Returns the last token's logits (1, vocab)."""
        policy = self.policy
        if policy:  # it is told which prompt this is, as in step()
            def policy(i, s, h, row, pos):
                return self.policy(i, s, h, row + slot.seq, pos)
        idx, cache = torch.tensor([tokens], device=self.device), self.cache[:, :, slot.index:slot.index + 1]
        out = self.model.prefill(idx, cache, policy=policy, tau=self.tau, max_iter=self.max_iter)
        slot.pos, slot.iteration = len(tokens) - 1, int(out.depth[0, -1]) - 1
        slot.gates = out.gates[0, -1, :min(slot.iteration + 1, len(out.records))].tolist()
        return self.model.unembed(out.hidden[:, -1])

    def step(self, active):
        """One iteration of each slot's token. Returns the slots whose tokens halted and their logits (N, vocab)."""
        model, K = self.model, self.model.cfg.n_iter
        numbers = [(slot.index, slot.pos, slot.seq) for slot in active]
        row, pos, seq = torch.tensor(numbers, device=self.device).unbind(1)
        # a token's keys and values go into all later iterations too: that is what those see if the token halts here
        places = [(n, slot.index, i, slot.pos) for n, slot in enumerate(active) for i in range(slot.iteration, K)]
        at = active, torch.tensor(places, device=self.device).unbind(1)
        h, _ = model.backbone(self.E[row], [t[pos] for t in self.rope], slot_attention, self.cache.unbind(1), at)

        # each iteration has a gate of its own, the last has none
        gate = torch.zeros(len(h), device=self.device, dtype=torch.promote_types(h.dtype, torch.float32))
        goes_on = torch.zeros_like(gate, dtype=torch.bool)
        for i in sorted({slot.iteration for slot in active} - {self.last}):
            same = torch.tensor([n for n, slot in enumerate(active) if slot.iteration == i], device=self.device)
            values, goes_on[same] = model.decide(i, h[same], seq[same], pos[same], self.policy, self.tau)
            gate[same] = values.to(gate.dtype)

        # tokens that halted get logits, the others a pondering embedding, which begins with logits too: one product,
        # the largest of a step, makes both
        going, halted = goes_on.nonzero()[:, 0], (~goes_on).nonzero()[:, 0]
        logits = model.unembed(torch.where(goes_on[:, None], model.ln_ponder(h), h))  # (N, vocab)
        if model.cfg.feedback == 'hidden':
            e = model.ponder(h[going])
        else:
            e = model.expect(logits[going]) * model.cfg.embed_scale
        if model.cfg.objective == 'paper':
            e = e * gate[going, None].to(e.dtype)
        self.E.index_add_(0, row[going], e.to(self.E.dtype))
        for slot, value, one_more in zip(active, gate.tolist(), goes_on.tolist()):
            if slot.iteration < self.last:
                slot.gates.append(value)
            slot.iteration += one_more
        return [active[n] for n in halted.tolist()], [logits[halted]]


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, tau=None,
           max_iter=None, policy=None, slots=1, stop_token=None):
    """Continue many prompts with a KV cache; yields a Step for each new token, as it is made.

    prompts: lists of token ids, of any lengths. max_new_tokens: a number, or one for each prompt.
    slots: sequences in flight. All iterations share their weights, so slots at different iterations of different tokens
    go through the blocks together: a slot whose token halted starts its next token in the very next step, and the slot
    of a finished sequence takes the next prompt.
    generator: a torch.Generator, or a list of one for each prompt: then no text depends on what runs beside it.
    temperature, top_k, top_p: see sample(). tau, max_iter, policy: see AdaPonderLM.decide(); row is the prompt's index.
    stop_token: ends a sequence, and is yielded. A text that outgrows block_size goes on with its last part, see
    AdaPonderLM.window(). Raises ValueError for an empty prompt, unknown tokens and numbers outside their range.
    """
    model.check_halting(tau, max_iter)
    check_sampling(temperature, top_k, top_p)
    texts = [list(p) for p in prompts]
    if any(not t or min(t) < 0 or max(t) >= model.cfg.vocab_size for t in texts):
        raise ValueError(f'prompts must have at least one token, and tokens from 0 to {model.cfg.vocab_size - 1}')
    budget = [max_new_tokens] * len(texts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * len(texts)
    if not len(texts) == len(budget) == len(generators):
        raise ValueError(f'{len(texts)} prompts, {len(budget)} numbers of new tokens, {len(generators)} generators')
    if min(budget, default=0) < 0:
        raise ValueError(f'max_new_tokens must be at least 0, not {min(budget)}')

    slots = max(1, min(slots, len(texts)))
    length = min(model.cfg.block_size, max((len(t) + n for t, n in zip(texts, budget)), default=1))
    engine = Engine(model, slots, length, policy, tau, max_iter)
    waiting = deque(seq for seq, n in enumerate(budget) if n > 0)
    active, free = [], list(range(slots))
    while waiting or active:
        # free slots take the next prompts, the others run one iteration of their tokens
        admitted, logits = [], []
        while waiting and free:
            seq = waiting.popleft()
            admitted.append(Slot(free.pop(), seq))
            logits.append(engine.prefill(admitted[-1], texts[seq][model.window(len(texts[seq])):]))
        halted, logits_halted = engine.step(active) if active else ([], [])
        active += admitted
        ready = admitted + halted
        if not ready:
            continue

        # draw the tokens that follow those that halted
        logits = torch.cat(logits + logits_halted)
        u = torch.stack([torch.rand((), generator=generators[slot.seq]) for slot in ready]).to(logits.device)
        tokens = sample(logits, u, temperature, top_k, top_p)
        nlls = F.cross_entropy(logits.float(), tokens, reduction='none')
        for slot, token, nll in zip(ready, tokens.tolist(), nlls.tolist()):
            yield Step(slot.seq, token, slot.iteration + 1, slot.gates, nll)
            texts[slot.seq].append(token)
            budget[slot.seq] -= 1
            finished = budget[slot.seq] == 0 or token == stop_token
            outgrown = model.window(len(texts[slot.seq])) != model.window(len(texts[slot.seq]) - 1)
            if outgrown and not finished:  # the context moves on: it comes in anew, as a prompt
                waiting.appendleft(slot.seq)
            if outgrown or finished:
                active.remove(slot)
                free.append(slot.index)
            slot.pos, slot.iteration, slot.gates = slot.pos + 1, 0, []
        engine.E[[slot.index for slot in ready]] = model.embed_tokens(tokens)


def score_prompt(model, tokens, **halting):
    """A Step for each token of a text that is already there, seq None: depth, gates and NLL of predicting it.

    Nothing predicted the first token: its depth is None. tokens: 1 to block_size. halting: tau, max_iter.
    """
    steps = [Step(None, tokens[0], None, [], None)]
    if len(tokens) > 1:
        x = torch.tensor([tokens], device=model.embed.weight.device)
        out = model(x[:, :-1], x[:, 1:], execution='packed', **halting)
        values = (t[0].tolist() for t in (out.depth, out.gates, out.nll))
        for token, depth, gates, nll in zip(tokens[1:], *values):
            steps.append(Step(None, token, depth, gates[:min(depth, len(out.records))], nll))
    return steps


def summary(model, runs, seconds, max_iter):
    """One line of figures. runs: (length of prompt, Steps) of each text. FLOPs saved are against fixed depth."""
    tokens = [(step.depth, n - model.window(n)) for length, steps in runs for n, step in enumerate(steps, length)]
    if not tokens:
        return 'no tokens made'
    cfg, fixed = model.cfg, replace(model.cfg, halting=False)
    depth = sum(depth for depth, context in tokens) / len(tokens)
    flops = sum(cfg.inference_flops(depth, context, max_iter) for depth, context in tokens)
    flops_fixed = sum(fixed.inference_flops(cfg.n_iter, context) for depth, context in tokens)
    return (f'{len(tokens)} tokens, {len(tokens) / seconds:.0f} tokens/s, mean depth {depth:.2f} of {cfg.n_iter}, '
            f'{1 - flops / flops_fixed:.1%} of the FLOPs of fixed depth {cfg.n_iter} saved')


# -----------------------------------------------------------------------------
# Showing depth

# backgrounds of depth 1 .. n_iter, (r, g, b): text on them is black, or white where the page is dark
LIGHT = [(226, 240, 252), (255, 243, 196), (255, 203, 128), (244, 132, 110)]
DARK = [(30, 44, 60), (66, 58, 26), (134, 78, 18), (178, 46, 48)]
CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')  # all but tab and line feed: a terminal would obey them


def colour(depth, n_iter, stops=LIGHT):
    """(r, g, b) of a depth, between the stops where n_iter is not their number."""
    x = (depth - 1) / max(1, n_iter - 1) * (len(stops) - 1)
    i = min(int(x), len(stops) - 2)
    return tuple(round(a + (b - a) * (x - i)) for a, b in zip(stops[i], stops[i + 1]))


def visible(text):
    """text with control characters written out."""
    return CONTROL.sub(lambda c: f'\\x{ord(c[0]):02x}', text)


def paint(text, depth, n_iter, bold=False):
    """text on the colour of its depth, if it has one, for a terminal of 256 colours."""
    style = '1' if bold else '0'
    if depth:  # the six levels of the colour cube are 0, 95, 135, 175, 215, 255
        r, g, b = (max(0, (c - 35) // 40) for c in colour(depth, n_iter))
        style += f';38;5;16;48;5;{16 + 36 * r + 6 * g + b}'
        text = text.replace('\n', '↵\n')  # a line break has a depth too
    lines = visible(text).replace('\t', '    ').split('\n')
    return '\n'.join(f'\x1b[{style}m{line}\x1b[0m' if line else '' for line in lines)


def token_bytes(enc, token):
    """The bytes of a token; none for the numbers that pad a vocabulary."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b''


def pieces(enc, steps):
    """(text, Steps) pairs. Tokens that end in the middle of a character wait for the rest, and are shown with it."""
    decoder, text, group = codecs.getincrementaldecoder('utf-8')('replace'), '', []
    for step in steps:
        group.append(step)
        text += decoder.decode(token_bytes(enc, step.token))
        if not decoder.getstate()[0]:  # no bytes wait
            yield text, group
            text, group = '', []
    if group:
        yield text + decoder.decode(b'', True), group


def depth_of(group):
    """The depth to show for the tokens of one text: the largest; None where nothing predicted them."""
    return max((step.depth for step in group if step.depth), default=None)


# the bar at the bottom is what a token's data-tip says
STYLE = '''
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:58rem;margin:0 auto;padding:1.5rem 1rem 11rem}
h1{font-size:1.15rem}
pre,.t::after{font:14px/1.7 ui-monospace,Menlo,Consolas,monospace;white-space:break-spaces;overflow-wrap:anywhere}
pre{tab-size:4;padding-top:1rem;border-top:1px solid GrayText}
.t{padding:.16em 0}
.t:hover,.t:focus{outline:2px solid}
.t:hover::after,.t:focus::after{content:attr(data-tip);position:fixed;inset:auto 0 0;padding:.6rem 1rem}
.t::after{background:Canvas;color:CanvasText;border-top:1px solid GrayText;max-height:9em;overflow:hidden}
.t:hover::after{z-index:1}
.prompt{font-weight:bold}
.nl::before{content:"↵";opacity:.5}
'''


def token_html(text, group, n_iter):
    """One piece of text, see pieces(), as a <span>, with what the bar at the bottom of the page says about it."""
    prompt, depth = group[0].seq is None, depth_of(group)
    tip = [json.dumps(text, ensure_ascii=False) + (', in the prompt' if prompt else ', generated')]
    for step in group:
        if step.depth is None:
            tip.append(f'token {step.token}: nothing predicted it')
        else:
            gates = ', '.join(f'{s:.2g}' for s in step.gates) or 'none'
            tip.append(f'token {step.token}: depth {step.depth} of {n_iter}, NLL {step.nll:.2f} nats '
                       f'(probability {math.exp(-step.nll):.2g}), gates {gates}')
    names = f't d{depth}'
    if prompt:
        names += ' prompt'
    if text.endswith('\n'):
        names += ' nl'
    tip = html.escape(visible('\n'.join(tip)))
    return f'<span class="{names}" tabindex="0" data-tip="{tip}">{html.escape(visible(text))}</span>'


def html_page(title, line, samples, enc, n_iter):
    """One self-contained page. samples: lists of Steps, those of the prompt with seq None."""
    counts = Counter(step.depth for step in chain(*samples) if step.depth)
    colours, legend, texts = '', '', ''
    for d in range(1, n_iter + 1):
        colours += f'.d{d}{{background:light-dark(rgb{colour(d, n_iter, LIGHT)},rgb{colour(d, n_iter, DARK)})}}\n'
        legend += f'<span class="d{d}">&nbsp;{d}: {counts[d] / max(1, counts.total()):.0%}&nbsp;</span> '
    for steps in samples:
        texts += '<pre>' + ''.join(token_html(*piece, n_iter) for piece in pieces(enc, steps)) + '</pre>\n'
    return f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}{colours}</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(line)}</p>
<p>Iterations: {legend} The colour is the number of iterations that were spent on predicting a token; the prompt is
bold. Point at a token, or move with Tab, for its NLL and gate values.</p>
{texts}</body></html>
'''


# -----------------------------------------------------------------------------
# The command

def find_ckpt(ckpt):
    """The Path of a checkpoint; of a run's folder, that of the ckpt.pt in it."""
    path = Path(os.path.expanduser(ckpt))
    return path / 'ckpt.pt' if (path / 'ckpt.pt').is_file() else path


def load_state(path):
    """The dict of a checkpoint of train.py; its meta and its train_config are dicts too, empty where it has none."""
    state = load_checkpoint(path)
    for key in ('meta', 'train_config'):
        state[key] = state.get(key) or {}
        if not isinstance(state[key], dict):
            raise UsageError(f'{path} is damaged or of another version: its {key} is no dict')
    return state


def load(ckpt, dtype):
    """The model of a checkpoint, a run's folder, or a Hugging Face folder or hub name, and its tokenizer."""
    path = find_ckpt(ckpt)
    if path.suffix == '.pt' or path.is_file():
        state = load_state(path)
        return AdaPonderLM.from_state(state, path).to(dtype), load_tokenizer(state['meta'], path.parent)
    if path.is_dir() and not (path / 'config.json').is_file():
        raise UsageError(f"{path} holds neither train.py's ckpt.pt nor Hugging Face's config.json")
    # a hub name has two parts, and the first is no folder here
    if not path.is_dir() and (path.is_absolute() or ckpt.count('/') != 1 or path.parent.is_dir()):
        raise UsageError(f'there is no {path}: give a checkpoint, a folder with one or a hub name like EleutherAI/NAME')
    transformers = optional('transformers', path)
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(path if path.is_dir() else ckpt)
    except (TypeError, RecursionError):
        raise UsageError(f'the config.json in {path} is no JSON object: give another folder') from None
    n_iter = None if 'ponderinglm' in config else 1  # a plain Pythia
    model = AdaPonderLM.from_pretrained(ckpt, n_iter, dtype)
    folder = model.tokenizer_files[0].parent if model.tokenizer_files else path  # a hub name's is in a cache
    meta = folder / 'meta.json'
    if meta.is_file():
        return model, load_tokenizer(read_json(meta), folder)
    return model, load_tokenizer(folder / 'tokenizer.json')


def read_text(data, name):
    """Bytes as text, line ends as they are. A byte order mark is left out. name: for the message."""
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        raise UsageError(f'{name} is not UTF-8 text') from None


def encode(model, enc, text, name):
    """The tokens of a prompt that the model sees, the last block_size ones. name: what messages call it."""
    tokens = enc.encode_ordinary(text)
    if not tokens:
        raise UsageError(f'{name} is empty: give at least one character')
    if max(tokens) >= model.cfg.vocab_size:
        raise UsageError(f'{name} holds token {max(tokens)}, outside the vocabulary of {model.cfg.vocab_size}: '
                         'the tokenizer is not the one that the model was trained with')
    if len(tokens) > model.cfg.block_size:
        print(f'{name} has {len(tokens)} tokens: the model sees the last {model.cfg.block_size}', file=sys.stderr)
    return tokens[-model.cfg.block_size:]


def read_jobs(path):
    """The objects of a file of JSON lines."""
    jobs = []
    for n, line in enumerate(read_text(Path(os.path.expanduser(path)).read_bytes(), path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
            json.dumps(job)  # what is nested too deeply to be written again is refused now
            job['prompt'].encode()  # half a surrogate pair is no text
            if type(n_tokens := job.get('max_new_tokens', 0)) is not int or n_tokens < 0:
                raise ValueError('not a number of tokens')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(f'{path}, line {n}: not a JSON object with a text "prompt", and if it has '
                             '"max_new_tokens", a whole number in it') from None
        jobs.append(job)
    return jobs


def run_batch(args, model, enc, stop):
    """JSON lines in, JSON lines out, in the order of the input.

    Returns (length of the prompt, Steps) of each, and seconds.
    """
    jobs = read_jobs(args.prompts)
    prompts = [encode(model, enc, job['prompt'], f'{args.prompts}: prompt {n}') for n, job in enumerate(jobs, 1)]
    budget = [job.get('max_new_tokens', args.max_new_tokens) for job in jobs]
    generators = [torch.Generator().manual_seed(args.seed + n) for n in range(len(jobs))]
    steps = stream(model, prompts, budget, args.temperature, args.top_k, args.top_p, generators, args.tau,
                   args.max_iter, slots=args.batch, stop_token=stop)
    made, lines = [[] for _ in jobs], []
    start = time.perf_counter()
    for step in tqdm(steps, total=sum(budget), unit='token', dynamic_ncols=True):
        made[step.seq].append(step)
    seconds = time.perf_counter() - start
    for job, steps in zip(jobs, made):
        data = b''.join(token_bytes(enc, step.token) for step in steps if step.token != stop)
        depth = sum(step.depth for step in steps) / len(steps) if steps else None
        result = {**job, 'completion': data.decode(errors='replace'), 'tokens': len(steps), 'mean_depth': depth}
        lines.append(json.dumps(result, ensure_ascii=False) + '\n')
    data = ''.join(lines).encode('utf-8', 'backslashreplace')  # a lone surrogate in another key becomes its escape
    if args.out:
        write_beside(args.out, data)
    else:
        print(data.decode(), end='')
    return [(len(tokens), steps) for tokens, steps in zip(prompts, made)], seconds


def run_samples(args, model, enc, stop):
    """Print args.num_samples continuations of one prompt as they are made.

    Returns (length of the prompt, Steps) of each, seconds, and the Steps of the prompt, see score_prompt().
    """
    if args.prompt is not None:  # bytes that the locale does not know arrive as surrogates
        data = args.prompt.encode('utf-8', 'surrogateescape')
    elif args.prompt_file:
        data = Path(os.path.expanduser(args.prompt_file)).read_bytes()
    else:
        if sys.stdin.isatty():
            print('Type a text to continue, then Ctrl-D on a line of its own.', file=sys.stderr)
        data = sys.stdin.buffer.read()
    tokens = encode(model, enc, read_text(data, args.prompt_file or 'the prompt'), 'the prompt')
    start, K = time.perf_counter(), model.cfg.n_iter
    prompt = score_prompt(model, tokens, tau=args.tau, max_iter=args.max_iter)
    if args.depth:
        legend = ''.join(paint(f' {d} ', d, K) for d in range(1, K + 1))
        print(f'iterations {legend}, the prompt is {paint("bold", None, K, bold=True)}\n')
    runs = []
    for n in range(args.num_samples):
        generator = torch.Generator().manual_seed(args.seed + n)
        steps = stream(model, [tokens], args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator,
                       args.tau, args.max_iter, stop_token=stop)
        if n:
            print('\n' + '-' * 20)
        made = []
        for text, group in pieces(enc, chain(prompt, steps)):
            made += [step for step in group if step.seq is not None]
            if group[-1].token == stop and made:
                text = text.removesuffix(EOT)  # it ends the sample, and is not shown
            if args.depth:
                text = paint(text, depth_of(group), K, bold=group[0].seq is None)
            elif sys.stdout.isatty():
                text = visible(text)
            print(text, end='', flush=True)
        runs.append((len(tokens), made))
    print()
    return runs, time.perf_counter() - start, prompt


def parse(argv):
    """The settings of the command line, checked as far as that goes without the model."""
    p = argparse.ArgumentParser('sample.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--ckpt', required=True, help="train.py's ckpt.pt, or a Hugging Face folder or hub name of a Pythia")
    what = p.add_mutually_exclusive_group()
    what.add_argument('--prompt', help='text to continue; default: standard input')
    what.add_argument('--prompt_file', help='a file with the text to continue')
    what.add_argument('--prompts', help='a file of JSON lines {"prompt": ..., "max_new_tokens": ...}; other keys stay')
    p.add_argument('--batch', type=int, default=8, help='sequences in flight with --prompts (8)')
    p.add_argument('--out', help='where --prompts writes its JSON lines; default: standard output')
    p.add_argument('--max_new_tokens', type=int, default=300, help='(300)')
    p.add_argument('--temperature', type=float, default=0.8, help='0 is greedy (0.8)')
    p.add_argument('--top_k', type=int, help='only the k likeliest tokens')
    p.add_argument('--top_p', type=float, help='only the likeliest tokens that together reach this probability')
    p.add_argument('--num_samples', type=int, default=1, help='continuations (1); sample n has seed + n')
    p.add_argument('--seed', type=int, default=1337, help='(1337)')
    p.add_argument('--tau', type=float, help="halting threshold, default the checkpoint's; larger halts sooner")
    p.add_argument('--max_iter', type=int, help='at most this many iterations a token')
    p.add_argument('--depth', action='store_true', help='colour each token by its depth')
    p.add_argument('--html', metavar='FILE', help='write a page that shows depth, NLL and gates of each token')
    p.add_argument('--ignore_eot', action='store_true', help='go on after <|endoftext|>')
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, mps; default cuda where there is one')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    args = p.parse_args(argv)
    check_sampling(args.temperature, args.top_k, args.top_p)
    if args.max_new_tokens < 0 or args.num_samples < 1 or args.batch < 1 or not 0 <= args.seed < 2 ** 62:
        raise UsageError('max_new_tokens must be at least 0, num_samples and batch at least 1, seed in [0, 2^62)')
    if bool(args.prompts) < bool(args.out) or (args.prompts and (args.html or args.depth or args.num_samples > 1)):
        raise UsageError('--out is for --prompts, and --html, --depth and --num_samples for a single prompt')
    for path in (args.html, args.out):
        if path is not None:
            check_writable(path)
    return args


@torch.inference_mode()
def main(argv=None):
    args = parse(argv)
    from train import get_device  # here, because importing train takes a second, and only the command needs it
    device = get_device(args.device)
    model, enc = load(args.ckpt, getattr(torch, args.dtype))
    model = model.to(device).eval()
    model.check_halting(args.tau, args.max_iter)
    stop = None if args.ignore_eot else enc._special_tokens[EOT]
    if args.prompts:
        runs, seconds = run_batch(args, model, enc, stop)
    else:
        runs, seconds, prompt = run_samples(args, model, enc, stop)
    line = summary(model, runs, seconds, args.max_iter)
    print(line, file=sys.stderr)
    if args.html:
        samples = [prompt + steps for length, steps in runs]
        page = html_page(f'AdaPonderLM, {args.ckpt}', line, samples, enc, model.cfg.n_iter)
        write_beside(args.html, page.encode('utf-8', 'backslashreplace'))
        print(f'wrote {args.html}', file=sys.stderr)


if __name__ == '__main__':
    command_line(main)
