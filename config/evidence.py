# The runs behind assets/notes.md: config/tiny.py's model, 2700 steps, 5 to 20 minutes on a CPU core.
# Baselines: --n_iter=1 (Pythia), --halting=False (fixed depth; PonderLM with --ponder_norm=False), and fewer iterations
# at fixed depth: --halting=False --n_iter=3.
out_dir = 'out/evidence'
data_dir = 'data/stdlib'
block_size = 192
n_layer = 2             # 1 in some of the results
n_head = 4
n_embd = 128
n_iter = 4
gate_width = 0.125
objective = 'saving'
ponder_norm = True
tau = 0.01
ponder_start = '10%'
ponder_full = '25%'
k_max = 0.15            # 0.34 and 0.66 in some of the results
batch_size = 16
max_steps = 2700
learning_rate = 3e-3
warmup = 20
dtype = 'bfloat16'      # --dtype=float32 on a CPU that is slow in it; train.py says so
eval_interval = '50%'
eval_tokens = 24576
sample_tokens = 0
