"""From what a user calls a network to the network and its description: one file a kind of source (leanvit.load.api)."""
