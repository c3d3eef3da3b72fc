"""Squeeze-and-excitation as a module that any backbone takes by name."""

from vision_attention.layers import squeeze_excite

MODULES = {'se': squeeze_excite.SqueezeExcite}
