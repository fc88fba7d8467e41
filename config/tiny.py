# An adaptive-depth model of Python source, byte by byte: about five minutes on two CPU cores.
# Baselines: --n_iter=1 (Pythia), --halting=False (PonderLM), --feedback=hidden (loop transformer).
out_dir = 'out/tiny'
data_dir = 'data/stdlib'
block_size = 192
n_layer = 2
n_head = 4
n_embd = 128
n_iter = 4
gate_width = 1           # in a model this small the paper's 4 would cost as much as it saves
ponder_start = '50%'     # sooner, and cross entropy alone closes a gate while the updates are still noise
ponder_full = '75%'
k_max = 0.4
ponder_lambda = 0.1
batch_size = 16
max_steps = 750
learning_rate = 3e-3
execution = 'dense'      # so few tokens halt that skipping them would cost more than it saves
warmup = 20
eval_interval = '25%'
eval_tokens = 24576
