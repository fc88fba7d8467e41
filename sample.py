"""
Continues a text with a trained model, and shows how long it thought about each token.

    python sample.py --ckpt out/tiny/ckpt.pt --prompt 'def main(' --depth
    python sample.py --ckpt out/tiny/ckpt.pt --prompt_file story.txt --html depth.html --tau 0.01
    echo 'import os' | python sample.py --ckpt out/tiny/ckpt.pt
    python sample.py --ckpt out/tiny/ckpt.pt --prompts in.jsonl --batch 16 --out out.jsonl

The colour of a token is the number of iterations that were spent on predicting it.
"""
import argparse
import codecs
import html
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import AdaPonderLM, load_checkpoint
from prepare_data import load_tokenizer

# depth 1 .. n_iter, pale to strong, as (r, g, b); black text on the pale half, white on the rest
RAMP = [(222, 235, 247), (158, 202, 225), (253, 174, 97), (215, 48, 39)]


def fail(message):
    """One sentence on stderr, exit code 2."""
    print(f'sample.py: {message}', file=sys.stderr)
    raise SystemExit(2)


def colour(depth, n_iter):
    """Background and text colour of a depth, two (r, g, b)."""
    x = (depth - 1) / max(1, n_iter - 1) * (len(RAMP) - 1)
    i = min(int(x), len(RAMP) - 2)
    back = tuple(round(a + (b - a) * (x - i)) for a, b in zip(RAMP[i], RAMP[i + 1]))
    return back, (0, 0, 0) if sum(back) > 430 else (255, 255, 255)


def paint(text, depth, n_iter):
    """text on the background of its depth, in the terminal's 24-bit colours, or its 256 where it does not say that it has more."""
    if depth is None:
        return text
    back, front = colour(depth, n_iter)
    if os.environ.get('COLORTERM') in ('truecolor', '24bit'):
        code = '48;2;{};{};{};38;2;{};{};{}'.format(*back, *front)
    else:
        cube = [16 + 36 * round(r / 51) + 6 * round(g / 51) + round(b / 51) for r, g, b in (back, front)]
        code = '48;5;{};38;5;{}'.format(*cube)
    shown = ''.join(c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text.replace('\t', '    '))
    return '\n'.join(f'\x1b[{code}m{line}\x1b[0m' if line else '' for line in shown.split('\n'))  # a coloured newline would paint the whole row


class Pieces:
    """Tokens to text: a token that ends in the middle of a character waits for the rest, and they are shown as one."""

    def __init__(self, enc):
        self.enc = enc
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.waiting = []

    def add(self, record, final=False):
        """record: dict with 'token', 'depth', 'gates', 'nll'. Returns (text, records that make it) when a text is complete, else None."""
        self.waiting.append(record)
        return self.flush(self.enc.decode_single_token_bytes(record['token']), final)

    def flush(self, data=b'', final=True):
        text = self.decoder.decode(data, final)
        if not text or not self.waiting:
            return None
        done, self.waiting = self.waiting, []
        return text, done


def group_depth(records):
    """The depth to show for the tokens of one text: the largest."""
    return max((r['depth'] for r in records if r['depth']), default=None)


@torch.inference_mode()
def read_prompt(model, tokens, tau, max_iter):
    """A record for each prompt token, as sample.py shows them: what was spent on predicting it, None for the first."""
    start = model.window(len(tokens))
    records = [dict(token=t, depth=None, gates=[], nll=None) for t in tokens]
    if len(tokens) - start > 1:
        x = torch.tensor([tokens[start:]], device=model.embed.weight.device)
        out = model(x[:, :-1], x[:, 1:], execution='packed', tau=tau, max_iter=max_iter)
        for r, d, g, n in zip(records[start + 1:], out.depth[0].tolist(), out.gates[0].tolist(), out.nll[0].tolist()):
            r.update(depth=d, gates=g[:d], nll=n)
    return records


def stream_without_cache(model, tokens, n, temperature, top_k, top_p, generator, tau, max_iter, execution, stop_token):
    """As model.stream() of one prompt, by running the whole text again for each token: slow, and the same text."""
    tokens = list(tokens)
    rng = generator[0]
    for _ in range(n):
        grown = torch.tensor([tokens], device=model.embed.weight.device)
        tokens.append(int(model.generate(grown, 1, temperature, top_k, top_p, [rng], tau, max_iter, execution=execution)[0, -1]))
        yield read_prompt(model, tokens, tau, max_iter)[-1]
        if tokens[-1] == stop_token:
            return


def write_html(path, title, summary, samples, enc, n_iter):
    """One self-contained page. samples: lists of records; 'new' marks the generated ones."""
    colours = ''.join('.d{}{{background:rgb({},{},{});color:rgb({},{},{})}}'.format(d, *colour(d, n_iter)[0], *colour(d, n_iter)[1]) for d in range(1, n_iter + 1))
    legend = ''.join(f'<span class="key d{d}">{d}</span>' for d in range(1, n_iter + 1))
    body = []
    for records in samples:
        spans, pieces = [], Pieces(enc)
        for n, r in enumerate(records):
            done = pieces.add(r, n == len(records) - 1)
            if done:
                text, group = done
                depth = group_depth(group)
                lines = [f'{"generated" if group[-1].get("new") else "prompt"} · {text!r}']
                for q in group:
                    if q['depth']:
                        gates = ' '.join(f'{g:.2g}' for g in q['gates']) or 'none'
                        lines.append(f'token {q["token"]} · depth {q["depth"]} of {n_iter} · NLL {q["nll"]:.2f} · gates {gates}')
                    else:
                        lines.append(f'token {q["token"]} · the first, not predicted')
                kind = ('t' + (f' d{depth}' if depth else '') + (' new' if group[-1].get('new') else ''))
                spans.append(f'<span class="{kind}" tabindex="0" data-tip="{html.escape(chr(10).join(lines))}">{html.escape(text)}</span>')
        counts = [sum(r['depth'] == d for r in records) for d in range(1, n_iter + 1)]
        bars = ''.join(f'<div class="bar d{d}" style="width:{100 * c / max(1, sum(counts)):.1f}%" title="{c} tokens at depth {d}"></div>' for d, c in enumerate(counts, 1))
        body.append(f'<div class="bars">{bars}</div><pre>{"".join(spans)}</pre>')
    page = f'''<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;background:#fff;color:#222}}
pre{{font:14px/1.75 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}}.t{{border-radius:2px;padding:.12em 0;cursor:default}}.new{{border-bottom:2px solid #888}}
.t:hover,.t:focus{{outline:2px solid #555}}.key{{padding:0 .7em;border-radius:3px;margin-right:.3em}}.bars{{display:flex;height:.6rem;border-radius:4px;overflow:hidden;margin-top:1.5rem}}
#tip{{position:fixed;left:0;right:0;bottom:0;padding:.5rem 1rem;min-height:3.2em;background:#eee;color:#222;font:13px/1.5 ui-monospace,monospace;white-space:pre-wrap;border-top:1px solid #ccc}}
body{{padding-bottom:6rem}}{colours}@media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}}#tip{{background:#262626;color:#ddd;border-color:#444}}}}</style>
<h1>{html.escape(title)}</h1><p>Passes through the network spent on each token: {legend} &nbsp; generated text is underlined. Hover, or move with Tab.</p>
<p>{html.escape(summary)}</p>{"".join(body)}<div id="tip" aria-live="polite"></div>
<script>for(const e of document.querySelectorAll('.t'))for(const v of['mouseenter','focus'])e.addEventListener(v,()=>document.getElementById('tip').textContent=e.dataset.tip)</script></html>'''
    Path(f'{path}.tmp').write_text(page, encoding='utf-8')
    os.replace(f'{path}.tmp', path)


def read_jobs(path):
    """The JSON lines of a --prompts file."""
    if not Path(path).is_file():
        fail(f'no prompts file {path}')
    jobs = []
    for n, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip():
            try:
                job = json.loads(line)
                if not isinstance(job['prompt'], str) or not isinstance(job.get('max_new_tokens', 0), int):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                fail(f'{path}, line {n}: not a JSON object with a string under "prompt"')
            jobs.append(job)
    return jobs


def run_batch(a, model, enc, jobs, stop):
    """JSON lines in, JSON lines out, in the order of the input, each written as soon as all before it are done."""
    prompts = [encode(model, enc, j['prompt'], f'{a.prompts}, prompt {n}') for n, j in enumerate(jobs, 1)]
    budget = [j.get('max_new_tokens', a.max_new_tokens) for j in jobs]
    made, left, written = [[] for _ in jobs], list(budget), 0
    rngs = [torch.Generator().manual_seed(a.seed + n) for n in range(len(jobs))]
    temporary = a.out and f'{a.out}.tmp'
    out = open(temporary, 'w') if a.out else sys.stdout
    t = time.time()
    with tqdm(total=len(jobs), unit='prompt', dynamic_ncols=True) as bar:
        def write():
            nonlocal written
            while written < len(jobs) and left[written] <= 0:
                steps, job = made[written], jobs[written]
                text = enc.decode([s.token for s in steps if s.token != stop and s.token < enc.n_vocab])
                depth = sum(s.depth for s in steps) / len(steps) if steps else None
                print(json.dumps({**job, 'completion': text, 'tokens': len(steps), 'mean_depth': depth}, ensure_ascii=False), file=out, flush=True)
                written += 1
                bar.update()
        write()
        for s in model.stream(prompts, budget, a.temperature, a.top_k, a.top_p, rngs, a.tau, a.max_iter, slots=a.batch, stop_token=stop):
            made[s.seq].append(s)
            left[s.seq] -= 1
            if s.token == stop:
                left[s.seq] = 0
            if left[s.seq] == 0:
                write()
    if a.out:
        out.close()
        os.replace(temporary, a.out)
    return [s._asdict() for steps in made for s in steps], time.time() - t


def encode(model, enc, text, what='the prompt'):
    tokens = enc.encode_ordinary(text)
    if not tokens:
        fail(f'{what} is empty: give at least one character')
    if max(tokens) >= model.cfg.vocab_size:
        fail(f'{what} holds token {max(tokens)}, outside the vocabulary of {model.cfg.vocab_size}: the tokenizer is not the one that the model was trained with')
    if len(tokens) > model.cfg.block_size:
        fail(f'{what} has {len(tokens)} tokens, more than block_size = {model.cfg.block_size}: shorten it')
    return tokens


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--ckpt', required=True, help='a ckpt.pt of train.py')
    p.add_argument('--prompt', help='text to continue; default: standard input')
    p.add_argument('--prompt_file', help='a file with the text to continue')
    p.add_argument('--prompts', help='a file of JSON lines {"prompt": ..., "max_new_tokens": ...}; other keys are carried through')
    p.add_argument('--batch', type=int, default=8, help='sequences in flight with --prompts')
    p.add_argument('--out', help='where --prompts writes its JSON lines; default: standard output')
    p.add_argument('--max_new_tokens', type=int, default=300)
    p.add_argument('--temperature', type=float, default=0.8, help='0 is greedy')
    p.add_argument('--top_k', type=int, help='only the k likeliest tokens')
    p.add_argument('--top_p', type=float, help='only the likeliest tokens that together reach this probability')
    p.add_argument('--num_samples', type=int, default=1)
    p.add_argument('--seed', type=int, default=1337)
    p.add_argument('--tau', type=float, help="halting threshold, default the checkpoint's; larger halts sooner")
    p.add_argument('--max_iter', type=int, help='at most this many iterations a token')
    p.add_argument('--execution', choices=('cached', 'packed', 'dense'), default='cached', help='the same text three ways; only cached is fast')
    p.add_argument('--depth', action='store_true', help='colour each token by its depth')
    p.add_argument('--html', help='write a page to hover over')
    p.add_argument('--ignore_eot', action='store_true', help='go on after <|endoftext|>')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    a = p.parse_args()
    try:
        state = load_checkpoint(a.ckpt)
        meta = state['meta']
        model = AdaPonderLM.from_state(state).to(a.device, getattr(torch, a.dtype)).eval()
        model.check_max_iter(a.max_iter)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    enc = load_tokenizer(meta, Path(a.ckpt).parent)
    if a.temperature < 0 or (a.top_k is not None and a.top_k < 1) or (a.top_p is not None and not 0 < a.top_p <= 1):
        fail('temperature must be >= 0, top_k at least 1, top_p in (0, 1]')
    if a.tau is not None and not 0 <= a.tau < 1:
        fail(f'tau must be in [0, 1), not {a.tau}')
    if min(a.max_new_tokens, a.num_samples - 1, a.batch - 1) < 0:
        fail('max_new_tokens must be at least 0, num_samples and batch at least 1')
    stop = None if a.ignore_eot else meta['eot']
    K = model.cfg.n_iter

    if a.prompts:
        made, seconds = run_batch(a, model, enc, read_jobs(a.prompts), stop)
    else:
        if a.prompt_file and not Path(a.prompt_file).is_file():
            fail(f'no prompt file {a.prompt_file}')
        try:
            text = a.prompt if a.prompt is not None else Path(a.prompt_file).read_text() if a.prompt_file else sys.stdin.read()
        except UnicodeDecodeError:
            fail('the prompt is not UTF-8 text')
        tokens = encode(model, enc, text)
        shown = read_prompt(model, tokens, a.tau, a.max_iter)
        if a.depth:
            print('iterations: ' + ' '.join(paint(f' {d} ', d, K) for d in range(1, K + 1)) + '\n')
        made, samples, seconds = [], [], 0.0
        for n in range(a.num_samples):
            pieces = Pieces(enc)

            def show(done):
                if done:
                    sys.stdout.write(paint(done[0], group_depth(done[1]), K) if a.depth else done[0])
                    sys.stdout.flush()
            for r in shown:
                show(pieces.add(r))
            t = time.time()
            args = (a.temperature, a.top_k, a.top_p, [torch.Generator().manual_seed(a.seed + n)], a.tau, a.max_iter)
            if a.execution == 'cached':
                steps = (dict(s._asdict()) for s in model.stream([tokens], a.max_new_tokens, *args, stop_token=stop))
            else:
                steps = stream_without_cache(model, tokens, a.max_new_tokens, *args, a.execution, stop)
            mine = []
            for r in steps:
                if r['token'] == stop or r['token'] >= enc.n_vocab:
                    made.append(r)
                    continue  # nothing to show: the end, or padding of the vocabulary
                mine.append(dict(r, new=True))
                show(pieces.add(mine[-1]))
            show(pieces.flush())
            seconds += time.time() - t
            made += mine
            samples.append([dict(r) for r in shown] + mine)
            print('\n' if n + 1 < a.num_samples else '')
    if made:
        context = (model.cfg.block_size + 1) / 2
        spent = sum(float(model.cfg.inference_flops(r['depth'], context, a.max_iter)) for r in made) / len(made)
        full = model.cfg.inference_flops(K, context)
        summary = (f'{len(made)} tokens, {len(made) / max(seconds, 1e-9):.0f} tokens/s, mean depth {sum(r["depth"] for r in made) / len(made):.2f} of {K}, '
                   f'{1 - spent / full:.1%} of the FLOPs of full depth saved')
        print(summary, file=sys.stderr)
    if a.html and not a.prompts:
        write_html(a.html, f'AdaPonderLM · {a.ckpt}', (summary if made else '') + f' · seed {a.seed}, temperature {a.temperature}', samples, enc, K)
        print(f'wrote {a.html}', file=sys.stderr)


if __name__ == '__main__':
    main()
