"""
Text in, token shards out.

    python prepare_data.py                                    the Python standard library's own source -> data/stdlib
    python prepare_data.py PATH ... --tokenizer gpt2          files, folders, globs -> data/NAME
    python prepare_data.py pile/*.jsonl.zst --tokenizer tokenizer.json --out data/pile --shard_tokens 1e9 --shard 0/64

A text or source file is one document; .jsonl and .parquet hold one a line or row, in the field "text"; all but Parquet also as .gz
or .zst. Every document ends with <|endoftext|>. The same command again continues an interrupted preparation.
Whether a document is for training or validation depends on its own text alone, so adding files moves no other document.
"""
import argparse
import base64
import codecs
import glob
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import unicodedata
import urllib.request
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

EOT = '<|endoftext|>'
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
PIECE = 2**20   # characters of text that travel to a worker together; a longer document goes in pieces
HASHED = 2**18  # characters of a document that decide its split


class UsageError(SystemExit):
    """One sentence on stderr, exit code 2."""

    def __init__(self, message):
        print(f'prepare_data.py: {message}', file=sys.stderr)
        super().__init__(2)


# tokenizers

def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def ranks_sha256(enc):
    """Of what decides the tokens of a named tokenizer, apart from its pattern, which tiktoken rewrites for speed now and then."""
    parts = sorted((i, token.hex()) for token, i in enc._mergeable_ranks.items()) + sorted(enc._special_tokens.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_tokenizer(tokenizer, folder=None):
    """The tiktoken.Encoding of a data folder or of a name.

    tokenizer: a meta.json dict, with `folder` where its tokenizer file lies; or 'bytes', a tiktoken name, a .tiktoken or a tokenizer.json file.
    Encode documents with encode_ordinary: text that happens to contain <|endoftext|> is then ordinary text.
    Exits with a sentence when the tokenizer is missing, cannot be represented exactly, or is not the one that meta.json recorded.
    """
    meta = tokenizer if isinstance(tokenizer, dict) else {}
    name = str(meta.get('tokenizer', tokenizer))
    path = Path(folder or '', name)
    if name == 'bytes':
        enc = tiktoken.Encoding('bytes', pat_str=r'[\s\S]{1,64}', mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={EOT: 256})
    elif path.suffix in ('.tiktoken', '.json'):
        if not path.is_file():
            raise UsageError(f'no tokenizer file {path}')
        if meta and file_sha256(path) != meta['tokenizer_sha256']:
            raise UsageError(f'{path} is not the tokenizer that this data was made with: its sha256 differs from meta.json')
        enc = load_tiktoken_file(path) if path.suffix == '.tiktoken' else load_tokenizer_json(path, check=not meta)
    else:
        if name not in tiktoken.list_encoding_names():
            raise UsageError(f"unknown tokenizer {name!r}: give bytes, one of {', '.join(tiktoken.list_encoding_names())}, or a .tiktoken or tokenizer.json file")
        try:
            enc = tiktoken.get_encoding(name)
        except Exception as e:  # tiktoken lets through whatever its HTTP library raises
            raise UsageError(f'tiktoken could not download {name} ({type(e).__name__}): offline, use bytes or a .tiktoken or tokenizer.json file')
        if meta and ranks_sha256(enc) != meta['tokenizer_sha256']:
            raise UsageError(f'the {name} of this tiktoken is not the one that this data was made with: its sha256 differs from meta.json')
    if EOT not in enc._special_tokens:
        raise UsageError(f'tokenizer {name} has no {EOT}, which ends a document')
    return enc


def load_tiktoken_file(path):
    """A rank file has lines of 'base64-of-token rank', and no pattern: GPT-2's is taken."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    except ValueError:
        raise UsageError(f'{path} is not a .tiktoken file: a line must be a token in base64 and its rank')
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UsageError(f'{path} is not a whole .tiktoken file: ranks must be 0, 1, 2, ... and every single byte a token')
    for name, size in (('p50k_base', 50280), ('cl100k_base', 100256), ('o200k_base', 199998)):
        if len(ranks) == size:
            raise UsageError(f'{path} looks like {name}, whose pattern is not in the file: use --tokenizer {name}')
    return tiktoken.Encoding(path.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


class SplitEncoding(tiktoken.Encoding):
    """A Hugging Face byte-level BPE: NFC where it asks for it, and added tokens, which split the text before the BPE's own pattern does.

    As in `tokenizers`, added tokens that are not "normalized" are looked for first, then each stretch between is normalized, then the others are
    looked for; the longest of those that begin first wins. Special ones count only where allowed_special names them.
    """

    def __init__(self, name, ranks, added, nfc):
        super().__init__(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={t['content']: t['id'] for t in added})
        self.added, self.nfc, self.splitters = added, nfc, {}

    @property
    def special_tokens_set(self):
        return {t['content'] for t in self.added if t['special']}

    def encode_ordinary(self, text):
        return self.encode(text, disallowed_special=())

    def encode_to_numpy(self, text, **kw):
        return np.array(self.encode(text, **kw), np.uint32)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special='all'):
        allowed = frozenset(self.special_tokens_set if allowed_special == 'all' else allowed_special)
        for special in self.special_tokens_set - allowed if disallowed_special == 'all' else disallowed_special:
            if special in text:
                raise ValueError(f'the text contains the special token {special!r}: allow it, or pass disallowed_special=()')
        if allowed not in self.splitters:
            found = [[t['content'] for t in self.added if t['normalized'] == normalized and (not t['special'] or t['content'] in allowed)]
                     for normalized in (False, True)]
            self.splitters[allowed] = [re.compile('(' + '|'.join(map(re.escape, sorted(f, key=len, reverse=True))) + ')' if f else r'((?!))')
                                       for f in found]
        raw, normalized = self.splitters[allowed]
        ids = []
        for i, part in enumerate(raw.split(text)):  # odd: the added tokens
            if i % 2:
                ids.append(self._special_tokens[part])
                continue
            for j, word in enumerate(normalized.split(unicodedata.normalize('NFC', part) if self.nfc else part)):
                if j % 2:
                    ids.append(self._special_tokens[word])
                elif word:
                    ids += super().encode_ordinary(word)
        return ids


def load_tokenizer_json(path, check=True):
    """tokenizer.json -> an Encoding that makes the tokens of Hugging Face's `tokenizers`, or an exit that says why it cannot. check: that the BPEs agree."""
    def require(truth, what):
        if not truth:
            raise UsageError(f'{path} cannot be represented exactly: {what}')

    try:
        spec = json.loads(path.read_text(encoding='utf-8'))
        model, added = spec['model'], sorted(spec.get('added_tokens', []), key=lambda t: t['id'])
        vocab, merges = model['vocab'], [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
        kind = model.get('type', 'BPE')
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f'{path} is not the tokenizer.json of a BPE')
    normalizer, splitter, after = (spec.get(k) or {} for k in ('normalizer', 'pre_tokenizer', 'post_processor'))
    require(kind == 'BPE', f'its model is {kind}, not BPE')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback', 'ignore_merges'):
        require(not model.get(key), f'its model sets {key}')
    for key in ('truncation', 'padding'):
        require(not spec.get(key), f'it sets {key}')
    require(normalizer.get('type', 'NFC') == 'NFC', f"its normalizer is {normalizer.get('type')}, and only NFC is known")
    require(splitter.get('type') == 'ByteLevel' and splitter.get('use_regex', True), f"its pre-tokenizer is {splitter.get('type')}, not GPT-2's ByteLevel")
    require(not splitter.get('add_prefix_space', True), 'its pre-tokenizer adds a space in front')
    require(after.get('type', 'ByteLevel') == 'ByteLevel', f"its post-processor {after.get('type')} adds tokens")
    for t in added:
        require(not (t.get('single_word') or t.get('lstrip') or t.get('rstrip')), f"added token {t['content']!r} takes account of its neighbours")
        require(t['content'] and unicodedata.is_normalized('NFC', t['content']), f"added token {t['content']!r} is empty or not in NFC")
        require(t['special'] or not SAFE_CUT.search(t['content']), f"added token {t['content']!r} holds more than one word")

    # ByteLevel writes a byte as a printable character: itself where it is one, else the next from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
    specials = {t['content'] for t in added}
    try:
        raw = {token: bytes(byte_of[c] for c in token) for token in vocab if token not in specials}
        made = [(raw[a], raw[b], vocab[a + b]) for a, b in merges]
    except (KeyError, ValueError):
        raise UsageError(f'{path} cannot be represented exactly: a token or merge is not of bytes, or not in the vocabulary')
    ranks = {raw[token]: i for token, i in vocab.items() if token in raw}
    # A byte that UTF-8 never uses may be missing
    require(all(bytes([b]) in ranks for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5), 'a byte is no token')
    require(len(made) == len({i for *_, i in made}) == sum(len(t) > 1 for t in ranks), 'a token is made by no merge, or by several')
    require([i for *_, i in made] == sorted(i for *_, i in made), 'its merges are not in the order of its token numbers')
    require(len({*ranks.values(), *(t['id'] for t in added)}) == len(ranks) + len(added), 'a token number is used twice')
    if check:
        # tiktoken joins any two neighbours that form a token, `tokenizers` only the listed pair. They agree on every text if each token's own bytes,
        # merged by all earlier merges, come down to the listed pair: whether two neighbours ever meet does not depend on what surrounds them.
        for a, b, i in made:
            require(merge_below(ranks, a + b, i) == [a, b], f'token {a + b!r} can form from another pair than its merge')
    return SplitEncoding(path.name, ranks, added, nfc=bool(normalizer))


def merge_below(ranks, token, limit):
    """BPE of the bytes `token`, by the ranks under `limit`."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def encode_array(enc, text, dtype):
    """text -> (n,) tokens as encode_ordinary makes them."""
    if enc.name == 'bytes':
        return np.frombuffer(text.encode(), np.uint8).astype(dtype)
    return np.array(enc.encode_ordinary(text), dtype)


# documents

def find_inputs(sources, out):
    """[(path or hf:NAME, named)] in a fixed order; named: the user gave this very file, so that failing to read it is an error."""
    found = {}
    for source in map(str, sources):
        if source == 'stdlib':
            root = Path(sysconfig.get_paths()['stdlib'])
            files = [p for p in root.rglob('*.py') if not {'site-packages', 'dist-packages', '__pycache__'} & set(p.parts[len(root.parts):])]
            if not files:
                raise UsageError(f'this Python keeps no source of its standard library in {root}: give a text file or folder instead')
            found.update((p, False) for p in sorted(files))
        elif source == 'shakespeare':
            found[download_shakespeare(Path(out))] = True
        elif source.startswith('hf:'):
            found[source] = True
        elif os.path.isdir(source):
            files = [Path(d, f) for d, _, names in os.walk(source) for f in names]
            files = [p for p in files if p.is_file() and not any(x.startswith('.') or x == '__pycache__' for x in p.relative_to(source).parts)]
            if not files:
                raise UsageError(f'folder {source} holds no files')
            for p in sorted(files):
                found.setdefault(p, False)
        else:
            paths = [source] if os.path.isfile(source) else sorted(p for p in glob.glob(source, recursive=True) if os.path.isfile(p))
            if not paths:
                raise UsageError(f"no input {source}: give files, folders, globs, 'stdlib', 'shakespeare' or hf:NAME of a dataset")
            found.update((Path(p), True) for p in paths)
    return list(found.items())


def download_shakespeare(out):
    path = out / 'input.txt'
    if not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                text = response.read()
        except OSError as e:
            raise UsageError(f"shakespeare could not be downloaded ({e}): offline, 'stdlib' works, and so does any text file or folder of yours")
        out.mkdir(parents=True, exist_ok=True)
        (out / 'input.txt.tmp').write_bytes(text)
        os.replace(out / 'input.txt.tmp', path)
    return path


def need(module, why):
    try:
        return __import__(module, fromlist=['_'])
    except ImportError:
        raise UsageError(f'{why} needs {module.split(".")[0]}: pip install {module.split(".")[0]}')


# Where a text may be cut without changing a token: behind a line break that stands alone and before a letter or digit, or before a single space
# between two letters. The patterns of GPT-2, GPT-NeoX, cl100k and o200k all begin a new word there, whichever side is missing; NFC
# composes nothing across it, and no added token that load_tokenizer_json accepts crosses it.
SAFE_CUT = re.compile(r'(?<=\S\n)(?=[^\W_])|(?<=[^\W\d_])(?= [^\W\d_])')


def last_cut(text, anywhere):
    """The last place in text[HASHED:] to cut at, or 0."""
    for window in (2**10, 2**15, len(text) - HASHED):
        start = len(text) - window
        cuts = [m.start() for m in SAFE_CUT.finditer(text[start:])]
        if cuts:
            return start + cuts[-1]
    return len(text) if anywhere else 0


def text_pieces(stream, anywhere):
    """One document as pieces (text, is the last one), about PIECE characters each. A text with no safe cut stays whole, in memory."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    text, wanted, read = '', PIECE, 0
    while block := stream.read(PIECE):
        try:
            text += decoder.decode(block)
        except UnicodeDecodeError as e:
            raise ValueError(f'is not UTF-8 text near byte {read + e.start}')
        read += len(block)
        if len(text) >= wanted:
            cut = last_cut(text, anywhere)
            if cut:
                yield text[:cut], False
            text, wanted = text[cut:], PIECE if cut else 2 * len(text)  # twice: looking again at every block would be quadratic
    try:
        decoder.decode(b'', final=True)
    except UnicodeDecodeError:
        raise ValueError('is not UTF-8 text: it ends within a character')
    if read:
        yield text, True


def draw(text):
    """A number in [0, 1) that depends on the beginning of a document alone; below val_fraction it is for validation."""
    return int.from_bytes(hashlib.blake2b(text[:HASHED].encode(), digest_size=8).digest(), 'big') / 2**64


def documents(path, named, anywhere, skipped, bar):
    """Items (where, text or bytes of a JSON line, number drawn or None, is the end of the document) of one input."""
    name = re.sub(r'\.(gz|zst)$', '', str(path).lower())
    if str(path).startswith('hf:'):
        repo, _, config = path[3:].partition(':')
        try:
            rows = need('datasets', path).load_dataset(repo, config or None, split='train', streaming=True)
        except Exception as e:
            raise UsageError(f'{path} could not be loaded: {type(e).__name__}: {e}')
        yield from row_documents(path, rows)
        return
    drawn, start = None, bar.n
    try:
        with open(path, 'rb') as raw:
            if name.endswith('.parquet'):
                yield from row_documents(path, (row for batch in need('pyarrow.parquet', path).ParquetFile(raw).iter_batches(256, columns=['text'])
                                                for row in batch.to_pylist()))
                return
            stream = raw
            if str(path).lower().endswith('.gz'):
                stream = gzip.GzipFile(fileobj=raw)
            elif str(path).lower().endswith('.zst'):
                zstandard = need('zstandard', path)
                stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 2**20)
            if name.endswith(('.jsonl', '.ndjson')):
                for number, line in enumerate(stream, 1):
                    bar.update(start + raw.tell() - bar.n)
                    if line.strip():
                        yield f'{path}, line {number}', line, None, True
                return
            for text, last in text_pieces(stream, anywhere):
                bar.update(start + raw.tell() - bar.n)
                drawn = draw(text) if drawn is None else drawn
                yield str(path), text, drawn, last
    except ValueError as e:
        if named or drawn is not None:  # in a folder too, once a part of it is written
            raise UsageError(f'{path} {e}: convert it to UTF-8, or leave it out')
        skipped.append(path)
    except Exception as e:  # each compression library has its own
        raise UsageError(f'{path} cannot be read: {e}')


def row_documents(path, rows):
    for number, row in enumerate(rows):
        if not isinstance(row.get('text'), str):
            raise UsageError(f'{path}, row {number}: has no string in a column "text"')
        yield f'{path}, row {number}', row['text'], None, True


def batches(items):
    """Lists of items with about PIECE characters together, so that a worker gets neither crumbs nor everything."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[1])
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# encoding

def start_worker(tokenizer, folder, val_fraction, dtype):
    global encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # die with it
    encode = encoder(load_tokenizer(tokenizer, folder), val_fraction, dtype)


def encode_in_worker(batch):
    return encode(batch)


def encoder(enc, val_fraction, dtype):
    """The function batch -> ((train, val) tokens, documents [2], bytes [2], lowest number drawn)."""
    eot = np.array([enc._special_tokens[EOT]], dtype)

    def encode(batch):
        tokens, ended, size, lowest = ([], []), [0, 0], [0, 0], 1.0
        for where, text, drawn, last in batch:
            if isinstance(text, bytes):
                try:
                    text = json.loads(text)['text']
                    text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # half a surrogate pair is no character
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f'{where}: is not a JSON object with a string "text"')
            if not text:
                continue
            drawn = draw(text) if drawn is None else drawn
            lowest = min(lowest, drawn)
            side = int(drawn < val_fraction)
            tokens[side].append(encode_array(enc, text, dtype))
            size[side] += len(text.encode())
            if last:
                tokens[side].append(eot)
                ended[side] += 1
        return [np.concatenate(t) if t else np.zeros(0, dtype) for t in tokens], ended, size, lowest
    return encode


class Shards:
    """The token files of one split, written beside their names. `tokens` counts all; file i holds those from i * limit on."""

    def __init__(self, out, split, dtype, limit, tokens):
        self.out, self.split, self.dtype, self.limit, self.tokens, self.file = out, split, np.dtype(dtype), limit or sys.maxsize, tokens, None
        if tokens % self.limit:  # continues
            self.file = open(self.path(tokens // self.limit, '.tmp'), 'r+b')
            self.file.truncate(tokens % self.limit * self.dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def path(self, i, suffix=''):
        return self.out / ((f'{self.split}.bin' if self.limit == sys.maxsize else f'{self.split}_{i:05d}.bin') + suffix)

    def write(self, tokens):
        while len(tokens):
            i, at = divmod(self.tokens, self.limit)
            if at == 0:
                self.close()
                self.file = open(self.path(i, '.tmp'), 'wb')
            part = tokens[:self.limit - at]
            self.file.write(part.tobytes())
            self.tokens += len(part)
            tokens = tokens[len(part):]

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()

    def files(self):
        """The list for meta.json."""
        return [{'name': self.path(i).name, 'tokens': min(self.limit, self.tokens - i * self.limit), 'sha256': file_sha256(self.path(i, '.tmp'))}
                for i in range(-(-self.tokens // self.limit))]


def copy_file(source, target):
    tmp = target.with_name(f'{target.name}.{os.getpid()}.tmp')
    shutil.copyfile(source, tmp)
    os.replace(tmp, target)


def write_json(path, value):
    tmp = path.with_name(f'{path.name}.{os.getpid()}.tmp')  # two jobs of an array may end at the same time
    tmp.write_text(json.dumps(value, indent=1))
    os.replace(tmp, path)


def prepare(sources=('stdlib',), out='data/stdlib', tokenizer='bytes', val_fraction=0.02, shard_tokens=0, shard=None, workers=None):
    """Writes train.bin, val.bin and meta.json into the folder `out`; returns the contents of meta.json.

    sources: names and paths as on the command line. shard_tokens: most tokens of a file, 0: all in one. shard: 'i/n', this job's part of the
    input files. workers: processes, default all cores. Exits with a sentence on bad input.
    """
    out = Path(out)
    if not 0 < val_fraction < 1:
        raise UsageError(f'val_fraction must lie between 0 and 1, not {val_fraction}')
    inputs = find_inputs(sources, out)
    whole = out
    if shard:
        i, n = map(int, shard.split('/')) if re.fullmatch(r'\d+/\d+', shard) else (0, 0)
        if i >= n or n > len(inputs):
            raise UsageError(f'--shard must be i/n with i from 0 to n - 1 and n at most the number of input files, {len(inputs)}, not {shard}')
        inputs, out = inputs[i::n], out / f'shard_{i:05d}_of_{n:05d}'
    enc = load_tokenizer(tokenizer)
    dtype = 'uint16' if enc.n_vocab <= 2**16 else 'uint32'
    out.mkdir(parents=True, exist_ok=True)
    if Path(tokenizer).suffix in ('.tiktoken', '.json'):
        kept, sha = 'tokenizer' + Path(tokenizer).suffix, file_sha256(tokenizer)
        if Path(tokenizer).resolve() != (out / kept).resolve():
            copy_file(tokenizer, out / kept)
    else:
        kept, sha = tokenizer, ranks_sha256(enc)
    meta = {'adaponder_data': 1, 'tokenizer': kept, 'tokenizer_sha256': sha, 'vocab_size': enc.n_vocab, 'eot': enc._special_tokens[EOT],
            'dtype': dtype, 'source': [str(s) for s in sources], 'val_fraction': val_fraction}

    stats = [(str(p), *(os.stat(p)[6:9:2] if isinstance(p, Path) else ())) for p, _ in inputs]
    job = hashlib.sha256(json.dumps([meta, stats, val_fraction, shard_tokens, shard]).encode()).hexdigest()
    state = {'job': job, 'batches': 0, 'tokens': [0, 0], 'documents': [0, 0], 'bytes': [0, 0], 'lowest': 1.0}
    state_file = out / 'progress.json'
    if state_file.is_file() and (old := json.loads(state_file.read_text()))['job'] == job:
        state = old
    else:
        state_file.unlink(missing_ok=True)  # its token files are about to be overwritten
    sides = [Shards(out, split, dtype, int(shard_tokens), n) for split, n in zip(('train', 'val'), state['tokens'])]

    single = not shard and len(inputs) == 1 and isinstance(inputs[0][0], Path) and not re.search(r'\.(jsonl|ndjson|parquet)(\.gz|\.zst)?$', inputs[0][0].name.lower())
    skipped, sizes = [], [s[1] if len(s) > 1 else 0 for s in stats]
    bar = tqdm(total=sum(sizes), unit='B', unit_scale=True, desc=str(out), mininterval=0.5)

    def items():
        for n, (path, named) in enumerate(inputs):
            for where, text, drawn, last in documents(path, named, tokenizer == 'bytes', skipped, bar):
                yield where, text, 1.0 if single else drawn, last
            bar.update(sum(sizes[:n + 1]) - bar.n)

    def results():
        todo = batches(items())
        for _ in range(state['batches']):  # done before the interruption
            next(todo, None)
        if tokenizer == 'bytes' or workers == 1 or sum(sizes) < 8 * PIECE:
            yield from map(encoder(enc, val_fraction, dtype), todo)
            return
        count = workers or os.cpu_count()
        with ProcessPoolExecutor(count, multiprocessing.get_context('spawn'), start_worker, (meta, out, val_fraction, dtype)) as pool:
            pending = deque()
            for batch in todo:
                pending.append(pool.submit(encode_in_worker, batch))
                if len(pending) > 3 * count:  # bounded, so that reading cannot run away from encoding
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    saved = time.monotonic()
    try:
        for tokens, ended, size, lowest in results():
            for side in (0, 1):
                sides[side].write(tokens[side])
                state['tokens'][side] = sides[side].tokens
                state['documents'][side] += ended[side]
                state['bytes'][side] += size[side]
            state['lowest'] = min(state['lowest'], lowest)
            state['batches'] += 1
            if time.monotonic() - saved > 10:
                for side in sides:
                    side.sync()
                write_json(state_file, state)
                saved = time.monotonic()
    except BrokenExecutor:
        raise UsageError('a worker process died, perhaps for lack of memory: try fewer --workers')
    except (ValueError, OSError) as e:
        raise UsageError(str(e))
    finally:
        bar.close()

    train, val = sides
    if sum(state['tokens']) == 0:
        raise UsageError(f'no text in {", ".join(map(str, sources))}')
    if single:  # one document: its end, within its last file, is the validation text
        last = (train.tokens - 1) // train.limit
        inside = train.tokens - last * train.limit
        n = min(int(train.tokens * val_fraction), inside - 1)
        if n:
            state_file.unlink(missing_ok=True)
            train.close()
            tail = np.fromfile(train.path(last, '.tmp'), dtype, offset=(inside - n) * train.dtype.itemsize)
            train = Shards(out, 'train', dtype, train.limit, train.tokens - n)
            val.write(tail)
            size = len(enc.decode_bytes(tail[:-1].tolist()))
            state['bytes'], state['documents'] = [state['bytes'][0] - size, size], [1, 1]
    for i, (name, side) in enumerate((('train', train), ('val', val))):
        side.close()
        meta[name] = {'tokens': side.tokens, 'documents': state['documents'][i], 'bytes': state['bytes'][i], 'files': side.files()}
    if not shard:
        check_split(meta, f'above {state["lowest"]:.3g}' if not val.tokens else 'smaller')
    (out / 'meta.json').unlink(missing_ok=True)  # not true while the files change
    state_file.unlink(missing_ok=True)
    for name in ('train', 'val'):
        for file in meta[name]['files']:
            os.replace(out / (file['name'] + '.tmp'), out / file['name'])
    write_json(out / 'meta.json', meta)
    if skipped:
        print(f'skipped {len(skipped)} files that are not UTF-8 text, the first {skipped[0]}')
    print(f'{out}: ' + ', '.join(f'{s} {meta[s]["tokens"]:,} tokens in {meta[s]["documents"]:,} documents' for s in ('train', 'val')))
    return join_shards(whole, n, meta) if shard else meta


def check_split(meta, hint):
    for name, split in (('validation', 'val'), ('training', 'train')):
        if not meta[split]['tokens']:
            raise UsageError(f'none of the {meta["train"]["documents"] + meta["val"]["documents"]} documents fell into the {name} split: '
                             f'give more documents, or a --val_fraction {hint}')


def join_shards(whole, n, meta):
    """Once all n jobs are done, the meta.json of the whole: their files in order."""
    folders = [whole / f'shard_{i:05d}_of_{n:05d}' for i in range(n)]
    missing = [f.name for f in folders if not (f / 'meta.json').is_file()]
    if missing:
        print(f'{whole}: {len(missing)} of {n} shards still to come, the next {missing[0]}')
        return meta
    metas = [json.loads((f / 'meta.json').read_text()) for f in folders]
    settings = [{k: v for k, v in m.items() if k not in ('train', 'val')} for m in metas]
    if any(s != settings[0] for s in settings):
        raise UsageError(f'the shards in {whole} were made with different sources, tokenizers or val_fraction: prepare the odd ones again')
    joined = dict(settings[0])
    for split in ('train', 'val'):
        joined[split] = {k: sum(m[split][k] for m in metas) for k in ('tokens', 'documents', 'bytes')}
        joined[split]['files'] = [f | {'name': f'{d.name}/{f["name"]}'} for d, m in zip(folders, metas) for f in m[split]['files']]
    check_split(joined, 'that is different')
    if (folders[0] / joined['tokenizer']).is_file():
        copy_file(folders[0] / joined['tokenizer'], whole / joined['tokenizer'])
    write_json(whole / 'meta.json', joined)
    print(f'{whole}: all {n} shards are there')
    return joined


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='*', default=['stdlib'], help='files, folders, globs, stdlib (default), shakespeare, hf:NAME[:CONFIG]')
    parser.add_argument('--tokenizer', default='bytes', help='bytes (default), gpt2 or another tiktoken name, a .tiktoken or tokenizer.json file')
    parser.add_argument('--out', help='default: data/NAME')
    parser.add_argument('--val_fraction', type=float, default=0.02, help='share of the documents, or of a single one, kept for validation (0.02)')
    parser.add_argument('--shard_tokens', type=float, default=0, help='most tokens in a file, e.g. 1e9 (default: one file)')
    parser.add_argument('--shard', metavar='i/n', help="do only every n-th input file from the i-th on, for job arrays; the last job to end joins all n")
    parser.add_argument('--workers', type=int, help='processes (default: all cores)')
    args = parser.parse_args()
    out = args.out or 'data/' + Path(args.sources[0].removeprefix('hf:')).name.split('.')[0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(args.sources, out, args.tokenizer, args.val_fraction, args.shard_tokens, args.shard, args.workers)
    except KeyboardInterrupt:
        print('interrupted: the same command continues', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
