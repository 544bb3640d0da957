"""The decoder in Megatron's parameter names.

Legend of shapes: s sequence, b micro-batch, h hidden, n attention heads, g query groups, d kv channels (head dim),
f ffn hidden size, v padded vocabulary, t tensor-parallel size. Shapes are local to the rank.
"""
