# Shakespeare, byte by byte, in the setting that nanoGPT publishes for a CPU: 10 to 15 minutes on two cores.
# The data: python prepare_data.py shakespeare --val_fraction 0.1 (without a network: a path to the text instead, and
# --out data/shakespeare). Baselines: --n_iter=1 (one iteration, as nanoGPT), --halting=False (fixed depth).
out_dir = 'out/shakespeare'
data_dir = 'data/shakespeare'
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
n_iter = 4
gate_width = 0.125       # in a model this small gates of width 4 would cost as much as they save
objective = 'saving'     # gates predict what an iteration will save
ponder_norm = True       # what an iteration hands on has a LayerNorm of its own
tau = 0.01               # where the threshold starts, nats
ponder_start = '10%'     # until here gates learn and no token halts
ponder_full = '25%'
k_max = 0.15             # of the iterations 2 .. 4, the share that shall not run
batch_size = 12
max_steps = 2000
learning_rate = 1e-3
warmup = 100
eval_interval = '25%'
eval_tokens = 111000     # all of the val split
