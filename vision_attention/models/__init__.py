"""One file per paper: blocks, backbone, `build`, `VARIANTS` and `REFERENCES`.

A model file defines

* `build(*, num_classes, image_size, dtype, param_dtype, <options>) -> base.Parts`,
* `VARIANTS`, name -> `base.Variant`,
* `REFERENCES`, source -> `reference.Reference`, how other people's weights become ours,
* `RESIZE`, pattern of a parameter's path -> function `(table, shape) -> table` for the tables that
  depend on the resolution.

The registry finds it by its being here.
"""
