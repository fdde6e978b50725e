"""What a GPU computes with: kernels and library products put together, chosen by shape and device.

Has the operators of nf4/reference/linear.py and lora_linear.py. No dense copy of a weight outlives
a call: it is written to scratch memory that the next call writes over.
"""
