"""The model's operations. Each file holds a plain reference beside its fast path; tests hold them equal.

Shape letters, used as suffixes of tensor names throughout ops and models:
B batch, S sequence, K block, V vocabulary, H hidden size (Mamba ops: h heads), P head dim, G groups, N state size,
C convolution channels, W taps, Q query heads, J key-value heads, D attention head dim, T key positions,
E experts, I expert width, R flat token rows, A experts per token.
"""
