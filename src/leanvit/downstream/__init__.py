"""The whole path of the tasks: train, validate, quantize, export, predict."""
