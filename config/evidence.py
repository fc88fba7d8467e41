# The runs behind the results table: 2 layers of width 128 on bytes, minutes to a quarter of an hour each on a CPU core. See README, Results.
# Baselines: --n_iter=1 (Pythia), --halting=False (PonderLM); the smaller size: --n_layer=1; the other text: --data_dir=data/gcide.
out_dir = 'out/evidence'
data_dir = 'data/stdlib'
block_size = 192
n_layer = 2
n_head = 4
n_embd = 128
n_iter = 4
gate_width = 1
objective = 'saving'
tau = 0.01
explore = 0.1
ponder_start = '30%'
ponder_full = '45%'
k_max = 0.37
batch_size = 16
max_steps = 900
learning_rate = 3e-3
warmup = 20
execution = 'dense'
dtype = 'bfloat16'
eval_interval = '50%'
eval_tokens = 24576
sample_tokens = 0
