"""leanvit on many machines, by Ray (extra `ray`): prediction, searches, sweeps, training, serving. Imports no Ray."""
