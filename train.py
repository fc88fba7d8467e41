"""
Trains AdaPonderLM. One process on a laptop, torchrun on a cluster:

    python train.py config/tiny.py --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py config/pythia70m.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/pythia410m.py

A config file assigns to the fields of TrainConfig; --key=value overrides it. The same command again goes on from out_dir/ckpt.pt.
The micro-batches of a step depend on (seed, step) alone, so any number of processes that divides gradient_accumulation_steps
trains the same model, and a resumed run equals an uninterrupted one.
"""
import ast
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import model as model_py
from model import AdaPonderConfig, AdaPonderLM, config_from_state, load_checkpoint
from prepare_data import load_tokenizer, prepare

Duration = int | str  # a number of steps, or '1000 steps', '1.2B tokens', '40%' (of max_steps)


@dataclass
class TrainConfig:
    # files
    out_dir: str = 'out/run'
    data_dir: str = 'data/stdlib'     # made by prepare_data.py; the default set is made when it is missing
    verify_data: bool = True          # hash the token files at the start: about a second a GB and process of a node
    init_from: str = 'scratch'        # 'scratch', a Hugging Face folder of GPT-NeoX weights, or a ckpt.pt; its shape wins over the one below
    resume: bool = True               # go on from out_dir/ckpt.pt if it exists; False starts anew
    # model
    vocab_size: int = 0               # 0: the data's, rounded up to a multiple of 64
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_iter: int = 4                   # 1: vanilla Pythia
    halting: bool = True              # False: fixed-depth PonderLM
    tau: float = 1e-4
    scale_embeds: bool = True
    gate_width: float = 4.0
    gate_bias: float = 4.0
    objective: str = 'saving'         # how gates learn to halt: 'saving', 'paper' or 'live', see AdaPonderConfig
    feedback: str = 'embedding'       # 'hidden': a loop transformer
    ponder_norm: bool = False         # a LayerNorm of its own for the pondering embedding
    # the two stages
    ponder_start: Duration = '40%'    # S0: until here plain PonderLM; then the gates act
    ponder_full: Duration = '70%'     # S1: k has risen from 0 at S0 to k_max here
    k_max: float = 0.4                # share of the gated iterations that shall not run; objectives 'paper' and 'live': fraction of all gate values under pressure
    ponder_lambda: float = 0.1        # weight of the ponder loss
    explore: float = 0.1              # objective 'saving': share of the training tokens that run all iterations, to show what halting costs; all until S0, this at S1, none at the end
    freeze_backbone: Duration = 0     # from S0 on, train the gates alone for this long
    # optimisation
    batch_size: int = 16              # sequences a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches a step, over all processes
    max_steps: Duration = 1000
    learning_rate: float = 1e-3
    final_lr: float = 0.1             # where the cosine ends, as a fraction of the peak
    warmup: Duration = '1%'
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    seed: int = 1337
    # evaluation, checkpoints, logs
    eval_interval: Duration = '20%'
    eval_tokens: int = 65536          # of the val split, evenly spread over it
    ckpt_interval: Duration = '10%'
    log_interval: int = 10
    sample_tokens: int = 300          # length of the sample at the end; 0: none
    wandb_log: bool = False
    wandb_project: str = 'adaponder'
    # system
    device: str = 'auto'              # 'cpu', 'cuda', 'mps'; auto: cuda where there is one, else cpu
    dtype: str = 'auto'               # 'float32' or 'bfloat16' (autocast); auto: bfloat16 on cuda
    compile: bool = True              # torch.compile the backbone; on cuda only
    execution: str = 'auto'           # once gates act: 'dense' runs halted tokens and masks them, 'packed' skips them (not with objective 'paper' or remat); auto: packed on a CPU
    remat: bool = False               # recompute each iteration's blocks in backward: memory of one iteration for one more forward of the blocks
    shard_optimizer: bool = False     # ZeroRedundancyOptimizer: optimizer state split over the processes


class UsageError(SystemExit):
    """One sentence on stderr, exit code 2. here: it may be the trouble of this rank alone; else all ranks have it, rank 0 says it, and the process group ends."""

    def __init__(self, message, here=False):
        rank = int(os.environ.get('RANK', 0))
        if here or rank == 0:
            print(f'train.py{f" (rank {rank})" if rank else ""}: {message}', file=sys.stderr, flush=True)
        if not here and dist.is_available() and dist.is_initialized():  # threads that outlive the interpreter may abort, and spoil the exit code
            dist.destroy_process_group()
        super().__init__(2)


def load_config(argv):
    """TrainConfig from a config file and --key=value arguments, in that order. Unknown keys and wrong types are refused."""
    known = {f.name: f for f in fields(TrainConfig)}
    values = {}

    def assign(key, value, where):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UsageError(f'{where}: unknown key {key!r}' + (f', did you mean {near[0]!r}?' if near else '; the keys are in TrainConfig'))
        kind = known[key].type
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f'{where}: {key} must be {getattr(kind, "__name__", kind)}, not {value!r}')
        values[key] = value

    for arg in argv:
        if arg in ('-h', '--help'):
            print(__doc__.strip(), *(f'    {f.name} = {f.default!r}' for f in fields(TrainConfig)), sep='\n')
            raise SystemExit(0)
        if arg.startswith('--'):
            key, eq, text = arg[2:].partition('=')
            if not eq:
                raise UsageError(f'{arg} has no value: write {arg}=VALUE')
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            if key in known and (known[key].type is str or known[key].type is Duration and type(value) is not int):
                value = text
            assign(key, value, 'command line')
        else:
            if not Path(arg).is_file():
                have = ', '.join(sorted(str(p) for p in Path('config').glob('*.py')))
                raise UsageError(f'no config file {arg}; there are {have}')
            names = {}
            try:
                exec(compile(Path(arg).read_text(), arg, 'exec'), names)
            except Exception as e:
                raise UsageError(f'{arg} is not a config file of assignments: {type(e).__name__}: {e}')
            for key, value in names.items():
                if not key.startswith('_'):
                    assign(key, value, arg)
    return TrainConfig(**values)


def in_steps(name, duration, tokens_per_step, max_steps):
    """A Duration in steps."""
    m = re.fullmatch(r'(\d+\.?\d*(?:e\d+)?)\s*([KMBT]?)\s*(steps|tokens|%|)', str(duration).strip())
    n = float(m[1]) * {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}[m[2]] if m else 0.5
    if (m and m[3] == '%' and max_steps is None) or (n % 1 and not (m and m[3] in ('%', 'tokens'))):
        like = "'1000 steps' or '1.2B tokens'" if max_steps is None else "'1000 steps', '1.2B tokens' or '40%' of max_steps"
        raise UsageError(f'{name} must be a number of steps, or like {like}, not {duration!r}')
    return round(n / tokens_per_step if m[3] == 'tokens' else n * max_steps / 100 if m[3] == '%' else n)


class Windows:
    """A split of a data folder as windows of block_size + 1 tokens, each overlapping the next by one: no token is predicted twice.

    train order: epoch e is a permutation of all windows, cut at an offset, both drawn from (seed, e).
    """

    def __init__(self, folder, meta, split, block_size, vocab_size, seed=0):
        self.block_size, self.vocab_size, self.seed, self.split = block_size, vocab_size, seed, split
        self.parts, starts = [], [0]
        dtype = np.dtype(meta['dtype'])
        for file in meta[split]['files']:
            path = Path(folder) / file['name']
            if not path.is_file() or path.stat().st_size != file['tokens'] * dtype.itemsize:
                raise UsageError(f"{path} is missing or not the {file['tokens']} tokens that meta.json says: prepare the data again", here=True)
            self.parts.append(np.memmap(path, dtype=dtype, mode='r') if file['tokens'] else np.zeros(0, dtype))
            starts.append(starts[-1] + file['tokens'])
        self.starts = np.array(starts)
        self.n = (starts[-1] - block_size) // block_size  # one window fewer than fits, so that any offset leaves room
        if self.n < 1:
            raise UsageError(f'the {split} split of {folder} has {starts[-1]} tokens, too few for block_size {block_size}')
        self.epoch = None

    def tokens(self, start, length):
        """length tokens from `start` on, across file borders."""
        part = int(np.searchsorted(self.starts, start, side='right')) - 1
        out = []
        while length > 0:
            piece = self.parts[part][start - self.starts[part]:][:length]
            out.append(piece)
            start, length, part = start + len(piece), length - len(piece), part + 1
        return np.concatenate(out).astype(np.int64)

    def batch(self, starts):
        x = torch.from_numpy(np.stack([self.tokens(s, self.block_size + 1) for s in starts]))  # (B, T + 1)
        if int(x.max()) >= self.vocab_size:
            raise ValueError(f'the {self.split} data holds token {int(x.max())}, beyond vocab_size {self.vocab_size}: it was made with another tokenizer')
        return x

    def train_batch(self, index, batch_size):
        """Micro-batch number `index` of the whole run: a pure function of (seed, index)."""
        starts = []
        for g in range(index * batch_size, (index + 1) * batch_size):
            epoch, i = divmod(g, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch, self.offset, self.order = epoch, int(rng.integers(self.block_size)), rng.permutation(self.n)
            starts.append(self.offset + int(self.order[i]) * self.block_size)
        return self.batch(starts)


def read_ahead(read, numbers, depth=4):
    """Yields read(n) for n in numbers; a thread is up to `depth` of them ahead."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(read, next(numbers)) for _ in range(depth))
        while True:
            yield ahead.popleft().result()
            ahead.append(thread.submit(read, next(numbers)))


def verify(folder, meta, part, parts):
    """Hash every parts-th token file, from number `part` on, and refuse what meta.json does not know."""
    for file in [f for split in ('train', 'val') for f in meta[split]['files']][part::parts]:
        digest = hashlib.sha256()
        with open(Path(folder) / file['name'], 'rb') as f:
            while block := f.read(2**20):
                digest.update(block)
        if digest.hexdigest() != file['sha256']:
            raise UsageError(f"{Path(folder) / file['name']} was changed: its sha256 is not the one in meta.json; prepare the data again", here=True)


@torch.no_grad()
def evaluate(model, val, cfg, device, autocast, halting, rank=0, world=1):
    """A pass over eval_tokens of val. Returns a dict: loss (nats a token), ppl, depth, active (share that ran iteration 1 .. n_iter),
    flops_saved against fixed depth, nll_by_depth."""
    K = model.cfg.n_iter
    n = max(1, min(val.n, cfg.eval_tokens // cfg.block_size))
    sums = torch.zeros(2, K, dtype=torch.float64)  # tokens and their NLL, by depth
    mine = range(rank, n, world)
    execution = 'packed' if device.type == 'cpu' and halting is None else 'dense'  # the same function; compiled kernels want one shape
    for i in range(0, len(mine), cfg.batch_size):
        x = val.batch([w * val.n // n * cfg.block_size for w in mine[i:i + cfg.batch_size]]).to(device)
        with autocast():
            out = model(x[:, :-1], x[:, 1:], execution=execution, halting=halting)
        d = out.depth.flatten().cpu() - 1
        sums[0].index_add_(0, d, torch.ones(len(d), dtype=torch.float64))
        sums[1].index_add_(0, d, out.nll.flatten().double().cpu())
    if world > 1:
        dist.all_reduce(sums)
    tokens, nll = sums
    share, depths, context = tokens / tokens.sum(), torch.arange(1, K + 1), (cfg.block_size + 1) / 2
    fixed = replace(model.cfg, halting=False)  # PonderLM has no gates to pay for, nor have we while they stay out
    flops = (model.cfg if halting is None else fixed).inference_flops(depths, context)
    loss = float(nll.sum() / tokens.sum())
    return dict(loss=loss, ppl=math.exp(min(loss, 50)), depth=float((depths * share).sum()), active=[float(share[i:].sum()) for i in range(K)],
                flops_saved=float(1 - (flops * share).sum() / fixed.inference_flops(K, context)), nll_by_depth=[float(x / c) if c else None for x, c in zip(nll, tokens)])


def peak_flops(device, dtype=torch.float32):
    """Dense bf16 matrix FLOP/s of a known GPU; elsewhere what one product of 1024 x 1024 matrices of this dtype reaches now."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        for key, peak in [('H100 PCIe', 756e12), ('H100', 989e12), ('H200', 989e12), ('H800', 989e12), ('B200', 2250e12), ('A100', 312e12),
                          ('A800', 312e12), ('L40S', 362e12), ('A6000', 155e12), ('4090', 165e12), ('3090', 71e12), ('V100', 125e12)]:
            if key in name:
                return peak
    a = torch.ones(1024, 1024, device=device, dtype=dtype)  # not random: that would move the generator
    for n in (1, 3):  # the first one warms up
        t = time.perf_counter()
        for _ in range(n):
            b = a @ a
        b.sum().item()
        seconds = time.perf_counter() - t
    return n * 2 * 1024 ** 3 / seconds


def peak_memory(device):
    """Bytes: of the GPU, or of the whole process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def save_checkpoint(path, state):
    """Beside, synced, then renamed: at any moment `path` is a whole checkpoint. A full disk costs this checkpoint, not the last one."""
    tmp = f'{path}.tmp'
    try:
        with open(tmp, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        return True
    except (OSError, RuntimeError) as e:
        tqdm.write(f'checkpoint not written ({e}); the one before stays in place')
        Path(tmp).unlink(missing_ok=True)
        return False


def lock(out_dir):
    """Refuse a second run on the same folder; the lock falls with the process. Returns the open file, to be kept."""
    f = open(Path(out_dir) / 'lock', 'w')
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # not on Windows
    except OSError:
        raise UsageError(f'another run is writing to {out_dir}: give this one another --out_dir')
    return f


def main(argv):
    cfg = load_config(argv)

    # processes and devices
    world, rank, local_rank = (int(os.environ.get(v, d)) for v, d in (('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_RANK', 0)))
    device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if cfg.device == 'auto' else cfg.device)
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UsageError('device is cuda, but this torch sees no GPU: give --device=cpu')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if cfg.dtype not in ('auto', 'float32', 'bfloat16'):
        raise UsageError(f"dtype must be 'auto', 'float32' or 'bfloat16', not {cfg.dtype!r}")
    bf16 = cfg.dtype == 'bfloat16' or (cfg.dtype == 'auto' and device.type == 'cuda')
    autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext
    if cfg.execution not in ('auto', 'dense', 'packed') or (cfg.execution == 'packed' and (cfg.objective == 'paper' or cfg.remat)):
        raise UsageError(f"execution must be 'auto', 'dense', or 'packed' with another objective than 'paper' and --remat=False, not {cfg.execution!r}")
    if cfg.gradient_accumulation_steps % world:
        raise UsageError(f'gradient_accumulation_steps ({cfg.gradient_accumulation_steps}) must be a multiple of the number of processes ({world})')
    if min(cfg.batch_size, cfg.block_size, cfg.gradient_accumulation_steps, cfg.log_interval) < 1:
        raise UsageError('batch_size, block_size, gradient_accumulation_steps and log_interval must be at least 1')
    if not 0 <= cfg.k_max <= 1 or not 0 <= cfg.explore <= 1 or min(cfg.ponder_lambda, cfg.learning_rate, cfg.final_lr, cfg.grad_clip) < 0:
        raise UsageError('k_max and explore must lie in 0 .. 1; ponder_lambda, learning_rate, final_lr and grad_clip must not be negative')
    master = rank == 0
    say = tqdm.write if master else lambda *a: None
    tokens_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    max_steps = in_steps('max_steps', cfg.max_steps, tokens_per_step, None)
    S0, S1, freeze, warmup, eval_interval, ckpt_interval = (
        in_steps(name, getattr(cfg, name), tokens_per_step, max_steps)
        for name in ('ponder_start', 'ponder_full', 'freeze_backbone', 'warmup', 'eval_interval', 'ckpt_interval'))
    act = S0 + freeze * (cfg.objective == 'saving')  # the step from which gates act: those that predict learn before
    if cfg.halting and cfg.n_iter > 1 and S1 < act < max_steps:
        raise UsageError(f'ponder_full (step {S1}) lies before ponder_start{" + freeze_backbone" * (act > S0)} (step {act}): k would jump to k_max at once')

    # data; the default set is made once, while the other processes wait for the group
    data_dir, out_dir = Path(cfg.data_dir), Path(cfg.out_dir)
    meta_file, ckpt_path = data_dir / 'meta.json', out_dir / 'ckpt.pt'
    if not meta_file.is_file():
        if data_dir != Path('data/stdlib'):
            raise UsageError(f'no data in {data_dir}: make it with "python prepare_data.py PATH ... --tokenizer TOKENIZER --out {data_dir}", '
                             'or give --data_dir=data/stdlib')
        if master:
            prepare(['stdlib'], data_dir)
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        held = lock(out_dir)  # noqa: F841, held until the process ends
    if world > 1:  # a rank that runs other code or data, or does not see the checkpoint, would train another model without a word
        if os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0' and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            say('--max-restarts without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment: a restart may fail, calling at processes that died')
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
        files = [Path(__file__), Path(model_py.__file__), meta_file]
        mine = [hashlib.sha256(f.read_bytes() if f.is_file() else b'').hexdigest() for f in files]
        mine += [repr(cfg), cfg.resume and ckpt_path.is_file() and ckpt_path.stat().st_size]
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
        for i, what in enumerate(('another train.py', 'another model.py', 'another meta.json', 'another config', f'another {ckpt_path}')):
            if others := [r for r, theirs in enumerate(everyone) if theirs[i] != everyone[0][i]]:
                raise UsageError(f'process {", ".join(map(str, others))} has {what} than process 0: all nodes need the same files, on a shared disk or copied')
    try:
        meta = json.loads(meta_file.read_text())
        vocab_size = cfg.vocab_size or -(-meta['vocab_size'] // 64) * 64
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f'{meta_file} was not written by prepare_data.py ({type(e).__name__}: {e})')

    # model
    torch.manual_seed(cfg.seed)
    shape = {f.name: getattr(cfg, f.name) for f in fields(AdaPonderConfig) if hasattr(cfg, f.name)}
    own = {k: shape[k] for k in ('n_iter', 'halting', 'tau', 'gate_width', 'gate_bias', 'objective', 'feedback', 'ponder_norm')}  # what a loaded backbone may be given anew
    resumed = None
    try:
        if cfg.resume and ckpt_path.exists():
            resumed = load_checkpoint(ckpt_path)
            model = AdaPonderLM.from_state(resumed)
        elif cfg.init_from == 'scratch':
            model = AdaPonderLM(AdaPonderConfig(**{**shape, 'vocab_size': vocab_size}))
        elif cfg.init_from.endswith('.pt'):
            state = load_checkpoint(cfg.init_from)
            model = AdaPonderLM(config_from_state(state, **own))
            model.load_state_dict({k: v for k, v in state['model'].items() if k in model.state_dict()}, strict=False)
        else:
            model = AdaPonderLM.from_pretrained(cfg.init_from, **own)
    except (ValueError, OSError) as e:
        raise UsageError(str(e))
    if cfg.block_size > model.cfg.block_size or meta['vocab_size'] > model.cfg.vocab_size:
        raise UsageError(f'the model takes {model.cfg.block_size} tokens of a vocabulary of {model.cfg.vocab_size}; '
                         f'block_size is {cfg.block_size}, the data has {meta["vocab_size"]} token ids')
    train = Windows(data_dir, meta, 'train', cfg.block_size, model.cfg.vocab_size, cfg.seed)
    val = Windows(data_dir, meta, 'val', cfg.block_size, model.cfg.vocab_size)
    if cfg.verify_data:
        verify(data_dir, meta, local_rank, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    model.to(device).remat = cfg.remat
    say(f'{sum(p.numel() for p in model.parameters()):,} parameters, {tokens_per_step:,} tokens a step, '
        f'{max_steps:,} steps, {train.n * cfg.block_size:,} train tokens, {device}, {world} process{"es" * (world > 1)}')

    # optimizer: matrices decay, vectors do not
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() <= 1], weight_decay=0.0)]
    adamw = dict(lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=device.type in ('cpu', 'cuda'))
    if cfg.shard_optimizer and world > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **adamw)
    else:
        optimizer = torch.optim.AdamW(groups, **adamw)

    step, log_path = 0, out_dir / 'log.jsonl'
    if resumed:
        before, now, step = resumed['train_config'], asdict(cfg), resumed['step']
        changed = [k for k in now if before.get(k) != now[k] and k not in ('resume', 'device', 'out_dir')]
        fatal = [k for k in changed if k in shape or k in ('seed', 'batch_size', 'gradient_accumulation_steps')]
        if (S0 <= step) != (resumed['ponder_start'] <= step):
            fatal.append(f'ponder_start, in steps ({resumed["ponder_start"]}, now {S0}: the gates would act at another time)')
        if fatal:
            raise UsageError(f'{ckpt_path} was trained with other values of {", ".join(fatal)}: give them back, or another --out_dir, or --resume=False')
        if {**resumed['meta'], 'source': 0} != {**meta, 'source': 0}:
            raise UsageError(f'{ckpt_path} was trained on other data than {data_dir} now holds: give another --out_dir, or --resume=False')
        for k in changed:
            say(f'changed since the checkpoint: {k} = {before.get(k)!r} -> {now[k]!r}')
        optimizer.load_state_dict(resumed['optimizer'])
        torch.set_rng_state(resumed['rng'])
        say(f'going on from {ckpt_path} at step {step}')
        del resumed
    if master:
        kept = []  # of the log: what was written before the checkpoint; a last line may be torn
        for line in log_path.read_text().splitlines() if step and log_path.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record['step'] < step + ('loss' in record):
                kept.append(line + '\n')
        log_path.write_text(''.join(kept))
        for name in ('meta.json', 'tokenizer.tiktoken', 'tokenizer.json'):  # so that sampling needs nothing but out_dir
            if (data_dir / name).is_file():
                shutil.copyfile(data_dir / name, out_dir / name)
    if cfg.compile and device.type == 'cuda':
        model.backbone = torch.compile(model.backbone)  # one graph, used by all iterations

    saving = bool(model.gates) and model.cfg.objective == 'saving'

    def phase(step):
        """What learns at this step: gates that neither act nor learn yet stay out of the optimizer and of DDP's buckets."""
        if not model.gates:
            return 'all'
        if step < S0:
            return 'all' if saving else 'backbone'
        return 'gates' if step < S0 + freeze else 'all'

    def largest(number):
        """That of all processes, so that they decide alike."""
        number = torch.tensor(number)
        if world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def checkpoint():
        """False if it could not be written."""
        if isinstance(optimizer, torch.optim.AdamW):
            state = optimizer.state_dict()
        else:
            optimizer.consolidate_state_dict(to=0)
            state = optimizer.state_dict() if master else None
        return not master or save_checkpoint(ckpt_path, dict(
            adaponder=1, config=asdict(model.cfg), model=model.state_dict(), meta=meta, optimizer=state, step=step,
            rng=torch.get_rng_state(), train_config=asdict(cfg), ponder_start=S0))

    def log(record):
        if master:
            try:
                with open(log_path, 'a') as f:
                    f.write(json.dumps(record) + '\n')
            except OSError as e:
                say(f'{log_path} not written ({e})')
            if wandb:
                wandb.log(record, step=record['step'])

    wandb = None
    if cfg.wandb_log and master:
        try:
            import wandb
        except ImportError:
            raise UsageError('wandb_log needs wandb: pip install wandb', here=True)
        wandb.init(project=cfg.wandb_project, name=out_dir.name, config=asdict(cfg), dir=str(out_dir))

    stop = []  # Ctrl-C and SIGTERM: drop the step, save, leave; a second Ctrl-C leaves at once

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    n_micro = cfg.gradient_accumulation_steps // world  # micro-batches of this process
    micro_batches = read_ahead(lambda n: train.train_batch(n, cfg.batch_size), count(step * cfg.gradient_accumulation_steps + rank, world))
    peak = peak_flops(device)
    if bf16 and device.type == 'cpu' and (slower := peak / peak_flops(device, torch.bfloat16)) > 2:  # no AVX-512: emulated
        say(f'this CPU multiplies matrices {slower:.0f} times more slowly in bfloat16 than in float32: give --dtype=float32')
    net, learning, leaving, skipped, saved, seconds, waited, done = model, None, 0, 0, True, 0.0, 0.0, step
    bar = tqdm(total=max_steps, initial=step, disable=None if master else True, dynamic_ncols=True, smoothing=0.05)

    while True:
        now = phase(step)
        acting = bool(model.gates) and step >= act
        halting = None if acting else False
        if (step % max(1, eval_interval) == 0 and step > 0) or step >= max_steps:
            result = evaluate(model, val, cfg, device, autocast, halting, rank, world)
            say(f'step {step}: val loss {result["loss"]:.4f}, ppl {result["ppl"]:.3f}, mean depth {result["depth"]:.2f} of {model.cfg.n_iter}, '
                f'ran iteration 1..: {" ".join(f"{a:.0%}" for a in result["active"])}, inference FLOPs saved {result["flops_saved"]:.1%}')
            log(dict(step=step, tokens=step * tokens_per_step, **{'val_' + k: v for k, v in result.items()}))
        if step >= max_steps:
            break
        if now != learning:
            for name, p in model.named_parameters():
                p.requires_grad_(now == 'all' or (now == 'gates') == name.startswith('gates.'))
                p.grad = None
            net = model  # let go of the old DDP first: its hooks leave with it
            if world > 1:
                net = DDP(model, device_ids=[local_rank] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
            learning = now
            packed = bool(model.gates) and now != 'backbone' and (cfg.execution == 'packed' or (
                cfg.execution == 'auto' and device.type == 'cpu' and model.cfg.objective != 'paper' and not cfg.remat))

        started = time.time()
        lr = cfg.learning_rate * min(1.0, (step + 1) / max(1, warmup)) * (
            cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps))))
        for group in optimizer.param_groups:
            group['lr'] = lr
        ramp = min(1.0, max(0.0, (step - act) / max(1, S1 - act)))
        k = cfg.k_max * (ramp * (2 - ramp) if saving else ramp)  # a price that is still rising when k stops would overshoot
        fade = min(1.0, (max_steps - step) / max(1, max_steps - S1))  # explorers leave keys and values that inference will not see: none at the end

        totals = torch.zeros(5, device=device)  # loss, ce, ponder loss, depth, share of gated iterations that the free tokens did not run
        for j in range(n_micro):
            if leaving := largest(max(stop, default=0)):
                break
            t = time.time()
            x = next(micro_batches)
            waited += time.time() - t
            x, explore = x.to(device, non_blocking=True), None
            if saving:  # whoever is not free to halt
                draw = np.random.default_rng([cfg.seed, 1, (step * n_micro + j) * world + rank]).random((len(x), cfg.block_size))
                explore = torch.from_numpy(draw < 1 - (1 - cfg.explore * fade) * ramp).to(device)
            with net.no_sync() if world > 1 and j + 1 < n_micro else nullcontext():
                with autocast():
                    out = net(x[:, :-1], x[:, 1:], 'packed' if packed else 'dense', halting=None if saving else halting, k=torch.tensor(k, device=device),
                              ponder_lambda=cfg.ponder_lambda, explore=explore)
                loss = out.loss / n_micro
                if packed:  # where all tokens halt the later gates do not run; DDP waits for their gradient, and AdamW must see 0
                    loss = loss + 0 * sum(p.sum() for part in (model.gates, model.ln_ponder) for p in part.parameters())
                loss.backward()
            depth = out.depth.float()
            free = torch.ones_like(depth) if explore is None else ~explore
            halted = ((model.cfg.n_iter - depth) * free).sum() / free.sum().clamp(min=1) / max(1, model.cfg.n_iter - 1)
            totals += torch.stack([out.loss.detach(), out.ce_loss.detach(), out.ponder_loss.detach(), depth.mean(), halted]) / n_micro
        if leaving:
            saved = checkpoint()
            break
        parts = [], []
        for name, p in model.named_parameters():
            if p.grad is not None:
                parts[saving and name.startswith('gates.')].append(p)  # gates that only watch do not shorten the others' step
        norm = math.hypot(*(float(torch.nn.utils.clip_grad_norm_(part, cfg.grad_clip)) for part in parts))
        if math.isfinite(norm):  # after DDP's sum a bad rank shows on all ranks: they agree without asking
            optimizer.step()
            skipped = 0
        else:
            skipped += 1
            say(f'step {step}: the gradient is not finite, step skipped ({skipped} in a row)')
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.time() - started
        bar.update()

        logging = step % cfg.log_interval == 0 or step == max_steps
        if world > 1 and (logging or saving):
            dist.all_reduce(totals)
        if saving and acting:  # the price of a pass rises until the share k does not run
            model.cfg.tau = min(0.999, max(1e-6, model.cfg.tau * math.exp(k - float(totals[4]) / world)))
        if logging:
            loss, ce, ponder, depth, halted = (totals / world).tolist()
            speed = (step - done) * tokens_per_step / seconds
            flops = replace(model.cfg, halting=bool(model.gates) and now != 'backbone').inference_flops(
                depth if packed else model.cfg.n_iter, (cfg.block_size + 1) / 2)  # a token forward; backward: twice that, or once for gates alone
            mfu = speed * flops * (2 if now == 'gates' else 3) / (peak * world)
            line = f'loss {loss:.3f} depth {depth:.2f} {speed / 1e3:.1f}k tok/s MFU {mfu:.0%}'
            bar.set_postfix_str(line)
            if bar.disable:  # not on a terminal
                say(f'step {step}: {line}')
            gates = [out.gates[..., i][out.depth > i] for i in range(out.gates.size(-1))] if now != 'backbone' else []
            gates = [g.sort().values for g in gates if len(g)]  # of the tokens that reached them, process 0's last micro-batch
            log(dict(step=step, tokens=step * tokens_per_step, loss=loss, ce=ce, ponder_loss=ponder, depth=depth, halted=halted, lr=lr, k=k, tau=model.cfg.tau, grad_norm=norm,
                     tokens_per_second=speed, mfu=mfu, waited=waited / seconds, memory=peak_memory(device), gate_mean=[float(g.mean()) for g in gates],
                     gate_under_tau=[float((g < model.cfg.tau).float().mean()) for g in gates],
                     gate_bottom_k=[float(g[:max(1, round(k * len(g)))].mean()) for g in gates]))
            seconds, waited, done = 0.0, 0.0, step
        if skipped == 10:
            bar.close()
            say('ten steps in a row without a finite gradient: stopped; try a smaller learning_rate'
                + f'; {ckpt_path} holds the last good state' * ckpt_path.is_file())
            raise SystemExit(1)
        if (step % max(1, ckpt_interval) == 0 and not skipped) or step == max_steps:
            saved = checkpoint()

    bar.close()
    micro_batches.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if leaving:
        say(f'stopped at step {step}' + (f'; the same command goes on from {ckpt_path}' if saved else ', not saved'))
    elif master:
        say(f'\n{out_dir}: val loss {result["loss"]:.4f} nats/token (perplexity {result["ppl"]:.3f}), mean depth {result["depth"]:.2f} of {model.cfg.n_iter}, '
            f'{sum(1 - a for a in result["active"][1:]) / max(1, model.cfg.n_iter - 1):.1%} of the gated iterations halted, '
            f'inference FLOPs saved against fixed depth: {result["flops_saved"]:.1%}')
        say(f'see which tokens it thought longer about: python sample.py --ckpt {ckpt_path} --depth')
        if cfg.sample_tokens:
            model.__dict__.pop('backbone', None)  # the compiled one wants whole sequences
            enc = load_tokenizer(meta, data_dir)
            prompt = val.tokens(0, min(32, cfg.block_size)).tolist()
            steps = model.stream([prompt], cfg.sample_tokens, temperature=0.8, top_k=50, generator=torch.Generator().manual_seed(cfg.seed))
            say(f'\n{enc.decode(prompt)}|{enc.decode([s.token for s in steps if s.token < meta["vocab_size"]])}\n')
    if world > 1:
        dist.destroy_process_group()
    if not saved:
        raise SystemExit(1)
    if leaving:  # what waits for a finished run (&&, afterok) must not start
        raise SystemExit(128 + leaving)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ValueError as e:  # what model.py and the data reader refuse
        raise UsageError(str(e), here=True)
    except KeyboardInterrupt:
        raise SystemExit(130)
