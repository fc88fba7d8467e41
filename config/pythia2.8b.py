# Pythia-2.8B's shape from scratch with AdaPonderLM's settings: the paper's objective, 26B Pile tokens, 2M a step.
# Baselines: --n_iter=1 (Pythia), --halting=False (PonderLM), --feedback=hidden (a looped transformer).
# --objective=saving --k_max=0.25 instead leaves out a quarter of the iterations 2 .. 4.
# Data: python prepare_data.py PILE/*.jsonl.zst --tokenizer tokenizer.json --out data/pile
out_dir = 'out/pythia2.8b'
data_dir = 'data/pile'
vocab_size = 50304
block_size = 2048
n_layer = 32
n_head = 32
n_embd = 2560
n_iter = 4
objective = 'paper'
k_max = 0.1
ponder_lambda = 0.1
ponder_start = '50%'  # when gates begin to act, and when in full: our choice, the paper leaves the steps open
ponder_full = '75%'
batch_size = 1  # what a GPU of 80 GB holds, see bench.py plan
gradient_accumulation_steps = 1024  # times batch_size: 1024 sequences a step
max_steps = '26B tokens'
learning_rate = 1.6e-4
eval_interval = '5%'
eval_tokens = 2**21
ckpt_interval = '1%'
remat = True
