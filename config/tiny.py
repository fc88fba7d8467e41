# An adaptive-depth model of Python source, byte by byte: about five minutes on two CPU cores.
out_dir = 'out/tiny'
data_dir = 'data/stdlib'
block_size = 192
n_layer = 3
n_head = 4
n_embd = 96
n_iter = 4
batch_size = 16
max_steps = 850
learning_rate = 3e-3
warmup = 20
eval_interval = '25%'
eval_tokens = 24576
