"""The gate: what a bundle must prove when it is written, and can prove again on any machine."""
