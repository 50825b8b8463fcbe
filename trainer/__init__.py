"""Training. trainer.py is the loop, objectives/ holds what it trains and datasets/ what it reads.

networks.py builds the networks, and sharding.py spreads them over ranks. The loop consists of optim.py, ema.py,
divergence.py, stop_signal.py, checkpoints.py, resume.py, logging.py, banner.py and sampling.py. planner.py estimates
the memory of a run.
"""
