"""
Continues a text with a trained model, and shows how long it thought about each token.

    python sample.py --ckpt out/tiny/ckpt.pt --prompt 'def main(' --depth
    python sample.py --ckpt out/tiny/ckpt.pt --prompt_file story.txt --html depth.html --tau 0.01
    echo 'import os' | python sample.py --ckpt out/tiny/ckpt.pt
    python sample.py --ckpt out/tiny/ckpt.pt --prompts in.jsonl --batch 16 --out out.jsonl

The colour of a token is its depth: the iterations that were spent on predicting it.
"""
import argparse
import codecs
import html
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import AdaPonderLM, check_sampling, load_checkpoint, rope_table, sample
from prepare_data import load_tokenizer

# -----------------------------------------------------------------------------
# The batch engine

class Step(NamedTuple):
    """One generated token. depth and gates belong to the position that predicted it: what was spent on finding this token."""
    seq: int      # index of the prompt that it continues
    token: int
    depth: int    # iterations, 1 .. n_iter
    gates: list   # the gate values that were computed
    nll: float    # nats, under the model itself (temperature 1, nothing cut off)


@dataclass
class Slot:
    """A sequence in flight, and where the token that it runs stands."""
    index: int    # its row of the cache and of the inputs
    seq: int      # index of its prompt
    start: int    # where the context starts in its text
    pos: int      # position of the token in the context
    it: int       # iteration of the token, 0 .. n_iter - 1
    gates: list   # gate values of the token so far


class Places:
    """Where the tokens of one step stand, for slot_attention()."""

    def __init__(self, active, n_iter, device):
        self.slots = [(s.index, s.it, s.pos) for s in active]
        # a token's keys and values go into all later iterations too: that is what those see if the token halts here
        places = [(n, s.index, it, s.pos) for n, s in enumerate(active) for it in range(s.it, n_iter)]
        self.token, self.slot, self.it, self.pos = torch.tensor(places, device=device).unbind(1)


@torch.compiler.disable  # Python loop over slots: nothing to fuse, and its lengths change with each step
def slot_attention(q, k, v, kv, at):
    """One token of each of N slots, each at its own iteration and position. q, k, v: (N, nh, hs), at: Places.

    kv: the layer's cache (2, slots, n_iter, nh, L, hs), written in place. Each token attends to a view of its slot's part.
    """
    kv[:, at.slot, at.it, :, at.pos] = torch.stack([k, v], dim=1)[at.token]  # (M, 2, nh, hs)
    y = []
    for n, (slot, it, pos) in enumerate(at.slots):
        K, V = kv[:, slot, it, None, :, :pos + 1]  # (1, nh, pos + 1, hs) each
        y.append(F.scaled_dot_product_attention(q[n:n + 1, :, None], K, V))
    return torch.cat(y)[:, :, 0], kv


class Engine:
    """The model, and a cache for several sequences. Each slot runs one token, and each token is at its own iteration."""

    def __init__(self, model, slots, length, policy=None, tau=None, max_iter=None):
        weight = model.embed.weight
        self.model, self.policy, self.tau, self.max_iter = model, policy, tau, max_iter
        self.last = (max_iter or model.cfg.n_iter) - 1
        self.device = weight.device
        self.cache = model.new_cache(slots, length)
        self.rope = rope_table(torch.arange(length, device=self.device), model.cfg, weight.dtype)
        self.E = weight.new_zeros(slots, model.cfg.n_embd)  # the input of each slot's token to its present iteration

    def prefill(self, slot, tokens):
        """Run a context (a list of tokens) and fill the slot's part of the cache. Returns the last token's logits (1, vocab)."""
        policy = self.policy
        if policy:  # it is told which prompt this is, as in step()
            def policy(i, s, h, row, pos):
                return self.policy(i, s, h, row + slot.seq, pos)
        idx, cache = torch.tensor([tokens], device=self.device), self.cache[:, :, slot.index:slot.index + 1]
        out = self.model.prefill(idx, cache, policy=policy, tau=self.tau, max_iter=self.max_iter)
        slot.pos, slot.it = len(tokens) - 1, int(out.depth[0, -1]) - 1
        slot.gates = out.gates[0, -1, :min(slot.it + 1, len(out.records))].tolist()
        return self.model.few_logits(out.hidden[:, -1])

    def start(self, slots, tokens):
        """Put newly drawn tokens (N,) into their slots."""
        self.E[[s.index for s in slots]] = self.model.embed_tokens(tokens)
        for slot in slots:
            slot.pos, slot.it, slot.gates = slot.pos + 1, 0, []

    def step(self, active):
        """One iteration of the token of each active slot. Returns the slots whose tokens halted, and their logits (N, vocab)."""
        if not active:
            return [], []
        model = self.model
        row, pos, seq = torch.tensor([(s.index, s.pos, s.seq) for s in active], device=self.device).unbind(1)
        rope, places = [t[pos] for t in self.rope], Places(active, model.cfg.n_iter, self.device)
        h, _ = model.backbone(self.E[row], rope, slot_attention, self.cache.unbind(1), places)  # (N, d)

        # each iteration has a gate of its own, the last has none
        gate = torch.zeros(len(h), device=self.device, dtype=torch.promote_types(h.dtype, torch.float32))
        on = torch.zeros_like(gate, dtype=torch.bool)
        for i in sorted({s.it for s in active} - {self.last}):
            at = torch.tensor([n for n, s in enumerate(active) if s.it == i], device=self.device)
            s, on[at] = model.decide(i, h[at], seq[at], pos[at], self.policy, self.tau)
            gate[at] = s.to(gate.dtype)

        # those that go on get their pondering embedding
        go, halt = on.nonzero()[:, 0], (~on).nonzero()[:, 0]
        e, logits = self.ponder_and_unembed(h[go], h[halt])
        if model.cfg.objective == 'paper':
            e = e * gate[go, None].to(e.dtype)
        self.E.index_add_(0, row[go], e.to(self.E.dtype))
        for slot, s, goes_on in zip(active, gate.tolist(), on.tolist()):
            if slot.it < self.last:
                slot.gates.append(s)
            slot.it += goes_on
        return [active[n] for n in halt.tolist()], [logits]

    def ponder_and_unembed(self, going, halted):
        """What tokens that go on hand on (N, d), and the logits of those that halted (M, vocab), from their states.

        Both begin with a product with the unembedding, the largest of a step: one product makes all of them.
        """
        if self.model.cfg.feedback == 'hidden':
            return self.model.ponder(going), self.model.few_logits(halted)
        logits = self.model.few_logits(torch.cat([self.model.ln_ponder(going), halted]))
        going, halted = logits.split([len(going), len(halted)])
        return self.model.expected_row(going) * self.model.cfg.embed_scale, halted


def draw(logits, generators, temperature, top_k, top_p):
    """A token for each row of logits (N, vocab), with a random number from its generator. Returns tokens and NLLs, (N,) each."""
    u = torch.stack([torch.rand((), generator=g) for g in generators]).to(logits.device)
    tokens = sample(logits, u, temperature, top_k, top_p)
    return tokens, F.cross_entropy(logits.float(), tokens, reduction='none')


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, tau=None, max_iter=None,
           policy=None, slots=1, stop_token=None):
    """Continue many prompts with a KV cache; yields a Step for each new token, as it is made.

    prompts: lists of token ids, of any lengths. max_new_tokens: a number, or one for each prompt.
    slots: sequences in flight. All iterations share their weights, so slots at different iterations of different tokens
    go through the blocks together: a slot whose token halted starts its next token in the very next step, and the slot of a
    finished sequence takes the next prompt.
    generator: a torch.Generator, or a list of one for each prompt: then its text does not depend on what runs beside it.
    temperature, top_k, top_p: see model.sample(). tau, max_iter, policy: see AdaPonderLM.decide(); row is the prompt's index.
    stop_token: ends a sequence, and is yielded. A text that outgrows block_size goes on with its last part, see
    AdaPonderLM.window(). Raises ValueError for an empty prompt, unknown tokens and numbers outside their range.
    """
    model.check_max_iter(max_iter)
    check_sampling(temperature, top_k, top_p)
    texts = [list(p) for p in prompts]
    if any(not t or min(t) < 0 or max(t) >= model.cfg.vocab_size for t in texts):
        raise ValueError(f'prompts must have at least one token, and tokens from 0 to {model.cfg.vocab_size - 1}')
    budget = [max_new_tokens] * len(texts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    generators = generator if isinstance(generator, list) else [generator] * len(texts)
    if not len(texts) == len(budget) == len(generators):
        raise ValueError(f'{len(texts)} prompts, {len(budget)} numbers of new tokens, {len(generators)} generators')

    slots = min(slots, len(texts))
    length = min(model.cfg.block_size, max((len(t) + n for t, n in zip(texts, budget)), default=1))
    engine = Engine(model, slots, length, policy, tau, max_iter)
    waiting = deque(seq for seq, n in enumerate(budget) if n > 0)
    active, free = [], list(range(slots))
    while waiting or active:
        # free slots take the next prompts, the others run one iteration of their tokens
        admitted, logits = [], []
        while waiting and free:
            seq = waiting.popleft()
            start = model.window(len(texts[seq]))
            admitted.append(Slot(free.pop(), seq, start, pos=0, it=0, gates=[]))
            logits.append(engine.prefill(admitted[-1], texts[seq][start:]))
        halted, logits_halted = engine.step(active)
        active += admitted
        ready = admitted + halted
        if not ready:
            continue

        # draw the tokens that follow those that halted
        tokens, nlls = draw(torch.cat(logits + logits_halted), [generators[s.seq] for s in ready], temperature, top_k, top_p)
        for slot, token, nll in zip(ready, tokens.tolist(), nlls.tolist()):
            yield Step(slot.seq, token, slot.it + 1, slot.gates, nll)
            texts[slot.seq].append(token)
            budget[slot.seq] -= 1
            finished = budget[slot.seq] == 0 or token == stop_token
            outgrown = model.window(len(texts[slot.seq])) != slot.start
            if outgrown and not finished:  # it comes in anew, as a prompt
                waiting.appendleft(slot.seq)
            if outgrown or finished:
                active.remove(slot)
                free.append(slot.index)
        engine.start(ready, tokens)


# -----------------------------------------------------------------------------
# Showing depth

# Backgrounds of depth 1 .. n_iter, (r, g, b): text on them is black, or white where the page is dark
LIGHT = [(226, 240, 252), (255, 243, 196), (255, 203, 128), (244, 132, 110)]
DARK = [(30, 44, 60), (66, 58, 26), (134, 78, 18), (178, 46, 48)]
CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')  # all but tab and line feed: a terminal would obey them


def fail(message):
    """One sentence on stderr, exit code 2."""
    print(f'sample.py: {message}', file=sys.stderr)
    raise SystemExit(2)


def colour(depth, n_iter, stops=LIGHT):
    """(r, g, b) of a depth, between the stops where n_iter is not their number."""
    x = (depth - 1) / max(1, n_iter - 1) * (len(stops) - 1)
    i = min(int(x), len(stops) - 2)
    return tuple(round(a + (b - a) * (x - i)) for a, b in zip(stops[i], stops[i + 1]))


def visible(text):
    return CONTROL.sub(lambda c: f'\\x{ord(c[0]):02x}', text)


def paint(text, depth, n_iter, bold=False):
    """text on the colour of its depth: the terminal's 24-bit colours, or its 256 where it does not say that it has more."""
    style = '1' if bold else '0'
    if depth:
        rgb = colour(depth, n_iter)
        if os.environ.get('COLORTERM') in ('truecolor', '24bit'):
            style += ';38;2;0;0;0;48;2;{};{};{}'.format(*rgb)
        else:  # the colour cube's six levels are 0, 95, 135, 175, 215, 255
            r, g, b = ((c > 47) + max(0, (c - 75) // 40) for c in rgb)
            style += f';38;5;16;48;5;{16 + 36 * r + 6 * g + b}'
    lines = visible(text).replace('\t', '    ').replace('\n', '↵\n' if depth else '\n').split('\n')  # a line break has a depth too
    return '\n'.join(f'\x1b[{style}m{line}\x1b[0m' if line else line for line in lines)


def token_bytes(enc, token):
    """Nothing for the numbers that pad a vocabulary."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b''


def pieces(enc, steps):
    """(text, steps) pairs: tokens that end in the middle of a character wait for the rest, and are shown with it as one."""
    decoder, text, group = codecs.getincrementaldecoder('utf-8')('replace'), '', []
    for s in steps:
        group.append(s)
        text += decoder.decode(token_bytes(enc, s.token))
        if not decoder.getstate()[0]:
            yield text, group
            text, group = '', []
    if group:
        yield text + decoder.decode(b'', True), group


def depth_of(group):
    """The depth to show for the tokens of one text: the largest; None for a text's first token, which nothing predicted."""
    return max((s.depth for s in group if s.depth), default=None)


@torch.inference_mode()
def read(model, tokens, tau, max_iter, execution='packed'):
    """A Step for each token of a text that is already there, seq None: what was spent on predicting it, its gates and NLL."""
    steps = [Step(None, tokens[0], None, [], None)]
    if len(tokens) > 1:
        x = torch.tensor([tokens], device=model.embed.weight.device)
        out = model(x[:, :-1], x[:, 1:], execution=execution, tau=tau, max_iter=max_iter)
        for t, d, g, nll in zip(tokens[1:], out.depth[0].tolist(), out.gates[0].tolist(), out.nll[0].tolist()):
            steps.append(Step(None, t, d, g[:min(d, (max_iter or model.cfg.n_iter) - 1)], nll))
    return steps


def stream_without_cache(model, tokens, n, temperature, top_k, top_p, generator, tau, max_iter, execution, stop_token):
    """As model.stream() of one prompt, by running the whole text again for each token: slow, and the same text."""
    tokens = list(tokens)
    for _ in range(n):
        window = model.window(len(tokens))
        x = torch.tensor([tokens], device=model.embed.weight.device)
        tokens.append(int(model.generate(x, 1, temperature, top_k, top_p, generator, tau, max_iter, execution=execution)[0, -1]))
        yield read(model, tokens[window:], tau, max_iter, execution)[-1]._replace(seq=0)
        if tokens[-1] == stop_token:
            return


def summary(model, runs, seconds, max_iter):
    """One line of figures. runs: (tokens of the prompt, Steps made) of each text. FLOPs are compared with the same model at fixed depth n_iter."""
    K, fixed = model.cfg.n_iter, replace(model.cfg, halting=False)
    n, depth, spent, full = 0, 0, 0.0, 0.0
    for length, steps in runs:
        for at, s in enumerate(steps, length):
            context = at - model.window(at)
            n, depth = n + 1, depth + s.depth
            spent += model.cfg.inference_flops(s.depth, context, max_iter)
            full += fixed.inference_flops(K, context)
    if not n:
        return 'no tokens made'
    return f'{n} tokens, {n / seconds:.0f} tokens/s, mean depth {depth / n:.2f} of {K}, {1 - spent / full:.1%} of the FLOPs of fixed depth {K} saved'


STYLE = '''
:root{color-scheme:light dark;--page:#fff;--text:#1c1c1e;--soft:#6b6b70;--line:#dcdce0;--bar:#f4f4f6}
@media(prefers-color-scheme:dark){:root{--page:#161618;--text:#e4e4e8;--soft:#9a9aa2;--line:#3a3a40;--bar:#222226}}
body{font:16px/1.5 system-ui,sans-serif;max-width:58rem;margin:0 auto;padding:1.5rem 1rem 11rem;background:var(--page);color:var(--text)}
h1{font-size:1.15rem;margin:0}p{margin:.3rem 0;color:var(--soft);font-size:.9rem}ul{display:flex;padding:0;margin:1rem 0 0;list-style:none;font-size:.8rem}
li{padding:.15rem .5rem;overflow:hidden;white-space:nowrap;flex:1 0 auto}li:first-child{border-radius:.3rem 0 0 .3rem}li:last-child{border-radius:0 .3rem .3rem 0}
pre{font:14px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;margin:1rem 0;padding-top:1rem;border-top:1px solid var(--line)}
.t{padding:.16em 0;cursor:default}.t:hover,.t:focus{outline:2px solid var(--text);outline-offset:-1px}.prompt{font-weight:bold}.nl::before{content:"↵";opacity:.5}
#tip{position:fixed;inset:auto 0 0;background:var(--bar);border-top:1px solid var(--line)}
#tip div{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;max-width:58rem;margin:0 auto;padding:.6rem 1rem;min-height:3em;max-height:9em;overflow:auto}
'''
SCRIPT = '''
const tip = document.querySelector('#tip div')
for (const e of document.querySelectorAll('.t')) for (const v of ['mouseenter', 'focus']) e.addEventListener(v, () => tip.textContent = e.dataset.tip)
'''


def write_html(path, title, line, samples, enc, n_iter):
    """One self-contained page. samples: lists of Steps, those of the prompt with seq None."""
    depths = range(1, n_iter + 1)
    colours = ['.d{}{{background:rgb{}}}'.format(d, colour(d, n_iter, LIGHT)) for d in depths]
    dark = ['.d{}{{background:rgb{}}}'.format(d, colour(d, n_iter, DARK)) for d in depths]
    count = [sum(s.depth == d for steps in samples for s in steps) for d in depths]
    legend = [f'<li class="d{d}" style="flex-grow:{c}">{d}: {c / max(1, sum(count)):.0%}</li>' for d, c in zip(depths, count)]
    texts = []
    for steps in samples:
        spans = []
        for text, group in pieces(enc, steps):
            made, depth = group[0].seq is not None, depth_of(group)
            tip = [f'{json.dumps(text, ensure_ascii=False)}, {"generated" if made else "in the prompt"}']
            for s in group:
                tip.append(f'token {s.token}: ' + (f'depth {s.depth} of {n_iter}, NLL {s.nll:.2f} nats (probability {math.exp(-s.nll):.2g}), gates '
                           + (', '.join(f'{g:.2g}' for g in s.gates) or 'none') if s.depth else 'the first, nothing predicted it'))
            kind = ' '.join(['t'] + [f'd{depth}'] * bool(depth) + ['prompt'] * (not made) + ['nl'] * (text[-1:] == '\n'))
            spans.append(f'<span class="{kind}" tabindex="0" data-tip="{html.escape(visible(chr(10).join(tip)))}">{html.escape(visible(text))}</span>')
        texts.append(f'<pre>{"".join(spans)}</pre>')
    page = ['<!doctype html>', '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">',
            f'<title>{html.escape(title)}</title>', f'<style>{STYLE}{"".join(colours)}', f'@media(prefers-color-scheme:dark){{{"".join(dark)}}}</style></head><body>',
            f'<h1>{html.escape(title)}</h1><p>{html.escape(line)}</p><ul>{"".join(legend)}</ul>',
            '<p>The colour is the number of iterations that were spent on predicting a token. The prompt is bold.</p>', *texts,
            '<div id="tip" aria-live="polite"><div>Point at a token, or move with Tab: depth, NLL and gates stand here.</div></div>',
            f'<script>{SCRIPT}</script></body></html>']
    Path(f'{path}.tmp').write_text('\n'.join(page), encoding='utf-8')
    os.replace(f'{path}.tmp', path)


def load(a):
    """The model, its tokenizer, and the token that ends a text."""
    try:
        path = Path(a.ckpt)
        path = path / 'ckpt.pt' if (path / 'ckpt.pt').is_file() else path
        if path.is_dir() and not (path / 'config.json').is_file():
            fail(f"{path} holds neither train.py's ckpt.pt nor Hugging Face's config.json")
        if path.suffix == '.pt':
            state = load_checkpoint(path)
            model, meta, folder = AdaPonderLM.from_state(state), state['meta'], path.parent
            enc = load_tokenizer({**meta, 'tokenizer': a.tokenizer} if a.tokenizer else meta, '' if a.tokenizer else folder)
        else:
            path = find_pretrained(a.ckpt)
            folder = path if path.is_dir() else path.parent
            vanilla = 'ponderinglm' not in read_json(folder / 'config.json')
            model = AdaPonderLM.from_pretrained(path, n_iter=1 if vanilla else None, dtype=getattr(torch, a.dtype))
            enc = load_tokenizer(a.tokenizer or folder / 'tokenizer.json')
        model = model.to(a.device, getattr(torch, a.dtype)).eval()
        model.check_max_iter(a.max_iter)
    except (OSError, ValueError, RuntimeError, AssertionError) as e:  # torch has its own for a device that is not there
        fail(e)
    return model, enc, enc._special_tokens['<|endoftext|>']


def encode(model, enc, text, what='the prompt'):
    try:
        text.encode()
    except UnicodeEncodeError:
        fail(f'{what} is not UTF-8 text')
    tokens = enc.encode_ordinary(text)
    if not tokens:
        fail(f'{what} is empty: give at least one character')
    if max(tokens) >= model.cfg.vocab_size:
        fail(f'{what} holds token {max(tokens)}, outside the vocabulary of {model.cfg.vocab_size}: the tokenizer is not the one that the model was trained with')
    if len(tokens) > model.cfg.block_size:
        fail(f'{what} has {len(tokens)} tokens, more than block_size = {model.cfg.block_size}: shorten it')
    return tokens


def read_text(path):
    """The UTF-8 text of a file, or of standard input for None, line ends as they are."""
    try:
        return (Path(path).read_bytes() if path else sys.stdin.buffer.read()).decode()
    except OSError as e:
        fail(f'{path} cannot be read: {e.strerror}')
    except UnicodeDecodeError:
        fail(f'{path or "standard input"} is not UTF-8 text')


def run_batch(a, model, enc, stop):
    """JSON lines in, JSON lines out, in the order of the input, each written as soon as all before it are done. Returns (prompt length, Steps) of each, and seconds."""
    jobs, prompts = [], []
    for n, line in enumerate(read_text(a.prompts).split('\n'), 1):
        if line.strip():
            try:
                job = json.loads(line)
                if type(job['prompt']) is not str or type(job.get('max_new_tokens', 0)) is not int or job.get('max_new_tokens', 0) < 0:
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                fail(f'{a.prompts}, line {n}: not a JSON object with a string "prompt", and if anything a whole number "max_new_tokens"')
            jobs.append(job)
            prompts.append(encode(model, enc, job['prompt'], f'{a.prompts}, line {n}: the prompt'))
    budget = [job.get('max_new_tokens', a.max_new_tokens) for job in jobs]
    rngs = [torch.Generator().manual_seed(a.seed + n) for n in range(len(jobs))]
    stream = model.stream(prompts, budget, a.temperature, a.top_k, a.top_p, rngs, a.tau, a.max_iter, slots=a.batch, stop_token=stop)
    made, ended, start = [[] for _ in jobs], [n == 0 for n in budget], time.perf_counter()
    out = open(f'{a.out}.tmp', 'w', encoding='utf-8', errors='backslashreplace') if a.out else sys.stdout
    with tqdm(total=len(jobs), initial=sum(ended), unit='prompt', dynamic_ncols=True) as bar:
        for job, steps, n in zip(jobs, made, range(len(jobs))):
            while not ended[n]:
                s = next(stream)
                made[s.seq].append(s)
                if len(made[s.seq]) == budget[s.seq] or s.token == stop:
                    ended[s.seq] = True
                    bar.update()
            text = b''.join(token_bytes(enc, s.token) for s in steps if s.token != stop).decode(errors='replace')
            depth = sum(s.depth for s in steps) / len(steps) if steps else None
            tqdm.write(json.dumps({**job, 'completion': text, 'tokens': len(steps), 'mean_depth': depth}, ensure_ascii=False), file=out)
            out.flush()
    if a.out:
        out.close()
        os.replace(f'{a.out}.tmp', a.out)
    return [(len(p), steps) for p, steps in zip(prompts, made)], time.perf_counter() - start


def run_samples(a, model, enc, stop):
    """Print a.num_samples continuations of one prompt as they are made. Returns (prompt length, Steps) of each, seconds, and the prompt's Steps."""
    if a.prompt is None and not a.prompt_file and sys.stdin.isatty():
        print('Type a text to continue, then Ctrl-D on a line of its own.', file=sys.stderr)
    text = a.prompt if a.prompt is not None else read_text(a.prompt_file)
    tokens, K = encode(model, enc, text), model.cfg.n_iter
    start, prompt = time.perf_counter(), read(model, tokens, a.tau, a.max_iter)
    if a.depth:
        print('iterations ' + ''.join(paint(f' {d} ', d, K) for d in range(1, K + 1)) + ', the prompt is ' + paint('bold', None, K, True) + '\n')
    runs = []
    for n in range(a.num_samples):
        made = []
        args = (a.max_new_tokens, a.temperature, a.top_k, a.top_p, [torch.Generator().manual_seed(a.seed + n)], a.tau, a.max_iter)
        if a.execution == 'cached':
            steps = model.stream([tokens], *args, stop_token=stop)
        else:
            steps = stream_without_cache(model, tokens, *args, a.execution, stop)

        def shown():
            for s in steps:
                made.append(s)
                if s.token != stop:
                    yield s
        if n:
            print('\n' + '-' * 20)
        for text, group in pieces(enc, chain(prompt, shown())):
            if a.depth:
                text = paint(text, depth_of(group), K, group[0].seq is None)
            print(visible(text) if sys.stdout.isatty() and not a.depth else text, end='', flush=True)
        runs.append((len(tokens), made))
    print()
    return runs, time.perf_counter() - start, prompt


def main(argv=None):
    p = argparse.ArgumentParser(prog='sample.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--ckpt', required=True, help="train.py's ckpt.pt, or a Hugging Face folder or hub name of a Pythia")
    p.add_argument('--tokenizer', help="a tokenizer file, where it is not the one beside the checkpoint")
    what = p.add_mutually_exclusive_group()
    what.add_argument('--prompt', help='text to continue; default: standard input')
    what.add_argument('--prompt_file', help='a file with the text to continue')
    what.add_argument('--prompts', help='a file of JSON lines {"prompt": ..., "max_new_tokens": ...}; other keys are carried through')
    p.add_argument('--batch', type=int, default=8, help='sequences in flight with --prompts (8)')
    p.add_argument('--out', help='where --prompts writes its JSON lines; default: standard output')
    p.add_argument('--max_new_tokens', type=int, default=300, help='(300)')
    p.add_argument('--temperature', type=float, default=0.8, help='0 is greedy (0.8)')
    p.add_argument('--top_k', type=int, help='only the k likeliest tokens')
    p.add_argument('--top_p', type=float, help='only the likeliest tokens that together reach this probability')
    p.add_argument('--num_samples', type=int, default=1)
    p.add_argument('--seed', type=int, default=1337)
    p.add_argument('--tau', type=float, help="halting threshold, default the checkpoint's; larger halts sooner")
    p.add_argument('--max_iter', type=int, help='at most this many iterations a token')
    p.add_argument('--execution', choices=('cached', 'packed', 'dense'), default='cached', help='the same text three ways; only cached is fast')
    p.add_argument('--depth', action='store_true', help='colour each token by its depth')
    p.add_argument('--html', metavar='FILE', help='write a page that shows depth, NLL and gates of each token')
    p.add_argument('--ignore_eot', action='store_true', help='go on after <|endoftext|>')
    p.add_argument('--compile', action='store_true', help='torch.compile the decoding: slower to start, then faster; for many tokens')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    a = p.parse_args(argv)
    if not a.temperature >= 0 or (a.top_k is not None and a.top_k < 1) or (a.top_p is not None and not 0 < a.top_p <= 1):
        fail('temperature must be >= 0, top_k at least 1, top_p in (0, 1]')
    if a.tau is not None and not 0 <= a.tau < 1:
        fail(f'tau must be in [0, 1), not {a.tau}')
    if min(a.max_new_tokens, a.num_samples - 1, a.batch - 1) < 0:
        fail('max_new_tokens must be at least 0, num_samples and batch at least 1')
    if a.prompts and (a.html or a.depth or a.num_samples > 1 or a.execution != 'cached'):
        fail('--prompts writes JSON lines: --html, --depth, --num_samples and --execution do not go with it')
    if a.out and not a.prompts:
        fail('--out is for --prompts: redirect standard output instead')
    for file in filter(None, (a.html, a.out)):
        if not os.access(Path(file).parent, os.W_OK):
            fail(f'{file} cannot be written: no folder {Path(file).parent} that allows it')
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')  # whatever the locale: text is UTF-8 here

    if a.compile and a.device == 'cpu' and not any(map(shutil.which, (os.environ.get('CXX', 'g++'), 'clang++', 'cl'))):
        fail('--compile needs a C++ compiler on a CPU: install g++, or leave it out')

    model, enc, eot = load(a)
    if a.compile:
        model.compile_decoding()
    runs, seconds, *prompt = (run_batch if a.prompts else run_samples)(a, model, enc, None if a.ignore_eot else eot)
    line = summary(model, runs, seconds, a.max_iter)
    print(line, file=sys.stderr)
    if a.html:
        settings = ''.join(f', {k} {v}' for k in ('seed', 'temperature', 'top_k', 'top_p', 'tau', 'max_iter') if (v := getattr(a, k)) is not None)
        write_html(a.html, f'AdaPonderLM, {a.ckpt}', line + settings, [prompt[0] + steps for _, steps in runs], enc, model.cfg.n_iter)
        print(f'wrote {a.html}', file=sys.stderr)


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end as quietly as other filters when `| head` has read enough
    try:
        main()
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        raise SystemExit(130)
