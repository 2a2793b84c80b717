"""Micro-benchmarks at FLUX.1's own shapes: python -m utils.kernel_bench

trial.py      one measurement: inputs, truth, work; and where it runs
timing.py     a trial's seconds: CUDA graphs over inputs larger than the caches
products.py   the transformer's linear layers, in every float8 that there is
attention.py  the transformer's attention by every backend
between.py    what stands between the products: our kernels beside the compiler's
decoder.py    the VAE decoder, its attention and its GroupNorms
text.py       T5 and CLIP
transfers.py  a CUDA graph's inputs and outputs, a picture's way to the host
__main__.py   the command: which cases, rows, the table
"""
