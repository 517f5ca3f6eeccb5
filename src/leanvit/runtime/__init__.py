"""All that serves a bundle: its folder, the runtimes, predictors of every task, and files of results. No torch."""
