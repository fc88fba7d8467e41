# An adaptive-depth model of Python source, byte by byte: three to eight minutes on two CPU cores.
# Baselines: --n_iter=1 (Pythia), --halting=False (fixed depth; PonderLM with --ponder_norm=False), --feedback=hidden (loop transformer).
out_dir = 'out/tiny'
data_dir = 'data/stdlib'
block_size = 192
n_layer = 2
n_head = 4
n_embd = 128
n_iter = 4
gate_width = 0.125       # of the model's width; in one this small the paper's 4 would cost as much as it saves
objective = 'saving'     # gates predict what a pass will save; the paper's: objective = 'paper', tau = 1e-4
ponder_norm = True       # what a pass hands on has a LayerNorm of its own
tau = 0.01               # the first price of a pass, nats
ponder_start = '30%'     # until here gates learn and nobody halts
ponder_full = '45%'
k_max = 0.5              # of the passes 2 .. 4, the share that shall not run
batch_size = 16
max_steps = 750
learning_rate = 3e-3
execution = 'dense'      # on two threads skipping halted tokens gains no time in a model this small
warmup = 20
eval_interval = '25%'
eval_tokens = 24576
