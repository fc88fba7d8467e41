# Gates for a trained model of 2.8B: first the gates alone for 1B tokens, with the backbone frozen, then everything.
# --init_from=DIR is a Hugging Face folder of a PonderPythia, whose shape and scale_embeds are used. A vanilla one has
# to learn to ponder first: give --freeze_backbone=0 and a later --ponder_start. --halting=False is fixed depth.
# Data: python prepare_data.py PILE/*.jsonl.zst --tokenizer DIR/tokenizer.json --out data/pile
out_dir = 'out/continue_2.8b'
data_dir = 'data/pile'
init_from = './checkpoints/ponderpythia-2.8b'
block_size = 2048
n_iter = 4
objective = 'paper'
k_max = 0.1
ponder_lambda = 0.1
ponder_start = 0
freeze_backbone = '1B tokens'
ponder_full = '2B tokens'
batch_size = 1  # what a GPU of 80 GB holds, see bench.py plan
gradient_accumulation_steps = 1024  # times batch_size: 1024 sequences a step
max_steps = '26B tokens'
learning_rate = 1.6e-4
eval_interval = '5%'
eval_tokens = 2**21
ckpt_interval = '1%'
remat = True
