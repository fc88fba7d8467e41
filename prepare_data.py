"""
Text in, token files out.

    python prepare_data.py                                    the Python standard library's own source -> data/stdlib
    python prepare_data.py shakespeare --val_fraction 0.1     tiny Shakespeare (1 MB, downloaded) -> data/shakespeare
    python prepare_data.py PATH ... --tokenizer gpt2          files, folders, globs -> data/NAME
    python prepare_data.py pile/*.jsonl.zst --tokenizer tokenizer.json --out data/pile

A text or source file is one document (one of over two million characters: several, cut at the ends of lines). A
.jsonl file has one document a line and a .parquet file one a row, in the field "text". All but Parquet may be packed as
.gz or .zst. Of a folder, hidden files, caches and installed packages are left out, and files that are not text in UTF-8
are skipped and counted.

Every document ends with the token <|endoftext|>. A hash of its text decides whether it is for training or for
validation, so adding files moves no other document. If that leaves one of the two empty, as with a handful of files,
the end of all the text is for validation.

A bar shows the time that is left. An interrupted preparation continues when the same command is given again.
"""
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends quietly

import argparse
import base64
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

EOT = '<|endoftext|>'
SPLITS = ('train', 'val')
SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
LEFT_OUT = ('__pycache__', 'site-packages', 'dist-packages')  # folders that are not searched
LONGEST = 2**21  # characters of a document: a longer text counts as several, so that memory stays bounded
BATCH = 2**22    # characters that are encoded together, in threads
UNFINISHED = 'prepare_data.unfinished'  # folder in the output folder
SAVE_EVERY = 10  # seconds of work that an interruption may cost


# helpers that the other scripts use too

class UsageError(ValueError):
    """A mistake of the user. The message is one sentence: what is wrong, and what to do."""


def command_line(main):
    """Run main() as a program: every script of the project ends with this call.

    ValueError, OSError and a lack of memory become one sentence on stderr and exit code 2, Ctrl-C becomes exit code
    130. Any other exception is a bug and keeps its traceback.
    """
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:  # closed, as in "python train.py >&-"
            setattr(sys, name, open(os.devnull, mode))
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
        drop_stdout()
        sys.exit(1)
    except (ValueError, OSError) as e:
        exit_with(str(e) or type(e).__name__)
    except (MemoryError, RuntimeError) as e:  # numpy raises the first, torch the second, and that for bugs as well
        if isinstance(e, RuntimeError) and not re.search('allocate memory|out of memory', str(e)):
            raise
        exit_with(f'there is too little memory, ask for less at a time ({str(e)[:80]})')


def exit_with(sentence):
    """Leave with code 2, and the sentence on stderr in one line."""
    print(f'{Path(sys.argv[0]).name}: {" ".join(sentence.split())}', file=sys.stderr)
    sys.exit(2)


def drop_stdout():
    """From here on what is printed goes nowhere, what is buffered included: the reader of stdout is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_beside(path, data):
    """Write bytes so that the file appears under its name whole or not at all, whenever the process is killed."""
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, lets an unknown ~user stand
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path):
    """Raise UsageError unless write_beside(path) will work: asked before the work whose result goes there."""
    path = Path(os.path.expanduser(path))
    if os.path.exists(path) and not path.is_file():
        raise UsageError(f'{path} is a folder or a device: give the name of a file')
    try:
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name).close()  # under a name that no file has
    except OSError as e:
        raise UsageError(f'{path} cannot be written ({e.strerror}): give a file in a folder that is there and writable')


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


def read_json(path):
    """The dict in a JSON file that a script of this project wrote."""
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UsageError(f'{path} is damaged: make it again or give another')
    return values


def optional(module, path):
    """Import a package that only some inputs need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f'{path} needs a package that is not installed: pip install {module.split(".")[0]}')


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# tokenizers

# GPT-2's pattern: how a text is split into words before the byte-pair encoding
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A run of white space so long that tiktoken's regex library overflows. (Python's \s has four characters more.)
LONG_BLANKS = re.compile(r'[^\S\x1c-\x1f]{100000,}')


def load_tokenizer(tokenizer, folder=None):
    """Return the tiktoken.Encoding of a name, a file, or a data folder.

    tokenizer: 'bytes', a name that tiktoken knows, a .tiktoken or tokenizer.json file, or the contents of a meta.json,
    with `folder` where it lies. The result has an attribute sha256, of the file or of the tokens. Encode documents by
    encode_ordinary(), which takes <|endoftext|> within a text for ordinary text.
    Raises UsageError if the tokenizer is missing, cannot be used, or is not the one that made the data.
    """
    meta = tokenizer if isinstance(tokenizer, dict) else {'tokenizer': tokenizer, 'tokenizer_sha256': None}
    if not {'tokenizer', 'tokenizer_sha256'} <= meta.keys():
        raise UsageError(f'the meta.json of {folder or "the data"} names no tokenizer: prepare the data again')
    name = str(meta['tokenizer'])
    path = Path(folder or '', os.path.expanduser(name))
    if path.suffix in ('.tiktoken', '.json'):
        if not path.is_file():
            raise UsageError(f'there is no tokenizer file {path}')
        enc = load_tiktoken_file(path) if path.suffix == '.tiktoken' else HuggingFaceEncoding(path)
        enc.sha256 = file_sha256(path)
    else:
        enc = load_named_tokenizer(name)
        # of the tokens only: tiktoken rewrites its patterns for speed now and then
        tokens = sorted((i, token.hex()) for token, i in enc._mergeable_ranks.items())
        enc.sha256 = hashlib.sha256(json.dumps(tokens + sorted(enc._special_tokens.items())).encode()).hexdigest()
    if isinstance(tokenizer, dict) and enc.sha256 != meta['tokenizer_sha256']:
        raise UsageError(f'tokenizer {path} is not the one that made the data: its sha256 differs from meta.json')
    if EOT not in enc._special_tokens:
        raise UsageError(f'tokenizer {name} has no {EOT}, which ends a document: give another')
    return enc


def load_named_tokenizer(name):
    if name == 'bytes':
        ranks = {bytes([b]): b for b in range(256)}
        return tiktoken.Encoding(name, pat_str=r'[\s\S]{1,64}', mergeable_ranks=ranks, special_tokens={EOT: 256})
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UsageError(f'unknown tokenizer {name!r}: give bytes, one of {", ".join(known)}, '
                         'or a .tiktoken or tokenizer.json file')
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken lets through whatever its HTTP library raises
        raise UsageError(f'tiktoken could not download {name} ({type(e).__name__}): '
                         'without a network use bytes, or a .tiktoken or tokenizer.json file')
    if name in ('gpt2', 'r50k_base', 'p50k_base'):
        enc = GPT2Encoding(name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks,
                           special_tokens=enc._special_tokens)
    return enc


def load_tiktoken_file(path):
    """Read lines of "token-in-base64 rank". The file holds no pattern: GPT-2's is taken."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UsageError(f'{path} is not a .tiktoken file: a line must be a token in base64 and its rank')
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UsageError(f'{path} is not a whole .tiktoken file: ranks must be 0, 1, 2, ... and every byte a token')
    for name, size in (('p50k_base', 50280), ('cl100k_base', 100256), ('o200k_base', 199998)):
        if len(ranks) == size:
            raise UsageError(f'{path} looks like {name}, whose pattern is not in the file: use --tokenizer {name}')
    return GPT2Encoding(path.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


class GPT2Encoding(tiktoken.Encoding):
    """GPT-2's byte-pair encoding, also of runs of blanks on which tiktoken's regex library would overflow."""

    def encode_ordinary(self, text):
        ids, start = [], 0
        for run in LONG_BLANKS.finditer(text) if len(text) >= 100000 else []:
            # the pattern makes one word of the run, less its last blank if something follows
            end = run.end() if run.end() == len(text) else run.end() - 1
            ids += super().encode_ordinary(text[start:run.start()])
            ids += self._encode_single_piece(text[run.start():end])
            start = end
        return ids + super().encode_ordinary(text[start:])


class HuggingFaceEncoding(tiktoken.Encoding):
    """A byte-level tokenizer.json: `tokenizers` encodes, and tiktoken decodes."""

    encode = encode_to_numpy = None  # only encode_ordinary() and encode_ordinary_batch() are there

    def __init__(self, path):
        library = optional('tokenizers', path)
        try:
            text = path.read_text(encoding='utf-8-sig')
            self.tokenizer = library.Tokenizer.from_str(text)
            spec = json.loads(text)
            if spec['decoder']['type'] != 'ByteLevel' or spec['model'].get('dropout'):
                raise ValueError('it is not of bytes, or has dropout')
            # A byte is written as a printable character: itself if it is one, else the next one from U+0100 on.
            # Added tokens are written as they are.
            printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
            others = sorted(set(range(256)) - set(printable))
            byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
            added = {token['content']: token['id'] for token in spec['added_tokens']}
            vocab = self.tokenizer.get_vocab()
            ranks = {bytes(byte_of[c] for c in name): i for name, i in vocab.items() if name not in added}
        except Exception as e:  # the library raises plain Exception
            raise UsageError(f'{path} cannot be used as a tokenizer.json ({e}): give another file')
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # special tokens within a text are ordinary text
        super().__init__(path.name, pat_str='', mergeable_ranks=ranks, special_tokens=added)
        probe, in_utf8 = 'Ab  c\n\tÉ 你', {*range(0xF5)} - {0xC0, 0xC1}
        if any(bytes([b]) not in ranks for b in in_utf8) or self.decode(self.encode_ordinary(probe)) != probe:
            raise UsageError(f'{path} loses some of a text (letters, blanks or bytes): give another tokenizer')

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts, num_threads=None):
        """The token ids of each text. The variable RAYON_NUM_THREADS sets the number of threads, not num_threads."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


# documents

def find_inputs(sources, out):
    """Return (path or 'hf:NAME', whether the user named this very file, bytes, time of change), in a fixed order."""
    inputs = {}
    for source in map(str, sources):
        if source.startswith('hf:') and len(source) > 3:
            inputs[source] = (source, True, 0, 0)
            continue
        if source == 'shakespeare':
            source = str(download_shakespeare(out))
        path = sysconfig.get_paths()['stdlib'] if source == 'stdlib' else os.path.expanduser(source)
        in_folder = os.path.isdir(path)
        names = walk(path, out) if in_folder else [path, *glob.glob(path, recursive=True)]
        if source == 'stdlib':
            names = [name for name in names if name.endswith('.py')]
        files = sorted({Path(name) for name in names if os.path.isfile(name)})
        if not files:
            raise UsageError(f'no files found for {source!r}: give files, folders, globs, stdlib, shakespeare, hf:NAME')
        for file in files:
            entry = file, not in_folder, file.stat().st_size, file.stat().st_mtime_ns
            inputs.setdefault(os.path.realpath(file), entry)  # once, however many of the sources it is in
    return list(inputs.values())


def walk(folder, out):
    """The files of a folder and those below it, without hidden ones and without the output folder."""
    names = []

    def refuse(error):
        raise error
    for at, folders, files in os.walk(folder, onerror=refuse):
        if Path(at).resolve() == out.resolve():
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != '.' and name not in LEFT_OUT]
        names += [os.path.join(at, name) for name in files if name[0] != '.']
    return names


def download_shakespeare(out):
    path = out / 'input.txt'
    if not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                text = response.read()
        except Exception as e:  # urllib lets through those of http and ssl too
            raise UsageError(f'shakespeare could not be downloaded ({e}): without a network give stdlib, or text files')
        out.mkdir(parents=True, exist_ok=True)
        write_beside(path, text)
    return path


def read_documents(path):
    """Yield (text, bytes of the file read so far) for every document of one input that is not empty.

    Raises UnicodeError for a text file that is not text, and UsageError for anything else that is wrong with it.
    """
    name = str(path).lower()
    form = Path(re.sub(r'\.(gz|zst)$', '', name)).suffix
    try:
        if name.startswith('hf:'):
            dataset, _, config = str(path)[3:].partition(':')
            rows = optional('datasets', path).load_dataset(dataset, config or None, split='train', streaming=True)
            print(f'{path} streams, and does not tell its length: the bar cannot show the time that is left')
            yield from ((text, 0) for text in row_texts(rows, path))
            return
        with open(path, 'rb') as raw:
            stream = raw  # a file that is damaged or was cut off raises an error in either library
            if name.endswith('.gz'):
                stream = gzip.GzipFile(fileobj=raw)
            elif name.endswith('.zst'):
                stream = io.BufferedReader(optional('pyarrow', path).input_stream(raw, compression='zstd'), 2**20)
            if stream is not raw and os.path.getsize(path) == 0:
                raise UsageError(f'{path} is empty, which no packed file is: mend it or leave it out')
            if form == '.parquet':
                table = optional('pyarrow.parquet', path).ParquetFile(raw, page_checksum_verification=True)
                rows = (row for batch in table.iter_batches(256, columns=['text']) for row in batch.to_pylist())
                texts = row_texts(rows, path)
            elif form in ('.jsonl', '.ndjson'):
                texts = row_texts(stream, path)
            else:
                texts = long_texts(io.TextIOWrapper(stream, encoding='utf-8-sig', newline=''))
            for text in texts:
                yield text, raw.tell()
    except (UsageError, UnicodeError):
        raise
    except Exception as e:  # every library has its own
        raise UsageError(f'{path} cannot be read ({e}): mend it or leave it out')


def row_texts(rows, path):
    """The field "text" of the rows of a table, or of lines of JSON (bytes)."""
    for i, row in enumerate(rows, 1):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            text = (json.loads(row) if isinstance(row, bytes) else row)['text']
            # half a surrogate pair, as JSON may hold it, is no character
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(f'{path}, line {i} is not an object with a string "text": mend it or leave it out')
        if text:
            yield text


def long_texts(reader):
    """A text, or where it is too long for one document the parts of it, cut at the ends of lines."""
    while text := reader.read(LONGEST):
        text += reader.readline(LONGEST)
        if '\0' in text:  # an archive, UTF-16, or another binary file
            raise UnicodeError('it holds zero bytes')
        yield text


def read_batches(inputs, enc, val_fraction, skipped):
    """Yield batches (list of (text, split), bytes read); split is 0 for train, 1 for val. Same inputs, same batches.

    skipped: this list collects the files of folders that are not text.
    """
    batch, size, before, total, splits = [], 0, 0, 0, set()
    refuses_blanks = type(enc) is tiktoken.Encoding and enc.name != 'bytes'
    for path, named, file_size, _ in inputs:
        begun = False
        try:
            for text, position in read_documents(path):
                begun = True
                if refuses_blanks and LONG_BLANKS.search(text):
                    raise UsageError(f'{path} has 100,000 blanks in a row, too many for {enc.name}: leave some out')
                if size >= BATCH:
                    yield batch, before + position
                    batch, size = [], 0
                split = split_of(text, val_fraction)
                batch.append((text, split))
                splits.add(split)
                size += len(text)
                total += len(text.encode())
        except UnicodeError:
            if named or begun:  # in a folder too, once a part of it is written
                raise UsageError(f'{path} is not text in UTF-8: unpack an archive, convert it, or leave it out')
            skipped.append(path)
        before += file_size
    if len(splits) == 1:  # the hashes of a few documents may put all of them into one split
        print(f'too few documents to choose some: the last {val_fraction:.1%} of the text is for validation')
        batch = cut_end(batch, max(1, int(total * val_fraction)))
    yield batch, before


def split_of(text, val_fraction):
    """0 (train) or 1 (val), from a hash of the beginning of a document."""
    digest = hashlib.blake2b(text[:2**18].encode(), digest_size=8).digest()
    return int(int.from_bytes(digest, 'big') / 2**64 < val_fraction)


def cut_end(batch, n):
    """The documents of a batch with the last n bytes for validation, or some more where that would cut a character."""
    parts = []
    for text, _ in reversed(batch):
        data = text.encode()
        head = data[:max(0, len(data) - n)].decode(errors='ignore')
        n = max(0, n - len(data))
        parts += [(text[len(head):], 1), (head, 0)]
    return [(text, split) for text, split in reversed(parts) if text]


# the whole preparation

def encode_all(batches, enc, done, workers):
    """Yield for each batch [(token ids, number of documents) of train, of val], and the bytes read.

    The first `done` batches are left out. Texts are encoded in threads: the libraries release Python's lock.
    """
    for number, (batch, position) in enumerate(batches):
        if number < done:
            continue
        encoded = []
        for split in range(len(SPLITS)):
            texts = [text for text, its_split in batch if its_split == split]
            if enc.name == 'bytes':
                ids = [np.frombuffer(text.encode(), np.uint8) for text in texts]
            else:
                ids = enc.encode_ordinary_batch(texts, num_threads=workers or os.cpu_count())
            parts = [part for document in ids for part in (document, [enc.eot_token])]
            encoded.append((np.concatenate([np.zeros(0, int), *parts]), len(texts)))
        yield encoded, position


def prepare(sources=('stdlib',), out='data/stdlib', tokenizer='bytes', val_fraction=0.02, workers=None):
    """Write train.bin, val.bin and meta.json into the folder `out`; return the contents of meta.json.

    sources: names and paths as on the command line. workers: threads, default all cores. Raises ValueError or OSError
    on bad input; work of more than some seconds stays in out/prepare_data.unfinished, and the same call continues it.
    """
    if not 0 < val_fraction < 1:
        raise UsageError(f'--val_fraction must lie between 0 and 1, not {val_fraction}')
    if workers is not None and workers < 1:
        raise UsageError(f'--workers must be at least 1, not {workers}')
    out = Path(os.path.expanduser(out))
    inputs = find_inputs(sources, out)
    if workers:
        os.environ['RAYON_NUM_THREADS'] = str(workers)  # for `tokenizers`
    enc = load_tokenizer(tokenizer)
    file = Path(os.path.expanduser(tokenizer))
    is_file = file.suffix in ('.tiktoken', '.json')
    meta = {'adaponder_data': 1, 'tokenizer': f'tokenizer{file.suffix}' if is_file else str(tokenizer),
            'tokenizer_sha256': enc.sha256, 'vocab_size': enc.n_vocab, 'eot': enc.eot_token,
            'dtype': 'uint16' if enc.n_vocab <= 2**16 else 'uint32', 'source': [str(source) for source in sources],
            'val_fraction': val_fraction}

    work, is_new = out / UNFINISHED, not out.exists()  # everything is made here, and moved when it is whole
    if not work.is_dir() and (out / 'meta.json').is_file() != (out / 'train.bin').is_file():
        raise UsageError(f'{out} holds a run, or files of another program: give the data a folder of its own')
    work.mkdir(parents=True, exist_ok=True)
    lock_file = lock(work)
    try:
        meta |= write_tokens(inputs, work, enc, meta, workers)
        publish(work, out, meta, file if is_file else None)
    except BaseException:
        if not (work / 'progress.json').is_file():  # nothing is saved that the same command could continue
            remove_work(work)
            with suppress(OSError):  # other files are there
                if is_new:
                    out.rmdir()
        raise
    finally:
        lock_file.close()
    counts = [f'{name} {meta[name]["tokens"]:,} tokens in {meta[name]["documents"]:,} documents' for name in SPLITS]
    print(f'{out}: ' + ', '.join(counts))
    return meta


def write_tokens(inputs, work, enc, meta, workers):
    """Write the token files of both splits into the folder `work`; return {split: what meta.json says of it}.

    Continues where an interrupted call with the same arguments left off: progress.json says how far that was.
    """
    job = json.dumps([meta, [[str(path), *rest] for path, *rest in inputs]])
    job = hashlib.sha256(job.encode()).hexdigest()
    progress = work / 'progress.json'
    state = {}
    if progress.is_file():
        with suppress(UsageError):  # a damaged one: begin anew
            state = read_json(progress)
    if state.get('job') != job:
        progress.unlink(missing_ok=True)
        state = {'job': job, 'batches': 0} | {name: {'tokens': 0, 'documents': 0} for name in SPLITS}

    dtype, files = np.dtype(meta['dtype']), {name: work / f'{name}.bin' for name in SPLITS}
    for name, path in files.items():
        with open(path, 'ab') as file:
            size = state[name]['tokens'] * dtype.itemsize
            if file.tell() < size:
                raise UsageError(f'{path} is shorter than progress.json says: remove {work}')
            file.truncate(size)  # an interrupted run wrote more than it saved

    skipped, saved = [], time.monotonic()
    batches = read_batches(inputs, enc, meta['val_fraction'], skipped)
    with tqdm(total=sum(size for _, _, size, _ in inputs), unit='B', unit_scale=True, desc=str(work.parent)) as bar:
        for encoded, position in encode_all(batches, enc, state['batches'], workers):
            for name, (ids, documents) in zip(SPLITS, encoded):
                with open(files[name], 'ab') as file:
                    file.write(ids.astype(dtype).tobytes())
                state[name]['tokens'] += len(ids)
                state[name]['documents'] += documents
            state['batches'] += 1
            bar.update(position - bar.n)
            if time.monotonic() - saved > SAVE_EVERY:
                write_beside(progress, json.dumps(state).encode())
                saved = time.monotonic()
    if skipped:
        print(f'skipped {len(skipped)} files that are not text in UTF-8, the first is {skipped[0]}')
    if not all(state[name]['tokens'] for name in SPLITS):
        raise UsageError(f'{", ".join(meta["source"])}: too little text for training and validation: give more')
    for name, path in files.items():
        state[name]['files'] = [{'name': path.name, 'tokens': state[name]['tokens'], 'sha256': file_sha256(path)}]
    return {name: state[name] for name in SPLITS}


def publish(work, out, meta, tokenizer_file):
    """Move the finished files from `work` to `out`. A meta.json is there only while the files are as it says."""
    names = [file['name'] for split in SPLITS for file in meta[split]['files']]
    if tokenizer_file:
        names.append(meta['tokenizer'])
        (work / meta['tokenizer']).write_bytes(tokenizer_file.read_bytes())
    (work / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
    (work / 'progress.json').unlink(missing_ok=True)
    (out / 'meta.json').unlink(missing_ok=True)
    for name in [*names, 'meta.json']:
        os.replace(work / name, out / name)
    remove_work(work)


def remove_work(work):
    """Delete the folder of an unfinished preparation: the files that are made there, and nothing else."""
    names = ['lock', 'meta.json', 'progress.json', 'tokenizer.json', 'tokenizer.tiktoken']
    for path in [*(work / name for name in names), *work.glob('*.bin'), *work.glob('progress.json.*.tmp')]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        work.rmdir()


def default_out(source):
    """data/NAME, from a path, a glob or a name: 'a/my.corpus.jsonl' -> data/my, 'hf:org/set:en' -> data/set."""
    path = re.split(r'[*?[]', os.path.expanduser(source.removeprefix('hf:')))[0]
    name = re.split('[.:]', Path(path).resolve().name.lstrip('.'))[0]
    return f'data/{name or "text"}'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = parser.add_argument
    arg('sources', nargs='*', default=['stdlib'],
        help='files, folders, globs, stdlib (default), shakespeare, or hf:NAME[:CONFIG] for a Hugging Face dataset')
    arg('--tokenizer', default='bytes',
        help='bytes (default), gpt2 or another name of tiktoken, a .tiktoken or tokenizer.json file')
    arg('--out', help='folder for the result (default: data/NAME, from the name of the first source)')
    arg('--val_fraction', type=float, default=0.02, help='share of the documents for validation (default: 0.02)')
    arg('--workers', type=int, help='threads that encode (default: all cores)')
    args = parser.parse_args(argv)
    out = args.out or default_out(args.sources[0])
    prepare(args.sources, out, args.tokenizer, args.val_fraction, args.workers)


if __name__ == '__main__':
    command_line(main)
