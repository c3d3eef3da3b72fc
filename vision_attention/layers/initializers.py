"""PyTorch's default initialisation of linear layers and convolutions."""

from flax import linen as nn

# Kaiming's uniform distribution with a slope of sqrt(5): bounds of fan_in ** -0.5.
TORCH_KERNEL = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
  """Returns the bias's initializer, uniform within `fan_in ** -0.5` of zero."""
  bound = fan_in**-0.5
  uniform = nn.initializers.uniform(2 * bound)
  return lambda key, shape, dtype: uniform(key, shape, dtype) - bound
