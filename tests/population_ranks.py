"""Two gloo processes with one population: ``population_ranks.py RANK FOLDER``, for test_population_sharded.py."""

import sys
from pathlib import Path

import torch
from population_cases import classes_table, every_kind

from mlpkit.population.sharded import ShardedPopulation

SETTINGS = {"loss": "cross_entropy", "metric": "accuracy", "validation": 0.2, "threads": 1, "progress": False}


def members():
    return every_kind(epochs=2)[::3]


def main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    X, y = classes_table()
    trained = ShardedPopulation(members(), X, y, **SETTINGS)
    seen = {"alive": [trained.alive], "steps": trained.train(1)}
    trained.fit()
    seen["alive"].append(trained.alive)
    seen["owners"], seen["own"] = trained.owners, len(trained.local.members)
    seen["curves"] = {index: [score.train_loss, score.metric] for index, score in trained.scores.items()}
    seen["ranking"] = trained.ranking()
    seen["outputs"] = trained.predict(X, ids=[3, 0, 3, 5])
    seen["all"] = trained.predict(X, weights="last")
    seen["exported"] = trained.export(4).state_dict()
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
