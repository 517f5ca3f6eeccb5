"""optimize(): a network and images in; the fastest or smallest proven file that holds the accuracy out."""
