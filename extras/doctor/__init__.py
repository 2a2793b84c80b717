"""What this machine can do, what stands in its way, and what an error message means.

checks.py     findings about hardware, versions, memory, hub, cache directory and weights
pairs.py      versions that are known not to go together, with where that was learnt
availability.py  every step with its verdict here, asked for or not
self_test.py  pictures by plain diffusers and by the stack, read back and compared
advice.py     usual failures, how to know them, and the commands that cure them
__main__.py   python -m extras.doctor
"""
