"""
Text in, token shards out.

    python prepare_data.py                                    the Python standard library's own source -> data/stdlib
    python prepare_data.py PATH ... --tokenizer gpt2          files, folders, globs -> data/NAME
    python prepare_data.py pile/*.jsonl.zst --tokenizer tokenizer.json --out data/pile --shard_tokens 1e9 --shard 0/64

A text or source file is one document; .jsonl and .parquet hold one a line or row, in the field "text"; all but Parquet also as .gz
or .zst. Every document ends with <|endoftext|>. The same command again continues an interrupted preparation.
Whether a document is for training or validation depends on its own text alone, so adding files moves no other document; of a lone text the end is
for validation. Of a folder, hidden files, caches and installed packages are left out, and what is not text in UTF-8 is skipped and counted.
"""
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends quietly

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
LEFT_OUT = ('__pycache__', 'site-packages', 'dist-packages')
SAVE_EVERY = 10  # seconds of work that an interruption may cost


# helpers that the other scripts use too

class UsageError(ValueError):
    """A mistake of the user. The message is one sentence: what is wrong, and what to do."""


def command_line(main):
    """Run main() as a program: every script of the project ends with this call.

    ValueError and OSError become one sentence on stderr and exit code 2, Ctrl-C becomes exit code 130. Any other
    exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding='utf-8', errors='backslashreplace')  # whatever the locale is
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the imports ran with SIG_DFL
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in "sample.py | head": the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as e:
        sentence = ' '.join(str(e).split()) or type(e).__name__
        print(f'{Path(sys.argv[0]).name}: {sentence}', file=sys.stderr)
        sys.exit(2)


def temporary_path(path):
    """Where write_beside() collects a file: in the same folder, so that the rename is atomic, and one name a process."""
    return path.with_name(f'{path.name}.{os.getpid()}.tmp')


def write_beside(path, data):
    """Write bytes so that the file appears under its name whole or not at all, whenever the process is killed."""
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, lets an unknown ~user stand
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path):
    """Raise UsageError unless write_beside(path) will work: asked before the work whose result goes there."""
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        raise UsageError(f'{path} is a folder: give the name of a file')
    if os.path.exists(path) and not path.is_file():
        raise UsageError(f'{path} is not a regular file: give another name')
    try:
        temporary_path(path).touch()
        temporary_path(path).unlink()
    except OSError as e:
        raise UsageError(f'{path} cannot be written ({e.strerror}): give a name in a folder that is there and writable')


def lock(folder):
    """Keep every other process that calls this out of `folder`, until the returned file is closed or this process ends.

    Raises UsageError if another process holds the lock. A file system without locks (some NFS and Lustre mounts) is
    used without one, with a warning.
    """
    file = open(Path(os.path.expanduser(folder)) / 'lock', 'a')
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows, where an open file could not be deleted either
        file.close()
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(f'another process is writing to {folder}: wait for it, or give another folder')
    except OSError as e:
        print(f'{folder} has no locks ({e.strerror}): see that no other process writes there', file=sys.stderr)
    return file


# tokenizers

def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_tokenizer(tokenizer, folder=None):
    """The tiktoken.Encoding of a data folder or of a name, with an attribute sha256: of its file, or of its tokens where it has none.

    tokenizer: a meta.json dict, with `folder` where its tokenizer file lies; or 'bytes', a tiktoken name, a .tiktoken or a tokenizer.json file.
    Encode documents with encode_ordinary: text that happens to contain <|endoftext|> is then ordinary text.
    Exits with a sentence when the tokenizer is missing, cannot be represented exactly, or is not the one that meta.json recorded.
    """
    meta = tokenizer if isinstance(tokenizer, dict) else {}
    name = str(meta.get('tokenizer', tokenizer))
    path = Path(folder or '', name)
    if path.suffix in ('.tiktoken', '.json'):
        if not path.is_file():
            raise UsageError(f'no tokenizer file {path}')
        enc = load_tiktoken_file(path) if path.suffix == '.tiktoken' else load_tokenizer_json(path, check=not meta)
        enc.sha256 = file_sha256(path)
    elif name == 'bytes':
        enc = tiktoken.Encoding('bytes', pat_str=r'[\s\S]{1,64}', mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={EOT: 256})
    elif name in tiktoken.list_encoding_names():
        try:
            enc = tiktoken.get_encoding(name)
        except Exception as e:  # tiktoken lets through whatever its HTTP library raises
            raise UsageError(f'tiktoken could not download {name} ({type(e).__name__}): offline, use bytes or a .tiktoken or tokenizer.json file')
    else:
        raise UsageError(f"unknown tokenizer {name!r}: give bytes, one of {', '.join(tiktoken.list_encoding_names())}, or a .tiktoken or tokenizer.json file")
    if not hasattr(enc, 'sha256'):  # apart from the pattern, which tiktoken rewrites for speed now and then
        parts = sorted((i, token.hex()) for token, i in enc._mergeable_ranks.items()) + sorted(enc._special_tokens.items())
        enc.sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if meta and enc.sha256 != meta['tokenizer_sha256']:
        raise UsageError(f'tokenizer {path} is not the one that this data was made with: its sha256 differs from meta.json')
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


# Characters that Unicode gained after `tokenizers` froze its tables and that later normalise with their neighbours: there they stand alone.
NEWER = re.compile('([\u05c8\u05c9\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c\U000105d2-\U000105da'
                   '\U00010d24-\U00010f85\U00011070\U0001133b\U000113b8-\U000113c2\U000113c9-\U000113d0\U0001145e\U00011839-\U00011930'
                   '\U0001193d-\U00011a99\U00011d42-\U00011f42\U0001611e-\U00016120\U00016129-\U0001612f\U00016d67\U00016ff0\U00016ff1\U0001d127'
                   '\U0001d128\U0001d250-\U0001d281\U0001e08f-\U0001e6f5])')


def nfc(text):
    """As the normalizer NFC of `tokenizers`, whatever Unicode this Python knows."""
    return text if text.isascii() else ''.join(unicodedata.normalize('NFC', part) for part in NEWER.split(text))


class HuggingFaceEncoding(tiktoken.Encoding):
    """A byte-level BPE as `tokenizers` runs it: NFC where asked for, and added tokens, which split the text before the BPE's own pattern does.

    Added tokens that are not "normalized" are looked for first, then each stretch between is normalized, then the others are looked for. The longest
    of those that begin first wins; a special one that allowed_special does not name is then passed over and remains text.
    """

    def __init__(self, name, ranks, added, normalize):
        super().__init__(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={t['content']: t['id'] for t in added})
        self.state, self.normalize, self.special = (name, ranks, added, normalize), nfc if normalize else str, {t['content'] for t in added if t['special']}
        longest_first = sorted(added, key=lambda t: -len(t['content']))
        self.finders = [re.compile('|'.join(re.escape(t['content']) for t in longest_first if t['normalized'] == n) or '(?!)') for n in (False, True)]

    def __reduce__(self):
        return HuggingFaceEncoding, self.state

    def encode_ordinary(self, text):
        return self.encode(text, disallowed_special=())

    def encode_to_numpy(self, text, **kw):
        return np.array(self.encode(text, **kw), np.uint32)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special='all'):
        passed = frozenset() if allowed_special == 'all' else self.special - set(allowed_special)
        for token in passed if disallowed_special == 'all' else disallowed_special:
            if token in text:
                raise ValueError(f'the text contains the special token {token!r}: allow it, or pass disallowed_special=()')

        def split(text, finder):
            """Pairs (text before an added token, that token)."""
            start = 0
            for found in finder.finditer(text):
                if found[0] not in passed:
                    yield text[start:found.start()], found[0]
                    start = found.end()
            yield text[start:], None

        ids = []
        for part, outer in split(text, self.finders[0]):
            for word, inner in split(self.normalize(part), self.finders[1]):
                if word:
                    ids += super().encode_ordinary(word)
                if inner:
                    ids.append(self._special_tokens[inner])
            if outer:
                ids.append(self._special_tokens[outer])
        return ids


def load_tokenizer_json(path, check=True):
    """tokenizer.json -> an Encoding that makes the tokens of Hugging Face's `tokenizers`, or an exit that says why it cannot. check: that the BPEs agree."""
    def require(truth, what):
        if not truth:
            raise UsageError(f'{path} cannot be represented exactly: {what}')

    try:
        spec = json.loads(path.read_text(encoding='utf-8'))
        model, fields = spec['model'], ('id', 'content', 'single_word', 'lstrip', 'rstrip', 'normalized', 'special')
        added = [{k: t[k] for k in fields} for t in spec['added_tokens']]
        vocab, merges = model['vocab'], [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
        kind = model.get('type', 'BPE')
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f'{path} is not the tokenizer.json of a BPE')
    normalizer, splitter, after = (spec.get(k) or {} for k in ('normalizer', 'pre_tokenizer', 'post_processor'))
    require(kind == 'BPE', f'its model is {kind}, not BPE')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback', 'ignore_merges', 'truncation', 'padding'):
        require(not (model.get(key) or spec.get(key)), f'it sets {key}')
    require(normalizer.get('type', 'NFC') == 'NFC', f"its normalizer is {normalizer.get('type')}, and only NFC is known")
    require(splitter.get('type') == 'ByteLevel' and splitter.get('use_regex', True), f"its pre-tokenizer is {splitter.get('type')}, not GPT-2's ByteLevel")
    require(not splitter.get('add_prefix_space', True), 'its pre-tokenizer adds a space in front')
    require(after.get('type', 'ByteLevel') == 'ByteLevel', f"its post-processor {after.get('type')} adds tokens")
    for t in added:
        require(not (t['single_word'] or t['lstrip'] or t['rstrip']), f"added token {t['content']!r} takes account of its neighbours")
        require(t['content'] and unicodedata.is_normalized('NFC', t['content']), f"added token {t['content']!r} is empty or not in NFC")
        require(not re.search(r'\n[^\W_]|[^\W\d_] ', t['content']), f"added token {t['content']!r} goes on behind a word or a line")  # SAFE_CUT

    # ByteLevel writes a byte as a printable character: itself where it is one, else the next from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
    numbers = dict(vocab)
    for t in added:
        numbers.setdefault(t['content'], len(numbers))
    right = sorted(numbers.values()) == list(range(len(numbers))) and all(numbers[t['content']] == t['id'] for t in added)
    require(right, 'its token numbers have gaps or clash')
    try:
        raw = {token: bytes(byte_of[c] for c in token) for token in vocab.keys() - {t['content'] for t in added}}
        made = [(raw[a], raw[b], vocab[a + b]) for a, b in merges]
    except (KeyError, ValueError):
        raise UsageError(f'{path} cannot be represented exactly: a token or merge is not of bytes, or not in the vocabulary')
    ranks = {raw[token]: vocab[token] for token in raw}
    # A byte that UTF-8 never uses may be missing
    require(all(bytes([b]) in ranks for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5), 'a byte is no token')
    require(len(made) == len({i for *_, i in made}) == sum(len(t) > 1 for t in ranks), 'a token is made by no merge, or by several')
    require([i for *_, i in made] == sorted(i for *_, i in made), 'its merges are not in the order of its token numbers')
    if check:
        # tiktoken joins any two neighbours that form a token, `tokenizers` only the listed pair. They agree on every text if each token's own bytes,
        # merged by all earlier merges, come down to the listed pair: whether two neighbours ever meet does not depend on what surrounds them.
        for a, b, i in made:
            require(merge_below(ranks, a + b, i) == [a, b], f'token {a + b!r} can form from another pair than its merge')
    return HuggingFaceEncoding(path.name, ranks, added, normalize=bool(normalizer))


def merge_below(ranks, token, limit):
    """BPE of the bytes `token`, by the ranks under `limit`."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# documents

def find_inputs(sources, out):
    """{path or hf:NAME: named} in a fixed order; named: the user gave this very file, so that its not being text is an error."""
    def walk(folder):
        for at, folders, names in os.walk(folder):
            folders[:] = [d for d in folders if d[0] != '.' and d not in LEFT_OUT and Path(at, d).resolve() != out.resolve()]
            yield from (p for p in (Path(at, n) for n in names if n[0] != '.') if p.is_file())

    found = {}
    for source in map(str, sources):
        if source == 'stdlib':
            root = sysconfig.get_paths()['stdlib']
            files, none = [p for p in walk(root) if p.suffix == '.py'], f'this Python keeps no source of its standard library in {root}'
        elif source == 'shakespeare':
            files = [out / 'input.txt']
            if not files[0].is_file():
                download_shakespeare(files[0])
        elif source.startswith('hf:'):
            files = [source]
        elif os.path.isdir(source):
            files, none = list(walk(source)), f'folder {source} holds no files'
        else:
            paths = [source] if os.path.isfile(source) else glob.glob(source, recursive=True)
            files, none = [Path(p) for p in paths if os.path.isfile(p)], f'no input {source}'
        if not files:
            raise UsageError(f"{none}: give files, folders, globs, 'stdlib', 'shakespeare' or hf:NAME of a dataset")
        for path in sorted(files):
            found[path] = found.get(path, False) or not (source == 'stdlib' or os.path.isdir(source))
    return found


def download_shakespeare(path):
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            text = response.read()
    except Exception as e:  # urllib lets through those of http and ssl too
        raise UsageError(f"shakespeare could not be downloaded ({e}): offline, 'stdlib' works, and so does any text file or folder of yours")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, text)


def need(module, why):
    try:
        return __import__(module, fromlist=['_'])
    except ImportError:
        raise UsageError('{0} needs {1}: pip install {1}'.format(why, module.split('.')[0]))


def kind(path):
    """'x.jsonl.gz' -> ('.jsonl', '.gz'); a document a file: ('', ...)."""
    return re.search(r'(^hf:.*|\.jsonl|\.ndjson|\.parquet|)(\.gz|\.zst|)$', str(path).lower()).groups()


# Where a text may be cut without changing a token: behind a line break that stands alone and before a letter or digit, or before a single space
# between two letters. The patterns of GPT-2, GPT-NeoX, cl100k and o200k all begin a new word there, whichever side is missing; NFC
# composes nothing across it, and no added token that load_tokenizer_json accepts crosses it.
SAFE_CUT = re.compile(r'(?<=\S\n)(?=[^\W_])|(?<=[^\W\d_])(?= [^\W\d_])')


def text_pieces(stream, cut_at, binary):
    """One document as pieces (text, is the last one), about PIECE characters each. A text where nothing matches cut_at stays whole, in memory."""
    decoder, text, read, block = codecs.getincrementaldecoder('utf-8')(), '', 0, True
    while block:
        block = stream.read(PIECE)
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise UnicodeError(f'is not UTF-8 text near byte {read + e.start}')
        if b'\0' in block and not binary:
            raise UnicodeError('is not text: it holds zero bytes')
        read += len(block)
        if block and len(text) >= PIECE:
            for window in (2**12, PIECE):
                start = max(HASHED, len(text) - window)
                if cuts := [m.start() for m in cut_at.finditer(text[start:])]:
                    yield text[:start + cuts[-1]], False
                    text = text[start + cuts[-1]:]
                    break
    if read:
        yield text, True


def draw(text):
    """A number in [0, 1) that depends on the beginning of a document alone; below val_fraction it is for validation."""
    return int.from_bytes(hashlib.blake2b(text[:HASHED].encode(), digest_size=8).digest(), 'big') / 2**64


def train_then_val(items, train_bytes):
    """The items of a lone text: behind train_bytes a second document begins, for validation."""
    for where, text, _, last in items:
        data = text.encode()
        if 0 < train_bytes <= len(data):
            head = data[:train_bytes].decode(errors='ignore')
            yield where, head, 1.0, True
            text, train_bytes = text[len(head):], 0
        yield where, text, float(train_bytes > 0), last
        train_bytes -= len(data)


def documents(path, named, cut_at, skipped, bar):
    """Items (where, text or bytes of a JSON line, number drawn or None, is the end of the document) of one input.

    named: the user gave this very file. cut_at: where a text may be cut into pieces. skipped: collects files that are not text. ValueError on bad input.
    """
    def rows(found):
        for number, row in enumerate(found):
            if not isinstance(row.get('text'), str):
                raise ValueError(f'row {number} has no string in a column "text"')
            yield f'{path}, row {number}', row['text'], None, True

    (form, packing), start, drawn = kind(path), bar.n, None
    try:
        if form.startswith('hf:'):
            name, _, config = path[3:].partition(':')
            yield from rows(need('datasets', path).load_dataset(name, config or None, split='train', streaming=True))
            return
        with open(path, 'rb') as raw:
            stream = gzip.GzipFile(fileobj=raw) if packing == '.gz' else raw
            if packing == '.zst':
                stream = io.BufferedReader(need('zstandard', path).ZstdDecompressor(max_window_size=2**31).stream_reader(raw, read_across_frames=True), 2**20)
            if form == '.parquet':
                tables = need('pyarrow.parquet', path).ParquetFile(raw).iter_batches(256, columns=['text'])
                yield from rows(row for table in tables for row in table.to_pylist())
            elif form:
                for number, line in enumerate(stream, 1):
                    bar.update(start + raw.tell() - bar.n)
                    if line.strip():
                        yield f'{path}, line {number}', line, None, True
            else:
                for text, last in text_pieces(stream, cut_at, named):
                    bar.update(start + raw.tell() - bar.n)
                    drawn = draw(text) if drawn is None else drawn
                    yield str(path), text, drawn, last
    except UnicodeError as e:
        if named or drawn is not None:  # in a folder too, once a part of it is written
            raise ValueError(f'{path} {e}: convert it to UTF-8, or leave it out')
        skipped.append(path)
    except Exception as e:  # each library has its own
        raise ValueError(f'{path} cannot be read: {e}')


# encoding

def encode_batch(enc, val_fraction, dtype, batch):
    """Items -> ((train, val) tokens, documents ended [2], bytes [2], lowest number drawn)."""
    tokens, ended, size, lowest = ([np.zeros(0, dtype)], [np.zeros(0, dtype)]), [0, 0], [0, 0], 1.0
    for where, text, drawn, last in batch:
        if drawn is None:  # a row: a document of its own
            try:
                text = json.loads(text)['text'] if isinstance(text, bytes) else text
                text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # half a surrogate pair is no character
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{where} is not a JSON object with a string "text"')
            if not text:
                continue
            drawn = draw(text)
        side, data, lowest = int(drawn < val_fraction), text.encode(), min(lowest, drawn)
        tokens[side].append(np.frombuffer(data, np.uint8).astype(dtype) if enc.name == 'bytes' else np.array(enc.encode_ordinary(text), dtype))
        size[side] += len(data)
        if last:
            tokens[side].append(np.array([enc._special_tokens[EOT]], dtype))
            ended[side] += 1
    return [np.concatenate(t) for t in tokens], ended, size, lowest


def start_worker(*settings):
    global worker_settings
    worker_settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # die with it


def encode_in_worker(batch):
    return encode_batch(*worker_settings, batch)


def encode_all(todo, settings, workers):
    """Pairs (place, encoded batch), in order; workers: processes, 1: this one."""
    if workers == 1:
        yield from ((place, encode_batch(*settings, batch)) for place, batch in todo)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), start_worker, settings) as pool:
        pending = deque()
        for place, batch in todo:
            pending.append((place, pool.submit(encode_in_worker, batch)))
            if len(pending) > 3 * workers:  # bounded, so that reading cannot run away from encoding
                place, future = pending.popleft()
                yield place, future.result()
        yield from ((place, future.result()) for place, future in pending)


class Shards:
    """The token files of one split. `tokens` counts all; file i holds those from i * limit on."""

    def __init__(self, folder, split, dtype, limit, tokens):
        self.folder, self.split, self.dtype, self.limit, self.tokens, self.file = folder, split, np.dtype(dtype), limit or sys.maxsize, tokens, None
        if tokens % self.limit:  # continues
            self.file = open(self.path(tokens // self.limit), 'r+b')
            self.file.truncate(tokens % self.limit * self.dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def path(self, i):
        return self.folder / (f'{self.split}.bin' if self.limit == sys.maxsize else f'{self.split}_{i:05d}.bin')

    def write(self, tokens):
        while len(tokens):
            i, at = divmod(self.tokens, self.limit)
            if at == 0:
                self.sync(close=True)
                self.file = open(self.path(i), 'wb')
            part = tokens[:self.limit - at]
            self.file.write(part.tobytes())
            self.tokens += len(part)
            tokens = tokens[len(part):]

    def sync(self, close=False):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            if close:
                self.file.close()

    def files(self):
        """The list for meta.json."""
        return [{'name': self.path(i).name, 'tokens': min(self.limit, self.tokens - i * self.limit), 'sha256': file_sha256(self.path(i))}
                for i in range(-(-self.tokens // self.limit))]


def prepare(sources=('stdlib',), out='data/stdlib', tokenizer='bytes', val_fraction=0.02, shard_tokens=0, shard=None, workers=None):
    """Writes train.bin, val.bin and meta.json into the folder `out`; returns the contents of meta.json.

    sources: names and paths as on the command line. shard_tokens: most tokens of a file, 0: all in one. shard: 'i/n', this job's part of the
    input files. workers: processes, default all cores. Exits with a sentence on bad input.
    """
    out = whole = Path(out)
    if not 0 < val_fraction < 1:
        raise UsageError(f'--val_fraction must lie between 0 and 1, not {val_fraction}')
    if not (shard_tokens == 0 or 1 <= shard_tokens < sys.maxsize) or (workers is not None and workers < 1):
        raise UsageError(f'--shard_tokens and --workers must be at least 1, not {shard_tokens} and {workers}')
    inputs = list(find_inputs(sources, out).items())
    lone = not shard and len(inputs) == 1 and not kind(inputs[0][0])[0]
    if shard:
        i, n = map(int, shard.split('/')) if re.fullmatch(r'\d+/\d+', shard) else (0, 0)
        if not i < n <= len(inputs):
            raise UsageError(f'--shard must be i/n with i from 0 to n - 1 and n at most the number of input files, {len(inputs)}, not {shard}')
        inputs, out = inputs[len(inputs) * i // n:len(inputs) * (i + 1) // n], out / f'shard_{i:05d}_of_{n:05d}'
    enc = load_tokenizer(tokenizer)
    file = Path(tokenizer) if Path(tokenizer).suffix in ('.tiktoken', '.json') else None
    meta = {'adaponder_data': 1, 'tokenizer': 'tokenizer' + file.suffix if file else str(tokenizer), 'tokenizer_sha256': enc.sha256,
            'vocab_size': enc.n_vocab, 'eot': enc._special_tokens[EOT], 'dtype': 'uint16' if enc.n_vocab <= 2**16 else 'uint32',
            'source': [str(s) for s in sources], 'val_fraction': val_fraction}
    work = out / 'unfinished'
    try:
        work.mkdir(parents=True, exist_ok=True)
        lowest = write_tokens(inputs, lone, work, enc, meta, int(shard_tokens), workers)
        if not shard:
            check_split(meta, f'a --val_fraction of {lowest + 0.001:.3f}')
        names = [f['name'] for split in ('train', 'val') for f in meta[split]['files']]
        if file:
            names.append(meta['tokenizer'])
            (work / names[-1]).write_bytes(file.read_bytes())
        (work / 'meta.json').write_text(json.dumps(meta, indent=1))
        (work / 'progress.json').unlink(missing_ok=True)
        (out / 'meta.json').unlink(missing_ok=True)  # not true while the files change
        for old in [*out.glob('train*.bin'), *out.glob('val*.bin')]:
            old.unlink()
        for name in [*names, 'meta.json']:
            os.replace(work / name, out / name)
        shutil.rmtree(work)
    except OSError as e:
        raise UsageError(f'{e}: once that is mended, the same command continues')
    except BrokenExecutor:
        raise UsageError('a worker process died, perhaps for lack of memory: try fewer --workers; the same command continues')
    except (ValueError, UsageError) as e:
        shutil.rmtree(work)
        if not any(out.iterdir()):
            out.rmdir()
        raise e if isinstance(e, UsageError) else UsageError(str(e))
    print(f'{out}: ' + ', '.join(f'{s} {meta[s]["tokens"]:,} tokens in {meta[s]["documents"]:,} documents' for s in ('train', 'val')))
    return join_shards(whole, n, meta) if shard else meta


def write_tokens(inputs, lone, work, enc, meta, shard_tokens, workers):
    """The token files of both splits in the folder `work`; adds 'train' and 'val' to meta. Continues where an interruption of the same job left off.

    Returns the lowest number that a document drew.
    """
    stats = [os.stat(path) if isinstance(path, Path) else None for path, _ in inputs]
    sizes = [s.st_size if s else 0 for s in stats]
    job = json.dumps([meta, shard_tokens, lone, [[str(path), s and s.st_size, s and s.st_mtime] for (path, _), s in zip(inputs, stats)]])
    state = {'job': hashlib.sha256(job.encode()).hexdigest(), 'place': [0, 0], 'tokens': [0, 0], 'documents': [0, 0], 'bytes': [0, 0], 'lowest': 1.0}
    progress = work / 'progress.json'
    if progress.is_file() and (old := json.loads(progress.read_text()))['job'] == state['job']:
        state = old
    else:
        shutil.rmtree(work)
        work.mkdir()
    sides = [Shards(work, split, meta['dtype'], shard_tokens, n) for split, n in zip(('train', 'val'), state['tokens'])]
    skipped, saved = [], time.monotonic()

    def batches():
        """Pairs (place of the last item, items), from the place in state on. A place: the number of an input file, and of an item within.

        About PIECE characters each, so that a worker gets neither crumbs nor everything.
        """
        (first, done), batch, size = state['place'], [], 0
        cut_at = re.compile('') if enc.name == 'bytes' else SAFE_CUT
        bar.update(sum(sizes[:first]))
        for n, (path, named) in enumerate(inputs[first:], first):
            end, found = bar.n + sizes[n], documents(path, named, cut_at, skipped, bar)
            if lone:
                length = sum(len(text.encode()) for _, text, *_ in documents(path, named, cut_at, [], tqdm(disable=True)))
                found = train_then_val(found, length - max(1, int(length * meta['val_fraction'])))
            for k, item in enumerate(found, 1):
                if n > first or k > done:
                    place, size = (n, k), size + len(item[1])
                    batch.append(item)
                    if size >= PIECE:
                        yield place, batch
                        batch, size = [], 0
            bar.update(end - bar.n)
        if batch:
            yield place, batch

    if enc.name == 'bytes' or all(stats) and sum(sizes) < 8 * PIECE:
        workers = 1  # starting processes would take longer
    with tqdm(total=sum(sizes), unit='B', unit_scale=True, desc=str(work.parent), mininterval=0.5) as bar:
        for place, (tokens, ended, size, lowest) in encode_all(batches(), (enc, meta['val_fraction'], meta['dtype']), workers or os.cpu_count()):
            for i in (0, 1):
                sides[i].write(tokens[i])
                state['tokens'][i] += len(tokens[i])
                state['documents'][i] += ended[i]
                state['bytes'][i] += size[i]
            state['place'], state['lowest'] = place, min(state['lowest'], lowest)
            if time.monotonic() - saved > SAVE_EVERY:
                for side in sides:
                    side.sync()
                write_beside(progress, json.dumps(state).encode())
                saved = time.monotonic()
    if not sum(state['tokens']):
        raise ValueError(f'no text in {", ".join(meta["source"])}')
    if skipped:
        print(f'skipped {len(skipped)} files that are not text in UTF-8, the first {skipped[0]}')
    for i, side in enumerate(sides):
        side.sync(close=True)
        meta[side.split] = {k: state[k][i] for k in ('tokens', 'documents', 'bytes')} | {'files': side.files()}
    return state['lowest']


def check_split(meta, remedy):
    for split, remedy in (('train', 'a smaller --val_fraction'), ('val', remedy)):
        if not meta[split]['tokens']:
            raise UsageError(f'none of {meta["train"]["documents"] + meta["val"]["documents"]} documents would be in the {split} split: give more, or {remedy}')


def join_shards(whole, n, meta):
    """Once all n jobs are done, the meta.json of the whole: their files in order."""
    folders = [whole / f'shard_{i:05d}_of_{n:05d}' for i in range(n)]
    missing = [f.name for f in folders if not (f / 'meta.json').is_file()]
    if missing:
        print(f'{whole}: {len(missing)} of {n} shards still to come, the next {missing[0]}')
        return meta
    metas = [json.loads((f / 'meta.json').read_text()) for f in folders]
    joined = {k: v for k, v in meta.items() if k not in ('train', 'val')}
    odd = [f.name for f, m in zip(folders, metas) if joined != {k: v for k, v in m.items() if k not in ('train', 'val')}]
    if odd:
        raise UsageError(f'{", ".join(odd)} in {whole} were made with other sources, tokenizer or val_fraction: prepare them again')
    for split in ('train', 'val'):
        joined[split] = {k: sum(m[split][k] for m in metas) for k in ('tokens', 'documents', 'bytes')}
        joined[split]['files'] = [f | {'name': f'{d.name}/{f["name"]}'} for d, m in zip(folders, metas) for f in m[split]['files']]
    check_split(joined, 'a larger --val_fraction')
    kept = folders[0] / joined['tokenizer']
    if kept.is_file():
        write_beside(whole / kept.name, kept.read_bytes())
    write_beside(whole / 'meta.json', json.dumps(joined, indent=1).encode())
    print(f'{whole}: all {n} shards are there')
    return joined


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='*', default=['stdlib'], help='files, folders, globs, stdlib (default), shakespeare, hf:NAME[:CONFIG] of datasets')
    parser.add_argument('--tokenizer', default='bytes', help='bytes (default), gpt2 or another tiktoken name, a .tiktoken or tokenizer.json file')
    parser.add_argument('--out', help='default: data/NAME, from the name of the first source')
    parser.add_argument('--val_fraction', type=float, default=0.02, help='share of the documents, or of a lone one, kept for validation (0.02)')
    parser.add_argument('--shard_tokens', type=float, default=0, help='most tokens in a file, e.g. 1e9 (default: one file)')
    parser.add_argument('--shard', metavar='i/n', help='do only the i-th (from 0) of n parts of the input files, for job arrays; the last job to end joins all')
    parser.add_argument('--workers', type=int, help='processes (default: all cores)')
    args = parser.parse_args(argv)
    name = Path(re.split(r'[*?[]', args.sources[0].replace('hf:', ''))[0]).resolve().name.lstrip('.')
    out = args.out or 'data/' + (re.split('[.:]', name)[0] or 'text')
    prepare(args.sources, out, args.tokenizer, args.val_fraction, args.shard_tokens, args.shard, args.workers)


if __name__ == '__main__':
    command_line(main)
