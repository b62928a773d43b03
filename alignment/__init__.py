"""The floor of the toolkit: dialogues, chat rendering, batches, models, sampling, runs. Knows no stage."""
