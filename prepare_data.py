"""
Text in, token shards out.

    python prepare_data.py                                        the Python standard library's own source -> data/stdlib
    python prepare_data.py shakespeare                            downloads the usual 1 MB
    python prepare_data.py corpus/ more.jsonl.gz 'x/*.txt' --out data/mine --tokenizer gpt2

Sources: files, folders, globs. A .jsonl file holds a document a line under "text"; any other file is one document; each may be .gz, or .zst
with zstandard installed. Documents end with <|endoftext|>; text that contains that string is ordinary text. A document goes to val by the
hash of its first 64 KiB, so that adding files moves no other document; a single document gives its last tenth. Output: train.bin, val.bin (or numbered shards) and meta.json.
"""
import argparse
import base64
import glob
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
from collections import deque
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

EOT = '<|endoftext|>'
PIECE = 1 << 20  # characters that a worker gets at a time
SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TEXT = {'.txt', '.md', '.rst', '.tex', '.html', '.xml', '.json', '.csv', '.py', '.pyi', '.c', '.h', '.cc', '.cpp', '.hpp', '.cu', '.java', '.js', '.ts',
        '.go', '.rs', '.rb', '.sh', '.pl', '.lua', '.hs', '.ml', '.scala', '.kt', '.swift', '.sql', '.jl', '.r', '.S', '.jsonl'}


class UsageError(SystemExit):
    """One sentence on stderr, exit code 2."""

    def __init__(self, message):
        print(f'prepare_data.py: {message}', file=sys.stderr)
        super().__init__(2)


# tokenizers

def load_tokenizer(tokenizer, folder=None):
    """A tiktoken.Encoding. tokenizer: 'bytes', a tiktoken name, a .tiktoken rank file, or the dict of a meta.json whose folder may hold that file.

    Encode text with encode_ordinary(), which takes a literal <|endoftext|> for text; enc.eot_token is the separator's id.
    """
    name, digest = (tokenizer['tokenizer'], tokenizer['tokenizer_sha256']) if isinstance(tokenizer, dict) else (tokenizer, None)
    if name == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]', mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={EOT: 256})
    if not name.endswith(('.tiktoken', '.json')):
        if name not in tiktoken.list_encoding_names():
            raise UsageError(f"no tokenizer {name!r}: give 'bytes', a FILE.tiktoken, or one of {', '.join(tiktoken.list_encoding_names())}")
        try:
            return tiktoken.get_encoding(name)
        except Exception as e:  # whatever the download raises
            raise UsageError(f"tiktoken must download {name!r} once and could not ({type(e).__name__}): 'bytes' or a FILE.tiktoken work offline")
    path = Path(folder or '') / name
    if not path.is_file():
        raise UsageError(f'no tokenizer file {path}')
    data = path.read_bytes()
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise UsageError(f'{path} is not the file that the data was made with: prepare the data again')
    if name.endswith('.json'):
        raise UsageError(f'{path}: tokenizer.json files are not supported, give a .tiktoken rank file')
    return from_rank_file(path, data)


def from_rank_file(path, data):
    """GPT-2's vocabulary in tiktoken's form, a line a token: base64, rank. Only its split pattern is known from the file's size."""
    from tiktoken_ext.openai_public import r50k_pat_str
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}
    except ValueError:
        raise UsageError(f'{path} is not a .tiktoken rank file: each line must be a base64 token and its rank')
    if len(ranks) != 50256 or sorted(ranks.values()) != list(range(50256)):
        raise UsageError(f"{path} has {len(ranks)} ranks; only GPT-2's 50256 are known in a file, name other tiktoken encodings instead")
    return tiktoken.Encoding(path.stem, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})


def encode(enc, text):
    """Token ids of ordinary text, a numpy array. Bytes need no regex."""
    if enc.name == 'bytes':
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.array(enc.encode_ordinary(text), dtype=np.uint32)


# documents

def find_files(source):
    """[(path, given by name)] of one source, in a fixed order."""
    if source == 'stdlib':
        root = Path(sysconfig.get_paths()['stdlib'])
        skip = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}  # tests are not in every distribution
        return [(p, False) for p in sorted(root.rglob('*.py')) if not skip & set(p.relative_to(root).parts)]
    path = Path(source)
    if path.is_dir():
        return [(p, False) for p in sorted(path.rglob('*')) if p.is_file() and Path(p.name.removesuffix('.gz').removesuffix('.zst')).suffix in TEXT]
    paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True)) if os.path.isfile(p)]
    if not paths:
        raise UsageError(f"no file, folder or glob {source!r}; 'stdlib' works without any file")
    return [(p, True) for p in paths]


def download_shakespeare(out):
    path = out / 'shakespeare.txt'
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as r:
                data = r.read()
        except OSError as e:
            raise UsageError(f"shakespeare could not be downloaded ({e}); offline, 'stdlib' works, and so does any text file you have")
        out.mkdir(parents=True, exist_ok=True)
        path.with_suffix('.tmp').write_bytes(data)
        os.replace(path.with_suffix('.tmp'), path)
    return path


def open_text(path, raw):
    """The decompressed text of an open binary file."""
    if path.suffix == '.gz':
        raw = gzip.open(raw)
    elif path.suffix == '.zst':
        try:
            import zstandard
        except ImportError:
            raise UsageError(f'{path} needs zstandard: pip install zstandard')
        raw = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return io.TextIOWrapper(raw, encoding='utf-8', errors='strict', newline='')


def pieces(stream):
    """One document in pieces of about PIECE characters, cut where no tokenizer's split pattern joins the sides.

    That is after a newline with a non-space before and after it: GPT-2's patterns and their kin end a piece there in any case. A document
    without such a place stays whole.
    """
    text = ''
    while part := stream.read(PIECE):
        text += part
        while len(text) >= PIECE and (cut := next(re.finditer(r'(?<=\S\n)(?=\S)', text[PIECE // 2:]), None)):
            yield text[:PIECE // 2 + cut.start()]
            text = text[PIECE // 2 + cut.start():]
    yield text


def documents(path):
    """Each document of a file, as an iterator of pieces; and the compressed bytes read so far. A byte order mark is dropped."""
    try:
        with open(path, 'rb') as raw:
            stream = open_text(path, raw)
            if '.jsonl' not in path.suffixes[-2:]:
                yield pieces(stream), raw.tell
                return
            for n, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        text = json.loads(line)['text']
                        if not isinstance(text, str):
                            raise TypeError
                    except (ValueError, KeyError, TypeError):
                        raise UsageError(f'{path}, line {n}: not a JSON object with a string under "text"')
                    yield iter([text.encode('utf-8', 'replace').decode()]), raw.tell  # a lone surrogate has no bytes: it becomes ?
    except (OSError, EOFError) as e:
        raise UsageError(f'{path} cannot be read: {e}')


def tasks(files, val_fraction, bar, count):
    """Lists of (split, text, ends a document), about PIECE characters each, in order. Tallies into count."""
    batch, size = [], 0
    for path, named in files:
        start, seen = bar.n, 0
        if not named and path.stat().st_size < 1 << 26 and path.suffix not in ('.gz', '.zst'):
            try:
                path.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                count['skipped'] += 1
                continue
        try:
            for doc, tell in documents(path):
                first = next(doc).removeprefix('\ufeff')
                if not first.strip():
                    count['empty'] += 1
                    continue
                digest = hashlib.sha256(first[:1 << 16].encode()).digest()
                split = 'val' if int.from_bytes(digest[:8], 'big') < val_fraction * 2 ** 64 else 'train'
                count[split] += 1
                ahead = next(doc, None)
                while True:
                    batch.append((split, first, ahead is None))
                    count[split + ' bytes'] += len(first.encode())
                    size += len(first)
                    if size >= PIECE:
                        yield batch
                        batch, size = [], 0
                    bar.update(tell() - seen)
                    seen = tell()
                    if ahead is None:
                        break
                    first, ahead = ahead, next(doc, None)
        except UnicodeDecodeError as e:
            raise UsageError(f'{path} is not UTF-8 text ({e.reason} at byte {e.start}): convert it, or leave it out')
        bar.update(start + path.stat().st_size - bar.n)
    if batch:
        yield batch


def start_worker(tokenizer, folder):
    global worker_encoding
    worker_encoding = load_tokenizer(tokenizer, folder)


def encode_task(task, enc=None):
    """[(split, token array)] of a task; documents end with the separator."""
    enc = enc or worker_encoding
    out = []
    for split, text, ends in task:
        out.append((split, encode(enc, text)))
        if ends:
            out.append((split, np.array([enc.eot_token])))
    return out


def in_order(fn, jobs, pool, ahead):
    """fn of each job, in order, with at most `ahead` of them in memory (imap would read all its input at once)."""
    pending = deque()
    for job in jobs:
        pending.append(pool.apply_async(fn, (job,)))
        if len(pending) >= ahead:
            yield pending.popleft().get()
    while pending:
        yield pending.popleft().get()


class Shards:
    """Writes one split to out/name.bin.tmp, or to numbered files of at most shard_tokens; finish() renames them."""

    def __init__(self, out, name, dtype, shard_tokens):
        self.out, self.name, self.dtype, self.limit, self.files, self.file = out, name, dtype, shard_tokens, [], None

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                name = f'{self.name}_{len(self.files):05d}.bin' if self.limit else f'{self.name}.bin'
                self.file = open(self.out / (name + '.tmp'), 'wb')
                self.files.append(dict(name=name, tokens=0))
            room = self.limit - self.files[-1]['tokens'] if self.limit else len(tokens)
            self.file.write(tokens[:room].astype(self.dtype).tobytes())
            self.files[-1]['tokens'] += len(tokens[:room])
            tokens = tokens[room:]
            if self.limit and self.files[-1]['tokens'] == self.limit:
                self.file = self.file.close()

    def close(self):
        if self.file:
            self.file = self.file.close()
        return sum(f['tokens'] for f in self.files)

    def paths(self):
        return [self.out / (f['name'] + '.tmp') for f in self.files]

    def take_tail(self, other, n):
        """Move the last n tokens of `other`'s last file here."""
        path, file = other.paths()[-1], other.files[-1]
        tail = np.fromfile(path, dtype=self.dtype)[-n:]
        self.write(tail)
        file['tokens'] -= len(tail)
        os.truncate(path, file['tokens'] * np.dtype(self.dtype).itemsize)

    def finish(self):
        for path, file in zip(self.paths(), self.files):
            with open(path, 'rb') as f:
                file['sha256'] = hashlib.file_digest(f, 'sha256').hexdigest() if sys.version_info >= (3, 11) else sha256_of(f)
            os.replace(path, path.with_suffix(''))
        return self.files


def sha256_of(f):
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def prepare(sources, out, tokenizer='bytes', val_fraction=0.02, shard_tokens=0, workers=None):
    """Write the token shards and meta.json of `sources` (a list, see the module) to the folder `out`. Returns the meta dict. Usage errors exit with 2."""
    if not 0 < val_fraction < 1:
        raise UsageError(f'val_fraction must be between 0 and 1, not {val_fraction}')
    out = Path(out)
    enc = load_tokenizer(tokenizer)
    stored, digest = tokenizer, None
    if tokenizer.endswith('.tiktoken'):
        stored, digest = 'tokenizer.tiktoken', hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    elif tokenizer != 'bytes':
        digest = hashlib.sha256(b''.join(k + v.to_bytes(4, 'big') for k, v in sorted(enc._mergeable_ranks.items()))).hexdigest()
    files = [f for s in sources for f in ([(download_shakespeare(out), True)] if s == 'shakespeare' else find_files(s))]
    out.mkdir(parents=True, exist_ok=True)
    dtype = 'uint16' if enc.n_vocab <= 2 ** 16 else 'uint32'
    splits = {s: Shards(out, s, dtype, shard_tokens) for s in ('train', 'val')}
    count = dict.fromkeys(('train', 'val', 'train bytes', 'val bytes', 'skipped', 'empty'), 0)
    workers = workers or os.cpu_count()
    bar = tqdm(total=sum(p.stat().st_size for p, _ in files), unit='B', unit_scale=True, desc=str(out), dynamic_ncols=True)
    pool = None
    try:
        single = len(files) == 1 and '.jsonl' not in files[0][0].suffixes  # one document: its last tenth becomes val
        jobs = tasks(files, 0 if single else val_fraction, bar, count)
        if tokenizer == 'bytes':  # copying it to a worker would take longer than encoding it
            results = (encode_task(job, enc) for job in jobs)
        else:
            pool = multiprocessing.get_context('spawn').Pool(workers, start_worker, (tokenizer, None))
            results = in_order(encode_task, jobs, pool, 4 * workers)
        for result in results:
            for split, tokens in result:
                splits[split].write(tokens)
        tokens = {s: w.close() for s, w in splits.items()}
        if not count['train'] + count['val']:
            raise UsageError(f'{", ".join(sources)}: no text in it, {count["skipped"]} undecodable and {count["empty"]} empty documents')
        if single:
            splits['val'].take_tail(splits['train'], round(tokens['train'] * max(val_fraction, 0.1)))
            tokens = {s: w.close() for s, w in splits.items()}
        for s in ('train', 'val'):
            if not tokens[s]:
                raise UsageError(f'none of the {count["train"] + count["val"]} documents fell into {s}: '
                                 f'give a {"larger" if s == "val" else "smaller"} --val_fraction, or more documents')
    except BaseException:
        for w in splits.values():
            w.close()
            for path in w.paths():
                path.unlink(missing_ok=True)
        raise
    finally:
        bar.close()
        if pool:
            pool.terminate()
    if stored == 'tokenizer.tiktoken' and Path(tokenizer).resolve() != (out / stored).resolve():
        shutil.copyfile(tokenizer, out / stored)
    meta = dict(adaponder_data=1, tokenizer=stored, tokenizer_sha256=digest, vocab_size=enc.n_vocab, eot=enc.eot_token, dtype=dtype, source=[str(s) for s in sources])
    for s, w in splits.items():
        meta[s] = dict(tokens=tokens[s], documents=count[s], bytes=count[s + ' bytes'], files=w.finish())
    (out / 'meta.json.tmp').write_text(json.dumps(meta, indent=1))
    os.replace(out / 'meta.json.tmp', out / 'meta.json')
    skipped = f'; skipped {count["skipped"]} files that are not UTF-8' if count['skipped'] else ''
    print(f'{out}: {tokens["train"]:,} train and {tokens["val"]:,} val tokens from {count["train"] + count["val"]:,} document(s){skipped}', file=sys.stderr)
    return meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='*', default=['stdlib'], help="'stdlib', 'shakespeare', files, folders, globs")
    parser.add_argument('--out', help='folder; default data/NAME of the first source')
    parser.add_argument('--tokenizer', default='bytes', help="'bytes', a tiktoken name such as gpt2, or a FILE.tiktoken")
    parser.add_argument('--val_fraction', type=float, default=0.02, help='share of the documents that go to val')
    parser.add_argument('--shard_tokens', type=int, default=0, help='bound on the tokens of a file; 0: one file a split')
    parser.add_argument('--workers', type=int, help='processes; default one a core')
    a = parser.parse_args()
    name = re.sub(r'\W+', '_', Path(a.sources[0]).name.split('.')[0]) or 'text'
    prepare(a.sources, a.out or f'data/{name}', a.tokenizer, a.val_fraction, a.shard_tokens, a.workers)


if __name__ == '__main__':
    main()
