"""
Trains AdaPonderLM: one process on a laptop, torchrun on a cluster.

    python train.py config/tiny.py --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py config/pythia70m.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/pythia410m.py

A config file is Python that assigns to fields of TrainConfig; --key=value overrides it. Helper variables of a config
begin with an underscore. The same command again goes on from out_dir/ckpt.pt. The micro-batches of a step depend on
(seed, step) alone, so any number of processes that divides gradient_accumulation_steps trains the same model.
With torchrun --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, else a restart may call at processes that died.
"""
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends quietly

import difflib
import gc
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import model as model_py
from model import TOKENIZER_FILES, AdaPonderConfig, AdaPonderLM, HaltingSchedule, is_plain, load_checkpoint
from prepare_data import (UsageError, check_writable, command_line, drop_stdout, file_sha256, load_tokenizer, lock,
                          optional, prepare, read_json, write_beside)

Duration = int | str  # a number of steps, or '1000 steps', '1.2B tokens', '40%' (of max_steps)


# -----------------------------------------------------------------------------
# Settings

@dataclass
class TrainConfig:
    # files
    out_dir: str = 'out/run'          # checkpoint, log and tokenizer go here
    data_dir: str = 'data/stdlib'     # made by prepare_data.py; the default set is made when it is missing
    verify_data: bool = True          # hash the token files at the start: about a second a GB and process of a node
    init_from: str = 'scratch'        # or a ckpt.pt, or a Hugging Face folder or name of GPT-NeoX weights
    resume: bool = True               # go on from out_dir/ckpt.pt if it exists; False starts anew
    # model, see AdaPonderConfig
    vocab_size: int = 0               # rows of the embedding tables; 0: the data's, rounded up to a multiple of 64
    block_size: int = 256             # context, tokens
    n_layer: int = 4                  # blocks in one iteration
    n_head: int = 4                   # attention heads a block
    n_embd: int = 128                 # width of the residual stream
    n_iter: int = 4                   # K, iterations through the backbone; 1 is vanilla Pythia
    halting: bool = True              # gates decide each token's depth; False is fixed-depth PonderLM
    tau: float = 1e-4                 # a token halts when its gate falls under this; objective 'saving' moves it
    scale_embeds: bool = True         # multiply embeddings by sqrt(n_embd)
    multiply_pondering_steps: bool = False  # multiply the first ones by n_iter - 1 too, as PonderLM's larger models do
    gate_width: float = 4.0           # hidden width of a gate, in units of n_embd
    gate_bias: float = 4.0            # logit at which gates start: open
    objective: str = 'saving'         # how gates learn to halt: to predict what going on saves, or 'paper': to close
    feedback: str = 'embedding'       # what an iteration hands on: 'embedding', or 'hidden' (a looped transformer)
    ponder_norm: bool = False         # give what is handed on a LayerNorm of its own
    early_ce: float = 0.0             # weight of the cross entropy after each iteration but the last (arXiv 2607.20519)
    # stages of the gates' training, see HaltingSchedule
    ponder_start: Duration = '10%'    # until here no token halts
    ponder_full: Duration = '25%'     # from here on the full amount shall halt
    k_max: float = 0.15               # 'saving': share of iterations 2 .. not to run; 'paper': of gates to push down
    ponder_lambda: float = 0.1        # weight of the gates' loss
    explore: float = 0.1              # 'saving': share of tokens forced to run all iterations at ponder_full
    freeze_backbone: Duration = 0     # from ponder_start on, train the gates alone for this long
    # optimisation
    batch_size: int = 16              # sequences a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches a step, over all processes
    max_steps: Duration = 1000        # length of the training
    learning_rate: float = 1e-3       # peak of warmup and cosine
    final_lr: float = 0.1             # where the cosine ends, as a fraction of the peak
    warmup: Duration = '1%'           # the learning rate rises linearly until here
    weight_decay: float = 0.01        # of matrices, embeddings included; vectors have none
    beta1: float = 0.9                # AdamW's
    beta2: float = 0.95               # AdamW's
    grad_clip: float = 1.0            # largest norm of the gradient; 0: no clipping
    seed: int = 1337                  # of weights, order of the data, and tokens forced to run all iterations
    # evaluation, checkpoints, logs
    eval_interval: Duration = '20%'   # 0: only at the end
    eval_tokens: int = 65536          # of the val split, evenly spread over it
    ckpt_interval: Duration = '10%'   # 0: only at the end
    log_interval: int = 10            # steps
    sample_tokens: int = 300          # length of the sample at the end; 0: none
    wandb_log: bool = False           # log to Weights & Biases too
    wandb_project: str = 'adaponder'  # the run there has the name of out_dir
    # system
    device: str = 'auto'              # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda where there is one, else cpu
    dtype: str = 'auto'               # 'float32' or 'bfloat16' (autocast); auto: bfloat16 on a GPU that has it
    compile: bool = True              # torch.compile the blocks; on cuda only
    execution: str = 'dense'          # 'dense' runs halted tokens and masks them, 'packed' skips them: same function
    remat: bool = False               # recompute each iteration in backward: the memory of one, for one more forward

    given = frozenset()               # the fields that a config file or the command line set; no field itself


# Smallest and largest value of the numeric fields; those that are not here may be 0 to 2^31 - 1
RANGES = dict.fromkeys(('k_max', 'explore', 'tau', 'final_lr'), (0, 1))
RANGES |= dict.fromkeys(('beta1', 'beta2'), (0, 0.999999))
RANGES |= dict.fromkeys(('block_size', 'n_layer', 'n_embd', 'n_iter', 'batch_size', 'gradient_accumulation_steps',
                         'log_interval'), (1, 2 ** 20))
RANGES |= dict(n_layer=(1, 1024), n_iter=(1, 1024), gate_bias=(-100, 100))

CHOICES = dict(dtype=('auto', 'float32', 'bfloat16'), execution=('dense', 'packed'))

# What nanoGPT calls our fields
OTHER_NAMES = dict(lr='learning_rate', min_lr='final_lr', warmup_iters='warmup', max_iters='max_steps',
                   lr_decay_iters='max_steps', eval_iters='eval_tokens', dataset='data_dir')


def checked(key, value, kind):
    """The value of a field of TrainConfig, text as what it stands for; UsageError for a wrong type or range."""
    parse = {int: int, float: float, bool: {'True': True, 'False': False}.__getitem__}.get(kind, str)
    try:
        value = parse(value) if isinstance(value, str) else value
    except (ValueError, KeyError):
        pass  # the text stays, and is refused
    is_number = type(value) in (int, float)
    right = is_number if kind is float else type(value) in getattr(kind, '__args__', (kind,))
    if not right or value == '':
        raise UsageError(f'{key} must be {getattr(kind, "__name__", kind)}, not {value!r:.80}')
    low, high = RANGES.get(key, (0, 2 ** 31 - 1))
    if is_number and not low <= value <= high:  # NaN is refused as well
        raise UsageError(f'{key} must be from {low} to {high}, not {value}')
    if value not in CHOICES.get(key, (value,)):
        raise UsageError(f'{key} must be one of {", ".join(CHOICES[key])}, not {value}')
    return float(value) if kind is float else value


def read_config_file(path):
    """The assignments in a config file, a dict. It is Python, so UTF-8 whatever the locale, and it is executed."""
    path, names = Path(os.path.expanduser(path)), {}
    if not path.is_file():
        raise UsageError(f'there is no config file {path}')
    try:
        exec(path.read_text(encoding='utf-8-sig'), names)
    except (Exception, SystemExit) as e:
        raise UsageError(f'{path} is not a config file of assignments: {type(e).__name__}: {e}')
    helpers = {k for k, v in names.items() if (callable(v) or inspect.ismodule(v)) and not hasattr(TrainConfig, k)}
    return {k: v for k, v in names.items() if not k.startswith('_') and k not in helpers}


def load_config(argv):
    """TrainConfig from config files and --key=value arguments, in that order; its `given` is the set of fields set."""
    if '-h' in argv or '--help' in argv:
        print(__doc__.strip() + '\n\n' + inspect.getsource(TrainConfig).split('\n', 2)[2].split('\n\n')[0])
        raise SystemExit(0)
    kinds, values = {f.name: f.type for f in fields(TrainConfig)}, {}
    for arg in argv:
        key, equals, text = arg.removeprefix('--').partition('=')
        if arg.startswith('--') and not equals:
            raise UsageError(f'{arg} has no value: write {arg}=VALUE')
        new = {key: text} if arg.startswith('--') else read_config_file(arg)
        for key, value in new.items():
            if key not in kinds:
                near = OTHER_NAMES.get(key) or ''.join(difflib.get_close_matches(key, kinds, 1))
                hint = f'did you mean {near!r}?' if near else 'python train.py --help lists the fields'
                raise UsageError(f'unknown key {key!r} in {arg}, {hint}')
            values[key] = checked(key, value, kinds[key])
    cfg = TrainConfig(**values)
    cfg.given = frozenset(values)
    return cfg


def in_steps(name, duration, tokens_per_step, max_steps=None):
    """A Duration in steps, int. max_steps: what '40%' is a part of. Raises UsageError."""
    m = re.fullmatch(r'(\d+\.?\d*(?:e\d+)?)\s*([KMBT]?)\s*(steps|tokens|%|)', str(duration).strip())
    factors = {'': 1, 'K': 10 ** 3, 'M': 10 ** 6, 'B': 10 ** 9, 'T': 10 ** 12}
    number, unit = (float(m[1]) * factors[m[2]], m[3]) if m else (-1, None)
    if unit == 'tokens':
        number /= tokens_per_step
    elif unit == '%':
        number = -1 if max_steps is None else number / 100 * max_steps
    if unit in ('tokens', '%') and 0 < number < 2 ** 31:
        number = max(1, round(number))  # 0 would mean another thing
    if not 0 <= number < 2 ** 31 or number % 1:
        raise UsageError(f"{name} must be a number of steps, or like '1.2B tokens'"
                         + (" or '40%' of max_steps" if max_steps else '') + f', not {duration!r}')
    return int(number)


# -----------------------------------------------------------------------------
# Devices

# Dense bfloat16 peak (FLOP/s) and memory (GB) by data sheet; the name is torch's without the maker and the memory
GPUS = {
    'H100': (989e12, 80), 'H100 NVL': (835e12, 94), 'H100 PCIe': (756e12, 80), 'GH200': (989e12, 96),
    'H200': (989e12, 141), 'H200 NVL': (835e12, 141), 'H800': (989e12, 80), 'H20': (148e12, 96), 'B200': (2250e12, 180),
    'GB200': (2500e12, 186), 'A100': (312e12, 80), 'A800': (312e12, 80), 'A40': (150e12, 48), 'A30': (165e12, 24),
    'A10': (125e12, 24), 'L40S': (362e12, 48), 'L40': (181e12, 48), 'L4': (121e12, 24), 'RTX A6000': (155e12, 48),
    'RTX 6000 Ada': (364e12, 48), 'RTX 4090': (165e12, 24), 'RTX 3090': (71e12, 24)}


def gpu_peak(name, dtype):
    """Dense peak FLOP/s of the GPU that torch calls `name`, or None for one that GPUS does not hold.

    float32 runs as TF32, half as fast on all of these. 'NVIDIA H100 80GB HBM3' is the SXM module, here H100.
    """
    short = re.sub(r'NVIDIA |GeForce | Generation|[ -](SXM\d|PCIE|\d+GB|HBM\w+)', '', name)
    peak = GPUS.get(short.replace('A100 PCIe', 'A100'), (None,))[0]
    return peak / 2 if peak and dtype is torch.float32 else peak


def get_device(name='auto'):
    """The torch.device that `name` means, for all scripts: what is named is used, or UsageError says why not.

    name: 'auto' (cuda where there is one, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'. Under torchrun the local rank
    picks the GPU. On a GPU float32 matrix products may run as TF32.
    """
    with warnings.catch_warnings(record=True) as trouble:  # torch only warns where the driver is too old
        warnings.simplefilter('always')
        has_cuda = torch.cuda.is_available()
    if name == 'auto':
        name = 'cuda' if has_cuda or trouble else 'cpu'
    if not re.fullmatch(r'cpu|mps|cuda(:\d{1,3})?', name):
        raise UsageError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', not {name!r}")
    if 'LOCAL_RANK' in os.environ and name not in ('cpu', 'cuda'):
        raise UsageError(f'device is {name}, but under torchrun each process has its own: give --device=cuda')
    kind = name.partition(':')[0]
    if not dict(cpu=True, cuda=has_cuda, mps=torch.backends.mps.is_available())[kind]:
        why = ' (' + str(trouble[0].message).split('. ')[0] + ')' if trouble else ''
        raise UsageError(f'this torch can use no {name}{why}: give --device=cpu')
    if kind != 'cuda':
        return torch.device(name)
    device = torch.device('cuda', torch.device(name).index or int(os.environ.get('LOCAL_RANK', 0)))
    if device.index >= torch.cuda.device_count():
        raise UsageError(f'there is no {device}: this torch sees {torch.cuda.device_count()} GPUs')
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')
    return device


def get_autocast(device, dtype='auto'):
    """The context in which a model computes, as a function without arguments, and the dtype of its matrix products.

    dtype: 'float32', 'bfloat16', or 'auto': bfloat16 on a GPU that has it. Raises UsageError where the GPU has none.
    """
    has_bfloat16 = device.type != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' and has_bfloat16 else 'float32'
    if dtype == 'float32':
        return nullcontext, torch.float32
    if dtype != 'bfloat16':
        raise UsageError(f"dtype must be 'auto', 'float32' or 'bfloat16', not {dtype!r}")
    if not has_bfloat16:
        raise UsageError(f'{torch.cuda.get_device_name(device)} has no bfloat16: give --dtype=float32')
    return partial(torch.autocast, device.type, torch.bfloat16), torch.bfloat16


# -----------------------------------------------------------------------------
# Data

def load_meta(folder):
    """The meta.json that prepare_data.py wrote, a dict; UsageError if there is none, or not with all that is needed."""
    path = Path(folder) / 'meta.json'
    if not path.is_file():
        raise UsageError(f'no data in {folder} (no meta.json): run "python prepare_data.py PATH ... --out {folder}"')
    meta = read_json(path)
    check_types(path, meta, dtype=str, vocab_size=int, tokenizer=str, tokenizer_sha256=str, train=dict, val=dict)
    for split in (meta['train'], meta['val']):
        check_types(path, split, files=list)
        for file in split['files']:
            check_types(path, file, name=str, tokens=int, sha256=str)
    if meta['dtype'] not in ('uint16', 'uint32'):
        raise UsageError(f'{path} is damaged or of another version (dtype is {meta["dtype"]})')
    return meta


def check_types(path, values, **types):
    """Raise UsageError unless `values`, which were read from path, are a dict with these keys, of these types."""
    for key, kind in types.items():
        if not isinstance(values, dict) or type(values.get(key)) is not kind:
            raise UsageError(f'{path} is damaged or of another version ({key} must be of type {kind.__name__}): '
                             'make it again or give another')


class Windows:
    """A split of a data folder as windows of block_size + 1 tokens, each overlapping the next by one token.

    So no token is predicted twice. Training order: epoch e is a permutation of all windows, cut at an offset, both
    drawn from (seed, e). n: the number of windows. Raises UsageError for files that do not fit meta.json.
    """

    def __init__(self, folder, meta, split, block_size, vocab_size, seed=0):
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.files, n_tokens, dtype = [], 0, np.dtype(meta['dtype'])  # files: (first token's number, tokens)
        for file in meta[split]['files']:
            path = Path(folder) / file['name']
            if not path.is_file() or path.stat().st_size != file['tokens'] * dtype.itemsize:
                raise UsageError(f'{path} is not there, or has not the {file["tokens"]} tokens that meta.json says')
            if file['tokens']:
                self.files.append((n_tokens, np.asarray(np.memmap(path, dtype=dtype, mode='r'))))
            n_tokens += file['tokens']
        self.n = (n_tokens - block_size) // block_size  # one window fewer than fits, so that any offset leaves room
        if self.n < 1:
            raise UsageError(f'the {split} split of {folder} has {n_tokens} tokens, too few for block_size '
                             f'{block_size}: give more data, or a smaller --block_size')
        self.epoch = None

    def tokens(self, start, length):
        """`length` tokens from `start` on, across file borders: int64."""
        pieces = [file[max(0, start - first):max(0, start + length - first)] for first, file in self.files]
        return np.concatenate(pieces).astype(np.int64)

    def batch(self, starts):
        """The windows that begin at these tokens: (B, block_size + 1) int64."""
        x = torch.from_numpy(np.stack([self.tokens(s, self.block_size + 1) for s in starts]))
        if int(x.max()) >= self.vocab_size:
            raise ValueError(f'the data holds token {int(x.max())}, beyond vocab_size {self.vocab_size}: '
                             'it was made with another tokenizer')
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


# -----------------------------------------------------------------------------
# The model to begin with, optimizer, evaluation, resume

def initial_model(cfg, meta):
    """A new model, or one that starts from trained weights: cfg.init_from, a ckpt.pt or what from_pretrained() takes.

    Trained weights bring their settings; those that a config file or the command line gave win over them, but for the
    shape. Raises UsageError for weights that do not fit, those of another tokenizer than the data's included.
    """
    settings = {f.name: getattr(cfg, f.name) for f in fields(AdaPonderConfig) if hasattr(cfg, f.name)}
    if cfg.init_from == 'scratch':
        settings['vocab_size'] = cfg.vocab_size or -(-meta['vocab_size'] // 64) * 64
        return AdaPonderLM(AdaPonderConfig(**settings))

    given = {k: v for k, v in settings.items() if k in cfg.given and k != 'block_size'}
    shape = {k: given.pop(k, 0) for k in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
    path = os.path.expanduser(cfg.init_from)
    if os.path.isfile(os.path.join(path, 'ckpt.pt')):  # the folder of a run
        path = os.path.join(path, 'ckpt.pt')
    if path.endswith('.pt'):
        state = load_checkpoint(path)
        trained, tokenizer = AdaPonderLM.from_state(state, path), state.get('meta') or {}
        model = AdaPonderLM(replace(trained.cfg, **given))
        if trained.gates and model.gates and trained.cfg.gate_hidden != model.cfg.gate_hidden:
            raise UsageError(f'gate_width is {cfg.gate_width}, but {trained.cfg.gate_width} in {path}: leave it out')
        model.load_state_dict(state['model'], strict=False)  # gates that it lacks start open, those beyond n_iter go
    else:
        model, tokenizer = AdaPonderLM.from_pretrained(path, **given), {}
        for file in model.tokenizer_files:
            if file.name == 'tokenizer.json':
                tokenizer = dict(tokenizer=file, tokenizer_sha256=file_sha256(file)) | tokenizer
            elif file.name == 'meta.json':  # save_pretrained() wrote it
                tokenizer = read_json(file)
    check_types(path, dict(meta=tokenizer), meta=dict)
    for k, value in shape.items():
        if value and value != getattr(model.cfg, k):
            raise UsageError(f'{k} is {value}, but {getattr(model.cfg, k)} in {path}: leave it out')
    if tokenizer.get('tokenizer_sha256', meta['tokenizer_sha256']) != meta['tokenizer_sha256']:
        raise UsageError(f'{path} has another tokenizer than the data in {cfg.data_dir}: prepare the data with '
                         f'--tokenizer {tokenizer.get("tokenizer")}')
    return model


def make_optimizer(cfg, model, device, state=None):
    """AdamW: matrices decay, vectors do not. state: a checkpoint's, of which the moments are taken over."""
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() <= 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                  fused=device.type in ('cpu', 'cuda'))
    if state:  # decay and betas are the config's, which may have changed
        optimizer.load_state_dict({**state, 'param_groups': optimizer.state_dict()['param_groups']})
    return optimizer


def clip_gradients(model, max_norm):
    """Clip the gradient to max_norm (0: not at all). Returns its norm before that, a scalar tensor.

    Gates that only watch (objective 'saving') are clipped apart, so that they do not shorten the backbone's steps.
    """
    backbone, gates = [], []
    for name, p in model.named_parameters():
        if p.grad is not None:
            apart = model.cfg.objective == 'saving' and name.startswith('gates.')
            (gates if apart else backbone).append(p)
    norms = [torch.nn.utils.clip_grad_norm_(part, max_norm or math.inf) for part in (backbone, gates) if part]
    return torch.stack(norms).norm()


@torch.no_grad()
def evaluate(model, val, cfg, device, autocast, halting=True, rank=0, world=1):
    """Evaluate on eval_tokens of the val split. halting: whether the gates act.

    Returns a dict: loss (nats a token), ppl, depth (mean), active (share of tokens that ran iteration 1 .. n_iter),
    flops_saved (of inference, against fixed depth).
    """
    K = model.cfg.n_iter
    n = max(1, min(val.n, cfg.eval_tokens // cfg.block_size))
    mine = range(rank, n, world)
    sums = torch.zeros(K + 1, dtype=torch.float64)  # tokens of each depth, and the NLL; on the CPU: MPS has no float64
    execution = 'dense' if cfg.compile and device.type == 'cuda' else 'packed'
    for i in range(0, len(mine), cfg.batch_size):
        starts = [w * val.n // n * cfg.block_size for w in mine[i:i + cfg.batch_size]]
        padding = starts[:1] * (cfg.batch_size - len(starts))  # compiled blocks want one shape
        x = val.batch(starts + padding).to(device)
        with autocast():
            out = model(x[:, :-1], x[:, 1:], execution=execution, halting=halting)
        sums[:K] += torch.bincount(out.depth[:len(starts)].flatten().cpu() - 1, minlength=K)
        sums[K] += out.nll[:len(starts)].cpu().double().sum()
    if world > 1:
        dist.all_reduce(sums)
    share, loss = sums[:K] / sums[:K].sum(), float(sums[K] / sums[:K].sum())
    depths, context = torch.arange(1, K + 1), (cfg.block_size + 1) / 2
    fixed = replace(model.cfg, halting=False)  # PonderLM has no gates to pay for, nor have we while they do not act
    flops = (model.cfg if halting else fixed).inference_flops(depths, context)
    return dict(loss=loss, ppl=math.exp(min(loss, 50)), depth=float((depths * share).sum()),
                active=[float(share[i:].sum()) for i in range(K)],
                flops_saved=float(1 - (flops * share).sum() / fixed.inference_flops(K, context)))


def closing_sample(model, cfg, val, meta, enc):
    """A prompt from the val split, and after a | what the model makes of it, up to the end of the document."""
    from sample import visible  # shows control bytes as escapes
    # compiled blocks would be compiled again for every length: put the same weights into a model without
    model = AdaPonderLM.from_state(dict(config=asdict(model.cfg), model=model.state_dict()))
    prompt = val.tokens(0, min(32, cfg.block_size)).tolist()
    idx = torch.tensor([prompt], device=model.embed.weight.device)
    generator = torch.Generator().manual_seed(cfg.seed)
    new = model.generate(idx, cfg.sample_tokens, temperature=0.8, top_k=50, generator=generator)
    new = [t for t in new[0, len(prompt):].tolist() if t < meta['vocab_size']]  # the rows beyond are padding
    if enc.eot_token in new:
        new = new[:new.index(enc.eot_token)]
    return visible(f'{enc.decode(prompt)}|{enc.decode(new)}')


def check_resume(path, state, cfg, meta, start):
    """The lines to print on changes that may be made on a resume; UsageError for those that may not."""
    check_types(path, state, train_config=dict, meta=dict, optimizer=dict, step=int, ponder_start=int)
    check_types(path, state['optimizer'], state=dict)
    before, now = state['train_config'], asdict(cfg)
    changed = [k for k in now if str(before.get(k)) != str(now[k]) and k not in ('resume', 'device', 'out_dir')]
    lasting = {f.name for f in fields(AdaPonderConfig)}
    lasting |= {'seed', 'batch_size', 'gradient_accumulation_steps', 'init_from'}
    fatal = [k for k in changed if k in lasting]
    if (start <= state['step']) != (state['ponder_start'] <= state['step']):  # gates would act at another time
        fatal.append(f'ponder_start ({state["ponder_start"]} steps, now {start})')
    if {**state['meta'], 'source': 0} != {**meta, 'source': 0}:
        fatal.append(f'the data in {cfg.data_dir}')
    if fatal:
        raise UsageError(f'{path} was trained with other values of {", ".join(fatal)}: '
                         'give them back, or another --out_dir, or --resume=False')
    return [*(f'changed since the checkpoint: {k} = {before.get(k)} -> {now[k]}' for k in changed),
            f'going on from {path} at step {state["step"]}']


def check_moments(path, model, state):
    """Raise UsageError unless the checkpoint has AdamW's moments of this model: others would crash torch.

    The gates, or the backbone, may have none at all: until they learn for the first time.
    """
    moments, has_moments = state['optimizer']['state'], dict(gates=set(), backbone=set())
    parameters = sorted(model.named_parameters(), key=lambda item: item[1].dim() <= 1)  # as in make_optimizer()
    fits = moments.keys() <= set(range(len(parameters)))
    for i, (name, p) in enumerate(parameters):
        has_moments['gates' if name.startswith('gates.') else 'backbone'].add(i in moments)
        if i in moments:
            check_types(path, moments[i], exp_avg=torch.Tensor, exp_avg_sq=torch.Tensor, step=torch.Tensor)
            first, second, step = (moments[i][key] for key in ('exp_avg', 'exp_avg_sq', 'step'))
            fits = fits and first.shape == second.shape == p.shape and step.shape == ()
            fits = fits and is_plain(first, p.dtype) and is_plain(second, p.dtype)
    if not fits or {True, False} in has_moments.values() or (state['step'] and not moments):
        raise UsageError(f"{path} is damaged or of another version (the optimizer's moments are not the model's): "
                         'give another --out_dir, or --resume=False')


def trim_log(path, step):
    """Leave in log.jsonl what was written up to the checkpoint of this step; lines may be torn."""
    valid = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if step and path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)['step'] <= step:
                valid.append(line + '\n')
    write_beside(path, ''.join(valid).encode())


# -----------------------------------------------------------------------------
# Training

def print_line(text):
    """Print at once. Where that fails, as in "python train.py ... | head", the training goes on without its lines."""
    try:
        print(text, flush=True)
    except OSError:
        drop_stdout()


@contextmanager
def run_folder(out_dir):
    """Make and lock the folder of a run. A refusal takes back what was made here, so that it leaves nothing."""
    is_new, has_lock = not out_dir.exists(), (out_dir / 'lock').exists()
    with suppress(OSError):
        out_dir.mkdir(parents=True, exist_ok=True)
    check_writable(out_dir / 'ckpt.pt')  # says what is wrong with out_dir
    with closing(lock(out_dir)):
        try:
            yield
        except (ValueError, OSError):
            if not has_lock:
                (out_dir / 'lock').unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # more lies there
                    out_dir.rmdir()
            raise


def train(cfg):
    """The whole training. Returns the exit code: 0, 1 if it gave up or could not save, 128 + a signal that came."""
    # processes, as torchrun describes them, and the device
    world, local_world = (int(os.environ.get(name, 1)) for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ('RANK', 'LOCAL_RANK'))
    master = rank == 0
    print0 = print_line if master else lambda text: None
    device = get_device(cfg.device)
    autocast, dtype = get_autocast(device, cfg.dtype)
    if cfg.gradient_accumulation_steps % world:
        raise UsageError(f'gradient_accumulation_steps must be a multiple of the number of processes, {world}')

    # durations, in steps
    tokens_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    max_steps = max(1, in_steps('max_steps', cfg.max_steps, tokens_per_step))
    ponder_start, ponder_full, freeze, warmup, eval_interval, ckpt_interval = (
        in_steps(name, getattr(cfg, name), tokens_per_step, max_steps)
        for name in ('ponder_start', 'ponder_full', 'freeze_backbone', 'warmup', 'eval_interval', 'ckpt_interval'))

    # data; the other processes wait for process 0, which may have to prepare it, in init_process_group
    data_dir, out_dir = (Path(os.path.expanduser(p)) for p in (cfg.data_dir, cfg.out_dir))
    has_data = (data_dir / 'meta.json').is_file()
    taken = (out_dir / 'train.bin').exists() or (out_dir / 'config.json').exists()
    if taken or os.path.realpath(data_dir) == os.path.realpath(out_dir):
        raise UsageError(f'{out_dir} is for data, or holds a Hugging Face model: give the run an --out_dir of its own')
    wandb = optional('wandb', '--wandb_log=True') if cfg.wandb_log and master else None
    if not has_data and (cfg.init_from != 'scratch' or cfg.data_dir != TrainConfig.data_dir):
        load_meta(data_dir)  # raises
    if master and not has_data:
        prepare(['stdlib'], data_dir)
    ckpt_path, log_path = out_dir / 'ckpt.pt', out_dir / 'log.jsonl'
    resuming = cfg.resume and ckpt_path.is_file()
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
        files = {'train.py': Path(__file__), 'model.py': Path(model_py.__file__), 'meta.json': data_dir / 'meta.json'}
        mine = {name: path.is_file() and file_sha256(path) for name, path in files.items()}
        mine |= dict(config=repr(cfg), checkpoint=resuming and ckpt_path.stat().st_size)
        ranks = [None] * world
        dist.all_gather_object(ranks, mine)
        for name in mine:  # processes that differ in these would each train another model
            if any(other[name] != ranks[0][name] for other in ranks):
                raise UsageError(f'not all processes have the same {name}: all nodes need the same files')
    meta = load_meta(data_dir)
    enc = load_tokenizer(meta, data_dir) if cfg.sample_tokens else None  # refused now, not after the training

    # model
    torch.manual_seed(cfg.seed)
    if resuming:
        state = load_checkpoint(ckpt_path)
        changes = check_resume(ckpt_path, state, cfg, meta, ponder_start)
        model = AdaPonderLM.from_state(state, ckpt_path)
        check_moments(ckpt_path, model, state)
    else:
        state, changes, model = {}, [], initial_model(cfg, meta)
    if cfg.block_size > model.cfg.block_size or meta['vocab_size'] > model.cfg.vocab_size:
        raise UsageError(f'the model takes {model.cfg.block_size} tokens of a vocabulary of {model.cfg.vocab_size}; '
                         f'block_size is {cfg.block_size}, the data has {meta["vocab_size"]} token ids')
    train_data = Windows(data_dir, meta, 'train', cfg.block_size, model.cfg.vocab_size, cfg.seed)
    val_data = Windows(data_dir, meta, 'val', cfg.block_size, model.cfg.vocab_size)
    if cfg.verify_data:  # the processes of a node share the files out
        for file in (meta['train']['files'] + meta['val']['files'])[local_rank::local_world]:
            if file_sha256(data_dir / file['name']) != file['sha256']:
                raise UsageError(f'{data_dir / file["name"]} was changed: its sha256 is not the one in meta.json')
    model.to(device).remat = cfg.remat
    schedule = HaltingSchedule(model.cfg, max_steps, ponder_start, ponder_full, cfg.k_max, cfg.ponder_lambda,
                               cfg.explore, freeze, cfg.seed)
    if model.gates and ponder_full < schedule.acting < max_steps:
        raise UsageError(f'ponder_full (step {ponder_full}) lies before step {schedule.acting}, where gates act first')
    print0(f'{sum(p.numel() for p in model.parameters()):,} parameters, {tokens_per_step:,} tokens a step, '
           f'{max_steps:,} steps, {train_data.n * cfg.block_size:,} train tokens, {device}, processes: {world}')
    if device.type == 'cpu' and dtype is torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        print0('a CPU without AVX-512 is slow in bfloat16: give --dtype=float32')

    # optimizer, resume, log
    optimizer = make_optimizer(cfg, model, device, state.get('optimizer'))
    step, wandb_id = state.get('step', 0), state.get('wandb_id')
    for line in changes:
        print0(line)
    del state  # a second model and optimizer in memory
    if master:
        trim_log(log_path, step)
        for name in TOKENIZER_FILES:  # so that sampling needs nothing but out_dir
            if (data_dir / name).is_file():
                shutil.copyfile(data_dir / name, out_dir / name)
        if cfg.wandb_log:
            run = wandb.init(project=cfg.wandb_project, name=out_dir.name, dir=str(out_dir), config=asdict(cfg),
                             id=wandb_id, resume='allow' if wandb_id else None)
            wandb_id = run.id
    if cfg.compile and device.type == 'cuda':
        torch._dynamo.config.optimize_ddp = False  # blocks are compiled one by one, there is no graph to split
        torch._dynamo.config.recompile_limit = 64  # all blocks share about ten graphs: stages, evaluation, with a mask
        for block in model.blocks:
            block.compile()

    def checkpoint():
        """Write all that a resume needs beside ckpt.pt, sync, rename: a full disk costs this one, not the last."""
        if not master:
            return True
        tmp = ckpt_path.with_name('ckpt.pt.tmp')
        try:
            with open(tmp, 'wb') as f:
                torch.save(dict(adaponder=1, config=asdict(model.cfg), model=model.state_dict(), step=step, meta=meta,
                                optimizer=optimizer.state_dict(), train_config=asdict(cfg), ponder_start=ponder_start,
                                wandb_id=wandb_id), f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, ckpt_path)
            return True
        except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError
            print0(f'checkpoint not written ({e}); the one before stays in place')
            tmp.unlink(missing_ok=True)
            return False

    stop_signals = []  # of Ctrl-C and SIGTERM: drop the step, save, leave; a second Ctrl-C leaves at once

    def on_signal(number, frame):
        stop_signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def read_batch(index):
        """Micro-batch number `index` of the run, on its way to the device."""
        x = train_data.train_batch(index, cfg.batch_size)
        return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)
    n_micro = cfg.gradient_accumulation_steps // world  # micro-batches a step of this process
    micro_in_run = step * cfg.gradient_accumulation_steps + rank  # the same numbers for any number of processes
    x = read_batch(micro_in_run)
    # a gate that no token reaches has no gradient, but DDP waits for one, and AdamW must see 0 alike on all processes
    maybe_idle = [p for part in (model.gates, model.ln_ponder) for p in part.parameters()]
    peak = gpu_peak(torch.cuda.get_device_name(device), dtype) if device.type == 'cuda' else None
    phase = None           # what learns: 'all', 'gates' or 'backbone'
    bad_steps = 0          # in a row, whose gradient was not finite
    saved = True           # whether the last checkpoint was written
    seconds = 0.0          # in steps since the last line of the log, which was at logged_step
    logged_step = step

    while step < max_steps:
        # what learns, and how fast
        old_phase, phase = phase, 'all'
        if model.gates and ponder_start <= step < ponder_start + freeze:
            phase = 'gates'
        elif model.gates and step < ponder_start and model.cfg.objective == 'paper':
            phase = 'backbone'  # gates that neither act nor learn yet stay out of the optimizer and of DDP
        if phase != old_phase:
            for name, p in model.named_parameters():
                part = 'gates' if name.startswith('gates.') else 'backbone'
                p.requires_grad_(phase in ('all', part))
            net = model  # let go of the old DDP first: its hooks leave with it
            if world > 1:
                net = DDP(model, gradient_as_bucket_view=True)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps)))
        lr = cfg.learning_rate * min(1.0, (step + 1) / max(1, warmup)) * (cfg.final_lr + (1 - cfg.final_lr) * cosine)
        for group in optimizer.param_groups:
            group['lr'] = lr

        # forward and backward of this process's micro-batches
        started = time.time()
        sums = torch.zeros(4, device=device)  # cross entropy, gates' loss, depth, halted
        for i in range(n_micro):
            stopped_by = torch.tensor(max(stop_signals, default=0))
            if world > 1:  # a signal to one process stops all of them
                dist.all_reduce(stopped_by, dist.ReduceOp.MAX)
            if stopped_by:
                break
            micro_in_step = i * world + rank
            with net.no_sync() if world > 1 and i + 1 < n_micro else nullcontext():
                with autocast():
                    out = net(x[:, :-1], x[:, 1:], execution=cfg.execution, **schedule.at(step, micro_in_step))
                loss = out.loss + 0 * sum(p.sum() for p in maybe_idle)
                (loss / n_micro).backward()
            halted = schedule.halted(step, out.depth, micro_in_step)
            sums += torch.stack([out.ce_loss.detach(), out.ponder_loss.detach(), out.depth.float().mean(), halted])
            micro_in_run += world
            x = read_batch(micro_in_run)  # while the GPU computes
        if stopped_by:
            saved = checkpoint()
            then = f'the same command goes on from {ckpt_path}' if saved else 'not saved'
            print0(f'stopped at step {step}; {then}')
            return 128 + int(stopped_by) if saved else 1  # what waits for a finished run (&&, afterok) must not start

        # update; the numbers of the step come to the CPU in one go
        norm = clip_gradients(model, cfg.grad_clip)
        if world > 1:
            dist.all_reduce(sums)
        sums /= cfg.gradient_accumulation_steps
        loss, gate_loss, depth, halted, norm = torch.cat([sums, norm[None].to(sums)]).tolist()
        if math.isfinite(norm):  # after DDP's sum a bad rank shows on all ranks: they agree without asking
            optimizer.step()
            schedule.update(step, halted=halted)
            bad_steps = 0
        else:
            bad_steps += 1
            print0(f'step {step}: the gradient is not finite, step skipped ({bad_steps} in a row)')
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.time() - started

        # log, evaluate
        record = {}
        if step % cfg.log_interval == 0 or step == max_steps:
            speed = (step - logged_step) * tokens_per_step / seconds
            to_go = timedelta(seconds=round((max_steps - step) * tokens_per_step / speed))
            # FLOPs a token: backward takes twice those of forward, or once for gates alone
            cfg_run = replace(model.cfg, halting=bool(model.gates) and phase != 'backbone')
            depth_run = depth if cfg.execution == 'packed' else model.cfg.n_iter
            flops = cfg_run.inference_flops(depth_run, (cfg.block_size + 1) / 2) * (2 if phase == 'gates' else 3)
            mfu = speed * flops / (peak * world) if peak else None
            print0(f'step {step}: loss {loss:.3f}, depth {depth:.2f}, {speed / 1e3:.1f}k tok/s, '
                   + (f'MFU {mfu:.0%}, ' if mfu else '') + f'{to_go} to go')
            # of each gate, for the tokens that reached it in the last micro-batch: mean value, and share under tau
            gates = [s.detach().float() for index, s, on, h in out.records if on is not None]
            record |= dict(loss=loss, gate_loss=gate_loss, depth=depth, halted=halted, lr=lr, k=schedule.k(step - 1),
                           tau=model.cfg.tau, grad_norm=norm, tokens_per_second=speed, mfu=mfu,
                           gate_mean=[float(s.mean()) for s in gates],
                           gate_under_tau=[float((s < model.cfg.tau).float().mean()) for s in gates])
            seconds, logged_step = 0.0, step
        if (eval_interval and step % eval_interval == 0) or step == max_steps:
            acting = bool(model.gates) and step >= schedule.acting
            result = evaluate(model, val_data, cfg, device, autocast, acting, rank, world)
            print0(f'step {step}: val loss {result["loss"]:.4f}, ppl {result["ppl"]:.3f}, mean depth '
                   f'{result["depth"]:.2f} of {model.cfg.n_iter}, inference FLOPs saved {result["flops_saved"]:.1%}')
            record |= {f'val_{k}': v for k, v in result.items()}
        if record and master:
            record = dict(step=step, tokens=step * tokens_per_step, **record)
            try:
                with open(log_path, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(record) + '\n')
            except OSError as e:
                print0(f'{log_path} not written ({e})')
            if cfg.wandb_log:
                wandb.log(record, step=step)
        if bad_steps == 10:
            print0(f'stopped: no finite gradient in ten steps, try a smaller learning_rate; {ckpt_path} is from before')
            return 1
        if (ckpt_interval and step % ckpt_interval == 0 and not bad_steps) or step == max_steps:
            saved = checkpoint()

    # leave
    for s, handler in handlers.items():
        signal.signal(s, handler)
    print0(f'see how long it thought about each token: python sample.py --ckpt {ckpt_path} --depth\n')
    if master and cfg.sample_tokens:
        print0(closing_sample(model, cfg, val_data, meta, enc))
    return 0 if saved else 1


def end_processes():
    """Leave the process group: its threads, if they outlive the interpreter, may abort and spoil the exit code."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DDP lies in reference cycles and holds the group
        dist.destroy_process_group()


def main(argv=None):
    try:
        cfg = load_config(sys.argv[1:] if argv is None else argv)
        is_master = os.environ.get('RANK', '0') == '0'
        with run_folder(Path(os.path.expanduser(cfg.out_dir))) if is_master else nullcontext():
            code = train(cfg)
    except torch.OutOfMemoryError:
        raise UsageError('the GPU has too little memory: lower batch_size and raise gradient_accumulation_steps, '
                         'or give --remat=True')
    except UsageError:  # all of these are raised before the first step, so no other process waits for this one's
        end_processes()
        raise
    end_processes()
    if code:
        raise SystemExit(code)


if __name__ == '__main__':
    command_line(main)
