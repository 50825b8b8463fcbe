"""Training: trainer.py is the loop, objectives/ holds the networks with their losses, datasets/ the training data.

networks.py builds DiTs, and sharding.py shards them over ranks. The loop uses optim.py, ema.py, divergence.py,
stop_signal.py, checkpoints.py, resume.py, logging.py, banner.py and sampling.py. planner.py estimates the memory of a
run.
"""
