"""One Linen module per attention family, called `attn(dim=..., num_heads=...)(x, train=...)`."""
