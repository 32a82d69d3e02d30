"""Shadows: copies of W_gate and W_up in 1 to 4 bits, from which QRIDA estimates neuron norms.

`build` (rounding weights to levels), `pack` (the bytes that kernels read), `store` (files),
`reference` (what the operators compute, in plain PyTorch).
"""
