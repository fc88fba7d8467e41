# An adaptive-depth model of Python source, byte by byte: three to eight minutes on two CPU cores.
# Baselines: --n_iter=1 (Pythia), --halting=False (fixed depth; PonderLM with --ponder_norm=False), --feedback=hidden
# (a looped transformer).
out_dir = 'out/tiny'
data_dir = 'data/stdlib'
block_size = 192
n_layer = 2
n_head = 4
n_embd = 128
n_iter = 4
gate_width = 0.125       # in a model this small gates of width 4 would cost as much as they save
objective = 'saving'     # gates predict what an iteration will save; the paper's: objective = 'paper', tau = 1e-4
ponder_norm = True       # what an iteration hands on has a LayerNorm of its own
tau = 0.01               # where the threshold starts, nats
ponder_start = '10%'     # until here gates learn and no token halts
ponder_full = '25%'
k_max = 0.15             # of the iterations 2 .. 4, the share that shall not run
batch_size = 16
max_steps = 750
learning_rate = 3e-3
warmup = 20
dtype = 'bfloat16'       # --dtype=float32 on a CPU that is slow in it; train.py says so
eval_interval = '25%'
eval_tokens = 24576
