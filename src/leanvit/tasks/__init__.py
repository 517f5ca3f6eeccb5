"""Heads for detection, segmentation and pose on any backbone: head, loss, decoding and metric, a file each."""
