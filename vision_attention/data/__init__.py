"""TFDS data sets on disk to batches of numpy arrays, without TensorFlow."""
